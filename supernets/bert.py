"""A BERT sequence classifier, elastic as in DynaBERT (Hou et al., NeurIPS 2020): width by heads and neurons, and depth.

``Bert`` is the plain network of the largest size, with the names of Hugging Face's and DynaBERT's checkpoints.
``elastic`` says which part of it a subnet uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators import Elastic, Sizes
from subnets import Space, SubnetValue, axis, is_number

EPS = 1e-12


@dataclass(frozen=True, slots=True)
class BertSubnet(SubnetValue):
    """A subnet: the fraction of heads and feed-forward neurons, and the fraction of layers; one number each."""

    FORM: ClassVar[str] = "w0.5-d0.75"
    width: tuple[float, ...] = axis(
        "w", "width", "fractions above 0, up to 1", lambda value: is_number(value, 1e-4, 1),
        place="", count=lambda depths: 1,
    )  # fmt: skip
    depth: tuple[float, ...] = axis(
        "d", "depth", "fractions above 0, up to 1", lambda value: is_number(value, 1e-4, 1),
        place="", count=lambda depths: 1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BertSpace(Space):
    """The legal widths and depths."""

    KIND: ClassVar[type[Any]] = BertSubnet
    width: tuple[tuple[float, ...], ...]
    depth: tuple[tuple[float, ...], ...]


def official_space(
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), depths: Sequence[float] = (0.5, 0.75, 1.0)
) -> BertSpace:
    """DynaBERT's grid."""
    return BertSpace((tuple(widths),), (tuple(depths),))


class Embeddings(nn.Module):
    """Of words, positions and token types, added and normalised."""

    def __init__(self, vocabulary: int, positions: int, types: int, hidden: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, hidden)
        self.position_embeddings = nn.Embedding(positions, hidden)
        self.token_type_embeddings = nn.Embedding(types, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, EPS)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:  # noqa: D102
        positions = self.position_embeddings.weight[: ids.shape[1]]
        x: Tensor = self.LayerNorm(self.word_embeddings(ids) + positions + self.token_type_embeddings(types))
        return x


class SelfAttention(nn.Module):
    """Attention of as many heads as its linear layers have outputs for."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.head_size = hidden // heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        query, key, value = (
            layer(x).unflatten(2, (-1, self.head_size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(query, key, value, mask)
        return context.transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """A linear layer whose output is added to what came before, and the sum normalised."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, EPS)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.LayerNorm(self.dense(x) + before)
        return y


class Attention(nn.Module):
    """Self-attention with its output layer, which is called ``output``."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(hidden, heads)
        self.output = AddAndNorm(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.output(self.self(x, mask), x)
        return y


class Layer(nn.Module):
    """Attention, then two linear layers with GELU between them."""

    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.intermediate = nn.Sequential(OrderedDict(dense=nn.Linear(hidden, intermediate), gelu=nn.GELU()))
        self.output = AddAndNorm(intermediate, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        attended = self.attention(x, mask)
        y: Tensor = self.output(self.intermediate(attended), attended)
        return y


class Layers(nn.Sequential):
    """Layers that all read the attention mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
        for layer in self:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """Embeddings, post-norm transformer layers, pooler of the first token, classifier.

    Input token ids (N, L), attention mask (N, L; 1 for tokens, 0 for padding; all ones unless given) and token types
    (N, L; zeros unless given); output logits (N, classes). Positions are counted over the whole padded row.
    """

    def __init__(
        self,
        classes: int = 2,
        vocabulary: int = 30522,
        hidden: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate: int = 3072,
        positions: int = 512,
        types: int = 2,
    ) -> None:
        super().__init__()
        sizes = {"classes": classes, "vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads}
        for name, value in (sizes | {"intermediate": intermediate, "positions": positions, "types": types}).items():
            if type(value) is not int or not 1 <= value <= 1_000_000:
                raise ValueError(f"{name} must be a whole number from 1 to 1000000, not {value!r:.40}")
        if hidden % heads or layers > 1000:
            raise ValueError(f"heads must divide hidden, and layers be at most 1000, not {heads}, {hidden}, {layers}")
        self.hidden, self.heads, self.intermediate, self.layers = hidden, heads, intermediate, layers
        stack = Layers(*(Layer(hidden, heads, intermediate) for _ in range(layers)))
        self.bert = nn.ModuleDict(
            {
                "embeddings": Embeddings(vocabulary, positions, types, hidden),
                "encoder": nn.ModuleDict({"layer": stack}),
                "pooler": nn.Sequential(OrderedDict(dense=nn.Linear(hidden, hidden), tanh=nn.Tanh())),
            }
        )
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:  # noqa: D102
        mask = torch.ones_like(ids) if mask is None else mask
        x = self.bert["embeddings"](ids, torch.zeros_like(ids) if types is None else types)
        # Added to the scores of keys; large rather than infinite, so that rows of padding alone stay finite.
        added = (1.0 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        x = self.bert["encoder"]["layer"](x, added)  # type: ignore[index]
        logits: Tensor = self.classifier(self.bert["pooler"](x[:, 0]))
        return logits


def own_name(name: str, known: Collection[str]) -> str:
    """The name, among the ``known`` ones, of the weight that a checkpoint calls ``name``; as it is where none fits.

    Old checkpoints have gamma and beta for weight and bias, and those of a bare encoder lack the prefix ``bert.``
    """
    for candidate in (name, name.replace("gamma", "weight").replace("beta", "bias")):
        for full in (candidate, f"bert.{candidate}"):
            if full in known:
                return full
    return name


def elastic(network: Bert) -> Elastic:
    """Which part of the network a subnet uses."""
    slices: dict[str, Sizes] = {}
    attended, inner = partial(_attended, network), partial(_inner, network)
    for number in range(network.layers):
        where = f"bert.encoder.layer.{number}"
        slices |= {f"{where}.attention.self.{part}": Sizes(outputs=attended) for part in ("query", "key", "value")}
        slices |= {
            f"{where}.attention.output.dense": Sizes(inputs=attended),
            f"{where}.intermediate.dense": Sizes(outputs=inner),
            f"{where}.output.dense": Sizes(inputs=inner),
        }
    return Elastic({"bert.encoder.layer": partial(_layers, network)}, slices, {})


def _heads(network: Bert, subnet: BertSubnet) -> int:
    return round(network.heads * subnet.width[0])  # ties to even, as DynaBERT's


def _attended(network: Bert, subnet: BertSubnet) -> int:
    return _heads(network, subnet) * (network.hidden // network.heads)


def _inner(network: Bert, subnet: BertSubnet) -> int:
    """Neurons follow the rounded number of heads."""
    return max(1, int(_heads(network, subnet) / network.heads * network.intermediate))


def _layers(network: Bert, subnet: BertSubnet) -> Sequence[int]:
    """Every other one, or as many as the depth leaves of each few."""
    return [int(number / subnet.depth[0]) for number in range(round(subnet.depth[0] * network.layers))]
