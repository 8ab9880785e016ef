"""Networks of the package timm, by the names that it gives them: code that is not ours, made elastic by structure.

The package is an optional dependency: only servables of this family need it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention import split_attention
from operators import Elastic
from structure import Structure, examine
from supernets.ofa import check_sizes

# Arguments of timm's that read files, load over the network, or are given here already.
FORBIDDEN = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
    "num_classes", "in_chans", "features_only", "scriptable", "exportable",
)  # fmt: skip


class TimmNetwork(nn.Module):
    """A network of timm's with random weights, whose attention is split into layers that can be sliced.

    Input (N, *input_size), output logits (N, classes). ``model``: as ``timm.create_model`` takes it; ``arguments``: its
    further arguments. ``depth_rule``: which layers of a vision transformer run, as ``structure.examine`` says.
    """

    def __init__(
        self,
        model: str,
        classes: int,
        input_size: Sequence[int] = (3, 224, 224),
        arguments: Mapping[str, Any] | None = None,
        depth_rule: str = "every-other",
    ) -> None:
        super().__init__()
        check_sizes("classes", [classes], 1, 100_000)
        check_sizes("input_size", input_size, 3, 4096)
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(f"arguments must be an object, not {arguments!r:.40}")
        for name in arguments or {}:
            if name in FORBIDDEN:
                raise ValueError(f"arguments must not have {name}")
        self.input_size, self.depth_rule = tuple(input_size), depth_rule
        self.network = _create(model, {**(arguments or {}), "num_classes": classes, "in_chans": input_size[0]})
        split_attention(self.network)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.network(x)
        return logits


def structure(network: TimmNetwork) -> Structure:
    """What can be elastic in the network."""
    like = next(network.parameters())
    return examine(network, like.new_zeros(1, *network.input_size), depth_rule=network.depth_rule)


def elastic(network: TimmNetwork) -> Elastic:
    """Which part of the network a subnet uses."""
    return structure(network).elastic()


def _create(model: str, arguments: Mapping[str, Any]) -> nn.Module:
    timm = import_timm()
    if not isinstance(model, str) or not timm.is_model(model):
        near = difflib.get_close_matches(str(model), timm.list_models(), 3)
        raise ValueError(f"timm has no model '{model!s:.60}'{'; near: ' + ', '.join(near) if near else ''}")
    try:
        network: nn.Module = timm.create_model(model, pretrained=False, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        raise ValueError(f"timm cannot make '{model}' with these arguments: {error!s:.200}") from error
    return network


def import_timm() -> Any:
    """The package; raises ValueError, telling what to install, where it is missing."""
    declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"family 'timm' needs the package timm, which cannot be imported: {error}") from error


def declare_torchvision_operators() -> None:
    """Let torchvision be imported where its compiled operators do not load, as those built for CUDA without CUDA.

    timm imports it for the loading of data, which is not used here. Its import fails without the two operators to
    which it attaches further functions; they are declared, and never called.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _DECLARED or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))  # type: ignore[no-untyped-call]
    except OSError:
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


_DECLARED: list[Any] = []  # torch forgets the declarations with the object
