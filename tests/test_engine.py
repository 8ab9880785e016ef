"""The engine computes what the actuated subnet would, on any worker, for inputs of either form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_supernet import INPUT, SPACE, tiny_servable
from numpy.typing import NDArray

from engine import DeviceFacts, Engine, EngineError, Normaliser, measure_latencies
from supernet import IllegalSubnetError

LARGEST, SMALLEST, UNCALIBRATED = SPACE.largest.name, SPACE.smallest.name, "d1-2-1-e0.5"
Input = NDArray[Any]


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
    assert engine._pool.submit(torch.get_num_threads).result() == 2
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


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
async def gpu() -> AsyncIterator[Engine]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits of mantissa are no error of the engine
    engine = Engine(tiny_servable(), "cuda", workers=2)
    yield engine
    engine.close()
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
async def test_a_gpu_gives_the_logits_of_the_cpu(gpu: Engine) -> None:
    cpu = tiny_servable().supernet
    for name in (LARGEST, SMALLEST, UNCALIBRATED):
        subnet = gpu.actuate(name).subnet
        x = torch.from_numpy(np.stack([normalised(image) for image in pixels(16)]))
        with torch.inference_mode():
            on_gpu = gpu.actuate(name)(x.cuda()).cpu()
            torch.testing.assert_close(on_gpu, cpu.actuate(subnet)(x), rtol=0, atol=1e-3)


@pytest.mark.gpu
async def test_a_gpu_takes_both_forms_and_keeps_order(gpu: Engine, engine: Engine) -> None:
    inputs = [normalised(image) if number % 3 else image for number, image in enumerate(pixels(9))]
    outputs = await gpu.run(LARGEST, inputs)
    np.testing.assert_allclose(outputs.probabilities, expected(engine, LARGEST, inputs), atol=1e-3)


@pytest.mark.gpu
async def test_two_streams_run_at_once(gpu: Engine, engine: Engine) -> None:
    names = [LARGEST, SMALLEST] * 50
    batches = [pixels(1 + number % 16, seed=number) for number in range(len(names))]
    outputs = await asyncio.gather(*map(gpu.run, names, batches))
    for name, batch, output in zip(names, batches, outputs, strict=True):
        np.testing.assert_allclose(output.probabilities, expected(engine, name, batch), atol=1e-3)


@pytest.mark.gpu
async def test_pinned_buffers_serve_other_batch_sizes_and_results_survive_them(gpu: Engine, engine: Engine) -> None:
    batches = [pixels(size, seed=size) for size in (4, 16, 1, 8, 16, 3)]
    outputs = [await gpu.run(LARGEST, batch) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(output.probabilities, expected(engine, LARGEST, batch), atol=1e-3)


@pytest.mark.gpu
async def test_a_failed_batch_leaves_the_gpu_usable(gpu: Engine) -> None:
    with pytest.raises(RuntimeError):
        await gpu.run(LARGEST, [np.zeros((2, 8, 8), np.float32)])
    assert (await gpu.run(LARGEST, pixels(2))).probabilities.shape == (2, 5)


@pytest.mark.gpu
def test_a_gpu_is_chosen_when_there_is_one(gpu: Engine) -> None:
    automatic = Engine(tiny_servable())
    assert (automatic.facts.kind, automatic.facts.threads) == ("cuda", 0)
    automatic.close()
