"""Reading the body of a request: in time, within the limit, and in an encoding that is known."""

from __future__ import annotations

import asyncio

from aiohttp import web

from web.errors import BadRequest, DeadlineExceeded, UnsupportedEncoding

# aiohttp inflates these, and counts what comes out against the limit.
ENCODINGS = ("", "identity", "gzip", "deflate")


async def read_body(request: web.Request, within_s: float, max_bytes: int) -> bytes:
    """Inflated; raises DeadlineExceeded, BadRequest, UnsupportedEncoding and aiohttp's 413 where too large."""
    encoding = request.headers.get("Content-Encoding", "")
    if encoding.lower() not in ENCODINGS:
        raise UnsupportedEncoding(f"content encoding '{encoding:.40}' is not read here; known: gzip, deflate")
    if request.client_max_size != max_bytes:  # mounted in an application that has its own limit
        request = request.clone(client_max_size=max_bytes)
    try:
        async with asyncio.timeout(within_s):
            return await request.read()
    except TimeoutError:
        message = "the deadline passed while the body was on its way"
        raise DeadlineExceeded(message, slo_ms=round(within_s * 1e3, 3)) from None
    except web.RequestPayloadError as error:
        raise BadRequest(f"the body cannot be read: {' '.join(str(error).split())}") from None
