"""The profile table and its files."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import choice, in_ms, table_of
from hypothesis import given
from hypothesis import strategies as st

from profiletable import (
    Choice,
    Device,
    DeviceMismatch,
    Latencies,
    ProfileError,
    ProfileTable,
    build_table,
    load_choices,
    load_latencies,
    save_choices,
    save_latencies,
    table_document,
)

DEVICE = Device(kind="cpu", name="AMD EPYC 7R13 (2 cores)", torch="2.13.0", dtype="float32", threads=1, workers=2)


# --------------------------------------------------------------------------------------------------- building the table


def test_entries_ascend_in_accuracy_and_only_the_frontier_is_kept() -> None:
    table = table_of((1, 2), (0.9, (9, 18)), (0.5, (2, 4)), (0.6, (10, 20)), (0.9, (9, 18)), (0.7, (2, 4)))
    assert [entry.name for entry in table.entries] == ["e4", "e0"]
    assert (table.fastest.name, table.most_accurate.name, table.max_batch) == ("e4", "e0", 2)


def test_of_equal_entries_the_first_is_kept() -> None:
    assert [entry.name for entry in table_of((1,), (0.5, (3,)), (0.5, (3,))).entries] == ["e0"]


def test_latency_is_linear_between_the_profiled_batch_sizes() -> None:
    latency_s = table_of((1, 2, 6), (0.5, (2, 3, 11))).fastest.latency_s
    assert latency_s == pytest.approx([0, 0.002, 0.003, 0.005, 0.007, 0.009, 0.011])


def test_dips_within_noise_are_levelled_up() -> None:
    assert table_of((1, 2, 3), (0.5, (10, 8.1, 12))).fastest.latency_s == pytest.approx([0, 0.010, 0.010, 0.012])


def test_policies_plan_with_the_99th_percentile() -> None:
    latencies = {"e": Latencies(p50_s=(0.001,), p99_s=(0.003,))}
    assert build_table([choice("e", 0.5)], (1,), latencies).fastest.latency_s == (0, 0.003)


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=6))
def test_planned_latency_never_falls_as_the_batch_grows(values_ms: list[float]) -> None:
    sizes = [2**power for power in range(len(values_ms))]
    latency_s = table_of(sizes, (0.5, sorted(values_ms))).fastest.latency_s
    assert list(latency_s) == sorted(latency_s)
    assert [latency_s[size] for size in sizes] == [value_ms / 1e3 for value_ms in sorted(values_ms)]


def test_unprofiled_choices_off_the_frontier_are_left_out() -> None:
    table = build_table([choice("a", 0.5), choice("b", 0.6, frontier=False)], (1,), {"a": in_ms(1)})
    assert [entry.name for entry in table.entries] == ["a"]


def test_an_unknown_name_lists_the_known_ones(table: ProfileTable) -> None:
    assert table.by_name("s3").accuracy == 0.7764
    with pytest.raises(ProfileError, match=r"no entry 's9'.*s1, s2, s3, s4, s5, s6"):
        table.by_name("s9")


def test_a_table_is_frozen(table: ProfileTable) -> None:
    with pytest.raises(FrozenInstanceError):
        table.entries = ()  # type: ignore[misc]


def test_the_table_document_is_json_in_milliseconds(table: ProfileTable) -> None:
    document = json.loads(json.dumps(table_document(replace(table, device=DEVICE))))
    assert document["device"]["threads"] == 1
    assert document["batch_sizes"] == [1, 2, 4, 8, 16, 32, 64]
    assert document["entries"][1]["name"] == "s2"
    assert document["entries"][1]["latency_ms"][0] == 2.8
    assert set(document["entries"][0]) == {
        "name", "kind", "accuracy", "test_accuracy", "parameters", "macs", "latency_ms",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- the profile's files

CHOICES: dict[str, Any] = {
    "schema": 1,
    "choices": [
        {
            "name": name, "kind": "subnet", "accuracy": accuracy, "accuracy_samples": 5000, "test_accuracy": None,
            "parameters": 1, "macs": 1, "frontier": frontier,
        }
        for name, accuracy, frontier in (("a", 0.5, True), ("b", 0.7, True), ("c", 0.6, False))
    ],
}  # fmt: skip
LATENCIES: dict[str, Any] = {
    "schema": 1,
    "device": {"kind": "cpu", "name": DEVICE.name, "torch": "2.13.0", "dtype": "float32", "threads": 1, "workers": 2},
    "batch_sizes": [1, 2, 4],
    "latencies": {
        "a": {"p50_ms": [1, 2, 3], "p99_ms": [2, 3, 4]},
        "b": {"p50_ms": [2, 4, 6], "p99_ms": [4, 6, 8]},
    },
}
MISSING = object()


def edited(document: dict[str, Any], path: Sequence[str | int], value: object) -> str:
    """The document as JSON with the value at this path replaced, or taken out if MISSING."""
    document = copy.deepcopy(document)
    *parents, last = path
    place: Any = document
    for key in parents:
        place = place[key]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


def read_choices(folder: Path, text: str) -> tuple[Choice, ...]:
    (folder / "choices.json").write_text(text)
    return load_choices(folder)


def read_latencies(folder: Path, text: str) -> ProfileTable:
    choices = read_choices(folder, json.dumps(CHOICES))
    (folder / DEVICE.file_name).write_text(text)
    return load_latencies(folder / DEVICE.file_name, choices, DEVICE)


def test_good_files_load(tmp_path: Path) -> None:
    table = read_latencies(tmp_path, json.dumps(LATENCIES))
    assert table.device == DEVICE
    assert table.by_name("a").latency_s == pytest.approx((0, 0.002, 0.003, 0.0035, 0.004))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 2, "schema: must be 1, not 2"),
        (["schema"], True, "schema: must be 1, not True"),
        (["schema"], MISSING, "schema: missing"),
        (["choices"], MISSING, "choices: missing"),
        (["choices"], {}, "choices: must be a list"),
        (["extra"], 1, "extra: unknown field; the fields are schema, choices"),
        (["choices", 1], 3, "choices[1]: must be an object"),
        (["choices", 1, "macs"], MISSING, "choices[1].macs: missing"),
        (["choices", 1, "speed"], 1, "choices[1].speed: unknown field"),
        (["choices", 1, "name"], "a", "choices: 'a' is there twice"),
        (["choices", 1, "name"], "", "choices[1].name: must be some text"),
        (["choices", 1, "kind"], "zoo", "choices[1].kind: must be subnet or ensemble, not 'zoo'"),
        (["choices", 1, "accuracy"], 70, "choices[1].accuracy: must be a number from 0 to 1, not 70"),
        (["choices", 1, "accuracy"], math.nan, "choices[1].accuracy: must be a number"),
        (["choices", 1, "accuracy"], True, "choices[1].accuracy: must be a number"),
        (["choices", 1, "test_accuracy"], -0.1, "choices[1].test_accuracy: must be a number"),
        (["choices", 1, "accuracy_samples"], 0, "choices[1].accuracy_samples: must be a whole number from 1"),
        (["choices", 1, "parameters"], 1.5, "choices[1].parameters: must be a whole number"),
        (["choices", 1, "macs"], 10**400, "choices[1].macs: must be a whole number"),
        (["choices", 1, "frontier"], 1, "choices[1].frontier: must be true or false, not 1"),
    ],
)
def test_bad_choices_are_refused_by_file_and_field(
    tmp_path: Path, path: list[Any], value: object, message: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        read_choices(tmp_path, edited(CHOICES, path, value))
    assert str(caught.value).startswith(f"{tmp_path / 'choices.json'}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "1", "schema: must be 1"),
        (["device"], MISSING, "device: missing"),
        (["device", "kind"], "tpu", "device.kind: must be cpu or cuda"),
        (["device", "threads"], -1, "device.threads: must be a whole number from 0"),
        (["device", "cores"], 2, "device.cores: unknown field"),
        (["batch_sizes"], [], "batch_sizes: must ascend from 1, not []"),
        (["batch_sizes"], [2, 4, 8], "batch_sizes: must ascend from 1"),
        (["batch_sizes"], [1, 4, 4], "batch_sizes: must ascend from 1"),
        (["batch_sizes", 1], 2.0, "batch_sizes: must be a whole number"),
        (["latencies"], {}, "latencies.a: missing, but the choice is on the frontier"),
        (["latencies", "b"], MISSING, "latencies.b: missing, but the choice is on the frontier"),
        (["latencies", "z"], LATENCIES["latencies"]["a"], "latencies.z: there is no such choice"),
        (["latencies", "b", "p99_ms"], MISSING, "latencies.b.p99_ms: missing"),
        (["latencies", "b", "p95_ms"], [1, 2, 3], "latencies.b.p95_ms: unknown field"),
        (["latencies", "b", "p99_ms"], [1, 2], "latencies.b.p99_ms: 2 numbers for 3 batch sizes"),
        (["latencies", "b", "p50_ms"], [1, 2, 3, 4], "latencies.b.p50_ms: 4 numbers for 3 batch sizes"),
        (["latencies", "b", "p99_ms", 0], 0, "latencies.b.p99_ms: must be positive"),
        (["latencies", "b", "p99_ms", 0], -1, "latencies.b.p99_ms: must be a number from 0"),
        (["latencies", "b", "p99_ms", 2], math.inf, "latencies.b.p99_ms: must be a number from 0"),
        (["latencies", "b", "p50_ms", 2], math.nan, "latencies.b.p50_ms: must be a number from 0"),
        (["latencies", "b", "p99_ms", 1], "6", "latencies.b.p99_ms: must be a number from 0"),
        (["latencies", "b", "p99_ms"], [4, 8, 6.3], "latencies.b.p99_ms: falls from 8 to 6.3 at batch size 4"),
    ],
)
def test_bad_latencies_are_refused_by_file_and_field(
    tmp_path: Path, path: list[Any], value: object, message: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        read_latencies(tmp_path, edited(LATENCIES, path, value))
    assert str(caught.value).startswith(f"{tmp_path / DEVICE.file_name}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "must be an object"), ('{"schema": 1, "schema": 1}', "schema: is there twice")],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=f"choices.json: {message}"):
        read_choices(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"choices.json: cannot be read: No such file"):
        load_choices(tmp_path)


@pytest.mark.parametrize("field", ["kind", "name", "torch", "dtype", "threads", "workers"])
def test_latencies_of_another_device_are_refused(tmp_path: Path, field: str) -> None:
    other = {"kind": "cuda", "threads": 4, "workers": 1}.get(field, "other")
    with pytest.raises(DeviceMismatch, match=r"measured on .*; this is cpu AMD EPYC"):
        read_latencies(tmp_path, edited(LATENCIES, ["device", field], other))


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    choices = (choice("a", 0.5), choice("b", 0.75), choice("c", 0.6, frontier=False))
    latencies = {"a": in_ms(1.25, 2.5), "b": Latencies(p50_s=(0.002, 0.003), p99_s=(0.004, 0.0061))}
    save_choices(tmp_path, choices)
    save_latencies(tmp_path / DEVICE.file_name, DEVICE, (1, 8), latencies)
    assert load_choices(tmp_path) == choices
    loaded = load_latencies(tmp_path / DEVICE.file_name, choices, DEVICE)
    built = build_table(choices, (1, 8), latencies, DEVICE)
    assert [entry.choice for entry in loaded.entries] == [entry.choice for entry in built.entries]
    for one, other in zip(loaded.entries, built.entries, strict=True):
        assert one.latency_s == pytest.approx(other.latency_s)


def test_saving_replaces_the_file_and_leaves_no_partial_one(tmp_path: Path) -> None:
    save_choices(tmp_path, [choice("a", 0.5)])
    save_choices(tmp_path, [choice("b", 0.5)])
    assert [path.name for path in tmp_path.iterdir()] == ["choices.json"]
    assert load_choices(tmp_path)[0].name == "b"


def test_the_file_name_of_a_device_is_safe_and_leaves_out_the_torch_version() -> None:
    assert DEVICE.file_name == "latency-cpu-amd-epyc-7r13-2-cores-t1-w2-float32.json"
    assert replace(DEVICE, torch="3.0").file_name == DEVICE.file_name
    assert replace(DEVICE, name="../../etc/passwd").file_name == "latency-cpu-etc-passwd-t1-w2-float32.json"
