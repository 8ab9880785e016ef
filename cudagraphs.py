"""CUDA graphs: all that a subnet computes of a batch, captured once and started by a single call.

Starting the kernels of a small network one by one takes longer than they run. A graph is captured for one pair of
subnet and batch size, from uint8 pixels in a buffer that stays where it is, over normalisation and network, to class
probabilities. ``GraphCache`` decides which pairs are held within a budget of memory; it touches no device.
``GraphPool`` captures them for one worker, on its stream, into one pool of memory: graphs of a worker run one after
another, so that each may overwrite what the others computed with.

A batch of a size between two captured ones runs on the graph of the larger. The rows left over are black; no row of a
network depends on another, and what comes of these rows is never handed out.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Network = Callable[..., Tensor]

# Largest first: the memory that the largest computes with is there for the smaller ones, too.
BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)
# Runs before capturing, so that kernels are loaded, algorithms chosen and workspaces there: none of it can be captured.
WARM_UP_RUNS = 2


# How torch, the libraries below it and the allocators of a CPU say it, where they have no class for it.
# cuDNN without room for a workspace finds no engine, and says no more (github.com/pytorch/pytorch/issues/108645).
_OUT_OF_MEMORY = (
    "out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "not enough memory", "allocate memory", "bad_alloc",
    "unable to find an engine to execute this computation",
)  # fmt: skip


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether this says that the device or the host has too little memory left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in said for each in _OUT_OF_MEMORY)


def is_lost(error: RuntimeError | MemoryError) -> bool:
    """Whether this says that the device no longer computes: after such an error every call to it fails."""
    # Older versions of torch have no class for these errors, and libraries report theirs without it.
    of_device = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return of_device and not is_out_of_memory(error)


def padded_size(count: int, sizes: Iterable[int]) -> int | None:
    """The smallest of these batch sizes that holds so many inputs; None where they are more than any."""
    return min((size for size in sizes if size >= count), default=None)


class Pair(NamedTuple):
    """A subnet, by name, and a batch size: what a graph is captured for."""

    subnet: str
    batch_size: int


class Replayable(Protocol):
    """What a CapturedGraph needs of a torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, eq=False)
class CapturedGraph:
    """One captured pair: what it reads and what it writes, and the bytes that it takes beside its pool."""

    graph: Replayable
    pixels: Tensor
    probabilities: Tensor
    nbytes: int

    def replay(self, pixels: Tensor) -> Tensor:
        """Class probabilities of uint8 pixels (N, H, W, C), at most as many as were captured.

        Starts on the current stream and returns at once; to be read on it before another graph of the pool is replayed.
        """
        count = len(pixels)
        self.pixels[:count].copy_(pixels, non_blocking=True)
        if count < len(self.pixels):  # or an ensemble would count members that failed for a row of an earlier batch
            self.pixels[count:].zero_()
        self.graph.replay()
        return self.probabilities[:count]


class Pool(Protocol):
    """What captures graphs and knows what they take; a GraphPool, or a fake in tests."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102
    def capture(self, network: Network, size: int) -> CapturedGraph: ...  # noqa: D102
    def release(self) -> None: ...  # noqa: D102


class _Outcome(enum.Enum):
    """What came of an attempt to capture a pair; what is too large may fit in a smaller batch."""

    HELD = enum.auto()
    TOO_LARGE = enum.auto()
    FAILED = enum.auto()


class GraphCache:
    """Which pairs one worker holds captured, within a budget in bytes.

    Graphs are found by the network itself, so that replacing a subnet's network replaces its graphs. For one thread at
    a time; ``nbytes`` and ``pairs`` may be read by any.
    """

    def __init__(self, pool: Pool, budget: float) -> None:
        self.nbytes = 0
        self.pairs: tuple[Pair, ...] = ()
        self.budget = budget
        self._pool = pool
        self._sizes: tuple[int, ...] = BATCH_SIZES
        self._names: dict[Network, str] = {}
        self._graphs: dict[Network, dict[int, CapturedGraph]] = {}

    def find(self, network: Network, count: int) -> CapturedGraph | None:
        """The smallest graph of this network that takes so many inputs; None where there is none."""
        graphs = self._graphs.get(network, {})
        size = padded_size(count, graphs)
        return None if size is None else graphs[size]

    def fill(self, networks: Mapping[str, Network]) -> None:
        """Capture these subnets one after another, the largest batch first, as far as the budget goes.

        A subnet that cannot be captured is left alone and runs as it did. A batch size that has once passed the budget
        is not tried again, and no larger one: subnets are mostly named from the smallest to the largest.
        """
        if self.budget > 0:
            for name, network in networks.items():
                self._names[network] = name
                self._fill_subnet(network)
        self._report()

    def drop(self) -> None:
        """Give up all graphs, and their memory."""
        self._graphs.clear()
        self._report()
        self._pool.release()

    def _fill_subnet(self, network: Network) -> None:
        for size in self._sizes:
            if size in self._graphs.get(network, ()):
                continue
            outcome = self._try(network, size)
            if outcome is _Outcome.FAILED:
                return
            if outcome is _Outcome.TOO_LARGE:
                self._sizes = tuple(each for each in self._sizes if each < size)

    def _try(self, network: Network, size: int) -> _Outcome:
        outcome = self._capture(network, size)
        if outcome is not _Outcome.HELD:
            # A pool gives nothing back while a graph uses it, and after a capture that failed torch may not let it be
            # used again. With a graph that is destroyed, torch from 2.12 on frees workspaces of cuBLAS that others of
            # its stream go on using (github.com/pytorch/pytorch/issues/193402).
            self._capture_anew()
        return outcome

    def _capture(self, network: Network, size: int) -> _Outcome:
        try:
            graph = self._pool.capture(network, size)
        except RuntimeError as error:
            return _Outcome.TOO_LARGE if is_out_of_memory(error) else _Outcome.FAILED
        if self._measured() + graph.nbytes > self.budget:
            return _Outcome.TOO_LARGE
        self._graphs.setdefault(network, {})[size] = graph
        return _Outcome.HELD

    def _capture_anew(self) -> None:
        """Capture what is held again, in a new pool: as large as the old one was before the last attempt.

        What can no longer be captured is given up, and the others are captured once more: it may have spoiled them.
        """
        kept = [(network, size) for network, graphs in self._graphs.items() for size in graphs]
        while (failing := self._recapture(kept)) is not None:
            kept.remove(failing)

    def _recapture(self, pairs: Iterable[tuple[Network, int]]) -> tuple[Network, int] | None:
        """Hold these and no others, in a new pool; returns the first that cannot be captured, where it ends."""
        self._graphs.clear()
        self._pool.release()
        for network, size in pairs:
            try:
                self._graphs.setdefault(network, {})[size] = self._pool.capture(network, size)
            except RuntimeError:
                return network, size
        return None

    def _measured(self) -> int:
        graphs = (graph for graphs in self._graphs.values() for graph in graphs.values())
        return self._pool.nbytes + sum(graph.nbytes for graph in graphs)

    def _report(self) -> None:
        self.pairs = tuple(Pair(self._names[each], size) for each, graphs in self._graphs.items() for size in graphs)
        self.nbytes = self._measured() if self.pairs else 0


# ---------------------------------------------------------------------------------------------------------------- CUDA

# One capture at a time in the process, and meanwhile nothing that waits for the whole device or empties torch's cache:
# CUDA and torch forbid both, whichever thread it is that captures. Workers may compute meanwhile.
_capturing = threading.Lock()

# torch's allocators may go on asking a graph whose capture could not be ended: these must not be destroyed.
_unfinished: list[torch.cuda.CUDAGraph] = []


class GraphPool:
    """Captures graphs on one worker's CUDA stream, into one pool of memory that is the worker's own.

    ``forward`` is what is captured: class probabilities of a network and uint8 pixels (N, H, W, C). Its ``nbytes`` are
    those of the pool and the buffer for pixels; that of each graph is what the driver keeps of it, which can be far
    more. What cuDNN and cuBLAS keep for themselves (up to 32 MB for each thread and stream) is not counted.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        device: torch.device,
        shape: tuple[int, ...],
        forward: Callable[[Network, Tensor], Tensor],
    ) -> None:
        self._stream, self._device, self._shape, self._forward = stream, device, shape, forward
        self._handle = torch.cuda.graph_pool_handle()
        self._pixels: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and of the buffer for pixels."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = [each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(self._handle)]
        return int(sum(own)) + (0 if self._pixels is None else self._pixels.nbytes)

    def capture(self, network: Network, size: int) -> CapturedGraph:
        """The graph of this network for batches of this size; waits for the whole device, and for other captures.

        Raises RuntimeError where it cannot be captured; everything else on the device goes on as before.
        """
        with _capturing, torch.inference_mode(), torch.cuda.stream(self._stream):
            pixels = self._buffer(size)
            for _ in range(WARM_UP_RUNS):
                self._forward(network, pixels)
            before = self._beside_torch()
            graph = torch.cuda.CUDAGraph()
            probabilities = self._record(graph, network, pixels)
            graph.replay()  # the driver gets the rest of what it needs when a graph runs for the first time
            self._stream.synchronize()
            return CapturedGraph(graph, pixels, probabilities, max(0, self._beside_torch() - before))

    def release(self) -> None:
        """Give the pool's memory and all that torch keeps unused back to the device; no graph may be held any more."""
        with _capturing:
            self._pixels = None
            self._handle = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()

    def _buffer(self, size: int) -> Tensor:
        """Where graphs of this size read their pixels; a part of the same memory for all, but for what grows later."""
        if self._pixels is None or len(self._pixels) < size:
            self._pixels = torch.zeros((size, *self._shape), dtype=torch.uint8, device=self._device)
        return self._pixels[:size]

    def _record(self, graph: torch.cuda.CUDAGraph, network: Network, pixels: Tensor) -> Tensor:
        """Capture the graph; returns where it leaves the probabilities."""
        # Errors are looked for in this thread only: other workers may allocate and copy meanwhile.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode=mode):
                return self._forward(network, pixels)
        except RuntimeError:
            self._abandon(graph)
            raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo a capture that failed as far as torch does not.

        In versions before github.com/pytorch/pytorch/pull/180395 (2.11 is one) the allocator believes ever after that
        the capture goes on, and fails to empty its cache; later ones raise here, as there is nothing left to end.
        """
        graph.reset()
        _unfinished.append(graph)
        # As it is called from torch 2.8 on, and as it was.
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
        end_allocating = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        if end_allocating is None:  # nothing that could be done
            return
        with contextlib.suppress(RuntimeError):
            end_allocating(torch.cuda.current_device(), self._handle)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._handle)

    def _beside_torch(self) -> int:
        """Bytes of the device in use, by anyone, that torch's allocator knows nothing of."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)
