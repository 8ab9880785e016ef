"""Looks for pairs and triples of known subnets that are more accurate than everything faster; for profile_supernet.py.

Every candidate's class probabilities of the validation images are computed once; all pairs and triples are combined
from them, by mean and by vote, with every weighting in tenths. Where a mirrored image keeps its class, each subnet is a
candidate twice, also as one that sees the image mirrored (members.py). One half of the images chooses members, weights
and combination, and which ensembles are on the frontier, by the probability that they give to the right classes: among
a thousand candidates, the one that is right most often owes that to chance. On the other half the accuracy is measured
that the profile states (seen both ways, where that is known: chance favours one of them), and an ensemble that is not
more accurate there than everything faster is dropped. The latency to choose by is estimated from the members', measured
together: ``lanes`` of them run at the same time. What the table holds is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import slackfit
from engine import Engine, measure_latencies
from ensembles import Mirrored, combine
from members import is_mirrored, mirrored, subnet_of
from profiletable import Ensemble
from scripts import datasets
from scripts.frontiers import Candidate, frontier, thinned
from scripts.train import predict
from servable import Servable

MOST_CANDIDATES = 16  # members; of so many there are 120 pairs and 560 triples
SIZES = (2, 3)
MOST = 6  # ensembles that become choices
LEAST_GAIN = 0.001  # in accuracy, over everything faster: what is worth another choice, and its time
PARTS = 10  # of the whole weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An ensemble that was looked at; ``disagreement``: on how much of the images two members differ, on average.

    The candidate's ``accuracy``, by which it is chosen, is how likely it is to be right (``fitted``).
    """

    ensemble: Ensemble
    candidate: Candidate
    disagreement: float


def find_ensembles(
    engine: Engine, servable: Servable, data: datasets.Dataset, folder: Path, batch_size: int, lanes: int = 0
) -> None:
    """Add the ensembles that extend the frontier to the folder's choices.json, in place of those there were.

    ``lanes``: so many members run at the same time; 0: as many as the engine can.
    """
    subnets = [choice for choice in slackfit.load_choices(folder) if choice.ensemble is None]
    views = 2 if data.mirrored else 1
    known = {choice.name: choice for choice in candidates(subnets, MOST_CANDIDATES // views)}
    asyncio.run(engine.prepare(list(known)))
    samples = asyncio.run(measure_latencies(engine, list(known), [batch_size], 9, lambda: None))
    latency_s = {name: float(np.median(sizes[0])) for name, sizes in samples.items()}
    names = [member for name in known for member in (name, mirrored(name))[:views]]
    bar = tqdm(names, desc="predict", unit="member", disable=None)
    validation = {name: probabilities(engine, servable, name, data.validation) for name in bar}
    labels = torch.from_numpy(data.validation.labels)
    members = [
        _single(name, known[subnet_of(name)], validation, labels, latency_s[subnet_of(name)]) for name in names
    ]
    with _one_thread():
        looked = looked_at(members, validation, labels, lanes or engine.ensembles.lanes(max(SIZES)))
        found = chosen([each for each in members if not is_mirrored(each.name)], list(looked))
    needed = {name for each in found for name in each.ensemble.members}
    test = {name: probabilities(engine, servable, name, data.test) for name in needed}
    choices = [_choice(each, test, data) for each in found]
    slackfit.save_choices(folder, [*subnets, *choices])
    report(found, choices)


def candidates(subnets: Sequence[slackfit.Choice], most: int = MOST_CANDIDATES) -> list[slackfit.Choice]:
    """Who may be a member: those on the frontier, then the most accurate; in order of size, the last the largest."""
    ranked = sorted(subnets, key=lambda choice: (not choice.frontier, -choice.accuracy))
    return sorted(ranked[:most], key=lambda choice: choice.macs)


def probabilities(engine: Engine, servable: Servable, name: str, split: datasets.Split) -> Tensor:
    """Class probabilities (images, classes) of a subnet, or of one that sees all images mirrored."""
    subnet = subnet_of(name)
    network = engine.executables.get(subnet) if engine.executables else engine.actuate(subnet)
    seen = Mirrored(network) if is_mirrored(name) else network
    return predict(seen, split.images, servable.input, servable.supernet.device).softmax(1)


def accuracy_of(members: Sequence[Tensor], ensemble: Ensemble, labels: Tensor) -> float:
    """Part of the images that an ensemble classifies correctly, from its members' probabilities."""
    return float(hits_of(torch.stack(list(members)), ensemble, labels).mean())


def hits_of(members: Tensor, ensemble: Ensemble, labels: Tensor) -> Tensor:
    """For each image, 1 where the ensemble is right, from its members' probabilities (members, images, classes)."""
    weights = torch.tensor(ensemble.weights).view(-1, 1, 1)
    combined, _ = combine(members, weights, ensemble.combination)
    return (combined.argmax(1) == labels).float()


def fitted(names: Sequence[str], seen: Sequence[Tensor], labels: Tensor) -> tuple[Ensemble, float]:
    """The weights with which the mean is likeliest to be right, and how likely: as the geometric mean over images.

    ``seen`` are probabilities (members, images, classes), of the same members in each way of looking at the images. Of
    equally likely weights the most even. A vote, in which no member may outvote all others together, stands in for the
    mean where it is right more often by more than chance.
    """
    weights = weightings(len(names))
    means = [(weights @ each.flatten(1)).view(len(weights), *each.shape[1:]) for each in seen]
    likely = torch.stack([_of_labels(each, labels).clamp_min(1e-9).log().mean(1) for each in means]).mean(0)
    place = int(likely.argmax())  # the first of the largest
    mean, vote = _ensemble(names, "mean", weights[place]), _best_vote(names, weights, seen, labels)
    chosen = mean if vote is None or not _is_better(vote, mean, seen, labels) else vote
    return chosen, math.exp(float(likely[place]))


def _of_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Of (..., images, classes), those of the right classes (..., images)."""
    return probabilities.gather(-1, labels.expand(probabilities.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _best_vote(names: Sequence[str], weights: Tensor, seen: Sequence[Tensor], labels: Tensor) -> Ensemble | None:
    """The weighted vote that is right most often; None where one member always decides, as of two."""
    fair = weights[weights.amax(1) < 0.5]
    if not len(fair):
        return None
    hits = torch.zeros(len(fair))
    for each in seen:
        votes = torch.nn.functional.one_hot(each.argmax(2), each.shape[2]).float()
        combined = (fair @ votes.flatten(1)).view(len(fair), *each.shape[1:])
        hits += (combined.argmax(2) == labels).sum(1)
    return _ensemble(names, "vote", fair[int(hits.argmax())])


def _is_better(one: Ensemble, other: Ensemble, seen: Sequence[Tensor], labels: Tensor) -> bool:
    """Whether one is right more often than the other, by two standard errors at least."""
    gains = [hits_of(each, one, labels) - hits_of(each, other, labels) for each in seen]
    gain = torch.stack(gains).mean(0)
    return float(gain.sum()) > 2 * float(gain.square().sum().sqrt())


def _ensemble(names: Sequence[str], combination: str, weights: Tensor) -> Ensemble:
    shares = tuple(round(float(weight), 6) for weight in weights[:-1])
    return Ensemble(members=tuple(names), combination=combination, weights=(*shares, round(1 - sum(shares), 6)))


def weightings(members: int) -> Tensor:
    """Weights of so many members that sum to 1: equal ones, then all in tenths above zero, the most even first."""
    parts = itertools.product(range(1, PARTS), repeat=members)
    grid = sorted((each for each in parts if sum(each) == PARTS), key=lambda each: (max(each) - min(each), each))
    return torch.tensor([[1 / members] * members, *([part / PARTS for part in each] for each in grid)])


def looked_at(
    singles: Sequence[Candidate], validation: Mapping[str, Tensor], labels: Tensor, lanes: int
) -> Iterator[Found]:
    """All pairs and triples of which one sees the image as it is; ``lanes`` members run at the same time."""
    groups = [group for size in SIZES for group in itertools.combinations(singles, size) if not _all_mirrored(group)]
    for group in tqdm(groups, desc="ensembles", unit="ensemble", disable=None):
        names, taken_s = [each.name for each in group], [each.latency_s for each in group]
        views = _views(names, validation)
        ensemble, likelihood = fitted(names, [members[:, ::2] for members in views], labels[::2])
        confirmed = [hits_of(members[:, 1::2], ensemble, labels[1::2]) for members in views]
        candidate = Candidate(
            name=ensemble.name,
            accuracy=likelihood,
            confirmed=float(torch.cat(confirmed).mean()),
            latency_s=max(*taken_s, sum(taken_s) / lanes),
            parameters=sum({subnet_of(each.name): each.parameters for each in group}.values()),
            macs=sum(each.macs for each in group),
        )
        yield Found(ensemble=ensemble, candidate=candidate, disagreement=disagreement(views[0]))


def _views(names: Sequence[str], validation: Mapping[str, Tensor]) -> list[Tensor]:
    """The members' probabilities (members, images, classes), and those of mirrored images, where they are known.

    Both tell as much of how good the members are together.
    """
    other = [subnet_of(name) if is_mirrored(name) else mirrored(name) for name in names]
    known = [view for view in (names, other) if all(name in validation for name in view)]
    return [torch.stack([validation[name] for name in view]) for view in known]


def _all_mirrored(group: Sequence[Candidate]) -> bool:
    return all(is_mirrored(each.name) for each in group)


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
    better, best = [], -1.0
    for each in sure:
        if each.name not in by_name:
            best = each.accuracy
        elif each.accuracy >= best + LEAST_GAIN:
            better.append(by_name[each.name])
            best = each.accuracy
    return better


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


def _single(
    name: str, choice: slackfit.Choice, validation: Mapping[str, Tensor], labels: Tensor, latency_s: float
) -> Candidate:
    """A member, which is this choice."""
    views = torch.cat(_views([name], validation))
    likely = _of_labels(views[:, ::2], labels[::2]).clamp_min(1e-9).log()
    return Candidate(
        name=name,
        accuracy=math.exp(float(likely.mean())),
        confirmed=float((views.argmax(2) == labels)[:, 1::2].float().mean()),
        latency_s=latency_s,
        parameters=choice.parameters,
        macs=choice.macs,
    )


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
