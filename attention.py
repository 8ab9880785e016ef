"""Attention whose packed weights are split into layers for queries, keys and values, so that heads can be left out.

torch.nn.MultiheadAttention and the attention of timm's vision transformers keep the three in one weight, and their
number of heads in the module. What is put in their place computes the same, of as many heads as its layers have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnets import SupernetError


class SelfAttention(nn.Module):
    """Self-attention, called as timm calls its own: ``x`` (N, L, C), and a mask that is added to the scores."""

    def __init__(self, packed: nn.Linear, proj: nn.Linear, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = _thirds(packed)
        self.proj, self.num_heads, self.dropout = proj, heads, dropout
        self.head_size = self.query.out_features // heads
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj_drop: nn.Module = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: D102
        query, key, value = (
            layer(x).unflatten(2, (-1, self.head_size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(
            self.q_norm(query), self.k_norm(key), value, attn_mask, dropout, is_causal
        )
        y: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))
        return y


class EncoderAttention(SelfAttention):
    """Self-attention, called as torch's encoder layers call theirs."""

    # Encoder layers that find these do not take the fused path, which would read packed weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        weight = cast(Tensor, attention.in_proj_weight)
        packed = nn.Linear(weight.shape[1], weight.shape[0], attention.in_proj_bias is not None, device="meta")
        packed.weight, packed.bias = attention.in_proj_weight, attention.in_proj_bias
        super().__init__(packed, _plain(attention.out_proj), attention.num_heads, attention.dropout)
        self.batch_first = attention.batch_first

    def forward(  # type: ignore[override]  # noqa: D102
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if query is not key or key is not value or need_weights or query.dim() != 3:
            raise SupernetError("elastic attention is of a batch to itself, and does not tell its weights")
        x = query if self.batch_first else query.transpose(0, 1)
        mask = _added(attn_mask, key_padding_mask, x)
        y = super().forward(x, mask, is_causal and mask is None)
        return (y if self.batch_first else y.transpose(0, 1)), None


def _added(attn_mask: Tensor | None, padding: Tensor | None, x: Tensor) -> Tensor | None:
    """What both masks add to the scores; of masks of truth values, minus infinity where they are true."""
    added = None
    for mask in (attn_mask, None if padding is None else padding[:, None, None, :]):
        if mask is not None and mask.dim() == 3:
            raise SupernetError("attention masks that differ by head are not elastic")
        if mask is not None:
            values = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -torch.inf) if _is_bool(mask) else mask
            added = values if added is None else added + values
    return added


def _is_bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


def _thirds(packed: nn.Linear) -> Iterator[nn.Linear]:
    weights = packed.weight.detach().chunk(3)
    biases = (None,) * 3 if packed.bias is None else packed.bias.detach().chunk(3)
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.clone(), packed.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), packed.bias.requires_grad)
        yield layer


def _plain(layer: nn.Linear) -> nn.Linear:
    """torch's own subclass of a linear layer, which differs in what quantisation does with it, as the base."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


# ----------------------------------------------------------------------------------------------------------- splitting


def split_attention(network: nn.Module) -> int:
    """Put SelfAttention in the place of attention with packed weights, wherever it can stand; gives the number.

    The network computes the same. Weights get other names: ``qkv.weight`` and ``in_proj_weight`` become those of the
    layers ``query``, ``key`` and ``value``; the output layer is called ``proj``.
    """
    found = [
        (path, split)
        for path, module in network.named_modules(remove_duplicate=False)
        if path and (split := _split(module)) is not None
    ]
    for path, split in found:
        owner, _, name = path.rpartition(".")
        setattr(network.get_submodule(owner), name, split.train(network.training))
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors exist for the fused path alone
    return len(found)


def _split(module: nn.Module) -> SelfAttention | None:
    if isinstance(module, nn.MultiheadAttention):
        simple = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return EncoderAttention(module) if simple else None
    return _split_timm(module)


def _split_timm(module: Any) -> SelfAttention | None:
    """Of a module in the form of timm's: ``qkv``, ``proj``, ``num_heads``; None where it has more than these can do."""
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if type(qkv) is not nn.Linear or type(proj) is not nn.Linear or type(heads) is not int:
        return None
    known = {"qkv", "proj", "q_norm", "k_norm", "attn_drop", "norm", "proj_drop"}
    more = {name for name, child in module.named_children() if name not in known and not _does_nothing(child)}
    if more or module._parameters or not _does_nothing(getattr(module, "norm", None)):
        return None
    if qkv.out_features != 3 * proj.in_features or proj.in_features % heads:
        return None
    drop = getattr(module, "attn_drop", None)
    split = SelfAttention(qkv, proj, heads, drop.p if isinstance(drop, nn.Dropout) else 0.0)
    for name in ("q_norm", "k_norm", "proj_drop"):
        setattr(split, name, getattr(module, name, None) or nn.Identity())
    return split


def _does_nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
