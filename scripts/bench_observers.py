"""What observing costs: the metrics and the live page, per query and per batch of eight, and what reading them costs.

Measured is the processor time of the observers' own calls for queries that are answered in time in batches of eight;
not measured is the dispatcher that calls them. Reading is one scrape of /metrics, and for the page its first request
(five busy minutes) and a later one (the last second); the page's figures also take memory. The last line of stdout is
one JSON document.

    python scripts/bench_observers.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dispatcher import Batch, Observer
from profiletable import Choice, Entry
from queries import Answer, Query
from web.live import SPAN_S, Live
from web.metrics import Metrics
from web.state import State

BATCH = 8
NAMES = tuple(f"d2-2-2-e0.{number}" for number in range(14))


class Nowhere:
    """A reply slot that nobody reads."""

    def done(self) -> bool:
        """Nobody waits."""
        return True

    def set_result(self, result: Answer, /) -> None:
        """Drop the answer."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Drop the error."""


class Clock:
    """Virtual time."""

    now_s = 0.0

    def __call__(self) -> float:
        """The instant."""
        return self.now_s


def batches() -> list[Batch]:
    """A full batch of each subnet, of queries that arrived up to 20 ms before it starts at 0."""
    found = []
    for number, name in enumerate(NAMES):
        choice = Choice(
            name=name, kind="subnet", accuracy=0.8 + number / 100, accuracy_samples=5000, test_accuracy=None,
            parameters=1000, macs=1000, frontier=True,
        )  # fmt: skip
        entry = Entry(choice=choice, latency_s=tuple(0.002 * size for size in range(BATCH + 1)))
        queries = tuple(
            Query(input=np.zeros(1), arrival_s=-0.02 * index / BATCH, slo_s=0.1, reply=Nowhere())
            for index in range(BATCH)
        )
        found.append(Batch(entry=entry, queries=queries, started_s=0.0))
    return found


def observe(observers: list[Observer], clock: Clock, work: list[Batch], rounds: int) -> float:
    """Seconds per query that the observers take."""
    answers = [Answer(np.zeros(1, np.float32), 0, batch.entry, BATCH, batch.started_s, 0.016) for batch in work]
    begin_s = time.thread_time()
    for _ in range(rounds):
        for batch, answer in zip(work, answers, strict=True):
            for observer in observers:
                for _query in batch.queries:
                    observer.arrived(clock.now_s)
                observer.batch_finished(batch, 0.017, 0.016)
                for query in batch.queries:
                    observer.ended(query, "in_time", clock.now_s, answer)
    return (time.thread_time() - begin_s) / (rounds * len(work) * BATCH)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    taken_s = []
    for _ in range(repeats):
        begin_s = time.thread_time()
        call()
        taken_s.append(time.thread_time() - begin_s)
    return statistics.median(taken_s)


def main() -> None:
    """Measure, print a line for people and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of 14 batches of 8 queries; default 100")
    rounds = parser.parse_args().rounds
    clock, work = Clock(), batches()
    state = State(
        ready=True, status="ready", workers=1, busy_workers=1, queue_depth=9, queue_limit=1000, oldest_age_s=0.01,
        slowdown=1.0, overhead_s=0.001, corrections=dict.fromkeys(NAMES, 1.0), held_bytes=1, held_subnets=9,
    )  # fmt: skip
    clock.now_s = 0.017
    metrics, live = Metrics(lambda: state, {"version": "0"}), Live(clock, lambda: 3)
    watched: dict[str, list[Observer]] = {"nothing": [], "metrics": [metrics], "live": [live], "both": [metrics, live]}
    per_query_us = {
        name: statistics.median(1e6 * observe(observers, clock, work, rounds) for _ in range(9))
        for name, observers in watched.items()
    }
    for second in range(SPAN_S + 1):
        clock.now_s = second
        observe([live], clock, work, 1)
    first_s = seconds_of(lambda: live.document(-1, state), 1)
    reading_ms = {
        "scrape": 1e3 * seconds_of(metrics.text, 20),
        "page_first": 1e3 * first_s,
        "page_next": 1e3 * seconds_of(lambda: live.document(SPAN_S - 2, state), 20),
    }
    tracemalloc.start()
    kept = Live(clock, lambda: 3)
    for second in range(2 * SPAN_S):
        clock.now_s = second
        observe([kept], clock, work, 1)
    document = {
        "page_memory_mb": round(tracemalloc.get_traced_memory()[0] / 1e6, 2),
        "observing_us_per_query": {name: round(value_us, 2) for name, value_us in per_query_us.items()},
        "reading_ms": {name: round(value_ms, 2) for name, value_ms in reading_ms.items()},
        "python": platform.python_version(),
        "prometheus_client": metadata.version("prometheus-client"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(f"{per_query_us['both']:.2f} µs a query for both observers, {reading_ms['scrape']:.2f} ms a scrape")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
