"""Architecture families, one file each: plain torch networks, and what of them is elastic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from operators import Elastic
from subnets import Space, SubnetSpace
from supernets import bert, ofa_mobilenet, ofa_resnet, resnet, timm_models, zoo


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's network is made, what its space is, and what is elastic: declared, or found in these stages.

    ``text``: whether inputs are token ids rather than images. ``files``: whether parts of the network can be in files
    of their own: it takes the ``folder`` that they are in, tells its ``files``, and can ``check`` them on an input.
    """

    network: Callable[..., nn.Module]
    space: type[Space]
    elastic: Callable[[Any], Elastic] | Sequence[str]
    text: bool = False
    files: bool = False


FAMILIES = {
    "bert": Family(bert.Bert, bert.BertSpace, bert.elastic, text=True),
    "ofa_mobilenet": Family(ofa_mobilenet.OfaMobileNet, ofa_mobilenet.OfaMobileNetSpace, ofa_mobilenet.elastic),
    "ofa_resnet": Family(ofa_resnet.OfaResNet, ofa_resnet.OfaResNetSpace, ofa_resnet.elastic),
    "resnet": Family(resnet.ResNet, SubnetSpace, resnet.STAGES),
    "timm": Family(timm_models.TimmNetwork, SubnetSpace, timm_models.elastic),
    "zoo": Family(zoo.Zoo, zoo.ZooSpace, zoo.elastic, files=True),
}


def family_of(name: str) -> Family:
    """The family of this name; raises ValueError, listing the known ones, if there is none."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"unknown family '{name}'; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def build(
    name: str, architecture: Mapping[str, Any], folder: Path | None = None
) -> tuple[nn.Module, Elastic | Sequence[str]]:
    """The family's plain network with random weights, and what of it is elastic; raises ValueError if unknown.

    What is in files is read from ``folder``, if there is one.
    """
    family = family_of(name)
    try:
        network = family.network(**architecture, **({"folder": folder} if family.files else {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"architecture does not fit family '{name}': {error}") from error
    return network, family.elastic(network) if callable(family.elastic) else family.elastic
