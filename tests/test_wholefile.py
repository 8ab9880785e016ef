"""Files are written whole or not at all, even when the process ends in between."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_supernet import noise, tiny_servable

import slackfit
from scripts import train
from servable import save_servable
from wholefile import LARGEST_TEXT, read_text, replacing, write_text

ROOT = Path(__file__).parent.parent


def test_what_is_written_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text in ("old", "\N{SNOWMAN} new"):
        write_text(path, text)
    assert path.read_text(encoding="utf-8") == "\N{SNOWMAN} new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"half of the ")
        file.flush()
        assert path.read_text() == "old"
        file.write(b"new")
    assert path.read_text() == "half of the new"


def test_a_write_that_raises_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"half of")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_the_same_file_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with replacing(path) as one:
        one.write(b"one, ")
        with replacing(path) as other:
            other.write(b"other")
        one.write(b"longer")
    assert path.read_text() == "one, longer"


def test_new_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    plain.write_text("")
    write_text(whole, "")
    assert whole.stat().st_mode == plain.stat().st_mode


def test_links_stay_links_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("target")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    reading, writing = os.pipe()
    write_text(Path(f"/proc/self/fd/{writing}") if Path("/proc").exists() else Path(os.devnull), "x")
    os.close(writing)
    os.close(reading)
    assert not list(tmp_path.glob("*.partial"))


OLD = b'{"epoch": 1}\n'


class Killed(BaseException):
    """Stands for the end of the process."""


def recipe() -> train.Recipe:
    return train.Recipe(epochs=1, batch_size=64, learning_rate=0.1, middle=1, seed=0, crop=0)


DEVICE = slackfit.Device(kind="cpu", name="x", torch="2", dtype="float32", threads=1, workers=1)

# What writes the files of a profile, each in place of one that is there.
WRITERS: dict[str, Callable[[Path], object]] = {
    "choices.json": lambda path: slackfit.save_choices(path.parent, []),
    "latency-x.json": lambda path: slackfit.save_latencies(path, DEVICE, (1,), {}),
    "supernet.json": lambda path: save_servable(tiny_servable(), path.parent),
    "weights.npz": lambda path: save_servable(tiny_servable(), path.parent),
    "norms.npz": lambda path: save_servable(tiny_servable(), path.parent),
    "checkpoint.pt": lambda path: train.Trainer(train.new_servable(noise()), noise(), recipe()).save(path),
    "train_log.jsonl": lambda path: train._log_epoch(path, {"epoch": 2}),
    "report.json": lambda path: write_text(path, "new"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "checkpoint.pt" else ()) for name in WRITERS]
)
def test_a_crash_before_the_replacement_leaves_the_old_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(OLD)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == name:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)  # a process that is gone tidies up nothing
    with pytest.raises(Killed):
        WRITERS[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == OLD
    (left,) = tmp_path.glob(f"{name}.*")
    assert left.suffix == ".partial", "what was new, complete but not in its place"


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    slackfit.save_choices(tmp_path, [])
    old = path.read_bytes()
    code = "import os, pathlib, sys, wholefile\n"
    code += "with wholefile.replacing(pathlib.Path(sys.argv[1])) as file:\n"
    code += "    file.write(b'half of'); file.flush(); os.kill(os.getpid(), 9)\n"
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert path.read_bytes() == old
    assert slackfit.load_choices(tmp_path) == ()
    write_text(path, "what the killed process left is in nobody's way")


def test_a_document_is_read_up_to_a_limit_and_nothing_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("größer", encoding="utf-8")
    assert read_text(tmp_path / "a") == "größer"
    with (tmp_path / "b").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    with pytest.raises(OSError, match="larger than"):
        read_text(tmp_path / "b")
    os.mkfifo(tmp_path / "c")
    for path in (tmp_path / "c", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a file"):
            read_text(path)
