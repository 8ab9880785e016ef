"""Reading the body of a request: in time, within the limits, and in an encoding that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from web.errors import (
    BadRequest,
    DeadlineExceeded,
    SlowRequest,
    TooLarge,
    TooManyUploads,
    UnsupportedEncoding,
    forget_past,
)

# aiohttp inflates these, and what comes out is counted.
ENCODINGS = ("", "identity", "gzip", "deflate")


class Uploads:
    """What the bodies of all requests under way take; each body counts until its request is answered.

    ``timeout_s`` is how long each may take to arrive.
    """

    def __init__(self, most_bytes: int, timeout_s: float) -> None:
        self.most_bytes, self.timeout_s = most_bytes, timeout_s
        self.held_bytes = 0
        self._held: dict[int, int] = {}  # by the identity of a request, which lives until it is released

    def hold(self, request: web.Request, count: int) -> None:
        """Count so many more bytes; raises TooManyUploads where they are too many."""
        if self.held_bytes + count > self.most_bytes:
            raise TooManyUploads("too many large bodies are under way; try again", retry_after_s=1)
        self.held_bytes += count
        self._held[id(request)] = self._held.get(id(request), 0) + count

    def release(self, request: web.Request) -> None:
        """The request is answered."""
        self.held_bytes -= self._held.pop(id(request), 0)


UPLOADS = web.AppKey("uploads", Uploads)


def add_uploads(app: web.Application, uploads: Uploads) -> None:
    """Bound what the requests of an application may upload."""

    @web.middleware
    async def release(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            uploads.release(request)

    app[UPLOADS] = uploads
    app.middlewares.append(release)


async def read_body(request: web.Request, within_s: float, max_bytes: int) -> bytes:
    """Inflated; raises DeadlineExceeded, SlowRequest, BadRequest, UnsupportedEncoding, TooLarge or TooManyUploads."""
    encoding = request.headers.get("Content-Encoding", "")
    if encoding.lower() not in ENCODINGS:
        raise UnsupportedEncoding(f"content encoding '{encoding:.40}' is not read here; known: gzip, deflate")
    uploads = request.app[UPLOADS]
    try:
        if request.content.is_eof():  # it came with the head, as most do: a timer would cost more than all else here
            return _take(request, uploads, max_bytes)
        async with asyncio.timeout(min(within_s, uploads.timeout_s)):
            return await _read(request, uploads, max_bytes)
    except TimeoutError:
        if within_s <= uploads.timeout_s:
            message = "the deadline passed while the body was on its way"
            raise DeadlineExceeded(message, slo_ms=round(within_s * 1e3, 3)) from None
        raise SlowRequest(f"the body did not arrive within {uploads.timeout_s:g} s") from None
    except web.RequestPayloadError as error:
        forget_past(error)  # the body keeps it
        raise BadRequest(f"the body cannot be read: {' '.join(str(error).split())}") from None


def _take(request: web.Request, uploads: Uploads, max_bytes: int) -> bytes:
    """All of a body that is there."""
    body = request.content.read_nowait()
    if len(body) > max_bytes:
        raise TooLarge(f"the body is larger than this server accepts: at most {max_bytes} bytes")
    uploads.hold(request, len(body))
    return body


async def _read(request: web.Request, uploads: Uploads, max_bytes: int) -> bytes:
    if (request.content_length or 0) > max_bytes:
        raise TooLarge(f"the body is larger than this server accepts: at most {max_bytes} bytes")
    body = bytearray()
    while chunk := await request.content.readany():
        if len(body) + len(chunk) > max_bytes:
            raise TooLarge(f"the body is larger than this server accepts: at most {max_bytes} bytes")
        uploads.hold(request, len(chunk))
        body += chunk
    return bytes(body)
