"""Compare policies on the same arrivals, in the simulator: who answers in time, how accurately, how near the optimum.

The grid runs policies × workloads × latency tables with one worker, each beside its optimum (scripts/oracle.py). Loads
are relative to the most that the cheapest subnet bears within the SLO; real traces are squeezed in time so that the
mean of the whole trace is that load: a test of their shape, not of their time scale. The other studies vary one thing
at a time: load, burstiness, acceleration, workers, worker failures, latency errors, mixed SLOs. The last line of stdout
is one JSON document of the grid; --json writes it with the studies, and --plots draws them.

    python scripts/compare_policies.py --quick
    python scripts/compare_policies.py --json policies.json --plots plots/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from config import Config
from scripts import plot_policies, replay, workloads
from scripts.oracle import OracleError, optimum
from scripts.simulate import QUIET, Noise, Outage, Results, SimulationError, load_table, simulate
from slackfit import ProfileError, ProfileTable
from wholefile import write_text

ROOT = Path(__file__).resolve().parent.parent
TABLES = (ROOT / "profiles" / "paper-ofa-resnet50", ROOT / "profiles" / "cifar10")
TRACES = ROOT.parent / "shared" / "data" / "traces"
RIVALS = ("clearfit", "pacefit", "halfslo", "slackfit", "slackfit:8", "maxbatch", "maxaccuracy", "cheapest")
QUICK_RIVALS = ("clearfit", "pacefit", "halfslo", "slackfit", "maxbatch", "cheapest")
FLEET = 8  # workers in the studies that follow the paper's
TIMELINE_S = 0.1


# ------------------------------------------------------------------------------------------------------------ workloads


@dataclass(frozen=True, slots=True)
class Families:
    """POLICY.md's families of arrivals, about ``queries`` each, at loads of a device that bears ``capacity`` a second.

    Held-out seeds: those from 1000 on were not used to choose any policy's constants.
    """

    capacity: float
    queries: int
    seed: int = 1000

    def poisson(self, load: float) -> workloads.Arrivals:
        """Arrivals independent of each other."""
        rate = load * self.capacity
        return workloads.poisson(rate, self.queries / rate, self.seed)

    def bursty(self, cv2: float, load: float) -> workloads.Arrivals:
        """The paper's bursty family: a third of the load constant, two thirds in bursts."""
        rate = load * self.capacity
        return workloads.bursty(rate / 3, rate * 2 / 3, cv2, self.queries / rate, self.seed + round(cv2))

    def accelerating(self, acceleration: float, to_load: float = 0.9, cv2: float = 8.0) -> workloads.Arrivals:
        """The paper's time-varying family, from a load of 0.15 on."""
        slow, fast = 0.15 * self.capacity, to_load * self.capacity
        ramp_s = (fast - slow) / acceleration
        duration_s = ramp_s + max(1.0, (self.queries - ramp_s * (slow + fast) / 2) / fast)
        arrivals = workloads.accelerating(slow, fast, acceleration, cv2, duration_s, self.seed + 3)
        return np.sort(arrivals)[: self.queries]

    def trace(self, name: str, load: float) -> workloads.Arrivals:
        """A part of a real trace, from a place that the seed picks."""
        squeezed = workloads.squeeze(_trace(name), load * self.capacity)
        first = np.random.default_rng(self.seed).integers(max(1, len(squeezed) - self.queries))
        cut = squeezed[first : first + self.queries]
        return cut - cut[0]


@cache
def _trace(name: str) -> workloads.Arrivals:
    return workloads.load_trace(TRACES / name)


def grid_workloads(families: Families, quick: bool) -> Iterator[tuple[str, Callable[[], workloads.Arrivals]]]:
    """The workloads of the grid by name; those of real traces only where there are traces."""
    for load in (0.4, 0.8, 0.95, 1.2) if quick else (0.2, 0.4, 0.6, 0.8, 0.95, 1.2):
        yield f"poisson {load:g}", partial(families.poisson, load)
    for cv2 in (8,) if quick else (2, 4, 8):
        for load in (0.4, 0.6, 0.8):
            yield f"bursty cv²={cv2} {load:g}", partial(families.bursty, cv2, load)
    for acceleration in (500,) if quick else (250, 500, 5000):
        yield f"accelerating {acceleration}/s²", partial(families.accelerating, acceleration)
    if TRACES.is_dir():
        for load in (0.3, 0.6):
            yield f"twitter {load:g}", partial(families.trace, "twitter_normal.txt.gz", load)
        for load in (0.15, 0.3):
            yield f"code {load:g}", partial(families.trace, "azure_llm_code_2023.txt.gz", load)


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload on one table, for all policies to be compared on."""

    study: str
    table: Path
    workload: str
    arrivals: workloads.Arrivals
    slos_s: NDArray[np.float64]
    policies: tuple[str, ...]
    workers: int = 1
    noise: Noise = QUIET
    x: float | None = None  # what the study varies
    bins: int = 0  # of the optimum; 0: it is not computed
    timeline: bool = False

    @property
    def cost(self) -> float:
        """How long it takes, in no unit: the optimum, if it is computed, takes longest."""
        return len(self.arrivals) * (len(self.policies) + self.bins / 4)


def run_case(case: Case) -> list[dict[str, Any]]:
    """A row for each policy."""
    table = load_table(case.table)
    bound = optimum(case.arrivals, case.slos_s, table, case.workers, bins=case.bins) if case.bins else None
    rows = []
    for spec in case.policies:
        policy = slackfit.make_policy(spec, table, case.workers)
        results = simulate(case.arrivals, case.slos_s, table, policy, workers=case.workers, noise=case.noise, seed=1)
        row = {
            "study": case.study, "table": case.table.name, "workload": case.workload, "policy": spec, "x": case.x,
            "workers": case.workers, "queries": len(case.arrivals), **_figures(results),
            "optimum_utility": None if bound is None else _rounded(bound.upper),
            "optimum_reached": None if bound is None or bound.lower is None else _rounded(bound.lower),
        }  # fmt: skip
        if case.timeline:
            row["timeline"] = replay.timeline(results, TIMELINE_S)
        rows.append(row)
    return rows


def _figures(results: Results) -> dict[str, float | None]:
    return {
        "attainment": _rounded(results.attainment),
        "accuracy": _rounded(results.mean_accuracy),
        "utility": _rounded(results.utility),
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


@dataclass(frozen=True, slots=True)
class Bench:
    """A table with the SLO and the capacity that go with it, as the paper chose its SLO."""

    path: Path
    table: ProfileTable
    slo_s: float

    @staticmethod
    def of(path: Path, slo_s: float | None = None) -> Bench:
        """By default the SLO leaves a fifth of room around the most accurate subnet at batch 16: the paper's 36 ms."""
        table = load_table(path)
        slowest_s = table.most_accurate.latency_s[min(16, table.max_batch)]
        return Bench(path, table, slo_s or round(1.2 * slowest_s, 4))

    @property
    def capacity(self) -> float:
        """Queries a second that one worker bears in the best batches of the cheapest subnet within the SLO."""
        latency_s = self.table.fastest.latency_s
        return max(size / latency_s[size] for size in range(1, len(latency_s)) if latency_s[size] <= self.slo_s)

    def case(self, study: str, workload: str, arrivals: workloads.Arrivals, **more: Any) -> Case:
        """A case in which all queries have this SLO, unless ``slos_s`` says otherwise."""
        more.setdefault("slos_s", np.full(len(arrivals), self.slo_s))
        return Case(study=study, table=self.path, workload=workload, arrivals=arrivals, **more)


def grid(bench: Bench, queries: int, policies: tuple[str, ...], bins: int, quick: bool) -> Iterator[Case]:
    """All workloads, one worker, with the optimum."""
    for name, make in grid_workloads(Families(bench.capacity, queries), quick):
        yield bench.case("grid", name, make(), policies=policies, bins=bins)


# -------------------------------------------------------------------------------------------------------------- studies


def studies(bench: Bench, queries: int, policies: tuple[str, ...]) -> Iterator[Case]:
    """What the paper's figures show, each for all policies and for every subnet alone, and what it does not show."""
    fixed = tuple(f"fixed:{entry.name}" for entry in bench.table.entries)
    one, fleet = Families(bench.capacity, queries), Families(bench.capacity * FLEET, 4 * queries)
    for load in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        yield bench.case("load", f"poisson {load:g}", one.poisson(load), x=load, policies=policies)
    for cv2 in (1, 2, 4, 8):
        for load in (0.25, 0.32, 0.4):  # the paper's own range, one third of it constant
            name = f"bursty cv²={cv2} {load:g}"
            arrivals = fleet.bursty(cv2, load)
            yield bench.case(
                "burstiness", name, arrivals, x=cv2, workers=FLEET, policies=policies + fixed, timeline=cv2 == 8
            )
    for acceleration in (250, 500, 5000):
        arrivals = fleet.accelerating(acceleration, 0.4)
        yield bench.case(
            "acceleration", f"accelerating {acceleration}/s²", arrivals, x=acceleration, workers=FLEET,
            policies=policies + fixed,
        )  # fmt: skip
    if TRACES.is_dir():
        for name, loads in {"code": (0.02, 0.03, 0.04, 0.06, 0.1), "twitter": (0.1, 0.15, 0.2, 0.25)}.items():
            file = {"code": "azure_llm_code_2023.txt.gz", "twitter": "twitter_normal.txt.gz"}[name]
            for load in loads:
                yield bench.case("traces", f"{name} {load:g}", one.trace(file, load), x=load, policies=policies + fixed)
    yield from _fleet_studies(bench, queries, policies)


def _fleet_studies(bench: Bench, queries: int, policies: tuple[str, ...]) -> Iterator[Case]:
    for workers in (1, 2, 4, 8, 16, 32, 64):
        arrivals = Families(bench.capacity * workers, queries * max(1, workers // 4)).bursty(4, 0.6)
        yield bench.case("workers", "bursty cv²=4 0.6", arrivals, x=workers, workers=workers, policies=policies)
    fleet = Families(bench.capacity * FLEET, 4 * queries)
    arrivals = fleet.bursty(2, 0.35)
    step_s = float(arrivals[-1]) / 5  # one after the other, half of them are lost, as in the paper
    outages = tuple(Outage(worker, (worker + 1) * step_s, math.inf) for worker in range(4))
    yield bench.case(
        "failures", "bursty cv²=2 0.35", arrivals, workers=FLEET, noise=Noise(outages=outages), policies=policies,
        timeline=True,
    )  # fmt: skip
    one = Families(bench.capacity, queries)
    for sigma in (0.05, 0.1, 0.2):
        for load in (0.4, 0.8):
            noise, arrivals = Noise(sigma=sigma), one.bursty(4, load)
            yield bench.case(
                "noise", f"bursty cv²=4 {load:g}", arrivals, x=sigma, noise=noise, policies=policies, bins=96
            )
    for load in (0.4, 0.6, 0.8):
        arrivals = one.bursty(4, load)
        slos_s = bench.slo_s * np.random.default_rng(5).choice([0.6, 1.0, 2.8], len(arrivals))
        name = f"bursty cv²=4 {load:g}, SLOs x0.6, x1, x2.8"
        yield bench.case("mixed", name, arrivals, x=load, slos_s=slos_s, policies=policies, bins=96)
    for load in (0.4, 0.6, 0.8):
        arrivals = Families(bench.capacity * FLEET, queries).bursty(4, load)
        yield bench.case("fleet", f"bursty cv²=4 {load:g}", arrivals, x=load, workers=FLEET, policies=policies, bins=96)


# -------------------------------------------------------------------------------------------------------------- results


def shares_of_optimum(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each policy the mean and the least share of the optimum over the rows that have one."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["optimum_utility"]:
            shares.setdefault(row["policy"], []).append(row["utility"] / row["optimum_utility"])
    return {
        policy: {"mean": round(sum(each) / len(each), 5), "least": round(min(each), 5)}
        for policy, each in sorted(shares.items(), key=lambda item: -sum(item[1]))
    }


def advantages(rows: Sequence[dict[str, Any]], policy: str) -> list[dict[str, Any]]:
    """For each workload: the policy against the most accurate fixed subnet with no less attainment, and against the
    best attainment among the fixed subnets with no less accuracy; null where there is none."""
    found = []
    for ours in (row for row in rows if row["policy"] == policy):
        fixed = [
            row for row in rows
            if row["policy"].startswith("fixed:") and row["accuracy"] and _same_workload(row, ours)
        ]  # fmt: skip
        as_often = [row for row in fixed if row["attainment"] >= ours["attainment"] - 0.0005]
        as_accurate = [row for row in fixed if row["accuracy"] >= ours["accuracy"]]
        found.append({
            "study": ours["study"], "table": ours["table"], "workload": ours["workload"],
            "attainment": ours["attainment"], "accuracy": ours["accuracy"],
            "points_at_equal_attainment": _points(ours, as_often),
            "times_attainment_at_equal_accuracy": _times(ours, as_accurate),
        })  # fmt: skip
    return [each for each in found if any(_same_workload(row, each) and "fixed:" in row["policy"] for row in rows)]


def _same_workload(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("study", "table", "workload"))


def _points(ours: dict[str, Any], fixed: Sequence[dict[str, Any]]) -> float | None:
    return round(100 * (ours["accuracy"] - max(row["accuracy"] for row in fixed)), 3) if fixed else None


def _times(ours: dict[str, Any], fixed: Sequence[dict[str, Any]]) -> float | None:
    best = max((row["attainment"] for row in fixed), default=0.0)
    return round(ours["attainment"] / best, 3) if best else None


def run_cases(cases: Sequence[Case], jobs: int) -> list[dict[str, Any]]:
    """All rows, in the order of the cases, with a progress bar on a terminal."""
    # The longest first, so that none is left to run alone at the end.
    order = sorted(range(len(cases)), key=lambda index: cases[index].cost, reverse=True)
    rows: dict[int, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(jobs) as pool, tqdm(total=len(cases), desc="compare", unit="case", disable=None) as bar:
        running = {pool.submit(run_case, cases[index]): index for index in order}
        for done in as_completed(running):
            rows[running[done]] = done.result()
            bar.update()
    return [row for index in range(len(cases)) for row in rows[index]]


# --------------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter workloads, and no studies: < 1 minute")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="PATH", help="profiles (the paper's and cifar10)")
    parser.add_argument("--slo-ms", type=float, metavar="MS", help="1.2 x the most accurate subnet's batch of 16")
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help=f"of {', '.join(slackfit.POLICIES)}")
    parser.add_argument("--queries", type=int, metavar="N", help="in each workload (2000 if quick, else 20000)")
    parser.add_argument("--bins", type=int, metavar="N", help="of the optimum (32 if quick, else 192)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures into a folder")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or (options.queries is not None and options.queries < 100):
        parser.error("--jobs must be at least 1 and --queries at least 100")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything that the options ask for; returns the document."""
    policies = tuple(options.policies or (QUICK_RIVALS if options.quick else RIVALS))
    queries = options.queries or (2000 if options.quick else 20_000)
    bins = options.bins or (32 if options.quick else 192)
    paths = options.tables or [path for path in TABLES if any(path.glob("latency-*.json"))]
    benches = [Bench.of(path, options.slo_ms and options.slo_ms / 1e3) for path in paths]
    for bench in benches:
        for spec in policies:
            slackfit.make_policy(spec, bench.table)  # a bad name is an error now, not an hour later
    cases = [case for bench in benches for case in grid(bench, queries, policies, bins, options.quick)]
    if not options.quick:
        cases += [case for bench in benches for case in studies(bench, queries, policies)]
    rows = run_cases(cases, options.jobs)
    default = Config().policy
    by_study = {
        study: [row for row in rows if row["study"] == study] for study in dict.fromkeys(c.study for c in cases)
    }
    return {
        "script": "compare_policies.py",
        **replay.provenance(),
        "default_policy": default,
        "slos_ms": {bench.path.name: bench.slo_s * 1e3 for bench in benches},
        "capacity_per_worker": {bench.path.name: round(bench.capacity, 1) for bench in benches},
        "left_out": [] if TRACES.is_dir() else [f"real traces: no {TRACES}"],
        "shares_of_optimum": {study: shares_of_optimum(each) for study, each in by_study.items()},
        "advantages": {policy: advantages(rows, policy) for policy in dict.fromkeys((default, *policies[:1]))},
        "rows": by_study.pop("grid"),
        "studies": by_study,
    }


ERRORS = (ProfileError, slackfit.PolicyError, SimulationError, OracleError, workloads.WorkloadError)
SHOWN = ("table", "workload", "policy", "attainment", "accuracy", "utility", "optimum_utility")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, write and draw what was asked for, print the grid."""
    options = parse_arguments(arguments)
    try:
        document = compare(options)
        if options.json:
            write_text(options.json, json.dumps(document, allow_nan=False) + "\n")
        if options.plots:
            plot_policies.draw_all(document, options.plots)
    except (*ERRORS, OSError) as error:
        sys.exit(f"compare_policies.py: {error}")
    for study, shares in document["shares_of_optimum"].items():
        for policy, share in shares.items():
            print(f"{study:10} {policy:14} {share['mean']:8.2%} of the optimum, at least {share['least']:.2%}")
    rows = [{name: row[name] for name in SHOWN} for row in document["rows"]]
    print(json.dumps({"default_policy": document["default_policy"], "rows": rows}, allow_nan=False))


if __name__ == "__main__":
    main()
