"""Architecture families: plain torch networks, one file each; supernet.py makes them elastic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from supernets import resnet

FAMILIES = {"resnet": (resnet.ResNet, resnet.STAGES)}


def build(family: str, architecture: Mapping[str, Any]) -> tuple[nn.Module, Sequence[str]]:
    """The family's plain network with random weights, and the names of its stages; raises ValueError if unknown."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"unknown family '{family}'; known: {', '.join(sorted(FAMILIES))}")
    network, stages = FAMILIES[family]
    try:
        return network(**architecture), stages
    except (TypeError, ValueError) as error:
        raise ValueError(f"architecture does not fit family '{family}': {error}") from error
