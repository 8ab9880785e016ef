"""Our families compute what the original code computes, on the fixtures beside the project."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.check_conformance import Report, check, find_cases, main, widened
from scripts.official_arguments import bert_subnet, merged, ofa_mobilenet_subnet, ofa_resnet_subnet
from supernet import SupernetError
from supernets import ofa_mobilenet, ofa_resnet

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the fixtures beside the project (../shared)")


# --------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("state", "given", "after"),
    [
        ([1, 2, 3], None, [1, 2, 3]),
        ([1, 2, 3], 7, [7, 7, 7]),
        ([1, 2, 3], [7, None, 9], [7, 2, 9]),
        ([1, 2, 3], (7, 8), [7, 8, 3]),
        ([1, 2, 3], [7, 8, 9, 10], [7, 8, 9]),
    ],
)
def test_arguments_change_the_state_where_told(state: list[int], given: object, after: list[int]) -> None:
    assert merged(state, given) == after


def test_resnet_arguments_are_extra_blocks_and_indices_of_widths() -> None:
    largest = ofa_resnet_subnet(ofa_resnet.DEPTH)
    assert largest == ofa_resnet.official_space().largest
    assert ofa_resnet_subnet(ofa_resnet.DEPTH, {"d": 0, "e": 0.2, "w": 0}) == ofa_resnet.official_space().smallest
    assert ofa_resnet_subnet(ofa_resnet.DEPTH, {"d": [1, 2, 2, 2, 2]}).stem == (0,), "kept only at 2"
    entries = [0.2] * 3 + [0.35] * 15
    dropped = ofa_resnet_subnet(ofa_resnet.DEPTH, {"d": [2, 0, 2, 2, 2], "e": entries})
    assert dropped.expands[:3] == (0.2, 0.2, 0.35), "the third entry is of a block that does not run"
    assert ofa_resnet_subnet(ofa_resnet.DEPTH, {"w": [0, 1, 2]}).widths == (0.65, 0.8, 1.0, 1.0, 1.0, 1.0)


def test_calls_follow_one_another() -> None:
    twice = ofa_resnet_subnet(ofa_resnet.DEPTH, {"d": 0, "e": 0.2}, {"d": [2, None, 1], "w": None})
    assert (twice.stem, twice.depths) == ((1,), (2, 3, 4, 2))
    assert set(twice.expands) == {0.2}


def test_mobilenet_arguments_are_values_and_depths_are_cut() -> None:
    assert ofa_mobilenet_subnet(ofa_mobilenet.DEPTH, {"d": 9}) == ofa_mobilenet.official_space().largest
    subnet = ofa_mobilenet_subnet(ofa_mobilenet.DEPTH, {"ks": [3, 5, 7] * 7, "e": 4, "d": [2, 4, 4, 4, 4]})
    assert subnet.kernels[:4] == (3, 5, 5, 7), "entries of dropped blocks are passed over"
    assert set(subnet.expands) == {4}


def test_unknown_arguments_and_indices_are_refused() -> None:
    with pytest.raises(SupernetError, match="takes d, e, w, not k"):
        ofa_resnet_subnet(ofa_resnet.DEPTH, {"k": 3})
    with pytest.raises(SupernetError, match="w must be indices"):
        ofa_resnet_subnet(ofa_resnet.DEPTH, {"w": 3})


def test_a_space_is_widened_by_what_cases_have() -> None:
    space = widened(ofa_mobilenet.official_space(), [ofa_mobilenet_subnet(ofa_mobilenet.DEPTH, {"d": [1, 4, 4, 4, 4]})])
    assert space.smallest.depths == (1, 2, 2, 2, 2)
    assert bert_subnet(0.5, 0.75).name == "w0.5-d0.75"


# ---------------------------------------------------------------------------------------------------------------- cases


def test_differences_and_nonsense_are_failures(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert report.close("case", "fine", np.ones(2), np.ones(2) + 1e-9, 1e-8) < 1e-8
    report.close("case", "far", np.ones(2), np.zeros(2), 1e-8)
    report.close("case", "nan", np.full(2, np.nan), np.zeros(2), 1e-8)
    report.close("case", "shape", np.ones(2), np.ones(3), 1e-8)
    report.same("case", "params", 3, 4)
    assert [line.split(" ")[1] for line in report.failures] == ["far", "nan", "shape", "params"]
    assert capsys.readouterr().out.splitlines() == report.failures


@needs_fixtures
@pytest.mark.slow
def test_quick_cases_agree() -> None:
    report = check(FIXTURES, names=["db_04", "db_12", "db_44", "mb10_24", "rn_28"])
    assert (report.cases, report.failures) == (5, [])
    assert report.worst["f64"] < 1e-8


@needs_fixtures
@pytest.mark.slow
@pytest.mark.parametrize("family", ["dynabert", "ofa_resnet50", "ofa_mbv3"])
def test_all_cases_agree(family: str) -> None:
    report = check(FIXTURES, [family])
    assert report.failures == []
    assert report.cases == sum(len(each.cases) for each in find_cases(FIXTURES, [family], ()))


def spoil_weights(folder: Path) -> None:
    source = (folder / "synth.py").read_text()
    (folder / "synth.py").write_text(source.replace("v = 0.1 * z", "v = 0.2 * z"))


def spoil_logits(folder: Path) -> None:
    with np.load(folder / "cases_public.npz") as archive:
        arrays: dict[str, Any] = {name: archive[name] + (1e-7 if name.endswith("f64") else 0) for name in archive.files}
    np.savez(folder / "cases_public.npz", **arrays)


def spoil_resolved(folder: Path) -> None:
    document = json.loads((folder / "cases_public.json").read_text())
    for case in document["cases"]:
        case["resolved"]["heads"] += 1
    (folder / "cases_public.json").write_text(json.dumps(document))


@needs_fixtures
@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_weights, "digests of l4h4: bert.embeddings.LayerNorm.bias"),
        (spoil_logits, "db_00: logits_f64 is off by 1e-07, allowed is 1e-08"),
        (spoil_resolved, "db_00: resolved heads is 1, expected 2"),
    ],
)
def test_what_is_wrong_is_named_and_the_exit_status_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, named: str
) -> None:
    shutil.copytree(FIXTURES / "dynabert", tmp_path / "dynabert")
    spoil(tmp_path / "dynabert")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--cases", "db_00"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert caught.value.code == 1
    assert any(line.startswith(named) for line in lines)
    assert json.loads(last)["failures"] == len(lines)


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no cases in"):
        main([str(tmp_path)])
