"""What happened to queries and batches since the start, as the Open Inference Protocol's statistics tell it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispatcher import Batch
    from queries import Answer, Answered, Query


@dataclass(slots=True)
class Total:
    """How many there were, and how long they took together."""

    count: int = 0
    taken_s: float = 0.0

    def add(self, taken_s: float, count: int = 1) -> None:
        """Count one more, or several together."""
        self.count += count
        self.taken_s += taken_s

    def document(self) -> dict[str, int]:
        """The protocol's form, in nanoseconds."""
        return {"count": self.count, "ns": round(self.taken_s * 1e9)}


@dataclass(slots=True)
class Statistics:
    """An observer of the dispatcher. Each query counts once, however many came in one request.

    Inputs are prepared as part of their batch: ``compute_input`` takes no time, ``compute_infer`` is the whole batch.
    ``queue`` is from arrival to the start of the batch, ``compute_output`` from its end to the reply. Cancelled queries
    are left out. Clients get ``last_inference`` as a time of the day, so that this one clock is the wall's.
    """

    wall_clock: Callable[[], float] = time.time
    last_inference_ms: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute_infer: Total = field(default_factory=Total)
    compute_output: Total = field(default_factory=Total)
    batches: dict[int, Total] = field(default_factory=dict)

    def arrived(self, now_s: float) -> None:
        """Nothing is counted before it ends."""

    def arrived_together(self, now_s: float, count: int) -> None:
        """Nor of several."""

    def batch_failed(self, batch: Batch) -> None:
        """Its queries are told one by one."""

    def ended(self, query: Query, outcome: str, now_s: float, answer: Answer | None) -> None:
        """Count one query as a success or a failure."""
        if answer is not None:
            self.answered(((query, answer),), outcome, now_s)
        elif outcome != "cancelled":
            self.fail.add(now_s - query.arrival_s)

    def answered(self, answered: Sequence[Answered], outcome: str, now_s: float) -> None:
        """Count queries as successes."""
        self.last_inference_ms = int(self.wall_clock() * 1e3)
        taken_s = queue_s = infer_s = output_s = 0.0
        for query, answer in answered:
            taken_s += now_s - query.arrival_s
            queue_s += answer.started_s - query.arrival_s
            infer_s += answer.finished_s - answer.started_s
            output_s += now_s - answer.finished_s
        sums = (self.success, taken_s), (self.queue, queue_s), (self.compute_infer, infer_s)
        for total, each_s in (*sums, (self.compute_output, output_s)):
            total.add(each_s, len(answered))

    def batch_finished(self, batch: Batch, taken_s: float, predicted_s: float) -> None:
        """Count one batch by its size."""
        self.batches.setdefault(len(batch.queries), Total()).add(taken_s)

    def document(self, name: str, version: str) -> dict[str, Any]:
        """One element of ``model_stats``."""
        nothing = Total().document()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.success.count,
            "execution_count": sum(total.count for total in self.batches.values()),
            "inference_stats": {
                "success": self.success.document(),
                "fail": self.fail.document(),
                "queue": self.queue.document(),
                "compute_input": Total(self.success.count).document(),
                "compute_infer": self.compute_infer.document(),
                "compute_output": self.compute_output.document(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": Total(total.count).document(),
                    "compute_infer": total.document(),
                    "compute_output": Total(total.count).document(),
                }
                for size, total in sorted(self.batches.items())
            ],
            "memory_usage": [],
        }
