"""The fuzzer begins with good inputs, takes refusals for what they are, and finds what is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import fuzz

ROOT = Path(__file__).parents[1]
SEEDS = fuzz.seeds()


def test_every_reader_has_seeds_and_no_seed_is_too_long() -> None:
    assert {data[0] for data in SEEDS.values()} == set(range(len(fuzz.CASES)))
    assert max(map(len, SEEDS.values())) <= fuzz.LONGEST_INPUT


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_read(name: str) -> None:
    outcome = fuzz.one_input(fuzz.readers(), SEEDS[name])
    # A request that is refused at the door is no list of parameters, as which it is read too.
    assert outcome.startswith("400 unknown parameter") if name == "request" else outcome == "read"


def test_a_refusal_is_no_finding_and_an_exception_is_one() -> None:
    def broken(data: bytes) -> None:
        raise IndexError

    assert fuzz.one_input(fuzz.readers(), b"\0\0no image").startswith("400 8 bytes are neither")
    with pytest.raises(IndexError):
        fuzz.one_input(fuzz.readers() | {"predict": broken}, b"\0\0no image")


def test_figures_are_read_from_what_libfuzzer_prints() -> None:
    told = (
        "#2\tINITED cov: 10 ft: 11 corp: 1/1b\n#9\tNEW cov: 90 ft: 91 corp: 7/1b lim: 4\n"
        "artifact_prefix='/x/'; Test unit written to /x/crash-1\nstat::number_of_executed_units: 1234\n"
        "stat::peak_rss_mb:              55\n"
    )
    found = fuzz.summary(told, 77)
    assert (found["executions"], found["coverage"], found["corpus"], found["peak_rss_mb"]) == (1234, 90, 7, 55)
    assert (found["findings"], found["exit_code"]) == (["/x/crash-1"], 77)
    assert fuzz.summary("", 1)["executions"] == 0


@pytest.mark.slow
def test_some_seconds_of_fuzzing_are_clean(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, "scripts/fuzz.py", "--seconds", "5", "--findings", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    document = json.loads(ended.stdout.splitlines()[-1])
    assert (ended.returncode, document["findings"]) == (0, []), ended.stdout
    assert document["executions"] > 500
    assert document["coverage"] > 100
