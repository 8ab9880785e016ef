"""What users trust a server for: a fault costs the batch concerned and nothing else; docs/survival.md has the table."""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aiohttp
import numpy as np
import pytest
import serving
from aiohttp import web
from faults import Faults, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from serving import (
    LARGE,
    SMALL,
    Clock,
    Process,
    config_of,
    fake_engine,
    image_array,
    outputs_for,
    process,
    turns_until,
)
from test_dispatcher import Ledger

import engine
import superserve
from engine import DeviceLostError, Outputs
from superserve import EX_LOST, SERVE, Dispatcher, Reply, SuperServe, make_app
from web.errors import BatchFailed, NotReady, ServeError
from workers import HungError

ROOT = Path(__file__).parent.parent
HANG_S = 0.2
GOOD = image_array(1)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny servable with latency tables for one and two workers on this device, not to be changed."""
    folder = serving.write_servable(tmp_path_factory.mktemp("tiny"))
    (one,) = folder.glob("latency-*-w1-*.json")
    document = json.loads(one.read_text())
    document["device"]["workers"] = 2
    one.with_name(one.name.replace("-w1-", "-w2-")).write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """The servers of this module share the tiny network, which nothing here changes, and do not tidy up in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_return_freed_memory", lambda: None)
        patch.setattr(superserve, "load_servable", functools.cache(superserve.load_servable))
        yield


@pytest.fixture
def faults() -> Iterator[Faults]:
    faults = Faults()
    yield faults
    faults.released.set()


def dispatcher_of(serve: SuperServe) -> Dispatcher:
    assert serve.dispatcher is not None
    return serve.dispatcher


def outcomes_of(serve: SuperServe) -> dict[str, int]:
    """Outcomes, checked to sum to the arrivals."""
    counters = dispatcher_of(serve).counters
    found = {name: count for name, count in counters.items() if name != "arrivals" and count}
    assert sum(found.values()) == counters["arrivals"]
    return found


@asynccontextmanager
async def started(profile: Path, faults: Faults, **given: Any) -> AsyncIterator[SuperServe]:
    """A server with an engine that can be poisoned; on a busy machine nothing hangs unless told otherwise."""
    serve = SuperServe(config_of(profile, **({"hang_timeout_s": 60} | given)))
    serve.engine.faults = faults
    await serve.start()
    try:
        yield serve
    finally:
        faults.released.set()
        await serve.close()


# -------------------------------------------------------------------------------- every query once, over the event loop


class ScriptedEngine(serving.FakeEngine):
    """An engine whose batches end when and how the test says."""

    def begin(self) -> None:
        self.running: list[tuple[int, asyncio.Future[Outputs]]] = []

    def run(self, name: str, inputs: Any, limit_s: float = 0.0) -> asyncio.Future[Outputs]:  # type: ignore[override]
        assert limit_s > 0
        ended: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self.running.append((len(inputs), ended))
        return ended

    def end(self, number: int, how: str) -> None:
        """End one of the running batches."""
        count, ended = self.running.pop(number % len(self.running))
        outputs = outputs_for(count + (how == "miscount"), self.clock())
        if how == "nan":
            outputs.probabilities[0, 0] = np.nan
        errors = {"raise": LookupError("broken"), "hang": HungError("not done", replaced=False)}
        if how in errors:
            ended.set_exception(errors[how])
        else:
            ended.set_result(outputs)


STEPS = st.tuples(
    st.sampled_from(["arrive", "arrive", "arrive", "cancel", "turn", "wait", "end", "end"]),
    st.integers(0, 99),
    st.sampled_from(["well", "well", "nan", "miscount", "raise", "hang", "replaced"]),
)


class Story:
    """A server with several workers, whose clients and batches do what the steps say."""

    def __init__(self, profile: Path, workers: int) -> None:
        self.clock = Clock()
        self.serve = SuperServe(config_of(profile, workers=workers, max_queue=10, drain_timeout_s=0), self.clock)
        self.engine = ScriptedEngine(self.clock, self.serve.engine.facts)
        self.engine.begin()
        self.serve.engine = self.engine  # type: ignore[assignment]
        self.ledger = Ledger()
        self.clients: list[asyncio.Task[Reply]] = []
        self.complaints: list[dict[str, Any]] = []

    async def play(self, steps: list[tuple[str, int, str]]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.complaints.append(context))
        await self.serve.start()
        dispatcher_of(self.serve).observers.append(self.ledger)
        workers = dispatcher_of(self.serve).workers
        for step, number, how in steps:
            if step == "arrive":
                slo_ms = (2, 20, 100, 30_000)[number % 4]
                self.clients.append(asyncio.create_task(self.serve.infer(GOOD, slo_ms=slo_ms)))
            elif step == "cancel" and self.clients:
                self.clients[number % len(self.clients)].cancel()
            elif step == "wait":
                self.clock.now_s += number / 1000
                self.serve._wake()
            elif step == "end" and self.engine.running:
                hung = how == "hang" and dispatcher_of(self.serve).workers > 1
                workers -= hung
                self.engine.end(number, "hang" if hung else how.replace("hang", "raise"))
            await asyncio.sleep(0)
            dispatcher = dispatcher_of(self.serve)
            assert 0 <= dispatcher.idle_workers <= dispatcher.workers
            assert len(self.engine.running) <= workers
        await self.finish()

    async def finish(self) -> None:
        """Close at once: what waits is abandoned, what runs is answered when it ends."""
        await asyncio.sleep(0)
        closing = asyncio.create_task(self.serve.close())
        await turns_until(lambda: self.engine.closed)
        while self.engine.running:
            self.engine.end(0, "well")
        await closing
        ends = await asyncio.gather(*self.clients, return_exceptions=True)
        assert all(isinstance(end, Reply | ServeError | asyncio.CancelledError) for end in ends)
        found = outcomes_of(self.serve)
        assert found == Counter(self.ledger.outcomes.values())
        assert found.get("in_time", 0) + found.get("late", 0) == sum(isinstance(end, Reply) for end in ends)
        assert dispatcher_of(self.serve).idle_workers == dispatcher_of(self.serve).workers
        assert not self.complaints


def tell(profile: Path, workers: int, steps: list[tuple[str, int, str]]) -> None:
    asyncio.run(Story(profile, workers).play(steps))


@settings(max_examples=4)
@given(st.integers(1, 2), st.lists(STEPS, max_size=40))
def test_every_query_is_answered_once_over_the_event_loop(
    profile: Path, workers: int, steps: list[tuple[str, int, str]]
) -> None:
    tell(profile, workers, steps)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(1, 2), st.lists(STEPS, min_size=20, max_size=120))
def test_every_query_is_answered_once_in_many_stories(
    profile: Path, workers: int, steps: list[tuple[str, int, str]]
) -> None:
    tell(profile, workers, steps)


class Stumbling:
    """A policy that raises whenever it is asked."""

    name = "stumbling"

    def arrived(self, now_s: float, slo_s: float) -> None:
        pass

    def adopt(self, table: object) -> bool:
        return False

    def decide(self, *_: object) -> None:
        raise LookupError("no idea")


async def test_a_policy_that_raises_costs_queries_their_answer_in_time_but_not_their_answer(profile: Path) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
    async with SuperServe(config_of(profile)) as serve:
        fake_engine(serve)
        policy, dispatcher_of(serve).policy = dispatcher_of(serve).policy, Stumbling()  # type: ignore[assignment]
        failed = await asyncio.gather(*(serve.infer(GOOD, slo_ms=30) for _ in range(3)), return_exceptions=True)
        assert [getattr(error, "reason", error) for error in failed] == ["deadline"] * 3
        dispatcher_of(serve).policy = policy
        assert (await serve.infer(GOOD)).deadline_met
        assert outcomes_of(serve) == {"expired": 3, "in_time": 1}
    assert {str(error) for error in complaints} == {"no idea"}


# --------------------------------------------------------------------------------------------------- faults, one by one


async def told(serve: SuperServe, *images: NDArray[np.uint8]) -> list[str]:
    """What becomes of these queries, sent one after another: ok, or the reason of the error."""
    ends = []
    for image in images:
        try:
            await serve.infer(image)
            ends.append("ok")
        except ServeError as error:
            ends.append(error.reason)
    return ends


@pytest.mark.parametrize("fault", ["raise", "nan", "count"])
async def test_a_fault_fails_its_own_batch_with_a_reason_and_no_other(
    profile: Path, faults: Faults, fault: str
) -> None:
    async with started(profile, faults) as serve:
        assert await told(serve, GOOD, poison(fault), GOOD, poison(fault), GOOD) == [
            "ok", "engine_failed", "ok", "engine_failed", "ok",
        ]  # fmt: skip
        assert outcomes_of(serve) == {"in_time": 3, "failed": 2}
        assert dispatcher_of(serve).idle_workers == 1
        assert (serve.ready, serve.lost) == (True, None)


async def test_a_batch_with_poison_in_it_fails_whole_but_for_rows_that_are_not_finite(
    profile: Path, faults: Faults
) -> None:
    for fault, failures in (("raise", 4), ("nan", 1)):
        async with started(profile, faults) as serve:
            batch = (GOOD, poison(fault), GOOD, GOOD)
            ends = await asyncio.gather(*(serve.infer(image) for image in batch), return_exceptions=True)
            assert sum(isinstance(end, BatchFailed) for end in ends) == failures
            assert isinstance(ends[1], BatchFailed)
            assert "secret" not in str(ends[1])


@pytest.mark.parametrize("fault", ["memory", "cuda memory"])
async def test_out_of_memory_costs_what_is_held_and_large_pieces_but_no_query(
    profile: Path, faults: Faults, fault: str
) -> None:
    async with started(profile, faults) as serve:
        before = serve.engine.held
        batch = [poison(fault)] * 3
        with pytest.raises(BatchFailed):  # halved, three are still two too many; the next is halved again
            await asyncio.gather(*(serve.infer(image) for image in [poison(fault)] * 4))
        replies = await asyncio.gather(*(serve.infer(image) for image in batch))
        assert (before.nbytes > 0, serve.engine.held.nbytes, serve.engine.held.subnets) == (True, 0, ())
        assert {reply.batch_size for reply in replies} == {3}
        assert faults.sizes == [4, 2, 2, 1, 1, 1]
        assert await told(serve, GOOD, poison(fault)) == ["ok", "ok"]
        assert outcomes_of(serve) == {"in_time": 5, "failed": 4}


async def test_a_hang_is_ended_for_its_clients_and_serving_goes_on(profile: Path, faults: Faults) -> None:
    async with started(profile, faults, hang_timeout_s=HANG_S) as serve:
        began_s = time.perf_counter()
        with pytest.raises(BatchFailed, match=r"it hung, not done after 0\.\d+ s"):
            await serve.infer(poison("hang"))
        assert time.perf_counter() - began_s >= HANG_S
        assert await told(serve, GOOD, GOOD) == ["ok", "ok"]
        assert (faults.hung, serve.ready, dispatcher_of(serve).idle_workers) == (1, True, 1)
        assert outcomes_of(serve) == {"failed": 1, "in_time": 2}


async def test_the_limit_is_never_less_than_ten_times_what_was_planned(profile: Path) -> None:
    limits_s = []
    async with SuperServe(config_of(profile, hang_timeout_s=0.01)) as serve:
        real = serve.engine.run

        def run(name: str, inputs: Any, limit_s: float) -> Any:
            limits_s.append(limit_s)
            return real(name, inputs, 30.0)

        serve.engine.run = run  # type: ignore[method-assign]
        dispatcher_of(serve).slowdown = 4.0
        reply = await serve.infer(GOOD)
    assert reply.subnet in (SMALL, LARGE)
    assert limits_s == [pytest.approx(10 * 1.3 * 4 * 1.1 * serving.LATENCY_S[reply.subnet])]


@pytest.mark.slow
async def test_a_batch_that_takes_long_but_ends_within_the_limit_is_no_hang(profile: Path, faults: Faults) -> None:
    async with started(profile, faults) as serve:
        assert await told(serve, poison("slow"), GOOD) == ["ok", "ok"]


async def test_with_several_workers_the_rest_carry_on_while_one_hangs(profile: Path, faults: Faults) -> None:
    async with started(profile, faults, workers=2) as serve:
        hanging = asyncio.create_task(serve.infer(poison("hang")))
        await turns_until(lambda: faults.hung)
        assert dispatcher_of(serve).idle_workers == 1
        assert await told(serve, *[GOOD] * 10) == ["ok"] * 10
        assert not hanging.done()


@pytest.mark.slow
async def test_after_so_many_hangs_workers_are_gone_and_with_the_last_the_device_is_lost(
    profile: Path, faults: Faults
) -> None:
    lost = asyncio.Event()
    async with started(profile, faults, workers=2, hang_timeout_s=1) as serve:
        serve.on_lost = lost.set
        left = []
        for _ in range(engine.REPLACEMENTS + 1):
            assert await told(serve, poison("hang"), GOOD) == ["engine_failed", "ok"]
            left.append(dispatcher_of(serve).workers)
        assert left == [2] * engine.REPLACEMENTS + [1]
        assert (serve.ready, lost.is_set()) == (True, False)
        assert await told(serve, poison("hang"), GOOD) == ["engine_failed", "not_ready"]
        assert (serve.lost, serve.ready, lost.is_set()) == ("every worker hangs", False, True)
        assert dispatcher_of(serve).idle_workers == dispatcher_of(serve).workers == 0


async def test_a_lost_device_fails_its_batch_and_refuses_the_rest(profile: Path, faults: Faults) -> None:
    lost = asyncio.Event()
    async with started(profile, faults) as serve:
        serve.on_lost = lost.set
        running = asyncio.create_task(serve.infer(poison("lost")))
        await turns_until(lambda: dispatcher_of(serve).idle_workers == 0)
        waiting = asyncio.create_task(serve.infer(GOOD))
        ends = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [BatchFailed, NotReady]
        with pytest.raises(NotReady, match="the device is lost") as refused:
            await serve.infer(GOOD)
        assert refused.value.retry_after_s
        assert serve.lost is not None
        assert "illegal memory access" in serve.lost
        assert lost.is_set()
        assert outcomes_of(serve) == {"failed": 2}


async def test_a_device_lost_while_getting_ready_fails_the_start(profile: Path) -> None:
    serve = SuperServe(config_of(profile))

    def broken(*_: object) -> Any:
        raise DeviceLostError("the device is lost: from the start")

    serve.engine.faults = broken
    with pytest.raises(DeviceLostError):
        await serve.start_soon()
    with pytest.raises(NotReady, match="the device is lost"):
        serve.limits()
    await serve.close()


async def test_a_hang_does_not_hold_up_the_drain(
    profile: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CLOSE_S", 0.05)
    async with started(profile, faults, hang_timeout_s=1000, drain_timeout_s=0.05) as serve:
        hanging = asyncio.create_task(serve.infer(poison("hang")))
        await turns_until(lambda: faults.hung)
        waiting = asyncio.create_task(serve.infer(GOOD))
        await turns_until(lambda: dispatcher_of(serve).heap)
        began_s = time.perf_counter()
        await serve.close()
        assert time.perf_counter() - began_s < 5
        ends = await asyncio.gather(hanging, waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [BatchFailed, NotReady]
        assert outcomes_of(serve) == {"failed": 2}


# ---------------------------------------------------------------------------------------------- clients that disconnect


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[int]:
    """The port of an application that is served as the command serves it."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def connected(port: int, count: int, body: bytes) -> list[asyncio.StreamWriter]:
    """Clients that have sent a query each, a few connecting at a time."""
    head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    places = asyncio.Semaphore(50)

    async def connect() -> asyncio.StreamWriter:
        async with places:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        return writer

    return await asyncio.gather(*(connect() for _ in range(count)))


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of a thousand connections are files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4000:
        pytest.skip("needs 4,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def disconnect(profile: Path, count: int) -> None:
    """Clients disconnect while queued and while running; those beside them are served."""
    app = make_app(config_of(profile, max_queue=count + 20))
    gate = asyncio.Event()
    fake = fake_engine(app[SERVE], gate=gate)
    async with listening(app) as port:
        await app[SERVE].start_soon()
        dispatcher = dispatcher_of(app[SERVE])
        url = f"http://127.0.0.1:{port}/predict"
        async with aiohttp.ClientSession() as session:
            running = await connected(port, 16, GOOD.tobytes())
            await turns_until(lambda: dispatcher.idle_workers == 0)
            beside = [asyncio.create_task(session.post(url, data=GOOD.tobytes())) for _ in range(3)]
            queued = await connected(port, count, GOOD.tobytes())
            await turns_until(lambda: dispatcher.counters["arrivals"] == count + 16 + 3)
            assert len(dispatcher.heap) == count + 16 + 3 - fake.batches[0][1]
            for writer in (*queued, *running):
                writer.close()
            began_s = time.perf_counter()
            await turns_until(lambda: dispatcher.counters["cancelled"] == count + 16)
            freed_s = time.perf_counter() - began_s
            assert len(dispatcher.heap) == 3, "every place is free again, though nothing has ended"
            assert fake.batches == fake.batches[:1]
            gate.set()
            assert [response.status for response in await asyncio.gather(*beside)] == [200] * 3
            assert [entry[1] for entry in fake.batches[1:]] == [3], "nothing is computed for those who left"
        assert outcomes_of(app[SERVE]) == {"cancelled": count + 16, "in_time": 3}
        assert dispatcher.idle_workers == 1
        print(f"{count} places free {1e3 * freed_s:.0f} ms after their clients left")


async def test_clients_that_disconnect_free_their_places_and_harm_nobody(profile: Path) -> None:
    await disconnect(profile, 20)


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
async def test_a_thousand_clients_that_disconnect_free_their_places_and_harm_nobody(profile: Path) -> None:
    await disconnect(profile, 1000)


# ------------------------------------------------------------------------------------------------------ whole processes


@contextmanager
def poisonable(folder: Path, *arguments: str) -> Iterator[Process]:
    """The command with an engine for poison, ready."""
    with process(folder, *arguments, script="tests/faults.py") as started:
        yield started


def asked(url: str, data: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """Status and document; status 0 when nobody answers."""
    try:
        with urlopen(Request(url, data=data), timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error) | {"retry_after": error.headers["Retry-After"]}
    except OSError:
        return 0, {}


@pytest.mark.slow
async def test_sigterm_under_load_turns_readiness_first_and_loses_no_accepted_query(profile: Path) -> None:
    with poisonable(profile, "--drain-timeout-s", "20") as server:
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(image: NDArray[np.uint8]) -> tuple[int, str | None, float]:
                async with session.post(f"{server.url}/predict", data=image.tobytes()) as response:
                    await response.read()
                    return response.status, response.headers.get("Retry-After"), loop.time()

            slow = [asyncio.create_task(ask(poison("slow"))) for _ in range(60)]  # several slow batches
            async with session.get(f"{server.url}/readyz") as response:
                assert response.status == 200
            first, _ = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
            assert all(task.result()[0] == 200 for task in first)
            began_s = loop.time()
            server.popen.terminate()
            ready = 200
            while ready == 200:
                async with session.get(f"{server.url}/readyz") as response:
                    ready = response.status
                    assert ready == 200 or response.headers["Retry-After"]
            unready_s = loop.time()
            late = await ask(GOOD)
            answered = [task.result() for task in await _all(slow)]
        assert server.popen.wait(30) == 0
        taken_s = loop.time() - began_s
        stopped = server.wait_for("stopped")
    assert ready == 503
    assert (late[0], bool(late[1])) == (503, True), "new ones are refused, with when to retry"
    assert {status for status, _, _ in answered} == {200}, "no accepted query is lost"
    assert unready_s < max(end_s for _, _, end_s in answered), "readiness falls while the rest is still served"
    assert taken_s < 20 + 10
    assert (stopped["arrivals"], stopped["in_time"]) == (60, 60)
    print(f"not ready {1e3 * (unready_s - began_s):.0f} ms, ended {taken_s:.2f} s after SIGTERM")


async def _all(tasks: list[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    await asyncio.wait(tasks)
    return tasks


@pytest.mark.slow
def test_sigterm_while_a_batch_hangs_ends_the_process_in_time(profile: Path) -> None:
    patient = ("--drain-timeout-s", "0.2", "--hang-timeout-s", "1000")
    with poisonable(profile, *patient) as server, ThreadPoolExecutor() as pool:
        client = pool.submit(asked, f"{server.url}/predict", poison("hang").tobytes())
        server.wait_for("a batch hangs")
        began_s = time.perf_counter()
        server.popen.terminate()
        assert server.popen.wait(30) == 0
        taken_s = time.perf_counter() - began_s
        assert client.result(30)[0] == 500
    assert taken_s < 0.2 + 10
    print(f"ended {taken_s:.2f} s after SIGTERM, though a batch hangs")


@pytest.mark.slow
def test_a_lost_device_ends_the_process_with_the_code_for_a_restart(profile: Path) -> None:
    with poisonable(profile) as server:
        assert asked(f"{server.url}/predict", GOOD.tobytes())[0] == 200
        began_s = time.perf_counter()
        status, document = asked(f"{server.url}/predict", poison("lost").tobytes())
        assert (status, document["reason"]) == (500, "engine_failed")
        status, document = asked(f"{server.url}/readyz")
        assert status == 0 or (status, document["reason"], document["retry_after"]) == (503, "not_ready", "1")
        lost, ended = server.wait_for("device lost"), server.wait_for("ended")
        assert server.popen.wait(30) == EX_LOST
        taken_s = time.perf_counter() - began_s
    assert "illegal memory access" in lost["why"]
    assert ended["exit_code"] == EX_LOST
    print(f"ended with {EX_LOST}, {taken_s:.2f} s after the device was lost")


@pytest.mark.slow
def test_hangs_beyond_those_replaced_end_the_process_with_the_code_for_a_restart(profile: Path) -> None:
    with poisonable(profile, "--hang-timeout-s", "1") as server:
        for number in range(engine.REPLACEMENTS + 1):
            began_s = time.perf_counter()
            status, document = asked(f"{server.url}/predict", poison("hang").tobytes())
            assert (status, document["reason"]) == (500, "engine_failed")
            assert "hung" in document["error"]
            if number < engine.REPLACEMENTS:
                assert asked(f"{server.url}/predict", GOOD.tobytes())[0] == 200
                print(f"served again {time.perf_counter() - began_s:.2f} s after a query that hangs")
        assert server.popen.wait(30) == EX_LOST
        assert server.wait_for("device lost")["why"] == "every worker hangs"


@pytest.mark.slow
def test_after_sigkill_under_load_the_server_is_ready_again_from_the_stored_table(
    profile: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(profile, tmp_path / "own"))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with poisonable(own) as server, ThreadPoolExecutor() as pool:
        clients = [pool.submit(asked, f"{server.url}/predict", poison("slow").tobytes()) for _ in range(4)]
        server.wait_for("a slow batch")
        server.popen.kill()
        server.popen.wait(30)
        assert {client.result(30)[0] for client in clients} <= {0, 200}
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    began_s = time.perf_counter()
    with poisonable(own) as server:
        ready_s = time.perf_counter() - began_s
        assert "profiling" not in server.named()
        assert asked(f"{server.url}/predict", GOOD.tobytes())[0] == 200
    print(f"ready again {ready_s:.2f} s after the restart")


@pytest.mark.slow
def test_sigkill_while_profiling_leaves_nothing_that_hinders_the_next_start(profile: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(profile, tmp_path / "own"))
    for table in own.glob("latency-*"):
        table.unlink()
    command = [sys.executable, "superserve.py", "--profile", str(own), "--port", "0", "--device", "cpu"]
    with subprocess.Popen([*command, "--threads", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
        Process(popen).wait_for("profiling")
        popen.kill()
    assert not list(own.glob("latency-*"))
    with poisonable(own) as server:
        assert "profiling" in server.named()
    assert len(list(own.glob("latency-*.json"))) == 1
