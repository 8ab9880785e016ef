"""Networks of somebody else become a zoo: copied, checked, measured and served; or refused in one line."""

from __future__ import annotations

import json
import pickle
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_imported import (
    CLASSES,
    INPUT,
    Foreign,
    foreign,
    rewrite,
    write_exported,
    write_scripted,
    write_torchscript,
)
from fixtures_supernet import digits
from serving import Served
from torch import nn

import slackfit
from scripts import import_zoo
from scripts.exported import ExportedError, to_torchscript
from servable import load_servable
from supernets.zoo import Member


def write_spec(folder: Path, **changed: Any) -> Path:
    spec = {"name": "theirs", "classes": list(CLASSES), "input": INPUT, "members": {"a": {"file": "a.pt"}}, **changed}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return path


def run(spec: Path, *more: str) -> Path:
    out = spec.parent / "out"
    import_zoo.main(["--spec", str(spec), "--out", str(out), *more])
    return out


def refusal(spec: Path, *more: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(spec, *more)
    message = str(caught.value.code)
    assert message.startswith("import_zoo.py: ")
    assert "\n" not in message
    assert not (spec.parent / "out").exists(), "something was written"
    return message


# ------------------------------------------------------------------------------------------------- copied and served


@pytest.mark.slow
def test_networks_are_copied_and_compute_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_torchscript(tmp_path / "elsewhere" / "net.pt", foreign(0))
    write_scripted(tmp_path / "b.pt", foreign(1, width=16))
    write_exported(tmp_path / "c.pt2", foreign(2))
    write_exported(tmp_path / "d.pt2", nn.Sequential(foreign(3), nn.Softmax(1)).eval())
    members = {
        "a": {"file": "elsewhere/net.pt"}, "b": {"file": str(tmp_path / "b.pt"), "outputs": "logits"},
        "c": {"file": "c.pt2"}, "d": {"file": "d.pt2", "outputs": "probabilities"},
    }  # fmt: skip
    out = run(write_spec(tmp_path, members=members))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"next: python scripts/profile_supernet.py --profile {out} --data DATA"
    assert json.loads(lines[-1]) == {"out": str(out), "members": ["a", "b", "c", "d"], "classes": 4}
    loaded = load_servable(out)
    assert loaded.classes == CLASSES
    x = torch.randn(3, 3, 16, 16)
    for seed, name in enumerate("abcd"):
        with torch.inference_mode():
            found = loaded.supernet.actuate(Member((name,)))(x).softmax(1)
            torch.testing.assert_close(found, foreign(seed, width=16 if name == "b" else 8)(x).softmax(1))
    assert sorted(path.name for path in out.iterdir()) == [
        "a.pt", "b.pt", "c.pt", "d.pt", "norms.npz", "supernet.json", "weights.npz",
    ]  # fmt: skip


def test_a_file_that_changes_later_is_noticed(tmp_path: Path) -> None:
    write_torchscript(tmp_path / "a.pt", foreign())
    out = run(write_spec(tmp_path))
    write_torchscript(out / "a.pt", foreign(1))
    with pytest.raises(ValueError, match=r"members\.a: a\.pt: is not the file that was imported: another sha256"):
        load_servable(out)


def trained(width: int) -> Foreign:
    """A network that has learnt the digits a little."""
    torch.manual_seed(0)
    network, data = Foreign(width, classes=10, channels=1), digits()
    x = (torch.from_numpy(data.train.images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    labels = torch.from_numpy(data.train.labels)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(60):
        part = slice(step % 8 * 128, step % 8 * 128 + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[part]), labels[part]).backward()
        optimizer.step()
    return network.eval()


DIGITS: dict[str, Any] = {
    "name": "digits", "classes": list("0123456789"),
    "input": {"height": 8, "width": 8, "channels": 1, "mean": [0.5], "std": [0.25]},
}  # fmt: skip


@pytest.mark.slow
def test_a_zoo_is_measured_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = {"small": trained(4), "large": trained(32)}
    for name, network in networks.items():
        write_torchscript(tmp_path / f"{name}.pt", network, (1, 1, 8, 8))
    members = {name: {"file": f"{name}.pt"} for name in networks}
    out = run(write_spec(tmp_path, members=members, **DIGITS), "--data", "digits")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["profile"] == str(out)
    choices = {choice.name: choice for choice in slackfit.load_choices(out)}
    assert choices.keys() == networks.keys()
    assert choices["large"].accuracy > 0.5, "chance is 0.1"
    assert choices["large"].macs == 16 * 9 * 32 + 4 * 32 * 10
    with Served(out, policy="fixed:large") as server:
        pixels = digits().test.images[0]
        request = urllib.request.Request(f"{server.url}/predict", data=pixels.tobytes())
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    assert answer["subnet"] == "large"
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
    expected = networks["large"](x).softmax(1)[0].detach()
    best = answer["predictions"][0]
    assert best["label"] == str(int(expected.argmax()))
    assert best["probability"] == pytest.approx(float(expected.max()), rel=1e-3)


@pytest.mark.slow
def test_accuracies_that_are_told_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_torchscript(tmp_path / "a.pt", foreign(0))
    write_torchscript(tmp_path / "b.pt", foreign(1, width=16))
    members = {
        name: {"file": f"{name}.pt", "accuracy": accuracy, "accuracy_samples": 500}
        for name, accuracy in (("a", 0.8), ("b", 0.9))
    }
    out = run(write_spec(tmp_path, members=members))
    assert f"next: python superserve.py --profile {out}\n" in capsys.readouterr().out
    with Served(out) as server:
        pixels = np.zeros((16, 16, 3), np.uint8)
        with urllib.request.urlopen(f"{server.url}/predict", data=pixels.tobytes()) as response:
            assert json.load(response)["accuracy"] in (0.8, 0.9)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"speed": 1}, "spec.json: speed is unknown; the fields are name, classes, input, members"),
        ({"name": ""}, "name must be some text"),
        ({"classes": "abcd"}, "classes must be a list of names"),
        ({"classes": ["a", "b", "c"]}, "a.pt: of a batch of 1 inputs (3, 16, 16) it computes (1, 4), expected (1, 3)"),
        ({"classes": []}, "classes must be"),
        ({"classes": ["a", "a", "b", "c"]}, "classes must be different names"),
        ({"input": {"height": 16}}, "input.width is missing"),
        ({"input": {**INPUT, "std": [0, 1, 1]}}, "input: std must be above zero"),
        ({"input": {**INPUT, "mean": 0.5}}, "input: mean must be one number per channel"),
        ({"input": {**INPUT, "channels": 1, "mean": [0], "std": [1]}}, "a.pt: of a batch of 1 inputs (1, 16, 16) it"),
        ({"members": {}}, "members must be an object from names to files"),
        ({"members": {"a": "a.pt"}}, "members.a must be an object"),
        ({"members": {"a": {}}}, "members.a.file is missing"),
        ({"members": {"a": {"file": "a.pt", "weight": 1}}}, "members.a.weight is unknown; the fields are file"),
        ({"members": {"a": {"file": 3}}}, "members.a.file must be the name of a file"),
        ({"members": {"a": {"file": "b.pt"}}}, "b.pt: is not in "),
        ({"members": {"a": {"file": "b.pt2"}}}, "b.pt2: is not there, or no file"),
        ({"members": {"a": {"file": "spec.json"}}}, "is no TorchScript file, as torch.jit.save writes"),
        ({"members": {"a": {"file": "pickle.pt"}}}, "is no TorchScript file, as torch.jit.save writes; pickle files"),
        ({"members": {"a": {"file": "pickle.pt2"}}}, "pickle.pt2: is no file of torch.export"),
        ({"members": {"a+b": {"file": "a.pt"}}}, "members: 'a+b' is no name"),
        ({"members": {"a-b": {"file": "a.pt"}}}, "members must be ascending names of letters"),
        ({"members": {"a": {"file": "a.pt", "outputs": "x"}}}, "outputs must be logits or probabilities"),
        ({"members": {"a": {"file": "soft.pt"}}}, 'its outputs look like probabilities; say "outputs"'),
        ({"members": {"a": {"file": "a.pt", "accuracy": 0.5}}}, "accuracy and accuracy_samples need each other"),
        ({"members": {"a": {"file": "a.pt", "accuracy": 90, "accuracy_samples": 9}}}, "accuracy must be 0 to 1"),
        ({"members": {"a": {"file": "a.pt", "accuracy": 0.9, "accuracy_samples": 0}}}, "must be a whole number from 1"),
        (
            {"members": {"a": {"file": "a.pt", "accuracy": 0.9, "accuracy_samples": 9}, "b": {"file": "a.pt"}}},
            "members.b.accuracy is missing, while others have it",
        ),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(changed: Any, message: str, tmp_path: Path) -> None:
    write_torchscript(tmp_path / "a.pt", foreign())
    write_torchscript(tmp_path / "soft.pt", nn.Sequential(foreign(), nn.Softmax(1)).eval())
    for name in ("pickle.pt", "pickle.pt2"):
        torch.save(foreign().state_dict(), tmp_path / name)
    assert message in refusal(write_spec(tmp_path, **changed))


def test_a_spec_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    assert "No such file" in refusal(path)
    for text, message in (("{", "is no JSON: "), ("[]", "the document must be an object"), ("{}", "name is missing")):
        path.write_text(text)
        assert message in refusal(path)
    assert "unrecognized arguments: --speed (--help tells more)" in refusal(path, "--speed")
    members = {"a": {"file": "a.pt", "accuracy": 0.9, "accuracy_samples": 9}}
    told = write_spec(tmp_path, members=members)
    assert "tells accuracies, which --data would measure" in refusal(told, "--data", "x")


@pytest.mark.slow
def test_data_of_another_form_are_refused(tmp_path: Path) -> None:
    write_torchscript(tmp_path / "a.pt", foreign())
    with pytest.raises(SystemExit, match="digits has images of 8x8x1, the network takes 16x16 with 3 channels"):
        run(write_spec(tmp_path), "--data", "digits")
    write_torchscript(tmp_path / "a.pt", foreign(channels=1), (1, 1, 8, 8))
    with pytest.raises(SystemExit, match="digits has 10 classes, the network 4"):
        run(write_spec(tmp_path, input=DIGITS["input"]), "--data", "digits")


# -------------------------------------------------------------------------------------------------------- torch.export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_exported(tmp_path_factory.mktemp("exported") / "a.pt2", foreign()).read_bytes()


@pytest.mark.slow
def test_an_export_of_one_batch_size_says_so(tmp_path: Path) -> None:
    write_exported(tmp_path / "a.pt2", foreign(), fixed=True, batch=1)
    message = refusal(write_spec(tmp_path, members={"a": {"file": "a.pt2"}}))
    assert "of a batch of 2 inputs (3, 16, 16) it computes" in message
    assert message.endswith("; its batch size is fixed")


@pytest.mark.slow
def test_an_export_in_training_mode_is_refused(tmp_path: Path) -> None:
    write_exported(tmp_path / "a.pt2", foreign().train())
    message = refusal(write_spec(tmp_path, members={"a": {"file": "a.pt2"}}))
    assert "training mode" in message


def replaced(name: str, old: bytes, new: bytes) -> Any:
    """A change of one record, which must have what is replaced."""

    def change(record: str, content: bytes) -> bytes:
        if not record.endswith(name):
            return content
        assert old in content
        return content.replace(old, new)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("weights_config.json", b'"use_pickle": false', b'"use_pickle": true'), "have to be unpickled"),
        (replaced("weights_config.json", b"weight_0", b"../../a"), "have to be unpickled"),
        (replaced("weights_config.json", b'"as_int": 8', b'"as_int": 800000'), "does not fit its bytes|damaged"),
        (replaced("model.json", b"torch.ops.aten.relu.default", b"torch.os.system"), "calls 'torch.os.system', which"),
        (replaced("model.json", b"torch.ops.aten.relu.default", b"torch.hub.load"), "calls 'torch.hub.load', which"),
        (replaced("model.json", b"torch.ops.aten.relu.default", b"_operator.attrgetter"), "calls '_operator.attrget"),
        (replaced("model.json", b"aten.relu.default", b"aten.nothing.default"), "cannot be written as TorchScript"),
        (replaced("model.json", b'"relu"', b'"relu; import os"'), "has the name 'relu; import os', which is none"),
        (replaced("model.json", b'"buffer"', b'"custom_obj"'), "has an input that is a custom_obj"),
        (replaced("model.json", b"{", b""), "is no file of torch.export, or damaged|is no JSON|Expecting|Extra data"),
        (replaced("byteorder", b"little", b"big"), "of another byte order"),
    ],
    ids=range(11),
)
def test_nothing_in_an_export_is_executed(change: Any, message: str, exported: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(exported)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        to_torchscript(path)


@pytest.mark.slow
def test_samples_and_expressions_of_an_export_are_not_looked_at(exported: bytes, tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Maker:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(victim)!r}, 'w')",)

    path = tmp_path / "a.pt2"
    path.write_bytes(exported)
    attack = f"__import__('pathlib').Path({str(victim)!r}).touch()"
    changes = [
        lambda name, content: pickle.dumps(Maker()) if "sample_inputs/" in name else content,
        lambda name, content: (
            content.replace(b'"guards_code": []', f'"guards_code": [{json.dumps(attack)}]'.encode())
            .replace(b"Symbol('s", attack.encode().replace(b'"', b"") + b"+Symbol('s")
        ) if name.endswith("model.json") else content,
    ]  # fmt: skip
    for change in changes:
        before = path.read_bytes()
        assert rewrite(path, change).read_bytes() != before
    assert to_torchscript(path) is not None
    assert not victim.exists()


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    for content in (b"", b"PK\x03\x04", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ExportedError, match=r"is no file of torch\.export"):
            to_torchscript(path)
    write_torchscript(path, foreign())
    with pytest.raises(ExportedError, match=r"is no file of torch\.export"):
        to_torchscript(path)
