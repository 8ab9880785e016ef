"""Threads that do one job at a time each, watched: one that hangs is given up, and another takes its place.

A thread of Python cannot be stopped from outside. One whose job outlasts its limit is left to itself: whoever waits for
the job is told, what the job returns one day is dropped, and the thread takes no other. All threads are daemons, so
that none keeps the process from ending; ``leave`` ends it even while one computes on inside a library.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, TypeVar

Tool = TypeVar("Tool")
Result = TypeVar("Result")

# A limit is waited for in so many parts: what stops the whole process for a while spends one of them, and no more.
LOOKS = 4


class HungError(RuntimeError):
    """A job outlasted its limit, and its thread was given up; ``replaced`` tells whether another took its place."""

    def __init__(self, message: str, *, replaced: bool) -> None:
        super().__init__(message)
        self.replaced = replaced


class ClosedError(RuntimeError):
    """No more jobs are taken, or there was no time left to finish this one."""


@dataclass(slots=True, eq=False)
class Job(Generic[Tool, Result]):
    """Something to do with the tool of whichever thread does it, and where what comes of it goes."""

    function: Callable[[Tool], Result]
    future: futures.Future[Result] = field(default_factory=futures.Future)


class WorkerThread(threading.Thread):
    """A thread of a crew."""

    given_up = False


class Crew(Generic[Tool]):
    """Threads with a tool each, that take jobs in the order in which they come.

    The threads start with the first job. At most ``spares`` of those given up are replaced; the others are missing
    from then on, and ``present`` tells how many are left. Safe to use from several threads.
    """

    def __init__(self, size: int, name: str, equip: Callable[[], Tool], spares: int = 0) -> None:
        """``equip`` makes what a thread works with, on that thread; it must not fail."""
        self.present = size
        self._name, self._equip, self._spares = name, equip, spares
        self._queue: SimpleQueue[Job[Tool, Any] | None] = SimpleQueue()
        self._lock = threading.Lock()  # of all below
        self._threads: list[WorkerThread] = []
        self._open: dict[Job[Tool, Any], WorkerThread | None] = {}  # not ended; with the thread of those that began
        self._closed = False

    def submit(self, function: Callable[[Tool], Result]) -> Job[Tool, Result]:
        """Have a job done; raises ClosedError when nobody is there to do it."""
        job = Job(function)
        with self._lock:
            if self._closed or not self.present:
                raise ClosedError("no more work is taken" if self._closed else "no worker is left")
            while len(self._threads) < self.present:
                self._start()
            self._open[job] = None
            self._queue.put(job)
        return job

    def run(self, function: Callable[[Tool], Result], limit_s: float = math.inf) -> asyncio.Future[Result]:
        """Have a job done for an event loop; HungError once it has been running for ``limit_s`` seconds."""
        job = self.submit(function)
        answer = asyncio.wrap_future(job.future)
        if limit_s < math.inf:
            answer.add_done_callback(_Watch(self, job, limit_s).end)
        return answer

    def give_up(self, job: Job[Tool, Any], message: str) -> None:
        """Leave a job that has begun, and its thread, to themselves; HungError for whoever waits. Does nothing else."""
        with self._lock:
            thread = self._open.get(job)
            if thread is None:
                return  # it ended meanwhile, or never began
            del self._open[job]
            replaced = self._replace(thread)
            stranded = [] if self.present else list(self._open)
            if stranded:
                self._open.clear()
        job.future.set_exception(HungError(message, replaced=replaced))
        for other in stranded:
            _refuse(other, "no worker is left")

    def close(self, timeout_s: float) -> None:
        """Take no more jobs and finish those there are; what is not finished in this time fails with ClosedError."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
            waited_for = [job.future for job in self._open]
        futures.wait(waited_for, timeout_s)
        with self._lock:
            unfinished = list(self._open)
            for thread in filter(None, self._open.values()):
                self._give_up(thread)
            self._open.clear()
            ending = list(self._threads)
        for job in unfinished:
            _refuse(job, "stopped before it ended")
        until_s = time.monotonic() + 1
        for thread in ending:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _start(self) -> None:
        thread = WorkerThread(target=self._work, name=self._name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _give_up(self, thread: WorkerThread) -> None:
        thread.given_up = True
        self._threads.remove(thread)

    def _replace(self, thread: WorkerThread) -> bool:
        self._give_up(thread)
        if self._spares:
            self._spares -= 1
            try:
                self._start()
            except RuntimeError:  # the system has no thread left
                pass
            else:
                return True
        self.present -= 1
        return False

    def _work(self) -> None:
        tool = self._equip()
        while self._do_next(tool):
            pass

    def _do_next(self, tool: Tool) -> bool:
        """Do the next job; False when the thread is to end."""
        job = self._queue.get()
        if job is None:
            return False
        if not self._begin(job):
            return True
        try:
            result = job.function(tool)
        except BaseException as error:  # noqa: BLE001 nothing is handled here: it is raised where the job is awaited
            wanted = self._end(job)
            if wanted:
                job.future.set_exception(error)
            job = None  # the error's traceback holds this frame; both would wait for the garbage collector
            return wanted
        wanted = self._end(job)
        if wanted:
            job.future.set_result(result)
        return wanted

    def _begin(self, job: Job[Tool, Any]) -> bool:
        with self._lock:
            if job not in self._open:
                return False
            if not job.future.set_running_or_notify_cancel():
                del self._open[job]
                return False
            thread = threading.current_thread()
            assert isinstance(thread, WorkerThread), "only the threads of a crew do its jobs"
            self._open[job] = thread
            return True

    def _end(self, job: Job[Tool, Any]) -> bool:
        """Whether anybody still waits for this job and its thread."""
        with self._lock:
            return self._open.pop(job, None) is not None


class Hands:
    """Threads without tools that do for an event loop what would hold it up; nothing waits for them without limit.

    The event loop's own executor gives no such promise: its threads are waited for, at the latest at the end.
    """

    def __init__(self, size: int, name: str) -> None:
        self._crew: Crew[None] = Crew(size, name, lambda: None)

    async def do(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns or raises; ClosedError if it did not end in time. At once where they are closed."""
        try:
            job = self._crew.run(_without_tool(work))
        except ClosedError:
            return work()  # nothing is left that it could hold up
        try:
            return await job
        finally:
            del job  # it keeps its error, which refers to this frame, and to all that the work has read

    def close(self, timeout_s: float) -> None:
        """As Crew.close."""
        self._crew.close(timeout_s)


async def apart(*calls: Callable[[], object]) -> None:
    """Make calls that wait for other threads, each on a thread of its own, at a time."""
    crew: Crew[None] = Crew(len(calls), "apart", lambda: None)
    try:
        await asyncio.gather(*(crew.run(_without_tool(call)) for call in calls))
    finally:
        crew.close(0)


def _without_tool(call: Callable[[], Result]) -> Callable[[None], Result]:
    return lambda _: call()


class _Watch:
    """Gives a job up when it has been running for its limit."""

    def __init__(self, crew: Crew[Any], job: Job[Any, Any], limit_s: float) -> None:
        self._crew, self._job, self._limit_s = crew, job, limit_s
        self._left = LOOKS
        self._arm()

    def end(self, _: object) -> None:
        """There is nothing to watch any more."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limit_s / LOOKS, self._look)

    def _look(self) -> None:
        self._left -= self._job.future.running()  # a job that waits for a thread has its time still before it
        if self._left:
            self._arm()
        else:
            self._crew.give_up(self._job, f"not done after {self._limit_s:.3g} s")


def _refuse(job: Job[Any, Any], message: str) -> None:
    # What is set running can no longer be cancelled by whoever waits for it; what is done already was cancelled.
    if job.future.running() or job.future.set_running_or_notify_cancel():
        job.future.set_exception(ClosedError(message))


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process with this exit code: ``at_once``, and always if threads that were given up are still at work.

    The ordinary end takes the interpreter and libraries apart. Under such a thread that may crash when it comes back,
    and without the device to which pinned memory belongs it does (github.com/pytorch/pytorch/issues/178154).
    """
    if at_once or any(isinstance(thread, WorkerThread) and thread.given_up for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
