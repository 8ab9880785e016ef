"""SuperServe: answers every query by its deadline, with the most accurate subnet that the moment allows.

The life of one query, top-down:

1. ``handle_predict`` notes the arrival and reads the parameters; ``SuperServe.turn_away`` refuses what has no chance,
   and in a flood ``Door.answer`` has done so before. Then the body is read: ``decode`` makes one network input of it.
   ``Lane.take`` does all this for requests in the plainest form, as most are, without aiohttp.
2. ``SuperServe.submit``, or ``begin`` for the lane, makes a ``Query`` with its deadline; ``Dispatcher.submit`` rejects
   it when the heap is full or no choice can meet the deadline any more, else pushes it onto the ``DeadlineHeap``. The
   handler awaits the reply. ``begin_all`` does it for those that come together on a stream (web/stream.py).
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
import logging
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvloop
from aiohttp import web
from numpy.typing import NDArray
from tqdm import tqdm

import slackfit
import startup
from config import Config, ConfigError, parse_arguments
from dispatcher import Batch, Dispatcher
from engine import DeviceLostError, EngineError, Outputs
from logs import log_event, start_log
from priorities import switch_promptly
from profiletable import refuse_synthetic
from queries import Answer, DeadlineHeap, Pending, Query, ReplySlot
from servable import load_servable
from slackfit import ProfileError, ProfileTable
from startup import TableFile
from supernet import SupernetError
from web.access import AccessError, add_access
from web.bodies import Uploads, add_uploads, read_body
from web.door import DOOR, Door
from web.errors import NotReady, ServeError, json_errors, json_response
from web.inputs import Limits, Parameters, parse_parameters
from web.lane import LANE, Lane
from web.live import Live, Page, add_live
from web.metrics import Metrics, add_metrics
from web.open_inference import OpenInference
from web.openapi import add_openapi
from web.replies import Prediction, Reply
from web.state import State, version
from web.statistics import Statistics
from web.stream import StreamLimits, add_stream
from workers import ClosedError, Hands, HungError, apart, leave

__all__ = [
    "Answer", "Batch", "Config", "DeadlineHeap", "Dispatcher", "Pending", "Prediction", "Query", "Reply", "ReplySlot",
    "SuperServe", "main", "make_app",
]  # fmt: skip

# A batch that takes so many times as long as was planned for it hangs; see Config.hang_timeout_s.
HANG_FACTOR = 10
# The exit code when the device is lost: "try again" to a supervisor, who is to start a new process.
EX_LOST = 75
# A larger share of refused arrivals is a flood: refusing then takes more of the loop's time than serving.
FLOOD = 0.5
# What still reads or writes when the server has drained gets so long to end.
LAST_WORDS_S = 3.0
# Large bodies that are decoded, and large answers that are encoded, at a time. Images take several bytes per pixel.
ASIDE = 4

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------------------------- serving


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
        self.on_lost: Callable[[], object] = lambda: None
        self._draining = False
        self._starting: asyncio.Task[None] | None = None
        refuse_synthetic(self.config.profile)
        self._servable = load_servable(self.config.profile, self.config.dtype)
        self.form = startup.input_form(self.config, self._servable)
        for lack in startup.lacking(self.form):
            log_event("no tokenizer", logging.WARNING, why=lack)
        self._choices = slackfit.load_choices(self.config.profile, self.config.dtype)
        startup.check_policy(self.config.policy, self._choices, self.config.workers)
        startup.check_statistics(self.config.profile, self._choices, self._servable)
        self.engine = startup.start_engine(self.config, self._servable, self._choices)
        self._table_file = TableFile.of(self.config, self._choices, self.engine)
        self.dispatcher: Dispatcher | None = None
        self._limits: Limits | None = None
        facts = self.engine.facts
        self.about = {
            "version": version(), "torch": facts.torch, "device": facts.name, "profile": self._servable.name,
            "policy": self.config.policy,
        }  # fmt: skip
        self.statistics = Statistics()
        self.metrics, self.live = Metrics(self.state, self.about), Live(self.clock, self._waiting)
        table = self._stored_table()
        if table is not None:
            self._use(table)
        self._aside = Hands(ASIDE, "aside")
        self._batches: set[asyncio.Future[Outputs]] = set()
        self._pump_due = False
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_s = math.inf

    async def __aenter__(self) -> SuperServe:
        try:
            await self.start()
        except BaseException:
            await self.close()  # threads and what a GPU holds
            raise
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

    @property
    def lost(self) -> str | None:
        """Why the device computes nothing more, so that this process should end; None while it does.

        ``on_lost`` is called when that happens; all queries are refused from then on.
        """
        return self.engine.lost

    async def close(self) -> None:
        """Accept nothing more, finish what is queued (up to ``drain_timeout_s``), stop the engine."""
        self.ready, self._draining = False, True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self.dispatcher is not None:
            await self._drain(self.dispatcher)
        # Both wait a while for what still runs; its queries are answered.
        await apart(self.engine.close, partial(self._aside.close, LAST_WORDS_S))
        if self._batches:
            await asyncio.wait(self._batches, timeout=0.1)  # those that the engine left alone

    async def _drain(self, dispatcher: Dispatcher) -> None:
        self._pump()  # queries of this very turn of the event loop wait for their first pump
        limit_s = self.clock() + self.config.drain_timeout_s
        while self._batches and self.clock() < limit_s:
            await asyncio.wait(self._batches, timeout=max(0.0, limit_s - self.clock()))
        dispatcher.abandon()
        if self._expiry is not None:
            self._expiry.cancel()

    async def infer(
        self, input: object, *, slo_ms: float | None = None, min_accuracy: float = 0.0, top_k: int = 1,
        members: Sequence[str] = (),
    ) -> Reply:  # fmt: skip
        """Classify an encoded image (bytes), uint8 pixels (H, W, C) or a normalised float32 tensor (C, H, W).

        With a text servable, a text (str), token ids (n,), ids and attention mask (2, n), or both by name.
        ``members``: of the ensemble, or the subnet, that is to answer; the policy chooses where none are given. Raises
        a ServeError: BadRequest, UnsupportedMedia, TooLarge, QueueFull, NotReady, DeadlineExceeded or BatchFailed.
        """
        arrival_s = self.clock()
        given = {"slo_ms": slo_ms, "min_accuracy": min_accuracy, "top_k": top_k, "members": "+".join(members) or None}
        texts = {name: str(value) for name, value in given.items() if value is not None}
        parameters = parse_parameters(texts, {}, self.limits())
        if isinstance(input, bytes | str):
            body = input.encode(errors="surrogatepass") if isinstance(input, str) else input
            decoded = await self.decode(body, "text/plain" if isinstance(input, str) else "image/*")
            return await self.submit(decoded, arrival_s, parameters)
        return await self.submit(self.form.check(input), arrival_s, parameters)

    @property
    def name(self) -> str:
        """The name of the model."""
        return self._servable.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, in the order of the probabilities."""
        return self._servable.classes

    def limits(self) -> Limits:
        """What parameters of a request may be; NotReady while there is no table."""
        self._open()
        assert self._limits is not None, "there is a table"
        return self._limits

    def check_input(self, array: object) -> NDArray[Any]:
        """An array that is one network input already; raises BadRequest for any other."""
        return self.form.check(array)

    def decode_inline(self, body: bytes, content_type: str) -> NDArray[Any] | None:
        """The network input in a request's body; None if decoding it would hold up other queries."""
        return self.form.decode_inline(body, content_type)

    async def decode(self, body: bytes, content_type: str) -> NDArray[Any]:
        """The network input in a request's body; large ones are decoded on a thread. Raises NotReady at the end."""
        decoded = self.decode_inline(body, content_type)
        if decoded is not None:
            return decoded
        self._open()  # a server that drains has other things to do
        return await self.aside(partial(self.form.decode, body, content_type))

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do on a thread what would hold up the queries of others. Raises what it raises, or NotReady at the end."""
        try:
            return await self._aside.do(work)
        except ClosedError:
            raise NotReady("draining", retry_after_s=1) from None

    @property
    def flooded(self) -> bool:
        """Whether most of those who came of late were refused."""
        return self.dispatcher is not None and self.dispatcher.refused_share > FLOOD

    def turn_away(self, arrival_s: float, parameters: Parameters, coming: int = 0, delay_s: float = 0.0) -> None:
        """Raise and count what ``submit`` would raise in a moment, whatever the input: it need not be decoded then.

        So many queries are coming before this one, which takes so long.
        """
        self._open().turn_away(
            arrival_s, parameters.slo_s, parameters.min_accuracy, self.form.least_bytes,
            choice=parameters.choice, coming=coming, delay_s=delay_s,
        )  # fmt: skip

    async def submit(self, input: NDArray[Any], arrival_s: float, parameters: Parameters) -> Reply:
        """Queue one decoded input and wait for its answer; cancelling frees its place."""
        reply: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        query = self._enqueue(input, arrival_s, parameters, reply)
        try:
            answer = await reply
        except asyncio.CancelledError:
            assert self.dispatcher is not None, "it took the query"
            self.dispatcher.cancel(query)
            raise
        except ServeError:
            del query, reply  # the error refers to this frame, and they to the error
            raise
        return self.answered(query, answer, parameters.top_k)

    def begin(
        self, input: NDArray[Any], arrival_s: float, parameters: Parameters, announce: Callable[[Pending], object]
    ) -> Pending:
        """Queue one decoded input without waiting: ``announce`` is called once, when its reply can be collected.

        It is called while a batch is being settled: it must be quick and must not raise. Raises what ``submit`` does.
        """
        pending = Pending(self, announce, parameters.top_k)
        pending.query = self._enqueue(input, arrival_s, parameters, pending)
        return pending

    def begin_all(
        self, inputs: Sequence[NDArray[Any]], arrival_s: float, parameters: Parameters,
        announce: Callable[[Pending], object],
    ) -> Sequence[Pending] | None:  # fmt: skip
        """As ``begin`` for inputs that came together; None, and nothing is done, unless there is room for all.

        What is looked at once for all of them is most of what queueing one takes.
        """
        dispatcher = self._correct(self._open())
        nbytes = sum([input.nbytes for input in inputs])
        if not dispatcher.has_room_for(len(inputs), nbytes, arrival_s + parameters.slo_s):
            return None
        found = [Pending(self, announce, parameters.top_k) for _ in inputs]
        queries = [
            self._query(input, arrival_s, parameters, pending) for input, pending in zip(inputs, found, strict=True)
        ]
        for pending, query in zip(found, queries, strict=True):
            pending.query = query
        dispatcher.accept(queries)
        self._wake()
        return found

    def _enqueue(self, input: NDArray[Any], arrival_s: float, parameters: Parameters, reply: ReplySlot) -> Query:
        dispatcher = self._correct(self._open())
        query = self._query(input, arrival_s, parameters, reply)
        dispatcher.submit(query)
        self._wake()
        return query

    @staticmethod
    def _correct(dispatcher: Dispatcher) -> Dispatcher:
        if dispatcher.correct_table():
            slower = {name: round(factor, 3) for name, factor in dispatcher.applied.items() if factor > 1}
            log_event("table corrected", slower=slower, slowdown=round(dispatcher.slowdown, 3))
        return dispatcher

    @staticmethod
    def _query(input: NDArray[Any], arrival_s: float, parameters: Parameters, reply: ReplySlot) -> Query:
        return Query(
            input=input, arrival_s=arrival_s, slo_s=parameters.slo_s, reply=reply,
            min_accuracy=parameters.min_accuracy, priority=parameters.priority, choice=parameters.choice,
        )  # fmt: skip

    def collect(self, announced: Sequence[Pending]) -> list[Reply | ServeError]:
        """What was announced, each once; answers are counted as in time or late by this moment."""
        assert self.dispatcher is not None, "it took the queries"
        answered, outcomes = [], []
        for pending in announced:
            query, outcome, pending.query = pending.query, pending.outcome, None
            assert query is not None, "collected once"
            assert outcome is not None, "collected after the announcement"
            outcomes.append((query, outcome, pending.top_k))
            if not isinstance(outcome, ServeError):
                answered.append((query, outcome))
        now_s = self.dispatcher.deliver_all(answered) if answered else 0.0
        return [
            outcome if isinstance(outcome, ServeError) else self._reply(query, outcome, now_s, top_k)
            for query, outcome, top_k in outcomes
        ]

    def answered(self, query: Query, answer: Answer, top_k: int) -> Reply:
        """The reply that goes to the client now; counted as in time or late by this moment."""
        assert self.dispatcher is not None, "it took the query"
        return self._reply(query, answer, self.dispatcher.deliver(query, answer), top_k)

    def profile_document(self) -> dict[str, object]:
        """What GET /profile answers."""
        dispatcher = self._open()
        corrections = dispatcher.corrections.factors(self.clock())
        return slackfit.table_document(dispatcher.measured, corrections, dispatcher.slowdown)

    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return not self._waiting() and not self._batches

    def _waiting(self) -> int:
        return 0 if self.dispatcher is None else len(self.dispatcher.heap)

    def state(self) -> State:
        """What the server is doing now, for metrics and the live page."""
        dispatcher, held = self.dispatcher, self.engine.held
        return State(
            ready=self.ready,
            status="ready" if self.ready else self._why_not_ready(),
            workers=self.config.workers if dispatcher is None else dispatcher.workers,
            busy_workers=0 if dispatcher is None else dispatcher.workers - dispatcher.idle_workers,
            queue_depth=self._waiting(),
            queue_limit=self.config.max_queue,
            oldest_age_s=0.0 if dispatcher is None else dispatcher.heap.oldest_age_s(self.clock()),
            slowdown=1.0 if dispatcher is None else dispatcher.slowdown,
            overhead_s=0.0 if dispatcher is None else dispatcher.overhead_s,
            corrections={} if dispatcher is None else dispatcher.applied,
            held_bytes=held.nbytes,
            held_subnets=len(held.subnets),
        )

    def _reply(self, query: Query, answer: Answer, now_s: float, top_k: int) -> Reply:
        row = answer.probabilities
        best = [answer.likeliest] if top_k == 1 else np.argsort(-row, kind="stable")[:top_k].tolist()
        classes = self._servable.classes
        return Reply(
            predictions=tuple([Prediction(label=classes[i], index=i, probability=float(row[i])) for i in best]),
            subnet=answer.entry.name,
            accuracy=answer.entry.accuracy,
            batch_size=answer.batch_size,
            slo_s=query.slo_s,
            latency_s=now_s - query.arrival_s,
            queue_s=answer.started_s - query.arrival_s,
            deadline_met=now_s <= query.deadline_s,
            degraded=answer.degraded,
            probabilities=row,
        )

    def _open(self) -> Dispatcher:
        if self._draining or self.dispatcher is None or not self.ready:
            raise NotReady(self._why_not_ready(), retry_after_s=1)
        return self.dispatcher

    def _why_not_ready(self) -> str:
        if self.lost is not None:
            return "the device is lost"
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
        try:
            while (batch := self.dispatcher.next_batch()) is not None:
                self._run(batch, self.dispatcher)
        finally:  # a policy that fails must not keep queries from their answer at the deadline
            if self.dispatcher.heap and self.dispatcher.heap.head_deadline_s < self._expiry_s:
                self._arm_expiry(self.dispatcher.heap.head_deadline_s)

    def _run(self, batch: Batch, dispatcher: Dispatcher) -> None:
        limit_s = max(self.config.hang_timeout_s, HANG_FACTOR * dispatcher.planned_s(batch))
        inputs = [query.input for query in batch.queries]
        running = asyncio.ensure_future(self.engine.run(batch.entry.name, inputs, limit_s))
        self._batches.add(running)
        running.add_done_callback(partial(self._finish, batch, dispatcher))

    def _arm_expiry(self, deadline_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_s = deadline_s
        delay_s = max(0.0, deadline_s - self.clock())
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._on_expiry)

    def _on_expiry(self) -> None:
        self._expiry, self._expiry_s = None, math.inf
        self._pump()

    def _finish(self, batch: Batch, dispatcher: Dispatcher, done: asyncio.Future[Outputs]) -> None:
        """Settle one batch, and start the next before the answers are written; only its own queries may fail."""
        self._batches.discard(done)
        try:
            if done.cancelled():  # which is no Exception
                raise EngineError("its computation was cancelled")
            dispatcher.settle(batch, done.result())
        except Exception as error:  # noqa: BLE001 the one broad except: it guards one batch
            log_event("batch failed", logging.ERROR, error, subnet=batch.entry.name, batch_size=len(batch.queries))
            hung = isinstance(error, HungError)
            why = f"it hung, {error}" if hung else type(error).__name__
            gone = isinstance(error, HungError) and not error.replaced
            dispatcher.fail(batch, f"the batch could not be computed: {why}", worker_gone=gone)
            if self.lost is not None:
                self._lose(dispatcher)
        finally:
            del done  # its error, if it has one, refers to this frame
            self._pump()

    def _lose(self, dispatcher: Dispatcher) -> None:
        """Refuse whatever waits and whatever comes: nothing can be computed any more."""
        dispatcher.abandon("the device is lost")
        if self.ready:
            self.ready = False
            log_event("device lost", logging.ERROR, why=self.lost)
            self.on_lost()

    def _use(self, table: ProfileTable) -> None:
        startup.plan_ensembles(self.engine, table)
        policy = slackfit.make_policy(self.config.policy, table, self.config.workers)
        self.dispatcher = Dispatcher(
            table,
            policy,
            self.clock,
            workers=self.config.workers,
            max_queue=self.config.max_queue,
            max_queue_bytes=self.config.max_queue_bytes,
            margin=self.config.margin,
            correction=self.config.correction,
        )
        self._limits = Limits(
            default_slo_s=self.config.default_slo_ms / 1e3,
            longest_slo_s=self.config.max_slo_ms / 1e3,
            accuracies={entry.name: entry.accuracy for entry in table.entries},
            classes=len(self._servable.classes),
        )
        self.dispatcher.observers += [self.metrics, self.live, self.statistics]

    def _stored_table(self) -> ProfileTable | None:
        """The stored latency table for this device; None when it is to be measured."""
        try:
            return self._table_file.load()
        except slackfit.DeviceMismatch as error:
            if not self.config.autoprofile:
                raise ProfileError(f"{error}; start without --no-autoprofile to measure one") from None
            return None

    async def _profile_device(self) -> ProfileTable:
        log_event("profiling", table=str(self._table_file.path), why="no stored table fits this device")
        names = [choice.name for choice in self._choices if choice.frontier]
        latencies = await startup.profile_latencies(self.engine, names, rounds=20)
        try:
            self._table_file.store(latencies)
        except OSError as error:
            log_event("table not stored", logging.WARNING, error=str(error))
        return slackfit.build_table(self._choices, startup.PROFILED_BATCH_SIZES, latencies, self._table_file.device)


# ---------------------------------------------------------------------------------------------------------------- HTTP

SERVE = web.AppKey("serve", SuperServe)


async def handle_predict(request: web.Request) -> web.Response:
    """POST /predict: one input, one answer."""
    serve, door = request.app[SERVE], request.app[DOOR]
    visitor = door.visitor(request.protocol)
    try:
        parameters = parse_parameters(request.query, request.headers, serve.limits())
        if not visitor.accepted:
            serve.turn_away(visitor.arrival_s, parameters)
        body = await read_body(request, parameters.slo_s, serve.config.max_body_bytes)
        decoded = serve.decode_inline(body, request.content_type)
        if decoded is None:
            decoded = await serve.decode(body, request.content_type)
    finally:
        door.leave(request.protocol)
    reply = await serve.submit(decoded, visitor.arrival_s, parameters)
    return web.Response(body=reply.json().encode(), content_type="application/json")


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
    access = startup.load_access(config)
    app = web.Application(middlewares=[json_errors], client_max_size=config.max_body_bytes)
    app[SERVE] = SuperServe(config)
    add_uploads(app, Uploads(config.max_upload_bytes, config.body_timeout_s))
    app.router.add_post("/predict", handle_predict)
    app.router.add_get("/healthz", handle_healthz)
    app.router.add_get("/readyz", handle_readyz)
    app.router.add_get("/profile", handle_profile)
    add_metrics(app, app[SERVE].metrics)
    add_openapi(app, app[SERVE])
    add_live(app, Page(app[SERVE].live, app[SERVE].state, app[SERVE].about))
    limits = StreamLimits(config.max_in_flight, config.max_body_bytes, config.drain_timeout_s, config.body_timeout_s)
    add_stream(app, app[SERVE], limits)
    app.router.add_routes(OpenInference(app[SERVE]).routes())
    add_access(app, access)
    count = app[SERVE].metrics.count_response
    app[DOOR] = Door(app[SERVE], count, keyed=access.keys is not None)
    if not access.origins:  # whose answers have headers of their own
        app[LANE] = Lane(app[SERVE], app[DOOR], count, config.max_body_bytes, config.drain_timeout_s)
        app.on_shutdown.append(app[LANE].drain)
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
    """Serve HTTP until SIGTERM or Ctrl-C, then drain; raises DeviceLostError if the device was lost meanwhile."""
    app = make_app(config)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORDS_S)
    await runner.setup()
    stop = asyncio.Event()
    app[SERVE].on_lost = stop.set
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with startup.opened(config, runner):
            stopping = asyncio.create_task(stop.wait())
            starting = app[SERVE].start_soon()
            await asyncio.wait((stopping, starting), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # a failed start ends the server
                startup.settle_garbage()
                tidying = asyncio.create_task(startup.collect_when_idle(app[SERVE].clock, app[SERVE].is_idle))
                await _until(stopping, app[SERVE], config.summary_s)
                tidying.cancel()
            log_event("draining")
            await app[SERVE].close()
    finally:
        await runner.cleanup()
    log_event("stopped", **_outcomes(app[SERVE]))
    if app[SERVE].lost is not None:
        raise DeviceLostError(app[SERVE].lost)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The server as a command; exits with 0 after a drain, EX_LOST for a new process, 1 where that would not help."""
    command = parse_arguments(arguments)
    if command.check:
        sys.exit(startup.report(startup.check(command.config)))
    start_log()
    switch_promptly()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_forever(command.config))
    except (DeviceLostError, HungError) as error:
        log_event("ended", logging.ERROR, why=str(error), exit_code=EX_LOST)
        leave(EX_LOST, at_once=True)
    except (ConfigError, AccessError, ProfileError, SupernetError, slackfit.PolicyError, EngineError, OSError) as error:
        sys.exit(f"superserve: {error}")
    leave(0)


if __name__ == "__main__":
    main()
