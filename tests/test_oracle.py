"""The optimum equals the paper's zero-one integer programme on small cases, and no run of the simulator exceeds it."""

import json
import math
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, sparse

from profiletable import Choice, Latencies, ProfileTable, build_table
from scripts import workloads
from scripts.oracle import Bound, OracleError, optimum

Floats = NDArray[np.float64]

ROOT = Path(__file__).parents[1]
UNIT_S = 0.001  # small cases have whole numbers of milliseconds, so that batches need to start at no other times


def small_table(rng: np.random.Generator) -> ProfileTable:
    """Two entries, batches up to four, whole milliseconds that ascend in batch size and accuracy."""
    cheap_ms = 1 + np.cumsum(rng.integers(0, 3, 4))
    accurate_ms = cheap_ms + 1 + np.cumsum(rng.integers(0, 2, 4))
    accuracies = np.sort(rng.choice(np.arange(50, 100), 2, replace=False)) / 100
    choices, latencies = [], {}
    for name, accuracy, each_ms in zip("ab", accuracies.tolist(), (cheap_ms, accurate_ms), strict=True):
        choice = Choice(
            name=name, kind="subnet", accuracy=accuracy, accuracy_samples=100, test_accuracy=None, parameters=1, macs=1,
            frontier=True,
        )  # fmt: skip
        choices.append(choice)
        seconds = tuple((each_ms * UNIT_S).tolist())
        latencies[name] = Latencies(p50_s=seconds, p99_s=seconds)
    return build_table(choices, (1, 2, 3, 4), latencies)


def integer_programme(arrivals: Floats, slos_s: Floats, table: ProfileTable, workers: int) -> float:
    """The paper's: which batches (a set of queries, a subnet, a start) to run; all subsets, all starts, HiGHS."""
    arrived, due = np.rint(arrivals / UNIT_S).astype(int), np.rint((arrivals + slos_s) / UNIT_S).astype(int)
    count, horizon = len(arrived), int(due.max())
    columns, values = [], []
    for size in range(1, min(count, table.max_batch) + 1):
        for members in combinations(range(count), size):
            for entry in table.entries:
                length = round(entry.latency_s[size] / UNIT_S)
                for start in range(max(arrived[list(members)]), min(due[list(members)]) - length + 1):
                    column = np.zeros(count + horizon)
                    column[list(members)] = 1
                    column[count + start : count + start + length] = 1
                    columns.append(column)
                    values.append(entry.accuracy * size)
    if not columns:
        return 0.0
    most = np.concatenate([np.ones(count), np.full(horizon, workers)])
    solution = optimize.milp(
        -np.array(values),
        constraints=optimize.LinearConstraint(sparse.csc_array(np.stack(columns, axis=1)), ub=most),
        integrality=np.ones(len(values)),
        bounds=optimize.Bounds(0, 1),
    )
    assert solution.success
    return -float(solution.fun) / count


def small_case(seed: int) -> tuple[Floats, ProfileTable, np.random.Generator]:
    rng = np.random.default_rng(seed)
    table = small_table(rng)
    return np.sort(rng.integers(0, 12, 6)) * UNIT_S, table, rng


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_equals_the_integer_programme_over_all_subsets(seed: int) -> None:
    arrivals, table, rng = small_case(seed)
    slo_s = int(rng.integers(3, 9)) * UNIT_S
    expected = integer_programme(arrivals, np.full(6, slo_s), table, workers=1)
    bound = optimum(arrivals, slo_s, table)
    assert bound == Bound(pytest.approx(expected), pytest.approx(expected), True, "dp")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bins", [1, 2, 3])
def test_coarse_bins_bracket_the_integer_programme(seed: int, bins: int) -> None:
    arrivals, table, rng = small_case(seed)
    slo_s = int(rng.integers(3, 9)) * UNIT_S
    expected = integer_programme(arrivals, np.full(6, slo_s), table, workers=1)
    bound = optimum(arrivals, slo_s, table, bins=bins)
    assert bound.lower is not None
    assert bound.lower - 1e-9 <= expected <= bound.upper + 1e-9


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("workers", [1, 2])
def test_the_linear_programme_is_above_the_integer_programme_with_mixed_slos(seed: int, workers: int) -> None:
    arrivals, table, rng = small_case(seed)
    slos_s = rng.integers(3, 9, 6) * UNIT_S
    slos_s[:2] = 3 * UNIT_S, 8 * UNIT_S
    bound = optimum(arrivals, slos_s, table, workers)
    assert bound.lower is None
    assert (bound.exact, bound.method) == (False, "lp")
    assert bound.upper >= integer_programme(arrivals, slos_s, table, workers) - 1e-9


def test_the_linear_programme_is_above_the_exact_optimum_and_close(table: ProfileTable) -> None:
    arrivals = workloads.poisson(1500, 0.05, seed=3)
    exact = optimum(arrivals, 0.036, table)
    slos_s = np.full(len(arrivals), 0.036)
    slos_s[-1] += 1e-12  # not quite one SLO
    fluid = optimum(arrivals, slos_s, table)
    assert fluid.method == "lp"
    assert exact.lower is not None
    assert exact.lower - 1e-9 <= fluid.upper <= 1.02 * exact.upper


def test_more_bins_narrow_the_bracket(table: ProfileTable) -> None:
    arrivals = workloads.poisson(3000, 0.05, seed=1)
    bounds = [optimum(arrivals, 0.036, table, bins=bins) for bins in (8, 24, 72)]
    widths = [bound.upper - (bound.lower or 0) for bound in bounds]
    assert all(coarse > fine >= 0 for coarse, fine in pairwise(widths))
    assert widths[-1] < 0.03


def test_queries_far_apart_all_get_the_most_accurate_entry(table: ProfileTable) -> None:
    bound = optimum(np.arange(20.0), 0.036, table)
    assert bound == Bound(pytest.approx(0.8016), pytest.approx(0.8016), True, "dp")


def test_an_slo_below_every_latency_leaves_nothing(table: ProfileTable) -> None:
    assert optimum(np.arange(3.0), 0.001, table) == Bound(0.0, 0.0, True, "dp")
    assert optimum(np.arange(3.0), 0.001, table, workers=2).upper == 0


def test_a_batch_may_end_at_the_very_deadline(table: ProfileTable) -> None:
    arrivals = np.full(64, 0.7)
    slo_s = table.fastest.latency_s[64]
    assert optimum(arrivals, slo_s, table).lower == pytest.approx(0.7382)
    assert optimum(arrivals, slo_s, table, workers=2).upper >= 0.7382


@pytest.mark.parametrize(
    ("arrivals", "slo_s", "workers"), [([], 1.0, 1), ([1.0, 0.0], 1.0, 1), ([0.0], 0.0, 1), ([0.0], 1.0, 0)]
)
def test_what_has_no_optimum_is_refused(table: ProfileTable, arrivals: list[float], slo_s: float, workers: int) -> None:
    with pytest.raises(OracleError, match="needs ascending arrivals"):
        optimum(np.array(arrivals), slo_s, table, workers)


@pytest.mark.slow
def test_the_command_prints_one_document() -> None:
    command = [sys.executable, "scripts/oracle.py", "--table", "profiles/paper-ofa-resnet50", "--poisson", "800"]
    done = subprocess.run(
        [*command, "--duration", "0.2", "--slo-ms", "36"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["method"] == "dp"
    assert 0.73 < document["lower"] <= document["upper"] < 0.8016
    assert math.isclose(document["lower"], document["upper"], rel_tol=0.01)
