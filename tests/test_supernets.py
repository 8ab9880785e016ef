"""Architecture families build plain networks, and refuse architectures that cannot be."""

from __future__ import annotations

from typing import Any

import fixtures_supernet  # noqa: F401  (one thread)
import pytest
import torch
from torch import nn

import supernets
from supernets.resnet import STAGES, BasicBlock

ARCHITECTURE = {"channels": 3, "widths": (4, 8, 8), "depths": (1, 2, 1), "classes": 7}


def test_families_build_plain_networks_whose_stages_are_where_they_say() -> None:
    network, stages = supernets.build("resnet", ARCHITECTURE)
    assert [len(network.get_submodule(stage)) for stage in stages] == [1, 2, 1]
    assert {type(module).__module__.split(".")[0] for module in network.modules()} == {"torch", "supernets"}


@pytest.mark.parametrize(
    ("form", "sides"),
    [({"stem_stride": 1}, [8, 4, 2]), ({"stem_stride": 2}, [4, 2, 1]), ({"stem_stride": 1, "pooled": True}, [4, 2, 1])],
)
def test_later_stages_halve_the_resolution(form: dict[str, Any], sides: list[int]) -> None:
    network, _ = supernets.build("resnet", ARCHITECTURE | form)
    seen: list[int] = []
    for stage in STAGES:
        network.get_submodule(stage).register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
    assert network.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert seen == sides


def test_a_pooled_block_convolves_at_full_resolution_first() -> None:
    block = BasicBlock(4, 4, 8, 2, pooled=True)
    assert block.conv1(torch.randn(2, 4, 8, 8)).shape[-1] == 8
    assert block(torch.randn(2, 4, 8, 8)).shape == (2, 8, 4, 4)


def test_the_stem_may_be_narrower_than_the_first_stage() -> None:
    network, _ = supernets.build("resnet", ARCHITECTURE | {"stem_width": 2, "stem_stride": 1})
    assert network.get_submodule("stem.0").weight.shape[0] == 2
    assert network.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_a_block_changes_its_shortcut_only_where_shapes_change() -> None:
    assert isinstance(BasicBlock(4, 4, 4, 1).shortcut, nn.Identity)
    for block in (BasicBlock(4, 4, 8, 1), BasicBlock(4, 4, 4, 2), BasicBlock(4, 2, 8, 2)):
        x = torch.randn(2, 4, 8, 8)
        assert block(x).shape == block.shortcut(x).shape


def test_unknown_family_lists_known_ones() -> None:
    known = "bert, ofa_mobilenet, ofa_resnet, resnet, timm, zoo"
    with pytest.raises(ValueError, match=f"^unknown family 'vgg'; known: {known}$"):
        supernets.build("vgg", {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"widths": 3}, "widths"),
        ({"widths": "abc"}, "widths"),
        ({"widths": (4, -8, 8)}, "widths"),
        ({"widths": (4, 8.0, 8)}, "widths"),
        ({"widths": (4, 8, 10**9)}, "widths"),
        ({"widths": (4, 8)}, "2 widths and 3 depths for 3 stages"),
        ({"depths": (1, 2, 0)}, "depths"),
        ({"depths": (1, 2, 10**12)}, "depths"),
        ({"classes": None}, "classes"),
        ({"classes": 0}, "classes"),
        ({"channels": True}, "channels"),
        ({"stem_stride": 3}, "stem_stride"),
        ({"stem_width": -1}, "stem_width"),
        ({"pooled": 1}, "pooled"),
        ({"wings": 2}, "wings"),
    ],
)
def test_impossible_architectures_are_refused_naming_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"architecture does not fit family 'resnet': .*{named}"):
        supernets.build("resnet", ARCHITECTURE | change)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'classes'"):
        supernets.build("resnet", {"channels": 3, "widths": (4, 4, 4), "depths": (1, 1, 1)})
