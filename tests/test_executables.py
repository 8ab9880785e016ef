"""An executable computes what the actuated subnet computes, whatever the network; the cache keeps its budget."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures_supernet import INPUT, SPACE, STAGES, images, randomise, tiny_servable
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import supernets
from config import Config, ConfigError
from engine import CHUNK, Engine
from executables import CannotFuseError, Executable, ExecutableCache, trace
from programs import Program
from steps import Convolution, Convolve, ConvolveAndAdd, ConvolveNarrowly, Larder, Multiply, Step
from supernet import ActuatedSubnet, Subnet, SubnetSpace, Supernet

BATCHES = (1, 2, 5, 17)
VARIANTS = {
    "plain": {"stem_stride": 1},
    "strided": {"stem_stride": 2},
    "pooled": {"stem_stride": 1, "stem_width": 4, "pooled": True},
}


def ready(network: nn.Module, stages: tuple[str, ...], space: SubnetSpace) -> Supernet:
    """A supernet with random weights that give values of both signs, as the engine has it: for inference."""
    network = randomise(network).requires_grad_(False).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean -= 1
    supernet = Supernet(network, stages, space)
    supernet.to(torch.device("cpu"))
    return supernet


def resnet(**architecture: object) -> Supernet:
    sizes = {"channels": 3, "widths": (8, 8, 16), "depths": (2, 2, 2), "classes": 5}
    return ready(supernets.build("resnet", sizes | architecture)[0], STAGES, SPACE)


class Net(nn.Module):
    """A stem and one stage of a single block, whose whole output counts."""

    def __init__(self, block: nn.Module, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stage = nn.Sequential(block)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.stage(self.stem(x))
        return outputs


class Block(nn.Module):
    """Layers for a block of any form; ``form`` computes it from them and the input."""

    def __init__(self, form: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.point1, self.point2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1)
        self.same, self.swish = nn.Conv2d(8, 8, 3, padding="same"), nn.Hardswish(inplace=True)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


FIXED = SubnetSpace(((1,),), ((1.0,),))


def actuated(form: Callable[[Block, Tensor], Tensor], stem: nn.Module | None = None) -> ActuatedSubnet:
    """The only subnet of a network whose block has this form."""
    torch.manual_seed(0)
    return ready(Net(Block(form), stem), ("stage",), FIXED).actuate(FIXED.largest)


def assert_equal(run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], count: int) -> None:
    """Both give the same logits, to rounding, and leave their inputs alone."""
    for layout in (torch.channels_last, torch.contiguous_format):
        x = images(count, seed=count).contiguous(memory_format=layout)
        before = x.clone()
        with torch.inference_mode():
            expected, given = reference(x.clone()), run(x)
        assert torch.equal(x, before)
        assert given.shape == expected.shape
        assert float(expected.abs().max()) > 0.1, "there is something to compare"
        assert float((given - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def assert_executable(subnet: ActuatedSubnet) -> None:
    """Shared and packed, at every batch size, as the actuated subnet."""
    shared = trace(subnet)
    for run in (shared, shared.packed()):
        for count in BATCHES:
            assert_equal(run, subnet, count)


def steps(executable: Executable) -> list[Step]:
    return list(executable.steps)


# ------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_those_of_the_actuated_subnet(variant: str, seed: int) -> None:
    supernet = resnet(**VARIANTS[variant])
    subnet = SPACE.sample(random.Random(seed))
    supernet.calibrate(subnet, [images(16, seed=9)])
    assert supernet.actuate(subnet).calibrated
    assert_executable(supernet.actuate(subnet))


def test_outputs_of_the_tiny_servable_are_those_of_the_actuated_subnets() -> None:
    supernet = tiny_servable().supernet
    for subnet in (SPACE.smallest, SPACE.largest):
        executable = trace(supernet.actuate(subnet))
        for run in (executable, executable.packed()):
            assert_equal(run, supernet.actuate(subnet), 3)


@pytest.mark.parametrize("subnet", [SPACE.smallest, SPACE.largest])
def test_nothing_of_a_resnet_is_left_as_a_module(subnet: Subnet) -> None:
    nodes = trace(resnet(pooled=True).actuate(subnet))._network.graph.nodes
    left = [node.target for node in nodes if node.op == "call_module" or node.target in (F.relu, torch.add)]
    assert left == []


def test_norms_with_negative_weights_keep_their_sign() -> None:
    supernet = resnet()
    for norm in supernet.operators.subnet_norms:
        with torch.no_grad():
            norm.weight[::2] *= -1
            norm.weight[1] = 0
    assert_executable(supernet.actuate(SPACE.largest))


FORMS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "bias": lambda b, x: b.norm1(b.conv1(x)),
    "bias and no norm": lambda b, x: b.relu(b.conv1(x)),
    "pointwise bias": lambda b, x: b.point2(b.norm1(b.point1(x))),
    "pointwise and relu": lambda b, x: F.relu(b.norm1(b.point1(x))),
    "padding by name": lambda b, x: F.relu(b.norm1(b.same(x)) + x),
    "residual": lambda b, x: F.relu(b.norm2(b.conv2(b.relu(b.norm1(b.conv1(x))))) + x),
    "residual first": lambda b, x: F.relu(x + b.norm2(b.conv2(b.relu(b.norm1(b.conv1(x)))))),
    "residual in place": lambda b, x: _added_in_place(b.norm2(b.conv2(b.relu(b.norm1(b.conv1(x))))), x),
    "residual that the convolution reads": lambda b, x: F.relu(b.norm1(b.conv1(x)) + x),
    "residual used afterwards": lambda b, x: F.relu(b.norm2(b.conv2(b.relu(b.conv1(x)))) + x) * x,
    "residual of which a view is used afterwards": lambda b, x: _with_view(b, x),
    "residual that a later convolution reads": lambda b, x: _with_branch(b, x),
    "input that is overwritten by a function": lambda b, x: _written_to(b, x, lambda x: F.relu(x, inplace=True)),
    "input that is overwritten by a method": lambda b, x: _written_to(b, x, lambda x: x.mul_(2)),
    "input that is overwritten by a module": lambda b, x: _written_to(b, x, b.relu),
    "residual of another branch": lambda b, x: b.norm1(b.conv1(x)) + b.norm2(b.conv2(x)),
    "residual of a pointwise branch": lambda b, x: F.relu(b.norm1(b.conv1(x)) + b.norm2(b.point2(x))),
    "residual of two pointwise branches": lambda b, x: F.relu(b.norm1(b.point1(x)) + b.norm2(b.point2(x))),
    "residual of a pooled branch": lambda b, x: F.relu(b.pool(x) + b.norm1(b.conv1(x))),
    "residual of a pointwise branch alone": lambda b, x: F.relu(b.norm1(b.conv1(b.pool(x))) + b.norm2(b.point2(x))),
    "pointwise branch first": lambda b, x: F.relu(b.norm2(b.point2(x)) + b.norm1(b.conv1(b.pool(x)))),
    "pointwise branch with a bias": lambda b, x: b.conv1(b.pool(x)) + b.point1(x),
    "pointwise branch across": lambda b, x: F.relu(b.norm1(b.conv1(x)) + b.point1(b.pool(x).transpose(2, 3))),
    "pointwise branch that is used again": lambda b, x: _used_twice(b.norm1(b.conv1(x)), b.norm2(b.point2(x))),
    "pointwise branch that the convolution reads": lambda b, x: _chained(b, b.norm2(b.point2(x))),
    "pointwise branch of what is overwritten": lambda b, x: _overwritten_branch(b, x - 0.5),
    "residual of one pixel": lambda b, x: F.relu(b.norm1(b.conv1(x)) + b.point1(x.mean((2, 3), keepdim=True))),
    "residual larger than the result": lambda b, x: F.relu(b.norm1(b.conv1(x.mean((2, 3), keepdim=True))) + x),
    "residual that is a weight": lambda b, x: F.relu(b.norm1(b.conv1(x)) + b.scale),
    "residual that is a slice": lambda b, x: F.relu(b.conv2(b.conv1(x)) + torch.cat([x, -x], 1)[:, 4:12]),
    "residual across": lambda b, x: F.relu(b.conv2(b.relu(b.conv1(x))) + x.transpose(2, 3)),
    "constant": lambda b, x: F.relu(b.norm1(b.conv1(x)) + 0.5),
    "weighted sum": lambda b, x: F.relu(torch.add(b.norm1(b.conv1(x)), x, alpha=2)),
    "same tensor twice": lambda b, x: F.relu(_twice(b.norm1(b.conv1(x)))),
    "norm first": lambda b, x: b.conv2(b.relu(b.norm2(b.conv1(b.relu(b.norm1(x)))))) + x,
    "norm after pooling": lambda b, x: F.relu(b.norm1(b.pool(b.conv1(x)))),
    "norm after a norm": lambda b, x: F.relu(b.norm2(b.norm1(b.conv1(x)))),
    "two norms of one convolution": lambda b, x: _two_norms(b, b.conv1(x)),
    "relu of what is used again": lambda b, x: _used_again(b.norm1(b.conv1(x))),
    "mean of pixels": lambda b, x: b.conv1(x) + x.mean((2, 3))[..., None, None],
    "mean of pixels by a function": lambda b, x: b.conv1(x) + torch.mean(b.conv2(x), (2, 3))[..., None, None],
    "mean of pixels from the end": lambda b, x: b.conv1(x) + x.mean((-1, -2))[..., None, None],
    "mean of the last two of five dimensions": lambda b, x: x + b.conv1(x).unflatten(1, (2, 4)).mean((-1, -2)).mean(),
    "mean of the last two of three dimensions": lambda b, x: x + b.conv1(x).flatten(2).mean((-1, -2)).mean(),
    "mean of pixels that lie far apart": lambda b, x: b.conv1(x) + x.transpose(2, 3).mean((2, 3), keepdim=True),
    "mean of two of five dimensions": lambda b, x: b.conv1(x) + x.unsqueeze(2).mean((2, 3)).unsqueeze(2),
    "other activations": lambda b, x: F.hardswish(b.conv1(x)) * F.hardsigmoid(x) + F.silu(b.norm1(b.conv2(x))),
    "modules of other activations": lambda b, x: b.swish(b.norm1(b.conv1(x))) + b.swish(b.conv2(x)),
    "a number that is added": lambda b, x: F.relu(b.norm1(b.conv1(x)) + x.size(2)),
    "residual of another type": lambda b, x: F.relu(b.norm1(b.conv1(x)) + (x > 0)),
    "nothing to fuse": lambda b, x: torch.tanh(b.conv1(F.gelu(b.conv2(x)))),
}  # fmt: skip


def _added_in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return F.relu_(y)


def _with_view(block: Block, x: Tensor) -> Tensor:
    view = x.transpose(2, 3)
    return F.relu(block.norm2(block.conv2(block.relu(block.norm1(block.conv1(x))))) + x) + view


def _with_branch(block: Block, x: Tensor) -> Tensor:
    one, other = block.norm1(block.conv1(x)), block.norm2(block.conv2(x))
    total = one + x
    return F.relu(other + total)


def _used_twice(y: Tensor, branch: Tensor) -> Tensor:
    return F.relu(y + branch) * branch


def _chained(block: Block, x: Tensor) -> Tensor:
    return F.relu(block.norm1(block.conv1(x)) + x)


def _overwritten_branch(block: Block, x: Tensor) -> Tensor:
    branch = block.point2(x)
    x.mul_(2)
    return F.relu(block.conv1(x) + branch)


def _written_to(block: Block, x: Tensor, write: Callable[[Tensor], Tensor]) -> Tensor:
    x = x - 0.5
    y = block.norm1(block.conv1(x))
    write(x)
    return F.relu(y + x)


def _twice(x: Tensor) -> Tensor:
    return x + x


def _two_norms(block: Block, x: Tensor) -> Tensor:
    return F.relu(block.norm1(x) + block.norm2(x))


def _used_again(x: Tensor) -> Tensor:
    return F.relu(x) + x


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_any_form_are_computed_as_written(form: str) -> None:
    assert_executable(actuated(FORMS[form]))


class Repeated(nn.Module):
    """Every channel this many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.times, 1, 1)


@pytest.mark.parametrize(
    "stem",
    [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 2, dilation=2), nn.AvgPool2d(2, 1), nn.Dropout(), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(3, 8, 1, 2, (0, 1), dilation=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.GELU()),
        nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 1), nn.ReLU(), nn.PixelShuffle(2), nn.BatchNorm2d(2), Repeated(4)
        ),
    ],
    ids=["grouped", "reflecting", "dilated", "dilated pixels", "adaptive", "shuffled"],
)
def test_stems_of_any_form_are_computed_as_written(stem: nn.Module) -> None:
    assert_executable(actuated(FORMS["residual"], stem))


class Undecided(Net):
    """A network whose control flow depends on its input, outside the stage."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def undecided() -> ActuatedSubnet:
    torch.manual_seed(0)
    return ready(Undecided(Block(FORMS["residual"])), ("stage",), FIXED).actuate(FIXED.largest)


def test_control_flow_that_depends_on_data_is_refused() -> None:
    with pytest.raises(CannotFuseError, match="control flow that depends on data"):
        trace(undecided())


# ------------------------------------------------------------------------------------------------------ shared weights


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return resnet()


NAMES = [subnet.name for subnet in (SPACE.largest, SPACE.smallest, Subnet((1, 2, 1), (0.5, 0.25, 1.0)))]


def outputs(run: Callable[[Tensor], Tensor], count: int = 4) -> Tensor:
    with torch.inference_mode():
        return run(images(count))


def test_packing_leaves_the_shared_weights_alone(supernet: Supernet) -> None:
    before = {name: value.clone() for name, value in supernet.network.state_dict().items()}
    actuated_before = outputs(supernet.actuate(SPACE.largest))
    outputs(trace(supernet.actuate(SPACE.largest)).packed())
    for name, value in supernet.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(outputs(supernet.actuate(SPACE.largest)), actuated_before)


def test_packed_weights_stay_when_others_are_packed_and_when_the_shared_ones_change() -> None:
    supernet = resnet()
    packed = trace(supernet.actuate(SPACE.largest)).packed()
    before = outputs(packed)
    others = [trace(supernet.actuate(subnet)).packed() for subnet in list(SPACE)[:5]]
    for other in others:
        outputs(other)
    assert torch.equal(outputs(packed), before)
    with torch.no_grad():
        for layer in supernet.operators.weight_slices:
            layer.weight.zero_()
    assert torch.equal(outputs(packed), before)


def test_two_threads_at_once_get_what_each_gets_alone(supernet: Supernet) -> None:
    runs: list[Callable[[Tensor], Tensor]] = []
    for name in NAMES[:2]:
        shared = trace(supernet.actuate(Subnet.parse(name)))
        runs += [shared, shared.packed()]
    alone = [outputs(run) for run in runs]

    def repeated(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.set_num_threads(1)
        together.wait()
        return [outputs(run) for _ in range(10)]

    together = threading.Barrier(len(runs))
    with ThreadPoolExecutor(len(runs)) as pool:
        for expected, many in zip(alone, pool.map(repeated, runs), strict=True):
            assert all(torch.equal(each, expected) for each in many)


def test_networks_run_while_others_are_traced() -> None:
    """Tracing replaces methods of all modules, also for the threads that compute."""
    subnet = actuated(FORMS["nothing to fuse"], nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.GELU()))
    executable, expected = trace(subnet), outputs(subnet)
    stop = threading.Event()

    def trace_on() -> None:
        while not stop.is_set():
            trace(subnet)

    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace_on)
        try:
            for _ in range(30):
                assert torch.allclose(outputs(executable), expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(outputs(subnet), expected)
        finally:
            stop.set()
        tracing.result()


def packed_nbytes(executable: Executable) -> int:
    """What it would hold with weights all of its own."""
    return sum(executable.needs(Larder()).values())


@pytest.mark.parametrize("name", NAMES)
def test_nbytes_is_what_is_held(supernet: Supernet, name: str) -> None:
    shared = trace(supernet.actuate(Subnet.parse(name)))
    packed = shared.packed()
    weights = [pack.weight for step in steps(packed) for pack in step.packs]
    held = sum(torch.ops.mkldnn._nbytes(each) if each.is_mkldnn else 4 * each.numel() for each in weights)
    assert (shared.nbytes, packed_nbytes(shared), packed.nbytes) == (0, held, held)
    whole = sum(weight.numel() for weight in supernet.network.parameters() if weight.dim() == 4)
    assert name != SPACE.largest.name or held >= 4 * whole


@given(
    outputs=st.integers(1, 8),
    inputs=st.integers(1, 3),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 4), (1, 5)]),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    columns=st.integers(2, 9),
    relu=st.booleans(),
)
def test_narrow_convolutions_are_those_of_torch_for_any_number_of_columns(
    outputs: int, inputs: int, kernel: tuple[int, int], padding: tuple[int, int], columns: int, relu: bool
) -> None:
    assume(columns + 2 * padding[1] >= kernel[1])
    generator = torch.Generator().manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs, *kernel, generator=generator), torch.randn(outputs, generator=generator)
    layer = Convolution(weight, bias, (1, 1), padding, (1, 1), 1, torch.linspace(-1, 2, outputs).view(-1, 1, 1, 1))
    step = (ConvolveNarrowly if ConvolveNarrowly.suits(layer) else Convolve)(layer, "relu" if relu else "none")
    for count in (1, 3):
        x = torch.randn(count, inputs, 6, columns, generator=generator).contiguous(memory_format=torch.channels_last)
        expected = torch.conv2d(x, layer.folded(), bias, padding=padding)
        for each in (step, step.packed(Larder())):
            given = each(x)
            assert given.is_contiguous(memory_format=torch.channels_last) or 1 in {inputs, *given.shape}
            torch.testing.assert_close(given, expected.relu() if relu else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [(1, 2), (1, 3), (2, 2), (2, 1)])
def test_convolutions_of_one_channel_are_right_where_the_kernels_are_not(stride: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 1, 3, 3, generator=generator)
    layer = Convolution(weight, torch.zeros(16), stride, (1, 0), (1, 1), 1, torch.ones(16, 1, 1, 1))
    step = Convolve(layer, "relu")
    for columns in (3, 4, 5):
        x = torch.randn(2, 1, 16, columns, generator=generator).contiguous(memory_format=torch.channels_last)
        expected = torch.conv2d(x, weight, None, stride, (1, 0)).relu()
        for each in (step, step.packed(Larder())):
            torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_known_parts_is_one_program_and_others_go_step_by_step() -> None:
    assert isinstance(trace(resnet().actuate(SPACE.largest)).write(many=True), Program)
    swishing = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.Hardswish(inplace=True))
    assert isinstance(trace(actuated(lambda b, x: F.hardswish(b.conv1(x)) * x, swishing)).write(many=True), Program)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.GELU())
    assert not isinstance(trace(actuated(FORMS["residual"], stem)).write(many=True), Program)


def test_of_deep_networks_only_those_that_are_packed_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executables.DEEP", 10)
    subnet = resnet().actuate(SPACE.largest)
    shared = trace(subnet)
    assert not isinstance(shared.write(many=True), Program)
    assert isinstance(shared.packed().write(many=True), Program)
    assert_executable(subnet)


def test_a_program_counts_only_where_there_is_one_and_something_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executables.DEEP", 2)
    stepwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4), nn.GELU())
    executable = trace(actuated(FORMS["residual"], stepwise)).packed()
    assert executable.nbytes == sum(pack.nbytes for pack in executable.packs)
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2), nn.ReLU())
    assert packed_nbytes(trace(actuated(lambda b, x: F.relu(x + x.mean()), pooled))) == 0


def test_too_many_channels_are_an_error_and_not_read_as_more_pixels() -> None:
    def form(block: Block, x: Tensor) -> Tensor:
        return F.relu(block.norm1(block.conv1(x)) + block.norm2(block.point2(torch.cat([x, x], 1))))

    shared = trace(actuated(form))
    for run in (shared, shared.packed()):
        for count in (1, 2):
            with pytest.raises(RuntimeError, match=r"mat1|shape|size"):
                outputs(run, count)


def test_a_shortcut_beside_a_convolution_that_the_kernels_do_not_suit_is_packed_alone() -> None:
    plain = Convolution(torch.ones(4, 1, 3, 3), None, (1, 2), (1, 1), (1, 1), 4)
    shortcut = Multiply(Convolution(torch.ones(4, 4, 1, 1), None, (1, 1), (0, 0), (1, 1)))
    assert not plain.suits_kernels
    assert ConvolveAndAdd(plain, "relu").joined(shortcut) is None


def test_the_program_of_a_deep_network_counts_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, names = resnet(), [SPACE.largest.name, SPACE.smallest.name]
    weights = sum(packed_nbytes(trace(supernet.actuate(Subnet.parse(name)))) for name in names)
    monkeypatch.setattr("executables.DEEP", 10)
    cache = cache_of_slices(supernet, 2 * weights, names)
    assert [cast(Executable, cache.get(name)).nbytes for name in names] == [0, 0], "others are no program as a whole"
    needed = sum(packed_nbytes(cast(Executable, cache.get(name))) for name in names)
    assert needed > 2 * weights
    cache.fill()
    assert len(cache.held) < 2
    cache.budget = needed
    cache.fill()
    assert (len(cache.held), cache.nbytes) == (2, needed)


# ------------------------------------------------------------------------------------------------------- shared slices


@pytest.fixture
def everything_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it is."""
    monkeypatch.setattr("steps.LEAST_SHARED_BYTES", 0)


def cache_of_slices(supernet: Supernet, budget: float, names: Iterable[str]) -> ExecutableCache:
    cache = ExecutableCache(budget)
    for name in names:
        cache.add(name, supernet.actuate(Subnet.parse(name)))
    return cache


WIDE = {"widths": (16, 32, 32)}  # of which not all are too narrow to be shared
SHARING = [SPACE.largest.name, "d1-2-1-e1", SPACE.smallest.name]


@pytest.mark.usefixtures("everything_is_shared")
def test_subnets_that_share_slices_give_the_outputs_of_the_actuated_subnets() -> None:
    supernet = resnet(**WIDE)
    for subnet in (SPACE.largest, SPACE.smallest):
        supernet.calibrate(subnet, [images(16, seed=9)])
    cache = cache_of_slices(supernet, math.inf, SHARING)
    cache.fill()
    alone = [trace(supernet.actuate(Subnet.parse(name))).packed() for name in SHARING]
    assert cache.nbytes < 0.8 * sum(each.nbytes for each in alone)
    for name in SHARING:
        for count in BATCHES:
            assert_equal(cast(Executable, cache.get(name)), supernet.actuate(Subnet.parse(name)), count)


@pytest.mark.usefixtures("everything_is_shared")
def test_a_shared_slice_stays_as_long_as_one_holds_it_and_is_freed_with_the_last() -> None:
    gc.disable()
    try:
        cache = cache_of_slices(resnet(**WIDE), math.inf, SHARING)
        cache.fill()
        first, second = (cast(Executable, cache.get(name)) for name in SHARING[:2])
        shared = [weakref.ref(pack) for pack in first.packs & second.packs]
        assert shared
        del first
        cache.drop()
        assert all(ref() is not None for ref in shared)
        del second
        assert all(ref() is None for ref in shared)
    finally:
        gc.enable()


SLICES = resnet(**WIDE)
SUBNETS = [subnet.name for subnet in list(SPACE)[:: len(SPACE) // 5]]
ALONE = {name: packed_nbytes(trace(SLICES.actuate(Subnet.parse(name)))) for name in SUBNETS}


@pytest.mark.usefixtures("everything_is_shared")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1.2),
    early=st.lists(st.sampled_from(SUBNETS), unique=True),
    uses=st.lists(st.sampled_from([*SUBNETS, "rebalance"]), max_size=10),
)
def test_the_budget_is_kept_when_slices_are_shared_and_when_subnets_come_later(
    share: float, early: list[str], uses: list[str]
) -> None:
    """Those that came first may hold slices of their own that others share later."""
    cache = cache_of_slices(SLICES, share * max(ALONE.values()), early)
    cache.fill(lambda: within_budget(cache))
    for use in uses:
        if use == "rebalance":
            cache.rebalance()
        else:
            cache.add(use, SLICES.actuate(Subnet.parse(use)))
            cache.get(use)
        within_budget(cache)
    assert not cache.held or cache.nbytes > 0


def within_budget(cache: ExecutableCache) -> None:
    assert cache.nbytes <= cache.budget


# --------------------------------------------------------------------------------------------------------------- cache


def column(channels: int) -> ActuatedSubnet:
    """The smallest thing to cache: one pointwise convolution of 4 bytes a channel."""
    network = nn.Sequential(nn.Conv2d(channels, 1, 1, bias=False)).requires_grad_(False).eval()
    return ActuatedSubnet(SPACE.largest, True, network, ())


def cache_of(budget: float, *channels: int) -> ExecutableCache:
    """A cache that knows subnets "0", "1", and so on, of so many channels each."""
    cache = ExecutableCache(budget)
    for number, each in enumerate(channels):
        cache.add(str(number), COLUMNS[each])
    return cache


COLUMNS = {channels: column(channels) for channels in range(1, 6)}


@settings(max_examples=25)  # each of them traces and packs
@given(
    budget=st.integers(0, 50),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    uses=st.lists(st.integers(-1, 3), max_size=15),
)
def test_the_cache_keeps_its_budget(budget: int, channels: list[int], uses: list[int]) -> None:
    cache = cache_of(budget, *channels)
    cache.fill(lambda: within(cache))
    for use in uses:
        if use < 0:
            cache.rebalance()
        elif use < len(channels):
            cache.get(str(use))
        within(cache)
    left = [4 * each for number, each in enumerate(channels) if str(number) not in cache.held]
    assert all(size > budget - cache.nbytes for size in left), "nothing is left out that would fit"


def within(cache: ExecutableCache) -> None:
    assert cache.nbytes == sum(cache.get(name).nbytes for name in cache.held) <= cache.budget


def test_the_budget_counts_what_the_kernels_pad(supernet: Supernet) -> None:
    subnets = [supernet.actuate(subnet) for subnet in list(SPACE)[:4]]
    whole = sum(packed_nbytes(trace(subnet)) for subnet in subnets)
    for budget in (whole - 1, whole):
        cache = ExecutableCache(budget)
        for subnet in subnets:
            cache.add(subnet.subnet.name, subnet)
        cache.fill()
        assert len(cache.held) == (3 if budget < whole else 4)
        assert cache.nbytes <= budget


def test_what_was_named_first_is_held_first() -> None:
    cache = cache_of(20, 2, 2, 1, 2)
    assert cache.held == ()
    cache.fill()
    assert cache.held == ("0", "1", "2")


def test_rebalancing_holds_what_was_used_most_and_first_named_among_equals() -> None:
    cache = cache_of(8, 1, 1, 1, 1)
    cache.fill()
    for name in ("3", "3", "2"):
        cache.get(name)
    cache.rebalance()
    assert set(cache.held) == {"3", "2"}
    for name in ("0", "0", "1", "1", "2", "3"):
        cache.get(name)
    cache.rebalance()
    assert set(cache.held) == {"0", "1"}, "uses of long ago count less"


def test_what_is_held_on_is_not_packed_again() -> None:
    cache = cache_of(8, 1, 1, 1)
    cache.fill()
    kept = cache.get("1")
    cache.get("2")
    cache.rebalance()
    assert cache.get("1") is kept


def test_what_is_no_longer_held_is_freed_at_once() -> None:
    cache = cache_of(8, 1, 1, 1)
    cache.fill()
    gc.disable()
    try:
        before = [weakref.ref(step) for name in cache.held for step in steps(cast(Executable, cache.get(name)))]
        running = cache.get("0")
        cache.get("2")
        cache.get("2")
        cache.rebalance()
        assert "1" not in cache.held
        assert [ref() is None for ref in before] == [False, True]
        cache.drop()
        assert before[0]() is not None, "a batch that runs on it keeps it"
        del running
        assert before[0]() is None
    finally:
        gc.enable()


def test_a_budget_of_nothing_holds_nothing() -> None:
    cache = cache_of(0, 1, 2)
    cache.fill()
    assert (cache.held, cache.nbytes, cache.get("1").nbytes) == ((), 0, 0)


def test_a_subnet_too_large_for_the_budget_leaves_room_for_smaller_ones() -> None:
    cache = cache_of(11, 3, 1, 2, 1)
    cache.fill()
    assert cache.held == ("1", "3")


def test_a_subnet_that_was_not_added_is_unknown() -> None:
    cache = cache_of(8, 1)
    assert "0" in cache
    assert "1" not in cache
    with pytest.raises(KeyError):
        cache.get("1")


def test_adding_again_changes_nothing() -> None:
    cache = cache_of(8, 1, 1)
    shared = cache.get("0")
    cache.add("0", COLUMNS[5])
    cache.fill()
    assert cache.held == ("0", "1")
    cache.budget = 0
    cache.fill()
    assert cache.get("0") is shared


def test_what_is_dropped_for_want_of_memory_is_not_held_again() -> None:
    cache = cache_of(8, 1, 1)
    cache.fill()
    assert cache.held == ("0", "1")
    cache.drop()
    assert (cache.held, cache.nbytes) == ((), 0)
    cache.get("0")
    cache.rebalance()
    cache.fill()
    assert cache.held == ()


def test_threads_that_add_the_same_subnet_add_it_once() -> None:
    cache = ExecutableCache(8)
    together = threading.Barrier(4)

    def add(_: int) -> None:
        together.wait()
        cache.add("0", COLUMNS[1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    cache.add("1", COLUMNS[1])
    cache.fill()
    assert cache.held == ("0", "1")


def test_what_cannot_be_fused_runs_as_the_actuated_subnet() -> None:
    subnet = undecided()
    cache = ExecutableCache(1e9)
    cache.add("odd", subnet)
    cache.REBALANCE_EVERY = 1
    cache.fill()
    assert cache.get("odd") is subnet
    assert (cache.held, cache.nbytes, cache.stale) == ((), 0, False)


# -------------------------------------------------------------------------------------------------------------- engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Holds one of the largest, or all of the smaller ones."""
    servable = tiny_servable()
    engine = Engine(servable, "cpu", memory_budget=packed_nbytes(trace(servable.supernet.actuate(SPACE.largest))))
    yield engine
    engine.close()


def pixels(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8))


def held(engine: Engine) -> tuple[str, ...]:
    """What is held once the builder has done what it was told so far."""
    engine._builder.submit(lambda _: None).future.result()
    assert engine.executables is not None
    return engine.executables.held


async def test_the_engine_holds_what_it_prepares_first(engine: Engine) -> None:
    await engine.prepare(NAMES)
    assert held(engine) == (SPACE.largest.name,)


async def test_the_engine_swaps_what_it_holds_for_what_it_runs(engine: Engine) -> None:
    assert engine.executables is not None
    engine.executables.REBALANCE_EVERY = 8
    await engine.prepare(NAMES)
    for _ in range(7):
        await engine.run(SPACE.smallest.name, pixels(1))
    assert held(engine) == (SPACE.largest.name,)
    await engine.run(SPACE.smallest.name, pixels(1))
    assert held(engine)[0] == SPACE.smallest.name
    assert SPACE.largest.name not in held(engine)
    assert engine.executables.nbytes <= engine.executables.budget


async def test_a_busy_builder_rebalances_once_not_once_a_batch(engine: Engine) -> None:
    assert engine.executables is not None
    engine.executables.REBALANCE_EVERY = 8
    await engine.prepare(NAMES)
    free = threading.Event()
    engine._builder.submit(lambda _: free.wait())
    for _ in range(40):
        await engine.run(SPACE.smallest.name, pixels(1))
    free.set()
    assert SPACE.smallest.name in held(engine)


@pytest.mark.parametrize("count", [CHUNK, CHUNK + 1, 3 * CHUNK + 1])
async def test_large_batches_give_the_outputs_of_the_actuated_subnet_in_order(engine: Engine, count: int) -> None:
    await engine.prepare(NAMES[:1])
    inputs = pixels(count)
    x = torch.from_numpy(np.stack([((each / 255 - INPUT.mean) / INPUT.std).transpose(2, 0, 1) for each in inputs]))
    for name in NAMES:
        with torch.inference_mode():
            expected = engine.actuate(name)(x.float()).softmax(1).numpy()
        given = (await engine.run(name, inputs)).probabilities
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(expected.round(6), axis=0)) == count, "inputs are told apart"


# ------------------------------------------------------------------------------------------------------------- setting


@pytest.mark.parametrize(
    ("text", "budget"), [("2x", 2000), ("0", 0), ("1048576", 1048576), ("0.5x", 500), ("0x", 0), ("8x", 8000)]
)
def test_a_memory_budget_is_bytes_or_a_multiple_of_the_weights(text: str, budget: float) -> None:
    assert Config(memory_budget=text).memory_budget_bytes(1000) == budget


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "2X", "many", "1e6", "\N{ARABIC-INDIC DIGIT ONE}x", "1.5", " 2x", "2x\n"]
)
def test_other_memory_budgets_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget must be a number of bytes, or a multiple .* such as 2x, not"):
        Config(memory_budget=text)
