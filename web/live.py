"""The live page at / and its data at /live: what happened in each of the last five minutes' seconds, in fixed memory.

The page asks once a second for the seconds that it does not have yet. Polling passes every proxy, holds no connection
open while the server drains, and a server that is gone is noticed by the next request.
"""

from __future__ import annotations

import hashlib
import mimetypes
import secrets
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, inf, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from web.errors import BadRequest, json_response
from web.state import State

if TYPE_CHECKING:
    from dispatcher import Batch
    from queries import Answer, Answered, Query

SPAN_S = 300
RECENT_S, CHOICES_S = 10, 5
# Latencies are kept in buckets that grow by 8 %, so that a quantile is true to 4 %; from 0.1 ms to 70 s.
_SHORTEST_S, _GROWTH, _BUCKETS = 1e-4, 1.08, 176
_REFUSED = ("expired", "given_up", "infeasible", "queue_full", "failed")


@dataclass(slots=True)
class Second:
    """What happened in one second; outcomes count in the second in which they came about.

    ``waiting`` is the largest number of waiting queries that an arriving one or an ending batch found.
    """

    number: int = -1
    arrivals: int = 0
    waiting: int = 0
    accuracy_total: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    choices: Counter[tuple[str, int]] = field(default_factory=Counter)  # batches by subnet and batch size
    latencies: array[int] = field(default_factory=lambda: array("I", [0]) * _BUCKETS)
    figures: dict[str, float | None] | None = None  # kept once the second is over

    def add(self, other: Second) -> None:
        """Sum up with another."""
        self.arrivals += other.arrivals
        self.waiting = max(self.waiting, other.waiting)
        self.accuracy_total += other.accuracy_total
        self.outcomes.update(other.outcomes)
        self.choices.update(other.choices)
        if other.answered:
            self.latencies = array("I", map(int.__add__, self.latencies, other.latencies))

    @property
    def answered(self) -> int:
        """Queries answered, in time or late."""
        return self.outcomes["in_time"] + self.outcomes["late"]

    @property
    def missed(self) -> int:
        """Queries that got no answer, for another reason than that their clients went away."""
        return sum(self.outcomes[outcome] for outcome in _REFUSED)

    @property
    def attainment(self) -> float | None:
        """Share of queries answered in time; None without any."""
        ended = self.answered + self.missed
        return round(self.outcomes["in_time"] / ended, 5) if ended else None

    @property
    def accuracy(self) -> float | None:
        """Mean profiled accuracy of answers in time; None without any."""
        in_time = self.outcomes["in_time"]
        return round(self.accuracy_total / in_time, 5) if in_time else None

    @property
    def batch_size(self) -> float | None:
        """Mean number of queries in a batch; None without any."""
        queries = sum(size * batches for (_, size), batches in self.choices.items())
        return round(queries / self.choices.total(), 2) if queries else None

    def quantile_ms(self, share: float) -> float | None:
        """The latency that such a share of the answered queries did not exceed; None without any."""
        if not self.answered:
            return None
        bucket = bisect_left(list(accumulate(self.latencies)), ceil(share * self.answered))
        return float(f"{1e3 * _SHORTEST_S * _GROWTH**bucket / sqrt(_GROWTH):.3g}")


def _bucket(latency_s: float) -> int:
    """The bucket of a latency; its upper limit is ``_SHORTEST_S * _GROWTH**bucket``."""
    if latency_s <= _SHORTEST_S:
        return 0
    return min(ceil(log(latency_s / _SHORTEST_S) / _LOG_GROWTH), _BUCKETS - 1)


_LOG_GROWTH = log(_GROWTH)


class Live:
    """An Observer that keeps the last SPAN_S seconds in a ring of as many slots."""

    def __init__(self, clock: Callable[[], float], waiting: Callable[[], int]) -> None:
        self.run = secrets.token_hex(4)  # tells a page that the server was started anew
        self._clock, self._waiting = clock, waiting
        self._started_s = clock()
        self._slots = [Second() for _ in range(SPAN_S + 1)]
        self._slot = self._slots[0]
        self._end_s = -inf  # of the second that _slot stands for

    def arrived(self, now_s: float) -> None:
        """Count a query that came in, and how many were waiting."""
        slot = self._slot if now_s < self._end_s else self._at(now_s)
        slot.arrivals += 1
        if (waiting := self._waiting()) > slot.waiting:
            slot.waiting = waiting

    def arrived_together(self, now_s: float, count: int) -> None:
        """Count so many, the last of which found the others waiting."""
        self.arrived(now_s)
        self._slot.arrivals += count - 1
        self._slot.waiting = max(self._slot.waiting, self._waiting() + count - 1)

    def ended(self, query: Query, outcome: str, now_s: float, answer: Answer | None) -> None:
        """Count what became of a query."""
        if answer is not None:
            self.answered(((query, answer),), outcome, now_s)
            return
        slot = self._slot if now_s < self._end_s else self._at(now_s)
        slot.outcomes[outcome] += 1

    def answered(self, answered: Sequence[Answered], outcome: str, now_s: float) -> None:
        """Count answers, their latencies, and the accuracies if they were in time."""
        slot = self._slot if now_s < self._end_s else self._at(now_s)
        slot.outcomes[outcome] += len(answered)
        latencies = slot.latencies
        for query, _ in answered:
            latencies[_bucket(now_s - query.arrival_s)] += 1
        if outcome == "in_time":
            slot.accuracy_total += sum([answer.entry.accuracy for _, answer in answered])

    def batch_finished(self, batch: Batch, taken_s: float, predicted_s: float) -> None:
        """Count what was chosen, in the second in which it was done."""
        slot = self._at(self._clock())
        slot.choices[batch.entry.name, len(batch.queries)] += 1
        slot.waiting = max(slot.waiting, self._waiting())

    def batch_failed(self, batch: Batch) -> None:
        """Its queries are counted one by one."""

    def _at(self, now_s: float) -> Second:
        """The slot of this moment's second, emptied if it stood for an earlier one."""
        number = int(now_s - self._started_s)
        slot = self._slots[number % len(self._slots)]
        if slot.number != number:
            _figures_of(self._slot)  # now, so that the first page to ask does not hold up queries
            slot = self._slots[number % len(self._slots)] = Second(number)
        self._slot, self._end_s = slot, self._started_s + number + 1
        return slot

    def document(self, since: int, state: State) -> dict[str, object]:
        """The seconds after ``since`` that are over, and sums over the last few; None where nothing happened."""
        now = int(self._clock() - self._started_s)
        seconds = self._seconds(max(since + 1, now - SPAN_S, 0), now)
        return {
            "run": self.run,
            "status": state.status,
            "now": now,
            "span_s": SPAN_S,
            "waiting": state.queue_depth,
            "seconds": _columns(seconds),
            "recent": {"span_s": RECENT_S} | _figures(_sum(self._seconds(max(now - RECENT_S, 0), now)), RECENT_S),
            "choices": self._choices(now),
        }

    def _seconds(self, first: int, end: int) -> list[Second]:
        found = []
        for number in range(first, end):
            slot = self._slots[number % len(self._slots)]
            found.append(slot if slot.number == number else Second(number))
        return found

    def _choices(self, now: int) -> list[dict[str, object]]:
        recent = _sum(self._seconds(max(now - CHOICES_S, 0), now + 1)).choices
        return [
            {"subnet": subnet, "batch_size": size, "batches": count} for (subnet, size), count in sorted(recent.items())
        ]


def _sum(seconds: Iterable[Second]) -> Second:
    total = Second()
    for each in seconds:
        total.add(each)
    return total


# What is told of a span of so many seconds, of which the Second is the sum; the live page reads them by these names.
FIGURES: Mapping[str, Callable[[Second, int], float | None]] = {
    "arrivals": lambda total, span_s: round(total.arrivals / span_s, 2),
    "in_time": lambda total, span_s: round(total.outcomes["in_time"] / span_s, 2),
    "late": lambda total, span_s: round(total.outcomes["late"] / span_s, 2),
    "missed": lambda total, span_s: round(total.missed / span_s, 2),
    "cancelled": lambda total, span_s: round(total.outcomes["cancelled"] / span_s, 2),
    "attainment": lambda total, _: total.attainment,
    "accuracy": lambda total, _: total.accuracy,
    "waiting": lambda total, _: total.waiting,
    "batch_size": lambda total, _: total.batch_size,
    "p50_ms": lambda total, _: total.quantile_ms(0.5),
    "p99_ms": lambda total, _: total.quantile_ms(0.99),
}


def _figures(second: Second, span_s: int = 1) -> dict[str, float | None]:
    return {name: figure(second, span_s) for name, figure in FIGURES.items()}


def _figures_of(second: Second) -> dict[str, float | None]:
    """The figures of a second that is over."""
    if second.figures is None:
        second.figures = _figures(second)
    return second.figures


def _columns(seconds: Iterable[Second]) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {"second": []}
    for each in seconds:
        columns["second"].append(each.number)
        for name, figure in _figures_of(each).items():
            columns.setdefault(name, []).append(figure)
    return columns


# ---------------------------------------------------------------------------------------------------------------- HTTP

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # may be kept, but is asked for again; mostly answered 304
}


class Page:
    """The page, its files, which are read once, and its data."""

    def __init__(self, live: Live, state: Callable[[], State], about: Mapping[str, str]) -> None:
        self._live, self._state, self._about = live, state, dict(about)
        root = Path(__file__).parent / "static"
        self._files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        self._bodies = {name: path.read_bytes() for name, path in self._files.items()}

    async def index(self, request: web.Request) -> web.Response:
        """GET /: the page."""
        return self._send(request, "index.html")

    async def file(self, request: web.Request) -> web.Response:
        """GET /static/…: one of its files."""
        name = request.match_info["name"]
        if name not in self._bodies:
            raise web.HTTPNotFound
        return self._send(request, name)

    async def data(self, request: web.Request) -> web.Response:
        """GET /live: the seconds after ``since`` that are over, and what is going on now."""
        unknown = request.query.keys() - {"since"}
        if unknown:
            raise BadRequest(f"unknown parameter '{min(unknown):.40}'; known: since")
        document = self._live.document(_since(request.query.get("since", "-1")), self._state())
        return json_response(document | {"about": self._about}, headers={"Cache-Control": "no-store"})

    def _send(self, request: web.Request, name: str) -> web.Response:
        body = self._bodies[name]
        tag = hashlib.sha256(body).hexdigest()[:16]
        headers = _HEADERS | {"ETag": f'"{tag}"'}
        if any(each.value in (tag, "*") for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        content_type = mimetypes.guess_type(name)[0] or "text/plain"
        return web.Response(body=body, headers=headers, content_type=content_type, charset="utf-8")


def _since(text: str) -> int:
    try:
        since = int(text)
    except ValueError:
        since = -2
    if not -1 <= since < 2**53:
        raise BadRequest(f"since must be the number of a second, or -1 for all, not '{text[:40]}'")
    return since


def add_live(app: web.Application, page: Page) -> None:
    """Serve the page, its files and its data."""
    app.router.add_get("/", page.index)
    app.router.add_get("/static/{name:.+}", page.file)
    app.router.add_get("/live", page.data)
