"""Ensembles are chosen on one half of the images, measured on the other, and only where they extend the frontier."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import choice
from fixtures_supernet import SPACE, noise, tiny_servable
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import slackfit
from engine import Engine
from members import mirrored
from profiletable import Ensemble
from scripts import profile_supernet
from scripts.datasets import Dataset, Split
from scripts.ensemble_search import (
    MOST,
    MOST_CANDIDATES,
    Found,
    accuracy_of,
    candidates,
    chosen,
    disagreement,
    find_ensembles,
    fitted,
    looked_at,
    probabilities,
    weightings,
)
from scripts.frontiers import Candidate
from scripts.profile_supernet import write_latencies
from servable import load_servable, save_servable
from supernet import Subnet

SMALLEST, LARGEST = SPACE.smallest.name, SPACE.largest.name
MIDDLE = "d1-2-1-e0.5"


def single(name: str, accuracy: float, latency_s: float, confirmed: float | None = None) -> Candidate:
    return Candidate(
        name=name, accuracy=accuracy, confirmed=accuracy if confirmed is None else confirmed, latency_s=latency_s,
        parameters=10, macs=20,
    )  # fmt: skip


def found(name: str, accuracy: float, latency_s: float, confirmed: float | None = None) -> Found:
    members = tuple(name.split("+"))
    ensemble = Ensemble(members=members, combination="mean", weights=(1 / len(members),) * len(members))
    return Found(ensemble=ensemble, candidate=single(name, accuracy, latency_s, confirmed), disagreement=0.1)


def names_of(kept: list[Found]) -> list[str]:
    return [each.candidate.name for each in kept]


def rows(*likeliest: list[int], sure: float = 0.8) -> Tensor:
    """Probabilities (members, images, 3) of members that are as sure of their classes."""
    return torch.eye(3)[torch.tensor(likeliest)] * (sure - (1 - sure) / 2) + (1 - sure) / 2


# -------------------------------------------------------------------------------------------------- combining, weighing


@pytest.mark.parametrize("members", [2, 3])
def test_weights_are_equal_ones_then_all_tenths_the_most_even_first(members: int) -> None:
    weights = weightings(members)
    assert weights[0].tolist() == pytest.approx([1 / members] * members)
    assert weights.sum(1).tolist() == pytest.approx([1] * len(weights))
    tenths = {tuple(round(10 * float(each)) for each in row) for row in weights[1:]}
    assert tenths == {each for each in itertools.product(range(1, 10), repeat=members) if sum(each) == 10}
    spread = [round(float(row.max() - row.min()), 6) for row in weights]
    assert spread == sorted(spread)


def likelihood(members: Tensor, weights: Sequence[float], labels: Tensor) -> float:
    """The geometric mean of what the weighted mean of members gives to the right classes."""
    mean = (torch.tensor(weights).view(-1, 1, 1) * members).sum(0)
    return math.exp(float(mean[torch.arange(len(labels)), labels].log().mean()))


def drawn(seed: int, members: int, images: int = 20) -> tuple[Tensor, Tensor]:
    """Random probabilities (members, images, 3), and labels."""
    rng = np.random.default_rng(seed)
    probabilities = torch.tensor(rng.dirichlet(np.ones(3), (members, images)), dtype=torch.float32)
    return probabilities, torch.tensor(rng.integers(0, 3, images))


@given(st.integers(0, 200), st.integers(2, 3))
def test_no_other_weights_make_the_mean_likelier_to_be_right(seed: int, members: int) -> None:
    probabilities, labels = drawn(seed, members)
    names = tuple(f"m{index}" for index in range(members))
    best, likely = fitted(names, [probabilities], labels)
    assert (best.members, sum(best.weights)) == (names, pytest.approx(1))
    every = [likelihood(probabilities, row, labels) for row in weightings(members).tolist()]
    assert likely == pytest.approx(max(every), rel=1e-4)
    if best.combination == "mean":
        assert likelihood(probabilities, best.weights, labels) == pytest.approx(likely, rel=1e-4)


@given(st.integers(0, 200))
def test_both_ways_of_seeing_the_images_count_alike(seed: int) -> None:
    one, labels = drawn(seed, 2)
    other, _ = drawn(seed + 1000, 2)
    _, likely = fitted(["a", "b"], [one, other], labels)
    assert fitted(["a", "b"], [other, one], labels)[1] == pytest.approx(likely)
    alone = [fitted(["a", "b"], [each], labels)[1] for each in (one, other)]
    assert likely <= math.sqrt(alone[0] * alone[1]) + 1e-5, "weights are chosen for both"


def test_a_member_that_is_right_more_often_gets_more_weight() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    members = rows([0, 1, 2, 0, 1, 2], [1, 2, 0, 1, 2, 0])
    best, _ = fitted(["right", "wrong"], [members], labels)
    assert best.weights[0] > best.weights[1]
    assert accuracy_of(list(members), best, labels) == 1


def test_equal_weights_and_the_mean_are_kept_where_nothing_is_better() -> None:
    best, _ = fitted(["a", "b", "c"], [rows([0, 1], [0, 1], [0, 1])], torch.tensor([0, 1]))
    assert best.combination == "mean"
    assert best.weights == pytest.approx((1 / 3,) * 3, abs=1e-6)
    assert sum(best.weights) == pytest.approx(1, abs=1e-9)


def outvoted(images: int) -> Tensor:
    """Two members who are right and not sure of it, and one who is wrong and sure: a vote is right, the mean is not."""
    unsure = rows([0] * images, [0] * images, sure=0.4)
    return torch.cat([unsure, rows([1] * images, sure=0.98)])


def test_a_vote_stands_in_for_the_mean_where_it_is_right_more_often_by_more_than_chance() -> None:
    # In half of the images the sure one is right, so that no weights of a mean do without it.
    labels = torch.tensor([0, 1] * 20)
    members = outvoted(40)
    members[:2, 1::2] = torch.tensor([0.2, 0.6, 0.2])
    best, _ = fitted(["a", "b", "c"], [members], labels)
    assert best.combination == "vote"
    assert max(best.weights) < 0.5
    assert accuracy_of(list(members), best, labels) == 1
    few, _ = fitted(["a", "b", "c"], [members[:, :4]], labels[:4])
    assert few.combination == "mean", "of four images, two may be chance"


@given(st.integers(0, 100))
def test_no_member_of_a_vote_decides_alone(seed: int) -> None:
    for names in (["a", "b"], ["a", "b", "c"]):
        probabilities, labels = drawn(seed, len(names), 400)
        best, _ = fitted(names, [probabilities], labels)
        assert best.combination == "mean" or max(best.weights) < 0.5


def test_disagreement_is_on_how_many_images_two_differ() -> None:
    assert disagreement(rows([0, 1, 2, 0], [0, 1, 2, 1])) == 0.25
    assert disagreement(rows([0, 0], [0, 1], [0, 1])) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------------- choosing


def test_members_are_those_of_the_frontier_then_the_most_accurate_the_largest_last() -> None:
    many = [choice(f"e{index}", index / 100, frontier=index < 5) for index in range(30)]
    picked = {each.name for each in candidates(many)}
    assert len(picked) == MOST_CANDIDATES
    assert picked == {f"e{index}" for index in (*range(5), *range(30 - MOST_CANDIDATES + 5, 30))}
    macs = [each.macs for each in candidates(many)]
    assert macs == sorted(macs)


def test_every_pair_and_triple_is_looked_at_once_with_the_time_that_its_lanes_need() -> None:
    singles = [single("a", 0.5, 1.0), single("b", 0.5, 2.0), single("c", 0.5, 4.0)]
    validation = dict(zip("abc", rows([0] * 4, [1] * 4, [2] * 4), strict=True))
    for lanes, expected_s in ((1, [3, 5, 6, 7]), (2, [2, 4, 4, 4]), (3, [2, 4, 4, 4])):
        looked = list(looked_at(singles, validation, torch.zeros(4, dtype=torch.long), lanes))
        assert names_of(looked) == ["a+b", "a+c", "b+c", "a+b+c"]
        assert [each.candidate.latency_s for each in looked] == pytest.approx(expected_s)
    assert (looked[-1].candidate.parameters, looked[-1].candidate.macs) == (30, 60)


def test_one_half_of_the_images_chooses_and_the_other_measures() -> None:
    singles = [single("a", 0.5, 1.0), single("b", 0.5, 2.0)]
    validation = dict(zip("ab", rows([0, 1, 0, 1], [0, 1, 0, 1]), strict=True))
    (pair,) = looked_at(singles, validation, torch.tensor([0, 2, 0, 2]), 2)
    assert (pair.candidate.accuracy, pair.candidate.confirmed) == (pytest.approx(0.8), 0)


def test_mirrored_members_are_looked_at_beside_others_and_judged_seeing_both_ways() -> None:
    names = ["a", mirrored("a"), "b", mirrored("b")]
    singles = [single(name, 0.5, 1.0) for name in names]
    validation = dict(zip(names, rows([0] * 4, [1] * 4, [0] * 4, [0] * 4), strict=True))
    looked = list(looked_at(singles, validation, torch.zeros(4, dtype=torch.long), 1))
    found = names_of(looked)
    assert {"a+a:mirrored", "a+b", "a:mirrored+b", "a+b+b:mirrored"} <= set(found)
    assert "a:mirrored+b:mirrored" not in found, "it is a+b, and the image turned"
    by_name = dict(zip(found, looked, strict=True))
    for name, turned in (("a+b:mirrored", "a:mirrored+b"), ("a+a:mirrored", "a+a:mirrored")):
        assert by_name[name].candidate.accuracy == pytest.approx(by_name[turned].candidate.accuracy)
        assert by_name[name].candidate.confirmed == by_name[turned].candidate.confirmed
    assert by_name["a+a:mirrored"].candidate.parameters == 10, "one network"
    assert by_name["a+b"].candidate.parameters == 20


def test_only_what_is_more_accurate_than_everything_faster_is_chosen() -> None:
    singles = [single("a", 0.6, 1.0), single("b", 0.7, 2.0), single("c", 0.8, 3.0)]
    looked = [found("a+b", 0.75, 2.5), found("a+c", 0.79, 3.5), found("b+c", 0.85, 4.0)]
    assert names_of(chosen(singles, looked)) == ["a+b", "b+c"]


def test_what_only_chance_has_chosen_is_dropped() -> None:
    singles = [single("a", 0.6, 1.0), single("b", 0.7, 2.0)]
    assert chosen(singles, [found("a+b", 0.8, 3.0, confirmed=0.69)]) == []


def test_what_is_hardly_better_is_not_worth_its_time() -> None:
    singles = [single("a", 0.6, 1.0), single("b", 0.7, 2.0)]
    assert chosen(singles, [found("a+b", 0.8, 3.0, confirmed=0.7005)]) == []
    both = [found("a+b", 0.8, 3.0, confirmed=0.702), found("a+c", 0.81, 4.0, confirmed=0.7025)]
    assert names_of(chosen(singles, both)) == ["a+b"]


def test_a_few_are_kept_the_most_accurate_among_them() -> None:
    singles = [single("a", 0.1, 1.0)]
    looked = [found(f"a+{index}", 0.2 + index / 100, 2.0 + index) for index in range(20)]
    kept = chosen(singles, looked)
    assert len(kept) == MOST
    assert names_of(kept)[-1] == "a+19"


# ------------------------------------------------------------------------------------------------------------- for real


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny profile of three subnets."""
    names = [SMALLEST, MIDDLE, LARGEST]
    save_servable(tiny_servable(tuple(map(Subnet.parse, names))), tmp_path)
    slackfit.save_choices(tmp_path, [choice(name, 0.2 + place / 100) for place, name in enumerate(names)])
    return tmp_path


def labelled_by(engine: Engine, *members: str) -> Dataset:
    """Noise in the classes that the mean of these members finds likeliest."""
    data = noise(120, channels=3)
    servable = engine._servable
    together = torch.stack([probabilities(engine, servable, member, data.test) for member in members]).mean(0)
    split = Split(data.test.images, together.argmax(1).numpy())
    return replace(data, train=split, validation=split, test=split)


@pytest.mark.slow
def test_what_is_found_is_written_as_the_engine_computes_it_in_place_of_what_there_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servable, subnets = load_servable(folder), slackfit.load_choices(folder)
    searching = Engine(servable, "cpu")
    asyncio.run(searching.prepare([SMALLEST, MIDDLE, LARGEST]))
    for members in ((SMALLEST, MIDDLE), (SMALLEST, LARGEST)):
        data = labelled_by(searching, *members)
        find_ensembles(searching, servable, data, folder, 2)
        choices = slackfit.load_choices(folder)
        assert choices[:3] == subnets
        assert "members disagree on" in capsys.readouterr().out
    searching.close()
    ensembles = [each.ensemble for each in choices[3:] if each.ensemble is not None]
    added = choices[-1]
    assert min(added.accuracy, added.test_accuracy or 0) > 0.9, "the labels are those of the mean with equal weights"
    assert added.accuracy_samples == 60
    assert (added.parameters, added.macs) == (20, 40)
    assert set(added.name.split("+")) == {SMALLEST, LARGEST}
    engine = Engine(servable, "cpu", ensembles=ensembles)
    rows = engine._compute(added.name, list(data.test.images), engine._make_worker()).probabilities
    assert (rows.argmax(1) == data.test.labels).mean() == pytest.approx(added.test_accuracy, abs=1e-4)
    path = write_latencies(engine, [each.name for each in choices if each.frontier], folder, 2)
    row = json.loads(path.read_text())["latencies"][added.name]
    assert set(row) == {"mode", "parallel_p50_ms", "serial_p50_ms", "p50_ms", "p99_ms"}
    engine.close()


@pytest.mark.slow
def test_where_no_ensemble_is_better_the_subnets_stay_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servable, subnets = load_servable(folder), slackfit.load_choices(folder)
    engine = Engine(servable, "cpu")
    asyncio.run(engine.prepare([SMALLEST]))
    find_ensembles(engine, servable, labelled_by(engine, SMALLEST), folder, 2)
    assert slackfit.load_choices(folder) == subnets
    assert "no ensemble is more accurate than everything faster" in capsys.readouterr().out
    engine.close()


def test_one_kind_of_search_at_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        profile_supernet.main(["--profile", str(tmp_path), "--ensembles-only", "--latency-only"])
    assert "not allowed with" in capsys.readouterr().err
