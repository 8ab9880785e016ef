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
    """Two 3x3 convolutions with batch norm around a residual addition; ``inner`` channels between them.

    A ``stride`` is taken by the first convolution, or, if ``pooled``, by maximum pooling after it.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, 1 if pooled else stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.pool: nn.Module = nn.MaxPool2d(stride) if pooled and stride != 1 else nn.Identity()
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, pooling, classifier.

    Input (N, channels, H, W), output logits (N, classes). ``widths`` are the channels that blocks exchange, stage by
    stage; inside a block there are as many. The first block of a stage halves the resolution: by stride, from the
    second stage on; or, if ``pooled``, by pooling in every stage, so that convolutions see each resolution in full
    (more accurate on small images, and more to compute). ``stem_width``: the stem's channels, those of the first stage
    unless given.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        classes: int,
        stem_stride: int = 2,
        stem_width: int = 0,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        _check("channels", [channels], 1024)
        _check("widths", widths, 8192)
        _check("depths", depths, 100)
        _check("classes", [classes], 100_000)
        _check("stem_stride", [stem_stride], 2)
        _check("stem_width", [stem_width or widths[0]], 8192)
        if type(pooled) is not bool:
            raise ValueError(f"pooled must be true or false, not {pooled!r:.60}")
        if not len(widths) == len(depths) == len(STAGES):
            raise ValueError(f"{len(widths)} widths and {len(depths)} depths for {len(STAGES)} stages")
        # An even kernel samples the strided grid symmetrically; an odd one is enough without stride.
        kernel = 4 if stem_stride == 2 else 3
        inputs = stem_width or widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, inputs, kernel, stem_stride, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()
        )
        stages: list[nn.Module] = []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for number in range(depth):
                stride = 2 if number == 0 and (pooled or index > 0) else 1
                blocks.append(BasicBlock(inputs, width, width, stride, pooled))
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
