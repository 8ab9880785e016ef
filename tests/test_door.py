"""Refusals before aiohttp: which requests they are for, and that nobody can tell them from those of the handlers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serving import Clock, FakeEngine, config_of, fake_engine, image_array, listening_app, turns_until
from yarl import URL

from superserve import SERVE, SuperServe, make_app
from web.door import DOOR, LOOP_SHARE, Door, Visitor, head_of
from web.errors import NotReady, QueueFull, ServeError
from web.inputs import Limits, Parameters, parse_parameters

PIXELS = image_array(0).tobytes()
LIMITS = Limits(default_slo_s=0.1, longest_slo_s=60, accuracies={"small": 0.7, "large": 0.9}, classes=5)


def post(target: str = "/predict", *headers: str, body: bytes = PIXELS) -> bytes:
    lines = [f"POST {target} HTTP/1.1", "Host: here", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# ---------------------------------------------------------------------------------------------------- what is looked at


@pytest.mark.parametrize(
    "data",
    [
        post(), post(body=b""), post("/predict?slo_ms=5", "X-SLO-Ms: 3"), post("/elsewhere"),
        post("/predict", "Connection: keep-alive"), b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
)  # fmt: skip
def test_a_request_in_one_piece_is_whole(data: bytes) -> None:
    assert head_of(data)


@pytest.mark.parametrize(
    "data",
    [
        b"", post()[:-1], post() + b"G", post() + post(), post()[1:], PIXELS,
        post("/predict", "Content-Length: 192"), post("/predict", "Content-length : 192"),
        post("/predict", "Transfer-Encoding: chunked"), post("/predict", "transfer-encoding: identity"),
        post("/predict", "Connection: close"), post("/predict", "Expect: 100-continue"),
        post("/predict", "Upgrade: websocket"), post("/predict", "X-A: b", " folded: c"), post("/predict", "X-A: \x00"),
        post("/pre dict"), post().replace(b"HTTP/1.1", b"HTTP/1.0"), post().replace(b"\r\n", b"\n"),
        post().replace(b"Content-Length: ", b"Content-Length: +"), post().replace(b"POST", b"post"),
        b"POST /predict HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_not(data: bytes) -> None:
    assert not head_of(data)


@dataclass
class Host:
    """A server that refuses with the error there is, and remembers what it was asked."""

    error: ServeError | None = field(default_factory=lambda: QueueFull("full", retry_after_s=3))
    flooded: bool = True
    clock: Clock = field(default_factory=Clock)
    asked: list[Parameters] = field(default_factory=list)
    told: list[tuple[float, int, float]] = field(default_factory=list)
    counted: list[tuple[str, int]] = field(default_factory=list)

    def limits(self) -> Limits:
        return LIMITS

    def turn_away(self, arrival_s: float, parameters: Parameters, coming: int = 0, delay_s: float = 0.0) -> None:
        self.asked.append(parameters)
        self.told.append((arrival_s, coming, delay_s))
        if self.error is not None:
            raise self.error

    def count(self, route: str, status: int) -> None:
        self.counted.append((route, status))


def test_a_refusal_is_a_whole_answer_on_a_connection_that_stays_open() -> None:
    host = Host()
    answer = Door(host, host.count).answer(post(), "here")
    assert answer is not None
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 429 Too Many Requests", b"Retry-After: 3", b"Content-Type: application/json; charset=utf-8",
        b"Content-Length: " + str(len(body)).encode(),
    ]  # fmt: skip
    assert json.loads(body) == {"error": "full", "reason": "queue_full"}
    assert host.counted == [("/predict", 429)]


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/predict", {}), ("/predict?slo_ms=25", {}), ("/predict?slo_ms=25&top_k=2&priority=1&min_accuracy=0.5", {}),
        ("/predict", {"X-SLO-Ms": "12.5", "X-Priority": "7"}), ("/predict?slo_ms=5", {"X-SLO-Ms": "9"}),
        ("/predict", {"x-envoy-expected-rq-timeout-ms": "44"}),
    ],
)  # fmt: skip
def test_it_asks_for_what_the_handler_would_ask_for(target: str, headers: dict[str, str]) -> None:
    host = Host()
    request = post(target, *(f"{name}: {value}" for name, value in headers.items()))
    assert Door(host, host.count).answer(request, "here") is not None
    given = {name.title().replace("-Slo-", "-SLO-"): value for name, value in headers.items()}
    assert host.asked == [parse_parameters(dict(URL(target).query), given, LIMITS)]


@pytest.mark.parametrize(
    "data",
    [
        post("/predict?slo_ms=-1"), post("/predict?slo_ms=1&slo_ms=2"), post("/predict?slo_ms=%31"),
        post("/predict?a=1"), post("/predict?slo_ms=1.2.3"), post("/predicts"), post("/predict/"),
        post("/v2/models/tiny/infer"),
        post("/predict", "X-SLO-Ms: 1", "X-SLO-Ms: 2"), post("/predict", "X-SLO-Ms: soon"),
        post("/predict", "Origin: https://example.com"), b"GET /predict HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
)  # fmt: skip
def test_what_a_handler_is_to_judge_goes_on_to_it(data: bytes) -> None:
    host = Host()
    assert Door(host, host.count).answer(data, "here") is None
    assert (host.asked, host.counted) == ([], [])


@pytest.mark.parametrize("error", [None, NotReady("draining", retry_after_s=1)])
def test_who_is_not_refused_goes_on_uncounted(error: ServeError | None) -> None:
    host = Host(error)
    assert Door(host, host.count).answer(post(), "here") is None
    assert host.counted == []


def test_nobody_is_refused_here_without_a_flood() -> None:
    host = Host(flooded=False)
    door = Door(host, host.count)
    assert [door.answer(post(), connection) for connection in range(150)] == [None] * 150
    assert host.asked == []
    host.flooded = True
    assert door.answer(post(), 150) is not None
    assert host.told == [(100, 150, 0)], "those who came before are ahead all the same"


def test_those_let_in_are_ahead_until_they_are_in_the_queue_and_cost_the_time_that_it_took() -> None:
    host = Host(error=None)
    door = Door(host, host.count)
    for connection in ("a", "b", "c"):
        assert door.answer(post(), connection) is None
    assert host.told == [(100, 0, 0), (100, 1, 0), (100, 2, 0)]
    host.clock.now_s += 0.002
    assert (door.visitor("a"), door.visitor("b")) == (Visitor(100, accepted=True), Visitor(100, accepted=True))
    assert door.visitor("nobody") == Visitor(host.clock())
    door.leave("a")
    host.clock.now_s += 0.001
    door.leave("b")
    door.leave("nobody")
    assert door.answer(post(), "d") is None
    arrival_s, coming, delay_s = host.told[-1]
    assert (arrival_s, coming) == (host.clock(), 1)
    assert 0 < delay_s < 2 * 0.002 / LOOP_SHARE
    for connection in ("c", "d"):
        door.leave(connection)
    assert door.answer(post(), "e") is None
    assert host.told[-1][:2] == (host.clock(), 0), "all those who were let in are in the queue by now"


def test_more_heads_than_are_remembered_are_read_all_the_same() -> None:
    host = Host()
    door = Door(host, host.count)
    for number in range(1, 1000):
        request = post(f"/predict?slo_ms={number}", "X-Long: " + "x" * (2000 if number % 2 else 1))
        assert head_of(request)
        assert door.answer(request, "here") is not None
    assert [each.slo_s for each in host.asked] == [number / 1e3 for number in range(1, 1000)]
    assert len(door._known) <= 256


# ---------------------------------------------------------------------------------------------------- over real sockets


@dataclass
class Full:
    """A server in a flood, with one query running and one in its queue, which has no place for another."""

    serve: SuperServe
    engine: FakeEngine
    port: int
    gate: asyncio.Event

    @property
    def counters(self) -> dict[str, int]:
        assert self.serve.dispatcher is not None
        return dict(self.serve.dispatcher.counters)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, dict[str, Any]]:
    """Status and document of the answer to one request, or to the rest of one."""
    writer.write(request)
    async with asyncio.timeout(30):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].split("\r")[0])
        return int(head.split()[1]), json.loads(await reader.readexactly(length))


@asynccontextmanager
async def full(profile: Path, app_of: Any = make_app) -> AsyncIterator[Full]:
    config = config_of(profile, max_queue=1)
    app: web.Application = app_of(config)
    gate = asyncio.Event()
    engine = fake_engine(app[SERVE], gate=gate)
    async with listening_app(config, app) as url:
        port = URL(url).port
        assert port is not None
        found = Full(app[SERVE], engine, port, gate)
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        asking = []
        for number, stream in enumerate(streams, start=1):
            asking.append(asyncio.create_task(ask(*stream, post())))
            await turns_until(lambda: found.counters.get("arrivals") == number and engine.batches)  # noqa: B023
        assert found.serve.dispatcher is not None
        found.serve.dispatcher.refused_share = 1.0
        try:
            yield found
        finally:
            gate.set()
            assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]
            for _, writer in streams:
                writer.close()


def doorless(config: Any) -> web.Application:
    app = make_app(config)
    app[DOOR].keyed = True
    return app


def test_a_server_that_wants_keys_refuses_nobody_at_its_door(profile: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key-that-is-long-enough\n")
    assert not make_app(config_of(profile))[DOOR].keyed
    assert make_app(config_of(profile, api_key_file=tmp_path / "keys"))[DOOR].keyed


async def test_a_refusal_at_the_door_is_the_handlers_own_and_counts_the_same(profile: Path) -> None:
    told = []
    for app_of in (make_app, doorless):
        async with full(profile, app_of) as server:
            stream = await asyncio.open_connection("127.0.0.1", server.port)
            answers = [await ask(*stream, post(body=b"no image")) for _ in range(3)]
            text = server.serve.metrics.text().decode()
            line = next(line for line in text.splitlines() if 'route="/predict",status="429"' in line)
            told.append((answers, server.counters, line))
            stream[1].close()
    assert told[0] == told[1]
    answers, counters, line = told[0]
    assert answers == [(429, {"error": "the queue is full (1 queries)", "reason": "queue_full"})] * 3
    assert counters == {"arrivals": 5, "queue_full": 3}
    assert line.endswith(" 3.0")


async def test_a_connection_on_which_queries_were_refused_is_served_when_there_is_room(profile: Path) -> None:
    async with full(profile) as server:
        stream = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(*stream, post()))[0] == 429
        server.gate.set()
        await turns_until(lambda: server.counters.get("in_time") == 2)
        assert (await ask(*stream, post()))[0] == 200
        stream[1].close()


async def test_a_request_in_pieces_is_refused_by_the_handler_and_so_are_those_after_it(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def spy(data: bytes, most_bytes: int) -> bytes | None:
        seen.append(data)
        return head_of(data, most_bytes)

    async with full(profile) as server:
        monkeypatch.setattr("web.listen.head_of", spy)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        whole = post()
        writer.write(whole[:70])
        await turns_until(lambda: seen)
        assert (await ask(reader, writer, whole[70:]))[0] == 429
        assert (await ask(reader, writer, whole))[0] == 429
        assert seen == [whole[:70]], "nothing on this connection is looked at any more"
        assert server.counters["queue_full"] == 2
        writer.close()


async def test_nothing_is_decoded_that_is_refused(profile: Path) -> None:
    async with full(profile) as server:

        def decode(*_: object) -> None:
            raise AssertionError("decoded")

        server.serve.decode_inline = decode  # type: ignore[assignment, method-assign]
        stream = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(*stream, post("/predict", "Connection: keep-alive ")))[0] == 429
        whole = post("/predict", "Origin: http://here")  # for the handler
        assert (await ask(*stream, whole))[0] == 429
        assert (await ask(*stream, post("/v2/models/tiny/infer", body=b"{}")))[0] == 429
        stream[1].close()
        del server.serve.decode_inline
