"""The real perf_analyzer, where it was fetched, against a server; and how it is taken out of its wheel."""

import csv
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
from test_open_inference import in_background

import fetch_perf_analyzer as fetched

UNUSABLE = fetched.why_not(fetched.FOLDER)


def test_the_program_is_taken_out_of_its_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a.data/data/bin/perf_analyzer", "#!/bin/sh\necho Version 1\n")
        archive.writestr("a/perf_analyzer.txt", "no")
    fetched.extract(tmp_path / "a.whl", "perf_analyzer", tmp_path)
    assert fetched.why_not(tmp_path) is None
    with pytest.raises(KeyError, match=r"a\.whl holds no libcudart"):
        fetched.extract(tmp_path / "a.whl", "libcudart.so.12", tmp_path)


def test_why_it_does_not_run_is_told(tmp_path: Path) -> None:
    assert "scripts/fetch_perf_analyzer.py puts it there" in (fetched.why_not(tmp_path) or "")
    (tmp_path / "perf_analyzer").write_text("#!/bin/sh\necho libb64.so.0d is missing >&2\n")
    (tmp_path / "perf_analyzer").chmod(0o755)
    assert fetched.why_not(tmp_path) == "perf_analyzer does not run: libb64.so.0d is missing"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = serving.write_servable(tmp_path_factory.mktemp("tiny"))
    with in_background(serving.config_of(folder)) as server:
        yield server.host


@pytest.mark.slow
@pytest.mark.skipif(UNUSABLE is not None, reason=str(UNUSABLE))
@pytest.mark.parametrize(
    ("load", "batch_size"),
    [
        (["--concurrency-range", "4"], 1),
        (["--concurrency-range", "2", "-b", "8", "-a"], 8),
        (["--concurrency-range", "2", "-x", "1", "--input-tensor-format", "json", "--output-tensor-format", "json"], 1),
        (["--request-rate-range", "50"], 1),
        (["--concurrency-range", "1", "-H", "X-SLO-Ms:20000"], 1),
    ],
    ids=["binary", "batches", "json", "rate", "header"],
)
def test_perf_analyzer_runs_as_it_is(address: str, tmp_path: Path, load: list[str], batch_size: int) -> None:
    report = tmp_path / "report.csv"
    command = [str(fetched.FOLDER / "perf_analyzer"), "-m", "tiny", "-u", address, "-i", "http"]
    ended = subprocess.run(
        [*command, "--request-count", "80", *load, "-v", "-f", str(report)], env=fetched.environment(fetched.FOLDER),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = csv.DictReader(report.read_text().splitlines())
    assert float(row["Inferences/Second"]) > 0
    assert int(row["Server Compute Infer"]) > 0
    assert "Request count: 80\n" in ended.stdout
    counted = re.search(r"Inference count: (\d+)", ended.stdout)
    assert counted is not None
    # It first asks for the statistics when its workers, up to 4 here, have begun to send.
    assert 76 * batch_size <= int(counted[1]) <= 80 * batch_size
