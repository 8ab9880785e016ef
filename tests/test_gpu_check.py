"""The check of a GPU ends in time with its table and few files, whatever its parts do; a shell script plays Python."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PARTS = ("tests", "profile", "graphs", "bfloat16", "float16", "zoo", "mechanism", "ensemble", "serving")
# Which part it is asked for, and what that leaves; $DOES has a word for each part that does not end well.
PYTHON = r"""#!/bin/sh
case "$*" in
  *is_available*) exit "${NO_GPU:-0}" ;;
  *get_device_name*) echo "GPU: fake"; exit ;;
  *"import httptools"*) exit "${NO_HTTPTOOLS:-0}" ;;
  *pytest*) part=tests ;;
  *"profile_supernet.py --profile profiles/cifar10-zoo"*) part=zoo
    echo of-zoo >profiles/cifar10-zoo/latency-cuda-x.json ;;
  *"--dtype bfloat16"*) part=bfloat16; echo of-cifar10 >profiles/cifar10/latency-cuda-x-bfloat16.json ;;
  *"--dtype float16"*) part=float16; echo in-float16 >profiles/cifar10/choices.json ;;
  *profile_supernet.py*) part=profile; echo of-cifar10 >profiles/cifar10/latency-cuda-x.json ;;
  *bench_graphs.py*) part=graphs ;;
  *bench_supernet.py*) part=mechanism ;;
  *bench_ensemble.py*) part=ensemble ;;
  *bench_serving.py*) part=serving; mkdir out/serving
    for n in 1 2 3 4 5 6 7 8 9; do echo $n >out/serving/$n.json; done ;;
esac
echo "$*" >>commands
echo "the last line of $part"
case " ${DOES:-} " in
  *" $part:fails "*) exit 3 ;;
  *" $part:hangs "*) exec sleep 30 ;;
esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the script, a fake Python, two profiles and data."""
    for folder in ("scripts", "profiles/cifar10", "profiles/cifar10-zoo"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for name in ("profiles/cifar10-zoo/choices.json", "data.npz", "trace.txt"):
        (tmp_path / name).touch()
    (tmp_path / "profiles" / "cifar10" / "latency-cuda-old.json").touch()
    os.utime(tmp_path / "profiles" / "cifar10" / "latency-cuda-old.json", (0, 0))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def check(house: Path, **settings: str) -> tuple[int, dict[str, str]]:
    """Run it; its exit code, and what its table says of each part, in order."""
    given = {"PYTHON": str(house / "python"), "DATA": "data.npz", "TRACE": "trace.txt", "OUT": "out", **settings}
    command = ["bash", str(house / "scripts" / "gpu_check.sh")]
    environment = {**os.environ, **given}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr == "" or ended.returncode == 2, ended.stderr
    if ended.returncode == 2:
        return 2, {}
    table = (house / "out" / "table.txt").read_text()
    assert ended.stdout.endswith(table), "the table comes last"
    rows = re.findall(r"^(\w+) +(ok|FAILED|CUT OFF|skipped|left out) +\d+s  (.*)$", table, re.MULTILINE)
    return ended.returncode, {name: how if how != "left out" else f"{how}: {why}" for name, how, why in rows}


def all_but(**others: str) -> Mapping[str, str]:
    return {name: others.get(name, "ok") for name in PARTS}


def packed(archive: Path) -> set[str]:
    with tarfile.open(archive) as file:
        return {member.name for member in file.getmembers() if member.isfile()}


def test_parts_come_in_the_order_of_their_worth_and_leave_few_files(house: Path) -> None:
    code, rows = check(house)
    assert (code, list(rows.items())) == (0, list(all_but().items()))
    out = house / "out"
    assert {path.name for path in out.iterdir()} == {
        "latency-cuda-x.json", "latency-cuda-x-bfloat16.json", "zoo-latency.json", "choices.json",
        "logs.tar.gz", "serving.tar.gz", "table.txt",
    }  # fmt: skip
    assert (out / "latency-cuda-x.json").read_text() == "of-cifar10\n"
    assert (out / "zoo-latency.json").read_text() == "of-zoo\n"
    assert (out / "choices.json").read_text() == "in-float16\n"
    assert packed(out / "logs.tar.gz") == {f"{name}.log" for name in PARTS}
    assert packed(out / "serving.tar.gz") == {f"serving/{number}.json" for number in range(1, 10)}
    assert "the last line of graphs" in (out / "table.txt").read_text()


def test_a_part_that_fails_fails_the_check_and_stops_no_other(house: Path) -> None:
    code, rows = check(house, DOES="tests:fails zoo:fails")
    assert (code, rows) == (1, all_but(tests="FAILED", zoo="FAILED"))


@pytest.mark.slow
def test_it_ends_in_time_whatever_hangs_and_says_what_was_skipped(house: Path) -> None:
    code, rows = check(house, DOES="profile:hangs", ALL_S="18")
    assert code == 1
    assert rows == all_but(profile="CUT OFF") | dict.fromkeys(PARTS[2:], "skipped")
    assert packed(house / "out" / "logs.tar.gz") == {"tests.log", "profile.log"}


def test_what_is_missing_leaves_only_that_out_which_needs_it(house: Path) -> None:
    code, rows = check(house, DATA="nowhere.npz")
    missing = dict.fromkeys(("float16", "ensemble", "serving"), "left out: nowhere.npz is not there")
    assert (code, rows) == (0, all_but(**missing))
    code, rows = check(house, NO_HTTPTOOLS="1")
    assert (code, rows) == (0, all_but(serving="left out: httptools is not there"))
    (house / "profiles" / "cifar10-zoo" / "choices.json").unlink()
    _, rows = check(house)
    missing = "left out: profiles/cifar10-zoo/choices.json is not there"
    assert rows == all_but(zoo=missing, ensemble=missing)


def test_without_a_gpu_nothing_runs(house: Path) -> None:
    assert check(house, NO_GPU="1") == (2, {})
    assert not (house / "commands").exists()


# ---------------------------------------------------------------------------------------------------- the real commands


def commands(house: Path) -> list[list[str]]:
    check(house)
    return [line.split() for line in (house / "commands").read_text().splitlines()]


def test_scripts_have_the_options_that_they_are_called_with(house: Path) -> None:
    called = [command for command in commands(house) if command[0].startswith("scripts/")]
    assert len(called) == 8
    for script, *arguments in called:
        source = (ROOT / script).read_text(encoding="utf-8")
        own = arguments[: arguments.index("--flags") + 1] if "--flags" in arguments else arguments
        assert [each for each in own if each.startswith("--") and f'"{each}"' not in source] == []


def gpu_tests(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    source = path.read_text(encoding="utf-8")
    return [
        each
        for each in ast.walk(ast.parse(source if "mark.gpu" in source else ""))
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(ast.unparse(decorator) == "pytest.mark.gpu" for decorator in each.decorator_list)
    ]


def test_all_tests_that_need_a_gpu_are_run_and_need_no_plugin(house: Path) -> None:
    found = {f"tests/{path.name}": gpu_tests(path) for path in sorted((ROOT / "tests").glob("test_*.py"))}
    (command,) = [each for each in commands(house) if "pytest" in each]
    assert {name for name, tests in found.items() if tests} == {each for each in command if each.startswith("tests/")}
    assert [each.name for tests in found.values() for each in tests if isinstance(each, ast.AsyncFunctionDef)] == []


@pytest.mark.slow
def test_what_it_runs_needs_nothing_that_is_missing_there(house: Path) -> None:
    called = [each for command in commands(house) for each in command if each.endswith(".py")]
    modules = {each.removesuffix(".py").replace("/", ".") for each in called} - {"scripts.bench_serving"}
    missing = ("httptools", "pytest_asyncio", "schemathesis", "playwright")
    script = f"""
import importlib, sys
sys.path[:0] = [".", "tests"]
sys.modules.update(dict.fromkeys({missing}))
for name in {sorted(modules)}:
    importlib.import_module(name.removeprefix("tests."))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
