"""OFA ResNet50 (Once-for-All, Cai et al., ICLR 2020): bottleneck blocks, elastic in depth, expand ratio and width.

``OfaResNet`` is the plain network of the largest size, with the names that extracted networks have. ``elastic`` says
which part of it a subnet uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from operators import Elastic, Sizes
from subnets import DEPTHS, Space, SubnetValue, axis, is_number, is_whole
from supernets.ofa import ConvLayer, GlobalAverage, block_of, check_sizes, classifier, round_channels

WIDTHS = (256, 512, 1024, 2048)
DEPTH = (4, 4, 6, 4)
STRIDES = (1, 2, 2, 2)


@dataclass(frozen=True, slots=True)
class OfaResNetSubnet(SubnetValue):
    """A subnet: blocks of each stage, the expand ratio of each block that runs, widths, and the stem's residual unit.

    ``widths`` are fractions of the stem's middle and output and of each stage; ``stem`` is 1 where the stem's residual
    unit runs, 0 where it is skipped.
    """

    FORM: ClassVar[str] = "d4-4-6-4-e0.35-w1-s1, with one e per block and one w per part where they differ"
    depths: tuple[int, ...] = DEPTHS
    expands: tuple[float, ...] = axis(
        "e", "expand ratio", "fractions above 0, up to 1", lambda value: is_number(value, 1e-4, 1),
        place="block", count=sum,
    )  # fmt: skip
    widths: tuple[float, ...] = axis(
        "w", "width", "fractions above 0, up to 1", lambda value: is_number(value, 1e-4, 1),
        place="part", count=lambda depths: 2 + len(depths),
    )  # fmt: skip
    stem: tuple[int, ...] = axis(
        "s", "stem unit", "of 0 and 1", lambda value: is_whole(value, 0, 1),
        whole=True, place="", count=lambda depths: 1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OfaResNetSpace(Space):
    """The legal depths by stage, expand ratios by block, widths by part; and whether the stem's unit may be skipped."""

    KIND: ClassVar[type[Any]] = OfaResNetSubnet
    depths: tuple[tuple[int, ...], ...]
    expands: tuple[tuple[float, ...], ...]
    widths: tuple[tuple[float, ...], ...]
    stem: tuple[tuple[int, ...], ...] = ((0, 1),)


def official_space(
    depths: Sequence[int] = DEPTH,
    expands: Sequence[float] = (0.2, 0.25, 0.35),
    widths: Sequence[float] = (0.65, 0.8, 1.0),
) -> OfaResNetSpace:
    """The space of the public checkpoint: each stage may leave out up to two blocks."""
    legal = tuple(tuple(range(max(1, depth - 2), depth + 1)) for depth in depths)
    return OfaResNetSpace(legal, (tuple(expands),) * sum(depths), (tuple(widths),) * (2 + len(depths)))


class Residual(nn.Module):
    """The stem's unit: adds what it computes to its input, without an activation after that."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(channels, channels, 3, activation=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = x + self.conv(x)
        return y


class Downsample(ConvLayer):
    """The shortcut where channels or resolution change: average pooling, then a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.bn(self.conv(self.pool(x)))
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3 (which takes the stride) and 1x1 convolution around a residual addition."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, first: bool) -> None:
        super().__init__()
        self.conv1 = ConvLayer(inputs, middle, activation=nn.ReLU())
        self.conv2 = ConvLayer(middle, middle, 3, stride, activation=nn.ReLU())
        self.conv3 = ConvLayer(middle, outputs)
        self.downsample: nn.Module = Downsample(inputs, outputs, stride) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class OfaResNet(nn.Module):
    """Stem of three convolutions, four stages of bottleneck blocks, pooling, classifier.

    Input (N, 3, H, W), output logits (N, classes). ``widths`` are the channels of the stem's output and of each stage;
    ``depths`` the blocks of each stage; ``expand`` is the largest ratio of a block's inner channels to its outer ones.
    """

    def __init__(
        self,
        classes: int = 1000,
        widths: Sequence[int] = (64, *WIDTHS),
        depths: Sequence[int] = DEPTH,
        expand: float = 0.35,
    ) -> None:
        super().__init__()
        check_sizes("classes", [classes], 1, 100_000)
        check_sizes("widths", widths, 5, 8192)
        check_sizes("depths", depths, 4, 100)
        if not is_number(expand, 1e-4, 1):
            raise ValueError(f"expand must be above 0, at most 1, not {expand!r:.40}")
        self.widths, self.depths = tuple(widths), tuple(depths)
        stem, *outer = map(round_channels, widths)
        middle = round_channels(stem // 2)
        self.input_stem = nn.Sequential(
            ConvLayer(3, middle, 3, 2, nn.ReLU()), Residual(middle), ConvLayer(middle, stem, 3, 1, nn.ReLU())
        )
        self.max_pooling = nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], stem
        for outputs, depth, stride in zip(outer, depths, STRIDES, strict=True):
            for number in range(depth):
                inner = round_channels(round(outputs * expand))
                blocks.append(Bottleneck(inputs, inner, outputs, 1 if number else stride, number == 0))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.global_avg_pool = GlobalAverage()
        self.classifier = classifier(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.blocks(self.max_pooling(self.input_stem(x)))
        logits: Tensor = self.classifier(self.global_avg_pool(x))
        return logits


def elastic(network: OfaResNet) -> Elastic:
    """Which part of the network a subnet uses."""
    sizes = _stem(network)
    for stage, depth in enumerate(network.depths):
        inputs: Callable[[OfaResNetSubnet], int] = partial(_outer, network, stage - 1)
        outer = partial(_outer, network, stage)
        for number in range(depth):
            where, inner = f"blocks.{sum(network.depths[:stage]) + number}", partial(_inner, network, stage, number)
            sizes[f"{where}.conv1"] = Sizes(inner, inputs)
            sizes[f"{where}.conv2"] = Sizes(inner, inner)
            sizes[f"{where}.conv3"] = Sizes(outer, inner)
            if number == 0:
                sizes[f"{where}.downsample"] = Sizes(outer, inputs)
            inputs = outer
    slices = {f"{path}.conv": each for path, each in sizes.items()}
    slices["classifier.linear"] = Sizes(None, partial(_outer, network, len(network.depths) - 1))
    return Elastic(
        layers={"input_stem": _stem_layers, "blocks": partial(_blocks, network)},
        slices=slices,
        norms={f"{path}.bn": each.outputs for path, each in sizes.items()},
        stages=network.depths,
    )


def _stem(network: OfaResNet) -> dict[str, Sizes]:
    middle, outer = partial(_stem_middle, network), partial(_outer, network, -1)
    parts = {"0": Sizes(middle), "1.conv": Sizes(middle, middle), "2": Sizes(outer, middle)}
    return {f"input_stem.{path}": each for path, each in parts.items()}


def _stem_middle(network: OfaResNet, subnet: OfaResNetSubnet) -> int:
    return round_channels(round_channels(network.widths[0] * subnet.widths[0]) // 2)


def _outer(network: OfaResNet, stage: int, subnet: OfaResNetSubnet) -> int:
    """Output channels of a stage; of the stem, which is stage -1."""
    return round_channels(network.widths[1 + stage] * subnet.widths[2 + stage])


def _inner(network: OfaResNet, stage: int, number: int, subnet: OfaResNetSubnet) -> int:
    ratio = subnet.expands[block_of(subnet.depths, stage, number)]
    return round_channels(round(_outer(network, stage, subnet) * ratio))


def _stem_layers(subnet: OfaResNetSubnet) -> Sequence[int]:
    return (0, 1, 2) if subnet.stem[0] else (0, 2)


def _blocks(network: OfaResNet, subnet: OfaResNetSubnet) -> Sequence[int]:
    firsts = [sum(network.depths[:stage]) for stage in range(len(network.depths))]
    return [first + number for first, depth in zip(firsts, subnet.depths, strict=True) for number in range(depth)]
