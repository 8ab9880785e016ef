"""The ensembles' benchmark measures what it says, on a profile of any network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import choice
from fixtures_supernet import SPACE, tiny_servable
from PIL import Image

import slackfit
from profiletable import Ensemble
from scripts import bench_ensemble
from scripts.bench_ensemble import pick, rows_of, twice
from servable import save_servable
from supernet import Subnet

NAMES = [SPACE.smallest.name, "d1-2-1-e0.5", SPACE.largest.name]
PAIR = Ensemble(members=(NAMES[0], NAMES[2]), combination="vote", weights=(0.4, 0.6))


def choices(*, ensembles: bool = True) -> list[slackfit.Choice]:
    singles = [choice(name, 0.5 + index / 10) for index, name in enumerate(NAMES)]
    other = replace(PAIR, members=(NAMES[0], NAMES[1]))
    both = [
        replace(choice(each.name, accuracy), kind="ensemble", ensemble=each)
        for each, accuracy in ((other, 0.75), (PAIR, 0.8))
    ]
    return [*singles, *(both if ensembles else [])]


def test_the_most_accurate_ensemble_is_measured_or_the_members_named() -> None:
    assert pick(choices(), None) == PAIR
    assert pick(choices(), PAIR.members) == PAIR
    named = pick(choices(), NAMES)
    assert (named.members, named.combination, sum(named.weights)) == (tuple(NAMES), "mean", pytest.approx(1))
    with pytest.raises(slackfit.ProfileError, match="there is no ensemble"):
        pick(choices(ensembles=False), None)
    with pytest.raises(slackfit.ProfileError, match="no subnet 'd9'"):
        pick(choices(), [NAMES[0], "d9"])


def test_ratios_are_those_of_the_medians() -> None:
    medians = {
        "a": [1.0, 10.0], "b": [2.0, 20.0], "a+b@parallel": [2.2, 30.0], "a+b@serial": [3.3, 30.0],
    }  # fmt: skip
    rows = rows_of(Ensemble(members=("a", "b"), combination="mean", weights=(0.5, 0.5)), medians, (1, 8))
    assert [row["batch"] for row in rows] == [1, 8]
    assert rows[0]["members_ms"] == {"a": 1, "b": 2}
    assert [row["serial_to_parallel"] for row in rows] == [1.5, 1]
    assert [row["parallel_to_slowest"] for row in rows] == [1.1, 1.5]


def test_two_equal_members_are_the_largest_twice() -> None:
    assert twice(PAIR).members == (NAMES[2], NAMES[2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny profile with ensembles, and a folder of images beside it."""
    save_servable(tiny_servable(tuple(map(Subnet.parse, NAMES))), tmp_path)
    slackfit.save_choices(tmp_path, choices())
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 12)):
        for place in range(count):
            path = tmp_path / "images" / part / f"class{place % 5}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path


@pytest.mark.slow
def test_the_benchmark_runs_and_ends_with_its_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_ensemble.main(
        [
            "--profile", str(folder), "--data", str(folder / "images"), "--device", "cpu", "--batches", "1", "4",
            "--rounds", "2", "--plot", str(folder / "plot.png"),
        ]
    )  # fmt: skip
    *_, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["ensemble"]["members"] == list(PAIR.members)
    found = document["accuracy"]
    assert set(found["members"]) == set(PAIR.members)
    assert found["images"] == 12
    assert found["gain_points"] == pytest.approx(100 * (found["ensemble"] - max(found["members"].values())), abs=0.01)
    for key, members in (("rows", set(PAIR.members)), ("two_equal_members", {NAMES[2]})):
        assert [row["batch"] for row in document[key]] == [1, 4]
        for row in document[key]:
            assert set(row["members_ms"]) == members
            assert min(row["parallel_ms"], row["serial_ms"]) > 0
    assert {"machine", "commit", "versions", "device", "rounds"} <= set(document)
    assert document["versions"]["torch"]
    assert (folder / "plot.png").stat().st_size > 1000


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--profile", str(folder), "--data", str(folder / "images"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"bench_ensemble\.py: no subnet 'd9'"):
        bench_ensemble.main([*command, "--members", "d9", NAMES[0]])
    for members in ([NAMES[0]], [NAMES[0], NAMES[0]]):
        with pytest.raises(SystemExit):
            bench_ensemble.main([*command, "--members", *members])
        assert "--members must be at least two different subnets" in capsys.readouterr().err
