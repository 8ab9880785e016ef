"""A zoo: separate networks in one servable, each a choice like a subnet."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import choice
from fixtures_imported import foreign, rewrite, write_scripted, write_torchscript
from fixtures_supernet import worst_in_two_threads
from torch import nn

import supernets.imported
from engine import Engine
from executables import CannotFuseError, Executable, trace
from servable import InputSpec, Servable, create_servable, load_servable, save_servable
from slackfit import ProfileError
from startup import check_statistics
from subnets import IllegalSubnetError, SupernetError
from supernet import count_macs, count_parameters
from supernets.imported import deprecation_known
from supernets.zoo import ARCHITECTURES, Member, Zoo, ZooSpace

MEMBERS: dict[str, dict[str, Any]] = {
    "branched": {"architecture": "branched", "stem": 8, "widths": (16, 32), "depths": (1, 2)},
    "fused": {
        "architecture": "inverted", "stem": 8, "widths": (8, 16), "depths": (2, 1), "strides": (1, 2), "expand": 2,
        "head": 16, "fused": True,
    },
    "inverted": {
        "architecture": "inverted", "stem": 8, "widths": (8, 16), "depths": (2, 1), "strides": (1, 2), "expand": 2,
        "head": 16,
    },
    "residual": {"architecture": "residual", "widths": (8, 16, 16), "depths": (1, 1, 1)},
}  # fmt: skip
SPACE = ZooSpace((tuple(sorted(MEMBERS)),))
INPUT = InputSpec(height=16, width=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def zoo(members: Any = MEMBERS, space: ZooSpace = SPACE) -> Servable:
    torch.manual_seed(0)
    servable = create_servable(
        name="zoo", family="zoo", architecture={"channels": 3, "classes": 4, "members": members}, space=space,
        input=INPUT, classes=["a", "b", "c", "d"],
    )  # fmt: skip
    servable.supernet.network.eval()
    return servable


@pytest.fixture(scope="module")
def calibrated() -> Servable:
    servable = zoo()
    for member in servable.supernet.space:
        servable.supernet.calibrate(member, [torch.randn(64, 3, 16, 16) for _ in range(2)])
    return servable


def members_of(servable: Servable) -> list[Any]:
    return list(servable.supernet.space)


@torch.inference_mode()
def test_a_member_computes_what_its_network_computes_alone(calibrated: Servable) -> None:
    x = torch.randn(5, 3, 16, 16)
    outputs = []
    for member in members_of(calibrated):
        alone = calibrated.supernet.extract(member)
        outputs.append(calibrated.supernet.actuate(member)(x))
        assert torch.equal(outputs[-1], alone(x))
        assert isinstance(alone, Zoo)
        (only,) = alone.members
        assert isinstance(only, ARCHITECTURES[MEMBERS[member.name]["architecture"]])
        assert count_parameters(alone) < count_parameters(calibrated.supernet.network)
    assert len({round(float(each[0, 0]), 4) for each in outputs}) == len(MEMBERS)


def test_members_run_at_the_same_time_in_two_threads(calibrated: Servable) -> None:
    inputs = (torch.randn(4, 3, 16, 16),)
    with torch.no_grad():
        assert worst_in_two_threads(calibrated.supernet, members_of(calibrated), inputs, rounds=20) == 0


@torch.inference_mode()
def test_members_are_fused_like_subnets(calibrated: Servable) -> None:
    x = torch.randn(5, 3, 16, 16).to(memory_format=torch.channels_last)
    for member in members_of(calibrated):
        actuated = calibrated.supernet.actuate(member)
        executable = trace(actuated)
        assert isinstance(executable, Executable)
        for each in (executable, executable.packed()):
            torch.testing.assert_close(each(x), actuated(x), atol=1e-4, rtol=1e-4)


def test_a_zoo_is_stored_and_read_again(calibrated: Servable, tmp_path: Path) -> None:
    save_servable(calibrated, tmp_path)
    read = load_servable(tmp_path)
    x = torch.randn(5, 3, 16, 16)
    assert read.supernet.space == SPACE
    for member in members_of(calibrated):
        with torch.inference_mode():
            torch.testing.assert_close(
                read.supernet.actuate(member)(x), calibrated.supernet.actuate(member)(x), atol=0.05, rtol=0.05
            )


def test_members_are_named_and_drawn_like_subnets() -> None:
    assert [member.name for member in SPACE] == sorted(MEMBERS)
    assert len(SPACE) == SPACE.size == 4
    assert SPACE.parse("residual") == Member(("residual",))
    rng = random.Random(0)
    drawn = [SPACE.sample(rng) for _ in range(50)]
    changed = [SPACE.mutate(each, rng, 0.5) for each in drawn]
    for subnet in drawn + changed:
        SPACE.check(subnet)
    assert {each.name for each in drawn} == set(MEMBERS)


@pytest.mark.parametrize("name", ["", "no name", "a+b", "../a", "é", "x" * 41, "1st"])
def test_what_can_be_no_name_of_a_member_is_refused(name: str) -> None:
    with pytest.raises(IllegalSubnetError, match="is no member's name: expected the form residual"):
        SPACE.parse(name)
    with pytest.raises(SupernetError, match="members must be ascending names of letters"):
        ZooSpace((("a", name),) if name > "a" else ((name, "a"),))


def test_a_member_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(IllegalSubnetError, match="'mobile' is no member: there are branched, fused, inver"):
        SPACE.check(SPACE.parse("mobile"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "members must be an object with 1 to 32 networks"),
        ([], "members must be an object"),
        ({"a": {"architecture": "resnet152"}}, "members.a.architecture must be one of branched, inverted, residual"),
        ({"a": 3}, "members.a.architecture must be one of"),
        ({"a": {**MEMBERS["branched"], "widths": (16, 30)}}, "members.a: widths must be multiples of 4"),
        ({"a": {**MEMBERS["branched"], "stem": 0}}, "members.a: stem must be 1 whole numbers from 1 to 8192"),
        ({"a": {**MEMBERS["inverted"], "depths": (1,)}}, "members.a: 2 widths, 1 depths and 2 strides of stages"),
        ({"a": {**MEMBERS["inverted"], "strides": (3, 1)}}, "members.a: strides must be"),
        ({"a": {**MEMBERS["residual"], "speed": 1}}, "members.a: .*unexpected keyword argument 'speed'"),
        ({"a": {**MEMBERS["residual"], "classes": 1}}, "members.a: .*multiple values for keyword argument 'classes'"),
    ],
)
def test_an_impossible_zoo_is_refused(members: Any, message: str) -> None:
    with pytest.raises(SupernetError, match=message):
        zoo(members)


def test_a_space_with_other_members_than_the_network_is_refused() -> None:
    with pytest.raises(SupernetError, match="is no member"):
        zoo(space=ZooSpace((("another", "branched"),)))


def test_a_plain_zoo_computes_its_last_member() -> None:
    network = Zoo(3, 4, MEMBERS).eval()
    x = torch.randn(2, 3, 16, 16)
    assert isinstance(network.members, nn.ModuleList)
    with torch.inference_mode():
        assert torch.equal(network(x), network.members[-1](x))


# ------------------------------------------------------------------------------------------------------- foreign files


def imported_zoo(folder: Path, /, **spec: Any) -> Servable:
    """One member of ours, one of a file."""
    members = {"ours": MEMBERS["residual"], "theirs": {"architecture": "torchscript", "file": "theirs.pt", **spec}}
    torch.manual_seed(0)
    servable = create_servable(
        name="zoo", family="zoo", architecture={"channels": 3, "classes": 4, "members": members},
        space=ZooSpace((("ours", "theirs"),)), input=INPUT, classes=["a", "b", "c", "d"], folder=folder,
    )  # fmt: skip
    servable.supernet.network.eval()
    return servable


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Servable:
    folder = tmp_path_factory.mktemp("theirs")
    write_torchscript(folder / "theirs.pt", foreign())
    servable = imported_zoo(folder)
    servable.supernet.calibrate(Member(("ours",)), [torch.randn(64, 3, 16, 16)])
    return servable


@torch.inference_mode()
def test_a_member_of_a_file_computes_what_its_network_computes(imported: Servable) -> None:
    supernet, theirs = imported.supernet, Member(("theirs",))
    for x in (torch.randn(1, 3, 16, 16), torch.randn(5, 3, 16, 16).to(memory_format=torch.channels_last)):
        expected = foreign()(x)
        torch.testing.assert_close(supernet.actuate(theirs)(x), expected)
        torch.testing.assert_close(supernet.extract(theirs)(x), expected)
        assert supernet.actuate(Member(("ours",)))(x).shape == expected.shape


@pytest.mark.slow
def test_it_is_counted_and_moved_like_others_and_needs_no_statistics(imported: Servable) -> None:
    supernet, theirs = imported.supernet, Member(("theirs",))
    alone = supernet.extract(theirs)
    network = foreign()
    folded = sum(each.numel() for each in network.parameters()) - 8 - 1  # of the norm, a bias is left; no scalars
    assert count_parameters(alone) == folded
    assert supernet.nbytes == 4 * (folded + count_parameters(supernet.extract(Member(("ours",)))))
    assert count_macs(alone, (3, 16, 16)) == count_macs(network, (3, 16, 16)) > 0
    assert supernet.actuate(theirs).calibrated
    assert supernet.is_calibrated(Member(("ours",)))
    supernet.calibrate(theirs, [])
    assert set(supernet.statistics) == {Member(("ours",))}
    supernet.to(torch.device("cpu"))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(supernet.actuate(theirs)(x), network(x))


def test_members_that_were_not_calibrated_still_say_so(tmp_path: Path) -> None:
    write_torchscript(tmp_path / "theirs.pt", foreign())
    supernet = imported_zoo(tmp_path).supernet
    assert not supernet.actuate(Member(("ours",))).calibrated
    assert supernet.actuate(Member(("theirs",))).calibrated


def test_it_runs_in_two_threads_and_beside_others(imported: Servable) -> None:
    supernet, x = imported.supernet, torch.randn(4, 3, 16, 16)
    both = [Member(("ours",)), Member(("theirs",))]
    with torch.inference_mode():
        assert worst_in_two_threads(supernet, both, (x,), rounds=20) == 0
        assert worst_in_two_threads(supernet, [both[1]] * 2, (x,), rounds=20) == 0


@pytest.mark.slow
async def test_the_engine_runs_it_as_it_is(imported: Servable) -> None:
    engine = Engine(imported, "cpu")
    await engine.prepare(["ours", "theirs"])
    rows = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(3)]
    outputs = await engine.run("theirs", rows)
    engine.close()
    x = (torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.from_numpy(outputs.probabilities), foreign()(x).softmax(1), atol=1e-5, rtol=1e-5)
    with pytest.raises(CannotFuseError):
        trace(imported.supernet.actuate(Member(("theirs",))))


@pytest.mark.slow
def test_its_file_goes_with_the_servable_wherever_it_is_saved(imported: Servable, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_servable(imported, first)
    save_servable(load_servable(first), second)
    save_servable(load_servable(second), second)  # onto itself
    assert (first / "theirs.pt").read_bytes() == (second / "theirs.pt").read_bytes()
    x = torch.randn(2, 3, 16, 16)
    for member in imported.supernet.space:
        expected = imported.supernet.actuate(member)(x)
        torch.testing.assert_close(load_servable(second).supernet.actuate(member)(x), expected, atol=0.05, rtol=0.05)
    with np.load(second / "weights.npz") as weights:
        assert not [name for name in weights.files if name.startswith("members.1.")]


def test_probabilities_come_out_as_they_went_in(tmp_path: Path) -> None:
    network = nn.Sequential(foreign(), nn.Softmax(1)).eval()
    write_torchscript(tmp_path / "theirs.pt", network)
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        actuated = imported_zoo(tmp_path, outputs="probabilities").supernet.actuate(Member(("theirs",)))
        torch.testing.assert_close(actuated(x).softmax(1), network(x))


class Fixed(nn.Module):
    """A network whose batch size is a number in its code; ``shape`` is that of its output."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.ones(48, 4)), shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 4).reshape(*self.shape, 48) if self.shape else x.flatten(1)
        return pooled @ self.weight


class Restless(nn.Module):
    """Computes something else every time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = foreign()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        return logits + torch.rand_like(logits)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = foreign().double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x.double())
        return logits


class Infinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = foreign()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        return logits / 0


@pytest.mark.parametrize(
    ("network", "spec", "message"),
    [
        (Fixed(1), {}, r"of a batch of 2 inputs \(3, 16, 16\) it computes nothing: .*; its batch size is fixed"),
        (Fixed(), {}, "of a batch of 1 inputs .* it computes nothing: .*; is its batch size fixed, or does it take"),
        (Fixed(1, 1), {}, r"of a batch of 1 inputs .* it computes \(1, 1, 4\), expected \(1, 4\)"),
        (foreign(classes=5), {}, r"of a batch of 1 inputs .* it computes \(1, 5\), expected \(1, 4\)"),
        (Doubled(), {}, "it computes torch.float64 that is not finite float32 numbers"),
        (Infinite(), {}, "it computes torch.float32 that is not finite float32 numbers"),
        (Restless(), {}, "computes something else of an input .* every time"),
        (foreign().train(), {}, "changes its own attributes when it runs: was it saved in training mode"),
        (foreign(), {"outputs": "probabilities"}, "it computes no probabilities, which add up to 1"),
        (foreign(), {"outputs": "scores"}, "outputs must be logits or probabilities, not 'scores'"),
        (foreign(), {"sha256": "0" * 64}, "theirs.pt: is not the file that was imported: another sha256"),
        (foreign(), {"folder": "/"}, "multiple values for keyword argument 'folder'"),
        (foreign(), {"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
    ids=[
        "batch of one", "other inputs", "other shape", "other classes", "double", "infinite", "restless", "training",
        "no probabilities", "unknown outputs", "another file", "folder", "unknown field",
    ],
)
def test_a_network_that_cannot_be_served_is_refused(
    network: nn.Module, spec: Any, message: str, tmp_path: Path
) -> None:
    shape = (1, 3, 4, 4) if isinstance(network, Fixed) and not network.shape else (1, 3, 16, 16)
    write_torchscript(tmp_path / "theirs.pt", network, shape)
    with pytest.raises(SupernetError, match=message) as caught:
        imported_zoo(tmp_path, **spec)
    assert "members.theirs: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "../theirs.pt", "/etc/theirs.pt", "a/theirs.pt", "theirs", "weights.npz", ".pt", "a.pt\n", 3]
)
def test_a_file_is_named_plainly(name: Any, tmp_path: Path) -> None:
    with pytest.raises(SupernetError, match=r"members\.theirs: file must be the name of a \.pt file beside"):
        imported_zoo(tmp_path, file=name)


def test_a_file_must_be_one_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", write_torchscript(tmp_path / "outside.pt", foreign())
    inside.mkdir()
    path = inside / "theirs.pt"

    def refused(message: str) -> None:
        with pytest.raises(SupernetError, match=rf"members\.theirs: theirs\.pt: {message}"):
            imported_zoo(inside)

    refused("is not in ")
    path.symlink_to(outside)
    refused("is a link that leads out of its folder")
    path.unlink()
    path.mkdir()
    refused("is not a file")
    path.rmdir()
    os.mkfifo(path)
    refused("is not a file")
    path.unlink()
    path.write_bytes(outside.read_bytes())
    monkeypatch.setattr(supernets.imported, "LARGEST_FILE", 1000)
    refused("is larger than 1,000 bytes")


def test_without_a_folder_nothing_is_read() -> None:
    with pytest.raises(SupernetError, match=r"theirs\.pt was not read: no folder is known"):
        imported_zoo(None)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- hostile files


class Writer(nn.Module):
    """Writes a file when it runs, or when it is read."""

    def __init__(self, path: str, when_read: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(768, 4))
        self.path, self.when_read = path, when_read

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool, bool]:
        return self.weight, self.path, self.when_read, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool, bool]) -> None:
        self.weight, self.path, self.when_read, self.training = state
        if self.when_read:
            torch.save(self.weight, self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.when_read:
            torch.save(x, self.path)
        return x.flatten(1) @ self.weight


class Mapper(nn.Module):
    """Reads a file of the machine when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(768, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight + torch.from_file("/etc/passwd", False, 4)


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = foreign()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.jit.wait(torch.jit.fork(self.network, x))


def test_what_would_run_while_it_is_read_is_refused_before(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    write_scripted(tmp_path / "theirs.pt", Writer(str(victim), when_read=True))
    with pytest.raises(SupernetError, match=r"has a method __setstate__, which would run when it is read; refused"):
        imported_zoo(tmp_path)
    assert not victim.exists()
    with deprecation_known():
        torch.jit.load(tmp_path / "theirs.pt")
    assert victim.exists(), "the check checks nothing"


@pytest.mark.parametrize("case", [str.upper, str.title])
def test_such_code_is_found_under_any_name_that_the_reader_finds(case: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = write_scripted(tmp_path / "theirs.pt", Writer(str(victim), when_read=True))
    path.write_bytes(path.read_bytes().replace(b"/code/", f"/{case('code')}/".encode()))
    with pytest.raises(SupernetError, match="refused"):
        imported_zoo(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("network", "operation"),
    [(Mapper(), "aten::from_file"), (Forked(), "(prim::fork|aten::wait)")],
    ids=["reads", "forks"],
)
def test_operations_beyond_computing_are_refused(network: nn.Module, operation: str, tmp_path: Path) -> None:
    write_scripted(tmp_path / "theirs.pt", network)
    with pytest.raises(SupernetError, match=rf"theirs\.pt: has the operation {operation}, which is not supported"):
        imported_zoo(tmp_path)


def test_a_network_that_writes_files_is_refused_and_writes_none(tmp_path: Path) -> None:
    class Saves(Mapper):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "victim")
            return x.flatten(1) @ self.weight

    write_scripted(tmp_path / "theirs.pt", Saves())
    with pytest.raises(SupernetError, match="has the operation aten::save, which is not supported"):
        imported_zoo(tmp_path)
    assert not Path("victim").exists()


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(victim),)

    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save(Payload(), tmp_path / "theirs.pt")
        with pytest.raises(SupernetError, match=r"theirs\.pt: is no TorchScript file, .*; pickle files are not read"):
            imported_zoo(tmp_path)
    # And in the archive of a network: torch reads it by the few names that its own reader knows.
    path = write_torchscript(tmp_path / "theirs.pt", foreign())
    rewrite(path, lambda name, content: pickle.dumps(Payload(), 2) if name.endswith("/data.pkl") else content)
    with pytest.raises(SupernetError, match=r"holds a posix\.mkdir, which restores itself when it is read; refused"):
        imported_zoo(tmp_path)
    assert not victim.exists()


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_torchscript(tmp_path / "theirs.pt", foreign())
    rewrite(path, lambda name, content: content, {"extra/zeros": bytes(10**6)}, packed=True)
    monkeypatch.setattr(supernets.imported, "LARGEST_FILE", 10**5)
    assert path.stat().st_size < 10**5
    with pytest.raises(SupernetError, match=r"theirs\.pt: unpacks to more than 100,000 bytes"):
        imported_zoo(tmp_path)


def test_a_choice_of_a_file_needs_no_statistics_to_be_served(tmp_path: Path) -> None:
    write_torchscript(tmp_path / "theirs.pt", foreign())
    servable = imported_zoo(tmp_path)
    check_statistics(tmp_path, [choice("theirs", 0.5)], servable)
    with pytest.raises(ProfileError, match=r"choices\.json: ours has no statistics in norms\.npz"):
        check_statistics(tmp_path, [choice("theirs", 0.5), choice("ours", 0.6)], servable)


def test_objects_of_classes_in_c_are_refused(tmp_path: Path) -> None:
    path = write_torchscript(tmp_path / "theirs.pt", foreign())
    made = b"c__torch__.torch.classes.quantized\nConv2dPackedParamsBase\n)\x81."
    for data in (b"\x80\x02" + made, b"\x80\x02" + made.replace(b".classes.quantized\n", b"\nclasses.quantized.")):
        rewrite(path, lambda name, content, data=data: data if name.endswith("/data.pkl") else content)
        with pytest.raises(SupernetError, match="which restores itself when it is read; refused"):
            imported_zoo(tmp_path)


@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write_torchscript(tmp_path / "theirs.pt", foreign())
    whole = path.read_bytes()
    rng, messages = random.Random(0), []
    for number in range(60):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if number % 2 else whole)
        for _ in range(rng.randrange(1, 8)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        messages += refusal(tmp_path)
    assert len(messages) > 30, "a bit of a weight may do no harm"
    assert all("theirs.pt: " in message and "\n" not in message for message in messages)


def refusal(folder: Path) -> list[str]:
    try:
        imported_zoo(folder)
    except SupernetError as error:
        return [str(error)]
    return []
