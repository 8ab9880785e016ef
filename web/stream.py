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
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from numpy.typing import NDArray

from web import websocket
from web.errors import BadRequest, NotReady, ServeError, TooLarge, TooManyInFlight, forget_past
from web.frames import BINARY, GOING_AWAY, INTERNAL_ERROR, TEXT, FrameError, frame
from web.inputs import Limits, Parameters, parse_parameters
from web.json_values import brief
from web.websocket import Socket

log = logging.getLogger("superserve")

MAX_HEADER_BYTES = 16 * 1024
# Large images of one connection that are decoded at a time; while more are to be, nothing is read from it.
MOST_DECODING = 4
# Clients send few different headers, but for the id; longer ones, and more of them, are read each time.
REMEMBERED, REMEMBERED_BYTES = 256, 1024

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

    def cancel(self) -> None:
        """Nobody wants its answer any more."""


class StreamServing(Protocol):
    """The part of SuperServe that this protocol needs."""

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    def limits(self) -> Limits: ...  # noqa: D102
    @property
    def flooded(self) -> bool: ...  # noqa: D102
    def turn_away(self, arrival_s: float, parameters: Parameters) -> None: ...  # noqa: D102
    def check_input(self, array: object) -> NDArray[Any]: ...  # noqa: D102
    def decode_inline(self, body: bytes, content_type: str) -> NDArray[Any] | None: ...  # noqa: D102
    async def decode(self, body: bytes, content_type: str) -> NDArray[Any]: ...  # noqa: D102
    def begin(  # noqa: D102
        self, input: NDArray[Any], arrival_s: float, parameters: Parameters, announce: Callable[[PendingReply], object]
    ) -> PendingReply: ...
    def begin_all(  # noqa: D102
        self, inputs: Sequence[NDArray[Any]], arrival_s: float, parameters: Parameters,
        announce: Callable[[PendingReply], object],
    ) -> Sequence[PendingReply] | None: ...  # fmt: skip
    def collect(self, announced: Sequence[Any]) -> Sequence[Answered | ServeError]:
        """What became of queries, once, after they were announced; this is the moment that counts as answering."""


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


class Familiar(NamedTuple):
    """What the header of a raw tensor asks for, whatever its id."""

    parameters: Parameters
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def input(self, message: bytearray, start: int) -> NDArray[Any]:
        """The tensor in a message, whose payload is as long as it has to be."""
        if self.dtype != "u1":  # is to lie where its values are aligned
            message, start = message[start:], 0
        return np.frombuffer(message, self.dtype, -1, start).reshape(self.shape)


class Alike(NamedTuple):
    """Messages that came together and differ in ids and payloads only; none yet where nothing is familiar."""

    familiar: Familiar | None
    ids: list[str]
    inputs: list[NDArray[Any]]


class Headers:
    """Headers of raw tensors that were read, and found good, before: most differ from one of them in their id only."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], Familiar] = {}

    def recall(self, message: bytearray) -> tuple[str, Familiar, int] | None:
        """The id, in JSON, what the header says, and where the payload begins; None if this is to be read."""
        start = _LENGTH.size + int.from_bytes(message[: _LENGTH.size], "little")
        header = bytes(message[_LENGTH.size : start])
        found = _ID.search(header)
        if found is None:
            return None
        known = self._known.get((header[: found.start(1)], header[found.end() :]))
        if known is None or len(message) - start != known.nbytes:
            return None
        return found[1].decode("ascii"), known, start

    def remember(self, data: bytes, message: Message, parameters: Parameters) -> None:
        """Keep what a header said that is good; it is plain if nothing but its one id can be taken for that."""
        header = data[_LENGTH.size : len(data) - len(message.payload)]
        found = _ID.search(header)
        if found is None or len(header) > REMEMBERED_BYTES or header.count(b'"id"') > 1 or b"\\" in header:
            return
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        dtype, shape = _DTYPES[message.header["dtype"]], tuple(message.header["shape"])
        nbytes = np.dtype(dtype).itemsize * math.prod(shape)
        self._known[header[: found.start(1)], header[found.end() :]] = Familiar(parameters, dtype, shape, nbytes)


# An id that goes back as it came.
_ID = re.compile(rb'"id": ?((?:0|[1-9][0-9]{0,17})|"[ !#-\[\]-~]*")(?=[,}])')


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

    There is no task per query: all that one read brought is queued at once, and what is announced within one turn of
    the event loop is collected and sent at the end of it. A client that does not take its replies holds up nobody but
    itself: its answers are counted when they are there, its queries in flight reach the limit, and nothing is read
    beyond the first error that it does not take. One that goes on so is cut off: it would hold this connection for
    ever.
    """

    def __init__(
        self,
        request: web.Request,
        writer: AbstractStreamWriter,
        serving: StreamServing,
        limits: StreamLimits,
        headers: Headers,
    ) -> None:
        self._serving, self._limits, self._headers = serving, limits, headers
        most_bytes = _LENGTH.size + MAX_HEADER_BYTES + limits.body_bytes
        self.socket = Socket(request, writer, self, most_bytes=most_bytes, send_s=limits.send_s)
        self._draining = False
        self._in_flight = 0  # messages accepted and not yet answered, in whatever stage
        self._waiting: dict[PendingReply, str] = {}  # the ids of queries, in JSON
        self._announced: list[PendingReply] = []
        self._outbox: list[bytes] = []  # replies to messages in flight
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks = asyncio.TaskGroup()
        self._decoders: set[asyncio.Task[None]] = set()
        self._may_decode = asyncio.Semaphore(MOST_DECODING)

    async def run(self) -> None:
        """Serve until the socket is closed; then cancel what is unanswered. Raises what ended it, FrameError too."""
        over = self.socket.over
        try:
            async with self._tasks as tasks:  # a failure of any ends the connection, and is logged above
                socket = self.socket
                helping = (socket.attend, socket.watch, socket.ask_whether_there)
                helpers = [tasks.create_task(each()) for each in helping]
                socket.open()
                await asyncio.wait((over,))
                for task in (*helpers, *self._decoders):
                    task.cancel()
        finally:
            over.cancel()  # nothing more is received
            self._announced.clear()
            for pending in self._waiting:
                pending.cancel()
            self._waiting.clear()
            self._idle.set()
        if not over.cancelled():
            over.result()

    def refuse(self) -> None:
        """Refuse new queries from now on."""
        self._draining = True

    async def drain(self) -> None:
        """Wait until what is in flight is answered, new queries being refused, and say goodbye."""
        self.refuse()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s if self._waiting or self._decoders else websocket.CLOSE_S):
                await self._idle.wait()
        await self.socket.close(GOING_AWAY, "the server is stopping")

    # ------------------------------------------------------------------------------------------------------- reading

    def receive(self, messages: Iterator[tuple[int, bytearray]]) -> None:
        """Queue what one read brought, until something has to be waited for."""
        arrival_s, recall, alike = self._serving.clock(), self._headers.recall, Alike(None, [], [])
        # In a flood, what is to be refused is refused in the cheapest way, which comes first in ``_take``.
        plain = not self._draining and not self._serving.flooded
        room = self._limits.in_flight - self._in_flight
        for kind, data in messages:
            known = recall(data) if kind == BINARY and plain and len(alike.ids) < room else None
            if known is not None and known[1] is alike.familiar:
                alike.ids.append(known[0])
                alike.inputs.append(known[1].input(data, known[2]))
                continue
            self._begin_alike(alike, arrival_s)
            alike = Alike(None, [], [])
            if known is not None:
                alike = Alike(known[1], [known[0]], [known[1].input(data, known[2])])
            else:
                self._receive(kind, data, arrival_s)
                if self.socket.over.done():
                    return
                if not self._may_read():
                    self.socket.hold()
                    return
            room = self._limits.in_flight - self._in_flight
        self._begin_alike(alike, arrival_s)

    def _begin_alike(self, alike: Alike, arrival_s: float) -> None:
        """Queue what came together, or one by one what may be refused."""
        if alike.familiar is None:
            return
        parameters, check = alike.familiar.parameters, self._serving.check_input
        try:
            inputs = [check(each) for each in alike.inputs]
            found = self._serving.begin_all(inputs, arrival_s, parameters, self._announce)
        except ServeError:  # is told below to whom it concerns
            found = None
        if found is not None:
            self._waiting.update(zip(found, alike.ids, strict=True))
            self._in_flight += len(found)
            self._idle.clear()
            return
        for message_id, input in zip(alike.ids, alike.inputs, strict=True):
            try:
                self._begin(check(input), arrival_s, parameters, message_id)
                self._accept()
            except ServeError as error:
                self._tell(error_text(json.loads(message_id), error))

    def _may_read(self) -> bool:
        return not self.socket.full and len(self._decoders) <= MOST_DECODING

    def taken(self) -> None:
        """The client took what it was sent; or an image is decoded."""
        if self.socket.full:
            self.socket.tell_when_taken()
            return
        self._flush()
        if self._may_read():
            self.socket.go_on()

    def _receive(self, kind: int, data: bytearray, arrival_s: float) -> None:
        if kind == BINARY:
            self._take(bytes(data), arrival_s)
        elif kind == TEXT:
            self._tell(error_text(None, BadRequest("a text message; queries are binary messages")))
        else:
            self.socket.control(kind, data)

    def _take(self, data: bytes, arrival_s: float) -> None:
        message_id = None
        try:
            message = split_message(data)
            message_id = message.id
            parameters = self._admit(message, arrival_s)
            tensor = message.tensor()
            if tensor is not None:
                input: NDArray[Any] | None = self._serving.check_input(tensor)
                self._headers.remember(data, message, parameters)
            else:
                input = self._serving.decode_inline(message.payload, message.content_type())
            if input is not None:
                self._begin(input, arrival_s, parameters, json.dumps(message_id))
                self._accept()
                return
        except ServeError as error:
            self._tell(error_text(message_id, error))
            return
        self._accept()
        task = self._tasks.create_task(self._decode(message, arrival_s, parameters, message_id))
        self._decoders.add(task)
        task.add_done_callback(self._decoded)

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

    async def _decode(
        self, message: Message, arrival_s: float, parameters: Parameters, message_id: MessageId
    ) -> None:
        """An image that would hold up other queries."""
        try:
            async with self._may_decode:
                input = await self._serving.decode(message.payload, message.content_type())
            self._begin(input, arrival_s, parameters, json.dumps(message_id))
        except ServeError as error:
            self._post([_framed(error_text(message_id, error))])

    def _decoded(self, task: asyncio.Task[None]) -> None:
        self._decoders.discard(task)
        self.socket.tell_when_taken()  # which goes on with what is held up

    def _begin(self, input: NDArray[Any], arrival_s: float, parameters: Parameters, message_id: str) -> None:
        self._waiting[self._serving.begin(input, arrival_s, parameters, self._announce)] = message_id

    def _accept(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    # ------------------------------------------------------------------------------------------------------- replying

    def _announce(self, pending: PendingReply) -> None:
        if not self._announced:
            asyncio.get_running_loop().call_soon(self._collect)
        self._announced.append(pending)

    def _collect(self) -> None:
        announced, self._announced = self._announced, []
        try:
            ids = [self._waiting.pop(pending) for pending in announced]
            outcomes = self._serving.collect(announced)
            self._post([_reply(*each) for each in zip(ids, outcomes, strict=True)])
        except Exception as error:  # noqa: BLE001 nobody foresaw it: whoever runs this connection ends it
            self.socket.fail(error)

    def _post(self, replies: list[bytes]) -> None:
        """Send replies to messages in flight, now or once the client takes them."""
        self._outbox += replies
        if self.socket.full:
            self.socket.tell_when_taken()
        else:
            self._flush()

    def _flush(self) -> None:
        if self._outbox:
            self.socket.write(b"".join(self._outbox))
            self._in_flight -= len(self._outbox)
            self._outbox.clear()
        if not self._in_flight:
            self._idle.set()

    def _tell(self, text: str) -> None:
        """Send an error for a message that was not accepted."""
        self.socket.write(_framed(text))


def _reply(message_id: str, outcome: Answered | ServeError) -> bytes:
    """The frame that tells what became of a query; the id is JSON already."""
    if isinstance(outcome, ServeError):
        return _framed(error_text(json.loads(message_id), outcome))
    return _framed(f'{{"id": {message_id}, {outcome.json()[1:]}')


def _framed(text: str) -> bytes:
    return frame(TEXT, text.encode())


# ------------------------------------------------------------------------------------------------------ the application


class Streams:
    """The connections that are open; none are opened once it drains."""

    def __init__(self, serving: StreamServing, limits: StreamLimits) -> None:
        self._serving, self._limits = serving, limits
        self._open: set[Connection] = set()
        self._headers = Headers()
        self._draining = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET /stream: a WebSocket, served until it is closed."""
        self._serving.limits()  # not ready is told as HTTP, before there is a socket
        if self._draining:
            raise NotReady("draining", retry_after_s=1)
        if not websocket.can_shake_hands(request):
            raise BadRequest("/stream is a WebSocket (version 13); connect to ws://HOST:PORT/stream")
        response = websocket.handshake(request)
        writer = await response.prepare(request)
        assert writer is not None, "prepared once"
        connection = Connection(request, writer, self._serving, self._limits, self._headers)
        self._open.add(connection)
        try:
            if self._draining:  # since a moment ago
                connection.socket.open()
                await connection.drain()
            else:
                await self._serve(connection)
        except asyncio.CancelledError as error:  # the client left
            forget_past(error)  # the task group keeps it
            raise
        finally:
            self._open.discard(connection)
            connection.socket.let_go()
            if request.transport is not None:  # a transport waits for ever until all that was sent is taken
                asyncio.get_running_loop().call_later(self._limits.send_s, request.transport.abort)
        return response

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except FrameError as error:
            await connection.socket.close(error.code, str(error))
        except Exception:  # what nobody foresaw ends here: json_errors would answer it by HTTP, in the midst of frames
            log.exception("a request failed", extra={"fields": {"method": "GET", "path": "/stream"}})
            await connection.socket.close(INTERNAL_ERROR, "the server failed")

    async def drain(self, _: web.Application) -> None:
        """Drain all connections at a time."""
        self._draining = True
        for connection in self._open:
            connection.refuse()
        await asyncio.gather(*(connection.drain() for connection in self._open))


def add_stream(app: web.Application, serving: StreamServing, limits: StreamLimits) -> None:
    """Give an application the route /stream; its shutdown drains and closes what is open."""
    streams = Streams(serving, limits)
    app.router.add_get("/stream", streams.handle, allow_head=False)
    app.on_shutdown.append(streams.drain)
