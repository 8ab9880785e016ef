"""The engine computes what the actuated subnet would, on any worker, for inputs of either form."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_supernet import INPUT, SPACE, tiny_servable
from numpy.typing import NDArray
from torch import Tensor

from cudagraphs import BATCH_SIZES, Network, Pair
from engine import (
    CudaWorker,
    DeviceFacts,
    DeviceLostError,
    Engine,
    EngineError,
    Outputs,
    PieceLimit,
    measure_latencies,
    noticing_loss,
)
from ensembles import MODES, EnsembleNetwork, StreamGroup, forced, one_after_another
from inputbatches import Normaliser
from members import is_mirrored, mirrored, subnet_of
from profiletable import Ensemble
from supernet import IllegalSubnetError
from workers import HungError

LARGEST, SMALLEST, UNCALIBRATED = SPACE.largest.name, SPACE.smallest.name, "d1-2-1-e0.5"
Input = NDArray[Any]
TOGETHER = Ensemble(members=(LARGEST, SMALLEST), combination="mean", weights=(0.5, 0.5))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(tiny_servable(), "cpu")
    yield engine
    engine.close()


def pixels(count: int, seed: int = 0) -> list[Input]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8))


def normalised(image: Input) -> Input:
    """The float32 form of an image, by the definition in InputSpec."""
    return ((image / 255 - INPUT.mean) / INPUT.std).transpose(2, 0, 1).astype(np.float32)


def expected(engine: Engine, name: str, inputs: Sequence[Input]) -> Input:
    rows = [row if row.dtype == np.float32 else normalised(row) for row in inputs]
    with torch.inference_mode():
        return engine.actuate(name)(torch.from_numpy(np.stack(rows))).softmax(1).numpy()


def test_pixels_are_normalised_as_defined() -> None:
    stacked = np.stack(pixels(3))
    network = Normaliser(INPUT, torch.device("cpu")).pixels(torch.from_numpy(stacked))
    np.testing.assert_allclose(network.numpy(), np.stack([normalised(image) for image in stacked]), atol=1e-5)
    assert network.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_every_input_gets_one_row_of_probabilities(engine: Engine, count: int) -> None:
    outputs = await engine.run(LARGEST, pixels(count))
    assert outputs.probabilities.shape == (count, 5)
    assert outputs.probabilities.dtype == np.float32
    np.testing.assert_allclose(outputs.probabilities.sum(1), 1, atol=1e-5)
    assert (outputs.probabilities >= 0).all()


@pytest.mark.parametrize("name", [LARGEST, SMALLEST, UNCALIBRATED])
async def test_results_are_those_of_the_actuated_subnet(engine: Engine, name: str) -> None:
    inputs = pixels(4)
    outputs = await engine.run(name, inputs)
    np.testing.assert_allclose(outputs.probabilities, expected(engine, name, inputs), atol=1e-5)


@pytest.mark.parametrize("pattern", ["uf", "fu", "ufuf", "ffuuf", "ffff"])
async def test_batches_of_mixed_forms_keep_their_order(engine: Engine, pattern: str) -> None:
    images = zip(pattern, pixels(len(pattern)), strict=True)
    inputs = [normalised(image) if form == "f" else image for form, image in images]
    outputs = await engine.run(LARGEST, inputs)
    np.testing.assert_allclose(outputs.probabilities, expected(engine, LARGEST, inputs), atol=1e-5)
    assert len(np.unique(outputs.probabilities.round(6), axis=0)) == len(pattern), "inputs are told apart"


@pytest.mark.skipif(
    not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)(), reason="this processor has no bfloat16"
)
@pytest.mark.parametrize("budget", [0, math.inf])
async def test_an_engine_computes_in_the_dtype_of_the_weights_nearly_as_in_float32(budget: float) -> None:
    servable, exact = tiny_servable(), Engine(tiny_servable(), "cpu", ensembles=[TOGETHER])
    nbytes = servable.supernet.nbytes
    servable.supernet.to(torch.device("cpu"), torch.bfloat16)
    engine = Engine(servable, "cpu", memory_budget=budget, ensembles=[TOGETHER])
    assert (engine.facts.dtype, exact.facts.dtype) == ("bfloat16", "float32")
    assert servable.supernet.nbytes < 0.6 * nbytes
    await engine.prepare([LARGEST, SMALLEST])
    for name in (LARGEST, SMALLEST, TOGETHER.name):
        for inputs in (pixels(1), [*pixels(2), normalised(pixels(1, 3)[0])]):
            given, there = await engine.run(name, inputs), await exact.run(name, inputs)
            assert given.probabilities.dtype == np.float32
            assert 0 < np.abs(given.probabilities - there.probabilities).max() < 0.02
    for each in (engine, exact):
        each.close()


def test_a_processor_without_kernels_for_a_dtype_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    servable = tiny_servable()
    servable.supernet.to(torch.device("cpu"), torch.float16)
    with pytest.raises(EngineError, match="this cpu has no kernels for float16"):
        Engine(servable, "cpu")


async def test_results_finish_after_they_were_asked_for(engine: Engine) -> None:
    first = await engine.run(SMALLEST, pixels(1))
    second = await engine.run(SMALLEST, pixels(1))
    assert first.finished_s < second.finished_s


@pytest.mark.slow
async def test_workers_at_the_same_time_give_the_same_results() -> None:
    engine = Engine(tiny_servable(), "cpu", workers=3)
    names = [LARGEST, SMALLEST, UNCALIBRATED] * 20
    batches = [pixels(1 + number % 4, seed=number) for number in range(len(names))]
    alone = [expected(engine, name, batch) for name, batch in zip(names, batches, strict=True)]
    together = await asyncio.gather(*map(engine.run, names, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.probabilities, one, atol=1e-5)
    engine.close()


async def test_illegal_subnets_fail_their_batch_only(engine: Engine) -> None:
    for name in ("d9-9-9-e1", "largest"):
        with pytest.raises(IllegalSubnetError):
            await engine.run(name, pixels(1))
    assert (await engine.run(LARGEST, pixels(1))).probabilities.shape == (1, 5)


async def test_inputs_of_a_wrong_size_fail_their_batch_only(engine: Engine) -> None:
    with pytest.raises(RuntimeError):
        await engine.run(LARGEST, [np.zeros((2, 8, 8), np.float32)])
    with pytest.raises(ValueError, match="same shape"):
        await engine.run(LARGEST, [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)])
    assert (await engine.run(LARGEST, pixels(1))).probabilities.shape == (1, 5)


async def test_the_event_loop_runs_on_while_a_batch_computes(engine: Engine) -> None:
    running = asyncio.ensure_future(engine.run(LARGEST, pixels(32)))
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not running.done():
            asyncio.get_running_loop().call_soon(turn)

    turn()
    await running
    assert turns > 2


def test_a_subnet_is_actuated_once(engine: Engine) -> None:
    assert engine.actuate(LARGEST) is engine.actuate(LARGEST)


@pytest.mark.parametrize("device", ["", "gpu", "tpu", "meta", "mps", "cuda:x", "cuda:-1", "cpu,cuda"])
def test_unknown_devices_list_the_known_ones(device: str) -> None:
    with pytest.raises(EngineError, match=r"unknown device .*; known: auto, cpu, cuda, cuda:N"):
        Engine(tiny_servable(), device)


def test_a_gpu_that_is_not_there_is_an_error_not_a_fallback() -> None:
    with pytest.raises(EngineError, match=r"device 'cuda:99' is not there: \d+ CUDA devices found"):
        Engine(tiny_servable(), "cuda:99")


def test_facts_are_what_latencies_depend_on() -> None:
    engine = Engine(tiny_servable(), "cpu", workers=2, threads=3)
    facts = engine.facts
    assert facts == DeviceFacts(
        kind="cpu", name=facts.name, torch=torch.__version__, dtype="float32", threads=3, workers=2
    )
    assert facts.name
    engine.close()


def test_workers_have_the_threads_they_were_given() -> None:
    engine = Engine(tiny_servable(), "cpu", threads=2)
    assert engine._crew.submit(lambda _: torch.get_num_threads()).future.result() == 2
    assert torch.get_num_threads() == 1, "other threads keep theirs"
    engine.close()


async def test_every_subnet_and_size_is_measured_on_every_worker_each_round() -> None:
    engine = Engine(tiny_servable(), "cpu", workers=2)
    steps: list[None] = []
    samples = await measure_latencies(engine, [SMALLEST, LARGEST], [1, 3], 4, lambda: steps.append(None))
    assert list(samples) == [SMALLEST, LARGEST]
    assert [len(sizes) for sizes in samples.values()] == [2, 2]
    assert {len(each) for sizes in samples.values() for each in sizes} == {4 * 2}
    assert all(0 < taken_s < 60 for sizes in samples.values() for each in sizes for taken_s in each)
    assert len(steps) == (4 + 1) * 2 * 2, "the first round warms up"
    engine.close()


async def test_warming_up_counts_its_steps(engine: Engine) -> None:
    steps: list[None] = []
    await engine.warm_up([SMALLEST, LARGEST], [1, 2, 4], lambda: steps.append(None))
    assert len(steps) == 6
    assert engine.blank_input().shape == (8, 8, 3)


async def test_what_is_held_is_reported() -> None:
    servable = tiny_servable()
    engine = Engine(servable, "cpu")
    assert (engine.held.nbytes, engine.held.subnets, engine.held.pairs) == (0, (), ())
    await engine.prepare([SMALLEST, LARGEST])
    assert (engine.held.subnets, engine.held.pairs) == ((SMALLEST, LARGEST), ())
    assert 0 < engine.held.nbytes < 3 * servable.supernet.nbytes
    engine.close()


# ------------------------------------------------------------------------------------------------------- out of memory


class SmallDevice:
    """Doubles numbers, in pieces of at most ``most``; larger ones run out of memory, while their tensors are held."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.pieces: list[int] = []
        self.tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.freed = 0

    def compute(self, inputs: Sequence[Input]) -> Input:
        self.pieces.append(len(inputs))
        tensor = torch.from_numpy(np.stack(inputs))
        self.tensors.add(tensor)
        if len(inputs) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return (2 * tensor).numpy()

    def free(self) -> None:
        assert not self.tensors, "the failed try still holds memory"
        self.freed += 1


def numbers(count: int) -> list[Input]:
    return list(np.arange(count, dtype=np.float32).reshape(count, 1))


def doubled(count: int) -> list[float]:
    return [2.0 * number for number in range(count)]


def test_while_memory_lasts_a_batch_is_one_piece() -> None:
    device = SmallDevice(100)
    assert PieceLimit(device.free).compute(device.compute, numbers(64)).ravel().tolist() == doubled(64)
    assert (device.pieces, device.freed) == ([64], 0)


def test_out_of_memory_halves_the_pieces_and_tries_the_batch_again_in_order() -> None:
    device = SmallDevice(7)
    limit = PieceLimit(device.free)
    assert limit.compute(device.compute, numbers(13)).ravel().tolist() == doubled(13)
    assert (device.pieces, device.freed, limit.largest) == ([13, 6, 6, 1], 1, 6)


def test_batches_after_it_come_in_pieces_without_failing_first() -> None:
    device = SmallDevice(7)
    limit = PieceLimit(device.free)
    limit.compute(device.compute, numbers(13))
    device.pieces.clear()
    assert limit.compute(device.compute, numbers(9)).ravel().tolist() == doubled(9)
    assert limit.compute(device.compute, numbers(6)).ravel().tolist() == doubled(6)
    assert (device.pieces, device.freed) == ([6, 3, 6], 1)


def test_a_batch_is_tried_once_more_and_those_after_it_go_on() -> None:
    device = SmallDevice(2)
    limit = PieceLimit(device.free)
    for largest in (4, 2):
        if largest == 4:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                limit.compute(device.compute, numbers(8))
        else:
            assert limit.compute(device.compute, numbers(8)).ravel().tolist() == doubled(8)
        assert limit.largest == largest


def test_one_input_is_the_smallest_piece() -> None:
    device = SmallDevice(0)
    limit = PieceLimit(device.free)
    for _ in range(3):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            limit.compute(device.compute, numbers(2))
    assert limit.largest == 1


def test_other_errors_are_no_lack_of_memory() -> None:
    device = SmallDevice(100)
    limit = PieceLimit(device.free)
    with pytest.raises(ValueError, match="same shape"):
        limit.compute(device.compute, [np.zeros(1), np.zeros(2)])
    with pytest.raises(RuntimeError, match="mat1"):
        limit.compute(lambda _: torch.zeros(2, 3).mm(torch.zeros(2, 3)).numpy(), numbers(2))
    assert (device.freed, limit.largest) == (0, None)


def test_a_lost_device_has_an_error_of_its_own() -> None:
    said = "CUDA error: unspecified launch failure"
    with pytest.raises(DeviceLostError, match=rf"^the device is lost: {said}$"), noticing_loss():
        raise torch.AcceleratorError(f"{said}\nCUDA kernel errors might be reported asynchronously")
    with pytest.raises(torch.cuda.OutOfMemoryError), noticing_loss():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(IndexError), noticing_loss():
        raise IndexError("CUDA error")


# ------------------------------------------------------------------------------------------------------------ ensembles

PAIR = Ensemble(members=(SMALLEST, LARGEST), combination="mean", weights=(0.25, 0.75))
TRIPLE = Ensemble(members=(UNCALIBRATED, SMALLEST, LARGEST), combination="vote", weights=(0.3, 0.3, 0.4))
BOTH_WAYS = Ensemble(members=(LARGEST, mirrored(LARGEST)), combination="mean", weights=(0.5, 0.5))


@pytest.fixture(scope="module")
def together() -> Iterator[Engine]:
    """An engine with three ensembles."""
    engine = Engine(tiny_servable(), "cpu", ensembles=[PAIR, TRIPLE, BOTH_WAYS])
    yield engine
    engine.close()


def combined(engine: Engine, ensemble: Ensemble, inputs: Sequence[Input]) -> Input:
    """What an ensemble answers, by the definition in profiletable.py."""
    turned = [np.ascontiguousarray(each[:, ::-1]) for each in inputs]
    seen = [turned if is_mirrored(member) else inputs for member in ensemble.members]
    rows = [expected(engine, subnet_of(name), each) for name, each in zip(ensemble.members, seen, strict=True)]
    if ensemble.combination == "vote":
        rows = [np.eye(5, dtype=np.float32)[each.argmax(1)] for each in rows]
    return np.average(rows, 0, ensemble.weights)


@pytest.mark.parametrize("ensemble", [PAIR, TRIPLE, BOTH_WAYS], ids=["pair", "triple", "both ways"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 5, 40])  # the last in chunks
async def test_an_ensemble_answers_as_its_members_together(
    together: Engine, ensemble: Ensemble, mode: str, count: int
) -> None:
    inputs = pixels(count)
    outputs = await together.run(forced(ensemble.name, mode), inputs)
    np.testing.assert_allclose(outputs.probabilities, combined(together, ensemble, inputs), atol=1e-5)
    assert (outputs.failed, outputs.probabilities.dtype) == ((), np.float32)


async def test_a_mirrored_member_is_held_as_its_subnet() -> None:
    engine = Engine(tiny_servable(), "cpu", ensembles=[BOTH_WAYS])
    await engine.prepare([BOTH_WAYS.name])
    assert engine.held.subnets == (LARGEST,)
    engine.close()


async def test_members_are_held_as_the_single_subnets_they_are() -> None:
    engine = Engine(tiny_servable(), "cpu", ensembles=[PAIR, TRIPLE])
    assert engine.executables is not None
    await engine.prepare([LARGEST, PAIR.name, TRIPLE.name])
    assert set(engine.held.subnets) == {LARGEST, SMALLEST, UNCALIBRATED}
    before = engine.held
    steps: list[None] = []
    await engine.warm_up([PAIR.name, TRIPLE.name], (1, 3), lambda: steps.append(None))
    assert engine.held == before
    assert len(steps) == 4
    engine.close()


class FailingMember:
    """Faults that change what one member of an ensemble computes, and note who computed on which thread."""

    def __init__(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        self.name, self.change = name, change
        self.threads: dict[str, set[int]] = {}

    def __call__(self, name: str, network: Network) -> Network:
        def compute(x: Tensor) -> Tensor:
            self.threads.setdefault(name, set()).add(threading.get_ident())
            return self.change(network(x)) if name == self.name else network(x)

        return compute


def raising(error: Exception) -> Callable[[Tensor], Tensor]:
    def change(logits: Tensor) -> Tensor:
        raise error

    return change


@pytest.fixture
def faulty(together: Engine) -> Iterator[Callable[[str, Callable[[Tensor], Tensor]], FailingMember]]:
    """Makes a member of the engine's ensembles fail until the test ends."""

    def install(name: str, change: Callable[[Tensor], Tensor]) -> FailingMember:
        together.faults = FailingMember(name, change)
        return together.faults

    yield install
    together.faults = None


Install = Callable[[str, Callable[[Tensor], Tensor]], FailingMember]


@pytest.mark.parametrize("change", [raising(LookupError("broken")), lambda logits: logits * torch.nan])
@pytest.mark.parametrize("mode", MODES)
async def test_the_rest_of_an_ensemble_answers_when_a_member_fails(
    together: Engine, faulty: Install, mode: str, change: Callable[[Tensor], Tensor]
) -> None:
    faults, inputs = faulty(SMALLEST, change), pixels(20)
    outputs = await together.run(forced(PAIR.name, mode), inputs)
    np.testing.assert_allclose(outputs.probabilities, expected(together, LARGEST, inputs), atol=1e-5)
    assert outputs.failed == (SMALLEST,)
    assert set(faults.threads) == {SMALLEST, LARGEST}, "each by its own name, and the ensemble by none"
    together.faults = None
    assert (await together.run(PAIR.name, inputs)).failed == ()


@pytest.mark.parametrize("mode", MODES)
async def test_what_the_device_says_through_a_member_reaches_the_worker(
    together: Engine, faulty: Install, mode: str
) -> None:
    engine = Engine(tiny_servable(), "cpu", ensembles=[PAIR])
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    engine.faults = FailingMember(SMALLEST, raising(lost))
    with pytest.raises(DeviceLostError):
        await engine.run(forced(PAIR.name, mode), pixels(2))
    assert engine.lost is not None
    engine.close()


@pytest.mark.parametrize("mode", MODES)
async def test_an_ensemble_that_runs_out_of_memory_is_computed_in_pieces(mode: str) -> None:
    engine = Engine(tiny_servable(), "cpu", ensembles=[PAIR])
    sizes: list[int] = []

    def short(logits: Tensor) -> Tensor:
        sizes.append(len(logits))
        if len(logits) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    engine.faults = FailingMember(LARGEST, short)
    outputs = await engine.run(forced(PAIR.name, mode), pixels(9))
    np.testing.assert_allclose(outputs.probabilities, combined(engine, PAIR, pixels(9)), atol=1e-5)
    assert (outputs.failed, sizes) == ((), [9, 4, 4, 1])
    engine.close()


async def test_the_plan_decides_who_computes(together: Engine, faulty: Install) -> None:
    faults = faulty("", lambda logits: logits)
    meeting = threading.Barrier(2, timeout=30)
    together.plan(PAIR.name, ("parallel", "serial", "parallel"))
    await together.run(PAIR.name, pixels(1))
    (alone,) = set.union(*faults.threads.values())
    faults.threads.clear()
    faulty("", lambda logits: logits)
    together.faults = lambda _, network: lambda x: network(x) if meeting.wait() >= 0 else x
    await together.run(PAIR.name, pixels(2))  # would wait for ever, did both not run at the same time
    assert alone != threading.get_ident()


async def test_an_impossible_plan_is_an_engine_error(together: Engine) -> None:
    with pytest.raises(EngineError, match="must be parallel or serial"):
        together.plan(PAIR.name, ("quick",))
    with pytest.raises(EngineError, match=f"no ensemble '{LARGEST}'"):
        together.plan(LARGEST, ("serial",))


async def test_both_modes_are_measured_by_their_names(together: Engine) -> None:
    names = [LARGEST, forced(PAIR.name, "parallel"), forced(PAIR.name, "serial")]
    samples = await measure_latencies(together, names, (1, 3), 2, lambda: None)
    assert list(samples) == names
    assert all(len(each) == 2 and min(each) > 0 for sizes in samples.values() for each in sizes)


async def test_an_unknown_member_fails_its_batch_only() -> None:
    unknown = Ensemble(members=(LARGEST, "d9-9-9-e1"), combination="mean", weights=(0.5, 0.5))
    engine = Engine(tiny_servable(), "cpu", ensembles=[unknown])
    with pytest.raises(IllegalSubnetError):
        await engine.run(unknown.name, pixels(1))
    with pytest.raises(IllegalSubnetError):
        await engine.prepare([unknown.name])
    assert (await engine.run(LARGEST, pixels(1))).failed == ()
    engine.close()


async def test_closing_ends_the_threads_of_ensembles_too() -> None:
    before = set(threading.enumerate())
    engine = Engine(tiny_servable(), "cpu", workers=2, ensembles=[PAIR])
    await asyncio.gather(*(engine.run(forced(PAIR.name, "parallel"), pixels(2)) for _ in range(4)))
    assert any(thread.name == "member" for thread in set(threading.enumerate()) - before)
    engine.close()
    assert set(threading.enumerate()) <= before


async def test_a_member_that_hangs_costs_its_worker_and_the_next_one_computes() -> None:
    engine, released = Engine(tiny_servable(), "cpu", ensembles=[PAIR]), threading.Event()

    def hang(logits: Tensor) -> Tensor:
        released.wait()
        return logits

    engine.faults = FailingMember(SMALLEST, hang)
    with pytest.raises(HungError) as hung:
        await engine.run(forced(PAIR.name, "parallel"), pixels(1), limit_s=0.05)
    assert hung.value.replaced
    engine.faults = None
    outputs = await engine.run(forced(PAIR.name, "parallel"), pixels(3))
    np.testing.assert_allclose(outputs.probabilities, combined(engine, PAIR, pixels(3)), atol=1e-5)
    engine.close()
    released.set()


# ------------------------------------------------------------------------------------------- CUDA, with fakes for a GPU


class FakeStream:
    """Notes what was actuated before each time that it was waited for."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.waits = engine, []  # type: ignore[var-annotated]

    def synchronize(self) -> None:
        self.waits.append(tuple(self.engine._actuated))


def test_what_actuating_computes_on_a_gpu_is_there_before_any_worker_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_servable(), "cpu")
    stream = FakeStream(engine)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    engine.actuate(SMALLEST)
    assert stream.waits == [], "a CPU computes at once"
    engine._device = torch.device("cuda")
    for _ in range(2):
        engine.actuate(LARGEST)
    assert stream.waits == [(SMALLEST,)]
    engine.close()


class FakeGraphs:
    def __init__(self, budget: float) -> None:
        self.budget = budget


class FakeCudaWorker:
    """Notes what it is to capture, and with which settings these would compute."""

    def __init__(self, engine: Engine, budget: float) -> None:
        self.engine, self.graphs, self.group = engine, FakeGraphs(budget), None
        self.captured: list[str] = []
        self.settings: list[object] = []

    def capture(self, networks: Mapping[str, Network]) -> None:
        self.captured, self.settings = list(networks), self.now()

    def now(self) -> list[Any]:
        return [each.settings.unpacked() for each in self.engine._actuated.values()]  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("budget", "held"), [(0.0, False), (1e9, True)])
async def test_statistics_stay_where_they_are_once_graphs_know_their_addresses(budget: float, held: bool) -> None:
    servable = tiny_servable()
    servable.supernet.pack_statistics()
    engine = Engine(servable, "cpu", ensembles=[BOTH_WAYS])
    worker = FakeCudaWorker(engine, budget)
    engine._cuda_workers, engine.executables = [worker], None  # type: ignore[list-item]
    await engine.prepare([SMALLEST, BOTH_WAYS.name])
    assert worker.captured == [SMALLEST, *(forced(BOTH_WAYS.name, mode) for mode in MODES)]
    servable.supernet._recent._held.clear()  # as when many others ran
    same = [now is then for now, then in zip(worker.now(), worker.settings, strict=True)]
    assert same == [held, held], "the subnet and the member"
    engine.close()


async def test_a_device_lost_while_preparing_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_servable(), "cpu")
    for error, raised in (
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for …"), DeviceLostError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), EngineError),
        (MemoryError("no memory"), EngineError),
    ):

        def fail(names: object, _: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(engine, "_prepare", fail)
        with pytest.raises(EngineError, match=r"^preparing the subnets failed: [^\n]*memory[^\n]*$") as failed:
            await engine.prepare([SMALLEST])
        assert type(failed.value) is raised
    engine.close()


# ---------------------------------------------------------------------------------------------------------------- CUDA
# Plain functions, with event loops of their own: where there is a GPU, the plugin for asynchronous ones may be missing.


@pytest.fixture(scope="module")
def exact_cuda() -> Iterator[None]:
    """Without TF32: its 10 bits of mantissa are no error of the engine."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def gpu(exact_cuda: None) -> Iterator[Engine]:
    """An engine with two workers that has captured nothing."""
    engine = Engine(tiny_servable(), "cuda", workers=2)
    yield engine
    engine.close()


@pytest.fixture
def captured(exact_cuda: None) -> Iterator[Engine]:
    """An engine with two workers that holds the smallest and the largest subnet captured, at every size."""
    engine = Engine(tiny_servable(), "cuda", workers=2)
    asyncio.run(engine.prepare([SMALLEST, LARGEST]))
    yield engine
    engine.close()


@pytest.fixture
def worker(captured: Engine) -> CudaWorker:
    """A worker with graphs that nothing else uses."""
    return captured._cuda_workers[0]


def computed(engine: Engine, name: str, *batches: Sequence[Input]) -> list[Input]:
    """Class probabilities of batches that are all in flight at once."""

    async def together() -> list[Input]:
        outputs = await asyncio.gather(*(engine.run(name, batch) for batch in batches))
        return [each.probabilities for each in outputs]

    return asyncio.run(together())


def same(one: Sequence[Input], other: Sequence[Input]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_cpu(gpu: Engine) -> None:
    cpu = tiny_servable().supernet
    for name in (LARGEST, SMALLEST, UNCALIBRATED):
        subnet = gpu.actuate(name).subnet
        x = torch.from_numpy(np.stack([normalised(image) for image in pixels(16)]))
        with torch.inference_mode():
            on_gpu = gpu.actuate(name)(x.cuda()).cpu()
            torch.testing.assert_close(on_gpu, cpu.actuate(subnet)(x), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_two_streams_run_at_once(gpu: Engine, engine: Engine) -> None:
    many_at_once(gpu, engine, [pixels(1 + number % 16, seed=number) for number in range(50)])


def many_at_once(gpu: Engine, engine: Engine, batches: Sequence[list[Input]]) -> None:
    """Both workers get these batches at once, on the largest and the smallest subnet, and compute what the CPU does."""
    for name in (LARGEST, SMALLEST):
        same(computed(gpu, name, *batches), [expected(engine, name, batch) for batch in batches])


@pytest.mark.gpu
def test_pinned_buffers_serve_other_batch_sizes_and_results_survive_them(gpu: Engine, engine: Engine) -> None:
    batches = [pixels(size, seed=size) for size in (4, 16, 1, 8, 16, 3)]
    outputs = [computed(gpu, LARGEST, batch)[0] for batch in batches]
    same(outputs, [expected(engine, LARGEST, batch) for batch in batches])


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", ["gpu", "captured"])
def test_a_gpu_takes_both_forms_and_keeps_order(prepared: str, request: pytest.FixtureRequest, engine: Engine) -> None:
    inputs = [normalised(image) if number % 3 else image for number, image in enumerate(pixels(9))]
    same(computed(request.getfixturevalue(prepared), LARGEST, inputs), [expected(engine, LARGEST, inputs)])


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", ["gpu", "captured"])
def test_a_failed_batch_leaves_the_gpu_usable(prepared: str, request: pytest.FixtureRequest) -> None:
    on_gpu = request.getfixturevalue(prepared)
    for wrong in (np.zeros((2, 8, 8), np.float32), np.zeros((8, 8, 2), np.uint8)):
        with pytest.raises(RuntimeError):
            computed(on_gpu, LARGEST, [wrong])
    assert computed(on_gpu, LARGEST, pixels(2))[0].shape == (2, 5)


@pytest.mark.gpu
def test_a_gpu_is_chosen_when_there_is_one(gpu: Engine) -> None:
    automatic = Engine(tiny_servable())
    assert (automatic.facts.kind, automatic.facts.threads) == ("cuda", 0)
    automatic.close()


# --------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.gpu
def test_graphs_are_captured_for_every_size_of_the_subnets_prepared(captured: Engine, gpu: Engine) -> None:
    assert captured.held.subnets == (SMALLEST, LARGEST)
    assert captured.held.pairs == tuple(Pair(name, size) for name in (SMALLEST, LARGEST) for size in BATCH_SIZES)
    assert captured.held.nbytes > 0
    assert (gpu.held.nbytes, gpu.held.pairs) == (0, ())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17, 33, 64, 65, 130])
def test_captured_results_equal_eager_ones(captured: Engine, gpu: Engine, size: int) -> None:
    batch = pixels(size, seed=size)
    for name in (SMALLEST, LARGEST, UNCALIBRATED):
        (graphed,), (eager,) = computed(captured, name, batch), computed(gpu, name, batch)
        assert graphed.shape == (size, 5)
        same([graphed], [eager])
        assert size == 1 or len(np.unique(graphed.round(6), axis=0)) > 1, "inputs are told apart"


@pytest.mark.gpu
def test_a_graph_is_what_computes(worker: CudaWorker, captured: Engine) -> None:
    replays = 0

    def counted(network: Network, inputs: Sequence[Input]) -> Tensor | None:
        nonlocal replays
        found = replayed(network, inputs)
        replays += found is not None
        return found

    replayed, worker._replayed = worker._replayed, counted  # type: ignore[method-assign]
    for size, by_graph in ((1, 1), (3, 1), (64, 1), (65, 0)):
        before = replays
        worker.compute(captured.actuate(LARGEST), pixels(size))
        assert replays - before == by_graph, size
    worker.compute(captured.actuate(LARGEST), [normalised(image) for image in pixels(2)])
    worker.compute(captured.actuate(UNCALIBRATED), pixels(2))
    assert replays == 3


@pytest.mark.gpu
def test_padding_of_captured_batches_never_leaks(worker: CudaWorker, captured: Engine, engine: Engine) -> None:
    network = captured.actuate(LARGEST)
    for seed, size in enumerate((64, 33, 3, 17, 1, 5, 2)):
        batch = pixels(size, seed=seed)
        same([worker.compute(network, batch)], [expected(engine, LARGEST, batch)])


@pytest.mark.gpu
def test_graphs_that_share_memory_take_turns(worker: CudaWorker, captured: Engine, engine: Engine) -> None:
    batches = [(name, pixels(size, seed=size)) for size in (64, 1, 16, 3) for name in (LARGEST, SMALLEST)]
    outputs = [worker.compute(captured.actuate(name), batch) for name, batch in batches]
    same(outputs, [expected(engine, name, batch) for name, batch in batches])


@pytest.mark.gpu
def test_two_workers_with_graphs_at_once_give_what_each_gives_alone(captured: Engine, engine: Engine) -> None:
    many_at_once(captured, engine, [pixels(1 + number % 40, seed=number) for number in range(60)])


@pytest.mark.gpu
def test_one_worker_computes_while_another_captures(gpu: Engine, engine: Engine) -> None:
    computing, capturing = gpu._cuda_workers
    networks: dict[str, Network] = {name: gpu.actuate(name) for name in (SMALLEST, LARGEST, UNCALIBRATED)}
    computing.compute(networks[LARGEST], pixels(1))  # libraries start up; workers do that before others capture
    thread = threading.Thread(target=capturing.capture, args=(networks,))
    thread.start()
    number = 0
    while thread.is_alive() or number < 20:
        # Larger ones allocate for the first time, also of pinned memory, while the other captures.
        batch = pixels(1 + number % 100, seed=number)
        same([computing.compute(networks[LARGEST], batch)], [expected(engine, LARGEST, batch)])
        number += 7
    thread.join()
    assert len(capturing.graphs.pairs) == 3 * len(BATCH_SIZES)
    same([capturing.compute(networks[LARGEST], pixels(9))], [expected(engine, LARGEST, pixels(9))])


@pytest.mark.gpu
def test_the_budget_is_kept_by_all_workers_together(exact_cuda: None) -> None:
    batch = list(np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8))
    unlimited = wide_engine(math.inf)
    everything, wanted = unlimited.held, computed(unlimited, LARGEST, batch)
    for part in (0.0, 0.4, 0.8):
        limited = wide_engine(part * everything.nbytes)
        assert limited.held.nbytes <= part * everything.nbytes
        assert len(limited.held.pairs) < len(everything.pairs)
        assert limited.held.pairs or part < 0.8
        same(computed(limited, LARGEST, batch, batch), wanted * 2)
        limited.close()
    unlimited.close()


def wide_engine(budget: float) -> Engine:
    """An engine whose captured graphs take far more memory than the least that torch takes; always the same weights."""
    servable = tiny_servable((), widths=(64, 64, 128), side=32)
    engine = Engine(servable, "cuda", workers=2, memory_budget=budget)
    asyncio.run(engine.prepare([SMALLEST, LARGEST]))
    return engine


@pytest.mark.gpu
def test_closing_gives_graphs_back(gpu: Engine) -> None:
    def pools() -> set[tuple[int, int]]:
        return {tuple(each["segment_pool_id"]) for each in torch.cuda.memory_snapshot()}

    before = pools()
    gpu._cuda_workers[0].capture({LARGEST: gpu.actuate(LARGEST)})
    assert pools() - before
    gpu.close()
    assert pools() <= before
    assert (gpu.held.nbytes, gpu.held.pairs) == (0, ())


class FakeFailure:
    """A network that fails once, or as often as told, and is what it stands for otherwise."""

    def __init__(self, network: Network, error: RuntimeError, times: int = 1) -> None:
        self.network, self.error, self.times = network, error, times
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.times:
            self.times -= 1
            raise self.error
        return self.network(x)


@pytest.mark.gpu
def test_out_of_memory_costs_graphs_and_large_pieces_but_no_batch(
    worker: CudaWorker, captured: Engine, engine: Engine
) -> None:
    short = FakeFailure(captured.actuate(LARGEST), torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert worker.graphs.pairs
    same([worker.compute(short, pixels(13))], [expected(engine, LARGEST, pixels(13))])
    assert (short.sizes, worker.limit.largest) == ([13, 6, 6, 1], 6)
    assert (worker.graphs.pairs, worker.graphs.nbytes) == ((), 0)
    for size in (1, 6, 20):
        batch = pixels(size, seed=size)
        same([worker.compute(captured.actuate(LARGEST), batch)], [expected(engine, LARGEST, batch)])
    assert captured._cuda_workers[1].graphs.pairs, "the other worker keeps its own"
    assert captured.held.pairs == (), "not every worker has them"
    same(computed(captured, LARGEST, *[pixels(9)] * 4), [expected(engine, LARGEST, pixels(9))] * 4)


@pytest.mark.gpu
def test_memory_that_really_runs_out_is_survived(worker: CudaWorker, captured: Engine, engine: Engine) -> None:
    actuated = captured.actuate(LARGEST)

    def greedy(x: Tensor) -> Tensor:
        if len(x) > 4:
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        return actuated(x)

    same([worker.compute(greedy, pixels(8))], [expected(engine, LARGEST, pixels(8))])
    assert worker.limit.largest == 4


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is(worker: CudaWorker, captured: Engine, engine: Engine) -> None:
    actuated, before = captured.actuate(LARGEST), worker.graphs.pairs

    def waits_for_the_device(x: Tensor) -> Tensor:
        return actuated(x) if x.sum().item() != math.inf else x

    worker.capture({"waits": waits_for_the_device, UNCALIBRATED: captured.actuate(UNCALIBRATED)})
    others = tuple(Pair(UNCALIBRATED, size) for size in BATCH_SIZES)
    assert worker.graphs.pairs == before + others, "the capture that failed spoils none before and none after it"
    same([worker.compute(waits_for_the_device, pixels(5))], [expected(engine, LARGEST, pixels(5))])
    for name in (LARGEST, UNCALIBRATED):
        same([worker.compute(captured.actuate(name), pixels(5))], [expected(engine, name, pixels(5))])
    torch.cuda.empty_cache()  # torch must not believe that the capture goes on
    worker.graphs.drop()


@pytest.mark.gpu
def test_a_lost_gpu_is_told_apart(worker: CudaWorker, captured: Engine) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceLostError, match="an illegal memory access"):
        worker.compute(FakeFailure(captured.actuate(LARGEST), error), pixels(2))


# ---------------------------------------------------------------------------------------------------- ensembles on CUDA


@pytest.fixture(scope="module")
def captured_ensembles(exact_cuda: None) -> Iterator[Engine]:
    """An engine with two workers that holds three ensembles captured, in both modes: 98 graphs, for all tests."""
    engine = Engine(tiny_servable(), "cuda", workers=2, ensembles=[PAIR, TRIPLE, BOTH_WAYS])
    asyncio.run(engine.prepare([SMALLEST, PAIR.name, TRIPLE.name, BOTH_WAYS.name]))
    yield engine
    engine.close()


@pytest.fixture
def streams(captured_ensembles: Engine) -> Iterator[Engine]:
    """That engine, to which faults do not stick."""
    yield captured_ensembles
    captured_ensembles.faults = None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 16, 64, 70])
def test_captured_ensembles_answer_as_their_members_together(
    streams: Engine, engine: Engine, mode: str, size: int
) -> None:
    for ensemble in (PAIR, TRIPLE, BOTH_WAYS):
        name, batch = forced(ensemble.name, mode), pixels(size, seed=size)
        wanted = combined(engine, ensemble, batch)
        for found in computed(streams, name, *[batch] * 4):
            assert ensemble.combination == "vote" or np.allclose(found, wanted, atol=1e-3)
            assert found.shape == wanted.shape
    assert Pair(forced(PAIR.name, mode), 64) in streams.held.pairs


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_member_that_fails_on_a_gpu_is_left_out(streams: Engine, engine: Engine, mode: str) -> None:
    async def run() -> Outputs:
        return await streams.run(forced(PAIR.name, mode), pixels(5))

    for change in (raising(LookupError("broken")), lambda logits: logits * torch.nan):
        streams.faults = FailingMember(SMALLEST, change)
        outputs = asyncio.run(run())
        same([outputs.probabilities], [expected(engine, LARGEST, pixels(5))])
        assert outputs.failed == (SMALLEST,)
    streams.faults = None
    assert asyncio.run(run()).failed == ()


@pytest.mark.gpu
def test_a_captured_graph_tells_who_was_not_finite(worker: CudaWorker, captured: Engine, engine: Engine) -> None:
    def nowhere_finite(x: Tensor) -> Tensor:
        return captured.actuate(SMALLEST)(x) * torch.nan

    for group in (one_after_another, StreamGroup(captured._device, 1)):
        network = EnsembleNetwork(PAIR, [nowhere_finite, captured.actuate(LARGEST)], group, captured._device)
        worker.capture({"degraded": network})
        assert worker.graphs.find(network, 4) is not None
        same([worker.compute(network, pixels(4))], [expected(engine, LARGEST, pixels(4))])
        assert network.take_failed() == (SMALLEST,)
