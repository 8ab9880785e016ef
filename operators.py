"""The three operators that make a network elastic: LayerSelect, WeightSlice and SubnetNorm; and what declares them.

They hold no state that switching changes. What an actuated subnet needs of each of them is computed once, by functions
of the subnet that the operator was given (how many channels, which blocks), and is found in ``_settings`` by the
operator's slot while that subnet runs. This file knows torch, but neither how subnets are chosen nor any architecture.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnets import SupernetError

Size = Callable[[Any], int]  # of a subnet


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of a convolution or linear layer a subnet uses: channels and side of the kernel; None is all of it."""

    outputs: Size | None = None
    inputs: Size | None = None
    kernel: Size | None = None


@dataclass(frozen=True, slots=True)
class Elastic:
    """What is elastic in a plain network, by module path.

    ``layers`` are sequences of blocks, with the indices of those that a subnet runs; ``norms`` the batch norms with
    fewer channels than all (the others are normalised in full, with statistics per subnet too). ``stages`` is how many
    blocks each stage of depths has, where there are stages.
    """

    layers: Mapping[str, Callable[[Any], Sequence[int]]]
    slices: Mapping[str, Sizes]
    norms: Mapping[str, Size | None]
    stages: tuple[int, ...] = ()


# What each operator is to do, by slot, for the batch that this thread (or task) is computing.
_settings: contextvars.ContextVar[Sequence[Any]] = contextvars.ContextVar("settings")


@contextlib.contextmanager
def active(settings: Sequence[Any]) -> Iterator[None]:
    """In this context the operators compute with these settings."""
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


# -------------------------------------------------------------------------------------------------------------- layers


class LayerSelect(nn.Sequential):
    """A sequence of blocks of which some run: the first of each stage, every other one, or all but an optional one.

    ``kept`` gives the indices of a subnet's blocks, ascending. Further arguments (an attention mask) go to every block.
    """

    def __init__(
        self, blocks: nn.Sequential | nn.ModuleList, slot: int, kept: Callable[[Any], Sequence[int]]
    ) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.slot, self._kept, self._container = slot, kept, type(blocks)

    def blocks_of(self, subnet: Any) -> tuple[nn.Module, ...]:
        """The blocks that the subnet runs."""
        blocks = tuple(self.children())
        return tuple(blocks[index] for index in self._kept(subnet))

    def __iter__(self) -> Iterator[nn.Module]:
        """The blocks that run, for networks that call them one by one; all of them where no subnet is running."""
        settings = _settings.get(None)
        return self.children() if settings is None else iter(settings[self.slot])

    def forward(self, x: Tensor, *more: Any) -> Tensor:  # noqa: D102
        for block in _settings.get()[self.slot]:
            x = block(x, *more)
        return x

    def standalone(self, subnet: Any, memo: dict[int, Any]) -> nn.Module:
        """The subnet's blocks, numbered anew, in a container as there was before; ``memo`` is deepcopy's."""
        named, kept = list(self.named_children()), self._kept(subnet)
        numbered = all(name.isdigit() for name, _ in named)
        plain: nn.Module = self._container.__new__(self._container)
        nn.Module.__init__(plain)
        for position, index in enumerate(kept):
            plain.add_module(str(position) if numbered else named[index][0], copy.deepcopy(named[index][1], memo))
        return plain


# ------------------------------------------------------------------------------------------------------------- weights


class SliceSettings(NamedTuple):
    """What WeightSlice uses: views of the shared tensors, and how to convolve (None: a linear layer)."""

    weight: Tensor
    bias: Tensor | None
    form: dict[str, Any] | None


class WeightSlice(nn.Module):
    """A convolution or linear layer that uses the leading input and output channels of its shared weight.

    A grouped convolution uses its leading groups (a depthwise one: its leading channels). An elastic kernel is the
    centre of the next larger one, times a matrix if the layer has one (``7to5_matrix``, ``5to3_matrix``: Once-for-All,
    Cai et al., ICLR 2020).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, slot: int, sizes: Sizes) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():  # under the names that it had, matrices included
            self.register_parameter(name, parameter)
        self.slot, self._sizes = slot, sizes
        self._groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self._form: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self._form = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self._made: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int, int], SliceSettings] = {}

    @property
    def elastic_outputs(self) -> bool:
        """Whether subnets differ in how many output channels they use."""
        return self._sizes.outputs is not None

    def _key(self, subnet: Any) -> tuple[int, int, int]:
        sizes, (outputs, inputs, *side) = self._sizes, self.weight.shape
        return (
            outputs if sizes.outputs is None else sizes.outputs(subnet),
            inputs if sizes.inputs is None else sizes.inputs(subnet),
            0 if sizes.kernel is None or side[0] == sizes.kernel(subnet) else sizes.kernel(subnet),
        )

    def check(self, subnet: Any, where: str) -> None:
        """Raise SupernetError where the stored weight is smaller than what the subnet would use."""
        outputs, inputs, kernel = self._key(subnet)
        full = tuple(self.weight.shape[:2])
        cut = self._groups > 1 and outputs * self._groups % full[0] != 0  # through the middle of a group
        if cut or not (1 <= outputs <= full[0] and 1 <= inputs <= full[1]):
            raise SupernetError(f"{where}: {subnet.name} needs {outputs}x{inputs} channels of {full[0]}x{full[1]}")
        if kernel and kernel not in range(2 - self.weight.shape[2] % 2, self.weight.shape[2], 2):
            raise SupernetError(f"{where}: {subnet.name} needs a kernel of {kernel} from {self.weight.shape[2]}")

    def settings(self, subnet: Any) -> SliceSettings:
        """What the subnet uses of this layer."""
        key = self._key(subnet)
        if torch.is_grad_enabled():  # training: a view belongs to one autograd graph
            return self._slice(*key)
        if key not in self._views:
            self._views[key] = self._slice(*key)
        return self._views[key]

    def slices(self, subnet: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as views of the shared tensors (of a smaller kernel: of what was made from them)."""
        return self.settings(subnet)[:2]

    @property
    def computes(self) -> bool:
        """Whether some of what it uses is computed from the weights, rather than a view of them."""
        return self._sizes.kernel is not None

    def forget_views(self) -> None:
        """Drop views of weights that moved to another device, and what was made from weights that changed."""
        self._views.clear()
        self._made.clear()

    def _slice(self, outputs: int, inputs: int, kernel: int) -> SliceSettings:
        weight = (self._kernel(kernel) if kernel else self.weight)[:outputs, :inputs]
        bias = None if self.bias is None else self.bias[:outputs]
        form = self._form
        if form is not None and kernel:
            form = {**form, "padding": (kernel // 2, kernel // 2)}
        if form is not None and self._groups > 1:
            form = {**form, "groups": self._groups * outputs // self.weight.shape[0]}
        return SliceSettings(weight, bias, form)

    def _kernel(self, side: int) -> Tensor:
        """The filters of all channels at this size; computed once, except in training."""
        if side in self._made and not torch.is_grad_enabled():
            return self._made[side]
        larger = side + 2
        source = self.weight if larger == self.weight.shape[2] else self._kernel(larger)
        centre = source[:, :, 1:-1, 1:-1]
        matrix = getattr(self, f"{larger}to{side}_matrix", None)
        if matrix is not None:
            centre = F.linear(centre.flatten(2), matrix).view(centre.shape)
        if not torch.is_grad_enabled():
            self._made[side] = centre
        return centre

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight, bias, form = _settings.get()[self.slot]
        if form is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **form)

    def standalone(self, subnet: Any) -> nn.Module:
        """The subnet's part as an ordinary layer with its own copy of the weights."""
        weight, bias, form = self.settings(subnet)
        outputs, inputs = weight.shape[:2]
        layer: nn.Conv2d | nn.Linear
        if form is None:
            layer = nn.Linear(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
        else:
            kernel, inputs = cast("tuple[int, int]", tuple(weight.shape[2:])), inputs * form.get("groups", 1)
            layer = nn.Conv2d(
                inputs, outputs, kernel, bias=bias is not None, device=weight.device, dtype=weight.dtype, **form
            )
        _copy_into(layer, weight=weight, bias=bias)
        return layer


# --------------------------------------------------------------------------------------------------------------- norms


class NormSettings(NamedTuple):
    """What SubnetNorm uses: statistics (None: those of the batch itself) and the leading part of the affine weights."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    recorder: StatisticsRecorder | None = None


class StatisticsRecorder:
    """Mean and (biased) variance per channel of all that one SubnetNorm sees, for calibration.

    ``pooled``: those of all values together. Otherwise the averages of each batch's own mean and variance, weighted by
    the number of inputs in it, as Once-for-All calibrates; the variance of the batches' means is then left out.
    """

    def __init__(self, pooled: bool = True) -> None:
        self._pooled, self._count = pooled, 0
        self._sum: Tensor | None = None
        self._spread: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Add one batch, shape (N, C, …); batches count by their size."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        # Double precision: the variance is a difference of numbers that may be nearly equal.
        var, mean = (each.double() for each in torch.var_mean(x, axes, correction=0))
        count = x.numel() // x.shape[1] if self._pooled else x.shape[0]
        total, spread = count * mean, count * (var + mean.square() if self._pooled else var)
        self._sum = total if self._sum is None else self._sum + total
        self._spread = spread if self._spread is None else self._spread + spread
        self._count += count

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of everything observed; an error if nothing was."""
        if self._sum is None or self._spread is None:
            raise SupernetError("calibration passed no data through a norm of the subnet")
        mean, spread = self._sum / self._count, self._spread / self._count
        return mean, (spread - mean.square()).clamp_min(0) if self._pooled else spread


class SubnetNorm(nn.Module):
    """Batch normalisation whose mean and variance belong to the actuated subnet.

    Using another subnet's statistics ruins accuracy (by up to 10 points, section 4.1 of the paper). ``channels`` tells
    how many a subnet normalises here; None where that is always all of them.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, slot: int, channels: Size | None) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise SupernetError(f"cannot replace {norm}: it keeps no running statistics")
        if not type(norm).__module__.startswith("torch.nn."):
            raise SupernetError(f"cannot replace {type(norm).__name__}: it may do more than batch normalisation")
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.eps, self.slot, self._channels = norm.eps, slot, channels
        self._views: dict[int, NormSettings] = {}

    def channels_of(self, subnet: Any) -> int:
        """How many channels the subnet normalises here."""
        return self.running_mean.shape[0] if self._channels is None else self._channels(subnet)

    def check(self, subnet: Any, where: str) -> None:
        """Raise SupernetError where there are fewer channels than the subnet would use."""
        channels, full = self.channels_of(subnet), self.running_mean.shape[0]
        if not 1 <= channels <= full:
            raise SupernetError(f"{where}: {subnet.name} needs {channels} channels of {full}")

    def settings(self, subnet: Any) -> NormSettings:
        """The affine weights that the subnet uses, as views of the shared tensors; no statistics yet."""
        channels = self.channels_of(subnet)
        if torch.is_grad_enabled():
            return self._slice(channels)
        if channels not in self._views:
            self._views[channels] = self._slice(channels)
        return self._views[channels]

    def forget_views(self) -> None:
        """Drop views of weights that moved to another device."""
        self._views.clear()

    def _slice(self, channels: int) -> NormSettings:
        weight, bias = (None if each is None else each[:channels] for each in (self.weight, self.bias))
        return NormSettings(None, None, weight, bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        mean, var, weight, bias, recorder = _settings.get()[self.slot]
        if recorder is not None:
            recorder.observe(x)
        return F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=self.eps)

    def standalone(self, settings: NormSettings) -> nn.Module:
        """These settings as an ordinary batch norm with its own copy of weights and statistics."""
        like = self.running_mean
        channels, affine = cast(Tensor, settings.mean).shape[0], settings.weight is not None
        norm = nn.BatchNorm2d(channels, eps=self.eps, affine=affine, device=like.device, dtype=like.dtype)
        _copy_into(
            norm, weight=settings.weight, bias=settings.bias, running_mean=settings.mean, running_var=settings.var
        )
        return norm


def _copy_into(module: nn.Module, **values: Tensor | None) -> None:
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                cast(Tensor, getattr(module, name)).copy_(value)


# -------------------------------------------------------------------------------------------------- packed statistics


def pack(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Statistics in a quarter of their size: a byte for each, and four numbers a norm, as one vector of bytes.

    ``flat`` holds means, then variances, of norms with ``sizes`` channels. Of each norm the means, in units of the
    standard deviation and compressed by asinh (or else one channel that hardly varies would coarsen all others), and
    the logarithms of the variances are spread over 256 equal steps from their least to their greatest: off by at most
    1/510 of that range, which is less than what calibration on other images changes.
    """
    mean, var = torch.split(flat.double().cpu(), sum(sizes))
    log = (var + _LEAST_VARIANCE).log()
    parts = [*torch.split((mean / (log / 2).exp()).asinh(), list(sizes)), *torch.split(log, list(sizes))]
    low = torch.stack([part.min() for part in parts]).float()
    step = ((torch.stack([part.max() for part in parts]).float() - low) / 255).clamp_min(1e-30)
    codes = [((part - least) / each).round().clamp(0, 255) for part, least, each in zip(parts, low, step, strict=True)]
    return torch.cat([torch.cat([low, step]).view(torch.uint8), torch.cat(codes).to(torch.uint8)])


def unpack(packed: Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The statistics that ``pack`` wrote."""
    ranges, codes = torch.split(packed, [16 * len(sizes), 2 * sum(sizes)])
    repeats = torch.tensor([*sizes, *sizes], device=packed.device)
    low, step = ranges.view(torch.float32).view(2, -1).repeat_interleave(repeats, 1, output_size=codes.shape[0])
    scaled, log = torch.addcmul(low, codes, step).view(2, -1)
    return torch.cat([scaled.sinh() * (log / 2).exp(), (log.exp() - _LEAST_VARIANCE).clamp_min(0)]).to(dtype)


_LEAST_VARIANCE = 1e-5  # what batch norm adds itself, usually: smaller ones make no difference


def packed_size(sizes: Sequence[int]) -> int:
    """Bytes of packed statistics."""
    return 16 * len(sizes) + 2 * sum(sizes)
