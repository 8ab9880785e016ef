"""How members of an ensemble are named: a subnet, or a subnet that sees the image mirrored. Names are all this knows.

A network that sees an image both ways errs differently each time, so that a subnet and itself, mirrored, are more
accurate together than it is alone, with the weights of one (test-time augmentation: Krizhevsky et al., "ImageNet
Classification with Deep Convolutional Neural Networks", NeurIPS 2012, section 4.1).
"""

from __future__ import annotations

MIRRORED = ":mirrored"


def mirrored(subnet: str) -> str:
    """The member that is this subnet and sees images mirrored."""
    return subnet + MIRRORED


def subnet_of(member: str) -> str:
    """The subnet that a member is, whichever way it sees the image."""
    return member.removesuffix(MIRRORED)


def is_mirrored(member: str) -> bool:
    """Whether a member sees images mirrored."""
    return member.endswith(MIRRORED)
