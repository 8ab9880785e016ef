"""A zoo: separate networks in one servable, each a choice like a subnet."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_supernet import worst_in_two_threads
from torch import nn

from executables import Executable, trace
from servable import InputSpec, Servable, create_servable, load_servable, save_servable
from subnets import IllegalSubnetError, SupernetError
from supernet import count_parameters
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
