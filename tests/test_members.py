"""A member is a subnet, or a subnet that sees the image mirrored, and its name tells which."""

from __future__ import annotations

from members import is_mirrored, mirrored, subnet_of


def test_a_member_s_name_tells_its_subnet_and_how_it_sees_the_image() -> None:
    name = "d2-2-1-e0.5"
    assert (subnet_of(name), is_mirrored(name)) == (name, False)
    assert (subnet_of(mirrored(name)), is_mirrored(mirrored(name))) == (name, True)
