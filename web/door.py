"""The door: while most queries have to be refused, POST /predict is refused before aiohttp has taken the request apart.

In a flood, a server that spends as much on those it refuses as on those it serves has no time left for the latter. A
refusal here takes a small part of what a handler takes. It says and counts what the handler would say and count.

Only requests in the plainest form are looked at: one whole request in one piece, in a form about which no two parsers
can disagree. Everything else goes on to aiohttp, whose handlers refuse, too, before they read or decode a body.

Those who were let in and are not in the queue yet are ahead of whoever comes next, and it takes time to get them there:
without that, all that arrives in one turn of the event loop would be let in because the queue was short before it. How
much time is known for floods only. At any other time nobody is refused here: of 150 queries that come at once to an
idle server, which can answer most of them, more than half would be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol

from aiohttp import web

from web.errors import NotReady, ServeError
from web.inputs import Limits, Parameters, parse_parameters

PATH = "/predict"
STARTS = (b"POST /predict ", b"POST /predict?")
# The share of its time that the event loop has in a flood for those who were let in, beside all else. Measured: with
# 0.25 instead, too many are let in to be answered in time.
LOOP_SHARE = 0.1
LONGEST_S = 0.005  # what takes longer from the door to the queue did so aside: a large image, or a slow body
END = b"\r\n\r\n"
# Clients send few different heads; longer ones, and more of them, are read each time.
REMEMBERED, REMEMBERED_BYTES = 256, 1024
# What aiohttp refuses: more lines, and headers that may stand there once.
MOST_LINES = 128
ONCE = (
    b"\nuser-agent:", b"\ncontent-type:", b"\ncontent-encoding:", b"\ncontent-location:", b"\ncontent-range:",
    b"\netag:", b"\nmax-forwards:", b"\nserver:",
)  # fmt: skip
# One whole request, but for its body; neither folded headers nor any other liberty that HTTP takes.
_HEAD = re.compile(rb"(?:GET|HEAD|OPTIONS|POST) /[!-~]* HTTP/1\.1\r\n(?:[!#-'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)+\r\n")
_FRAMING = re.compile(rb"\n(?:transfer-encoding|expect|upgrade|proxy-connection|connection:(?! *keep-alive *\r))")
_LENGTH = re.compile(rb"\ncontent-length: *([0-9]{1,12}) *\r")
_QUERY = re.compile(r"[a-z_]+=[0-9.]+(?:&[a-z_]+=[0-9.]+)*")
_HEADER = re.compile(rb"\n(x-[a-z-]+|origin): *([^\r]*?) *\r")
_CONTENT_TYPE = re.compile(rb"\ncontent-type: *([a-z0-9]+/[a-z0-9.+-]+) *\r")
_NAMES = {
    b"x-slo-ms": "X-SLO-Ms", b"x-min-accuracy": "X-Min-Accuracy", b"x-priority": "X-Priority", b"x-top-k": "X-Top-K",
    b"x-members": "X-Members",
    b"x-envoy-expected-rq-timeout-ms": "X-Envoy-Expected-Rq-Timeout-Ms",
}  # fmt: skip


class Host(Protocol):
    """The part of SuperServe that is asked here."""

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    @property
    def flooded(self) -> bool: ...  # noqa: D102
    def limits(self) -> Limits: ...  # noqa: D102
    def turn_away(  # noqa: D102
        self, arrival_s: float, parameters: Parameters, coming: int = 0, delay_s: float = 0.0
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What a head asks for; the type of its body is None where the body is not to be taken as it is."""

    parameters: Parameters
    content_type: str | None


@dataclass(slots=True)
class Visitor:
    """A query at the door, since when, and whether it was found that it is not to be refused."""

    arrival_s: float
    accepted: bool = False


class Door:
    """Refuses what would be refused in any case. ``count`` is told of each answer's route and status.

    ``keyed`` servers want a key, which is for the handlers to check: nothing is refused here.
    """

    def __init__(self, host: Host, count: Callable[[str, int], object], *, keyed: bool = False) -> None:
        self._host, self._count, self.keyed = host, count, keyed
        self._known: dict[bytes, Asked | None] = {}
        self._told: tuple[ServeError | None, bytes] = (None, b"")  # the latest error, and the answer that tells of it
        self._inside: dict[object, Visitor] = {}  # by connection, those let in who are not in the queue yet
        self._left_s = self._each_s = 0.0  # when the last of them left, and how long each takes

    def answer(self, data: bytes, connection: object) -> bytes | None:
        """The whole answer to a request that is refused; None for all others. ``data`` is a whole one (``head_of``)."""
        if not data.startswith(STARTS):
            return None
        self._inside.pop(connection, None)
        visitor = Visitor(self._host.clock())
        if self._host.flooded:
            error = self._refusal(data, visitor)
            if error is not None:
                self._count(PATH, error.status)
                if self._told[0] is not error:  # queries alike are refused with the same error
                    self._told = (error, refusal_bytes(error))
                return self._told[1]
        self._inside[connection] = visitor
        return None

    def visitor(self, connection: object) -> Visitor:
        """Who this connection's handler begins with; somebody who comes now, if nobody looked at the request here."""
        return self._inside.get(connection) or Visitor(self._host.clock())

    def leave(self, connection: object) -> None:
        """The query of this connection is in the queue, or is none any more."""
        visitor = self._inside.pop(connection, None)
        if visitor is not None:
            now_s = self._host.clock()
            taken_s = min(LONGEST_S, now_s - max(visitor.arrival_s, self._left_s))
            self._left_s = now_s
            self._each_s += (taken_s - self._each_s) * 0.05

    def _refusal(self, data: bytes, visitor: Visitor) -> ServeError | None:
        coming = len(self._inside)
        try:
            asked = self.asked(data[: data.index(END) + 4])
            if asked is not None:
                delay_s = (coming + 1) * self._each_s / LOOP_SHARE  # it has to get there itself, too
                self._host.turn_away(visitor.arrival_s, asked.parameters, coming, delay_s)
                visitor.accepted = True
        except NotReady:
            return None
        except ServeError as error:
            return error
        return None

    def asked(self, head: bytes) -> Asked | None:
        """What the request asks for; None where that is for a handler to judge. Raises NotReady."""
        if head in self._known:
            return self._known[head]
        found = _asked(head, self._host.limits())
        if len(head) <= REMEMBERED_BYTES:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[head] = found
        return found


DOOR = web.AppKey("door", Door)


def head_of(data: bytes, most_bytes: int = 8192) -> bytes | None:
    """The head, if this is one request from its first byte to its last, not too long, and beyond doubt."""
    head = data[: data.find(END) + 4]
    if len(head) > most_bytes:
        return None
    length = _known_length(head) if len(head) <= REMEMBERED_BYTES else _length(head)
    return head if length is not None and len(head) + length == len(data) else None


def _length(head: bytes) -> int | None:
    """The length of the body after this head; None where there may be doubt."""
    if _HEAD.fullmatch(head) is None:
        return None
    lines = head.lower()
    lengths = _LENGTH.findall(lines)
    if _FRAMING.search(lines) or lines.count(b"\ncontent-length") != len(lengths) or len(lengths) > 1:
        return None
    if lines.count(b"\nhost:") != 1 or lines.count(b"\n") > MOST_LINES or any(lines.count(each) > 1 for each in ONCE):
        return None
    return int(lengths[0]) if lengths else 0


_known_length = lru_cache(REMEMBERED)(_length)


def _asked(head: bytes, limits: Limits) -> Asked | None:
    path, _, query = head[5 : head.index(b" ", 5)].decode("ascii").partition("?")
    if path != PATH or (query and _QUERY.fullmatch(query) is None):
        return None
    given = [part.split("=") for part in query.split("&")] if query else []
    lines = head.lower()
    headers = _headers(head, lines)
    if headers is None or len({name for name, _ in given}) != len(given):
        return None
    try:
        return Asked(parse_parameters(dict(given), headers, limits), _content_type(lines))
    except ServeError:
        return None


def _content_type(lines: bytes) -> str | None:
    """As aiohttp reads it, where there is nothing to be read into it, and the body is not encoded."""
    if b"\ncontent-encoding:" in lines:
        return None
    if b"\ncontent-type:" not in lines:
        return "application/octet-stream"
    found = _CONTENT_TYPE.findall(lines)
    return found[0].decode("ascii") if len(found) == lines.count(b"\ncontent-type:") == 1 else None


def _headers(head: bytes, lines: bytes) -> Mapping[str, str] | None:
    """Headers that are parameters; None where there is one that asks for more than an answer.

    They are found in ``lines``, the head in small letters, and read from the head itself.
    """
    found: dict[str, str] = {}
    for match in _HEADER.finditer(lines):
        if match[1] == b"origin":
            return None
        if match[1] in _NAMES:
            if _NAMES[match[1]] in found:
                return None
            found[_NAMES[match[1]]] = head[slice(*match.span(2))].decode("ascii")
    return found


def refusal_bytes(error: ServeError) -> bytes:
    """An answer that tells of an error and leaves the connection open."""
    body = json.dumps({"error": str(error), "reason": error.reason, **error.details}).encode()
    retry = "" if error.retry_after_s is None else f"Retry-After: {error.retry_after_s}\r\n"
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n{retry}"
        f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
