"""How long a policy thinks: one decision with 1,000 queries waiting, at ease and in overload, for every policy.

Each decision sees the server's own heap of queries, filled anew, with arrivals remembered that fit it: *calm*, where
the cheapest subnet can clear the queue long before it is due, and *overload*, where most of it cannot be saved and
early drop has to look ahead. Deadlines arrive in order (one SLO) or mixed (three SLOs), which makes the heap sort. The
first decision is not counted. The last line of stdout is one JSON document; times are in microseconds.

    python scripts/bench_policies.py
    python scripts/bench_policies.py --waiting 64 --policies pacefit halfslo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

import slackfit  # noqa: E402 the path is set above
from dispatcher import DeadlineHeap, Query  # noqa: E402
from scripts import replay  # noqa: E402
from scripts.compare_policies import RIVALS, TABLES, Bench  # noqa: E402
from wholefile import write_text  # noqa: E402

NOTHING = np.empty(0)
STATES = {"calm": 40.0, "overload": 1.0}  # how many SLOs the deadlines are spread over


class _NoReply:
    """A place for an answer that never comes."""

    def done(self) -> bool:
        return False

    def set_result(self, result: object, /) -> None:
        raise AssertionError("nothing is answered here")

    def set_exception(self, exception: BaseException, /) -> None:
        raise AssertionError("nothing is answered here")


def filled(waiting: int, slo_s: float, spread: float, mixed: bool, now_s: float, seed: int) -> DeadlineHeap:
    """A heap of queries that are due from a tenth of an SLO on, over ``spread`` SLOs."""
    heap, rng = DeadlineHeap(), np.random.default_rng(seed)
    deadlines_s = now_s + 0.1 * slo_s + np.sort(rng.random(waiting)) * spread * slo_s
    slos_s = slo_s * (rng.choice([0.6, 1.0, 2.8], waiting) if mixed else np.ones(waiting))
    order = np.argsort(deadlines_s - slos_s, kind="stable")  # the order in which they arrived
    for deadline, slo in zip(deadlines_s[order].tolist(), slos_s[order].tolist(), strict=True):
        heap.push(Query(input=NOTHING, arrival_s=deadline - slo, slo_s=slo, reply=_NoReply()))
    return heap


def decision_us(spec: str, bench: Bench, waiting: int, state: str, mixed: bool, rounds: int) -> list[float]:
    """Microseconds of each decision."""
    policy, taken = slackfit.make_policy(spec, bench.table), []
    for number in range(rounds + 1):
        now_s = number * 10 * bench.slo_s
        for age in np.linspace(-2, 0, 200):  # arrivals of the last two SLOs
            policy.arrived(now_s + age * bench.slo_s, bench.slo_s)
        heap = filled(waiting, bench.slo_s, STATES[state], mixed, now_s, number)
        started_s = time.perf_counter()
        policy.decide(now_s, heap)
        taken.append((time.perf_counter() - started_s) * 1e6)
    return taken[1:]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every policy, table, state and kind of SLOs."""
    benches = [Bench.of(path) for path in TABLES if any(path.glob("latency-*.json"))]
    plan = [
        (bench, spec, state, mixed)
        for bench in benches for spec in options.policies for state in STATES for mixed in (False, True)
    ]  # fmt: skip
    rows = []
    for bench, spec, state, mixed in tqdm(plan, desc="policies", disable=None):
        taken = decision_us(spec, bench, options.waiting, state, mixed, options.rounds)
        rows.append({
            "table": bench.path.name, "policy": spec, "state": state, "slos": "mixed" if mixed else "one",
            "p50_us": round(statistics.median(taken), 1), "p99_us": round(float(np.percentile(taken, 99)), 1),
        })  # fmt: skip
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=1000, help="queries in the heap (default: 1000)")
    parser.add_argument("--rounds", type=int, default=300, help="decisions for each row (default: 300)")
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
    document = {"cores": os.cpu_count(), **replay.provenance(), "waiting": options.waiting, "rows": rows}
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
