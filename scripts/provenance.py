"""What a report has to say of where it comes from: machine, commit and versions.

Apart from the scripts that write reports, so that one needs no package that only another uses.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "uvloop", "httptools")


def provenance() -> dict[str, Any]:
    """Machine, commit and versions, for the report; of a package that is not installed, null."""
    return {
        "machine": {"system": platform.platform(), "processor": _processor(), "cpus": os.cpu_count()},
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
    }


def commit() -> str | None:
    """The commit of this code, with ``+`` when files differ from it; null outside a repository, or without git."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
