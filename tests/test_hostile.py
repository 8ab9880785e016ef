"""What strangers can send: each attack over a real socket, then a good query beside it, and nothing in the log."""

import asyncio
import functools
import gzip
import io
import json
import logging
import os
import random
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from PIL import Image
from serving import config_of, image_array, listening_app, turns_until
from test_access import certificate  # noqa: F401 a fixture
from yarl import URL

from config import Config
from superserve import make_app
from web.bodies import UPLOADS
from web.errors import QueueFull
from web.listen import SPARE_DESCRIPTORS, answer_bytes, room_for

ROOT = Path(__file__).parents[1]
PIXELS = image_array(0).tobytes()
BODY_LIMIT = 300_000
# Long enough for a good query on a busy machine, and short enough to wait for.
QUICK_S = 0.3
PATIENT_S = 30.0


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs on the event loop that the command runs on."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        uvloop.run(test(*arguments, **fixtures))

    return run


@dataclass
class Running:
    """A server that listens."""

    port: int
    app: web.Application

    async def talk(self, *parts: bytes) -> bytes:
        """Send these one after another, and read all that comes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = b""
        try:
            async with asyncio.timeout(PATIENT_S):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                while piece := await reader.read(2**16):
                    answer += piece
        except ConnectionError:
            pass  # closed while there was more to send; what came before counts
        finally:
            writer.close()
        return answer

    async def check_good(self) -> None:
        """A good query on a connection of its own is answered."""
        assert statuses(await self.talk(post(CLOSE, body=PIXELS))) == [200]


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Running]:
    """A server whose event loop has nothing to complain of."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    app = make_app(config)
    async with listening_app(config, app) as url:
        port = URL(url).port
        assert port is not None
        yield Running(port, app)
        assert app[UPLOADS].held_bytes == 0
    assert not complaints


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No attack fills the log: nothing above what a start says."""
    caplog.set_level(logging.INFO)
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


def statuses(answer: bytes) -> list[int]:
    return [int(head.split()[1]) for head in answer.split(b"HTTP/1.")[1:]]


def document_of(answer: bytes) -> dict[str, Any]:
    """The JSON document of the last answer."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head.rpartition(b"HTTP/1.")[2]
    document: dict[str, Any] = json.loads(body)
    assert document["error"]
    return document


CLOSE = b"Connection: close"


def post(*headers: bytes, body: bytes = b"", length: int | None = None, path: bytes = b"/predict") -> bytes:
    """A request with a Content-Length, unless it is told to have none by a negative one."""
    count = len(body) if length is None else length
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", *headers]
    return b"\r\n".join(lines + ([b"Content-Length: %d" % count] if count >= 0 else [])) + b"\r\n\r\n" + body


def get(*headers: bytes, path: bytes = b"/healthz") -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: x", *headers]) + b"\r\n\r\n"


def chunked(body: bytes, *headers: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", *headers, body=body, length=-1)


def image_bomb() -> bytes:
    """A PNG of 100 megapixels in few bytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def squeezed(encoding: bytes, body: bytes) -> bytes:
    return post(b"Content-Encoding: " + encoding, CLOSE, body=body)


SMUGGLED = b"GET /profile HTTP/1.1\r\nHost: x\r\n\r\n"
DEFLATED = zlib.compress(PIXELS)
GZIPPED = gzip.compress(PIXELS)
BOMB = gzip.compress(bytes(100_000_000))
UPGRADE = (
    b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)  # fmt: skip

# name: what is sent (in one piece or several), and the statuses and last reason of what comes before the server closes
ATTACKS: dict[str, tuple[bytes | tuple[bytes, ...], list[int], str]] = {
    "TLS to a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), [400], "bad_request"),
    "zeros": (bytes(1000), [400], "bad_request"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], "bad_request"),
    "HTTP/9.9": (b"GET /healthz HTTP/9.9\r\n\r\n", [400], "bad_request"),
    "bare line feeds": (b"GET /healthz HTTP/1.1\nHost: x\n\n", [400], "bad_request"),
    "no version": (b"GET\r\n\r\n", [400], "bad_request"),
    "a URL that is none": (get(path=b"http://[::1/healthz"), [400], "bad_request"),
    "a URL with another port": (get(path=b"http://x:99999/"), [400], "bad_request"),
    "bytes in the path": (get(path=b"/\xff\xfe"), [400], "bad_request"),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", [400], "bad_request"),
    "two hosts": (get(b"Host: y"), [400], "bad_request"),
    # smuggling: what proxies and servers read differently
    "length and chunked": (chunked(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 192"), [400], "bad_request"),
    "two lengths": (post(b"Content-Length: 0", body=PIXELS), [400], "bad_request"),
    "the same length twice": (post(b"Content-Length: 192", body=PIXELS), [400], "bad_request"),
    "a list of lengths": (post(b"Content-Length: 192, 192", body=PIXELS, length=-1), [400], "bad_request"),
    "a length with a sign": (post(b"Content-Length: +192", body=PIXELS, length=-1), [400], "bad_request"),
    "a negative length": (post(b"Content-Length: -1", body=PIXELS, length=-1), [400], "bad_request"),
    "a hexadecimal length": (post(b"Content-Length: 0xc0", body=PIXELS, length=-1), [400], "bad_request"),
    "a length with an underscore": (post(b"Content-Length: 1_92", body=PIXELS, length=-1), [400], "bad_request"),
    "a length beyond 64 bits": (post(b"Content-Length: " + b"9" * 30, length=-1), [400], "bad_request"),
    "chunked twice": (chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), [400], "bad_request"),
    "another coding": (post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n", length=-1), [400], "bad_request"),
    "chunked, then identity": (
        post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n", length=-1), [400], "bad_request",
    ),
    "a space before the colon": (
        post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n", length=-1), [400], "bad_request",
    ),
    "a vertical tab": (post(b"Transfer-Encoding:\x0bchunked", body=b"0\r\n\r\n", length=-1), [400], "bad_request"),
    "a folded header": (get(b"X-A: b\r\n folded"), [400], "bad_request"),
    "a folded coding": (post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n", length=-1), [400], "bad_request"),
    "a chunk size that is none": (chunked(b"zz\r\nabc\r\n0\r\n\r\n"), [400], "bad_request"),
    "a negative chunk size": (chunked(b"-1\r\nabc\r\n0\r\n\r\n"), [400], "bad_request"),
    "a chunk size with 0x": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), [400], "bad_request"),
    "a chunk size beyond 64 bits": (chunked(b"F" * 18 + b"\r\nabc\r\n"), [400], "bad_request"),
    "a chunk longer than its size": (chunked(b"2\r\nabc\r\n0\r\n\r\n"), [400], "bad_request"),
    "chunks ended by line feeds": (chunked(b"1\na\n0\n\n"), [400], "bad_request"),
    "a length in a trailer": (chunked(b"0\r\nContent-Length: 5\r\n\r\n" + SMUGGLED), [400], "bad_request"),
    "a request in the body of GET": (
        get(b"Content-Length: %d" % len(SMUGGLED), CLOSE) + SMUGGLED, [200], "",
    ),
    "more body than said": (post(body=PIXELS, length=100), [400], "bad_request"),
    "more body than said, sent after the answer": ((post(body=PIXELS), b"\0" * 100), [], "bad_request"),
    "a bad chunk for a route that reads none": (
        (b"PUT /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n"), [], "",
    ),
    "a bad chunk after the head": ((chunked(b""), b"zz\r\n"), [400], "bad_request"),
    "a bad chunk after a good one": ((chunked(b"1\r\na\r\n"), b"zz\r\n"), [400], "bad_request"),
    # heads
    "a long line": (get(path=b"/" + b"a" * 20_000), [431], "head_too_large"),
    "a long header": (get(b"X-A: " + b"a" * 20_000), [431], "head_too_large"),
    "a long header without end": (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 2_000_000, [431], "head_too_large"),
    "a long name of a header": (get(b"a" * 20_000 + b": b"), [431], "head_too_large"),
    "many headers": (get(*[b"X-A: b"] * 20_000), [431], "head_too_large"),
    "many trailers": (chunked(b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n"), [431], "head_too_large"),
    "no colon": (get(b"foo"), [400], "bad_request"),
    "a zero in a header": (get(b"X: a\0b"), [400], "bad_request"),
    "a lone carriage return": (get(b"X: a\rb"), [400], "bad_request"),
    "a header without a name": (get(b": b"), [400], "bad_request"),
    "an expectation that is unknown": (post(b"Expect: money", CLOSE, body=PIXELS), [417], "expectation_failed"),
    "an expectation that is met": (post(b"Expect: 100-continue", CLOSE, body=PIXELS), [100, 200], ""),
    # bodies
    "a gzip bomb": (squeezed(b"gzip", BOMB), [413], "too_large"),
    "a gzip bomb for /v2": (
        post(b"Content-Encoding: gzip", CLOSE, body=BOMB, path=b"/v2/models/tiny/infer"), [413], "too_large",
    ),
    "a gzip bomb in a gzip bomb": (squeezed(b"gzip, gzip", gzip.compress(BOMB)), [501], "unsupported_encoding"),
    "an image bomb": (post(CLOSE, body=image_bomb()), [413], "too_large"),
    "a cut gzip body": (squeezed(b"gzip", GZIPPED[:60]), [400], "bad_request"),
    "a gzip body with more behind": (squeezed(b"gzip", GZIPPED + b"more"), [400], "bad_request"),
    "a cut deflate body": (squeezed(b"deflate", DEFLATED[:60]), [400], "bad_request"),
    "a deflate body of one byte": (squeezed(b"deflate", DEFLATED[:1]), [400], "bad_request"),
    "a coding that aiohttp knows by name only": (squeezed(b"zstd", b"0123456789"), [400], "bad_request"),
    "deep JSON": (post(b"Content-Type: application/json", CLOSE, body=b"[" * 200_000), [413], "too_large"),
    "JSON that is deep for its size": (
        post(b"Content-Type: application/json", CLOSE, body=b"[" * 1300), [400], "bad_request",
    ),
    "deep objects": (post(b"Content-Type: application/json", CLOSE, body=b'{"a":' * 50_000), [413], "too_large"),
    "deep JSON for /v2": (post(CLOSE, body=b"[" * 200_000, path=b"/v2/models/tiny/infer"), [413], "too_large"),
    "a number of 60,000 digits": (
        post(b"Content-Type: application/json", CLOSE, body=b'{"inputs": %s}' % (b"9" * 60_000)), [400], "bad_request",
    ),
    "a body above the limit": (post(CLOSE, length=2**40), [413], "too_large"),
    "chunks above the limit": (
        chunked((b"10000\r\n" + bytes(2**16) + b"\r\n") * 5 + b"0\r\n\r\n", CLOSE), [413], "too_large",
    ),
    # pipelining
    "a hundred requests at once": (post(body=PIXELS) * 99 + post(CLOSE, body=PIXELS), [200] * 100, ""),
    "noise behind a request": (post(body=PIXELS) + bytes(100), [400], "bad_request"),
    "noise after an upgrade that is refused": (post(*UPGRADE, body=PIXELS) + bytes(100), [200, 400], "bad_request"),
    # WebSocket
    "frames that are none": ((get(*UPGRADE, path=b"/stream"), random.Random(0).randbytes(2000)), [101], ""),
    "a frame of exabytes": ((get(*UPGRADE, path=b"/stream"), b"\x82\xff" + struct.pack(">QI", 2**62, 0)), [101], ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def victim(profile: Path) -> Iterator[Running]:
    """A server on a thread of its own, which stands all attacks of the table one after another."""
    ready, stop = threading.Event(), asyncio.Event()
    found: list[tuple[Running, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        async with running(config_of(profile, max_body_bytes=BODY_LIMIT, body_timeout_s=1.5)) as server:
            found.append((server, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()

    with ThreadPoolExecutor(1) as thread:
        serving_it = thread.submit(uvloop.run, serve())
        assert ready.wait(60), serving_it
        server, loop = found[0]
        yield server
        loop.call_soon_threadsafe(stop.set)
        serving_it.result(60)


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_gets_json_or_nothing_and_harms_no_query_beside_it(victim: Running, name: str) -> None:
    sent, expected, reason = ATTACKS[name]
    answer = await victim.talk(*(sent if isinstance(sent, tuple) else (sent,)))
    assert statuses(answer) == expected or not expected
    assert not reason or document_of(answer)["reason"] == reason
    assert b"entries" not in answer, "a smuggled request was answered"
    assert b"Traceback" not in answer
    await victim.check_good()


@pytest.mark.parametrize("encoding", [b"deflate", b"gzip"])
@on_uvloop
async def test_a_squeezed_body_that_ends_anywhere_is_refused_at_once(profile: Path, encoding: bytes) -> None:
    raw = zlib.compressobj(wbits=-15)
    whole = {b"deflate": (DEFLATED, raw.compress(PIXELS) + raw.flush()), b"gzip": (GZIPPED,)}
    async with running(config_of(profile)) as server:
        for body in whole[encoding]:
            assert statuses(await server.talk(squeezed(encoding, body))) == [200]
            for cut in (1, 2, 3, 10, len(body) // 2, len(body) - 9):
                head, rest = post(b"Content-Encoding: " + encoding, CLOSE, length=cut), body[:cut]
                for parts in ((head + rest,), (head, rest)):
                    began_s = time.monotonic()
                    answer = await server.talk(*parts)
                    assert statuses(answer) == [400], cut
                    assert document_of(answer)["reason"] == "bad_request"
                    assert time.monotonic() - began_s < PATIENT_S / 2
        await server.check_good()


@on_uvloop
async def test_random_bytes_and_mutated_requests_harm_nobody(profile: Path) -> None:
    chance = random.Random(7)
    in_chunks = chunked(b"c0\r\n" + PIXELS + b"\r\n0\r\n\r\n", CLOSE)
    seeds = [post(CLOSE, body=PIXELS), in_chunks, get(CLOSE), squeezed(b"gzip", GZIPPED)]
    async with running(quick(profile)) as server:
        for turn in range(60):
            sent = bytearray(chance.choice(seeds) if turn % 4 else chance.randbytes(chance.randrange(1, 3000)))
            for _ in range(chance.randrange(1, 5)):
                sent[chance.randrange(min(len(sent), 150))] = chance.randrange(256)
            answer = await server.talk(bytes(sent))
            assert set(statuses(answer)) <= {100, 101, 200, 400, 401, 404, 405, 408, 413, 415, 417, 431, 501, 504}, sent
            assert b"Traceback" not in answer
        await server.check_good()


# -------------------------------------------------------------------------------------------------------------- slow


def quick(profile: Path, **settings: Any) -> Config:
    times = {"header_timeout_s": QUICK_S, "body_timeout_s": QUICK_S, "idle_timeout_s": QUICK_S}
    return config_of(profile, **(times | settings))


@pytest.mark.slow
@on_uvloop
async def test_a_head_that_comes_byte_by_byte_is_cut_off_with_408(profile: Path) -> None:
    async with running(quick(profile, idle_timeout_s=60)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def drip() -> None:
            for byte in post(body=PIXELS):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        began_s = time.monotonic()
        answer = await reader.read()
        assert statuses(answer) == [408]
        assert document_of(answer)["reason"] == "slow_request"
        assert QUICK_S * 0.9 < time.monotonic() - began_s < PATIENT_S / 2
        dripping.cancel()
        writer.close()
        await server.check_good()


@pytest.mark.slow
@on_uvloop
async def test_the_second_head_of_a_connection_has_no_more_time(profile: Path) -> None:
    async with running(quick(profile, idle_timeout_s=60)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(get())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"}")
        writer.write(b"GET /hea")
        assert statuses(await reader.read()) == [408]
        writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/predict", b"/v2/models/tiny/infer", b"/v2/repository/index"])
@on_uvloop
async def test_a_body_that_does_not_come_is_answered_408(profile: Path, path: bytes) -> None:
    async with running(quick(profile)) as server:
        answer = await server.talk(post(CLOSE, body=b"{", length=100, path=path))
        assert statuses(answer) == [408]
        assert document_of(answer)["error"] == "the body did not arrive within 0.3 s"
        await server.check_good()


@pytest.mark.slow
@on_uvloop
async def test_connections_on_which_nothing_is_asked_are_closed(profile: Path) -> None:
    async with running(quick(profile)) as server:
        assert await server.talk() == b"", "before the first request"
        assert statuses(await server.talk(post(body=PIXELS))) == [200], "and after one"
        await server.check_good()


@pytest.mark.slow
@on_uvloop
async def test_a_client_that_does_not_read_is_cut_off(profile: Path) -> None:
    async with running(quick(profile, idle_timeout_s=60)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2)
        pages = get(path=b"/static/vendor/uPlot.iife.min.js") * 300
        writer.write(pages)
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENT_S):
                while True:
                    writer.write(pages)
                    await writer.drain()
        writer.close()
        await server.check_good()


# -------------------------------------------------------------------------------------------------------- too many


async def idle(port: int, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]


@on_uvloop
async def test_connections_beyond_the_limit_get_503_until_one_is_closed(
    profile: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(config_of(profile, max_connections=3)) as server:
        first = await idle(server.port, 3)
        for _ in range(4):
            answer = await server.talk(post(body=PIXELS))
            assert statuses(answer) == [503]
            assert b"Retry-After: 1\r\n" in answer
            assert document_of(answer)["reason"] == "too_many_connections"
        reader, writer = first[0]
        writer.write(post(CLOSE, body=PIXELS))
        assert statuses(await reader.read()) == [200], "those that are in are served"
        writer.close()
        await turns_until_good(server)
        for _, writer in first[1:]:
            writer.close()
    refusals = [record for record in caplog.records if record.getMessage() == "connections refused"]
    assert len(refusals) == 1, "a flood is one line in the log"
    assert (refusals[0].fields, refusals[0].levelname) == ({"open": 3, "limit": 3}, "WARNING")  # type: ignore[attr-defined]


async def turns_until_good(server: Running) -> None:
    """A place becomes free when the server sees that a client went away."""
    async with asyncio.timeout(PATIENT_S):
        while statuses(await server.talk(post(CLOSE, body=PIXELS))) != [200]:
            pass


@pytest.mark.slow
@on_uvloop
async def test_two_thousand_idle_connections_leave_the_queries_of_others_alone(profile: Path) -> None:
    if room_for(6000) < 6000:
        pytest.skip("needs 6,000 open files")
    async with running(config_of(profile, max_connections=1000, idle_timeout_s=5, header_timeout_s=5)) as server:
        known_reader, known = await asyncio.open_connection("127.0.0.1", server.port)
        known.write(post(body=PIXELS))
        assert (await known_reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        flood = await idle(server.port, 2000)
        known.write(post(CLOSE, body=PIXELS))
        assert statuses(await known_reader.read()) == [200]
        answers = [await reader.read() for reader, _ in flood]  # all are closed in the end
        for _, writer in flood:
            writer.close()
        known.close()
        refused = [answer for answer in answers if answer]
        assert 900 <= len(refused) <= 1001
        assert all(statuses(answer) == [503] for answer in refused)
        await server.check_good()


@pytest.mark.slow
def test_a_server_with_few_file_descriptors_serves_fewer_connections_and_survives_a_flood(profile: Path) -> None:
    command = f"ulimit -n {SPARE_DESCRIPTORS + 40}; exec {sys.executable} superserve.py --port 0 --device cpu "
    command += f"--threads 1 --profile {profile} --default-slo-ms 30000"
    with subprocess.Popen(["bash", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        events: list[dict[str, Any]] = []
        while not events or events[-1]["event"] != "ready":
            events.append(json.loads(popen.stderr.readline()))
        assert events[0]["why"] == "max_connections is 1000, but the limit of open files leaves room for 40"
        port = URL(events[1]["url"]).port
        assert port is not None
        asyncio.run(flooded(Running(port, web.Application())))
        popen.terminate()
        rest = [json.loads(line) for line in popen.stderr]
        assert popen.wait(60) == 0
    assert [event["event"] for event in rest if event["level"] == "error"] == []


async def flooded(server: Running) -> None:
    flood = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", server.port) for _ in range(400)))
    assert statuses(await server.talk(get())) in ([503], [])
    for _, writer in flood:
        writer.close()
    await turns_until_good(server)


@on_uvloop
async def test_large_bodies_of_many_clients_are_bounded_together(profile: Path) -> None:
    async with running(config_of(profile, max_upload_bytes=100_000)) as server:
        uploads = server.app[UPLOADS]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(CLOSE, length=90_001, body=bytes(90_000)))
        await turns_until(lambda: uploads.held_bytes == 90_000)
        answer = await server.talk(post(CLOSE, body=bytes(20_000)))
        assert statuses(answer) == [503]
        assert b"Retry-After: 1\r\n" in answer
        assert document_of(answer)["reason"] == "too_many_uploads"
        await server.check_good()
        writer.write(b"\0")
        assert statuses(await reader.read()) == [400]
        writer.close()
        await turns_until(lambda: uploads.held_bytes == 0)
        assert statuses(await server.talk(post(CLOSE, body=bytes(20_000)))) == [400]


@on_uvloop
async def test_an_upload_whose_client_goes_away_is_forgotten(profile: Path) -> None:
    async with running(config_of(profile)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(length=90_001, body=bytes(90_000)))
        await turns_until(lambda: server.app[UPLOADS].held_bytes == 90_000)
        writer.close()
        await turns_until(lambda: server.app[UPLOADS].held_bytes == 0)


@pytest.mark.slow
@on_uvloop
async def test_tls_handshakes_that_are_not_finished_are_ended_and_cost_no_place_for_long(
    profile: Path, certificate: Path  # noqa: F811
) -> None:
    config = quick(profile, tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem", max_connections=2)
    trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
    async with running(config) as server:
        waiting = await idle(server.port, 2)
        waiting[0][1].write(b"\x16\x03\x01\x02\x00\x01")
        for reader, writer in waiting:
            assert await reader.read() == b""
            writer.close()

        async def served() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=trusting)
            writer.write(get(CLOSE))
            answer = await reader.read()
            writer.close()
            return answer

        async with asyncio.timeout(PATIENT_S):
            while statuses(await served()) != [200]:
                pass
        for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(300)):
            assert b"HTTP/1.1" not in await server.talk(noise)


def test_room_for_connections_leaves_files_for_the_rest() -> None:
    assert room_for(1) == 1
    assert room_for(100) == 100


def test_an_answer_without_aiohttp_is_whole() -> None:
    head, _, body = answer_bytes(QueueFull("full", retry_after_s=2)).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 429 Too Many Requests"
    assert {"Retry-After: 2", f"Content-Length: {len(body)}", "Connection: close"} <= set(lines)
    assert json.loads(body) == {"error": "full", "reason": "queue_full"}
