"""What waits: a query with its deadline, where its answer goes, and the heap that holds them, most urgent first.

Reads no clock, and decides nothing: what becomes of each query is the dispatcher's (dispatcher.py).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from slackfit import Entry
from web.errors import ServeError

if TYPE_CHECKING:
    from web.replies import Reply


class Answer(NamedTuple):
    """What the engine found for one query; ``likeliest`` is the class of the highest probability."""

    probabilities: NDArray[np.float32]
    likeliest: int
    entry: Entry
    batch_size: int
    started_s: float
    finished_s: float
    degraded: bool = False  # members of the ensemble that was chosen failed; the entry is what is left of it


Answered = tuple["Query", Answer]


class ReplySlot(Protocol):
    """Where a query's answer goes, once; an asyncio.Future in the server."""

    def done(self) -> bool: ...  # noqa: D102
    def set_result(self, result: Answer, /) -> None: ...  # noqa: D102
    def set_exception(self, exception: BaseException, /) -> None: ...  # noqa: D102


class Nobody:
    """The reply slot of a query that is refused before anybody waits for its answer."""

    def done(self) -> bool:
        """Nobody waits."""
        return True

    def set_result(self, result: Answer, /) -> None:
        """Nobody hears it."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Nobody hears it."""


NOBODY, NOTHING = Nobody(), np.empty(0, np.uint8)


@dataclass(slots=True, eq=False, kw_only=True)
class Query:
    """One input with a deadline; ``priority`` breaks ties between equal deadlines, the higher first.

    ``choice``: the entry that its client asked for; the policy chooses unless there is one.
    """

    input: NDArray[Any]
    arrival_s: float
    slo_s: float
    reply: ReplySlot
    min_accuracy: float = 0.0
    priority: int = 0
    choice: str | None = None
    waiting: bool = False
    order: int = 0  # among equal deadlines; set by the heap
    refused: bool = False

    @property
    def deadline_s(self) -> float:
        """The instant by which the answer is due."""
        return self.arrival_s + self.slo_s


class Canceller(Protocol):
    """Who frees the places of queries: the dispatcher."""

    def cancel(self, query: Query) -> None:
        """The client of a query went away."""


class Collector(Protocol):
    """Who makes replies of announced answers: the server."""

    @property
    def dispatcher(self) -> Canceller | None:
        """The dispatcher, once there is one."""

    def collect(self, announced: Sequence[Pending]) -> Sequence[Reply | ServeError]:
        """What was announced, each once."""


@dataclass(slots=True, eq=False)
class Pending:
    """A query whose answer is announced by a call, so that no task waits for it; ``SuperServe.begin`` makes it."""

    serve: Collector
    announce: Callable[[Pending], object]
    top_k: int
    query: Query | None = None  # until collected or cancelled; it holds this as its reply slot
    outcome: Answer | ServeError | None = None

    def done(self) -> bool:
        """Whether there is an answer or an error, or nobody who wants one any more."""
        return self.outcome is not None or self.query is None

    def set_result(self, result: Answer, /) -> None:
        """Take the answer."""
        self.outcome = result
        self.announce(self)

    def set_exception(self, exception: BaseException, /) -> None:
        """Take the error."""
        assert isinstance(exception, ServeError), "the dispatcher refuses with errors that clients are told"
        self.outcome = exception
        self.announce(self)

    def collect(self) -> Reply | ServeError:
        """What was announced, once; an answer is counted as in time or late by this moment."""
        return self.serve.collect((self,))[0]

    def cancel(self) -> None:
        """Free the query's place, whether announced or not; nothing is announced from here on."""
        query, self.query = self.query, None
        if query is not None and self.serve.dispatcher is not None:
            self.serve.dispatcher.cancel(query)


class DeadlineHeap:
    """Waiting queries, most urgent first; equal deadlines by priority, then by arrival. Reads no clock.

    Kept fully sorted, which is a heap too: queries mostly arrive in the order of their deadlines, so that most are
    appended, and early drop looks deadlines up by their place on each decision in overload. Whatever enters or leaves
    elsewhere moves pointers only, which for a queue of thousands takes less time than a heap's comparisons.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Query]] = []
        self._deadlines_s: list[float] = []  # of the entries
        self._sequence = itertools.count()
        self.nbytes = 0  # of all inputs

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def deadlines_s(self) -> Sequence[float]:
        """All deadlines, ascending: the heap's own, which change as queries come and go."""
        return self._deadlines_s

    def push(self, query: Query) -> None:
        """Add a query."""
        query.order = next(self._sequence) - (query.priority << 48)
        entry = query.deadline_s, query.order, query
        if self._entries and entry < self._entries[-1]:
            place = bisect_left(self._entries, entry)
            self._entries.insert(place, entry)
            self._deadlines_s.insert(place, entry[0])
        else:
            self._entries.append(entry)
            self._deadlines_s.append(entry[0])
        self.nbytes += query.input.nbytes
        query.waiting = True

    @property
    def head(self) -> Query:
        """The most urgent query; IndexError when empty."""
        return self._entries[0][2]

    @property
    def head_deadline_s(self) -> float:
        """When the most urgent query is due."""
        return self._deadlines_s[0]

    @property
    def last_deadline_s(self) -> float:
        """When the least urgent query is due."""
        return self._deadlines_s[-1]

    def first(self, count: int) -> list[Query]:
        """The most urgent queries, which stay where they are."""
        return [entry[2] for entry in self._entries[:count]]

    def pop(self) -> Query:
        """Take out the most urgent query."""
        return self._take_out(0)

    def pop_first(self, count: int) -> list[Query]:
        """Take out the most urgent queries."""
        queries = self.first(count)
        del self._entries[:count]
        del self._deadlines_s[:count]
        for query in queries:
            self.nbytes -= query.input.nbytes
            query.waiting = False
        return queries

    def discard(self, query: Query) -> bool:
        """Take out a query from anywhere; False if it was not waiting."""
        if not query.waiting:
            return False
        self._take_out(bisect_left(self._entries, (query.deadline_s, query.order)))
        return True

    def _take_out(self, place: int) -> Query:
        query = self._entries.pop(place)[2]
        del self._deadlines_s[place]
        self.nbytes -= query.input.nbytes
        query.waiting = False
        return query

    def due_by(self, deadline_s: float) -> int:
        """How many are due at that instant or earlier."""
        return bisect_right(self._deadlines_s, deadline_s)

    def oldest_age_s(self, now_s: float) -> float:
        """How long ago the query arrived that arrived first, 0 when none waits; looks at each."""
        return now_s - min((query.arrival_s for _, _, query in self._entries), default=now_s)
