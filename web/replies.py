"""What a client is told of a query that was answered; ``/predict``, ``/stream`` and those who embed get the same."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


# These two are not frozen: each query makes both, and setting the fields of a frozen class takes three times as long.
@dataclass(slots=True, kw_only=True)
class Prediction:
    """One class with its probability."""

    label: str
    index: int
    probability: float

    def json(self) -> str:
        """The JSON form."""
        return f'{{"label": {_quoted(self.label)}, "index": {self.index}, "probability": {self.probability:.4g}}}'


@dataclass(slots=True, kw_only=True)
class Reply:
    """The answer to one query: what was seen, by which subnet, how accurate that subnet is, and when.

    ``predictions`` are the likeliest classes, ``probabilities`` those of all classes. ``members`` are the subnets of an
    ensemble; it is ``degraded``, and less accurate, where others failed that were to answer, too.
    """

    predictions: tuple[Prediction, ...]
    subnet: str
    accuracy: float
    batch_size: int
    slo_s: float
    latency_s: float
    queue_s: float
    deadline_met: bool
    degraded: bool = False
    probabilities: NDArray[np.float32] = field(compare=False, repr=False)

    @property
    def members(self) -> tuple[str, ...]:
        """The subnets that answered together; none where one answered alone."""
        members = tuple(self.subnet.split("+"))
        return members if len(members) > 1 else ()

    def json(self) -> str:
        """The JSON form, durations in milliseconds; written by hand, as json.dumps takes four times as long."""
        return (
            f'{{"predictions": [{", ".join([each.json() for each in self.predictions])}], '
            f"{_computed(self.subnet, self.accuracy, self.batch_size, self.degraded)}"
            f'"slo_ms": {self.slo_s * 1e3:.7g}, "latency_ms": {self.latency_s * 1e3:.6g}, '
            f'"queue_ms": {self.queue_s * 1e3:.6g}, "deadline_met": {"true" if self.deadline_met else "false"}}}'
        )


@functools.lru_cache(4096)
def _computed(subnet: str, accuracy: float, batch_size: int, degraded: bool) -> str:
    """What all queries of a batch are told, with what separates it from the next."""
    told = '"degraded": true, ' if degraded else ""
    return (
        f'"subnet": {_quoted(subnet)}, {_members(subnet)}{told}"accuracy": {accuracy:.4g}, "batch_size": {batch_size}, '
    )


def _members(name: str) -> str:
    """The JSON of an ensemble's members, with what separates it from the next."""
    return f'"members": {json.dumps(name.split("+"))}, ' if "+" in name else ""


@functools.lru_cache(4096)
def _quoted(name: str) -> str:
    """A label or a subnet as JSON; there are few, and many queries."""
    return json.dumps(name)
