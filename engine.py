"""The engine: one device that runs batches on subnets of a supernet, off the event loop.

A worker is one thread that computes one batch at a time: on the CPU with its own share of cores, on a GPU with its own
CUDA stream and pinned host buffers. The thread waits for the device, never the event loop. On the CPU a subnet runs as
an executable (executables.py), with packed weights of its own as far as the memory budget goes. The engine knows
subnets by name; it knows no queue, deadline or HTTP.
"""

from __future__ import annotations

import asyncio
import math
import os
import platform
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executables import ExecutableCache
from servable import InputSpec, Servable
from supernet import ActuatedSubnet, Subnet

Network = Callable[[Tensor], Tensor]


class EngineError(RuntimeError):
    """The device that was asked for is not there, or a batch could not be computed."""


# How many prepared operations oneDNN keeps (1024 unless told) and torch with them. Preparing one takes longer than a
# small convolution, and a frontier of subnets at every batch size up to CHUNK needs a few thousand, of some 10 kB each.
# They are read at the first convolution, so that they must be set before any network runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

# A CPU computes larger batches in parts of at most so many: outputs that stay in cache, far fewer shapes to prepare
# for, and a quarter of the memory, for 1 to 5 % of the time (docs/LOG.md).
CHUNK = 16


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
    """Class probabilities (batch, classes) on the host, and the instant (perf_counter) at which they were there."""

    probabilities: NDArray[np.float32]
    finished_s: float


class Normaliser:
    """Turns queries' inputs into one network batch: uint8 pixels (H, W, C) or normalised float32 (C, H, W)."""

    def __init__(self, spec: InputSpec, device: torch.device) -> None:
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device)
        self._shift = (-mean / std).view(1, -1, 1, 1).to(device)

    def pixels(self, stacked: Tensor) -> Tensor:
        """Network inputs (N, C, H, W), channels last in memory, of uint8 pixels (N, H, W, C) on the device."""
        return torch.addcmul(self._shift, stacked.permute(0, 3, 1, 2).float(), self._scale)

    @staticmethod
    def stack(inputs: Sequence[NDArray[Any]]) -> list[tuple[list[int], NDArray[Any]]]:
        """Inputs of one form each, stacked, with their positions in the batch; one group unless forms are mixed."""
        kinds = {row.dtype for row in inputs}
        groups = ([i for i, row in enumerate(inputs) if row.dtype == kind] for kind in sorted(kinds, key=str))
        return [(positions, np.stack([inputs[i] for i in positions])) for positions in groups]


class Worker:
    """Computes one batch at a time on the CPU."""

    def __init__(self, normaliser: Normaliser) -> None:
        self._normaliser = normaliser

    def compute(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Class probabilities (batch, classes)."""
        with torch.inference_mode():
            batch = self._batch(inputs)
            parts = batch.tensor_split(-(-len(inputs) // CHUNK)) if len(inputs) > CHUNK else (batch,)
            logits = [network(part) for part in parts]
            return (logits[0] if len(logits) == 1 else torch.cat(logits)).softmax(1).numpy()

    def _batch(self, inputs: Sequence[NDArray[Any]]) -> Tensor:
        groups = self._normaliser.stack(inputs)
        parts = [self._to_network(array) for _, array in groups]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([position for positions, _ in groups for position in positions])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _to_network(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return self._normaliser.pixels(tensor) if array.dtype == np.uint8 else tensor


class CudaWorker(Worker):
    """Computes one batch at a time on its own CUDA stream, with pinned host buffers that are used again."""

    def __init__(self, normaliser: Normaliser, device: torch.device) -> None:
        super().__init__(normaliser)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[Any, ...], Tensor] = {}

    def compute(self, network: Network, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Class probabilities (batch, classes); returns when they are on the host."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            probabilities = network(self._batch(inputs)).softmax(1).float()
            host = self._buffer("out", tuple(probabilities.shape), torch.float32)
            host.copy_(probabilities, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        return host.numpy().copy()  # the buffer is overwritten by the next batch

    def _to_network(self, array: NDArray[Any]) -> Tensor:
        source = torch.from_numpy(array)
        pinned = self._buffer("in", tuple(source.shape), source.dtype)
        pinned.copy_(source)
        on_device = pinned.to(self._device, non_blocking=True)
        return self._normaliser.pixels(on_device) if array.dtype == np.uint8 else on_device

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A pinned buffer of this shape, a part of the largest that was needed so far."""
        key = name, shape[1:], dtype
        held = self._pinned.get(key)
        if held is None or held.shape[0] < shape[0]:
            held = torch.empty(shape, dtype=dtype, pin_memory=True)
            self._pinned[key] = held
        return held[: shape[0]]


class Engine:
    """Runs batches on one device; ``run`` may be called for as many batches at once as there are workers."""

    def __init__(
        self,
        servable: Servable,
        device: str = "auto",
        workers: int = 1,
        threads: int = 1,
        memory_budget: float = math.inf,
    ) -> None:
        """``device``: auto, cpu, cuda or cuda:N; ``threads``: CPU threads per worker.

        ``memory_budget``: bytes that subnets may hold beside the shared weights, to run faster; counts on a CPU.
        """
        self._servable = servable
        self._device = _resolve(device)
        cuda = self._device.type == "cuda"
        self.facts = DeviceFacts(
            kind=self._device.type,
            name=torch.cuda.get_device_name(self._device) if cuda else _processor_name(),
            torch=torch.__version__,
            dtype="float32",
            threads=0 if cuda else threads,
            workers=workers,
        )
        servable.supernet.to(self._device)
        if cuda:
            torch.cuda.synchronize(self._device)  # the workers' streams do not wait for the copies of the default one
        self._normaliser = Normaliser(servable.input, self._device)
        self._threads = threads
        self._actuated: dict[str, ActuatedSubnet] = {}
        self.executables = ExecutableCache(memory_budget) if not cuda else None
        self._builder = ThreadPoolExecutor(
            1, thread_name_prefix="builder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="engine", initializer=self._start_worker)

    def _start_worker(self) -> None:
        if self._device.type == "cuda":
            self._local.worker = CudaWorker(self._normaliser, self._device)
        else:
            torch.set_num_threads(self._threads)  # counts for the calling thread
            self._local.worker = Worker(self._normaliser)

    def run(self, name: str, inputs: Sequence[NDArray[Any]]) -> Awaitable[Outputs]:
        """Start a batch on this subnet at once; awaiting gives its outputs or raises what the device did."""
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._pool, self._compute, name, inputs)
        except RuntimeError as error:  # the engine is closed
            refused: asyncio.Future[Outputs] = loop.create_future()
            refused.set_exception(EngineError(str(error)))
            return refused

    def actuate(self, name: str) -> ActuatedSubnet:
        """The subnet of this name, ready to run: a look-up after the first time."""
        actuated = self._actuated.get(name)
        if actuated is None:
            actuated = self._actuated[name] = self._servable.supernet.actuate(Subnet.parse(name))
        return actuated

    def _compute(self, name: str, inputs: Sequence[NDArray[Any]]) -> Outputs:
        worker: Worker = self._local.worker
        outputs = Outputs(worker.compute(self._network(name), inputs), time.perf_counter())
        if self.executables is not None and self.executables.stale:
            self._builder.submit(self._rebalance)
        return outputs

    def _rebalance(self) -> None:
        """Once, however many batches asked for it while the builder was busy."""
        if self.executables is not None and self.executables.stale:
            self.executables.rebalance()

    def _network(self, name: str) -> Network:
        if self.executables is None:
            return self.actuate(name)
        if name not in self.executables:
            self.executables.add(name, self.actuate(name))
        return self.executables.get(name)

    async def prepare(self, names: Sequence[str]) -> None:
        """Get these subnets ready, and hold the first of them packed, as far as the memory budget goes."""
        await asyncio.wrap_future(self._builder.submit(self._prepare, names))

    def _prepare(self, names: Sequence[str]) -> None:
        for name in names:
            actuated = self.actuate(name)
            if self.executables is not None:
                self.executables.add(name, actuated)
        if self.executables is not None:
            self.executables.fill()

    def blank_input(self) -> NDArray[np.uint8]:
        """A black image of the right size, for warming up and measuring."""
        spec = self._servable.input
        return np.zeros((spec.height, spec.width, spec.channels), np.uint8)

    async def warm_up(self, names: Sequence[str], batch_sizes: Sequence[int], step: Callable[[], object]) -> None:
        """Run each subnet at each batch size once on every worker; ``step`` is called after each."""
        blank = self.blank_input()
        for name in names:
            for size in batch_sizes:
                await asyncio.gather(*(self.run(name, [blank] * size) for _ in range(self.facts.workers)))
                step()

    def close(self) -> None:
        """Let running batches end, then stop the threads."""
        self._pool.shutdown()
        self._builder.shutdown()


async def measure_latencies(
    engine: Engine, names: Sequence[str], batch_sizes: Sequence[int], rounds: int, step: Callable[[], object]
) -> Mapping[str, Sequence[Sequence[float]]]:
    """Seconds from submitting a batch to having its result on the host: per name, per batch size, one per round.

    All names and sizes are run once a round, so that a slow moment of the machine falls on all alike, with as many
    batches in flight as there are workers. The first round warms up and is not counted. ``step`` is called after each.
    """
    samples: dict[str, list[list[float]]] = {name: [[] for _ in batch_sizes] for name in names}
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, engine.blank_input().shape, np.uint8)

    async def timed(name: str, size: int) -> float:
        started_s = time.perf_counter()
        return (await engine.run(name, [image] * size)).finished_s - started_s

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


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
