"""What becomes of each query: the dispatcher, which decides, and answers each exactly once.

Synchronous and without I/O; the clock is passed in. superserve.py drives it in real time, scripts/simulate.py the same
code in virtual time.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Protocol

import numpy as np

from profiletable import Corrections
from queries import NOBODY, NOTHING, Answer, Answered, DeadlineHeap, Query
from slackfit import Decision, Entry, Policy, ProfileTable, QueueView
from web.errors import BatchFailed, DeadlineExceeded, NotReady, QueueFull, ServeError, forget_past

if TYPE_CHECKING:
    from engine import Outputs  # deciding needs no torch


@dataclass(slots=True, eq=False, kw_only=True)
class Batch:
    """Queries that run together on one entry of the table; ``ended`` once its worker is free again, or gone."""

    entry: Entry
    queries: tuple[Query, ...]
    started_s: float
    ended: bool = False


class Observer(Protocol):
    """Who wants to know what happens to queries and batches: metrics, the live page. Must be quick, must not raise.

    Of queries that come or are answered together it is told at once; who needs to know each need not implement that.
    """

    def arrived(self, now_s: float) -> None:
        """A query came in; ``ended`` is called exactly once for each, maybe at once."""

    def ended(self, query: Query, outcome: str, now_s: float, answer: Answer | None) -> None:
        """A query reached one of the outcomes that the dispatcher counts; with its answer when in_time or late."""

    def arrived_together(self, now_s: float, count: int) -> None:
        """So many queries came in, each of which found those before it waiting."""
        for _ in range(count):
            self.arrived(now_s)

    def answered(self, answered: Sequence[Answered], outcome: str, now_s: float) -> None:
        """These queries were answered, all in_time or all late."""
        for query, answer in answered:
            self.ended(query, outcome, now_s, answer)

    def batch_finished(self, batch: Batch, taken_s: float, predicted_s: float) -> None:
        """A batch was computed; ``predicted_s`` is what the table in use said, slowdown included."""

    def batch_failed(self, batch: Batch) -> None:
        """A batch could not be computed."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a query is not accepted: what it counts as, and what its client is told."""

    outcome: str
    error: ServeError


@dataclass(frozen=True, slots=True)
class Precedent:
    """A query that was turned away as infeasible just after it arrived, when, and how many were coming before it."""

    query: Query
    refusal: Refusal
    now_s: float
    coming: int

    def covers(self, now_s: float, slo_s: float, min_accuracy: float, choice: str | None, coming: int) -> bool:
        """Whether one that asks for the same, so much later, would be turned away, too."""
        return (
            now_s < self.now_s + ALIKE_S
            and slo_s == self.query.slo_s
            and min_accuracy == self.query.min_accuracy
            and choice == self.query.choice
            and coming >= self.coming
        )


# A query is refused when so many times as many are due by its deadline as can be answered until then. Those that come
# last would be the ones refused, where early drop gives up the most urgent and so gains time for larger batches: it is
# left more to choose from than it can keep, and what is refused would not have been answered in any case.
AHEAD = 2.0
ROUNDING_S = 1e-9  # differences of instants are not exact
# Of the share that is refused, by each arrival: the latest thousand or so count, those of some turns of the event loop.
FOLLOWED = 0.001
# A query is refused without another look when another like it was, so little before: in a flood, looking costs most.
ALIKE_S = 0.002
# The slowdown that is followed; slower than this is a hang, not a device to plan for.
MOST_SLOWDOWN = 20.0
NOTABLE = 1.15  # an entry's own correction is worth a new table from this factor on
CORRECTED_EVERY_S = 1.0


class Dispatcher:
    """Decides what happens to each query, and answers it exactly once. Synchronous; the clock is passed in.

    ``slowdown`` is how much longer batches take than the table says, learnt from those that finish: a hot device or a
    busy neighbour is followed within a few batches. What single entries take longer than others, ``corrections`` learns
    and ``correct_table`` makes a new ``table`` of, from the one that was ``measured``. Without ``correction`` the table
    is believed. ``margin`` is added to every latency, as a fraction of it, for what cannot be foreseen.

    ``counters`` holds arrivals and outcomes: in_time, late, expired (deadline passed while waiting), given_up (the
    policy dropped it early), infeasible and queue_full (rejected on arrival), failed, cancelled. When nothing is
    waiting or running, outcomes sum to arrivals.

    ``max_queue`` bounds the waiting queries, and ``max_queue_bytes`` what their inputs take. ``refused_share`` is the
    part of the latest arrivals that were rejected.
    """

    def __init__(
        self,
        table: ProfileTable,
        policy: Policy,
        clock: Callable[[], float],
        *,
        workers: int,
        max_queue: int,
        max_queue_bytes: float = inf,
        margin: float = 0.0,
        correction: bool = True,
    ) -> None:
        self.policy, self.clock = policy, clock
        self.measured = table
        self.heap = DeadlineHeap()
        self.counters: Counter[str] = Counter()
        self.observers: list[Observer] = []
        self.idle_workers = workers
        self.overhead_s = 0.0
        self.slowdown = 1.0
        self.refused_share = 0.0
        self._precedent: Precedent | None = None
        self._measured_s = {entry.name: entry.latency_s for entry in table.entries}
        self.corrections = Corrections(self._measured_s)
        self.applied = dict.fromkeys(self._measured_s, 1.0)  # corrections that the table in use includes
        self._corrected_s = -inf
        self.workers = workers
        self._max_queue, self._max_queue_bytes = max_queue, max_queue_bytes
        self._margin = margin
        self._correction = correction
        self._running: set[Batch] = set()
        self._running_s = 0.0  # how long they take together, by the table
        self._use(table)

    def _use(self, table: ProfileTable) -> None:
        self.table = table
        self._accuracies = [entry.accuracy for entry in table.entries]
        self._least_s = [min(each) for each in zip(*(entry.latency_s for entry in table.entries), strict=True)]
        rates = (size / self._least_s[size] for size in range(1, len(self._least_s)))
        self._rates = [0.0, *itertools.accumulate(rates, max)]  # the most queries a second, in batches up to a size
        # Also those that are dominated as they are corrected: a client may ask for one by name.
        self._by_name = {entry.name: entry.stretched(self.applied[entry.name]) for entry in self.measured.entries}
        self._longest_s = max(entry.latency_s[1] for entry in self._by_name.values())

    def submit(self, query: Query) -> None:
        """Accept a query, or raise QueueFull or DeadlineExceeded."""
        now_s = self.clock()
        if not self._has_room(query.deadline_s, query.input.nbytes, now_s):
            refusal = self.refusal(query, now_s, query.input.nbytes)
            if refusal is not None:
                try:
                    raise self._refuse_arrival(query, refusal, now_s)
                finally:
                    del refusal  # its error refers to this frame; they are to be freed without the garbage collector
        self._arrive(now_s)
        self.refused_share -= FOLLOWED * self.refused_share
        self.policy.arrived(now_s, max(0.0, query.slo_s - self.overhead_s) / self._stretch)
        self.heap.push(query)

    def has_room_for(self, count: int, nbytes: int, deadline_s: float) -> bool:
        """Whether so many queries, with inputs of so many bytes in all, are accepted for sure: a glance.

        It is for those that come together and ask for the same, which are then given to ``accept``.
        """
        return self._has_room(deadline_s, nbytes, self.clock(), count - 1)

    def accept(self, queries: Sequence[Query]) -> None:
        """Accept queries that have just been found to have room."""
        now_s, count, slo_s = self.clock(), len(queries), queries[0].slo_s
        self.counters["arrivals"] += count
        for observer in self.observers:
            observer.arrived_together(now_s, count)
        self.refused_share *= (1 - FOLLOWED) ** count
        slack_s = max(0.0, slo_s - self.overhead_s) / self._stretch
        for query in queries:
            self.policy.arrived(now_s, slack_s)
            self.heap.push(query)

    def turn_away(
        self, arrival_s: float, slo_s: float, min_accuracy: float, nbytes: int, *, choice: str | None = None,
        coming: int = 0, delay_s: float = 0.0,
    ) -> None:  # fmt: skip
        """Raise what ``submit`` would raise for such a query, whose input takes so many bytes or more.

        Its input need not be there yet; so many others are coming before it, and getting there takes it so long, if
        that is known. The query is counted if it is refused, and only then. One like it that comes right after it is
        refused with the same error.
        """
        now_s, precedent = self.clock(), self._precedent
        alike = precedent is not None and precedent.covers(now_s, slo_s, min_accuracy, choice, coming)
        if not alike and self._has_room(arrival_s + slo_s, nbytes * (coming + 1), now_s, coming, delay_s):
            return
        query = Query(
            input=NOTHING, arrival_s=arrival_s, slo_s=slo_s, reply=NOBODY, min_accuracy=min_accuracy, choice=choice
        )
        if alike and precedent is not None:
            raise self._refuse_arrival(query, precedent.refusal, now_s).with_traceback(None)
        refusal = self.refusal(query, now_s, nbytes, coming, delay_s)
        if refusal is not None:
            # One that arrived long ago says nothing of others.
            fresh = refusal.outcome == "infeasible" and now_s < arrival_s + ALIKE_S
            if precedent is not None:  # else what is dropped here would wait for the garbage collector
                forget_past(precedent.refusal.error)
            self._precedent = Precedent(query, refusal, now_s, coming) if fresh else None
            try:
                raise self._refuse_arrival(query, refusal, now_s)
            finally:
                del refusal  # as in ``submit``

    def _has_room(self, deadline_s: float, nbytes: int, now_s: float, coming: int = 0, delay_s: float = 0.0) -> bool:
        """Whether a query is accepted for sure: a glance, which does for most; False leaves it to ``refusal``.

        It is when all that wait fit into ``AHEAD`` batches of the largest size, there is slack for one of these after
        all that runs, and for the slowest entry alone.
        """
        slack_s, waiting = (deadline_s - now_s - delay_s - self.overhead_s) / self._stretch, len(self.heap) + coming
        return (
            waiting < self._max_queue
            and waiting + 1 <= (1.0 if delay_s else AHEAD) * (len(self._least_s) - 1)
            and self.heap.nbytes + nbytes <= self._max_queue_bytes
            and slack_s >= self._longest_s
            and self.workers * slack_s >= self._running_s + self._least_s[-1]
            and slack_s >= self._least_s[-1]
        )

    def refusal(
        self, query: Query, now_s: float, nbytes: int = 0, coming: int = 0, delay_s: float = 0.0
    ) -> Refusal | None:
        """Why a query would not be accepted now, if so; counts nothing.

        Refused are those for whom there is no place, those that are late even if run at once and alone, and those with
        too many ahead: more are due by then than ``AHEAD`` times what all workers can answer at their best.
        """
        if self._is_full(nbytes, coming):
            return Refusal("queue_full", self._full(now_s, len(self.heap) + coming))
        latency_s = self._least_for(query).latency_s[1]
        now_s += delay_s
        done_s = now_s + self.overhead_s + self._stretch * latency_s
        if done_s > query.deadline_s:
            why = "the deadline cannot be met"
            return Refusal("infeasible", self._too_late(query, why, predicted_s=done_s - query.arrival_s))
        slack_s, ahead = query.deadline_s - now_s - self.overhead_s, coming + self.heap.due_by(query.deadline_s)
        # What is not in the queue yet costs time to get there, and early drop cannot choose from it.
        allowed = (1.0 if delay_s else AHEAD) * self._most_by(slack_s, now_s) + 1e-6  # but for rounding
        if not ahead or ahead + 1 <= allowed:
            return None
        why = "the deadline cannot be met: too many queries are ahead"
        return Refusal("infeasible", self._too_late(query, why, predicted_s=None))

    def _refuse_arrival(self, query: Query, refusal: Refusal, now_s: float) -> ServeError:
        self._arrive(now_s)
        self.refused_share += FOLLOWED * (1 - self.refused_share)
        self._count(query, refusal.outcome, now_s=now_s)
        if refusal.outcome == "infeasible" and not self.heap and self.idle_workers == self.workers:
            # No answer is on its way that could correct the estimates: a stall long past would refuse all for ever.
            self.overhead_s /= 2
            self.slowdown = max(1.0, self.slowdown / 2)
        return refusal.error

    def _arrive(self, now_s: float) -> None:
        self.counters["arrivals"] += 1
        for observer in self.observers:
            observer.arrived(now_s)

    def _is_full(self, nbytes: int, coming: int) -> bool:
        """Whether there is no place for so many bytes more; an empty queue has a place for one query of any size."""
        count, more_bytes = len(self.heap) + coming, nbytes * (coming + 1)
        return count >= self._max_queue or (count > 0 and self.heap.nbytes + more_bytes > self._max_queue_bytes)

    def _full(self, now_s: float, count: int) -> QueueFull:
        """To be tried again when half of what waits is done, or due."""
        done_s = count / 2 * self._stretch / (max(1, self.workers) * self._rates[-1])
        due_s = self.heap.last_deadline_s - now_s if self.heap else 0.0
        limit = f"{self._max_queue} queries" if count >= self._max_queue else f"{self._max_queue_bytes:.0f} bytes"
        return QueueFull(f"the queue is full ({limit})", retry_after_s=max(1, ceil(min(done_s, due_s))))

    def _most_by(self, slack_s: float, now_s: float) -> float:
        """No more queries than this can be answered within the slack, by all workers together."""
        # What runs is taken to end as the table says, without slowdown and margin: in favour of what is to come.
        # Beyond the slack it takes nothing more from those that wait.
        busy_s = sum(min(max(0.0, self._ends_s(batch) - now_s), slack_s) for batch in self._running)
        most = max(1, bisect_right(self._least_s, slack_s / self._stretch + ROUNDING_S, 1) - 1)
        return float((self.workers * slack_s - busy_s) / self._stretch * self._rates[most])

    @staticmethod
    def _ends_s(batch: Batch) -> float:
        return batch.started_s + batch.entry.latency_s[len(batch.queries)]

    def correct_table(self) -> bool:
        """Make a new table in use if what was learnt of single entries differs notably from it; whether there is one.

        Looks once a second at most. Queries and batches stay as they are, and the policy keeps what it remembers. One
        that cannot change its table keeps that as well, and ``slowdown`` follows what its batches take.
        """
        now_s = self.clock()
        if now_s < self._corrected_s + CORRECTED_EVERY_S:
            return False
        self._corrected_s = now_s
        learnt = self.corrections.factors(now_s)
        if all(1 / NOTABLE <= factor / self.applied[name] <= NOTABLE for name, factor in learnt.items()):
            return False
        # Small corrections are left to the slowdown, so that each that is applied is also taken back some time.
        applied = {name: factor if factor > NOTABLE else 1.0 for name, factor in learnt.items()}
        table = self.measured.stretched(applied)
        if not self.policy.adopt(table):
            return False
        self.applied = applied
        self._use(table)
        return True

    def cancel(self, query: Query) -> None:
        """The client of a query went away: free its place. A query refused at that very moment is counted as such."""
        self.heap.discard(query)
        if not query.refused:
            self._count(query, "cancelled")

    def expire(self) -> None:
        """Answer all waiting queries whose deadline has passed."""
        now_s = self.clock()
        while self.heap and self.heap.head_deadline_s <= now_s:
            self._give_up("expired", "the deadline passed while the query was waiting")

    def abandon(self, why: str = "stopping") -> None:
        """Answer all waiting queries: they cannot be run any more."""
        while self.heap:
            self._refuse(self.heap.pop(), "failed", NotReady(why, retry_after_s=1))

    def next_batch(self) -> Batch | None:
        """What an idle worker is to run now; None when there is no worker or nothing to run."""
        while self.heap and self.idle_workers:
            now_s = self.clock()
            lowest = self._lowest(self.heap.head)
            decision = self._decide(now_s + self.overhead_s, lowest)
            for _ in range(decision.give_up):
                self._give_up("given_up", "the deadline cannot be met: more urgent work is ahead")
                if self.heap and (self._lowest(self.heap.head) != lowest or self.heap.head.choice is not None):
                    break  # decided for another accuracy floor than this one's, or not for this choice
            else:
                if decision.entry is not None:
                    self.idle_workers -= 1
                    queries = self._take(decision.entry, decision.batch_size)
                    batch = Batch(entry=decision.entry, queries=queries, started_s=now_s)
                    self._running.add(batch)
                    self._running_s += decision.entry.latency_s[len(queries)]
                    return batch
                if not decision.give_up:
                    return None
        return None

    def _decide(self, now_s: float, lowest: int) -> Decision:
        """What the policy wants for the most urgent query, or what that one's client does."""
        head = self.heap.head
        if head.choice is None:
            return self.policy.decide(now_s, QueueView(self.heap.deadlines_s, self._stretch), lowest)
        entry, slack_s = self._least_for(head), (head.deadline_s - now_s) / self._stretch
        size = bisect_right(entry.latency_s, slack_s + ROUNDING_S, 1) - 1
        return Decision(0, entry, size) if size else Decision(1, None, 0)

    def settle(self, batch: Batch, outputs: Outputs) -> None:
        """Give each query of a finished batch its row; raises BatchFailed when rows and queries do not match."""
        if len(outputs.probabilities) != len(batch.queries):
            raise BatchFailed(f"{len(outputs.probabilities)} outputs for {len(batch.queries)} inputs")
        usable = [bool(good) for good in np.isfinite(outputs.probabilities).min(axis=1)]
        # Of the whole batch, in the time that one row takes.
        likeliest: list[int] = outputs.probabilities.argmax(axis=1).tolist()
        taken_s = outputs.finished_s - batch.started_s
        predicted_s = self.slowdown * batch.entry.latency_s[len(batch.queries)]
        self._learn(batch, taken_s)
        self._end(batch)
        entry = self.table.without(batch.entry, outputs.failed) if outputs.failed else batch.entry
        for row, best, good, query in zip(outputs.probabilities, likeliest, usable, batch.queries, strict=True):
            if not good:
                self._refuse(query, "failed", BatchFailed("the network's output is not finite for this input"))
            elif not query.reply.done():
                answer = Answer(
                    row, best, entry, len(batch.queries), batch.started_s, outputs.finished_s, entry is not batch.entry
                )
                query.reply.set_result(answer)
        for observer in self.observers:  # last: whatever goes wrong before makes the batch one that failed
            observer.batch_finished(batch, taken_s, predicted_s)

    def fail(self, batch: Batch, message: str, *, worker_gone: bool = False) -> None:
        """Answer all queries of a batch that could not be computed, and were not answered yet.

        Its worker takes another, unless it is gone: then there is one less from now on.
        """
        self._end(batch, worker_gone)
        for query in batch.queries:
            self._refuse(query, "failed", BatchFailed(message))
        for observer in self.observers:
            observer.batch_failed(batch)

    def planned_s(self, batch: Batch) -> float:
        """How long this batch is planned to take, slowdown and margin included."""
        return self._stretch * batch.entry.latency_s[len(batch.queries)]

    def _end(self, batch: Batch, worker_gone: bool = False) -> None:
        """Account for a batch's worker, once: what goes wrong while a batch is settled makes it fail afterwards."""
        if not batch.ended:
            batch.ended = True
            self._running.discard(batch)
            self._running_s = sum(each.entry.latency_s[len(each.queries)] for each in self._running)
            self.workers -= worker_gone
            self.idle_workers += not worker_gone
            if worker_gone and self.workers:
                self.policy.resize(self.workers)

    def deliver(self, query: Query, answer: Answer) -> float:
        """Count an answer that is on its way to the client; returns the instant."""
        return self.deliver_all(((query, answer),))

    def deliver_all(self, answered: Sequence[Answered]) -> float:
        """Count answers that are on their way to their clients, all at this instant, which it returns."""
        now_s = self.clock()
        in_time = [pair for pair in answered if now_s <= pair[0].deadline_s]
        late = [pair for pair in answered if now_s > pair[0].deadline_s] if len(in_time) < len(answered) else []
        for outcome, pairs in (("in_time", in_time), ("late", late)):
            if pairs:
                self.counters[outcome] += len(pairs)
                for observer in self.observers:
                    observer.answered(pairs, outcome, now_s)
        # Follows a rise at once and forgets slowly: an optimistic estimate costs deadlines, a pessimistic one little.
        overhead_s = self.overhead_s
        for _, answer in answered:
            seen_s = now_s - answer.finished_s
            overhead_s += (seen_s - overhead_s) * (0.3 if seen_s > overhead_s else 0.005)
        self.overhead_s = overhead_s
        return now_s

    def _learn(self, batch: Batch, taken_s: float) -> None:
        """Follow the slowdown, up quickly and down slowly; the table's own high percentile is the least it can be.

        Judged by the table in use now, which may have been corrected since the batch was decided.
        """
        if not self._correction:
            return
        name = batch.entry.name
        ratio = taken_s / self._measured_s[name][len(batch.queries)]
        self.corrections.learn(name, ratio, self.clock())
        seen = ratio / self.applied[name]
        followed = self.slowdown + (seen - self.slowdown) * (0.2 if seen > self.slowdown else 0.02)
        self.slowdown = min(max(1.0, followed), MOST_SLOWDOWN)

    @property
    def _stretch(self) -> float:
        """What a latency of the table is multiplied by to plan with it."""
        return self.slowdown * (1 + self._margin)

    def _lowest(self, query: Query) -> int:
        return min(bisect_left(self._accuracies, query.min_accuracy), len(self._accuracies) - 1)

    def _least_for(self, query: Query) -> Entry:
        """The fastest entry that may answer it."""
        return self._by_name[query.choice] if query.choice else self.table.entries[self._lowest(query)]

    def _take(self, entry: Entry, size: int) -> tuple[Query, ...]:
        """The most urgent queries, up to the first for which this entry may not be used."""
        accuracy, choices, count = entry.accuracy, (None, entry.name), 1  # the first is whom it was chosen for
        for query in self.heap.first(size)[1:]:
            if query.min_accuracy > accuracy or query.choice not in choices:
                break
            count += 1
        return tuple(self.heap.pop_first(count))

    def _count(self, query: Query, outcome: str, answer: Answer | None = None, now_s: float | None = None) -> None:
        self.counters[outcome] += 1
        now_s = self.clock() if now_s is None else now_s
        for observer in self.observers:
            observer.ended(query, outcome, now_s, answer)

    def _give_up(self, outcome: str, message: str) -> None:
        query = self.heap.pop()
        self._refuse(query, outcome, self._too_late(query, message, predicted_s=None))

    def _refuse(self, query: Query, outcome: str, error: ServeError) -> None:
        if not query.reply.done():  # else its client has just gone, and cancel() is about to be called
            query.refused = True
            self._count(query, outcome)
            query.reply.set_exception(error)

    def _too_late(self, query: Query, message: str, predicted_s: float | None) -> DeadlineExceeded:
        predicted_ms = None if predicted_s is None else round(predicted_s * 1e3, 3)
        slo_ms = round(query.slo_s * 1e3, 3)
        return DeadlineExceeded(message, slo_ms=slo_ms, predicted_ms=predicted_ms, queue_depth=len(self.heap))
