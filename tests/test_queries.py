"""The heap gives up the most urgent query first, whatever comes and leaves in whatever order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Clock, make_query

from queries import DeadlineHeap, Query


def heap_of(*queries: Query) -> DeadlineHeap:
    heap = DeadlineHeap()
    for query in queries:
        heap.push(query)
    return heap


def drained(heap: DeadlineHeap) -> list[Query]:
    return [heap.pop() for _ in range(len(heap))]


def test_heap_orders_by_deadline_not_by_arrival() -> None:
    clock = Clock()
    late, soon, middle = (make_query(clock, slo_ms) for slo_ms in (300, 100, 200))
    assert drained(heap_of(late, soon, middle)) == [soon, middle, late]


def test_ties_go_to_the_higher_priority_and_then_to_the_earlier_arrival() -> None:
    clock = Clock()
    queries = [make_query(clock, priority=priority) for priority in (0, 100, 0, 100, 1)]
    first, urgent, second, urgent_too, raised = queries
    assert drained(heap_of(*queries)) == [urgent, urgent_too, raised, first, second]


def test_an_empty_heap_has_no_head() -> None:
    query = make_query(Clock())
    heap = heap_of(query)
    heap.discard(query)
    with pytest.raises(IndexError):
        _ = heap.head


def test_a_query_is_discarded_once() -> None:
    query = make_query(Clock())
    heap = heap_of(query)
    assert [heap.discard(query), heap.discard(query), len(heap)] == [True, False, 0]


def test_a_popped_query_cannot_be_discarded() -> None:
    heap = heap_of(make_query(Clock()))
    assert not heap.discard(heap.pop())


def test_discarded_queries_do_not_pile_up() -> None:
    clock = Clock()
    heap = heap_of(*(make_query(clock, 10_000 + i) for i in range(5)))
    for _ in range(3000):
        query = make_query(clock, 20_000)
        heap.push(query)
        heap.discard(query)
    assert len(heap) == 5
    assert len(heap._entries) < 50


OPERATIONS = st.tuples(st.sampled_from(["push", "push", "discard", "pop", "pop_first", "look"]), st.integers(0, 9))


@given(st.lists(OPERATIONS, max_size=60))
def test_the_heap_agrees_with_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    clock, heap = Clock(0), DeadlineHeap()
    model: list[tuple[float, int, int, Query]] = []
    numbers = itertools.count()
    for operation, value in operations:
        if operation == "push":
            query = make_query(clock, slo_ms=1000 + value // 2, priority=value % 3)
            heap.push(query)
            model.append((query.deadline_s, -query.priority, next(numbers), query))
            model.sort(key=lambda item: item[:3])
        elif operation == "discard" and model:
            assert heap.discard(model.pop(value % len(model))[3])
        elif operation == "pop" and model:
            assert heap.pop() is model.pop(0)[3]
        elif operation == "pop_first":
            first, model = [item[3] for item in model[:value]], model[value:]
            assert heap.first(value) == first
            assert heap.pop_first(value) == first
            assert not any(query.waiting for query in first)
        elif operation == "look":
            assert list(heap.deadlines_s) == [item[0] for item in model]
        assert len(heap) == len(model)
        assert heap.nbytes == sum(item[3].input.nbytes for item in model)
        if model:
            assert heap.head is model[0][3]
            assert heap.head_deadline_s == model[0][0]
    assert drained(heap) == [item[3] for item in model]
