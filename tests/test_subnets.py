"""Spaces whose subnets are chosen block by block: names, sizes, drawing and changing."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from fixtures_families import BERT, MOBILENET, RESNET, TINY, Tiny
from hypothesis import given
from hypothesis import strategies as st

from subnets import IllegalSubnetError, Space, SupernetError
from supernets import ofa_mobilenet, ofa_resnet
from supernets.bert import BertSpace, BertSubnet
from supernets.ofa_mobilenet import OfaMobileNetSpace, OfaMobileNetSubnet
from supernets.ofa_resnet import OfaResNetSpace, OfaResNetSubnet

tiny_spaces = st.sampled_from([each.space for each in TINY.values()])


def test_subnets_import_no_torch() -> None:
    code = "import subnets, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(tiny_spaces, st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_samples_and_mutations_are_legal_and_named_once(space: Space, seed: int, probability: float) -> None:
    rng = random.Random(seed)
    sample = space.sample(rng)
    mutated = space.mutate(sample, rng, probability)
    for subnet in (sample, mutated):
        space.check(subnet)
        assert space.parse(subnet.name) == subnet
    assert probability or mutated == sample


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [RESNET, BERT], ids=["ofa_resnet", "bert"])
def test_a_space_holds_every_combination_once(tiny: Tiny) -> None:
    everything = list(tiny.space)
    assert len(everything) == len(tiny.space) == len(set(everything)) == len({subnet.name for subnet in everything})
    assert {tiny.space.largest, tiny.space.smallest} <= set(everything)


def test_official_spaces_are_too_large_to_count_on_len() -> None:
    space = ofa_mobilenet.official_space()
    assert space.size == (9**2 + 9**3 + 9**4) ** 5
    with pytest.raises(OverflowError):
        len(space)
    assert ofa_resnet.official_space().size == 2 * 3**6 * (9 + 27 + 81) ** 3 * (81 + 243 + 729)


@pytest.mark.parametrize(
    ("subnet", "name"),
    [
        (RESNET.space.largest, "d2-2-1-1-e0.5-w1-s1"),
        (RESNET.space.smallest, "d1-1-1-1-e0.25-w0.5-s0"),
        (MOBILENET.space.largest, "d2-2-1-1-1-k7-e6"),
        (OfaMobileNetSubnet((1,) * 5, (3, 5, 7, 7, 7), (3, 3, 3, 3, 6)), "d1-1-1-1-1-k3-5-7-7-7-e3-3-3-3-6"),
        (BertSubnet((0.5,), (0.75,)), "w0.5-d0.75"),
    ],
)
def test_names_write_what_is_the_same_once(subnet: Any, name: str) -> None:
    assert subnet.name == name
    assert type(subnet).parse(name) == subnet


@pytest.mark.parametrize("text", ["", "d1-1-e1", "d1-1-1-1-e1-w1", "w0.5", "d2-1-e0.5-w1-s1\n", "d9999999-1-e1-w1-s1"])
def test_other_text_is_no_subnet_name(text: str) -> None:
    for kind in (OfaResNetSubnet, OfaMobileNetSubnet, BertSubnet):
        with pytest.raises(IllegalSubnetError, match="is no subnet name"):
            kind.parse(text)


def test_each_subnet_has_one_name() -> None:
    with pytest.raises(IllegalSubnetError, match=r"expected 'd1-1-1-1-e0\.5-w1-s1'"):
        OfaResNetSubnet.parse("d1-1-1-1-e0.5-0.5-0.5-0.5-w1-s1")


def test_what_a_block_gets_that_did_not_run_before_is_legal() -> None:
    rng = random.Random(0)
    for _ in range(50):
        RESNET.space.check(RESNET.space.mutate(RESNET.space.smallest, rng, 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OfaResNetSpace(((1,),), ((0.5,),), ((1.0,),)), "3 parts with depths but 1 with widths"),
        (lambda: OfaResNetSpace(((1, 2),), ((0.5,),), ((1.0,),) * 3), "2 blocks with depths but 1 with expand ratios"),
        (lambda: OfaResNetSpace(((1,),), ((2.0,),), ((1.0,),) * 3), "block 0: expand ratios must be ascending"),
        (lambda: OfaResNetSpace(((1,),), ((0.5,),), ((1.0,),) * 3, ((0, 2),)), "stem units must be ascending of 0"),
        (lambda: OfaMobileNetSpace(((1,),), ((4,),), ((6,),)), "block 0: kernel sizes must be ascending odd numbers"),
        (lambda: BertSpace(((0.5, 0.25),), ((1.0,),)), "widths must be ascending fractions above 0, up to 1"),
        (lambda: BertSpace(((0.5,), (1.0,)), ((1.0,),)), "2 lists with widths"),
    ],
)  # fmt: skip
def test_impossible_spaces_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SupernetError) as caught:
        make()
    assert message in str(caught.value)
