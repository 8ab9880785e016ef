"""Every form of labelled images is read into the same splits, and what cannot be read is named."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fixtures_supernet import digits
from PIL import Image

from scripts import datasets
from scripts.datasets import Dataset, DatasetError, Split

RED, BLUE = (200, 30, 30), (30, 30, 200)


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def same(one: Split, other: Split) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


def is_consistent(data: Dataset) -> bool:
    """Three splits of uint8 images of one shape, with a valid label each."""
    splits = (data.train, data.validation, data.test)
    return all(
        split.images.dtype == np.uint8
        and split.images.shape[1:] == data.train.images.shape[1:]
        and split.labels.dtype == np.int64
        and len(split.images) == len(split.labels) == len(split)
        and set(split.labels) <= set(range(len(data.classes)))
        for split in splits
    )


# -------------------------------------------------------------------------------------------------------------- digits


@pytest.mark.slow
def test_digits_are_split_into_three_parts_without_overlap() -> None:
    data = digits()
    assert is_consistent(data)
    assert [len(data.train), len(data.validation), len(data.test)] == [1150, 287, 360]
    assert data.classes == tuple("0123456789")
    assert not data.mirrored
    assert data.train.images.shape == (1150, 8, 8, 1)
    assert data.train.images.max() == 255


@pytest.mark.slow
def test_the_same_split_is_made_every_time() -> None:
    again = datasets.load("digits")
    assert all(same(getattr(again, part), getattr(digits(), part)) for part in ("train", "validation", "test"))


@pytest.mark.parametrize(("images", "held_out"), [(100, 20), (9_999, 1999), (10_000, 1000)])
def test_small_data_sets_hold_out_a_fifth_and_large_ones_a_tenth(images: int, held_out: int) -> None:
    train = Split(np.zeros((images, 1, 1, 1), np.uint8), np.arange(images))
    data = datasets._with_validation("numbers", train, train, ())
    assert len(data.validation) == held_out
    assert sorted([*data.train.labels, *data.validation.labels]) == list(range(images))


# --------------------------------------------------------------------------------------------------------- JPEG archive


def write_archive(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {"classes": np.array(["red", "blue"])}
    for part, count in (("train", 10), ("test", 4)):
        files = [encoded((RED, BLUE)[number % 2], kind="JPEG") for number in range(count)]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = np.arange(count) % 2
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_an_archive_of_jpegs_is_decoded(tmp_path: Path) -> None:
    data = datasets.load(str(write_archive(tmp_path / "images.npz")))
    assert is_consistent(data)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
    assert data.classes == ("red", "blue")
    assert data.mirrored
    reddish = data.train.images[:, 0, 0, 0] > 128
    assert np.array_equal(reddish, data.train.labels == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "test_labels"),
        ({"classes": None}, "classes"),
        ({"train_jpeg": np.zeros(5000, np.uint8)}, "cannot identify image file"),
    ],
)
def test_a_damaged_archive_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_archive(tmp_path / "images.npz", **changes)
    with pytest.raises(DatasetError, match=f"images.npz: .*{message}"):
        datasets.load(str(path))


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "images.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"images\.npz: "):
        datasets.load(str(path))


# -------------------------------------------------------------------------------------------------- cifar-10-batches-py


class OldPickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is how CIFAR-10 was published."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_old(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = _save_old


def old_pickle(content: object) -> bytes:
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(folder: Path) -> Path:
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = np.repeat(np.array([RED, BLUE], np.uint8), 32 * 32, axis=1)  # rows of 1024 red, green, blue values
        (folder / name).write_bytes(old_pickle({b"data": pixels, b"labels": [0, 1]}))
    (folder / "batches.meta").write_bytes(old_pickle({b"label_names": [b"red", b"blue"]}))
    return folder


def test_the_published_cifar_files_are_read(tmp_path: Path) -> None:
    data = datasets.load(str(write_cifar(tmp_path / "cifar-10-batches-py")))
    assert is_consistent(data)
    assert data.classes == ("red", "blue")
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 2)
    assert tuple(data.test.images[0, 5, 7]) == RED
    assert tuple(data.test.images[1, 31, 0]) == BLUE


def test_a_cifar_file_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return pytest.fail, ("executed",)

    folder = write_cifar(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Trap()}))
    with pytest.raises(DatasetError, match=r"data_batch_3: .*does not belong into a CIFAR-10 file"):
        datasets.load(str(folder))


@pytest.mark.parametrize("name", ["data_batch_5", "test_batch", "batches.meta"])
def test_missing_and_truncated_cifar_files_are_named(tmp_path: Path, name: str) -> None:
    folder = write_cifar(tmp_path / "cifar-10-batches-py")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=f"{name}: "):
        datasets.load(str(folder))
    (folder / name).unlink()
    with pytest.raises(DatasetError, match=f"{name}: "):
        datasets.load(str(folder))


# ------------------------------------------------------------------------------------------------------ class folders


def write_folders(folder: Path) -> Path:
    for part, count in (("train", 10), ("test", 2)):
        for name, colour in (("red", RED), ("blue", BLUE)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                (folder / part / name / f"{number}.png").write_bytes(encoded(colour, (20 + number, 30)))
    return folder


def test_a_folder_per_class_is_read_at_one_size(tmp_path: Path) -> None:
    data = datasets.load(str(write_folders(tmp_path / "flags")), image_size=16)
    assert is_consistent(data)
    assert (data.name, data.classes) == ("flags", ("blue", "red"))
    assert data.train.images.shape == (16, 16, 16, 3)
    assert (len(data.validation), len(data.test)) == (4, 4)
    reddish = data.train.images[:, 0, 0, 0] > 128
    assert np.array_equal(reddish, data.train.labels == 1)


def test_a_folder_is_named_by_itself_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folders(tmp_path / "flags"))
    assert datasets.load(".", image_size=8).name == "flags"


def test_images_are_cut_to_their_middle_square(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), BLUE)
    wide.paste(RED, (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    assert (datasets._open(tmp_path / "wide.png", 10) == RED).all()


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "flags")
    (folder / "train" / "red" / "notes.txt").write_text("not an image")
    with pytest.raises(DatasetError, match=r"notes\.txt: cannot identify image file"):
        datasets.load(str(folder))


def test_empty_folders_are_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DatasetError, match="train: no class folders"):
        datasets.load(str(tmp_path))
    (tmp_path / "train" / "red").mkdir()
    with pytest.raises(DatasetError, match="train: no images in the folders red"):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize("source", ["digit", "missing.npz", "/nowhere", ""])
def test_other_sources_list_what_is_read(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=f"^{source}: expected 'digits', an .npz of JPEG files"):
        datasets.load(source)
