"""Whatever happens in whatever order, the dispatcher answers every query once, and counts it once."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import serving
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import Clock, make_query, slot_of

from dispatcher import Answer, Batch, Dispatcher, Query
from slackfit import ProfileTable, make_policy
from web.errors import BatchFailed, DeadlineExceeded, NotReady, QueueFull

MAX_QUEUE = 12
POLICIES = ("halfslo", "slackfit", "slackfit:3", "fixed:largest", "fixed:smallest")
# What a client is told, and what is counted then.
TOLD = {DeadlineExceeded: {"expired", "given_up"}, BatchFailed: {"failed"}, NotReady: {"failed"}}


class Ledger:
    """An observer that remembers what became of each query."""

    def __init__(self) -> None:
        self.arrivals = self.finished = self.failed = 0
        self.outcomes: dict[Query, str] = {}
        self.broken = False

    def arrived(self, now_s: float) -> None:
        self.arrivals += 1

    def ended(self, query: Query, outcome: str, now_s: float, answer: Answer | None) -> None:
        assert query not in self.outcomes, "ended twice"
        assert (answer is not None) == (outcome in ("in_time", "late"))
        self.outcomes[query] = outcome

    def batch_finished(self, batch: Batch, taken_s: float, predicted_s: float) -> None:
        if self.broken:
            raise LookupError("an observer that breaks its promise")
        self.finished += 1

    def batch_failed(self, batch: Batch) -> None:
        self.failed += 1


numbers = st.integers(0, 99)


class World(RuleBasedStateMachine):
    """A dispatcher with its clients, its workers and a clock; rules are what can happen next."""

    def __init__(self, table: ProfileTable) -> None:
        super().__init__()
        self.table, self.clock, self.ledger = table, Clock(), Ledger()
        self.clients: list[Query] = []  # those that have not gone on yet
        self.leaving: list[Query] = []  # of which the dispatcher has not heard
        self.batches: list[Batch] = []
        self.queries: list[Query] = []
        self.rejected = 0

    @initialize(policy=st.sampled_from(POLICIES), workers=st.integers(1, 4), margin=st.sampled_from([0.0, 0.3]))
    def begin(self, policy: str, workers: int, margin: float) -> None:
        self.workers = workers
        self.dispatcher = Dispatcher(
            self.table, make_policy(policy, self.table, workers), self.clock, workers=workers, max_queue=MAX_QUEUE,
            margin=margin,
        )  # fmt: skip
        self.dispatcher.observers.append(self.ledger)

    @rule(
        slo_ms=st.sampled_from([1, 5, 20, 36, 36, 100, 300, 3000]), floor=st.integers(-3, 5),
        priority=st.integers(0, 2), count=st.integers(1, 4),
    )  # fmt: skip
    def arrive(self, slo_ms: int, floor: int, priority: int, count: int) -> None:
        lowest = self.table.entries[floor % len(self.table.entries)].accuracy if floor >= 0 else 0.0
        for _ in range(count):
            query = make_query(self.clock, slo_ms, min_accuracy=lowest, priority=priority)
            self.queries.append(query)
            try:
                self.dispatcher.submit(query)
                self.clients.append(query)
            except (QueueFull, DeadlineExceeded):
                self.rejected += 1

    @rule(ms=st.sampled_from([0.1, 1, 5, 20, 100, 1000]))
    def pass_time(self, ms: float) -> None:
        self.clock.now_s += ms / 1e3

    @precondition(lambda self: self.clients)
    @rule(number=numbers)
    def leave(self, number: int) -> None:
        """A client goes away; the dispatcher is to hear of it later."""
        query = self.clients.pop(number % len(self.clients))
        slot_of(query).gone = True
        self.leaving.append(query)

    @precondition(lambda self: self.leaving)
    @rule()
    def hear_of_it(self) -> None:
        self.dispatcher.cancel(self.leaving.pop(0))

    @rule()
    def go_on(self) -> None:
        """Clients that were answered go on."""
        for query in [query for query in self.clients if slot_of(query).done()]:
            self.clients.remove(query)
            if (answer := slot_of(query).answer) is not None:
                self.dispatcher.deliver(query, answer)

    @rule()
    def expire(self) -> None:
        self.dispatcher.expire()
        assert not [query for query in self.clients if query.waiting and query.deadline_s <= self.clock()]

    @rule()
    def dispatch(self) -> None:
        idle = self.dispatcher.idle_workers
        batch = self.dispatcher.next_batch()
        if batch is not None:
            assert idle > 0
            assert 1 <= len(batch.queries) <= self.table.max_batch
            assert all(query.min_accuracy <= batch.entry.accuracy for query in batch.queries)
            assert not any(query.waiting for query in batch.queries)
            self.batches.append(batch)

    @precondition(lambda self: self.batches)
    @rule(number=numbers, spoilt=st.sets(st.integers(0, 5), max_size=2), value=st.sampled_from([math.nan, math.inf]))
    def finish(self, number: int, spoilt: set[int], value: float) -> None:
        """A batch ends; some rows may not be finite."""
        batch = self._ending(number)
        outputs = serving.outputs_for(len(batch.queries), self.clock())
        for row in spoilt:
            outputs.probabilities[row % len(batch.queries), 0] = value
        self.dispatcher.settle(batch, outputs)

    @precondition(lambda self: self.batches)
    @rule(number=numbers, by=st.sampled_from([-1, 1, 3]))
    def miscount(self, number: int, by: int) -> None:
        """A batch ends with more or fewer rows than queries."""
        batch = self._ending(number)
        with pytest.raises(BatchFailed):
            self.dispatcher.settle(batch, serving.outputs_for(max(0, len(batch.queries) + by)))
        self.dispatcher.fail(batch, "the rows do not match")

    @precondition(lambda self: self.batches)
    @rule(number=numbers)
    def break_observer(self, number: int) -> None:
        """Something raises while a batch is settled."""
        batch = self._ending(number)
        self.ledger.broken = True
        with pytest.raises(LookupError):
            self.dispatcher.settle(batch, serving.outputs_for(len(batch.queries), self.clock()))
        self.ledger.broken = False
        self.dispatcher.fail(batch, "an observer broke")

    @precondition(lambda self: self.batches)
    @rule(number=numbers)
    def fail(self, number: int) -> None:
        self.dispatcher.fail(self._ending(number), "it broke")

    @precondition(lambda self: self.batches)
    @rule(number=numbers)
    def hang(self, number: int) -> None:
        """A batch is given up, and its worker with it."""
        self.dispatcher.fail(self._ending(number), "it hung", worker_gone=True)
        self.workers -= 1

    @precondition(lambda self: self.batches)
    @rule(number=numbers)
    def fail_after_settling(self, number: int) -> None:
        """What raises after the answers are given makes the batch fail a second time."""
        batch = self._ending(number)
        self.dispatcher.settle(batch, serving.outputs_for(len(batch.queries), self.clock()))
        self.dispatcher.fail(batch, "too late to matter")

    @rule()
    def abandon(self) -> None:
        self.dispatcher.abandon()
        assert not self.dispatcher.heap

    @invariant()
    def workers_are_accounted_for(self) -> None:
        if self.queries:
            assert 0 <= self.dispatcher.idle_workers <= self.dispatcher.workers == self.workers
            assert self.dispatcher.idle_workers == self.workers - len(self.batches)

    @invariant()
    def queries_are_accounted_for(self) -> None:
        if self.queries:
            counters = self.dispatcher.counters
            ended = sum(count for name, count in counters.items() if name != "arrivals")
            assert counters["arrivals"] == self.ledger.arrivals == len(self.queries)
            assert ended == len(self.ledger.outcomes)
            assert len(self.dispatcher.heap) == sum(query.waiting for query in self.queries) <= MAX_QUEUE

    def teardown(self) -> None:
        """Everything comes to its end; then every query has had exactly one."""
        if not self.queries:
            return
        while self.leaving:
            self.hear_of_it()
        while self.batches:
            self.finish(0, set(), math.nan)
        self.clock.now_s += 10_000
        self.expire()
        assert all(slot_of(query).done() for query in self.clients), "a query was never answered"
        self.go_on()
        self.workers_are_accounted_for()
        assert set(self.ledger.outcomes) == set(self.queries)
        assert Counter(self.ledger.outcomes.values()) == Counter(
            {name: count for name, count in self.dispatcher.counters.items() if name != "arrivals" and count}
        )
        for query in self.queries:
            told, counted = slot_of(query), self.ledger.outcomes[query]
            if told.error is not None:
                assert counted in TOLD[type(told.error)]  # type: ignore[index]
            elif not told.gone:
                assert counted in ({"in_time", "late"} if told.answer else {"infeasible", "queue_full"})
        refused = Counter(self.ledger.outcomes.values())
        assert refused["infeasible"] + refused["queue_full"] == self.rejected

    def _ending(self, number: int) -> Batch:
        return self.batches.pop(number % len(self.batches))


def explore(table: ProfileTable, **limits: Any) -> None:
    run_state_machine_as_test(lambda: World(table), settings=settings(deadline=None, **limits))


def test_every_query_ends_exactly_once_whatever_happens_in_whatever_order(table: ProfileTable) -> None:
    explore(table, max_examples=8, stateful_step_count=25)


@pytest.mark.slow
def test_every_query_ends_exactly_once_in_many_long_histories(table: ProfileTable) -> None:
    explore(table, max_examples=150, stateful_step_count=80)


def test_a_worker_that_is_gone_is_not_idle_and_the_rest_carry_on(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = Dispatcher(table, make_policy("fixed:smallest", table, 2), clock, workers=2, max_queue=1000)
    for _ in range(200):
        dispatcher.submit(make_query(clock, 10_000))
    hung, running = dispatcher.next_batch(), dispatcher.next_batch()
    assert hung is not None
    assert running is not None
    dispatcher.fail(hung, "it hung", worker_gone=True)
    assert (dispatcher.workers, dispatcher.idle_workers, dispatcher.next_batch()) == (1, 0, None)
    dispatcher.settle(running, serving.outputs_for(len(running.queries), clock()))
    assert (dispatcher.workers, dispatcher.idle_workers) == (1, 1)
    assert dispatcher.next_batch() is not None


def test_abandoned_queries_are_told_why(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = Dispatcher(table, make_policy("halfslo", table), clock, workers=1, max_queue=10)
    query = make_query(clock)
    dispatcher.submit(query)
    dispatcher.abandon("the device is lost")
    with pytest.raises(NotReady, match="the device is lost") as refused:
        raise slot_of(query).error or AssertionError("not answered")
    assert refused.value.retry_after_s == 1


def test_what_is_planned_for_a_batch_includes_slowdown_and_margin(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = Dispatcher(table, make_policy("halfslo", table), clock, workers=1, max_queue=10, margin=0.5)
    dispatcher.slowdown = 2.0
    batch = Batch(entry=table.fastest, queries=(make_query(clock), make_query(clock)), started_s=clock())
    assert dispatcher.planned_s(batch) == pytest.approx(3 * table.fastest.latency_s[2])
