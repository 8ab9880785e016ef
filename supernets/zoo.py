"""A zoo: separate networks of different architectures in one servable, of which one runs; plain torch.

Each member is a choice like a subnet. They share nothing, so that they err differently, and together they are more
accurate than each of them: ensembles of them are choices too (docs/ensembles.md).

* ``residual``: basic blocks around residual additions (resnet.py).
* ``inverted``: inverted residuals, narrow outside and wide inside (MobileNetV2, Sandler et al., CVPR 2018), with
  depthwise convolutions or, ``fused``, with ordinary ones (EfficientNetV2, Tan and Le, ICML 2021).
* ``branched``: cells whose branches of 1x1, 3x3 and two 3x3 convolutions and of pooling are joined (Inception, Szegedy
  et al., CVPR 2016; the branches of NASNet's cells, Zoph et al., CVPR 2018, without the search).
* ``torchscript``: any network, of a TorchScript file beside supernet.json (imported.py, docs/zoo.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from operators import Elastic
from subnets import IllegalSubnetError, Space, SubnetValue, axis
from supernets.imported import Imported
from supernets.ofa import check_sizes
from supernets.resnet import ResNet

MOST_MEMBERS = 32


def _is_name(value: object) -> bool:
    """Whether it can stand in a URL, in a file of choices, and in the name of an ensemble."""
    return isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= 40


@dataclass(frozen=True, slots=True)
class Member(SubnetValue):
    """One network of the zoo, by its name."""

    FORM: ClassVar[str] = "residual"
    members: tuple[str, ...] = axis(
        "", "member", "names of letters, digits and underscores", _is_name, place="", count=lambda _: 1
    )

    @property
    def name(self) -> str:
        """The member's own name."""
        return self.members[0]

    @classmethod
    def parse(cls, name: str) -> Self:
        """The member of this name; raises IllegalSubnetError for any text that can be none."""
        if not _is_name(name):
            raise IllegalSubnetError(f"'{name}' is no member's name: expected the form {cls.FORM}")
        return cls((name,))


@dataclass(frozen=True, slots=True)
class ZooSpace(Space):
    """The names of all members, one list, in alphabetical order."""

    KIND: ClassVar[type[Any]] = Member
    members: tuple[tuple[str, ...], ...]

    def check(self, subnet: Any) -> None:
        """Raise IllegalSubnetError, listing the members, unless this is one of them."""
        if type(subnet) is not Member:
            raise IllegalSubnetError(f"{subnet!r:.80} is no member of a zoo: expected Member")
        if subnet.name not in self.members[0]:
            raise IllegalSubnetError(f"'{subnet.name}' is no member: there are {', '.join(self.members[0])}")


# ------------------------------------------------------------------------------------------------------- architectures


def _check(name: str, values: Sequence[int], most: int = 8192) -> None:
    check_sizes(name, values, len(values) if isinstance(values, Sequence) else 1, most)


def _convolution(inputs: int, outputs: int, side: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Widened to ``expand`` times the channels, and back by 1x1; around it a residual addition where shapes agree.

    Widening is 1x1, then 3x3 depthwise; if ``fused``, an ordinary 3x3.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, fused: bool) -> None:
        super().__init__()
        inner = inputs * expand
        if fused:
            widened = _convolution(inputs, inner, 3, stride)
        else:
            widened = [*_convolution(inputs, inner, 1), nn.ReLU(), *_convolution(inner, inner, 3, stride, groups=inner)]
        self.body = nn.Sequential(*widened, nn.ReLU(), *_convolution(inner, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.body(x)
        return y + x if self.residual else y


class InvertedNet(nn.Module):
    """A stem, stages of inverted residuals, a 1x1 convolution to ``head`` channels, pooling, classifier.

    ``strides`` are those of the first block of each stage.
    """

    def __init__(
        self, channels: int, classes: int, stem: int, widths: Sequence[int], depths: Sequence[int],
        strides: Sequence[int], expand: int, head: int, fused: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, values in (("stem", [stem]), ("widths", widths), ("head", [head])):
            _check(name, values)
        for name, values, most in (("depths", depths, 100), ("strides", strides, 2), ("expand", [expand], 16)):
            _check(name, values, most)
        if not len(widths) == len(depths) == len(strides):
            raise ValueError(f"{len(widths)} widths, {len(depths)} depths and {len(strides)} strides of stages")
        self.stem = nn.Sequential(*_convolution(channels, stem), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = stem
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            for number in range(depth):
                blocks.append(InvertedResidual(inputs, width, stride if number == 0 else 1, expand, fused))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_convolution(inputs, head, 1), nn.ReLU())
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class Cell(nn.Module):
    """Four branches of a quarter of the outputs each, joined: 1x1; 3x3; twice 3x3; pooled and 1x1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        quarter = outputs // 4
        inner = max(8, quarter // 2)
        self.direct = nn.Sequential(*_convolution(inputs, quarter, 1), nn.ReLU())
        self.once = nn.Sequential(
            *_convolution(inputs, inner, 1), nn.ReLU(), *_convolution(inner, quarter), nn.ReLU()
        )
        self.twice = nn.Sequential(
            *_convolution(inputs, inner, 1), nn.ReLU(), *_convolution(inner, quarter), nn.ReLU(),
            *_convolution(quarter, quarter), nn.ReLU(),
        )  # fmt: skip
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_convolution(inputs, quarter, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat((self.direct(x), self.once(x), self.twice(x), self.pooled(x)), 1)


class BranchedNet(nn.Module):
    """A stem, stages of cells with maximum pooling before each stage, pooling, classifier."""

    def __init__(
        self, channels: int, classes: int, stem: int, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        _check("stem", [stem])
        _check("widths", widths)
        _check("depths", depths, 100)
        if len(widths) != len(depths) or any(width % 4 for width in widths):
            raise ValueError(f"widths must be multiples of 4, one for each of the {len(depths)} depths, not {widths}")
        self.stem = nn.Sequential(*_convolution(channels, stem), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = stem
        for width, depth in zip(widths, depths, strict=True):
            blocks.append(nn.MaxPool2d(2))
            for _ in range(depth):
                blocks.append(Cell(inputs, width))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


ARCHITECTURES = {"branched": BranchedNet, "inverted": InvertedNet, "residual": ResNet}


# -------------------------------------------------------------------------------------------------------------- family


class Zoo(nn.Module):
    """Networks by name; each is {"architecture": one of ARCHITECTURES or "torchscript", and that one's arguments}.

    Input (N, channels, H, W), output logits (N, classes), of the last member that runs: of one, in a subnet. Files of
    members are in ``folder``; without one, they are not read.
    """

    def __init__(
        self, channels: int, classes: int, members: Mapping[str, Mapping[str, Any]], folder: Path | None = None
    ) -> None:
        super().__init__()
        _check("channels", [channels], 1024)
        _check("classes", [classes], 100_000)
        if not isinstance(members, Mapping) or not 1 <= len(members) <= MOST_MEMBERS:
            raise ValueError(f"members must be an object with 1 to {MOST_MEMBERS} networks, not {members!r:.60}")
        self.names = tuple(sorted(members))
        self.members = nn.ModuleList(_build(name, members[name], channels, classes, folder) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits = x
        for member in self.members:
            logits = member(x)
        return logits

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its members."""
        return tuple(member.path for member in self._imported.values())

    def check(self, x: Tensor) -> None:
        """Raise ValueError, naming it, for a member of a file that does not compute what one must of this input."""
        for name, member in self._imported.items():
            try:
                member.check(x)
            except ValueError as error:
                raise ValueError(f"members.{name}: {error}") from error

    @property
    def _imported(self) -> dict[str, Imported]:
        pairs = zip(self.names, self.members, strict=True)
        return {name: member for name, member in pairs if isinstance(member, Imported)}


def _build(name: str, spec: Mapping[str, Any], channels: int, classes: int, folder: Path | None) -> nn.Module:
    known = (*ARCHITECTURES, "torchscript")
    if not isinstance(spec, Mapping) or spec.get("architecture") not in known:
        raise ValueError(f"members.{name}.architecture must be one of {', '.join(known)}, in {spec!r:.60}")
    arguments = {key: value for key, value in spec.items() if key != "architecture"}
    try:
        if spec["architecture"] == "torchscript":
            return Imported(classes=classes, folder=folder, **arguments)
        network: nn.Module = ARCHITECTURES[spec["architecture"]](channels=channels, classes=classes, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"members.{name}: {error}") from error
    return network


def elastic(network: Zoo) -> Elastic:
    """Of all members, one runs."""

    def kept(subnet: Member) -> Sequence[int]:
        if subnet.name not in network.names:
            raise IllegalSubnetError(f"'{subnet.name}' is no member of the network: it has {', '.join(network.names)}")
        return (network.names.index(subnet.name),)

    return Elastic({"members": kept}, {}, {})
