"""What a folder under profiles/ holds of a network: architecture, weights, norm statistics, input form and classes.

``supernet.json`` says how to build the network and its space of subnets; ``weights.npz`` and ``norms.npz`` fill it.
Reading them executes nothing. Members of a zoo may lie beside them, as TorchScript files (supernets/imported.py).
(Accuracies and latencies, which decide and do not compute, are slackfit.py's.)
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import supernets
from supernet import Elastic, Space, Supernet, SupernetError
from wholefile import read_text, replacing

SCHEMA = 1
FIELDS = ("schema", "name", "family", "architecture", "space", "input", "classes")
LARGEST_INPUT = 4096  # pixels a side, or tokens
LARGEST_VOCABULARY = 10**7
LARGEST_NETWORK = 10**9  # weights; beyond it the architecture is a slip rather than a network
LARGEST_STATISTICS = 2**30  # bytes of norms.npz, all subnets together
MOST_ARRAYS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input image: its size, and how pixels (0..255) are normalised: (pixel / 255 - mean) / std, per channel."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if not _is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= LARGEST_INPUT:
                raise SupernetError(f"{name} must be 1 to {LARGEST_INPUT}, not {getattr(self, name)!r:.40}")
        if not _is_whole(self.channels) or self.channels not in (1, 3):
            raise SupernetError(f"channels must be 1 or 3, not {self.channels!r:.40}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != self.channels or not all(map(_is_number, values)):
                raise SupernetError(f"{name} must be one number per channel, not {values!r:.60}")
        if min(self.std) <= 0:
            raise SupernetError(f"std must be above zero, not {self.std}")

    def example(self) -> tuple[Tensor, ...]:
        """One blank input, as the network takes it."""
        return (torch.zeros(1, self.channels, self.height, self.width),)

    def __str__(self) -> str:
        return f"{self.height}x{self.width} with {self.channels} channels"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpec:
    """One text as token ids and an attention mask: its greatest length, and how many different tokens there are."""

    length: int
    vocabulary: int

    def __post_init__(self) -> None:
        for name, most in (("length", LARGEST_INPUT), ("vocabulary", LARGEST_VOCABULARY)):
            if not _is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= most:
                raise SupernetError(f"{name} must be 1 to {most}, not {getattr(self, name)!r:.40}")

    def example(self) -> tuple[Tensor, ...]:
        """One input of the greatest length and with the greatest token, as the network takes it."""
        return torch.full((1, self.length), self.vocabulary - 1), torch.ones(1, self.length, dtype=torch.long)

    def __str__(self) -> str:
        return f"{self.length} of {self.vocabulary} tokens"


def _is_whole(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A supernet with all that serving needs to know of it; one folder under profiles/."""

    name: str
    family: str
    architecture: Mapping[str, Any]
    supernet: Supernet
    input: InputSpec | TokenSpec
    classes: tuple[str, ...]


def create_servable(
    *,
    name: str,
    family: str,
    architecture: Mapping[str, Any],
    space: Space,
    input: InputSpec | TokenSpec,
    classes: Sequence[str],
    folder: Path | None = None,
) -> Servable:
    """A servable with random weights; raises SupernetError where the parts do not fit.

    ``folder``: where the files are that parts of the network are read from, in families that have them.
    """
    if not isinstance(name, str) or not name:
        raise SupernetError(f"name must be some text, not {name!r:.40}")
    if not classes or not all(isinstance(each, str) and each for each in classes) or len(set(classes)) < len(classes):
        raise SupernetError(f"classes must be different names, not {classes!r:.60}")
    network, elastic = _build(family, architecture, folder)
    if supernets.family_of(family).files:
        _check_files(network, input)
    _check_fit(network, input, classes)
    supernet = Supernet(network, elastic, space)
    return Servable(
        name=name,
        family=family,
        architecture=architecture,
        supernet=supernet,
        input=input,
        classes=tuple(classes),
    )


def _build(
    family: str, architecture: Mapping[str, Any], folder: Path | None = None
) -> tuple[nn.Module, Elastic | Sequence[str]]:
    try:
        with torch.device("meta"):  # counts weights without making any; files have bounds of their own
            network, _ = supernets.build(family, architecture)
        weights = sum(weight.numel() for weight in network.parameters())
        if weights > LARGEST_NETWORK:
            raise SupernetError(f"architecture has {weights:,} weights; at most {LARGEST_NETWORK:,} are supported")
        return supernets.build(family, architecture, folder)
    except (ValueError, RuntimeError) as error:
        raise SupernetError(_first_line(error)) from error


@torch.no_grad()
def _check_fit(network: nn.Module, input: InputSpec | TokenSpec, classes: Sequence[str]) -> None:
    try:
        logits = network.eval()(*input.example())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise SupernetError(f"input of {input} does not fit the network: {_first_line(error)}") from error
    network.train()
    if logits.shape != (1, len(classes)):
        raise SupernetError(f"classes: {len(classes)} names, but the network has outputs {tuple(logits.shape[1:])}")


def _check_files(network: Any, input: InputSpec | TokenSpec) -> None:
    try:
        network.check(*input.example())
    except ValueError as error:
        raise SupernetError(str(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_servable(servable: Servable, folder: Path) -> None:
    """Write supernet.json, weights.npz (half precision) and norms.npz; each file appears whole or not at all.

    Files that parts of the network were read from are copied.
    """
    weights = {name: _stored(name, value.cpu()) for name, value in servable.supernet.network.state_dict().items()}
    norms = {subnet.name: flat.cpu().numpy() for subnet, flat in servable.supernet.statistics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if supernets.family_of(servable.family).files:
        _copy_files(cast(Any, servable.supernet.network).files, folder)
    space = servable.supernet.space
    document = {
        "schema": SCHEMA,
        "name": servable.name,
        "family": servable.family,
        "architecture": dict(servable.architecture),
        "space": asdict(space),
        "input": asdict(servable.input),
        "classes": servable.classes,
    }
    _write(folder / "supernet.json", lambda file: file.write((json.dumps(document, indent=1) + "\n").encode()))
    _write(folder / "weights.npz", lambda file: np.savez(file, **weights))  # type: ignore[arg-type]
    _write(folder / "norms.npz", lambda file: np.savez(file, **norms))  # type: ignore[arg-type]


def _copy_files(files: Sequence[Path], folder: Path) -> None:
    for path in files:
        if path.resolve() != (folder / path.name).resolve():
            with path.open("rb") as source:
                _write(folder / path.name, functools.partial(shutil.copyfileobj, source))


def _stored(name: str, value: Tensor) -> NDArray[Any]:
    stored = value.half() if value.is_floating_point() else value
    if not bool(torch.isfinite(stored).all()):
        raise SupernetError(f"{name} contains values that are not finite in half precision")
    return stored.numpy()


def load_servable(folder: Path, dtype: str = "float32") -> Servable:
    """Read what ``save_servable`` wrote, on the CPU. SupernetError names the file and the field.

    ``dtype``: what it is to compute with, one of DTYPES (profiletable.py). Executes nothing, except the networks of
    TorchScript files on a blank input, once they have been looked through.
    """
    path = folder / "supernet.json"
    try:
        servable = _parse(json.loads(read_text(path)), folder)
    except (OSError, ValueError, RecursionError) as error:
        raise SupernetError(f"{path}: {_first_line(error)}") from error
    _load_weights(servable.supernet, folder / "weights.npz")
    _load_statistics(servable.supernet, folder / "norms.npz")
    if dtype != "float32":
        if isinstance(servable.input, TokenSpec):
            raise SupernetError(f"{path}: texts are computed in float32 only, not in {dtype}")
        servable.supernet.to(torch.device("cpu"), getattr(torch, dtype))
    return servable


def _parse(document: object, folder: Path) -> Servable:
    # The schema comes first: a file of another version has other fields, and that is not what is wrong with it.
    if isinstance(document, dict) and document.get("schema", SCHEMA) != SCHEMA:
        raise SupernetError(f"schema must be {SCHEMA}, not {document['schema']!r:.40}")
    top = record(document, "", FIELDS)
    family = supernets.family_of(top["family"])
    space = record(top["space"], "space", [each.name for each in fields(family.space)])
    rows = {name: tuple(map(tuple, _lists(space[name], f"space.{name}"))) for name in space}
    spec = TokenSpec if family.text else InputSpec
    form = record(top["input"], "input", [each.name for each in fields(spec)])
    form |= {name: tuple(_list(form[name], f"input.{name}")) for name in ("mean", "std") if name in form}
    return create_servable(
        name=top["name"],
        family=top["family"],
        architecture=top["architecture"],
        space=_named("space", family.space, **rows),
        input=_named("input", spec, **form),
        classes=_list(top["classes"], "classes"),
        folder=folder,
    )


def _named(where: str, make: Callable[..., Any], **values: object) -> Any:
    try:
        return make(**values)
    except SupernetError as error:
        raise SupernetError(f"{where}: {error}") from error


def record(value: object, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The value as an object with exactly these fields, the optional ones if it has them; raises SupernetError."""
    if not isinstance(value, dict):
        raise SupernetError(f"{where or 'the document'} must be an object, not {value!r:.40}")
    prefix = f"{where}." if where else ""
    for name in names:
        if name not in value:
            raise SupernetError(f"{prefix}{name} is missing")
    for name in value:
        if name not in (*names, *optional):
            raise SupernetError(f"{prefix}{name} is unknown; the fields are {', '.join((*names, *optional))}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SupernetError(f"{where} must be a list, not {value!r:.40}")
    return value


def _lists(value: object, where: str) -> list[list[Any]]:
    return [_list(each, f"{where}[{index}]") for index, each in enumerate(_list(value, where))]


def _load_weights(supernet: Supernet, path: Path) -> None:
    expected = supernet.network.state_dict()
    arrays = _read_arrays(path, sum(8 * value.numel() + 4096 for value in expected.values()))
    for what, names in (("missing", expected.keys() - arrays.keys()), ("unexpected", arrays.keys() - expected.keys())):
        if names:
            raise SupernetError(f"{path}: {what} weights: {', '.join(sorted(names))}")
    for name, value in expected.items():
        if tuple(value.shape) != arrays[name].shape:
            raise SupernetError(f"{path}: {name} has shape {arrays[name].shape}, expected {tuple(value.shape)}")
        with torch.no_grad():
            value.copy_(_tensor(arrays[name], f"{path}: {name}"))
    supernet.network.requires_grad_(False).eval()


def _load_statistics(supernet: Supernet, path: Path) -> None:
    for name, array in _read_arrays(path, LARGEST_STATISTICS).items():
        try:
            packed = array.dtype == np.uint8 and array.ndim == 1
            flat = torch.from_numpy(array) if packed else _tensor(array, f"statistics of {name}")
            supernet.set_statistics(supernet.space.parse(name), flat)
        except SupernetError as error:
            raise SupernetError(f"{path}: {error}") from error


def _tensor(array: NDArray[Any], where: str) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise SupernetError(f"{where} holds {array.dtype}, not numbers")
    with np.errstate(over="ignore"):  # what single precision cannot hold becomes infinite
        tensor = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if not bool(torch.isfinite(tensor).all()):
        raise SupernetError(f"{where} contains values that are not finite")
    return tensor


# What numpy and zipfile raise for damaged archives.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,  # of an array's header, which numpy reads as Python's literals
    zipfile.BadZipFile,
    zlib.error,
)


def _read_arrays(path: Path, most_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays of an archive, never objects, as unpickling runs code; a small file could unpack to a huge one."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would never end
        with zipfile.ZipFile(path) as packed:  # numpy would read other formats too
            members = packed.infolist()
        if len(members) > MOST_ARRAYS or sum(member.file_size for member in members) > most_bytes:
            raise ValueError(f"more than {MOST_ARRAYS} arrays or {most_bytes} bytes: not of this network")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _DAMAGE as error:
        raise SupernetError(f"{path}: {_first_line(error)}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise SupernetError(f"{path}: {name} is not an array")
    return arrays


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with replacing(path) as file:
        write(file)
