"""The profile table: what is known of each choice, its accuracy and its latencies, and the files that hold them.

``choices.json`` says what is true on any device (accuracy, size), one latency file per device how long a batch takes
there. ``build_table`` makes of both the ``ProfileTable`` that policies (slackfit.py) plan with. ``Corrections`` learns
while serving which entries take longer than their rows say.

This file knows neither policies nor queries, neither torch nor HTTP.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from members import subnet_of
from wholefile import read_text, write_text

SCHEMA = 1
KINDS = ("subnet", "ensemble")
COMBINATIONS = ("mean", "vote")
MODES = ("parallel", "serial")
MOST_MEMBERS = 8
DTYPES = ("float32", "bfloat16", "float16")
DEVICE_KINDS = ("cpu", "cuda", "synthetic")  # synthetic: made up, to be simulated and never served
NOISE = 0.2  # a larger batch may be measured this much faster than a smaller one before the profile is refused
LONGEST_S = 3600.0  # no batch takes an hour: a longer latency is a wrong unit or an infinity
LARGEST = 10**18  # of counts such as MACs


class ProfileError(ValueError):
    """A profile that cannot be used; says which file and field."""


class DeviceMismatch(ProfileError):
    """A latency table that was measured on another device than this one."""


# ------------------------------------------------------------------------------------------------ records and the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a latency table was measured on. A table fits only a device that is equal in every field."""

    kind: str  # one of DEVICE_KINDS
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
class Ensemble:
    """How several subnets answer together: the weighted mean of their class probabilities, or their weighted votes.

    ``weights`` sum to 1; in a vote, each member gives its weight to the class that it finds likeliest.
    """

    members: tuple[str, ...]  # names of choices of the kind subnet, maybe mirrored (members.py)
    combination: str  # one of COMBINATIONS
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """Canonical name: the members', joined."""
        return "+".join(self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class InDtype:
    """How accurate a choice is when it computes with other numbers than float32, measured on the same images."""

    dtype: str  # one of DTYPES, but float32
    accuracy: float
    test_accuracy: float | None


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
    ensemble: Ensemble | None = None  # of the kind ensemble, and only of that
    in_dtypes: tuple[InDtype, ...] = ()  # beside float32, where measured

    def computed_in(self, dtype: str) -> Choice | None:
        """The choice as accurate as it is in this dtype; None where that was not measured."""
        if dtype == "float32":
            return self
        found = next((each for each in self.in_dtypes if each.dtype == dtype), None)
        if found is None:
            return None
        return replace(self, accuracy=found.accuracy, test_accuracy=found.test_accuracy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """As measured for one choice, one number per profiled batch size.

    Of ensembles, ``modes`` tells which of MODES was faster at each, by the medians of both. The percentiles are its.
    """

    p50_s: tuple[float, ...]
    p99_s: tuple[float, ...]
    modes: tuple[str, ...] = ()
    parallel_p50_s: tuple[float, ...] = ()
    serial_p50_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A choice with its planned latency on this device: ``latency_s[n]`` for a batch of n, ``latency_s[0]`` is 0.

    Of ensembles that were measured in both of MODES, ``modes[n]`` is that for a batch of n, and ``measured`` is known.
    """

    choice: Choice
    latency_s: tuple[float, ...]
    modes: tuple[str, ...] = ()
    measured: Latencies | None = None

    @property
    def name(self) -> str:
        """The choice's name."""
        return self.choice.name

    @property
    def accuracy(self) -> float:
        """The choice's accuracy, 0 to 1."""
        return self.choice.accuracy

    def stretched(self, factor: float) -> Entry:
        """The same where batches take this many times as long."""
        return self if factor == 1 else replace(self, latency_s=tuple(factor * each_s for each_s in self.latency_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """The entries on the accuracy/latency frontier, both ascending; made by ``build_table``."""

    entries: tuple[Entry, ...]
    batch_sizes: tuple[int, ...]  # those that were measured
    device: Device | None = None
    known: tuple[Choice, ...] = ()  # all there are, on the frontier or not

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

    def without(self, entry: Entry, failed: Collection[str]) -> Entry:
        """What is left of an ensemble of which these members failed, as accurate as that was measured to be.

        Where the rest was never measured together, it counts as accurate as the best of it alone.
        """
        assert entry.choice.ensemble is not None, "others have no members"
        left = [name for name in entry.choice.ensemble.members if name not in failed]
        measured = [choice for choice in self.known if choice.ensemble and set(choice.ensemble.members) == set(left)]
        alone = [choice for choice in self.known if choice.name in map(subnet_of, left)]
        best = max(measured or alone, key=lambda choice: choice.accuracy)
        return replace(entry, choice=best if measured else replace(best, name="+".join(left)))

    def stretched(self, factors: Mapping[str, float]) -> ProfileTable:
        """This table where entries take ``factors[name]`` times as long, without those that others then dominate.

        Factors are of all entries, by name. The most accurate entry stays, whatever its factor.
        """
        entries = (entry.stretched(factors[entry.name]) for entry in self.entries)
        return replace(self, entries=_frontier(entries, self.batch_sizes))


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
            entries.append(_entry(choice, batch_sizes, latencies[choice.name]))
        elif choice.frontier:
            raise ProfileError(f"latencies.{choice.name}: missing, but the choice is on the frontier")
    if not entries:
        raise ProfileError("latencies: empty")
    return ProfileTable(
        entries=_frontier(entries, batch_sizes),
        batch_sizes=tuple(batch_sizes),
        device=device,
        known=tuple(known.values()),
    )


def table_document(table: ProfileTable, corrections: Mapping[str, float], slowdown: float) -> dict[str, object]:
    """The table as JSON for people and dashboards, latencies in milliseconds by profiled batch size.

    ``corrections`` and ``slowdown`` are how many times as long each entry, and all of them, take at present.
    """
    shown = ("name", "kind", "accuracy", "test_accuracy", "parameters", "macs")
    entries = [
        {name: getattr(entry.choice, name) for name in shown}
        | {"latency_ms": [_ms(entry.latency_s[size]) for size in table.batch_sizes]}
        | {"correction": round(corrections[entry.name], 3)}
        | _modes_document(entry, table.batch_sizes)
        for entry in table.entries
    ]
    device = asdict(table.device) if table.device else None
    return {
        "device": device,
        "slowdown": round(slowdown, 3),
        "batch_sizes": list(table.batch_sizes),
        "entries": entries,
    }


def _modes_document(entry: Entry, batch_sizes: Sequence[int]) -> dict[str, object]:
    """How an ensemble runs at each batch size, and a sentence that says why; nothing of others."""
    if entry.measured is None:
        return {}
    modes = [entry.modes[size] for size in batch_sizes]
    pairs = zip(entry.measured.serial_p50_s, entry.measured.parallel_p50_s, batch_sizes, strict=True)
    gain, at = max((serial_s / parallel_s, -size) for serial_s, parallel_s, size in pairs)
    serial = ", ".join(str(size) for size, mode in zip(batch_sizes, modes, strict=True) if mode == "serial")
    reasons = []
    if "parallel" in modes:
        faster = f"parallel is {gain:.2f} times as fast as serial at batch size {-at}"
        reasons.append(f"{faster}: members run at the same time")
    if serial:
        reasons.append(f"serial is faster at batch size {serial}: one member fills the device")
    return {"mode": modes, "why": "; ".join(reasons)}


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


def _entry(choice: Choice, batch_sizes: Sequence[int], measured: Latencies) -> Entry:
    latency_s = _planned(choice.name, batch_sizes, measured)
    if not measured.modes:
        return Entry(choice=choice, latency_s=latency_s)
    where = f"latencies.{choice.name}"
    if choice.ensemble is None:
        raise ProfileError(f"{where}.mode: only ensembles have modes, and this is a {choice.kind}")
    _check_modes(where, batch_sizes, measured)
    # Between two measured sizes, as in the larger: a CUDA graph of that size runs them.
    sizes = zip((0, *batch_sizes), batch_sizes, measured.modes, strict=False)
    modes = [mode for smaller, size, mode in sizes for _ in range(size - smaller)]
    return Entry(choice=choice, latency_s=latency_s, modes=(modes[0], *modes), measured=measured)


def _check_modes(where: str, batch_sizes: Sequence[int], measured: Latencies) -> None:
    if len(measured.modes) != len(batch_sizes):
        raise ProfileError(f"{where}.mode: {len(measured.modes)} modes for {len(batch_sizes)} batch sizes")
    medians_s = {"parallel": measured.parallel_p50_s, "serial": measured.serial_p50_s}
    for mode, each_s in medians_s.items():
        _levelled(f"{where}.{mode}_p50_ms", batch_sizes, each_s)
    for index, mode in enumerate(measured.modes):
        other = MODES[1 - MODES.index(mode)]
        if medians_s[mode][index] > medians_s[other][index]:
            raise ProfileError(f"{where}.mode: {mode} at batch size {batch_sizes[index]}, where {other} is faster")


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


# --------------------------------------------------------------------------------------------------------- corrections

MOST_CORRECTION = 4.0
FEWEST_BATCHES = 10  # of an entry, before it is corrected
LEARNT_UP, LEARNT_DOWN = 0.1, 0.03  # of what is seen, each time; the table's own latencies are high percentiles too
BOLDEST = 1.5  # times what was believed is as much as one batch is believed to show: any may have met with a hiccup
HALF_LIFE_S = 10.0


class Corrections:
    """How many times as long as its row says each entry takes, beyond what slows down all of them: from 1 to 4.

    A slow batch alone does not tell whether its entry is slow or the device. So an entry is judged when batches of it
    follow on those of others and others follow on them: by its first batch and the slowest of three others just before,
    and by its last batch and the next one. The lesser of both counts, for what befalls the device in between shows on
    one side only. What is faster than its row counts as what the row says.

    An entry that is judged no more (it runs alone, or not at all since it was found slow) is given another chance: half
    of what it took too long is forgotten every 10 s.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._learnt = dict.fromkeys(names, 1.0)
        self._judged_s = dict.fromkeys(self._learnt, 0.0)
        self._batches: Counter[str] = Counter()
        self._recent: deque[tuple[str, float]] = deque(maxlen=6)  # name, and how long it took beyond its correction
        self._running, self._at_first, self._last = "", 0.0, 0.0  # the latest batches of one entry in a row

    def learn(self, name: str, ratio: float, now_s: float) -> None:
        """A batch of this entry took ``ratio`` times as long as its row says."""
        level = max(1.0, ratio / self._factor(name, now_s))
        if name != self._running:
            if self._running:
                self._judge(self._running, min(self._at_first, self._last / level), now_s)
            levels = [recent for other, recent in self._recent if other != name][-3:]
            self._running, self._at_first = name, ratio / max(levels) if levels else 0.0
        self._last = ratio
        self._recent.append((name, level))
        self._batches[name] += 1

    def factors(self, now_s: float) -> dict[str, float]:
        """What is known of each entry now, by name."""
        return {
            name: self._factor(name, now_s) if self._batches[name] >= FEWEST_BATCHES else 1.0 for name in self._learnt
        }

    def _judge(self, name: str, seen: float, now_s: float) -> None:
        believed = self._factor(name, now_s)
        change = min(seen, BOLDEST * believed) - believed
        followed = believed + change * (LEARNT_UP if change > 0 else LEARNT_DOWN)
        self._learnt[name], self._judged_s[name] = min(max(1.0, followed), MOST_CORRECTION), now_s

    def _factor(self, name: str, now_s: float) -> float:
        excess = self._learnt[name] - 1
        return 1 + excess * 0.5 ** ((now_s - self._judged_s[name]) / HALF_LIFE_S) if excess else 1.0


# -------------------------------------------------------------------------------------------------- the profile's files


def load_choices(folder: Path, dtype: str = "float32") -> tuple[Choice, ...]:
    """The rows of the folder's choices.json; raises ProfileError, naming file and field, for anything amiss.

    For another ``dtype`` than float32, those that were measured in it, which all that may answer must be.
    """
    path = Path(folder) / "choices.json"
    with _naming(path):
        document = _read(path, ("choices",))
        rows = _array(document["choices"], "choices")
        choices = tuple(_parse_choice(row, f"choices[{index}]") for index, row in enumerate(rows))
        known = _by_unique_name(choices)
        for index, choice in enumerate(choices):
            for member in choice.ensemble.members if choice.ensemble else ():
                subnet = subnet_of(member)
                if subnet not in known or known[subnet].ensemble:
                    raise ProfileError(f"choices[{index}].ensemble.members: there is no subnet '{subnet}'")
        return choices if dtype == "float32" else tuple(_computed_in(dtype, choices))


def served(choices: Sequence[Choice]) -> frozenset[str]:
    """Names of what may answer: the frontier, and the subnets that its ensembles are of, as the others may fail."""
    frontier = [choice for choice in choices if choice.frontier]
    members = (subnet_of(member) for each in frontier if each.ensemble for member in each.ensemble.members)
    return frozenset([*(choice.name for choice in frontier), *members])


def _computed_in(dtype: str, choices: Sequence[Choice]) -> Iterator[Choice]:
    needed = served(choices)
    for index, choice in enumerate(choices):
        found = choice.computed_in(dtype)
        if found is not None:
            yield found
        elif choice.name in needed:
            how = f"scripts/profile_supernet.py --dtype {dtype} measures it"
            raise ProfileError(f"choices[{index}].in_dtypes: no accuracy of {choice.name} in {dtype}; {how}")


def load_latencies(path: Path, choices: Iterable[Choice], device: Device | None = None) -> ProfileTable:
    """The table of one latency file; raises ProfileError for anything amiss, DeviceMismatch for another device's.

    Without a device, whatever it was measured on is taken.
    """
    with _naming(path):
        document = _read(path, ("device", "batch_sizes", "latencies"))
        measured_on = _parse_device(document["device"])
        if device is not None and measured_on != device:
            raise DeviceMismatch(f"device: measured on {measured_on}; this is {device}")
        sizes = [_count(size, "batch_sizes", 1) for size in _array(document["batch_sizes"], "batch_sizes")]
        rows = _mapping(document["latencies"], "latencies").items()
        latencies = {name: _parse_latencies(row, f"latencies.{name}") for name, row in rows}
        return build_table(choices, sizes, latencies, measured_on)


def refuse_synthetic(folder: Path) -> None:
    """Raise ProfileError if this profile is for simulation only, its latencies having been measured on nothing."""
    if any(Path(folder).glob("latency-synthetic-*.json")):
        raise ProfileError(f"{folder}: its latencies are synthetic, for simulation only: there is nothing to serve")


def save_choices(folder: Path, choices: Iterable[Choice]) -> None:
    """Write the folder's choices.json, whole or not at all."""
    rows = [
        {name: value for name, value in asdict(choice).items() if value or name not in ("ensemble", "in_dtypes")}
        for choice in choices
    ]
    _write(Path(folder) / "choices.json", {"schema": SCHEMA, "choices": rows})


def measured_in(choice: Choice, found: InDtype) -> Choice:
    """The choice with these figures too, in place of older ones in the same dtype."""
    others = [each for each in choice.in_dtypes if each.dtype != found.dtype]
    return replace(choice, in_dtypes=(*others, found))


def save_latencies(path: Path, device: Device, batch_sizes: Sequence[int], latencies: Mapping[str, Latencies]) -> None:
    """Write one latency file, whole or not at all."""
    rows = {name: _latencies_row(row) for name, row in latencies.items()}
    document = {"schema": SCHEMA, "device": asdict(device), "batch_sizes": list(batch_sizes), "latencies": rows}
    _write(path, document)


def _latencies_row(measured: Latencies) -> dict[str, list[object]]:
    both = {"parallel_p50_ms": measured.parallel_p50_s, "serial_p50_ms": measured.serial_p50_s}
    each_s = {"p50_ms": measured.p50_s, "p99_ms": measured.p99_s} | (both if measured.modes else {})
    row: dict[str, list[object]] = {"mode": [*measured.modes]} if measured.modes else {}
    return row | {name: [_ms(value_s) for value_s in values_s] for name, values_s in each_s.items()}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ProfileError as error:
        raise type(error)(f"{path}: {error}") from error


def _write(path: Path, document: Mapping[str, object]) -> None:
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _read(path: Path, names: Sequence[str]) -> dict[str, object]:
    try:
        document = json.loads(read_text(path), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}") from error
    except ProfileError:
        raise
    except (ValueError, RecursionError) as error:
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
    kind = _text(_mapping(value, where).get("kind"), f"{where}.kind", KINDS)
    names = [spec.name for spec in fields(Choice) if spec.name not in ("ensemble", "in_dtypes")]
    own = ["ensemble"] if kind == "ensemble" else []
    row = _record(value, where, [*names, *own], optional=("in_dtypes",))
    rows = enumerate(_array(row.get("in_dtypes", []), f"{where}.in_dtypes"))
    in_dtypes = tuple(_parse_in_dtype(each, f"{where}.in_dtypes[{at}]") for at, each in rows)
    if len({each.dtype for each in in_dtypes}) < len(in_dtypes):
        raise ProfileError(f"{where}.in_dtypes: a dtype is there twice")
    tested, name = row["test_accuracy"], _text(row["name"], f"{where}.name")
    return Choice(
        name=name,
        kind=kind,
        accuracy=_number(row["accuracy"], f"{where}.accuracy", 0, 1),
        accuracy_samples=_count(row["accuracy_samples"], f"{where}.accuracy_samples", 1),
        test_accuracy=None if tested is None else _number(tested, f"{where}.test_accuracy", 0, 1),
        parameters=_count(row["parameters"], f"{where}.parameters", 1),
        macs=_count(row["macs"], f"{where}.macs", 1),
        frontier=_flag(row["frontier"], f"{where}.frontier"),
        ensemble=_parse_ensemble(row["ensemble"], f"{where}.ensemble", name) if kind == "ensemble" else None,
        in_dtypes=in_dtypes,
    )


def _parse_in_dtype(value: object, where: str) -> InDtype:
    row = _record(value, where, [spec.name for spec in fields(InDtype)])
    tested = row["test_accuracy"]
    return InDtype(
        dtype=_text(row["dtype"], f"{where}.dtype", DTYPES[1:]),
        accuracy=_number(row["accuracy"], f"{where}.accuracy", 0, 1),
        test_accuracy=None if tested is None else _number(tested, f"{where}.test_accuracy", 0, 1),
    )


def _parse_ensemble(value: object, where: str, name: str) -> Ensemble:
    row = _record(value, where, [spec.name for spec in fields(Ensemble)])
    members = tuple(_text(each, f"{where}.members") for each in _array(row["members"], f"{where}.members"))
    weights = tuple(_number(each, f"{where}.weights", 0, 1) for each in _array(row["weights"], f"{where}.weights"))
    if not 2 <= len(members) <= MOST_MEMBERS or len(set(members)) < len(members):
        raise ProfileError(f"{where}.members: must be 2 to {MOST_MEMBERS} different subnets, not {list(members)}")
    if len(weights) != len(members) or abs(sum(weights) - 1) > 1e-6:
        raise ProfileError(f"{where}.weights: must be one per member and sum to 1, not {list(weights)}")
    combination = _text(row["combination"], f"{where}.combination", COMBINATIONS)
    ensemble = Ensemble(members=members, combination=combination, weights=weights)
    if name != ensemble.name:
        raise ProfileError(f"{where}.members: those of '{name}' would be {name.split('+')}, not {list(members)}")
    return ensemble


def _parse_device(value: object) -> Device:
    row = _record(value, "device", [spec.name for spec in fields(Device)])
    return Device(
        kind=_text(row["kind"], "device.kind", DEVICE_KINDS),
        name=_text(row["name"], "device.name"),
        torch=_text(row["torch"], "device.torch"),
        dtype=_text(row["dtype"], "device.dtype"),
        threads=_count(row["threads"], "device.threads", 0),
        workers=_count(row["workers"], "device.workers", 1),
    )


def _parse_latencies(value: object, where: str) -> Latencies:
    plain, of_both = ("p50_ms", "p99_ms"), ("mode", "parallel_p50_ms", "serial_p50_ms")
    both = any(name in _mapping(value, where) for name in of_both)
    row = _record(value, where, (*plain, *of_both) if both else plain)

    def seconds(name: str) -> tuple[float, ...]:
        numbers = _array(row[name], f"{where}.{name}")
        return tuple(_number(number, f"{where}.{name}", 0, LONGEST_S * 1e3) / 1e3 for number in numbers)

    if not both:
        return Latencies(p50_s=seconds("p50_ms"), p99_s=seconds("p99_ms"))
    return Latencies(
        p50_s=seconds("p50_ms"),
        p99_s=seconds("p99_ms"),
        modes=tuple(_text(each, f"{where}.mode", MODES) for each in _array(row["mode"], f"{where}.mode")),
        parallel_p50_s=seconds("parallel_p50_ms"),
        serial_p50_s=seconds("serial_p50_ms"),
    )


def _record(value: object, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, object]:
    """The value as an object with exactly these fields, the optional ones if it has them."""
    row = _mapping(value, where)
    prefix = f"{where}." if where else ""
    for name in names:
        if name not in row:
            raise ProfileError(f"{prefix}{name}: missing")
    for name in row:
        if name not in (*names, *optional):
            raise ProfileError(f"{prefix}{name}: unknown field; the fields are {', '.join((*names, *optional))}")
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
