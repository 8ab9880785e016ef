"""SlackFit: which subnet to run next, and on how many queries.

A **profile table** (profiletable.py) says how accurate each control choice is and how long it takes on this device by
batch size. A **policy** reads the table, the time and the waiting queries, and returns a ``Decision``: how many of the
most urgent queries to give up, what to run on the most urgent of the rest, and on how many of them at once.

This file reads no clock and does no I/O; it knows neither torch nor HTTP. The caller passes ``now_s``, already moved
forward by the overhead of answering, so that the slack of a query is its deadline minus ``now_s``.

Which queries cannot be saved is earlydrop.py's part. Here are the policies of the literature, our own (``HalfSLO``,
``PaceFit``, ``ClearFit``), and their names (``make_policy``).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Protocol

from earlydrop import Arrivals, QueueView, Rest, Traffic, drop_early, drop_hopeless, largest_batch
from profiletable import (
    DTYPES,
    Choice,
    Device,
    DeviceMismatch,
    Entry,
    InDtype,
    Latencies,
    ProfileError,
    ProfileTable,
    build_table,
    load_choices,
    load_latencies,
    measured_in,
    save_choices,
    save_latencies,
    served,
    table_document,
)

# With the names of the table and of early drop, so that whoever plans needs this module only.
__all__ = [
    "DTYPES", "POLICIES", "Arrivals", "CheapestFirst", "Choice", "ClearFit", "Decision", "Device", "DeviceMismatch",
    "Entry", "FixedSubnet", "HalfSLO", "InDtype", "Latencies", "MaxAccuracy", "MaxBatch", "PaceFit", "Policy",
    "PolicyError", "ProfileError", "ProfileTable", "QueueView", "Rest", "SlackFit", "Traffic", "build_table",
    "drop_early", "drop_hopeless", "largest_batch", "load_choices", "load_latencies", "make_policy", "measured_in",
    "save_choices", "save_latencies", "served", "table_document",
]  # fmt: skip


class PolicyError(ValueError):
    """A policy that does not exist or cannot be had with this table; lists what can."""


# -------------------------------------------------------------------------------------------------- what policies share


class Decision(NamedTuple):
    """Give up this many of the most urgent queries, then run the entry (None: nothing) on the most urgent left."""

    give_up: int
    entry: Entry | None
    batch_size: int


class Policy(Protocol):
    """Decides what an idle worker does next; remembers nothing but what these methods were told."""

    name: str

    def arrived(self, now_s: float, slo_s: float) -> None:
        """A query arrived; of no interest to most policies."""
        return

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """What to do now, the queue not being empty, with the table's entries from index ``lowest`` on."""
        ...

    def adopt(self, table: ProfileTable) -> bool:
        """Decide by this table from now on, as if made for it; False: a policy that stays with the one it has."""
        return False

    def resize(self, workers: int) -> None:
        """So many workers are left; of no interest to policies that look at one at a time."""
        return


# ----------------------------------------------------------------------------------------------- the policies of others


DEFAULT_BUCKETS = 16


class _Answers(NamedTuple):
    """SlackFit's answers: ``best[i][n]`` if choice i is the slowest that fits, n queries wait and none is given up.

    The last of each row is for all longer queues.
    """

    shortest_s: float  # what a query needs at least
    latencies_s: tuple[float, ...]  # of the choices, ascending
    best: tuple[tuple[Decision, ...], ...]


class SlackFit(Policy):
    """The paper's policy (SuperServe, arXiv 2312.16733): less slack, a faster choice; a longer queue, a larger batch.

    All choices (entry, profiled batch size) are put into buckets evenly spaced by latency. The slack of the most urgent
    query picks the bucket closest to it from below; in the bucket, the largest batch that the queue can fill wins, and
    among equals the most accurate. The slowest choice that fits the slack is always in that bucket, so that all answers
    can be tabled by that choice and by the length of the queue.
    """

    def __init__(self, table: ProfileTable, buckets: int = DEFAULT_BUCKETS) -> None:
        if buckets < 1:
            raise PolicyError(f"slackfit needs at least one bucket, not {buckets}")
        self.name = "slackfit" if buckets == DEFAULT_BUCKETS else f"slackfit:{buckets}"
        self._buckets = buckets
        self.adopt(table)

    def adopt(self, table: ProfileTable) -> bool:
        """Answers are tabled anew."""
        self._table = table
        self._least_s = min(entry.latency_s[1] for entry in table.entries)
        self._width_s = (max(entry.latency_s[-1] for entry in table.entries) - self._least_s) / self._buckets
        self._answers = {0: self._tabled(0)}
        return True

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """Two look-ups; the first decision at an accuracy floor also tables its answers."""
        answers = self._answers.get(lowest)
        if answers is None:
            answers = self._answers[lowest] = self._tabled(lowest)
        given_up, count = 0, len(queue.deadlines_s)
        slack_s = (queue.deadlines_s[0] - now_s) / queue.stretch
        if slack_s < answers.shortest_s:
            rest = drop_hopeless(now_s, queue, self._table.entries[lowest].latency_s)
            given_up, count, slack_s = rest.given_up, rest.count, rest.slack_s
            if not count:
                return Decision(given_up, None, 0)
        row = answers.best[bisect_right(answers.latencies_s, slack_s) - 1]
        decision = row[count] if count < len(row) else row[-1]
        return Decision(given_up, decision.entry, decision.batch_size) if given_up else decision

    def _tabled(self, lowest: int) -> _Answers:
        entries, sizes = self._table.entries, self._table.batch_sizes
        pairs = [(index, size) for index in range(lowest, len(entries)) for size in sizes]
        pairs.sort(key=lambda pair: entries[pair[0]].latency_s[pair[1]])
        latencies_s = tuple(entries[index].latency_s[size] for index, size in pairs)
        # What a queue can fill: exactly one of the sizes or, at the end, more than the largest.
        fillable = (*sizes, sizes[-1] + 1)
        rows: list[tuple[tuple[int, int], ...]] = []
        bucket = -1
        for pair, latency_s in zip(pairs, latencies_s, strict=True):
            previous, bucket = bucket, self._bucket(latency_s)
            rivals = rows[-1] if bucket == previous else (pair,) * len(fillable)
            rows.append(tuple(_better(rival, pair, queued) for rival, queued in zip(rivals, fillable, strict=True)))
        # By the length of the queue; many rows are alike.
        by_length = [bisect_left(sizes, length) for length in range(sizes[-1] + 2)]
        alike = {
            row: tuple(self._decision(row[place], length) for length, place in enumerate(by_length))
            for row in dict.fromkeys(rows)
        }
        return _Answers(entries[lowest].latency_s[1], latencies_s, tuple(alike[row] for row in rows))

    def _decision(self, pair: tuple[int, int], queued: int) -> Decision:
        return Decision(0, self._table.entries[pair[0]], min(pair[1], queued))

    def _bucket(self, latency_s: float) -> int:
        if not self._width_s:
            return 0
        return min(int((latency_s - self._least_s) / self._width_s), self._buckets - 1)


def _better(one: tuple[int, int], other: tuple[int, int], queued: int) -> tuple[int, int]:
    """Of two choices, entry (by accuracy ascending) and batch size, that for so many queries; the first if equal."""
    return max(one, other, key=lambda pair: (min(pair[1], queued), pair[0]))


class FixedSubnet(Policy):
    """A server of one model, as Clipper is: the largest batch that fits the slack of the most urgent query."""

    def __init__(self, table: ProfileTable, entry: Entry) -> None:
        self.name = f"fixed:{entry.name}"
        self._entry = entry
        self._index = table.entries.index(entry)

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """The one entry, in the largest batch that fits; a query with a floor above it cannot be served."""
        if self._index < lowest:
            return Decision(1, None, 0)
        rest = drop_hopeless(now_s, queue, self._entry.latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        return Decision(rest.given_up, self._entry, largest_batch(self._entry.latency_s, rest.slack_s, rest.count))


class _Stateless(Policy):
    """A policy that knows nothing but the table's entries."""

    def __init__(self, table: ProfileTable) -> None:
        self.adopt(table)

    def adopt(self, table: ProfileTable) -> bool:
        self._entries = table.entries
        return True


class MaxAccuracy(_Stateless):
    """A greedy rival from the SuperServe paper: accuracy first, then as large a batch as that leaves slack for."""

    name = "maxaccuracy"

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """The most accurate entry that can serve the most urgent query in time, in the largest batch that fits."""
        rest = drop_hopeless(now_s, queue, self._entries[lowest].latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        entry = _most_accurate(self._entries[lowest:], 1, rest.slack_s)
        return Decision(rest.given_up, entry, largest_batch(entry.latency_s, rest.slack_s, rest.count))


class MaxBatch(_Stateless):
    """The other greedy rival from the SuperServe paper: as many queries as possible, then accuracy."""

    name = "maxbatch"

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """The largest batch that the cheapest entry does within the slack, on the most accurate that does so too."""
        cheapest = self._entries[lowest]
        rest = drop_hopeless(now_s, queue, cheapest.latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        batch_size = largest_batch(cheapest.latency_s, rest.slack_s, rest.count)
        return Decision(rest.given_up, _most_accurate(self._entries[lowest:], batch_size, rest.slack_s), batch_size)


class CheapestFirst(_Stateless):
    """The cheapest model that meets the client's accuracy, as INFaaS picks it (Romero et al., USENIX ATC 2021)."""

    name = "cheapest"

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """The cheapest entry that may be used, in the largest batch that fits."""
        cheapest = self._entries[lowest]
        rest = drop_hopeless(now_s, queue, cheapest.latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        return Decision(rest.given_up, cheapest, largest_batch(cheapest.latency_s, rest.slack_s, rest.count))


def _most_accurate(entries: Sequence[Entry], batch_size: int, limit_s: float) -> Entry:
    """The most accurate that does such a batch within the limit; the first of them always does."""
    return next((entry for entry in reversed(entries) if entry.latency_s[batch_size] <= limit_s), entries[0])


# -------------------------------------------------------------------------------------------------------------- our own


class HalfSLO:
    """The most accurate subnet that clears the whole queue within half of an SLO, and early drop.

    With batches of length T back to back, a query waits up to T and is then served in T, so that T may be half of the
    SLO; batches are the more efficient the longer they are. With N workers the wait is T/N, and the share N/(N+1).
    """

    def __init__(self, table: ProfileTable, workers: int = 1) -> None:
        self.name = "halfslo"
        self._arrivals = Arrivals()
        self.resize(workers)
        self.adopt(table)

    def adopt(self, table: ProfileTable) -> bool:
        """Arrivals stay in memory."""
        self._table = table
        return True

    def resize(self, workers: int) -> None:
        """With fewer workers, queries wait longer for one."""
        self._workers, self._share = workers, _share_of_slo(workers)

    def arrived(self, now_s: float, slo_s: float) -> None:
        """Remember the SLO: the shortest recent one caps the length of a batch."""
        self._arrivals.add(now_s, slo_s)

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """Clear the queue as accurately as the cap allows, else run as much as fits with the cheapest entry."""
        entries, traffic = self._table.entries[lowest:], self._arrivals.traffic(now_s)
        cheapest = entries[0]
        rest = drop_early(now_s, queue, cheapest.latency_s, traffic, self._workers)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        batch_size = largest_batch(cheapest.latency_s, rest.slack_s, rest.count)
        if batch_size < min(rest.count, self._table.max_batch):
            return Decision(rest.given_up, cheapest, batch_size)
        limit_s = min(rest.slack_s, self._share * traffic.shortest_slo_s)
        return Decision(rest.given_up, _most_accurate(entries, batch_size, limit_s), batch_size)


def _share_of_slo(workers: int) -> float:
    return min(0.85, workers / (workers + 1))


PLANNED_BATCHES = 16  # a queue that needs more is in overload
EXPECTED = 1.05  # the ceiling allows for so many times the recent arrivals
HEDGE = 4.0  # how much more than the queries that it displaces the next overload costs
OVERLOADS_KEPT_S = 4.0


class PaceFit:
    """Our own: HalfSLO with a ceiling by arrival rate, a plan for the whole queue and a hedge against bursts.

    1. Ceiling: no entry slower than those that would serve the recent arrivals in batches of half an SLO, back to back.
       What is spent above that is paid for by the next batch.
    2. Hull: at each batch size only entries on the concave hull of accuracy over latency. Two of its neighbours in turn
       are more accurate than any entry below it, in the same time.
    3. Plan: an entry is accepted if batches of it clear the whole queue, with room for those who arrive meanwhile.
    4. Hedge: of the accepted entries the most accurate is taken; for some time after an overload, long batches are
       charged with what they would cost if the next one began meanwhile.

    If none is accepted, the cheapest entry runs as much as fits. Early drop comes before all this.
    """

    name = "pacefit"

    def __init__(self, table: ProfileTable, workers: int = 1) -> None:
        self._arrivals = Arrivals()
        self._overloads = _Overloads()
        self.resize(workers)
        self.adopt(table)

    def adopt(self, table: ProfileTable) -> bool:
        """Arrivals and overloads stay in memory; hulls are tabled anew."""
        self._table = table
        self._hulls = {0: _hulls(table.entries)}
        return True

    def resize(self, workers: int) -> None:
        """With fewer workers, queries wait longer for one."""
        self._workers, self._planned, self._share = workers, PLANNED_BATCHES, _share_of_slo(workers)

    def arrived(self, now_s: float, slo_s: float) -> None:
        """Remember when, for the rate, and the SLO."""
        self._arrivals.add(now_s, slo_s)

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """Early drop, then the best entry for what is left; the first at an accuracy floor also tables its hulls."""
        cheapest, traffic = self._table.entries[lowest], self._arrivals.traffic(now_s)
        hulls = self._hulls.get(lowest)
        if hulls is None:
            hulls = self._hulls[lowest] = _hulls(self._table.entries[lowest:])
        rest = drop_early(now_s, queue, cheapest.latency_s, traffic, self._workers)
        if rest.given_up:
            self._overloads.add(now_s, traffic.shortest_slo_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        hull = hulls[rest.count if rest.count < len(hulls) else -1]
        best = None
        if rest.count <= self._planned * (len(hulls) - 1):  # else no plan clears the queue
            plan = _Plan(
                now_s, queue, rest, self._share * traffic.shortest_slo_s, self._workers, self._planned, traffic,
                self._reserve(traffic, cheapest),
            )  # fmt: skip
            best = self._best(plan, hull, self._ceiling(traffic, hulls))
        entry, batch_size = best or _last_resort(rest, hull.entries[0], cheapest)
        return Decision(rest.given_up, entry, batch_size)

    def _best(self, plan: _Plan, hull: _Hull, ceiling: float) -> tuple[Entry, int] | None:
        """Of the entries on the hull and no more accurate than the ceiling that clear the queue, the one worth most."""
        rest, best, most = plan.rest, None, -inf
        charge = self._charge(plan.now_s, plan.traffic, hull.entries[0])
        for index in range(bisect_right(hull.accuracies, ceiling) - 1, -1, -1):
            entry = hull.entries[index]
            limit_s = min(rest.slack_s, plan.cap_s) if index else rest.slack_s
            batch_size = largest_batch(entry.latency_s, limit_s, rest.count)
            if not batch_size:
                continue
            busy_s = plan.busy_s(entry.latency_s, batch_size)
            worth = rest.count * entry.accuracy - charge * busy_s**2 if busy_s < inf else -inf
            if worth > most:
                best, most = (entry, batch_size), worth
                if not charge:
                    break
        return best

    def _ceiling(self, traffic: Traffic, hulls: Sequence[_Hull]) -> float:
        """Accuracy of the first entry on the hull too slow for recent arrivals: it and the one below make the mean."""
        half_s = traffic.shortest_slo_s / 2
        arriving = EXPECTED * traffic.rate * half_s / self._workers if traffic.rate else 0.0
        batch_size = min(max(1, round(arriving)), len(hulls) - 1)
        hull = hulls[batch_size]
        return hull.accuracies[min(bisect_right(hull.latencies_s, half_s), len(hull.entries) - 1)]

    def _reserve(self, traffic: Traffic, cheapest: Entry) -> float:
        """The share of a plan's time to be kept free for those who arrive meanwhile: about the load, 1 being all."""
        each_s = cheapest.latency_s[-1] / self._table.max_batch / self._workers
        return min(2.0, traffic.highest_rate * each_s)

    def _charge(self, now_s: float, traffic: Traffic, cheapest: Entry) -> float:
        """What a second of delay, squared, costs: it meets the start of an overload and holds up its queries."""
        overloads = self._overloads.rate(now_s)
        if not overloads:
            return 0.0
        fits = largest_batch(cheapest.latency_s, traffic.shortest_slo_s, self._table.max_batch)
        return HEDGE / 2 * overloads * cheapest.accuracy * fits / cheapest.latency_s[fits] if fits else 0.0


class ClearFit(PaceFit):
    """PaceFit that plans one batch on each worker and no more: what that does not clear is a burst, for the cheapest.

    Planning a sequence of accurate batches trusts that each takes as long as the table says. With one worker that gains
    nothing even in simulation, and on a real device a batch that takes longer delays all those behind it.
    """

    name = "clearfit"

    def resize(self, workers: int) -> None:
        """With fewer workers, fewer batches are planned."""
        super().resize(workers)
        self._planned = workers


def _last_resort(rest: Rest, *cheapest: Entry) -> tuple[Entry, int]:
    """As much as fits. Where rows cross, the fastest at the queue's size may be too slow for even one query."""
    for entry in cheapest:
        batch_size = largest_batch(entry.latency_s, rest.slack_s, rest.count)
        if batch_size:
            break
    return entry, batch_size


class _Plan(NamedTuple):
    """What PaceFit knows when it decides, and whether batches of one entry would do."""

    now_s: float
    queue: QueueView
    rest: Rest
    cap_s: float  # on the length of a batch
    workers: int
    most_batches: int
    traffic: Traffic
    reserve: float

    def busy_s(self, latency_s: Sequence[float], batch_size: int) -> float:
        """How long batches at these latencies, the first of this size, take to clear the queue; infinite if late."""
        if batch_size >= self.rest.count:
            return latency_s[batch_size]
        given_up, count = self.rest.given_up, self.rest.count
        if count > batch_size + (self.most_batches - 1) * (len(latency_s) - 1):
            return inf
        deadlines_s, stretch = self.queue.deadlines_s, self.queue.stretch
        busy_s, planned = latency_s[batch_size] / self.workers, batch_size
        overtakers = self.traffic.rate * busy_s / batch_size  # time that they take, by time to arrive
        for _ in range(self.most_batches):
            if planned == count:
                return busy_s
            slack_s = (deadlines_s[given_up + planned] - self.now_s) / stretch
            batch_size = largest_batch(latency_s, self.cap_s, count - planned)
            done_s = busy_s + latency_s[batch_size]
            # Who overtakes takes long to find out, and can only make it later.
            if not batch_size or done_s * (1 + self.reserve) > slack_s:
                return inf
            done_s += overtakers * self.traffic.overtaking_s(slack_s)
            if done_s * (1 + self.reserve) > slack_s:
                return inf
            busy_s += latency_s[batch_size] / self.workers
            planned += batch_size
        return inf


class _Overloads:
    """When overloads began of late: times at which queries were given up, after an SLO without."""

    def __init__(self) -> None:
        self._began_s: deque[float] = deque()
        self._last_s = -inf

    def add(self, now_s: float, slo_s: float) -> None:
        if now_s - self._last_s > slo_s:
            self._began_s.append(now_s)
        self._last_s = now_s

    def rate(self, now_s: float) -> float:
        while self._began_s and self._began_s[0] < now_s - OVERLOADS_KEPT_S:
            self._began_s.popleft()
        return len(self._began_s) / OVERLOADS_KEPT_S


class _Hull(NamedTuple):
    """Entries on the upper concave hull of accuracy over latency at one batch size; all ascending."""

    entries: tuple[Entry, ...]
    accuracies: tuple[float, ...]
    latencies_s: tuple[float, ...]


def _hulls(entries: Sequence[Entry]) -> tuple[_Hull, ...]:
    """By batch size; at 0 as at 1."""
    return tuple(_hull(entries, max(1, size)) for size in range(len(entries[0].latency_s)))


def _hull(entries: Sequence[Entry], size: int) -> _Hull:
    def below(middle: Entry, left: Entry, right: Entry) -> bool:
        start_s, step_s, whole_s = (entry.latency_s[size] for entry in (left, middle, right))
        gained, most = middle.accuracy - left.accuracy, right.accuracy - left.accuracy
        return gained * (whole_s - start_s) <= most * (step_s - start_s)

    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.latency_s[size], -entry.accuracy)):
        if kept and entry.accuracy <= kept[-1].accuracy:
            continue
        while len(kept) > 1 and below(kept[-1], kept[-2], entry):
            kept.pop()
        kept.append(entry)
    return _Hull(tuple(kept), tuple(entry.accuracy for entry in kept), tuple(entry.latency_s[size] for entry in kept))


# ---------------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a policy is described, and made for so many workers."""

    text: str
    make: Callable[[ProfileTable, int], Policy]


_KINDS: Mapping[str, _Kind] = {
    "clearfit": _Kind("pacefit that plans one batch on each worker and no more", ClearFit),
    "pacefit": _Kind("accuracy by arrival rate and a plan for the whole queue, with early drop", PaceFit),
    "halfslo": _Kind("the most accurate subnet that clears the queue within half of an SLO, with early drop", HalfSLO),
    "slackfit": _Kind(
        f"the paper's SlackFit, with {DEFAULT_BUCKETS} latency buckets", lambda table, _: SlackFit(table)
    ),
    "maxaccuracy": _Kind(
        "the most accurate subnet in time, then the largest batch", lambda table, _: MaxAccuracy(table)
    ),
    "maxbatch": _Kind("the largest batch in time, then the most accurate subnet", lambda table, _: MaxBatch(table)),
    "cheapest": _Kind("the least accurate subnet that is allowed", lambda table, _: CheapestFirst(table)),
}
POLICIES: Mapping[str, str] = {name: kind.text for name, kind in _KINDS.items()} | {
    "slackfit:K": "the paper's SlackFit, with K latency buckets",
    "fixed:SUBNET": "one subnet for everything, by name, or 'largest' or 'smallest'",
}


def make_policy(spec: str, table: ProfileTable, workers: int = 1) -> Policy:
    """The policy of a name in POLICIES; raises PolicyError, listing them, for any other."""
    name, colon, argument = spec.partition(":")
    if spec in _KINDS:
        return _KINDS[spec].make(table, workers)
    if name == "slackfit" and re.fullmatch("[1-9][0-9]{0,5}", argument):
        return SlackFit(table, int(argument))
    if name == "fixed" and colon:
        return FixedSubnet(table, _fixed_entry(argument, table))
    raise PolicyError(f"no policy '{spec}': there are {', '.join(POLICIES)}")


def _fixed_entry(name: str, table: ProfileTable) -> Entry:
    if name in ("largest", "smallest"):
        # Of one model: ensembles stand in where there is nothing else.
        entries = [entry for entry in table.entries if entry.choice.ensemble is None] or table.entries
        return entries[-1] if name == "largest" else entries[0]
    try:
        return table.by_name(name)
    except ProfileError as error:
        raise PolicyError(f"fixed:{name}: {error}, or largest, smallest") from error
