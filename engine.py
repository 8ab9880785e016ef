"""The engine: one device that runs batches on subnets of a supernet, off the event loop.

A worker is one thread that computes one batch at a time: on the CPU with its own share of cores, on a GPU with its own
CUDA stream and pinned host buffers. The thread waits for the device, never the event loop. As far as the memory budget
goes, subnets are held ready to run fastest: on the CPU as executables with packed weights of their own
(executables.py), on a GPU as CUDA graphs (cudagraphs.py). The engine knows subnets by name; it knows no queue, deadline
or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cudagraphs import GraphCache, GraphPool, Network, Pair, is_lost, is_out_of_memory
from ensembles import (
    Catalogue,
    Ensemble,
    EnsembleNetwork,
    Mirrored,
    StreamGroup,
    ThreadGroup,
    forced,
    one_after_another,
)
from executables import ExecutableCache
from inputbatches import Batching, batching_for
from members import is_mirrored, subnet_of
from priorities import go_first
from servable import Servable
from supernet import ActuatedSubnet
from workers import Crew

log = logging.getLogger("superserve")


class EngineError(RuntimeError):
    """The device that was asked for is not there, or a batch could not be computed."""


class DeviceLostError(EngineError):
    """The device failed in a way after which it computes nothing more, until the process starts anew."""


# What tests make go wrong: called with a subnet's name and network on a worker's thread; what it returns computes the
# batch. It may return a network that raises, hangs or computes nonsense, or the one that it was given.
Faults = Callable[[str, Network], Network]

# How many hung workers of a CPU are replaced; each left a thread behind that may compute for ever, so that more of them
# ask for a new process. On a GPU a hung stream cannot be got rid of, and no worker is replaced.
REPLACEMENTS = 3
# A batch of the start hangs when it takes so long: nothing is known of it yet, and it may prepare much.
START_LIMIT_S = 120.0
# What still runs when the engine closes gets so long to end.
CLOSE_S = 5.0

# How many prepared operations oneDNN keeps (1024 unless told). Preparing one takes longer than a small convolution, and
# a frontier of subnets at every batch size up to CHUNK needs a few thousand, of some 10 kB each. What torch keeps
# beside them, to find them some 5 us faster, is for those that ran last: some 10 pairs of subnet and batch size.
# Both are read at the first convolution, so that they must be set before any network runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

# A CPU computes larger batches in parts of at most so many: outputs that stay in cache, far fewer shapes to prepare
# for, and a quarter of the memory, for 1 to 5 % of the time (docs/LOG.md).
CHUNK = 16
# Batches of many sizes leave the heap full of holes, 35 MB within a minute; giving them back takes some 4 ms.
TRIM_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What latencies depend on; a latency table is valid for one such device."""

    kind: str
    name: str
    torch: str
    dtype: str
    threads: int
    workers: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """Class probabilities (batch, classes) on the host, and the instant (perf_counter) at which they were there.

    ``failed``: members of the ensemble that some row of the probabilities had to do without.
    """

    probabilities: NDArray[np.float32]
    finished_s: float
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an engine holds beside the shared weights, to run faster.

    ``subnets``: those held, by name; ``pairs``: those of subnet and batch size that every worker of a GPU has captured.
    """

    nbytes: int
    subnets: tuple[str, ...]
    pairs: tuple[Pair, ...]


class Worker:
    """Computes one batch at a time on the CPU; ``group`` computes members of ensembles beside each other."""

    group: ThreadGroup | StreamGroup | None = None

    def __init__(self, batching: Batching, free_memory: Callable[[], None], most: float = CHUNK) -> None:
        """``free_memory`` is to make room when memory has run out; ``most`` inputs are computed at once."""
        self._batching = batching
        self.limit = PieceLimit(free_memory, most)

    def compute(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Class probabilities (batch, classes); returns when they are on the host.

        When memory runs out, what is held is given up and the batch is tried once more, in smaller pieces; those after
        it come in such pieces from the start. Raises DeviceLostError, or what else the device did.
        """
        with noticing_loss():
            return self.limit.compute(functools.partial(self._compute_piece, network), inputs)

    def _compute_piece(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            batch = self._batch(inputs)
            parts = batch.tensor_split(-(-len(inputs) // CHUNK)) if len(inputs) > CHUNK else (batch,)
            logits = [self._batching.logits(network, part) for part in parts]
            return (logits[0] if len(logits) == 1 else torch.cat(logits)).float().softmax(1).numpy()

    def _batch(self, inputs: Sequence[NDArray[Any]]) -> Tensor:
        groups = self._batching.stack(inputs)
        parts = [self._to_network(array) for _, array in groups]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([position for positions, _ in groups for position in positions])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _to_network(self, array: NDArray[Any]) -> Tensor:
        return self._batching.to_network(torch.from_numpy(array))


Piece = Callable[[Sequence[NDArray[Any]]], NDArray[np.float32]]  # class probabilities of some inputs


class PieceLimit:
    """How large a batch is computed in one piece: any, until memory runs out; then half of what was too much.

    It never grows again: what took the memory once may do so at any time. ``free_memory`` is to make room before the
    batch is tried again. ``most`` is what a piece is at most computed of at once, so that half of it is smaller.
    """

    def __init__(self, free_memory: Callable[[], None], most: float = math.inf) -> None:
        self.largest: int | None = None
        self._free_memory, self._most = free_memory, most

    def compute(self, piece: Piece, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """The rows of a batch, computed by ``piece``; tried once more in smaller pieces when memory runs out.

        Raises what ``piece`` raises: out of memory too, when that was not enough.
        """
        try:
            return self._in_pieces(piece, inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # After the except clause: before its end, the error's traceback holds the tensors of the failed try.
        self.largest = max(1, int(min(len(inputs), self.largest or len(inputs), self._most)) // 2)
        self._free_memory()
        return self._in_pieces(piece, inputs)

    def _in_pieces(self, piece: Piece, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        size = self.largest or len(inputs)
        if len(inputs) <= size:
            return piece(inputs)
        return np.concatenate([piece(inputs[first : first + size]) for first in range(0, len(inputs), size)])


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Inside, errors that tell of a lost device become DeviceLostError; all others stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        said, _, _ = str(error).partition("\n")
        raise DeviceLostError(f"the device is lost: {said}") from error


class CudaWorker(Worker):
    """Computes one batch at a time on its own CUDA stream, with pinned host buffers and CUDA graphs of its own.

    One stream is enough for copies and kernels. Of one batch, each needs what the one before it left, and the worker
    waits for the last before it takes another batch: on streams of their own they would find nothing to overlap with.
    The copies of one worker overlap the kernels of the others.
    """

    def __init__(self, batching: Batching, device: torch.device, budget: float) -> None:
        """``budget``: bytes that this worker's graphs may take; there are none for inputs other than pixels."""
        super().__init__(batching, self._free_memory, most=math.inf)
        shape = batching.blanks()[-1].shape
        self._device, self._shape = device, shape
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[Any, ...], Tensor] = {}
        self._turn = threading.Lock()  # computing or capturing: both use the stream and the graphs
        self.ensembles: dict[str, EnsembleNetwork] = {}  # graphs are found by them
        pool = GraphPool(self._stream, device, shape, self._probabilities)
        self.graphs = GraphCache(pool, budget if batching.pixels_only else 0)

    def capture(self, networks: Mapping[str, Network]) -> None:
        """Capture these subnets, by name, as far as the budget goes; a batch that comes meanwhile waits."""
        with self._turn:
            self.graphs.fill(networks)

    def compute(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """As any worker, but never while it captures."""
        with self._turn:
            return super().compute(network, inputs)

    def close(self) -> None:
        """Give up the graphs; what the worker computes afterwards is computed without."""
        if self._turn.acquire(blocking=False):  # else it hangs
            with contextlib.suppress(RuntimeError):  # of a lost device there is nothing to give back
                self.graphs.drop()
            self._turn.release()

    def _compute_piece(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            probabilities = self._replayed(network, inputs)
            if probabilities is None:
                probabilities = self._batching.logits(network, self._batch(inputs)).float().softmax(1)
            host = self._buffer("out", tuple(probabilities.shape), torch.float32)
            host.copy_(probabilities, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        return host.numpy().copy()  # the buffer is overwritten by the next batch

    def _replayed(self, network: Network, inputs: Sequence[NDArray[Any]]) -> Tensor | None:
        """The probabilities of pixels by a captured graph; None where there is none for these inputs."""
        graph = self.graphs.find(network, len(inputs))
        if graph is None or any(each.dtype != np.uint8 or each.shape != self._shape for each in inputs):
            return None
        pinned = self._buffer("in", (len(inputs), *self._shape), torch.uint8)
        np.stack(inputs, out=pinned.numpy())
        return graph.replay(pinned)

    def _probabilities(self, network: Network, pixels: Tensor) -> Tensor:
        return self._batching.logits(network, self._batching.to_network(pixels)).float().softmax(1)

    def _free_memory(self) -> None:
        self._stream.synchronize()
        self.graphs.drop()

    def _to_network(self, array: NDArray[Any]) -> Tensor:
        source = torch.from_numpy(array)
        pinned = self._buffer("in", tuple(source.shape), source.dtype)
        pinned.copy_(source)
        return self._batching.to_network(pinned.to(self._device, non_blocking=True))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A pinned buffer of this shape, a part of the largest that was needed so far."""
        key = name, shape[1:], dtype
        held = self._pinned.get(key)
        if held is None or held.shape[0] < shape[0]:
            held = torch.empty(shape, dtype=dtype, pin_memory=True)
            self._pinned[key] = held
        return held[: shape[0]]


class Engine:
    """Runs batches on one device; ``run`` may be called for as many batches at once as there are workers.

    ``faults`` is for tests; None costs nothing.
    """

    faults: Faults | None = None

    def __init__(
        self,
        servable: Servable,
        device: str = "auto",
        workers: int = 1,
        threads: int = 1,
        memory_budget: float = math.inf,
        ensembles: Sequence[Ensemble] = (),
    ) -> None:
        """``device``: auto, cpu, cuda or cuda:N; ``threads``: CPU threads per worker.

        It computes with the type of number that the servable's weights are kept in.

        ``memory_budget``: bytes that subnets may hold beside the shared weights, to run faster; on a GPU each worker
        captures graphs of its own, within its share. ``ensembles`` run by their names, as subnets do.
        """
        self._servable = servable
        self._device = _resolve(device)
        _check_computes(self._device, servable.supernet.dtype)
        cuda = self._device.type == "cuda"
        self.facts = DeviceFacts(
            kind=self._device.type,
            name=torch.cuda.get_device_name(self._device) if cuda else _processor_name(),
            torch=torch.__version__,
            dtype=str(servable.supernet.dtype).removeprefix("torch."),
            threads=0 if cuda else threads,
            workers=workers,
        )
        servable.supernet.to(self._device)
        if cuda:
            # The workers' streams do not wait for the copies of the default one.
            torch.cuda.current_stream(self._device).synchronize()
        self._batching = batching_for(servable.input, self._device, servable.supernet.dtype)
        self._threads = threads
        kind = self._device.type
        self.ensembles = Catalogue(ensembles, device=kind, cores=_cores(), workers=workers, threads=threads)
        self._groups: list[ThreadGroup] = []
        self._actuated: dict[str, ActuatedSubnet] = {}
        self.executables = ExecutableCache(memory_budget) if not cuda else None
        self._builder = Crew(1, "builder", functools.partial(torch.set_num_threads, 1))
        share = memory_budget / workers
        self._cuda_workers = [self._cuda_worker(share) for _ in range(workers)] if cuda else []
        self._without_thread = list(self._cuda_workers)
        self._crew = Crew(workers, "engine", self._make_worker, spares=0 if cuda else REPLACEMENTS)
        self._lost: str | None = None
        self._trimmed_s = time.perf_counter()

    def _cuda_worker(self, budget: float) -> CudaWorker:
        worker = CudaWorker(self._batching, self._device, budget)
        worker.group = StreamGroup(self._device, self.ensembles.beside)
        return worker

    def _make_worker(self) -> Worker:
        if self._device.type == "cuda":
            return self._without_thread.pop()
        torch.set_num_threads(self._threads)  # counts for the calling thread
        if _cores() > self.facts.workers * self._threads:  # else who reads requests would never come to it
            go_first()
        worker = Worker(self._batching, self._free_memory)
        worker.group = ThreadGroup(self.ensembles.beside, self.ensembles.threads)
        self._groups.append(worker.group)
        return worker

    @property
    def lost(self) -> str | None:
        """Why nothing can be computed any more until the process starts anew; None as long as something can."""
        return self._lost or (None if self._crew.present else "every worker hangs")

    def run(self, name: str, inputs: Sequence[NDArray[Any]], limit_s: float = math.inf) -> Awaitable[Outputs]:
        """Start a batch on this subnet at once; awaiting gives its outputs or raises what the device did.

        Raises DeviceLostError when no batch will succeed any more, and HungError (workers.py) once the batch has been
        running for ``limit_s``: its worker is then given up, and replaced if that is possible.
        """
        try:
            return self._crew.run(functools.partial(self._compute, name, inputs), limit_s)
        except RuntimeError as error:  # the engine is closed, or no worker is left
            refused: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
            refused.set_exception(EngineError(str(error)))
            return refused

    def actuate(self, name: str) -> ActuatedSubnet:
        """The subnet of this name, ready to run: a look-up after the first time."""
        actuated = self._actuated.get(name)
        if actuated is None:
            supernet = self._servable.supernet
            made = supernet.actuate(supernet.space.parse(name))
            if self._device.type == "cuda":
                # Smaller kernels are computed on this stream, for which those of the workers do not wait.
                torch.cuda.current_stream(self._device).synchronize()
            # The first stays, where two threads come at once: graphs are found by it.
            actuated = self._actuated.setdefault(name, made)
        return actuated

    def _compute(self, name: str, inputs: Sequence[NDArray[Any]], worker: Worker) -> Outputs:
        try:
            if name in self.ensembles:
                ensemble = self._ensemble(name, self.ensembles.mode(name, len(inputs)), worker)
                probabilities, finished_s = worker.compute(ensemble, inputs), time.perf_counter()
                outputs = Outputs(probabilities, finished_s, ensemble.take_failed())
            else:
                outputs = Outputs(worker.compute(self._with_faults(name), inputs), time.perf_counter())
        except DeviceLostError as error:
            self._lost = str(error)
            raise
        if self.executables is not None:
            self._look_after(self.executables, outputs.finished_s)
        return outputs

    def _look_after(self, executables: ExecutableCache, now_s: float) -> None:
        """On another thread, so that batches need not wait for it."""
        if executables.stale:
            self._later(self._rebalance)
        if now_s > self._trimmed_s + TRIM_EVERY_S:
            self._trimmed_s = now_s
            self._later(lambda _: _trim())

    def _later(self, work: Callable[[object], None]) -> None:
        """Have the builder do something that no batch waits for; it must not fail one that was computed."""
        with contextlib.suppress(RuntimeError):  # the engine is closing, or the system has no thread left
            self._builder.submit(work).future.add_done_callback(self._built)

    def _built(self, done: Future[None]) -> None:
        """Memory may have run out over packing: then nothing is held that was not needed before either."""
        if (error := done.exception()) is not None:
            log.error("preparing a subnet failed", exc_info=error)
            if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
                self._free_memory()

    def _rebalance(self, _: object) -> None:
        """Once, however many batches asked for it while the builder was busy."""
        if self.executables is not None and self.executables.stale:
            self.executables.rebalance()

    def _free_memory(self) -> None:
        if self.executables is not None:
            self.executables.drop()
        _return_freed_memory()

    def _with_faults(self, name: str) -> Network:
        network = self._network(name)
        return network if self.faults is None else self.faults(name, network)

    def _ensemble(self, name: str, mode: str, worker: Worker) -> EnsembleNetwork:
        """The network of an ensemble on this worker: on a GPU always the same one, for its graphs are found by it."""
        kept = worker.ensembles if isinstance(worker, CudaWorker) and self.faults is None else {}
        key = forced(self.ensembles[name].name, mode)
        if key not in kept:
            members = [self._with_faults(member) for member in self.ensembles[name].members]
            group = worker.group if mode == "parallel" and worker.group is not None else one_after_another
            # The first stays, where two threads come at once.
            kept.setdefault(key, EnsembleNetwork(self.ensembles[name], members, group, self._device))
        return kept[key]

    def _network(self, name: str) -> Network:
        """What computes a subnet, or a member of an ensemble."""
        if is_mirrored(name):
            return Mirrored(self._network(subnet_of(name)))
        if self.executables is None:
            return self.actuate(name)
        if name not in self.executables:
            self.executables.add(name, self.actuate(name))
        return self.executables.get(name)

    async def prepare(self, names: Sequence[str]) -> None:
        """Get these subnets ready, and hold the first of them packed or captured, as far as the memory budget goes."""
        with _as_engine_error("preparing the subnets failed"):
            await self._builder.run(functools.partial(self._prepare, names))

    def _prepare(self, names: Sequence[str], _: object) -> None:
        for name in self.ensembles.with_members(names):
            actuated = self.actuate(name)
            if self.executables is not None:
                self.executables.add(name, actuated)
        if self.executables is not None:
            try:
                self.executables.fill()
                _return_freed_memory()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._free_memory()  # all run from the shared weights
        for worker in self._cuda_workers:  # one after another: the others compute meanwhile
            worker.capture(self._captured(names, worker))

    def _captured(self, names: Sequence[str], worker: CudaWorker) -> Mapping[str, Network]:
        """What a worker captures: ensembles in each mode in which they may run, after the subnets."""
        if worker.graphs.budget > 0:
            for name in self.ensembles.with_members(names):
                self.actuate(name).hold()
        networks: dict[str, Network] = {name: self.actuate(name) for name in names if name not in self.ensembles}
        for name in (name for name in names if name in self.ensembles):
            for mode in self.ensembles.modes(name):
                networks[forced(name, mode)] = self._ensemble(name, mode, worker)
        return networks

    def plan(self, name: str, modes: Sequence[str]) -> None:
        """Run an ensemble in the mode ``modes[n]`` for a batch of n: "parallel" or "serial"; raises EngineError.

        On a GPU, ``prepare`` captures the modes that were planned before, or both.
        """
        try:
            self.ensembles.plan(name, modes)
        except ValueError as error:
            raise EngineError(str(error)) from error

    @property
    def held(self) -> Held:
        """What is held beside the shared weights at the moment, by all workers together."""
        if self.executables is not None:
            return Held(nbytes=self.executables.nbytes, subnets=self.executables.held, pairs=())
        graphs = [worker.graphs for worker in self._cuda_workers]
        pairs = tuple(pair for pair in graphs[0].pairs if all(pair in each.pairs for each in graphs))
        subnets = tuple(dict.fromkeys(pair.subnet for pair in pairs))
        return Held(nbytes=sum(each.nbytes for each in graphs), subnets=subnets, pairs=pairs)

    def blank_input(self) -> NDArray[Any]:
        """A black image of the right size, or the first token as often as a text may have tokens."""
        return self._batching.blanks()[-1]

    def random_input(self, rng: np.random.Generator) -> NDArray[Any]:
        """What takes as long as any input, to measure by."""
        return self._batching.example(rng)

    async def warm_up(self, names: Sequence[str], batch_sizes: Sequence[int], step: Callable[[], object]) -> None:
        """Run each subnet at each batch size and input shape once on every worker; ``step`` after each batch size."""
        for name in names:
            for size in batch_sizes:
                for blank in self._batching.blanks():
                    batches = (self.run(name, [blank] * size, START_LIMIT_S) for _ in range(self.facts.workers))
                    with _as_engine_error(f"warming up {name} at batch size {size} failed"):
                        await asyncio.gather(*batches)
                step()
        _return_freed_memory()

    def close(self) -> None:
        """Let running batches end, then stop the threads and give back what a GPU holds.

        What has not ended within CLOSE_S fails, and is left alone.
        """
        until_s = time.perf_counter() + CLOSE_S
        self._crew.close(CLOSE_S)
        self._builder.close(max(0.0, until_s - time.perf_counter()))
        for group in self._groups:
            group.close(0)  # what still runs is of a worker that was left alone
        for worker in self._cuda_workers:
            worker.close()


@contextlib.contextmanager
def _as_engine_error(what: str) -> Iterator[None]:
    """Inside, what torch or the device raises becomes an EngineError, which ends the start with one line.

    A lost device becomes a DeviceLostError, which asks for a new process.
    """
    try:
        yield
    except EngineError:
        raise
    except (RuntimeError, MemoryError) as error:
        kind = DeviceLostError if is_lost(error) else EngineError
        raise kind(f"{what}: {str(error).partition(chr(10))[0] or type(error).__name__}") from error


def _return_freed_memory() -> None:
    """Give what is no longer needed back to the system; glibc would keep some 30 MB of it."""
    gc.collect()
    _trim()


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


async def measure_latencies(
    engine: Engine, names: Sequence[str], batch_sizes: Sequence[int], rounds: int, step: Callable[[], object]
) -> Mapping[str, Sequence[Sequence[float]]]:
    """Seconds from submitting a batch to having its result on the host: per name, per batch size, one per round.

    All names and sizes are run once a round, so that a slow moment of the machine falls on all alike, with as many
    batches in flight as there are workers. The first round warms up and is not counted. ``step`` is called after each.
    """
    samples: dict[str, list[list[float]]] = {name: [[] for _ in batch_sizes] for name in names}
    input = engine.random_input(np.random.default_rng(0))

    async def timed(name: str, size: int) -> float:
        started_s = time.perf_counter()
        return (await engine.run(name, [input] * size, START_LIMIT_S)).finished_s - started_s

    for number in range(rounds + 1):
        for name in names:
            for index, size in enumerate(batch_sizes):
                taken = await asyncio.gather(*(timed(name, size) for _ in range(engine.facts.workers)))
                if number:
                    samples[name][index] += taken
                step()
    return samples


def _resolve(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise EngineError(f"unknown device '{device}'; known: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if available else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise EngineError(f"device '{device}' is not there: {count} CUDA devices found")
    return resolved


def _check_computes(device: torch.device, dtype: torch.dtype) -> None:
    """Raise EngineError for numbers that the device has no kernels for."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        with torch.cuda.device(device):
            computes = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        kernels = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
        computes = dtype not in kernels or getattr(torch.ops.mkldnn, kernels[dtype], lambda: False)()
    if not computes:
        raise EngineError(f"this {device.type} has no kernels for {name}; for float32 it has")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
