"""The profile table and its files."""

import copy
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import choice, in_ms, table_of
from hypothesis import given, settings
from hypothesis import strategies as st

from members import mirrored
from profiletable import (
    Choice,
    Corrections,
    Device,
    DeviceMismatch,
    Ensemble,
    Entry,
    InDtype,
    Latencies,
    ProfileError,
    ProfileTable,
    build_table,
    load_choices,
    load_latencies,
    measured_in,
    save_choices,
    save_latencies,
    served,
    table_document,
)

DEVICE = Device(kind="cpu", name="AMD EPYC 7R13 (2 cores)", torch="2.13.0", dtype="float32", threads=1, workers=2)


NONE = {f"s{number}": 1.0 for number in range(1, 7)}  # corrections of the fixture's entries


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


def test_a_stretched_table_leaves_the_measured_one_and_other_entries_as_they_are(table: ProfileTable) -> None:
    stretched, latency_s = table.stretched({**NONE, "s2": 1.2}), table.by_name("s2").latency_s
    assert stretched.by_name("s2").latency_s == pytest.approx([1.2 * each_s for each_s in latency_s])
    assert stretched.by_name("s3") is table.by_name("s3")
    assert table.stretched(NONE) == table


def test_a_stretched_table_drops_what_a_more_accurate_entry_then_does_in_less_time(table: ProfileTable) -> None:
    stretched = table.stretched({**NONE, "s1": 2.0, "s3": 1.2})
    assert [entry.name for entry in stretched.entries] == ["s2", "s4", "s5", "s6"]
    assert stretched.batch_sizes == table.batch_sizes


def test_the_most_accurate_entry_is_never_dropped(table: ProfileTable) -> None:
    assert table.stretched({**NONE, "s6": 4.0}).most_accurate.name == "s6"


def test_the_table_document_is_json_in_milliseconds(table: ProfileTable) -> None:
    corrections = {**NONE, "s2": 1.23456}
    document = json.loads(json.dumps(table_document(replace(table, device=DEVICE), corrections, slowdown=1.5)))
    assert [entry["correction"] for entry in document["entries"]] == [1, 1.235, 1, 1, 1, 1]
    assert document["slowdown"] == 1.5
    assert document["device"]["threads"] == 1
    assert document["batch_sizes"] == [1, 2, 4, 8, 16, 32, 64]
    assert document["entries"][1]["name"] == "s2"
    assert document["entries"][1]["latency_ms"][0] == 2.8
    assert set(document["entries"][0]) == {
        "name", "kind", "accuracy", "test_accuracy", "parameters", "macs", "latency_ms", "correction",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- corrections

NAMES = "abcd"


class Served:
    """Entries that serve batches in random turns, 100 a second, and the most that each was corrected by meanwhile."""

    def __init__(self, seed: int = 0) -> None:
        self.corrections, self.rng, self.now_s = Corrections(NAMES), random.Random(seed), 100.0
        self.most = dict.fromkeys(NAMES, 1.0)

    def run(self, count: int, among: str = NAMES, least: float = 1.0, **factors: float) -> dict[str, float]:
        """Batches that take from ``least`` to 1 times as long as the table and the factors by name say."""
        for name in self.rng.choices(among, k=count):
            self.now_s += 0.01
            self.corrections.learn(name, factors.get(name, 1.0) * self.rng.uniform(least, 1), self.now_s)
            self.most = {name: max(self.most[name], factor) for name, factor in self.factors.items()}
        return self.factors

    @property
    def factors(self) -> dict[str, float]:
        return self.corrections.factors(self.now_s)


EQUAL = dict.fromkeys(NAMES, 1.0)
ALL_TWICE = dict.fromkeys(NAMES, 2.0)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0.6, 1)), max_size=60))
def test_entries_that_keep_to_the_table_are_not_corrected(batches: list[tuple[str, float]]) -> None:
    corrections = Corrections(NAMES)
    for name, ratio in batches:
        corrections.learn(name, ratio, 0.0)
    assert corrections.factors(0.0) == EQUAL


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slow", [1.3, 1.6, 2.0])
def test_a_slow_entry_is_recognised_within_20_of_its_batches_and_no_other_is(slow: float, seed: int) -> None:
    served = Served(seed)
    factors = served.run(80, least=0.9, b=slow)
    assert 1 + (slow - 1) / 2 < factors.pop("b") <= slow
    assert set(factors.values()) == {1.0}


def test_slow_entries_are_recognised_though_they_are_half_of_all() -> None:
    factors = Served().run(400, least=0.9, a=1.5, c=1.5)
    assert min(factors["a"], factors["c"]) > 1.25
    assert factors["b"] == factors["d"] == 1


def test_a_correction_ends_where_the_entry_is_and_goes_back_when_that_is_over() -> None:
    served = Served()
    assert served.run(1000, c=1.5)["c"] == pytest.approx(1.5, rel=0.02)
    assert served.run(300)["c"] < 1.1
    assert served.run(3000)["c"] == pytest.approx(1, abs=0.001)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 40), st.sampled_from([0.6, 0.8, 1.0]), st.sampled_from(["ab", NAMES]))
def test_a_slowdown_of_all_for_100_batches_is_no_entry_s_own(seed: int, before: int, least: float, among: str) -> None:
    served = Served(seed)
    for count, factors in ((before, EQUAL), (100, ALL_TWICE), (100, EQUAL)):
        served.run(count, among, least, **factors)
    assert max(served.most.values()) < 1.1


def test_a_slow_entry_is_told_from_the_others_while_all_are_slow() -> None:
    served = Served()
    served.run(100, least=0.9)
    factors = served.run(200, least=0.9, **(ALL_TWICE | {"b": 3.0}))
    assert factors.pop("b") == pytest.approx(1.4, abs=0.1)
    assert max(factors.values()) < 1.05


def test_an_entry_that_runs_alone_is_not_judged() -> None:
    assert Served().run(100, "a", a=2.0) == EQUAL


def test_fewer_than_ten_batches_correct_nothing() -> None:
    corrections = Corrections("ab")
    for _ in range(10):
        assert corrections.factors(0.0)["b"] == 1
        corrections.learn("a", 1.0, 0.0)
        corrections.learn("b", 3.0, 0.0)
    assert corrections.factors(0.0)["b"] > 1.5


def test_one_hiccup_is_no_correction() -> None:
    served = Served()
    served.run(100)
    served.run(1, "b", b=50.0)
    assert served.run(100) == EQUAL
    assert served.most["b"] <= 1.05


def test_a_correction_is_four_at_most() -> None:
    assert 3.9 < Served().run(400, b=50.0)["b"] <= 4


def test_what_is_not_judged_again_is_half_forgotten_every_10_s() -> None:
    served = Served()
    factor = served.run(200, b=2.0)["b"]
    served.run(1, "a")  # so that a's, and not b's, are the next batches to be judged
    served.now_s += 9.99
    assert served.run(1, "a")["b"] - 1 == pytest.approx((factor - 1) / 2, rel=0.2)


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
ENSEMBLE: dict[str, Any] = {
    **CHOICES["choices"][0], "name": "a+b", "kind": "ensemble", "accuracy": 0.8,
    "ensemble": {"members": ["a", "b"], "combination": "mean", "weights": [0.4, 0.6]},
}  # fmt: skip
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


def test_an_ensemble_is_written_as_it_was_read(tmp_path: Path) -> None:
    choices = read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], ENSEMBLE]}))
    assert choices[3].ensemble == Ensemble(members=("a", "b"), combination="mean", weights=(0.4, 0.6))
    assert choices[0].ensemble is None
    save_choices(tmp_path, choices)
    assert load_choices(tmp_path) == choices
    assert "ensemble" not in json.loads((tmp_path / "choices.json").read_text())["choices"][0]


IN_BFLOAT16 = {"dtype": "bfloat16", "accuracy": 0.45, "test_accuracy": 0.4}


def in_bfloat16(*indices: int) -> str:
    """The choices, those at these positions measured in bfloat16 too."""
    choices = copy.deepcopy(CHOICES["choices"])
    for index in indices:
        choices[index]["in_dtypes"] = [IN_BFLOAT16]
    return json.dumps({**CHOICES, "choices": choices})


def test_choices_are_as_accurate_as_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    choices = read_choices(tmp_path, in_bfloat16(0, 1))
    assert [choice.accuracy for choice in choices] == [0.5, 0.7, 0.6]
    served = load_choices(tmp_path, "bfloat16")
    assert [(each.name, each.accuracy, each.test_accuracy) for each in served] == [("a", 0.45, 0.4), ("b", 0.45, 0.4)]
    save_choices(tmp_path, choices)
    assert load_choices(tmp_path) == choices
    assert "in_dtypes" not in json.loads((tmp_path / "choices.json").read_text())["choices"][2]


def test_all_of_the_frontier_must_have_been_measured_in_it(tmp_path: Path) -> None:
    read_choices(tmp_path, in_bfloat16(0))
    message = r"choices\[1\]\.in_dtypes: no accuracy of b in bfloat16; scripts/profile_supernet\.py --dtype bfloat16"
    with pytest.raises(ProfileError, match=message):
        load_choices(tmp_path, "bfloat16")


def test_a_dtype_is_there_once(tmp_path: Path) -> None:
    text = edited(json.loads(in_bfloat16(0)), ["choices", 0, "in_dtypes"], [IN_BFLOAT16, IN_BFLOAT16])
    with pytest.raises(ProfileError, match=re.escape("choices[0].in_dtypes: a dtype is there twice")):
        read_choices(tmp_path, text)


def test_members_of_ensembles_on_the_frontier_may_answer_and_must_have_been_measured_too(tmp_path: Path) -> None:
    choices = json.loads(in_bfloat16(0, 1))["choices"]
    ensemble = {"members": ["b", "c:mirrored"], "combination": "mean", "weights": [0.5, 0.5]}
    both = {**ENSEMBLE, "name": "b+c:mirrored", "ensemble": ensemble, "in_dtypes": [IN_BFLOAT16]}
    loaded = read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*choices, both]}))
    assert served(loaded) == {"a", "b", "c", "b+c:mirrored"}
    with pytest.raises(ProfileError, match="no accuracy of c in bfloat16"):
        load_choices(tmp_path, "bfloat16")


def test_what_is_measured_again_replaces_the_older_figures(tmp_path: Path) -> None:
    (choice, *_) = read_choices(tmp_path, in_bfloat16(0))
    newer, other = (InDtype(dtype=each, accuracy=0.48, test_accuracy=None) for each in ("bfloat16", "float16"))
    assert measured_in(measured_in(choice, newer), other).in_dtypes == (newer, other)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float32", "must be bfloat16 or float16, not 'float32'"),
        ("dtype", "int8", "must be bfloat16 or float16, not 'int8'"),
        ("accuracy", 45, "must be a number from 0 to 1, not 45"),
        ("test_accuracy", "high", "must be a number from 0 to 1, not 'high'"),
        ("test_accuracy", MISSING, "missing"),
    ],
)
def test_an_impossible_figure_in_another_dtype_is_refused(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    document = json.loads(in_bfloat16(0))
    text = edited(document, ["choices", 0, "in_dtypes", 0, field], value)
    with pytest.raises(ProfileError, match=re.escape(f"choices[0].in_dtypes[0].{field}: {message}")):
        read_choices(tmp_path, text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["name"], "b+a", "those of 'b+a' would be ['b', 'a'], not ['a', 'b']"),
        (["kind"], "subnet", "ensemble: unknown field"),
        (["ensemble"], MISSING, "ensemble: missing"),
        (["ensemble", "members"], ["a"], "members: must be 2 to 8 different subnets, not ['a']"),
        (["ensemble", "members"], ["a", "a"], "members: must be 2 to 8 different subnets"),
        (["ensemble", "weights"], [1], "weights: must be one per member and sum to 1, not [1.0]"),
        (["ensemble", "weights"], [0.5, 0.6], "weights: must be one per member and sum to 1"),
        (["ensemble", "combination"], "sum", "combination: must be mean or vote, not 'sum'"),
    ],
)
def test_an_impossible_ensemble_is_refused(tmp_path: Path, path: list[str], value: object, message: str) -> None:
    broken = json.loads(edited(ENSEMBLE, path, value))
    with pytest.raises(ProfileError, match=re.escape("choices[3]")) as caught:
        read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], broken]}))
    assert message in str(caught.value)


def test_the_members_of_an_ensemble_are_subnets_that_are_there(tmp_path: Path) -> None:
    other = {**ENSEMBLE, "name": "c+d", "ensemble": {**ENSEMBLE["ensemble"], "members": ["c", "d"]}}
    with pytest.raises(ProfileError, match=re.escape("choices[4].ensemble.members: there is no subnet 'd'")):
        read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], ENSEMBLE, other]}))


def test_a_member_may_be_a_subnet_that_sees_the_image_mirrored(tmp_path: Path) -> None:
    members = ["a", mirrored("a")]
    both = {**ENSEMBLE, "name": "+".join(members), "ensemble": {**ENSEMBLE["ensemble"], "members": members}}
    choices = read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], both]}))
    ensemble = choices[3].ensemble
    assert ensemble is not None
    assert ensemble.members == tuple(members)
    entry = Entry(choice=choices[3], latency_s=(0.0, 0.1))
    left = ProfileTable(entries=(entry,), batch_sizes=(1,), known=choices).without(entry, ["a"])
    assert (left.name, left.accuracy) == (mirrored("a"), choices[0].accuracy)
    other = {**both, "name": "a+x:mirrored", "ensemble": {**both["ensemble"], "members": ["a", "x:mirrored"]}}
    with pytest.raises(ProfileError, match=re.escape("choices[3].ensemble.members: there is no subnet 'x'")):
        read_choices(tmp_path, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], other]}))


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


# ------------------------------------------------------------------------------------------------- modes of ensembles

BOTH: dict[str, Any] = {
    "mode": ["parallel", "parallel", "serial"], "parallel_p50_ms": [2, 3, 9], "serial_p50_ms": [4, 6, 8],
    "p50_ms": [2, 3, 8], "p99_ms": [5, 6, 9],
}  # fmt: skip


def read_with_ensemble(folder: Path, row: object, name: str = "a+b") -> ProfileTable:
    read_choices(folder, json.dumps({**CHOICES, "choices": [*CHOICES["choices"], ENSEMBLE]}))
    latencies = {**LATENCIES["latencies"], name: row}
    (folder / DEVICE.file_name).write_text(json.dumps({**LATENCIES, "latencies": latencies}))
    return load_latencies(folder / DEVICE.file_name, load_choices(folder), DEVICE)


def test_an_ensemble_runs_at_each_batch_size_in_the_mode_that_was_faster(tmp_path: Path) -> None:
    entry = read_with_ensemble(tmp_path, BOTH).by_name("a+b")
    assert entry.modes == ("parallel", "parallel", "parallel", "serial", "serial")  # by batch size, 0 to 4
    assert len(entry.modes) == len(entry.latency_s)
    assert entry.latency_s == pytest.approx((0, 0.005, 0.006, 0.0075, 0.009))


def test_modes_are_written_as_they_were_read(tmp_path: Path) -> None:
    table = read_with_ensemble(tmp_path, BOTH)
    measured = {entry.name: entry.measured for entry in table.entries if entry.measured}
    assert list(measured) == ["a+b"]
    save_latencies(tmp_path / "again.json", DEVICE, (1, 2, 4), {"a": in_ms(1, 2, 3), **measured})
    rows = json.loads((tmp_path / "again.json").read_text())["latencies"]
    assert rows["a+b"] == BOTH
    assert set(rows["a"]) == {"p50_ms", "p99_ms"}


def test_an_ensemble_that_was_measured_in_one_way_only_has_no_modes(tmp_path: Path) -> None:
    entry = read_with_ensemble(tmp_path, {"p50_ms": [4, 6, 8], "p99_ms": [5, 6, 9]}).by_name("a+b")
    assert (entry.modes, entry.measured) == ((), None)


def test_the_table_document_says_how_ensembles_run_and_why(tmp_path: Path) -> None:
    table = read_with_ensemble(tmp_path, BOTH)
    none = {entry.name: 1.0 for entry in table.entries}
    entries = {entry["name"]: entry for entry in table_document(table, none, 1.0)["entries"]}  # type: ignore[attr-defined]
    assert "mode" not in entries["a"]
    assert entries["a+b"]["mode"] == ["parallel", "parallel", "serial"]
    assert entries["a+b"]["why"] == (
        "parallel is 2.00 times as fast as serial at batch size 1: members run at the same time; "
        "serial is faster at batch size 4: one member fills the device"
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["mode"], MISSING, "latencies.a+b.mode: missing"),
        (["serial_p50_ms"], MISSING, "latencies.a+b.serial_p50_ms: missing"),
        (["mode", 0], "fast", "latencies.a+b.mode: must be parallel or serial, not 'fast'"),
        (["mode"], ["parallel", "serial"], "latencies.a+b.mode: 2 modes for 3 batch sizes"),
        (["mode", 0], "serial", "latencies.a+b.mode: serial at batch size 1, where parallel is faster"),
        (["mode", 2], "parallel", "latencies.a+b.mode: parallel at batch size 4, where serial is faster"),
        (["parallel_p50_ms"], [2, 3], "latencies.a+b.parallel_p50_ms: 2 numbers for 3 batch sizes"),
        (["serial_p50_ms"], [4, 6, 1], "latencies.a+b.serial_p50_ms: falls from 6 to 1 at batch size 4"),
        (["parallel_p50_ms", 0], 0, "latencies.a+b.parallel_p50_ms: must be positive"),
        (["parallel_p50_ms", 0], "2", "latencies.a+b.parallel_p50_ms: must be a number"),
    ],
)
def test_impossible_modes_are_refused(tmp_path: Path, path: list[str | int], value: object, message: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(message)):
        read_with_ensemble(tmp_path, json.loads(edited(BOTH, path, value)))


def test_a_subnet_has_no_modes(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=re.escape("latencies.c.mode: only ensembles have modes")):
        read_with_ensemble(tmp_path, BOTH, name="c")
