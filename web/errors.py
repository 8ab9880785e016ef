"""Everything that can go wrong for a client, with its HTTP status, and its translation to JSON in one place.

ServeError                500
├── BadRequest            400  a body, tensor, image or parameter that is not what was asked for
├── Unauthorized          401  no API key, or one that is not known
├── ForbiddenOrigin       403  a page of another origin opens a WebSocket
├── SlowRequest           408  a head or a body that takes too long to arrive
├── TooLarge              413  a body or image above the limit
├── HeadTooLarge          431  a request line or header above the limit
├── UnknownModel          404  a model, or a version of it, that is not served here
├── UnsupportedMedia      415  a content type that /predict does not read
├── QueueFull             429  no place in the queue; Retry-After
├── TooManyInFlight       429  more unanswered queries on one /stream connection than it may have
├── NotSupported          501  a part of the Open Inference Protocol that this server does without
├── UnsupportedEncoding   501  a Content-Encoding that is not read; Accept-Encoding names those that are
├── NotReady              503  starting, draining, or the device is lost; Retry-After
├── TooManyConnections    503  no more connections are served; Retry-After
├── TooManyUploads        503  the bodies under way are too large altogether; Retry-After
├── DeadlineExceeded      504  the deadline passed, or cannot be met any more
└── BatchFailed           500  the engine failed at the batch of this query
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

from aiohttp import web

log = logging.getLogger("superserve")


class ServeError(Exception):
    """An error that is told to the client; ``details`` become further fields of the JSON answer."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, *, retry_after_s: int | None = None, **details: object) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.details = details


class BadRequest(ServeError):
    """A body, tensor, image or parameter that is not what was asked for."""

    status, reason = 400, "bad_request"


class TooLarge(ServeError):
    """A body or image above the limit."""

    status, reason = 413, "too_large"


class Unauthorized(ServeError):
    """No API key, or one that is not known."""

    status, reason = 401, "unauthorized"
    headers = {"WWW-Authenticate": 'Bearer realm="superserve"'}  # noqa: RUF012 read only, as the base class says


class ForbiddenOrigin(ServeError):
    """A page of another origin opens a WebSocket."""

    status, reason = 403, "forbidden_origin"


class SlowRequest(ServeError):
    """A head or a body that takes too long to arrive."""

    status, reason = 408, "slow_request"


class HeadTooLarge(ServeError):
    """A request line or header above the limit."""

    status, reason = 431, "head_too_large"


class UnknownModel(ServeError):
    """A model, or a version of it, that is not served here."""

    status, reason = 404, "unknown_model"


class UnsupportedMedia(ServeError):
    """A content type that /predict does not read."""

    status, reason = 415, "unsupported_media_type"


class QueueFull(ServeError):
    """No place in the queue."""

    status, reason = 429, "queue_full"


class TooManyInFlight(ServeError):
    """More unanswered queries on one connection than it may have."""

    status, reason = 429, "too_many_in_flight"


class NotSupported(ServeError):
    """A part of the Open Inference Protocol that this server does without."""

    status, reason = 501, "not_supported"


class UnsupportedEncoding(ServeError):
    """A Content-Encoding that is not read."""

    status, reason = 501, "unsupported_encoding"
    headers = {"Accept-Encoding": "gzip, deflate"}  # noqa: RUF012 read only, as the base class says


class NotReady(ServeError):
    """Starting, draining, or the device is lost."""

    status, reason = 503, "not_ready"


class TooManyConnections(ServeError):
    """No more connections are served at present."""

    status, reason = 503, "too_many_connections"


class TooManyUploads(ServeError):
    """The bodies of requests under way are too large altogether."""

    status, reason = 503, "too_many_uploads"


class DeadlineExceeded(ServeError):
    """The deadline passed, or cannot be met any more."""

    status, reason = 504, "deadline"


class BatchFailed(ServeError):
    """The engine failed at the batch of this query."""

    status, reason = 500, "engine_failed"


def forget_past(error: BaseException) -> None:
    """Cut an error off from where it came from, once nobody asks for that any more.

    Its frames refer to all that they worked on, and where any of that keeps the error, all of it, connection and body
    included, would wait for the collector of garbage, which seldom comes (``startup.settle_garbage``).
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None


def json_response(document: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    body = json.dumps(document).encode()
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def error_response(error: ServeError) -> web.Response:
    """The answer that tells a client of an error."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    document = {"error": str(error), "reason": error.reason, **error.details}
    return json_response(document, error.status, headers)


_ROUTING_REASONS = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def _routing_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """The JSON form of an error that aiohttp itself raised (unknown route, wrong method, body too large)."""
    known = sorted({resource.canonical for resource in request.app.router.resources()})
    messages = {
        404: f"no route {request.path}; known: {', '.join(known)}",
        405: f"{request.method} is not allowed for {request.path}; allowed: {error.headers.get('Allow', '')}",
        413: "the body is larger than this server accepts",
    }
    document = {
        "error": messages.get(error.status, error.reason),
        "reason": _ROUTING_REASONS.get(error.status, error.reason.lower().replace(" ", "_")),
    }
    kept = {name: value for name, value in error.headers.items() if name in ("Allow", "Location", "Retry-After")}
    return json_response(document, error.status, kept)


@web.middleware
async def json_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer every error as JSON, also one that nobody foresaw: it is logged, and the client is told no more."""
    try:
        return await handler(request)
    except ServeError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        forget_past(error)  # the route keeps it
        return _routing_error(request, error)
    except Exception:
        log.exception("a request failed", extra={"fields": {"method": request.method, "path": request.path}})
        return error_response(ServeError("the server failed at this request; its log says why"))
