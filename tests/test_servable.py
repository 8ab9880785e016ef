"""What is saved comes back, and damage stops with one line that names file and field."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_supernet import CLASSES, INPUT, SPACE, images, tiny_servable
from hypothesis import given, settings
from hypothesis import strategies as st

import servable as servable_module
from servable import InputSpec, create_servable, load_servable, save_servable
from supernet import Subnet, SupernetError

FILES = ("supernet.json", "weights.npz", "norms.npz")
SMALLEST = SPACE.smallest.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_servable(tiny_servable(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved servable, for damaging."""
    for name in FILES:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def refusal(folder: Path, file: str) -> str:
    """The one line that loading stops with; it must name the file."""
    with pytest.raises(SupernetError) as caught:
        load_servable(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}: ")
    assert "\n" not in message
    return message


def change_document(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "supernet.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_arrays(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(folder / file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays)
    with (folder / file).open("wb") as out:
        np.savez(out, **arrays)


# ---------------------------------------------------------------------------------------------------------- round trip


def test_a_second_round_trip_changes_nothing(saved: Path, tmp_path: Path) -> None:
    once = load_servable(saved)
    save_servable(once, tmp_path)
    twice = load_servable(tmp_path)
    for name in FILES[1:]:
        with np.load(saved / name) as first, np.load(tmp_path / name) as second:
            assert first.files == second.files
            assert all(np.array_equal(first[each], second[each]) for each in first.files)
    assert (saved / "supernet.json").read_bytes() == (tmp_path / "supernet.json").read_bytes()
    for subnet in (SPACE.smallest, SPACE.largest):
        assert torch.equal(once.supernet.actuate(subnet)(images(3)), twice.supernet.actuate(subnet)(images(3)))


def test_what_was_saved_comes_back_to_half_precision(saved: Path) -> None:
    original, loaded = tiny_servable(), load_servable(saved)
    assert (loaded.name, loaded.family, loaded.input, loaded.classes) == ("tiny", "resnet", INPUT, CLASSES)
    assert loaded.supernet.space == SPACE
    assert loaded.supernet.statistics.keys() == original.supernet.statistics.keys()
    for subnet in original.supernet.statistics:
        before, after = (each.supernet.actuate(subnet)(images(3)) for each in (original, loaded))
        torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_a_loaded_network_is_for_inference_only(saved: Path) -> None:
    network = load_servable(saved).supernet.network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_saving_again_replaces_what_was_there(folder: Path) -> None:
    servable = load_servable(folder)
    servable.supernet.calibrate(Subnet((1, 2, 1), (0.5, 0.5, 0.5)), [images(4)])
    save_servable(servable, folder)
    assert len(load_servable(folder).supernet.statistics) == 3
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path: Path) -> None:
    servable = tiny_servable()
    with torch.no_grad():
        servable.supernet.network.classifier.weight[0, 0] = 1e6
    with pytest.raises(SupernetError, match=r"^classifier\.weight contains values that are not finite"):
        save_servable(servable, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failing_write_leaves_the_old_file_and_nothing_partial(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in FILES}
    servable = load_servable(folder)
    unwritable = replace(servable, architecture={"channels": object()})
    with pytest.raises(TypeError):
        save_servable(unwritable, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_write_that_breaks_off_leaves_nothing_partial(tmp_path: Path) -> None:
    def write(file: io.BufferedWriter) -> None:
        file.write(b"half of")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        servable_module._write(tmp_path / "weights.npz", write)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- supernet.json


@pytest.mark.parametrize("field", servable_module.FIELDS)
def test_missing_fields_are_named(folder: Path, field: str) -> None:
    change_document(folder, lambda document: document.pop(field))
    assert refusal(folder, "supernet.json").endswith(f": {field} is missing")


@pytest.mark.parametrize("path", ["space.depths", "space.expands", "input.std", "input.width"])
def test_missing_inner_fields_are_named(folder: Path, path: str) -> None:
    part, field = path.split(".")
    change_document(folder, lambda document: document[part].pop(field))
    assert refusal(folder, "supernet.json").endswith(f": {path} is missing")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 2, "schema must be 1, not 2"),
        ("schema", None, "schema must be 1, not None"),
        ("name", None, "name must be some text"),
        ("name", "", "name must be some text"),
        ("family", "vgg", "unknown family 'vgg'; known: bert, ofa_mobilenet, ofa_resnet, resnet"),
        ("family", ["resnet"], "unknown family"),
        ("classes", None, "classes must be a list"),
        ("classes", 5, "classes must be a list"),
        ("classes", [], "classes must be different names"),
        ("classes", [1, 2, 3, 4, 5], "classes must be different names"),
        ("classes", ["a", "b", "c", "d", "a"], "classes must be different names"),
        ("classes", ["a", "b", "c", "d", ["e"]], "classes must be different names"),
        ("classes", ["a", "b"], "classes: 2 names, but the network has outputs (5,)"),
        ("space", 3, "space must be an object"),
        ("space", {"depths": 1, "expands": 2}, "space.depths must be a list"),
        ("space", {"depths": [1], "expands": [[1.0]]}, "space.depths[0] must be a list"),
        ("space", {"depths": [[1], [1]], "expands": [[1.0]]}, "space: 2 stages with depths but 1 with expand ratios"),
        ("space", {"depths": [[1]], "expands": [[1.0]]}, "3 stages named, but the space has 1"),
        ("space", {"depths": [[1], [1], ["2"]], "expands": [[1.0]] * 3}, "space: stage 2: depths"),
        ("space", {"depths": [[1], [1], [9]], "expands": [[1.0]] * 3}, "depths up to 9"),
        ("space", {"depths": [[1]] * 3, "expands": [[1.0], [0.3], [1.0]]}, "expand ratio 0.3 of 8 channels"),
        ("space", {"depths": [[1]] * 3, "expands": [[1.0], [None], [1.0]]}, "space: stage 1: expand ratios"),
        ("space", {"depths": [[1]] * 3, "expands": [[1.0]] * 3, "widths": []}, "space.widths is unknown"),
        ("input", None, "input must be an object"),
        ("architecture", None, "architecture"),
        ("architecture", [], "architecture"),
        ("extra", 1, "extra is unknown; the fields are schema, name"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(folder: Path, field: str, value: object, message: str) -> None:
    change_document(folder, lambda document: document.update({field: value}))
    assert message in refusal(folder, "supernet.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", -3),
        ("channels", "3"),
        ("widths", 8),
        ("widths", None),
        ("widths", [8, 8, -16]),
        ("widths", [8, 8, 10**12]),
        ("depths", [2, 2, 10**9]),
        ("depths", [2, 2, 2.5]),
        ("depths", [2, 2]),
        ("classes", 10**15),
        ("classes", 4),
        ("stem_stride", 0),
        ("wings", 2),
    ],
)
def test_impossible_architectures_are_refused(folder: Path, field: str, value: object) -> None:
    change_document(folder, lambda document: document["architecture"].update({field: value}))
    assert field in refusal(folder, "supernet.json")


def test_networks_too_large_to_be_meant_are_refused_before_they_are_made(folder: Path) -> None:
    change_document(folder, lambda document: document["architecture"].update(widths=[8192] * 3, depths=[50] * 3))
    assert "weights; at most 1,000,000,000 are supported" in refusal(folder, "supernet.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 0),
        ("height", "8"),
        ("width", -8),
        ("width", 10**9),
        ("width", 8.5),
        ("channels", 2),
        ("channels", True),
        ("mean", 0.5),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("std", [0.5, 0.5, 0.0]),
        ("std", [0.5, 0.5, float("nan")]),
        ("std", None),
        ("depth", 3),
    ],
)
def test_impossible_inputs_are_refused(folder: Path, field: str, value: object) -> None:
    change_document(folder, lambda document: document["input"].update({field: value}))
    message = refusal(folder, "supernet.json")
    assert f"input: {field} must be" in message or f"input.{field} " in message


def test_an_input_that_the_network_cannot_take_is_refused(folder: Path) -> None:
    grey = {"height": 8, "width": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    change_document(folder, lambda document: document.update(input=grey))
    assert "input of 8x8 with 1 channels does not fit the network" in refusal(folder, "supernet.json")
    change_document(folder, lambda document: document["input"].update(vars_of(replace(INPUT, height=1, width=1))))
    assert "input of 1x1 with 3 channels does not fit the network" in refusal(folder, "supernet.json")


def vars_of(spec: InputSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000, "\ufeff{}", '{"schema": 1}', "9" * 5000])
def test_other_documents_are_refused(folder: Path, text: str) -> None:
    (folder / "supernet.json").write_text(text, encoding="utf-8")
    refusal(folder, "supernet.json")


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "supernet.json").write_bytes(b"\xff\xfe\x00")
    refusal(folder, "supernet.json")


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert "No such file" in refusal(folder, file)


def test_creating_checks_what_loading_checks() -> None:
    with pytest.raises(SupernetError, match="classes: 1 names, but the network has outputs"):
        create_servable(
            name="tiny",
            family="resnet",
            architecture=tiny_servable(()).architecture,
            space=SPACE,
            input=INPUT,
            classes=["one"],
        )


def test_checking_the_fit_leaves_a_network_to_train() -> None:
    servable = create_servable(
        name="tiny",
        family="resnet",
        architecture=tiny_servable(()).architecture,
        space=SPACE,
        input=INPUT,
        classes=CLASSES,
    )
    assert servable.supernet.network.training
    assert not any(norm.running_mean.any() for norm in servable.supernet.operators.subnet_norms)


# ------------------------------------------------------------------------------------------------- weights, statistics

WEIGHT = "stages.1.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop(WEIGHT), f"missing weights: {WEIGHT}"),
        (lambda arrays: arrays.update(extra=arrays[WEIGHT]), "unexpected weights: extra"),
        (lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT][1:]}), "has shape (7, 8, 3, 3), expected (8, 8, 3, 3)"),
        (lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT] * np.float16("nan")}), f"{WEIGHT} contains values"),
        (lambda arrays: arrays.update({WEIGHT: np.full((8, 8, 3, 3), 1e300)}), f"{WEIGHT} contains values"),
        (lambda arrays: arrays.update({WEIGHT: np.full((8, 8, 3, 3), "x")}), f"{WEIGHT} holds <U1, not numbers"),
        (lambda arrays: arrays.update({WEIGHT: np.full((8, 8, 3, 3), 1j)}), f"{WEIGHT} holds complex128, not numbers"),
    ],
)  # fmt: skip
def test_wrong_weights_are_refused(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_arrays(folder, "weights.npz", change)
    assert message in refusal(folder, "weights.npz")


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_weights_of_any_precision_and_byte_order_are_read(folder: Path, dtype: str) -> None:
    expected = load_servable(folder).supernet.network.state_dict()[WEIGHT]
    change_arrays(folder, "weights.npz", lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].astype(dtype)}))
    assert torch.equal(load_servable(folder).supernet.network.state_dict()[WEIGHT], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.update({"d9-9-9-e1": arrays[SMALLEST]}), "depth 9 of stage 0 is not in [1, 2]"),
        (lambda arrays: arrays.update({"largest": arrays[SMALLEST]}), "'largest' is no subnet name"),
        (lambda arrays: arrays.update({SMALLEST: arrays[SMALLEST][:-2]}), f"statistics of {SMALLEST} have shape"),
        (lambda arrays: arrays.update({SMALLEST: arrays[SMALLEST][None]}), f"statistics of {SMALLEST} have shape"),
        (lambda arrays: arrays.update({SMALLEST: -arrays[SMALLEST]}), f"statistics of {SMALLEST} contain negative"),
        (lambda arrays: arrays.update({SMALLEST: arrays[SMALLEST] * np.inf}), f"statistics of {SMALLEST} contains"),
        (lambda arrays: arrays.update({SMALLEST: np.array("x")}), f"statistics of {SMALLEST} holds <U1, not numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_wrong_statistics_are_refused(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_arrays(folder, "norms.npz", change)
    assert message in refusal(folder, "norms.npz")


@pytest.mark.parametrize("file", FILES[1:])
def test_truncated_archives_are_refused(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        (folder / file).write_bytes(content[:length])
        refusal(folder, file)


@pytest.mark.parametrize("file", FILES[1:])
def test_pickled_objects_are_not_loaded(folder: Path, file: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("executed",)

    name = WEIGHT if file == "weights.npz" else SMALLEST
    change_arrays(folder, file, lambda arrays: arrays.update({name: np.array([Trap()], dtype=object)}))
    assert "allow_pickle=False" in refusal(folder, file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_a_pickle_is_not_loaded(folder: Path, file: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("executed",)

    (folder / file).write_bytes(pickle.dumps(Trap()))
    refusal(folder, file)


@pytest.mark.parametrize("file", FILES[1:])
def test_a_small_archive_that_unpacks_to_a_huge_one_is_refused_unread(folder: Path, file: str) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**28,)})
    with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(f"{WEIGHT}.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(64):
                member.write(bytes(2**20))
        for info in archive.filelist:  # it says in its directory that it is as large as the array
            info.file_size = 2**31
    tracemalloc.start()
    message = refusal(folder, file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "not of this network" in message
    assert peak < 2**24


@pytest.mark.parametrize("file", FILES[1:])
def test_an_array_that_claims_more_than_there_is_is_refused(folder: Path, file: str) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(folder / file, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    refusal(folder, file)


@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert "not a file" in refusal(folder, file)


def test_names_in_a_profile_lead_to_no_file_elsewhere(folder: Path) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "..\\x"):
        change_arrays(folder, "norms.npz", lambda arrays, name=name: arrays.update({name: arrays[SMALLEST]}))
        assert "is no subnet name" in refusal(folder, "norms.npz")
        change_arrays(folder, "norms.npz", lambda arrays, name=name: arrays.pop(name))
        change_document(folder, lambda document, name=name: document.update(family=name))
        assert "unknown family" in refusal(folder, "supernet.json")
        change_document(folder, lambda document: document.update(family="resnet"))



@pytest.mark.parametrize("file", FILES[1:])
def test_archives_of_other_things_are_refused(folder: Path, file: str) -> None:
    with (folder / file).open("wb") as out:
        np.save(out, np.zeros(3))
    assert "not a zip file" in refusal(folder, file)
    with zipfile.ZipFile(folder / file, "w") as archive:
        archive.writestr("readme.txt", "not an array")
    assert "readme.txt is not an array" in refusal(folder, file)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.sampled_from(FILES), st.integers(0, 2**31), st.integers(0, 255))
def test_a_changed_byte_loads_or_stops_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, file: str, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    for name in FILES:
        (folder / name).write_bytes((saved / name).read_bytes())
    content = bytearray((saved / file).read_bytes())
    content[position % len(content)] = value
    (folder / file).write_bytes(content)
    try:
        load_servable(folder)
    except SupernetError as error:
        message = str(error)
        assert "\n" not in message and str(folder) in message  # noqa: PT018


def test_an_array_whose_header_never_ends_is_told_by_its_file(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, \n"
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(SupernetError, match=r"weights\.npz: "):
        servable_module._read_arrays(tmp_path / "weights.npz", 10**6)
