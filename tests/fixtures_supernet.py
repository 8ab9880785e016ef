"""Small supernets with random weights, and the digits supernet that the suite trains once; import what you need."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts import datasets, train
from servable import InputSpec, Servable, create_servable
from supernet import Subnet, SubnetSpace, Supernet

torch.set_num_threads(1)  # tensors this small are slower on several threads

STAGES = ("stages.0", "stages.1", "stages.2")
SPACE = SubnetSpace(((1, 2), (1, 2), (1, 2)), ((0.25, 0.5, 1.0),) * 3)
CLASSES = ("ant", "bee", "cat", "dog", "eel")
INPUT = InputSpec(height=8, width=8, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm weights and statistics too, so that a value taken from the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    value = getattr(module, name)
                    value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if name != "bias" else -0.5))
    return network


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random normalised inputs."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_servable(
    calibrated: tuple[Subnet, ...] = (SPACE.smallest, SPACE.largest),
    widths: tuple[int, int, int] = (8, 8, 16),
    side: int = 8,
) -> Servable:
    """A supernet of 216 subnets for images of 8x8, the ends of its space calibrated; nothing was trained."""
    torch.manual_seed(0)
    servable = create_servable(
        name="tiny",
        family="resnet",
        architecture={"channels": 3, "widths": widths, "depths": (2, 2, 2), "classes": 5, "stem_stride": 1},
        space=SPACE,
        input=replace(INPUT, height=side, width=side),
        classes=CLASSES,
    )
    for subnet in calibrated:
        servable.supernet.calibrate(subnet, [images(4, seed=7)])
    servable.supernet.network.requires_grad_(False).eval()
    return servable


@functools.cache
def trained_digits(base: Path) -> Path:
    """A folder below ``base`` with a digits supernet that train.py trained in seconds; do not change it."""
    folder = base / "trained" / "digits"
    train.main(["--data", "digits", "--out", str(folder), "--epochs", "6", "--threads", "1"])
    return folder


def noise(images: int = 128, name: str = "digits", side: int = 8, channels: int = 1) -> datasets.Dataset:
    """Noise in the form of a data set, for tests of how things go rather than how well."""
    rng = np.random.default_rng(0)
    split = datasets.Split(rng.integers(0, 256, (images, side, side, channels), np.uint8), np.arange(images) % 10)
    return datasets.Dataset(name, split, split, split, tuple("0123456789"), mirrored=False)


@functools.cache
def digits() -> datasets.Dataset:
    """Scikit-learn's handwritten digits."""
    return datasets.load("digits")


def differs(first: Tensor, second: Tensor) -> float:
    """By how much they differ at most."""
    return float((first - second).detach().abs().max())


def worst_in_two_threads(
    supernet: Supernet, chosen: Sequence[Subnet], inputs: tuple[Tensor, ...], rounds: int
) -> float:
    """By how much actuated subnets differ from extracted ones, while two threads run every second one of them each."""
    torch.set_num_threads(1)  # as in both threads; scripts that ran before may have set another number
    alone = {subnet: supernet.extract(subnet)(*inputs) for subnet in chosen}
    start, worst = threading.Barrier(2), [0.0, 0.0]

    def run(thread: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        for subnet in itertools.islice(itertools.cycle(chosen[thread::2]), rounds):
            worst[thread] = max(worst[thread], differs(supernet.actuate(subnet)(*inputs), alone[subnet]))

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return max(worst)
