"""The socket: how many connections there may be, and how long a client may take to send, to read, or to do nothing.

aiohttp parses requests and answers them, but for those that door.py or lane.py can answer. What it leaves to others is
done here, for each connection:

* Connections beyond the limit get 503 and are closed; the limit leaves file descriptors for everything else.
* A head that has begun must be complete ``header_timeout_s`` later; else the client gets 408. So must a TLS handshake.
* A connection on which nothing is asked is closed after ``idle_timeout_s``.
* A client that does not read what it is sent is cut off after ``stall_timeout_s``, as is one that is to be closed.
* Whatever aiohttp would answer by itself, as text, is JSON; what clients cause is not logged as an error.

Bodies are bounded by bodies.py, messages of a WebSocket by stream.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import (
    BadStatusLine,
    HttpProcessingError,
    InvalidHeader,
    InvalidURLError,
    LineTooLong,
    PayloadEncodingError,
)
from yarl import URL

from web.door import DOOR, STARTS, Door, head_of
from web.errors import (
    BadRequest,
    HeadTooLarge,
    ServeError,
    SlowRequest,
    TooManyConnections,
    error_response,
    forget_past,
)
from web.lane import LANE, Lane, PendingReply

log = logging.getLogger("superserve")

BACKLOG = 1024
# File descriptors for the log, the device, the loop, connections that are refused, and profiles that are read.
SPARE_DESCRIPTORS = 128
# Those that are refused linger for a moment, so that the answer reaches them; more at a time are just closed.
MOST_REFUSING, REFUSING_S = 64, 1.0
# Bytes of an unread body are read and dropped for so long after the answer, so that the answer is not lost.
LINGERING_S = 5.0
# For so long in each turn of the event loop, clients are told that their requests are refused.
TELLING_S = 0.001
# Bytes of further requests that are kept while the answer to one is under way.
MOST_HELD = 64 * 1024
# A flood of connections gets one line in the log in so many seconds.
QUIET_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one connection may take, and how many there may be."""

    connections: int
    header_bytes: int
    header_timeout_s: float
    idle_timeout_s: float
    stall_timeout_s: float


def answer_bytes(error: ServeError) -> bytes:
    """The whole HTTP answer that tells of an error on a connection that is then closed."""
    response = error_response(error)
    body = response.body
    assert isinstance(body, bytes), "errors are told in JSON"
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items() if name != "Content-Length"]
    lines += [f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --------------------------------------------------------------------------------------------------------- connections


class Connection(web.RequestHandler):
    """One connection that is served."""

    __slots__ = (
        "_answer", "_body", "_ending", "_gate", "_head_timer", "_held", "_orderly", "_pending", "_stall_timer", "met",
    )  # fmt: skip

    def __init__(self, gate: Gate) -> None:
        limits = gate.limits
        super().__init__(
            gate.server,
            loop=gate.loop,
            keepalive_timeout=limits.idle_timeout_s,
            lingering_time=min(LINGERING_S, limits.stall_timeout_s),
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
            access_log=None,  # type: ignore[arg-type] # aiohttp's own runner passes it on in this way
        )
        self._gate = gate
        self.met = False
        self._body: StreamReader | None = None  # of the latest request
        # One whole request after the other came, each in one piece.
        self._orderly = gate.door is not None and not gate.door.keyed
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._answer: bytes | None = None  # to a request that is refused, and not told so yet
        self._pending: PendingReply | None = None  # the query of a request that went down the lane
        self._held = b""  # what the client sent before it had the answer to that

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is there, and so is TLS."""
        super().connection_made(transport)
        self.met = True
        assert self._task_handler is not None, "started by aiohttp"
        self._task_handler.add_done_callback(partial(self._end, cast(asyncio.Transport, transport)))

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client went away, or was sent away."""
        for timer in (self._head_timer, self._stall_timer, self._ending):
            if timer is not None:
                timer.cancel()
        self._gate.forget(self)
        if self._gate.door is not None:
            self._gate.door.leave(self)
        if self._pending is not None and self._gate.lane is not None:
            self._gate.lane.give_up(self._pending)
        self._pending = self._body = None  # a body refers to its connection
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A request, or a part of one; a head that has begun is to be complete in time."""
        if self._pending is not None or self._held:
            self._hold(data)
            return
        self.tell_refused()
        if self._orderly and data:  # aiohttp goes on with nothing, too, after a pause
            head = head_of(data, self._gate.limits.header_bytes)
            self._orderly = head is not None
            if head is not None and self._may_answer() and (self._turned_away(data) or self._taken(head, data)):
                return
        super().data_received(data)
        if self._messages and self.transport is not None:
            self._end_body(*self._messages[-1])
        awaited = self._waiter is not None and not self._waiter.done()
        if self._head_timer is None:
            if data and awaited:
                self._head_timer = self._loop.call_later(self._gate.limits.header_timeout_s, self._head_is_late)
        elif not awaited:
            self._head_timer.cancel()
            self._head_timer = None

    def _may_answer(self) -> bool:
        """Whether aiohttp has nothing to do with this connection, so that it need not see the next request."""
        idle = self._waiter is not None and not self._waiter.done()
        stopping = self._close or self._force_close or self.transport is None
        return not stopping and not self._paused and (idle or not self._request_count)

    def _turned_away(self, data: bytes) -> bool:
        """Whether this request is refused at the door."""
        assert self._gate.door is not None, "orderly only where there is one"
        answer = self._gate.door.answer(data, self)
        if answer is not None:
            self._refuse(answer)
        return answer is not None

    def _refuse(self, answer: bytes) -> None:
        self._answer = answer
        self._gate.tell_later(self)

    def _taken(self, head: bytes, data: bytes) -> bool:
        """Whether this request went down the lane."""
        if self._gate.lane is None or not head.startswith(STARTS):
            return False
        outcome = self._gate.lane.take(head, data[len(head) :], self)
        if isinstance(outcome, bytes):
            self._refuse(outcome)
        else:
            self._pending = outcome
        return outcome is not None

    def arrive(self, answer: bytes) -> None:
        """Send the answer to a request that was on the lane, and go on with what came meanwhile."""
        self._pending = None
        if self.transport is not None:
            self._stay()
            self.transport.write(answer)
            if self._held:
                self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """With what the client sent before it had its answer."""
        held, self._held = self._held, b""
        if self.transport is not None:
            self.transport.resume_reading()
            self.data_received(held)

    def _hold(self, data: bytes) -> None:
        """Keep what a client sends before it has its answer; it is not to send much of that.

        Reading goes on as long as it can: only who reads notices that a client has left.
        """
        self._held += data
        if len(self._held) > MOST_HELD and self.transport is not None:
            self.transport.pause_reading()

    def _stay(self) -> None:
        """Have aiohttp leave the connection open, as if it had answered a request now."""
        self._next_keepalive_close_time = self._loop.time() + self._gate.limits.idle_timeout_s

    def _process_keepalive(self) -> None:
        if self._pending is not None:  # it waits for its answer, of which aiohttp knows nothing
            self._stay()
        super()._process_keepalive()

    def tell_refused(self) -> None:
        """Send the answer to a request that is refused, if there is one to be told."""
        answer, self._answer = self._answer, None
        if answer is not None and self.transport is not None:
            self._stay()
            self.transport.write(answer)

    def _end_body(self, message: object, body: StreamReader) -> None:
        """aiohttp keeps what is wrong with a body for the next answer, while the handler of this one waits for more."""
        error = getattr(message, "exc", None)
        if not isinstance(error, HttpProcessingError):
            self._body = body
            return
        forget_past(error)  # the message keeps it
        if self._body is not None and not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError(error.message.partition("\n")[0].rstrip(" :")))

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport is not None:
            limit_s = self._gate.limits.header_timeout_s
            self.transport.write(answer_bytes(SlowRequest(f"the head did not arrive within {limit_s:g} s")))
            self.force_close()

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        if self.transport is not None:
            self._stall_timer = self._loop.call_later(self._gate.limits.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads on."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _end(self, transport: asyncio.Transport, handling: asyncio.Task[None]) -> None:
        """Nothing is served any more: what was sent last is to be read in time, for a transport would wait for ever."""
        if handling.cancelled():  # asking takes the error out of the task, to which its frames refer
            with contextlib.suppress(asyncio.CancelledError):
                handling.exception()
        self._messages.clear()  # asked for and never looked at; their bodies refer to this connection
        self._await_end(transport)

    def _await_end(self, transport: asyncio.Transport) -> None:
        if self in self._gate.open:
            self._ending = self._loop.call_later(self._gate.limits.stall_timeout_s, self._cut_off, transport)

    def _cut_off(self, transport: asyncio.Transport) -> None:
        if self._pending is None:
            transport.abort()
        else:  # the lane drains, and the answer is to come before the end
            self._await_end(transport)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or an error that got past all handlers; as JSON."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; there is no place for another")
        if status >= 500:
            self.log_exception("a request failed", exc_info=exc)
            response = error_response(ServeError("the server failed at this request; its log says why"))
        else:
            response = error_response(_malformed(exc, message))
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp refuses by itself (an Expect that is unknown), as JSON."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            document = {"error": resp.text or resp.reason, "reason": resp.reason.lower().replace(" ", "_")}
            resp = web.json_response(document, status=resp.status)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """Log what is a fault of the server."""
        error = kwargs.get("exc_info")
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            forget_past(error)  # the body keeps it
        else:
            super().log_exception(*args, **kwargs)


def _malformed(exc: BaseException | None, message: str | None) -> ServeError:
    """Why aiohttp cannot read a request, without what the client sent, which may be long and may hold a key."""
    why = (message or "").partition("\n")[0].rstrip(" :.")
    if isinstance(exc, LineTooLong) or why == "Too many headers received":
        return HeadTooLarge("the request line or a header is too long, or there are too many headers")
    if isinstance(exc, InvalidURLError):
        return BadRequest("this is no HTTP request: its URL cannot be read")
    if isinstance(exc, PayloadEncodingError):
        return BadRequest(f"the body cannot be read: {why}")
    if isinstance(exc, BadStatusLine | InvalidHeader):  # quote what they are about
        why = why.partition("'")[0].rstrip(" :")
    return BadRequest(f"this is no HTTP request: {why}")


class Refusal(asyncio.Protocol):
    """One connection too many."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so, and wait for a moment: closing at once would take the answer back from a client that has written."""
        transport = cast(asyncio.Transport, transport)
        self._gate.refusing += 1
        transport.write(BUSY)
        if self._gate.refusing > MOST_REFUSING:
            transport.close()
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._timer = self._gate.loop.call_later(REFUSING_S, transport.abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._gate.refusing -= 1
        if self._timer is not None:
            self._timer.cancel()


BUSY = answer_bytes(TooManyConnections("no more connections are served at present", retry_after_s=1))


class Gate:
    """Makes the protocol for each connection that comes: to serve it, or to refuse it when there are too many."""

    def __init__(
        self,
        server: web.Server,
        limits: ConnectionLimits,
        door: Door | None = None,
        lane: Lane | None = None,
        *,
        tls: bool = False,
    ) -> None:
        self.server, self.limits, self.loop = server, limits, asyncio.get_running_loop()
        self.door, self.lane = door, lane
        self._refused: deque[Connection] = deque()
        self.open: set[Connection] = set()
        self.refusing = 0
        self._tls = tls
        self._told_s = -QUIET_S

    def __call__(self) -> asyncio.Protocol:
        """Called when a connection is accepted, and before TLS."""
        if len(self.open) >= self.limits.connections:
            self._tell()
            return Refusal(self)
        connection = Connection(self)
        self.open.add(connection)
        if self._tls:  # nobody says so when a handshake fails, which it has by then
            self.loop.call_later(self.limits.header_timeout_s + 1, self._forget_failed, connection)
        return connection

    def tell_later(self, connection: Connection) -> None:
        """Have a connection tell that its request is refused, after what is to be done for those that are served."""
        if not self._refused:
            self.loop.call_soon(self._tell_refused)
        self._refused.append(connection)

    def _tell_refused(self) -> None:
        """A few in each turn of the loop: all at once, they would hold up each step of those that are served."""
        until_s = time.perf_counter() + TELLING_S
        while self._refused and time.perf_counter() < until_s:
            self._refused.popleft().tell_refused()
        if self._refused:
            self.loop.call_soon(self._tell_refused)

    def forget(self, connection: Connection) -> None:
        """It is gone."""
        self.open.discard(connection)

    def _forget_failed(self, connection: Connection) -> None:
        if not connection.met:
            self.forget(connection)

    def _tell(self) -> None:
        if self.loop.time() >= self._told_s + QUIET_S:
            self._told_s = self.loop.time()
            fields = {"open": len(self.open), "limit": self.limits.connections}
            log.warning("connections refused", extra={"fields": fields})


# ----------------------------------------------------------------------------------------------------------- listening


@contextlib.asynccontextmanager
async def listening(
    runner: web.AppRunner, host: str, port: int, limits: ConnectionLimits, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Accept connections for a runner that is set up, until the block ends; gives the URL. Raises OSError."""
    assert runner.server is not None, "set up"
    gate = Gate(runner.server, limits, runner.app.get(DOOR), runner.app.get(LANE), tls=tls is not None)
    settings: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": limits.header_timeout_s}
    server = await gate.loop.create_server(gate, host, port, backlog=BACKLOG, **settings)
    try:
        yield str(URL.build(scheme="http" if tls is None else "https", host=host, port=_port(server)))
    finally:
        server.close()


def _port(server: asyncio.Server) -> int:
    port = server.sockets[0].getsockname()[1]
    assert isinstance(port, int), "of an internet address"
    return port


def room_for(connections: int) -> int:
    """How many of so many connections file descriptors are left for; raises the limit of this process if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - SPARE_DESCRIPTORS))
