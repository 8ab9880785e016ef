"""Labelled images for training and profiling: CIFAR-10 in three forms, any class-per-folder directory, and digits.

The validation part is cut from the training images by a fixed seed, so that every script that chooses anything (epochs,
subnets, the frontier) uses the same images, none of which was trained on; the test images only report.
"""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

SPLIT_SEED = 20240205
SMALL = 10_000  # training images; smaller data sets hold out more, since too few tell no subnet from another


@dataclass(frozen=True, slots=True)
class Split:
    """Images as uint8 (N, H, W, C), and their labels as int64 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """The images at these positions."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set with its validation images set apart; ``mirrored``: a mirrored image keeps its class."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mirrored: bool = True


class DatasetError(ValueError):
    """Data that cannot be read; says which file and why."""


def load(source: str, image_size: int = 32) -> Dataset:
    """``digits``, an .npz of JPEGs, a ``cifar-10-batches-py`` folder, or a folder of train/CLASS/* and test/CLASS/*.

    A folder's images are cut to a square and resized to ``image_size``. Raises DatasetError, naming the file.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _jpeg_archive(path)
    if (path / "data_batch_1").is_file():
        return _cifar_batches(path)
    if (path / "train").is_dir() and (path / "test").is_dir():
        return _folders(path, image_size)
    raise DatasetError(
        f"{source}: expected 'digits', an .npz of JPEG files, a cifar-10-batches-py folder, "
        "or a folder with train/CLASS/* and test/CLASS/*"
    )


def _with_validation(name: str, train: Split, test: Split, classes: tuple[str, ...], mirrored: bool = True) -> Dataset:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    held_out = len(train) // (10 if len(train) >= SMALL else 5)
    return Dataset(name, train.take(order[held_out:]), train.take(order[:held_out]), test, classes, mirrored)


def _jpeg_archive(path: Path) -> Dataset:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            parts = {part: _decode_archive(archive, part) for part in ("train", "test")}
            classes = tuple(str(name) for name in archive["classes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: {error}") from error
    return _with_validation("cifar10", parts["train"], parts["test"], classes)


def _decode_archive(archive: Any, part: str) -> Split:
    offsets = archive[f"{part}_offsets"]
    data = archive[f"{part}_jpeg"].tobytes()
    spans = itertools.pairwise(offsets)
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
        for start, end in tqdm(spans, desc=f"decode {part}", total=len(offsets) - 1, disable=None)
    ]
    return Split(np.stack(images), archive[f"{part}_labels"].astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickled arrays of the original CIFAR-10 files and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)  # numpy 2 moved it
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a CIFAR-10 file")


def _cifar_batches(folder: Path) -> Dataset:
    def read(name: str) -> dict[bytes, Any]:
        try:
            with (folder / name).open("rb") as file:
                content: dict[bytes, Any] = _ArraysOnly(file, encoding="bytes").load()
                return content
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DatasetError(f"{folder / name}: {error}") from error

    def split(names: list[str]) -> Split:
        batches = [read(name) for name in names]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[b"labels"] for batch in batches]).astype(np.int64)
        return Split(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels)

    classes = tuple(name.decode() for name in read("batches.meta")[b"label_names"])
    return _with_validation("cifar10", split([f"data_batch_{i}" for i in range(1, 6)]), split(["test_batch"]), classes)


def _folders(folder: Path, size: int) -> Dataset:
    classes = tuple(sorted(child.name for child in (folder / "train").iterdir() if child.is_dir()))
    if not classes:
        raise DatasetError(f"{folder / 'train'}: no class folders")

    def split(part: str) -> Split:
        files = [
            (path, label) for label, name in enumerate(classes) for path in sorted((folder / part / name).glob("*"))
        ]
        if not files:
            raise DatasetError(f"{folder / part}: no images in the folders {', '.join(classes)}")
        images = [_open(path, size) for path, _ in tqdm(files, desc=f"read {part}", disable=None)]
        return Split(np.stack(images), np.array([label for _, label in files], np.int64))

    return _with_validation(folder.resolve().name, split("train"), split("test"), classes)


def _open(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise DatasetError(f"{path}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # a development requirement, needed for this data set only

    pixels, labels = load_digits(return_X_y=True)
    images = (np.minimum(pixels.reshape(-1, 8, 8, 1) * 16, 255)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    everything = Split(images, labels.astype(np.int64))
    test, train = everything.take(order[:360]), everything.take(order[360:])
    return _with_validation("digits", train, test, tuple("0123456789"), mirrored=False)
