"""Every family: an actuated subnet is the extracted one, its parts are those of the papers, and it can be stored."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures_families import BERT, MOBILENET, RESNET, TINY, Tiny
from fixtures_supernet import INPUT, differs, worst_in_two_threads
from torch import Tensor, nn

import supernets
from executables import CannotFuseError, Executable, ExecutableCache, trace
from servable import InputSpec, TokenSpec, create_servable, load_servable, save_servable
from supernet import (
    IllegalSubnetError,
    LayerSelect,
    SubnetNorm,
    Supernet,
    SupernetError,
    WeightSlice,
    count_macs,
    count_parameters,
)
from supernets import bert, ofa
from supernets.bert import BertSubnet
from supernets.ofa_mobilenet import KernelConv2d, OfaMobileNetSubnet
from supernets.ofa_resnet import OfaResNetSpace, OfaResNetSubnet

FAMILIES = pytest.mark.parametrize("tiny", list(TINY.values()), ids=list(TINY))


# --------------------------------------------------------------------------------------------------------- all of them


@FAMILIES
def test_what_the_input_is_shows_in_the_logits(tiny: Tiny) -> None:
    logits = tiny.supernet().actuate(tiny.space.largest)(*tiny.inputs(2))
    assert differs(logits[0], logits[1]) > 0.01 * float(logits.detach().abs().max())


@FAMILIES
def test_parameter_names_stay_as_they_were(tiny: Tiny) -> None:
    plain = tiny.network().state_dict()
    assert list(tiny.supernet().network.state_dict()) == list(plain)


@pytest.mark.slow
@FAMILIES
def test_the_largest_subnet_is_the_plain_network(tiny: Tiny) -> None:
    inputs = tiny.inputs()
    expected = tiny.network().double().eval()(*inputs)
    supernet = tiny.supernet()
    torch.testing.assert_close(supernet.actuate(tiny.space.largest)(*inputs), expected, rtol=0, atol=1e-12)
    assert count_parameters(supernet.extract(tiny.space.largest)) == sum(
        value.numel() for name, value in tiny.network().named_parameters() if not name.endswith("_matrix")
    )


@pytest.mark.slow
@FAMILIES
def test_actuated_equals_extracted(tiny: Tiny) -> None:
    supernet, inputs, rng = tiny.supernet(), tiny.inputs(), random.Random(0)
    for subnet in (tiny.space.smallest, *(tiny.space.sample(rng) for _ in range(5))):
        for calibrated in (False, True):
            if calibrated and tiny is not BERT:
                supernet.calibrate(subnet, [inputs])
            extracted = supernet.extract(subnet)
            operators = LayerSelect | WeightSlice | SubnetNorm | KernelConv2d
            assert not any(isinstance(module, operators) for module in extracted.modules())
            torch.testing.assert_close(supernet.actuate(subnet)(*inputs), extracted(*inputs), rtol=0, atol=1e-12)


@FAMILIES
def test_the_smallest_subnet_has_fewer_weights_and_computes_less(tiny: Tiny) -> None:
    supernet, inputs = tiny.supernet(), tiny.inputs(1)
    smallest, largest = (supernet.extract(each) for each in (tiny.space.smallest, tiny.space.largest))
    assert count_parameters(smallest) < count_parameters(largest)
    assert count_macs(smallest, *inputs) < count_macs(largest, *inputs)


@pytest.mark.slow
@FAMILIES
def test_two_subnets_run_at_the_same_time(tiny: Tiny) -> None:
    rng = random.Random(1)
    chosen = [tiny.space.sample(rng) for _ in range(6)]
    assert worst_in_two_threads(tiny.supernet(), chosen, tiny.inputs(), 20) <= 1e-12


@FAMILIES
def test_gradients_are_those_of_the_standalone_network(tiny: Tiny) -> None:
    inputs, subnet = tiny.inputs(4), tiny.space.smallest
    network = tiny.network().double().train()
    supernet = Supernet(network, supernets.build(tiny.family, tiny.architecture)[1], tiny.space)
    plain = supernet.extract(subnet).train()
    plain(*inputs).square().sum().backward()
    supernet.for_training(subnet)(*inputs).square().sum().backward()
    assert any(parameter.grad is not None for parameter in network.parameters())
    whole = dict(network.named_parameters())
    last, first = list(plain.named_parameters())[-2], next(iter(plain.named_parameters()))
    for name, parameter in (first, last):  # what lies between shows in the first
        used = tuple(map(slice, parameter.shape))
        assert parameter.grad is not None
        assert whole[name].grad is not None
        torch.testing.assert_close(whole[name].grad[used], parameter.grad, rtol=1e-8, atol=1e-8)


def spec_of(tiny: Tiny) -> InputSpec | TokenSpec:
    if tiny is BERT:
        return TokenSpec(length=8, vocabulary=30)
    return InputSpec(height=36, width=36, channels=3, mean=INPUT.mean, std=INPUT.std)


@pytest.mark.slow
@FAMILIES
def test_a_servable_of_the_family_comes_back(tiny: Tiny, tmp_path: Path) -> None:
    classes = [str(number) for number in range(tiny.architecture["classes"])]
    servable = create_servable(
        name="tiny", family=tiny.family, architecture=tiny.architecture, space=tiny.space, input=spec_of(tiny),
        classes=classes,
    )  # fmt: skip
    inputs = tuple(each.float() if each.is_floating_point() else each for each in tiny.inputs())
    subnet = tiny.space.sample(random.Random(3))
    if tiny is not BERT:
        servable.supernet.calibrate(subnet, [inputs])
        servable.supernet.calibrate(tiny.space.smallest, [inputs])
        servable.supernet.pack_statistics()
    save_servable(servable, tmp_path)
    loaded = load_servable(tmp_path)
    assert (loaded.supernet.space, loaded.input, loaded.family) == (tiny.space, spec_of(tiny), tiny.family)
    assert loaded.supernet.statistics.keys() == servable.supernet.statistics.keys()
    servable.supernet.network.load_state_dict(loaded.supernet.network.state_dict())
    servable.supernet.forget()
    servable.supernet.network.eval()
    assert torch.equal(loaded.supernet.actuate(subnet)(*inputs), servable.supernet.actuate(subnet)(*inputs))


@pytest.mark.parametrize(
    ("tiny", "subnet", "message"),
    [
        (RESNET, OfaResNetSubnet((3, 1, 1, 1), (0.5,) * 6, (1.0,) * 6, (1,)), "depth 3 of stage 0 is not in [1, 2]"),
        (RESNET, OfaResNetSubnet((1, 1, 1, 1), (0.5,) * 5, (1.0,) * 6, (1,)), "this supernet has 4 expand ratios"),
        (RESNET, OfaResNetSubnet((1, 1, 1, 1), (0.5, 0.5, 0.3, 0.5), (1.0,) * 6, (1,)), "0.3 of block 2 is not in"),
        (RESNET, OfaResNetSubnet((1, 1, 1, 1), (0.5,) * 4, (1.0,) * 5 + (0.8,), (1,)), "width 0.8 of part 5 is not in"),
        (RESNET, OfaResNetSubnet((1, 1, 1, 1), (0.5,) * 4, (1.0,) * 6, (2,)), "stem unit 2 is not in [0, 1]"),
        (MOBILENET, OfaMobileNetSubnet((1,) * 5, (9, 7, 7, 7, 7), (6.0,) * 5), "kernel size 9 of block 0 is not in"),
        (MOBILENET, OfaMobileNetSubnet((1,) * 5, (7,) * 5, (6, 6, 6, 6, 5)), "expand ratio 5 of block 4 is not in"),
        (BERT, BertSubnet((0.3,), (1.0,)), "width 0.3 is not in [0.25, 0.5, 0.75, 1.0]"),
        (BERT, BertSubnet((1.0,), (0.6,)), "depth 0.6 is not in [0.5, 0.75, 1.0]"),
        (BERT, RESNET.space.largest, "expected BertSubnet"),
    ],
)
def test_illegal_subnets_list_what_is_legal(tiny: Tiny, subnet: Any, message: str) -> None:
    with pytest.raises(IllegalSubnetError) as caught:
        tiny.supernet().actuate(subnet)
    assert message in str(caught.value)


def larger_ratio(space: OfaResNetSpace) -> OfaResNetSpace:
    return OfaResNetSpace(space.depths, ((0.25, 1.0),) * 6, space.widths)


def deeper(space: OfaResNetSpace) -> OfaResNetSpace:
    return OfaResNetSpace(((1, 3), *space.depths[1:]), ((0.5,),) * 7, space.widths)


def three_stages(space: OfaResNetSpace) -> OfaResNetSpace:
    return OfaResNetSpace(space.depths[:3], ((0.5,),) * 5, space.widths[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (larger_ratio, "blocks.0.conv1.conv: d2-2-1-1-e1-w1-s1 needs 32x16 channels of 16x16"),
        (deeper, "stage 0 has 2 blocks, but depths up to 3"),
        (three_stages, "the network has 4 stages, but the space has 3"),
    ],
)
def test_spaces_that_the_network_does_not_hold_are_refused(change: Callable[[Any], Any], message: str) -> None:
    network, elastic = supernets.build(RESNET.family, RESNET.architecture)
    with pytest.raises(SupernetError) as caught:
        Supernet(network, elastic, change(RESNET.space))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("ofa_resnet", {"widths": (1, 2)}, "widths"),
        ("ofa_resnet", {"depths": (1, 2, 3, "4")}, "depths"),
        ("ofa_resnet", {"expand": 2}, "expand"),
        ("ofa_resnet", {"classes": 0}, "classes"),
        ("ofa_mobilenet", {"kernel": 4}, "kernel"),
        ("ofa_mobilenet", {"width": "wide"}, "width"),
        ("ofa_mobilenet", {"channels": (8,) * 3}, "channels"),
        ("bert", {"heads": 5}, "heads"),
        ("bert", {"layers": 0}, "layers"),
        ("bert", {"vocabulary": None}, "vocabulary"),
    ],
)
def test_impossible_architectures_are_refused_naming_the_field(
    family: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"architecture does not fit family '{family}': .*{named}"):
        supernets.build(family, TINY[family].architecture | change)


# ---------------------------------------------------------------------------------------------------------- OFA ResNet


def test_official_names_are_found() -> None:
    known = RESNET.network().state_dict()
    for official, own in {
        "input_stem.0.conv.conv.weight": "input_stem.0.conv.weight",
        "input_stem.1.conv.conv.conv.weight": "input_stem.1.conv.conv.weight",
        "input_stem.1.conv.conv.weight": "input_stem.1.conv.conv.weight",
        "input_stem.1.conv.bn.bn.running_var": "input_stem.1.conv.bn.running_var",
        "blocks.0.downsample.conv.conv.weight": "blocks.0.downsample.conv.weight",
        "blocks.1.conv3.bn.bn.num_batches_tracked": "blocks.1.conv3.bn.num_batches_tracked",
        "classifier.linear.linear.bias": "classifier.linear.bias",
        "blocks.99.conv3.bn.bn.weight": "blocks.99.conv3.bn.bn.weight",
    }.items():
        assert ofa.own_name(official, known) == own
        assert own in known or own == official


@pytest.mark.parametrize(
    ("channels", "rounded"), [(3, 8), (19.2, 24), (52, 56), (51.2, 48), (64, 64), (41.6, 40), (14, 16), (20, 24)]
)
def test_channels_are_rounded_to_eights_but_never_far_down(channels: float, rounded: int) -> None:
    assert ofa.round_channels(channels) == rounded


def test_the_stem_unit_is_skipped_or_kept_as_told() -> None:
    supernet = RESNET.supernet()
    extracted = {stem: supernet.extract(RESNET.space.parse(f"d2-2-1-1-e0.5-w1-s{stem}")) for stem in (0, 1)}
    assert [len(extracted[stem].get_submodule("input_stem")) for stem in (0, 1)] == [2, 3]
    assert "input_stem.1.conv.weight" in extracted[0].state_dict(), "numbered anew"
    assert "input_stem.1.conv.conv.weight" in extracted[1].state_dict()


def test_dropped_blocks_are_the_last_of_their_stage() -> None:
    supernet = RESNET.supernet()
    blocks = list(supernet.network.get_submodule("blocks").children())
    select = next(each for each in supernet.operators.layer_selects if len(each) > 3)
    kept = select.blocks_of(RESNET.space.parse("d1-2-1-1-e0.5-w1-s1"))
    assert [blocks.index(block) for block in kept] == [0, 2, 3, 4, 5]


def test_the_shortcut_averages_what_is_inside_the_border() -> None:
    block = RESNET.network().get_submodule("blocks.2")
    x = torch.ones(1, 32, 5, 5)
    assert block.get_submodule("downsample.pool")(x).shape[-1] == 3
    assert torch.equal(block.get_submodule("downsample.pool")(x), torch.ones(1, 32, 3, 3))


# ------------------------------------------------------------------------------------------------------- OFA MobileNet


def kernel_by_hand(layer: Any, size: int) -> Tensor:
    filters = []
    for stored in layer.weight[:, 0]:
        five = (layer.get_parameter("7to5_matrix") @ stored[1:-1, 1:-1].reshape(25)).reshape(5, 5)
        three = (layer.get_parameter("5to3_matrix") @ five[1:-1, 1:-1].reshape(9)).reshape(3, 3)
        filters.append({7: stored, 5: five, 3: three}[size])
    return torch.stack(filters)[:, None]


@pytest.mark.parametrize("size", [3, 5, 7])
def test_smaller_kernels_are_made_from_the_centre_of_larger_ones(size: int) -> None:
    supernet = MOBILENET.supernet()
    subnet = MOBILENET.space.parse(f"d1-1-1-1-1-k{size}-e3")
    where = "blocks.1.conv.depth_conv.conv"
    stored, extracted = (each.get_submodule(where) for each in (supernet.network, supernet.extract(subnet)))
    assert isinstance(extracted, nn.Conv2d)
    assert (extracted.groups, extracted.padding) == (24, (size // 2, size // 2))
    torch.testing.assert_close(extracted.weight, kernel_by_hand(stored, size)[:24], rtol=0, atol=1e-12)


def test_kernels_follow_weights_that_were_trained() -> None:
    supernet, inputs = MOBILENET.supernet(), MOBILENET.inputs()
    smallest = MOBILENET.space.smallest
    before = supernet.actuate(smallest)(*inputs)
    supernet.for_training(smallest)
    with torch.no_grad():
        supernet.network.get_submodule("blocks.1.conv.depth_conv.conv").weight.mul_(2)
    after = supernet.actuate(smallest)(*inputs)
    assert differs(before, after) > 1e-3
    assert differs(after, supernet.extract(smallest)(*inputs)) <= 1e-12


def test_squeeze_excite_follows_the_active_channels() -> None:
    extracted = MOBILENET.supernet().extract(MOBILENET.space.parse("d1-2-1-1-1-k7-e6-3-3-3-3-3"))
    squeezes = [
        (module.in_channels, module.out_channels)
        for name, module in extracted.named_modules()
        if name.endswith("fc.reduce") and isinstance(module, nn.Conv2d)
    ]
    assert squeezes[0] == (24, 8)
    assert all(inner == ofa.round_channels(outer // 4) for outer, inner in squeezes)


def test_old_checkpoint_names_are_found() -> None:
    known = MOBILENET.network().state_dict()
    for official, own in {
        "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.conv.weight": (
            "blocks.1.conv.inverted_bottleneck.conv.weight"
        ),
        "blocks.1.conv.depth_conv.conv.7to5_matrix": "blocks.1.conv.depth_conv.conv.7to5_matrix",
        "blocks.1.mobile_inverted_conv.depth_conv.conv.conv.weight": "blocks.1.conv.depth_conv.conv.weight",
        "blocks.0.mobile_inverted_conv.depth_conv.conv.weight": "blocks.0.conv.depth_conv.conv.weight",
        "first_conv.bn.weight": "first_conv.bn.weight",
    }.items():
        assert ofa.own_name(official, known) == own
        assert own in known


# ---------------------------------------------------------------------------------------------------------------- BERT


@pytest.mark.parametrize(
    ("layers", "depth", "kept"),
    [
        (4, 0.5, [0, 2]),
        (4, 0.75, [0, 1, 2]),
        (4, 1.0, [0, 1, 2, 3]),
        (4, 0.625, [0, 1]),
        (12, 0.5, [0, 2, 4, 6, 8, 10]),
        (12, 0.75, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (12, 0.625, [0, 1, 3, 4, 6, 8, 9, 11]),
    ],
)
def test_depth_leaves_out_every_other_layer(layers: int, depth: float, kept: list[int]) -> None:
    _, elastic = supernets.build("bert", BERT.architecture | {"layers": layers})
    assert not isinstance(elastic, tuple)
    assert list(elastic.layers["bert.encoder.layer"](BertSubnet((1.0,), (depth,)))) == kept  # type: ignore[union-attr]


def test_width_is_heads_and_the_neurons_that_go_with_them() -> None:
    layer = BERT.supernet().extract(BERT.space.parse("w0.75-d0.5")).get_submodule("bert.encoder.layer.1")
    sizes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert sizes["attention.self.query.weight"] == (12, 16)
    assert sizes["attention.self.value.bias"] == (12,)
    assert sizes["attention.output.dense.weight"] == (16, 12)
    assert sizes["attention.output.dense.bias"] == (16,)
    assert sizes["intermediate.dense.weight"] == (18, 16)
    assert sizes["output.dense.weight"] == (16, 18)


def test_padding_does_not_change_the_answer() -> None:
    ids, mask, types = BERT.inputs()
    run = BERT.supernet().actuate(BERT.space.parse("w0.5-d0.75"))
    alone = run(ids[1:2, :6], mask[1:2, :6], types[1:2, :6])
    assert differs(run(ids, mask, types)[1:2], alone) < 1e-9
    assert differs(run(ids), run(ids, torch.ones_like(ids), torch.zeros_like(ids))) == 0


def test_attention_is_what_the_paper_writes() -> None:
    (ids, mask, types), network = BERT.inputs(), BERT.network().double().eval()
    first = network.get_submodule("bert.encoder.layer.0.attention.self")
    x = network.get_submodule("bert.embeddings")(ids, types)
    added = (1.0 - mask[:, None, None, :].double()) * -10000.0
    query, key, value = (
        F.linear(x, layer.weight, layer.bias).view(3, 7, 4, 4).transpose(1, 2)
        for layer in (first.query, first.key, first.value)
    )
    context = ((query @ key.transpose(2, 3)) / 2 + added).softmax(3) @ value
    torch.testing.assert_close(first(x, added), context.transpose(1, 2).reshape(3, 7, 16), rtol=0, atol=1e-12)


def test_names_of_old_and_bare_checkpoints_are_found() -> None:
    known = BERT.network().state_dict()
    assert bert.own_name("embeddings.LayerNorm.gamma", known) == "bert.embeddings.LayerNorm.weight"
    assert bert.own_name("bert.pooler.dense.bias", known) == "bert.pooler.dense.bias"
    assert bert.own_name("classifier.weight", known) == "classifier.weight"
    assert bert.own_name("cls.predictions.bias", known) == "cls.predictions.bias"


# ------------------------------------------------------------------------------------------------- statistics, serving


@pytest.mark.slow
def test_packed_statistics_change_the_logits_less_than_calibration_on_other_images() -> None:
    supernet, inputs, rng = RESNET.supernet(), RESNET.inputs(8), random.Random(2)
    chosen = [RESNET.space.sample(rng) for _ in range(40)]  # more than are held unpacked
    exact, other = {}, {}
    for subnet, logits, seed in [*((each, other, 1) for each in chosen), *((each, exact, 0) for each in chosen)]:
        supernet.calibrate(subnet, [RESNET.inputs(8, seed)])
        logits[subnet] = supernet.actuate(subnet)(*inputs)
    single = sum(flat.numel() * 4 for flat in supernet.statistics.values())
    supernet.pack_statistics()
    assert sum(flat.nbytes for flat in supernet.statistics.values()) < 0.4 * single, "small norms: a quarter else"
    packed = {subnet: supernet.actuate(subnet)(*inputs) for subnet in chosen + chosen}
    for subnet in chosen:
        assert differs(packed[subnet], supernet.extract(subnet)(*inputs)) <= 1e-12
    assert mean_difference(packed, exact) < 0.5 * mean_difference(other, exact)


def mean_difference(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> float:
    return float(torch.stack([(first[each] - second[each]).detach().abs().mean() for each in first]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [RESNET, MOBILENET], ids=["ofa_resnet", "ofa_mobilenet"])
def test_executables_compute_the_family(tiny: Tiny) -> None:
    supernet = Supernet(
        tiny.network().requires_grad_(False).eval(), supernets.build(tiny.family, tiny.architecture)[1], tiny.space
    )
    supernet.to(torch.device("cpu"))
    x = tiny.inputs()[0].float().to(memory_format=torch.channels_last)
    for subnet in (tiny.space.smallest, tiny.space.largest, tiny.space.sample(random.Random(5))):
        actuated = supernet.actuate(subnet)
        executable = trace(actuated)
        expected = actuated(x)
        for run, batch in itertools.product((executable, executable.packed()), (1, 3)):
            torch.testing.assert_close(run(x[:batch]), expected[:batch], rtol=1e-3, atol=1e-4)


def test_a_network_of_several_inputs_runs_as_it_is() -> None:
    actuated = BERT.supernet().actuate(BERT.space.smallest)
    with pytest.raises(CannotFuseError, match="several inputs"):
        trace(actuated)
    cache = ExecutableCache(1e9)
    cache.add("smallest", actuated)
    cache.fill()
    assert cache.get("smallest") is actuated
    assert not isinstance(cache.get("smallest"), Executable)
