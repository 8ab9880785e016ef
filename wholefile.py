"""Files that appear whole or not at all: whatever ends the process while one is written, the old one stays.

What is new is written beside the old file and takes its place once it is on the disk. A process that is killed leaves
a file ending in ``.partial`` behind, which nothing reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LARGEST_TEXT = 64 * 2**20  # bytes of one document of a profile, which may come from anywhere


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends, and is deleted when it raises."""
    if path.exists() and not path.is_file():
        with path.open("wb") as file:  # a device or a pipe: there is no old file to keep
            yield file
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # two processes may write the same
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """The text of a document in UTF-8; OSError for what is no file (a pipe would never end) or far too large."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    if path.stat().st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_TEXT} bytes", str(path))
    return path.read_text(encoding="utf-8")
