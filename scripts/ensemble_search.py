"""Looks for pairs and triples of known subnets that are more accurate than everything faster; for profile_supernet.py.

Every candidate's class probabilities of the validation images are computed once; all pairs and triples are combined
from them, by mean and by vote, with every weighting in tenths. One half of the images chooses members, combination and
weights, and which ensembles are on the frontier; on the other half the accuracy is measured that the profile states.
The latency to choose by is estimated from the members', measured together; what the table holds is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import slackfit
from engine import Engine, measure_latencies
from ensembles import combine
from profiletable import COMBINATIONS, Ensemble
from scripts import datasets
from scripts.frontiers import Candidate, frontier, thinned
from scripts.train import predict
from servable import Servable

MOST_CANDIDATES = 16  # subnets; of so many there are 120 pairs and 560 triples
SIZES = (2, 3)
MOST = 4  # ensembles that become choices
PARTS = 10  # of the whole weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An ensemble that was looked at; ``disagreement``: on how much of the images two members differ, on average."""

    ensemble: Ensemble
    candidate: Candidate
    disagreement: float


def find_ensembles(engine: Engine, servable: Servable, data: datasets.Dataset, folder: Path, batch_size: int) -> None:
    """Add the ensembles that extend the frontier to the folder's choices.json, in place of those there were."""
    subnets = [choice for choice in slackfit.load_choices(folder) if choice.ensemble is None]
    known = {choice.name: choice for choice in candidates(subnets)}
    asyncio.run(engine.prepare(list(known)))
    samples = asyncio.run(measure_latencies(engine, list(known), [batch_size], 9, lambda: None))
    latency_s = {name: float(np.median(sizes[0])) for name, sizes in samples.items()}
    bar = tqdm(known, desc="predict", unit="subnet", disable=None)
    validation = {name: probabilities(engine, servable, name, data.validation) for name in bar}
    labels = torch.from_numpy(data.validation.labels)
    singles = [_single(choice, validation[choice.name], labels, latency_s[choice.name]) for choice in known.values()]
    with _one_thread():
        found = chosen(singles, list(looked_at(singles, validation, labels, engine.ensembles.lanes(max(SIZES)))))
    needed = {name for each in found for name in each.ensemble.members}
    test = {name: probabilities(engine, servable, name, data.test) for name in needed}
    choices = [_choice(each, test, data) for each in found]
    slackfit.save_choices(folder, [*subnets, *choices])
    report(found, choices)


def candidates(subnets: Sequence[slackfit.Choice]) -> list[slackfit.Choice]:
    """Who may be a member: those on the frontier, then the most accurate; in order of size, the last the largest."""
    ranked = sorted(subnets, key=lambda choice: (not choice.frontier, -choice.accuracy))
    return sorted(ranked[:MOST_CANDIDATES], key=lambda choice: choice.macs)


def probabilities(engine: Engine, servable: Servable, name: str, split: datasets.Split) -> Tensor:
    """Class probabilities (images, classes) of a subnet."""
    network = engine.executables.get(name) if engine.executables else engine.actuate(name)
    return predict(network, split.images, servable.input, servable.supernet.device).softmax(1)


def accuracy_of(members: Sequence[Tensor], ensemble: Ensemble, labels: Tensor) -> float:
    """Part of the images that an ensemble classifies correctly, from its members' probabilities."""
    weights = torch.tensor(ensemble.weights).view(-1, 1, 1)
    combined, _ = combine(torch.stack(list(members)), weights, ensemble.combination)
    return float((combined.argmax(1) == labels).float().mean())


def fitted(names: Sequence[str], members: Tensor, labels: Tensor) -> Ensemble:
    """The combination and weights that classify most images correctly; (members, images, classes) are probabilities.

    Of equally good ones the mean, and the most even weights.
    """
    weights = weightings(len(names))
    best, most = None, -1
    for combination in COMBINATIONS:
        scores = members
        if combination == "vote":
            scores = torch.nn.functional.one_hot(members.argmax(2), members.shape[2]).float()
        combined = (weights @ scores.flatten(1)).view(len(weights), *members.shape[1:])
        hits = (combined.argmax(2) == labels).sum(1)
        place = int(hits.argmax())  # the first of the largest
        if int(hits[place]) > most:
            shares = tuple(round(float(weight), 6) for weight in weights[place, :-1])
            shares = (*shares, round(1 - sum(shares), 6))
            best = Ensemble(members=tuple(names), combination=combination, weights=shares)
            most = int(hits[place])
    assert best is not None, "there are combinations"
    return best


def weightings(members: int) -> Tensor:
    """Weights of so many members that sum to 1: equal ones, then all in tenths above zero, the most even first."""
    parts = itertools.product(range(1, PARTS), repeat=members)
    grid = sorted((each for each in parts if sum(each) == PARTS), key=lambda each: (max(each) - min(each), each))
    return torch.tensor([[1 / members] * members, *([part / PARTS for part in each] for each in grid)])


def looked_at(
    singles: Sequence[Candidate], validation: Mapping[str, Tensor], labels: Tensor, lanes: int
) -> Iterator[Found]:
    """All pairs and triples; ``lanes`` members run at the same time."""
    groups = [group for size in SIZES for group in itertools.combinations(singles, size)]
    for group in tqdm(groups, desc="ensembles", unit="ensemble", disable=None):
        names, taken_s = [each.name for each in group], [each.latency_s for each in group]
        members = torch.stack([validation[name] for name in names])
        ensemble = fitted(names, members[:, ::2], labels[::2])
        candidate = Candidate(
            name=ensemble.name,
            accuracy=accuracy_of(list(members[:, ::2]), ensemble, labels[::2]),
            confirmed=accuracy_of(list(members[:, 1::2]), ensemble, labels[1::2]),
            latency_s=max(*taken_s, sum(taken_s) / lanes),
            parameters=sum(each.parameters for each in group),
            macs=sum(each.macs for each in group),
        )
        yield Found(ensemble=ensemble, candidate=candidate, disagreement=disagreement(members))


def disagreement(members: Tensor) -> float:
    """On how much of the images two members find different classes likeliest, on average."""
    classes = members.argmax(2)
    pairs = itertools.combinations(classes, 2)
    return float(torch.stack([(one != other).float().mean() for one, other in pairs]).mean())


def chosen(singles: Sequence[Candidate], found: Sequence[Found]) -> list[Found]:
    """The ensembles on the common frontier of subnets and ensembles, at most MOST, if the other images confirm them."""
    by_name = {each.candidate.name: each for each in found}
    on_it = frontier([*singles, *(each.candidate for each in found)])
    kept = thinned([each for each in on_it if each.name in by_name], MOST)
    sure = frontier([replace(each, accuracy=each.confirmed) for each in [*singles, *kept]])
    return [by_name[each.name] for each in sure if each.name in by_name]


def report(found: Sequence[Found], choices: Sequence[slackfit.Choice]) -> None:
    """Print the ensembles that were chosen, and how much their members differ."""
    if not found:
        print("no ensemble is more accurate than everything faster")
    for each, choice in zip(found, choices, strict=True):
        weights = ", ".join(f"{weight:.2f}" for weight in each.ensemble.weights)
        facts = f"{each.ensemble.combination} ({weights}), members disagree on {each.disagreement:.1%} of the images"
        print(f"{choice.name}: {choice.accuracy:.4f}, {choice.test_accuracy:.4f} on test images; {facts}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, by far where others want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _single(choice: slackfit.Choice, found: Tensor, labels: Tensor, latency_s: float) -> Candidate:
    right = (found.argmax(1) == labels).float()
    return Candidate(
        name=choice.name, accuracy=float(right[::2].mean()), confirmed=float(right[1::2].mean()), latency_s=latency_s,
        parameters=choice.parameters, macs=choice.macs,
    )  # fmt: skip


def _choice(found: Found, test: Mapping[str, Tensor], data: datasets.Dataset) -> slackfit.Choice:
    labels = torch.from_numpy(data.test.labels)
    tested = accuracy_of([test[name] for name in found.ensemble.members], found.ensemble, labels)
    return slackfit.Choice(
        name=found.ensemble.name,
        kind="ensemble",
        accuracy=round(found.candidate.confirmed, 4),
        accuracy_samples=len(data.validation) // 2,
        test_accuracy=round(tested, 4),
        parameters=found.candidate.parameters,
        macs=found.candidate.macs,
        frontier=True,
        ensemble=found.ensemble,
    )
