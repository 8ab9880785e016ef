"""The live page: what its data say of the last minutes, its files, and the page itself in a real browser."""

import glob
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import serving
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from playwright.sync_api import Error, Page, sync_playwright
from serving import (
    IDLE,
    LARGE,
    LARGE_ACCURACY,
    SMALL,
    Clock,
    Served,
    config_of,
    image_array,
    make_query,
    outputs_for,
    two_entries,
)

from dispatcher import Batch, Dispatcher
from slackfit import make_policy
from superserve import SERVE, SuperServe, make_app
from web.live import RECENT_S, SPAN_S, Live

Client = TestClient[web.Request, web.Application]
RAW = {"Content-Type": "application/octet-stream"}
ROOT = Path(__file__).parents[1]
STATIC = ROOT / "web" / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass
class Watched:
    """A dispatcher in virtual time that the live page observes."""

    clock: Clock
    dispatcher: Dispatcher
    live: Live

    def answer(self, count: int = 1, taken_s: float = 0.008, slo_ms: float = 100) -> None:
        """Let queries arrive together, and answer them in one batch."""
        queries = [make_query(self.clock, slo_ms) for _ in range(count)]
        for query in queries:
            self.dispatcher.submit(query)
        batch = self.dispatcher.next_batch()
        assert batch is not None
        self.clock.now_s += taken_s
        self.dispatcher.settle(batch, outputs_for(len(batch.queries), self.clock()))
        for query in batch.queries:
            answer = serving.slot_of(query).answer
            assert answer is not None
            self.dispatcher.deliver(query, answer)

    def document(self, since: int = -1) -> dict[str, Any]:
        return self.live.document(since, IDLE)


@pytest.fixture
def watched() -> Watched:
    clock, table = Clock(), two_entries()
    dispatcher = Dispatcher(table, make_policy("halfslo", table, 1), clock, workers=1, max_queue=100, correction=False)
    live = Live(clock, lambda: len(dispatcher.heap))
    dispatcher.observers.append(live)
    return Watched(clock, dispatcher, live)


# ------------------------------------------------------------------------------------------------------------ the data


def test_a_second_tells_rates_attainment_accuracy_latency_and_batch(watched: Watched) -> None:
    watched.answer(4)
    watched.clock.now_s += 1
    seconds = watched.document()["seconds"]
    assert seconds["second"] == [0]
    assert seconds["arrivals"] == seconds["in_time"] == [4]
    assert seconds["attainment"] == [1]
    assert seconds["accuracy"] == [LARGE_ACCURACY]
    assert seconds["batch_size"] == [4]
    assert seconds["waiting"] == [3]
    assert seconds["p50_ms"][0] == pytest.approx(8, rel=0.05)


def test_a_second_without_queries_has_no_attainment_nor_latency(watched: Watched) -> None:
    watched.clock.now_s += 1
    seconds = watched.document()["seconds"]
    assert (seconds["arrivals"], seconds["waiting"]) == ([0], [0])
    for name in ("attainment", "accuracy", "batch_size", "p50_ms", "p99_ms"):
        assert seconds[name] == [None]


def test_late_and_missed_queries_lower_the_attainment_but_cancelled_ones_do_not(watched: Watched) -> None:
    watched.answer(taken_s=0.2)
    watched.answer()
    for slo_ms in (50, 60):
        watched.dispatcher.submit(make_query(watched.clock, slo_ms))
    gone = make_query(watched.clock, 1000)
    watched.dispatcher.submit(gone)
    watched.dispatcher.cancel(gone)
    watched.clock.now_s += 0.1
    watched.dispatcher.expire()
    watched.clock.now_s += 1
    seconds = watched.document()["seconds"]
    assert (seconds["late"][0], seconds["in_time"][0], seconds["missed"][0], seconds["cancelled"][0]) == (1, 1, 2, 1)
    assert seconds["attainment"][0] == 0.25


def test_quantiles_are_true_to_four_percent(watched: Watched) -> None:
    for number in range(100):
        watched.answer(taken_s=0.001 * 1.05**number if number < 80 else 0.09, slo_ms=1000)
    watched.clock.now_s += 10
    total = watched.live.document(-1, IDLE)["recent"]
    assert isinstance(total, dict)
    seconds = watched.document()["seconds"]
    assert max(each for each in seconds["p99_ms"] if each is not None) == pytest.approx(90, rel=0.041)


def test_only_seconds_that_are_over_and_not_yet_known_are_sent(watched: Watched) -> None:
    for _ in range(5):
        watched.answer()
        watched.clock.now_s += 1
    assert watched.document()["now"] == 5
    assert watched.document(since=2)["seconds"]["second"] == [3, 4]
    assert watched.document(since=4)["seconds"] == {"second": []}
    assert watched.document(since=10**15)["seconds"] == {"second": []}


def test_memory_and_document_hold_five_minutes_and_no_more(watched: Watched) -> None:
    for _ in range(2 * SPAN_S):
        watched.answer()
        watched.clock.now_s += 0.992
    seconds = watched.document()["seconds"]
    assert len(seconds["second"]) == SPAN_S
    assert seconds["second"] == sorted(seconds["second"])
    assert set(seconds["arrivals"]) <= {0, 1, 2}
    assert len(watched.live._slots) == SPAN_S + 1


def test_what_happened_before_a_long_silence_is_forgotten(watched: Watched) -> None:
    watched.answer()
    watched.clock.now_s += 10 * SPAN_S
    document = watched.document()
    assert set(document["seconds"]["arrivals"]) == {0}
    assert document["choices"] == []
    assert document["recent"]["arrivals"] == 0


def test_recent_figures_are_rates_over_the_last_seconds(watched: Watched) -> None:
    for _ in range(30):
        watched.answer(2)
        watched.clock.now_s += 0.992
    recent = watched.document()["recent"]
    assert recent["span_s"] == RECENT_S
    assert recent["arrivals"] == pytest.approx(2, abs=0.21)
    assert recent["p99_ms"] == pytest.approx(8, rel=0.05)


def test_choices_are_those_of_the_last_seconds(watched: Watched) -> None:
    table = two_entries()
    old = Batch(entry=table.entries[0], queries=(make_query(watched.clock),), started_s=watched.clock())
    watched.live.batch_finished(old, 0.001, 0.001)
    assert watched.document()["choices"] == [{"subnet": SMALL, "batch_size": 1, "batches": 1}]
    watched.clock.now_s += 20
    watched.answer(2)
    watched.answer(2)
    assert watched.document()["choices"] == [{"subnet": LARGE, "batch_size": 2, "batches": 2}]


def test_a_second_that_is_over_does_not_change_any_more(watched: Watched) -> None:
    watched.answer(3)
    watched.clock.now_s += 1
    first = watched.document()["seconds"]
    watched.answer(5)
    watched.clock.now_s += 1
    assert {name: column[:1] for name, column in watched.document()["seconds"].items()} == first


# ----------------------------------------------------------------------------------------------------------------- HTTP


async def test_the_data_route_tells_of_queries_and_of_the_server(client: Client) -> None:
    for _ in range(3):
        assert (await client.post("/predict", data=image_array(0).tobytes(), headers=RAW)).status == 200
    response = await client.get("/live")
    assert response.headers["Cache-Control"] == "no-store"
    live = await response.json()
    assert (live["status"], live["span_s"], live["about"]["profile"]) == ("ready", SPAN_S, "tiny")
    assert sum(choice["batches"] for choice in live["choices"]) == 3


async def test_the_data_route_answers_before_the_server_is_ready(profile: Path) -> None:
    app = make_app(config_of(profile))
    serving.fake_engine(app[SERVE])
    app.cleanup_ctx.clear()  # nothing starts it
    async with TestClient(TestServer(app)) as client:
        live = await (await client.get("/live")).json()
        assert (live["status"], live["choices"]) == ("starting", [])
        await app[SERVE].close()
        assert (await (await client.get("/live")).json())["status"] == "draining"


@pytest.mark.parametrize("query", ["since=x", "since=", "since=-2", "since=1.5", f"since={2**53}", "sinse=1"])
async def test_a_bad_parameter_of_the_data_route_is_told(client: Client, query: str) -> None:
    response = await client.get(f"/live?{query}")
    assert response.status == 400
    assert "since" in (await response.json())["error"]


async def test_two_servers_have_different_runs(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as one, SuperServe(config_of(profile)) as other:
        assert one.live.run != other.live.run


class References(HTMLParser):
    """What a page refers to, and whether anything in it would need an inline script or style."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("link", "script", "img", "a"):
            self.found.update(value for name in ("href", "src") if (value := given.get(name)))
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


async def test_everything_that_the_page_refers_to_is_served_by_this_server(client: Client) -> None:
    response = await client.get("/")
    assert response.content_type == "text/html"
    page = References()
    page.feed(await response.text())
    assert page.inline == []
    assert len(page.found) >= 8
    for reference in page.found:
        assert not re.match(r"[a-z]+:|/", reference), "relative, so that the application can be mounted anywhere"
        answer = await client.get(f"/{reference}")
        assert answer.status == 200, reference


async def test_files_have_strict_headers_and_the_right_type(client: Client) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".txt": "text/plain"}
    for path in STATIC.rglob("*.*"):
        response = await client.get(f"/static/{path.relative_to(STATIC).as_posix()}")
        assert await response.read() == path.read_bytes()
        assert response.content_type == types.get(path.suffix, "image/svg+xml")
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_file_that_has_not_changed_is_not_sent_again(client: Client) -> None:
    tag = (await client.get("/static/app.js")).headers["ETag"]
    again = await client.get("/static/app.js", headers={"If-None-Match": tag})
    assert (again.status, await again.read()) == (304, b"")
    assert (await client.get("/static/app.js", headers={"If-None-Match": '"other"'})).status == 200


@pytest.mark.parametrize("name", ["nothing.js", "../live.py", "..%2Flive.py", "vendor", "%2Fetc%2Fpasswd"])
async def test_no_other_file_is_served(client: Client, name: str) -> None:
    assert (await client.get(f"/static/{name}")).status == 404


def test_all_files_of_the_page_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["web"]
    packed = {name for each in patterns for name in glob.glob(each, root_dir=ROOT / "web", recursive=True)}
    assert {path.relative_to(ROOT / "web").as_posix() for path in STATIC.rglob("*") if path.is_file()} <= packed


# -------------------------------------------------------------------------------------------------------------- browser


@contextmanager
def browsing(url: str, **settings: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page in headless Chromium, and what it complains of."""
    if CHROMIUM is None:
        pytest.skip("no chromium; on Debian: apt-get install chromium")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"chromium does not start: {error.message.splitlines()[0]}")
        page = browser.new_page(**settings)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        yield page, complaints
        browser.close()


def reading(page: Page, title: str) -> float:
    """The first number of a chart."""
    chart = page.locator(".chart", has=page.get_by_role("heading", name=title))
    shown = chart.locator("dd span").first.inner_text()
    return float("nan") if shown == "–" else float(shown)


@pytest.mark.slow
def test_the_page_shows_queries_as_they_come_and_answers_one_itself(profile: Path) -> None:
    with Served(profile) as served, browsing(served.url) as (page, complaints):
        page.locator("#status[data-state=ready]").wait_for()
        page.get_by_text("No traffic yet").wait_for()
        assert page.locator(".chart canvas").count() == 6
        page.evaluate(
            """async () => {
              const body = new Uint8Array(192), headers = {"Content-Type": "application/octet-stream"};
              for (let i = 0; i < 30; i++) await fetch("predict?slo_ms=30000", {method: "POST", body, headers});
            }"""
        )
        page.get_by_text("No traffic yet").wait_for(state="hidden")
        page.wait_for_function("parseFloat(document.querySelector('.chart dd span').textContent) > 0")
        assert reading(page, "SLO attainment") == 100
        assert reading(page, "Mean serving accuracy") == 100 * LARGE_ACCURACY
        assert reading(page, "Latency") > 0
        # By keyboard alone, as far as a browser's file dialogue lets a test.
        page.locator("#slo").focus()
        before = page.locator("#slo-value").inner_text()
        for _ in range(50):
            page.keyboard.press("ArrowRight")
        assert (before, page.locator("#slo-value").inner_text()) == ("100 ms", "2000 ms")
        page.locator("#floor").focus()
        page.keyboard.press("End")
        assert page.locator("#floor-value").inner_text() == "90.00 %"
        page.locator("#file").set_input_files(ROOT / "examples" / "cat.jpg")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "send"
        page.keyboard.press("Enter")
        page.locator("#answer .facts").wait_for()
        told = page.locator("#answer").inner_text()
        assert LARGE in told
        assert "SLO 2000 ms" in told
        assert page.locator("#answer .classes tr").count() == 3
        page.locator("#frontier .lit").first.wait_for()
        assert complaints == []


@pytest.mark.slow
def test_the_page_tells_why_there_is_no_answer(profile: Path) -> None:
    with Served(profile) as served, browsing(served.url) as (page, complaints):
        page.locator("#status[data-state=ready]").wait_for()
        note = {"name": "note.png", "mimeType": "image/png", "buffer": b"this is no image"}
        page.locator("#file").set_input_files(files=[note])  # type: ignore[list-item]
        page.locator("#send").click()
        page.get_by_text("No answer (400, bad_request)").wait_for()
        assert [text for text in complaints if "400" not in text] == []


@pytest.mark.slow
def test_the_page_fits_a_phone_and_notices_that_the_server_is_gone(profile: Path) -> None:
    phone = {"width": 360, "height": 740}
    with Served(profile) as served, browsing(served.url, viewport=phone, color_scheme="dark") as (page, complaints):
        page.locator("#status[data-state=ready]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 22)"
        assert complaints == []
        served.stop()
        page.locator("#status[data-state=unreachable]").wait_for()
        page.get_by_text("The server cannot be reached.").wait_for()


@pytest.mark.slow
def test_the_page_takes_a_key_from_its_address_and_hides_it(profile: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key-of-the-page-1\n", encoding="utf-8")
    with Served(profile, api_key_file=tmp_path / "keys") as served, browsing(served.url) as (page, complaints):
        page.get_by_text("This server asks for an API key that it knows").wait_for()
        assert page.locator("#status").inner_text() == "needs a key"
        page.evaluate("location.hash = 'key=a-key-of-the-page-1'")
        page.locator("#status[data-state=ready]").wait_for()
        assert "key" not in page.url
        page.locator("#file").set_input_files(ROOT / "examples" / "cat.jpg")
        page.locator("#send").click()
        page.locator("#answer .facts").wait_for()
        assert [text for text in complaints if "401" not in text] == []
