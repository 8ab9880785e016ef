"""Small networks of every family with random weights, and how to make supernets of them; import what you need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fixtures_supernet
import torch
from torch import Tensor, nn

import supernets
from supernet import Space, Supernet
from supernets import bert, ofa_mobilenet, ofa_resnet


@dataclass(frozen=True, slots=True)
class Tiny:
    """A family at a size that tests can afford."""

    family: str
    architecture: dict[str, Any]
    space: Space

    def network(self, seed: int = 0) -> nn.Module:
        """The plain network; random norms and kernel matrices too, so that a value from the wrong place shows."""
        torch.manual_seed(seed)
        network = fixtures_supernet.randomise(supernets.build(self.family, self.architecture)[0], seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("_matrix"):
                    parameter.add_(0.2 * torch.randn(parameter.shape))
            norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = 1.0
            inputs = self.inputs(8)
            network(*(each.float() if each.is_floating_point() else each for each in inputs))
            for norm in norms:  # with other statistics nothing of the input would be left at the end
                norm.momentum = 0.1
        return network

    def supernet(self, seed: int = 0) -> Supernet:
        """In double precision, for inference."""
        network = self.network(seed).double().requires_grad_(False).eval()
        return Supernet(network, supernets.build(self.family, self.architecture)[1], self.space)

    def inputs(self, count: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
        """What the network takes."""
        generator = torch.Generator().manual_seed(seed)
        if self.family == "bert":
            ids = torch.randint(0, 30, (count, 7), generator=generator)
            mask = (torch.arange(7) < torch.arange(7, 7 - count, -1).clamp_min(1)[:, None]).long()
            return ids, mask, ids % 2
        return (torch.randn(count, 3, 36, 36, generator=generator).double(),)


RESNET = Tiny(
    "ofa_resnet",
    {"classes": 5, "widths": (16, 32, 32, 64, 64), "depths": (2, 2, 1, 1), "expand": 0.5},
    ofa_resnet.OfaResNetSpace(
        ((1, 2), (1, 2), (1,), (1,)), ((0.25, 0.5),) * 6, ((0.5, 1.0),) * 6
    ),
)
MOBILENET = Tiny(
    "ofa_mobilenet",
    {"classes": 5, "channels": (8, 8, 8, 16, 16, 24, 24, 32, 40), "depths": (2, 2, 1, 1, 1)},
    ofa_mobilenet.OfaMobileNetSpace(
        ((1, 2), (1, 2), (1,), (1,), (1,)), ((3, 5, 7),) * 7, ((3, 6),) * 7
    ),
)
BERT = Tiny(
    "bert",
    {"classes": 3, "vocabulary": 30, "hidden": 16, "layers": 4, "heads": 4, "intermediate": 24, "positions": 8},
    bert.official_space(),
)
TINY = {each.family: each for each in (RESNET, MOBILENET, BERT)}
