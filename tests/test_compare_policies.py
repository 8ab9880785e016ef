"""The comparison of policies: its workloads, its figures, its last line and its pictures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import Config
from profiletable import ProfileTable
from scripts import compare_policies, plot_policies
from scripts.compare_policies import Bench, Case, Families, advantages, grid_workloads, run_case, shares_of_optimum
from slackfit import PolicyError

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "profiles" / "paper-ofa-resnet50"


def row(policy: str, attainment: float, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "study": "grid", "table": "t", "workload": "w", "policy": policy, "attainment": attainment,
        "accuracy": accuracy, "utility": attainment * accuracy, "optimum_utility": None, **more,
    }  # fmt: skip


def test_the_paper_table_gets_the_slo_of_the_paper() -> None:
    bench = Bench.of(PAPER)
    assert bench.slo_s == 0.036
    assert bench.capacity == pytest.approx(2783, abs=1)


def test_workloads_ascend_and_have_about_the_rate_that_their_load_says() -> None:
    for quick in (True, False):
        for name, make in grid_workloads(Families(1000.0, 500), quick):
            arrivals = make()
            assert (np.diff(arrivals) >= 0).all(), name
            assert 250 < len(arrivals) < 1000, name
    rate = 500 / Families(1000.0, 500).poisson(0.5)[-1]
    assert rate == pytest.approx(500, rel=0.2)


def test_every_policy_gets_a_row_beside_the_optimum() -> None:
    bench = Bench.of(PAPER)
    arrivals = Families(bench.capacity, 60).poisson(0.5)
    rows = run_case(bench.case("grid", "w", arrivals, policies=("pacefit", "slackfit"), bins=16))
    assert [each["policy"] for each in rows] == ["pacefit", "slackfit"]
    for each in rows:
        assert each["utility"] == pytest.approx(each["attainment"] * each["accuracy"], abs=1e-5)
        assert each["utility"] <= each["optimum_utility"]


def test_shares_are_of_the_rows_that_have_an_optimum() -> None:
    rows = [row("a", 1.0, 0.5, optimum_utility=1.0), row("a", 1.0, 0.9, optimum_utility=1.0), row("a", 0.0, 0.0)]
    assert shares_of_optimum(rows) == {"a": {"mean": 0.7, "least": 0.5}}


def test_the_advantage_is_over_the_best_single_subnet_that_does_as_well() -> None:
    rows = [
        row("pacefit", 0.99, 0.78),
        row("fixed:a", 1.0, 0.72),
        row("fixed:b", 0.99, 0.74),
        row("fixed:c", 0.33, 0.8),
    ]
    (found,) = advantages(rows, "pacefit")
    assert found["points_at_equal_attainment"] == pytest.approx(4.0)
    assert found["times_attainment_at_equal_accuracy"] == pytest.approx(3.0)


def test_no_advantage_is_claimed_where_nothing_compares() -> None:
    (found,) = advantages([row("pacefit", 0.99, 0.78), row("fixed:a", 0.5, 0.7)], "pacefit")
    assert (found["points_at_equal_attainment"], found["times_attainment_at_equal_accuracy"]) == (None, None)
    assert advantages([row("pacefit", 0.99, 0.78)], "pacefit") == []


def test_a_bad_policy_is_refused_before_anything_runs() -> None:
    options = compare_policies.parse_arguments(["--quick", "--tables", str(PAPER), "--policies", "best"])
    with pytest.raises(PolicyError, match="no policy 'best'"):
        compare_policies.compare(options)


@pytest.mark.slow
def test_all_studies_run_and_are_drawn(tmp_path: Path) -> None:
    arguments = ["--tables", PAPER, "--queries", "100", "--bins", "4", "--json", tmp_path / "all.json"]
    command = [sys.executable, "scripts/compare_policies.py", *map(str, arguments), "--plots", str(tmp_path / "plots")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["default_policy"] == Config().policy
    assert {each["policy"] for each in last["rows"]} == set(compare_policies.RIVALS)
    assert set(last["rows"][0]) == set(compare_policies.SHOWN)
    document = json.loads((tmp_path / "all.json").read_text())
    assert set(document["studies"]) == {
        "load", "burstiness", "acceleration", "workers", "failures", "noise", "mixed", "fleet",
        *(["traces"] if compare_policies.TRACES.is_dir() else []),
    }  # fmt: skip
    drawn = {path.stem.removeprefix(f"{PAPER.name}-") for path in (tmp_path / "plots").iterdir()}
    assert drawn == {
        "tradeoff", "load", "burstiness", "acceleration", "workers", "timeline-burstiness", "timeline-failures",
    }  # fmt: skip
    assert plot_policies.draw_all(document, tmp_path / "again")


def test_cases_that_take_longer_cost_more(table: ProfileTable) -> None:
    bench = Bench(PAPER, table, 0.036)
    short, long = np.arange(10.0), np.arange(100.0)

    def cost(arrivals: np.ndarray, **more: Any) -> float:
        case: Case = bench.case("grid", "w", arrivals, policies=("pacefit",), **more)
        return case.cost

    assert cost(short) < cost(long) < cost(long, bins=100)
