"""What is over is freed at once: collections of garbage are rare, and what waits for one is memory that grows."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import uvloop
from aiohttp import web
from serving import SIDE, config_of, image_array, image_file, turns_until

import startup
from superserve import SERVE, make_app
from web.frames import BINARY, NORMAL, close_frame, frame

PIXELS = image_array(0).tobytes()
# Not plain, so that aiohttp and the handler answer it, and not the lane.
ROUNDABOUT = "Content-Type: image/png; q=1"
CLIENTS = 8

Client = Callable[[socket.socket], object]


def post(path: str = "/predict", *headers: str, body: bytes = PIXELS, length: int | None = None) -> bytes:
    size = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: here", size, *headers, "", ""]).encode() + body


def until_answered(sent: bytes) -> Client:
    """Reads what comes first, which is a head and more, and leaves."""

    def ask(client: socket.socket) -> None:
        client.sendall(sent)
        assert client.recv(65536).startswith(b"HTTP/1.")

    return ask


def unanswered(sent: bytes) -> Client:
    return lambda client: client.sendall(sent)


def masked(frames: bytes) -> bytes:
    """A frame as a client sends it, under a mask of zeros."""
    size = {126: 4, 127: 10}.get(frames[1], 2)
    return frames[:1] + bytes((frames[1] | 0x80,)) + frames[2:size] + bytes(4) + frames[size:]


def message(body: bytes, **header: object) -> bytes:
    text = json.dumps({"id": 1, **header}).encode()
    return masked(frame(BINARY, struct.pack("<I", len(text)) + text + body))


def over_stream(*sent: bytes, goodbye: bool = True) -> Client:
    """Opens a WebSocket, sends, and waits for the server's goodbye or just leaves."""

    def ask(client: socket.socket) -> None:
        head = ["GET /stream HTTP/1.1", "Host: here", "Upgrade: websocket", "Connection: Upgrade"]
        head += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
        client.sendall("\r\n".join(head).encode())
        assert b" 101 " in client.recv(65536)
        client.sendall(b"".join(sent))
        if goodbye:
            client.sendall(masked(close_frame(NORMAL)))
            while client.recv(65536):
                pass

    return ask


LARGE = image_file("PNG", (1000, 800))
V2 = {"name": "input", "datatype": "UINT8", "shape": [4, SIDE, SIDE, 3], "data": list(PIXELS) * 4}
RAW = {"dtype": "uint8", "shape": [SIDE, SIDE, 3]}
CASES = {
    "the lane": until_answered(post()),
    "the lane, refused": until_answered(post(body=b"123")),
    "the lane, hopeless": until_answered(post("/predict?slo_ms=0.001")),
    "the lane, gone": unanswered(post()),
    "the handler": until_answered(post("/predict", ROUNDABOUT, body=image_file())),
    "the handler, refused": until_answered(post("/predict?speed=1")),
    "the handler, late": until_answered(post("/predict?slo_ms=2", ROUNDABOUT, body=image_file())),
    "the handler, gone": unanswered(post("/predict", ROUNDABOUT, body=image_file())),
    "several, gone": unanswered(post("/predict", ROUNDABOUT, body=image_file()) * 3),
    "half a body": unanswered(post(length=1000)),
    "a body too large": until_answered(post(length=10**9)),
    "a large image": until_answered(post("/predict", "Content-Type: image/png", body=LARGE)),
    "a large image, damaged": until_answered(post("/predict", "Content-Type: image/png", body=LARGE[:-3000])),
    "no gzip": until_answered(post("/predict", "Content-Encoding: gzip")),
    "no HTTP": until_answered(b"NONSENSE\r\n\r\n"),
    "rows": until_answered(post("/v2/models/tiny/infer", body=json.dumps({"inputs": [V2]}).encode())),
    "rows, hopeless": until_answered(
        post("/v2/models/tiny/infer?slo_ms=0.001", body=json.dumps({"inputs": [V2]}).encode())
    ),
    "rows, late": until_answered(post("/v2/models/tiny/infer?slo_ms=2", body=json.dumps({"inputs": [V2]}).encode())),
    "no route": until_answered(post("/nowhere")),
    "a stream": over_stream(message(PIXELS, **RAW) * 3),
    "a stream, gone": over_stream(message(PIXELS, **RAW) * 3, goodbye=False),
    "a stream, damaged": over_stream(message(b"no image"), message(LARGE[:-3000])),
    "a stream, broken": over_stream(b"\xff" * 8, goodbye=False),
}  # fmt: skip


@pytest.fixture
def garbage() -> Iterator[list[object]]:
    """What a collection finds, instead of being freed; nothing is collected before it is asked for."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield gc.garbage
    gc.enable()
    gc.unfreeze()


def taken(garbage: list[object]) -> Counter[str]:
    """What there is to be collected, by type; then it is."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    kinds = Counter(type(each).__qualname__ for each in garbage)
    garbage.clear()
    gc.collect()
    return kinds


def ask(port: int, client: Client) -> None:
    """Several clients, one after the other."""
    for _ in range(CLIENTS):
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            client(connection)


@pytest.fixture(scope="module")
def served(profile: Path) -> Iterator[tuple[asyncio.Runner, web.AppRunner, int]]:
    """A loop of its own kind, as the command has, on which a server listens."""
    config = config_of(profile, port=0, max_body_bytes=4 * 2**20)
    app = make_app(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        listening = AsyncExitStack()

        async def open_all() -> tuple[web.AppRunner, int]:
            server = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
            await server.setup()
            listening.push_async_callback(server.cleanup)
            await app[SERVE].start_soon()
            url = await listening.enter_async_context(startup.opened(config, server))
            return server, int(url.rpartition(":")[2])

        yield runner, *runner.run(open_all())
        runner.run(listening.aclose())


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_client_does_nothing_of_it_waits_to_be_collected(
    name: str, served: tuple[asyncio.Runner, web.AppRunner, int], garbage: list[object]
) -> None:
    runner, server, port = served

    async def visit() -> Counter[str]:
        await asyncio.to_thread(ask, port, CASES[name])
        await turns_until(lambda: server.server is not None and not server.server.connections)
        await turns_until(server.app[SERVE].is_idle)
        for _ in range(10):  # tasks that were cancelled end
            await asyncio.sleep(0)
        return taken(garbage)

    runner.run(visit())  # loads modules and fills tables
    left = runner.run(visit())
    assert not left.keys() & {"Connection", "traceback"}, left
