"""Replay a trace of real images over HTTP against a running server, and report what became of each query.

Open loop: every query is sent at its scheduled instant, whatever came back before, and its latency counts from that
instant to the last byte of its reply, so that neither a slow server nor a slow client is hidden. Measured is the whole
way as a client sees it, HTTP included; not measured are networks, for client and server share this machine, and its
processors. Sends leave up to a millisecond late, the grain of the timer, or later when the client cannot keep up:
``send_delay_ms`` tells. The last line of stdout is one JSON document; scripts/plot_replay.py draws several at once.

    python scripts/replay.py --poisson 200 --duration 20
    python scripts/replay.py --trace ../shared/data/traces/twitter_normal.txt.gz --rate 300 --duration 60 --plot out.png
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import http.client
import io
import itertools
import json
import math
import mimetypes
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlencode, urlsplit

import httptools
import numpy as np
import uvloop
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import datasets, workloads
from scripts.provenance import provenance
from wholefile import write_text

CIFAR10 = "../shared/data/cifar10_jpeg.npz"
GRACE_S = 10.0  # how long after the last send replies are waited for, beyond the SLO
BINS_S = {"timeline": 1.0, "timeline_fine": 0.25}  # the second one goes to files only


class ReplayError(Exception):
    """Why the replay cannot start, in one line."""


# --------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class Samples:
    """Encoded images with their content types and the names of their true classes."""

    bodies: list[bytes]
    content_types: list[str]
    labels: list[str]


def load_samples(data: str, folder: Path | None) -> Samples:
    """Test images: a folder of classes if one is given, else ``digits``, else an archive of JPEG files."""
    if folder is not None:
        return _folder_samples(folder)
    if data == "digits":
        return _digit_samples()
    return _archive_samples(Path(data))


def _archive_samples(path: Path) -> Samples:
    """The JPEG files exactly as they stand in the archive."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            data, offsets = archive["test_jpeg"].tobytes(), archive["test_offsets"]
            labels = archive["classes"][archive["test_labels"]].tolist()
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise ReplayError(f"{path}: no archive of test images ({error}); give another --data, or --images") from None
    bodies = [data[start:end] for start, end in itertools.pairwise(offsets)]
    return Samples(bodies, ["image/jpeg"] * len(bodies), labels)


def _folder_samples(folder: Path) -> Samples:
    root = folder / "test" if (folder / "test").is_dir() else folder
    files = sorted(path for path in root.glob("*/*") if path.is_file())
    types = [mimetypes.guess_type(path.name)[0] or "" for path in files]
    for path, content_type in zip(files, types, strict=True):
        if not content_type.startswith("image/"):
            raise ReplayError(f"{path}: not named like an image (.jpg, .png, ...)")
    if not files:
        raise ReplayError(f"{folder}: no images; expected {folder}/CLASS/*.jpg or {folder}/test/CLASS/*.jpg")
    return Samples([path.read_bytes() for path in files], types, [path.parent.name for path in files])


def _digit_samples() -> Samples:
    data = datasets.load("digits")
    bodies = []
    for image in data.test.images:
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1)).save(file, "PNG")
        bodies.append(file.getvalue())
    return Samples(bodies, ["image/png"] * len(bodies), [data.classes[label] for label in data.test.labels])


# --------------------------------------------------------------------------------------------------------------- client


class Connection(asyncio.Protocol):
    """One keep-alive connection, which carries at most one query at a time (its position in the schedule)."""

    __slots__ = ("_body", "_client", "_parser", "query", "transport")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self.query = -1  # none
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        self.transport = transport
        self._client.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of a reply; what is no HTTP ends the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Part of a reply's body (httptools)."""
        self._body += body

    def on_message_complete(self) -> None:
        """A whole reply (httptools)."""
        query, self.query, body, self._body = self.query, -1, self._body, b""
        if query < 0 or not self._parser.should_keep_alive():
            self.transport.close()  # nobody asked, or the server wants no more
        else:
            self._client.free.append(self)
        if query >= 0:
            self._client.settle(query, self._parser.get_status_code(), body)

    def connection_lost(self, error: Exception | None) -> None:
        """The server went away: its query, if any, failed."""
        self._client.connections.discard(self)
        if self.query >= 0:
            self._client.settle(self.query, 0, b"connection")
        elif self in self._client.free:
            self._client.free.remove(self)


class Client:
    """Sends each request at its scheduled second and keeps status, body and instants of each answer, by position.

    Status 0 is no HTTP answer; the body says why. Connections that are free are used again, the last used first, and
    when none is free another is opened: a client that waits for one would close the loop.
    """

    def __init__(self, url: SplitResult, requests: Sequence[bytes], schedule: Sequence[float]) -> None:
        self._address = (url.hostname or "", url.port or 80)
        self._requests = requests
        self._connecting: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._settled = asyncio.Event()
        self.schedule = schedule
        self.connections: set[Connection] = set()
        self.free: list[Connection] = []
        self.start_s = self.cpu_s = math.nan
        self.sent = self.answered = 0
        self.sent_s = [math.nan] * len(schedule)
        self.done_s = [math.nan] * len(schedule)
        self.status = [0] * len(schedule)
        self.body = [b"unanswered"] * len(schedule)

    async def run(self, connections: int, grace_s: float) -> bool:
        """Send everything and wait for the answers, for ``grace_s`` after the last send; False if stopped before."""
        self.free.extend(await asyncio.gather(*(self._open() for _ in range(connections))))
        cpu_s = time.process_time()
        self.start_s = time.perf_counter()
        self._send_due()
        await self._stopped.wait()
        with contextlib.suppress(TimeoutError):  # what is not answered by then stays "unanswered"
            await asyncio.wait_for(self._settled.wait(), grace_s)
        self.cpu_s = time.process_time() - cpu_s
        self._close()
        return self.sent == len(self.schedule)

    def stop(self) -> None:
        """Send no more; what is under way may still be answered. A second call ends the waiting too."""
        if self._stopped.is_set() or self.answered == self.sent:
            self._settled.set()
        self._stopped.set()

    def settle(self, query: int, status: int, body: bytes) -> None:
        """The query's one answer."""
        self.done_s[query] = time.perf_counter()
        self.status[query] = status
        self.body[query] = body
        self.answered += 1
        if self.answered == self.sent and self._stopped.is_set():
            self._settled.set()

    def _send_due(self) -> None:
        """Send all that is due, then sleep until the next: uvloop's timers have a grain of 1 ms, and are rounded up."""
        if self._stopped.is_set():
            return
        now_s = time.perf_counter() - self.start_s
        while self.sent < len(self.schedule) and self.schedule[self.sent] <= now_s:
            self.sent += 1
            self._send(self.sent - 1)
        if self.sent == len(self.schedule):
            self.stop()
        else:
            delay_ms = math.ceil((self.schedule[self.sent] - now_s) * 1000)
            asyncio.get_running_loop().call_later(delay_ms / 1000, self._send_due)

    def _send(self, query: int) -> None:
        if not self.free:
            task = asyncio.create_task(self._connect(query))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
            return
        connection = self.free.pop()
        connection.query = query
        self.sent_s[query] = time.perf_counter()
        connection.transport.write(self._requests[query])

    async def _connect(self, query: int) -> None:
        try:
            self.free.append(await self._open())
        except OSError:
            self.settle(query, 0, b"connection")
        else:
            self._send(query)

    async def _open(self) -> Connection:
        host, port = self._address
        _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(self), host, port)
        return connection

    def _close(self) -> None:
        for task in self._connecting:
            task.cancel()
        self.free.clear()
        for connection in self.connections:
            connection.query = -1  # an answer that is still missing is no failure of the connection
            connection.transport.abort()


def request_head(url: SplitResult, parameters: dict[str, float], content_type: str, length: int) -> bytes:
    """The head of a ``POST /predict`` below the URL's path."""
    return (
        f"POST {url.path.rstrip('/')}/predict?{urlencode(parameters)} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
    ).encode("ascii")


def parse_url(text: str) -> SplitResult:
    """An http:// address of this server."""
    try:
        url = urlsplit(text)
        valid = url.scheme == "http" and bool(url.hostname) and url.port != 0 and not url.query
    except ValueError:
        valid = False
    if not valid:
        raise ReplayError(f"--url: expected something like http://127.0.0.1:8000, not '{text}'")
    return url


def check_ready(url: SplitResult) -> None:
    """Raise unless a server answers 200 to GET /readyz."""
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=5)
    try:
        connection.request("GET", f"{url.path.rstrip('/')}/readyz")
        answer = connection.getresponse()
        text = answer.read(300).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise ReplayError(f"no server at {url.geturl()}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise ReplayError(f"the server at {url.geturl()} is not ready: GET /readyz answers {answer.status} {text}")


# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class Results:
    """What became of each query that was sent, one entry a query; NaN where there was no such number."""

    scheduled_s: NDArray[np.float64]
    send_delay_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]  # scheduled arrival to full reply, answered or not
    outcome: NDArray[np.str_]
    answered: NDArray[np.bool_]  # 200 with predictions
    in_time: NDArray[np.bool_]
    image: NDArray[np.int64]
    correct: NDArray[np.bool_]
    subnet: NDArray[np.str_]
    accuracy: NDArray[np.float64]
    batch_size: NDArray[np.float64]
    server_latency_s: NDArray[np.float64]
    server_met: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of one reply that the report needs."""

    outcome: str
    answered: bool = False
    label: str = ""
    subnet: str = ""
    accuracy: float = math.nan
    batch_size: float = math.nan
    server_latency_s: float = math.nan
    server_met: bool = False


def read_answer(status: int, body: bytes) -> Answer:
    """A reply's JSON; any other status than 200 becomes an outcome of its status and reason."""
    if status == 0:
        return Answer(body.decode())
    try:
        reply = json.loads(body)
        if status != 200:
            return Answer(f"{status} {reply['reason']}")
        return Answer(
            "200",
            answered=True,
            label=str(reply["predictions"][0]["label"]),
            subnet=str(reply["subnet"]),
            accuracy=float(reply["accuracy"]),
            batch_size=float(reply["batch_size"]),
            server_latency_s=float(reply["latency_ms"]) / 1000,
            server_met=reply["deadline_met"] is True,
        )
    except (ValueError, KeyError, IndexError, TypeError):
        return Answer(f"{status} unreadable")


def collect(client: Client, images: NDArray[np.int64], labels: list[str], slo_s: float) -> Results:
    """Judge each query that was sent by the client's own clock."""
    sent = client.sent
    scheduled_s = np.array(client.schedule[:sent], float)
    answers = [read_answer(*reply) for reply in zip(client.status[:sent], client.body[:sent], strict=True)]
    latency_s = np.array(client.done_s[:sent]) - client.start_s - scheduled_s
    answered = np.array([answer.answered for answer in answers], bool)
    in_time = answered & (latency_s <= slo_s)
    outcomes = [answer.outcome for answer in answers]
    for query in np.flatnonzero(answered):
        outcomes[query] = "200 in time" if in_time[query] else "200 late"
    right = [answer.label == labels[image] for answer, image in zip(answers, images[:sent], strict=True)]
    return Results(
        scheduled_s=scheduled_s,
        send_delay_s=np.array(client.sent_s[:sent]) - client.start_s - scheduled_s,
        latency_s=latency_s,
        outcome=np.array(outcomes, str),
        answered=answered,
        in_time=in_time,
        image=images[:sent],
        correct=np.array(right, bool),
        subnet=np.array([answer.subnet for answer in answers], str),
        accuracy=np.array([answer.accuracy for answer in answers]),
        batch_size=np.array([answer.batch_size for answer in answers]),
        server_latency_s=np.array([answer.server_latency_s for answer in answers]),
        server_met=np.array([answer.server_met for answer in answers], bool),
    )


def summarise(results: Results) -> dict[str, Any]:
    """All figures of the report except the timeline."""
    in_time, answered = results.in_time, results.answered
    profiled, observed = results.accuracy[in_time], results.correct[in_time].astype(float)
    images = results.image[in_time]
    return {
        "queries": len(in_time),
        "attainment": _mean(in_time),
        "attainment_server": _mean(results.server_met),
        "mean_serving_accuracy": _mean(profiled),
        "observed_accuracy": _mean(observed),
        "observed_accuracy_error": _sampling_error(observed, images),
        "profiled_minus_observed": _mean(profiled - observed),
        "profiled_minus_observed_error": _sampling_error(profiled - observed, images),
        "latency_ms": _percentiles_ms(results.latency_s[answered], 50, 90, 99, 99.9),
        "server_latency_ms": _percentiles_ms(results.server_latency_s[answered], 50, 99),
        "send_delay_ms": _percentiles_ms(results.send_delay_s[np.isfinite(results.send_delay_s)], 50, 99, 100),
        "outcomes": _counts(results.outcome),
        "subnets": _by_subnet(results),
        "batch_sizes": _counts(results.batch_size[answered].astype(int)),
    }


def timeline(results: Results, bin_s: float) -> dict[str, list[float | None] | float]:
    """Columns by time of scheduled arrival; accuracy and batch size of the answers, null where there were none."""
    bins = np.floor(results.scheduled_s / bin_s).astype(int)
    count = int(bins.max(initial=-1)) + 1
    # Queries stand in the order of their arrivals, so that each bin is one stretch of them.
    starts = np.searchsorted(bins[results.answered], np.arange(1, count))
    latencies_s = np.split(results.latency_s[results.answered], starts)
    return {
        "bin_s": bin_s,
        "time_s": [round(index * bin_s, 6) for index in range(count)],
        "arrivals": np.bincount(bins, minlength=count).tolist(),
        "attainment": _bin_means(bins, results.in_time.astype(float), count),
        "accuracy": _bin_means(bins[results.in_time], results.accuracy[results.in_time], count),
        "batch_size": _bin_means(bins[results.answered], results.batch_size[results.answered], count),
        "p99_ms": [_percentiles_ms(values, 99)["p99"] for values in latencies_s[:count]],
    }


def _bin_means(bins: NDArray[np.int64], values: NDArray[np.float64], count: int) -> list[float | None]:
    sums, counts = np.bincount(bins, values, count), np.bincount(bins, minlength=count)
    return [round(total / n, 5) if n and math.isfinite(total) else None for total, n in zip(sums, counts, strict=True)]


def _by_subnet(results: Results) -> dict[str, dict[str, float | None]]:
    """Most used first; over all answers, late ones too."""
    rows = {}
    for name, queries in _counts(results.subnet[results.answered]).items():
        chosen = results.answered & (results.subnet == name)
        observed = results.correct[chosen].astype(float)
        rows[name] = {
            "queries": queries,
            "accuracy": _mean(results.accuracy[chosen]),
            "observed_accuracy": _mean(observed),
            "observed_accuracy_error": _sampling_error(observed, results.image[chosen]),
        }
    return rows


def _mean(values: NDArray[Any]) -> float | None:
    return round(float(values.mean()), 6) if len(values) and np.isfinite(values).all() else None


def _sampling_error(values: NDArray[np.float64], images: NDArray[np.int64]) -> float | None:
    """One standard error of the mean; an image sent many times is one sample, not many, hence the sums by image."""
    if not len(values) or not np.isfinite(values).all():
        return None
    by_image = np.bincount(images, values - values.mean())
    return round(float(np.sqrt((by_image**2).sum()) / len(values)), 6)


def _percentiles_ms(values_s: NDArray[np.float64], *percents: float) -> dict[str, float | None]:
    if not len(values_s):
        return {f"p{percent:g}": None for percent in percents}
    values_ms = np.percentile(values_s, percents) * 1000
    return {f"p{percent:g}": round(float(value), 3) for percent, value in zip(percents, values_ms, strict=True)}


def _counts(values: NDArray[Any]) -> dict[str, int]:
    return {str(value): count for value, count in collections.Counter(values.tolist()).most_common()}


# --------------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running server")
    arrivals = parser.add_mutually_exclusive_group(required=True)
    arrivals.add_argument("--trace", help="arrival seconds, or Azure Functions 2019 or 2021 CSV, also .gz")
    arrivals.add_argument("--poisson", type=float, metavar="RATE", help="random arrivals, so many a second")
    parser.add_argument("--rate", type=float, metavar="R", help="squeeze the whole trace's time to this mean rate")
    parser.add_argument("--thin", type=float, default=1.0, metavar="F", help="keep this fraction of the arrivals")
    parser.add_argument("--spread", choices=("random", "evenly"), default="random", help="2019 format: inside a minute")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="cut: from this squeezed second on")
    parser.add_argument("--duration", type=float, metavar="S", help="cut: so many seconds (all; 60 for --poisson)")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--data", default=CIFAR10, help="an .npz of JPEG files, or digits (%(default)s)")
    images.add_argument("--images", type=Path, metavar="FOLDER", help="FOLDER/CLASS/*.jpg or FOLDER/test/CLASS/*.jpg")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO of each query (default: 100)")
    parser.add_argument("--min-accuracy", type=float, help="the floor that each query asks for, 0 to 1")
    parser.add_argument("--connections", type=int, default=64, metavar="N", help="opened at first; more when all work")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, thinning and the order of images")
    parser.add_argument("--label", "--policy-label", help="a name for this run, for plots")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, fit for plot_replay.py")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the timeline")
    options = parser.parse_args(arguments)
    check_arguments(parser, options)
    return options


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, by the option's name; what the loaders check is left to them."""
    for name in ("duration", "slo_ms", "connections"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be above zero, not {value}")
    if not 0 <= options.start < math.inf:
        parser.error(f"argument --start: must be zero or more, not {options.start}")
    if options.min_accuracy is not None and not 0 <= options.min_accuracy <= 1:
        parser.error(f"argument --min-accuracy: must be from 0 to 1, not {options.min_accuracy}")


def make_workload(options: argparse.Namespace) -> tuple[workloads.Arrivals, dict[str, Any]]:
    """The arrivals to send, and a description before and after scaling that says which scaling and by how much."""
    if options.poisson is not None:
        everything = workloads.poisson(options.poisson, options.start + (options.duration or 60.0), options.seed)
        loaded = workloads.thin(everything, options.thin, options.seed + 1)
    else:
        evenly = options.spread == "evenly"
        loaded = workloads.load_trace(options.trace, seed=options.seed, evenly=evenly, fraction=options.thin)
    scaled = loaded if options.rate is None else workloads.squeeze(loaded, options.rate)
    cut = workloads.window(scaled, options.start, options.duration or math.inf)
    if not len(cut):
        raise ReplayError(f"no arrivals left: of {len(scaled)}, up to {scaled.max(initial=0):g} s, the cut takes none")
    return cut, {
        "source": options.trace or f"poisson {options.poisson:g}/s",
        "thinned_to": options.thin,
        "before": dataclasses.asdict(workloads.describe(loaded)),
        "squeezed_by": 1.0 if options.rate is None else float(loaded[-1] / scaled[-1]),
        "sent": dataclasses.asdict(workloads.describe(cut)),
    }


async def send_all(
    url: SplitResult, requests: Sequence[bytes], schedule: Sequence[float], options: argparse.Namespace
) -> tuple[Client, bool]:
    """Run the client under a progress bar; Ctrl-C stops the sending."""
    client = Client(url, requests, schedule)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, client.stop)
    with tqdm(total=len(schedule), desc="replay", unit="query", disable=None) as bar:
        progress = asyncio.create_task(_show_progress(client, bar))
        try:
            complete = await client.run(options.connections, options.slo_ms / 1000 + GRACE_S)
        finally:
            progress.cancel()
            loop.remove_signal_handler(signal.SIGINT)
        bar.update(client.answered - bar.n)
    return client, complete


async def _show_progress(client: Client, bar: tqdm[NoReturn]) -> None:
    while True:
        bar.set_postfix(in_flight=client.sent - client.answered, refresh=False)
        bar.update(client.answered - bar.n)
        await asyncio.sleep(0.25)


def replay(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; returns the report with its timelines."""
    url = parse_url(options.url)
    arrivals, workload = make_workload(options)
    samples = load_samples(options.data, options.images)
    check_ready(url)
    parameters = {"slo_ms": options.slo_ms}
    if options.min_accuracy is not None:
        parameters["min_accuracy"] = options.min_accuracy
    encoded = [
        request_head(url, parameters, content_type, len(body)) + body
        for content_type, body in zip(samples.content_types, samples.bodies, strict=True)
    ]
    order = np.random.default_rng(options.seed).permutation(len(encoded))
    images = order[np.arange(len(arrivals)) % len(order)]
    client, complete = uvloop.run(send_all(url, [encoded[image] for image in images], arrivals.tolist(), options))
    results = collect(client, images, samples.labels, options.slo_ms / 1000)
    return {
        "script": "replay.py",
        **provenance(),
        "seed": options.seed,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "workload": workload,
        "complete": complete,
        "client_cpu_us_per_query": round(client.cpu_s / max(1, client.sent) * 1e6, 1),
        **summarise(results),
        **{name: timeline(results, bin_s) for name, bin_s in BINS_S.items()},
    }


def warn(report: dict[str, Any]) -> None:
    """Say on stderr what would make the report misleading."""
    delay_ms, slo_ms = report["send_delay_ms"]["p99"], report["arguments"]["slo_ms"]
    if delay_ms is not None and delay_ms > max(5.0, 0.1 * slo_ms):
        print(f"replay.py: 1 % of the sends were {delay_ms:g} ms late or later: a saturated client", file=sys.stderr)
    if report["observed_accuracy"] == 0:
        print("replay.py: no label was right: does this server know the classes of these images?", file=sys.stderr)
    if not report["complete"]:
        print("replay.py: interrupted: the report covers what was sent until then", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, write the files asked for, print the report."""
    options = parse_arguments(arguments)
    try:
        report = replay(options)
    except (ReplayError, workloads.WorkloadError, OSError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        sys.exit(2)
    warn(report)
    if options.plot and report["queries"]:
        from scripts import plot_replay  # matplotlib is slow to import, and needed here only

        plot_replay.draw([report], options.plot)
    if options.json:
        write_text(options.json, json.dumps(report, allow_nan=False) + "\n")
    del report["timeline_fine"]
    print(json.dumps(report, allow_nan=False))
    if not report["complete"]:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
