"""Jobs are done in order on threads of their own; one that hangs costs its thread and nothing else."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from serving import turns_until

from workers import ClosedError, Crew, HungError, Job, WorkerThread

ROOT = Path(__file__).parent.parent
SOON_S = 0.02


class Hang:
    """A job that hangs until it is let go."""

    def __init__(self) -> None:
        self.began, self.released = threading.Event(), threading.Event()
        self.ended = threading.Event()

    def __call__(self, _: object) -> str:
        self.began.set()
        self.released.wait(30)
        self.ended.set()
        return "too late"


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.released.set()


@pytest.fixture
def crew() -> Iterator[Crew[list[str]]]:
    """Two threads, one replacement; each thread's tool is a list of its own."""
    crew: Crew[list[str]] = Crew(2, "test", list, spares=1)
    yield crew
    crew.close(5)


def done(crew: Crew[Any], function: Callable[[Any], object] = lambda _: "done") -> object:
    return crew.submit(function).future.result(30)


def failed(future: Future[Any]) -> BaseException | None:
    return future.exception(30)


def test_jobs_are_done_with_the_tool_of_their_thread(crew: Crew[list[str]]) -> None:
    for number in range(20):
        done(crew, lambda tool, number=number: tool.append(str(number)))
    together = threading.Barrier(2)

    def look(tool: list[str]) -> list[str]:
        together.wait(30)  # so that one thread cannot do both
        return tool

    tools = [job.future.result(30) for job in (crew.submit(look), crew.submit(look))]
    assert sorted(map(int, tools[0] + tools[1])) == list(range(20))


def test_one_thread_does_jobs_in_the_order_in_which_they_came() -> None:
    crew: Crew[list[int]] = Crew(1, "test", list)
    for number in range(50):
        crew.submit(lambda tool, number=number: tool.append(number))
    assert done(crew, list) == list(range(50))
    crew.close(5)


def test_what_a_job_raises_is_raised_where_it_is_awaited(crew: Crew[list[str]]) -> None:
    with pytest.raises(ZeroDivisionError):
        done(crew, lambda _: 1 / 0)
    with pytest.raises(SystemExit):
        done(crew, lambda _: sys.exit(3))
    assert done(crew) == "done"


def test_a_failed_job_leaves_nothing_for_the_garbage_collector() -> None:
    class Held:
        pass

    references = []

    def fail(_: object) -> None:
        held = Held()
        references.append(weakref.ref(held))
        raise ValueError("its traceback holds the frame that holds what is held")

    crew: Crew[None] = Crew(1, "test", lambda: None)
    gc.disable()
    try:
        job = crew.submit(fail)
        assert isinstance(failed(job.future), ValueError)
        del job
        done(crew)  # the thread has let go of the job before
        assert references[0]() is None
    finally:
        gc.enable()
        crew.close(5)


def test_threads_start_with_the_first_job_and_end_when_closed() -> None:
    before = threading.active_count()
    crew: Crew[None] = Crew(3, "test", lambda: None)
    assert threading.active_count() == before
    done(crew)
    assert threading.active_count() == before + 3
    crew.close(5)
    assert threading.active_count() == before


def test_what_was_submitted_is_done_before_closing_and_nothing_after(crew: Crew[list[str]]) -> None:
    jobs = [crew.submit(lambda _, number=number: number) for number in range(20)]
    crew.close(30)
    assert [job.future.result(0) for job in jobs] == list(range(20))
    with pytest.raises(ClosedError, match="no more work"):
        crew.submit(lambda _: None)
    crew.close(0)


def test_closing_waits_no_longer_than_it_may(crew: Crew[list[str]], hang: Hang) -> None:
    running = [crew.submit(hang), crew.submit(hang)]
    waiting = crew.submit(lambda _: None)
    assert hang.began.wait(30)
    crew.close(SOON_S)
    for job in (*running, waiting):
        assert isinstance(failed(job.future), ClosedError)
    hang.released.set()


async def test_a_job_within_its_limit_is_let_be(crew: Crew[list[str]]) -> None:
    assert await crew.run(lambda _: "done", 30) == "done"
    with pytest.raises(ZeroDivisionError):
        await crew.run(lambda _: 1 / 0, 30)


async def test_a_job_that_hangs_is_given_up_and_its_thread_replaced(crew: Crew[list[str]], hang: Hang) -> None:
    began_s = time.perf_counter()
    with pytest.raises(HungError, match=r"not done after 0\.02 s") as hung:
        await crew.run(hang, SOON_S)
    assert time.perf_counter() - began_s >= SOON_S
    assert (hung.value.replaced, crew.present) == (True, 2)
    together = threading.Barrier(2)
    await asyncio.gather(*(crew.run(lambda _: together.wait(30)) for _ in range(2)))


async def test_the_others_work_on_while_one_hangs(crew: Crew[list[str]], hang: Hang) -> None:
    hanging = crew.run(hang, 30)
    for _ in range(20):
        assert await crew.run(lambda _: "done", 30) == "done"
    assert not hanging.done()
    hang.released.set()
    assert await hanging == "too late", "within its limit it is not"


async def test_what_a_job_returns_after_it_was_given_up_is_dropped_with_its_thread(
    crew: Crew[list[str]], hang: Hang
) -> None:
    with pytest.raises(HungError):
        await crew.run(hang, SOON_S)
    (thread,) = (each for each in threading.enumerate() if isinstance(each, WorkerThread) and each.given_up)
    hang.released.set()
    thread.join(30)
    assert not thread.is_alive()
    assert await crew.run(lambda _: "done") == "done"


async def test_without_a_replacement_the_rest_carries_on_until_none_is_left(crew: Crew[list[str]], hang: Hang) -> None:
    replaced = []
    for _ in range(2):
        with pytest.raises(HungError) as hung:
            await crew.run(hang, SOON_S)
        replaced.append(hung.value.replaced)
    assert (replaced, crew.present) == ([True, False], 1)
    assert await crew.run(lambda _: "done", 30) == "done"
    hanging = crew.run(hang, SOON_S)
    stranded = crew.run(lambda _: "never")
    with pytest.raises(HungError):
        await hanging
    with pytest.raises(ClosedError, match="no worker is left"):
        await stranded
    with pytest.raises(ClosedError, match="no worker is left"):
        crew.submit(lambda _: None)
    assert crew.present == 0


async def test_the_limit_counts_from_when_a_thread_took_the_job(hang: Hang) -> None:
    crew: Crew[None] = Crew(1, "test", lambda: None)
    first = crew.run(hang)
    second = crew.run(lambda _: "done", SOON_S)
    assert hang.began.wait(30)
    loop = asyncio.get_running_loop()
    passed = asyncio.Event()
    loop.call_later(5 * SOON_S, passed.set)
    await passed.wait()
    assert not second.done()
    hang.released.set()
    assert (await first, await second) == ("too late", "done")
    crew.close(5)


async def test_an_event_loop_that_stood_still_takes_no_job_for_hung(crew: Crew[list[str]]) -> None:
    ended = threading.Event()

    def end(_: object) -> str:
        ended.set()
        return "done"

    running = crew.run(end, SOON_S)
    assert ended.wait(30)
    until_s = time.perf_counter() + 5 * SOON_S
    while time.perf_counter() < until_s:
        pass  # as if the process had been stopped: the answer is there, and so is its limit
    assert await running == "done"


async def test_a_job_that_nobody_awaits_any_more_is_not_begun(hang: Hang) -> None:
    crew: Crew[None] = Crew(1, "test", lambda: None)
    first = crew.run(hang)
    second = crew.run(lambda _: pytest.fail("begun"))
    second.cancel()
    await turns_until(second.cancelled)
    hang.released.set()
    assert await first == "too late"
    crew.close(5)


async def test_giving_up_a_job_that_ended_does_nothing(crew: Crew[list[str]]) -> None:
    job: Job[list[str], str] = crew.submit(lambda _: "done")
    assert job.future.result(30) == "done"
    crew.give_up(job, "hung")
    assert (job.future.result(), crew.present) == ("done", 2)


LEAVING = """
import sys, threading, workers
crew = workers.Crew(1, "test", lambda: None)
began = threading.Event()
crew.submit(lambda _: (began.set(), threading.Event().wait()))
began.wait()
crew.close(0)
print("last words")
workers.leave(int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 75])
def test_a_process_ends_though_a_thread_hangs(code: int) -> None:
    command = [sys.executable, "-c", LEAVING, str(code)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "last words\n", "")


def test_a_process_that_is_to_end_at_once_takes_nothing_apart() -> None:
    """What libraries do at the ordinary end may crash where the device is lost, and its exit code would be another."""
    script = """
import os, sys, workers
class Pinned:
    def __del__(self):
        os.abort()
kept = Pinned()
print("last words")
workers.leave(75, at_once=True)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "last words\n", "")
