"""What the statistics count, from a dispatcher that serves, refuses and loses queries."""

import pytest
from serving import LARGE, Clock, make_query, outputs_for, two_entries

import slackfit
from dispatcher import Dispatcher
from web.errors import QueueFull
from web.statistics import Statistics


def dispatcher_with(clock: Clock, statistics: Statistics) -> Dispatcher:
    table = two_entries()
    policy = slackfit.make_policy("fixed:largest", table, 1)
    dispatcher = Dispatcher(table, policy, clock, workers=1, max_queue=2)
    dispatcher.observers.append(statistics)
    return dispatcher


def counts(statistics: Statistics) -> dict[str, tuple[int, int]]:
    stats = statistics.document("tiny", "1")["inference_stats"]
    return {name: (each["count"], each["ns"]) for name, each in stats.items()}


def test_a_batch_is_told_in_all_its_times() -> None:
    clock, statistics = Clock(10.0), Statistics(wall_clock=lambda: 1_700_000_000.5)
    dispatcher = dispatcher_with(clock, statistics)
    queries = [make_query(clock) for _ in range(2)]
    for query in queries:
        dispatcher.submit(query)
    clock.now_s = 10.25
    batch = dispatcher.next_batch()
    assert batch is not None
    assert batch.entry.name == LARGE
    clock.now_s = 10.5
    dispatcher.settle(batch, outputs_for(2, clock()))
    clock.now_s = 10.625
    for query in queries:
        dispatcher.deliver(query, query.reply.answer)  # type: ignore[attr-defined]
    document = statistics.document("tiny", "1")
    assert (document["name"], document["version"]) == ("tiny", "1")
    assert (document["inference_count"], document["execution_count"]) == (2, 1)
    assert document["last_inference"] == 1_700_000_000_500
    assert counts(statistics) == {
        "success": (2, 1_250_000_000),
        "fail": (0, 0),
        "queue": (2, 500_000_000),
        "compute_input": (2, 0),
        "compute_infer": (2, 500_000_000),
        "compute_output": (2, 250_000_000),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    (sizes,) = document["batch_stats"]
    assert (sizes["batch_size"], sizes["compute_infer"]) == (2, {"count": 1, "ns": 250_000_000})


def test_what_is_refused_fails_and_what_is_cancelled_is_left_out() -> None:
    clock, statistics = Clock(10.0), Statistics()
    dispatcher = dispatcher_with(clock, statistics)
    queries = [make_query(clock) for _ in range(3)]
    dispatcher.submit(queries[0])
    dispatcher.submit(queries[1])
    with pytest.raises(QueueFull):
        dispatcher.submit(queries[2])
    dispatcher.cancel(queries[0])
    clock.now_s = 12.0
    dispatcher.expire()
    assert counts(statistics)["fail"] == (2, 2_000_000_000)
    assert counts(statistics)["success"] == (0, 0)
    assert statistics.document("tiny", "1")["last_inference"] == 0
