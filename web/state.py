"""What a server tells of itself at one moment; asked for by a scrape of /metrics and by the live page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Gauges of a server; ``status`` is "ready" or tells why it is not.

    ``corrections`` are factors by subnet; they are empty while there is no table. ``overhead_s`` is what answering
    takes beyond computing, as measured; ``held_bytes`` is what the engine holds beside the shared weights to run
    faster, for ``held_subnets`` subnets.
    """

    ready: bool
    status: str
    workers: int
    busy_workers: int
    queue_depth: int
    queue_limit: int
    oldest_age_s: float
    slowdown: float
    overhead_s: float
    corrections: Mapping[str, float]
    held_bytes: int
    held_subnets: int


def version() -> str:
    """The version of the installed package; "source" where the server runs from a checkout."""
    try:
        return metadata.version("superserve-edge")
    except metadata.PackageNotFoundError:
        return "source"
