"""Workloads: when queries arrive, as ascending float64 arrays of seconds from the start.

Reads arrival traces (a file of seconds, and the two public Azure Functions formats), makes the synthetic families of
the SuperServe paper (arXiv 2312.16733), and scales either by squeezing time or by thinning. Knows nothing of servers or
policies. Traces of single arrivals count from the first arrival, per-minute traces from the start of the first minute.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrivals = NDArray[np.float64]
Rows = Iterator[tuple[int, list[str]]]  # line number, fields

MINUTE_S = 60.0
HEADER_2019 = ["HashOwner", "HashApp", "HashFunction", "Trigger"]  # and one column a minute
HEADER_2021 = ["app", "func", "end_timestamp", "duration"]
MOST_ARRIVALS = 50_000_000  # a day of the full 2019 trace has about a billion: 8 GB as an array


class WorkloadError(ValueError):
    """A trace that cannot be read or a workload that cannot be made; names file and line, or the parameter."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a workload looks like; ``cv2`` is the squared coefficient of variation of the times between arrivals."""

    count: int
    length_s: float
    mean_rate: float | None
    cv2: float | None
    busiest_second: int


def describe(arrivals: Arrivals) -> Description:
    """Count, length (to the last arrival), mean rate, burstiness and the most arrivals in one second of the clock."""
    length_s = float(arrivals[-1]) if len(arrivals) else 0.0
    gaps = np.diff(arrivals)
    return Description(
        count=len(arrivals),
        length_s=length_s,
        mean_rate=len(arrivals) / length_s if length_s else None,
        cv2=float(gaps.var() / gaps.mean() ** 2) if len(gaps) and length_s > arrivals[0] else None,
        busiest_second=int(np.unique(np.floor(arrivals), return_counts=True)[1].max(initial=0)),
    )


# --------------------------------------------------------------------------------------------------------------- traces


def load_trace(path: str | Path, *, seed: int = 0, evenly: bool = False, fraction: float = 1.0) -> Arrivals:
    """The arrivals of a file, its format recognised by its first line; ``.gz`` files are unpacked on the way.

    Known: one arrival in seconds a line; Azure Functions 2019 (counts by minute: all functions summed, spread inside
    each minute ``evenly`` or at random); Azure Functions 2021 (invocations: arrival = end - duration). ``fraction``
    thins while loading, so that a file with more arrivals than memory holds can be read.
    """
    _check_fraction(fraction)
    path = Path(path)
    rows = _rows(path)
    line, header = next(rows, (1, []))
    if header[: len(HEADER_2019)] == HEADER_2019:
        counts = _minute_counts(path, header, rows)
        thinned = np.random.default_rng(seed).binomial(counts, fraction) if fraction < 1 else counts
        return spread_minutes(thinned, None if evenly else seed)
    if header == HEADER_2021:
        arrivals = np.sort(_invocation_starts(path, rows))
    else:
        arrivals = _arrival_seconds(path, line, header, rows)
    return thin(_from_first(path, arrivals), fraction, seed)


def spread_minutes(counts: NDArray[np.int64], seed: int | None = None) -> Arrivals:
    """So many arrivals in each minute, spread evenly inside it, or uniformly at random when there is a seed."""
    total = int(counts.sum())
    if total > MOST_ARRIVALS:
        share = MOST_ARRIVALS / total
        raise WorkloadError(f"{total:,} arrivals are more than {MOST_ARRIVALS:,}: thin to a fraction below {share:.2g}")
    minutes = np.repeat(np.arange(len(counts)), counts)
    if seed is not None:
        return np.sort((minutes + np.random.default_rng(seed).random(total)) * MINUTE_S)
    position = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return (minutes + (position + 0.5) / np.repeat(counts, counts)) * MINUTE_S


def _rows(path: Path) -> Rows:
    """The file's lines, split at commas, one at a time: the public traces are too large to be read whole."""
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
            for fields in reader:
                yield reader.line_num, fields
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}:{reader.line_num + 1}: not a text of arrivals: {error}") from error


def _arrival_seconds(path: Path, line: int, first: list[str], rows: Rows) -> Arrivals:
    """One arrival a line, ascending; the first line tells whether this is the format at all."""
    if _seconds(first) is None:
        raise WorkloadError(
            f"{path}:{line}: unknown format: '{','.join(first)[:60]}'; expected one arrival in seconds a line, or the "
            f"header '{','.join(HEADER_2019)},1,2,...' (Azure Functions 2019) or '{','.join(HEADER_2021)}' (2021)"
        )
    arrivals = array("d", [float(first[0])])
    for line, fields in rows:
        arrival_s = _seconds(fields)
        if arrival_s is None:
            raise WorkloadError(f"{path}:{line}: expected one number of seconds, not '{','.join(fields)[:60]}'")
        if arrival_s < arrivals[-1]:
            raise WorkloadError(f"{path}:{line}: arrival {arrival_s:g} is before the previous one, {arrivals[-1]:g}")
        arrivals.append(arrival_s)
    return np.array(arrivals)


def _invocation_starts(path: Path, rows: Rows) -> Arrivals:
    """Azure Functions 2021: the files are ordered by end, so that the starts still have to be sorted."""
    starts = array("d")
    for line, fields in rows:
        end_s, duration_s = _seconds(fields[2:3]), _seconds(fields[3:])
        if end_s is None or duration_s is None or duration_s < 0:
            row, known = ",".join(fields)[-60:], ",".join(HEADER_2021)
            raise WorkloadError(f"{path}:{line}: expected {known}, the last two in seconds, not '{row}'")
        starts.append(end_s - duration_s)
    return np.array(starts)


def _minute_counts(path: Path, header: list[str], rows: Rows) -> NDArray[np.int64]:
    """Azure Functions 2019: invocations of all functions in each minute."""
    minutes = header[len(HEADER_2019) :]
    if not minutes or minutes != [str(minute) for minute in range(1, len(minutes) + 1)]:
        raise WorkloadError(f"{path}:1: the minutes must be columns named 1, 2, 3, ... after {HEADER_2019[-1]}")
    totals = np.zeros(len(minutes), np.int64)
    for line, fields in rows:
        if len(fields) != len(header):
            raise WorkloadError(f"{path}:{line}: {len(fields)} columns, but the header has {len(header)}")
        totals += _counts(f"{path}:{line}", fields[len(HEADER_2019) :])
    return totals


def _counts(where: str, fields: list[str]) -> NDArray[np.int64]:
    try:
        counts = np.array(list(map(int, fields)), np.int64)
    except (ValueError, OverflowError) as error:
        raise WorkloadError(f"{where}: counts must be whole numbers: {error}") from error
    if counts.min() < 0:
        raise WorkloadError(f"{where}: minute {int(counts.argmin()) + 1}: a count cannot be negative: {counts.min()}")
    return counts


def _seconds(fields: list[str]) -> float | None:
    """The single field as a finite number, else None."""
    try:
        (field,) = fields
        number = float(field)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _from_first(path: Path, arrivals: Arrivals) -> Arrivals:
    if not len(arrivals):
        raise WorkloadError(f"{path}: no arrivals")
    first_s = float(arrivals[0])
    return arrivals - first_s


# -------------------------------------------------------------------------------------------------------------- scaling


def squeeze(arrivals: Arrivals, rate: float) -> Arrivals:
    """The same arrivals with time scaled so that their mean rate (see ``describe``) becomes ``rate`` a second."""
    _check_positive("rate", rate)
    if not len(arrivals) or arrivals[-1] <= 0:
        raise WorkloadError("squeezing needs arrivals at two different times at least")
    return arrivals * (len(arrivals) / float(arrivals[-1]) / rate)


def thin(arrivals: Arrivals, fraction: float, seed: int) -> Arrivals:
    """Each arrival kept with this probability, independently; the time scale stays."""
    _check_fraction(fraction)
    return arrivals if fraction == 1 else arrivals[np.random.default_rng(seed).random(len(arrivals)) < fraction]


def window(arrivals: Arrivals, start_s: float, duration_s: float) -> Arrivals:
    """The arrivals from ``start_s`` on, for ``duration_s`` (its end excluded), counted from ``start_s``."""
    _check_positive("duration", duration_s, infinite=True)
    first, end = np.searchsorted(arrivals, [start_s, start_s + duration_s])
    return arrivals[first:end] - start_s


# ------------------------------------------------------------------------------------------------------------- families


def poisson(rate: float, duration_s: float, seed: int) -> Arrivals:
    """Arrivals independent of each other: CV² = 1."""
    return gamma(rate, 1.0, duration_s, seed)


def gamma(rate: float, cv2: float, duration_s: float, seed: int) -> Arrivals:
    """A renewal process whose times between arrivals are gamma distributed with this CV² (0: all equal)."""
    _check_positive("rate", rate)
    _check_positive("duration", duration_s)
    return _unit_renewals(cv2, rate * duration_s, seed) / rate


def bursty(base_rate: float, burst_rate: float, cv2: float, duration_s: float, seed: int) -> Arrivals:
    """The paper's bursty family: a base stream at constant intervals, and a gamma stream of this CV² on top."""
    base, bursts = gamma(base_rate, 0.0, duration_s, seed), gamma(burst_rate, cv2, duration_s, seed)
    return np.sort(np.concatenate([base, bursts]))


def accelerating(
    from_rate: float, to_rate: float, acceleration: float, cv2: float, duration_s: float, seed: int, hold_s: float = 0.0
) -> Arrivals:
    """The paper's time-varying family: ``from_rate`` for ``hold_s``, then by ``acceleration`` (1/s²) to ``to_rate``.

    The times between arrivals of a unit-rate gamma process are stretched by the rate of the moment, so that CV² stays.
    """
    for name, value in (("from_rate", from_rate), ("to_rate", to_rate), ("acceleration", acceleration)):
        _check_positive(name, value)
    slope = math.copysign(acceleration, to_rate - from_rate)
    ramp_s = abs(to_rate - from_rate) / acceleration
    held = from_rate * hold_s
    ramped = held + (from_rate + to_rate) / 2 * ramp_s
    most = ramped + max(0.0, duration_s - hold_s - ramp_s) * to_rate
    ordinal = _unit_renewals(cv2, most, seed)  # the expected number of arrivals up to each arrival
    on_ramp = np.clip(ordinal - held, 0, ramped - held)
    # The root of from_rate*x + slope*x²/2 = on_ramp, in the form that also holds for a slope near zero.
    ramp_part = 2 * on_ramp / (from_rate + np.sqrt(np.maximum(from_rate**2 + 2 * slope * on_ramp, 0)))
    arrivals = np.minimum(ordinal, held) / from_rate + ramp_part + np.maximum(ordinal - ramped, 0) / to_rate
    arrivals = np.maximum.accumulate(arrivals)  # rounding can swap two where the parts meet
    return arrivals[arrivals < duration_s]


def _unit_renewals(cv2: float, length: float, seed: int) -> Arrivals:
    """Arrivals at mean rate 1 in [0, length)."""
    if not (math.isfinite(cv2) and cv2 >= 0):
        raise WorkloadError(f"cv2 must be zero or more, not {cv2}")
    if length > MOST_ARRIVALS:
        raise WorkloadError(f"about {length:,.0f} arrivals are more than {MOST_ARRIVALS:,}")
    if cv2 == 0:
        return np.arange(math.ceil(length), dtype=np.float64)
    rng = np.random.default_rng(seed)
    parts, end = [], 0.0
    while end < length:  # usually once: a margin of six standard deviations is drawn
        remaining = length - end
        gaps = rng.gamma(1 / cv2, cv2, int(remaining + 6 * math.sqrt(cv2 * remaining)) + 16)
        parts.append(end + np.cumsum(gaps))
        end = float(parts[-1][-1])
    arrivals = np.concatenate(parts)
    return arrivals[arrivals < length]


def _check_positive(name: str, value: float, infinite: bool = False) -> None:
    if not value > 0 or (math.isinf(value) and not infinite):
        raise WorkloadError(f"{name} must be above zero, not {value}")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise WorkloadError(f"fraction must be above 0 and at most 1, not {fraction}")
