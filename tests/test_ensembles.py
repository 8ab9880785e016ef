"""Members' answers are combined as defined, whatever runs them, and members that fail are left out."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ensembles import (
    Catalogue,
    EnsembleNetwork,
    Group,
    StreamGroup,
    Task,
    ThreadGroup,
    combine,
    forced,
    one_after_another,
)
from profiletable import Ensemble

CPU = torch.device("cpu")
CLASSES = 4


def ensemble(count: int, combination: str = "mean", weights: Sequence[float] = ()) -> Ensemble:
    return Ensemble(
        members=tuple(f"m{index}" for index in range(count)),
        combination=combination,
        weights=tuple(weights) or (1 / count,) * count,
    )


def logits_of(seed: int) -> Callable[[Tensor], Tensor]:
    """A network of random weights."""
    weight = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(seed))
    return lambda x: x @ weight


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def network(
    networks: Sequence[Callable[[Tensor], Tensor]], combined: Ensemble | None = None, group: Group = one_after_another
) -> EnsembleNetwork:
    return EnsembleNetwork(combined or ensemble(len(networks)), networks, group, CPU)


def close(found: Tensor, expected: Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def threads() -> Iterator[ThreadGroup]:
    group = ThreadGroup(2, 1)
    yield group
    group.close(1)


# ---------------------------------------------------------------------------------------------------------- combination


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["mean", "vote"]))
def test_the_combination_is_the_weighted_mean_or_vote_computed_in_plain_python(
    members: int, rows: int, seed: int, combination: str
) -> None:
    rng = np.random.default_rng(seed)
    probabilities, weights = rng.dirichlet(np.ones(CLASSES), (members, rows)), rng.dirichlet(np.ones(members))
    expected = np.zeros((rows, CLASSES))
    for member in range(members):
        for row in range(rows):
            one = probabilities[member, row]
            scores = one if combination == "mean" else np.eye(CLASSES)[one.argmax()]
            expected[row] += weights[member] * scores
    found, left_out = combine(torch.tensor(probabilities), torch.tensor(weights).view(-1, 1, 1), combination)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert left_out.tolist() == [False] * members


@pytest.mark.parametrize("combination", ["mean", "vote"])
def test_the_softmax_after_it_gives_the_combination_back(combination: str) -> None:
    members, x = [logits_of(1), logits_of(2), logits_of(3)], batch(50)
    weighted = ensemble(3, combination, (0.5, 0.2, 0.3))
    rows = [each(x).softmax(1) for each in members]
    if combination == "vote":
        rows = [torch.nn.functional.one_hot(each.argmax(1), CLASSES).float() for each in rows]
    expected = torch.stack([weight * each for weight, each in zip(weighted.weights, rows, strict=True)]).sum(0)
    close(network(members, weighted)(x).softmax(1), expected)


def test_an_ensemble_of_equal_members_gives_what_one_gives() -> None:
    x = batch(9)
    for combination in ("mean", "vote"):
        both = network([logits_of(1), logits_of(1)], ensemble(2, combination))(x).softmax(1)
        alone = logits_of(1)(x).softmax(1)
        assert (both.argmax(1) == alone.argmax(1)).all()
        if combination == "mean":
            close(both, alone)


# --------------------------------------------------------------------------------------------------------------- faults


def broken(x: Tensor) -> Tensor:
    raise LookupError("broken")


def nowhere_finite(x: Tensor) -> Tensor:
    return torch.full((len(x), CLASSES), torch.nan)


def not_finite_in(rows: Sequence[int], seed: int = 1) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        logits = logits_of(seed)(x)
        logits[list(rows), 0] = torch.inf
        return logits

    return compute


def too_many(x: Tensor) -> Tensor:
    return torch.zeros(len(x) + 1, CLASSES)


@pytest.mark.parametrize("fault", [broken, nowhere_finite, too_many])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_others_answer_for_a_member_that_fails(
    fault: Callable[[Tensor], Tensor], parallel: bool, place: int, threads: ThreadGroup
) -> None:
    members, weights, x = [logits_of(seed) for seed in range(3)], [0.5, 0.2, 0.3], batch(6)
    left = [index for index in range(3) if index != place]
    members[place] = fault
    group: Group = threads if parallel else one_after_another
    degraded = network(members, ensemble(3, weights=weights), group)
    expected = torch.stack([weights[index] * members[index](x).softmax(1) for index in left]).sum(0)
    close(degraded(x).softmax(1), expected / (1 - weights[place]))
    assert degraded.take_failed() == (f"m{place}",)


def test_a_member_is_left_out_of_the_rows_only_in_which_it_is_not_finite() -> None:
    x = batch(4)
    degraded = network([not_finite_in([1, 3]), logits_of(2)])
    found, first, second = degraded(x).softmax(1), logits_of(1)(x).softmax(1), logits_of(2)(x).softmax(1)
    close(found[[1, 3]], second[[1, 3]])
    close(found[[0, 2]], (first + second)[[0, 2]] / 2)
    assert degraded.take_failed() == ("m0",)


def test_a_row_for_which_no_member_is_finite_is_not_finite_and_no_member_s_fault() -> None:
    alike = network([not_finite_in([2], seed=1), not_finite_in([2], seed=2)])
    found = alike(batch(4)).softmax(1)
    assert found.isnan().any(1).tolist() == [False, False, True, False]
    assert alike.take_failed() == ()


def test_a_member_without_weight_answers_where_it_is_the_only_one_left() -> None:
    x = batch(3)
    found = network([broken, logits_of(1)], ensemble(2, weights=(1.0, 0.0)))(x).softmax(1)
    close(found, logits_of(1)(x).softmax(1))


def test_who_failed_is_told_once_for_all_parts_of_a_batch() -> None:
    degraded = network([not_finite_in([0]), logits_of(2)])
    for part in (batch(3), batch(2), batch(1)):
        degraded(part)
    assert degraded.take_failed() == ("m0",)
    assert degraded.take_failed() == ()


@pytest.mark.parametrize("parallel", [False, True])
def test_if_all_fail_the_first_error_is_raised(parallel: bool, threads: ThreadGroup) -> None:
    failing = network([broken, too_many], group=threads if parallel else one_after_another)
    with pytest.raises(LookupError, match="broken"):
        failing(batch(2))


OF_DEVICE = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
]


@pytest.mark.parametrize("error", OF_DEVICE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_concerns_the_device_is_no_member_s_failure(
    error: Exception, place: int, parallel: bool, threads: ThreadGroup
) -> None:
    def fails(x: Tensor) -> Tensor:
        raise error

    members = [logits_of(1), logits_of(2)]
    members[place] = fails
    with pytest.raises(type(error)):
        network(members, group=threads if parallel else one_after_another)(batch(2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), LookupError()])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_batch_that_failed_holds_no_memory(error: Exception, parallel: bool, threads: ThreadGroup) -> None:
    tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def fails(x: Tensor) -> Tensor:
        large = x.clone()
        tensors.add(large)
        raise type(error)(*error.args)

    gc.disable()
    logging.disable()  # pytest keeps what is logged, tracebacks too
    try:
        with contextlib.suppress(RuntimeError, LookupError):
            network([fails, fails], group=threads if parallel else one_after_another)(batch(2))
        assert not tensors
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


# -------------------------------------------------------------------------------------------------------------- threads


def test_members_run_at_the_same_time_on_different_threads(threads: ThreadGroup) -> None:
    meeting, met = threading.Barrier(3, timeout=30), []

    def waits(x: Tensor) -> Tensor:
        meeting.wait()
        met.append((threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return logits_of(1)(x)

    found = network([waits] * 3, group=threads)(batch(2))
    assert len({ident for ident, _, _ in met}) == 3
    assert threading.get_ident() in {ident for ident, _, _ in met}
    assert {inference for _, _, inference in met} == {True}
    close(found.softmax(1), logits_of(1)(batch(2)).softmax(1))


@given(st.integers(1, 8), st.integers(0, 3))
def test_every_task_is_done_once_and_in_its_place_however_few_threads_there_are(count: int, size: int) -> None:
    done: list[int] = []

    def task(index: int) -> Tensor:
        done.append(index)
        return torch.tensor(index)

    group = ThreadGroup(size, 1)
    tasks: list[Task] = [lambda index=index: task(index) for index in range(count)]  # type: ignore[misc]
    assert [int(each) for each in group(tasks)] == list(range(count))  # type: ignore[arg-type]
    assert sorted(done) == list(range(count))
    group.close(1)


def test_a_closed_group_leaves_all_to_the_worker_s_own_thread(threads: ThreadGroup) -> None:
    threads.close(1)
    ran_on: list[int] = []

    def note(x: Tensor) -> Tensor:
        ran_on.append(threading.get_ident())
        return logits_of(1)(x)

    network([note] * 3, group=threads)(batch(1))
    assert ran_on == [threading.get_ident()] * 3


def test_threads_end_when_the_group_closes() -> None:
    group = ThreadGroup(2, 1)
    before = threading.active_count()
    meeting = threading.Barrier(3, timeout=30)

    def waits(x: Tensor) -> Tensor:
        meeting.wait()
        return logits_of(1)(x)

    network([waits] * 3, group=group)(batch(1))
    assert threading.active_count() == before + 2
    group.close(1)
    assert threading.active_count() == before


# -------------------------------------------------------------------------------------------------------------- streams


@dataclass(eq=False)
class FakeStream:
    """Notes what is asked of it."""

    name: str
    log: list[tuple[str, ...]]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))


@dataclass
class FakeCuda:
    """Streams that run nothing: what is started on each is noted."""

    log: list[tuple[str, ...]] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.running = self.own = FakeStream("own", self.log)

    def Stream(self, device: torch.device) -> FakeStream:
        self.made += 1
        return FakeStream(f"side{self.made}", self.log)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.running

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.running = self.running, stream
        try:
            yield
        finally:
            self.running = before

    def noting(self, name: str, error: Exception | None = None) -> Callable[[Tensor], Tensor]:
        def start(x: Tensor) -> Tensor:
            self.log.append((self.running.name, "runs", name))
            if error is not None:
                raise error
            return logits_of(1)(x)

        return start


def on_streams(size: int, *members: Any) -> tuple[FakeCuda, EnsembleNetwork]:
    cuda = FakeCuda()
    networks = [cuda.noting(f"m{index}", error) for index, error in enumerate(members)]
    return cuda, network(networks, group=StreamGroup(torch.device("cuda"), size, cuda))


def test_each_other_member_has_a_stream_that_forks_from_the_worker_s_and_joins_it() -> None:
    cuda, three = on_streams(3, None, None, None)
    three(batch(2))
    assert cuda.log == [
        ("side1", "waits for", "own"), ("side2", "waits for", "own"),
        ("side1", "runs", "m0"), ("side2", "runs", "m1"), ("own", "runs", "m2"),
        ("own", "waits for", "side1"), ("own", "waits for", "side2"),
    ]  # fmt: skip


def test_streams_are_joined_whatever_fails_on_them() -> None:
    for error in (LookupError(), torch.OutOfMemoryError("CUDA out of memory.")):
        cuda, two = on_streams(1, error, None)
        with contextlib.suppress(torch.OutOfMemoryError):
            two(batch(2))
        assert cuda.log[-1] == ("own", "waits for", "side1")
        assert cuda.running is cuda.own


@pytest.mark.parametrize(("size", "places"), [(0, ["own"] * 4), (2, ["side1", "side2", "side1", "own"])])
def test_members_share_streams_where_there_are_too_few(size: int, places: list[str]) -> None:
    cuda, four = on_streams(size, *[None] * 4)
    four(batch(1))
    assert [line[0] for line in cuda.log if line[1] == "runs"] == places


# ------------------------------------------------------------------------------------------------------------ catalogue


def catalogue(
    *ensembles: Ensemble, cores: int = 2, workers: int = 1, threads: int = 1, device: str = "cpu"
) -> Catalogue:
    return Catalogue(ensembles, device=device, cores=cores, workers=workers, threads=threads)


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "beside", "each", "mode"),
    [
        (2, 1, 1, 1, 1, "parallel"),  # of three members, two share a thread
        (1, 1, 1, 1, 1, "serial"),
        (2, 2, 1, 1, 1, "serial"),
        (4, 2, 1, 1, 1, "parallel"),
        (8, 1, 7, 1, 1, "parallel"),
        (16, 1, 4, 2, 4, "parallel"),
        (64, 1, 1, 2, 1, "parallel"),
    ],
)
def test_members_get_the_cores_that_workers_leave(
    cores: int, workers: int, threads: int, beside: int, each: int, mode: str
) -> None:
    three = catalogue(ensemble(3), cores=cores, workers=workers, threads=threads)
    assert (three.beside, three.threads, three.mode("m0+m1+m2", 1)) == (beside, each, mode)
    assert three.lanes(3) == (1 if mode == "serial" else 1 + beside)


def test_an_engine_without_ensembles_makes_no_threads_or_streams_for_them() -> None:
    assert catalogue().beside == catalogue(device="cuda").beside == 0


def test_no_cuda_stream_is_used_twice() -> None:
    for workers in (1, 4, 8, 16, 32, 40):
        eight = catalogue(ensemble(8), device="cuda", workers=workers)
        assert eight.beside >= 0
        assert workers * (1 + eight.beside) <= max(32, workers)
        assert eight.mode("+".join(f"m{index}" for index in range(8)), 1) == ("parallel" if eight.beside else "serial")


def test_the_mode_follows_the_plan_and_the_last_one_counts_for_larger_batches() -> None:
    two = catalogue(ensemble(2))
    assert two.modes("m0+m1") == ("parallel", "serial")
    two.plan("m0+m1", ("serial", "parallel", "parallel", "serial"))
    assert [two.mode("m0+m1", size) for size in (1, 2, 3, 4, 64)] == ["parallel"] * 2 + ["serial"] * 3
    assert two.mode(forced("m0+m1", "parallel"), 64) == "parallel"
    assert two.modes("m0+m1") == ("parallel", "serial")
    two.plan("m0+m1", ["serial"])
    assert two.modes("m0+m1") == ("serial",)


@pytest.mark.parametrize(
    ("name", "modes", "message"),
    [
        ("m0+m1", ["fast"], r"modes of m0\+m1: must be parallel or serial, not \['fast'\]"),
        ("m0+m1", [], "must be parallel or serial, not none"),
        ("m0", ["serial"], r"no ensemble 'm0': there are m0\+m1"),
    ],
)
def test_an_impossible_plan_is_refused(name: str, modes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalogue(ensemble(2)).plan(name, modes)


def test_members_follow_on_the_subnets_asked_for_each_once() -> None:
    two = catalogue(ensemble(2), ensemble(3))
    assert two.with_members(["m1", "m0+m1", "x", "m0+m1+m2"]) == ["m1", "x", "m0", "m2"]
    assert "m0+m1" in two
    assert forced("m0+m1", "serial") in two
    assert "m0" not in two
