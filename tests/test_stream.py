"""/stream over real sockets: many queries on one connection, and what becomes of each; and the client in examples/."""

import asyncio
import json
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import serving
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st
from serving import LARGE, FakeEngine, config_of, fake_engine, image_array, image_file, turns_until
from test_frames import masked

from config import Config
from examples.client import Client, ConnectionClosed, ServerError
from scripts.bench_http import HANDSHAKE
from superserve import SERVE, SuperServe, make_app
from web.errors import BadRequest, ServeError
from web.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from web.inputs import Limits
from web.stream import FIELDS, MAX_HEADER_BYTES, Headers, split_message

ROOT = Path(__file__).parents[1]
PIXELS = image_array(0).tobytes()
PLANES = np.random.default_rng(0).standard_normal((3, 8, 8)).astype("<f4").tobytes()
BODY_LIMIT = 300_000
LARGE_PNG = image_file("PNG", (600, 500))
Socket = aiohttp.ClientWebSocketResponse


@pytest.fixture
def config(profile: Path) -> Config:
    return config_of(profile, max_body_bytes=BODY_LIMIT)


@dataclass
class Running:
    """A server that listens; with a gate, its batches wait for it."""

    client: TestClient[web.Request, web.Application]
    serve: SuperServe
    engine: FakeEngine
    gate: asyncio.Event

    @property
    def counters(self) -> Counter[str]:
        assert self.serve.dispatcher is not None
        return self.serve.dispatcher.counters

    @property
    def waiting(self) -> int:
        assert self.serve.dispatcher is not None
        return len(self.serve.dispatcher.heap)

    @property
    def url(self) -> str:
        return str(self.client.make_url("/"))

    def outcomes_sum_to_arrivals(self) -> bool:
        counters = dict(self.counters)
        return counters.pop("arrivals", 0) == sum(counters.values())


@asynccontextmanager
async def running(config: Config, *, gated: bool = False, real: bool = False) -> AsyncIterator[Running]:
    app, gate = make_app(config), asyncio.Event()
    if not gated:
        gate.set()
    engine = fake_engine(app[SERVE], gate=gate) if not real else app[SERVE].engine
    complaints: list[dict[str, Any]] = []
    async with TestClient(TestServer(app)) as client:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await app[SERVE].start_soon()
        try:
            yield Running(client, app[SERVE], engine, gate)  # type: ignore[arg-type]
        finally:
            gate.set()
    assert not complaints


def packed(payload: bytes = PIXELS, **header: Any) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<I", len(encoded)) + encoded + payload


async def reply_of(socket: Socket) -> dict[str, Any]:
    async with asyncio.timeout(30):
        document: dict[str, Any] = await socket.receive_json()
    return document


async def ask(socket: Socket, message: bytes) -> dict[str, Any]:
    await socket.send_bytes(message)
    return await reply_of(socket)


# -------------------------------------------------------------------------------------------------------------- answers

GOOD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "raw pixels": (PIXELS, {"dtype": "uint8", "shape": [8, 8, 3]}),
    "raw planes": (PLANES, {"dtype": "float32", "shape": [3, 8, 8]}),
    "pixels of no type": (PIXELS, {}),
    "image of no type": (image_file("JPEG"), {}),
    "JPEG": (image_file("JPEG"), {"content_type": "image/jpeg"}),
    "type with parameters": (image_file("PNG"), {"content_type": "Image/PNG; q=1"}),
    "large PNG": (LARGE_PNG, {"content_type": "image/png"}),
    "JSON": (json.dumps({"inputs": image_array(0).tolist()}).encode(), {"content_type": "application/json"}),
    "all parameters": (PIXELS, {"slo_ms": 20_000, "min_accuracy": 0.8, "priority": 5, "top_k": 1}),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_good_input_is_answered_as_by_predict_with_its_id(config: Config, name: str) -> None:
    payload, header = GOOD[name]
    async with running(config, real=True) as server, server.client.ws_connect("/stream") as socket:
        document = await ask(socket, packed(payload, id="one", **header))
        kind = header.get("content_type", "application/octet-stream")
        posted = await server.client.post("/predict", data=payload, headers={"Content-Type": kind})
        expected = await posted.json()
    assert document.pop("id") == "one", document
    assert document.keys() == expected.keys()
    assert (document["predictions"], document["subnet"]) == (expected["predictions"], LARGE)
    assert document["slo_ms"] == header.get("slo_ms", serving.PATIENT_MS)
    assert 0 < document["queue_ms"] < document["latency_ms"]


async def test_replies_come_in_the_order_in_which_queries_are_done(profile: Path) -> None:
    async with (
        running(config_of(profile, policy="fixed:largest"), gated=True) as server,
        server.client.ws_connect("/stream") as socket,
    ):
        await socket.send_bytes(packed(id="runs first"))
        await turns_until(lambda: server.engine.batches)
        await socket.send_bytes(packed(id="expires", slo_ms=100))
        await socket.send_bytes(packed(id="waits"))
        assert (await reply_of(socket))["id"] == "expires"
        server.gate.set()
        assert [(await reply_of(socket))["id"] for _ in range(2)] == ["runs first", "waits"]
        assert server.counters == {"arrivals": 3, "in_time": 2, "expired": 1}


@pytest.mark.parametrize("message_id", ["", "a", "é\ud800\n", 0, -1, 2**70])
async def test_the_id_comes_back_as_it_was(config: Config, message_id: str | int) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        assert (await ask(socket, packed(id=message_id)))["id"] == message_id
        assert (await ask(socket, packed(id=message_id, slo_ms=-1)))["id"] == message_id


async def test_many_queries_at_once_are_all_answered_each_once(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        for number in range(200):
            await socket.send_bytes(packed(id=number))
        replies = [await reply_of(socket) for _ in range(200)]
        assert sorted(reply["id"] for reply in replies) == list(range(200))
        assert {reply["deadline_met"] for reply in replies} == {True}
        assert max(size for _, size in server.engine.batches) > 1
        assert server.counters == {"arrivals": 200, "in_time": 200}


async def test_the_slo_counts_from_the_message_not_from_the_connection(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        await ask(socket, packed(id=1))
        assert server.serve.clock() > 0
        reply = await ask(socket, packed(id=2, slo_ms=5000))
        assert reply["latency_ms"] < 5000
        assert reply["deadline_met"]


# --------------------------------------------------------------------------------------------------------------- errors


def raw(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", len(header) if length is None else length) + header


BAD: dict[str, tuple[bytes, int, str, Any]] = {
    # name: message, status, what the error names, the id that comes back
    "nothing": (b"", 400, "a message of 0 bytes", None),
    "too short": (b"abc", 400, "3 bytes; it begins with the header's length", None),
    "no header": (raw(b""), 400, "not JSON", None),
    "header beyond the message": (raw(b"{}", 3), 400, "a header of 3 bytes in a message of 6 bytes", None),
    "header too large": (raw(b"{}", MAX_HEADER_BYTES + 1), 400, "at most 16384", None),
    "header absurd": (raw(b"{}", 2**32 - 1), 400, "a header of 4294967295 bytes", None),
    "not JSON": (raw(b"{"), 400, "not JSON", None),
    "not UTF-8": (raw(b"\xff\xfe{\x00}\x00"), 400, "not JSON", None),
    "deep": (raw(b"[" * MAX_HEADER_BYTES), 400, "not JSON", None),
    "a number too long to read": (raw(b'{"id": ' + b"1" * 5000 + b"}"), 400, "not JSON", None),
    "not an object": (raw(b"[1]"), 400, "must be a JSON object, not a list", None),
    "no id": (packed(), 400, "id must be a string or a whole number, not null", None),
    "id true": (packed(id=True), 400, "not true", None),
    "id 1.5": (packed(id=1.5), 400, "not 1.5", None),
    "unknown field": (packed(id=1, slo=5), 400, "unknown header field 'slo'; known: content_type, dtype, id", 1),
    "slo text": (packed(id=1, slo_ms="50"), 400, 'slo_ms must be a number, not "50"', 1),
    "slo true": (packed(id=1, slo_ms=True), 400, "slo_ms must be a number, not true", 1),
    "slo NaN": (packed(id=1, slo_ms=float("nan")), 400, "slo_ms must be between", 1),
    "slo zero": (packed(id=1, slo_ms=0), 400, "slo_ms must be above 0", 1),
    "slo absurd": (packed(id=1, slo_ms=10**400), 400, "slo_ms must be between 0 and 60000", 1),
    "slo that cannot be met": (packed(id=1, slo_ms=0.01), 504, "cannot be met", 1),
    "top_k": (packed(id=1, top_k=2.5), 400, "top_k must be a whole number", 1),
    "floor too high": (packed(id=1, min_accuracy=0.95), 400, "min_accuracy 0.95 is above", 1),
    "type": (packed(id=1, content_type="text/plain"), 415, "'text/plain' is not read", 1),
    "type no text": (packed(id=1, content_type=5), 400, "content_type must be a string", 1),
    "both": (packed(id=1, content_type="image/png", dtype="uint8", shape=[8, 8, 3]), 400, "either a content_type", 1),
    "dtype alone": (packed(id=1, dtype="uint8"), 400, "shape must be a list of whole numbers", 1),
    "shape alone": (packed(id=1, shape=[8, 8, 3]), 400, "int64, uint8, not null", 1),
    "dtype": (packed(id=1, dtype="int8", shape=[8, 8, 3]), 400, 'int64, uint8, not "int8"', 1),
    "shape negative": (packed(id=1, dtype="uint8", shape=[-1]), 400, "above 0", 1),
    "shape long": (packed(id=1, dtype="uint8", shape=[1] * 9), 400, "9 dimensions", 1),
    "shape absurd": (packed(id=1, dtype="uint8", shape=[2**62, 8, 3]), 400, "192 bytes are not a uint8 tensor", 1),
    "shape of another net": (packed(id=1, dtype="uint8", shape=[3, 8, 8]), 400, r"the input is uint8 (3, 8, 8)", 1),
    "bytes of another shape": (packed(b"abc", id=1, dtype="float32", shape=[1]), 400, "3 bytes are not a float32", 1),
    "not finite": (
        packed(np.full(192, np.nan, "<f4").tobytes(), id=1, dtype="float32", shape=[3, 8, 8]), 400, "not finite", 1,
    ),
    "empty payload": (packed(b"", id=1), 400, "empty body", 1),
    "damaged image": (packed(image_file("JPEG")[:400], id=1), 400, "cannot be decoded", 1),
    "damaged large image": (packed(LARGE_PNG[:60] + bytes(40_000), id=1), 400, "cannot be decoded", 1),
    "payload too large": (packed(bytes(BODY_LIMIT + 1), id=1), 413, "larger than this server accepts", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_message_gets_an_error_and_the_connection_lives_on(config: Config, name: str) -> None:
    message, status, named, message_id = BAD[name]
    async with running(config) as server, server.client.ws_connect("/stream", max_msg_size=0) as socket:
        document = await ask(socket, message)
        assert named in document.pop("error")
        assert (document.pop("id"), document.pop("status")) == (message_id, status)
        assert document.pop("reason") in {kind.reason for kind in ServeError.__subclasses__()}
        if status != 504:
            assert document == {}
        assert (await ask(socket, packed(id=2)))["deadline_met"]
        assert server.outcomes_sum_to_arrivals()


async def test_the_figures_of_a_deadline_that_cannot_be_met_are_told(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        document = await ask(socket, packed(id=1, slo_ms=0.5))
        assert (document["reason"], document["slo_ms"], document["queue_depth"]) == ("deadline", 0.5, 0)
        assert document["predicted_ms"] > 1


async def test_a_text_message_is_told_what_is_read(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        await socket.send_str('{"id": 1}')
        document = await reply_of(socket)
        assert (document["id"], document["status"], document["reason"]) == (None, 400, "bad_request")
        assert "queries are binary messages" in document["error"]
        assert (await ask(socket, packed(id=2)))["id"] == 2


async def test_good_and_bad_messages_mix(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        for number in range(60):
            await socket.send_bytes((packed(id=number), packed(id=number, slo_ms=-1), raw(b"x"))[number % 3])
        replies = [await reply_of(socket) for _ in range(60)]
        assert {reply["id"] for reply in replies if "subnet" in reply} == set(range(0, 60, 3))
        assert {reply["id"] for reply in replies if "error" in reply} == {*range(1, 60, 3), None}
        assert server.counters == {"arrivals": 20, "in_time": 20}


async def test_a_failed_batch_is_told_without_its_cause(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        server.engine.failure = RuntimeError("secret")
        document = await ask(socket, packed(id=1))
        assert (document["status"], document["reason"]) == (500, "engine_failed")
        assert "secret" not in document["error"]
        server.engine.failure = None
        assert (await ask(socket, packed(id=2)))["id"] == 2


async def test_a_message_beyond_all_limits_closes_the_connection_with_1009_and_cancels(config: Config) -> None:
    async with running(config, gated=True) as server, server.client.ws_connect("/stream", max_msg_size=0) as socket:
        await socket.send_bytes(packed(id=1))
        await turns_until(lambda: server.engine.batches)
        await socket.send_bytes(bytes(BODY_LIMIT + MAX_HEADER_BYTES + 5))
        assert (await socket.receive()).type is WSMsgType.CLOSE
        assert socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        await turns_until(lambda: server.counters["cancelled"] == 1)


async def test_the_largest_message_allowed_is_read(profile: Path) -> None:
    config = config_of(profile, max_body_bytes=len(PIXELS))
    async with running(config) as server, server.client.ws_connect("/stream", max_msg_size=0) as socket:
        padding = " " * (MAX_HEADER_BYTES - len('{"id": 1}'))
        reply = await ask(socket, raw(b'{"id": 1' + padding.encode() + b"}") + PIXELS)
        assert reply["id"] == 1
        assert reply["deadline_met"]


# ------------------------------------------------------------------------------------------------------ known headers


def both(data: bytes, first: bytes) -> tuple[object, object]:
    """A message as it is read, and as it is recalled where the header of another is known; None: it is not."""
    headers, message, other = Headers(), split_message(data), split_message(first)
    headers.remember(first, other, other.parameters(LIMITS))
    known = headers.recall(bytearray(data))
    recalled = None if known is None else (known[0], known[1].parameters, known[1].input(bytearray(data), known[2]))
    tensor = message.tensor()
    assert tensor is not None
    read = json.dumps(message.id), message.parameters(LIMITS), tensor
    return tuple(map(str, read)), recalled and tuple(map(str, recalled))


TENSOR: dict[str, Any] = {"dtype": "uint8", "shape": [2, 3]}


@pytest.mark.parametrize("message_id", [0, 7, 10**17, "", "a b", "x" * 99, "{}[],:~"])
@pytest.mark.parametrize(
    "more", [{}, {"slo_ms": 5}, {"top_k": 2, "members": "small"}, {"dtype": "int32", "shape": [6]}], ids=str
)
def test_a_header_that_differs_in_its_id_is_known(message_id: str | int, more: dict[str, Any]) -> None:
    header = TENSOR | more
    payload = bytes(range(6 * (4 if header["dtype"] == "int32" else 1)))
    for fields in ({"id": message_id} | header, header | {"id": message_id}):
        read, recalled = both(packed(payload, **fields), packed(payload, **(fields | {"id": 1})))
        assert recalled == read


def test_a_header_is_not_known_by_another_that_asks_for_something_else() -> None:
    good = packed(b"abcdef", id=1, **TENSOR)
    text = json.dumps(TENSOR).encode()[1:]
    for other in (
        packed(b"abcdef", id=1, slo_ms=5, **TENSOR), packed(b"abcdef", **TENSOR, id=1),
        packed(b"abcdef", id=-1, **TENSOR), packed(b"abcdef", id="\\", **TENSOR), packed(b"abcdef", id="é", **TENSOR),
        raw(b'{"id": 1, "id": 2, ' + text) + b"abcdef", raw(b'{"id":  1, ' + text) + b"abcdef",
    ):  # fmt: skip
        assert both(other, good)[1] is None
    assert both(good, raw(b'{"id": 1, "id": 2, ' + text) + b"a" * 6)[1] is None
    assert Headers().recall(bytearray(good)) is None


def test_a_payload_of_another_length_is_read_and_refused() -> None:
    headers, good = Headers(), packed(b"abcdef", id=1, **TENSOR)
    headers.remember(good, split_message(good), LIMITS.defaults)
    assert headers.recall(bytearray(good)) is not None
    for bad in (good + b"g", good[:-1], good[:20], good[:3], b""):
        assert headers.recall(bytearray(bad)) is None


async def test_messages_of_known_headers_are_answered_or_refused_each_by_itself(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        planes = np.full(192, np.nan, "<f4").tobytes()
        kinds = ((PIXELS, {"dtype": "uint8", "shape": [8, 8, 3]}), (PLANES, {"dtype": "float32", "shape": [3, 8, 8]}))
        for number in range(60):
            payload, header = kinds[number % 20 // 10]
            await socket.send_bytes(packed(planes if number == 55 else payload, id=number, **header))
        replies = {reply["id"]: reply for reply in [await reply_of(socket) for _ in range(60)]}
        assert replies.keys() == set(range(60))
        assert [number for number, reply in replies.items() if "error" in reply] == [55]
        assert "not finite" in replies[55]["error"]
        assert server.counters == {"arrivals": 59, "in_time": 59}


async def test_known_headers_keep_to_the_limit_and_are_refused_while_draining(narrow: Config) -> None:
    header = {"dtype": "uint8", "shape": [8, 8, 3]}
    async with running(narrow, gated=True) as server, server.client.ws_connect("/stream") as socket:
        server.gate.set()
        assert (await ask(socket, packed(id="first", **header)))["deadline_met"]
        server.gate.clear()
        for number in range(5):
            await socket.send_bytes(packed(id=number, **header))
        refused = [await reply_of(socket) for _ in range(2)]
        assert [(reply["id"], reply["reason"]) for reply in refused] == [(n, "too_many_in_flight") for n in (3, 4)]
        server.gate.set()
        assert sorted([(await reply_of(socket))["id"] for _ in range(3)]) == [0, 1, 2]
        assert server.counters == {"arrivals": 4, "in_time": 4}


async def test_known_headers_beyond_the_queue_are_refused_one_by_one(profile: Path) -> None:
    header = {"dtype": "uint8", "shape": [8, 8, 3]}
    config = config_of(profile, policy="fixed:largest", max_queue=2)
    async with running(config, gated=True) as server, server.client.ws_connect("/stream") as socket:
        server.gate.set()
        assert (await ask(socket, packed(id="first", **header)))["deadline_met"]
        server.gate.clear()
        await socket.send_bytes(packed(id="runs", **header))
        await turns_until(lambda: len(server.engine.batches) == 2)
        for number in range(6):
            await socket.send_bytes(packed(id=number, **header))
        refused = [await reply_of(socket) for _ in range(4)]
        assert [(reply["id"], reply["reason"]) for reply in refused] == [(n, "queue_full") for n in (2, 3, 4, 5)]
        server.gate.set()
        assert {(await reply_of(socket))["id"] for _ in range(3)} == {"runs", 0, 1}
        assert server.outcomes_sum_to_arrivals()


# --------------------------------------------------------------------------------------------------------------- frames


async def wire(server: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has shaken hands, whose client writes frames by itself."""
    url = server.client.make_url("/")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(HANDSHAKE.format(host="x").encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer


async def frame_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(30):
        first, length = await reader.readexactly(2)
        if length == 126:
            length = int.from_bytes(await reader.readexactly(2), "big")
        return first & 15, await reader.readexactly(length)


async def test_fragments_and_pings_among_them_are_read_however_they_come(config: Config) -> None:
    async with running(config) as server:
        reader, writer = await wire(server)
        message = packed(id=1)
        sent = masked(BINARY, message[:9], final=False) + masked(PING, b"there?") + masked(CONTINUATION, message[9:])
        for index in range(len(sent)):
            writer.write(sent[index : index + 1])
            await writer.drain()
        assert await frame_of(reader) == (PONG, b"there?")
        kind, text = await frame_of(reader)
        assert (kind, json.loads(text)["id"]) == (TEXT, 1)
        writer.close()


@pytest.mark.parametrize(("broken", "code"), [
    (masked(BINARY, b"x", mask=None), 1002), (masked(3), 1002), (masked(TEXT, b"\xff"), 1007),
    (masked(BINARY, bytes(BODY_LIMIT + MAX_HEADER_BYTES + 5)), 1009),
])  # fmt: skip
async def test_what_breaks_the_protocol_closes_with_its_code_and_cancels(
    config: Config, broken: bytes, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.websocket.CLOSE_S", 0.05)
    async with running(config, gated=True) as server:
        reader, writer = await wire(server)
        writer.write(masked(BINARY, packed(id=1)))
        await turns_until(lambda: server.engine.batches)
        writer.write(broken)
        kind, payload = await frame_of(reader)
        assert (kind, int.from_bytes(payload[:2], "big")) == (CLOSE, code)
        assert await reader.read() == b""
        await turns_until(lambda: server.counters["cancelled"] == 1)
        writer.close()


async def test_a_goodbye_is_returned_with_its_code_and_what_follows_is_not_read(config: Config) -> None:
    async with running(config) as server:
        reader, writer = await wire(server)
        writer.write(masked(CLOSE, b"\x0f\xa0bye") + masked(BINARY, packed(id=1)))
        assert await frame_of(reader) == (CLOSE, b"\x0f\xa0")
        assert await reader.read() == b""
        assert server.counters == {}
        writer.close()


async def test_a_silent_client_is_asked_and_given_up_unless_it_answers(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.websocket.HEARTBEAT_S", 0.1)
    async with running(config) as server:
        reader, writer = await wire(server)
        for _ in range(2):
            assert await frame_of(reader) == (PING, b"")
            writer.write(masked(PONG))
        assert await frame_of(reader) == (PING, b"")
        async with asyncio.timeout(30):
            with suppress(ConnectionError):  # how it ends depends on what was read before
                assert await reader.read() == b""
        writer.close()


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def narrow(profile: Path) -> Config:
    return config_of(profile, max_in_flight=3, policy="fixed:largest")


async def test_queries_beyond_the_limit_are_refused_and_those_within_answered(narrow: Config) -> None:
    async with running(narrow, gated=True) as server, server.client.ws_connect("/stream") as socket:
        for number in range(5):
            await socket.send_bytes(packed(id=number))
        refused = [await reply_of(socket) for _ in range(2)]
        assert [(reply["id"], reply["status"], reply["reason"]) for reply in refused] == [
            (3, 429, "too_many_in_flight"), (4, 429, "too_many_in_flight"),
        ]  # fmt: skip
        assert "3 queries of this connection are unanswered" in refused[0]["error"]
        server.gate.set()
        assert sorted([(await reply_of(socket))["id"] for _ in range(3)]) == [0, 1, 2]
        assert (await ask(socket, packed(id=5)))["id"] == 5
        assert server.counters == {"arrivals": 4, "in_time": 4}


async def test_refused_queries_leave_the_limit_as_it_was(narrow: Config) -> None:
    async with running(narrow) as server, server.client.ws_connect("/stream") as socket:
        for message in (packed(id=1, slo_ms=0.01), packed(id=1, top_k=0), packed(LARGE_PNG[:60] + bytes(40_000), id=1)):
            for _ in range(5):
                assert (await ask(socket, message))["status"] in (400, 504)
        assert (await ask(socket, packed(id=2)))["id"] == 2


async def test_the_limit_is_each_connections_own(narrow: Config) -> None:
    async with (
        running(narrow, gated=True) as server,
        server.client.ws_connect("/stream") as one,
        server.client.ws_connect("/stream") as other,
    ):
        for number in range(3):
            await one.send_bytes(packed(id=number))
        await turns_until(lambda: server.counters["arrivals"] == 3)
        await other.send_bytes(packed(id=0))
        await turns_until(lambda: server.counters["arrivals"] == 4)
        server.gate.set()
        assert (await reply_of(other))["id"] == 0


async def test_a_full_queue_is_told_with_when_to_retry(profile: Path) -> None:
    async with (
        running(config_of(profile, max_queue=1), gated=True) as server,
        server.client.ws_connect("/stream") as socket,
    ):
        await socket.send_bytes(packed(id=0))
        await turns_until(lambda: server.engine.batches)
        await socket.send_bytes(packed(id=1))
        document = await ask(socket, packed(id=2))
        assert (document["id"], document["status"], document["reason"]) == (2, 429, "queue_full")
        assert document["retry_after_s"] == 1


async def test_many_large_images_at_once_are_decoded_and_answered(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        for number in range(12):
            await socket.send_bytes(packed(LARGE_PNG, id=number))
        assert sorted([(await reply_of(socket))["id"] for _ in range(12)]) == list(range(12))
        assert server.counters == {"arrivals": 12, "in_time": 12}


# -------------------------------------------------------------------------------------------------------------- closing


async def test_closing_cancels_what_waits_and_what_runs(narrow: Config) -> None:
    async with running(narrow, gated=True) as server:
        async with server.client.ws_connect("/stream") as socket:
            await socket.send_bytes(packed(id=0))
            await turns_until(lambda: server.engine.batches)
            for number in (1, 2):
                await socket.send_bytes(packed(id=number))
            await turns_until(lambda: server.waiting == 2)
        await turns_until(lambda: server.waiting == 0)
        server.gate.set()
        assert (await server.client.post("/predict", data=PIXELS)).status == 200
        assert server.counters == {"arrivals": 4, "cancelled": 3, "in_time": 1}


async def test_a_connection_that_breaks_cancels_its_queries_too(narrow: Config) -> None:
    async with running(narrow, gated=True) as server:
        socket = await server.client.ws_connect("/stream")
        await socket.send_bytes(packed(id=0))
        await turns_until(lambda: server.engine.batches)
        await socket.send_bytes(packed(id=1))
        await turns_until(lambda: server.waiting == 1)
        transport = socket._writer.transport
        assert transport is not None
        transport.abort()
        await turns_until(lambda: server.counters["cancelled"] == 2)
        assert server.waiting == 0
        await socket.close()


async def test_closing_while_an_image_is_decoded_makes_no_query_of_it(config: Config) -> None:
    async with running(config) as server:
        async with server.client.ws_connect("/stream") as socket:
            await ask(socket, packed(id=0))
            await socket.send_bytes(packed(LARGE_PNG, id=1))
        assert (await server.client.post("/predict", data=PIXELS)).status == 200
        assert server.outcomes_sum_to_arrivals()


async def test_while_draining_queries_in_flight_are_answered_and_new_ones_refused(narrow: Config) -> None:
    async with running(narrow, gated=True) as server, server.client.ws_connect("/stream") as socket:
        await socket.send_bytes(packed(id=0))
        await turns_until(lambda: server.engine.batches)
        await socket.send_bytes(packed(id=1))
        await turns_until(lambda: server.waiting == 1)
        closing = asyncio.create_task(server.serve.close())
        refused = await ask(socket, packed(id=2))
        assert (refused["id"], refused["status"], refused["error"]) == (2, 503, "draining")
        assert refused["retry_after_s"] == 1
        with pytest.raises(aiohttp.WSServerHandshakeError) as failed:
            await server.client.ws_connect("/stream")
        assert failed.value.status == 503
        server.gate.set()
        assert sorted([(await reply_of(socket))["id"] for _ in range(2)]) == [0, 1]
        await closing
        assert server.counters == {"arrivals": 2, "in_time": 2}


async def test_shutdown_without_a_close_before_answers_first_and_says_goodbye(narrow: Config) -> None:
    async with running(narrow, gated=True) as server, server.client.ws_connect("/stream") as socket:
        await socket.send_bytes(packed(id=0))
        await turns_until(lambda: server.engine.batches)
        stopping = asyncio.create_task(server.client.app.shutdown())  # type: ignore[union-attr]
        assert (await ask(socket, packed(id=1)))["error"] == "draining"
        assert server.serve.ready
        with pytest.raises(aiohttp.WSServerHandshakeError) as failed:
            await server.client.ws_connect("/stream")
        assert failed.value.status == 503
        server.gate.set()
        assert (await reply_of(socket))["id"] == 0
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY)
        assert message.extra == "the server is stopping"
        await stopping


async def test_shutdown_waits_for_no_client_that_reads_nothing(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.websocket.CLOSE_S", 0.05)
    async with running(config_of(profile)) as server:
        session = aiohttp.ClientSession()
        socket = await session.ws_connect(f"{server.url}stream")
        transport = socket._writer.transport
        assert transport is not None
        transport.pause_reading()  # type: ignore[attr-defined]
        flood = packed(id="x" * 10_000, slo_ms=-1)
        sending = asyncio.create_task(_send_for_ever(socket, flood))
        await turns_until(lambda: socket._writer.protocol._paused)  # nothing is read any more, so nothing is taken
        async with asyncio.timeout(20):
            await server.client.app.shutdown()  # type: ignore[union-attr]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        transport.abort()
        await socket.close()
        await session.close()


@pytest.mark.parametrize("flood", ["refused queries", "texts", "pings"])
async def test_a_client_that_reads_nothing_is_cut_off(profile: Path, flood: str) -> None:
    config = config_of(profile, body_timeout_s=0.2, max_body_bytes=BODY_LIMIT)
    async with running(config) as server, aiohttp.ClientSession() as session:
        socket = await session.ws_connect(f"{server.url}stream", max_msg_size=0)
        transport = socket._writer.transport
        assert transport is not None
        transport.pause_reading()  # type: ignore[attr-defined]
        sending = asyncio.create_task(_flood(socket, flood))
        (connection,) = server.client.server.handler.connections
        await turns_until(lambda: connection.writing_paused)
        await turns_until(lambda: not server.client.server.handler.connections)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        transport.abort()
        await socket.close()  # else aiohttp's client warns of it when it is collected
        assert server.outcomes_sum_to_arrivals()


async def _flood(socket: Socket, kind: str) -> None:
    while kind == "refused queries":
        await socket.send_bytes(packed(id="x" * 10_000, slo_ms=-1))
    while kind == "texts":
        await socket.send_str("x" * 10)
    while kind == "pings":
        await socket.ping(bytes(100))


async def test_a_client_that_reads_late_is_not_cut_off(profile: Path) -> None:
    config = config_of(profile, body_timeout_s=5)
    async with running(config) as server, aiohttp.ClientSession() as session:
        socket = await session.ws_connect(f"{server.url}stream", max_msg_size=0)
        transport = socket._writer.transport
        assert transport is not None
        transport.pause_reading()  # type: ignore[attr-defined]
        sending = asyncio.create_task(_send_for_ever(socket, packed(id="x" * 10_000, slo_ms=-1)))
        (connection,) = server.client.server.handler.connections
        await turns_until(lambda: connection.writing_paused)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        transport.resume_reading()  # type: ignore[attr-defined]
        last = asyncio.create_task(socket.send_bytes(packed(id="last")))
        while (await reply_of(socket))["id"] != "last":
            pass
        await last
        await socket.close()


async def test_what_nobody_foresaw_closes_the_connection_with_1011_and_is_logged(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    async with running(config) as server, server.client.ws_connect("/stream") as socket:
        server.serve.begin = fail  # type: ignore[assignment,method-assign]
        await socket.send_bytes(packed(id=1))
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, aiohttp.WSCloseCode.INTERNAL_ERROR)
        assert "secret" not in str(message.extra)
        assert (await server.client.post("/predict", data=PIXELS)).status == 200
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.message for record in logged] == ["a request failed"]
    assert logged[0].__dict__["fields"]["path"] == "/stream"


async def _send_for_ever(socket: Socket, message: bytes) -> None:
    while True:
        await socket.send_bytes(message)


@pytest.mark.slow
async def test_sigterm_answers_what_is_in_flight_closes_the_stream_and_ends_the_process(profile: Path) -> None:
    command = [sys.executable, "superserve.py", "--profile", str(profile), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", "--default-slo-ms", str(serving.PATIENT_MS)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(120), aiohttp.ClientSession() as session:
            events: dict[str, dict[str, Any]] = {}
            while "ready" not in events:
                event = json.loads(await process.stderr.readline())
                events[event["event"]] = event
            async with session.ws_connect(f"{events['listening']['url']}/stream") as socket:
                for number in range(100):
                    await socket.send_bytes(packed(id=number))
                replies = [await reply_of(socket)]
                process.terminate()
                replies += [json.loads(message.data) async for message in socket]
                assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY
            lines = [json.loads(line) async for line in process.stderr]
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert [reply["id"] for reply in replies if reply.get("status", 503) != 503] == []
    assert len(replies) == 100
    answered = sum("subnet" in reply for reply in replies)
    assert lines[-1]["event"] == "stopped"
    assert lines[-1]["arrivals"] == lines[-1]["in_time"] == answered > 0


# ----------------------------------------------------------------------------------------------------------- handshake


async def test_a_plain_request_is_told_how_to_connect(config: Config) -> None:
    async with running(config) as server:
        response = await server.client.get("/stream")
        assert (response.status, (await response.json())["reason"]) == (400, "bad_request")
        assert "ws://HOST:PORT/stream" in (await response.json())["error"]
        assert (await server.client.post("/stream")).status == 405


async def test_messages_are_not_compressed_unless_somebody_shows_a_gain(config: Config) -> None:
    async with running(config) as server, server.client.ws_connect("/stream", compress=15) as socket:
        assert socket.compress == 0
        assert (await ask(socket, packed(id=1)))["id"] == 1


# -------------------------------------------------------------------------------------------------------------- fuzzing

HEADERS = st.dictionaries(
    st.sampled_from([*sorted(FIELDS), "other"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.lists(st.integers(-2, 9), max_size=4) | st.sampled_from(["uint8", "float32", "image/png"]),
)  # fmt: skip
LIMITS = Limits(default_slo_s=0.1, longest_slo_s=1.0, accuracies={"small": 0.7, "large": 0.9}, classes=5)


def refusal(read: Callable[[], object]) -> str | None:
    """Why reading failed; None if it did not."""
    try:
        read()
    except BadRequest as error:
        return str(error)
    return None


@given(st.binary(max_size=200) | st.binary(max_size=99).map(raw))
def test_any_bytes_are_split_or_refused_with_a_reason(data: bytes) -> None:
    assert refusal(lambda: split_message(data)) != ""


@given(HEADERS, st.binary(max_size=9))
def test_any_header_is_read_or_refused_with_a_reason(header: dict[str, Any], payload: bytes) -> None:
    message = split_message(packed(payload, **header))
    assert message.payload == payload
    for read in (lambda: message.id, lambda: message.parameters(LIMITS), message.content_type, message.tensor):
        assert refusal(read) != ""


@given(st.text() | st.integers(-(10**4000), 10**4000), st.binary(max_size=64))
def test_what_was_packed_is_unpacked(message_id: str | int, payload: bytes) -> None:
    message = split_message(packed(payload, id=message_id))
    assert (message.id, message.payload) == (message_id, payload)


# ----------------------------------------------------------------------------------------------------------- the client


async def test_the_client_predicts_by_http_and_by_stream(config: Config) -> None:
    async with running(config, real=True) as server, Client(server.url) as client:
        posted = await client.predict(image_file("JPEG"), slo_ms=20_000, top_k=2)
        async with client.stream() as stream:
            streamed = await stream.predict(image_file("JPEG"), slo_ms=20_000, top_k=2)
            raw_reply = await stream.predict(PIXELS, dtype="uint8", shape=(8, 8, 3))
    assert posted.predictions == streamed.predictions
    assert (len(posted.predictions), posted.subnet, posted.slo_ms) == (2, LARGE, 20_000)
    assert raw_reply.deadline_met


async def test_the_client_keeps_many_in_flight_and_gives_each_its_own_reply(narrow: Config) -> None:
    async with running(narrow) as server, Client(server.url) as client, client.stream(in_flight=3) as stream:
        queries = (stream.predict(PIXELS, slo_ms=10_000 + number) for number in range(50))
        assert [reply.slo_ms for reply in await asyncio.gather(*queries)] == [10_000 + number for number in range(50)]
        assert server.counters == {"arrivals": 50, "in_time": 50}


async def test_the_client_raises_what_the_server_refuses(config: Config) -> None:
    async with running(config) as server, Client(server.url) as client, client.stream() as stream:
        for predict in (client.predict, stream.predict):
            with pytest.raises(ServerError, match="cannot be met") as failed:
                await predict(PIXELS, slo_ms=0.01)  # type: ignore[operator]
            assert (failed.value.status, failed.value.reason) == (504, "deadline")
            assert failed.value.details.keys() == {"slo_ms", "predicted_ms", "queue_depth"}


async def test_the_client_is_told_when_the_stream_ends_before_its_answer(narrow: Config) -> None:
    async with running(narrow, gated=True) as server, Client(server.url) as client, client.stream() as stream:
        asking = asyncio.create_task(stream.predict(PIXELS))
        await turns_until(lambda: server.engine.batches)
        await stream._socket.close()
        with pytest.raises(ConnectionClosed):
            await asking
        with pytest.raises(ConnectionClosed):
            await stream.predict(PIXELS)


async def test_the_client_must_be_entered() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Client().predict(b"")
