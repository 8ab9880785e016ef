"""Whatever happens in whatever order, the dispatcher answers every query once, and counts it once."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import serving
from conftest import choice, ensemble, in_ms, table_of
from hypothesis import given, settings
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

import dispatcher as dispatcher_module
from dispatcher import Batch, Dispatcher, Observer
from queries import Answer, Query
from slackfit import ProfileTable, build_table, make_policy
from web.errors import BatchFailed, DeadlineExceeded, NotReady, QueueFull

MAX_QUEUE = 12
POLICIES = ("halfslo", "slackfit", "slackfit:3", "fixed:largest", "fixed:smallest")
# What a client is told, and what is counted then.
TOLD = {DeadlineExceeded: {"expired", "given_up"}, BatchFailed: {"failed"}, NotReady: {"failed"}}


class Ledger(Observer):
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
        priority=st.integers(0, 2), count=st.integers(1, 4), asked_for=st.integers(-6, 5),
    )  # fmt: skip
    def arrive(self, slo_ms: int, floor: int, priority: int, count: int, asked_for: int) -> None:
        entries = self.table.entries
        lowest = entries[floor % len(entries)].accuracy if floor >= 0 else 0.0
        choice = entries[asked_for % len(entries)] if asked_for >= 0 else None
        if choice is not None:
            lowest = min(lowest, choice.accuracy)
        name = None if choice is None else choice.name
        for _ in range(count):
            query = make_query(self.clock, slo_ms, min_accuracy=lowest, priority=priority, choice=name)
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
            assert all(query.choice in (None, batch.entry.name) for query in batch.queries)
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
            waiting = [query for query in self.queries if query.waiting]
            assert len(self.dispatcher.heap) == len(waiting) <= MAX_QUEUE
            assert self.dispatcher.heap.nbytes == sum(query.input.nbytes for query in waiting)

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


# ----------------------------------------------------------------------------------------------------------- admission

# Latencies in milliseconds at batches of 1, 2 and 4; the second entry is the slower one.
SIZES, LATENCIES_MS = (1, 2, 4), (2.0, 3.0, 5.0)
SMALL = table_of(SIZES, (0.7, LATENCIES_MS), (0.9, (4.0, 6.5, 11.0)))


def all_in_time(deadlines_s: Sequence[float], free_s: Sequence[float], latency_s: Sequence[float]) -> bool:
    """Whether all queries can be answered by their deadlines, by trying every way to batch them, in their order."""
    if not deadlines_s:
        return True
    for worker, start_s in enumerate(free_s):
        for size in range(1, min(len(deadlines_s), len(latency_s) - 1) + 1):
            end_s = start_s + latency_s[size]
            others_s = [*free_s[:worker], end_s, *free_s[worker + 1 :]]
            if end_s <= deadlines_s[0] + 1e-9 and all_in_time(deadlines_s[size:], others_s, latency_s):
                return True
    return False


def judged(workers: int, running: Sequence[int], slos_ms: Sequence[float], slo_ms: float) -> tuple[bool, bool]:
    """Whether one more query is accepted behind those that run and wait, and whether all could be served with it."""
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL, workers), clock, workers=workers, max_queue=100)
    free_s = [clock()] * workers
    for worker, size in enumerate(running[:workers]):
        for _ in range(size):
            dispatcher.submit(make_query(clock, 1000))
        assert dispatcher.next_batch() is not None
        free_s[worker] += SMALL.fastest.latency_s[size]
        assert not dispatcher.heap
    waiting = [make_query(clock, each_ms) for each_ms in slos_ms]
    for query in waiting:
        dispatcher.heap.push(query)
    newcomer = make_query(clock, slo_ms)
    urgent_s = sorted(query.deadline_s for query in waiting if query.deadline_s <= newcomer.deadline_s)
    feasible = all_in_time([*urgent_s, newcomer.deadline_s], free_s, SMALL.fastest.latency_s)
    return dispatcher.refusal(newcomer, clock()) is None, feasible


slos = st.sampled_from([2.0, 3.0, 4.5, 5.0, 7.0, 8.0, 10.0, 12.0, 15.0])


@given(
    workers=st.integers(1, 2), running=st.lists(st.sampled_from(SIZES), max_size=2), waiting=st.lists(slos, max_size=6),
    slo_ms=slos,
)  # fmt: skip
def test_no_query_is_refused_that_could_be_served_with_all_those_ahead(
    workers: int, running: list[int], waiting: list[float], slo_ms: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher_module, "AHEAD", 1.0)  # stricter than the server
        accepted, feasible = judged(workers, running, waiting, slo_ms)
    assert accepted or not feasible


@pytest.mark.slow
def test_no_query_is_refused_that_could_be_served_in_any_of_many_small_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "AHEAD", 1.0)
    found: Counter[tuple[bool, bool]] = Counter()
    choices = (3.0, 5.0, 8.0, 11.0)
    for workers, running, count in itertools.product((1, 2), ((), (1,), (4,), (4, 2)), range(6)):
        for waiting in itertools.combinations_with_replacement(choices, count):
            for slo_ms in choices:
                found[judged(workers, running, waiting, slo_ms)] += 1
    assert found[False, True] == 0
    assert found[False, False] > 100, "some are refused"
    assert found[True, True] > 100


def test_a_query_behind_too_many_is_refused_at_once_and_told_so() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100)
    # Four batches of 4 fit into 20 ms, and twice as many queries may wait.
    for _ in range(32):
        dispatcher.submit(make_query(clock, 20))
    with pytest.raises(DeadlineExceeded, match="too many queries are ahead") as refused:
        dispatcher.submit(make_query(clock, 20))
    assert refused.value.details == {"slo_ms": 20, "predicted_ms": None, "queue_depth": 32}
    dispatcher.submit(make_query(clock, 10))  # these are ahead of those
    dispatcher.submit(make_query(clock, 25))  # and here is time for more
    assert dispatcher.counters == {"arrivals": 35, "infeasible": 1}


def test_what_runs_takes_time_from_what_waits_until_it_ends() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100)
    for _ in range(4):
        dispatcher.submit(make_query(clock, 20))
    batch = dispatcher.next_batch()
    assert batch is not None
    for _ in range(24):  # 15 ms are left
        dispatcher.submit(make_query(clock, 20))
    newcomer = make_query(clock, 20)
    refusal = dispatcher.refusal(newcomer, clock())
    assert refusal is not None
    assert refusal.outcome == "infeasible"
    clock.now_s += 0.003  # sooner than planned
    dispatcher.settle(batch, serving.outputs_for(4, clock()))
    assert dispatcher.refusal(newcomer, clock()) is None


def test_a_query_is_turned_away_before_its_input_is_there_and_counted_only_then() -> None:
    clock, ledger = Clock(), Ledger()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=1)
    dispatcher.observers.append(ledger)
    dispatcher.turn_away(clock(), 1.0, 0.9, 10**9)
    assert (dispatcher.counters, ledger.arrivals) == ({}, 0)
    with pytest.raises(DeadlineExceeded):
        dispatcher.turn_away(clock(), 0.003, 0.9, 0)  # 2 ms would do for the first entry
    dispatcher.turn_away(clock(), 0.003, 0.7, 0)
    dispatcher.submit(make_query(clock))
    with pytest.raises(QueueFull):
        dispatcher.turn_away(clock(), 1.0, 0.0, 0)
    assert dispatcher.counters == {"arrivals": 3, "infeasible": 1, "queue_full": 1}
    assert (ledger.arrivals, sorted(ledger.outcomes.values())) == (3, ["infeasible", "queue_full"])


# --------------------------------------------------------------------------------------------------- choices, ensembles


def test_who_asks_for_a_choice_gets_it_and_only_it() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("clearfit", SMALL), clock, workers=1, max_queue=100)
    for number, name in enumerate(["e1", "e1", None, "e0", "e1", None]):
        dispatcher.submit(make_query(clock, 100 + number, choice=name))
    found = []
    while (batch := dispatcher.next_batch()) is not None:
        found.append((batch.entry.name, [query.choice for query in batch.queries]))
        clock.now_s += 0.012
        dispatcher.settle(batch, serving.outputs_for(len(batch.queries), clock()))
    assert [each for _, asked in found for each in asked] == ["e1", "e1", None, "e0", "e1", None], "none is passed over"
    assert all(each in (None, name) for name, asked in found for each in asked)
    assert found[0][0] == "e1"


def test_who_asks_for_a_choice_that_takes_too_long_is_told_so_at_once() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("clearfit", SMALL), clock, workers=1, max_queue=100)
    dispatcher.submit(make_query(clock, 3))
    with pytest.raises(DeadlineExceeded, match="the deadline cannot be met") as caught:
        dispatcher.submit(make_query(clock, 3, choice="e1"))
    assert caught.value.details["predicted_ms"] == 4
    with pytest.raises(DeadlineExceeded):
        dispatcher.turn_away(clock(), 0.003, 0.0, 0, choice="e1")
    dispatcher.turn_away(clock(), 0.003, 0.0, 0, choice="e0")


def test_who_asks_for_a_choice_that_has_no_time_left_is_given_up() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("clearfit", SMALL), clock, workers=1, max_queue=100)
    asked, other = make_query(clock, 5, choice="e1"), make_query(clock, 6)
    dispatcher.submit(asked)
    dispatcher.submit(other)
    clock.now_s += 0.002
    batch = dispatcher.next_batch()
    assert batch is not None
    assert batch.queries == (other,)
    assert isinstance(slot_of(asked).error, DeadlineExceeded)
    assert dispatcher.counters == {"arrivals": 2, "given_up": 1}


def test_one_that_came_late_is_no_precedent_for_those_that_did_not() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100)
    with pytest.raises(DeadlineExceeded):
        dispatcher.turn_away(clock() - 0.0999, 0.1, 0.0, 0)
    dispatcher.turn_away(clock(), 0.1, 0.0, 0)


def test_a_choice_is_planned_with_as_it_is_corrected_whether_or_not_it_is_dominated_then() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("clearfit", SMALL), clock, workers=1, max_queue=100)
    dispatcher.corrections.factors = lambda _: {"e0": 3.0, "e1": 1.0}  # type: ignore[method-assign]
    assert dispatcher.correct_table()
    assert [entry.name for entry in dispatcher.table.entries] == ["e1"]
    with pytest.raises(DeadlineExceeded) as caught:
        dispatcher.submit(make_query(clock, 5, choice="e0"))
    assert caught.value.details["predicted_ms"] == 6
    dispatcher.submit(make_query(clock, 7, choice="e0"))
    batch = dispatcher.next_batch()
    assert batch is not None
    assert (batch.entry.name, dispatcher.planned_s(batch)) == ("e0", pytest.approx(0.006))


def with_ensembles() -> ProfileTable:
    """Subnets a, b and c, and ensembles of all of them and of the first two."""
    singles = [choice("a", 0.7), choice("b", 0.72), choice("c", 0.71, frontier=False)]
    ensembles = [ensemble(("a", "b"), 0.75), ensemble(("a", "b", "c"), 0.8)]
    latencies = {"a": in_ms(2, 3, 5), "b": in_ms(3, 4, 6), "a+b": in_ms(3, 4, 6), "a+b+c": in_ms(4, 5, 7)}
    return build_table([*singles, *ensembles], SIZES, latencies)


@pytest.mark.parametrize(
    ("failed", "left", "accuracy"),
    [(("c",), "a+b", 0.75), (("b",), "a+c", 0.71), (("a", "b"), "c", 0.71), ((), "a+b+c", 0.8)],
)
def test_what_members_that_failed_left_is_what_is_told(failed: tuple[str, ...], left: str, accuracy: float) -> None:
    clock, table = Clock(), with_ensembles()
    dispatcher = Dispatcher(table, make_policy("maxaccuracy", table), clock, workers=1, max_queue=100)
    query = make_query(clock, 100)
    dispatcher.submit(query)
    batch = dispatcher.next_batch()
    assert batch is not None
    assert batch.entry.name == "a+b+c"
    dispatcher.settle(batch, replace(serving.outputs_for(1, clock()), failed=failed))
    answer = slot_of(query).answer
    assert answer is not None
    assert (answer.entry.name, answer.entry.accuracy, answer.degraded) == (left, accuracy, bool(failed))
    dispatcher.deliver(query, answer)
    assert dispatcher.counters == {"arrivals": 1, "in_time": 1}


def test_a_floor_above_every_subnet_is_met_by_an_ensemble_or_refused_when_time_is_short() -> None:
    clock, table = Clock(), with_ensembles()
    dispatcher = Dispatcher(table, make_policy("clearfit", table), clock, workers=1, max_queue=100)
    dispatcher.submit(make_query(clock, 100, min_accuracy=0.74))
    batch = dispatcher.next_batch()
    assert batch is not None
    assert batch.entry.name in ("a+b", "a+b+c")
    with pytest.raises(DeadlineExceeded):
        dispatcher.submit(make_query(clock, 3.5, min_accuracy=0.76))


def test_the_queue_is_full_when_inputs_take_more_bytes_than_they_may() -> None:
    clock = Clock()
    dispatcher = Dispatcher(
        SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100, max_queue_bytes=2000
    )

    def ask(nbytes: int) -> Query:
        query = Query(input=np.zeros(nbytes, np.uint8), arrival_s=clock(), slo_s=1.0, reply=serving.Slot())
        dispatcher.submit(query)
        return query

    first = ask(1200)
    with pytest.raises(QueueFull, match=r"the queue is full \(2000 bytes\)"):
        ask(801)
    second = ask(800)
    dispatcher.cancel(first)
    ask(1200)
    dispatcher.cancel(second)
    assert dispatcher.heap.nbytes == 1200
    clock.now_s += 2
    dispatcher.expire()
    ask(3000)  # alone, as it would never have a place else
    with pytest.raises(QueueFull):
        ask(1)
    assert dispatcher.heap.nbytes == 3000


def test_the_share_that_is_refused_is_that_of_the_latest_arrivals() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100)

    def arrive(count: int, slo_ms: float) -> float:
        for _ in range(count):
            query = make_query(clock, slo_ms)
            with contextlib.suppress(DeadlineExceeded):
                dispatcher.submit(query)
            dispatcher.heap.discard(query)
        return dispatcher.refused_share

    assert arrive(10, 1000) == 0
    assert arrive(500, 1) < 0.5 < arrive(500, 1) < 1
    assert 0 < arrive(2000, 1000) < 0.1


def test_one_like_another_that_was_turned_away_right_before_it_is_refused_without_a_look_and_counted() -> None:
    clock = Clock()
    dispatcher = Dispatcher(SMALL, make_policy("fixed:e0", SMALL), clock, workers=1, max_queue=100)

    def error_of(slo_s: float, min_accuracy: float, coming: int, delay_s: float = 0.0) -> DeadlineExceeded | None:
        try:
            dispatcher.turn_away(clock(), slo_s, min_accuracy, 0, coming=coming, delay_s=delay_s)
        except DeadlineExceeded as error:
            return error
        return None

    first = error_of(1.0, 0.0, coming=5, delay_s=2.0)
    assert first is not None
    assert error_of(1.0, 0.0, coming=5) is first, "though there would be time for it"
    assert error_of(1.0, 0.0, coming=6) is first
    assert error_of(1.0, 0.0, coming=4) is None, "there are fewer before it"
    assert error_of(1.1, 0.0, coming=5) is None
    assert error_of(1.0, 0.1, coming=5) is None
    clock.now_s += 0.0021
    assert error_of(1.0, 0.0, coming=5) is None
    assert dispatcher.counters == {"arrivals": 3, "infeasible": 3}
    error = first
    for _ in range(10):
        error = error_of(0.001, 0.0, coming=0)
    assert error is not None
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_next is not None
    assert error.__traceback__.tb_next.tb_next is None, "what is raised again and again does not grow"


def test_retry_after_is_when_half_of_the_queue_is_done_or_due() -> None:
    clock = Clock()
    slow = table_of((1,), (0.7, (400.0,)))

    def retry_after_s(count: int, slo_ms: float) -> int | None:
        dispatcher = Dispatcher(slow, make_policy("fixed:e0", slow), clock, workers=1, max_queue=count)
        for _ in range(count):
            dispatcher.submit(make_query(clock, slo_ms))
        with pytest.raises(QueueFull) as refused:
            dispatcher.submit(make_query(clock, slo_ms))
        return refused.value.retry_after_s

    assert retry_after_s(2, 60_000) == 1
    assert retry_after_s(30, 60_000) == 6
    assert retry_after_s(30, 7000) == 6
    assert retry_after_s(10, 2500) == 2
