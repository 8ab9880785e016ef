"""``GET /stream``: a WebSocket for clients that send many queries over one connection.

A binary message is one query: a little-endian uint32, the length of the header; the header, a JSON object; the payload.
The header's fields: ``id`` (a string or a whole number, sent back with the reply), ``slo_ms``, ``min_accuracy``,
``priority`` and ``top_k`` as for POST /predict, and what the payload is: ``content_type`` as for POST /predict, or
``dtype`` ("uint8", "float32", "int32" or "int64", little-endian) with ``shape`` for a raw tensor. With neither, an
image speaks for itself.

Replies are JSON text messages in the order in which queries are done: the reply of POST /predict and ``id``; or
``error``, ``reason``, ``status`` (what the HTTP status would be), what else the error tells, and ``id``, which is null
where the message had none that can be read. A bad message costs its sender one such reply, not the connection.

The SLO counts from the arrival of the message. A closed connection cancels its queries. While the server drains, new
messages are refused, queries in flight are answered, and then the connection is closed with code 1001. A client that
does not take what it is sent is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from numpy.typing import NDArray

from web.errors import BadRequest, NotReady, ServeError, TooLarge, TooManyInFlight
from web.inputs import Limits, Parameters, parse_parameters
from web.json_values import brief

log = logging.getLogger("superserve")

MAX_HEADER_BYTES = 16 * 1024
# A silent peer is asked whether it is still there, and given up half as long after that.
HEARTBEAT_S = 30.0
# How long a peer may take to return a close frame.
CLOSE_S = 2.0
# Large images of one connection that are decoded at a time; while so many are, nothing more is read from it.
MOST_DECODING = 4
# The time in which a client is to take what it is sent is waited for in so many parts.
LOOKS = 4

PARAMETERS = ("slo_ms", "min_accuracy", "priority", "top_k")
FIELDS = frozenset(("id", "content_type", "dtype", "shape", "members", *PARAMETERS))
_DTYPES = {"uint8": "u1", "float32": "<f4", "int32": "<i4", "int64": "<i8"}
_LENGTH = struct.Struct("<I")

MessageId = str | int


# ---------------------------------------------------------------------------------------------------- what is needed


class Answered(Protocol):
    """The answer to one query."""

    def json(self) -> str:
        """Its JSON form, an object."""


class PendingReply(Protocol):
    """A query on its way; a hashable object of its own."""

    def collect(self) -> Answered | ServeError:
        """What became of it, once, after it was announced; this is the moment that counts as answering."""

    def cancel(self) -> None:
        """Nobody wants its answer any more."""


class StreamServing(Protocol):
    """The part of SuperServe that this protocol needs."""

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    def limits(self) -> Limits: ...  # noqa: D102
    def turn_away(self, arrival_s: float, parameters: Parameters) -> None: ...  # noqa: D102
    def check_input(self, array: object) -> NDArray[Any]: ...  # noqa: D102
    def decode_inline(self, body: bytes, content_type: str) -> NDArray[Any] | None: ...  # noqa: D102
    async def decode(self, body: bytes, content_type: str) -> NDArray[Any]: ...  # noqa: D102
    def begin(  # noqa: D102
        self, input: NDArray[Any], arrival_s: float, parameters: Parameters, announce: Callable[[PendingReply], object]
    ) -> PendingReply: ...


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one connection may cost, how long draining may take, and its client to take what it is sent."""

    in_flight: int
    body_bytes: int
    drain_s: float
    send_s: float


# --------------------------------------------------------------------------------------------------------- the messages


class Message(NamedTuple):
    """One message taken apart; the header's fields are read, and refused, one by one by the methods."""

    header: Mapping[str, Any]
    payload: bytes

    @property
    def id(self) -> MessageId:
        """What tells its reply from those to others; BadRequest if there is none."""
        found = self.header.get("id")
        if type(found) is not str and type(found) is not int:
            raise BadRequest(f"id must be a string or a whole number, not {brief(found)}")
        return found

    def parameters(self, limits: Limits) -> Parameters:
        """What is asked for beside the input itself; BadRequest for unknown fields and values out of range."""
        header = self.header
        if not header.keys() <= FIELDS:
            raise BadRequest(f"unknown header field '{min(header.keys() - FIELDS):.40}'; known: {_listed(FIELDS)}")
        texts = {}
        for name in PARAMETERS:
            if name in header:
                if type(header[name]) is not float and type(header[name]) is not int:
                    raise BadRequest(f"{name} must be a number, not {brief(header[name])}")
                texts[name] = str(header[name])
        if "members" in header:
            if not isinstance(header["members"], str):
                raise BadRequest(f"members must be a string, joined by +, not {brief(header['members'])}")
            texts["members"] = header["members"]
        return parse_parameters(texts, {}, limits) if texts else limits.defaults

    def content_type(self) -> str:
        """The payload's type without its parameters, as an HTTP request would have it."""
        found = self.header.get("content_type", "application/octet-stream")
        if not isinstance(found, str):
            raise BadRequest(f"content_type must be a string, not {brief(found)}")
        return found.partition(";")[0].strip().lower()

    def tensor(self) -> NDArray[Any] | None:
        """The array that dtype and shape say the payload is; None where the header has neither."""
        dtype, shape = self.header.get("dtype"), self.header.get("shape")
        if dtype is None and shape is None:
            return None
        if "content_type" in self.header:
            raise BadRequest("a payload has either a content_type, or a dtype and a shape")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise BadRequest(f"dtype must be one of {_listed(_DTYPES)}, not {brief(dtype)}")
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
            raise BadRequest("shape must be a list of whole numbers above 0")
        if len(shape) > 8:  # numpy has a limit of its own, which is higher
            raise BadRequest(f"shape has {len(shape)} dimensions; at most 8 are read")
        try:
            return np.frombuffer(self.payload, _DTYPES[dtype]).reshape(shape)
        except (ValueError, OverflowError):
            raise BadRequest(f"{len(self.payload)} bytes are not a {dtype} tensor of shape {shape!s:.80}") from None


def split_message(data: bytes) -> Message:
    """Header and payload of a binary message; BadRequest says what is wrong with its form."""
    if len(data) < _LENGTH.size:
        raise BadRequest(f"a message of {len(data)} bytes; it begins with the header's length, a little-endian uint32")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_HEADER_BYTES:
        raise BadRequest(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    start = _LENGTH.size + length
    if start > len(data):
        raise BadRequest(f"a header of {length} bytes in a message of {len(data)} bytes")
    try:
        header = json.loads(data[_LENGTH.size : start].decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadRequest(f"the header must be a JSON object, not {brief(header)}")
    return Message(header, data[start:])


def error_text(message_id: MessageId | None, error: ServeError) -> str:
    """The text message that tells a client of an error."""
    document = {"id": message_id, "error": str(error), "reason": error.reason, "status": error.status, **error.details}
    if error.retry_after_s is not None:
        document["retry_after_s"] = error.retry_after_s
    return json.dumps(document)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


# ------------------------------------------------------------------------------------------------------ one connection


class Connection:
    """One WebSocket: reads queries, and sends what becomes of them as it does.

    There is no task per query: what is announced within one turn of the event loop is collected at the end of it, and
    one task sends. A client that does not read its replies holds up nobody but itself: its answers are counted when
    they are there, its queries in flight reach the limit, and errors beyond that are sent before more is read from it.
    One that goes on so is cut off: it would hold this connection for ever.
    """

    def __init__(
        self, request: web.Request, socket: web.WebSocketResponse, serving: StreamServing, limits: StreamLimits
    ) -> None:
        self._request, self._socket, self._serving, self._limits = request, socket, serving, limits
        self._sent = 0
        self._draining = False
        self._in_flight = 0  # messages accepted and not yet answered, in whatever stage
        self._waiting: dict[PendingReply, MessageId] = {}
        self._announced: list[PendingReply] = []
        self._outbox: deque[str] = deque()
        self._posted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoders: set[asyncio.Task[None]] = set()
        self._may_decode = asyncio.Semaphore(MOST_DECODING)

    async def run(self) -> None:
        """Serve until the socket is closed; then cancel what is unanswered."""
        try:
            async with asyncio.TaskGroup() as tasks:  # a failure of any ends the connection, and is logged above
                sender, watcher = tasks.create_task(self._send_posted()), tasks.create_task(self._watch())
                await self._read(tasks)
                for task in (sender, watcher, *self._decoders):
                    task.cancel()
        finally:
            self._announced.clear()
            for pending in self._waiting:
                pending.cancel()
            self._waiting.clear()
            self._idle.set()

    async def drain(self) -> None:
        """Refuse new queries, wait until those in flight are answered, and say goodbye."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s if self._waiting or self._decoders else CLOSE_S):
                await self._idle.wait()
        # Not drained: a client that reads nothing would never let this end.
        await self._socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server is stopping", drain=False)

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        async for message in self._socket:
            arrival_s = self._serving.clock()
            if message.type is WSMsgType.BINARY:
                await self._receive(message.data, arrival_s, tasks)
            elif message.type is WSMsgType.TEXT:
                await self._send(error_text(None, BadRequest("a text message; queries are binary messages")))

    async def _receive(self, data: bytes, arrival_s: float, tasks: asyncio.TaskGroup) -> None:
        message_id = None
        try:
            message = split_message(data)
            message_id = message.id
            parameters = self._admit(message, arrival_s)
            input = self._input_of(message)
            if input is not None:
                self._begin(input, arrival_s, parameters, message_id)
                self._accept()
                return
        except ServeError as error:
            await self._send(error_text(message_id, error))
            return
        await self._may_decode.acquire()
        self._accept()
        task = tasks.create_task(self._decode(message, arrival_s, parameters, message_id))
        self._decoders.add(task)
        task.add_done_callback(self._decoders.discard)

    def _admit(self, message: Message, arrival_s: float) -> Parameters:
        if self._draining:
            raise NotReady("draining", retry_after_s=1)
        parameters = message.parameters(self._serving.limits())
        if self._in_flight >= self._limits.in_flight:
            allowed = self._limits.in_flight
            raise TooManyInFlight(f"{allowed} queries of this connection are unanswered; more are refused")
        if len(message.payload) > self._limits.body_bytes:
            raise TooLarge("the body is larger than this server accepts")
        self._serving.turn_away(arrival_s, parameters)
        return parameters

    def _input_of(self, message: Message) -> NDArray[Any] | None:
        """The network input; None if decoding it would hold up other queries."""
        tensor = message.tensor()
        if tensor is not None:
            return self._serving.check_input(tensor)
        return self._serving.decode_inline(message.payload, message.content_type())

    async def _decode(
        self, message: Message, arrival_s: float, parameters: Parameters, message_id: MessageId
    ) -> None:
        try:
            input = await self._serving.decode(message.payload, message.content_type())
            self._begin(input, arrival_s, parameters, message_id)
        except ServeError as error:
            self._post(error_text(message_id, error))
        finally:
            self._may_decode.release()

    def _begin(self, input: NDArray[Any], arrival_s: float, parameters: Parameters, message_id: MessageId) -> None:
        pending = self._serving.begin(input, arrival_s, parameters, self._announce)
        self._waiting[pending] = message_id

    def _accept(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _announce(self, pending: PendingReply) -> None:
        if not self._announced:
            asyncio.get_running_loop().call_soon(self._collect)
        self._announced.append(pending)

    def _collect(self) -> None:
        announced, self._announced = self._announced, []
        for pending in announced:
            message_id = self._waiting.pop(pending)
            outcome = pending.collect()
            if isinstance(outcome, ServeError):
                self._post(error_text(message_id, outcome))
            else:
                self._post(f'{{"id": {json.dumps(message_id)}, {outcome.json()[1:]}')

    def _post(self, text: str) -> None:
        self._outbox.append(text)
        self._posted.set()

    async def _send_posted(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._outbox:
                await self._send(self._outbox.popleft())
                self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _send(self, text: str) -> None:
        try:  # noqa: SIM105 suppress would take as long as all else here
            await self._socket.send_str(text)
        except ConnectionError:
            pass  # the client went away; reading ends, too
        self._sent += 1

    async def _watch(self) -> None:
        """Cut the client off once nothing could be sent for a time, be it replies or what aiohttp sends itself."""
        paused = seen = 0
        while paused < LOOKS:
            await asyncio.sleep(self._limits.send_s / LOOKS)
            paused = paused + 1 if self._request.protocol.writing_paused and self._sent == seen else 0
            seen = self._sent
        if self._request.transport is not None:
            self._request.transport.abort()


# ------------------------------------------------------------------------------------------------------ the application


class Streams:
    """The connections that are open; none are opened once it drains."""

    def __init__(self, serving: StreamServing, limits: StreamLimits) -> None:
        self._serving, self._limits = serving, limits
        self._open: set[Connection] = set()
        self._draining = False

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """GET /stream: a WebSocket, served until it is closed."""
        self._serving.limits()  # not ready is told as HTTP, before there is a socket
        if self._draining:
            raise NotReady("draining", retry_after_s=1)
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S,
            timeout=CLOSE_S,
            compress=False,  # images do not shrink
            max_msg_size=_LENGTH.size + MAX_HEADER_BYTES + self._limits.body_bytes + 1,
        )
        if not socket.can_prepare(request):
            raise BadRequest("/stream is a WebSocket (version 13); connect to ws://HOST:PORT/stream")
        await socket.prepare(request)
        connection = Connection(request, socket, self._serving, self._limits)
        self._open.add(connection)
        try:
            if self._draining:  # since a moment ago
                await connection.drain()
            else:
                await self._serve(connection, socket)
        finally:
            self._open.discard(connection)
            if request.transport is not None:  # a transport waits for ever until all that was sent is taken
                asyncio.get_running_loop().call_later(self._limits.send_s, request.transport.abort)
        return socket

    async def _serve(self, connection: Connection, socket: web.WebSocketResponse) -> None:
        try:
            await connection.run()
        except Exception:  # what nobody foresaw ends here: json_errors would answer it by HTTP, in the midst of frames
            log.exception("a request failed", extra={"fields": {"method": "GET", "path": "/stream"}})
            # Not drained: a client that reads nothing would never let this end.
            await socket.close(code=WSCloseCode.INTERNAL_ERROR, message=b"the server failed", drain=False)

    async def drain(self, _: web.Application) -> None:
        """Drain all connections at a time."""
        self._draining = True
        await asyncio.gather(*(connection.drain() for connection in self._open))


def add_stream(app: web.Application, serving: StreamServing, limits: StreamLimits) -> None:
    """Give an application the route /stream; its shutdown drains and closes what is open."""
    streams = Streams(serving, limits)
    app.router.add_get("/stream", streams.handle, allow_head=False)
    app.on_shutdown.append(streams.drain)
