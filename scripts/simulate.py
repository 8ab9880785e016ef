"""Simulate the server in virtual time: the same dispatcher, heap and policies, with workers made of a latency table.

Nothing of the server is copied: arrivals go to ``superserve.Dispatcher``, which asks a policy of slackfit.py; only its
clock and its workers are virtual. A batch takes what the table says, times optional noise (``Noise``). Left out are
HTTP, decoding and the time that decisions take; ``--answer-ms`` stands for what they add to an answer. The last line of
stdout is one JSON document, which scripts/plot_replay.py draws like those of replay.py.

    python scripts/simulate.py --table profiles/paper-ofa-resnet50 --poisson 1500 --slo-ms 36 --policy slackfit
    python scripts/simulate.py --table profiles/cifar10 --trace ../shared/data/traces/twitter_normal.txt.gz --rate 900
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from engine import Outputs
from scripts import replay, workloads
from slackfit import Latencies, Policy, ProfileError, ProfileTable
from superserve import Answer, Batch, Dispatcher, Query
from web.errors import DeadlineExceeded, QueueFull
from wholefile import write_text

MAX_QUEUE = 1000  # the server's default
NO_INPUT = np.empty(0)  # the input of every query
PROGRESS_STEP = 2048  # arrivals between two reports of progress

Service = Mapping[str, Sequence[float]]  # by entry and batch size, as Entry.latency_s


class SimulationError(ValueError):
    """What cannot be simulated, in one line."""


# ---------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True, slots=True)
class Slowdown:
    """From one instant to another, the batches that start take ``factor`` times as long."""

    start_s: float
    end_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class Outage:
    """A worker fails, with the batch that it runs, and comes back; infinity: it does not."""

    worker: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How batches and workers differ from what the table says. Sigma is that of a lognormal factor of median 1."""

    sigma: float = 0.0
    straggler_probability: float = 0.0
    straggler_factor: float = 2.0
    slowdowns: tuple[Slowdown, ...] = ()
    outages: tuple[Outage, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise SimulationError(f"sigma must be zero or more, not {self.sigma}")
        if not 0 <= self.straggler_probability <= 1:
            raise SimulationError(f"a probability must be from 0 to 1, not {self.straggler_probability}")
        for factor in (self.straggler_factor, *(slowdown.factor for slowdown in self.slowdowns)):
            if not 0 < factor < math.inf:
                raise SimulationError(f"a factor must be above zero, not {factor}")
        for span in (*self.slowdowns, *self.outages):
            if not 0 <= span.start_s < span.end_s:
                raise SimulationError(f"must start at zero or later and end after that: {span}")

    def factor(self, now_s: float, rng: np.random.Generator) -> float:
        """What the service time of a batch that starts now is multiplied by."""
        factor = math.exp(self.sigma * rng.standard_normal()) if self.sigma else 1.0
        if self.straggler_probability and rng.random() < self.straggler_probability:
            factor *= self.straggler_factor
        for slowdown in self.slowdowns:
            if slowdown.start_s <= now_s < slowdown.end_s:
                factor *= slowdown.factor
        return factor


QUIET = Noise()


# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What became of each query, in the order of arrivals. Unanswered ones: finish NaN, entry −1, batch size 0."""

    table: ProfileTable
    arrival_s: NDArray[np.float64]
    slo_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    entry: NDArray[np.int16]  # index into the table's entries
    batch_size: NDArray[np.int32]
    outcomes: dict[str, int]  # the dispatcher's counters, without arrivals

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Ran, in time or late."""
        return self.entry >= 0

    @property
    def in_time(self) -> NDArray[np.bool_]:
        """Answered by the deadline."""
        return self.finish_s <= self.arrival_s + self.slo_s

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Of the entry that ran; NaN if none did."""
        return np.array([*(entry.accuracy for entry in self.table.entries), math.nan])[self.entry]

    @property
    def latency_s(self) -> NDArray[np.float64]:
        """Arrival to answer; NaN if there was none."""
        return self.finish_s - self.arrival_s

    @property
    def scheduled_s(self) -> NDArray[np.float64]:
        """The arrivals, by their name in replay.py, so that its timelines fit these results too."""
        return self.arrival_s

    @property
    def attainment(self) -> float:
        """Queries in time / queries; NaN without queries."""
        return float(self.in_time.mean()) if len(self.entry) else math.nan

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy of the queries in time; NaN if there are none."""
        in_time = self.in_time
        return float(self.accuracy[in_time].mean()) if in_time.any() else math.nan

    @property
    def utility(self) -> float:
        """Sum of the accuracies of the queries in time / queries; NaN without queries."""
        return float(self.accuracy[self.in_time].sum() / len(self.entry)) if len(self.entry) else math.nan


def summarise(results: Results) -> dict[str, Any]:
    """The figures of a run as JSON; subnets and batch sizes by how many queries ran with them."""
    answered = results.answered
    names = [entry.name for entry in results.table.entries]
    subnets = Counter(results.entry[answered].tolist()).most_common()
    sizes = Counter(results.batch_size[answered].tolist()).most_common()
    return {
        "queries": len(answered),
        "attainment": _rounded(results.attainment),
        "mean_serving_accuracy": _rounded(results.mean_accuracy),
        "utility": _rounded(results.utility),
        "latency_ms": _percentiles_ms(results.latency_s[answered], 50, 90, 99, 99.9),
        "outcomes": dict(sorted(results.outcomes.items(), key=lambda item: -item[1])),
        "subnets": {names[index]: count for index, count in subnets},
        "batch_sizes": {str(size): count for size, count in sizes},
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _percentiles_ms(values_s: NDArray[np.float64], *percents: float) -> dict[str, float | None]:
    values_ms = np.percentile(values_s, percents) * 1e3 if len(values_s) else [math.nan] * len(percents)
    return {f"p{percent:g}": _rounded(float(value)) for percent, value in zip(percents, values_ms, strict=True)}


# ----------------------------------------------------------------------------------------------------------- simulation


def simulate(
    arrivals: workloads.Arrivals,
    slo_s: ArrayLike,
    table: ProfileTable,
    policy: Policy,
    *,
    workers: int = 1,
    service: Service | None = None,
    noise: Noise = QUIET,
    answer_s: float = 0.0,
    max_queue: int = MAX_QUEUE,
    margin: float = 0.0,
    floors: ArrayLike = 0.0,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Results:
    """Serve the ascending arrivals, with one SLO or one for each, under a policy made for this table and run only once.

    Of ``floors``, the least accuracy that a query accepts, there is also one or one for each.

    Batches take the latencies of ``service``, by default those that the policy plans with. An answer leaves
    ``answer_s`` after its batch is done; ``margin`` is the dispatcher's. ``progress`` is told of arrivals, some
    thousand at a time.
    """
    arrivals = np.asarray(arrivals, np.float64)
    if workers < 1 or max_queue < 1:
        raise SimulationError(f"workers and max_queue must be at least 1, not {workers} and {max_queue}")
    slos_s = np.broadcast_to(np.asarray(slo_s, np.float64), arrivals.shape)
    if not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any() or not (slos_s > 0).all():
        raise SimulationError("arrivals must be finite and ascend, and SLOs must be above zero")
    for outage in noise.outages:
        if not 0 <= outage.worker < workers:
            raise SimulationError(f"no worker {outage.worker}: there are {workers}, from 0 on")
    least = np.broadcast_to(np.asarray(floors, np.float64), arrivals.shape)
    best = table.most_accurate.accuracy
    if not ((least >= 0) & (least <= best)).all():
        raise SimulationError(f"accuracy floors must be from 0 to {best:g}, what the most accurate entry reaches")
    service = service or {entry.name: entry.latency_s for entry in table.entries}
    machine = _Workers(workers, service, noise, np.random.default_rng(seed))
    settings = {"max_queue": max_queue, "margin": margin}
    run = _Run(arrivals, slos_s, least, table, policy, machine, answer_s, settings)
    return run.play(progress or (lambda _: None))


class _Slot:
    """A query's reply, and where the query stands among the arrivals."""

    __slots__ = ("_done", "answer", "position")

    def __init__(self, position: int) -> None:
        self.position = position
        self.answer: Answer | None = None
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, result: Answer, /) -> None:
        self.answer = result
        self._done = True

    def set_exception(self, exception: BaseException, /) -> None:
        self._done = True


class _Workers:
    """Who is idle, who runs which batch until when, and who is away when."""

    def __init__(self, count: int, service: Service, noise: Noise, rng: np.random.Generator) -> None:
        self.count = count
        self._idle = list(range(count))
        self._running: list[tuple[float, int, Batch]] = []
        self._service, self._noise, self._rng = service, noise, rng
        self._away: Counter[int] = Counter()  # outages of one worker may overlap
        self._changes = sorted(
            change
            for outage in noise.outages
            for change in ((outage.start_s, outage.worker, 1), (outage.end_s, outage.worker, -1))
        )

    @property
    def next_s(self) -> float:
        """When the next batch is done, or the next worker leaves or comes back."""
        done_s = self._running[0][0] if self._running else math.inf
        return min(done_s, self._changes[0][0]) if self._changes else done_s

    def start(self, batch: Batch) -> None:
        """An idle worker takes this batch."""
        service_s = self._service[batch.entry.name][len(batch.queries)]
        done_s = batch.started_s + service_s * self._noise.factor(batch.started_s, self._rng)
        heapq.heappush(self._running, (done_s, heapq.heappop(self._idle), batch))

    def finished(self, now_s: float) -> Batch | None:
        """A batch that is done by now; call until there is none."""
        if not self._running or self._running[0][0] > now_s:
            return None
        _, worker, batch = heapq.heappop(self._running)
        heapq.heappush(self._idle, worker)
        return batch

    def change(self, now_s: float, dispatcher: Dispatcher) -> None:
        """Let workers fail and come back that do so by now; a batch that ran on a failing worker fails."""
        while self._changes and self._changes[0][0] <= now_s:
            _, worker, step = self._changes.pop(0)
            before = self._away[worker]
            self._away[worker] += step
            if not before:
                self._lose(worker, dispatcher)
            elif not self._away[worker]:
                heapq.heappush(self._idle, worker)
                dispatcher.idle_workers += 1

    def _lose(self, worker: int, dispatcher: Dispatcher) -> None:
        for run in self._running:
            if run[1] == worker:
                self._running.remove(run)
                heapq.heapify(self._running)
                dispatcher.fail(run[2], "the worker failed")
                break
        else:
            self._idle.remove(worker)
            heapq.heapify(self._idle)
        dispatcher.idle_workers -= 1


class _Run:
    """One run from the first arrival until nothing waits and nothing runs."""

    def __init__(
        self,
        arrivals: workloads.Arrivals,
        slos_s: NDArray[np.float64],
        floors: NDArray[np.float64],
        table: ProfileTable,
        policy: Policy,
        workers: _Workers,
        answer_s: float,
        settings: Mapping[str, Any],
    ) -> None:
        self._now_s = 0.0
        self._dispatcher = Dispatcher(table, policy, lambda: self._now_s, workers=workers.count, **settings)
        self._workers = workers
        self._answer_s = answer_s
        # Python's own floats: those of numpy are several times slower one by one.
        self._arrivals_s, self._slos_s, self._floors = [*arrivals.tolist(), math.inf], slos_s.tolist(), floors.tolist()
        self._next = 0
        self._rows = np.zeros((table.max_batch, 1), np.float32)
        self._index = {entry.name: index for index, entry in enumerate(table.entries)}
        self._results = Results(
            table=table,
            arrival_s=arrivals,
            slo_s=slos_s,
            finish_s=np.full(len(arrivals), math.nan),
            entry=np.full(len(arrivals), -1, np.int16),
            batch_size=np.zeros(len(arrivals), np.int32),
            outcomes={},
        )

    def play(self, progress: Callable[[int], object]) -> Results:
        """Go from event to event: what arrives, ends, fails or expires at one instant is seen by the same decision."""
        dispatcher, workers, reported = self._dispatcher, self._workers, 0
        while (now_s := self._next_event_s()) < math.inf:
            self._now_s = now_s
            while (batch := workers.finished(now_s)) is not None:
                self._answer(batch)
            workers.change(now_s, dispatcher)
            while self._arrivals_s[self._next] <= now_s:
                self._arrive()
            dispatcher.expire()
            while (batch := dispatcher.next_batch()) is not None:
                workers.start(batch)
            if self._next >= reported + PROGRESS_STEP:
                progress(self._next - reported)
                reported = self._next
        progress(self._next - reported)
        return self._finish()

    def _next_event_s(self) -> float:
        """The server's expiry timer is the third kind of event: nobody waits past a deadline."""
        heap = self._dispatcher.heap
        event_s = min(self._arrivals_s[self._next], self._workers.next_s)
        return min(event_s, heap.head_deadline_s) if heap else event_s

    def _arrive(self) -> None:
        position = self._next
        self._next += 1
        query = Query(
            input=NO_INPUT, arrival_s=self._arrivals_s[position], slo_s=self._slos_s[position], reply=_Slot(position),
            min_accuracy=self._floors[position],
        )  # fmt: skip
        with contextlib.suppress(QueueFull, DeadlineExceeded):  # the dispatcher has counted it
            self._dispatcher.submit(query)

    def _answer(self, batch: Batch) -> None:
        """Settle a batch and deliver its answers, as the server does before it decides again."""
        dispatcher, done_s, count = self._dispatcher, self._now_s, len(batch.queries)
        dispatcher.settle(batch, Outputs(self._rows[:count], done_s))
        # For the answers only: the dispatcher learns at once, not a little later, how long answering takes.
        self._now_s = finish_s = done_s + self._answer_s
        for query in batch.queries:
            dispatcher.deliver(query, query.reply.answer)
        self._now_s = done_s
        positions = [query.reply.position for query in batch.queries]
        self._results.finish_s[positions] = finish_s
        self._results.entry[positions] = self._index[batch.entry.name]
        self._results.batch_size[positions] = count

    def _finish(self) -> Results:
        outcomes = Counter(self._dispatcher.counters)
        arrivals = outcomes.pop("arrivals", 0)
        assert outcomes.total() == arrivals == len(self._results.entry), "each query has exactly one outcome"
        return replace(self._results, outcomes=dict(outcomes))


# ----------------------------------------------------------------------------------------------------------- the tables


def load_table(path: Path) -> ProfileTable:
    """The table of one latency file, or of a profile folder: its only one, or that in float32; raises ProfileError."""
    file = _latency_file(path)
    table = slackfit.load_latencies(file, slackfit.load_choices(file.parent))
    dtype = table.device.dtype if table.device else ""
    if dtype not in slackfit.DTYPES[1:]:  # of a table from elsewhere it may be anything
        return table
    return slackfit.load_latencies(file, slackfit.load_choices(file.parent, dtype))


def load_medians(path: Path) -> Service:
    """Median latencies from the same file: what batches mostly take, where the table plans with the 99th percentile."""
    table, file = load_table(path), _latency_file(path)
    document = json.loads(file.read_text(encoding="utf-8"))  # checked when the table was loaded
    medians = {}
    for entry in table.entries:
        p50_s = tuple(milliseconds / 1e3 for milliseconds in document["latencies"][entry.name]["p50_ms"])
        latencies = {entry.name: Latencies(p50_s=p50_s, p99_s=p50_s)}
        medians[entry.name] = slackfit.build_table([entry.choice], table.batch_sizes, latencies).entries[0].latency_s
    return medians


def _latency_file(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.glob("latency-*.json"))
    if len(files) > 1:
        files = [each for each in files if each.stem.endswith("-float32")] or files
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ProfileError(f"{path}: expected one latency table, found {names}; give the path of one file")
    return files[0]


# --------------------------------------------------------------------------------------------------------- command line


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which queries arrive at which table; scripts/oracle.py has the same."""
    parser.add_argument(
        "--table", type=Path, default=Path("profiles/cifar10"), metavar="PATH", help="a profile folder or latency file"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", help="arrival seconds, or Azure Functions 2019 or 2021 CSV, also .gz")
    source.add_argument("--poisson", type=float, metavar="RATE", help="random arrivals, so many a second")
    source.add_argument("--gamma", type=float, nargs=2, metavar=("RATE", "CV2"), help="a renewal process")
    source.add_argument(
        "--bursty", type=float, nargs=3, metavar=("BASE", "BURSTS", "CV2"), help="a constant stream and a gamma stream"
    )
    source.add_argument(
        "--accelerating", type=float, nargs=4, metavar=("FROM", "TO", "TAU", "CV2"), help="TAU in queries/s²"
    )
    parser.add_argument("--rate", type=float, metavar="R", help="squeeze the whole workload's time to this mean rate")
    parser.add_argument("--thin", type=float, default=1.0, metavar="F", help="keep this fraction of the arrivals")
    parser.add_argument("--spread", choices=("random", "evenly"), default="random", help="2019 format: inside a minute")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="cut: from this squeezed second on")
    parser.add_argument("--duration", type=float, metavar="S", help="cut: so many seconds (all; 60 when synthetic)")
    parser.add_argument(
        "--slo-ms", type=float, nargs="+", default=[100.0], metavar="MS", help="several: each query draws one of them"
    )
    parser.add_argument("--workers", type=int, default=1, help="batches that run at the same time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, thinning and noise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file, too")


def make_workload(options: argparse.Namespace) -> tuple[workloads.Arrivals, NDArray[np.float64], dict[str, Any]]:
    """Arrivals, the SLO of each, and a description that says how the workload was scaled."""
    if min(options.slo_ms) <= 0 or options.workers < 1 or not 0 <= options.start < math.inf:
        raise SimulationError("--slo-ms must be above zero, --workers at least 1, --start zero or more")
    loaded, source = _load_arrivals(options)
    scaled = loaded if options.rate is None else workloads.squeeze(loaded, options.rate)
    cut = workloads.window(scaled, options.start, options.duration or math.inf)
    if not len(cut):
        raise SimulationError(f"no arrivals left: the cut takes none of {len(scaled)}, to {scaled.max(initial=0):g} s")
    slos_s = np.random.default_rng(options.seed).choice(np.array(options.slo_ms) / 1e3, len(cut))
    description = {
        "source": source,
        "thinned_to": options.thin,
        "before": asdict(workloads.describe(loaded)),
        "squeezed_by": 1.0 if options.rate is None else float(loaded[-1] / scaled[-1]),
        "sent": asdict(workloads.describe(cut)),
    }
    return cut, slos_s, description


def _load_arrivals(options: argparse.Namespace) -> tuple[workloads.Arrivals, str]:
    """Before squeezing and cutting, with where they are from. What is synthetic is made as long as the cut needs."""
    seed, thin = options.seed, options.thin
    if options.trace is not None:
        evenly = options.spread == "evenly"
        return workloads.load_trace(options.trace, seed=seed, evenly=evenly, fraction=thin), options.trace
    length_s = options.start + (options.duration or 60.0)
    if options.poisson is not None:
        made, source = workloads.poisson(options.poisson, length_s, seed), f"poisson {options.poisson:g}/s"
    elif options.gamma is not None:
        made, source = workloads.gamma(*options.gamma, length_s, seed), "gamma {:g}/s, CV² {:g}".format(*options.gamma)
    elif options.bursty is not None:
        made = workloads.bursty(*options.bursty, length_s, seed)
        source = "bursty {:g}/s + {:g}/s, CV² {:g}".format(*options.bursty)
    else:
        made = workloads.accelerating(*options.accelerating, length_s, seed)
        source = "accelerating {:g} to {:g}/s at {:g}/s², CV² {:g}".format(*options.accelerating)
    return workloads.thin(made, thin, seed + 1), source


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    parser.add_argument("--policy", default="clearfit", help=f"one of {', '.join(slackfit.POLICIES)} (%(default)s)")
    parser.add_argument("--max-queue", type=int, default=MAX_QUEUE, metavar="N", help="waiting at most")
    parser.add_argument("--service", choices=("p99", "p50"), default="p99", help="which latency batches really take")
    parser.add_argument("--answer-ms", type=float, default=0.0, metavar="MS", help="from a batch's end to its answers")
    parser.add_argument("--margin", type=float, default=0.0, help="plan with longer latencies; the server's is 0.3")
    parser.add_argument(
        "--floors", type=float, nargs="+", default=[0.0], metavar="ACCURACY",
        help="least accuracy, 0 to 1; several: each query draws one of them",
    )  # fmt: skip
    parser.add_argument("--sigma", type=float, default=0.0, help="of a lognormal factor on each batch's time")
    parser.add_argument(
        "--stragglers", type=float, nargs=2, default=(0.0, 2.0), metavar=("PROBABILITY", "FACTOR"),
        help="of batches that take so many times as long",
    )  # fmt: skip
    parser.add_argument(
        "--slowdown", type=float, nargs=3, action="append", default=[], metavar=("FROM_S", "TO_S", "FACTOR"),
        help="all batches take so many times as long for a while",
    )  # fmt: skip
    parser.add_argument(
        "--outage", type=float, nargs=3, action="append", default=[], metavar=("WORKER", "FROM_S", "TO_S"),
        help="workers count from 0; inf: it does not come back",
    )  # fmt: skip
    parser.add_argument("--label", help="a name for this run, for plots")
    return parser.parse_args(arguments)


def make_noise(options: argparse.Namespace) -> Noise:
    """The noise that the options ask for."""
    probability, factor = options.stragglers
    return Noise(
        sigma=options.sigma,
        straggler_probability=probability,
        straggler_factor=factor,
        slowdowns=tuple(Slowdown(*given) for given in options.slowdown),
        outages=tuple(Outage(int(worker), *span) for worker, *span in options.outage),
    )


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Simulate as the options say; returns the report with its timelines."""
    table = load_table(options.table)
    policy = slackfit.make_policy(options.policy, table, options.workers)
    arrivals, slos_s, workload = make_workload(options)
    with tqdm(total=len(arrivals), desc="simulate", unit="query", unit_scale=True, disable=None) as bar:
        started_s = time.process_time()
        results = simulate(
            arrivals, slos_s, table, policy,
            workers=options.workers, service=load_medians(options.table) if options.service == "p50" else None,
            noise=make_noise(options), answer_s=options.answer_ms / 1e3, max_queue=options.max_queue,
            margin=options.margin, floors=np.random.default_rng(options.seed).choice(options.floors, len(arrivals)),
            seed=options.seed, progress=bar.update,
        )  # fmt: skip
        cpu_s = time.process_time() - started_s
    return {
        "script": "simulate.py",
        **replay.provenance(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        | {"label": options.label or policy.name, "slo_ms": min(options.slo_ms), "slos_ms": options.slo_ms},
        "synthetic_table": table.device is not None and table.device.kind == "synthetic",
        "workload": workload,
        "cpu_us_per_query": round(cpu_s / len(arrivals) * 1e6, 1),
        **summarise(results),
        **{name: replay.timeline(results, bin_s) for name, bin_s in replay.BINS_S.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, write the file asked for, print the report."""
    options = parse_arguments(arguments)
    try:
        document = report(options)
        if options.json:
            write_text(options.json, json.dumps(document, allow_nan=False) + "\n")
    except (SimulationError, ProfileError, slackfit.PolicyError, workloads.WorkloadError, OSError) as error:
        sys.exit(f"simulate.py: {error}")
    del document["timeline_fine"]
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
