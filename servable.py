"""What a folder under profiles/ holds of a network: architecture, weights, norm statistics, input form and classes.

``supernet.json`` says how to build the network and its space of subnets; ``weights.npz`` and ``norms.npz`` fill it.
Reading them executes nothing. (Accuracies and latencies, which decide and do not compute, are slackfit.py's.)
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

import supernets
from supernet import Subnet, SubnetSpace, Supernet, SupernetError

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input image: its size, and how pixels (0..255) are normalised: (pixel / 255 - mean) / std, per channel."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.channels not in (1, 3):
            raise SupernetError(
                f"input of {self.height}x{self.width} with {self.channels} channels; 1 or 3 are supported"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise SupernetError("mean and std must have one value per channel, std above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A supernet with all that serving needs to know of it; one folder under profiles/."""

    name: str
    family: str
    architecture: Mapping[str, Any]
    supernet: Supernet
    input: InputSpec
    classes: tuple[str, ...]


def create_servable(
    *,
    name: str,
    family: str,
    architecture: Mapping[str, Any],
    space: SubnetSpace,
    input: InputSpec,
    classes: Sequence[str],
) -> Servable:
    """A servable with random weights; raises SupernetError where the parts do not fit."""
    try:
        network, stages = supernets.build(family, architecture)
    except ValueError as error:
        raise SupernetError(str(error)) from error
    supernet = Supernet(network, stages, space)
    return Servable(
        name=name, family=family, architecture=architecture, supernet=supernet, input=input, classes=tuple(classes)
    )


def save_servable(servable: Servable, folder: Path) -> None:
    """Write supernet.json, weights.npz (half precision) and norms.npz; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    space = servable.supernet.space
    document = {
        "schema": SCHEMA,
        "name": servable.name,
        "family": servable.family,
        "architecture": dict(servable.architecture),
        "space": {"depths": space.depths, "expands": space.expands},
        "input": asdict(servable.input),
        "classes": servable.classes,
    }
    _write(folder / "supernet.json", lambda file: file.write((json.dumps(document, indent=1) + "\n").encode()))
    weights = {
        name: value.half().numpy() if value.is_floating_point() else value.numpy()
        for name, value in servable.supernet.network.state_dict().items()
    }
    _write(folder / "weights.npz", lambda file: np.savez(file, **weights))
    norms = {subnet.name: flat.cpu().numpy() for subnet, flat in servable.supernet.statistics.items()}
    _write(folder / "norms.npz", lambda file: np.savez(file, **norms))  # type: ignore[arg-type]


def load_servable(folder: Path) -> Servable:
    """Read what ``save_servable`` wrote, on the CPU; executes nothing. SupernetError names the file and the field."""
    path = folder / "supernet.json"
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise SupernetError(f"schema {document['schema']} is not {SCHEMA}, the one this version reads")
        space = SubnetSpace(*(tuple(map(tuple, document["space"][key])) for key in ("depths", "expands")))
        shape = document["input"]
        servable = create_servable(
            name=document["name"],
            family=document["family"],
            architecture=document["architecture"],
            space=space,
            input=InputSpec(**{**shape, "mean": tuple(shape["mean"]), "std": tuple(shape["std"])}),
            classes=document["classes"],
        )
    except KeyError as error:
        raise SupernetError(f"{path}: field {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise SupernetError(f"{path}: {error}") from error
    _load_weights(servable.supernet, folder / "weights.npz")
    _load_statistics(servable.supernet, folder / "norms.npz")
    return servable


def _load_weights(supernet: Supernet, path: Path) -> None:
    arrays = _read_arrays(path)
    expected = supernet.network.state_dict()
    for what, names in (("missing", expected.keys() - arrays.keys()), ("unexpected", arrays.keys() - expected.keys())):
        if names:
            raise SupernetError(f"{path}: {what} weights: {', '.join(sorted(names))}")
    for name, value in expected.items():
        if tuple(value.shape) != arrays[name].shape:
            raise SupernetError(f"{path}: {name} has shape {arrays[name].shape}, expected {tuple(value.shape)}")
        if not np.isfinite(arrays[name]).all():
            raise SupernetError(f"{path}: {name} contains values that are not finite")
        with torch.no_grad():
            value.copy_(torch.from_numpy(arrays[name]))
    supernet.network.requires_grad_(False).eval()


def _load_statistics(supernet: Supernet, path: Path) -> None:
    for name, flat in _read_arrays(path).items():
        try:
            supernet.set_statistics(Subnet.parse(name), torch.from_numpy(flat))
        except SupernetError as error:
            raise SupernetError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SupernetError(f"{path}: {error}") from error


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
    partial.replace(path)
