"""Soak a server: mixed load in bursts for minutes or hours, and whether anything is lost, leaks or is complained of.

A server is started, asked in all ways that it knows and in some that it refuses, and stopped with SIGTERM. Bursts
alternate with quiet; there are images small and large, raw tensors, JSON, /v2, /stream, bad input, clients that leave
while they wait or before they have sent all, and deadlines that cannot be met. The client knows of each query what may
come back; anything else is ``unexpected``.

Checked are: every query that was not abandoned is answered, as expected; the server's own counters sum to arrivals;
resident memory, file descriptors and threads stay where they were after the warm-up (memory by medians of the first and
the last part of the time after it: the server returns freed memory every now and then); no line of the log is an
error; the server drains and ends with 0. The last line of stdout is one JSON document; the exit code is 1 if a check
fails.

    python scripts/soak.py --minutes 30
    python scripts/soak.py --seconds 60 --rate 50
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image
from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

from examples.client import Client, ConnectionClosed, ServerError, Stream  # noqa: E402 the path is set above
from scripts import replay  # noqa: E402
from scripts.bench_overload import server_counters  # noqa: E402
from wholefile import write_text  # noqa: E402

MOST_GROWTH_PERCENT = 2.0
PATIENCE_S = 30.0  # a query that has no answer after this is unanswered
CYCLE_S, BURST_S, BURST_FACTOR = 4.0, 0.4, 6.0  # a burst in each cycle, at so many times the rate
SAMPLE_EVERY_S = 0.25
PART = 16  # engine.CHUNK, which this program would import torch for
SERVED = {200, 429, 504}  # what a good query may be answered in a burst


class Left(Exception):
    """This client left before it had an answer, as it meant to."""


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True)
class Inputs:
    """Bodies in all forms, for a network that takes images of this shape."""

    pixels: list[bytes]
    planes: list[bytes]
    small: list[bytes]
    large: bytes
    shape: tuple[int, int, int]


def make_inputs(shape: tuple[int, int, int], seed: int) -> Inputs:
    """A few of each; noise, for what is recognised is of no interest here."""
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 256, shape, np.uint8) for _ in range(8)]
    height, width, channels = shape
    planes = [(array.transpose(2, 0, 1) / 128.0 - 1.0).astype("<f4").tobytes() for array in arrays]
    smooth = rng.integers(0, 256, (1200, 1600, channels), np.uint8)
    return Inputs(
        pixels=[array.tobytes() for array in arrays], planes=planes,
        small=[_encoded(array, kind) for array in arrays for kind in ("PNG", "JPEG")],
        large=_encoded(smooth, "JPEG"), shape=(height, width, channels),
    )  # fmt: skip


def _encoded(array: np.ndarray[Any, Any], kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, kind)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- clients


@dataclass(slots=True)
class Clients:
    """Everything that asks: one session with connections of its own, and one stream."""

    url: str
    model: str
    inputs: Inputs
    rng: random.Random
    session: aiohttp.ClientSession
    stream: Stream

    async def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
        """The status of the answer, which must be JSON or binary, and complete."""
        async with self.session.post(self.url + path, data=body, headers=headers) as response:
            answer = await response.read()
            if response.content_type == "application/json":
                json.loads(answer)
            return response.status

    def pick(self, bodies: Sequence[bytes]) -> bytes:
        """Any of them."""
        return self.rng.choice(bodies)

    def slo(self) -> str:
        """The parameters of a good query."""
        return self.rng.choice(("", "?slo_ms=50", "?slo_ms=200", "?slo_ms=1000&top_k=3", "?slo_ms=300&priority=2"))


async def image(clients: Clients) -> int:
    """A small image."""
    kind = {"Content-Type": "image/png"} if clients.rng.random() < 0.5 else None
    return await clients.post(f"/predict{clients.slo()}", clients.pick(clients.inputs.small), kind)


async def large_image(clients: Clients) -> int:
    """An image that is decoded on a thread."""
    return await clients.post("/predict?slo_ms=5000", clients.inputs.large, {"Content-Type": "image/jpeg"})


async def tensor(clients: Clients) -> int:
    """A raw tensor of either type."""
    bodies = clients.rng.choice((clients.inputs.pixels, clients.inputs.planes))
    return await clients.post(f"/predict{clients.slo()}", clients.pick(bodies), OCTETS)


OCTETS = {"Content-Type": "application/octet-stream"}


async def as_json(clients: Clients) -> int:
    """Pixels as JSON."""
    array = np.frombuffer(clients.pick(clients.inputs.pixels), np.uint8).reshape(clients.inputs.shape)
    body = json.dumps({"inputs": array.tolist()}).encode()
    return await clients.post(f"/predict{clients.slo()}", body, {"Content-Type": "application/json"})


async def v2_binary(clients: Clients) -> int:
    """A request of several rows, binary."""
    rows = clients.rng.randint(1, 4)
    body = b"".join(clients.pick(clients.inputs.pixels) for _ in range(rows))
    document = _v2(rows, clients, parameters={"binary_data_size": len(body)})
    head = json.dumps(document).encode()
    headers = {**OCTETS, "Inference-Header-Content-Length": str(len(head))}
    return await clients.post(f"/v2/models/{clients.model}/infer", head + body, headers)


async def v2_json(clients: Clients) -> int:
    """One row, as JSON."""
    document = _v2(1, clients, data=list(clients.pick(clients.inputs.pixels)))
    return await clients.post(f"/v2/models/{clients.model}/infer?slo_ms=1000", json.dumps(document).encode())


def _v2(rows: int, clients: Clients, **more: Any) -> dict[str, Any]:
    shape = [rows, *clients.inputs.shape]
    return {"inputs": [{"name": "input", "datatype": "UINT8", "shape": shape, **more}]}


async def by_stream(clients: Clients) -> int:
    """A small image over the one stream."""
    return await _told(clients.stream.predict(clients.pick(clients.inputs.small), slo_ms=clients.rng.choice((50, 500))))


async def tensor_by_stream(clients: Clients) -> int:
    """A raw tensor over the one stream."""
    body, shape = clients.pick(clients.inputs.pixels), clients.inputs.shape
    return await _told(clients.stream.predict(body, slo_ms=500, dtype="uint8", shape=shape))


async def bad_by_stream(clients: Clients) -> int:
    """A message that is no query costs an error, not the stream."""
    return await _told(clients.stream.predict(b"no image", slo_ms=500))


async def _told(reply: Awaitable[object]) -> int:
    try:
        await reply
    except ServerError as error:
        return error.status
    return 200


async def hopeless(clients: Clients) -> int:
    """A deadline that cannot be met."""
    return await clients.post("/predict?slo_ms=0.1", clients.pick(clients.inputs.small))


async def tight(clients: Clients) -> int:
    """A deadline that may be met, or not."""
    return await clients.post(f"/predict?slo_ms={clients.rng.uniform(1, 12):.2f}", clients.pick(clients.inputs.small))


async def damaged(clients: Clients) -> int:
    """Half an image, or bytes of no form."""
    whole = clients.pick(clients.inputs.small)
    body = clients.rng.choice((whole[: len(whole) // 2], b"\x89PNG\r\n\x1a\n", b"nothing", b""))
    return await clients.post("/predict", body, {"Content-Type": "image/png"})


async def misread(clients: Clients) -> int:
    """JSON, parameters and types that are refused."""
    path, body, kind = clients.rng.choice((
        ("/predict", b"{", "application/json"),
        ("/predict", b"[" * 5000, "application/json"),
        ("/predict?slo_ms=-1", b"x", "image/png"),
        ("/predict?nonsense=1", b"x", "image/png"),
        ("/predict", b"x", "text/html"),
        (f"/v2/models/{clients.model}/infer", b"{}", "application/json"),
        ("/v2/models/nobody/infer", b"{}", "application/json"),
        ("/nowhere", b"", "image/png"),
    ))  # fmt: skip
    return await clients.post(path, body, {"Content-Type": kind})


async def leave_while_waiting(clients: Clients) -> int:
    """A client that goes away a moment after it has asked."""
    try:
        async with asyncio.timeout(clients.rng.uniform(0.0, 0.02)):
            return await clients.post("/predict?slo_ms=20000", clients.pick(clients.inputs.small))
    except TimeoutError:
        raise Left from None


async def leave_while_sending(clients: Clients) -> int:
    """A client that goes away when half of its body is sent."""
    body, address = clients.pick(clients.inputs.small), urlsplit(clients.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    writer.write(body[: len(body) // 2])
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()
    raise Left


async def leave_stream(clients: Clients) -> int:
    """A stream that is closed while its queries are under way."""
    async with clients.session.ws_connect(f"{clients.url}/stream", max_msg_size=0) as socket:
        for number in range(4):
            header = json.dumps({"id": number, "slo_ms": 20000}).encode()
            await socket.send_bytes(struct.pack("<I", len(header)) + header + clients.pick(clients.inputs.small))
        await asyncio.sleep(clients.rng.uniform(0.0, 0.01))
    raise Left


async def every_shape(clients: Clients) -> None:
    """One batch of each size up to a part of the engine's on each subnet, so that all that it prepares for is there.

    What oneDNN prepares for a shape it keeps: 22 MB for all of them together, and no more (docs/LOG.md). The load alone
    meets with the rarest of them long after the warm-up.
    """
    async with clients.session.get(f"{clients.url}/profile") as response:
        names = [entry["name"] for entry in (await response.json())["entries"]]
    for name in names:
        for rows in range(1, PART + 1):
            body = b"".join(clients.pick(clients.inputs.pixels) for _ in range(rows))
            document = _v2(rows, clients, parameters={"binary_data_size": len(body)})
            head = json.dumps(document | {"parameters": {"slo_ms": 10000, "members": name}}).encode()
            headers = {**OCTETS, "Inference-Header-Content-Length": str(len(head))}
            status = await clients.post(f"/v2/models/{clients.model}/infer", head + body, headers)
            if status != 200:
                sys.exit(f"soak.py: a batch of {rows} on {name} was answered {status}")


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to ask, how often it is taken, and with which statuses it may be answered."""

    ask: Callable[[Clients], Awaitable[int]]
    weight: float
    expected: frozenset[int]


def _kind(ask: Callable[[Clients], Awaitable[int]], weight: float, *expected: int) -> Kind:
    return Kind(ask, weight, frozenset(expected or SERVED))


# What is refused before the body is looked at may be refused for that; see web/door.py.
KINDS = (
    _kind(image, 30), _kind(tensor, 20), _kind(as_json, 4), _kind(large_image, 1), _kind(v2_binary, 8),
    _kind(v2_json, 2), _kind(by_stream, 12), _kind(tensor_by_stream, 8), _kind(bad_by_stream, 2, 400, 429, 504),
    _kind(hopeless, 3, 504, 429), _kind(tight, 4), _kind(damaged, 2, 400, 429, 504),
    _kind(misread, 3, 400, 404, 413, 415, 429, 504), _kind(leave_while_waiting, 4), _kind(leave_while_sending, 2),
    _kind(leave_stream, 1),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- load


@dataclass(slots=True)
class Tally:
    """What became of all queries."""

    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    unanswered: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)

    async def follow(self, kind: Kind, clients: Clients) -> None:
        """Ask once, and note what comes of it."""
        self.sent += 1
        name = kind.ask.__name__
        try:
            async with asyncio.timeout(PATIENCE_S):
                status = await kind.ask(clients)
        except Left:
            self.cancelled += 1
            self.outcomes[f"{name} left"] += 1
        except (TimeoutError, aiohttp.ClientError, ConnectionClosed, OSError, ValueError, RuntimeError) as error:
            self.unanswered += 1
            self.unexpected[f"{name} {type(error).__name__}: {error}"[:120]] += 1
        else:
            self.answered += 1
            self.outcomes[f"{name} {status}"] += 1
            if status not in kind.expected:
                self.unexpected[f"{name} {status}"] += 1


Advance = Callable[[float], object]  # told of seconds that have passed


async def offer(clients: Clients, tally: Tally, rate: float, seconds: float, advance: Advance) -> None:
    """Random arrivals in bursts, each of a random kind; returns when all are done with."""
    loop, rng = asyncio.get_running_loop(), clients.rng
    weights, start_s, next_s = [kind.weight for kind in KINDS], loop.time(), 0.0
    async with asyncio.TaskGroup() as tasks:
        while next_s < seconds:
            late_s = loop.time() - start_s - next_s
            await asyncio.sleep(max(0.0, -late_s))
            (kind,) = rng.choices(KINDS, weights)
            tasks.create_task(tally.follow(kind, clients))
            gap_s = rng.expovariate(rate * (BURST_FACTOR if next_s % CYCLE_S < BURST_S else 1.0))
            advance(min(gap_s, seconds - next_s))
            next_s += gap_s


@contextlib.asynccontextmanager
async def clients_of(url: str, seed: int) -> AsyncIterator[Clients]:
    """Clients with connections of their own, which are closed in the end."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, Client(url) as client, client.stream() as stream:
        model, shape = await _model(session, url)
        yield Clients(url, model, make_inputs(shape, seed), random.Random(seed), session, stream)


async def _model(session: aiohttp.ClientSession, url: str) -> tuple[str, tuple[int, int, int]]:
    async with session.post(f"{url}/v2/repository/index") as response:
        name = (await response.json())[0]["name"]
    async with session.get(f"{url}/v2/models/{name}") as response:
        _, height, width, channels = (await response.json())["inputs"][0]["shape"]
    return name, (height, width, channels)


# --------------------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True, slots=True)
class Holdings:
    """File descriptors and threads of a process."""

    descriptors: int
    threads: int


class Server:
    """A server of our own; its log goes to a file."""

    def __init__(self, profile: Path, flags: Sequence[str], log: Path) -> None:
        command = [sys.executable, "superserve.py", "--profile", str(profile), "--port", "0", "--summary-s", "0"]
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen([*command, *flags], cwd=HOUSE, stderr=file)
        self.pid = self._process.pid
        self.url = ""

    def wait_until_ready(self) -> None:
        """Until it says so; ends this program if it does not."""
        while self._process.poll() is None:
            events = {event["event"]: event for event in self.events()}
            if "ready" in events and "listening" in events:
                self.url = events["listening"]["url"]
                return
            time.sleep(0.05)
        sys.exit(f"soak.py: the server did not start:\n{self._log.read_text()}")

    def events(self) -> list[dict[str, Any]]:
        """Its log; what is no JSON becomes an error line."""
        found = []
        for line in self._log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"event": line, "level": "unreadable"})
        return found

    def resident_mb(self) -> float:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def holdings(self) -> Holdings:
        """What it holds now."""
        process = Path(f"/proc/{self.pid}")
        return Holdings(len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))

    async def settled(self) -> Holdings:
        """What it holds when that has been the same for a second; connections that were closed take a moment."""
        last, since_s = self.holdings(), time.monotonic()
        until_s = since_s + 15
        while time.monotonic() < min(until_s, since_s + 1):
            await asyncio.sleep(0.1)
            now = self.holdings()
            if now != last:
                last, since_s = now, time.monotonic()
        return last

    def stop(self) -> int:
        """Drain; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """Whatever happened, it does not stay."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


# ----------------------------------------------------------------------------------------------------------------- soak


async def sample_memory(server: Server, samples: list[float]) -> None:
    """Note the resident memory every so often, until cancelled."""
    while True:
        samples.append(server.resident_mb())
        await asyncio.sleep(SAMPLE_EVERY_S)


async def soak(server: Server, options: argparse.Namespace, advance: Advance) -> dict[str, Any]:
    """Warm up, take stock, load, take stock."""
    tally = Tally()
    samples: list[float] = []
    await _load(server, tally, options.rate, options.warm_up_s, options.seed, advance, prepare=True)
    before = await server.settled()
    sampling = asyncio.create_task(sample_memory(server, samples))
    await _load(server, tally, options.rate, options.seconds - options.warm_up_s, options.seed + 1, advance)
    sampling.cancel()
    after = await server.settled()
    part = max(1, len(samples) // 4)
    first_mb, last_mb = median(samples[:part]), median(samples[-part:])
    return {
        "sent": tally.sent, "answered": tally.answered, "cancelled": tally.cancelled, "unanswered": tally.unanswered,
        "rss_growth_percent": round((last_mb / first_mb - 1) * 100, 3),
        "fd_growth": after.descriptors - before.descriptors,
        "thread_growth": after.threads - before.threads,
        "unexpected": dict(tally.unexpected),
        "resident_mb": {"first": round(first_mb, 1), "last": round(last_mb, 1), "peak": round(max(samples), 1)},
        "held": {"descriptors": after.descriptors, "threads": after.threads},
        "server": server_counters(server.url),
        "outcomes": dict(tally.outcomes.most_common()),
    }  # fmt: skip


async def _load(
    server: Server, tally: Tally, rate: float, seconds: float, seed: int, advance: Advance, *, prepare: bool = False
) -> None:
    async with clients_of(server.url, seed) as clients:
        large = next(kind for kind in KINDS if kind.ask is large_image)
        await asyncio.gather(*(tally.follow(large, clients) for _ in range(12)))  # all threads that decode
        if prepare:
            await every_shape(clients)
        await offer(clients, tally, rate, seconds, advance)


def failed_checks(found: dict[str, Any]) -> list[str]:
    """The checks that did not hold, by name."""
    server = dict(found["server"])
    arrivals = server.pop("arrivals")
    checks = {
        "every query is answered": not found["unanswered"],
        "answers are as expected": not found["unexpected"],
        "outcomes sum to arrivals": sum(server.values()) == arrivals > 0,
        "memory is flat": found["rss_growth_percent"] < MOST_GROWTH_PERCENT,
        "file descriptors are flat": found["fd_growth"] <= 0,
        "threads are flat": found["thread_growth"] <= 0,
        "no error in the log": not found["error_log_lines"],
        "the server drains": found["exit_code"] == 0,
    }
    return [name for name, good in checks.items() if not good]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole soak; its document."""
    progress = tqdm(total=round(options.seconds), desc="soak", unit="s", disable=None)
    with tempfile.TemporaryDirectory() as folder, progress as bar:
        server = Server(options.profile, options.flags, Path(folder) / "log")
        try:
            server.wait_until_ready()
            found = asyncio.run(soak(server, options, bar.update))
            found["exit_code"] = server.stop()
        finally:
            server.kill()
        errors = [event for event in server.events() if event.get("level") not in ("info", "warning")]
    found["error_log_lines"] = len(errors)
    found["errors"] = [str(event)[:300] for event in errors[:5]]
    found["failed"] = failed_checks(found)
    return {**found, "seconds": options.seconds, "rate": options.rate, "script": "soak.py", **replay.provenance()}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="N", help="how long, warm-up included (default: 30)")
    length.add_argument("--seconds", type=float, metavar="N", help="the same in seconds")
    parser.add_argument("--rate", type=float, default=100.0, help="queries/s outside of bursts (default: 100)")
    parser.add_argument("--warm-up-s", type=float, metavar="S", help="default: a fifth of the time, at most 60 s")
    parser.add_argument("--profile", type=Path, default=HOUSE / "profiles" / "cifar10", help="folder of the servable")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document to a file, too")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags go to the server")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or 60 * (options.minutes or 30.0)
    if options.warm_up_s is None:
        options.warm_up_s = min(60.0, options.seconds / 5)
    if not (0 < options.warm_up_s < options.seconds and options.rate > 0):
        parser.error("the time must be longer than the warm-up, and the rate above zero")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, print."""
    options = parse_arguments(arguments)
    document = run(options)
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    for name in document["failed"]:
        print(f"soak.py: not so: {name}", file=sys.stderr)
    print(json.dumps(document))
    sys.exit(1 if document["failed"] else 0)


if __name__ == "__main__":
    main()
