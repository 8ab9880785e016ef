"""Subnets in the forms in which the public code of Once-for-All and DynaBERT takes them, turned into ours.

The official ``set_active_subnet`` changes a state: a scalar counts for every position, None (a whole argument or one
entry) leaves what was set before, a list of another length is cut or reaches only the first positions, and everything
is the largest at first. Ours takes none of this: it is one value, complete and checked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from supernet import SupernetError
from supernets.bert import BertSubnet
from supernets.ofa_mobilenet import OfaMobileNetSubnet
from supernets.ofa_resnet import OfaResNetSubnet

RESNET_WIDTHS = (0.65, 0.8, 1.0)
EXTRA_BLOCKS = 2  # that a stage of OFA ResNet50 may have beyond its base depth
STEM_KEPT = 2  # the only depth of its stem with which the residual unit runs


def merged(state: Sequence[Any], given: object) -> list[Any]:
    """The state after setting it to what was given."""
    values = list(given) if isinstance(given, list | tuple) else [given] * len(state)
    values += [None] * (len(state) - len(values))
    return [old if new is None else new for old, new in zip(state, values, strict=False)]


def ofa_resnet_subnet(depths: Sequence[int], *calls: Mapping[str, Any]) -> OfaResNetSubnet:
    """After these calls ``set_active_subnet(d, e, w)`` on a network of these depths.

    ``d``: the stem's, then blocks of each stage beyond its base depth; ``e``: of every block, those that do not run
    included; ``w``: indices of widths, of the stem's middle and output and of each stage.
    """
    d, e, w = [EXTRA_BLOCKS] * (1 + len(depths)), [0.35] * sum(depths), [2] * (2 + len(depths))
    for call in calls:
        _known(call, "d", "e", "w")
        d, e, w = (merged(each, call.get(name)) for name, each in (("d", d), ("e", e), ("w", w)))
    kept = tuple(min(most, most - EXTRA_BLOCKS + extra) for most, extra in zip(depths, d[1:], strict=True))
    if not all(each in range(len(RESNET_WIDTHS)) for each in w):
        raise SupernetError(f"w must be indices of {list(RESNET_WIDTHS)}, not {w}")
    widths = tuple(RESNET_WIDTHS[index] for index in w)
    return OfaResNetSubnet(kept, _of_running(e, depths, kept), widths, (int(d[0] == STEM_KEPT),))


def ofa_mobilenet_subnet(depths: Sequence[int], *calls: Mapping[str, Any]) -> OfaMobileNetSubnet:
    """After these calls ``set_active_subnet(ks, e, d)`` on a network of these depths.

    ``ks`` and ``e``: of every elastic block, those that do not run included; ``d``: blocks of each stage, at most all.
    """
    ks, e, d = [7] * sum(depths), [6] * sum(depths), list(depths)
    for call in calls:
        _known(call, "ks", "e", "d")
        ks, e, d = (merged(each, call.get(name)) for name, each in (("ks", ks), ("e", e), ("d", d)))
    kept = tuple(min(most, number) for most, number in zip(depths, d, strict=True))
    return OfaMobileNetSubnet(kept, _of_running(ks, depths, kept), _of_running(e, depths, kept))


def bert_subnet(width_mult: float = 1.0, depth_mult: float = 1.0) -> BertSubnet:
    """Of DynaBERT's two multipliers."""
    return BertSubnet((width_mult,), (depth_mult,))


def _known(call: Mapping[str, Any], *names: str) -> None:
    for name in call:
        if name not in names:
            raise SupernetError(f"set_active_subnet takes {', '.join(names)}, not {name}")


def _of_running(values: Sequence[Any], depths: Sequence[int], kept: Sequence[int]) -> tuple[Any, ...]:
    """The entries of the blocks that run, from a list by absolute block."""
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    return tuple(value for first, depth in zip(firsts, kept, strict=True) for value in values[first : first + depth])
