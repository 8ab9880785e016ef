"""Reads the tensors of checkpoint files, .safetensors or PyTorch's, without executing anything that they contain."""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_HEADER = 100_000_000  # bytes; as the format's own library has it
# The format's types; it has more, which hold no weights of the families here.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file and why."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU.

    Of a dictionary that holds more than tensors, those under ``state_dict``. The prefix ``module.``, which
    DataParallel puts before every name, is left out. Raises CheckpointError, naming the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        ours = start[8:9] == b"{" or path.suffix == ".safetensors"
        content = _safetensors(path) if ours else _torch_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if content and all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in other versions, before what is wrong with them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_refused(str(error))) from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"truncated, or no checkpoint of PyTorch or safetensors ({_first_line(error)})") from error
    for name in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"holds a {type(content).__name__}, expected tensors by name or a dictionary with state_dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"holds a {type(value).__name__} under {name!r:.60}, expected tensors by name")
    return dict(content)


def _why_refused(message: str) -> str:
    """What torch says in many lines, with the advice to run the code left out."""
    for line in message.splitlines():
        _, found, what = line.partition("Unsupported global: GLOBAL ")
        if found:
            return f"reading it would execute pickled code ({what.split()[0]}); save only its state_dict"
        _, found, what = line.partition("Unsupported operand ")
        if found:
            return f"no checkpoint, or damaged: pickle operand {what.split()[0]} is not one of tensors; refused"
    return "no checkpoint of tensors alone, or damaged; what needs pickled code to be executed is refused"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# --------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The documented format: length of the header (8 bytes, little endian), header (JSON), tensors end to end."""
    content = bytearray(path.read_bytes())  # torch wants memory that could be written to
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(LONGEST_HEADER, len(content) - 8):
        raise ValueError(f"truncated: the header should have {length} bytes, the file has {len(content)}")
    try:
        header = json.loads(content[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of a safetensors file is no JSON: {_first_line(error)}") from error
    if not isinstance(header, dict):
        raise ValueError("the header of a safetensors file must be an object")
    header.pop("__metadata__", None)
    if not header:
        raise ValueError("holds no tensors")
    body = memoryview(content)[8 + length :]
    return {name: _tensor(name, entry, body) for name, entry in header.items()}


def _tensor(name: str, entry: Any, body: memoryview) -> Tensor:
    fits = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    if not fits or not _are_sizes(entry["shape"]) or not _are_sizes(entry["data_offsets"]):
        raise ValueError(f"the header says of {name!r:.80} {entry!r:.80}: no type, shape and place of a tensor")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _TYPES:
        raise ValueError(f"{name} is of type {entry['dtype']!r:.40}; known: {', '.join(_TYPES)}")
    dtype, count, offsets = _TYPES[entry["dtype"]], math.prod(entry["shape"]), entry["data_offsets"]
    if len(offsets) != 2 or offsets[1] - offsets[0] != count * dtype.itemsize:
        raise ValueError(f"{name} of shape {entry['shape']} does not fit its place {offsets}")
    if offsets[1] > len(body):
        raise ValueError(f"truncated: {name} ends at byte {offsets[1]} of {len(body)}")
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(body, dtype=torch.uint8, count=count * dtype.itemsize, offset=offsets[0]).clone().view(
        dtype
    ).reshape(entry["shape"])  # fmt: skip


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**48 for each in value)
