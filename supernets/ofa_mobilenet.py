"""OFA MobileNetV3 (Once-for-All, Cai et al., ICLR 2020): elastic in depth, expand ratio and kernel size.

``OfaMobileNet`` is the plain network of the largest size, with the names that extracted networks have. ``elastic`` says
which part of it a subnet uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from operators import Elastic, Sizes
from subnets import DEPTHS, Space, SubnetValue, axis, is_number
from supernets.ofa import ConvLayer, GlobalAverage, block_of, check_sizes, classifier, round_channels

# First convolution, static block, five stages, final expansion, feature mix; multiplied by ``width``.
CHANNELS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
DEPTH = (4, 4, 4, 4, 4)


@dataclass(frozen=True, slots=True)
class Stage:
    """What the blocks of a stage have in common."""

    stride: int
    activation: type[nn.Module]
    squeeze: bool


STAGES = (
    Stage(2, nn.ReLU, False),
    Stage(2, nn.ReLU, True),
    Stage(2, nn.Hardswish, False),
    Stage(1, nn.Hardswish, True),
    Stage(2, nn.Hardswish, True),
)


def _is_kernel(value: object) -> bool:
    return type(value) is int and 1 <= value <= 99 and value % 2 == 1


@dataclass(frozen=True, slots=True)
class OfaMobileNetSubnet(SubnetValue):
    """A subnet: blocks of each stage; kernel size and expand ratio of each block that runs."""

    FORM: ClassVar[str] = "d4-4-4-4-4-k7-e6, with one k and one e per block where they differ"
    depths: tuple[int, ...] = DEPTHS
    kernels: tuple[int, ...] = axis(
        "k", "kernel size", "odd numbers", _is_kernel, whole=True, place="block", count=sum
    )
    expands: tuple[float, ...] = axis(
        "e", "expand ratio", "numbers from 0.1 to 100", lambda value: is_number(value, 0.1, 100),
        place="block", count=sum,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OfaMobileNetSpace(Space):
    """The legal depths by stage, kernel sizes and expand ratios by block."""

    KIND: ClassVar[type[Any]] = OfaMobileNetSubnet
    depths: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    expands: tuple[tuple[float, ...], ...]


def official_space(
    depths: Sequence[int] = DEPTH, kernels: Sequence[int] = (3, 5, 7), expands: Sequence[float] = (3, 4, 6)
) -> OfaMobileNetSpace:
    """The space of the public checkpoints: each stage may leave out up to two blocks."""
    legal = tuple(tuple(range(max(1, depth - 2), depth + 1)) for depth in depths)
    return OfaMobileNetSpace(legal, (tuple(kernels),) * sum(depths), (tuple(expands),) * sum(depths))


class KernelConv2d(nn.Conv2d):
    """A depthwise convolution with the matrices that make smaller kernels from the centre of larger ones.

    ``7to5_matrix`` is 25x25: times a filter's central 5x5, row by row, it gives the filter of size 5, whose centre
    ``5to3_matrix`` turns into that of size 3. At its full size it is an ordinary convolution.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        for side in range(3, kernel, 2):
            self.register_parameter(f"{side + 2}to{side}_matrix", nn.Parameter(torch.eye(side**2)))


class SqueezeExcite(nn.Module):
    """Scales every channel by a function of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = _squeezed(channels)
        self.mean = GlobalAverage(keep=True)
        self.fc = nn.Sequential(
            OrderedDict(
                reduce=nn.Conv2d(channels, inner, 1),
                relu=nn.ReLU(),
                expand=nn.Conv2d(inner, channels, 1),
                h_sigmoid=nn.Hardsigmoid(),
            )
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = x * self.fc(self.mean(x))
        return y


def _squeezed(channels: int) -> int:
    return round_channels(channels // 4)


def _depthwise(channels: int, kernel: int, stage: Stage, stride: int, elastic: bool) -> nn.Module:
    layer = ConvLayer(channels, channels, kernel, stride, stage.activation())
    layer.conv = (
        KernelConv2d(channels, kernel, stride)
        if elastic
        else nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    )
    if stage.squeeze:
        layer.add_module("se", SqueezeExcite(channels))
    return layer


class Block(nn.Module):
    """Expansion (none in the static block), depthwise convolution, projection; a shortcut around it where it fits."""

    def __init__(self, inputs: int, middle: int, outputs: int, kernel: int, stage: Stage, first: bool, elastic: bool):
        super().__init__()
        parts: dict[str, nn.Module] = {}
        if elastic:
            parts["inverted_bottleneck"] = ConvLayer(inputs, middle, activation=stage.activation())
        parts["depth_conv"] = _depthwise(middle, kernel, stage, stage.stride if first else 1, elastic)
        parts["point_linear"] = ConvLayer(middle, outputs)
        self.conv = nn.Sequential(OrderedDict(parts))
        self.shortcut = not first

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.conv(x)
        return y + x if self.shortcut else y


class OfaMobileNet(nn.Module):
    """A first convolution, a static block, five stages of inverted residual blocks, pooling, classifier.

    Input (N, 3, H, W), output logits (N, classes). ``width`` multiplies all ``channels``; ``depths`` are the blocks of
    each stage; ``expand`` and ``kernel`` the largest expand ratio and kernel size.
    """

    def __init__(
        self,
        classes: int = 1000,
        width: float = 1.0,
        channels: Sequence[int] = CHANNELS,
        depths: Sequence[int] = DEPTH,
        expand: float = 6,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        check_sizes("classes", [classes], 1, 100_000)
        check_sizes("channels", channels, len(CHANNELS), 8192)
        check_sizes("depths", depths, len(STAGES), 100)
        if not is_number(width, 0.05, 20) or not is_number(expand, 0.1, 100):
            raise ValueError(f"width and expand must be numbers up to 20 and 100, not {width!r:.40} and {expand!r:.40}")
        if not _is_kernel(kernel) or kernel > 15:
            raise ValueError(f"kernel must be an odd number up to 15, not {kernel!r:.40}")
        self.depths, sizes = tuple(depths), [round_channels(each * width) for each in channels]
        stem, inputs, *stages, final, mixed = sizes
        self.channels = (inputs, *stages)  # that blocks exchange
        self.first_conv = ConvLayer(3, stem, 3, 2, nn.Hardswish())
        static = Block(stem, stem, inputs, 3, Stage(1, nn.ReLU, False), first=False, elastic=False)
        blocks = [static]
        for outputs, depth, stage in zip(stages, depths, STAGES, strict=True):
            for number in range(depth):
                middle = round_channels(round(inputs * expand))
                blocks.append(Block(inputs, middle, outputs, kernel, stage, first=number == 0, elastic=True))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.final_expand_layer = ConvLayer(inputs, final, activation=nn.Hardswish())
        self.global_avg_pool = GlobalAverage(keep=True)
        self.feature_mix_layer = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(final, mixed, 1, bias=False), act=nn.Hardswish())
        )
        self.classifier = classifier(mixed, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.final_expand_layer(self.blocks(self.first_conv(x)))
        x = self.feature_mix_layer(self.global_avg_pool(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def elastic(network: OfaMobileNet) -> Elastic:
    """Which part of the network a subnet uses."""
    slices: dict[str, Sizes] = {}
    norms: dict[str, Callable[[Any], int] | None] = {}
    for stage, depth in enumerate(network.depths):
        for number in range(depth):
            where = f"blocks.{1 + sum(network.depths[:stage]) + number}.conv"
            middle = partial(_middle, network, stage, number)
            squeezed = partial(_squeezed_middle, middle)
            slices |= {
                f"{where}.inverted_bottleneck.conv": Sizes(outputs=middle),
                f"{where}.depth_conv.conv": Sizes(outputs=middle, kernel=partial(_kernel, stage, number)),
                f"{where}.point_linear.conv": Sizes(inputs=middle),
            }
            norms |= {f"{where}.{part}.bn": middle for part in ("inverted_bottleneck", "depth_conv")}
            if STAGES[stage].squeeze:
                slices[f"{where}.depth_conv.se.fc.reduce"] = Sizes(squeezed, middle)
                slices[f"{where}.depth_conv.se.fc.expand"] = Sizes(middle, squeezed)
    return Elastic({"blocks": partial(_blocks, network)}, slices, norms, network.depths)


def _middle(network: OfaMobileNet, stage: int, number: int, subnet: OfaMobileNetSubnet) -> int:
    inputs = network.channels[stage] if number == 0 else network.channels[stage + 1]
    return round_channels(round(inputs * subnet.expands[block_of(subnet.depths, stage, number)]))


def _squeezed_middle(middle: Callable[[Any], int], subnet: OfaMobileNetSubnet) -> int:
    return _squeezed(middle(subnet))


def _kernel(stage: int, number: int, subnet: OfaMobileNetSubnet) -> int:
    return subnet.kernels[block_of(subnet.depths, stage, number)]


def _blocks(network: OfaMobileNet, subnet: OfaMobileNetSubnet) -> Sequence[int]:
    firsts = [1 + sum(network.depths[:stage]) for stage in range(len(network.depths))]
    running = [first + number for first, depth in zip(firsts, subnet.depths, strict=True) for number in range(depth)]
    return [0, *running]
