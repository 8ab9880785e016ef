"""GET /metrics: what happens to queries and batches, for Prometheus; docs/metrics.md explains each name.

``Metrics`` observes the dispatcher. Everything is counted on the event loop's thread, in plain numbers without locks,
and becomes metric families only when somebody scrapes: prometheus-client's own histograms look at every bucket under a
lock, three times for one query.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest, openmetrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from web.state import State

if TYPE_CHECKING:
    from dispatcher import Batch
    from queries import Answer, Answered, Query

OUTCOMES = ("in_time", "late", "expired", "given_up", "infeasible", "queue_full", "failed", "cancelled")
LATENCY_BUCKETS_S = tuple(
    each_ms / 1e3
    for each_ms in (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10_000)
)
BATCH_BUCKETS = tuple(2**power for power in range(8))
RATIO_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 2, 3, 5)


class Distribution:
    """How many values lie in each bucket; ``bounds`` are ascending upper limits, which belong to their bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total: float = 0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """The form in which Prometheus reads it."""
        limits = [*map(floatToGoString, self.bounds), "+Inf"]
        buckets = list(zip(limits, map(float, accumulate(self.counts)), strict=True))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


class Metrics(Collector):
    """Counts what an Observer is told, and how HTTP requests were answered; has a registry of its own."""

    def __init__(self, state: Callable[[], State], build: Mapping[str, str]) -> None:
        self._state, self._build = state, dict(build)
        self._arrivals = 0
        self._outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self._responses: Counter[tuple[str, str]] = Counter()  # by route and status
        self._accuracy_total = 0.0
        self._latency_s, self._queue_s = Distribution(LATENCY_BUCKETS_S), Distribution(LATENCY_BUCKETS_S)
        self._batch_size, self._prediction = Distribution(BATCH_BUCKETS), Distribution(RATIO_BUCKETS)
        self._batches: Counter[str] = Counter()
        self._batch_queries: Counter[str] = Counter()
        self._failed_batches = self._degraded = 0
        self._busy_s = 0.0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # ----------------------------------------------------------------------------------------------------- observing

    def arrived(self, now_s: float) -> None:
        """Count a query that came in."""
        self._arrivals += 1

    def arrived_together(self, now_s: float, count: int) -> None:
        """Count so many."""
        self._arrivals += count

    def ended(self, query: Query, outcome: str, now_s: float, answer: Answer | None) -> None:
        """Count what became of a query."""
        if answer is None:
            self._outcomes[outcome] += 1
        else:
            self.answered(((query, answer),), outcome, now_s)

    def answered(self, answered: Sequence[Answered], outcome: str, now_s: float) -> None:
        """Count answers, how long they took and by how accurate a subnet they are."""
        self._outcomes[outcome] += len(answered)
        latencies, queue = self._latency_s, self._queue_s
        for query, answer in answered:  # without calls: this is a good part of what a query costs
            arrival_s = query.arrival_s
            latency_s, queue_s = now_s - arrival_s, answer.started_s - arrival_s
            latencies.counts[bisect_left(LATENCY_BUCKETS_S, latency_s)] += 1
            latencies.total += latency_s
            queue.counts[bisect_left(LATENCY_BUCKETS_S, queue_s)] += 1
            queue.total += queue_s
            self._degraded += answer.degraded
        if outcome == "in_time":
            self._accuracy_total += sum([answer.entry.accuracy for _, answer in answered])

    def batch_finished(self, batch: Batch, taken_s: float, predicted_s: float) -> None:
        """Count a batch, its queries, and how long it took beside what was predicted."""
        name, size = batch.entry.name, len(batch.queries)
        self._batches[name] += 1
        self._batch_queries[name] += size
        self._batch_size.observe(size)
        self._prediction.observe(taken_s / predicted_s)
        self._busy_s += taken_s

    def batch_failed(self, batch: Batch) -> None:
        """Count a batch that could not be computed."""
        self._failed_batches += 1

    async def responded(self, request: web.Request, response: web.StreamResponse) -> None:
        """Count a response by route and status; a signal handler for ``on_response_prepare``."""
        resource = request.match_info.route.resource
        self.count_response("unknown" if resource is None else resource.canonical, response.status)

    def count_response(self, route: str, status: int) -> None:
        """Count a response to a request that was never routed."""
        self._responses[route, str(status)] += 1

    # ----------------------------------------------------------------------------------------------------- collecting

    def collect(self) -> Iterator[Metric]:
        """All families, at the moment of a scrape."""
        yield from self._query_families()
        yield from self._batch_families()
        yield from self._state_families(self._state())

    def _query_families(self) -> Iterator[Metric]:
        yield CounterMetricFamily("superserve_queries", "Queries that arrived", self._arrivals)
        yield _counters("superserve_outcomes", "Queries by what became of them", "outcome", self._outcomes)
        yield self._latency_s.family("superserve_latency_seconds", "Arrival to answer, of answered queries")
        yield self._queue_s.family("superserve_queue_time_seconds", "Arrival to start of batch, of answered queries")
        yield SummaryMetricFamily(
            "superserve_serving_accuracy", "Profiled accuracy, 0 to 1, of queries answered in time",
            count_value=self._outcomes["in_time"], sum_value=self._accuracy_total,
        )  # fmt: skip
        yield CounterMetricFamily("superserve_degraded", "Answers that failed members had no part in", self._degraded)
        responses = CounterMetricFamily(
            "superserve_http_responses", "HTTP responses by route and status", labels=("route", "status")
        )
        for labels, count in self._responses.items():
            responses.add_metric(labels, count)
        yield responses

    def _batch_families(self) -> Iterator[Metric]:
        yield self._batch_size.family("superserve_batch_size", "Queries in a computed batch")
        yield _counters("superserve_batches", "Computed batches by subnet", "subnet", self._batches)
        yield _counters("superserve_batch_queries", "Queries in them by subnet", "subnet", self._batch_queries)
        yield CounterMetricFamily("superserve_failed_batches", "Batches that failed", self._failed_batches)
        yield CounterMetricFamily(
            "superserve_worker_busy_seconds", "Time that workers computed, all together", self._busy_s
        )
        yield self._prediction.family("superserve_prediction_ratio", "Measured by predicted time of a batch")

    def _state_families(self, state: State) -> Iterator[Metric]:
        for name, text, value in (
            ("superserve_ready", "1 when profiled, warmed up and not draining", state.ready),
            ("superserve_workers", "Workers", state.workers),
            ("superserve_workers_busy", "Workers that compute a batch", state.busy_workers),
            ("superserve_queue_depth", "Queries that wait", state.queue_depth),
            ("superserve_queue_limit", "Queries that may wait", state.queue_limit),
            ("superserve_queue_oldest_age_seconds", "For how long the oldest has waited", state.oldest_age_s),
            ("superserve_slowdown_ratio", "Time of batches by that of the table, at present", state.slowdown),
            ("superserve_overhead_seconds", "Time from a batch's end to an answer, as planned with", state.overhead_s),
            ("superserve_held_bytes", "Held beside the shared weights to run faster", state.held_bytes),
            ("superserve_held_subnets", "Subnets for which something is held", state.held_subnets),
        ):
            yield GaugeMetricFamily(name, text, value)
        corrections = GaugeMetricFamily(
            "superserve_correction_ratio", "By what the table in use is corrected for a subnet", labels=("subnet",)
        )
        for subnet, factor in state.corrections.items():
            corrections.add_metric((subnet,), factor)
        yield corrections
        yield InfoMetricFamily("superserve_build", "What is running", self._build)

    # ------------------------------------------------------------------------------------------------------------ HTTP

    async def handle(self, request: web.Request) -> web.Response:
        """GET /metrics: text for Prometheus, or OpenMetrics for who asks for it."""
        if "application/openmetrics-text" in request.headers.get("Accept", ""):
            body = openmetrics.exposition.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return web.Response(body=body, headers={"Content-Type": openmetrics.exposition.CONTENT_TYPE_LATEST})
        return web.Response(body=self.text(), headers={"Content-Type": TEXT_TYPE})

    def text(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return generate_latest(self.registry)


def add_metrics(app: web.Application, metrics: Metrics) -> None:
    """Serve them at /metrics, and count the responses of this application."""
    app.router.add_get("/metrics", metrics.handle)
    app.on_response_prepare.append(metrics.responded)


TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _counters(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family
