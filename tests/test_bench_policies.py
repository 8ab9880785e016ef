"""How long decisions take is measured beside a loop that does nothing, as the server makes them."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import bench_policies
from scripts.bench_policies import CONTROL


@pytest.fixture(autouse=True)
def _garbage_as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_each_setting_has_a_row_for_every_policy_and_one_for_the_control(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    bench_policies.main(["--waiting", "70", "--rounds", "3", "--policies", "clearfit", "slackfit", "--json", str(path)])
    document = json.loads(path.read_text())
    assert (document["waiting"], document["margin"], document["rounds"]) == (70, 0.3, 3)
    settings = {(row["table"], row["state"], row["slos"]) for row in document["rows"]}
    assert len(settings) == 8
    for setting in settings:
        rows = [row for row in document["rows"] if (row["table"], row["state"], row["slos"]) == setting]
        assert [row["policy"] for row in rows] == ["clearfit", "slackfit", CONTROL]
        assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)


def test_the_control_takes_about_what_a_decision_takes() -> None:
    # How fast the machine is may change in between, but hardly twofold.
    assert bench_policies.Loop().least_us() > bench_policies.CONTROL_US / 2


def test_an_unknown_policy_is_an_error_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"bench_policies.py: no policy 'magic'"):
        bench_policies.main(["--policies", "magic", "--rounds", "1"])
