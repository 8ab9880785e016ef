"""Poison: images of one grey that make the engine fail, each in its own way; as a command, a server with that engine.

    python tests/faults.py --profile profiles/digits
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import superserve
from cudagraphs import Network
from engine import Engine

GREYS = {
    "hang": 255, "lost": 254, "raise": 253, "nan": 252, "count": 251, "slow": 250, "memory": 249, "cuda memory": 248,
}  # fmt: skip
SLOW_S = 0.25
SIDE = 8


def poison(fault: str) -> NDArray[np.uint8]:
    """An image for the tiny servable that makes this happen to its batch."""
    return np.full((SIDE, SIDE, 3), GREYS[fault], np.uint8)


class Faults:
    """What an engine's ``faults`` is set to; hangs end when ``released`` is set."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.hung = 0
        self.sizes: list[int] = []  # of what ran out of memory, or was tried to

    def __call__(self, name: str, network: Network) -> Network:
        return functools.partial(self._compute, network)

    def _compute(self, network: Network, x: Tensor) -> Tensor:
        found = self._faults_in(x)
        if "hang" in found:
            self.hung += 1
            superserve.log_event("a batch hangs")
            self.released.wait()
        if "slow" in found:
            superserve.log_event("a slow batch")
            until_s = time.perf_counter() + SLOW_S
            while time.perf_counter() < until_s:
                network(x)
        if "lost" in found:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if "raise" in found:
            raise LookupError("a secret of the house")
        self._run_out(found, len(x))
        logits = network(x)
        if "nan" in found:
            logits[self._rows(x, "nan")] = torch.nan
        return torch.cat([logits, logits[:1]]) if "count" in found else logits

    def _run_out(self, found: set[str], size: int) -> None:
        if found & {"memory", "cuda memory"}:
            self.sizes.append(size)
            if size > 1 and "memory" in found:
                torch.empty(1 << 50, dtype=torch.uint8)  # no machine has as much
            if size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    @staticmethod
    def _rows(x: Tensor, fault: str) -> Tensor:
        """Which rows hold this poison; normalised as the tiny servable says."""
        return ((x - (GREYS[fault] / 255 - 0.5) / 0.25).abs() < 1e-3).flatten(1).all(1)

    def _faults_in(self, x: Tensor) -> set[str]:
        return {fault for fault in GREYS if bool(self._rows(x, fault).any())}


if __name__ == "__main__":
    Engine.faults = Faults()
    superserve.main()
