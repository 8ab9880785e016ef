"""How fast the way through HTTP is, with an engine that answers at once: beside a bare aiohttp handler.

Only the server's own path is measured: connections, parsing, decoding, queueing, deciding, counting, answering. The
engine is a fake in this file, which computes nothing and gives every query the same probabilities at once, so that no
network is measured, nor what computing one beside it costs. The latency table is made up; SLOs are a second long. The
bare handler reads the same body, answers with a document like ours, and runs in the same process on the same loop.

The server is a process of its own on one processor, the client runs on another: wrk, one request at a time on each of
its connections, or an own client where wrk is not installed; for /stream a WebSocket client that sends frames made
beforehand, many in flight. All are measured in turn (A B C A B C), a slice each, and ratios are taken within a round:
medians of rounds. Beside replies a second stands the processor time of the server's process by reply, which busy
neighbours disturb less. Then /predict gets random arrivals at half of its measured rate; latencies count from the
scheduled instant, which the client's timer may miss by a millisecond. The last line of stdout is one JSON document.

    python scripts/bench_http.py
    python scripts/bench_http.py --seconds 3 --rounds 9 --json http.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop
from aiohttp import web
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

from priorities import switch_promptly  # noqa: E402 the path is set above
from scripts import workloads  # noqa: E402
from scripts.replay import Client, provenance  # noqa: E402
from wholefile import write_text  # noqa: E402

SLO_MS = 1000.0
BARS = {"predict of bare": 0.7, "stream of predict": 2.0}
P99_BAR_MS = 5.0
RAW = "application/octet-stream"
# What the bare handler answers: a document like those of /predict.
DOCUMENT = {
    "predictions": [{"label": "cat", "index": 3, "probability": 0.97}], "subnet": "d2-2-1-e0.5", "accuracy": 0.912,
    "batch_size": 8, "slo_ms": 1000.0, "latency_ms": 12.345, "queue_ms": 4.102, "deadline_met": True,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the server


class InstantEngine:
    """Has the whole batch at once: the same probabilities for each query. Nothing is computed."""

    lost = None

    def __init__(self, facts: Any, held: Any, classes: int, clock: Callable[[], float]) -> None:
        self.facts, self.held = facts, held
        self._clock = clock
        self._rows = np.tile(np.linspace(1, 0, classes, dtype=np.float32) / classes, (1024, 1))

    async def run(self, name: str, inputs: Sequence[NDArray[Any]], limit_s: float = math.inf) -> Any:
        """As Engine.run."""
        from engine import Outputs

        return Outputs(self._rows[: len(inputs)], self._clock())

    async def prepare(self, names: Sequence[str]) -> None:
        """Nothing is needed."""

    async def warm_up(self, names: Sequence[str], batch_sizes: Sequence[int], step: Callable[[], object]) -> None:
        """It is as fast as it gets."""

    def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the server process listens, and what it serves."""

    bare: str
    url: str
    model: str
    shape: tuple[int, int, int]


def serve(profile: Path, core: int | None, pipe: Pipe) -> None:
    """The server process: sends its Place, then its processor time whenever asked, until it is told None."""
    pin(core)
    switch_promptly()  # as the server does
    uvloop.run(_serve(profile, pipe))


async def _serve(profile: Path, pipe: Pipe) -> None:
    import startup  # with torch, which the client is to do without
    from config import Config
    from superserve import SERVE, make_app
    from web.listen import listening

    with tempfile.TemporaryDirectory() as tables:
        config = Config(profile=profile, table_dir=Path(tables), device="cpu", threads=1, default_slo_ms=SLO_MS)
        _store_table(config)
        app = make_app(config)
        server = app[SERVE]
        server.engine.close()
        server.engine = InstantEngine(server.engine.facts, server.engine.held, len(server.classes), server.clock)  # type: ignore[assignment]
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        bare = web.Application(client_max_size=config.max_body_bytes)
        bare.router.add_post("/bare", handle_bare)
        bare_runner = web.AppRunner(bare, handler_cancellation=True, access_log=None)
        await runner.setup()
        await bare_runner.setup()
        try:
            site = web.TCPSite(bare_runner, "127.0.0.1", 0)
            await site.start()
            async with listening(runner, "127.0.0.1", 0, startup.connection_limits(config)) as url:
                await server.start_soon()
                startup.settle_garbage()
                form = server.form.shape
                shape = (form.height, form.width, form.channels)
                port = bare_runner.addresses[0][1]
                pipe.send(Place(bare=f"http://127.0.0.1:{port}", url=url, model=server.name, shape=shape))
                await _until_told(pipe)
        finally:
            await bare_runner.cleanup()
            await runner.cleanup()


def _store_table(config: Any) -> None:
    """A table in which the more accurate choices are the slower ones, and large batches the more efficient."""
    import slackfit
    import startup
    from servable import load_servable

    choices = slackfit.load_choices(config.profile)
    engine = startup.start_engine(config, load_servable(config.profile))
    frontier = sorted((choice for choice in choices if choice.frontier), key=lambda choice: choice.accuracy)
    latencies = {}
    for rank, choice in enumerate(frontier):
        row = tuple(0.0005 * (1 + rank / 4) * (1 + size / 10) for size in startup.PROFILED_BATCH_SIZES)
        latencies[choice.name] = slackfit.Latencies(p50_s=row, p99_s=row)
    startup.TableFile.of(config, choices, engine).store(latencies)
    engine.close()


async def handle_bare(request: web.Request) -> web.Response:
    """What anybody would write who reads a body and answers with JSON."""
    await request.read()
    return web.json_response(DOCUMENT)


async def _until_told(pipe: Pipe) -> None:
    stop = asyncio.Event()

    def answer() -> None:
        if pipe.recv() is None:
            stop.set()
        else:
            pipe.send(time.process_time())

    asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
    await stop.wait()


class Server:
    """The server process, as its parent sees it."""

    def __init__(self, pipe: Pipe, place: Place) -> None:
        self._pipe, self.place = pipe, place

    def cpu_s(self) -> float:
        """Processor time that its process has taken."""
        self._pipe.send("cpu")
        taken_s: float = self._pipe.recv()
        return taken_s


@contextlib.contextmanager
def running(profile: Path, core: int | None) -> Iterator[Server]:
    """A server process until the block ends."""
    context = multiprocessing.get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=serve, args=(profile, core, its))
    process.start()
    its.close()  # so that a server that ends is noticed
    try:
        yield Server(pipe, pipe.recv())
    except EOFError:
        sys.exit("bench_http.py: the server ended; see above")
    finally:
        with contextlib.suppress(OSError):  # it has ended
            pipe.send(None)
        process.join(60)
        process.kill()


def pin(core: int | None) -> None:
    """Let this process, and those that it starts, run on one processor only; None: on any."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def two_cores() -> tuple[int | None, int | None]:
    """Processors for server and client; None where there is but one, or a process cannot be bound to one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


# --------------------------------------------------------------------------------------------------------- the clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request that is sent over and over."""

    url: str
    headers: dict[str, str]
    body: bytes

    def encode(self) -> bytes:
        """As it is sent."""
        url = urlsplit(self.url)
        lines = [f"POST {url.path} HTTP/1.1", f"Host: {url.netloc}", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


@dataclass(frozen=True, slots=True)
class Sent:
    """What a slice brought: good replies, and how long it lasted."""

    replies: int
    seconds: float


class BenchError(Exception):
    """Why there is no result, in one line."""


WRK_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
{headers}
done = function(summary)
  local failed = 0
  for _, count in pairs(summary.errors) do failed = failed + count end
  io.write(string.format('{{"replies": %d, "us": %d, "failed": %d}}\\n', summary.requests, summary.duration, failed))
end
"""


def flood_with_wrk(request: Request, connections: int, seconds: float) -> Sent:
    """As many requests as wrk gets through; whole seconds."""
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body"), Path(folder, "post.lua")
        body.write_bytes(request.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers.items())
        script.write_text(WRK_SCRIPT.format(body=body, headers=headers))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(script), request.url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    summary = json.loads(output.strip().splitlines()[-1])
    if summary["failed"]:
        raise BenchError(f"{request.url}: {summary['failed']} of {summary['replies']} requests failed")
    return Sent(summary["replies"], summary["us"] / 1e6)


class Flood(asyncio.Protocol):
    """One connection that always has a request under way; counts the replies."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._transport: Any = None
        self.replies = 0
        self.failure: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = transport
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Bytes of replies."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """A whole reply (httptools)."""
        if self._parser.get_status_code() != 200:
            self.failure = f"status {self._parser.get_status_code()}"
            return
        self.replies += 1
        self._transport.write(self._request)


HANDSHAKE = (
    "GET /stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
_TEXT = 0x81  # the first byte of a text message in one frame
# Part of every reply to a query that was answered.
_ANSWERED = b'"deadline_met"'


class StreamFlood(asyncio.Protocol):
    """One WebSocket with so many queries in flight; counts the replies. ``frames`` are sent in turn."""

    def __init__(self, handshake: bytes, frames: Sequence[bytes], in_flight: int) -> None:
        self._handshake, self._in_flight = handshake, in_flight
        self._frames = itertools.cycle(frames)
        self._opened = False
        self._received = b""
        self._transport: Any = None
        self.replies = 0
        self.failure: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for a WebSocket."""
        self._transport = transport
        self._transport.write(self._handshake)

    def data_received(self, data: bytes) -> None:
        """For each reply, send another query."""
        self._received += data
        if not self._opened:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if end:
                self._opened, self._received = True, rest
                if not head.startswith(b"HTTP/1.1 101 "):
                    self.failure = head.partition(b"\r\n")[0].decode(errors="replace")
                    return
                self._send(self._in_flight)
        found = self._take_replies() if self._opened else 0
        self.replies += found
        if found and self.failure is None:
            self._send(found)

    def _send(self, count: int) -> None:
        self._transport.write(b"".join(itertools.islice(self._frames, count)))

    def _take_replies(self) -> int:
        """Cut off all frames that are complete; how many of them are answers."""
        data, position, found = self._received, 0, 0
        while len(data) >= position + 4:  # the shortest reply is longer
            start, length = position + 2, data[position + 1]
            if length == 126:
                start, length = position + 4, int.from_bytes(data[position + 2 : position + 4], "big")
            if len(data) < start + length:
                break
            if data[position] == _TEXT:
                if data.find(_ANSWERED, start, start + length) < 0:
                    self.failure = data[start : start + length].decode(errors="replace")
                found += 1
            position = start + length
        self._received = data[position:]
        return found


def stream_frames(shape: tuple[int, int, int], payload: bytes, count: int, seed: int) -> list[bytes]:
    """Queries as a client's WebSocket frames, masked, each with an id of its own."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(count):
        header = json.dumps({"id": number, "dtype": "uint8", "shape": shape}).encode()
        message = np.frombuffer(struct.pack("<I", len(header)) + header + payload, np.uint8)
        mask = rng.integers(0, 256, 4, np.uint8)
        masked = message ^ np.resize(mask, len(message))
        frames.append(_frame_head(len(message)) + mask.tobytes() + masked.tobytes())
    return frames


def _frame_head(length: int) -> bytes:
    if length < 126:
        return struct.pack(">BB", 0x82, 0x80 | length)
    if length < 2**16:
        return struct.pack(">BBH", 0x82, 0x80 | 126, length)
    return struct.pack(">BBQ", 0x82, 0x80 | 127, length)


async def flood(make: Callable[[], Flood | StreamFlood], url: str, connections: int, seconds: float) -> Sent:
    """Replies of so many connections within so many seconds, from the moment on at which all are open."""
    loop, address = asyncio.get_running_loop(), urlsplit(url)
    opened = [await loop.create_connection(make, address.hostname, address.port) for _ in range(connections)]
    before, began_s = sum(protocol.replies for _, protocol in opened), time.perf_counter()
    await asyncio.sleep(seconds)
    replies, taken_s = sum(protocol.replies for _, protocol in opened) - before, time.perf_counter() - began_s
    for transport, protocol in opened:
        if protocol.failure is not None:
            raise BenchError(f"{url}: {protocol.failure}")
        transport.abort()
    return Sent(replies, taken_s)


# ---------------------------------------------------------------------------------------------------------- the rounds


@dataclass(frozen=True, slots=True)
class Slice:
    """One measurement."""

    per_s: float
    cpu_us: float


def requests(place: Place, seed: int) -> dict[str, Request]:
    """What is sent, by the name of the row: one random input, raw and as a JPEG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, place.shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG")
    raw, predict = {"Content-Type": RAW}, f"{place.url}/predict"
    header = json.dumps({
        "inputs": [{
            "name": "input", "datatype": "UINT8", "shape": [1, *place.shape],
            "parameters": {"binary_data_size": pixels.nbytes},
        }],
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    v2 = raw | {"Inference-Header-Content-Length": str(len(header))}
    return {
        "bare": Request(url=f"{place.bare}/bare", headers=raw, body=pixels.tobytes()),
        "predict": Request(url=predict, headers=raw, body=pixels.tobytes()),
        "predict JPEG": Request(url=predict, headers={"Content-Type": "image/jpeg"}, body=file.getvalue()),
        "v2": Request(url=f"{place.url}/v2/models/{place.model}/infer", headers=v2, body=header + pixels.tobytes()),
    }


def rows(place: Place, options: argparse.Namespace) -> dict[str, Callable[[float], Sent]]:
    """What is measured, by name: each sends for so many seconds."""
    with_wrk = options.client == "wrk"

    def http(request: Request) -> Callable[[float], Sent]:
        if with_wrk:
            return lambda seconds: flood_with_wrk(request, options.connections, seconds)
        encoded = request.encode()
        return lambda seconds: uvloop.run(flood(lambda: Flood(encoded), request.url, options.connections, seconds))

    found = requests(place, options.seed)
    frames = stream_frames(place.shape, found["predict"].body, options.in_flight, options.seed)
    handshake = HANDSHAKE.format(host=urlsplit(place.url).netloc).encode()

    def stream(seconds: float) -> Sent:
        return uvloop.run(flood(lambda: StreamFlood(handshake, frames, options.in_flight), place.url, 1, seconds))

    return {name: http(request) for name, request in found.items()} | {"stream": stream}


def measure(server: Server, send: Callable[[float], Sent], seconds: float) -> Slice:
    """One slice."""
    before_s = server.cpu_s()
    sent = send(seconds)
    if not sent.replies:
        raise BenchError("no reply within a slice; give it more --seconds")
    return Slice(sent.replies / sent.seconds, (server.cpu_s() - before_s) / sent.replies * 1e6)


def measure_rounds(server: Server, options: argparse.Namespace) -> dict[str, list[Slice]]:
    """All rows, one slice after the other, round by round; a first round warms up and is not counted."""
    senders = rows(server.place, options)
    slices: dict[str, list[Slice]] = {name: [] for name in senders}
    with tqdm(total=(options.rounds + 1) * len(senders), desc="bench", unit="slice", disable=None) as bar:
        for number in range(options.rounds + 1):
            for name, send in senders.items():
                bar.set_postfix_str(name, refresh=False)
                measured = measure(server, send, options.seconds)
                if number:
                    slices[name].append(measured)
                bar.update()
    return slices


def half_load(server: Server, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """/predict under random arrivals at this rate: percentiles of latency, medians of rounds, and all 99th."""
    request = requests(server.place, options.seed)["predict"]
    p50_ms, p99_ms, delay_ms, refused = [], [], [], 0
    for number in tqdm(range(options.rounds), desc="half load", unit="round", disable=None):
        arrivals = workloads.poisson(rate, max(0.2, options.seconds), options.seed + number)
        client = Client(urlsplit(request.url), [request.encode()] * len(arrivals), arrivals.tolist())
        uvloop.run(client.run(options.connections, 10.0))
        answered = np.array(client.status) == 200
        if not answered.any():
            raise BenchError(f"half load: none of {len(arrivals)} queries was answered")
        refused += int((~answered).sum())  # after a stall, the client opens more connections than are served
        due_s = (client.start_s + arrivals)[answered]
        late_ms = (np.array(client.sent_s)[answered] - due_s) * 1e3
        taken_ms = (np.array(client.done_s)[answered] - due_s) * 1e3
        p50_ms.append(float(np.percentile(taken_ms, 50)))
        p99_ms.append(float(np.percentile(taken_ms, 99)))
        delay_ms.append(float(np.percentile(late_ms, 99)))
    return {
        "rate": round(rate, 1),
        "p50_ms": round(statistics.median(p50_ms), 3),
        "p99_ms": round(statistics.median(p99_ms), 3),
        "send_delay_p99_ms": round(statistics.median(delay_ms), 3),
        "refused": refused,
        "p99_ms_by_round": [round(value, 3) for value in p99_ms],
    }


# ---------------------------------------------------------------------------------------------------------- the report


def ratios(slices: dict[str, list[Slice]]) -> dict[str, dict[str, float]]:
    """Medians over rounds of replies a second, and of processor time, of one row by that of another."""
    found = {}
    for of, by in (("predict", "bare"), ("predict JPEG", "bare"), ("v2", "bare"), ("stream", "predict")):
        pairs = list(zip(slices[of], slices[by], strict=True))
        found[f"{of} of {by}"] = {
            "per_s": round(statistics.median(one.per_s / other.per_s for one, other in pairs), 3),
            "cpu": round(statistics.median(one.cpu_us / other.cpu_us for one, other in pairs), 3),
        }
    return found


def table(slices: dict[str, list[Slice]]) -> dict[str, dict[str, Any]]:
    """Medians and all slices of each row."""
    return {
        name: {
            "per_s": round(statistics.median(each.per_s for each in measured), 1),
            "cpu_us": round(statistics.median(each.cpu_us for each in measured), 1),
            "per_s_by_round": [round(each.per_s, 1) for each in measured],
            "cpu_us_by_round": [round(each.cpu_us, 1) for each in measured],
        }
        for name, measured in slices.items()
    }


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; its report."""
    server_core, client_core = two_cores()
    with running(options.profile, server_core) as server:
        pin(client_core)  # after the server has started: it would inherit this
        slices = measure_rounds(server, options)
        loaded = half_load(server, statistics.median(each.per_s for each in slices["predict"]) / 2, options)
    found, origin = ratios(slices), provenance()
    origin["versions"]["aiohttp"] = metadata.version("aiohttp")
    return {
        "script": "bench_http.py",
        **origin,
        "seed": options.seed,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "cores": {"server": server_core, "client": client_core},
        "input": asdict(server.place)["shape"],
        "rows": table(slices),
        "ratios": found,
        "half_load": loaded,
        "bars": {
            **{f"{name} >= {least:g}": found[name]["per_s"] >= least for name, least in BARS.items()},
            f"p99 at half load < {P99_BAR_MS:g} ms": loaded["p99_ms"] < P99_BAR_MS and not loaded["refused"],
        },
    }


def show(report: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{'':14}{'replies/s':>12}{'CPU of server, µs':>20}")
    for name, row in report["rows"].items():
        print(f"{name:14}{row['per_s']:12.0f}{row['cpu_us']:20.1f}")
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio['per_s']:.2f} of its replies/s, {ratio['cpu']:.2f} of its processor time")
    loaded = report["half_load"]
    print(f"half load, {loaded['rate']:.0f}/s: p50 {loaded['p50_ms']:.2f} ms, p99 {loaded['p99_ms']:.2f} ms", end="")
    print(f", {loaded['refused']} refused")
    for bar, reached in report["bars"].items():
        print(f"{bar}: {'yes' if reached else 'no'}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "wrk" if shutil.which("wrk") else "own"
    profile = HOUSE / "profiles" / "cifar10"
    parser.add_argument("--profile", type=Path, default=profile, metavar="FOLDER", help="whose inputs are sent")
    parser.add_argument("--client", choices=("wrk", "own"), default=default, help="for HTTP (wrk if it is installed)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="a slice; wrk rounds it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="slices of each row (%(default)s)")
    parser.add_argument("--connections", type=int, default=64, metavar="N", help="of the HTTP client (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=128, metavar="N", help="queries on /stream (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of inputs, masks and arrivals (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    options = parser.parse_args(arguments)
    for name in ("seconds", "rounds", "connections", "in_flight"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be above zero, not {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the file asked for, print the report."""
    options = parse_arguments(arguments)
    try:
        report = bench(options)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench_http.py: {error}")
    if options.json:
        write_text(options.json, json.dumps(report) + "\n")
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
