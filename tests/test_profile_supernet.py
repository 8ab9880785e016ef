"""The search finds a frontier on a supernet that was trained for real, and leaves what the server loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fixtures_supernet import SPACE, digits, noise, tiny_servable, trained_digits
from hypothesis import given
from hypothesis import strategies as st

import slackfit
import supernets
from cudagraphs import Pair
from engine import Engine, Held
from scripts import profile_supernet
from scripts.profile_supernet import Candidate, Search, confirmed, frontier, thinned
from scripts.simulate import load_table
from scripts.train import accuracy, hits, normalise
from servable import load_servable, save_servable
from startup import PROFILED_BATCH_SIZES
from supernet import Subnet, SubnetSpace, Supernet, count_parameters

SEARCHED = 14


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained digits supernet, searched and measured; do not change it."""
    folder = tmp_path_factory.mktemp("searched") / "digits"
    shutil.copytree(trained_digits(tmp_path_factory.getbasetemp()), folder)
    profile_supernet.main(arguments(folder))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--data", "digits", "--profile", str(folder), "--device", "cpu", "--threads", "1",
        "--candidates", str(SEARCHED), "--rounds", "3", *more,
    ]  # fmt: skip


def candidate(accuracy_: float, latency_s: float, name: str = "", confirmed: float = 0.5) -> Candidate:
    return Candidate(
        name=name, accuracy=accuracy_, confirmed=confirmed, latency_s=latency_s, parameters=1, macs=1
    )  # fmt: skip


def log_of(folder: Path) -> list[Candidate]:
    return [Candidate(**json.loads(line)) for line in (folder / "search.jsonl").read_text().splitlines()]


def test_the_report_tells_what_was_held_while_latencies_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    class Holding:
        held = Held(nbytes=3 * 2**20, subnets=("a",), pairs=(Pair("a", 2), Pair("a", 1)))

    document = profile_supernet.report_held(Holding())  # type: ignore[arg-type]
    assert document == {"subnets_held": 1, "pairs_held": 2, "held_bytes": 3 * 2**20}
    assert "held: 1 subnets, 2 captured pairs of subnet and batch size, 3.0 MB" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- searched for real


@pytest.mark.slow
def test_the_server_can_load_what_was_found(profile: Path) -> None:
    servable, choices = load_servable(profile), slackfit.load_choices(profile)
    engine = Engine(servable, "cpu")
    device = slackfit.Device(**asdict(engine.facts))
    table = slackfit.load_latencies(profile / device.file_name, choices, device)
    assert table.batch_sizes == PROFILED_BATCH_SIZES
    assert 1 <= len(table.entries) <= SEARCHED
    for entry in table.entries:
        assert engine.actuate(entry.name).calibrated
        servable.supernet.space.check(Subnet.parse(entry.name))
    engine.close()


@pytest.mark.slow
def test_every_subnet_looked_at_is_calibrated_and_listed(profile: Path) -> None:
    servable, choices = load_servable(profile), slackfit.load_choices(profile)
    assert len(choices) == len(servable.supernet.statistics) == SEARCHED
    assert {choice.name for choice in choices} == {subnet.name for subnet in servable.supernet.statistics}
    assert {choice.name for choice in choices} == {row.name for row in log_of(profile)}
    space = servable.supernet.space
    assert {space.largest.name, space.smallest.name} <= {choice.name for choice in choices if choice.frontier}


@pytest.mark.slow
def test_half_of_the_validation_images_choose_the_others_measure_and_test_images_report(profile: Path) -> None:
    servable, data, searched = load_servable(profile), digits(), {row.name: row for row in log_of(profile)}
    for choice in slackfit.load_choices(profile):
        subnet = Subnet.parse(choice.name)
        right = hits(servable, subnet, data.validation)
        assert choice.accuracy == pytest.approx(right[1::2].mean(), abs=1e-4)
        assert searched[choice.name].accuracy == pytest.approx(right[::2].mean(), abs=1e-4)
        assert choice.accuracy_samples == len(data.validation) // 2 == 143
        assert choice.parameters == count_parameters(servable.supernet.extract(subnet))
        if choice.frontier:
            assert choice.test_accuracy == pytest.approx(accuracy(servable, subnet, data.test), abs=1e-4)
        else:
            assert choice.test_accuracy is None


@pytest.mark.slow
def test_larger_subnets_cost_more(profile: Path) -> None:
    choices = {choice.name: choice for choice in slackfit.load_choices(profile)}
    space = load_servable(profile).supernet.space
    small, large = choices[space.smallest.name], choices[space.largest.name]
    assert small.macs < large.macs / 10
    assert small.parameters < large.parameters / 5


@pytest.mark.slow
def test_a_finished_search_is_not_repeated(profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(profile, folder)
    profile_supernet.main(arguments(folder))
    assert (folder / "search.jsonl").read_bytes() == (profile / "search.jsonl").read_bytes()
    # Which of them are on the frontier may differ, since latencies are measured anew.
    before, after = map(slackfit.load_choices, (profile, folder))
    assert [(each.name, each.accuracy) for each in after] == [(each.name, each.accuracy) for each in before]


@pytest.mark.slow
def test_latencies_can_be_measured_alone(profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(profile, folder)
    for table in folder.glob("latency-*.json"):
        table.unlink()
    profile_supernet.main(
        ["--profile", str(folder), "--latency-only", "--device", "cpu", "--threads", "1", "--rounds", "2"]
    )
    assert len(list(folder.glob("latency-cpu-*.json"))) == 1


BFLOAT16 = pytest.mark.skipif(
    not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)(), reason="this processor has no bfloat16"
)


@BFLOAT16
@pytest.mark.slow
def test_another_dtype_is_measured_on_the_frontier_and_served_with_its_accuracies(
    profile: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bfloat16"
    shutil.copytree(profile, folder)
    profile_supernet.main(arguments(folder, "--dtype", "bfloat16"))
    before, after = slackfit.load_choices(profile), slackfit.load_choices(folder)
    assert [replace(each, in_dtypes=()) for each in after] == list(before)
    assert all(bool(each.in_dtypes) == each.frontier for each in after)
    served, data = slackfit.load_choices(folder, "bfloat16"), digits()
    servable = load_servable(folder, "bfloat16")
    exact = {choice.name: choice for choice in before}
    for choice in served:
        subnet = servable.supernet.space.parse(choice.name)
        halves = (data.validation.images[1::2], data.validation.labels[1::2]), (data.test.images, data.test.labels)
        for (shown, labels), told in zip(halves, (choice.accuracy, choice.test_accuracy), strict=True):
            x = normalise(shown, servable.input).bfloat16()
            right = servable.supernet.actuate(subnet)(x).argmax(1).numpy() == labels
            assert told == pytest.approx(right.mean(), abs=0.01), "kernels round otherwise"
        assert choice.accuracy == pytest.approx(exact[choice.name].accuracy, abs=0.02)
    (file,) = folder.glob("latency-cpu-*-bfloat16.json")
    table = load_table(file)
    assert table.device is not None
    assert table.device.dtype == "bfloat16"
    assert {each.choice for each in table.entries} <= set(served), "accuracies of its dtype, not of float32"
    assert load_table(folder).device == replace(table.device, dtype="float32")


@pytest.mark.slow
def test_ensembles_alone_leave_the_subnets_as_they_are(profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "together"
    shutil.copytree(profile, folder)
    for _ in range(2):
        profile_supernet.main(arguments(folder, "--ensembles-only"))
    before, after = map(slackfit.load_choices, (profile, folder))
    assert after[: len(before)] == before
    servable, data = load_servable(folder), digits()
    engine = Engine(servable, "cpu", ensembles=[each.ensemble for each in after if each.ensemble])
    for each in after[len(before) :]:
        assert each.kind == "ensemble"
        assert each.accuracy_samples == len(data.validation) // 2
        rows = engine._compute(each.name, list(data.test.images), engine._make_worker()).probabilities
        assert each.test_accuracy == pytest.approx((rows.argmax(1) == data.test.labels).mean(), abs=0.004)
    table = slackfit.load_latencies(folder / device_of(engine).file_name, after, device_of(engine))
    assert all(len(entry.modes) == 65 for entry in table.entries if entry.choice.ensemble)
    engine.close()


def device_of(engine: Engine) -> slackfit.Device:
    return slackfit.Device(**asdict(engine.facts))


# ------------------------------------------------------------------------------------------------------------- search


def tiny_search(folder: Path, engine_of: list[Engine]) -> Search:
    servable = load_servable(folder)
    engine_of.append(Engine(servable, "cpu"))
    return Search(servable, noise(12, channels=3), engine_of[-1], folder, batch_size=2)


@pytest.fixture
def engines() -> list[Engine]:
    return []


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    save_servable(tiny_servable(), tmp_path)
    return tmp_path


@pytest.mark.slow
def test_an_interrupted_search_continues_where_its_statistics_were_saved(
    tiny_folder: Path, engines: list[Engine]
) -> None:
    first = tiny_search(tiny_folder, engines)
    found = first.run(6, seed=0)
    log = tiny_folder / "search.jsonl"
    unsaved = Candidate(**{**asdict(found[0]), "name": "d2-2-1-e1"})
    log.write_text(log.read_text() + json.dumps(asdict(unsaved)) + '\n{"name": "d1-1-2-')
    second = tiny_search(tiny_folder, engines)
    assert second.found.keys() == first.found.keys(), "neither the unsaved nor the line that was cut off counts"
    assert len(second.run(9, seed=0)) == 9
    third = tiny_search(tiny_folder, engines)
    assert third.found.keys() == second.found.keys()
    for engine in engines:
        engine.close()


@pytest.mark.slow
def test_a_search_over_everything_ends(tmp_path: Path, engines: list[Engine]) -> None:
    servable = tiny_servable(())
    space = SubnetSpace(((1, 2), (1,), (2,)), ((0.5, 1.0), (1.0,), (1.0,)))
    network, stages = supernets.build(servable.family, servable.architecture)
    save_servable(replace(servable, supernet=Supernet(network, stages, space)), tmp_path)
    search = tiny_search(tmp_path, engines)
    assert {each.name for each in search.run(1000, seed=0)} == {subnet.name for subnet in space}
    engines[0].close()


# ----------------------------------------------------------------------------------------------------------- frontier

candidates = st.lists(
    st.builds(candidate, st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.integers(1, 9).map(float)), min_size=1
)


def test_what_only_chance_has_chosen_is_not_confirmed() -> None:
    chosen = [candidate(0.7, 1, "a", confirmed=0.7), candidate(0.8, 2, "b", confirmed=0.69)]
    chosen.append(candidate(0.9, 3, "c", confirmed=0.8))
    assert [each.name for each in confirmed(chosen)] == ["a", "c"]


@given(candidates)
def test_the_frontier_is_what_nothing_beats(found: list[Candidate]) -> None:
    kept = frontier(found)

    def beaten(one: Candidate) -> bool:
        return any(
            other.accuracy >= one.accuracy
            and other.latency_s <= one.latency_s
            and (other.accuracy, other.latency_s) != (one.accuracy, one.latency_s)
            for other in found
        )

    points = {(each.accuracy, each.latency_s) for each in found if not beaten(each)}
    assert {(each.accuracy, each.latency_s) for each in kept} == points
    assert len(kept) == len(points), "equals are kept once"
    assert [each.latency_s for each in kept] == sorted(each.latency_s for each in kept)


@given(candidates, st.integers(1, 6))
def test_thinning_keeps_the_ends(found: list[Candidate], most: int) -> None:
    whole = frontier(found)
    kept = thinned(whole, most)
    assert len(kept) <= max(2, most)
    assert {whole[0], whole[-1]} <= set(kept) <= set(whole)
    assert len(kept) == min(len(whole), max(2, most))


def test_thinning_leaves_out_what_is_missed_least() -> None:
    ends = [candidate(0.5, 1.0), candidate(0.9, 9.0)]
    barely_better, much_better = candidate(0.51, 4.0), candidate(0.8, 5.0)
    assert thinned([ends[0], barely_better, much_better, ends[1]], 3) == [ends[0], much_better, ends[1]]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_data_is_needed_for_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_supernet.main(["--profile", str(tmp_path)])
    assert "--data is needed, except with --latency-only" in capsys.readouterr().err


def test_ensembles_are_looked_for_in_float32_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_supernet.main(["--profile", str(tmp_path), "--data", "digits", "--dtype", "float16", "--ensembles"])
    assert "ensembles are looked for in float32" in capsys.readouterr().err


def test_a_folder_without_a_supernet_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"profile_supernet\.py: .*supernet\.json: .*No such file"):
        profile_supernet.main(["--profile", str(tmp_path), "--data", "digits"])


def test_an_unknown_device_is_named(tiny_folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"profile_supernet\.py: unknown device 'npu'"):
        profile_supernet.main(["--profile", str(tiny_folder), "--data", "digits", "--device", "npu"])


def test_measuring_alone_needs_a_search_before_it(tiny_folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"choices\.json"):
        profile_supernet.main(["--profile", str(tiny_folder), "--latency-only", "--device", "cpu"])
    assert SPACE.largest in load_servable(tiny_folder).supernet.statistics
