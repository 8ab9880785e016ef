"""The offline optimum: the best utility that any policy could reach, had it known all arrivals beforehand.

Utility is the sum of the accuracies of the queries in time, divided by all queries. Two methods, by what is asked:

* ``dp``, one worker and one SLO: dynamic programming over the queries in the order of their deadlines. Deadlines that
  ascend with the arrivals lose nothing by batches of neighbours, with drops between batches. A state is the instant at
  which the worker is free, with the value gained so far; where there are too many, those in one bin of time are merged,
  once into what can be reached (``lower``) and once into what nothing can exceed (``upper``).
* ``lp``, several workers or SLOs: an upper bound only. Queries take their cheapest possible share of a batch, divided
  at will among the windows of time between arrival and deadline, of which each holds no more than the workers' time.

The last line of stdout is one JSON document.

    python scripts/oracle.py --table profiles/paper-ofa-resnet50 --poisson 1500 --duration 10 --slo-ms 36
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, sparse
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from profiletable import ProfileError, ProfileTable
from scripts.workloads import Arrivals, WorkloadError
from wholefile import write_text

Floats = NDArray[np.float64]

EPSILON_S = 1e-9  # deadlines are met up to this: the server's own sums round, and no bound may fall below a real run
BINS = 192  # of an SLO, for merging states
WINDOWS = 6  # of the shortest SLO, for the linear programme


class OracleError(ValueError):
    """What has no optimum, in one line."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The optimal utility lies between ``lower`` (None: unknown) and ``upper``; ``exact`` if they are equal."""

    lower: float | None
    upper: float
    exact: bool
    method: str  # "dp" or "lp"


def optimum(
    arrivals: Arrivals,
    slo_s: ArrayLike,
    table: ProfileTable,
    workers: int = 1,
    *,
    bins: int = BINS,
    progress: Callable[[int], object] = lambda _: None,
) -> Bound:
    """The best utility for ascending arrivals, with one SLO or one for each.

    ``bins`` divide an SLO: more make the bracket narrower, in proportionally more time. ``progress`` is told of steps,
    two for each query.
    """
    arrivals = np.asarray(arrivals, np.float64)
    slos_s = np.broadcast_to(np.asarray(slo_s, np.float64), arrivals.shape)
    if not len(arrivals) or (np.diff(arrivals) < 0).any() or not (slos_s > 0).all() or workers < 1 or bins < 1:
        raise OracleError("needs ascending arrivals, at least one, SLOs above zero, and at least one worker and bin")
    choices = _Choices.of(table)
    if workers > 1 or slos_s.min() < slos_s.max():
        return Bound(None, _fluid_bound(arrivals, slos_s, choices, workers), False, "lp")
    lower, upper = (
        _Fronts(arrivals, float(slos_s[0]), choices, bins, optimistic).solve(progress) for optimistic in (False, True)
    )
    return Bound(lower, max(lower, upper), upper - lower < 1e-12, "dp")


@dataclass(frozen=True, slots=True)
class _Choices:
    """The table as arrays: ``latency_s[s, n - 1]`` of a batch of n."""

    accuracy: Floats
    latency_s: Floats

    @classmethod
    def of(cls, table: ProfileTable) -> _Choices:
        accuracy = np.array([entry.accuracy for entry in table.entries])
        return cls(accuracy, np.array([entry.latency_s[1 : table.max_batch + 1] for entry in table.entries]))


# -------------------------------------------------------------------------------------------------- dynamic programming


class _Fronts:
    """For the first k queries, k = 0, 1, ...: the Pareto front of (worker free from, value), both ascending.

    Row k holds the front of k, padded with infinite times. ``optimistic`` decides how states in one bin are merged:
    into the earliest time with the greatest value of any of them, or into the one of greatest value.
    """

    def __init__(self, arrivals: Arrivals, slo_s: float, choices: _Choices, bins: int, optimistic: bool) -> None:
        count, self._most = len(arrivals), choices.latency_s.shape[1]
        self._choices, self._optimistic = choices, optimistic
        self._arrivals, self._deadlines = arrivals, arrivals + slo_s + EPSILON_S
        self._width_s = slo_s / bins
        self._free_s = np.full((count + 1, bins + 3), math.inf)
        self._value = np.full((count + 1, bins + 3), -math.inf)
        self._length = np.zeros(count + 1, np.int64)
        self._put(0, np.array([-math.inf]), np.array([0.0]))

    def solve(self, progress: Callable[[int], object]) -> float:
        """The greatest utility."""
        count = len(self._arrivals)
        for k in range(1, count + 1):
            self._advance(k)
            if k % 256 == 0:
                progress(256)
        progress(count % 256)
        return float(self._value[count].max()) / count

    def _advance(self, k: int) -> None:
        """Row k: query k is dropped, or is the last of a batch of n that follows a state of row k - n."""
        free_s, value = self._batches(k)
        next_s = self._arrivals[k] if k < len(self._arrivals) else math.inf
        dropped = slice(self._length[k - 1])
        # Before the next arrival nothing can start: to have been free earlier is worth nothing.
        free_s = np.maximum(np.concatenate([self._free_s[k - 1][dropped], free_s]), next_s)
        self._merge(k, free_s, np.concatenate([self._value[k - 1][dropped], value]))

    def _batches(self, k: int) -> tuple[Floats, Floats]:
        """All states in which a batch ends with query k."""
        last_s, latency_s = self._arrivals[k - 1], self._choices.latency_s
        first = max(k - self._most, 0)  # of the batch; before it, so many queries are settled
        first += int(np.searchsorted(self._deadlines[first:k], last_s + latency_s[0, 0]))
        if first == k:
            return np.empty(0), np.empty(0)
        size = np.arange(k - first, 0, -1)
        longest = int(self._length[first:k].max())
        free_s, value = self._free_s[first:k, : longest + 1], self._value[first:k]
        # Of the states in which the worker waits for query k, the last has the greatest value.
        row, column = np.nonzero((free_s[:, :-1] < math.inf) & (free_s[:, 1:] > last_s))
        start_s, value, size = np.maximum(free_s[row, column], last_s), value[row, column], size[row]
        done_s = start_s + latency_s[:, size - 1]
        entry, state = np.nonzero(done_s <= self._deadlines[first:k][row])
        return done_s[entry, state], value[state] + size[state] * self._choices.accuracy[entry]

    def _merge(self, k: int, free_s: Floats, value: Floats) -> None:
        """Keep at most one state a bin, and of these only states of more value than all that are free earlier."""
        least_s = free_s.min()
        if least_s == math.inf:  # after the last query only the value counts
            self._put(k, free_s[:1], value.max(keepdims=True))
            return
        # Bins that move with k would merge the same states again and again, each time into something better.
        bins = np.floor(free_s / self._width_s).astype(np.int64)
        # The earliest states are a bin of their own: they are where the worker would have to wait.
        bins = np.where(free_s > least_s, bins - int(least_s / self._width_s) + 1, 0)
        length = int(bins.max()) + 1
        most = np.full(length, -math.inf)
        np.maximum.at(most, bins, value)
        chosen = slice(None) if self._optimistic else value == most[bins]
        earliest = np.full(length, math.inf)
        np.minimum.at(earliest, bins[chosen], free_s[chosen])
        kept = most > np.concatenate([[-math.inf], np.maximum.accumulate(most)[:-1]])
        free_s, value = self._without_hopeless(k, earliest[kept], most[kept])
        self._put(k, free_s, value)

    def _put(self, k: int, free_s: Floats, value: Floats) -> None:
        self._length[k] = len(free_s)
        self._free_s[k, : len(free_s)], self._value[k, : len(free_s)] = free_s, value

    def _without_hopeless(self, k: int, free_s: Floats, value: Floats) -> tuple[Floats, Floats]:
        """Leave out states that one free later beats even if the earlier gains all queries that arrive until then."""
        waiting = np.searchsorted(self._arrivals, free_s, side="right") - k
        sure = value - waiting * self._choices.accuracy[-1]
        kept = np.append(value[:-1] > np.maximum.accumulate(sure[:0:-1])[::-1], True)
        return free_s[kept], value[kept]


# ---------------------------------------------------------------------------------------------------- linear programme


def _fluid_bound(arrivals: Arrivals, slos_s: Floats, choices: _Choices, workers: int) -> float:
    """The optimum when work is a fluid: whatever batches do, this can be done with their shares of the workers' time.

    Queries of one class (the same windows of arrival and deadline) are one source of work. Its value is concave in the
    work: pieces of so much work, each of one value per second.
    """
    deadlines = arrivals + slos_s + EPSILON_S
    width_s = float(slos_s.min()) / WINDOWS
    spans, class_of = np.unique(
        np.floor(np.stack([arrivals, deadlines], axis=1) / width_s).astype(np.int64), axis=0, return_inverse=True
    )
    shares_s, kind_of = np.unique(_cheapest_shares(arrivals, deadlines, choices), axis=0, return_inverse=True)
    members, counts = np.unique(np.stack([class_of.ravel(), kind_of.ravel()], axis=1), axis=0, return_counts=True)
    pieces_of = [_pieces(row, choices.accuracy) for row in shares_s]
    pieces = np.array(
        [
            (source, work_s * count, slope)
            for (source, kind), count in zip(members, counts, strict=True)
            for work_s, slope in pieces_of[kind]
        ]
    ).reshape(-1, 3)
    return _most_value(spans, pieces, workers * width_s) / len(arrivals)


def _cheapest_shares(arrivals: Arrivals, deadlines: Floats, choices: _Choices) -> Floats:
    """Worker seconds that a query costs at least, by query and entry: its share of the cheapest batch it can be in.

    A batch of n that runs from t on for a time needs n queries that have all arrived by t and are not due before its
    end, and the query must be one of them. Infinite where there is no such batch.
    """
    shares_s = np.full((len(arrivals), len(choices.accuracy)), math.inf)
    sizes = np.arange(1, choices.latency_s.shape[1] + 1)
    for entry, latency_s in enumerate(choices.latency_s):
        for index in np.argsort(latency_s / sizes, kind="stable"):
            missing = shares_s[:, entry] == math.inf
            if not missing.any():
                break
            fits = _can_run(arrivals, deadlines, latency_s[index], int(sizes[index]))
            shares_s[fits & missing, entry] = latency_s[index] / sizes[index]
    return shares_s


def _can_run(arrivals: Arrivals, deadlines: Floats, latency_s: float, size: int) -> NDArray[np.bool_]:
    """Which queries can be in some batch of this size and latency, by what is there to fill it."""
    able = deadlines - arrivals >= latency_s
    starts_s, due_s = arrivals[able], deadlines[able]
    present = np.searchsorted(starts_s, starts_s, side="right")
    present -= np.searchsorted(np.sort(due_s), starts_s + latency_s)
    # Enough are present from some arrival on that is neither before this query's nor too late for its deadline.
    enough = np.concatenate([[0], np.cumsum(present >= size)])
    latest = np.searchsorted(starts_s, due_s - latency_s, side="right")
    fits = np.zeros(len(arrivals), np.bool_)
    fits[able] = enough[latest] > enough[np.arange(len(starts_s))]
    return fits


def _pieces(shares_s: Floats, accuracy: Floats) -> list[tuple[float, float]]:
    """The upper concave hull of accuracy over worker seconds, from zero on: seconds and slope of each edge."""
    pieces: list[tuple[float, float]] = []
    work_s, value = 0.0, 0.0
    while (better := np.flatnonzero((accuracy > value) & (shares_s < math.inf))).size:
        # All of these cost more than work_s, or the edge before would have been steeper towards them.
        slopes = (accuracy[better] - value) / (shares_s[better] - work_s)
        best = better[np.argmax(slopes)]
        pieces.append((float(shares_s[best] - work_s), float(slopes.max())))
        work_s, value = float(shares_s[best]), float(accuracy[best])
    return pieces


def _most_value(spans: NDArray[np.int64], pieces: Floats, capacity_s: float) -> float:
    """The linear programme: which pieces to do, and in which windows the work of each class is done."""
    if not len(pieces):
        return 0.0
    lengths = spans[:, 1] - spans[:, 0] + 1
    source = np.repeat(np.arange(len(spans)), lengths)
    window = np.arange(len(source)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(spans[:, 0], lengths)
    window = np.unique(window, return_inverse=True)[1]
    done, placed = np.ones(len(pieces)), np.ones(len(source))
    columns = len(pieces) + np.arange(len(source))
    rows = np.concatenate([pieces[:, 0].astype(np.int64), source, len(spans) + window])
    matrix = sparse.csr_array(
        (np.concatenate([done, -placed, placed]), (rows, np.concatenate([np.arange(len(pieces)), columns, columns])))
    )
    solution = optimize.linprog(
        np.concatenate([-pieces[:, 2], np.zeros(len(source))]),
        A_ub=matrix,
        b_ub=np.concatenate([np.zeros(len(spans)), np.full(window.max() + 1, capacity_s)]),
        bounds=np.stack([np.zeros(matrix.shape[1]), np.append(pieces[:, 1], np.full(len(source), math.inf))], axis=1),
        method="highs",
    )
    if not solution.success:
        raise OracleError(f"the linear programme was not solved: {solution.message}")
    return -float(solution.fun)


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the optimum of a workload, with how long it took."""
    from scripts import replay, simulate  # they import the server, which takes seconds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    simulate.add_workload_arguments(parser)
    parser.add_argument("--bins", type=int, default=BINS, metavar="N", help="of an SLO: more are narrower and slower")
    options = parser.parse_args(arguments)
    try:
        table = simulate.load_table(options.table)
        arrivals, slos_s, workload = simulate.make_workload(options)
        started_s = time.process_time()
        with tqdm(total=2 * len(arrivals), desc="optimum", unit="step", unit_scale=True, disable=None) as bar:
            bound = optimum(arrivals, slos_s, table, options.workers, bins=options.bins, progress=bar.update)
        document: dict[str, Any] = {
            "script": "oracle.py", **replay.provenance(), "workload": workload, "slos_ms": options.slo_ms,
            "workers": options.workers, "cpu_s": round(time.process_time() - started_s, 2), **asdict(bound),
        }  # fmt: skip
        text = json.dumps(document, allow_nan=False)
        if options.json:
            write_text(options.json, text + "\n")
    except (OracleError, ProfileError, simulate.SimulationError, WorkloadError, OSError) as error:
        sys.exit(f"oracle.py: {error}")
    print(text)


if __name__ == "__main__":
    main()
