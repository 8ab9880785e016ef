"""SlackFit: which subnet to run next, and on how many queries.

A **profile table** says how accurate each control choice is and how long it takes on this device by batch size. A
**policy** reads the table, the time and the waiting queries, and returns a ``Decision``: how many of the most urgent
queries to give up, what to run on the most urgent of the rest, and on how many of them at once.

This file reads no clock and does no I/O after loading; it knows neither torch nor HTTP. The caller passes ``now_s``,
already moved forward by the overhead of answering, so that the slack of a query is its deadline minus ``now_s``.

From bottom to top: records and the table (``build_table``), its files (``load_choices``, ``load_latencies``), what
policies share (``Decision``, ``drop_hopeless``, ``drop_early``), and the policies (``make_policy``).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Protocol

SCHEMA = 1
KINDS = ("subnet", "ensemble")
NOISE = 0.2  # a larger batch may be measured this much faster than a smaller one before the profile is refused
LONGEST_S = 3600.0  # no batch takes an hour: a longer latency is a wrong unit or an infinity
LARGEST = 10**18  # of counts such as MACs


class ProfileError(ValueError):
    """A profile that cannot be used; says which file and field."""


class DeviceMismatch(ProfileError):
    """A latency table that was measured on another device than this one."""


class PolicyError(ValueError):
    """A policy that does not exist or cannot be had with this table; lists what can."""


# ------------------------------------------------------------------------------------------------ records and the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a latency table was measured on. A table fits only a device that is equal in every field."""

    kind: str  # "cpu" or "cuda"
    name: str
    torch: str
    dtype: str
    threads: int  # CPU threads per worker; 0 on a GPU
    workers: int  # how many ran batches at the same time while measuring

    @property
    def file_name(self) -> str:
        """Where this device's latencies are kept; the torch version is left out, so that a new one replaces the old."""
        parts = (self.kind, self.name, f"t{self.threads}", f"w{self.workers}", self.dtype)
        return f"latency-{'-'.join(_slug(part) for part in parts)}.json"

    def __str__(self) -> str:
        what = f"{self.kind} {self.name}, torch {self.torch}, {self.dtype}"
        return f"{what}, {self.threads} threads per worker, {self.workers} workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One row of choices.json: a subnet or ensemble and what is known of it on any device."""

    name: str
    kind: str  # one of KINDS
    accuracy: float  # 0 to 1, on validation images
    accuracy_samples: int
    test_accuracy: float | None
    parameters: int
    macs: int
    frontier: bool  # worth profiling on a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """As measured for one choice, one number per profiled batch size."""

    p50_s: tuple[float, ...]
    p99_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A choice with its planned latency on this device: ``latency_s[n]`` for a batch of n, ``latency_s[0]`` is 0."""

    choice: Choice
    latency_s: tuple[float, ...]

    @property
    def name(self) -> str:
        """The choice's name."""
        return self.choice.name

    @property
    def accuracy(self) -> float:
        """The choice's accuracy, 0 to 1."""
        return self.choice.accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """The entries on the accuracy/latency frontier, both ascending; made by ``build_table``."""

    entries: tuple[Entry, ...]
    batch_sizes: tuple[int, ...]  # those that were measured
    device: Device | None = None

    @property
    def max_batch(self) -> int:
        """The largest batch that any entry may run."""
        return self.batch_sizes[-1]

    @property
    def fastest(self) -> Entry:
        """The least accurate entry."""
        return self.entries[0]

    @property
    def most_accurate(self) -> Entry:
        """The slowest entry."""
        return self.entries[-1]

    def by_name(self, name: str) -> Entry:
        """The entry of this name; raises ProfileError, listing the names that there are, for any other."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.entries)
        raise ProfileError(f"no entry '{name}' in the profile table: there are {known}")


def build_table(
    choices: Iterable[Choice],
    batch_sizes: Sequence[int],
    latencies: Mapping[str, Latencies],
    device: Device | None = None,
) -> ProfileTable:
    """The table that policies plan with, by 99th percentiles; raises ProfileError for gaps and impossible figures."""
    known = _by_unique_name(choices)
    _check_batch_sizes(batch_sizes)
    for name in latencies:
        if name not in known:
            raise ProfileError(f"latencies.{name}: there is no such choice")
    entries = []
    for choice in known.values():
        if choice.name in latencies:
            entries.append(Entry(choice=choice, latency_s=_planned(choice.name, batch_sizes, latencies[choice.name])))
        elif choice.frontier:
            raise ProfileError(f"latencies.{choice.name}: missing, but the choice is on the frontier")
    if not entries:
        raise ProfileError("latencies: empty")
    return ProfileTable(entries=_frontier(entries, batch_sizes), batch_sizes=tuple(batch_sizes), device=device)


def table_document(table: ProfileTable) -> dict[str, object]:
    """The table as JSON for people and dashboards, latencies in milliseconds by profiled batch size."""
    shown = ("name", "kind", "accuracy", "test_accuracy", "parameters", "macs")
    entries = [
        {name: getattr(entry.choice, name) for name in shown}
        | {"latency_ms": [_ms(entry.latency_s[size]) for size in table.batch_sizes]}
        for entry in table.entries
    ]
    device = asdict(table.device) if table.device else None
    return {"device": device, "batch_sizes": list(table.batch_sizes), "entries": entries}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "unknown"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _by_unique_name(choices: Iterable[Choice]) -> dict[str, Choice]:
    known: dict[str, Choice] = {}
    for choice in choices:
        if choice.name in known:
            raise ProfileError(f"choices: '{choice.name}' is there twice")
        known[choice.name] = choice
    return known


def _check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    ascending = all(smaller < larger for smaller, larger in pairwise(batch_sizes))
    if not batch_sizes or batch_sizes[0] != 1 or not ascending:
        raise ProfileError(f"batch_sizes: must ascend from 1, not {list(batch_sizes)}")


def _planned(name: str, batch_sizes: Sequence[int], measured: Latencies) -> tuple[float, ...]:
    _levelled(f"latencies.{name}.p50_ms", batch_sizes, measured.p50_s)
    return _interpolated(batch_sizes, _levelled(f"latencies.{name}.p99_ms", batch_sizes, measured.p99_s))


def _levelled(where: str, batch_sizes: Sequence[int], latencies_s: Sequence[float]) -> list[float]:
    """The latencies with dips within noise filled up, so that they never fall as the batch grows."""
    if len(latencies_s) != len(batch_sizes):
        raise ProfileError(f"{where}: {len(latencies_s)} numbers for {len(batch_sizes)} batch sizes")
    levelled: list[float] = []
    highest_s = 0.0
    for size, latency_s in zip(batch_sizes, latencies_s, strict=True):
        if not 0 < latency_s <= LONGEST_S:
            raise ProfileError(f"{where}: must be positive, finite and at most an hour, not {latency_s * 1e3:g}")
        if latency_s < (1 - NOISE) * highest_s:
            raise ProfileError(f"{where}: falls from {highest_s * 1e3:g} to {latency_s * 1e3:g} at batch size {size}")
        highest_s = max(highest_s, latency_s)
        levelled.append(highest_s)
    return levelled


def _interpolated(batch_sizes: Sequence[int], latencies_s: Sequence[float]) -> tuple[float, ...]:
    """Latency by batch size, 0 to the largest, linear between those measured."""
    every_s = [0.0]
    for (small, low_s), (large, high_s) in pairwise(zip((0, *batch_sizes), (0.0, *latencies_s), strict=True)):
        step_s = (high_s - low_s) / (large - small)
        every_s += [min(low_s + step_s * above, high_s) for above in range(1, large - small)] + [high_s]
    return tuple(every_s)


def _frontier(entries: Iterable[Entry], batch_sizes: Sequence[int]) -> tuple[Entry, ...]:
    """Accuracy ascending, without the entries that another equals or beats in both accuracy and mean latency."""

    def slowness(entry: Entry) -> tuple[float, float]:
        return sum(entry.latency_s[size] for size in batch_sizes), -entry.accuracy

    kept: list[Entry] = []
    for entry in sorted(entries, key=slowness):
        if not kept or entry.accuracy > kept[-1].accuracy:
            kept.append(entry)
    return tuple(kept)


# -------------------------------------------------------------------------------------------------- the profile's files


def load_choices(folder: Path) -> tuple[Choice, ...]:
    """The rows of the folder's choices.json; raises ProfileError, naming file and field, for anything amiss."""
    path = Path(folder) / "choices.json"
    with _naming(path):
        document = _read(path, ("choices",))
        rows = _array(document["choices"], "choices")
        choices = tuple(_parse_choice(row, f"choices[{index}]") for index, row in enumerate(rows))
        _by_unique_name(choices)
        return choices


def load_latencies(path: Path, choices: Iterable[Choice], device: Device) -> ProfileTable:
    """The table of one latency file; raises ProfileError for anything amiss, DeviceMismatch for another device's."""
    with _naming(path):
        document = _read(path, ("device", "batch_sizes", "latencies"))
        measured_on = _parse_device(document["device"])
        if measured_on != device:
            raise DeviceMismatch(f"device: measured on {measured_on}; this is {device}")
        sizes = [_count(size, "batch_sizes", 1) for size in _array(document["batch_sizes"], "batch_sizes")]
        rows = _mapping(document["latencies"], "latencies").items()
        latencies = {name: _parse_latencies(row, f"latencies.{name}") for name, row in rows}
        return build_table(choices, sizes, latencies, device)


def save_choices(folder: Path, choices: Iterable[Choice]) -> None:
    """Write the folder's choices.json, whole or not at all."""
    _write(Path(folder) / "choices.json", {"schema": SCHEMA, "choices": [asdict(choice) for choice in choices]})


def save_latencies(path: Path, device: Device, batch_sizes: Sequence[int], latencies: Mapping[str, Latencies]) -> None:
    """Write one latency file, whole or not at all."""
    rows = {
        name: {"p50_ms": [_ms(value) for value in row.p50_s], "p99_ms": [_ms(value) for value in row.p99_s]}
        for name, row in latencies.items()
    }
    document = {"schema": SCHEMA, "device": asdict(device), "batch_sizes": list(batch_sizes), "latencies": rows}
    _write(path, document)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ProfileError as error:
        raise type(error)(f"{path}: {error}") from error


def _write(path: Path, document: Mapping[str, object]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _read(path: Path, names: Sequence[str]) -> dict[str, object]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}") from error
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"is not JSON: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    # The schema comes first: a file of another version has other fields, and that is not what is wrong with it.
    if schema is not None and (type(schema) is not int or schema != SCHEMA):
        raise ProfileError(f"schema: must be {SCHEMA}, not {schema!r}")
    return _record(document, "", ("schema", *names))


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for name, value in pairs:
        if name in seen:
            raise ProfileError(f"{name}: is there twice")
        seen[name] = value
    return seen


def _parse_choice(value: object, where: str) -> Choice:
    row = _record(value, where, [spec.name for spec in fields(Choice)])
    tested = row["test_accuracy"]
    return Choice(
        name=_text(row["name"], f"{where}.name"),
        kind=_text(row["kind"], f"{where}.kind", KINDS),
        accuracy=_number(row["accuracy"], f"{where}.accuracy", 0, 1),
        accuracy_samples=_count(row["accuracy_samples"], f"{where}.accuracy_samples", 1),
        test_accuracy=None if tested is None else _number(tested, f"{where}.test_accuracy", 0, 1),
        parameters=_count(row["parameters"], f"{where}.parameters", 1),
        macs=_count(row["macs"], f"{where}.macs", 1),
        frontier=_flag(row["frontier"], f"{where}.frontier"),
    )


def _parse_device(value: object) -> Device:
    row = _record(value, "device", [spec.name for spec in fields(Device)])
    return Device(
        kind=_text(row["kind"], "device.kind", ("cpu", "cuda")),
        name=_text(row["name"], "device.name"),
        torch=_text(row["torch"], "device.torch"),
        dtype=_text(row["dtype"], "device.dtype"),
        threads=_count(row["threads"], "device.threads", 0),
        workers=_count(row["workers"], "device.workers", 1),
    )


def _parse_latencies(value: object, where: str) -> Latencies:
    row = _record(value, where, ("p50_ms", "p99_ms"))

    def seconds(name: str) -> tuple[float, ...]:
        numbers = _array(row[name], f"{where}.{name}")
        return tuple(_number(number, f"{where}.{name}", 0, LONGEST_S * 1e3) / 1e3 for number in numbers)

    return Latencies(p50_s=seconds("p50_ms"), p99_s=seconds("p99_ms"))


def _record(value: object, where: str, names: Sequence[str]) -> dict[str, object]:
    """The value as an object with exactly these fields."""
    row = _mapping(value, where)
    prefix = f"{where}." if where else ""
    for name in names:
        if name not in row:
            raise ProfileError(f"{prefix}{name}: missing")
    for name in row:
        if name not in names:
            raise ProfileError(f"{prefix}{name}: unknown field; the fields are {', '.join(names)}")
    return row


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ProfileError(f"{where + ': ' if where else ''}must be an object, not {value!r:.40}")
    return value


def _array(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise ProfileError(f"{where}: must be a list, not {value!r:.40}")
    return value


def _text(value: object, where: str, allowed: Sequence[str] = ()) -> str:
    if not isinstance(value, str) or not value or (allowed and value not in allowed):
        raise ProfileError(f"{where}: must be {' or '.join(allowed) or 'some text'}, not {value!r:.40}")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ProfileError(f"{where}: must be true or false, not {value!r:.40}")
    return value


def _number(value: object, where: str, low: float, high: float) -> float:
    # NaN is in no range, and true is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ProfileError(f"{where}: must be a number from {low:g} to {high:g}, not {value!r:.40}")
    return float(value)


def _count(value: object, where: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LARGEST:
        raise ProfileError(f"{where}: must be a whole number from {low}, not {value!r:.40}")
    return value


# -------------------------------------------------------------------------------------------------- what policies share


class QueueView(Protocol):
    """What a policy may see of the waiting queries."""

    def __len__(self) -> int:
        """How many wait."""
        ...

    @property
    def head_deadline_s(self) -> float:
        """The most urgent deadline."""
        ...

    def deadlines_s(self) -> Sequence[float]:
        """All deadlines, ascending. Costs time in proportion to the queue: asked for only in overload."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """Give up this many of the most urgent queries, then run the entry (None: nothing) on the most urgent left."""

    give_up: int
    entry: Entry | None
    batch_size: int


class Policy(Protocol):
    """Decides what an idle worker does next."""

    name: str

    def arrived(self, now_s: float, slo_s: float) -> None:
        """A query arrived."""
        ...

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """What to do now, the queue not being empty, with the table's entries from index ``lowest`` on."""
        ...


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of the queue once some of its most urgent queries are given up."""

    given_up: int
    count: int
    slack_s: float  # of the most urgent that is left; 0 if none is


def largest_batch(latency_s: Sequence[float], slack_s: float, count: int) -> int:
    """The most queries, up to count, that are done within the slack; 0 if not even one is."""
    return bisect_right(latency_s, slack_s, 1, min(count, len(latency_s) - 1) + 1) - 1


def drop_hopeless(now_s: float, queue: QueueView, latency_s: Sequence[float]) -> Rest:
    """Give up the queries that would be late even if run at once and alone, at this latency by batch size."""
    slack_s = queue.head_deadline_s - now_s
    if slack_s >= latency_s[1]:
        return Rest(0, len(queue), slack_s)
    deadlines_s = queue.deadlines_s()
    return _rest(now_s, deadlines_s, _hopeless(now_s, deadlines_s, latency_s))


# How far to look ahead when the queue cannot be served whole. What is lost later is for later decisions to see.
SIMULATED_BATCHES = 64


def drop_early(now_s: float, queue: QueueView, latency_s: Sequence[float], slo_s: float, workers: int) -> Rest:
    """Give up at once the queries that cannot all be saved, rather than one by one at their deadlines.

    Without this, a queue that is a little too long is served in ever smaller batches, each just in time for its most
    urgent query and none of them efficient. Nothing is given up while a single batch clears the queue. Else a run of
    the largest batches that fit is simulated, with the cheapest latencies; as many as it would lose, but no more, are
    given up, and only until the next in line has slack for a batch of all the others, or for 0.4 of an SLO.
    """
    slack_s, count = queue.head_deadline_s - now_s, len(queue)
    if largest_batch(latency_s, slack_s, count) == count:
        return Rest(0, count, slack_s)
    deadlines_s = queue.deadlines_s()
    first = _hopeless(now_s, deadlines_s, latency_s)
    lost = _unserved(now_s, deadlines_s, first, latency_s, workers)

    def has_slack(head: int) -> bool:
        efficient_s = latency_s[min(count - head, len(latency_s) - 1)]
        return deadlines_s[head] - now_s >= min(efficient_s, 0.4 * slo_s)

    # Further down the queue slack grows and the batch of the others shrinks, so that the first place can be bisected.
    return _rest(now_s, deadlines_s, first + bisect_left(range(first, first + lost), True, key=has_slack))


def _rest(now_s: float, deadlines_s: Sequence[float], given_up: int) -> Rest:
    count = len(deadlines_s) - given_up
    return Rest(given_up, count, deadlines_s[given_up] - now_s if count else 0.0)


def _hopeless(now_s: float, deadlines_s: Sequence[float], latency_s: Sequence[float]) -> int:
    # Compares slack, as largest_batch does: the rounding of now + latency could call the same query hopeless or not.
    return bisect_left(deadlines_s, latency_s[1], key=lambda deadline_s: deadline_s - now_s)


def _unserved(now_s: float, deadlines_s: Sequence[float], first: int, latency_s: Sequence[float], workers: int) -> int:
    """How many of the queries from ``first`` on are lost in the largest batches that fit, one after another."""
    lost, count, most, shortest_s = 0, len(deadlines_s), len(latency_s) - 1, latency_s[1]
    for _ in range(SIMULATED_BATCHES):
        if first < count and deadlines_s[first] - now_s < shortest_s:
            alive = bisect_left(deadlines_s, now_s + shortest_s, first + 1)
            lost += alive - first
            first = alive
        if first == count:
            break
        # largest_batch, but for speed: this loop is most of the time that a decision takes in overload.
        batch_size = bisect_right(latency_s, deadlines_s[first] - now_s, 2, min(count - first, most) + 1) - 1
        now_s += latency_s[batch_size] / workers
        first += batch_size
    return lost


# --------------------------------------------------------------------------------------------------------- the policies


class HalfSLO:
    """The default: the most accurate subnet that clears the whole queue within half of an SLO, and early drop.

    With batches of length T back to back, a query waits up to T and is then served in T, so that T may be half of the
    SLO; batches are the more efficient the longer they are. With N workers the wait is T/N, and the share N/(N+1).
    """

    def __init__(self, table: ProfileTable, workers: int = 1) -> None:
        self.name = "halfslo"
        self._table = table
        self._workers = workers
        self._share = min(0.85, workers / (workers + 1))
        self._slos_s: deque[float] = deque(maxlen=64)

    def arrived(self, now_s: float, slo_s: float) -> None:
        """Remember the SLO: the shortest recent one caps the length of a batch."""
        self._slos_s.append(slo_s)

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """Clear the queue as accurately as the cap allows, else run as much as fits with the cheapest entry."""
        entries = self._table.entries
        cheapest = entries[lowest]
        slo_s = min(self._slos_s, default=inf)
        rest = drop_early(now_s, queue, cheapest.latency_s, slo_s, self._workers)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        batch_size = min(rest.count, self._table.max_batch)
        limit_s = min(rest.slack_s, self._share * slo_s)
        for index in range(len(entries) - 1, lowest - 1, -1):
            if entries[index].latency_s[batch_size] <= limit_s:
                return Decision(rest.given_up, entries[index], batch_size)
        return Decision(rest.given_up, cheapest, largest_batch(cheapest.latency_s, rest.slack_s, batch_size))


DEFAULT_BUCKETS = 16


@dataclass(frozen=True, slots=True)
class _Plan:
    """SlackFit's answers: ``best[i][j]`` if choice i is the slowest that fits and j batch sizes are below the queue."""

    latencies_s: tuple[float, ...]  # of the choices, ascending
    best: tuple[tuple[tuple[Entry, int], ...], ...]


class SlackFit:
    """The paper's policy (SuperServe, arXiv 2312.16733): less slack, a faster choice; a longer queue, a larger batch.

    All choices (entry, profiled batch size) are put into buckets evenly spaced by latency. The slack of the most urgent
    query picks the bucket closest to it from below; in the bucket, the largest batch that the queue can fill wins, and
    among equals the most accurate. The slowest choice that fits the slack is always in that bucket, so that all answers
    can be tabled by that choice and by which batch sizes the queue can fill.
    """

    def __init__(self, table: ProfileTable, buckets: int = DEFAULT_BUCKETS) -> None:
        if buckets < 1:
            raise PolicyError(f"slackfit needs at least one bucket, not {buckets}")
        self.name = "slackfit" if buckets == DEFAULT_BUCKETS else f"slackfit:{buckets}"
        self._table = table
        self._buckets = buckets
        self._least_s = min(entry.latency_s[1] for entry in table.entries)
        self._width_s = (max(entry.latency_s[-1] for entry in table.entries) - self._least_s) / buckets
        self._plans = {0: self._plan(0)}

    def arrived(self, now_s: float, slo_s: float) -> None:
        """Of no interest to this policy."""

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """Two look-ups by bisection; the first decision at an accuracy floor also tables its answers."""
        rest = drop_hopeless(now_s, queue, self._table.entries[lowest].latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        if lowest not in self._plans:
            self._plans[lowest] = self._plan(lowest)
        plan = self._plans[lowest]
        slowest = bisect_right(plan.latencies_s, rest.slack_s) - 1
        entry, batch_size = plan.best[slowest][bisect_left(self._table.batch_sizes, rest.count)]
        return Decision(rest.given_up, entry, min(batch_size, rest.count))

    def _plan(self, lowest: int) -> _Plan:
        sizes = self._table.batch_sizes
        pairs = [(entry, size) for entry in self._table.entries[lowest:] for size in sizes]
        pairs.sort(key=lambda pair: pair[0].latency_s[pair[1]])
        latencies_s = tuple(entry.latency_s[size] for entry, size in pairs)
        # What a queue can fill: exactly one of the sizes or, at the end, more than the largest.
        fillable = (*sizes, sizes[-1] + 1)
        rows: list[tuple[tuple[Entry, int], ...]] = []
        bucket = -1
        for pair, latency_s in zip(pairs, latencies_s, strict=True):
            previous, bucket = bucket, self._bucket(latency_s)
            rivals = rows[-1] if bucket == previous else (pair,) * len(fillable)
            rows.append(tuple(_better(rival, pair, queued) for rival, queued in zip(rivals, fillable, strict=True)))
        return _Plan(latencies_s, tuple(rows))

    def _bucket(self, latency_s: float) -> int:
        if not self._width_s:
            return 0
        return min(int((latency_s - self._least_s) / self._width_s), self._buckets - 1)


def _better(one: tuple[Entry, int], other: tuple[Entry, int], queued: int) -> tuple[Entry, int]:
    def merit(pair: tuple[Entry, int]) -> tuple[int, float]:
        return min(pair[1], queued), pair[0].accuracy

    return max(one, other, key=merit)


class FixedSubnet:
    """A server of one model, as Clipper is: the largest batch that fits the slack of the most urgent query."""

    def __init__(self, table: ProfileTable, entry: Entry) -> None:
        self.name = f"fixed:{entry.name}"
        self._entry = entry
        self._index = table.entries.index(entry)

    def arrived(self, now_s: float, slo_s: float) -> None:
        """Of no interest to this policy."""

    def decide(self, now_s: float, queue: QueueView, lowest: int = 0) -> Decision:
        """The one entry, in the largest batch that fits; a query with a floor above it cannot be served."""
        if self._index < lowest:
            return Decision(1, None, 0)
        rest = drop_hopeless(now_s, queue, self._entry.latency_s)
        if not rest.count:
            return Decision(rest.given_up, None, 0)
        return Decision(rest.given_up, self._entry, largest_batch(self._entry.latency_s, rest.slack_s, rest.count))


POLICIES: Mapping[str, str] = {
    "halfslo": "the most accurate subnet that clears the queue within half of an SLO, and early drop (the default)",
    "slackfit": f"the paper's SlackFit, with {DEFAULT_BUCKETS} latency buckets",
    "slackfit:K": "the paper's SlackFit, with K latency buckets",
    "fixed:SUBNET": "one subnet for everything, by name, or 'largest' or 'smallest'",
}


def make_policy(spec: str, table: ProfileTable, workers: int = 1) -> Policy:
    """The policy of a name in POLICIES; raises PolicyError, listing them, for any other."""
    name, colon, argument = spec.partition(":")
    if spec == "halfslo":
        return HalfSLO(table, workers)
    if spec == "slackfit":
        return SlackFit(table)
    if name == "slackfit" and re.fullmatch("[1-9][0-9]{0,5}", argument):
        return SlackFit(table, int(argument))
    if name == "fixed" and colon:
        return FixedSubnet(table, _fixed_entry(argument, table))
    raise PolicyError(f"no policy '{spec}': there are {', '.join(POLICIES)}")


def _fixed_entry(name: str, table: ProfileTable) -> Entry:
    if name == "largest":
        return table.most_accurate
    if name == "smallest":
        return table.fastest
    try:
        return table.by_name(name)
    except ProfileError as error:
        raise PolicyError(f"fixed:{name}: {error}, or largest, smallest") from error
