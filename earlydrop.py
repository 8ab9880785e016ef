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
from typing import NamedTuple

# ------------------------------------------------------------------------------------------------------- what is known


@dataclass(slots=True)  # not frozen: made by each decision, and frozen ones take three times as long to make
class QueueView:
    """What a policy may see of the waiting queries: all deadlines, ascending, to read while it decides.

    Batches take ``stretch`` times as long as the table says. What a policy compares with the table's latencies is
    therefore slack divided by that: it says the same as longer latencies would, and there is less of it to compute.
    """

    deadlines_s: Sequence[float]
    stretch: float = 1.0


@dataclass(slots=True)  # not frozen, for the same reason
class Rest:
    """What is left of the queue once some of its most urgent queries are given up."""

    given_up: int
    count: int
    slack_s: float  # of the most urgent that is left, by the table's time; 0 if none is


def largest_batch(latency_s: Sequence[float], slack_s: float, count: int) -> int:
    """The most queries, up to count, that are done within the slack; 0 if not even one is."""
    return bisect_right(latency_s, slack_s, 1, min(count, len(latency_s) - 1) + 1) - 1


def drop_hopeless(now_s: float, queue: QueueView, latency_s: Sequence[float]) -> Rest:
    """Give up the queries that would be late even if run at once and alone, at this latency by batch size."""
    slack_s = (queue.deadlines_s[0] - now_s) / queue.stretch
    if slack_s >= latency_s[1]:
        return Rest(0, len(queue.deadlines_s), slack_s)
    return _rest(now_s, queue, _hopeless(now_s, queue, latency_s[1]))


class Traffic(NamedTuple):
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
        most = bisect_right(latency_s, self.shortest_slo_s, 1) - 1
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
        slos_s, rate, just_now = self._slos_s, self._lately.rate(now_s), self._just_now.rate(now_s)
        if not slos_s:
            return Traffic(rate, just_now, inf, inf, slos_s)
        return Traffic(rate, just_now if just_now > rate else rate, min(slos_s), sum(slos_s) / len(slos_s), slos_s)


class _Window:
    """Instants of the last ``length_s``, or of the time since the first but not much less than that."""

    def __init__(self, length_s: float) -> None:
        self._length_s, self._least_s = length_s, length_s / 8
        self._instants_s: deque[float] = deque()
        self._first_s = inf

    def add(self, now_s: float) -> None:
        if now_s < self._first_s:
            self._first_s = now_s
        self._instants_s.append(now_s)
        if self._instants_s[0] < now_s - self._length_s:  # here too, so that decisions find little to forget
            self._forget_before(now_s - self._length_s)

    def rate(self, now_s: float) -> float:
        if self._instants_s and self._instants_s[0] < now_s - self._length_s:
            self._forget_before(now_s - self._length_s)
        lasted_s = now_s - self._first_s
        if lasted_s >= self._length_s:
            return len(self._instants_s) / self._length_s
        return len(self._instants_s) / max(self._least_s, lasted_s)

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
    slack_s, count = (queue.deadlines_s[0] - now_s) / queue.stretch, len(queue.deadlines_s)
    if count < len(latency_s) and latency_s[count] <= slack_s:
        return Rest(0, count, slack_s)
    first = best = 0 if slack_s >= latency_s[1] else _hopeless(now_s, queue, latency_s[1])
    ahead = _Ahead(now_s, queue, latency_s, traffic, workers)
    fewest, soonest_s = ahead.losses(first, count)
    # From the largest on: its simulation is the shortest, and what it finds cuts the others short.
    simulated, batches = first, ahead.batches
    for size in _sizes_to_wait_for(len(latency_s) - 1) if fewest else ():
        if ahead.batches > ALL_BATCHES:
            break
        start = ahead.first_with_slack(first, size)
        if start - first >= fewest:
            continue
        if start == simulated:  # would find the same, and is counted as if it had
            ahead.batches += batches
            continue
        simulated, batches = start, ahead.batches
        lost, cleared_s = ahead.losses(start, fewest - (start - first))
        batches = ahead.batches - batches
        if (start - first + lost, cleared_s) < (fewest, soonest_s):
            best, fewest, soonest_s = start, start - first + lost, cleared_s
    return _rest(now_s, queue, best)


class _Ahead:
    """What the largest batches that fit would make of the queue, and of the arrivals expected within an SLO."""

    def __init__(
        self, now_s: float, queue: QueueView, latency_s: Sequence[float], traffic: Traffic, workers: int
    ) -> None:
        self._now_s, self._deadlines_s, self._stretch = now_s, queue.deadlines_s, queue.stretch
        self._latency_s, self._workers = latency_s, workers
        self._slo_s, self._rate = traffic.mean_slo_s, traffic.bearable_rate(latency_s, workers)
        self._together = (workers + 1) // 2  # so many batches are simulated as one: looking ahead costs no more then
        self._share = self._together / workers
        self.batches = 0  # simulated so far

    def first_with_slack(self, first: int, size: int) -> int:
        """The first query with slack for a batch of this size, or of itself and all behind it."""
        deadlines_s = self._deadlines_s
        head = bisect_left(deadlines_s, self._now_s + self._latency_s[size] * self._stretch, first)
        return head if len(deadlines_s) - head >= size else self._first_with_slack_for_all(first, head, size)

    def _first_with_slack_for_all(self, first: int, enough: int, size: int) -> int:
        """The same where fewer than the size are left behind the first with ``enough`` slack for it."""
        latency_s, deadlines_s, now_s, stretch = self._latency_s, self._deadlines_s, self._now_s, self._stretch
        count = len(deadlines_s)

        def has_slack(head: int) -> bool:
            return (deadlines_s[head] - now_s) / stretch >= latency_s[min(count - head, size)]

        # Further down the queue slack grows and the batch of the others shrinks, so that the place can be bisected.
        return bisect_left(range(enough), True, max(first, count - size), key=has_slack)

    def losses(self, first: int, most_lost: int) -> tuple[int, float]:
        """How many are lost if those before ``first`` are given up, and when the others are done; stops at too many.

        What is beyond the batches that are simulated is taken to be lost in the same proportion.
        """
        start_s = now_s = self._now_s
        start, lost, batches, stretch, rate = first, 0, QUEUE_BATCHES, self._stretch, self._rate / self._stretch
        deadlines_s, latency_s, together = self._deadlines_s, self._latency_s, self._together
        count, most, share = len(deadlines_s), len(latency_s) - 1, self._share * stretch
        shortest_s, longest_s = latency_s[1] * stretch, latency_s[-1] * stretch
        second_s = latency_s[min(2, most)] * stretch
        single_s, whole_s, whole = latency_s[1] * share, latency_s[-1] * share, most * together
        # For speed without helpers: these loops are most of the time that a decision takes in overload. While the queue
        # fills the largest batches, what arrives meanwhile does not matter. Most batches are of one query (after a
        # loss) or the largest (after those given up): neither has to be searched for.
        filled = count - whole
        while batches and first <= filled:
            left_s = deadlines_s[first] - now_s
            if left_s < shortest_s:
                alive = bisect_left(deadlines_s, now_s + shortest_s, first + 1)
                lost += alive - first
                first = alive
                if lost > most_lost:
                    break
                continue
            if left_s < second_s:
                now_s += single_s
                first += together
            elif left_s >= longest_s:
                now_s += whole_s
                first += whole
            else:
                batch_size = bisect_right(latency_s, left_s / stretch, 2) - 1
                now_s += latency_s[batch_size] * share
                first += batch_size * together
            batches -= 1
        while first < count and batches and lost <= most_lost:
            left_s = deadlines_s[first] - now_s
            if left_s < shortest_s:
                alive = bisect_left(deadlines_s, now_s + shortest_s, first + 1)
                lost += alive - first
                first = alive
                continue
            there = count - first + int(rate * (now_s - start_s))
            batch_size = bisect_right(latency_s, left_s / stretch, 2, there + 1 if there < most else most + 1) - 1
            if batch_size * together <= there:
                now_s += latency_s[batch_size] * share
                first += batch_size * together
            else:
                now_s += latency_s[batch_size] * ceil(there / batch_size) / self._workers * stretch
                first += there
            batches -= 1
        self.batches += QUEUE_BATCHES - batches
        if first < count:
            lost += round((count - first) * lost / (first - start))
        if not rate or lost > most_lost:
            return lost, now_s
        more, after_s = self._losses_of_expected((now_s - start_s) / stretch, first - count if first > count else 0)
        return lost + more, now_s + after_s * stretch

    def _losses_of_expected(self, busy_s: float, taken: int) -> tuple[int, float]:
        """The same for the arrivals after that, until the device keeps up."""
        latency_s, rate, slo_s, start_s = self._latency_s, self._rate, self._slo_s, busy_s
        lost, batches, expected = 0, EXPECTED_BATCHES, int(rate * slo_s)
        most, shortest_s, enough_s = len(latency_s) - 1, latency_s[1], 0.6 * slo_s
        together, share = self._together, self._share
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
            batch_size = bisect_right(latency_s, slack_s, 2, there + 1 if there < most else most + 1) - 1
            at_once = batch_size * together
            if at_once <= there:
                busy_s += latency_s[batch_size] * share
                taken += at_once
            else:
                busy_s += latency_s[batch_size] * ceil(there / batch_size) / self._workers
                taken += there
            batches -= 1
        self.batches += EXPECTED_BATCHES - batches
        return lost, busy_s - start_s


@lru_cache
def _sizes_to_wait_for(most: int) -> tuple[int, ...]:
    """Batch sizes that may be worth giving queries up for: sixteen up to the largest, evenly spaced, descending."""
    return tuple(sorted({max(1, most * part // 16) for part in range(1, 17)}, reverse=True))


def _rest(now_s: float, queue: QueueView, given_up: int) -> Rest:
    count = len(queue.deadlines_s) - given_up
    return Rest(given_up, count, (queue.deadlines_s[given_up] - now_s) / queue.stretch if count else 0.0)


def _hopeless(now_s: float, queue: QueueView, shortest_s: float) -> int:
    """How many have less slack than that."""
    deadlines_s, stretch = queue.deadlines_s, queue.stretch
    first, count = bisect_left(deadlines_s, now_s + shortest_s * stretch), len(deadlines_s)
    # What counts is slack, as largest_batch compares it; the rounding of the sum may differ by those at the edge.
    has_all = not first or (deadlines_s[first - 1] - now_s) / stretch < shortest_s
    if has_all and (first == count or (deadlines_s[first] - now_s) / stretch >= shortest_s):
        return first
    return bisect_left(deadlines_s, shortest_s, key=lambda deadline_s: (deadline_s - now_s) / stretch)
