"""Texts of any length are computed together, and answered as each would be on its own."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_texts import LARGEST, LENGTH, SMALLEST, VOCABULARY, plain_probabilities, tokens, write_text_servable
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cudagraphs import CapturedGraph, GraphCache, Network
from engine import CHUNK, CudaWorker, Engine, Worker, measure_latencies
from inputbatches import Batching, Normaliser, Padder, batching_for
from servable import InputSpec, TokenSpec, load_servable
from startup import profile_latencies

SPEC = TokenSpec(length=LENGTH, vocabulary=len(VOCABULARY))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_servable(tmp_path_factory.mktemp("texts"), with_tokenizer=False)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(load_servable(folder), "cpu", workers=1, threads=1)
    yield engine
    engine.close()


def random_text(length: int, seed: int) -> NDArray[np.int32]:
    return tokens(*np.random.default_rng(seed).integers(0, SPEC.vocabulary, length).tolist())


@pytest.mark.parametrize(("longest", "padded"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 40), (40, 40)])
def test_a_batch_is_padded_to_the_bucket_of_its_longest_text(longest: int, padded: int) -> None:
    ((positions, stacked),) = Padder(SPEC).stack([random_text(1, 0), random_text(longest, 1)])
    assert positions == [0, 1]
    assert stacked.shape == (2, 2, padded)
    assert stacked[1, 1].sum() == longest
    assert not stacked[0, :, 1:].any()


@given(st.integers(1, 4096), st.data())
def test_buckets_never_cut_a_text_and_are_few(length: int, data: st.DataObject) -> None:
    padder = Padder(TokenSpec(length=length, vocabulary=9))
    count = data.draw(st.integers(1, length))
    assert count <= padder.padded_length(count) <= length
    shapes = {blank.shape[1] for blank in padder.blanks()}
    assert padder.padded_length(count) in shapes
    assert len(shapes) <= 9
    assert padder.blanks()[-1].shape == (2, length)


def test_each_kind_of_input_has_its_batching() -> None:
    image = InputSpec(height=4, width=4, channels=1, mean=(0.5,), std=(0.5,))
    device = torch.device("cpu")
    made: tuple[Batching, Batching] = batching_for(SPEC, device), batching_for(image, device)
    assert isinstance(made[0], Padder)
    assert isinstance(made[1], Normaliser)
    assert made[0].example(np.random.default_rng(0)).shape == (2, LENGTH)
    assert made[1].example(np.random.default_rng(0)).shape == (4, 4, 1)


@pytest.mark.parametrize("name", [SMALLEST, LARGEST])
@pytest.mark.parametrize("count", [3, CHUNK + 5])
@pytest.mark.slow
async def test_a_padded_batch_answers_as_each_text_alone(engine: Engine, folder: Path, name: str, count: int) -> None:
    texts = [random_text(1 + (7 * number) % LENGTH, number) for number in range(count)]
    found = (await engine.run(name, texts)).probabilities
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(row, plain_probabilities(folder, name, text[0].tolist()), atol=1e-5)
    assert np.ptp(found, axis=0).max() > 0.05, "the texts are told apart"


@pytest.mark.slow
async def test_holes_in_the_mask_are_kept(engine: Engine, folder: Path) -> None:
    text = random_text(9, 1)
    text[1, 3:6] = 0
    found = (await engine.run(LARGEST, [text, random_text(30, 2)])).probabilities
    expected = plain_probabilities(folder, LARGEST, text[0].tolist(), text[1].tolist())
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert np.abs(found[0] - plain_probabilities(folder, LARGEST, text[0].tolist())).max() > 1e-4


@pytest.mark.slow
async def test_memory_that_runs_out_splits_a_batch_of_texts(engine: Engine, folder: Path) -> None:
    raised = []

    def short_of_memory(name: str, network: object) -> object:
        def compute(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if len(ids) > 2:
                raised.append(len(ids))
                raise torch.OutOfMemoryError("out of memory")
            return network(ids, mask)  # type: ignore[operator,no-any-return]

        return compute

    strained = Engine(load_servable(folder), "cpu")
    strained.faults = short_of_memory  # type: ignore[assignment]
    texts = [random_text(5 * number + 1, number) for number in range(5)]
    found = (await strained.run(LARGEST, texts)).probabilities
    strained.close()
    assert raised == [5]
    np.testing.assert_allclose(found, (await engine.run(LARGEST, texts)).probabilities, atol=1e-5)


@pytest.mark.slow
async def test_latencies_are_measured_at_the_greatest_length(folder: Path) -> None:
    shapes = set()

    def seen(name: str, network: object) -> object:
        def compute(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(ids.shape))
            assert mask.all()
            return network(ids, mask)  # type: ignore[operator,no-any-return]

        return compute

    engine = Engine(load_servable(folder), "cpu")
    engine.faults = seen  # type: ignore[assignment]
    samples = await measure_latencies(engine, [SMALLEST], [1, 2], 2, lambda: None)
    assert shapes == {(1, LENGTH), (2, LENGTH)}
    assert [len(each) for each in samples[SMALLEST]] == [2, 2]
    shapes.clear()
    steps: list[None] = []
    await engine.warm_up([SMALLEST], (1, 16), lambda: steps.append(None))
    assert shapes == {(size, length) for size in (1, 16) for length in (16, 32, LENGTH)}
    assert len(steps) == 2
    engine.close()


@pytest.mark.slow
async def test_a_table_is_measured_for_texts_as_for_images(engine: Engine) -> None:
    table = await profile_latencies(engine, [SMALLEST, LARGEST], rounds=2)
    assert table[LARGEST].p50_s[-1] > 0
    assert table.keys() == {SMALLEST, LARGEST}


@pytest.mark.slow
async def test_nothing_is_fused_or_packed_of_texts(engine: Engine) -> None:
    await engine.prepare([SMALLEST, LARGEST])
    assert engine.held.nbytes == 0


class Done:
    """An event that has happened."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaWorkerOnACpu(CudaWorker):
    """All that a CudaWorker does of a batch, but on the CPU and with memory that is not pinned."""

    def __init__(self, batching: Batching) -> None:
        Worker.__init__(self, batching, self._free_memory)
        self._device, self._shape = torch.device("cpu"), batching.blanks()[-1].shape
        self._stream, self._done = None, Done()
        self._pinned = {}
        self._turn = threading.Lock()
        self.graphs = GraphCache(NoPool(), math.inf if batching.pixels_only else 0)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


class NoPool:
    """Captures nothing, and says so loudly."""

    nbytes = 0

    def capture(self, network: Network, size: int) -> CapturedGraph:
        raise AssertionError("graphs are for images")

    def release(self) -> None:
        pass


@pytest.mark.slow
async def test_what_a_gpu_worker_does_gives_the_same_and_captures_nothing(engine: Engine) -> None:
    worker = CudaWorkerOnACpu(Padder(SPEC))
    texts = [random_text(1 + (7 * number) % LENGTH, number) for number in range(CHUNK + 5)]
    actuated = engine.actuate(LARGEST)
    worker.capture({LARGEST: actuated})
    found = worker.compute(actuated, texts)
    np.testing.assert_allclose(found, (await engine.run(LARGEST, texts)).probabilities, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.slow
def test_a_gpu_answers_texts_as_a_cpu_does(engine: Engine, folder: Path) -> None:
    """Not asynchronous itself: where there is a GPU, the plugin for such tests may be missing."""
    asyncio.run(answers_alike(Engine(load_servable(folder), "cuda", workers=2), engine))


async def answers_alike(on_gpu: Engine, engine: Engine) -> None:
    await on_gpu.prepare([SMALLEST, LARGEST])
    assert on_gpu.held.pairs == (), "graphs are for images"
    await on_gpu.warm_up([SMALLEST, LARGEST], (1, 16), lambda: None)
    for count in (1, 5, 40):
        texts = [random_text(1 + (7 * number) % LENGTH, number) for number in range(count)]
        for name in (SMALLEST, LARGEST):
            found = (await on_gpu.run(name, texts)).probabilities
            np.testing.assert_allclose(found, (await engine.run(name, texts)).probabilities, atol=1e-4)
    on_gpu.close()
