"""A network of timm's becomes a servable that is trained, profiled and loaded like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_supernet import digits
from torch import Tensor

import servable as servable_module
import supernets
from scripts import make_elastic
from servable import InputSpec, create_servable, load_servable
from subnets import SubnetSpace, SupernetError
from supernet import Supernet
from supernets.timm_models import TimmNetwork, import_timm, structure

RESNET = ["--model", "resnet18", "--arguments", '{"channels": [8, 8, 16, 16], "output_stride": 8}']
VIT_ARGUMENTS = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 4}
VIT = ["--model", "vit_tiny_patch16_224", "--arguments", json.dumps(VIT_ARGUMENTS)]


@pytest.fixture(autouse=True)
def _needs_timm() -> None:
    try:
        import_timm()
    except ValueError:
        pytest.skip("needs timm")


def run(*arguments: str) -> None:
    make_elastic.main(["--threads", "1", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = str(caught.value.code)
    assert message.startswith("make_elastic.py: ")
    assert "\n" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_a_network_of_timms_is_made_elastic_trained_and_served(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    run(*model, "--data", "digits", "--out", str(out), "--epochs", "2")
    printed = capsys.readouterr().out
    assert printed.startswith("stage 0: ")
    if model is RESNET:  # of a transformer, two epochs of so few images make nothing yet
        assert json.loads(printed.splitlines()[-1])["largest"] > 0.3, "chance is 0.1"
    loaded = load_servable(out)
    assert loaded.family == "timm"
    assert loaded.architecture["model"] == model[1]
    space = loaded.supernet.space
    x = torch.randn(2, 1, 8, 8)
    for subnet in (space.largest, space.smallest):
        actuated = loaded.supernet.actuate(subnet)
        assert actuated.calibrated
        torch.testing.assert_close(actuated(x), loaded.supernet.extract(subnet)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_weights_of_the_plain_network_are_taken_over(model: list[str], tmp_path: Path) -> None:
    torch.manual_seed(5)
    timm = import_timm()
    arguments: dict[str, Any] = json.loads(model[3])
    plain = timm.create_model(model[1], num_classes=10, in_chans=1, **arguments).eval()
    torch.nn.init.normal_(plain.get_classifier().weight)
    path = tmp_path / "plain.pt"
    torch.save(plain.state_dict(), path)
    options = make_elastic.parse_arguments(
        [*model, "--weights", str(path), "--report-only", "--input-size", "1", "8", "8", "--classes", "10"]
    )
    _, insertion = make_elastic.elastic_network(options, make_elastic.architecture_of(options, None))
    x = torch.randn(3, 1, 8, 8)
    largest = insertion.supernet.actuate(insertion.supernet.space.largest)(x)
    torch.testing.assert_close(largest, plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_report_alone_needs_neither_data_nor_training(capsys: pytest.CaptureFixture[str]) -> None:
    run(*RESNET, "--report-only", "--input-size", "3", "32", "32", "--classes", "7", "--depths", "[[1],[1],[1],[1]]")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in lines[:4]] == [
        f"network.layer{number}" for number in (1, 2, 3, 4)
    ]
    assert json.loads(lines[-1])["stages"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet1O", "--data", "digits"], "timm has no model 'resnet1O'; near: resnet1"),
        (["--model", "hf-hub:someone/something", "--data", "digits"], "timm has no model 'hf-hub:"),
        (["--model", "resnet10t", "--arguments", '{"wings": 2}', "--data", "digits"], "cannot make 'resnet10t'"),
        (["--model", "resnet10t", "--arguments", '{"checkpoint_path": "x"}', "--data", "digits"], "must not have"),
        (
            ["--model", "vgg11", "--report-only", "--input-size", "3", "32", "32"],
            "nothing in the network can be elastic",
        ),
        ([*RESNET, "--data", "digits", "--depths", "[[1]]"], "1 stages with depths but 4 with expand ratios"),
        ([*RESNET, "--data", "nothing"], "nothing: expected 'digits'"),
        ([*RESNET, "--data", "digits", "--weights", "nowhere.pt"], "nowhere.pt: No such file"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(*arguments, "--out", str(tmp_path / "out"))


@pytest.mark.slow
def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"fc.weight": torch.zeros(3)}, path)
    assert "Missing key" in refusal(*RESNET, "--data", "digits", "--weights", str(path), "--out", str(tmp_path / "out"))


def test_a_profile_of_timms_without_the_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(SupernetError, match="needs the package timm"):
        create_servable(
            name="x", family="timm", architecture={"model": "resnet10t", "classes": 2, "input_size": [1, 8, 8]},
            space=SubnetSpace(((1,),), ((1.0,),)),
            input=InputSpec(height=8, width=8, channels=1, mean=(0.5,), std=(0.5,)), classes=["a", "b"],
        )  # fmt: skip


@pytest.mark.slow
def test_networks_too_large_to_be_meant_are_refused_before_they_are_made() -> None:
    huge = VIT_ARGUMENTS | {"embed_dim": 16384, "depth": 40}
    with pytest.raises(SupernetError, match="weights; at most"):
        servable_module._build(
            "timm", {"model": VIT[1], "classes": 10, "input_size": [1, 8, 8], "arguments": huge}
        )


@pytest.mark.slow
def test_the_family_finds_in_a_loaded_network_what_it_found_before() -> None:
    torch.manual_seed(0)
    network = TimmNetwork("vit_tiny_patch16_224", 10, [1, 8, 8], VIT_ARGUMENTS)
    found = structure(network)
    supernet = Supernet(network.eval(), supernets.FAMILIES["timm"].elastic(network), found.space())  # type: ignore[operator]
    x: Tensor = torch.from_numpy(digits().test.images[:2]).permute(0, 3, 1, 2).float()
    assert supernet.actuate(supernet.space.smallest)(x).shape == (2, 10)
