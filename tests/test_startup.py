"""What a start needs is found missing before it takes long; ``--check`` finds all of it and touches nothing."""

import asyncio
import gc
import itertools
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import serving
import torch
from conftest import choice, in_ms
from serving import LARGE, LARGE_ACCURACY, SMALL, SMALL_ACCURACY, Clock, config_of, latencies, turns_until

import slackfit
import startup
import superserve
from config import Config
from members import mirrored
from profiletable import Ensemble
from servable import TokenSpec, load_servable
from slackfit import DeviceMismatch, Latencies, PolicyError
from startup import Finding, TableFile, check, check_policy
from superserve import SuperServe


@pytest.fixture
def own(profile: Path, tmp_path: Path) -> Path:
    """A copy of the profile, to be changed."""
    return Path(shutil.copytree(profile, tmp_path / "own"))


def table_of(folder: Path) -> Path:
    (path,) = folder.glob("latency-*.json")
    return path


def damage(path: Path) -> None:
    document = json.loads(path.read_text())
    document["latencies"][LARGE]["p99_ms"][0] = -1
    path.write_text(json.dumps(document))


def of_another_device(path: Path) -> None:
    document = json.loads(path.read_text())
    document["device"]["torch"] = "0.1"
    path.write_text(json.dumps(document))


# ------------------------------------------------------------------------------------------------------------- policies


POLICIES = [name for name in slackfit.POLICIES if name not in ("slackfit:K", "fixed:SUBNET")]
WITH_ARGUMENTS = ["slackfit:4", "fixed:largest", "fixed:smallest", f"fixed:{SMALL}", f"fixed:{LARGE}"]


@pytest.mark.parametrize("spec", POLICIES + WITH_ARGUMENTS)
def test_every_policy_there_is_passes_before_there_is_a_table(spec: str) -> None:
    check_policy(spec, serving.choices(), workers=2)


@pytest.mark.parametrize("name", ["e1", "e2", "e3"])
def test_a_subnet_as_accurate_as_another_is_known_too(name: str) -> None:
    check_policy(f"fixed:{name}", [choice("e1", 0.5), choice("e2", 0.5), choice("e3", 0.5)], workers=1)


@pytest.mark.parametrize("spec", ["random", "slackfit:0", "fixed:d9", "fixed:", ""])
def test_a_policy_that_is_none_is_named_before_any_profiling(spec: str, own: Path) -> None:
    table_of(own).unlink()
    with pytest.raises(PolicyError, match=f"^(no policy '{spec}': there are|{spec}: .*{LARGE}, or largest, smallest)"):
        SuperServe(config_of(own, policy=spec))


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_is_found_in_the_table_folder_then_in_the_profile(own: Path, tmp_path: Path) -> None:
    config = config_of(own, table_dir=tmp_path / "new" / "tables", autoprofile=False)
    assert SuperServe(config).dispatcher is not None  # from the profile
    file = table_file(config)
    assert file.path.parent.parent == config.table_dir
    flat_s = (0.001,) * len(startup.PROFILED_BATCH_SIZES)
    file.store(dict.fromkeys(latencies(), Latencies(p50_s=flat_s, p99_s=flat_s)))
    assert file.load().batch_sizes == startup.PROFILED_BATCH_SIZES  # from the table folder
    of_another_device(file.path)
    assert file.load().batch_sizes == serving.SIZES  # from the profile again
    of_another_device(table_of(own))
    with pytest.raises(DeviceMismatch, match=str(own)):
        file.load()


def test_profiles_that_share_a_table_folder_do_not_find_each_others_tables(own: Path, tmp_path: Path) -> None:
    config = config_of(own, table_dir=tmp_path / "tables")
    file = table_file(config)
    flat_s = (0.001,) * len(startup.PROFILED_BATCH_SIZES)
    file.store(dict.fromkeys(latencies(), Latencies(p50_s=flat_s, p99_s=flat_s)))
    document = json.loads((own / "supernet.json").read_text())
    (own / "supernet.json").write_text(json.dumps({**document, "classes": document["classes"][::-1]}))
    assert table_file(config).path != file.path
    assert table_file(config).load().batch_sizes == serving.SIZES  # of the profile itself


def table_file(config: Config) -> TableFile:
    serve = SuperServe(config)
    serve.engine.close()
    return TableFile.of(config, serving.choices(), serve.engine)


# ---------------------------------------------------------------------------------------------------------------- check


def test_what_is_well_is_one_line(profile: Path) -> None:
    (finding,) = check(config_of(profile))
    assert finding.level == "ok"
    assert str(profile) in finding.text
    assert "1 threads x 1 workers: a latency table fits" in finding.text


FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, object], list[tuple[str, str]]]] = {
    # name: what is done to the profile, settings, level and text of each finding
    "policy": (lambda own: None, {"policy": "random"}, [("error", "no policy 'random'"), ("ok", "a latency table")]),
    "device": (lambda own: None, {"device": "tpu"}, [("error", "unknown device 'tpu'")]),
    "no profile": (shutil.rmtree, {}, [("error", r"supernet\.json"), ("error", r"choices\.json")]),
    "weights": (lambda own: (own / "weights.npz").write_bytes(b"PK"), {}, [("error", r"weights\.npz")]),
    "choices": (lambda own: (own / "choices.json").write_text("{}"), {}, [("error", r"choices\.json")]),
    "no table": (lambda own: table_of(own).unlink(), {}, [("warning", "no latency table .*; the start will measure")]),
    "no table, and none to be measured": (
        lambda own: table_of(own).unlink(), {"autoprofile": False}, [("error", "start without --no-autoprofile")],
    ),
    "table of another device": (lambda own: of_another_device(table_of(own)), {}, [("warning", "torch")]),
    "damaged table": (lambda own: damage(table_of(own)), {}, [("error", rf"latencies\.{LARGE}\.p99_ms")]),
    "several": (
        lambda own: table_of(own).unlink(), {"policy": "fixed:x", "autoprofile": False},
        [("error", "fixed:x"), ("error", "no latency table")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_named(own: Path, name: str) -> None:
    harm, settings, expected = FAULTS[name]
    harm(own)
    before = sorted(own.rglob("*"))
    findings = check(config_of(own, **settings))
    assert [finding.level for finding in findings] == [level for level, _ in expected], findings
    for finding, (_, named) in zip(findings, expected, strict=True):
        assert re.search(named, finding.text)
        assert "\n" not in finding.text
    assert sorted(own.rglob("*")) == before


def test_a_table_is_not_written_through_a_link_that_leads_out_of_the_profile(own: Path, tmp_path: Path) -> None:
    table = table_of(own)
    table.unlink()
    table.symlink_to(tmp_path / "elsewhere.json")
    config = config_of(own)
    servable = load_servable(own)
    engine = startup.start_engine(config, servable)
    engine.close()
    with pytest.raises(OSError, match="is a link that leads out of its folder"):
        TableFile.of(config, serving.choices(), engine).store(latencies())
    assert not (tmp_path / "elsewhere.json").exists()


def test_a_profile_for_simulation_only_is_no_profile_to_serve() -> None:
    findings = check(Config(profile=Path(startup.__file__).parent / "profiles" / "paper-ofa-resnet50"))
    assert findings[0].level == "error"
    assert "synthetic" in findings[0].text


@pytest.mark.parametrize(
    ("levels", "code"), [(["ok"], 0), (["warning"], 0), (["error"], 1), (["error", "ok"], 1), ([], 0)]
)
def test_the_exit_code_is_1_if_a_server_could_not_start(
    levels: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert startup.report([Finding(level, "this") for level in levels]) == code
    assert capsys.readouterr().out == "".join(f"{level}: this\n" for level in levels)


def test_the_command_checks_and_exits(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, line in (([], 0, "ok: "), (["--policy", "x"], 1, "error: no policy 'x'")):
        with pytest.raises(SystemExit) as exit:
            superserve.main(["--check", "--profile", str(profile), "--device", "cpu", "--threads", "1", *arguments])
        assert exit.value.code == code
        assert capsys.readouterr().out.startswith(line)


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.slow
@pytest.mark.skipif(
    not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)(), reason="this processor has no bfloat16"
)
def test_a_server_in_another_dtype_tells_its_accuracies_and_measures_a_table_of_its_own(own: Path) -> None:
    lower = [
        slackfit.measured_in(each, slackfit.InDtype(dtype="bfloat16", accuracy=each.accuracy / 2, test_accuracy=None))
        for each in serving.choices()
    ]
    slackfit.save_choices(own, lower)

    async def told() -> set[float]:
        async with SuperServe(config_of(own, dtype="bfloat16")) as serve:
            reply = await serve.infer(serving.image_file())
            assert serve.dispatcher is not None
            return {reply.accuracy, *(entry.accuracy for entry in serve.dispatcher.table.entries)}

    assert asyncio.run(told()) <= {SMALL_ACCURACY / 2, LARGE_ACCURACY / 2}
    assert len(list(own.glob("latency-*-bfloat16.json"))) == 1
    assert [finding.level for finding in check(config_of(own))] == ["ok"], "in float32 all is as it was"


def test_a_dtype_in_which_nothing_was_measured_is_named(own: Path) -> None:
    (finding, *_) = [each for each in check(config_of(own, dtype="bfloat16")) if each.level == "error"]
    assert re.search(r"no accuracy of \S+ in bfloat16; scripts/profile_supernet\.py --dtype bfloat16", finding.text)


# ------------------------------------------------------------------------------------------------------------ ensembles

PAIR = Ensemble(members=(SMALL, LARGE), combination="mean", weights=(0.5, 0.5))


def with_ensemble(*, frontier: bool = True) -> list[slackfit.Choice]:
    """The choices of the tiny servable, and an ensemble of them."""
    both = replace(choice(PAIR.name, 0.95, frontier=frontier), kind="ensemble", ensemble=PAIR)
    return [*serving.choices(), both]


async def test_ensembles_are_measured_in_both_modes_and_run_in_the_faster(profile: Path) -> None:
    choices = with_ensemble()
    engine = startup.start_engine(config_of(profile), load_servable(profile), choices)
    measured = await startup.profile_latencies(engine, [each.name for each in choices], 2)
    assert list(measured) == [SMALL, LARGE, PAIR.name]
    both = measured[PAIR.name]
    assert (measured[SMALL].modes, len(both.modes)) == ((), len(startup.PROFILED_BATCH_SIZES))
    assert both.p50_s == tuple(map(min, zip(both.parallel_p50_s, both.serial_p50_s, strict=True)))
    table = slackfit.build_table(choices, startup.PROFILED_BATCH_SIZES, measured)
    startup.plan_ensembles(engine, table)
    entry = table.by_name(PAIR.name)
    assert [engine.ensembles.mode(PAIR.name, size) for size in startup.PROFILED_BATCH_SIZES] == list(both.modes)
    assert [engine.ensembles.mode(PAIR.name, size) for size in range(1, 65)] == list(entry.modes[1:])
    engine.close()


def test_of_both_modes_the_lower_median_counts_by_batch_size() -> None:
    parallel, serial = in_ms(2, 3, 9), in_ms(4, 3, 8)
    parallel, serial = replace(parallel, p99_s=(0.005, 0.030, 0.040)), replace(serial, p99_s=(0.001, 0.002, 0.020))
    both = startup.faster_of(parallel, serial)
    assert both.modes == ("parallel", "parallel", "serial")
    assert both.p50_s == (0.002, 0.003, 0.008)
    assert both.p99_s == (0.005, 0.030, 0.030), "a larger batch takes no less time"


def test_members_of_ensembles_on_the_frontier_need_statistics(profile: Path) -> None:
    servable = load_servable(profile)
    unknown = Ensemble(members=(SMALL, "d1-1-1-e1"), combination="mean", weights=(0.5, 0.5))
    choices = [replace(each, frontier=False) for each in serving.choices()]
    pair = replace(choice(unknown.name, 0.9), kind="ensemble", ensemble=unknown)
    with pytest.raises(slackfit.ProfileError, match=r"choices\.json: d1-1-1-e1 has no statistics in norms\.npz"):
        startup.check_statistics(profile, [*choices, pair], servable)
    startup.check_statistics(profile, [*choices, replace(pair, frontier=False)], servable)
    startup.check_statistics(profile, with_ensemble(), servable)


def test_only_images_can_be_mirrored(profile: Path) -> None:
    servable = load_servable(profile)
    both = Ensemble(members=(SMALL, mirrored(SMALL)), combination="mean", weights=(0.5, 0.5))
    choices = [*serving.choices(), replace(choice(both.name, 0.95), kind="ensemble", ensemble=both)]
    startup.check_statistics(profile, choices, servable)
    texts = replace(servable, input=TokenSpec(length=8, vocabulary=10))
    with pytest.raises(slackfit.ProfileError, match=f"{mirrored(SMALL)}: only images can be mirrored"):
        startup.check_statistics(profile, choices, texts)


def test_a_profile_with_an_ensemble_is_checked_as_it_is_served(own: Path) -> None:
    slackfit.save_choices(own, with_ensemble())
    (finding,) = check(config_of(own))
    assert "missing, but the choice is on the frontier" in finding.text
    slackfit.save_choices(own, with_ensemble(frontier=False))
    (finding,) = check(config_of(own))
    assert finding.level == "ok"


# ------------------------------------------------------------------------------------------------------------- garbage


@pytest.fixture
def few_objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collections look at nothing that is there now, and come without a pause, and only when asked for."""
    monkeypatch.setattr(startup, "COLLECTED_EVERY_S", 0.0)
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.self = self


@pytest.mark.usefixtures("few_objects")
async def test_garbage_is_collected_while_nothing_is_to_be_done_and_not_before() -> None:
    idle, knot = asyncio.Event(), weakref.ref(Knot())
    collecting = asyncio.create_task(startup.collect_when_idle(Clock(), idle.is_set))
    for _ in range(10):
        await asyncio.sleep(0)
    assert knot() is not None
    idle.set()
    await turns_until(lambda: knot() is None)
    collecting.cancel()


@pytest.mark.usefixtures("few_objects")
async def test_a_collection_that_takes_long_is_followed_by_small_ones_for_a_time() -> None:
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    # The first takes a millisecond, so that twenty seconds pass before the next, which takes four seconds.
    times_s = itertools.chain((0.0, 0.001), range(4, 28, 4), (28.0,), itertools.repeat(29.0))
    collecting = asyncio.create_task(startup.collect_when_idle(lambda: next(times_s), lambda: True))
    await turns_until(lambda: len(generations) >= 8)
    collecting.cancel()
    gc.callbacks.remove(note)
    assert generations[:7] == [2, 1, 1, 1, 1, 2, 1]
