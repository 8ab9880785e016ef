"""Traces are read as they are meant, bad rows are named by file and line, and scaling changes only what it says."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scripts import workloads
from scripts.workloads import WorkloadError

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "traces"
HEADER_2019 = "HashOwner,HashApp,HashFunction,Trigger,1,2,3"
HEADER_2021 = "app,func,end_timestamp,duration"


def write(path: Path, *lines: str) -> Path:
    data = "\n".join(lines).encode() + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("name", ["trace.txt", "trace.txt.gz", "trace"])
def test_seconds_count_from_the_first_arrival(tmp_path: Path, name: str) -> None:
    arrivals = workloads.load_trace(write(tmp_path / name, "5", "5.5", "5.5", "1e1"))
    assert arrivals.dtype == np.float64
    assert arrivals.tolist() == [0, 0.5, 0.5, 5]


def test_2021_arrivals_are_end_minus_duration_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER_2021, "a,f,7.0,5.0", "a,g,7.5,0.5", "b,f,8.0,7.0")
    assert workloads.load_trace(path).tolist() == [0, 1, 6]


def test_2019_sums_all_functions_and_spreads_evenly_inside_a_minute(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv.gz", HEADER_2019, "o,a,f,http,1,0,2", "o,a,g,timer,1,0,0")
    assert workloads.load_trace(path, evenly=True).tolist() == [15, 45, 135, 165]


def test_2019_spread_at_random_keeps_each_minutes_count_and_repeats_with_its_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER_2019, "o,a,f,http,50,0,70")
    arrivals = workloads.load_trace(path, seed=4)
    assert np.histogram(arrivals, [0, 60, 120, 180])[0].tolist() == [50, 0, 70]
    assert (np.diff(arrivals) >= 0).all()
    assert (arrivals == workloads.load_trace(path, seed=4)).all()
    assert (arrivals != workloads.load_trace(path, seed=5)).any()


def test_2019_with_more_arrivals_than_memory_can_be_read_thinned(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER_2019, "o,a,f,http,4000000000,0,2000000000")
    with pytest.raises(WorkloadError, match=r"6,000,000,000 arrivals .* thin to a fraction below 0\.0083"):
        workloads.load_trace(path)
    arrivals = workloads.load_trace(path, fraction=1e-6)
    assert len(arrivals) == pytest.approx(6000, rel=0.1)
    assert (arrivals < 60).sum() == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0", "1.5", "soon"], r"t:3: expected one number of seconds, not 'soon'"),
        (["0", "1.5", ""], r"t:3: expected one number of seconds, not ''"),
        (["0", "nan"], r"t:2: expected one number of seconds, not 'nan'"),
        (["0", "1,2"], r"t:2: expected one number of seconds, not '1,2'"),
        (["0", "2", "1"], r"t:3: arrival 1 is before the previous one, 2"),
        (["time,model", "1,2"], r"t:1: unknown format: 'time,model'; expected .*func,end_timestamp,duration' \(2021\)"),
        ([""], r"t:1: unknown format"),
        ([HEADER_2021], r"t: no arrivals"),
        ([HEADER_2021, "a,f,1.0,0.5", "a,f,1.0"], r"t:3: expected app,func,end_timestamp,duration"),
        ([HEADER_2021, "a,f,1.0,0.5,9"], r"t:2: expected app,func,end_timestamp,duration"),
        ([HEADER_2021, "a,f,inf,0.5"], r"t:2: .* the last two in seconds, not 'a,f,inf,0.5'"),
        ([HEADER_2021, "a,f,1.0,-0.5"], r"t:2: .* not 'a,f,1.0,-0.5'"),
        ([HEADER_2019, "o,a,f,http,1,2,3", "o,a,f,http,1,2"], r"t:3: 6 columns, but the header has 7"),
        ([HEADER_2019, "o,a,f,http,1,x,3"], r"t:2: counts must be whole numbers: .*'x'"),
        ([HEADER_2019, "o,a,f,http,1,2.5,3"], r"t:2: counts must be whole numbers: .*'2.5'"),
        ([HEADER_2019, "o,a,f,http,1,-2,3"], r"t:2: minute 2: a count cannot be negative: -2"),
        ([HEADER_2019 + ",5", "o,a,f,http,1,2,3,4"], r"t:1: the minutes must be columns named 1, 2, 3"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        workloads.load_trace(write(tmp_path / "t", *lines))


def test_files_that_are_no_text_or_no_gzip_or_cut_short_are_errors_that_name_them(tmp_path: Path) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"1.0\n\xff\xfe\n")
    not_gzip = tmp_path / "plain.txt.gz"
    not_gzip.write_bytes(b"1.0\n")
    short = write(tmp_path / "short.txt.gz", *map(str, range(1000)))
    short.write_bytes(short.read_bytes()[:-20])
    for path in (binary, not_gzip, short, tmp_path / "missing.txt"):
        with pytest.raises(WorkloadError, match=path.name):
            workloads.load_trace(path)


# -------------------------------------------------------------------------------------------------------------- scaling


def test_squeeze_sets_the_mean_rate_and_keeps_the_shape() -> None:
    arrivals = workloads.gamma(20, 8, 100, seed=1)
    squeezed = workloads.squeeze(arrivals, 250)
    assert workloads.describe(squeezed).mean_rate == pytest.approx(250)
    assert workloads.describe(squeezed).cv2 == pytest.approx(workloads.describe(arrivals).cv2)
    assert len(squeezed) == len(arrivals)


def test_thin_keeps_a_random_part_and_the_time_scale() -> None:
    arrivals = workloads.poisson(1000, 20, seed=1)
    kept = workloads.thin(arrivals, 0.25, seed=2)
    assert len(kept) == pytest.approx(len(arrivals) / 4, rel=0.05)
    assert np.isin(kept, arrivals).all()
    assert kept[-1] > 19.9
    assert (kept == workloads.thin(arrivals, 0.25, seed=2)).all()
    assert (workloads.thin(arrivals, 1, seed=2) == arrivals).all()


def test_window_counts_from_its_start_and_excludes_its_end() -> None:
    arrivals = np.array([0.0, 1, 2, 3, 4])
    assert workloads.window(arrivals, 1, 2).tolist() == [0, 1]
    assert workloads.window(arrivals, 0.5, np.inf).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert workloads.window(arrivals, 9, 1).tolist() == []


def test_windows_side_by_side_hold_every_arrival_once() -> None:
    arrivals = workloads.poisson(100, 10, seed=3)
    parts = [workloads.window(arrivals, start, 2.5) + start for start in (0, 2.5, 5, 7.5)]
    assert np.allclose(np.concatenate(parts), arrivals)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: workloads.squeeze(np.array([1.0, 2.0]), 0), "rate must be above zero, not 0"),
        (lambda: workloads.squeeze(np.array([1.0, 2.0]), np.nan), "rate must be above zero, not nan"),
        (lambda: workloads.squeeze(np.array([0.0]), 5), "two different times"),
        (lambda: workloads.thin(np.array([0.0]), 1.5, 0), "fraction must be above 0 and at most 1, not 1.5"),
        (lambda: workloads.window(np.array([0.0]), 0, 0), "duration must be above zero"),
        (lambda: workloads.poisson(-1, 10, 0), "rate must be above zero, not -1"),
        (lambda: workloads.poisson(1, float("inf"), 0), "duration must be above zero"),
        (lambda: workloads.gamma(1, -1, 10, 0), "cv2 must be zero or more, not -1"),
        (lambda: workloads.poisson(1e9, 1e9, 0), "more than 50,000,000"),
        (lambda: workloads.accelerating(1, 2, 0, 8, 10, 0), "acceleration must be above zero, not 0"),
    ],
)
def test_impossible_parameters_are_errors_that_name_them(make: Callable[[], object], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("cv2", [0, 1, 2, 8])
def test_gamma_arrivals_have_the_rate_and_burstiness_asked_for(cv2: float) -> None:
    found = workloads.describe(workloads.gamma(500, cv2, 100, seed=7))
    assert found.mean_rate == pytest.approx(500, rel=0.05)
    assert found.cv2 == pytest.approx(cv2, rel=0.1, abs=1e-6)


def test_poisson_repeats_with_its_seed_and_ends_before_its_duration() -> None:
    arrivals = workloads.poisson(300, 5, seed=1)
    assert (arrivals == workloads.poisson(300, 5, seed=1)).all()
    assert len(arrivals) != len(workloads.poisson(300, 5, seed=2))
    assert 4.9 < arrivals[-1] < 5
    assert (np.diff(arrivals) >= 0).all()


def test_bursty_is_a_constant_stream_plus_a_gamma_stream() -> None:
    arrivals = workloads.bursty(10, 200, 8, 10, seed=1)
    base = workloads.gamma(10, 0, 10, seed=1)
    assert np.isin(base, arrivals).all()
    assert len(arrivals) == len(base) + len(workloads.gamma(200, 8, 10, seed=1))


@pytest.mark.parametrize(("from_rate", "to_rate"), [(100, 1100), (1100, 100)])
def test_acceleration_changes_the_rate_linearly_between_its_ends(from_rate: float, to_rate: float) -> None:
    arrivals = workloads.accelerating(from_rate, to_rate, 100, 0, 30, seed=1, hold_s=10)
    rates = np.histogram(arrivals, np.arange(0, 31, 2))[0] / 2
    sign = 1 if to_rate > from_rate else -1
    ramp = [from_rate + sign * 100 * middle_s for middle_s in (1, 3, 5, 7, 9)]
    assert rates == pytest.approx([from_rate] * 5 + ramp + [to_rate] * 5, abs=1)


def test_describe_counts_and_finds_the_busiest_second() -> None:
    found = workloads.describe(np.array([0.0, 0.5, 1.1, 1.2, 1.9, 4.0]))
    assert (found.count, found.length_s, found.mean_rate, found.busiest_second) == (6, 4.0, 1.5, 3)
    assert found.cv2 == pytest.approx(0.725)


def test_describe_says_nothing_of_what_too_few_arrivals_do_not_tell() -> None:
    nothing = workloads.Description(count=0, length_s=0, mean_rate=None, cv2=None, busiest_second=0)
    assert workloads.describe(np.array([])) == nothing
    found = workloads.describe(np.array([0.0, 0.0]))
    assert (found.mean_rate, found.cv2, found.busiest_second) == (None, None, 2)


# ---------------------------------------------------------------------------------------------------------- real traces


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs ../shared/data/traces")
@pytest.mark.parametrize(
    ("name", "count", "length_s", "cv2"),
    [
        ("azure_llm_code_2023.txt.gz", 8819, 3436, 173),
        ("twitter_normal.txt.gz", 57873, 291, 3.06),
        ("azure_functions_2019_sample.csv", 4525, 13800, None),
        ("azure_functions_2021_sample.csv", 199, 1200, None),
    ],
)
def test_shared_traces_are_what_their_readme_says(name: str, count: int, length_s: float, cv2: float | None) -> None:
    found = workloads.describe(workloads.load_trace(TRACES / name))
    assert found.count == count
    assert found.length_s == pytest.approx(length_s, rel=0.001)
    assert cv2 is None or found.cv2 == pytest.approx(cv2, rel=0.01)


def test_accelerating_arrivals_ascend_where_the_parts_meet() -> None:
    assert (np.diff(workloads.accelerating(417, 2502, 500, 8, 8, seed=2003, hold_s=2)) >= 0).all()
