"""From the inputs of queries to what a network takes of a batch: images normalised, texts padded to one length.

``batching_for`` gives what a servable's inputs need. The engine runs batches by it and knows no kind of input itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cudagraphs import Network
from servable import InputSpec, TokenSpec

# Texts of a batch are padded to the least of these and their doubles that holds the longest: a new length is a new
# shape, for which kernels are chosen and memory is laid out anew, and more padding is more to compute.
SHORTEST = 16


class Batching(Protocol):
    """How inputs become a batch, one kind of input each."""

    @property
    def pixels_only(self) -> bool:
        """Whether a batch of its blank input is all that a CUDA graph need be captured for."""

    def stack(self, inputs: Sequence[NDArray[Any]]) -> list[tuple[list[int], NDArray[Any]]]:
        """Inputs of one form each as one array, with their positions in the batch."""

    def to_network(self, stacked: Tensor) -> Tensor:
        """Of a stack on the device, one tensor that can be cut along its first dimension."""

    def logits(self, network: Network, batch: Tensor) -> Tensor:
        """What the network makes of such a tensor."""

    def blanks(self) -> list[NDArray[Any]]:
        """An input of each shape that batches can have, the one that takes longest last."""

    def example(self, rng: np.random.Generator) -> NDArray[Any]:
        """A random input that takes as long as any."""


class Normaliser:
    """Images: uint8 pixels (H, W, C) or normalised float32 (C, H, W)."""

    pixels_only = True

    def __init__(self, spec: InputSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """``dtype``: what the network computes with; pixels are normalised in float32."""
        self._dtype = dtype
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device)
        self._shift = (-mean / std).view(1, -1, 1, 1).to(device)
        self._shape = spec.height, spec.width, spec.channels

    def pixels(self, stacked: Tensor) -> Tensor:
        """Network inputs (N, C, H, W), channels last in memory, of uint8 pixels (N, H, W, C) on the device."""
        return torch.addcmul(self._shift, stacked.permute(0, 3, 1, 2).float(), self._scale).to(self._dtype)

    @staticmethod
    def stack(inputs: Sequence[NDArray[Any]]) -> list[tuple[list[int], NDArray[Any]]]:
        """Inputs of one form each, stacked, with their positions in the batch; one group unless forms are mixed."""
        kinds = {row.dtype for row in inputs}
        groups = ([i for i, row in enumerate(inputs) if row.dtype == kind] for kind in sorted(kinds, key=str))
        return [(positions, np.stack([inputs[i] for i in positions])) for positions in groups]

    def to_network(self, stacked: Tensor) -> Tensor:
        """Normalised images (N, C, H, W)."""
        return self.pixels(stacked) if stacked.dtype == torch.uint8 else stacked.to(self._dtype)

    def logits(self, network: Network, batch: Tensor) -> Tensor:
        """Of images."""
        return network(batch)

    def blanks(self) -> list[NDArray[Any]]:
        """A black image."""
        return [np.zeros(self._shape, np.uint8)]

    def example(self, rng: np.random.Generator) -> NDArray[Any]:
        """Noise."""
        return rng.integers(0, 256, self._shape, np.uint8)


class Padder:
    """Texts: int32 (2, L), token ids and attention mask, L from 1 to the greatest length.

    What is added at the end has the mask 0, so that it changes no answer beyond rounding.
    """

    pixels_only = False

    def __init__(self, spec: TokenSpec) -> None:
        self._spec = spec

    def padded_length(self, tokens: int) -> int:
        """To how many tokens a batch is padded, the longest text of which has so many."""
        length = SHORTEST
        while length < tokens:
            length *= 2
        return min(length, self._spec.length)

    def stack(self, inputs: Sequence[NDArray[Any]]) -> list[tuple[list[int], NDArray[Any]]]:
        """All of them, as int32 (N, 2, padded length)."""
        length = self.padded_length(max(each.shape[1] for each in inputs))
        stacked = np.zeros((len(inputs), 2, length), np.int32)
        for row, each in zip(stacked, inputs, strict=True):
            row[:, : each.shape[1]] = each
        return [(list(range(len(inputs))), stacked)]

    def to_network(self, stacked: Tensor) -> Tensor:
        """As int64, which embeddings of any network take."""
        return stacked.long()

    def logits(self, network: Network, batch: Tensor) -> Tensor:
        """Of ids and masks, which the network takes one after the other."""
        return network(*batch.unbind(1))

    def blanks(self) -> list[NDArray[Any]]:
        """The first token over and over, of each padded length."""
        lengths: list[int] = []
        tokens = 1
        while not lengths or lengths[-1] < self._spec.length:
            lengths.append(self.padded_length(tokens))
            tokens = lengths[-1] + 1
        return [np.repeat(np.array([[0], [1]], np.int32), length, axis=1) for length in lengths]

    def example(self, rng: np.random.Generator) -> NDArray[Any]:
        """Random tokens, of the greatest length."""
        ids = rng.integers(0, self._spec.vocabulary, self._spec.length, np.int32)
        return np.stack([ids, np.ones_like(ids)])


def batching_for(spec: InputSpec | TokenSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> Batching:
    """What these inputs need."""
    return Padder(spec) if isinstance(spec, TokenSpec) else Normaliser(spec, device, dtype)
