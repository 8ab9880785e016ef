"""Which CUDA graphs are held within a budget, and how batches are fitted to them; with fakes for the device.

What torch and CUDA make of it is tested in test_engine.py, on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cudagraphs import (
    BATCH_SIZES,
    CapturedGraph,
    GraphCache,
    GraphPool,
    Pair,
    is_lost,
    is_out_of_memory,
    padded_size,
)
from ensembles import EnsembleNetwork, one_after_another
from profiletable import Ensemble

Network = Callable[[Tensor], Tensor]


class FakeGraph:
    """Computes all rows of its buffer when replayed, as a CUDA graph does.

    ``spoiled``: another of its pool was destroyed, and with it the workspaces that this one goes on using.
    """

    spoiled = False

    def __init__(self, network: Network, pixels: Tensor, probabilities: Tensor) -> None:
        self.network, self.pixels, self.probabilities = network, pixels, probabilities

    def replay(self) -> None:
        self.probabilities.copy_(self.network(self.pixels))


class FakePool:
    """Takes ``each`` bytes for a graph, and what the largest of them needs, even if that one is gone.

    An image needs one byte, or as many as ``widths`` says of the subnet.
    """

    def __init__(
        self,
        each: int = 0,
        failures: Mapping[Pair, RuntimeError] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.each, self.failures, self.widths = each, failures or {}, widths or {}
        self.nbytes = 0
        self.attempts: list[Pair] = []
        self.alive: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self._pixels = torch.zeros(64, 1, 1, 1, dtype=torch.uint8)

    def capture(self, network: Network, size: int) -> CapturedGraph:
        pair = Pair(str(network), size)
        self.attempts.append(pair)
        self.nbytes = max(self.nbytes, size * self.widths.get(pair.subnet, 1))
        if pair in self.failures:
            self._spoil()
            raise self.failures[pair]
        pixels, probabilities = self._pixels[:size], torch.full((size, 2), torch.nan)
        graph = FakeGraph(network, pixels, probabilities)
        self._live(graph)
        return CapturedGraph(graph, pixels, probabilities, self.each)

    def _live(self, graph: FakeGraph) -> None:
        self.alive.add(graph)
        weakref.finalize(graph, self._spoil).atexit = False

    def _spoil(self) -> None:
        for graph in self.alive:
            graph.spoiled = True

    def release(self) -> None:
        assert not self.alive, "memory of a graph that may still run"
        self.nbytes = 0


class FakeNetwork:
    """Gives the first pixel of each image and a constant."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.stack([pixels[:, 0, 0, 0], torch.full((len(pixels),), 7)], 1)


def networks(*names: str) -> dict[str, Network]:
    return {name: FakeNetwork(name) for name in names}


def images(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


def pairs(name: str, *sizes: int) -> list[Pair]:
    return [Pair(name, size) for size in sizes]


def test_a_batch_is_padded_to_the_next_size() -> None:
    padded = {count: padded_size(count, BATCH_SIZES) for count in (1, 2, 3, 4, 5, 8, 9, 33, 64, 65)}
    assert padded == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 33: 64, 64: 64, 65: None}
    assert padded_size(1, ()) is None


def test_subnets_are_captured_in_the_order_named_each_from_the_largest_batch_down() -> None:
    pool = FakePool()
    cache = GraphCache(pool, 1e9)
    cache.fill(networks("b", "a"))
    assert pool.attempts == [*pairs("b", 64, 32, 16, 8, 4, 2, 1), *pairs("a", 64, 32, 16, 8, 4, 2, 1)]
    assert list(cache.pairs) == pool.attempts


def test_what_is_held_is_the_pool_once_and_each_graph() -> None:
    cache = GraphCache(FakePool(each=10), 1e9)
    assert (cache.nbytes, cache.pairs) == (0, ())
    cache.fill(networks("a", "b"))
    assert cache.nbytes == 64 + 14 * 10


def test_without_a_budget_nothing_is_captured() -> None:
    pool = FakePool()
    cache = GraphCache(pool, 0)
    cache.fill(networks("a"))
    assert (pool.attempts, cache.pairs, cache.nbytes) == ([], (), 0)


def test_a_size_that_passes_the_budget_is_given_back_and_not_tried_again() -> None:
    pool = FakePool()
    cache = GraphCache(pool, 20)
    cache.fill(networks("a", "b"))
    assert pool.attempts[:3] == pairs("a", 64, 32, 16)
    assert list(cache.pairs) == [*pairs("a", 16, 8, 4, 2, 1), *pairs("b", 16, 8, 4, 2, 1)]
    assert (pool.nbytes, cache.nbytes) == (16, 16)


def test_what_was_held_is_captured_anew_when_an_attempt_made_the_pool_grow() -> None:
    pool = FakePool(widths={"b": 2})
    cache = GraphCache(pool, 40)
    cache.fill(networks("a", "b"))
    held = pairs("a", 32, 16, 8, 4, 2, 1)
    assert pool.attempts[:15] == [*pairs("a", 64), *held, *pairs("b", 32), *held, *pairs("b", 16)]
    assert list(cache.pairs) == [*held, *pairs("b", 16, 8, 4, 2, 1)]
    assert cache.nbytes == pool.nbytes == 32


def test_graphs_that_share_the_pool_are_limited_by_what_each_takes_beside_it() -> None:
    cache = GraphCache(FakePool(each=10), 64 + 35)
    cache.fill(networks("a", "b"))
    assert list(cache.pairs) == pairs("a", 64, 32, 16)


@given(st.integers(0, 800), st.integers(0, 30), st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
def test_the_budget_is_never_passed(budget: int, each: int, widths: tuple[int, int, int]) -> None:
    pool = FakePool(each, widths=dict(zip("abc", widths, strict=True)))
    cache = GraphCache(pool, budget)
    cache.fill(networks("a", "b", "c"))
    assert cache.nbytes == pool.nbytes + each * len(cache.pairs) <= budget
    assert len(pool.alive) == len(cache.pairs)
    assert not any(graph.spoiled for graph in pool.alive)
    assert bool(cache.pairs) or budget < widths[0] + each, "a graph for one image fits"


def test_a_subnet_that_cannot_be_captured_is_left_alone() -> None:
    pool = FakePool(failures={Pair("a", 64): RuntimeError("operation not permitted when stream is capturing")})
    cache = GraphCache(pool, 1e9)
    named = networks("a", "b")
    cache.fill(named)
    assert pool.attempts == [*pairs("a", 64), *pairs("b", *BATCH_SIZES)]
    assert cache.find(named["a"], 1) is None
    assert cache.find(named["b"], 1) is not None


def test_no_graph_is_held_that_was_there_when_another_was_destroyed() -> None:
    too_large = FakePool(each=10)
    failing = FakePool(failures={Pair("b", 16): RuntimeError("operation not permitted when stream is capturing")})
    for pool, budget in ((too_large, 64 + 35), (failing, 1e9)):
        cache = GraphCache(pool, budget)
        cache.fill(networks("a", "b"))
        assert cache.pairs
        assert not any(graph.spoiled for graph in pool.alive)


def test_what_can_no_longer_be_captured_anew_is_given_up_and_spoils_no_other() -> None:
    pool = FakePool(widths={"b": 2})
    cache = GraphCache(pool, 40)
    cache.fill(networks("a"))
    pool.failures = {Pair("a", 16): torch.cuda.OutOfMemoryError("CUDA out of memory.")}
    cache.fill(networks("b"))
    assert list(cache.pairs) == [*pairs("a", 32, 8, 4, 2, 1), *pairs("b", 16, 8, 4, 2, 1)]
    assert not any(graph.spoiled for graph in pool.alive)


def test_a_batch_for_which_memory_runs_out_is_not_tried_again() -> None:
    pool = FakePool(failures={Pair("a", 64): torch.cuda.OutOfMemoryError("CUDA out of memory.")})
    cache = GraphCache(pool, 1e9)
    cache.fill(networks("a", "b"))
    assert list(cache.pairs) == [*pairs("a", 32, 16, 8, 4, 2, 1), *pairs("b", 32, 16, 8, 4, 2, 1)]


def test_other_errors_are_not_taken_for_a_graph_that_cannot_be() -> None:
    class Broken(FakePool):
        def capture(self, network: Network, size: int) -> CapturedGraph:
            raise TypeError("a mistake in the network")

    with pytest.raises(TypeError):
        GraphCache(Broken(), 1e9).fill(networks("a"))


def test_filling_twice_captures_nothing_twice() -> None:
    pool = FakePool()
    cache = GraphCache(pool, 1e9)
    named = networks("a", "b")
    cache.fill({"a": named["a"]})
    cache.fill(named)
    assert pool.attempts == [*pairs("a", *BATCH_SIZES), *pairs("b", *BATCH_SIZES)]


def test_a_graph_is_found_by_its_network_and_the_next_size() -> None:
    cache = GraphCache(FakePool(), 1e9)
    named = networks("a", "b")
    cache.fill({"a": named["a"]})
    found = {count: cache.find(named["a"], count) for count in (1, 3, 64)}
    assert {count: graph and len(graph.pixels) for count, graph in found.items()} == {1: 1, 3: 4, 64: 64}
    assert cache.find(named["a"], 65) is None
    assert cache.find(named["b"], 1) is None
    assert cache.find(FakeNetwork("a"), 1) is None, "another network of the same name"


def test_what_was_dropped_is_gone_and_can_be_captured_again() -> None:
    pool = FakePool(each=5)
    cache = GraphCache(pool, 1e9)
    named = networks("a")
    cache.fill(named)
    cache.drop()
    assert (cache.pairs, cache.nbytes, pool.nbytes, cache.find(named["a"], 1)) == ((), 0, 0, None)
    cache.fill(named)
    assert len(cache.pairs) == len(BATCH_SIZES)


def test_padding_never_leaks() -> None:
    cache = GraphCache(FakePool(), 1e9)
    network = FakeNetwork("a")
    cache.fill({"a": network})
    for values in (range(1, 65), range(100, 133), (200, 201, 202), (210,), (220, 221, 222, 223, 224)):
        graph = cache.find(network, len(values))
        assert graph is not None
        rows = graph.replay(images(*values))
        assert rows.tolist() == [[value, 7] for value in values]


def test_a_member_is_not_reported_for_what_it_did_to_an_earlier_batch() -> None:
    def sound(pixels: Tensor) -> Tensor:
        return FakeNetwork("b")(pixels).float()

    def fails_for_nine(pixels: Tensor) -> Tensor:
        return sound(pixels).masked_fill(pixels[:, 0, 0] == 9, torch.nan)

    pair = Ensemble(members=("a", "b"), combination="mean", weights=(0.5, 0.5))
    network = EnsembleNetwork(pair, [fails_for_nine, sound], one_after_another, torch.device("cpu"))
    cache = GraphCache(FakePool(), 1e9)
    cache.fill({"both": network})
    graph = cache.find(network, 4)
    assert graph is not None
    told = []
    for values in ((1, 2, 3, 9), (1, 2, 3), (9,), (1,)):
        graph.replay(images(*values))
        told.append(network.take_failed())
    assert told == [("a",), (), ("a",), ()]


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
def test_a_capture_that_failed_is_ended_by_the_name_that_this_torch_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unfinished:
        def reset(self) -> None:
            calls.append("reset")

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    monkeypatch.setattr(torch._C, name, lambda device, handle: calls.append(f"end {handle}"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, handle: calls.append("release"), raising=False)
    pool = object.__new__(GraphPool)
    pool._handle = (0, 7)  # type: ignore[assignment]
    pool._abandon(Unfinished())  # type: ignore[arg-type]
    assert calls == ["reset", "end (0, 7)", "release"]


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"), True, False),
        (RuntimeError("std::bad_alloc"), True, False),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True, False),
        (MemoryError("Unable to allocate 1.00 PiB for an array"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for …"), False, True),
        (torch.AcceleratorError("uncorrectable ECC error encountered"), False, True),
        (RuntimeError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False, False),
    ],
)
def test_errors_of_the_device_are_told_apart(error: RuntimeError | MemoryError, memory: bool, lost: bool) -> None:
    assert is_out_of_memory(error) == memory
    assert is_lost(error) == lost


def test_a_cpu_without_enough_memory_is_recognised_by_what_it_really_says() -> None:
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(short.value)
