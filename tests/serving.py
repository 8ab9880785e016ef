"""Fakes and fixtures of the tests that serve: a clock, a reply slot, an engine, and a tiny servable on disk."""

import asyncio
import io
import json
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from numpy.typing import NDArray
from PIL import Image

import slackfit
import startup
from config import Config
from engine import DeviceFacts, Engine, Held, Outputs
from servable import InputSpec, create_servable, load_servable, save_servable
from slackfit import Choice, Latencies, ProfileTable, build_table
from supernet import SubnetSpace
from superserve import SERVE, Answer, Query, SuperServe, make_app
from web.state import State

ROOT = Path(__file__).parent.parent

CLASSES = ("ant", "bee", "cat", "dog", "elk")
SIDE = 8
SMALL, LARGE = "d1-1-1-e0.5", "d2-1-2-e1"
SMALL_ACCURACY, LARGE_ACCURACY = 0.7, 0.9
SIZES = (1, 2, 4, 8, 16)
LATENCY_S = {SMALL: 0.001, LARGE: 0.004}
# Long enough for any machine to answer in.
PATIENT_MS = 30_000
IDLE = State(
    ready=True, status="ready", workers=1, busy_workers=0, queue_depth=0, queue_limit=1000, oldest_age_s=0, slowdown=1,
    overhead_s=0, corrections={}, held_bytes=0, held_subnets=0,
)  # fmt: skip


class Clock:
    """A clock that tests set."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Slot:
    """A reply slot that refuses to be set twice, as a future does."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.gone = False

    def done(self) -> bool:
        return self.gone or self.answer is not None or self.error is not None

    def set_result(self, result: Answer) -> None:
        assert not self.done(), "answered twice"
        self.answer = result

    def set_exception(self, exception: BaseException) -> None:
        assert not self.done(), "answered twice"
        self.error = exception


def make_query(
    clock: Callable[[], float], slo_ms: float = 1000, *, arrival_s: float | None = None, **settings: Any
) -> Query:
    """A query that arrives now, with a Slot for its reply."""
    arrival_s = clock() if arrival_s is None else arrival_s
    return Query(input=image_array(0), arrival_s=arrival_s, slo_s=slo_ms / 1e3, reply=Slot(), **settings)


def slot_of(query: Query) -> Slot:
    assert isinstance(query.reply, Slot)
    return query.reply


def outputs_for(count: int, finished_s: float = 0.0) -> Outputs:
    """One row per input, the first class the likeliest."""
    row = np.linspace(0.4, 0.0, len(CLASSES), dtype=np.float32)
    return Outputs(np.tile(row, (count, 1)), finished_s)


def two_entries() -> ProfileTable:
    """A fast entry and an accurate one, as calibrated in the tiny servable."""
    return build_table(choices(), SIZES, latencies())


def choices() -> list[Choice]:
    return [
        Choice(
            name=name, kind="subnet", accuracy=accuracy, accuracy_samples=1000, test_accuracy=None,
            parameters=1000, macs=1000, frontier=True,
        )
        for name, accuracy in ((SMALL, SMALL_ACCURACY), (LARGE, LARGE_ACCURACY))
    ]  # fmt: skip


def latencies() -> dict[str, Latencies]:
    """One batch takes as long as another in which twice as many queries run, plus a tenth."""
    each_s = {name: tuple(one_s * (1 + size / 10) for size in SIZES) for name, one_s in LATENCY_S.items()}
    return {name: Latencies(p50_s=values_s, p99_s=values_s) for name, values_s in each_s.items()}


@dataclass
class FakeEngine:
    """Computes nothing. Batches wait for ``gate`` when there is one; ``failure`` is raised when there is one."""

    clock: Callable[[], float]
    facts: DeviceFacts
    gate: asyncio.Event | None = None
    failure: Exception | None = None
    rows: NDArray[np.float32] | None = None
    batches: list[tuple[str, int]] = field(default_factory=list)
    closed: bool = False
    lost: str | None = None

    async def run(self, name: str, inputs: Sequence[NDArray[Any]], limit_s: float = math.inf) -> Outputs:
        self.batches.append((name, len(inputs)))
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        computed = outputs_for(len(inputs), self.clock())
        return computed if self.rows is None else Outputs(self.rows, self.clock())

    async def prepare(self, names: Sequence[str]) -> None:
        pass

    async def warm_up(self, names: Sequence[str], batch_sizes: Sequence[int], step: Callable[[], object]) -> None:
        pass

    @property
    def held(self) -> Held:
        return Held(nbytes=0, subnets=(), pairs=())

    def close(self) -> None:
        self.closed = True


def fake_engine(serve: SuperServe, **settings: Any) -> FakeEngine:
    """Replace the engine of a server that has not started."""
    engine = FakeEngine(serve.clock, serve.engine.facts, **settings)
    serve.engine = engine  # type: ignore[assignment]
    return engine


def config_of(folder: Path, **settings: Any) -> Config:
    """The settings that the stored latency table of the tiny servable fits."""
    fixed: dict[str, Any] = {"device": "cpu", "threads": 1, "default_slo_ms": PATIENT_MS}
    return Config(profile=folder, **(fixed | settings))


def write_servable(folder: Path) -> Path:
    """Write a tiny calibrated servable with choices and a latency table for this device; returns the folder."""
    torch.manual_seed(0)
    space = SubnetSpace(((1, 2), (1,), (1, 2)), ((0.5, 1.0),) * 3)
    servable = create_servable(
        name="tiny", family="resnet", space=space, classes=CLASSES,
        architecture={"channels": 3, "widths": [4, 4, 8], "depths": [2, 1, 2], "classes": 5, "stem_stride": 1},
        input=InputSpec(height=SIDE, width=SIDE, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
    )  # fmt: skip
    for subnet in (space.smallest, space.largest):
        servable.supernet.calibrate(subnet, [torch.randn(16, 3, SIDE, SIDE)])
    save_servable(servable, folder)
    slackfit.save_choices(folder, choices())
    engine = Engine(load_servable(folder), "cpu", workers=1, threads=1)
    engine.close()
    device = slackfit.Device(**asdict(engine.facts))
    slackfit.save_latencies(folder / device.file_name, device, SIZES, latencies())
    return folder


def image_array(seed: int) -> NDArray[np.uint8]:
    """An image of the network's size."""
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def image_file(format: str = "PNG", size: tuple[int, int] = (20, 12), **options: Any) -> bytes:
    """An encoded image with a gradient, so that its sides can be told apart."""
    width, height = size
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()).save(file, format, **options)
    return file.getvalue()


async def turns_until(condition: Callable[[], object]) -> None:
    """Let the event loop go round until something has happened."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 what is waited for has no event
            await asyncio.sleep(0)


class Served:
    """A server on a thread of its own, for a client in another process."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.url = ""
        self._config = config_of(folder, **settings)
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = make_app(self._config)
        async with TestServer(app) as server:
            await app[SERVE].start_soon()
            self.url = str(server.make_url("")).rstrip("/")
            self._listening.set()
            await self._stop.wait()

    def __enter__(self) -> "Served":
        self._thread.start()
        assert self._listening.wait(60), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it, if it runs, and wait until it has stopped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)


@asynccontextmanager
async def listening_app(config: Config, app: web.Application | None = None) -> AsyncIterator[str]:
    """The URL of a server that listens as the command does, limits on connections and TLS included."""
    app = make_app(config) if app is None else app
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await app[SERVE].start_soon()
        async with startup.opened(replace(config, port=0), runner) as url:
            yield url
    finally:
        await runner.cleanup()


@dataclass
class Process:
    """The command, running; ``events`` are the lines of its log."""

    popen: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def wait_for(self, event: str) -> dict[str, Any]:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"ended before '{event}': {self.events}")

    def named(self) -> list[str]:
        return [event["event"] for event in self.events]


@contextmanager
def process(folder: Path, *arguments: str, script: str = "superserve.py") -> Iterator[Process]:
    """The command as people start it, or another, with its log read up to ``ready``."""
    command = [sys.executable, script, "--profile", str(folder), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", "--default-slo-ms", str(PATIENT_MS), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
        started = Process(popen)
        try:
            started.url = started.wait_for("listening")["url"]
            started.wait_for("ready")
            yield started
        finally:
            popen.kill()
