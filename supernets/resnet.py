"""A small residual CNN for low-resolution images; plain torch, knows nothing of subnets."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ("stages.0", "stages.1", "stages.2")


def _check(name: str, values: Sequence[int], most: int) -> None:
    if not isinstance(values, Sequence) or any(type(each) is not int or not 1 <= each <= most for each in values):
        raise ValueError(f"{name} must be from 1 to {most}, not {values!r:.60}")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a residual addition; ``inner`` channels between them."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, pooling, classifier; the first block of a later stage halves the resolution.

    Input (N, channels, H, W), output logits (N, classes). ``widths`` are the channels that blocks exchange, stage by
    stage; inside a block there are as many.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], depths: Sequence[int], classes: int, stem_stride: int = 2
    ) -> None:
        super().__init__()
        _check("channels", [channels], 1024)
        _check("widths", widths, 8192)
        _check("depths", depths, 100)
        _check("classes", [classes], 100_000)
        _check("stem_stride", [stem_stride], 2)
        if not len(widths) == len(depths) == len(STAGES):
            raise ValueError(f"{len(widths)} widths and {len(depths)} depths for {len(STAGES)} stages")
        # An even kernel samples the strided grid symmetrically; an odd one is enough without stride.
        kernel = 4 if stem_stride == 2 else 3
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel, stem_stride, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        inputs = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for number in range(depth):
                blocks.append(BasicBlock(inputs, width, width, 2 if number == 0 and index > 0 else 1))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
