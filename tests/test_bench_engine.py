"""The engine's benchmark measures what it says, on a profile of any network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import choice
from fixtures_supernet import SPACE, tiny_servable

import slackfit
from scripts import bench_engine
from servable import save_servable
from supernet import Subnet, count_parameters

NAMES = [SPACE.largest.name, "d1-2-1-e0.5", SPACE.smallest.name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny profile with a frontier of three, most accurate first."""
    save_servable(tiny_servable(tuple(map(Subnet.parse, NAMES))), tmp_path)
    slackfit.save_choices(tmp_path, [choice(name, 0.9 - number / 10) for number, name in enumerate(NAMES)])
    return tmp_path


def constant(value: float) -> Callable[[], torch.Tensor]:
    return lambda: torch.full((2, 3), value)


def test_equal_logits_pass_and_others_end_the_script() -> None:
    bench_engine.check("d1, batch 2", {"a": constant(1), "b": constant(1 + 1e-5)}, torch.ones(2, 3))
    for wrong in (1.001, float("nan")):
        with pytest.raises(
            SystemExit, match=r"bench_engine\.py: d1, batch 2: b differs by .* from the actuated subnet"
        ):
            bench_engine.check("d1, batch 2", {"a": constant(1), "b": constant(wrong)}, torch.ones(2, 3))


def test_what_takes_long_runs_three_rounds_and_the_bar_runs_on() -> None:
    calls: list[str] = []
    steps: list[None] = []

    def run() -> torch.Tensor:
        calls.append("run")
        return torch.empty(0)

    medians_ms = bench_engine.interleaved({"a": run}, 10, 0.0, lambda: steps.append(None))
    assert (len(calls), len(steps)) == (bench_engine.WARM_UP + 3, 10)
    assert 0 <= medians_ms["a"] < 1e4


def test_large_batches_are_computed_in_parts_and_keep_their_order() -> None:
    x = torch.arange(35.0).view(35, 1)
    parts: list[int] = []

    def double(part: torch.Tensor) -> torch.Tensor:
        parts.append(len(part))
        return part * 2

    assert torch.equal(bench_engine.in_parts(double, x), x * 2)  # type: ignore[arg-type]
    assert parts == [12, 12, 11]


def test_rows_of_a_table_are_aligned() -> None:
    shown = bench_engine.table([{"subnet": "d1", "batch": 1}, {"subnet": "d10-e0.5", "batch": 32}])
    assert shown == "  subnet  batch\n      d1      1\nd10-e0.5     32\n"


def test_bad_usage_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_engine.parse_arguments(["--rounds", "0"])
    assert "--threads, --rounds and --batches must be at least 1" in capsys.readouterr().err


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"rounds": 1, "seconds": 1.0, "seed": 0, "threads": 1, "clock": "wall", **given})


@pytest.mark.slow
def test_more_budget_holds_more_and_never_more_than_allowed(folder: Path) -> None:
    servable = bench_engine.load_servable(folder)
    points = bench_engine.budget_curve(servable, NAMES, options(), lambda: None)
    assert [point["budget"] for point in points] == ["0", "1x", "2x", "4x", "8x"]
    assert points[0]["held"] == points[0]["held_bytes"] == 0
    assert points[-1]["held"] == len(NAMES)
    for point in points:
        assert point["held_bytes"] <= float(point["budget"].rstrip("x")) * servable.supernet.nbytes
        assert point["mean_ms"] > 0


@pytest.mark.slow
def test_a_process_grows_by_no_more_than_the_budget_allows_and_by_what_it_holds() -> None:
    """The bundled servable, whose subnets are large enough to be seen among a process' memory."""
    profile = Path(bench_engine.__file__).parent.parent / "profiles" / "cifar10"
    choices = slackfit.load_choices(profile)
    names = [each.name for each in choices if each.frontier and each.ensemble is None]
    weights_nbytes = bench_engine.load_servable(profile).supernet.nbytes
    _, once, twice = bench_engine.resident_growth(profile, names, ["0", "1x", "2x"], seed=0)
    if once is None or twice is None:
        pytest.skip("this system does not tell the memory of a process")
    assert 0.5 * weights_nbytes < once <= weights_nbytes
    assert weights_nbytes < twice <= 2 * weights_nbytes


@pytest.mark.slow
def test_the_benchmark_compares_every_form_of_the_frontier_and_ends_with_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx", reason="needs onnx, of requirements-dev.txt")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of requirements-dev.txt")
    bench_engine.main(["--profile", str(folder), "--rounds", "1", "--batches", "1", "17"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["subnet"], row["batch"]) for row in document["rows"]] == [
        (name, batch) for name in reversed(NAMES) for batch in (1, 17)
    ]
    for row in document["rows"]:
        assert row["budget0_to_eager"] == pytest.approx(row["budget0_ms"] / row["extracted_eager_ms"], abs=1e-2)
        assert row["default_to_onnxruntime"] == pytest.approx(row["default_ms"] / row["onnxruntime_ms"], abs=1e-2)
        assert row["extracted_compiled_ms"] > 0
    assert 0 < document["actuation_us"] <= document["actuation_us_p99"]
    assert document["zoo_memory_ratio"] > 0
    largest = document["memory"]["subnets"][-1]
    parameters = count_parameters(tiny_servable().supernet.extract(SPACE.largest))
    assert largest["extracted_bytes"] >= 4 * parameters
    assert largest["onnx_bytes"] > largest["packed_bytes"] / 2
    assert [point["resident_growth_bytes"] is None for point in document["budget_curve"]] == [False] * 5
    assert document["memory"]["default_held"] == len(NAMES)
    assert (document["threads"], document["torch"]) == (1, torch.__version__)
