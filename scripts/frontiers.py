"""The accuracy/latency frontier of candidates that were looked at, and which of it are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a search found out about one subnet or ensemble; latency at the search's batch size.

    ``accuracy`` is that on the images by which the frontier is chosen, ``confirmed`` that on the others.
    """

    name: str
    accuracy: float
    confirmed: float
    latency_s: float
    parameters: int
    macs: int


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates to which no other is both more accurate and faster, fastest first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.latency_s, -each.accuracy)):
        if not kept or candidate.accuracy > kept[-1].accuracy:
            kept.append(candidate)
    return kept


def confirmed(chosen: Sequence[Candidate]) -> list[Candidate]:
    """Those of a frontier that are still more accurate than all faster ones on the images that did not choose it."""
    return frontier([replace(each, accuracy=each.confirmed) for each in chosen])


def thinned(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """At most this many of a frontier, the ends included: repeatedly leave out the one that the hull misses least."""
    kept = list(candidates)
    while len(kept) > max(2, most):
        losses = [_lost_without(*kept[i - 1 : i + 2]) for i in range(1, len(kept) - 1)]
        del kept[1 + int(np.argmin(losses))]
    return kept


def _lost_without(before: Candidate, middle: Candidate, after: Candidate) -> float:
    """Accuracy lost, integrated over latency, when the faster neighbour must stand in for the middle one."""
    return (middle.accuracy - before.accuracy) * (after.latency_s - middle.latency_s)
