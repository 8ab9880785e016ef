"""The lane answers what the handler would have answered, without aiohttp, and leaves to it what is not plain."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image
from serving import SIDE, SMALL, FakeEngine, config_of, fake_engine, image_array, listening_app, turns_until
from yarl import URL

from superserve import SERVE, Pending, make_app
from web.door import DOOR
from web.lane import LANE

PIXELS = image_array(0).tobytes()
PLANES = np.zeros((3, SIDE, SIDE), np.float32).tobytes()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_array(0)).save(file, "PNG")
    return file.getvalue()


def request(path: str = "/predict", *headers: str, body: bytes = PIXELS) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Place:
    """A server that listens, and what its lane did."""

    app: web.Application
    port: int
    engine: FakeEngine
    gate: asyncio.Event
    taken: list[object] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, sent: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
        reader, writer = await self.connect()
        writer.write(sent)
        answer = await answered(reader)
        writer.close()
        return answer

    @property
    def counters(self) -> dict[str, int]:
        dispatcher = self.app[SERVE].dispatcher
        assert dispatcher is not None
        return dict(dispatcher.counters)


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, document and headers of the next answer."""
    async with asyncio.timeout(30):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), json.loads(await reader.readexactly(int(headers["content-length"]))), headers


@asynccontextmanager
async def place(
    profile: Path, *, lane: bool = True, real: bool = False, held: bool = False, **settings: Any
) -> AsyncIterator[Place]:
    """A server whose engine is a fake unless it is to be ``real``; ``held``: batches wait for the gate."""
    config = config_of(profile, **settings)
    app = make_app(config)
    app[DOOR].keyed = not lane  # all is left to aiohttp where keys are wanted
    gate, engine = asyncio.Event(), FakeEngine(app[SERVE].clock, app[SERVE].engine.facts)
    if not real:
        engine = fake_engine(app[SERVE], gate=gate if held else None)
    async with listening_app(config, app) as url:
        port = URL(url).port
        assert port is not None
        found = Place(app, port, engine, gate)
        if lane:
            take = app[LANE].take

            def spied(head: bytes, body: bytes, traveller: Any) -> object:
                found.taken.append(take(head, body, traveller))
                return found.taken[-1]

            app[LANE].take = spied  # type: ignore[method-assign]
        yield found


PLAIN = {
    "pixels": request(),
    "pixels, typed": request("/predict", "Content-Type: application/octet-stream"),
    "a tensor": request(body=PLANES),
    "an image": request("/predict", "Content-Type: image/png", body=png()),
    "type in capitals": request("/predict", "Content-Type: IMAGE/PNG", body=png()),
    "json": request(
        "/predict", "content-type:application/json", body=json.dumps({"inputs": image_array(0).tolist()}).encode()
    ),
    "parameters": request("/predict?slo_ms=9000&top_k=3&min_accuracy=0.6&priority=4"),
    "headers": request("/predict", "X-SLO-Ms: 9000", "X-Top-K: 2", "X-Min-Accuracy: 0.6", "Accept: */*"),
    "a subnet": request("/predict", f"X-Members: {SMALL}"),
    "wrong size": request(body=b"123"),
    "no image": request("/predict", "Content-Type: image/jpeg", body=b"no image"),
    "broken json": request("/predict", "Content-Type: application/json", body=b"{"),
    "another type": request("/predict", "Content-Type: text/csv", body=b"1,2"),
    "not finite": request(body=np.full((3, SIDE, SIDE), np.nan, np.float32).tobytes()),
    "no body": request(body=b""),
    "no time": request("/predict?slo_ms=0.001"),
}
OTHER = {
    "many headers": request("/predict", *(f"X-{number}: 1" for number in range(200))),
    "a long header": request("/predict", "X-Long: " + "x" * 20_000),
    "two hosts": request("/predict", "Host: there"),
    "no host": request().replace(b"Host: here\r\n", b""),
    "two agents": request("/predict", "User-Agent: a", "User-Agent: b"),
    "a member in capitals": request("/predict", f"X-Members: {SMALL.upper()}"),
    "unknown parameter": request("/predict?speed=1"),
    "impossible parameter": request("/predict?slo_ms=0"),
    "a member": request("/predict?members=nobody"),
    "type with more": request("/predict", "Content-Type: image/png; q=1", body=png()),
    "two types": request("/predict", "Content-Type: image/png", "Content-Type: image/png", body=png()),
    "compressed": request("/predict", "Content-Encoding: gzip", body=b"\x1f\x8b"),
    "of a page": request("/predict", "Origin: http://elsewhere"),
    "large": request("/predict", "Content-Type: application/json", body=b"[" + b"1," * 20_000 + b"1]"),
    "another route": request("/nowhere"),
    "health": b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n",
}


UNSTEADY = ("latency_ms", "queue_ms", "queue_depth", "predicted_ms")


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in UNSTEADY}


def counted(where: Place) -> tuple[dict[str, int], list[str]]:
    """Queries by outcome, and responses by route and status."""
    lines = where.app[SERVE].metrics.text().decode().splitlines()
    return where.counters, sorted(line for line in lines if line.startswith("superserve_http_responses_total"))


def kept(headers: dict[str, str], status: int) -> dict[str, str]:
    """Of the headers, those that clients read."""
    found = {name: headers.get(name, "").partition(";")[0] for name in ("content-type", "retry-after")}
    return found | {"date": str("date" in headers or status != 200)}


@pytest.mark.slow
async def test_the_lane_answers_and_counts_as_the_handler_does(profile: Path) -> None:
    async with place(profile, real=True) as ours, place(profile, real=True, lane=False) as theirs:
        for name, sent in {**PLAIN, **OTHER}.items():
            ours.taken.clear()
            told = []
            for where in (ours, theirs):
                status, document, headers = await where.ask(sent)
                told.append((status, timeless(document), kept(headers, status)))
            assert told[0] == told[1], name
            assert any(each is not None for each in ours.taken) == (name in PLAIN), name
            assert counted(ours) == counted(theirs), name


async def test_a_connection_is_used_again_and_again_by_lane_and_handler_in_turn(profile: Path) -> None:
    async with place(profile) as where:
        reader, writer = await where.connect()
        for sent, status in [(request(), 200), (OTHER["health"], 200), (request(), 200), (request(body=b"1"), 400)] * 2:
            writer.write(sent)
            assert (await answered(reader))[0] == status
        assert sum(isinstance(each, Pending) for each in where.taken) == 4
        writer.close()


async def test_what_is_sent_before_the_answer_is_answered_after_it_and_in_order(profile: Path) -> None:
    async with place(profile, held=True) as where:
        reader, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.counters.get("arrivals"))
        writer.write(request("/predict?top_k=2"))
        writer.write(OTHER["health"] + request(body=b"1"))
        where.gate.set()
        answers = [await answered(reader) for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 400]
        assert [len(document.get("predictions", ())) for _, document, _ in answers] == [1, 2, 0, 0]
        writer.close()


async def test_a_client_that_leaves_frees_its_place(profile: Path) -> None:
    async with place(profile, held=True) as where:
        streams = [await where.connect() for _ in range(3)]
        for number, (_, writer) in enumerate(streams, start=1):
            writer.write(request())
            await turns_until(lambda: where.counters.get("arrivals") == number and where.engine.batches)  # noqa: B023
        streams[2][1].close()
        await turns_until(lambda: where.counters.get("cancelled") == 1)
        where.gate.set()
        for reader, writer in streams[:2]:
            assert (await answered(reader))[0] == 200
            writer.close()
        assert where.counters == {"arrivals": 3, "in_time": 2, "cancelled": 1}


async def test_a_client_that_sent_more_and_left_frees_its_place_too(profile: Path) -> None:
    async with place(profile, held=True) as where:
        _, first = await where.connect()
        first.write(request())
        await turns_until(lambda: where.engine.batches)
        _, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.counters.get("arrivals") == 2)
        writer.write(request()[:40])
        await writer.drain()
        writer.close()
        await turns_until(lambda: where.counters.get("cancelled") == 1)
        where.gate.set()
        await turns_until(lambda: where.counters.get("in_time") == 1)
        first.close()


async def test_what_goes_wrong_with_one_answer_keeps_the_others_from_none(profile: Path) -> None:
    async with place(profile, held=True) as where:
        lane = where.app[LANE]
        streams = [await where.connect() for _ in range(4)]
        for number, (_, writer) in enumerate(streams, start=1):
            writer.write(request())
            await turns_until(lambda: where.counters.get("arrivals") == number)  # noqa: B023
        connection = list(lane._travellers.values())[1]
        wrong: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context["exception"]))

        class Broken:
            def arrive(self, _: bytes) -> None:
                raise LookupError("broken")

        pending = next(each for each, traveller in lane._travellers.items() if traveller is connection)
        lane._travellers[pending] = Broken()
        where.gate.set()
        for number, (reader, writer) in enumerate(streams):
            if number != 1:
                assert (await answered(reader))[0] == 200
            writer.close()
        assert [type(each) for each in wrong] == [LookupError]
        assert not lane._travellers


async def test_a_batch_that_fails_is_told_and_a_server_that_drains_says_when_to_come_again(profile: Path) -> None:
    async with place(profile) as where:
        serve = where.app[SERVE]
        where.engine.failure = RuntimeError("broken")
        status, document, _ = await where.ask(request())
        assert (status, document["reason"]) == (500, "engine_failed")
        reader, writer = await where.connect()
        await serve.close()
        writer.write(request())
        status, document, headers = await answered(reader)
        assert (status, headers["retry-after"]) == (503, "1")
        writer.close()


async def test_a_query_under_way_is_answered_when_the_server_drains(profile: Path) -> None:
    async with place(profile, held=True) as where:
        reader, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.engine.batches)
        closing = asyncio.create_task(where.app[SERVE].close())
        await asyncio.sleep(0)
        where.gate.set()
        assert (await answered(reader))[0] == 200
        await closing
        writer.close()


async def test_queries_are_answered_where_the_application_is_cleaned_up_without_the_server_being_closed_before(
    profile: Path,
) -> None:
    async with place(profile, held=True) as where:
        streams = [await where.connect() for _ in range(3)]
        for number, (_, writer) in enumerate(streams, start=1):
            writer.write(request())
            await turns_until(lambda: where.counters.get("arrivals") == number)  # noqa: B023
        streams[0][1].close()
        asyncio.get_running_loop().call_later(0.2, where.gate.set)
    for reader, writer in streams[1:]:
        assert (await answered(reader))[0] == 200
        assert await reader.read() == b""
        writer.close()
    assert where.counters == {"arrivals": 3, "in_time": 2, "cancelled": 1}


@pytest.mark.slow
async def test_an_answer_for_which_the_server_drains_is_waited_for_longer_than_for_a_client_to_read(
    profile: Path,
) -> None:
    async with place(profile, held=True, body_timeout_s=0.1) as where:
        reader, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.engine.batches)
        asyncio.get_running_loop().call_later(0.5, where.gate.set)
    assert (await answered(reader))[0] == 200
    writer.close()


async def test_draining_the_lane_ends_in_time(profile: Path) -> None:
    async with place(profile, held=True, drain_timeout_s=0.05) as where:
        reader, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.engine.batches)
    assert await reader.read() == b""
    writer.close()


async def test_what_nobody_foresaw_is_left_to_the_handler_which_tells_and_logs_it(
    profile: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with place(profile) as where:

        def broken(*_: object) -> None:
            raise LookupError("a secret")

        where.app[SERVE].decode_inline = broken  # type: ignore[assignment, method-assign]
        status, document, _ = await where.ask(request())
    assert status == 500
    assert "secret" not in document["error"]
    assert "a request failed" in caplog.text


def test_there_is_no_lane_where_answers_tell_origins(profile: Path) -> None:
    assert LANE in make_app(config_of(profile))
    assert LANE not in make_app(config_of(profile, allow_origin="https://a.example"))


@pytest.mark.slow
async def test_a_connection_is_closed_when_idle_and_not_while_it_waits_for_its_answer(profile: Path) -> None:
    async with place(profile, idle_timeout_s=0.4, held=True) as where:
        loop = asyncio.get_running_loop()
        reader, writer = await where.connect()
        writer.write(request())
        await turns_until(lambda: where.engine.batches)
        loop.call_later(1.0, where.gate.set)
        assert (await answered(reader))[0] == 200
        since_s = loop.time()
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        assert 0.3 < loop.time() - since_s < 10
        writer.close()
