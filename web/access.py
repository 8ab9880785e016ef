"""Who may ask what: API keys, pages of other origins, certificates.

With keys, every route wants one but those of ``OPEN``: health checks, and the files of the live page, which hold
nothing of this server. Its data want a key. A key comes as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``, also
with the request that opens ``/stream``; browsers cannot send those there, and no other way is offered, as a key that
is written into a page is none.

Without ``allow_origin``, pages of other origins can neither read answers (no header allows it) nor open ``/stream``:
an ``Origin`` must name the ``Host``.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from web.errors import ForbiddenOrigin, Unauthorized

OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/static/{name}")
METRICS = "/metrics"
SHORTEST_KEY = 16
LARGEST_FILE = 2**20
# What a browser is told when it asks in advance; Content-Type and the parameters' headers among it.
_ALLOWED_METHODS = "GET, HEAD, POST"
_ALLOWED_HEADERS = (
    "Authorization, Content-Encoding, Content-Type, Inference-Header-Content-Length, X-API-Key, X-Members, "
    "X-Min-Accuracy, X-Priority, X-SLO-Ms, X-Top-K"
)
_PREFLIGHT_S = 600

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AccessError(ValueError):
    """A file of keys or certificates that cannot be used; says which, and what is wrong with it."""


# --------------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are accepted, as digests: they cannot be shown, and comparing takes the same time for any key."""

    digests: tuple[bytes, ...] = field(repr=False)

    def accept(self, key: str) -> bool:
        """Whether this is one of them."""
        given, found = _digest(key), False
        for digest in self.digests:
            found |= hmac.compare_digest(digest, given)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_keys(path: Path) -> Keys:
    """The keys of a file, one a line; empty lines and those that begin with # are none. Raises AccessError."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise AccessError(f"{path}: more than {LARGEST_FILE} bytes are no file of API keys")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AccessError(f"{path}: the API keys cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise AccessError(f"{path}: no text of API keys in UTF-8") from None
    keys = {number: line.strip() for number, line in enumerate(lines, start=1)}
    keys = {number: key for number, key in keys.items() if key and not key.startswith("#")}
    for number, key in keys.items():  # an error must not show the key
        if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable() and " " not in key):
            raise AccessError(
                f"{path}: line {number} is no API key: it has at least {SHORTEST_KEY} ASCII characters and no space"
            )
    if not keys:
        raise AccessError(f"{path}: no API key in it; put one into each line")
    return Keys(tuple(_digest(key) for key in keys.values()))


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key that a request came with."""
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return headers.get("X-API-Key")


def readable_by_others(path: Path) -> bool:
    """Whether other users of this machine can read a file that is to be kept secret."""
    return bool(path.stat().st_mode & stat.S_IROTH)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# ---------------------------------------------------------------------------------------------------------------- TLS


def load_tls(cert: Path, key: Path) -> ssl.SSLContext:
    """The context to serve with, TLS 1.2 or newer; raises AccessError for files that cannot be read or do not fit."""
    for path, what, mark in ((cert, "certificate", "CERTIFICATE-----"), (key, "private key", "PRIVATE KEY-----")):
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise AccessError(f"{path}: the {what} cannot be read: {error.strerror}") from error
        if mark not in text:
            raise AccessError(f"{path}: no {what} in PEM form")
        if "ENCRYPTED" in text:
            raise AccessError(f"{path}: the {what} is encrypted; a server that starts by itself needs it in the clear")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise AccessError(f"{key}: not the private key of the certificate in {cert}") from error
        raise AccessError(f"{cert} and {key} cannot be used: {error.reason or error}") from error
    return context


# ------------------------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What requests need: a key if there are any, and an origin that is allowed where a page sends them."""

    keys: Keys | None = None
    open_metrics: bool = False
    origins: frozenset[str] = frozenset()

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may use the server."""
        return "*" in self.origins or origin.lower() in self.origins

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise ForbiddenOrigin for a page that is neither of this server nor of an allowed origin."""
        origin = headers.get("Origin")
        if origin is None or self.allows_origin(origin):
            return
        if urlsplit(origin).netloc.lower() != headers.get("Host", "").lower():
            raise ForbiddenOrigin(f"pages of '{origin:.80}' may not open a WebSocket here; see --allow-origin")

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raise Unauthorized for a request without a key that is known."""
        if self.keys is None:
            return
        key = key_of(headers)
        if key is None:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        if not self.keys.accept(key):
            raise Unauthorized("the API key is not known")


def add_access(app: web.Application, access: Access) -> None:
    """Check the requests of an application that has all its routes; its errors are told by ``json_errors``."""
    paths = (*OPEN, METRICS) if access.open_metrics else OPEN
    # Resources and not paths: where the application is mounted in another, these have a prefix.
    free = {resource for resource in app.router.resources() if resource.canonical in paths}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS" and _is_preflight(request) and access.allows_origin(request.headers["Origin"]):
            return web.Response(status=204, headers=_PREFLIGHT)
        if access.keys is not None and request.match_info.route.resource not in free:
            access.check_key(request.headers)
        if "Upgrade" in request.headers:
            access.check_origin(request.headers)
        return await handler(request)

    async def allow(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Vary"] = ", ".join(filter(None, (response.headers.get("Vary"), "Origin")))
        origin = request.headers.get("Origin")
        if origin is not None and access.allows_origin(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Inference-Header-Content-Length, Retry-After"

    app.middlewares.append(check)
    if access.origins:
        app.on_response_prepare.append(allow)


_PREFLIGHT = {
    "Access-Control-Allow-Methods": _ALLOWED_METHODS,
    "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
    "Access-Control-Max-Age": str(_PREFLIGHT_S),
}


def _is_preflight(request: web.Request) -> bool:
    return "Origin" in request.headers and "Access-Control-Request-Method" in request.headers
