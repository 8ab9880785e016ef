"""A report says where it comes from, as far as that can be told where it was made."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from scripts import provenance


def test_what_is_not_installed_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "httptools":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    document = provenance.provenance()
    assert document["versions"]["httptools"] is None
    assert document["versions"]["numpy"] == known("numpy")
    assert document["commit"] is None, "there is no git"
    assert document["machine"]["cpus"] > 0
