"""How long a policy thinks: one decision with 1,000 queries waiting, at ease and in overload, for every policy.

Each decision sees the server's own heap of queries, with slack shortened by the server's margin, filled anew, with
arrivals remembered that fit it: *calm*, where the cheapest subnet can clear the queue long before it is due, and
*overload*, where most of it cannot be saved and early drop has to look ahead. Deadlines arrive in order (one SLO) or
mixed (three SLOs), which makes the heap sort. The first decision is not counted.

Filling the heap leaves little of the policy in the processor's caches, as a server's other work does. Garbage is
collected as in the server; collections within decisions are counted. A *control* row is of a loop that does nothing for
about as long as a decision takes, in the same run and after the same filling: what its 99th percentile is above its
median, is the machine's doing. The last line of stdout is one JSON document; times are in microseconds.

    python scripts/bench_policies.py
    python scripts/bench_policies.py --margin 0
    python scripts/bench_policies.py --waiting 64 --policies pacefit halfslo
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

import slackfit  # noqa: E402 the path is set above
from config import Config  # noqa: E402
from queries import DeadlineHeap, Query  # noqa: E402
from scripts import replay  # noqa: E402
from scripts.compare_policies import RIVALS, TABLES, Bench  # noqa: E402
from startup import settle_garbage  # noqa: E402
from wholefile import write_text  # noqa: E402

NOTHING = np.empty(0)
CONTROL, CONTROL_US = "control", 30.0
STATES = {"calm": 40.0, "overload": 1.0}  # how many SLOs the deadlines are spread over


class _NoReply:
    """A place for an answer that never comes."""

    def done(self) -> bool:
        return False

    def set_result(self, result: object, /) -> None:
        raise AssertionError("nothing is answered here")

    def set_exception(self, exception: BaseException, /) -> None:
        raise AssertionError("nothing is answered here")


class Loop(slackfit.Policy):
    """No policy: a loop that does nothing, as long as a decision takes when nothing disturbs it."""

    name = CONTROL

    def __init__(self) -> None:
        self._turns = 100
        while self.least_us() < CONTROL_US:
            self._turns += self._turns // 10

    def least_us(self) -> float:
        """Undisturbed: the least of several."""
        return min(self._timed_us() for _ in range(50))

    def _timed_us(self) -> float:
        started_s = time.perf_counter()
        self._idle()
        return (time.perf_counter() - started_s) * 1e6

    def _idle(self) -> None:
        for _ in range(self._turns):
            pass

    def decide(self, now_s: float, queue: slackfit.QueueView, lowest: int = 0) -> slackfit.Decision:
        """Nothing is decided."""
        self._idle()
        return slackfit.Decision(0, None, 0)


def filled(waiting: int, slo_s: float, spread: float, mixed: bool, now_s: float, seed: int) -> DeadlineHeap:
    """A heap of queries that are due from a tenth of an SLO on, over ``spread`` SLOs."""
    heap, rng = DeadlineHeap(), np.random.default_rng(seed)
    deadlines_s = now_s + 0.1 * slo_s + np.sort(rng.random(waiting)) * spread * slo_s
    slos_s = slo_s * (rng.choice([0.6, 1.0, 2.8], waiting) if mixed else np.ones(waiting))
    order = np.argsort(deadlines_s - slos_s, kind="stable")  # the order in which they arrived
    for deadline, slo in zip(deadlines_s[order].tolist(), slos_s[order].tolist(), strict=True):
        heap.push(Query(input=NOTHING, arrival_s=deadline - slo, slo_s=slo, reply=_NoReply()))
    return heap


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a row is measured with."""

    bench: Bench
    state: str
    mixed: bool
    waiting: int
    rounds: int
    margin: float


def decisions(spec: str, setting: Setting) -> tuple[list[float], int]:
    """Microseconds of each decision, and in how many of them garbage was collected."""
    slo_s, stretch = setting.bench.slo_s, 1 + setting.margin
    policy = Loop() if spec == CONTROL else slackfit.make_policy(spec, setting.bench.table)
    taken: list[float] = []
    collected = 0
    for number in range(setting.rounds + 1):
        now_s = number * 10 * slo_s
        for age in np.linspace(-2, 0, 200).tolist():  # arrivals of the last two SLOs
            policy.arrived(now_s + age * slo_s, slo_s / stretch)
        heap = filled(setting.waiting, slo_s, STATES[setting.state], setting.mixed, now_s, number)
        collections = _collections()
        started_s = time.perf_counter()
        # As the dispatcher does it, which makes a view of the queue for each decision.
        policy.decide(now_s, slackfit.QueueView(heap.deadlines_s, stretch))
        taken.append((time.perf_counter() - started_s) * 1e6)
        collected += _collections() > collections
    return taken[1:], collected


def _collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every policy, table, state and kind of SLOs, and for the control."""
    benches = [Bench.of(path) for path in TABLES if any(path.glob("latency-*.json"))]
    settings = [
        Setting(
            bench=bench, state=state, mixed=mixed, waiting=options.waiting, rounds=options.rounds, margin=options.margin
        )
        for bench in benches for state in STATES for mixed in (False, True)
    ]  # fmt: skip
    plan = [(spec, setting) for setting in settings for spec in (*options.policies, CONTROL)]
    settle_garbage()
    rows = []
    for spec, setting in tqdm(plan, desc="policies", disable=None):
        taken, collected = decisions(spec, setting)
        rows.append({
            "table": setting.bench.path.name, "policy": spec, "state": setting.state,
            "slos": "mixed" if setting.mixed else "one", "p50_us": round(statistics.median(taken), 1),
            "p99_us": round(float(np.percentile(taken, 99)), 1), "collected": collected,
        })  # fmt: skip
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=1000, help="queries in the heap (default: 1000)")
    parser.add_argument("--rounds", type=int, default=300, help="decisions for each row (default: 300)")
    parser.add_argument("--margin", type=float, default=Config().margin, help="as the server's (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", default=list(RIVALS), help=f"default: {' '.join(RIVALS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document to a file, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, then the document."""
    options = parse_arguments(arguments)
    try:
        rows = measure(options)
    except slackfit.PolicyError as error:
        sys.exit(f"bench_policies.py: {error}")
    for row in rows:
        where = f"{row['table']:<20} {row['policy']:<12} {row['state']:<9} {row['slos']:<6}"
        print(f"{where} p50 {row['p50_us']:7.1f} us  p99 {row['p99_us']:7.1f} us")
    settings = {"waiting": options.waiting, "margin": options.margin, "rounds": options.rounds}
    document = {"cores": os.cpu_count(), **replay.provenance(), **settings, "rows": rows}
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
