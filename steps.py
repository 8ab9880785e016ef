"""Steps: what an executable's network calls in place of modules; each is written as TorchScript (programs.py).

Activation and residual addition are done by oneDNN while it has the result of a convolution in cache, 1x1 convolutions
are matrix products. A step computes from the supernet's weights, folding each slice as it goes, or from weights in the
layout that the kernels read, once it is ``packed``: from its own, or, where several subnets use a large slice, from one
that they share (``Larder``), to which each applies its own norm afterwards.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast, overload
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from programs import Hold, Program, literal, program_of

# What a vector of the processor holds in float32; a convolution of half as many outputs leaves half of it unused.
_LANES = {"AVX2": 8, "AVX512": 16}
# A slice as large as that is worth sharing: what passing over its outputs again costs is the less, the larger it is.
LEAST_SHARED_BYTES = 200_000


Slice = tuple[Any, ...]  # what tells slices apart


@dataclass(frozen=True, slots=True, eq=False)
class Convolution:
    """What a convolution computes: a weight (outputs, inputs, height, width) that may be a view, and a bias."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    scale: Tensor | None = None  # by output channel: of a norm that follows; the bias includes it already

    def followed_by(self, norm: Norm) -> Convolution:
        """This convolution and the norm as one: scale and bias of each output channel."""
        scale = torch.rsqrt(norm.var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.mean if self.bias is None else self.bias - norm.mean
        bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        form = self.stride, self.padding, self.dilation, self.groups
        return Convolution(self.weight, bias, *form, scale.view(-1, 1, 1, 1))

    def folded(self) -> Tensor:
        """The weight with its scale."""
        if self.scale is None:
            return self.weight
        return self.as_weights(self.weight.to(self.scale.dtype) * self.scale)

    @overload
    def as_weights(self, tensor: Tensor) -> Tensor: ...
    @overload
    def as_weights(self, tensor: Tensor | None) -> Tensor | None: ...
    def as_weights(self, tensor: Tensor | None) -> Tensor | None:
        """Bias or scale as the kernels take it: of the type of the weight."""
        return None if tensor is None else tensor.to(self.weight.dtype)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product of every pixel's channels."""
        ones = tuple(self.weight.shape[2:]) == self.stride == (1, 1)
        return ones and self.padding == (0, 0) and self.groups == 1

    @property
    def suits_kernels(self) -> bool:
        """Whether oneDNN's kernels compute it right, with packed weights, too.

        They do not for one input channel and a stride across that is larger than the one down: where the result is one
        column wide, they give nonsense.
        """
        return self.weight.shape[1] > 1 or self.stride[1] <= self.stride[0]

    @property
    def form(self) -> tuple[Any, ...]:
        """Padding, stride, dilation and groups, in the order of the kernels."""
        return self.padding, self.stride, self.dilation, self.groups

    @property
    def slice(self) -> Slice:
        """Which part of the supernet's weights it reads, and how."""
        weight = self.weight
        return weight.data_ptr(), tuple(weight.shape), weight.stride(), *self.form


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Statistics and affine weights of a batch norm in evaluation."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Pack:
    """A weight in the layout that the kernels read; held by the steps that read it."""

    def __init__(self, weight: Tensor, nbytes: int) -> None:
        self.weight, self.nbytes = weight, nbytes


class Larder:
    """Packed slices that several subnets share, each as long as a step of one of them holds it."""

    def __init__(self) -> None:
        self._users: Counter[Slice] = Counter()
        self._packs: WeakValueDictionary[Slice, Pack] = WeakValueDictionary()

    def add(self, steps: Iterable[Step]) -> None:
        """Steps of one more subnet, which may be packed."""
        self._users.update({step.slice for step in steps if step.slice is not None})

    def shares(self, step: Step) -> bool:
        """Whether the slice of this step is held once for all who use it; or is to be, once it is packed."""
        if step.packs:
            return step.slice is not None
        return step.slice is not None and self._users[step.slice] > 1 and step.packed_nbytes >= LEAST_SHARED_BYTES

    def pack(self, layer: Convolution, nbytes: int) -> Pack:
        """The slice of this convolution without its scale."""
        pack = self._packs.get(layer.slice)
        if pack is None:
            pack = self._packs[layer.slice] = Pack(_packed(layer.weight, *layer.form), nbytes)
        return pack


class Step:
    """What the rewritten network calls in place of a module."""

    packed_nbytes = 0  # that it holds when packed
    packs: tuple[Pack, ...] = ()  # what it holds
    slice: Slice | None = None  # what it may share with steps of other subnets, or shares if it is packed

    def __init__(self, name: str) -> None:
        self.__name__ = name  # torch.fx writes it into the code that it generates
        self._programs: dict[bool, Program] = {}

    @property
    def parts(self) -> tuple[Step, ...]:
        """Itself, and steps that it does besides."""
        return (self,)

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:
        """The expression of its result, for batches of one or of ``many`` inputs; must not depend on their number."""
        raise NotImplementedError

    def packed(self, larder: Larder) -> Step:
        """The same step with weights in the kernels' layout; itself where nothing is gained."""
        return self

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Its result; for networks that are no program as a whole."""
        many = arguments[0].shape[0] > 1
        program = self._programs.get(many) or self.write(len(arguments), many)
        return program(*arguments)

    def write(self, inputs: int, many: bool) -> Program:
        """Get ready to be called with so many tensors, for batches of one or of ``many``."""
        program = program_of(inputs, lambda names, hold: [f"return {self.written(names, hold, many)}"], keep=True)
        self._programs[many] = program
        return program


class Call(Step):
    """A function of its input and settings."""

    def __init__(self, name: str, function: str, *settings: Any) -> None:
        """``function``: its name in TorchScript; ``settings``: constants and weights."""
        super().__init__(name)
        self._function, self._settings = function, settings

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        settings = [hold(each) if isinstance(each, Tensor) else literal(each) for each in self._settings]
        return f"{self._function}({', '.join([*arguments, *settings])})"


class Average(Step):
    """The mean of each channel's pixels: of few and one image, a kernel that pools is faster than one that reduces."""

    def __init__(self, keep: bool) -> None:
        """``keep``: as one pixel."""
        super().__init__("average")
        self._keep = keep

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        return f"averaged({arguments[0]}, {self._keep})" if not many else f"{arguments[0]}.mean([2, 3], {self._keep})"


class Convolve(Step):
    """A convolution with bias and activation as one oneDNN call."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        """``activation``: none or relu."""
        super().__init__("convolution")
        self._layer, self._activation, self.slice = layer, activation, layer.slice
        weight, bias = layer.weight, layer.bias
        self._bias = weight.new_zeros(weight.shape[0]) if bias is None else layer.as_weights(bias)
        if layer.suits_kernels:
            self.packed_nbytes = _packed_nbytes(weight.dtype, tuple(weight.shape), *layer.form)
        self._scale = layer.as_weights(layer.scale)  # that is still to be applied
        self._pack: Pack | None = None

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        (x,) = arguments
        return self._fused(x, hold) if self._fuses(many) else self._activated(self._apart(x, hold))

    def packed(self, larder: Larder) -> Convolve:  # noqa: D102
        if not self._layer.suits_kernels:
            return self
        step = self._copy(larder)
        if larder.shares(self):
            step._pack = larder.pack(self._layer, self.packed_nbytes)
        else:
            step._pack, step._scale = Pack(_packed(self._layer.folded(), *self._layer.form), self.packed_nbytes), None
            step.slice = None
        step.packs = (step._pack,)
        return step

    def _copy(self, larder: Larder) -> Self:
        """A step like this one, whose own weight is still to be packed."""
        return self.__class__(self._layer, self._activation)

    def _fuses(self, many: bool) -> bool:
        """Not for one image: folding and reordering, or telling oneDNN of more to do, costs more than it saves then."""
        return many and self._layer.suits_kernels and (self._pack is None or self._scale is None)

    def _fused(self, x: str, hold: Hold) -> str:
        return _convolved(x, self._weight(hold), hold(self._bias), self._layer.form, self._activation)

    def _weight(self, hold: Hold) -> str:
        weight = hold(self._layer.weight if self._pack is None else self._pack.weight)
        return weight if self._scale is None else f"({weight} * {hold(self._scale)})"

    def _apart(self, x: str, hold: Hold) -> str:
        """The convolution alone, in memory of its own."""
        layer, scale, bias = self._layer, self._scale, self._bias
        if self._pack is None:
            form = ", ".join(map(literal, (None, layer.stride, layer.padding, layer.dilation, layer.groups)))
            outputs = f"torch.conv2d({x}, {hold(layer.weight)}, {form})"
        else:
            shift = hold(bias) if scale is None else "None"
            outputs = _convolved(x, hold(self._pack.weight), shift, layer.form, "none")
        if scale is not None:
            return f"torch.addcmul({hold(bias.view(-1, 1, 1))}, {outputs}, {hold(scale[:, :, 0])})"
        return f"{outputs}.add_({hold(bias.view(-1, 1, 1))})" if self._pack is None else outputs

    def _activated(self, outputs: str) -> str:
        return f"{outputs}.relu_()" if self._activation == "relu" else outputs


class ConvolveNarrowly(Convolve):
    """A convolution with so few outputs that they fill no more than half of a vector.

    Packed, two neighbouring pixels are computed at once, as twice as many outputs of kernels one column wider that move
    by two: 0.7 of the time on AVX-512 (docs/LOG.md). In memory the result is the same.
    """

    def __init__(self, layer: Convolution, activation: str) -> None:
        super().__init__(layer, activation)
        outputs, inputs, height, self._width = layer.weight.shape
        self._form = layer.padding, (1, 2), (1, 1), 1
        pairs = 2 * outputs, inputs, height, self._width + 1
        self.packed_nbytes = _packed_nbytes(layer.weight.dtype, pairs, *self._form)
        self._pairs, self.slice = cast("tuple[Tensor, Tensor] | None", None), None

    @staticmethod
    def suits(layer: Convolution) -> bool:
        """Whether it is one of these, on this processor; with one input channel, pairs would not suit the kernels."""
        moves_by_one = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.weight.shape[1] > 1
        return moves_by_one and 2 * layer.weight.shape[0] <= _LANES.get(torch.backends.cpu.get_cpu_capability(), 0)

    def packed(self, larder: Larder) -> Convolve:  # noqa: D102
        step, weight = self.__class__(self._layer, self._activation), self._layer.folded()
        pairs = _packed(torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))]), *self._form)
        step._pairs, step.packs = (pairs, self._bias.repeat(2)), (Pack(pairs, self.packed_nbytes),)
        return step

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        one_by_one = super().written(arguments, hold, many)
        if self._pairs is None:
            return one_by_one
        (x,), (weight, bias) = arguments, map(hold, self._pairs)
        pairs = _convolved(x, weight, bias, self._form, self._activation)
        even = f"({x}.size(3) - {self._width}) % 2 == 1"  # the number of columns of the result
        return f"parted({pairs}, {len(self._bias)}) if {even} else {one_by_one}"


class ConvolveAndAdd(Convolve):
    """A convolution to whose result a residual is added before the activation."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        super().__init__(layer, activation)
        self._overwrites = False
        spans = zip(layer.weight.shape[2:], layer.dilation, layer.padding, strict=True)
        self._reach = [dilation * (size - 1) + 1 - 2 * padding for size, dilation, padding in spans]

    def joined(self, multiply: Multiply) -> ConvolveAndMultiply | None:
        """A step that does both: this one's work, and that of the step that gives the residual; None if it cannot."""
        if multiply.layer.weight.shape[0] != len(self._bias) or not self._layer.suits_kernels:
            return None
        return ConvolveAndMultiply(self._layer, self._activation, multiply.layer)

    def overwrite(self) -> None:
        """Let the sum take the memory of the residual from now on."""
        self._overwrites = True

    def _copy(self, larder: Larder) -> Self:
        step = super()._copy(larder)
        step._overwrites = self._overwrites
        return step

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        x, residual = arguments
        apart = f"added({self._apart(x, hold)}, {residual})"
        return self._summed(x, residual, residual, len(self._bias), self._activated(apart), hold, many)

    def _summed(self, x: str, residual: str, like: str, channels: int, apart: str, hold: Hold, many: bool) -> str:
        """As one oneDNN call if the residual has the size of the result, else ``apart``.

        ``like``: what has as many pixels as the residual, and so many ``channels`` if the residual fits.
        """
        if not self._fuses(many):
            return apart
        name, read = "_convolution_pointwise", f"{x}, {residual}"
        if self._overwrites:
            name, read = "_convolution_pointwise_", f"{residual}, {x}"
        settings = ", ".join([self._weight(hold), hold(self._bias), *map(literal, self._layer.form), "'add'", "1.0"])
        activation = literal(None if self._activation == "none" else self._activation)
        fused = f"torch.ops.mkldnn.{name}({read}, {settings}, {activation}, [], '')"
        size = ", ".join([str(channels), literal(self._reach), literal(self._layer.stride)])
        return f"{fused} if fits({like}, {x}, {size}) else {apart}"  # the kernels do not broadcast


class ConvolveAndMultiply(ConvolveAndAdd):
    """A convolution to whose result that of a 1x1 convolution of something else is added before the activation.

    For one image the product is accumulated on the result of the convolution, which saves passes and memory.
    """

    def __init__(self, layer: Convolution, activation: str, product: Convolution) -> None:
        biases = [each.bias for each in (layer, product) if each.bias is not None]
        super().__init__(replace(layer, bias=sum(biases[1:], biases[0]) if biases else None), activation)
        self._product = replace(product, bias=None)
        self._multiply = Multiply(self._product)
        self._overwrites = True

    @property
    def parts(self) -> tuple[Step, ...]:  # noqa: D102
        return self, self._multiply

    def _copy(self, larder: Larder) -> Self:
        step = self.__class__(self._layer, self._activation, self._product)
        step._multiply = self._multiply.packed(larder)
        return step

    def packed(self, larder: Larder) -> Self:  # noqa: D102
        step = cast("Self", super().packed(larder))
        if step is not self:
            step.packs += step._multiply.packs
        return step

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        x, y = arguments
        product, inputs = self._multiply.written([y], hold, many), self._product.weight.shape[1]
        apart = f"added({self._apart(x, hold)}, {product})"
        if not many:
            apart = f"accumulated({self._apart(x, hold)}, {y}, {self._multiply.matrix(hold, across=True)})"
        return self._summed(x, product, y, inputs, self._activated(apart), hold, many)


class Multiply(Step):
    """A 1x1 convolution as a matrix product, which costs less to call; input and output are channels-last."""

    def __init__(self, layer: Convolution) -> None:
        super().__init__("pointwise")
        self.layer, self._matrix = layer, cast("Tensor | None", None)
        self.packed_nbytes = layer.weight.nbytes

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        pixels, bias = f"{arguments[0]}.permute([0, 2, 3, 1])", self.layer.bias
        shift = "None" if bias is None else hold(self.layer.as_weights(bias))
        return f"torch._C._nn.linear({pixels}, {self.matrix(hold)}, {shift}).permute([0, 3, 1, 2])"

    def matrix(self, hold: Hold, across: bool = False) -> str:
        """The expression of what it multiplies by: outputs, inputs; or, ``across``, inputs, outputs."""
        weight, scale = self.layer.weight.flatten(1), self.layer.as_weights(self.layer.scale)
        factors = [weight] if scale is None else [weight, scale.flatten(1)]
        factors = factors if self._matrix is None else [self._matrix]
        return f"({' * '.join(hold(each.t() if across else each) for each in factors)})"

    def packed(self, larder: Larder) -> Multiply:  # noqa: D102
        step = Multiply(self.layer)
        step._matrix = self.layer.folded().flatten(1).contiguous()
        step.packs = (Pack(step._matrix, step.packed_nbytes),)
        return step


def _convolved(x: str, weight: str, bias: str, form: tuple[Any, ...], activation: str) -> str:
    settings = ", ".join(map(literal, (*form, activation)))
    return f"torch.ops.mkldnn._convolution_pointwise({x}, {weight}, {bias}, {settings}, [], '')"


def _packed(weight: Tensor, *form: Any) -> Tensor:
    plain = weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *form, None)  # type: ignore[call-arg]


@functools.cache
def _packed_nbytes(dtype: torch.dtype, shape: tuple[int, ...], *form: Any) -> int:
    """What a convolution's weight takes in the kernels' layout, which fills channels up to whole vectors."""
    return int(torch.ops.mkldnn._nbytes(_packed(torch.zeros(shape, dtype=dtype), *form)))
