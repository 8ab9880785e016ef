"""What the Once-for-All families share: rounding of channels, a convolution with its norm, and names of weights.

Networks are written with the names of their extracted subnets (``conv1.conv.weight``). The public supernets'
checkpoints name what is elastic one level deeper (``conv1.conv.conv.weight``): ``own_name`` translates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from torch import Tensor, nn

_RENAMED = ((".conv.conv.weight", ".conv.weight"), (".bn.bn.", ".bn."), (".linear.linear.", ".linear."))


def round_channels(channels: float) -> int:
    """To the nearest multiple of 8, at least 8, and never below 0.9 of what was asked for."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def own_name(name: str, known: Collection[str]) -> str:
    """The name, among the ``known`` ones of a network, of the weight that a checkpoint calls ``name``.

    Checkpoints have the names of supernets or of extracted networks, those written before November 2020 with
    ``mobile_inverted_conv`` for ``conv``. A name that fits nothing comes back as it is.
    """
    name = name.replace(".mobile_inverted_conv.", ".conv.")
    for old, new in _RENAMED:
        if name not in known and name.replace(old, new) in known:
            return name.replace(old, new)
    return name


class ConvLayer(nn.Sequential):
    """A convolution without bias, padded to keep the size, its norm, and an activation if there is one."""

    conv: nn.Module
    bn: nn.Module

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, activation: nn.Module | None = None
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        parts: dict[str, nn.Module] = {"conv": conv, "bn": nn.BatchNorm2d(outputs)}
        super().__init__(OrderedDict(parts | ({"act": activation} if activation is not None else {})))


class GlobalAverage(nn.Module):
    """The mean of every channel."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.mean((2, 3), keepdim=self.keep)


def classifier(features: int, classes: int) -> nn.Module:
    """A linear layer, by the name that the checkpoints give it."""
    return nn.Sequential(OrderedDict(linear=nn.Linear(features, classes)))


def check_sizes(name: str, values: object, length: int, most: int) -> None:
    """Raise ValueError unless these are so many whole numbers from 1."""
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == length
    if not fits or any(type(each) is not int or not 1 <= each <= most for each in values):  # type: ignore[attr-defined]
        raise ValueError(f"{name} must be {length} whole numbers from 1 to {most}, not {values!r:.60}")


def block_of(subnet_depths: Sequence[int], stage: int, number: int) -> int:
    """Where a subnet keeps what was chosen for this block, which must run: blocks that run, stage after stage."""
    return sum(subnet_depths[:stage]) + number
