"""The dispatcher and the server without HTTP: every query is answered exactly once, whatever happens."""

import asyncio
import dataclasses
import gc
import json
import logging
import math
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from hypothesis import given
from hypothesis import strategies as st
from serving import LARGE, LARGE_ACCURACY, PATIENT_MS, SMALL, Clock, config_of, fake_engine, make_query, slot_of

import slackfit
import startup
from engine import EngineError, Outputs
from slackfit import Decision, Policy, ProfileError, ProfileTable, make_policy
from supernet import SupernetError
from superserve import Batch, Dispatcher, Query, Reply, SuperServe
from web.errors import BadRequest, BatchFailed, DeadlineExceeded, NotReady, QueueFull, ServeError, TooLarge
from web.inputs import INLINE_BODY_BYTES

POLICIES = ("halfslo", "slackfit", "slackfit:3", "fixed:largest", "fixed:smallest")


# ------------------------------------------------------------------------------------------------------ the dispatcher


def dispatcher_of(
    table: ProfileTable,
    clock: Callable[[], float],
    policy: str = "halfslo",
    workers: int = 1,
    max_queue: int = 1000,
    **settings: Any,
) -> Dispatcher:
    chosen = make_policy(policy, table, workers)
    return Dispatcher(table, chosen, clock, workers=workers, max_queue=max_queue, **settings)


def submitted(dispatcher: Dispatcher, *queries: Query) -> Dispatcher:
    for query in queries:
        dispatcher.submit(query)
    return dispatcher


def running(dispatcher: Dispatcher) -> Batch:
    batch = dispatcher.next_batch()
    assert batch is not None
    return batch


def outcomes(dispatcher: Dispatcher) -> dict[str, int]:
    return {name: count for name, count in dispatcher.counters.items() if name != "arrivals"}


def test_a_full_heap_rejects_and_asks_to_retry(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = submitted(dispatcher_of(table, clock, max_queue=2), make_query(clock), make_query(clock))
    with pytest.raises(QueueFull, match=r"\(2 queries\)") as full:
        dispatcher.submit(make_query(clock))
    assert full.value.retry_after_s == 1
    assert dispatcher.counters == {"arrivals": 3, "queue_full": 1}


def test_what_not_even_the_fastest_choice_can_meet_is_rejected_with_the_figures(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = submitted(dispatcher_of(table, clock), make_query(clock))
    with pytest.raises(DeadlineExceeded) as late:
        dispatcher.submit(make_query(clock, slo_ms=5, arrival_s=clock() - 0.004))
    assert late.value.details == {"slo_ms": 5.0, "predicted_ms": 6.0, "queue_depth": 1}
    assert dispatcher.counters == {"arrivals": 2, "infeasible": 1}


def test_a_query_is_rejected_by_what_its_own_accuracy_floor_takes(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock)
    dispatcher.submit(make_query(clock, slo_ms=6))
    with pytest.raises(DeadlineExceeded):
        dispatcher.submit(make_query(clock, slo_ms=6, min_accuracy=0.80))


def test_the_overhead_of_answering_counts_against_the_slack(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock)
    dispatcher.overhead_s = 0.002
    dispatcher.submit(make_query(clock, slo_ms=4.1))
    with pytest.raises(DeadlineExceeded):
        dispatcher.submit(make_query(clock, slo_ms=3.9))


def test_a_stall_that_is_over_does_not_refuse_queries_for_ever(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = submitted(dispatcher_of(table, clock), make_query(clock, 100))
    query = running(dispatcher).queries[0]
    batch = Batch(entry=table.fastest, queries=(query,), started_s=clock())
    dispatcher.settle(batch, serving.outputs_for(1, clock()))
    clock.now_s += 10  # the machine was suspended while the answer was on its way
    answer = slot_of(query).answer
    assert answer is not None
    dispatcher.deliver(query, answer)
    for _ in range(10):
        try:
            dispatcher.submit(make_query(clock, 100))
        except DeadlineExceeded:
            continue
    assert dispatcher.heap


def finish_batches(dispatcher: Dispatcher, clock: Clock, count: int, factor: float) -> None:
    """Serve one query at a time, each batch taking ``factor`` times what the table says."""
    for _ in range(count):
        dispatcher.submit(make_query(clock, 1000))
        batch = running(dispatcher)
        clock.now_s += factor * batch.entry.latency_s[len(batch.queries)]
        dispatcher.settle(batch, serving.outputs_for(1, clock()))


def test_a_slowdown_is_followed_within_a_few_batches_and_forgotten_when_it_is_over(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock)
    finish_batches(dispatcher, clock, 15, factor=2)
    assert dispatcher.slowdown == pytest.approx(2, rel=0.05)
    finish_batches(dispatcher, clock, 300, factor=1)
    assert dispatcher.slowdown == pytest.approx(1, abs=0.01)


def test_without_correction_the_table_is_believed(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock, correction=False)
    finish_batches(dispatcher, clock, 15, factor=2)
    assert dispatcher.slowdown == 1


class Turns(Policy):
    """A policy that runs single queries on random entries of its table."""

    def __init__(self, table: ProfileTable) -> None:
        self.name, self.rng, self.table = "turns", random.Random(0), table

    def adopt(self, table: ProfileTable) -> bool:
        self.table = table
        return True

    def decide(self, now_s: float, queue: slackfit.QueueView, lowest: int = 0) -> Decision:
        return Decision(0, self.rng.choice(self.table.entries[lowest:]), 1)


def in_turns(table: ProfileTable, **settings: Any) -> tuple[Dispatcher, Clock]:
    clock = Clock()
    return Dispatcher(table, Turns(table), clock, workers=1, max_queue=10, **settings), clock


def corrected(dispatcher: Dispatcher, clock: Clock, count: int, least: float = 1.0, **factors: float) -> int:
    """Run batches of one that take from ``least`` to 1 times their measured latency and factor; how many new tables."""
    renewed, rng = 0, random.Random(1)
    for _ in range(count):
        dispatcher.submit(make_query(clock, 10_000))
        batch = running(dispatcher)
        measured_s = dispatcher.measured.by_name(batch.entry.name).latency_s[1]
        clock.now_s += rng.uniform(least, 1) * factors.get(batch.entry.name, 1.0) * measured_s
        dispatcher.settle(batch, serving.outputs_for(1, clock()))
        renewed += dispatcher.correct_table()
    return renewed


def slow_down(dispatcher: Dispatcher, now_s: float, name: str, factor: float) -> None:
    """Let an entry be known to be slow."""
    other = next(entry.name for entry in dispatcher.measured.entries if entry.name != name)
    for _ in range(60):
        dispatcher.corrections.learn(name, factor, now_s)
        dispatcher.corrections.learn(other, 1.0, now_s)


def test_batches_as_fast_as_the_table_says_never_make_a_new_one(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    assert corrected(dispatcher, clock, 800, least=0.6) == 0
    assert dispatcher.table is table


def test_what_slows_down_all_entries_alike_makes_no_new_table(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    assert corrected(dispatcher, clock, 500, **{entry.name: 2.0 for entry in table.entries}) == 0
    assert dispatcher.slowdown == pytest.approx(2, rel=0.01)


def test_a_slow_entry_is_planned_with_what_it_takes_and_the_others_as_before(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    assert 1 <= corrected(dispatcher, clock, 500, s6=1.5) <= 3
    assert dispatcher.table.by_name("s6").latency_s[1] == pytest.approx(1.5 * table.by_name("s6").latency_s[1], rel=0.1)
    assert dispatcher.table.entries[:-1] == table.entries[:-1]
    assert dispatcher.slowdown == pytest.approx(1, abs=0.1)


def test_an_entry_too_slow_to_be_of_use_is_left_out_and_tried_again_later(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    corrected(dispatcher, clock, 500, s5=2.0)
    assert [entry.name for entry in dispatcher.table.entries] == ["s1", "s2", "s3", "s4", "s6"]
    assert dispatcher.measured is table
    clock.now_s += 30
    assert dispatcher.correct_table()
    assert dispatcher.table == table
    assert corrected(dispatcher, clock, 500) == 0


def test_accuracy_floors_follow_the_table_in_use(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    corrected(dispatcher, clock, 500, s5=2.0)
    for entry in table.entries:
        dispatcher.submit(make_query(clock, 10_000, min_accuracy=entry.accuracy))
        batch = running(dispatcher)
        assert batch.entry.accuracy >= entry.accuracy
        dispatcher.fail(batch, "not of interest")
    with pytest.raises(DeadlineExceeded):  # s5 was measured to do it
        dispatcher.submit(make_query(clock, 5.5, min_accuracy=table.by_name("s5").accuracy))


def test_the_table_is_looked_at_once_a_second(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table)
    assert not dispatcher.correct_table()
    slow_down(dispatcher, clock(), "s6", 2.0)
    assert not dispatcher.correct_table()
    clock.now_s += 1
    assert dispatcher.correct_table()


def test_without_correction_no_entry_is_corrected_either(table: ProfileTable) -> None:
    dispatcher, clock = in_turns(table, correction=False)
    assert corrected(dispatcher, clock, 500, s6=2.0) == 0


def test_a_fixed_policy_keeps_its_table_and_the_slowdown_follows_what_it_takes(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock, "fixed:s6")
    slow_down(dispatcher, clock(), "s6", 2.0)
    assert corrected(dispatcher, clock, 200, s6=2.0) == 0
    assert dispatcher.table is table
    assert dispatcher.slowdown == pytest.approx(2)


def test_a_batch_decided_by_the_old_table_is_settled_by_what_is_known_now(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock)
    batch = running(submitted(dispatcher, make_query(clock, 10_000)))
    assert batch.entry is table.by_name("s6")
    slow_down(dispatcher, clock(), "s6", 1.5)
    assert dispatcher.correct_table()
    clock.now_s += 1.5 * batch.entry.latency_s[1]
    dispatcher.settle(batch, serving.outputs_for(1, clock()))
    assert dispatcher.slowdown == pytest.approx(1, abs=0.01)


def test_a_device_faster_than_its_table_is_planned_for_by_the_table(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = dispatcher_of(table, clock)
    finish_batches(dispatcher, clock, 50, factor=0.5)
    assert dispatcher.slowdown == 1


def test_with_slack_for_the_table_s_latency_alone_a_slow_device_runs_something_faster(table: ProfileTable) -> None:
    clock = Clock()
    usual, slow = dispatcher_of(table, clock), dispatcher_of(table, clock)
    slow.slowdown = 2
    slack_ms = 1.1e3 * table.most_accurate.latency_s[1]
    chosen = []
    for dispatcher in (usual, slow):
        dispatcher.policy = make_policy("maxaccuracy", table)
        dispatcher.submit(make_query(clock, slack_ms))
        chosen.append(running(dispatcher).entry)
    assert chosen[0] is table.most_accurate
    assert 2 * chosen[1].latency_s[1] <= slack_ms / 1e3


def test_the_margin_lengthens_every_latency(table: ProfileTable) -> None:
    clock = Clock()
    policy = make_policy("halfslo", table)
    dispatcher = Dispatcher(table, policy, clock, workers=1, max_queue=10, margin=0.5)
    fastest_ms = 1e3 * table.fastest.latency_s[1]
    dispatcher.submit(make_query(clock, 1.51 * fastest_ms))
    with pytest.raises(DeadlineExceeded):
        dispatcher.submit(make_query(clock, 1.49 * fastest_ms))


def test_expire_answers_exactly_the_queries_whose_deadline_has_passed(table: ProfileTable) -> None:
    clock = Clock(0)
    queries = [make_query(clock, slo_ms) for slo_ms in (10, 30, 20, 31)]
    dispatcher = submitted(dispatcher_of(table, clock), *queries)
    clock.now_s = 0.030
    dispatcher.expire()
    assert [slot_of(query).done() for query in queries] == [True, True, True, False]
    errors = [slot_of(query).error for query in queries[:3]]
    assert all(isinstance(error, DeadlineExceeded) for error in errors)
    dispatcher.expire()
    assert outcomes(dispatcher) == {"expired": 3}


def test_without_an_idle_worker_nothing_is_decided(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = submitted(dispatcher_of(table, clock), make_query(clock))
    batch = running(dispatcher)
    dispatcher.submit(make_query(clock))
    assert dispatcher.next_batch() is None
    dispatcher.fail(batch, "it broke")
    assert dispatcher.next_batch() is not None


def test_an_empty_heap_is_not_decided_about(table: ProfileTable) -> None:
    assert dispatcher_of(table, Clock()).next_batch() is None


def test_a_batch_stops_before_a_query_that_demands_more_accuracy(table: ProfileTable) -> None:
    clock = Clock()
    easy = [make_query(clock, 14 + i) for i in range(8)]
    demanding = make_query(clock, 30, min_accuracy=0.80)
    dispatcher = submitted(dispatcher_of(table, clock, "slackfit"), *easy, demanding, make_query(clock, 31))
    batch = running(dispatcher)
    assert batch.entry.accuracy < 0.80
    assert batch.queries == tuple(easy)


def test_a_query_behind_those_given_up_gets_a_decision_of_its_own(table: ProfileTable) -> None:
    for policy in ("halfslo", "slackfit"):
        clock = Clock()
        hopeless, demanding = make_query(clock, 10), make_query(clock, 40, min_accuracy=0.80)
        dispatcher = submitted(dispatcher_of(table, clock, policy), hopeless, demanding)
        clock.now_s += 0.009
        batch = running(dispatcher)
        assert (batch.queries, batch.entry.accuracy) == ((demanding,), 0.8016)
        assert outcomes(dispatcher) == {"given_up": 1}


def test_a_demanding_query_that_is_hopeless_takes_no_other_with_it(table: ProfileTable) -> None:
    for policy in ("halfslo", "slackfit"):
        clock = Clock()
        demanding, easy = make_query(clock, 10, min_accuracy=0.80), make_query(clock, 11)
        dispatcher = submitted(dispatcher_of(table, clock, policy), demanding, easy)
        clock.now_s += 0.005
        assert running(dispatcher).queries == (easy,)
        assert isinstance(slot_of(demanding).error, DeadlineExceeded)


def test_a_policy_that_runs_nothing_is_asked_again_only_after_it_gave_up_something(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = submitted(
        dispatcher_of(table, clock, "fixed:smallest"), *(make_query(clock, 50 + i, min_accuracy=0.8) for i in range(3)),
        make_query(clock, 60),
    )  # fmt: skip
    assert running(dispatcher).entry is table.fastest
    assert outcomes(dispatcher) == {"given_up": 3}


class Idler(Policy):
    """A policy that waits."""

    name = "idler"

    def decide(self, now_s: float, queue: slackfit.QueueView, lowest: int = 0) -> Decision:
        return Decision(0, None, 0)


def test_a_policy_may_wait(table: ProfileTable) -> None:
    clock = Clock()
    dispatcher = Dispatcher(table, Idler(), clock, workers=1, max_queue=10)
    assert submitted(dispatcher, make_query(clock)).next_batch() is None
    assert (len(dispatcher.heap), dispatcher.idle_workers) == (1, 1)


def test_settle_gives_each_query_its_own_row(table: ProfileTable) -> None:
    clock = Clock()
    queries = [make_query(clock) for _ in range(3)]
    batch = running(submitted(dispatcher := dispatcher_of(table, clock), *queries))
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    dispatcher.settle(batch, Outputs(rows, clock() + 0.001))
    for query, row in zip(queries, rows, strict=True):
        answer = slot_of(query).answer
        assert answer is not None
        assert np.array_equal(answer.probabilities, row)
        assert (answer.entry, answer.batch_size, answer.started_s) == (batch.entry, 3, clock())
        dispatcher.deliver(query, answer)
    assert outcomes(dispatcher) == {"in_time": 3}


def test_an_answer_after_the_deadline_is_late(table: ProfileTable) -> None:
    clock = Clock()
    query = make_query(clock, 10)
    batch = running(submitted(dispatcher := dispatcher_of(table, clock), query))
    clock.now_s += 0.011
    dispatcher.settle(batch, serving.outputs_for(1, clock()))
    answer = slot_of(query).answer
    assert answer is not None
    dispatcher.deliver(query, answer)
    assert outcomes(dispatcher) == {"late": 1}


MALFORMED = [np.ones((2, 5)), np.ones((0, 5)), np.ones(3), np.ones((3, 0)), np.array([["a"]] * 3), np.float32(1), None]


@pytest.mark.parametrize("rows", MALFORMED, ids=lambda rows: str(np.shape(rows)))
def test_malformed_outputs_fail_the_batch_and_free_its_worker_once(table: ProfileTable, rows: Any) -> None:
    clock = Clock()
    queries = [make_query(clock) for _ in range(3)]
    batch = running(submitted(dispatcher := dispatcher_of(table, clock), *queries))
    with pytest.raises((BatchFailed, ValueError, TypeError)):
        dispatcher.settle(batch, Outputs(rows, 0.0))
    dispatcher.fail(batch, "malformed")
    assert dispatcher.idle_workers == 1
    assert all(isinstance(slot_of(query).error, BatchFailed) for query in queries)
    assert outcomes(dispatcher) == {"failed": 3}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_fails_only_its_own_query(table: ProfileTable, value: float) -> None:
    clock = Clock()
    queries = [make_query(clock) for _ in range(3)]
    batch = running(submitted(dispatcher := dispatcher_of(table, clock), *queries))
    outputs = serving.outputs_for(3)
    outputs.probabilities[1, 4] = value
    dispatcher.settle(batch, outputs)
    assert [slot_of(query).answer is None for query in queries] == [False, True, False]
    assert isinstance(slot_of(queries[1]).error, BatchFailed)
    assert (dispatcher.idle_workers, outcomes(dispatcher)) == (1, {"failed": 1})


def gone(query: Query) -> Query:
    """The client went away; the dispatcher is to hear of it in the next turn of the event loop."""
    slot_of(query).gone = True
    return query


def test_a_query_cancelled_while_queued_frees_its_place(table: ProfileTable) -> None:
    clock = Clock()
    query, other = make_query(clock), make_query(clock)
    dispatcher = submitted(dispatcher_of(table, clock, max_queue=2), query, other)
    dispatcher.cancel(gone(query))
    assert len(dispatcher.heap) == 1
    dispatcher.submit(make_query(clock))
    assert outcomes(dispatcher) == {"cancelled": 1}


def test_a_query_cancelled_while_running_is_not_answered(table: ProfileTable) -> None:
    clock = Clock()
    query, other = make_query(clock), make_query(clock)
    batch = running(submitted(dispatcher := dispatcher_of(table, clock), query, other))
    dispatcher.cancel(gone(query))
    dispatcher.settle(batch, serving.outputs_for(2))
    assert slot_of(other).answer is not None
    assert (outcomes(dispatcher), dispatcher.idle_workers) == ({"cancelled": 1}, 1)


def test_a_client_that_leaves_just_before_its_query_expires_hurts_no_other(table: ProfileTable) -> None:
    clock = Clock()
    left, other = make_query(clock, 10), make_query(clock, 10)
    dispatcher = submitted(dispatcher_of(table, clock), left, other)
    clock.now_s += 1
    gone(left)
    dispatcher.expire()
    dispatcher.cancel(left)
    assert isinstance(slot_of(other).error, DeadlineExceeded)
    assert outcomes(dispatcher) == {"expired": 1, "cancelled": 1}


def test_a_client_that_leaves_just_after_its_query_expired_is_counted_once(table: ProfileTable) -> None:
    clock = Clock()
    query = make_query(clock, 10)
    dispatcher = submitted(dispatcher_of(table, clock), query)
    clock.now_s += 1
    dispatcher.expire()
    dispatcher.cancel(query)
    assert outcomes(dispatcher) == {"expired": 1}


def test_abandon_answers_all_that_wait(table: ProfileTable) -> None:
    clock = Clock()
    queries = [make_query(clock) for _ in range(3)]
    dispatcher = submitted(dispatcher_of(table, clock), *queries)
    dispatcher.abandon()
    assert all(isinstance(slot_of(query).error, NotReady) for query in queries)
    assert (len(dispatcher.heap), outcomes(dispatcher)) == (0, {"failed": 3})


class World:
    """A dispatcher with its clients and workers, for random interleavings."""

    def __init__(self, table: ProfileTable, policy: str, workers: int) -> None:
        self.clock = Clock()
        self.workers = workers
        self.table = table
        self.dispatcher = dispatcher_of(table, self.clock, policy, workers, max_queue=12)
        self.rejected = 0
        self.clients: list[Query] = []  # those that have not resumed yet
        self.leaving: list[Query] = []  # of which the dispatcher has not heard
        self.batches: list[Batch] = []

    def submit(self, number: int) -> None:
        floor = self.table.entries[number % len(self.table.entries)].accuracy if number % 3 == 0 else 0.0
        query = make_query(self.clock, slo_ms=(1, 5, 20, 36, 300)[number % 5], min_accuracy=floor, priority=number % 2)
        try:
            self.dispatcher.submit(query)
            self.clients.append(query)
        except ServeError:
            self.rejected += 1

    def advance(self, number: int) -> None:
        self.clock.now_s += number / 2000

    def leave(self, number: int) -> None:
        if self.clients:
            query = self.clients.pop(number % len(self.clients))
            slot_of(query).gone = True
            self.leaving.append(query)

    def cancel(self, number: int) -> None:
        if self.leaving:
            self.dispatcher.cancel(self.leaving.pop(0))

    def resume(self, number: int) -> None:
        """All clients that were answered go on."""
        for query in [query for query in self.clients if slot_of(query).done()]:
            self.clients.remove(query)
            if (answer := slot_of(query).answer) is not None:
                self.dispatcher.deliver(query, answer)

    def expire(self, number: int) -> None:
        self.dispatcher.expire()
        late = [query for query in self.clients if query.waiting and query.deadline_s <= self.clock()]
        assert not late

    def dispatch(self, number: int) -> None:
        batch = self.dispatcher.next_batch()
        if batch is not None:
            self.batches.append(batch)
            assert 1 <= len(batch.queries) <= self.table.max_batch
            assert all(query.min_accuracy <= batch.entry.accuracy for query in batch.queries)
            assert not any(query.waiting for query in batch.queries)
        assert len(self.batches) <= self.workers

    def settle(self, number: int) -> None:
        if self.batches:
            batch = self.batches.pop(number % len(self.batches))
            outputs = serving.outputs_for(len(batch.queries), self.clock())
            if number % 4 == 0:
                outputs.probabilities[0, 0] = math.nan
            self.dispatcher.settle(batch, outputs)

    def mismatch(self, number: int) -> None:
        if self.batches:
            batch = self.batches.pop(number % len(self.batches))
            with pytest.raises(BatchFailed):
                self.dispatcher.settle(batch, serving.outputs_for(len(batch.queries) + 1))
            self.dispatcher.fail(batch, "mismatch")

    def correct(self, number: int) -> None:
        """An entry is found to be slow, or not to be."""
        name = self.table.entries[number % len(self.table.entries)].name
        slow_down(self.dispatcher, self.clock(), name, 1 + number / 20)
        self.dispatcher._corrected_s = -math.inf
        self.dispatcher.correct_table()

    def check(self) -> None:
        assert self.dispatcher.idle_workers == self.workers - len(self.batches)

    def finish(self) -> None:
        while self.leaving:
            self.cancel(0)
        while self.batches:
            self.settle(1)
        self.clock.now_s += 1000
        self.expire(0)
        assert all(slot_of(query).done() for query in self.clients), "a query was never answered"
        self.resume(0)


STEPS = tuple(name for name in vars(World) if not name.startswith("_") and name not in ("check", "finish"))


@given(
    st.sampled_from(POLICIES),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from((*STEPS, "submit", "submit", "dispatch")), st.integers(0, 60)), max_size=80),
)
def test_every_query_is_answered_exactly_once(
    table: ProfileTable, policy: str, workers: int, steps: list[tuple[str, int]]
) -> None:
    world = World(table, policy, workers)
    for name, number in steps:
        getattr(world, name)(number)
        world.check()
    world.finish()
    counters = world.dispatcher.counters
    assert sum(outcomes(world.dispatcher).values()) == counters["arrivals"]
    assert counters["queue_full"] + counters["infeasible"] == world.rejected
    assert (len(world.dispatcher.heap), world.dispatcher.idle_workers) == (0, workers)


# -------------------------------------------------------------------------------------------- the server without HTTP


@pytest.fixture
async def tidy() -> AsyncIterator[None]:
    """Fails a test that leaves tasks or futures with exceptions that nobody looked at."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    gc.freeze()  # so that the collection below has little to look at
    yield
    gc.collect()
    gc.unfreeze()
    assert not complaints


def total(serve: SuperServe) -> dict[str, int]:
    """Outcomes, checked to sum to the arrivals."""
    assert serve.dispatcher is not None
    found = outcomes(serve.dispatcher)
    assert sum(found.values()) == serve.dispatcher.counters["arrivals"]
    return found


async def turns(count: int = 5) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


INPUTS = {
    "encoded": serving.image_file("JPEG"),
    "pixels": serving.image_array(1),
    "planes": np.random.default_rng(1).standard_normal((3, 8, 8)).astype(np.float32),
}


@pytest.mark.parametrize("kind", INPUTS)
async def test_infer_answers_all_kinds_of_inputs(profile: Path, kind: str) -> None:
    async with SuperServe(config_of(profile)) as serve:
        reply = await serve.infer(INPUTS[kind], slo_ms=PATIENT_MS)
        assert total(serve) == {"in_time": 1}
    assert (reply.subnet, reply.accuracy, reply.batch_size, reply.slo_s) == (LARGE, LARGE_ACCURACY, 1, 30.0)
    assert reply.deadline_met
    assert 0 < reply.queue_s < reply.latency_s < 30
    (best,) = reply.predictions
    assert serving.CLASSES[best.index] == best.label
    assert 0.2 <= best.probability <= 1


async def test_the_answer_is_the_actuated_subnet_s(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        reply = await serve.infer(INPUTS["pixels"], top_k=5)
        outputs = await serve.engine.run(LARGE, [INPUTS["pixels"]])  # type: ignore[list-item]
    probabilities = [each.probability for each in reply.predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    for each in reply.predictions:
        assert each.probability == pytest.approx(float(outputs.probabilities[0, each.index]), abs=1e-5)


async def test_a_path_and_settings_make_a_server_too(profile: Path) -> None:
    serve = SuperServe(str(profile), device="cpu", threads=1, policy="fixed:smallest", default_slo_ms=PATIENT_MS)
    async with serve:
        assert (await serve.infer(INPUTS["pixels"])).subnet == SMALL


async def test_a_floor_is_honoured(profile: Path) -> None:
    async with SuperServe(config_of(profile, policy="slackfit")) as serve:
        fake_engine(serve)
        tight = await serve.infer(INPUTS["pixels"], slo_ms=PATIENT_MS, min_accuracy=0.8)
        assert tight.accuracy == LARGE_ACCURACY


@pytest.mark.parametrize(
    ("image", "settings", "error"),
    [
        (b"", {}, BadRequest),
        (b"no image", {}, BadRequest),
        (b"no image" * 10_000, {}, BadRequest),
        (np.zeros((3, 8, 8), np.uint8), {}, BadRequest),
        (np.zeros((8, 8, 3), np.float32), {}, BadRequest),
        (np.full((3, 8, 8), np.nan, np.float32), {}, BadRequest),
        ([[1, 2], [3, 4]], {}, BadRequest),
        (INPUTS["pixels"], {"slo_ms": 0}, BadRequest),
        (INPUTS["pixels"], {"slo_ms": math.nan}, BadRequest),
        (INPUTS["pixels"], {"min_accuracy": 0.95}, BadRequest),
        (INPUTS["pixels"], {"top_k": 6}, BadRequest),
        (INPUTS["pixels"], {"slo_ms": 0.001}, DeadlineExceeded),
        (serving.image_file("PNG", (400, 300)), {}, TooLarge),
    ],
)
async def test_infer_refuses_what_cannot_be(profile: Path, image: Any, settings: Any, error: type[ServeError]) -> None:
    async with SuperServe(config_of(profile, max_pixels=100_000)) as serve:
        with pytest.raises(error):
            await serve.infer(image, **settings)
        assert (await serve.infer(INPUTS["pixels"])).deadline_met


async def test_a_small_file_with_a_large_image_is_decoded_beside_the_event_loop(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        assert len(body := serving.image_file("PNG", (1000, 1000))) < INLINE_BODY_BYTES
        assert (await serve.infer(body)).deadline_met


async def test_queries_that_arrive_together_run_together(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve)
    async with serve:
        replies = await asyncio.gather(*(serve.infer(serving.image_array(i)) for i in range(10)))
        assert engine.batches == [(LARGE, 10)]
        assert {reply.batch_size for reply in replies} == {10}
        assert total(serve) == {"in_time": 10}


@pytest.mark.usefixtures("tidy")
async def test_queries_that_arrive_while_all_workers_run_form_the_next_batch(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve, gate=asyncio.Event())
    async with serve:
        first = asyncio.create_task(serve.infer(INPUTS["pixels"]))
        await turns()
        others = [asyncio.create_task(serve.infer(INPUTS["pixels"])) for _ in range(20)]
        await turns()
        assert engine.batches == [(LARGE, 1)]
        engine.gate.set()  # type: ignore[union-attr]
        await asyncio.gather(first, *others)
    assert [size for _, size in engine.batches] == [1, 16, 4]


@pytest.mark.usefixtures("tidy")
async def test_the_next_batch_starts_before_the_answers_to_the_last_are_given(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve)
    order: list[str] = []
    running: list[asyncio.Future[Outputs]] = []

    def run(*_: object) -> asyncio.Future[Outputs]:
        order.append("started")
        running.append(asyncio.get_running_loop().create_future())
        return running[-1]

    monkeypatch.setattr(engine, "run", run)
    async with serve:
        queries = [asyncio.create_task(serve.infer(INPUTS["pixels"]))]
        await turns()
        queries.append(asyncio.create_task(serve.infer(INPUTS["pixels"])))
        await turns()
        queries[0].add_done_callback(lambda _: order.append("answered"))
        running[0].set_result(serving.outputs_for(1, serve.clock()))
        await queries[0]
        assert order == ["started", "started", "answered"]
        running[1].set_result(serving.outputs_for(1, serve.clock()))
        await queries[1]


@pytest.mark.usefixtures("tidy")
async def test_a_batch_that_fails_takes_no_other_with_it(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve, failure=RuntimeError("the device is on fire, with a secret"))
    async with serve:
        failed = await asyncio.gather(*(serve.infer(INPUTS["pixels"]) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in failed] == [BatchFailed] * 3
        assert "secret" not in str(failed[0])
        engine.failure, engine.rows = None, np.ones((2, 5), np.float32)
        with pytest.raises(BatchFailed):
            await serve.infer(INPUTS["pixels"])
        engine.rows = np.ones(1, np.float32)
        with pytest.raises(BatchFailed):
            await serve.infer(INPUTS["pixels"])
        engine.rows = None
        assert (await serve.infer(INPUTS["pixels"])).deadline_met
        assert serve.dispatcher is not None
        assert serve.dispatcher.idle_workers == 1
        assert total(serve) == {"failed": 5, "in_time": 1}


async def test_a_failed_batch_is_logged_with_its_cause(profile: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve = SuperServe(config_of(profile))
    fake_engine(serve, failure=RuntimeError("on fire"))
    async with serve:
        with pytest.raises(BatchFailed):
            await serve.infer(INPUTS["pixels"])
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.getMessage() == "batch failed"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "on fire"


@pytest.mark.usefixtures("tidy")
async def test_a_cancelled_task_frees_its_place_in_the_queue(profile: Path) -> None:
    serve = SuperServe(config_of(profile, max_queue=1))
    engine = fake_engine(serve, gate=asyncio.Event())
    async with serve:
        first = asyncio.create_task(serve.infer(INPUTS["pixels"]))
        await turns()
        second = asyncio.create_task(serve.infer(INPUTS["pixels"]))
        await turns()
        with pytest.raises(QueueFull):
            await serve.infer(INPUTS["pixels"])
        second.cancel()
        await turns()
        third = asyncio.create_task(serve.infer(INPUTS["pixels"]))
        await turns()
        first.cancel()  # while it runs
        await turns()
        engine.gate.set()  # type: ignore[union-attr]
        assert (await third).deadline_met
        assert total(serve) == {"queue_full": 1, "cancelled": 2, "in_time": 1}


@pytest.mark.usefixtures("tidy")
async def test_a_query_cancelled_before_its_first_pump_hurts_no_other(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    fake_engine(serve)
    async with serve:
        left, other = (asyncio.create_task(serve.infer(INPUTS["pixels"])) for _ in range(2))
        await asyncio.sleep(0)
        left.cancel()
        assert (await other).deadline_met
        await asyncio.wait((left,))
        assert total(serve) == {"cancelled": 1, "in_time": 1}


@pytest.mark.usefixtures("tidy")
async def test_a_waiting_query_is_answered_at_its_deadline_though_no_worker_is_free(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve, gate=asyncio.Event())
    async with serve:
        running = asyncio.create_task(serve.infer(INPUTS["pixels"]))
        await turns()
        started_s = serve.clock()
        waiting = [asyncio.create_task(serve.infer(INPUTS["pixels"], slo_ms=slo_ms)) for slo_ms in (90, 30, 60)]
        ended_s = {}
        for task, slo_s in zip(waiting, (0.09, 0.03, 0.06), strict=True):
            task.add_done_callback(lambda _, slo_s=slo_s: ended_s.update({slo_s: serve.clock() - started_s}))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [DeadlineExceeded] * 3
        assert list(ended_s) == [0.03, 0.06, 0.09]
        # Never early; how late depends on what else this machine does.
        assert all(0 <= ended - slo_s < 0.3 for slo_s, ended in ended_s.items())
        engine.gate.set()  # type: ignore[union-attr]
        assert (await running).deadline_met
        assert total(serve) == {"expired": 3, "in_time": 1}


async def test_an_answer_after_the_deadline_says_so(profile: Path) -> None:
    clock = Clock()
    serve = SuperServe(config_of(profile), clock)
    engine = fake_engine(serve, gate=asyncio.Event())
    async with serve:
        task = asyncio.create_task(serve.infer(INPUTS["pixels"], slo_ms=20))
        await turns()
        clock.now_s += 0.021
        engine.gate.set()  # type: ignore[union-attr]
        reply = await task
        assert not reply.deadline_met
        assert reply.latency_s == pytest.approx(0.021)
        assert total(serve) == {"late": 1}


@pytest.mark.usefixtures("tidy")
async def test_queries_that_wait_and_run_while_the_table_is_corrected_are_answered(
    profile: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    serve = SuperServe(config_of(profile), clock)
    engine = fake_engine(serve, gate=asyncio.Event())
    caplog.set_level(logging.INFO, "superserve")
    async with serve:
        tasks = [asyncio.create_task(serve.infer(INPUTS["pixels"])) for _ in range(20)]
        await turns()
        assert serve.dispatcher is not None
        slow_down(serve.dispatcher, clock(), LARGE, 2.0)
        clock.now_s += 1
        tasks.append(asyncio.create_task(serve.infer(INPUTS["pixels"])))
        await turns()
        assert serve.dispatcher.table.most_accurate.latency_s[1] > 1.5 * serving.LATENCY_S[LARGE]
        document: Any = serve.profile_document()
        engine.gate.set()  # type: ignore[union-attr]
        assert all(reply.deadline_met for reply in await asyncio.gather(*tasks))
        assert total(serve) == {"in_time": 21}
    small, large = document["entries"]
    assert (small["correction"], document["slowdown"]) == (1, 1)
    assert 1.5 < large["correction"] <= 2
    assert large["latency_ms"][0] == pytest.approx(1e3 * serving.LATENCY_S[LARGE] * 1.1)
    assert "table corrected" in caplog.messages


@pytest.mark.usefixtures("tidy")
async def test_close_answers_what_is_queued_and_then_nothing_more(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    engine = fake_engine(serve, gate=asyncio.Event())
    await serve.start()
    tasks = [asyncio.create_task(serve.infer(INPUTS["pixels"])) for _ in range(40)]
    await turns()
    closing = asyncio.create_task(serve.close())
    await turns()
    with pytest.raises(NotReady, match="draining"):
        await serve.infer(INPUTS["pixels"])
    assert (closing.done(), engine.closed) == (False, False)
    engine.gate.set()  # type: ignore[union-attr]
    await closing
    assert engine.closed
    assert [reply.deadline_met for reply in await asyncio.gather(*tasks)] == [True] * 40
    with pytest.raises(NotReady):
        await serve.infer(INPUTS["pixels"])
    await serve.close()


@pytest.mark.usefixtures("tidy")
async def test_close_answers_queries_of_the_same_turn_of_the_event_loop(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    fake_engine(serve)
    await serve.start()
    tasks = [asyncio.create_task(serve.infer(INPUTS["pixels"])) for _ in range(3)]
    await asyncio.sleep(0)
    await serve.close()
    assert [reply.deadline_met for reply in await asyncio.gather(*tasks)] == [True] * 3


@pytest.mark.usefixtures("tidy")
async def test_what_cannot_be_drained_in_time_is_answered_too(profile: Path) -> None:
    serve = SuperServe(config_of(profile, drain_timeout_s=0.02))
    engine = fake_engine(serve, gate=asyncio.Event())
    await serve.start()
    running = asyncio.create_task(serve.infer(INPUTS["pixels"]))
    await turns()
    waiting = asyncio.create_task(serve.infer(INPUTS["pixels"]))
    await turns()
    await serve.close()
    with pytest.raises(NotReady, match="stopping"):
        await waiting
    engine.gate.set()  # type: ignore[union-attr]
    assert (await running).deadline_met
    assert total(serve) == {"failed": 1, "in_time": 1}


@pytest.mark.usefixtures("tidy")
async def test_close_ends_a_start_that_is_under_way(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    starting = serve.start_soon()
    await asyncio.sleep(0)
    await serve.close()
    assert starting.cancelled() or starting.done()
    with pytest.raises(NotReady):
        serve.limits()


async def test_before_the_start_nothing_is_accepted(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    with pytest.raises(NotReady, match="starting"):
        await serve.infer(INPUTS["pixels"])
    await serve.close()


@pytest.mark.usefixtures("tidy")
async def test_a_start_that_failed_is_told(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    fake_engine(serve).warm_up = broken_warm_up  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        await serve.start_soon()
    with pytest.raises(NotReady, match="the start failed"):
        serve.limits()
    await serve.close()


async def broken_warm_up(*_: object) -> None:
    raise EngineError("out of memory")


@pytest.mark.usefixtures("tidy")
async def test_many_queries_at_random_are_each_answered_once(profile: Path) -> None:
    rng = np.random.default_rng(0)
    serve = SuperServe(config_of(profile, max_queue=40, workers=1))
    fake_engine(serve)

    async def client(number: int) -> str:
        await turns(int(rng.integers(0, 30)))
        task = asyncio.create_task(serve.infer(INPUTS["pixels"], slo_ms=float(rng.choice([0.5, 20, PATIENT_MS]))))
        await turns(int(rng.integers(0, 8)))
        if number % 5 == 0:
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, Reply | ServeError | asyncio.CancelledError)
        return type(result).__name__

    async with serve:
        ends = await asyncio.gather(*(client(number) for number in range(150)))
        assert serve.dispatcher is not None
        # A cancelled task may not have arrived, and one that was refused in the same turn is counted as refused.
        assert 150 - ends.count("CancelledError") <= serve.dispatcher.counters["arrivals"] <= 150
        found = total(serve)
        assert found.get("in_time", 0) + found.get("late", 0) == ends.count("Reply")
        assert serve.dispatcher.idle_workers == 1


# ---------------------------------------------------------------------------------------------------------- the profile


@pytest.fixture
def own(profile: Path, tmp_path: Path) -> Path:
    """A copy of the profile, to be changed."""
    return Path(shutil.copytree(profile, tmp_path / "own"))


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def table_of(folder: Path) -> Path:
    (path,) = folder.glob("latency-*.json")
    return path


def test_a_damaged_latency_table_is_refused_by_file_and_field(own: Path) -> None:
    path = table_of(own)
    rewrite(path, lambda document: document["latencies"][SMALL]["p99_ms"].__setitem__(0, math.nan))
    with pytest.raises(ProfileError, match=rf"{path.name}: latencies\.{SMALL}\.p99_ms"):
        SuperServe(config_of(own))


def test_a_choice_without_statistics_is_refused_by_file_and_name(own: Path) -> None:
    rewrite(own / "choices.json", lambda document: document["choices"][0].update(name="d1-1-1-e1"))
    with pytest.raises(ProfileError, match=r"choices\.json: d1-1-1-e1 has no statistics"):
        SuperServe(config_of(own))


def test_a_profile_that_is_not_there_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(SupernetError, match=r"supernet\.json"):
        SuperServe(config_of(tmp_path / "nowhere"))


def test_an_unknown_policy_is_refused_before_anything_runs(profile: Path) -> None:
    with pytest.raises(slackfit.PolicyError, match="no policy 'random'"):
        SuperServe(config_of(profile, policy="random"))


def test_an_unknown_device_is_refused(profile: Path) -> None:
    with pytest.raises(EngineError, match="unknown device 'tpu'"):
        SuperServe(config_of(profile, device="tpu"))


@pytest.mark.parametrize("other", ["missing", "another torch"])
def test_without_a_table_for_this_device_no_autoprofile_means_an_error(own: Path, other: str) -> None:
    if other == "missing":
        table_of(own).unlink()
    else:
        rewrite(table_of(own), lambda document: document["device"].update(torch="0.1"))
    with pytest.raises(ProfileError, match=r"latency-cpu.*\.json: .*start without --no-autoprofile"):
        SuperServe(config_of(own, autoprofile=False))


@pytest.mark.parametrize("other", ["missing", "another torch"])
async def test_a_server_without_a_table_measures_and_stores_one(
    own: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table_of(own)
    if other == "missing":
        path.unlink()
    else:
        rewrite(path, lambda document: document["device"].update(torch="0.1"))
    measure = startup.profile_latencies
    monkeypatch.setattr(startup, "profile_latencies", lambda engine, names, rounds: measure(engine, names, rounds=1))
    monkeypatch.setattr(startup, "PROFILED_BATCH_SIZES", (1, 4))
    async with SuperServe(config_of(own)) as serve:
        assert (await serve.infer(INPUTS["pixels"])).deadline_met
        document = serve.profile_document()
    assert document["batch_sizes"] == [1, 4]
    assert document["device"] == dataclasses.asdict(serve.engine.facts)
    assert json.loads(path.read_text())["device"] == document["device"]
    SuperServe(config_of(own, autoprofile=False))
