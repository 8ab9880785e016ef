"""Ensembles: several subnets answer a batch together, one after another or at the same time.

An ``EnsembleNetwork`` is called as any network is, and returns the logarithms of class probabilities that are the
weighted mean of its members', or their weighted votes: the softmax that follows every network gives them back. So
workers, pieces of batches and CUDA graphs need not know of ensembles; all is combined on the device, and copied once.

Members run *serial*, each after the one before it, or *parallel*: on threads of a ``ThreadGroup`` beside the worker's
own, or on CUDA streams of a ``StreamGroup`` beside the worker's own. Which is faster depends on the batch size; a
``Catalogue`` knows what was planned for each.

A member that fails does not fail the batch: the weights of the others count for all. It has failed if it raised, and
for a row of the batch if its probabilities there are not finite, though another member's are. What concerns the device
(out of memory, lost) is no member's failure and reaches the worker.

This file knows torch, but neither profile tables nor how members are actuated.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor

from cudagraphs import is_lost, is_out_of_memory
from logs import log_event
from members import subnet_of
from priorities import go_with_others
from workers import Crew, Job

MODES = ("parallel", "serial")
# torch hands out so many different CUDA streams for each device, then the same ones again.
CUDA_STREAMS = 32

# What a member's network may raise without failing the others. (What the device raises is RuntimeError too; see
# ``_is_of_device``.)
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

MemberNetwork = Callable[..., Tensor]  # logits of a batch
Outcome = Tensor | Exception  # a member's class probabilities (batch, classes), or why there are none
Task = Callable[[], Outcome]
Group = Callable[[Sequence[Task]], list[Outcome]]  # does tasks, and returns when all are done or started in order


class Ensemble(Protocol):
    """What has to be known of an ensemble; see profiletable.py."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def members(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def combination(self) -> str: ...  # noqa: D102
    @property
    def weights(self) -> tuple[float, ...]: ...  # noqa: D102


# ---------------------------------------------------------------------------------------------------------- combination


def combine(probabilities: Tensor, weights: Tensor, combination: str) -> tuple[Tensor, Tensor]:
    """Combined class probabilities (batch, classes), and who was left out: a flag for each member.

    ``probabilities`` are (members, batch, classes), ``weights`` (members, 1, 1) and above zero. In each row, members
    whose probabilities are not finite are left out, and the weights of the others count for all; a row without any
    member is NaN. Waits for no device.
    """
    counted = probabilities.isfinite().all(2, keepdim=True)
    scores = probabilities if combination == "mean" else _votes(probabilities)
    shares = weights * counted
    combined = scores.masked_fill(~counted, 0).mul_(shares).sum(0) / shares.sum(0)
    return combined, (~counted & counted.any(0)).flatten(1).any(1)


def _votes(probabilities: Tensor) -> Tensor:
    """1 for the class that a member finds likeliest, 0 for the others."""
    return torch.zeros_like(probabilities).scatter_(2, probabilities.argmax(2, keepdim=True), 1.0)


class Mirrored:
    """A network that sees images (N, C, H, W) mirrored, the left side on the right."""

    def __init__(self, network: MemberNetwork) -> None:
        self._network = network

    def __call__(self, x: Tensor) -> Tensor:
        """Its logits."""
        return self._network(x.flip(3))


class EnsembleNetwork:
    """The members of an ensemble as one network; for one batch at a time.

    ``take_failed`` tells who was left out since it was asked last. A CUDA graph writes that to the host beside its
    probabilities, so that it is there once those are, and nothing waits for the device on the way.
    """

    def __init__(self, ensemble: Ensemble, networks: Sequence[MemberNetwork], group: Group, device: torch.device):
        """``networks`` are the members', in their order; ``group`` runs them."""
        self._ensemble, self._networks, self._group = ensemble, networks, group
        least = 1e-9  # so that a member without weight answers for all where it is the only one left
        weights = torch.tensor([max(weight, least) for weight in ensemble.weights])
        self._weights = weights.view(-1, 1, 1).to(device)
        # How often each member was left out, on the device and as the host sees it; only ever counted up, so that
        # nobody has to reset what a stream may be writing.
        self._left_out = torch.zeros(len(networks), dtype=torch.int64, device=device)
        self._seen = torch.zeros(len(networks), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._known = [0] * len(networks)
        if device.type == "cuda":
            # The worker's stream does not wait for what was done on this one.
            torch.cuda.current_stream(device).synchronize()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logarithms of the combined class probabilities of a batch (batch, classes); raises if all members fail."""
        named = zip(self._ensemble.members, self._networks, strict=True)
        outcomes = self._group([functools.partial(_attempt, name, network, inputs) for name, network in named])
        combined, left_out = combine(_stacked(outcomes), self._weights, self._ensemble.combination)
        self._left_out.add_(left_out)
        self._seen.copy_(self._left_out, non_blocking=True)
        return combined.log()

    def take_failed(self) -> tuple[str, ...]:
        """The members that were left out of any row since the last call; to be asked when the batch has ended."""
        before, self._known = self._known, self._seen.tolist()
        counts = zip(self._ensemble.members, self._known, before, strict=True)
        return tuple(name for name, count, known in counts if count > known)


def _attempt(name: str, network: MemberNetwork, inputs: Sequence[Tensor]) -> Outcome:
    """A member's class probabilities, or the error that is its own."""
    try:
        with torch.inference_mode():  # counts for the calling thread
            probabilities = network(*inputs).float().softmax(1)
        if len(probabilities) != len(inputs[0]):
            raise ValueError(f"{name} gave {len(probabilities)} outputs for {len(inputs[0])} inputs")
        return probabilities
    except FAILURES as error:
        if _is_of_device(error) or _is_capturing(inputs[0]):
            raise
        log_event("a member of an ensemble failed", logging.ERROR, error, member=name)
        return error


def _is_of_device(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and (is_out_of_memory(error) or is_lost(error))


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: one without this member must not be held for good."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _stacked(outcomes: list[Outcome]) -> Tensor:
    """Probabilities (members, batch, classes), NaN for members that failed; raises the first error if all did."""
    there = [each for each in outcomes if isinstance(each, Tensor)]
    if not there:
        _raise_first(outcomes)
    absent = torch.full_like(there[0], torch.nan) if len(there) < len(outcomes) else there[0]
    return torch.stack([each if isinstance(each, Tensor) else absent for each in outcomes])


def _raise_first(outcomes: list[Outcome]) -> NoReturn:
    first = cast(Exception, outcomes[0])
    try:
        raise first
    finally:
        # The error's traceback holds this frame: what it computed with would wait for the garbage collector.
        del first
        outcomes.clear()


# ---------------------------------------------------------------------------------------------------------------- modes


def one_after_another(tasks: Sequence[Task]) -> list[Outcome]:
    """Serial, on the calling thread and its CUDA stream."""
    return [task() for task in tasks]


def _begin(threads: int) -> None:
    """Of a thread that computes members: on cores that others want too, the event loop above all."""
    go_with_others()
    torch.set_num_threads(threads)


class ThreadGroup:
    """Threads beside a worker's own, that compute members of its ensembles; they start with the first batch.

    The worker's thread begins with the last task, the others with the first ones; whoever is ready takes another. A
    task that raises ends the batch, once those that were begun have ended.
    """

    def __init__(self, size: int, threads: int) -> None:
        """``size`` threads beside the worker's, which compute with so many ``threads`` each."""
        self._size = size
        self._crew: Crew[None] = Crew(size, "member", functools.partial(_begin, threads))

    def __call__(self, tasks: Sequence[Task]) -> list[Outcome]:
        """What comes of each task."""
        left = deque(enumerate(tasks))
        outcomes: dict[int, Outcome] = {}

        def work(take: Callable[[], tuple[int, Task]]) -> None:
            try:
                while left:
                    taken = None
                    with contextlib.suppress(IndexError):  # another was faster
                        taken = take()
                    if taken is not None:
                        outcomes[taken[0]] = taken[1]()
            finally:
                left.clear()

        jobs = self._submit(lambda _: work(left.popleft), min(self._size, len(tasks) - 1))
        try:
            work(left.pop)
        finally:
            begun = [job.future for job in jobs if not job.future.cancel()]
            jobs.clear()
            futures.wait(begun)
        while begun:
            begun.pop().result()
        in_place = [outcomes[index] for index in range(len(tasks))]
        outcomes.clear()  # errors among them hold the frames above, which hold this
        return in_place

    def _submit(self, work: Callable[[None], None], count: int) -> list[Job[None, None]]:
        jobs: list[Job[None, None]] = []
        # Where the system has no thread left, or the engine closes, the worker's own thread does the rest.
        with contextlib.suppress(RuntimeError):
            jobs.extend(self._crew.submit(work) for _ in range(count))
        return jobs

    def close(self, timeout_s: float) -> None:
        """End the threads; one that computes on after this time is left alone."""
        self._crew.close(timeout_s)


class Cuda(Protocol):
    """What a StreamGroup needs of torch.cuda, or of a fake in tests."""

    def Stream(self, device: torch.device) -> Any: ...  # noqa: D102
    def current_stream(self, device: torch.device) -> Any: ...  # noqa: D102
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...  # noqa: D102


class StreamGroup:
    """CUDA streams beside a worker's own, on which members of its ensembles are computed.

    They fork from the current stream and join it again, so that a graph which is captured from it holds all members.
    What a stream allocates is used by the current one after the join, and again by that stream after the next fork
    only: no memory is used twice at a time.
    """

    def __init__(self, device: torch.device, size: int, cuda: Cuda = cast(Cuda, torch.cuda)) -> None:  # noqa: B008
        self._device, self._cuda = device, cuda
        self._streams = [cuda.Stream(device) for _ in range(size)]

    def __call__(self, tasks: Sequence[Task]) -> list[Outcome]:
        """What comes of each task; the last one runs on the current stream itself. Waits for no stream."""
        current, forked = self._cuda.current_stream(self._device), self._streams[: len(tasks) - 1]
        for stream in forked:
            stream.wait_stream(current)
        try:
            return [self._start(task, stream) for task, stream in zip(tasks, self._places(tasks, current), strict=True)]
        finally:
            for stream in forked:
                current.wait_stream(stream)

    def _places(self, tasks: Sequence[Task], current: Any) -> list[Any]:
        """The stream of each task; where there are too few, some take several."""
        if not self._streams:
            return [current] * len(tasks)
        return [self._streams[index % len(self._streams)] for index in range(len(tasks) - 1)] + [current]

    def _start(self, task: Task, stream: Any) -> Outcome:
        with self._cuda.stream(stream):
            return task()


# --------------------------------------------------------------------------------------------------------------- engine


def forced(name: str, mode: str) -> str:
    """The name under which an engine runs an ensemble in this mode, whatever was planned."""
    return f"{name}@{mode}"


class Catalogue:
    """The ensembles that an engine knows, and the mode in which each runs at each batch size."""

    def __init__(self, ensembles: Iterable[Ensemble], *, device: str, cores: int, workers: int, threads: int) -> None:
        """``device`` is cpu or cuda; ``threads``: with which each worker computes on a CPU.

        ``beside`` is how many threads or CUDA streams each worker gets for members beside its own, and ``threads`` with
        how many each of these threads computes. On a CPU, workers share the cores that none of them uses. Where there
        are none, each has one such thread all the same: it can be measured, but does not run unless planned.
        """
        self._ensembles = {ensemble.name: ensemble for ensemble in ensembles}
        most = max((len(ensemble.members) for ensemble in self._ensembles.values()), default=1) - 1
        spare = max(0, cores - workers * threads) // workers
        of_cpu = max(min(1, spare), spare // threads)
        self._room = of_cpu if device == "cpu" else CUDA_STREAMS // workers - 1
        self.beside = min(most, max(int(device == "cpu"), self._room))
        self.threads = max(1, min(threads, spare // max(1, self.beside)))
        self._default = "parallel" if self._room > 0 else "serial"
        self._plans: dict[str, tuple[str, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name.partition("@")[0] in self._ensembles

    def __getitem__(self, name: str) -> Ensemble:
        return self._ensembles[name.partition("@")[0]]

    def plan(self, name: str, modes: Sequence[str]) -> None:
        """Run an ensemble in the mode ``modes[n]`` for a batch of n, and the last one for larger batches.

        Raises ValueError for anything that is no ensemble or mode.
        """
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise ValueError(f"modes of {name}: must be {' or '.join(MODES)}, not {unknown or 'none'}")
        if name not in self._ensembles:
            raise ValueError(f"no ensemble '{name}': there are {', '.join(self._ensembles) or 'none'}")
        self._plans[name] = tuple(modes)

    def mode(self, name: str, size: int) -> str:
        """The mode of a batch of this size."""
        plain, _, mode = name.partition("@")
        if mode:
            return mode
        modes = self._plans.get(plain, (self._default,))
        return modes[min(size, len(modes) - 1)]

    def lanes(self, members: int) -> int:
        """How many of so many members may run at the same time."""
        return 1 + min(members - 1, max(0, self._room))

    def modes(self, name: str) -> tuple[str, ...]:
        """The modes in which an ensemble may run: those planned, or all while none are."""
        plain, _, mode = name.partition("@")
        return (mode,) if mode else tuple(each for each in MODES if each in self._plans.get(plain, MODES))

    def with_members(self, names: Sequence[str]) -> list[str]:
        """The subnets among the names, then those that are members of the ensembles among them, each once."""
        subnets = [name for name in names if name not in self]
        members = [subnet_of(member) for name in names if name in self for member in self[name].members]
        return list(dict.fromkeys([*subnets, *members]))
