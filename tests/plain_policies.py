"""Early drop and PaceFit written plainly, with no thought of speed: what slackfit.py and earlydrop.py must decide.

Everything is looked at for each decision: all arrivals, all entries, all batches. Only slack is computed as there, so
that both round alike.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from earlydrop import ALL_BATCHES, EXPECTED_BATCHES, QUEUE_BATCHES
from slackfit import EXPECTED, HEDGE, OVERLOADS_KEPT_S, Decision, Entry, ProfileTable


def largest(latency_s: Sequence[float], slack_s: float, count: int) -> int:
    """The most queries up to count that are done within the slack."""
    sizes = range(1, min(count, len(latency_s) - 1) + 1)
    return max((size for size in sizes if latency_s[size] <= slack_s), default=0)


@dataclass
class PlainEarlyDrop:
    """What becomes of a queue and of evenly spaced arrivals, in the largest batches that fit of the cheapest entry."""

    now_s: float
    deadlines_s: Sequence[float]
    latency_s: Sequence[float]
    workers: int
    rate: float
    slo_s: float  # the mean of late
    batches: int = 0

    def given_up(self) -> int:
        """How many of the most urgent to give up."""
        count, most = len(self.deadlines_s), len(self.latency_s) - 1
        if largest(self.latency_s, self.deadlines_s[0] - self.now_s, count) == count:
            return 0
        first = sum(deadline_s - self.now_s < self.latency_s[1] for deadline_s in self.deadlines_s)
        fewest, soonest_s = self._losses(first, count)
        best = first
        for size in sorted({max(1, most * part // 16) for part in range(1, 17)}, reverse=True) if fewest else ():
            start = self._first_with_slack(first, size)
            if self.batches > ALL_BATCHES or start - first >= fewest:
                continue
            lost, cleared_s = self._losses(start, fewest - (start - first))
            if (start - first + lost, cleared_s) < (fewest, soonest_s):
                best, fewest, soonest_s = start, start - first + lost, cleared_s
        return best

    def _first_with_slack(self, first: int, size: int) -> int:
        count = len(self.deadlines_s)
        head = bisect_left(self.deadlines_s, self.now_s + self.latency_s[size], first)
        if count - head >= size:
            return head
        heads = range(max(first, count - size), head)
        fits = (h for h in heads if self.deadlines_s[h] - self.now_s >= self.latency_s[min(count - h, size)])
        return next(fits, head)

    def _spent(self, slack_s: float, there: int) -> tuple[int, float]:
        """Half of the workers, rounded up, run batches at the same time: how many queries, in how much time."""
        size, together = largest(self.latency_s, slack_s, there), (self.workers + 1) // 2
        batches = together if size * together <= there else ceil(there / size)
        return min(size * batches, there), self.latency_s[size] * batches / self.workers

    def _losses(self, first: int, most_lost: int) -> tuple[int, float]:
        now_s, start, lost, batches, count = self.now_s, first, 0, 0, len(self.deadlines_s)
        while first < count and batches < QUEUE_BATCHES and lost <= most_lost:
            slack_s = self.deadlines_s[first] - now_s
            if slack_s < self.latency_s[1]:
                alive = bisect_left(self.deadlines_s, now_s + self.latency_s[1], first + 1)
                first, lost = alive, lost + alive - first
                continue
            taken, spent_s = self._spent(slack_s, count - first + int(self.rate * (now_s - self.now_s)))
            first, now_s, batches = first + taken, now_s + spent_s, batches + 1
        self.batches += batches
        if first < count:
            lost += round((count - first) * lost / (first - start))
        if not self.rate or lost > most_lost:
            return lost, now_s
        more, after_s = self._losses_of_expected(now_s - self.now_s, max(0, first - count))
        return lost + more, now_s + after_s

    def _losses_of_expected(self, busy_s: float, taken: int) -> tuple[int, float]:
        start_s, lost, batches, expected = busy_s, 0, 0, int(self.rate * self.slo_s)
        while taken < expected:
            arrival_s = (taken + 1) / self.rate
            busy_s = max(busy_s, arrival_s)
            slack_s = arrival_s + self.slo_s - busy_s
            if slack_s >= 0.6 * self.slo_s:
                break
            if batches == EXPECTED_BATCHES:
                lost += round((expected - taken) * lost / taken)
                break
            if slack_s < self.latency_s[1]:
                alive = ceil((busy_s + self.latency_s[1] - self.slo_s) * self.rate - 1)
                alive = min(expected, max(taken + 1, alive))
                taken, lost = alive, lost + alive - taken
                continue
            more, spent_s = self._spent(slack_s, int(self.rate * busy_s) - taken or 1)
            taken, busy_s, batches = taken + more, busy_s + spent_s, batches + 1
        self.batches += batches
        return lost, busy_s - start_s


@dataclass
class PlainPaceFit:
    """PaceFit, or ClearFit if as many batches are planned as there are workers."""

    table: ProfileTable
    workers: int
    planned: int
    arrivals: list[tuple[float, float]] = field(default_factory=list)  # instant and SLO
    overloads_s: list[float] = field(default_factory=list)  # when they began
    last_overload_s: float = -inf

    def decide(self, now_s: float, deadlines_s: Sequence[float], lowest: int) -> Decision:
        """Early drop, then the entry that is worth most of those that clear the rest."""
        entries = self.table.entries[lowest:]
        slos_s = [slo_s for _, slo_s in self.arrivals][-64:]
        shortest_s, mean_s = min(slos_s, default=inf), sum(slos_s) / len(slos_s) if slos_s else inf
        rate, rate_now = self._rate(now_s, 0.4), self._rate(now_s, 0.1)
        latency_s = entries[0].latency_s
        most = largest(latency_s, shortest_s, len(latency_s) - 1)
        bearable = min(rate, 1.1 * self.workers * most / latency_s[most]) if most else 0.0
        give_up = PlainEarlyDrop(now_s, deadlines_s, latency_s, self.workers, bearable, mean_s).given_up()
        if give_up:
            if now_s - self.last_overload_s > shortest_s:
                self.overloads_s.append(now_s)
            self.last_overload_s = now_s
        left_s = [deadline_s - now_s for deadline_s in deadlines_s[give_up:]]
        if not left_s:
            return Decision(give_up, None, 0)
        reserve = min(2.0, max(rate, rate_now) * (latency_s[-1] / self.table.max_batch / self.workers))
        hull = self._hull(entries, min(len(left_s), self.table.max_batch))
        charge = self._charge(now_s, shortest_s, hull[0])
        ceiling = self._ceiling(entries, rate, shortest_s)
        cap_s = min(0.85, self.workers / (self.workers + 1)) * shortest_s
        best, worth_most = None, -inf
        for entry in reversed(hull):
            limit_s = left_s[0] if entry is hull[0] else min(left_s[0], cap_s)
            size = largest(entry.latency_s, limit_s, len(left_s))
            if size and entry.accuracy <= ceiling:
                busy_s = self._busy_s(entry, size, left_s, cap_s, rate, reserve, slos_s)
                worth = len(left_s) * entry.accuracy - charge * busy_s**2 if busy_s < inf else -inf
                # Without a charge the most accurate, whatever rounding makes of its worth.
                if worth > worth_most and (charge or best is None):
                    best, worth_most = (entry, size), worth
        for entry in (hull[0], entries[0]):
            best = best or ((entry, size) if (size := largest(entry.latency_s, left_s[0], len(left_s))) else None)
        assert best is not None, "early drop leaves none that is hopeless"
        return Decision(give_up, *best)

    def _rate(self, now_s: float, length_s: float) -> float:
        if not self.arrivals:
            return 0.0
        lasted_s = min(length_s, now_s - self.arrivals[0][0])
        return sum(at_s >= now_s - length_s for at_s, _ in self.arrivals) / max(length_s / 8, lasted_s)

    def _charge(self, now_s: float, shortest_s: float, cheapest: Entry) -> float:
        overloads = sum(began_s >= now_s - OVERLOADS_KEPT_S for began_s in self.overloads_s) / OVERLOADS_KEPT_S
        fits = largest(cheapest.latency_s, shortest_s, self.table.max_batch)
        return HEDGE / 2 * overloads * cheapest.accuracy * fits / cheapest.latency_s[fits] if fits else 0.0

    def _ceiling(self, entries: Sequence[Entry], rate: float, shortest_s: float) -> float:
        arriving = EXPECTED * rate * (shortest_s / 2) / self.workers if rate else 0.0
        size = min(max(1, round(arriving)), self.table.max_batch)
        hull = self._hull(entries, size)
        return next((entry for entry in hull if entry.latency_s[size] > shortest_s / 2), hull[-1]).accuracy

    @staticmethod
    def _hull(entries: Sequence[Entry], size: int) -> list[Entry]:
        """Those that no two others, used in turns, equal in accuracy and mean time."""
        kept: list[Entry] = []
        for entry in sorted(entries, key=lambda entry: (entry.latency_s[size], -entry.accuracy)):
            if kept and entry.accuracy <= kept[-1].accuracy:
                continue
            while len(kept) > 1:
                (low, low_s), (mid, mid_s), (high, high_s) = (
                    (each.accuracy, each.latency_s[size]) for each in (*kept[-2:], entry)
                )
                if (mid - low) * (high_s - low_s) > (high - low) * (mid_s - low_s):
                    break
                kept.pop()
            kept.append(entry)
        return kept

    def _busy_s(
        self, entry: Entry, size: int, left_s: Sequence[float], cap_s: float, rate: float, reserve: float,
        slos_s: Sequence[float],
    ) -> float:  # fmt: skip
        """How long batches of the entry, the first of this size, take for the queue; infinite if some are late."""
        latency_s, planned = entry.latency_s, size
        if size >= len(left_s):
            return latency_s[size]
        busy_s = latency_s[size] / self.workers
        overtakers = rate * busy_s / size
        for _ in range(self.planned):
            if planned == len(left_s):
                return busy_s
            slack_s = left_s[planned]
            size = largest(latency_s, cap_s, len(left_s) - planned)
            overtaken_s = sum(slack_s - slo_s for slo_s in slos_s if slo_s < slack_s) / len(slos_s) if slos_s else 0.0
            if not size or (busy_s + latency_s[size] + overtakers * overtaken_s) * (1 + reserve) > slack_s:
                return inf
            busy_s += latency_s[size] / self.workers
            planned += size
        return inf
