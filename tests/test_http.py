"""The server over real sockets: what clients send, what they get, and how the process starts and stops."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import aiohttp
import numpy as np
import pytest
import serving
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from serving import (
    LARGE,
    ROOT,
    SMALL,
    FakeEngine,
    Process,
    config_of,
    fake_engine,
    image_array,
    image_file,
    process,
    turns_until,
)

import superserve
from config import Config
from superserve import SERVE, SuperServe, make_app
from web.errors import json_errors

Client = TestClient[web.Request, web.Application]

PIXELS = image_array(0)
PLANES = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
BODY_LIMIT = 300_000
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def config(profile: Path) -> Config:
    return config_of(profile, max_body_bytes=BODY_LIMIT)


@dataclass
class Running:
    """A server that listens, and a client of it."""

    client: Client
    serve: SuperServe

    @property
    def counters(self) -> Counter[str]:
        assert self.serve.dispatcher is not None
        return self.serve.dispatcher.counters


@asynccontextmanager
async def listening(app: web.Application, serve: SuperServe) -> AsyncIterator[Running]:
    complaints: list[dict[str, Any]] = []
    async with TestClient(TestServer(app)) as client:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        yield Running(client, serve)
    assert not complaints


@asynccontextmanager
async def serving_app(config: Config) -> AsyncIterator[Running]:
    app = make_app(config)
    async with listening(app, app[SERVE]) as running:
        await app[SERVE].start_soon()
        yield running


@asynccontextmanager
async def faking(config: Config) -> AsyncIterator[tuple[Running, FakeEngine, asyncio.Event]]:
    """A server whose batches wait for an event."""
    app = make_app(config)
    gate = asyncio.Event()
    engine = fake_engine(app[SERVE], gate=gate)
    async with listening(app, app[SERVE]) as running:
        await app[SERVE].start_soon()
        try:
            yield running, engine, gate
        finally:
            gate.set()


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, dict[str, Any]]:
    """Status and document of an error, which has error and reason."""
    assert response.content_type == "application/json"
    document = await response.json()
    assert document["error"]
    assert document["reason"]
    return response.status, document


# --------------------------------------------------------------------------------------------------------- good inputs

GOOD = {
    "JPEG": (image_file("JPEG"), "image/jpeg"),
    "PNG": (image_file("PNG"), "image/png"),
    "large PNG": (image_file("PNG", (600, 500)), "image/png"),
    "image of another type than it says": (image_file("PNG"), "image/jpeg"),
    "JPEG from curl": (image_file("JPEG"), "application/x-www-form-urlencoded"),
    "untyped JPEG": (image_file("JPEG"), "application/octet-stream"),
    "raw uint8": (PIXELS.tobytes(), "application/octet-stream"),
    "raw uint8 from curl": (PIXELS.tobytes(), "application/x-www-form-urlencoded"),
    "raw float32": (PLANES.tobytes(), "application/octet-stream"),
    "JSON pixels": (json.dumps({"inputs": PIXELS.tolist()}).encode(), "application/json"),
    "JSON planes": (json.dumps({"inputs": PLANES.tolist()}).encode(), "application/json; charset=utf-8"),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_good_input_is_answered_in_full(config: Config, name: str) -> None:
    body, content_type = GOOD[name]
    async with serving_app(config) as running:
        response = await running.client.post("/predict", data=body, headers={"Content-Type": content_type})
        document = await response.json()
    assert response.status == 200, document
    assert response.content_type == "application/json"
    (best,) = document.pop("predictions")
    assert (best.keys(), best["label"]) == ({"label", "index", "probability"}, serving.CLASSES[best["index"]])
    latency_ms, queue_ms = document.pop("latency_ms"), document.pop("queue_ms")
    assert 0 < queue_ms < latency_ms
    expected = {"subnet": LARGE, "accuracy": 0.9, "batch_size": 1, "slo_ms": serving.PATIENT_MS, "deadline_met": True}
    assert document == expected


async def test_all_forms_of_one_input_get_the_same_answer(config: Config) -> None:
    async with serving_app(config) as running:
        answers = [
            await (await running.client.post("/predict?top_k=5", data=body, headers={"Content-Type": kind})).json()
            for body, kind in (GOOD["raw uint8"], GOOD["JSON pixels"])
        ]
    assert answers[0]["predictions"] == answers[1]["predictions"]
    assert len(answers[0]["predictions"]) == 5


async def test_one_connection_serves_many_requests(config: Config) -> None:
    async with serving_app(config) as running:
        for _ in range(5):
            assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200
            assert (await running.client.post("/predict", data=b"x")).status == 400
        assert running.counters == {"arrivals": 5, "in_time": 5}


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("query", "headers", "slo_ms"),
    [
        ("", {}, 30_000),
        ("?slo_ms=20000", {}, 20_000),
        ("", {"X-SLO-Ms": "21000"}, 21_000),
        ("", {"x-slo-ms": "21000", "x-envoy-expected-rq-timeout-ms": "22000"}, 21_000),
        ("", {"x-envoy-expected-rq-timeout-ms": "22000"}, 22_000),
        ("?slo_ms=20000", {"X-SLO-Ms": "21000", "x-envoy-expected-rq-timeout-ms": "22000"}, 20_000),
    ],
)
async def test_the_slo_comes_from_the_query_string_the_header_envoy_or_the_default(
    config: Config, query: str, headers: dict[str, str], slo_ms: float
) -> None:
    async with serving_app(config) as running:
        response = await running.client.post(f"/predict{query}", data=PIXELS.tobytes(), headers=headers)
        assert (await response.json())["slo_ms"] == slo_ms


async def test_all_parameters_work_in_either_form(config: Config) -> None:
    async with serving_app(config) as running:
        by_query = "/predict?top_k=3&min_accuracy=0.8&priority=5&slo_ms=30000"
        by_header = {"X-Top-K": "3", "X-Min-Accuracy": "0.8", "X-Priority": "5", "X-SLO-Ms": "30000"}
        for path, headers in ((by_query, {}), ("/predict", by_header)):
            document = await (await running.client.post(path, data=PIXELS.tobytes(), headers=headers)).json()
            assert (len(document["predictions"]), document["subnet"]) == (3, LARGE)


# ----------------------------------------------------------------------------------------------------------- bad input


def bomb() -> bytes:
    """A PNG of 100 megapixels in few bytes."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1251 * 10_000), 9)
    chunks = (head, data, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


JSON = {"Content-Type": "application/json"}
BAD: dict[str, tuple[str, str, bytes, dict[str, str], int, str]] = {
    # name: method, path, body, headers, status, what the error names
    "not an image": ("POST", "/predict", b"hello", {"Content-Type": "image/jpeg"}, 400, "cannot be decoded"),
    "truncated JPEG": ("POST", "/predict", image_file("JPEG")[:400], {}, 400, "cannot be decoded"),
    "bomb": ("POST", "/predict", bomb(), {"Content-Type": "image/png"}, 413, "10000x10000|100000000 pixels"),
    "tensor too short": ("POST", "/predict", bytes(191), RAW, 400, "191 bytes .* expected 192"),
    "tensor too long": ("POST", "/predict", bytes(769), RAW, 400, "769 bytes"),
    "tensor with NaN": ("POST", "/predict", np.full(192, np.nan, "<f4").tobytes(), RAW, 400, "not finite"),
    "slo NaN": ("POST", "/predict?slo_ms=nan", PIXELS.tobytes(), RAW, 400, "slo_ms must be between"),
    "slo infinite": ("POST", "/predict?slo_ms=inf", PIXELS.tobytes(), RAW, 400, "slo_ms must be between"),
    "slo zero": ("POST", "/predict?slo_ms=0", PIXELS.tobytes(), RAW, 400, "slo_ms must be above 0"),
    "slo negative": ("POST", "/predict?slo_ms=-5", PIXELS.tobytes(), RAW, 400, "slo_ms must be between"),
    "slo absurd": ("POST", "/predict?slo_ms=1e12", PIXELS.tobytes(), RAW, 400, "between 0 and 60000, not 1e12"),
    "slo empty": ("POST", "/predict?slo_ms=", PIXELS.tobytes(), RAW, 400, "slo_ms must be a number"),
    "slo in a header": ("POST", "/predict", PIXELS.tobytes(), RAW | {"X-SLO-Ms": "soon"}, 400, "not 'soon'"),
    "slo that cannot be met": ("POST", "/predict?slo_ms=0.5", PIXELS.tobytes(), RAW, 504, "cannot be met"),
    "unknown parameter": ("POST", "/predict?slo=5", PIXELS.tobytes(), RAW, 400, "'slo'; known: members"),
    "floor too high": ("POST", "/predict?min_accuracy=0.95", PIXELS.tobytes(), RAW, 400, "min_accuracy 0.95"),
    "empty body": ("POST", "/predict", b"", {}, 400, "empty body"),
    "damaged gzip": ("POST", "/predict", b"no gzip", RAW | {"Content-Encoding": "gzip"}, 400, "cannot be read: .*gzip"),
    "unknown encoding": ("POST", "/predict", b"x", RAW | {"Content-Encoding": "br"}, 501, "'br' .* known: gzip, defl"),
    "body too large": ("POST", "/predict", bytes(BODY_LIMIT + 1), RAW, 413, "larger than"),
    "not JSON": ("POST", "/predict", b"{", JSON, 400, "not JSON"),
    "deep JSON": ("POST", "/predict", b"[" * 1300, JSON, 400, "not JSON"),
    "much JSON": ("POST", "/predict", b"[" * 100_000, JSON, 413, "100000 bytes of JSON; at most 71680 are read"),
    "tensor absurd": ("POST", "/predict", np.full(192, 1e30, "<f4").tobytes(), RAW, 400, "from -1000 to 1000"),
    "JSON of another shape": ("POST", "/predict", b'{"inputs": [1]}', JSON, 400, r"shape \(1,\)"),
    "a form": ("POST", "/predict", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "3 bytes"),
    "text": ("POST", "/predict", b"cat", {"Content-Type": "text/plain"}, 415, "text/plain"),
    "wrong method": ("GET", "/predict", b"", {}, 405, "GET is not allowed for /predict; allowed: POST"),
    "other method": ("DELETE", "/readyz", b"", {}, 405, "allowed: GET,HEAD"),
    "options": ("OPTIONS", "/predict", b"", {}, 405, "OPTIONS"),
    "unknown route": ("POST", "/classify", b"", {}, 404, "no route /classify; known: /, /healthz,"),
    "route below another": ("GET", "/predict/cat", b"", {}, 404, "no route /predict/cat"),
}
REASONS = {
    400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type",
    501: "unsupported_encoding", 504: "deadline",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_named_and_harms_no_query_beside_it(config: Config, name: str) -> None:
    method, path, body, headers, status, named = BAD[name]
    async with faking(config) as (running, engine, gate):
        beside = asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes()))
        await turns_until(lambda: engine.batches)
        response = await running.client.request(method, path, data=body or None, headers=headers)
        found, document = await error_of(response)
        assert (found, document["reason"]) == (status, REASONS[status])
        assert re.search(named, document["error"])
        gate.set()
        assert (await beside).status == 200
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(64 * 1024)


async def test_a_chunked_body_is_limited_too(config: Config) -> None:
    async with serving_app(config) as running:
        response = await running.client.post("/predict", data=chunks(16), headers=RAW)
        status, document = await error_of(response)
        assert (status, document["reason"]) == (413, "too_large")
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200


async def test_multipart_is_told_what_is_read(config: Config) -> None:
    form = aiohttp.FormData()
    form.add_field("image", image_file("JPEG"), filename="cat.jpg", content_type="image/jpeg")
    async with serving_app(config) as running:
        status, document = await error_of(await running.client.post("/predict", data=form))
    assert (status, document["reason"]) == (415, "unsupported_media_type")
    assert "'multipart/form-data' is not read here; send image/*" in document["error"]


async def test_a_wrong_method_is_told_the_right_ones_in_the_header_too(config: Config) -> None:
    async with serving_app(config) as running:
        assert (await running.client.get("/predict")).headers["Allow"] == "POST"
        head = await running.client.head("/predict")
        assert (head.status, await head.read()) == (405, b"")


async def test_a_deadline_that_cannot_be_met_is_told_with_the_figures(config: Config) -> None:
    async with serving_app(config) as running:
        _, document = await error_of(await running.client.post("/predict?slo_ms=1", data=PIXELS.tobytes()))
    assert document["slo_ms"] == 1
    assert document["predicted_ms"] > 1
    assert document["queue_depth"] == 0


async def test_a_query_that_waits_too_long_gets_504_at_its_deadline(config: Config) -> None:
    async with faking(config) as (running, engine, gate):
        beside = asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes()))
        await turns_until(lambda: engine.batches)
        response = await running.client.post("/predict?slo_ms=40", data=PIXELS.tobytes())
        status, document = await error_of(response)
        assert (status, document["slo_ms"], document["predicted_ms"]) == (504, 40, None)
        gate.set()
        assert (await beside).status == 200
        assert running.counters == {"arrivals": 2, "expired": 1, "in_time": 1}


async def test_a_full_queue_gets_429_and_when_to_retry(profile: Path) -> None:
    async with faking(config_of(profile, max_queue=1)) as (running, engine, gate):
        tasks = [asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes()))]
        await turns_until(lambda: engine.batches)
        tasks.append(asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes())))
        await turns_until(lambda: running.counters["arrivals"] == 2)
        response = await running.client.post("/predict", data=PIXELS.tobytes())
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        assert (await error_of(response))[1]["reason"] == "queue_full"
        gate.set()
        assert [response.status for response in await asyncio.gather(*tasks)] == [200, 200]


async def test_a_failed_batch_is_a_500_without_a_cause_for_strangers(config: Config) -> None:
    async with faking(config) as (running, engine, gate):
        gate.set()
        engine.failure = RuntimeError("secret")
        response = await running.client.post("/predict", data=PIXELS.tobytes())
        status, document = await error_of(response)
        assert (status, document["reason"]) == (500, "engine_failed")
        assert "secret" not in await response.text()
        engine.failure = None
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200


# ------------------------------------------------------------------------------------------------------ the connection


def plain_request(path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


async def test_a_client_that_disconnects_while_queued_frees_its_place(config: Config) -> None:
    async with faking(config) as (running, engine, gate):
        beside = asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes()))
        await turns_until(lambda: engine.batches)
        dispatcher = running.serve.dispatcher
        assert dispatcher is not None
        _, writer = await asyncio.open_connection(running.client.host, running.client.port)
        writer.write(plain_request("/predict", PIXELS.tobytes()))
        await turns_until(lambda: len(dispatcher.heap) == 1)
        writer.close()
        await writer.wait_closed()
        await turns_until(lambda: not dispatcher.heap)
        gate.set()
        assert (await beside).status == 200
        assert running.counters == {"arrivals": 2, "cancelled": 1, "in_time": 1}


async def test_a_client_that_disconnects_during_its_upload_is_no_query(config: Config) -> None:
    async with serving_app(config) as running:
        reader, writer = await asyncio.open_connection(running.client.host, running.client.port)
        writer.write(plain_request("/predict", b"half", length=192))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await reader.read() == b""
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200
        assert running.counters == {"arrivals": 1, "in_time": 1}


async def test_what_is_no_http_harms_nobody(config: Config) -> None:
    async with serving_app(config) as running:
        for noise in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /predict HTTP/9.9\r\n\r\n"):
            _, writer = await asyncio.open_connection(running.client.host, running.client.port)
            writer.write(noise)
            writer.close()
            await writer.wait_closed()
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200


# ------------------------------------------------------------------------------------------------------- other routes


async def test_alive_ready_and_profile(config: Config) -> None:
    async with serving_app(config) as running:
        assert await (await running.client.get("/healthz")).json() == {"status": "alive"}
        assert await (await running.client.get("/readyz")).json() == {"status": "ready"}
        document = await (await running.client.get("/profile")).json()
        assert [entry["name"] for entry in document["entries"]] == [SMALL, LARGE]
        assert document["batch_sizes"] == list(serving.SIZES)
        assert document["device"]["kind"] == "cpu"
        for path in ("/healthz", "/readyz", "/profile"):
            response = await running.client.head(path)
            assert (response.status, await response.read()) == (200, b"")


async def test_before_it_is_ready_a_server_is_alive_and_says_when_to_retry(config: Config) -> None:
    app = make_app(config)
    engine, gate = fake_engine(app[SERVE]), asyncio.Event()

    async def warm_up(*_: object) -> None:
        await gate.wait()

    engine.warm_up = warm_up  # type: ignore[method-assign]
    async with listening(app, app[SERVE]) as running:
        assert (await running.client.get("/healthz")).status == 200
        for response in (
            await running.client.get("/readyz"),
            await running.client.get("/profile"),
            await running.client.post("/predict", data=PIXELS.tobytes()),
        ):
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert (await error_of(response))[1] == {"error": "starting", "reason": "not_ready"}
        gate.set()
        await app[SERVE].start_soon()
        assert (await running.client.get("/readyz")).status == 200
        assert (await running.client.post("/predict", data=PIXELS.tobytes())).status == 200


async def test_a_start_that_fails_in_the_background_is_logged_and_told(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(config)
    engine = fake_engine(app[SERVE])

    async def warm_up(*_: object) -> None:
        raise MemoryError("too large for this device")

    engine.warm_up = warm_up  # type: ignore[method-assign]
    async with listening(app, app[SERVE]) as running:
        await turns_until(lambda: caplog.records)
        response = await running.client.get("/readyz")
        assert (await error_of(response))[1]["error"] == "the start failed; the log says why"
    assert caplog.records[0].getMessage() == "start failed"
    assert caplog.records[0].fields == {"error": "MemoryError: too large for this device"}  # type: ignore[attr-defined]


async def test_while_draining_readiness_falls_first_and_accepted_queries_are_answered(config: Config) -> None:
    async with faking(config) as (running, engine, gate):
        tasks = [asyncio.create_task(running.client.post("/predict", data=PIXELS.tobytes())) for _ in range(5)]
        await turns_until(lambda: running.counters["arrivals"] == 5)
        closing = asyncio.create_task(running.serve.close())
        for method, path in (("GET", "/readyz"), ("POST", "/predict")):
            response = await running.client.request(method, path, data=PIXELS.tobytes())
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert (await error_of(response))[1]["error"] == "draining"
        assert (await running.client.get("/healthz")).status == 200
        gate.set()
        assert [response.status for response in await asyncio.gather(*tasks)] == [200] * 5
        await closing
        assert engine.closed
        assert running.counters == {"arrivals": 5, "in_time": 5}


# ------------------------------------------------------------------------------------------------------------- mounted


@asynccontextmanager
async def mounted(config: Config) -> AsyncIterator[Running]:
    parent, app = web.Application(), make_app(config)
    parent.add_subapp("/vision", app)
    async with listening(parent, app[SERVE]) as running:
        await app[SERVE].start_soon()
        yield running


async def test_the_application_can_be_mounted_in_another(config: Config) -> None:
    async with mounted(config) as running:
        assert (await running.client.post("/vision/predict", data=PIXELS.tobytes())).status == 200
        assert (await running.client.get("/vision/readyz")).status == 200
        _, document = await error_of(await running.client.get("/vision/predict"))
        assert document["error"] == "GET is not allowed for /vision/predict; allowed: POST"
        _, document = await error_of(await running.client.get("/vision/nothing"))
        assert "known: /vision/, /vision/healthz, " in document["error"]
        status, _ = await error_of(await running.client.post("/vision/predict", data=b"x"))
        assert status == 400
        assert (await running.client.post("/predict")).status == 404


@pytest.mark.parametrize("limit", [100_000, 3_000_000])
async def test_the_body_limit_holds_in_another_application_too(profile: Path, limit: int) -> None:
    async with mounted(config_of(profile, max_body_bytes=limit)) as running:
        for size, expected in ((limit + 1, 413), (limit, 400)):
            body = io.BytesIO(bytes(size))
            status, _ = await error_of(await running.client.post("/vision/predict", data=body, headers=RAW))
            assert status == expected


# --------------------------------------------------------------------------------------------------------- the process


@pytest.fixture
def own(profile: Path, tmp_path: Path) -> Path:
    """A copy of the profile, to be changed."""
    return Path(shutil.copytree(profile, tmp_path / "own"))


@pytest.fixture
def restored() -> Iterator[None]:
    """Undoes what the command does to its process."""
    interval_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval_s)
    torch.set_grad_enabled(True)


def stopped_with(folder: Path, *arguments: str) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as exit:
        superserve.main(["--profile", str(folder), "--device", "cpu", "--threads", "1", "--port", "0", *arguments])
    assert isinstance(exit.value.code, str)
    assert "\n" not in exit.value.code
    return exit.value.code


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def table_of(folder: Path) -> Path:
    (path,) = folder.glob("latency-*.json")
    return path


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"supernet\.json: .*No such file"),
    "cut supernet.json": (lambda own: (own / "supernet.json").write_text('{"schema": 1,'), r"supernet\.json: "),
    "no classes": (
        lambda own: rewrite(own / "supernet.json", lambda it: it.pop("classes")),
        r"supernet\.json: .*classes",
    ),
    "another schema": (
        lambda own: rewrite(own / "supernet.json", lambda it: it.update(schema=2)),
        r"supernet\.json: schema",
    ),
    "unknown family": (
        lambda own: rewrite(own / "supernet.json", lambda it: it.update(family="x")),
        r"supernet\.json: .*'x'",
    ),
    "cut weights": (lambda own: os.truncate(own / "weights.npz", 700), r"weights\.npz: "),
    "cut statistics": (lambda own: os.truncate(own / "norms.npz", 200), r"norms\.npz: "),
    "no choices": (lambda own: (own / "choices.json").unlink(), r"choices\.json: cannot be read"),
    "choice without accuracy": (
        lambda own: rewrite(own / "choices.json", lambda it: it["choices"][1].pop("accuracy")),
        r"choices\.json: choices\[1\].*accuracy",
    ),
    "latency that is no number": (
        lambda own: rewrite(table_of(own), lambda it: it["latencies"][SMALL].update(p99_ms=[float("nan")] * 5)),
        rf"latency-cpu-.*\.json: latencies\.{SMALL}\.p99_ms: .*nan",
    ),
    "latency missing": (
        lambda own: rewrite(table_of(own), lambda it: it["latencies"].pop(LARGE)),
        rf"latency-cpu-.*\.json: latencies\.{LARGE}: missing",
    ),
}


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_profile_stops_the_start_with_a_line_that_names_file_and_field(own: Path, name: str) -> None:
    damage, named = DAMAGE[name]
    damage(own)
    assert re.search(named, stopped_with(own))


@pytest.mark.usefixtures("restored")
def test_without_a_table_no_autoprofile_stops_the_start_with_a_line(own: Path) -> None:
    table_of(own).unlink()
    line = stopped_with(own, "--no-autoprofile")
    assert re.search(r"latency-cpu-.*\.json: no latency table .*; start without --no-autoprofile to measure one", line)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("flag", "value", "named"), [("--policy", "random", "no policy"), ("--device", "tpu", "'tpu'")]
)
def test_settings_that_do_not_fit_stop_the_start_with_a_line(profile: Path, flag: str, value: str, named: str) -> None:
    assert named in stopped_with(profile, flag, value)


@pytest.mark.usefixtures("restored")
def test_a_port_in_use_stops_the_start_with_a_line(profile: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert re.search(rf"{port}.*in use", stopped_with(profile, "--port", str(port)))


@pytest.mark.slow
def test_the_command_serves_and_ends_with_0(profile: Path) -> None:
    with process(profile) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+", server.url)
        with urlopen(Request(f"{server.url}/predict?slo_ms=30000", data=image_file("JPEG"))) as response:
            assert json.load(response)["deadline_met"] is True
        server.popen.send_signal(signal.SIGINT)
        counters = server.wait_for("stopped")
        assert server.popen.wait(30) == 0
    assert (counters["arrivals"], counters["in_time"]) == (1, 1)
    assert server.named() == ["listening", "ready", "draining", "stopped"]


@pytest.mark.slow
async def test_sigterm_under_load_answers_every_accepted_query(profile: Path) -> None:
    with process(profile) as server:
        statuses: Counter[int] = Counter()

        async def client(session: aiohttp.ClientSession) -> None:
            while True:
                try:
                    async with session.post(f"{server.url}/predict", data=PIXELS.tobytes()) as response:
                        document = await response.json()
                except aiohttp.ClientConnectionError:
                    return  # the server is gone, or closed this connection while it was idle
                statuses[response.status] += 1
                assert response.status == 200 or document["reason"] == "not_ready", document

        async with aiohttp.ClientSession() as session:
            clients = [asyncio.create_task(client(session)) for _ in range(50)]
            await turns_until(lambda: statuses[200] > 200)
            server.popen.send_signal(signal.SIGTERM)
            await asyncio.gather(*clients)
        stopped = server.wait_for("stopped")
        assert server.popen.wait(30) == 0
    assert statuses.keys() <= {200, 503}
    assert stopped["in_time"] + stopped.get("late", 0) == stopped["arrivals"] == statuses[200]


@pytest.mark.slow
def test_the_command_measures_this_device_once(own: Path) -> None:
    table_of(own).unlink()
    for expected in (["listening", "profiling", "ready"], ["listening", "ready"]):
        with process(own) as server:
            assert sorted(server.named()) == sorted(expected)
            server.popen.send_signal(signal.SIGTERM)
            assert server.popen.wait(30) == 0


@pytest.mark.slow
def test_sigterm_while_profiling_ends_the_command_with_0(own: Path) -> None:
    table_of(own).unlink()
    command = [
        sys.executable,
        "superserve.py",
        "--profile",
        str(own),
        "--port",
        "0",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
        server = Process(popen)
        server.wait_for("listening")
        popen.send_signal(signal.SIGTERM)
        server.wait_for("stopped")
        assert popen.wait(30) == 0
    assert "ready" not in server.named()


@pytest.mark.slow
def test_a_damaged_profile_ends_the_command_with_one_line_and_1(own: Path) -> None:
    os.truncate(own / "weights.npz", 700)
    command = [sys.executable, "superserve.py", "--profile", str(own)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"superserve: .*weights\.npz: .*\n", ended.stderr)


async def test_an_unforeseen_error_is_told_as_json_and_logged_but_not_explained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(_: web.Request) -> web.Response:
        raise RuntimeError("a secret path")

    app = web.Application(middlewares=[json_errors])
    app.router.add_get("/broken", broken)
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/broken")
        text = await response.text()
    assert (response.status, response.content_type) == (500, "application/json")
    assert json.loads(text)["reason"] == "internal"
    assert "secret" not in text
    assert "a secret path" in caplog.text


async def test_an_upload_that_outlasts_its_slo_gets_504(config: Config) -> None:
    async with serving_app(config) as running:
        reader, writer = await asyncio.open_connection(running.client.host, running.client.port)
        writer.write(b"POST /predict?slo_ms=30 HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n\r\n" + bytes(100))
        status = await reader.readline()
        writer.close()
    assert status.split()[1] == b"504"
