"""SuperServe: answers every query by its deadline, with the most accurate subnet that the moment allows.

The life of one query, top-down:

1. ``handle_predict`` notes the arrival, reads parameters and body; ``decode`` makes one network input of the body.
2. ``SuperServe.submit`` makes a ``Query`` with its deadline; ``Dispatcher.submit`` rejects it when the heap is full or
   no choice can meet the deadline any more, else pushes it onto the ``DeadlineHeap``. The handler awaits the reply.
3. ``SuperServe._pump`` runs when a query arrived, a worker became free or a deadline passed.
4. ``Dispatcher.expire`` answers the queries whose deadline has passed, at that moment.
5. ``Dispatcher.next_batch`` asks the policy (slackfit.py) for a ``Decision``, for a worker that is idle now.
6. The most urgent queries leave the heap for that batch; a client that went away had its query taken out at once.
7. ``Engine.run`` (engine.py) computes the batch on the chosen subnet, off the event loop.
8. ``Dispatcher.settle`` gives each query its row; ``Dispatcher.deliver`` counts it as in time or late.

Everything between 2 and 8 happens on one thread; the dispatcher has no I/O and reads only the clock that it was given.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import logging
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from aiohttp import web
from numpy.typing import NDArray
from tqdm import tqdm

import slackfit
from config import Config, ConfigError, parse_arguments
from dispatcher import Answer, Batch, DeadlineHeap, Dispatcher, Query, ReplySlot
from engine import Engine, EngineError, Outputs, measure_latencies
from profiletable import refuse_synthetic
from servable import load_servable
from slackfit import ProfileError, ProfileTable
from supernet import SupernetError
from web.errors import DeadlineExceeded, NotReady, TooLarge, json_errors, json_response
from web.inputs import Limits, Parameters, check_array, decode, parse_parameters

__all__ = [
    "Answer", "Batch", "Config", "DeadlineHeap", "Dispatcher", "Prediction", "Query", "Reply", "ReplySlot",
    "SuperServe", "main", "make_app",
]  # fmt: skip

log = logging.getLogger("superserve")


def log_event(event: str, level: int = logging.INFO, cause: Exception | None = None, /, **fields: object) -> None:
    """Log something that happened, with fields that a machine can read."""
    log.log(level, event, exc_info=cause, extra={"fields": fields})


PROFILED_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Larger bodies and images are decoded on a thread, so that one photograph does not hold up the queries of others.
INLINE_BODY_BYTES = 32 * 1024
INLINE_PIXELS = 256 * 256


# ------------------------------------------------------------------------------------------------------------- serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class with its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to one query: what was seen, by which subnet, how accurate that subnet is, and when."""

    predictions: tuple[Prediction, ...]
    subnet: str
    accuracy: float
    batch_size: int
    slo_s: float
    latency_s: float
    queue_s: float
    deadline_met: bool

    def document(self) -> dict[str, Any]:
        """The JSON form, durations in milliseconds."""
        return {
            "predictions": [
                {"label": each.label, "index": each.index, "probability": round(each.probability, 4)}
                for each in self.predictions
            ],
            "subnet": self.subnet,
            "accuracy": round(self.accuracy, 4),
            "batch_size": self.batch_size,
            "slo_ms": round(self.slo_s * 1e3, 3),
            "latency_ms": round(self.latency_s * 1e3, 3),
            "queue_ms": round(self.queue_s * 1e3, 3),
            "deadline_met": self.deadline_met,
        }


class SuperServe:
    """The server without HTTP: ``async with SuperServe("profiles/cifar10") as serve: await serve.infer(image)``.

    Constructing reads and checks the profile; raises ConfigError, ProfileError, SupernetError, PolicyError or
    EngineError.
    """

    def __init__(
        self, profile: str | Path | Config, clock: Callable[[], float] = time.perf_counter, **settings: Any
    ) -> None:
        self.config = profile if isinstance(profile, Config) else Config(profile=Path(profile), **settings)
        self.clock = clock
        self.ready = False
        self._draining = False
        self._starting: asyncio.Task[None] | None = None
        refuse_synthetic(self.config.profile)
        self._servable = load_servable(self.config.profile)
        self._choices = slackfit.load_choices(self.config.profile)
        self.engine = Engine(
            self._servable,
            self.config.device,
            workers=self.config.workers,
            threads=self.config.threads_per_worker,
            memory_budget=self.config.memory_budget_bytes(self._servable.supernet.nbytes),
        )
        self._check_choices()
        self.dispatcher: Dispatcher | None = None
        table = self._stored_table()
        if table is not None:
            self._use(table)
        self._batches: set[asyncio.Task[None]] = set()
        self._pump_due = False
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_s = math.inf

    async def __aenter__(self) -> SuperServe:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Profile this device if no stored table fits it, warm up, and be ready."""
        await self.engine.prepare([choice.name for choice in self._choices if choice.frontier])
        if self.dispatcher is None:
            self._use(await self._profile_device())
        assert self.dispatcher is not None, "a table is in use from here on"
        names = [entry.name for entry in self.dispatcher.table.entries]
        with tqdm(total=2 * len(names), desc="warm up", unit="batch", disable=None, leave=False) as bar:
            await self.engine.warm_up(names, (1, 16), bar.update)
        self.ready = True
        log_event("ready", policy=self.config.policy, subnets=len(names), device=dataclasses.asdict(self.engine.facts))

    def start_soon(self) -> asyncio.Task[None]:
        """The task that gets ready in the background; always the same one."""
        if self._starting is None:
            self._starting = asyncio.create_task(self.start())
        return self._starting

    async def close(self) -> None:
        """Accept nothing more, finish what is queued (up to ``drain_timeout_s``), stop the engine."""
        self.ready, self._draining = False, True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self.dispatcher is not None:
            await self._drain(self.dispatcher)
        await asyncio.to_thread(self.engine.close)  # waits for what still runs; its queries are answered meanwhile

    async def _drain(self, dispatcher: Dispatcher) -> None:
        self._pump()  # queries of this very turn of the event loop wait for their first pump
        limit_s = self.clock() + self.config.drain_timeout_s
        while self._batches and self.clock() < limit_s:
            await asyncio.wait(self._batches, timeout=max(0.0, limit_s - self.clock()))
        dispatcher.abandon()
        if self._expiry is not None:
            self._expiry.cancel()

    async def infer(
        self, image: bytes | NDArray[Any], *, slo_ms: float | None = None, min_accuracy: float = 0.0, top_k: int = 1
    ) -> Reply:
        """Classify an encoded image, uint8 pixels (H, W, C) or a normalised float32 tensor (C, H, W).

        Raises a ServeError: BadRequest, QueueFull, NotReady, DeadlineExceeded or BatchFailed.
        """
        arrival_s = self.clock()
        given = {"slo_ms": slo_ms, "min_accuracy": min_accuracy, "top_k": top_k}
        texts = {name: str(value) for name, value in given.items() if value is not None}
        parameters = parse_parameters(texts, {}, self.limits())
        if isinstance(image, bytes):
            return await self.submit(await self.decode(image, "image/*"), arrival_s, parameters)
        return await self.submit(check_array(image, self._servable.input), arrival_s, parameters)

    def limits(self) -> Limits:
        """What parameters of a request may be; NotReady while there is no table."""
        return Limits(
            default_slo_s=self.config.default_slo_ms / 1e3,
            longest_slo_s=self.config.max_slo_ms / 1e3,
            best_accuracy=self._open().table.entries[-1].accuracy,
            classes=len(self._servable.classes),
        )

    async def decode(self, body: bytes, content_type: str) -> NDArray[Any]:
        """The network input in a request's body; large ones are decoded on a thread."""
        spec, max_pixels = self._servable.input, self.config.max_pixels
        if len(body) <= INLINE_BODY_BYTES:
            try:
                return decode(body, content_type, spec, min(INLINE_PIXELS, max_pixels))
            except TooLarge:
                pass  # a small file can hold a large image, which is then looked at again
        return await asyncio.to_thread(decode, body, content_type, spec, max_pixels)

    async def submit(self, input: NDArray[Any], arrival_s: float, parameters: Parameters) -> Reply:
        """Queue one decoded input and wait for its answer; cancelling frees its place."""
        dispatcher = self._open()
        if dispatcher.correct_table():
            slower = {name: round(factor, 3) for name, factor in dispatcher.applied.items() if factor > 1}
            log_event("table corrected", slower=slower, slowdown=round(dispatcher.slowdown, 3))
        reply: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        query = Query(
            input=input, arrival_s=arrival_s, slo_s=parameters.slo_s, reply=reply,
            min_accuracy=parameters.min_accuracy, priority=parameters.priority,
        )  # fmt: skip
        dispatcher.submit(query)
        self._wake()
        try:
            answer = await reply
        except asyncio.CancelledError:
            dispatcher.cancel(query)
            raise
        return self._reply(query, answer, dispatcher.deliver(query, answer), parameters.top_k)

    def profile_document(self) -> dict[str, object]:
        """What GET /profile answers."""
        dispatcher = self._open()
        corrections = dispatcher.corrections.factors(self.clock())
        return slackfit.table_document(dispatcher.measured, corrections, dispatcher.slowdown)

    def _reply(self, query: Query, answer: Answer, now_s: float, top_k: int) -> Reply:
        row = answer.probabilities
        best = [int(row.argmax())] if top_k == 1 else np.argsort(-row, kind="stable")[:top_k].tolist()
        return Reply(
            predictions=tuple(
                Prediction(label=self._servable.classes[i], index=i, probability=float(row[i])) for i in best
            ),
            subnet=answer.entry.name,
            accuracy=answer.entry.accuracy,
            batch_size=answer.batch_size,
            slo_s=query.slo_s,
            latency_s=now_s - query.arrival_s,
            queue_s=answer.started_s - query.arrival_s,
            deadline_met=now_s <= query.deadline_s,
        )

    def _open(self) -> Dispatcher:
        if self._draining or self.dispatcher is None or not self.ready:
            raise NotReady(self._why_not_ready(), retry_after_s=1)
        return self.dispatcher

    def _why_not_ready(self) -> str:
        if self._draining:
            return "draining"
        starting = self._starting
        failed = starting is not None and starting.done() and not starting.cancelled() and starting.exception()
        return "the start failed; the log says why" if failed else "starting"

    def _wake(self) -> None:
        """Pump once all that has arrived in this turn of the event loop is in the heap."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        assert self.dispatcher is not None, "nothing wakes the pump before there is a dispatcher"
        self._pump_due = False
        self.dispatcher.expire()
        while (batch := self.dispatcher.next_batch()) is not None:
            # Submitted here and not in the task, which would begin only after what else this turn of the loop holds.
            running = self.engine.run(batch.entry.name, [query.input for query in batch.queries])
            task = asyncio.get_running_loop().create_task(self._finish(batch, running, self.dispatcher))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)
        if self.dispatcher.heap and self.dispatcher.heap.head_deadline_s < self._expiry_s:
            self._arm_expiry(self.dispatcher.heap.head_deadline_s)

    def _arm_expiry(self, deadline_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_s = deadline_s
        delay_s = max(0.0, deadline_s - self.clock())
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._on_expiry)

    def _on_expiry(self) -> None:
        self._expiry, self._expiry_s = None, math.inf
        self._pump()

    async def _finish(self, batch: Batch, running: Awaitable[Outputs], dispatcher: Dispatcher) -> None:
        """Wait for one batch and settle it; whatever goes wrong, only its own queries fail."""
        try:
            dispatcher.settle(batch, await running)
        except Exception as error:  # noqa: BLE001 the one broad except: it guards one batch
            log_event("batch failed", logging.ERROR, error, subnet=batch.entry.name, batch_size=len(batch.queries))
            dispatcher.fail(batch, f"the batch could not be computed: {type(error).__name__}")
        self._wake()

    def _check_choices(self) -> None:
        calibrated = {subnet.name for subnet in self._servable.supernet.statistics}
        for choice in self._choices:
            if choice.frontier and choice.name not in calibrated:
                raise ProfileError(f"{self.config.profile}/choices.json: {choice.name} has no statistics in norms.npz")

    def _use(self, table: ProfileTable) -> None:
        policy = slackfit.make_policy(self.config.policy, table, self.config.workers)
        self.dispatcher = Dispatcher(
            table,
            policy,
            self.clock,
            workers=self.config.workers,
            max_queue=self.config.max_queue,
            margin=self.config.margin,
            correction=self.config.correction,
        )

    def _table_path(self) -> tuple[Path, slackfit.Device]:
        device = slackfit.Device(**dataclasses.asdict(self.engine.facts))
        return self.config.profile / device.file_name, device

    def _stored_table(self) -> ProfileTable | None:
        """The stored latency table for this device; None when it is to be measured."""
        path, device = self._table_path()
        missing = f"{path}: no latency table for this device"
        if path.is_file():
            try:
                return slackfit.load_latencies(path, self._choices, device)
            except slackfit.DeviceMismatch as error:
                missing = str(error)
        if not self.config.autoprofile:
            raise ProfileError(f"{missing}; start without --no-autoprofile to measure one")
        return None

    async def _profile_device(self) -> ProfileTable:
        path, device = self._table_path()
        log_event("profiling", table=str(path), why="no stored table fits this device")
        names = [choice.name for choice in self._choices if choice.frontier]
        latencies = await profile_latencies(self.engine, names, rounds=20)
        try:
            slackfit.save_latencies(path, device, PROFILED_BATCH_SIZES, latencies)
        except OSError as error:
            log_event("table not stored", logging.WARNING, error=str(error))
        return slackfit.build_table(self._choices, PROFILED_BATCH_SIZES, latencies, device)


async def profile_latencies(engine: Engine, names: Sequence[str], rounds: int) -> dict[str, slackfit.Latencies]:
    """Measure each subnet at PROFILED_BATCH_SIZES, with a progress bar on a terminal."""
    steps = (rounds + 1) * len(names) * len(PROFILED_BATCH_SIZES)
    with tqdm(total=steps, desc="profile", unit="batch", disable=None) as bar:
        samples = await measure_latencies(engine, names, PROFILED_BATCH_SIZES, rounds, bar.update)
    return {
        name: slackfit.Latencies(
            p50_s=_rising(np.percentile(each, 50) for each in sizes),
            p99_s=_rising(np.percentile(each, 99) for each in sizes),
        )
        for name, sizes in samples.items()
    }


def _rising(latencies_s: Iterable[float]) -> tuple[float, ...]:
    """Latencies by batch size, freed of the dips that noise makes: a larger batch takes no less time."""
    return tuple(map(float, itertools.accumulate(latencies_s, max)))


# ---------------------------------------------------------------------------------------------------------------- HTTP

SERVE = web.AppKey("serve", SuperServe)


async def handle_predict(request: web.Request) -> web.Response:
    """POST /predict: one input, one answer."""
    serve = request.app[SERVE]
    arrival_s = serve.clock()
    parameters = parse_parameters(request.query, request.headers, serve.limits())
    if request.client_max_size != serve.config.max_body_bytes:  # mounted in an application that has its own limit
        request = request.clone(client_max_size=serve.config.max_body_bytes)
    try:
        async with asyncio.timeout(parameters.slo_s):
            body = await request.read()
    except TimeoutError:
        message = "the deadline passed while the body was on its way"
        raise DeadlineExceeded(message, slo_ms=round(parameters.slo_s * 1e3, 3)) from None
    decoded = await serve.decode(body, request.content_type)
    return json_response((await serve.submit(decoded, arrival_s, parameters)).document())


async def handle_healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process is alive."""
    return json_response({"status": "alive"})


async def handle_readyz(request: web.Request) -> web.Response:
    """GET /readyz: profiled, warmed up and not draining; else 503."""
    request.app[SERVE].limits()
    return json_response({"status": "ready"})


async def handle_profile(request: web.Request) -> web.Response:
    """GET /profile: the table as measured, and by what it is corrected at present."""
    return json_response(request.app[SERVE].profile_document())


def make_app(config: Config) -> web.Application:
    """The HTTP application, also to mount in another; reads the profile now, gets ready in the background."""
    app = web.Application(middlewares=[json_errors], client_max_size=config.max_body_bytes)
    app[SERVE] = SuperServe(config)
    app.router.add_post("/predict", handle_predict)
    app.router.add_get("/healthz", handle_healthz)
    app.router.add_get("/readyz", handle_readyz)
    app.router.add_get("/profile", handle_profile)
    app.cleanup_ctx.append(_lifespan)
    return app


async def _lifespan(app: web.Application) -> AsyncIterator[None]:
    app[SERVE].start_soon().add_done_callback(_log_failure)
    yield
    await app[SERVE].close()


def _log_failure(starting: asyncio.Task[None]) -> None:
    """Whoever mounted the application awaits no task that could tell."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        log_event("start failed", logging.ERROR, error=f"{type(error).__name__}: {error}")


async def serve_forever(config: Config) -> None:
    """Serve HTTP until SIGTERM or Ctrl-C, then drain."""
    app = make_app(config)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=config.drain_timeout_s)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=1024)
        await site.start()
        log_event("listening", url=site.name)
        stopping = asyncio.create_task(stop.wait())
        starting = app[SERVE].start_soon()
        await asyncio.wait((stopping, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()  # a failed start ends the server
            gc.collect()
            gc.freeze()  # what lives now lives on: collections need not look at it again
            await _until(stopping, app[SERVE], config.summary_s)
        log_event("draining")
        await app[SERVE].close()
    finally:
        await runner.cleanup()
    log_event("stopped", **_outcomes(app[SERVE]))


async def _until(stopping: asyncio.Task[Any], serve: SuperServe, summary_s: float) -> None:
    """Wait, logging a summary every ``summary_s`` in which something happened (0: never)."""
    last: dict[str, int] = {}
    while not stopping.done():
        await asyncio.wait((stopping,), timeout=summary_s or None)
        outcomes = _outcomes(serve)
        if not stopping.done() and outcomes != last:
            log_event("summary", **outcomes)
            last = outcomes


def _outcomes(serve: SuperServe) -> dict[str, int]:
    return {} if serve.dispatcher is None else dict(serve.dispatcher.counters)


# -------------------------------------------------------------------------------------------------------- command line


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields given to ``log_event``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def main(arguments: Sequence[str] | None = None) -> None:
    """The server as a command."""
    config = parse_arguments(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # A batch is many short torch calls that each release the interpreter; the event loop would keep it for 5 ms.
    sys.setswitchinterval(0.0005)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_forever(config))
    except (ConfigError, ProfileError, SupernetError, slackfit.PolicyError, EngineError, OSError) as error:
        sys.exit(f"superserve: {error}")


if __name__ == "__main__":
    main()
