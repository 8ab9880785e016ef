"""Measure overload: a real server that is asked ten times as much as it can answer, and then a moderate amount again.

Rates are raised step by step first, with Poisson arrivals, until fewer than 99 % of the queries are answered in time:
the last rate before that is saturation, and the most answers in time a second up to there the best goodput. Then
follow a moderate load (half of saturation), the overload, and at once the moderate load again. All the while another
process asks for /healthz and /metrics ten times a second, and looks at the server's memory.

The load is open: queries leave at their scheduled instants whatever came back before, and are in time if the whole
answer is there within the SLO after that instant. The client is made to be cheap, but it shares this machine's
processors with the server: ``client`` tells how late it sent, and what it took. What finds no free connection is not
sent and counts as lost. The last line of stdout is one JSON document.

    python scripts/bench_overload.py --seconds 60
    python scripts/bench_overload.py --saturation 1000 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import math
import multiprocessing
import os
import re
import sys
import time
import urllib.request
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import uvloop
from numpy.typing import NDArray

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

from scripts import replay, workloads  # noqa: E402 the path is set above
from scripts.bench_serving import server  # noqa: E402
from wholefile import write_text  # noqa: E402

IN_TIME_AT_SATURATION = 0.99
STEP = 1.15  # from one rate to the next in the search for saturation
MODERATE = 0.5  # of saturation
PROBE_EVERY_S = 0.1
GRACE_S = 2.0  # beyond the SLO, for what is still on its way when the last query was sent
# What we hold ourselves to.
LEAST_GOODPUT, LONGEST_PROBE_S, RECOVERY_S, RECOVERED = 0.9, 0.1, 1.0, 0.999
MOST_GROWTH_MB = 64.0
UNSENT, UNANSWERED, BROKEN = 0, 1, 2  # in place of an HTTP status


# --------------------------------------------------------------------------------------------------------------- client


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one query on its way."""

    __slots__ = ("_client", "_held", "query", "transport")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held = b""  # of an answer that is not all there
        self.query = -1  # none
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """An answer, or a part of one; answers have a length and are nearly always in one piece."""
        if self._held:
            data = self._held + data
        head = data.find(b"\r\n\r\n")
        start = data.find(b"Content-Length: ", 0, head) + 16
        if head < 0 or start < 16 or len(data) < head + 4 + int(data[start : data.find(b"\r", start)]):
            self._held = data
            return
        self._held = b""
        self._client.settle(self, int(data[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        """The server went away."""
        self._client.lose(self)


class Client:
    """Sends requests at their instants over ``connections``; notes status and instants by position in the schedule."""

    def __init__(self, url: SplitResult, requests: Sequence[bytes], connections: int) -> None:
        self._address = (url.hostname or "", url.port or 80)
        self._requests, self._connections = requests, connections
        self._free: list[Connection] = []
        self._open: set[Connection] = set()
        self._cpu_s: list[tuple[float, float]] = []
        self.lost_connections = 0

    async def connect(self) -> None:
        """Open all connections, but for those that are open: servers close what is idle for a minute."""
        loop = asyncio.get_running_loop()
        for _ in range(self._connections - len(self._open)):
            _, connection = await loop.create_connection(lambda: Connection(self), *self._address)
            self._free.append(connection)
            self._open.add(connection)

    async def run(self, schedule: workloads.Arrivals, grace_s: float) -> Sent:
        """Send everything, and wait for the answers until ``grace_s`` after the last instant."""
        await self.connect()
        self._schedule = schedule.tolist()
        count = len(self._schedule)
        self._sent_s, self._done_s = array("d", [math.nan]) * count, array("d", [math.nan]) * count
        self._status = array("h", [UNSENT]) * count
        self._next = self._unanswered = 0
        self._end = asyncio.Event()
        self._start_s = time.perf_counter()
        cpu = asyncio.create_task(self._note_cpu())
        self._send_due()
        try:
            async with asyncio.timeout(self._schedule[-1] + grace_s):
                await self._end.wait()
        except TimeoutError:
            self._give_up()
        cpu.cancel()
        return Sent(
            start_s=self._start_s, scheduled_s=schedule, sent_s=np.array(self._sent_s) - self._start_s,
            done_s=np.array(self._done_s) - self._start_s, status=np.array(self._status), cpu_s=np.array(self._cpu_s),
        )  # fmt: skip

    def close(self) -> None:
        """End all connections."""
        for connection in list(self._open):
            connection.transport.abort()

    def settle(self, connection: Connection, status: int) -> None:
        """A query's answer is there."""
        query, connection.query = connection.query, -1
        if query >= 0:
            self._done_s[query] = time.perf_counter()
            self._free.append(connection)
            self._settle(query, status)

    def lose(self, connection: Connection) -> None:
        """A connection ended; it is not replaced before the next schedule, and what was on it has failed."""
        self._open.discard(connection)
        self.lost_connections += 1
        if connection.query >= 0:
            self._settle(connection.query, BROKEN)
        elif connection in self._free:
            self._free.remove(connection)

    def _settle(self, query: int, status: int) -> None:
        self._status[query] = status
        self._unanswered -= 1
        if not self._unanswered and self._next == len(self._schedule):
            self._end.set()

    def _give_up(self) -> None:
        """Leave what is still unanswered, and its connections, whose answers would be taken for those to others."""
        for connection in list(self._open):
            if connection.query >= 0:
                connection.query = -1
                connection.transport.abort()

    def _send_due(self) -> None:
        """Send what is due, then sleep until the next; uvloop's timers have a grain of 1 ms."""
        schedule, free, requests = self._schedule, self._free, self._requests
        now_s = time.perf_counter() - self._start_s
        count, each = len(schedule), len(requests)
        while self._next < count and schedule[self._next] <= now_s:
            query = self._next
            self._next += 1
            if not free:
                continue  # stays unsent
            connection = free.pop()
            connection.query = query
            self._unanswered += 1
            self._status[query] = UNANSWERED
            self._sent_s[query] = time.perf_counter()
            connection.transport.write(requests[query % each])
        if self._next < count:
            asyncio.get_running_loop().call_later(max(0.001, schedule[self._next] - now_s), self._send_due)
        elif not self._unanswered:
            self._end.set()

    async def _note_cpu(self) -> None:
        self._cpu_s = []  # of this run
        while True:
            self._cpu_s.append((time.perf_counter() - self._start_s, time.process_time()))
            await asyncio.sleep(0.25)


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a schedule; NaN where there was no such instant. ``start_s`` is on the clock, all else from it.

    ``cpu_s`` has two columns: instants, and the processor time that the client had taken by then.
    """

    start_s: float
    scheduled_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    done_s: NDArray[np.float64]
    status: NDArray[np.int16]
    cpu_s: NDArray[np.float64]

    def part(self, from_s: float, to_s: float) -> Sent:
        """What was scheduled between two instants, counted from the first."""
        first, end = np.searchsorted(self.scheduled_s, [from_s, to_s])
        return Sent(
            start_s=self.start_s + from_s, scheduled_s=self.scheduled_s[first:end] - from_s,
            sent_s=self.sent_s[first:end] - from_s, done_s=self.done_s[first:end] - from_s,
            status=self.status[first:end], cpu_s=self.cpu_s - [from_s, 0.0],
        )  # fmt: skip

    def in_time(self, slo_s: float) -> NDArray[np.bool_]:
        """Answered with 200 within the SLO."""
        return (self.status == 200) & (self.done_s - self.scheduled_s <= slo_s)

    def figures(self, seconds: float, slo_s: float) -> dict[str, Any]:
        """What a phase amounts to; ``goodput`` is answers in time a second."""
        in_time = self.in_time(slo_s)
        delay_s, latency_s = self.sent_s - self.scheduled_s, self.done_s - self.scheduled_s
        by_second = np.bincount(self.scheduled_s[in_time].astype(int), minlength=math.ceil(seconds))
        whole = by_second[: max(1, int(seconds))]
        cpu_s = float(np.diff(np.interp([0.0, seconds], self.cpu_s[:, 0], self.cpu_s[:, 1]))[0])
        return {
            "offered_rate": round(len(in_time) / seconds, 1),
            "sent_rate": round(int((self.status != UNSENT).sum()) / seconds, 1),
            "goodput": round(float(in_time.sum()) / seconds, 1),
            "goodput_by_second": {"least": int(whole.min()), "median": float(np.median(whole))},
            "attainment": round(float(in_time.mean()), 5),
            "outcomes": _outcomes(self.status, in_time),
            "answer_ms": _percentiles_ms(latency_s[self.status == 200]),
            "refusal_ms": _percentiles_ms(latency_s[self.status > 200]),
            "client": {
                "send_delay_ms": _percentiles_ms(delay_s[np.isfinite(delay_s)]),
                "cpu_share": round(cpu_s / seconds, 3),
                "cpu_us_per_query": round(cpu_s / max(1, len(in_time)) * 1e6, 1),
            },
        }


def _outcomes(status: NDArray[np.int16], in_time: NDArray[np.bool_]) -> dict[str, int]:
    names = {UNSENT: "not sent, no connection free", UNANSWERED: "unanswered", BROKEN: "connection lost"}
    found = Counter({"200 in time": int(in_time.sum()), "200 late": int(((status == 200) & ~in_time).sum())})
    for value, count in zip(*np.unique(status[status != 200], return_counts=True), strict=True):
        found[names.get(int(value), str(value))] = int(count)
    return {name: count for name, count in found.most_common() if count}


def _percentiles_ms(values_s: NDArray[np.float64]) -> dict[str, float | None]:
    names = {"p50": 50, "p99": 99, "max": 100}
    if not len(values_s):
        return dict.fromkeys(names)
    return {name: round(float(np.percentile(values_s, percent)) * 1e3, 2) for name, percent in names.items()}


# --------------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the server, at an instant of the clock; ``taken_s`` is infinite where there was no answer 200."""

    at_s: float
    healthz_s: float
    metrics_s: float
    resident_mb: float


def figures_of(looks: Sequence[Seen]) -> dict[str, Any]:
    """What looks amount to, for the report; null where one was not answered."""
    healthz_s, metrics_s = np.array([look.healthz_s for look in looks]), np.array([look.metrics_s for look in looks])
    resident_mb = [look.resident_mb for look in looks] or [math.nan]
    return {
        "asked": len(healthz_s) + len(metrics_s),
        "failed": int(np.isinf(healthz_s).sum() + np.isinf(metrics_s).sum()),
        "healthz_ms": _percentiles_ms(healthz_s[np.isfinite(healthz_s)]),
        "metrics_ms": _percentiles_ms(metrics_s[np.isfinite(metrics_s)]),
        "resident_mb": {"median": _round(np.median(resident_mb)), "peak": _round(max(resident_mb))},
    }


def _round(value: Any) -> float:
    return round(float(value), 1)


def probe(url: str, pid: int, orders: Pipe) -> None:
    """Look every so often until the other end says anything, and send all looks; ends when that end is closed."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=10)
    looks: list[Seen] = []
    try:
        while not orders.poll(PROBE_EVERY_S):
            at_s = time.perf_counter()  # the same clock in all processes
            taken_s = [_ask(connection, path) for path in ("/healthz", "/metrics")]
            looks.append(Seen(at_s, *taken_s, _resident_mb(pid)))
        orders.recv()
        orders.send(looks)
    except (EOFError, OSError):
        return


def _ask(connection: http.client.HTTPConnection, path: str) -> float:
    """How long the answer took."""
    began_s = time.perf_counter()
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return math.inf
    return time.perf_counter() - began_s if answer.status == 200 else math.inf


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def server_counters(url: str) -> dict[str, int]:
    """Arrivals and outcomes as /metrics tells them."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    (arrivals,) = re.findall(r"^superserve_queries_total (\S+)", text, re.MULTILINE)
    outcomes = re.findall(r'^superserve_outcomes_total\{outcome="(\w+)"\} (\S+)', text, re.MULTILINE)
    return {"arrivals": int(float(arrivals)), **{name: int(float(count)) for name, count in outcomes}}


class Prober:
    """The other process, as seen from here."""

    def __init__(self, orders: Pipe) -> None:
        self._orders = orders

    def looks(self) -> list[Seen]:
        """All that it saw; it ends with that."""
        self._orders.send("enough")
        found: list[Seen] = self._orders.recv()
        return found


@contextmanager
def probing(url: str, pid: int) -> Iterator[Prober]:
    """Have a process ask for health and metrics while the block runs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=probe, args=(url, pid, there), daemon=True)
    process.start()
    there.close()
    try:
        yield Prober(here)
    finally:
        here.close()
        process.join(10)


# --------------------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True, slots=True)
class Load:
    """Poisson arrivals for a while."""

    name: str
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A load, and what became of it."""

    load: Load
    sent: Sent
    slo_s: float

    def row(self, looks: Sequence[Seen]) -> dict[str, Any]:
        """For the report, with what the prober saw meanwhile."""
        start_s, end_s = self.sent.start_s, self.sent.start_s + self.load.seconds
        during = [look for look in looks if start_s <= look.at_s < end_s]
        return {"phase": self.load.name, **self.figures(), "probes": figures_of(during)}

    def figures(self) -> dict[str, Any]:
        """What the client saw."""
        return self.sent.figures(self.load.seconds, self.slo_s)

    @property
    def saturated(self) -> bool:
        """Whether this was too much."""
        return float(self.sent.in_time(self.slo_s).mean()) < IN_TIME_AT_SATURATION


@dataclass(frozen=True, slots=True)
class Bench:
    """A client of one server."""

    client: Client
    slo_s: float
    seed: int

    async def offer(self, *loads: Load) -> list[Phase]:
        """One load after the other, without a pause."""
        starts_s = np.cumsum([0.0, *(load.seconds for load in loads)]).tolist()
        parts = [workloads.poisson(load.rate, load.seconds, self.seed + index) for index, load in enumerate(loads)]
        schedule = np.concatenate([part + start_s for part, start_s in zip(parts, starts_s[:-1], strict=True)])
        sent = await self.client.run(schedule, self.slo_s + GRACE_S)
        phases = [
            Phase(load, sent.part(start_s, start_s + load.seconds), self.slo_s)
            for load, start_s in zip(loads, starts_s[:-1], strict=True)
        ]
        for phase in phases:
            print(json.dumps({"phase": phase.load.name, **phase.figures()}), file=sys.stderr)
        return phases

    async def rising(self, rate: float, seconds: float) -> list[Phase]:
        """Rising loads, up to the first that is too much."""
        phases: list[Phase] = []
        while not phases or not phases[-1].saturated:
            phases += await self.offer(Load("rising", rate, seconds))
            rate *= STEP
        return phases


async def measure(
    url: SplitResult, requests: Sequence[bytes], prober: Prober, options: argparse.Namespace
) -> dict[str, Any]:
    """All phases against a running server; their figures, and what they amount to."""
    client = Client(url, requests, options.connections)
    gc.collect()
    gc.freeze()
    gc.disable()  # a pause of the client would look like one of the server
    bench, step_s = Bench(client, options.slo_ms / 1e3, options.seed), options.step_seconds
    await bench.offer(Load("warm-up", options.first_rate / 2, step_s))
    if options.saturation:
        below = await bench.offer(Load("below saturation", options.saturation, step_s))
    else:
        below = await bench.rising(options.first_rate, step_s)
    borne = [phase for phase in below if not phase.saturated] or below[:1]
    rate = borne[-1].load.rate
    moderate, times = MODERATE * rate, options.rate or options.times * rate
    (before,) = await bench.offer(Load("moderate before", moderate, step_s))
    overload, after = await bench.offer(
        Load("overload", times, options.seconds), Load("moderate after", moderate, options.after_seconds)
    )
    lost_connections = client.lost_connections
    client.close()
    looks = prober.looks()
    return {
        "saturation_rate": round(rate, 1),
        "best_goodput": max(phase.figures()["goodput"] for phase in borne),
        "times_saturation": round(times / rate, 2),
        **verdict(borne, before.row(looks), overload.row(looks), after),
        "lost_connections": lost_connections,
        "server": {"of": "all phases", **server_counters(url.geturl())},
        "rows": [phase.row(looks) for phase in (*below, before, overload, after)],
    }


def verdict(borne: Sequence[Phase], before: dict[str, Any], overload: dict[str, Any], after: Phase) -> dict[str, Any]:
    """The figures that there are bars for, and which of these are met."""
    in_time = after.sent.in_time(after.slo_s)
    missed_s, settled = after.sent.scheduled_s[~in_time], in_time[after.sent.scheduled_s >= RECOVERY_S]
    probes, best = overload["probes"], max(phase.figures()["goodput"] for phase in borne)
    slowest_ms = max(probes["healthz_ms"]["max"] or 0.0, probes["metrics_ms"]["max"] or 0.0)
    figures = {
        "goodput_share": round(overload["goodput"] / best, 4) if best else None,
        "resident_growth_mb": _round(probes["resident_mb"]["peak"] - before["probes"]["resident_mb"]["median"]),
        "slowest_probe_ms": slowest_ms,
        "last_miss_after_s": round(float(missed_s.max(initial=0.0)), 3),
        "attainment_from_1s_on": round(float(settled.mean()), 5) if len(settled) else None,
    }
    met = {
        "goodput": (figures["goodput_share"] or 0.0) >= LEAST_GOODPUT,
        "memory": figures["resident_growth_mb"] <= MOST_GROWTH_MB,
        "probes": bool(probes["asked"]) and not probes["failed"] and slowest_ms <= LONGEST_PROBE_S * 1e3,
        "recovery": (figures["attainment_from_1s_on"] or 0.0) >= RECOVERED,
    }
    return {**figures, "met": met}


# --------------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HOUSE.parent / "shared" / "data"
    parser.add_argument("--profile", type=Path, default=HOUSE / "profiles" / "cifar10", help="folder of the servable")
    parser.add_argument("--policy", default="clearfit", help="(default: clearfit)")
    parser.add_argument("--data", default=str(shared / "cifar10_jpeg.npz"), help="images; see replay.py")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO of each query (default: 100)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default: 60)")
    parser.add_argument("--times", type=float, default=10.0, help="overload by saturation (default: 10)")
    parser.add_argument("--rate", type=float, help="queries/s of the overload, instead of --times")
    parser.add_argument("--saturation", type=float, help="queries/s; searched when not given")
    parser.add_argument("--first-rate", type=float, default=400.0, help="where the search begins (default: 400)")
    parser.add_argument("--step-seconds", type=float, default=5.0, help="of each step below saturation (default: 5)")
    parser.add_argument("--after-seconds", type=float, default=10.0, help="of moderate load afterwards (default: 10)")
    parser.add_argument("--connections", type=int, default=600, help="(default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is not met")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file, too")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags go to the server")
    options = parser.parse_args(arguments)
    for name in ("slo_ms", "seconds", "times", "first_rate", "step_seconds", "after_seconds", "connections"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be above zero")
    return options


def requests_of(options: argparse.Namespace, url: SplitResult) -> list[bytes]:
    """The bytes of some hundred requests, one an image."""
    samples = replay.load_samples(options.data, None)
    parameters = {"slo_ms": options.slo_ms}
    return [
        replay.request_head(url, parameters, content_type, len(body)) + body
        for content_type, body in list(zip(samples.content_types, samples.bodies, strict=True))[:500]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Start a server, measure, print."""
    options = parse_arguments(arguments)
    try:
        with server(options.profile, options.policy, options.flags) as running:
            url = urlsplit(running.url)
            requests = requests_of(options, url)
            with probing(running.url, running.pid) as prober:
                found = uvloop.run(measure(url, requests, prober, options))
    except (replay.ReplayError, OSError) as error:
        sys.exit(f"bench_overload.py: {error}")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    document = {"script": "bench_overload.py", **replay.provenance(), "arguments": given, **found}
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    if options.check and not all(document["met"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
