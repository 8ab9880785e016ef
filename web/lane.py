"""The lane: POST /predict in its plainest form, from the socket to the queue and back without aiohttp.

Taking a request apart and putting an answer together costs aiohttp more than all else that the event loop does for a
query: most of a core at saturation, which the batches need. What the door (door.py) recognises as one whole request of
a known head, with a small body that needs no inflating, goes to the queue at once; its answer is written when it is
there. It says and counts what the handler would. Everything else is left to aiohttp: other routes, parameters that are
wrong, bodies that are large or compressed, pages of other origins, servers that want keys.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from numpy.typing import NDArray

from web.door import PATH, Door, refusal_bytes
from web.errors import NotReady, ServeError
from web.inputs import INLINE_BODY_BYTES, Parameters
from web.replies import Reply


class PendingReply(Protocol):
    """A query whose answer is announced."""

    def collect(self) -> Reply | ServeError: ...  # noqa: D102
    def cancel(self) -> None: ...  # noqa: D102


class Host(Protocol):
    """The part of SuperServe that queries are given to."""

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    def turn_away(self, arrival_s: float, parameters: Parameters) -> None: ...  # noqa: D102
    def decode_inline(self, body: bytes, content_type: str) -> NDArray[Any] | None: ...  # noqa: D102
    def begin(  # noqa: D102
        self, input: NDArray[Any], arrival_s: float, parameters: Parameters, announce: Callable[[Any], object]
    ) -> PendingReply: ...


class Traveller(Protocol):
    """A connection whose request is on the lane."""

    def arrive(self, answer: bytes) -> None:
        """The answer is there."""


class Lane:
    """Takes requests to the queue and writes their answers, all that are announced in one turn of the event loop."""

    def __init__(
        self, host: Host, door: Door, count: Callable[[str, int], object], max_body_bytes: int, drain_s: float
    ) -> None:
        self._host, self._door, self._count = host, door, count
        self._most = min(INLINE_BODY_BYTES, max_body_bytes)
        self._travellers: dict[Any, Traveller] = {}  # by what is pending
        self._announced: deque[PendingReply] = deque()
        self._drain_s = drain_s
        self._empty = asyncio.Event()  # of interest while it drains only

    def take(self, head: bytes, body: bytes, traveller: Traveller) -> PendingReply | bytes | None:
        """The query that this request became, or the whole answer to one that is refused; None: it is for aiohttp.

        The head is one that ``Door.answer`` has just let in, or has not looked at.
        """
        if len(body) > self._most:
            return None
        try:
            asked = self._door.asked(head)
            if asked is None or asked.content_type is None:
                return None
            visitor = self._door.visitor(traveller)
            if not visitor.accepted:
                self._host.turn_away(visitor.arrival_s, asked.parameters)
                visitor.accepted = True
            input = self._host.decode_inline(body, asked.content_type)
            if input is None:
                return None
            pending = self._host.begin(input, visitor.arrival_s, asked.parameters, self._announce)
        except NotReady:
            return None
        except ServeError as error:
            self._door.leave(traveller)
            self._count(PATH, error.status)
            return refusal_bytes(error)
        except Exception:  # noqa: BLE001 nobody foresaw it: the handler meets with it again, which is told and logged
            return None
        self._door.leave(traveller)
        self._travellers[pending] = traveller
        return pending

    def give_up(self, pending: PendingReply) -> None:
        """The client went away."""
        if self._travellers.pop(pending, None) is not None:
            pending.cancel()
            self._note_empty()

    async def drain(self, _: web.Application) -> None:
        """Take nothing more, and answer what is on the lane: aiohttp knows nothing of it, and closes what is open."""
        self._most = -1
        self._empty.clear()
        self._note_empty()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._empty.wait()

    def _note_empty(self) -> None:
        if not self._travellers:
            self._empty.set()

    def _announce(self, pending: PendingReply) -> None:
        if not self._announced:
            asyncio.get_running_loop().call_soon(self._collect)
        self._announced.append(pending)

    def _collect(self) -> None:
        date = rfc822_formatted_time()
        try:
            while self._announced:
                self._answer(self._announced.popleft(), date)
        finally:  # whatever goes wrong with one answer, the others are given
            if self._announced:
                asyncio.get_running_loop().call_soon(self._collect)
            self._note_empty()

    def _answer(self, pending: PendingReply, date: str) -> None:
        traveller = self._travellers.pop(pending, None)
        if traveller is not None:
            status, answer = _told(pending.collect(), date)
            self._count(PATH, status)
            traveller.arrive(answer)


def _told(outcome: Reply | ServeError, date: str) -> tuple[int, bytes]:
    """The status and the whole answer."""
    if isinstance(outcome, ServeError):
        return outcome.status, refusal_bytes(outcome)
    return 200, answer_bytes(outcome, date)


def answer_bytes(reply: Reply, date: str) -> bytes:
    """The whole answer to a query that was served; leaves the connection open."""
    body = reply.json()
    size = len(body) if body.isascii() else len(body.encode())
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\nDate: {date}\r\n\r\n{body}"
    ).encode()


LANE = web.AppKey("lane", Lane)
