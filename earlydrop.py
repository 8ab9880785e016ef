"""Which waiting queries cannot be saved: early drop, and what it needs to know of the queue and of recent arrivals.

Part of deciding (slackfit.py), with its rules: no clock, no I/O, neither torch nor HTTP.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf
from typing import Protocol

# ------------------------------------------------------------------------------------------------------- what is known


class QueueView(Protocol):
    """What a policy may see of the waiting queries."""

    def __len__(self) -> int:
        """How many wait."""
        ...

    @property
    def head_deadline_s(self) -> float:
        """The most urgent deadline."""
        ...

    def deadlines_s(self) -> Sequence[float]:
        """All deadlines, ascending. Costs time in proportion to the queue: asked for only in overload."""
        ...


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of the queue once some of its most urgent queries are given up."""

    given_up: int
    count: int
    slack_s: float  # of the most urgent that is left; 0 if none is


def largest_batch(latency_s: Sequence[float], slack_s: float, count: int) -> int:
    """The most queries, up to count, that are done within the slack; 0 if not even one is."""
    return bisect_right(latency_s, slack_s, 1, min(count, len(latency_s) - 1) + 1) - 1


def drop_hopeless(now_s: float, queue: QueueView, latency_s: Sequence[float]) -> Rest:
    """Give up the queries that would be late even if run at once and alone, at this latency by batch size."""
    slack_s = queue.head_deadline_s - now_s
    if slack_s >= latency_s[1]:
        return Rest(0, len(queue), slack_s)
    deadlines_s = queue.deadlines_s()
    return _rest(now_s, deadlines_s, _hopeless(now_s, deadlines_s, latency_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Arrivals of late: queries a second, and the SLOs of the last 64; infinite SLOs before the first."""

    rate: float  # over 400 ms
    highest_rate: float  # over 100 ms, if that is more
    shortest_slo_s: float
    mean_slo_s: float
    slos_s: Collection[float]

    def overtaking_s(self, slack_s: float) -> float:
        """For how long, on average over the SLOs, new arrivals are put before a query with this slack."""
        if slack_s <= self.shortest_slo_s:
            return 0.0
        return sum([slack_s - slo_s for slo_s in self.slos_s if slo_s < slack_s]) / len(self.slos_s)

    def bearable_rate(self, latency_s: Sequence[float], workers: int) -> float:
        """The rate, or a little more than all workers bear at most: what is beyond that is lost in any case."""
        most = largest_batch(latency_s, self.shortest_slo_s, len(latency_s) - 1)
        return min(self.rate, 1.1 * workers * most / latency_s[most]) if most else 0.0


class Arrivals:
    """What a policy remembers of arrivals: how many of late, and their SLOs."""

    def __init__(self) -> None:
        self._lately, self._just_now = _Window(0.4), _Window(0.1)
        self._slos_s: deque[float] = deque(maxlen=64)

    def add(self, now_s: float, slo_s: float) -> None:
        """One more."""
        self._lately.add(now_s)
        self._just_now.add(now_s)
        self._slos_s.append(slo_s)

    def traffic(self, now_s: float) -> Traffic:
        """What they amount to now."""
        slos_s, rate = self._slos_s, self._lately.rate(now_s)
        return Traffic(
            rate=rate,
            highest_rate=max(rate, self._just_now.rate(now_s)),
            shortest_slo_s=min(slos_s, default=inf),
            mean_slo_s=sum(slos_s) / len(slos_s) if slos_s else inf,
            slos_s=slos_s,
        )


class _Window:
    """Instants of the last ``length_s``, or of the time since the first but not much less than that."""

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._instants_s: deque[float] = deque()
        self._first_s = inf

    def add(self, now_s: float) -> None:
        if now_s < self._first_s:
            self._first_s = now_s
        self._instants_s.append(now_s)
        if self._instants_s[0] < now_s - self._length_s:  # here too, so that decisions find little to forget
            self._forget_before(now_s - self._length_s)

    def rate(self, now_s: float) -> float:
        self._forget_before(now_s - self._length_s)
        return len(self._instants_s) / max(self._length_s / 8, min(self._length_s, now_s - self._first_s))

    def _forget_before(self, oldest_s: float) -> None:
        instants_s = self._instants_s
        while instants_s and instants_s[0] < oldest_s:
            instants_s.popleft()


# ----------------------------------------------------------------------------------------------------------- early drop

# How far a simulation looks into the queue, into the arrivals expected after it, and all simulations of a decision.
QUEUE_BATCHES, EXPECTED_BATCHES, ALL_BATCHES = 10, 6, 20


def drop_early(now_s: float, queue: QueueView, latency_s: Sequence[float], traffic: Traffic, workers: int) -> Rest:
    """Give up at once the queries that cannot all be saved, rather than one by one at their deadlines.

    Without this, a queue that is a little too long is served in ever smaller batches, each just in time for its most
    urgent query and none of them efficient. Nothing is given up while a single batch clears the queue. Else a sequence
    of the largest batches that fit is simulated, with the cheapest latencies, over the queue and what arrives in the
    next SLO if traffic stays as it is. If some queries are lost, so are sequences that first give up queries, until the
    next has slack for a batch of a certain size; the one that loses the fewest is taken.
    """
    slack_s, count = queue.head_deadline_s - now_s, len(queue)
    if largest_batch(latency_s, slack_s, count) == count:
        return Rest(0, count, slack_s)
    deadlines_s = queue.deadlines_s()
    first = best = _hopeless(now_s, deadlines_s, latency_s)
    ahead = _Ahead(now_s, deadlines_s, latency_s, traffic, workers)
    fewest, soonest_s = ahead.losses(first, count)
    # From the largest on: its simulation is the shortest, and what it finds cuts the others short.
    for size in _sizes_to_wait_for(len(latency_s) - 1) if fewest else ():
        if ahead.batches > ALL_BATCHES:
            break
        start = ahead.first_with_slack(first, size)
        if start - first >= fewest:
            continue
        lost, cleared_s = ahead.losses(start, fewest - (start - first))
        if (start - first + lost, cleared_s) < (fewest, soonest_s):
            best, fewest, soonest_s = start, start - first + lost, cleared_s
    return _rest(now_s, deadlines_s, best)


class _Ahead:
    """What the largest batches that fit would make of the queue, and of the arrivals expected within an SLO."""

    def __init__(
        self, now_s: float, deadlines_s: Sequence[float], latency_s: Sequence[float], traffic: Traffic, workers: int
    ) -> None:
        self._now_s, self._deadlines_s, self._latency_s, self._workers = now_s, deadlines_s, latency_s, workers
        self._slo_s, self._rate = traffic.mean_slo_s, traffic.bearable_rate(latency_s, workers)
        self._together = (workers + 1) // 2  # so many batches are simulated as one: looking ahead costs no more then
        self.batches = 0  # simulated so far

    def first_with_slack(self, first: int, size: int) -> int:
        """The first query with slack for a batch of this size, or of itself and all behind it."""
        latency_s, deadlines_s, now_s, count = self._latency_s, self._deadlines_s, self._now_s, len(self._deadlines_s)
        head = bisect_left(deadlines_s, now_s + latency_s[size], first)
        if count - head >= size:
            return head

        def has_slack(head: int) -> bool:
            return deadlines_s[head] - now_s >= latency_s[min(count - head, size)]

        # Further down the queue slack grows and the batch of the others shrinks, so that the place can be bisected.
        return bisect_left(range(head), True, max(first, count - size), key=has_slack)

    def losses(self, first: int, most_lost: int) -> tuple[int, float]:
        """How many are lost if those before ``first`` are given up, and when the others are done; stops at too many.

        What is beyond the batches that are simulated is taken to be lost in the same proportion.
        """
        now_s, start, lost, batches, rate = self._now_s, first, 0, QUEUE_BATCHES, self._rate
        deadlines_s, latency_s, shortest_s = self._deadlines_s, self._latency_s, self._latency_s[1]
        count, most, workers, together = len(deadlines_s), len(latency_s) - 1, self._workers, self._together
        # For speed without helpers: these two loops are most of the time that a decision takes in overload.
        while first < count and batches and lost <= most_lost:
            slack_s = deadlines_s[first] - now_s
            if slack_s < shortest_s:
                alive = bisect_left(deadlines_s, now_s + shortest_s, first + 1)
                lost += alive - first
                first = alive
                continue
            there = count - first + int(rate * (now_s - self._now_s))
            batch_size = bisect_right(latency_s, slack_s, 2, (there if there < most else most) + 1) - 1
            batches_now = together if batch_size * together <= there else ceil(there / batch_size)
            now_s += latency_s[batch_size] * batches_now / workers
            first += batch_size * batches_now if batch_size * batches_now < there else there
            batches -= 1
        self.batches += QUEUE_BATCHES - batches
        if first < count:
            lost += round((count - first) * lost / (first - start))
        if not rate or lost > most_lost:
            return lost, now_s
        more, after_s = self._losses_of_expected(now_s - self._now_s, max(0, first - count))
        return lost + more, now_s + after_s

    def _losses_of_expected(self, busy_s: float, taken: int) -> tuple[int, float]:
        """The same for the arrivals after that, until the device keeps up."""
        latency_s, rate, slo_s, start_s = self._latency_s, self._rate, self._slo_s, busy_s
        lost, batches, expected = 0, EXPECTED_BATCHES, int(rate * slo_s)
        most, shortest_s, enough_s = len(latency_s) - 1, latency_s[1], 0.6 * slo_s
        workers, together = self._workers, self._together
        while taken < expected:
            arrival_s = (taken + 1) / rate
            if arrival_s > busy_s:
                busy_s = arrival_s
            slack_s = arrival_s + slo_s - busy_s
            if slack_s >= enough_s:
                break
            if not batches:
                lost += round((expected - taken) * lost / taken)
                break
            if slack_s < shortest_s:
                alive = min(expected, max(taken + 1, ceil((busy_s + shortest_s - slo_s) * rate - 1)))
                lost += alive - taken
                taken = alive
                continue
            there = int(rate * busy_s) - taken or 1
            batch_size = bisect_right(latency_s, slack_s, 2, (there if there < most else most) + 1) - 1
            batches_now = together if batch_size * together <= there else ceil(there / batch_size)
            busy_s += latency_s[batch_size] * batches_now / workers
            taken += batch_size * batches_now if batch_size * batches_now < there else there
            batches -= 1
        self.batches += EXPECTED_BATCHES - batches
        return lost, busy_s - start_s


@lru_cache
def _sizes_to_wait_for(most: int) -> tuple[int, ...]:
    """Batch sizes that may be worth giving queries up for: sixteen up to the largest, evenly spaced, descending."""
    return tuple(sorted({max(1, most * part // 16) for part in range(1, 17)}, reverse=True))


def _rest(now_s: float, deadlines_s: Sequence[float], given_up: int) -> Rest:
    count = len(deadlines_s) - given_up
    return Rest(given_up, count, deadlines_s[given_up] - now_s if count else 0.0)


def _hopeless(now_s: float, deadlines_s: Sequence[float], latency_s: Sequence[float]) -> int:
    # Compares slack, as largest_batch does: the rounding of now + latency could call the same query hopeless or not.
    return bisect_left(deadlines_s, latency_s[1], key=lambda deadline_s: deadline_s - now_s)
