"""The simulator serves by the server's own dispatcher, in virtual time, and tells what became of each query."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import superserve
from profiletable import ProfileError, ProfileTable
from scripts import simulate as simulator
from scripts import workloads
from scripts.oracle import optimum
from scripts.simulate import Noise, Outage, Results, SimulationError, Slowdown, simulate, summarise
from slackfit import POLICIES, Decision, Policy, QueueView, load_choices, make_policy

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "profiles" / "paper-ofa-resnet50"
SLO_S = 0.036
SPECS = ["halfslo", "slackfit", "slackfit:8", "fixed:largest", "fixed:smallest"]


def run(
    table: ProfileTable, arrivals: Sequence[float], spec: str = "fixed:smallest", slo_s: float = SLO_S, **how: object
) -> Results:
    """A short run; the fixed policy's decisions are easy to foresee."""
    policy = make_policy(spec, table, int(str(how.get("workers", 1))))
    return simulate(np.array(arrivals), slo_s, table, policy, **how)  # type: ignore[arg-type]


def same(one: Results, other: Results) -> bool:
    return np.array_equal(one.finish_s, other.finish_s, equal_nan=True) and np.array_equal(one.entry, other.entry)


# ------------------------------------------------------------------------------------------------------------ decisions


def test_a_lone_query_takes_its_latency(table: ProfileTable) -> None:
    results = run(table, [1.0], "fixed:largest")
    assert results.finish_s == pytest.approx([1.0 + 0.0065])
    assert (results.entry.tolist(), results.batch_size.tolist()) == ([5], [1])
    assert results.outcomes == {"in_time": 1}


def test_what_arrives_while_the_worker_is_busy_is_the_next_batch(table: ProfileTable) -> None:
    results = run(table, [0.0, 0.0005, 0.001, 0.0015])
    assert results.batch_size.tolist() == [1, 3, 3, 3]
    assert results.finish_s[1:] == pytest.approx(0.002 + table.fastest.latency_s[3])


def test_what_arrives_at_one_instant_is_one_batch(table: ProfileTable) -> None:
    assert run(table, [0.0] * 5).batch_size.tolist() == [5] * 5


def test_workers_run_at_the_same_time(table: ProfileTable) -> None:
    assert run(table, [0.0, 0.0005], workers=2).batch_size.tolist() == [1, 1]


def test_the_same_dispatcher_decides() -> None:
    assert simulator.Dispatcher is superserve.Dispatcher


@given(
    spec=st.sampled_from([*(name for name in POLICIES if ":" not in name), "slackfit:3", "fixed:largest", "fixed:s4"]),
    workers=st.integers(1, 3),
    load=st.sampled_from([0.3, 0.8, 2.0]),
    floors=st.lists(st.sampled_from([0.0, 0.7, 0.7669, 0.78, 0.7944, 0.8016]), min_size=1, max_size=4),
    margin=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_every_policy_runs_each_batch_at_or_above_the_highest_floor_in_it(
    table: ProfileTable, spec: str, workers: int, load: float, floors: list[float], margin: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrivals = workloads.gamma(2700 * load * workers, 4, 0.02, seed=seed)
    least, slos_s = rng.choice(floors, len(arrivals)), rng.choice([0.6, 1.0, 2.8], len(arrivals)) * SLO_S
    policy = make_policy(spec, table, workers)
    results = simulate(arrivals, slos_s, table, policy, workers=workers, floors=least, margin=margin, seed=seed)
    answered = results.answered
    assert (results.accuracy[answered] >= least[answered]).all()
    assert sum(results.outcomes.values()) == len(arrivals)
    # Honoured by answering, not by giving up whoever has a floor: those who come alone have all the time they need.
    if len(arrivals) and not spec.startswith("fixed"):
        alone = simulate(np.arange(4.0), SLO_S, table, make_policy(spec, table), floors=sorted(floors)[-1])
        assert alone.attainment == 1


def test_a_floor_above_all_entries_cannot_be_simulated(table: ProfileTable) -> None:
    with pytest.raises(SimulationError, match=r"accuracy floors must be from 0 to 0.8016"):
        run(table, [1.0], floors=0.9)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_query_has_one_outcome_and_nothing_exceeds_the_optimum(
    table: ProfileTable, spec: str, workers: int
) -> None:
    arrivals = workloads.gamma(2000 * workers, 4, 0.06, seed=workers)
    results = run(table, arrivals, spec, workers=workers)
    assert sum(results.outcomes.values()) == len(arrivals)
    assert results.outcomes["in_time"] == results.in_time.sum()
    assert results.outcomes.get("late", 0) == (results.answered & ~results.in_time).sum()
    assert results.utility <= optimum(arrivals, SLO_S, table, workers, bins=32).upper + 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_without_noise_no_answer_is_late(table: ProfileTable, spec: str) -> None:
    assert "late" not in run(table, workloads.poisson(3000, 0.2, seed=0), spec).outcomes


def test_batches_start_after_their_queries_and_share_no_worker(table: ProfileTable) -> None:
    results = run(table, workloads.poisson(2000, 0.2, seed=1), "halfslo")
    chosen = zip(results.entry, results.batch_size, strict=True)
    starts_s = results.finish_s - [table.entries[entry].latency_s[size] for entry, size in chosen]
    assert (starts_s >= results.arrival_s - 1e-12).all()
    ends_s, first = np.unique(results.finish_s, return_index=True)
    assert (starts_s[first][1:] >= ends_s[:-1] - 1e-12).all()


def test_a_slower_worker_than_planned_makes_answers_late(table: ProfileTable) -> None:
    slow = {entry.name: tuple(2 * each for each in entry.latency_s) for entry in table.entries}
    results = run(table, workloads.poisson(800, 0.2, seed=0), "fixed:largest", service=slow)
    assert results.outcomes["late"] > 0


def test_each_query_may_have_its_own_slo(table: ProfileTable) -> None:
    slos_s = np.array([0.1, 0.0001, 0.003])
    results = simulate(np.array([0.0, 0.0, 0.0]), slos_s, table, make_policy("fixed:smallest", table))
    assert results.in_time.tolist() == [True, False, True]
    assert results.outcomes == {"in_time": 2, "infeasible": 1}


def test_time_to_answer_counts_and_is_learnt(table: ProfileTable) -> None:
    at_once, later = (run(table, np.arange(50) / 100, "fixed:smallest", 0.0045, answer_s=s) for s in (0.0, 0.002))
    assert later.finish_s == pytest.approx(at_once.finish_s + 0.002)
    assert run(table, np.arange(50) / 100, "fixed:smallest", 0.0035, answer_s=0.002).outcomes["infeasible"] > 5


class Never(Policy):
    """A policy that runs nothing."""

    name = "never"

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        return Decision(0, None, 0)


def test_what_never_runs_expires_and_leaves_its_place_at_its_deadline(table: ProfileTable) -> None:
    results = simulate(np.arange(10) * 0.03, SLO_S, table, Never(), max_queue=2)
    assert results.outcomes == {"expired": 10}
    assert math.isnan(results.mean_accuracy)
    assert results.utility == 0


def test_a_full_queue_rejects(table: ProfileTable) -> None:
    assert run(table, [0.0] * 5, max_queue=3).outcomes == {"in_time": 3, "queue_full": 2}


# ---------------------------------------------------------------------------------------------------------------- noise

NOISY = Noise(sigma=0.2, straggler_probability=0.05)


def test_equal_seeds_give_equal_runs_and_others_do_not(table: ProfileTable) -> None:
    arrivals = workloads.poisson(1200, 0.2, seed=0)
    one, again, other = (run(table, arrivals, noise=NOISY, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)


def test_sigma_is_that_of_the_logarithm_and_the_median_stays(table: ProfileTable) -> None:
    logs = np.log(run(table, np.arange(800.0), noise=Noise(sigma=0.1)).latency_s / 0.002)
    assert abs(np.median(logs)) < 0.02
    assert logs.std() == pytest.approx(0.1, rel=0.1)


def test_stragglers_are_as_many_and_as_slow_as_asked(table: ProfileTable) -> None:
    noise = Noise(straggler_probability=0.25, straggler_factor=3)
    slow = run(table, np.arange(800.0), noise=noise).latency_s > 0.005
    assert slow.mean() == pytest.approx(0.25, abs=0.05)


def test_a_slow_spell_slows_the_batches_that_start_in_it(table: ProfileTable) -> None:
    results = run(table, [0, 1, 2, 3], noise=Noise(slowdowns=(Slowdown(1, 3, 2),)))
    assert results.latency_s == pytest.approx([0.002, 0.004, 0.004, 0.002])


def test_a_failing_worker_fails_its_batch_and_works_again_when_it_is_back(table: ProfileTable) -> None:
    noise = Noise(outages=(Outage(0, 0.001, 0.02),))
    results = run(table, [0.0, 0.005, 0.03], noise=noise)
    assert results.outcomes == {"failed": 1, "in_time": 2}
    assert results.finish_s[1:] == pytest.approx([0.022, 0.032])


def test_the_other_workers_go_on_when_one_fails(table: ProfileTable) -> None:
    noise = Noise(outages=(Outage(1, 0.0, math.inf),))
    results = run(table, [0.0, 0.0005, 0.001], workers=2, noise=noise)
    assert results.batch_size.tolist() == [1, 2, 2]


def test_queries_expire_while_no_worker_is_left(table: ProfileTable) -> None:
    noise = Noise(outages=(Outage(0, 0.0, math.inf), Outage(0, 0.01, 0.02)))
    assert run(table, [0.005, 0.05], noise=noise).outcomes == {"expired": 2}


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"sigma": -1}, "sigma must be zero or more, not -1"),
        ({"straggler_probability": 2}, "a probability must be from 0 to 1, not 2"),
        ({"straggler_factor": 0}, "a factor must be above zero, not 0"),
        ({"slowdowns": (Slowdown(2, 1, 2),)}, "must start at zero or later and end after that"),
    ],
)
def test_impossible_noise_is_refused(noise: dict[str, float], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        Noise(**noise)  # type: ignore[arg-type]


def test_an_outage_of_no_worker_is_refused(table: ProfileTable) -> None:
    with pytest.raises(SimulationError, match="no worker 3: there are 2, from 0 on"):
        run(table, [0.0], workers=2, noise=Noise(outages=(Outage(3, 0, 1),)))


def test_arrivals_that_do_not_ascend_are_refused(table: ProfileTable) -> None:
    with pytest.raises(SimulationError, match="must be finite and ascend"):
        run(table, [1.0, 0.0])


# -------------------------------------------------------------------------------------------------- tables and commands


def test_the_summary_adds_up(table: ProfileTable) -> None:
    summary = summarise(run(table, workloads.poisson(2900, 0.2, seed=0), "halfslo"))
    assert sum(summary["outcomes"].values()) == summary["queries"]
    assert sum(summary["subnets"].values()) == sum(summary["batch_sizes"].values()) == summary["outcomes"]["in_time"]
    assert summary["utility"] == pytest.approx(summary["attainment"] * summary["mean_serving_accuracy"], abs=2e-6)


def test_progress_is_told_of_every_arrival(table: ProfileTable) -> None:
    told: list[int] = []
    run(table, np.arange(2500) / 500, progress=told.append)
    assert sum(told) == 2500
    assert len(told) > 1


def test_the_paper_table_is_synthetic_and_equals_the_one_of_the_study(table: ProfileTable) -> None:
    paper = simulator.load_table(PAPER)
    assert paper.device is not None
    assert paper.device.kind == "synthetic"
    assert [entry.accuracy for entry in paper.entries] == [entry.accuracy for entry in table.entries]
    for ours, theirs in zip(paper.entries, table.entries, strict=True):
        assert ours.latency_s == pytest.approx(theirs.latency_s, rel=0.02)
        assert simulator.load_medians(PAPER)[ours.name] == pytest.approx(ours.latency_s)


def test_of_the_tables_of_a_profile_that_in_float32_counts_and_each_has_the_accuracies_of_its_dtype() -> None:
    profile = ROOT / "profiles" / "cifar10"
    assert simulator.load_table(profile).device == simulator.load_table(_table_in("float32")).device
    for dtype in ("float32", "bfloat16"):
        choices = {each.name: each for each in load_choices(profile, dtype)}
        for entry in simulator.load_table(_table_in(dtype)).entries:
            assert entry.choice == choices[entry.name]


def _table_in(dtype: str) -> Path:
    (path,) = (ROOT / "profiles" / "cifar10").glob(f"latency-cpu-*-{dtype}.json")
    return path


def test_the_server_refuses_a_synthetic_profile_in_one_clear_line() -> None:
    with pytest.raises(ProfileError) as caught:
        superserve.SuperServe(PAPER)
    assert str(caught.value) == f"{PAPER}: its latencies are synthetic, for simulation only: there is nothing to serve"


def test_a_folder_without_exactly_one_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="expected one latency table, found none; give the path of one file"):
        simulator.load_table(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        ["--poisson", "1000"],
        ["--gamma", "1000", "8"],
        ["--bursty", "300", "600", "4", "--workers", "2"],
        ["--accelerating", "200", "1500", "5000", "8", "--slo-ms", "20", "36", "100"],
    ],
)
def test_the_command_prints_one_document(source: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    simulator.main(["--table", str(PAPER), *source, "--duration", "0.3", "--json", str(path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["synthetic_table"] is True
    assert document["queries"] == document["workload"]["sent"]["count"] == sum(document["outcomes"].values())
    assert json.loads(path.read_text())["timeline_fine"]["bin_s"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--poisson", "10", "--policy", "magic"], f"no policy 'magic': there are {', '.join(POLICIES)}"),
        (["--poisson", "-1"], "rate must be above zero, not -1"),
        (["--poisson", "10", "--slo-ms", "0"], "--slo-ms must be above zero"),
        (["--poisson", "10", "--outage", "1", "0", "1"], "no worker 1: there are 1, from 0 on"),
        (["--trace", "missing.txt"], "missing.txt: cannot be read"),
    ],
)
def test_bad_options_end_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        simulator.main(["--table", str(PAPER), "--duration", "1", *options])
    assert str(caught.value).startswith(f"simulate.py: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_report_can_be_drawn_like_a_replay(tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "out.png"
    simulator.main(["--table", str(PAPER), "--poisson", "900", "--duration", "1", "--json", str(report)])
    subprocess.run([sys.executable, "scripts/plot_replay.py", report, "--out", picture], cwd=ROOT, check=True)
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_million_queries_take_less_than_a_minute(table: ProfileTable) -> None:
    arrivals = workloads.poisson(2200, 20, seed=0)
    started_s = time.process_time()
    run(table, arrivals, "halfslo")
    assert (time.process_time() - started_s) / len(arrivals) * 1e6 < 60
