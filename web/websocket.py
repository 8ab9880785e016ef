"""One WebSocket: the handshake, and what keeps a connection in order once it is one. No messages are read here.

aiohttp hands over whatever the client sends from the handshake on (``set_parser``), as it does to its own reader; so
this serves on any connection that aiohttp does, TLS and mounted applications included.

* A silent client is asked whether it is still there, and given up half as long after that.
* One that does not take what it is sent is cut off.
* Reading can be held up: what was received stays where it is, and nothing more is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from web.errors import forget_past
from web.frames import CLOSE, NORMAL, PING, PONG, Frames, close_frame, frame

HEARTBEAT_S = 30.0
# How long a peer may take to return a close frame.
CLOSE_S = 2.0
# The time in which a client is to take what it is sent is waited for in so many parts.
LOOKS = 4
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of RFC 6455, section 1.3


def can_shake_hands(request: web.Request) -> bool:
    """Whether this request asks for a WebSocket of the version that is spoken here."""
    return bool(web.WebSocketResponse(compress=False).can_prepare(request))


def handshake(request: web.Request) -> web.StreamResponse:
    """The answer that makes a WebSocket of the connection, once it is prepared."""
    key = request.headers["Sec-WebSocket-Key"].encode()
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
    headers = {"Upgrade": "websocket", "Connection": "upgrade", "Sec-WebSocket-Accept": accept}
    response = web.StreamResponse(status=101, headers=headers)
    response.force_close()
    return response


class User(Protocol):
    """Who reads a WebSocket's messages."""

    def receive(self, messages: Iterator[tuple[int, bytearray]]) -> None:
        """Take all that is there, control frames to ``Socket.control``, or call ``Socket.hold`` and stop."""

    def taken(self) -> None:
        """The client took what it was sent, so that ``Socket.go_on`` may be called."""


class Socket:
    """A WebSocket on a connection of aiohttp, which calls ``feed_data`` and ``feed_eof``.

    ``over`` is done when the client has said goodbye or gone away; a failure, or a FrameError, is its exception.
    """

    def __init__(
        self, request: web.Request, writer: AbstractStreamWriter, user: User, *, most_bytes: int, send_s: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol, self._writer, self._send_s = request.protocol, writer, send_s
        self._user: User = weakref.proxy(user)  # which holds this
        self._frames = Frames(most_bytes)
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._answered = asyncio.Event()  # the client's goodbye is there, or it is gone
        self._said_goodbye = False
        self._held = False
        self._full = asyncio.Event()
        self._heard_s = self._loop.time()
        self._sent = 0

    # ------------------------------------------------------------------------------------------------------- reading

    def open(self) -> None:
        """Read from now on; what came with the handshake at once."""
        self._protocol.keep_alive(False)
        self._protocol.set_parser(self)  # type: ignore[arg-type] # needs no more of a reader than is here

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what was received (aiohttp)."""
        self._heard_s = self._loop.time()
        if not self.over.done():
            self._frames.feed(data)
            if not self._held:
                self._read()
        return False, b""

    def feed_eof(self) -> None:
        """The connection is gone (aiohttp)."""
        self._answered.set()
        self._end()

    def _read(self) -> None:
        try:
            self._user.receive(self._frames.messages())
        except Exception as error:  # noqa: BLE001 whoever runs this connection is told, and ends it
            self.fail(error)

    def hold(self) -> None:
        """Read no more before ``go_on``; ``taken`` is called once the client has taken what it was sent."""
        if not self._held:
            self._held = True
            self._protocol.pause_reading()
        self._full.set()

    def go_on(self) -> None:
        """Read on, if that is held up."""
        if self._held and not self.over.done():
            self._held = False
            self._read()
            if not self._held:
                self._protocol.resume_reading()

    def control(self, opcode: int, payload: bytearray) -> None:
        """Do what a control frame asks for."""
        if opcode == PING:
            self.write(frame(PONG, payload))
        elif opcode == CLOSE:
            self._say_goodbye(int.from_bytes(payload[:2], "big") if payload else NORMAL)
            self._answered.set()
            self._end()

    # ------------------------------------------------------------------------------------------------------- writing

    @property
    def full(self) -> bool:
        """Whether the client, if it is there, has not taken what it was sent."""
        return self._protocol.writing_paused and self._protocol.transport is not None

    def write(self, data: bytes) -> None:
        """Send whole frames; after the goodbye, and to a client that is gone, nothing is sent."""
        transport = self._protocol.transport
        if transport is not None and not transport.is_closing() and not self._said_goodbye:
            transport.write(data)
            self._sent += 1

    def tell_when_taken(self) -> None:
        """Have ``taken`` called once the client has taken what it was sent."""
        self._full.set()

    async def attend(self) -> None:
        """Wait for the client to take what it was sent, whenever somebody asked for that."""
        while True:
            await self._full.wait()
            self._full.clear()
            with suppress(ConnectionError):  # the client went away
                await self._writer.drain()
            self._user.taken()

    async def watch(self) -> None:
        """Cut the client off once it took nothing for a time, be it replies or what control frames are answered."""
        paused = seen = 0
        while paused < LOOKS:
            await asyncio.sleep(self._send_s / LOOKS)
            paused = paused + 1 if self.full and self._sent == seen else 0
            seen = self._sent
        self.abort()

    async def ask_whether_there(self) -> None:
        """Ask a client that has long been silent; it is given up if it remains so."""
        while True:
            asked_s = self._loop.time()
            silent_s = asked_s - self._heard_s
            if silent_s < HEARTBEAT_S:
                await asyncio.sleep(HEARTBEAT_S - silent_s)
                continue
            self.write(frame(PING, b""))
            await asyncio.sleep(HEARTBEAT_S / 2)
            if self._heard_s < asked_s and not self._held:  # nothing is heard while nothing is read
                self.abort()
                return

    # ------------------------------------------------------------------------------------------------------- the end

    async def close(self, code: int, reason: str) -> None:
        """Say goodbye, and wait a moment for the client's."""
        self._say_goodbye(code, reason)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._answered.wait()
        self._end()

    def fail(self, error: Exception) -> None:
        """It cannot go on like this."""
        if not self.over.done():
            self.over.set_exception(error)
            self.over.exception()  # is not to be complained of where nobody asks for it

    def let_go(self) -> None:
        """Nobody asks any more why it could not go on."""
        if self.over.done() and not self.over.cancelled() and (error := self.over.exception()) is not None:
            with suppress(type(error)):
                self.over.result()  # the future keeps the traceback until it is asked for this
            forget_past(error)

    def abort(self) -> None:
        """Cut the client off."""
        if self._protocol.transport is not None:
            self._protocol.transport.abort()

    def _say_goodbye(self, code: int, reason: str = "") -> None:
        self.write(close_frame(code, reason))
        self._said_goodbye = True

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
