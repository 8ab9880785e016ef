"""Steps: what an executable's network calls in place of modules; each is written as TorchScript (programs.py).

Activation and residual addition are done by oneDNN while it has the result of a convolution in cache, 1x1 convolutions
are matrix products. A step computes from shared weights, folding each slice as it goes, or from weights of its own in
the layout that the kernels read, once it is ``packed``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from programs import Hold, Program, literal, program_of

# What a vector of the processor holds in float32; a convolution of half as many outputs leaves half of it unused.
_LANES = {"AVX2": 8, "AVX512": 16}


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
        return self.weight if self.scale is None else self.weight * self.scale

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product of every pixel's channels."""
        ones = tuple(self.weight.shape[2:]) == self.stride == (1, 1)
        return ones and self.padding == (0, 0) and self.groups == 1

    @property
    def form(self) -> tuple[Any, ...]:
        """Padding, stride, dilation and groups, in the order of the kernels."""
        return self.padding, self.stride, self.dilation, self.groups


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Statistics and affine weights of a batch norm in evaluation."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Step:
    """What the rewritten network calls in place of a module."""

    nbytes = 0  # that it holds of its own
    packed_nbytes = 0  # that it would hold when packed

    def __init__(self, name: str) -> None:
        self.__name__ = name  # torch.fx writes it into the code that it generates
        self._programs: dict[bool, Program] = {}

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:
        """The expression of its result, for batches of one or of ``many`` inputs; must not depend on their number."""
        raise NotImplementedError

    def packed(self) -> Step:
        """The same step with weights of its own, in the kernels' layout; itself where nothing is gained."""
        return self

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Its result; for networks that are no program as a whole."""
        many = arguments[0].shape[0] > 1
        program = self._programs.get(many)
        if program is None:
            program = program_of(len(arguments), lambda names, hold: [f"return {self.written(names, hold, many)}"])
            self._programs[many] = program
        return program(*arguments)


class Call(Step):
    """A function of its input and settings."""

    def __init__(self, name: str, function: str, *settings: Any) -> None:
        """``function``: its name in TorchScript; ``settings``: constants and weights."""
        super().__init__(name)
        self._function, self._settings = function, settings

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: ARG002, D102
        settings = [hold(each) if isinstance(each, Tensor) else literal(each) for each in self._settings]
        return f"{self._function}({', '.join([*arguments, *settings])})"


class Convolve(Step):
    """A convolution with bias and activation as one oneDNN call."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        """``activation``: none or relu."""
        super().__init__("convolution")
        self._layer, self._activation = layer, activation
        self._bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        self.packed_nbytes = _packed_nbytes(tuple(layer.weight.shape), *layer.form)
        self._packed: Tensor | None = None

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        (x,) = arguments
        return self._fused(x, hold) if many else self._apart(x, None, hold)

    def packed(self) -> Convolve:  # noqa: D102
        step = self.__class__(self._layer, self._activation)
        step._packed = _packed(self._layer.folded(), *self._layer.form)
        step.nbytes = self.packed_nbytes
        return step

    def _fused(self, x: str, hold: Hold) -> str:
        return _convolved(x, self._weight(hold), hold(self._bias), self._layer.form, self._activation)

    def _weight(self, hold: Hold) -> str:
        if self._packed is not None:
            return hold(self._packed)
        weight, scale = hold(self._layer.weight), self._layer.scale
        return weight if scale is None else f"({weight} * {hold(scale)})"

    def _apart(self, x: str, residual: str | None, hold: Hold) -> str:
        """For one image, folding and reordering weights, or telling oneDNN of more to do, costs more than it saves."""
        layer, bias = self._layer, self._bias
        if self._packed is not None:
            outputs = _convolved(x, hold(self._packed), hold(bias), layer.form, "none")
        else:
            form = ", ".join(map(literal, (None, layer.stride, layer.padding, layer.dilation, layer.groups)))
            outputs, wide_bias = f"torch.conv2d({x}, {hold(layer.weight)}, {form})", hold(bias.view(-1, 1, 1))
            if layer.scale is None:
                outputs = f"{outputs}.add_({wide_bias})"
            else:
                outputs = f"torch.addcmul({wide_bias}, {outputs}, {hold(layer.scale[:, :, 0])})"
        if residual is not None:
            outputs = f"added({outputs}, {residual})"
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
        self._pairs, self._pair_bias = cast("Tensor | None", None), self._bias.repeat(2)
        self.packed_nbytes += _packed_nbytes((2 * outputs, inputs, height, self._width + 1), *self._form)

    @staticmethod
    def suits(layer: Convolution) -> bool:
        """Whether it is one of these, on this processor."""
        moves_by_one = layer.stride == layer.dilation == (1, 1) and layer.groups == 1
        return moves_by_one and 2 * layer.weight.shape[0] <= _LANES.get(torch.backends.cpu.get_cpu_capability(), 0)

    def packed(self) -> Convolve:  # noqa: D102
        step = cast(ConvolveNarrowly, super().packed())
        weight = self._layer.folded()
        pairs = torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])
        step._pairs = _packed(pairs, *self._form)
        return step

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        one_by_one = super().written(arguments, hold, many)
        if self._pairs is None:
            return one_by_one
        (x,) = arguments
        pairs = _convolved(x, hold(self._pairs), hold(self._pair_bias), self._form, self._activation)
        parted = f"parted({pairs}, {len(self._bias)})"
        return f"{parted} if ({x}.size(3) - {self._width}) % 2 == 1 else {one_by_one}"  # an even number of columns


class ConvolveAndAdd(Convolve):
    """A convolution to whose result a residual is added before the activation."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        super().__init__(layer, activation)
        self._overwrites = False
        spans = zip(layer.weight.shape[2:], layer.dilation, layer.padding, strict=True)
        self._reach = [dilation * (size - 1) + 1 - 2 * padding for size, dilation, padding in spans]

    def overwrite(self) -> None:
        """Let the sum take the memory of the residual from now on."""
        self._overwrites = True

    def packed(self) -> Convolve:  # noqa: D102
        step = cast(ConvolveAndAdd, super().packed())
        step._overwrites = self._overwrites
        return step

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: D102
        x, residual = arguments
        apart = self._apart(x, residual, hold)
        if not many:
            return apart
        kernel, read = ("_convolution_pointwise_", f"{residual}, {x}"), f"{x}, {residual}"
        name, read = (kernel if self._overwrites else ("_convolution_pointwise", read))
        settings = [self._weight(hold), hold(self._bias), *map(literal, self._layer.form), "'add'", "1.0"]
        activation = literal(None if self._activation == "none" else self._activation)
        fused = f"torch.ops.mkldnn.{name}({read}, {', '.join(settings)}, {activation}, [], '')"
        reach, stride = literal(self._reach), literal(self._layer.stride)
        # The kernels do not broadcast.
        return f"{fused} if fits({residual}, {x}, {hold(self._bias)}, {reach}, {stride}) else {apart}"


class Multiply(Step):
    """A 1x1 convolution as a matrix product, which costs less to call; input and output are channels-last."""

    def __init__(self, layer: Convolution) -> None:
        super().__init__("pointwise")
        self._layer, self._matrix = layer, cast("Tensor | None", None)
        self.packed_nbytes = 4 * layer.weight.numel()

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:  # noqa: ARG002, D102
        scale, bias = self._layer.scale, self._layer.bias
        matrix = hold(self._layer.weight.flatten(1) if self._matrix is None else self._matrix)
        if self._matrix is None and scale is not None:
            matrix = f"{matrix} * {hold(scale.flatten(1))}"
        pixels, shift = f"{arguments[0]}.permute([0, 2, 3, 1])", "None" if bias is None else hold(bias)
        return f"torch._C._nn.linear({pixels}, {matrix}, {shift}).permute([0, 3, 1, 2])"

    def packed(self) -> Multiply:  # noqa: D102
        step = Multiply(self._layer)
        step._matrix = self._layer.folded().flatten(1).contiguous()
        step.nbytes = step.packed_nbytes
        return step


def _convolved(x: str, weight: str, bias: str, form: tuple[Any, ...], activation: str) -> str:
    settings = ", ".join(map(literal, (*form, activation)))
    return f"torch.ops.mkldnn._convolution_pointwise({x}, {weight}, {bias}, {settings}, [], '')"


def _packed(weight: Tensor, *form: Any) -> Tensor:
    plain = weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *form, None)  # type: ignore[call-arg]


@functools.cache
def _packed_nbytes(shape: tuple[int, ...], *form: Any) -> int:
    """What a convolution's weight takes in the kernels' layout, which fills channels up to whole vectors."""
    return int(torch.ops.mkldnn._nbytes(_packed(torch.zeros(shape), *form)))
