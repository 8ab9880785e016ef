"""What /metrics counts, and that documents, dashboard and alerts name only what it exports."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serving
import yaml
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from serving import (
    IDLE,
    LARGE,
    LARGE_ACCURACY,
    SMALL,
    Clock,
    config_of,
    image_array,
    make_query,
    outputs_for,
    two_entries,
)

from config import Config
from dispatcher import Dispatcher
from slackfit import make_policy
from superserve import SuperServe, make_app
from web.errors import DeadlineExceeded, QueueFull
from web.metrics import OUTCOMES, Distribution, Metrics

ROOT = Path(__file__).parents[1]
RAW = {"Content-Type": "application/octet-stream"}
PIXELS = image_array(0).tobytes()
SUFFIXES = {
    "counter": ("_total",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def promql_names(families: Iterable[Metric]) -> set[str]:
    """The names by which PromQL knows them."""
    return {each.name + suffix for each in families for suffix in SUFFIXES.get(each.type, ("",))}


def observed(clock: Clock, **settings: Any) -> tuple[Dispatcher, Metrics]:
    table = two_entries()
    limits = {"workers": 1, "max_queue": 3} | settings
    found = Dispatcher(table, make_policy("halfslo", table, 1), clock, correction=False, **limits)
    metrics = Metrics(lambda: IDLE, {"version": "0"})
    found.observers.append(metrics)
    return found, metrics


# ------------------------------------------------------------------------------------------------------------- counting


def test_a_value_belongs_to_the_first_bucket_that_it_does_not_exceed() -> None:
    values = Distribution((1, 2))
    for each in (0.5, 1, 1.5, 2, 9):
        values.observe(each)
    (family,) = [values.family("x", "text")]
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert found == {"1.0": 2, "2.0": 4, "+Inf": 5, "x_count": 5, "x_sum": 14}


def test_an_answer_in_time_counts_with_latency_queue_time_and_accuracy() -> None:
    clock = Clock()
    dispatcher, metrics = observed(clock)
    query = make_query(clock, 100)
    dispatcher.submit(query)
    clock.now_s += 0.004
    batch = dispatcher.next_batch()
    assert batch is not None
    clock.now_s += 0.008
    dispatcher.settle(batch, outputs_for(1, clock()))
    answer = serving.slot_of(query).answer
    assert answer is not None
    dispatcher.deliver(query, answer)
    assert value(metrics, "superserve_queries_total") == value(metrics, "superserve_latency_seconds_count") == 1
    assert value(metrics, "superserve_outcomes_total", outcome="in_time") == 1
    assert value(metrics, "superserve_latency_seconds_sum") == pytest.approx(0.012)
    assert value(metrics, "superserve_latency_seconds_bucket", le="0.01") == 0
    assert value(metrics, "superserve_latency_seconds_bucket", le="0.015") == 1
    assert value(metrics, "superserve_queue_time_seconds_sum") == pytest.approx(0.004)
    assert value(metrics, "superserve_serving_accuracy_sum") == LARGE_ACCURACY
    assert value(metrics, "superserve_serving_accuracy_count") == 1
    assert value(metrics, "superserve_batches_total", subnet=LARGE) == 1
    assert value(metrics, "superserve_batch_queries_total", subnet=LARGE) == 1
    assert value(metrics, "superserve_worker_busy_seconds_total") == pytest.approx(0.008)
    assert value(metrics, "superserve_prediction_ratio_sum") == pytest.approx(0.008 / 0.0044)


def test_a_late_answer_has_a_latency_but_no_accuracy() -> None:
    clock = Clock()
    dispatcher, metrics = observed(clock)
    query = make_query(clock, 100)
    dispatcher.submit(query)
    batch = dispatcher.next_batch()
    assert batch is not None
    clock.now_s += 1
    dispatcher.settle(batch, outputs_for(1, clock()))
    answer = serving.slot_of(query).answer
    assert answer is not None
    dispatcher.deliver(query, answer)
    assert value(metrics, "superserve_outcomes_total", outcome="late") == 1
    assert value(metrics, "superserve_latency_seconds_count") == 1
    assert value(metrics, "superserve_serving_accuracy_count") == 0


def test_outcomes_are_those_of_the_dispatcher_and_sum_to_arrivals() -> None:
    clock = Clock()
    found, metrics = observed(clock)
    batches = []
    for number in range(3):
        found.submit(make_query(clock, 1000))
        batches.append(found.next_batch() if number == 0 else None)
    with pytest.raises(DeadlineExceeded):
        found.submit(make_query(clock, 0.01))
    gone = make_query(clock, 500)
    found.submit(gone)
    with pytest.raises(QueueFull):
        found.submit(make_query(clock, 1000))
    found.cancel(gone)
    assert batches[0] is not None
    found.fail(batches[0], "broken")
    clock.now_s += 2
    found.expire()
    counted = {outcome: value(metrics, "superserve_outcomes_total", outcome=outcome) for outcome in OUTCOMES}
    expected = {"expired": 2, "infeasible": 1, "queue_full": 1, "failed": 1, "cancelled": 1}
    assert counted == dict.fromkeys(OUTCOMES, 0) | expected
    assert value(metrics, "superserve_queries_total") == sum(expected.values()) == found.counters["arrivals"]
    assert value(metrics, "superserve_failed_batches_total") == 1
    assert {*OUTCOMES, "arrivals"} >= found.counters.keys()


def test_every_outcome_that_the_dispatcher_names_is_exported_from_the_start() -> None:
    named = re.findall(r"[a-z_]+", (Dispatcher.__doc__ or "").split("outcomes:")[1].split("When nothing")[0])
    assert set(OUTCOMES) <= set(named)
    _, metrics = observed(Clock())
    assert {value(metrics, "superserve_outcomes_total", outcome=outcome) for outcome in OUTCOMES} == {0}


def test_gauges_show_the_state_at_the_moment_of_the_scrape() -> None:
    state = replace(IDLE, ready=False, queue_depth=7, oldest_age_s=0.25, corrections={SMALL: 1.5})
    metrics = Metrics(lambda: state, {"version": "1.2"})
    assert value(metrics, "superserve_ready") == 0
    assert value(metrics, "superserve_queue_depth") == 7
    assert value(metrics, "superserve_queue_oldest_age_seconds") == 0.25
    assert value(metrics, "superserve_correction_ratio", subnet=SMALL) == 1.5
    assert value(metrics, "superserve_build_info", version="1.2") == 1


def test_the_oldest_query_is_not_the_most_urgent_one() -> None:
    clock = Clock()
    found, _ = observed(clock)
    found.submit(make_query(clock, 10_000))
    clock.now_s += 0.25
    found.submit(make_query(clock, 1000))
    assert found.heap.oldest_age_s(clock()) == 0.25


# ----------------------------------------------------------------------------------------------------------------- HTTP


async def test_a_scrape_counts_queries_and_responses(client: TestClient[web.Request, web.Application]) -> None:
    for _ in range(3):
        assert (await client.post("/predict", data=PIXELS, headers=RAW)).status == 200
    assert (await client.post("/predict", data=b"no", headers=RAW)).status == 400
    assert (await client.get("/nowhere")).status == 404
    response = await client.get("/metrics")
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in parse_text(await response.text())}
    responses = families["superserve_http_responses"].samples
    counted = {f"{each.labels['route']} {each.labels['status']}": each.value for each in responses}
    assert counted == {"/predict 200": 3, "/predict 400": 1, "unknown 404": 1}
    (queries,) = families["superserve_queries"].samples
    assert queries.value == 3
    (ready,) = families["superserve_ready"].samples
    assert ready.value == 1
    (build,) = families["superserve_build_info"].samples
    assert (build.labels["profile"], build.labels["policy"]) == ("tiny", Config().policy)


async def test_openmetrics_is_sent_to_who_asks_for_it(client: TestClient[web.Request, web.Application]) -> None:
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.content_type == "application/openmetrics-text"
    assert {family.name for family in parse_openmetrics(await response.text())} >= {"superserve_latency_seconds"}


async def test_metrics_are_there_before_the_server_is_ready(profile: Path) -> None:
    serve = SuperServe(config_of(profile))
    text = generate_latest(serve.metrics.registry).decode()
    await serve.close()
    assert "superserve_ready 0.0" in text
    assert "superserve_queue_limit 1000.0" in text


async def test_two_servers_in_one_process_count_apart(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as one, SuperServe(config_of(profile)) as other:
        await one.infer(image_array(0))
        assert value(one.metrics, "superserve_outcomes_total", outcome="in_time") == 1
        assert value(other.metrics, "superserve_outcomes_total", outcome="in_time") == 0


async def test_a_mounted_application_counts_its_own_responses(profile: Path) -> None:
    inner, outer = make_app(config_of(profile)), web.Application()
    outer.add_subapp("/vision", inner)
    async with TestClient[web.Request, web.Application](TestServer(outer)) as client:
        assert (await client.get("/vision/healthz")).status == 200
        assert (await client.get("/elsewhere")).status == 404
        text = await (await client.get("/vision/metrics")).text()
    assert re.findall(r"^superserve_http_responses_total.*", text, re.MULTILINE) == [
        'superserve_http_responses_total{route="/vision/healthz",status="200"} 1.0'
    ]


# ------------------------------------------------------------------------------------------------------------ documents


def exported() -> set[str]:
    """All names that a server exports to PromQL, those of the process included where there are any."""
    metrics = Metrics(lambda: IDLE, {})
    return promql_names(metrics.registry.collect())


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:superserve|process)_[a-z_]+\b", text)) - {"superserve_edge"}


def dashboard_queries() -> list[str]:
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def alert_rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((ROOT / "docs/alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def documented() -> str:
    return (ROOT / "docs/metrics.md").read_text(encoding="utf-8")


def test_every_metric_is_in_the_table_of_the_documentation() -> None:
    families = Metrics(lambda: IDLE, {}).registry.collect()
    rows = set(re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram|summary|info) ", documented(), re.MULTILINE))
    ending = {"counter": "_total", "info": "_info"}
    expected = {(each.name + ending.get(each.type, ""), each.type) for each in families}
    assert expected - rows == set()
    assert {name for name, _ in rows - expected if not name.startswith("process_")} == set()


@pytest.mark.parametrize("source", ["metrics.md", "grafana.json", "alerts.yml"])
def test_every_metric_named_is_exported(source: str) -> None:
    text = (ROOT / "docs" / source).read_text(encoding="utf-8")
    families = {name.rsplit("_", 1)[0] for name in exported() if name.endswith(("_bucket", "_sum", "_count"))}
    named = names_in(text)
    assert named
    assert {name for name in named - exported() - families if not name.startswith("process_")} == set()


def test_dashboard_and_alerts_have_queries() -> None:
    assert len(dashboard_queries()) >= 10
    assert len(alert_rules()) >= 5
    for rule in alert_rules():
        assert {"alert", "expr", "for", "labels", "annotations"} == rule.keys()
        assert names_in(rule["expr"])
        assert rule["annotations"].keys() == {"summary", "description"}
    assert all(names_in(query) for query in dashboard_queries())


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_outcomes_in_documents_are_exported_ones() -> None:
    texts = [documented(), *dashboard_queries(), *(rule["expr"] for rule in alert_rules())]
    groups = [group for text in texts for group in re.findall(r'outcome[!=]?[=~]"([a-z_|]+)"', text)]
    assert groups
    assert {outcome for group in groups for outcome in group.split("|")} <= set(OUTCOMES)


async def test_the_first_scrape_after_traffic_parses_in_full(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        await serve.infer(image_array(0))
        text = generate_latest(serve.metrics.registry).decode()
    assert promql_names(parse_text(text)) >= {name for name in exported() if name.startswith("superserve_queries")}
