"""Networks that were not written for it become supernets that compute what they did; what cannot is refused."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures_foreign import FOREIGN, BasicBlock, Encoder, Foreign, ResNet, basic, bottleneck
from fixtures_supernet import differs, randomise, worst_in_two_threads
from torch import Tensor, nn

from insertion import groups_of, make_elastic, sort_channels
from operators import LayerSelect, SubnetNorm, WeightSlice
from structure import examine
from subnets import Subnet, SubnetSpace, SupernetError
from supernet import count_macs, count_parameters

EACH = pytest.mark.parametrize("foreign", list(FOREIGN.values()), ids=list(FOREIGN))


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.slow
@EACH
def test_what_the_input_is_shows_in_the_answer(foreign: Foreign) -> None:
    logits = foreign.network()(*foreign.inputs())
    assert differs(logits[0], logits[1]) > 0.01 * float(logits.abs().max())


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "as it was"])
def test_the_largest_subnet_computes_what_the_network_did(foreign: Foreign, sort: bool) -> None:
    network, inputs = foreign.network(), foreign.inputs()
    expected = network(*inputs)
    supernet = make_elastic(network, *inputs, sort=sort).supernet
    torch.testing.assert_close(supernet.actuate(supernet.space.largest)(*inputs), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@EACH
def test_actuated_equals_extracted(foreign: Foreign) -> None:
    inputs, rng = foreign.inputs(), random.Random(0)
    supernet = make_elastic(foreign.network(), *inputs).supernet
    space = supernet.space
    for subnet in (space.smallest, *(space.sample(rng) for _ in range(5))):
        for calibrated in (False, True):
            if calibrated and supernet.operators.subnet_norms:
                supernet.calibrate(subnet, [inputs])
            extracted = supernet.extract(subnet)
            assert not any(isinstance(module, LayerSelect | WeightSlice | SubnetNorm) for module in extracted.modules())
            torch.testing.assert_close(supernet.actuate(subnet)(*inputs), extracted(*inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
@EACH
def test_every_choice_changes_the_answer_and_costs_less(foreign: Foreign) -> None:
    inputs = foreign.inputs()
    supernet = make_elastic(foreign.network(), *inputs).supernet
    space = supernet.space
    largest = supernet.extract(space.largest)
    full = largest(*inputs).detach()
    for stage, (depths, ratios) in enumerate(zip(space.depths, space.expands, strict=True)):
        for field, values in (("depths", depths), ("expands", ratios)):
            if len(values) == 1:
                continue
            changed = list(getattr(space.largest, field))
            changed[stage] = values[0]
            extracted = supernet.extract(
                Subnet(**{"depths": space.largest.depths, "expands": space.largest.expands, field: tuple(changed)})
            )
            assert differs(extracted(*inputs), full) > 1e-4 * float(full.abs().max())
            assert count_parameters(extracted) < count_parameters(largest)
            assert count_macs(extracted, *inputs) < count_macs(largest, *inputs)


@pytest.mark.slow
@EACH
def test_two_subnets_run_at_the_same_time(foreign: Foreign) -> None:
    inputs, rng = foreign.inputs(), random.Random(1)
    supernet = make_elastic(foreign.network(), *inputs).supernet
    chosen = [supernet.space.sample(rng) for _ in range(6)]
    assert worst_in_two_threads(supernet, chosen, inputs, 12) <= 1e-12


@pytest.mark.slow
@EACH
def test_gradients_reach_the_shared_weights(foreign: Foreign) -> None:
    inputs = foreign.inputs()
    supernet = make_elastic(foreign.network(), *inputs).supernet
    supernet.network.requires_grad_(True)
    for subnet in (supernet.space.largest, supernet.space.smallest):
        supernet.for_training(subnet)(*inputs).square().sum().backward()
    sliced = [layer.weight for layer in supernet.operators.weight_slices]
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in sliced)


# ---------------------------------------------------------------------------------------------------- what is found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("basic", [("layer1", 3, 0, 0, {8}), ("layer2", 2, 1, 0, {16})]),
        ("bottleneck", [("layer1", 2, 1, 0, {4}), ("layer2", 2, 1, 0, {8})]),
        ("timm vit", [("blocks", 4, 0, 4, {24, 96})]),
        ("torch encoder", [("encoder.layers", 4, 0, 4, {16, 24})]),
        ("hugging face", [("model.bert.encoder.layer", 4, 0, 4, {16, 24})]),
    ],
)
def test_stages_blocks_and_widths_are_found(name: str, stages: list[tuple[Any, ...]]) -> None:
    foreign = FOREIGN[name]
    found = make_elastic(foreign.network(), *foreign.inputs()).structure
    assert [
        (each.path, each.blocks, each.needed, each.heads, {part.full for part in each.parts.values()})
        for each in found.stages
    ] == stages
    assert found.refused == ()


def test_the_report_names_what_was_found_and_how_much_of_it_is_elastic() -> None:
    report = make_elastic(basic().eval(), torch.randn(2, 3, 16, 16)).structure.report().splitlines()
    assert report == [
        "stage 0: layer1: 3 residual blocks; depth 1 to 3; elastic channels: conv1 (8)",
        "stage 1: layer2: 2 residual blocks; depth 1 to 2; elastic channels: conv1 (16)",
    ]
    report = make_elastic(Encoder().eval(), *FOREIGN["torch encoder"].inputs()).structure.report().splitlines()
    assert report == [
        "stage 0: encoder.layers: 4 encoder layers, 4 heads each; depth 1 to 4; "
        "elastic channels: self_attn.query (16), linear1 (24)"
    ]


def test_encoders_leave_out_every_other_layer_or_the_last() -> None:
    inputs = FOREIGN["torch encoder"].inputs()
    for rule, kept in (("every-other", [0, 2]), ("first", [0, 1])):
        supernet = make_elastic(Encoder().eval(), *inputs, depth_rule=rule).supernet
        layers = list(supernet.network.get_submodule("encoder.layers").children())
        blocks = supernet.operators.layer_selects[0].blocks_of(Subnet((2,), (1.0,)))
        assert [layers.index(block) for block in blocks] == kept


def test_three_heads_give_ratios_of_thirds() -> None:
    class Three(Encoder):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(18, 3, 24, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, None, enable_nested_tensor=False)
            self.embedding, self.head = nn.Embedding(30, 18), nn.Linear(18, 5)

    supernet = make_elastic(Three().eval(), torch.zeros(2, 4, dtype=torch.long)).supernet
    assert supernet.space.expands == ((0.33, 0.67, 1.0),)
    extracted = supernet.extract(Subnet((1,), (0.33,)))
    assert extracted.get_submodule("encoder.layers.0.self_attn.query").out_features == 6


def test_a_given_space_is_used_and_one_that_cannot_be_is_refused() -> None:
    for space in (
        SubnetSpace(((1, 3), (2,)), ((0.5, 1.0), (0.125, 1.0))),
        SubnetSpace(((1, 2), (1,)), ((0.25, 0.5), (0.125,))),
    ):
        assert make_elastic(basic().eval(), torch.randn(2, 3, 16, 16), space=space).supernet.space == space
    for wrong, message in (
        (SubnetSpace(((1, 4), (2,)), ((1.0,), (1.0,))), r"layer1: depths must be 1 to 3, not \[1, 4\]"),
        (SubnetSpace(((1, 3),), ((1.0,),)), "the network has 2 stages, but the space has 1"),
        (SubnetSpace(((1, 3), (2,)), ((0.01, 1.0), (1.0,))), r"layer1.0.conv1: expand ratios .* of 8 leave \[0, 8\]"),
        (SubnetSpace(((1, 3), (2,)), ((0.5, 0.51), (1.0,))), r"layer1.0.conv1: expand ratios .* leave \[4, 4\]"),
    ):
        with pytest.raises(SupernetError, match=message):
            make_elastic(basic().eval(), torch.randn(2, 3, 16, 16), space=wrong)


def test_blocks_that_change_the_shape_in_the_middle_keep_all_before_them() -> None:
    one = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16))
    network = ResNet(one, nn.Sequential(BasicBlock(16, 16)), channels=16).eval()
    assert make_elastic(network, torch.randn(1, 3, 16, 16)).supernet.space.depths == ((2, 3), (1,))


# -------------------------------------------------------------------------------------------------- what matters most


@pytest.mark.parametrize("name", ["basic", "torch encoder"])
def test_sorted_channels_come_by_what_reads_them(name: str) -> None:
    foreign = FOREIGN[name]
    network = foreign.network()
    inserted = make_elastic(network, *foreign.inputs())
    groups = groups_of(inserted.structure.elastic())
    assert groups
    for group in groups:
        weight = torch.stack([network.get_submodule(path).weight.abs() for path in group.readers]).sum(0)  # type: ignore[union-attr]
        importance = weight.transpose(0, 1).flatten(1).sum(1).view(-1, group.unit).sum(1)
        assert torch.equal(importance, importance.sort(descending=True).values)


@pytest.mark.slow
def test_a_network_that_uses_half_of_its_channels_loses_nothing_when_sorted() -> None:
    generator, inputs = torch.Generator().manual_seed(3), FOREIGN["basic"].inputs()
    network = FOREIGN["basic"].network()
    for block in (*network.get_submodule("layer1").children(), *network.get_submodule("layer2").children()):
        weight = block.get_submodule("conv2").weight
        unused = torch.randperm(weight.shape[1], generator=generator)[: weight.shape[1] // 2]  # type: ignore[index,union-attr,operator]
        weight[:, unused] = 0  # type: ignore[index,operator]
    expected, half = network(*inputs), SubnetSpace(((3,), (2,)), ((0.5, 1.0),) * 2)
    lost = [
        differs(supernet.actuate(supernet.space.smallest)(*inputs), expected)
        for supernet in (make_elastic(copy.deepcopy(network), *inputs, space=half, sort=sort).supernet
                         for sort in (True, False))
    ]  # fmt: skip
    assert lost[0] < 1e-10 < 1e-3 < lost[1]


def test_sorting_again_changes_nothing() -> None:
    network = basic().eval()
    elastic = examine(network, torch.randn(1, 3, 16, 16)).elastic()
    sort_channels(network, elastic)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sort_channels(network, elastic)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ------------------------------------------------------------------------------------------------------ what is refused


class Branching(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Conv(nn.Conv2d):
    pass


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def with_blocks(make: Callable[[int], nn.Module]) -> nn.Module:
    stages = [nn.Sequential(*(make(8) for _ in range(2))) for _ in range(2)]
    return ResNet(*stages, channels=8)


def changed(path: str, module: Callable[[], nn.Module]) -> nn.Module:
    network = with_blocks(lambda channels: BasicBlock(channels, channels))
    for stage, number in itertools.product((1, 2), (0, 1)):
        setattr(network.get_submodule(f"layer{stage}.{number}"), path, module())
    return network


def tied() -> nn.Module:
    network = with_blocks(lambda channels: BasicBlock(channels, channels))
    shared = network.get_submodule("layer1.0.conv1").weight
    for stage, number in itertools.product((1, 2), (0, 1)):
        network.get_submodule(f"layer{stage}.{number}.conv1").weight = shared  # type: ignore[assignment]
    return network


def repeated() -> nn.Module:
    block = BasicBlock(8, 8)
    return with_blocks(lambda channels: block)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: bottleneck(groups=2), "layer1.0.conv2: grouped"),
        (lambda: with_blocks(lambda channels: Branching(channels, channels)), "control flow that depends on data"),
        (lambda: changed("conv1", lambda: Conv(8, 8, 3, padding=1)), "the layer type test_insertion.Conv is unknown"),
        (lambda: changed("bn1", lambda: NormAndActivation(8)), "NormAndActivation is unknown"),
        (tied, "layer1.0.conv1.weight is tied: it is layer1.1.conv1.weight too"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), "no sequence of residual blocks"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), "no sequence of residual blocks or encoder layers"),
    ],
)
def test_residual_networks_that_cannot_be_elastic_are_refused(
    network: Callable[[], nn.Module], message: str
) -> None:
    made = network().eval()
    with pytest.raises(SupernetError) as caught:
        make_elastic(made, torch.randn(2, 3, 16, 16))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blocks_that_run_twice_are_refused() -> None:
    with pytest.raises(SupernetError, match=r"tied|runs \d times"):
        make_elastic(repeated().eval(), torch.randn(2, 3, 16, 16))


class Layer(nn.Module):
    """An encoder layer whose ways can be changed."""

    def __init__(self, way: Callable[[Layer, Tensor], Tensor], heads: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.num_heads, self.way = heads, way

    def attended(self, x: Tensor) -> Tensor:
        query, key, value = (
            each(x).unflatten(2, (-1, 4)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        return x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def plain(layer: Layer, x: Tensor) -> Tensor:
    x = layer.attended(x)
    return x + layer.second(F.gelu(layer.first(x)))


def mixing(layer: Layer, x: Tensor) -> Tensor:
    x = layer.attended(x)
    return x + layer.second(layer.first(x).softmax(-1))


def asking(layer: Layer, x: Tensor) -> Tensor:
    return plain(layer, x) if bool((x > -100).any()) else x


def longer(layer: Layer, x: Tensor) -> Tensor:
    return layer.second(layer.first(plain(layer, x)))


def fixed_heads(layer: Layer, x: Tensor) -> Tensor:
    query, key, value = (
        each(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for each in (layer.query, layer.key, layer.value)
    )
    return layer.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)) + layer.second(
        layer.first(x)
    )


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def stack(way: Callable[[Layer, Tensor], Tensor], **more: Any) -> nn.Module:
    return Stack(*(Layer(way, **more) for _ in range(2)))


def sharing() -> nn.Module:
    layer = Layer(plain)
    network = Stack(layer, Layer(plain))
    network.layers[1].first.weight = layer.first.weight  # type: ignore[union-attr,assignment]
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: stack(mixing), "layers.0.second: what is computed before it mixes channels"),
        (lambda: stack(asking), "block 'layers.0' has control flow that depends on data"),
        (lambda: stack(longer), "more linear layers are expected, but these ran: query, key"),
        (lambda: stack(plain, heads=3), "queries, keys and values must have 3 heads of one size"),
        (lambda: stack(fixed_heads), "the network does not run with fewer channels or heads"),
        (sharing, "layers.0.first.weight is tied: it is layers.1.first.weight too"),
    ],
)
def test_encoders_that_cannot_be_elastic_are_refused(network: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(SupernetError) as caught:
        make_elastic(network().eval(), torch.randn(2, 6, 16))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_two_stages_one_can_be_refused_and_is_said() -> None:
    network = with_blocks(lambda channels: BasicBlock(channels, channels))
    network.layer2 = nn.Sequential(Branching(8, 8), Branching(8, 8))
    structure = make_elastic(randomise(network).eval(), torch.randn(2, 3, 16, 16)).structure
    assert [stage.path for stage in structure.stages] == ["layer1"]
    assert "left as it is: block 'layer2.0' has control flow" in structure.report()


def test_an_example_that_does_not_fit_is_told() -> None:
    with pytest.raises(SupernetError, match="the example does not fit the network"):
        examine(basic(), torch.randn(2, 4, 16, 16))
    with pytest.raises(SupernetError, match="depth rule must be every-other or first"):
        examine(basic(), torch.randn(2, 3, 16, 16), depth_rule="last")
