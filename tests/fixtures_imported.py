"""Files of networks that are not ours, as their owners save them; import what you need."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supernets.imported import deprecation_known

SIDE, CLASSES = 16, ("a", "b", "c", "d")
INPUT: dict[str, Any] = {"height": SIDE, "width": SIDE, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


class Foreign(nn.Module):
    """A small network with what matters here: norms, dropout, a scalar, a tensor made at run time, a size read."""

    def __init__(self, width: int = 8, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5)
        )
        self.classifier = nn.Linear(4 * width, classes)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.num_classes = classes
        nn.init.uniform_(self.body[1].running_mean, -0.5, 0.5)
        nn.init.uniform_(self.body[1].running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(self.body(x), 2)
        y = y.reshape(y.shape[0], -1)
        logits: Tensor = self.classifier(y + torch.zeros(y.shape[1], device=y.device))
        return logits * self.scale


def foreign(seed: int = 0, width: int = 8, classes: int = 4, channels: int = 3) -> Foreign:
    """A network with random weights, in evaluation."""
    torch.manual_seed(seed)
    return Foreign(width, classes, channels).eval()


def write_torchscript(
    path: Path, network: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (1, 3, SIDE, SIDE)
) -> Path:
    """Trace and save."""
    with deprecation_known():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # norms in training mode look at sizes
        torch.jit.save(torch.jit.trace(network, torch.randn(shape), check_trace=False), path)
    return path


def write_scripted(path: Path, network: nn.Module) -> Path:
    """Compile and save."""
    with deprecation_known():
        torch.jit.save(torch.jit.script(network), path)
    return path


def write_exported(path: Path, network: nn.Module, fixed: bool = False, batch: int = 2) -> Path:
    """Export and save, for batches of any size unless ``fixed``."""
    sizes = None if fixed else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (torch.randn(batch, 3, SIDE, SIDE),), dynamic_shapes=sizes)
    torch.export.save(program, path)
    return path


def rewrite(
    path: Path, change: Callable[[str, bytes], bytes], more: Mapping[str, bytes] | None = None, packed: bool = False
) -> Path:
    """Replace what is in an archive, record by record, and add to it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(records)).partition("/")[0]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
        for name, content in (more or {}).items():
            archive.writestr(f"{top}/{name}", content)
    path.write_bytes(file.getvalue())
    return path
