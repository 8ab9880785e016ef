"""SubNetAct: operators go in by themselves, and an actuated subnet computes what its standalone network would."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from fixtures_supernet import SPACE, STAGES, images, randomise, tiny_servable, worst_in_two_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import supernets
from supernet import (
    IllegalSubnetError,
    LayerSelect,
    NormSettings,
    Recent,
    Subnet,
    SubnetNorm,
    SubnetSpace,
    Supernet,
    SupernetError,
    WeightSlice,
    count_macs,
    count_parameters,
    insert_operators,
)
from supernets.resnet import BasicBlock, ResNet

RESNET = {"channels": 3, "widths": (8, 8, 16), "depths": (2, 2, 2), "classes": 5, "stem_stride": 1}
ONE_STAGE = SubnetSpace(((1, 2),), ((0.5, 1.0),))
MIDDLE = Subnet((1, 2, 1), (0.5, 0.25, 1.0))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(supernets.build("resnet", RESNET)[0], seed)


def double_supernet() -> Supernet:
    supernet = Supernet(resnet().double(), STAGES, SPACE)
    supernet.network.requires_grad_(False).eval()
    return supernet


# ------------------------------------------------------------------------------------------------------------- subnets

ratios = st.one_of(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]), st.floats(1e-4, 1.0))
subnets = st.integers(1, 6).flatmap(
    lambda stages: st.builds(
        Subnet,
        st.lists(st.integers(1, 99), min_size=stages, max_size=stages).map(tuple),
        st.lists(ratios, min_size=stages, max_size=stages).map(tuple),
    )
)


@given(subnets)
def test_names_name_one_subnet(subnet: Subnet) -> None:
    assert Subnet.parse(subnet.name) == subnet


def test_one_ratio_for_all_stages_is_written_once() -> None:
    assert Subnet((2, 2, 1), (0.5, 0.5, 0.5)).name == "d2-2-1-e0.5"
    assert Subnet((2, 2, 1), (0.5, 1.0, 0.25)).name == "d2-2-1-e0.5-1-0.25"
    assert Subnet.parse("d2-2-1-e0.5") == Subnet((2, 2, 1), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "text", ["", "largest", "d-e1", "d1", "d1-e", "d1-e1\n", "d1e1", "d-1-e1", "d1-e1e0", "D1-e1", "d" + "9" * 5000]
)
def test_other_text_is_no_subnet_name(text: str) -> None:
    with pytest.raises(IllegalSubnetError, match=r"is no subnet name: expected the form d2-2-1-e0\.5"):
        Subnet.parse(text)


@pytest.mark.parametrize(
    ("text", "canonical"), [("d01-e1", "d1-e1"), ("d1-1-e0.50", "d1-1-e0.5"), ("d1-1-e1-1", "d1-1-e1")]
)
def test_each_subnet_has_one_name(text: str, canonical: str) -> None:
    with pytest.raises(IllegalSubnetError, match=f"expected '{canonical}'"):
        Subnet.parse(text)


@given(st.text(max_size=30))
def test_parsing_text_gives_a_subnet_or_the_error(text: str) -> None:
    with contextlib.suppress(IllegalSubnetError):
        assert Subnet.parse(text).name == text


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet((1, 3, 1), (1.0,) * 3), "depth 3 of stage 1 is not in [1, 2]"),
        (Subnet((1, 1, 0), (1.0,) * 3), "depth 0 of stage 2 is not in [1, 2]"),
        (Subnet((1, 1, 1), (1.0, 1.0, 0.3)), "expand ratio 0.3 of stage 2 is not in [0.25, 0.5, 1.0]"),
        (Subnet((1, 1), (1.0, 1.0)), "this supernet has 3 stages"),
        (Subnet((1, 1, 1), (1.0, 0.5)), "this supernet has 3 stages"),
    ],
)
def test_illegal_subnets_list_what_is_legal(subnet: Subnet, message: str) -> None:
    supernet = tiny_servable(()).supernet
    for use in (SPACE.check, supernet.actuate, supernet.extract, supernet.for_training):
        with pytest.raises(IllegalSubnetError) as caught:
            use(subnet)
        assert message in str(caught.value)
    with pytest.raises(IllegalSubnetError):
        supernet.calibrate(subnet, [images(2)])


@pytest.mark.parametrize(
    ("depths", "expands"),
    [
        ((), ()),
        (((1, 2),), ()),
        (((),), ((1.0,),)),
        (((2, 1),), ((1.0,),)),
        (((1, 1),), ((1.0,),)),
        (((0, 1),), ((1.0,),)),
        (((1.5,),), ((1.0,),)),
        ((("1",),), ((1.0,),)),
        (((True,),), ((1.0,),)),
        (((1,),), ((1.0, 0.5),)),
        (((1,),), ((0.0, 0.5),)),
        (((1,),), ((0.5, 2.0),)),
        (((1,),), ((float("nan"),),)),
        (((1,),), ((None,),)),
    ],
)
def test_impossible_spaces_are_refused(
    depths: tuple[tuple[int, ...], ...], expands: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(SupernetError, match="stage"):
        SubnetSpace(depths, expands)


def test_a_space_holds_every_combination_once() -> None:
    everything = list(SPACE)
    assert len(everything) == len(SPACE) == len({subnet.name for subnet in everything}) == 216
    assert {SPACE.largest, SPACE.smallest} <= set(everything)
    assert SPACE.largest == Subnet((2, 2, 2), (1.0, 1.0, 1.0))
    assert SPACE.smallest == Subnet((1, 1, 1), (0.25, 0.25, 0.25))


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_samples_and_mutations_are_legal(seed: int, probability: float) -> None:
    rng = random.Random(seed)
    sample = SPACE.sample(rng)
    mutated = SPACE.mutate(sample, rng, probability)
    SPACE.check(sample)
    SPACE.check(mutated)
    assert probability or mutated == sample


# ----------------------------------------------------------------------------------------------------------- insertion


def test_operators_are_found_by_structure() -> None:
    network = resnet()
    plain = [module for stage in STAGES for module in network.get_submodule(stage).modules()]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in plain)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    operators = insert_operators(network, STAGES, SPACE)
    assert [len(operators.layer_selects), len(operators.weight_slices), len(operators.subnet_norms)] == [
        3,
        convolutions,
        norms,
    ]
    everything = [*operators.layer_selects, *operators.weight_slices, *operators.subnet_norms]
    assert operators.slots == len({operator.slot for operator in everything}) == 3 + convolutions + norms
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(LayerSelect) == 3
    assert kinds.count(nn.BatchNorm2d) == 0
    assert kinds.count(nn.Conv2d) == 1, "the stem keeps its convolution"


def test_only_inner_convolutions_get_elastic_outputs() -> None:
    network = resnet()
    insert_operators(network, STAGES, SPACE)
    elastic = {
        name for name, module in network.named_modules() if isinstance(module, WeightSlice) and module.elastic_outputs
    }
    assert elastic == {f"stages.{stage}.{block}.conv1" for stage in range(3) for block in range(2)}


def test_parameter_names_and_values_stay_as_they_were() -> None:
    network, untouched = resnet(), resnet().state_dict()
    insert_operators(network, STAGES, SPACE)
    after = network.state_dict()
    assert list(after) == list(untouched)
    assert all(torch.equal(after[name], untouched[name]) for name in untouched)
    network.load_state_dict(resnet(seed=1).state_dict())


class Block(nn.Module):
    """A residual block whose way through is given as a function of itself."""

    def __init__(self, way: Callable[[Block, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        for name, part in parts.items():
            self.add_module(name, part)
        self._way = way

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self._way(self, x) + x)


class OneStage(nn.Module):
    """A stem and one stage of blocks of eight channels."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).mean((2, 3))


def plain_way(block: Block, x: Tensor) -> Tensor:
    return block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))


def branching_way(block: Block, x: Tensor) -> Tensor:
    return plain_way(block, x) if x.sum() > 0 else x


def measuring_way(block: Block, x: Tensor) -> Tensor:
    return plain_way(block, x) if len(x) > 1 else x


def repeating_way(block: Block, x: Tensor) -> Tensor:
    return plain_way(block, plain_way(block, x))


def reshaping_way(block: Block, x: Tensor) -> Tensor:
    return block.conv2(block.conv1(x).flip(1))


def group_norm_way(block: Block, x: Tensor) -> Tensor:
    return block.conv2(block.between(block.conv1(x)))


def blocks(way: Callable[[Block, Tensor], Tensor] = plain_way, **parts: nn.Module) -> list[nn.Module]:
    return [Block(way, **parts) for _ in range(2)]


grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
blind = nn.BatchNorm2d(8, track_running_stats=False)
shared = Block(plain_way)


@pytest.mark.parametrize(
    ("network", "stages", "space", "message"),
    [
        (OneStage(*blocks()), ["stem"], ONE_STAGE, "stage 'stem' is a Conv2d; it must be an nn.Sequential of blocks"),
        (OneStage(*blocks()), ["tail"], ONE_STAGE, "the network has no stage 'tail'; its parts are: stem, body"),
        (OneStage(*blocks()), ["body", "body"], ONE_STAGE, "2 stages named, but the space has 1"),
        (OneStage(*blocks()), ["body"], SubnetSpace(((3,),), ((1,),)), "stage 'body' has 2 blocks, but depths up to 3"),
        (OneStage(*blocks()), ["body"], SubnetSpace(((1,),), ((0.3,),)), "body.0.conv1: expand ratio 0.3 of 8 chan"),
        (OneStage(*blocks()), ["body"], SubnetSpace(((1,),), ((0.0001, 1.0),)), "is not a whole number"),
        (OneStage(*blocks(conv2=grouped)), ["body"], ONE_STAGE, "body.0.conv2: grouped"),
        (OneStage(*blocks(conv1=mirrored)), ["body"], ONE_STAGE, "body.0.conv1: grouped and non-zero-padded"),
        (OneStage(*blocks(bn1=blind)), ["body"], ONE_STAGE, "keeps no running statistics"),
        (OneStage(*blocks(branching_way)), ["body"], ONE_STAGE, "block 'body.0' has control flow that depends on data"),
        (OneStage(*blocks(measuring_way)), ["body"], ONE_STAGE, "block 'body.0' has control flow that depends on data"),
        (OneStage(*blocks(repeating_way)), ["body"], ONE_STAGE, "body.0.conv1 is used more than once"),
        (OneStage(shared, shared), ["body"], ONE_STAGE, "block 'body.1' shares layers with another one"),
        (OneStage(*blocks(reshaping_way)), ["body"], ONE_STAGE, "stage 'body': expand ratios [0.5, 1.0], but no"),
        (OneStage(*blocks(group_norm_way, between=nn.GroupNorm(2, 8))), ["body"], ONE_STAGE, "no convolution that"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_elastic_are_refused(
    network: nn.Module, stages: Sequence[str], space: SubnetSpace, message: str
) -> None:
    with pytest.raises(SupernetError) as caught:
        insert_operators(network, stages, space)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_operators_are_not_inserted_twice() -> None:
    network = resnet()
    insert_operators(network, STAGES, SPACE)
    with pytest.raises(SupernetError, match=r"stage 'stages\.0' is a LayerSelect"):
        insert_operators(network, STAGES, SPACE)


@pytest.mark.slow
def test_without_ratios_any_block_has_elastic_depth() -> None:
    torch.manual_seed(0)
    network = randomise(OneStage(*blocks(reshaping_way))).eval()
    x = images(2)
    expected = network(x)
    supernet = Supernet(network, ["body"], SubnetSpace(((1, 2),), ((1.0,),)))
    torch.testing.assert_close(supernet.actuate(Subnet((2,), (1.0,)))(x), expected)
    assert not torch.allclose(supernet.actuate(Subnet((1,), (1.0,)))(x), expected)


# -------------------------------------------------------------------------------- networks that are written differently


class Bottleneck(nn.Module):
    """Three convolutions, named as in torchvision."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class BottleneckNet(nn.Module):
    """ResNet-50 in small: bottleneck blocks, layer1 and layer2, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Bottleneck(8, 4, 16, 1, self._down(8, 16, 1)), Bottleneck(16, 4, 16, 1, None))
        self.layer2 = nn.Sequential(Bottleneck(16, 8, 32, 2, self._down(16, 32, 2)), Bottleneck(32, 8, 32, 1, None))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    @staticmethod
    def _down(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the shortcut takes the activated input where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.act = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs), nn.SiLU()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(self.norm_a(x))
        way = self.second(F.dropout(self.act(self.norm_b(self.first(active))), 0.1, self.training))
        return way + (x if self.project is None else self.project(active))


class PreActivationNet(nn.Module):
    """Two stages of pre-activation blocks and a norm at the end; one stage is also held under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(PreActivation(8, 8, 1), PreActivation(8, 8, 1))
        self.two = nn.Sequential(PreActivation(8, 16, 2), PreActivation(16, 16, 1))
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.two(self.one(self.stem(x))))).mean((2, 3)))


TWO_STAGES = SubnetSpace(((1, 2), (1, 2)), ((0.5, 1.0), (0.25, 0.5, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "stages", "elastic"),
    [
        (BottleneckNet, ("layer1", "layer2"), {"conv1", "conv2"}),
        (PreActivationNet, ("one", "two"), {"first"}),
    ],
)
def test_other_residual_networks_become_elastic_too(
    make: Callable[[], nn.Module], stages: Sequence[str], elastic: set[str]
) -> None:
    torch.manual_seed(0)
    network = randomise(make()).double().eval()
    x = images(3, dtype=torch.float64)
    expected = network(x)
    supernet = Supernet(network, stages, TWO_STAGES)
    narrowed = {
        name.rpartition(".")[2] for name, module in network.named_modules() if getattr(module, "elastic_outputs", False)
    }
    assert narrowed == elastic
    torch.testing.assert_close(supernet.actuate(TWO_STAGES.largest)(x), expected)
    for subnet in TWO_STAGES:
        supernet.calibrate(subnet, [x])
        network.eval()
        torch.testing.assert_close(supernet.actuate(subnet)(x), supernet.extract(subnet)(x), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- actuation


def narrow_by_hand(full: nn.Module, subnet: Subnet) -> nn.Module:
    """The subnet as a network that is built narrow and gets the leading part of every tensor; knows no operator."""
    narrow = ResNet(**RESNET)
    for stage, (depth, ratio) in enumerate(zip(subnet.depths, subnet.expands, strict=True)):
        kept = []
        for block in list(narrow.stages[stage])[:depth]:
            inputs, width = block.conv1.in_channels, block.conv2.out_channels
            kept.append(BasicBlock(inputs, int(width * ratio), width, block.conv1.stride[0]))
        narrow.stages[stage] = nn.Sequential(*kept)
    values = full.state_dict()
    narrow.load_state_dict(
        {name: values[name][tuple(map(slice, small.shape))] for name, small in narrow.state_dict().items()}
    )
    return narrow.double().eval()


def test_an_actuated_subnet_uses_the_leading_channels_and_first_blocks() -> None:
    full, supernet, x = resnet().double(), double_supernet(), images(4, dtype=torch.float64)
    for subnet in (SPACE.largest, SPACE.smallest, MIDDLE):
        torch.testing.assert_close(supernet.actuate(subnet)(x), narrow_by_hand(full, subnet)(x), rtol=0, atol=1e-12)


def test_biases_are_cut_as_their_weights_are() -> None:
    operators = insert_operators(randomise(OneStage(*blocks())), ["body"], ONE_STAGE)
    conv1, conv2 = operators.weight_slices[:2]
    for layer, outputs, inputs in ((conv1, 4, 8), (conv2, 8, 4)):
        weight, bias = layer.slices(Subnet((1,), (0.5,)))
        assert torch.equal(weight, layer.weight[:outputs, :inputs])
        assert torch.equal(bias, layer.bias[:outputs])


@pytest.mark.slow
def test_actuated_equals_extracted_for_fifty_random_subnets() -> None:
    supernet, x = double_supernet(), images(4, dtype=torch.float64)
    for subnet in random.Random(0).sample(list(SPACE), 50):
        supernet.calibrate(subnet, [images(6, seed=1, dtype=torch.float64)])
        extracted = supernet.extract(subnet)
        assert not any(isinstance(module, LayerSelect | WeightSlice | SubnetNorm) for module in extracted.modules())
        torch.testing.assert_close(supernet.actuate(subnet)(x), extracted(x), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_subnets_run_at_the_same_time() -> None:
    chosen = random.Random(1).sample(list(SPACE), 8)
    assert worst_in_two_threads(double_supernet(), chosen, (images(4, dtype=torch.float64),), 150) <= 1e-12


def test_actuate_there_and_back_is_identity() -> None:
    supernet, x = tiny_servable().supernet, images(4)
    first = supernet.actuate(SPACE.largest)
    before = first(x)
    other = supernet.actuate(SPACE.smallest)(x)
    assert supernet.actuate(SPACE.largest) is first
    assert torch.equal(first(x), before)
    assert not torch.allclose(other, before)


def test_a_failed_run_leaves_no_subnet_actuated() -> None:
    supernet, x = tiny_servable().supernet, images(2)
    with pytest.raises(RuntimeError, match="channels"):
        supernet.actuate(SPACE.smallest)(x[:, :2])
    with pytest.raises(LookupError):
        supernet.network(x)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_actuation_copies_nothing() -> None:
    supernet = tiny_servable().supernet
    weights = {storage(value) for value in supernet.network.state_dict().values()}
    statistics_of = {subnet: {storage(flat)} for subnet, flat in supernet.statistics.items()}
    for subnet in SPACE:
        used = set()
        for setting in supernet.actuate(subnet).settings:
            parts = setting[:4] if isinstance(setting, NormSettings) else setting or ()
            used |= {storage(part) for part in parts if isinstance(part, Tensor)}
        assert used <= weights | statistics_of.get(subnet, set())


def test_statistics_of_a_subnet_are_small() -> None:
    supernet = tiny_servable().supernet
    largest = supernet.statistics[SPACE.largest].numel()
    assert largest == 2 * sum(norm.running_mean.numel() for norm in supernet.operators.subnet_norms)
    assert supernet.statistics[SPACE.smallest].numel() < largest < count_parameters(supernet.network) / 10


def test_changed_weights_show_in_what_was_actuated() -> None:
    supernet, x = double_supernet(), images(2, dtype=torch.float64)
    actuated = supernet.actuate(MIDDLE)
    actuated(x)
    with torch.no_grad():
        for parameter in supernet.network.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(actuated(x), supernet.extract(MIDDLE)(x), rtol=0, atol=1e-12)


def test_moving_forgets_views_and_keeps_results() -> None:
    supernet, x = tiny_servable().supernet, images(2)
    before = supernet.actuate(SPACE.smallest)
    expected = before(x)
    supernet.to(torch.device("cpu"))
    after = supernet.actuate(SPACE.smallest)
    assert after is not before
    assert supernet.device == torch.device("cpu")
    torch.testing.assert_close(after(x), expected)
    supernet.to(torch.device("meta"))
    settings = supernet.actuate(SPACE.smallest).settings
    moved = [part for setting in settings if setting for part in setting if isinstance(part, Tensor)]
    assert {part.device.type for part in moved} == {"meta"}


def test_weights_are_kept_in_another_dtype_and_norms_as_precise_as_they_are() -> None:
    supernet, x = tiny_servable().supernet, images(2)
    expected = supernet.actuate(SPACE.smallest)(x)
    assert supernet.dtype == torch.float32
    supernet.to(torch.device("cpu"), torch.bfloat16)
    assert supernet.dtype == supernet.network.classifier.weight.dtype == torch.bfloat16
    for norm in supernet.operators.subnet_norms:
        assert norm.running_var.dtype == norm.weight.dtype == torch.float32
    assert {flat.dtype for flat in supernet.statistics.values()} == {torch.float32}
    logits = supernet.actuate(SPACE.smallest)(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1)


def test_an_extracted_network_owns_its_weights() -> None:
    supernet, x = double_supernet(), images(2, dtype=torch.float64)
    extracted = supernet.extract(MIDDLE)
    expected = extracted(x)
    shared_storage = {storage(value) for value in supernet.network.state_dict().values()}
    assert not shared_storage & {storage(value) for value in extracted.state_dict().values()}
    with torch.no_grad():
        for parameter in supernet.network.parameters():
            parameter.zero_()
    assert torch.equal(extracted(x), expected)


def test_extraction_follows_modules_that_are_held_twice() -> None:
    network = resnet()
    network.first_stage = network.stages[0]
    network.listed = [network.classifier]
    supernet = Supernet(network, STAGES, SPACE)
    extracted = supernet.extract(SPACE.smallest)
    assert extracted.stages[0] is not network.stages[0]
    assert extracted.listed[0] is extracted.classifier


@pytest.mark.slow
def test_switching_among_five_hundred_subnets_takes_less_than_fifty_microseconds() -> None:
    space = SubnetSpace(((1, 2),) * 3, ((0.125, 0.25, 0.5, 1.0),) * 3)
    supernet = Supernet(resnet(), STAGES, space)
    everything = list(space)
    assert len(everything) >= 500
    for subnet in everything:
        supernet.actuate(subnet)
    taken_s = []
    for subnet in random.Random(0).choices(everything, k=5000):
        started_s = time.perf_counter()
        supernet.actuate(subnet)
        taken_s.append(time.perf_counter() - started_s)
    assert statistics.median(taken_s) < 50e-6


# --------------------------------------------------------------------------------------------------------- calibration


def in_training_mode(supernet: Supernet, subnet: Subnet) -> nn.Module:
    """The extracted subnet, its batch norms set to average what they see from scratch."""
    extracted = supernet.extract(subnet)
    for module in extracted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    return extracted.train()


def norms_of(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize("subnet", [SPACE.largest, SPACE.smallest, MIDDLE])
def test_calibrated_statistics_are_those_of_batch_norm_in_training(subnet: Subnet) -> None:
    supernet, x = double_supernet(), images(16, dtype=torch.float64)
    trained = in_training_mode(supernet, subnet)
    counts: dict[str, int] = {}
    for name, module in norms_of(trained).items():
        module.register_forward_hook(lambda _, __, y, name=name: counts.update({name: y.numel() // y.shape[1]}))
    trained(x)
    supernet.calibrate(subnet, [x])
    calibrated = norms_of(supernet.extract(subnet))
    assert calibrated.keys() == norms_of(trained).keys()
    for name, module in norms_of(trained).items():
        biased = module.running_var * (counts[name] - 1) / counts[name]
        torch.testing.assert_close(calibrated[name].running_mean, module.running_mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(calibrated[name].running_var, biased, rtol=1e-9, atol=1e-12)


def test_batches_count_by_their_size() -> None:
    supernet, batches = double_supernet(), list(images(8, dtype=torch.float64).split([5, 2, 1]))
    trained = in_training_mode(supernet, MIDDLE)
    seen: dict[str, list[Tensor]] = {name: [] for name in norms_of(trained)}
    for name, module in norms_of(trained).items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].transpose(0, 1).flatten(1)))
    for batch in batches:
        trained(batch)
    supernet.calibrate(MIDDLE, batches)
    for name, module in norms_of(supernet.extract(MIDDLE)).items():
        activations = torch.cat(seen[name], 1)
        torch.testing.assert_close(module.running_mean, activations.mean(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(module.running_var, activations.var(1, correction=0), rtol=1e-9, atol=1e-12)


def test_small_variances_beside_large_means_survive_single_precision() -> None:
    torch.manual_seed(0)
    network = OneStage(*blocks())
    with torch.no_grad():
        network.body[0].conv1.bias.fill_(1000.0)
    supernet = Supernet(network, ["body"], ONE_STAGE)
    supernet.calibrate(ONE_STAGE.smallest, [images(4), images(4, seed=1)])
    single = norms_of(supernet.extract(ONE_STAGE.smallest))["body.0.bn1"].running_var
    again = Supernet(network_like(network).double(), ["body"], ONE_STAGE)
    again.calibrate(ONE_STAGE.smallest, [images(4).double(), images(4, seed=1).double()])
    double = norms_of(again.extract(ONE_STAGE.smallest))["body.0.bn1"].running_var
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0)


def network_like(network: nn.Module) -> nn.Module:
    fresh = OneStage(*blocks())
    fresh.load_state_dict(network.state_dict())
    return fresh


def test_statistics_of_another_subnet_give_another_result() -> None:
    supernet, x = tiny_servable().supernet, images(4)
    right = supernet.actuate(SPACE.smallest)(x)
    supernet.set_statistics(SPACE.smallest, supernet.statistics[SPACE.smallest].flip(0).abs())
    assert not torch.allclose(supernet.actuate(SPACE.smallest)(x), right, rtol=0.05)


def test_uncalibrated_subnets_say_so() -> None:
    supernet = tiny_servable().supernet
    assert supernet.actuate(SPACE.smallest).calibrated
    before = supernet.actuate(MIDDLE)
    assert not before.calibrated
    supernet.calibrate(MIDDLE, [images(4)])
    after = supernet.actuate(MIDDLE)
    assert after.calibrated
    assert not torch.allclose(before(images(4)), after(images(4)))


def test_calibration_needs_data() -> None:
    with pytest.raises(SupernetError, match="calibration passed no data"):
        tiny_servable(()).supernet.calibrate(MIDDLE, [])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda flat: flat[:-1], "have shape"),
        (lambda flat: flat[None], "have shape"),
        (lambda flat: flat * float("nan"), "not finite"),
        (lambda flat: -flat.abs() - 1, "negative variances"),
    ],
)
def test_impossible_statistics_are_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    supernet = tiny_servable().supernet
    with pytest.raises(SupernetError, match=message):
        supernet.set_statistics(SPACE.smallest, spoil(supernet.statistics[SPACE.smallest]))


# ------------------------------------------------------------------------------------------------------------ training


def test_gradients_reach_the_used_slices_only_and_are_those_of_the_standalone_network() -> None:
    supernet, x = Supernet(resnet().double(), STAGES, SPACE), images(6, dtype=torch.float64)
    plain = supernet.extract(MIDDLE).train()
    plain(x).square().sum().backward()
    supernet.for_training(MIDDLE)(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in supernet.network.named_parameters():
        if name not in expected:
            assert parameter.grad is None, f"{name} is not part of the subnet"
            continue
        used = tuple(map(slice, expected[name].shape))
        torch.testing.assert_close(parameter.grad[used], expected[name], rtol=1e-9, atol=1e-9)
        outside = parameter.grad.clone()
        outside[used] = 0
        assert not outside.any(), f"{name}: gradient outside the slice"


@pytest.mark.slow
def test_training_steps_do_not_hold_on_to_old_graphs() -> None:
    supernet, x = Supernet(resnet(), STAGES, SPACE), images(4)
    optimizer = torch.optim.SGD(supernet.network.parameters(), lr=0.1)
    for subnet in (SPACE.largest, MIDDLE, SPACE.largest):
        supernet.for_training(subnet)(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert supernet.for_training(MIDDLE)(x).requires_grad


def test_packed_statistics_that_are_held_stay_unpacked_however_many_others_run() -> None:
    subnets = list(SPACE)[: Recent.MOST + 2]
    supernet = tiny_servable(tuple(subnets)).supernet
    supernet.pack_statistics()
    held, passing = supernet.actuate(subnets[0]), supernet.actuate(subnets[1])
    held.hold()
    before = held.settings[:], passing.settings[:]
    logits = held(images(2))
    for subnet in subnets[1:]:
        supernet.actuate(subnet)(images(1))
    held.hold()
    assert all(now is then for now, then in zip(held.settings, before[0], strict=True))
    assert torch.equal(held(images(2)), logits)
    passing.hold()
    assert not all(now is then for now, then in zip(passing.settings, before[1], strict=True))


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize(
    ("network", "shape", "macs", "parameters"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 5, 5), 25 * 8 * 27, 8 * 27 + 8),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), (4, 8, 8), 16 * 8 * 36, 8 * 36),
        (nn.Conv2d(4, 8, 1, groups=2, bias=False), (4, 2, 2), 4 * 8 * 2, 16),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2), 60, 65),
        (nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU()), (1, 3, 3), 4 * 2 * 4, 8 + 4),
    ],
)
def test_counts_agree_with_hand_counts(network: nn.Module, shape: tuple[int, ...], macs: int, parameters: int) -> None:
    assert count_macs(network.eval(), shape) == macs
    assert count_parameters(network) == parameters


def test_half_the_inner_channels_are_half_the_block() -> None:
    supernet = double_supernet()
    block = {ratio: supernet.extract(Subnet((2, 2, 2), (ratio,) * 3)).stages[0][1].float() for ratio in (0.5, 1.0)}
    assert count_macs(block[1.0], (8, 6, 6)) == 2 * count_macs(block[0.5], (8, 6, 6)) == 2 * 36 * 8 * 8 * 9
