"""SubNetAct: many subnets in one weight-shared network, switched without copying anything.

``insert_operators`` replaces parts of a plain torch network by three operators (SuperServe, arXiv 2312.16733,
section 4): ``LayerSelect`` runs the first blocks of a stage, ``WeightSlice`` uses the leading channels of a shared
weight, and ``SubnetNorm`` normalises with statistics that were calibrated for one subnet. The operators hold no state
that switching changes: what a subnet needs of each of them (views, depths, statistics) is built once into an immutable
``ActuatedSubnet`` and found by dictionary look-up, so that two subnets of the same weights can run at the same time.

This file knows torch, but no policy, no HTTP and no architecture (those are in supernets/).
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import itertools
import random
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class SupernetError(ValueError):
    """A network that cannot be made elastic, or supernet data that do not fit each other; says what and where."""


class IllegalSubnetError(SupernetError):
    """A subnet outside the supernet's space; the message lists what is legal."""


# ------------------------------------------------------------------------------------------------------------- subnets


@dataclass(frozen=True, slots=True)
class Subnet:
    """One subnet as a value: how many blocks of each stage run, and which part of each stage's inner channels.

    ``expands`` are fractions of the full number of inner channels of a block, one per stage.
    """

    depths: tuple[int, ...]
    expands: tuple[float, ...]

    @property
    def name(self) -> str:
        """Canonical name, such as ``d2-2-1-e0.5`` (one ratio for all stages) or ``d2-2-1-e0.5-1-0.25``."""
        ratios = self.expands[:1] if len(set(self.expands)) == 1 else self.expands
        return f"d{'-'.join(map(str, self.depths))}-e{'-'.join(map(_ratio_text, ratios))}"

    @classmethod
    def parse(cls, name: str) -> Subnet:
        """The subnet of a canonical name; raises IllegalSubnetError for any other text."""
        match = re.fullmatch(r"d(\d{1,9}(?:-\d{1,9})*)-e(\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)*)", name)
        if match is None:
            raise IllegalSubnetError(f"'{name}' is no subnet name: expected the form d2-2-1-e0.5 or d2-2-1-e0.5-1-0.25")
        depths = tuple(int(part) for part in match[1].split("-"))
        ratios = tuple(float(part) for part in match[2].split("-"))
        subnet = cls(depths, ratios * len(depths) if len(ratios) == 1 else ratios)
        if subnet.name != name:
            raise IllegalSubnetError(f"'{name}' is not written canonically: expected '{subnet.name}'")
        return subnet


def _ratio_text(ratio: float) -> str:
    short = f"{ratio:g}"
    return short if float(short) == ratio else repr(ratio)


@dataclass(frozen=True, slots=True)
class SubnetSpace:
    """All legal subnets: for each stage, its legal depths and its legal expand ratios, each ascending."""

    depths: tuple[tuple[int, ...], ...]
    expands: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.depths or len(self.depths) != len(self.expands):
            raise SupernetError(f"{len(self.depths)} stages with depths but {len(self.expands)} with expand ratios")
        for stage, choices in enumerate(zip(self.depths, self.expands, strict=True)):
            for what, values in zip(("depths", "expand ratios"), choices, strict=True):
                legal = _is_depth if what == "depths" else _is_ratio
                if not values or not all(map(legal, values)) or list(values) != sorted(set(values)):
                    rule = "whole numbers from 1" if what == "depths" else "fractions above 0, up to 1"
                    raise SupernetError(f"stage {stage}: {what} must be ascending {rule}, not {list(values)}")

    def __len__(self) -> int:
        size = 1
        for choices in (*self.depths, *self.expands):
            size *= len(choices)
        return size

    def __iter__(self) -> Iterator[Subnet]:
        for depths in itertools.product(*self.depths):
            for expands in itertools.product(*self.expands):
                yield Subnet(depths, expands)

    @property
    def largest(self) -> Subnet:
        """The subnet that uses everything."""
        return Subnet(tuple(d[-1] for d in self.depths), tuple(e[-1] for e in self.expands))

    @property
    def smallest(self) -> Subnet:
        """The subnet that uses the least of every stage."""
        return Subnet(tuple(d[0] for d in self.depths), tuple(e[0] for e in self.expands))

    def sample(self, rng: random.Random) -> Subnet:
        """A subnet drawn uniformly, one choice at a time."""
        return Subnet(tuple(rng.choice(d) for d in self.depths), tuple(rng.choice(e) for e in self.expands))

    def mutate(self, subnet: Subnet, rng: random.Random, probability: float) -> Subnet:
        """A copy in which each choice is redrawn with this probability (for evolutionary search)."""

        def redraw(values: Sequence[Any], legal: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
            pairs = zip(values, legal, strict=True)
            return tuple(rng.choice(choices) if rng.random() < probability else value for value, choices in pairs)

        return Subnet(redraw(subnet.depths, self.depths), redraw(subnet.expands, self.expands))

    def check(self, subnet: Subnet) -> None:
        """Raise IllegalSubnetError, listing what is legal, unless the subnet is in this space."""
        stages = len(self.depths)
        if len(subnet.depths) != stages or len(subnet.expands) != stages:
            raise IllegalSubnetError(f"{subnet.name}: this supernet has {stages} stages")
        for stage in range(stages):
            if subnet.depths[stage] not in self.depths[stage]:
                legal = list(self.depths[stage])
                raise IllegalSubnetError(
                    f"{subnet.name}: depth {subnet.depths[stage]} of stage {stage} is not in {legal}"
                )
            if subnet.expands[stage] not in self.expands[stage]:
                legal_ratios = list(self.expands[stage])
                ratio = subnet.expands[stage]
                raise IllegalSubnetError(
                    f"{subnet.name}: expand ratio {ratio:g} of stage {stage} is not in {legal_ratios}"
                )


def _is_depth(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_ratio(value: object) -> bool:
    return type(value) in (int, float) and 1e-4 <= cast(float, value) <= 1  # names hold nothing smaller


# ----------------------------------------------------------------------------------------------------------- operators

# What each operator is to do, by slot, for the batch that this thread (or task) is computing.
_settings: contextvars.ContextVar[Sequence[Any]] = contextvars.ContextVar("settings")


class NormSettings(NamedTuple):
    """What SubnetNorm uses: statistics (None: those of the batch itself) and the leading part of the affine weights."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    recorder: StatisticsRecorder | None = None


class StatisticsRecorder:
    """Mean and variance per channel of all that one SubnetNorm sees, for calibration."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._square: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Add one batch, shape (N, C, …); batches count by their size."""
        axes, count = [axis for axis in range(x.dim()) if axis != 1], x.numel() // x.shape[1]
        # Double precision: the variance is a difference of numbers that may be nearly equal.
        var, mean = (each.double() for each in torch.var_mean(x, axes, correction=0))
        total, square = count * mean, count * (var + mean.square())
        self._sum = total if self._sum is None else self._sum + total
        self._square = square if self._square is None else self._square + square
        self._count += count

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance over everything observed; an error if nothing was."""
        if self._sum is None or self._square is None:
            raise SupernetError("calibration passed no data through a norm of the subnet")
        mean = self._sum / self._count
        return mean, (self._square / self._count - mean.square()).clamp_min(0)


class LayerSelect(nn.Sequential):
    """A stage of which the first blocks run; how many is the subnet's depth."""

    def __init__(self, blocks: nn.Sequential, slot: int, stage: int) -> None:
        super().__init__(OrderedDict(blocks.named_children()))
        self.slot, self.stage = slot, stage

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for block in _settings.get()[self.slot]:
            x = block(x)
        return x


class WeightSlice(nn.Module):
    """A convolution or linear layer that uses the leading input and output channels of its shared weight.

    ``inputs`` is the WeightSlice whose outputs it reads, when those are elastic too.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, slot: int, stage: int, inputs: WeightSlice | None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.slot, self.stage = slot, stage
        self.elastic_outputs = False
        object.__setattr__(self, "inputs", inputs)  # not a child module
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self.convolution = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def outputs_of(self, subnet: Subnet) -> int:
        """How many output channels the subnet uses."""
        full = self.weight.shape[0]
        return round(full * subnet.expands[self.stage]) if self.elastic_outputs else full

    def inputs_of(self, subnet: Subnet) -> int:
        """How many input channels the subnet uses."""
        source = cast("WeightSlice | None", self.inputs)
        return self.weight.shape[1] if source is None else source.outputs_of(subnet)

    def slices(self, subnet: Subnet) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as views of the shared tensors."""
        key = self.outputs_of(subnet), self.inputs_of(subnet)
        if torch.is_grad_enabled():  # training: a view belongs to one autograd graph
            return self._slice(*key)
        if key not in self._views:
            self._views[key] = self._slice(*key)
        return self._views[key]

    def forget_views(self) -> None:
        """Drop views of weights that moved to another device."""
        self._views.clear()

    def _slice(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        return self.weight[:outputs, :inputs], None if self.bias is None else self.bias[:outputs]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight, bias = _settings.get()[self.slot]
        if self.convolution is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **self.convolution)

    def standalone(self, subnet: Subnet) -> nn.Module:
        """The subnet's part as an ordinary layer with its own copy of the weights."""
        weight, bias = self.slices(subnet)
        outputs, inputs = weight.shape[:2]
        layer: nn.Conv2d | nn.Linear
        if self.convolution is None:
            layer = nn.Linear(inputs, outputs, bias is not None)
        else:
            kernel = cast("tuple[int, int]", tuple(weight.shape[2:]))
            layer = nn.Conv2d(inputs, outputs, kernel, bias=bias is not None, **self.convolution)
        layer.to(weight.device, weight.dtype)
        _copy_into(layer, weight=weight, bias=bias)
        return layer


class SubnetNorm(nn.Module):
    """Batch normalisation whose mean and variance belong to the actuated subnet.

    Using another subnet's statistics ruins accuracy (by up to 10 points, section 4.1 of the paper). ``source`` is the
    WeightSlice whose outputs it normalises, when those are elastic.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, slot: int, source: WeightSlice | None) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise SupernetError(f"cannot replace {norm}: it keeps no running statistics")
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.eps, self.slot = norm.eps, slot
        object.__setattr__(self, "source", source)  # not a child module
        self._views: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def channels_of(self, subnet: Subnet) -> int:
        """How many channels the subnet normalises here."""
        source = cast("WeightSlice | None", self.source)
        return self.running_mean.shape[0] if source is None else source.outputs_of(subnet)

    def affine(self, subnet: Subnet) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as views of the shared tensors."""
        channels = self.channels_of(subnet)
        if torch.is_grad_enabled():
            return self._slice(channels)
        if channels not in self._views:
            self._views[channels] = self._slice(channels)
        return self._views[channels]

    def forget_views(self) -> None:
        """Drop views of weights that moved to another device."""
        self._views.clear()

    def _slice(self, channels: int) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if t is None else t[:channels] for t in (self.weight, self.bias))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        mean, var, weight, bias, recorder = _settings.get()[self.slot]
        if recorder is not None:
            recorder.observe(x)
        return F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=self.eps)

    def standalone(self, subnet: Subnet, settings: NormSettings) -> nn.Module:
        """The subnet's part as an ordinary batch norm with its own copy of weights and statistics."""
        norm = nn.BatchNorm2d(self.channels_of(subnet), eps=self.eps, affine=settings.weight is not None)
        norm.to(self.running_mean.device, self.running_mean.dtype)
        _copy_into(
            norm, weight=settings.weight, bias=settings.bias, running_mean=settings.mean, running_var=settings.var
        )
        return norm


def _copy_into(module: nn.Module, **values: Tensor | None) -> None:
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                cast(Tensor, getattr(module, name)).copy_(value)


# ----------------------------------------------------------------------------------------------------------- insertion


@dataclass(frozen=True, slots=True)
class Operators:
    """The operators inserted into a network, found again by slot."""

    layer_selects: tuple[LayerSelect, ...]
    weight_slices: tuple[WeightSlice, ...]
    subnet_norms: tuple[SubnetNorm, ...]

    @property
    def slots(self) -> int:
        """How many settings an actuated subnet holds."""
        return len(self.layer_selects) + len(self.weight_slices) + len(self.subnet_norms)


def insert_operators(network: nn.Module, stages: Sequence[str], space: SubnetSpace) -> Operators:
    """Replace, in place, what must be elastic in a plain residual network; parameter names stay as they were.

    ``stages`` names the network's stages in order; each must be an ``nn.Sequential`` of residual blocks. Inside each
    block, traced with torch.fx, the convolutions whose output reaches another convolution are *inner* and get elastic
    outputs; those that reach the residual addition keep the stage's width, since blocks exchange it. Raises
    SupernetError for what cannot be made elastic, naming it.
    """
    return _Insertion(network, stages, space).run()


class _Insertion:
    """One pass over a network; collects the operators as it inserts them."""

    def __init__(self, network: nn.Module, stages: Sequence[str], space: SubnetSpace) -> None:
        self.network, self.stages, self.space = network, stages, space
        self.selects: list[LayerSelect] = []
        self.slices: list[WeightSlice] = []
        self.norms: list[SubnetNorm] = []

    def run(self) -> Operators:
        if len(self.stages) != len(self.space.depths):
            raise SupernetError(f"{len(self.stages)} stages named, but the space has {len(self.space.depths)}")
        for index, name in enumerate(self.stages):
            self._stage(index, name)
        for name, module in list(self.network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):  # outside the stages (the stem): full width, statistics per subnet
                self._replace(self.network, name, self._norm(module, None))
        return Operators(tuple(self.selects), tuple(self.slices), tuple(self.norms))

    def _slot(self) -> int:
        return len(self.selects) + len(self.slices) + len(self.norms)

    def _stage(self, index: int, name: str) -> None:
        stage = _submodule(self.network, name)
        if not isinstance(stage, nn.Sequential) or isinstance(stage, LayerSelect):
            raise SupernetError(f"stage '{name}' is a {type(stage).__name__}; it must be an nn.Sequential of blocks")
        if self.space.depths[index][-1] > len(stage):
            raise SupernetError(
                f"stage '{name}' has {len(stage)} blocks, but depths up to {self.space.depths[index][-1]}"
            )
        for number, block in enumerate(stage):
            self._block(block, index, f"{name}.{number}")
        elastic = any(layer.elastic_outputs for layer in self.slices if layer.stage == index)
        if not elastic and self.space.expands[index] != (1,):
            ratios = list(self.space.expands[index])
            raise SupernetError(f"stage '{name}': expand ratios {ratios}, but no convolution that can be narrowed")
        select = LayerSelect(stage, self._slot(), index)
        self.selects.append(select)
        self._replace(self.network, name, select)

    def _block(self, block: nn.Module, stage: int, where: str) -> None:
        if any(isinstance(module, WeightSlice | SubnetNorm) for module in block.modules()):
            raise SupernetError(f"block '{where}' shares layers with another one")
        graph = _trace(block, where)
        inserted: dict[fx.Node, WeightSlice] = {}
        for node in graph.nodes:
            module = block.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                if module.groups != 1 or module.padding_mode != "zeros":
                    raise SupernetError(
                        f"{where}.{node.target}: grouped and non-zero-padded convolutions are not elastic"
                    )
                source = _convolution_before(node, inserted)
                inputs = inserted[source] if source is not None and inserted[source].elastic_outputs else None
                replaced = WeightSlice(module, self._slot(), stage, inputs)
                replaced.elastic_outputs = _is_inner(node, block)
                self._check_ratios(replaced, stage, f"{where}.{node.target}")
                inserted[node] = replaced
                self.slices.append(replaced)
                self._replace(block, str(node.target), replaced)
            elif isinstance(module, nn.BatchNorm2d):
                source = _convolution_before(node, inserted)
                self._replace(block, str(node.target), self._norm(module, inserted[source] if source else None))
            elif isinstance(module, WeightSlice | SubnetNorm):
                raise SupernetError(f"{where}.{node.target} is used more than once")

    def _check_ratios(self, layer: WeightSlice, stage: int, where: str) -> None:
        full = layer.weight.shape[0]
        for ratio in self.space.expands[stage] if layer.elastic_outputs else ():
            if round(full * ratio) < 1 or abs(full * ratio - round(full * ratio)) > 1e-6:
                raise SupernetError(f"{where}: expand ratio {ratio:g} of {full} channels is not a whole number")

    def _norm(self, norm: nn.BatchNorm2d, source: WeightSlice | None) -> SubnetNorm:
        replaced = SubnetNorm(norm, self._slot(), source)
        self.norms.append(replaced)
        return replaced

    @staticmethod
    def _replace(parent: nn.Module, path: str, module: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(parent.get_submodule(owner), name, module)


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in network.named_children())
        raise SupernetError(f"the network has no stage '{name}'; its parts are: {known}") from None


def _trace(block: nn.Module, where: str) -> fx.Graph:
    try:
        return fx.Tracer().trace(block)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError) as error:
        raise SupernetError(f"block '{where}' has control flow that depends on data: {error}") from error


def _convolution_before(node: fx.Node, inserted: Mapping[fx.Node, WeightSlice]) -> fx.Node | None:
    """The convolution whose channels arrive at this node; None where a block's input or addition comes before it."""
    source = node.all_input_nodes[0]
    while source not in inserted:
        if source.op == "placeholder" or len(source.all_input_nodes) != 1:
            return None
        source = source.all_input_nodes[0]
    return source


# Operations that treat every channel alike and alone; named as modules, functions and methods, without underscores.
_CHANNELWISE = {
    "batchnorm2d", "relu", "relu6", "leakyrelu", "elu", "silu", "gelu", "mish", "hardswish", "hardtanh", "hardsigmoid",
    "sigmoid", "tanh", "identity", "dropout", "dropout2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "contiguous",
}  # fmt: skip


def _is_inner(node: fx.Node, block: nn.Module) -> bool:
    """Whether all that reads this convolution's output, through channelwise operations, is another convolution."""
    for user in node.users:
        module = block.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            continue
        name = type(module).__name__ if module else getattr(user.target, "__name__", str(user.target))
        if name.lower().replace("_", "") not in _CHANNELWISE or not _is_inner(user, block):
            return False
    return True


# ------------------------------------------------------------------------------------------------------------ supernet


@dataclass(frozen=True, slots=True, eq=False)
class ActuatedSubnet:
    """A subnet ready to run: immutable, shares the supernet's weights, safe to call from several threads at once."""

    subnet: Subnet
    calibrated: bool
    network: nn.Module = field(repr=False)
    settings: tuple[Any, ...] = field(repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a batch of inputs."""
        with self.active():
            return cast(Tensor, self.network(x))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """In this context the network itself computes this subnet, for those that follow it from inside."""
        token = _settings.set(self.settings)
        try:
            yield
        finally:
            _settings.reset(token)


class Supernet:
    """A network with the operators inserted, its space of subnets, and the norm statistics of those calibrated."""

    def __init__(self, network: nn.Module, stages: Sequence[str], space: SubnetSpace) -> None:
        self.network = network
        self.space = space
        self.operators = insert_operators(network, stages, space)
        self.statistics: dict[Subnet, Tensor] = {}
        self._actuated: dict[Subnet, ActuatedSubnet] = {}

    @property
    def device(self) -> torch.device:
        """Where weights and statistics are."""
        return next(self.network.parameters()).device

    @property
    def nbytes(self) -> int:
        """Size of the shared weights; statistics of the subnets come on top."""
        return sum(parameter.nbytes for parameter in self.network.parameters())

    def to(self, device: torch.device) -> None:
        """Move weights and statistics to a device; forgets what was actuated before."""
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.statistics = {subnet: flat.to(device) for subnet, flat in self.statistics.items()}
        for layer in self.operators.weight_slices:
            layer.forget_views()
        for norm in self.operators.subnet_norms:
            norm.forget_views()
        self._actuated.clear()

    def actuate(self, subnet: Subnet) -> ActuatedSubnet:
        """The subnet, ready for inference: a look-up after the first time.

        A subnet that was never calibrated is actuated with the network's own running statistics and says so
        (``calibrated`` is False). Raises IllegalSubnetError outside the space.
        """
        actuated = self._actuated.get(subnet)
        if actuated is None:
            self.space.check(subnet)
            with torch.no_grad():
                settings = self._settings(subnet, self._norm_settings(subnet))
            actuated = ActuatedSubnet(subnet, subnet in self.statistics, self.network, settings)
            self._actuated[subnet] = actuated
        return actuated

    def for_training(self, subnet: Subnet) -> ActuatedSubnet:
        """The subnet with batch statistics and with gradients flowing to the shared weights; valid for one step."""
        self.space.check(subnet)
        norms = {norm.slot: NormSettings(None, None, *norm.affine(subnet)) for norm in self.operators.subnet_norms}
        return ActuatedSubnet(subnet, False, self.network, self._settings(subnet, norms))

    @torch.no_grad()
    def calibrate(self, subnet: Subnet, batches: Iterable[Tensor]) -> None:
        """Compute and keep the subnet's norm statistics by passing calibration data, in large batches, through it."""
        self.space.check(subnet)
        recorders = {norm.slot: StatisticsRecorder() for norm in self._norms_in(subnet)}
        norms = {
            norm.slot: NormSettings(None, None, *norm.affine(subnet), recorders.get(norm.slot))
            for norm in self.operators.subnet_norms
        }
        run = ActuatedSubnet(subnet, False, self.network, self._settings(subnet, norms))
        for batch in batches:
            run(batch)
        pairs = [recorders[norm.slot].statistics() for norm in self._norms_in(subnet)]
        self.set_statistics(subnet, torch.cat([*(mean for mean, _ in pairs), *(var for _, var in pairs)]))

    def set_statistics(self, subnet: Subnet, flat: Tensor) -> None:
        """Keep statistics: means of all the subnet's norms in order, then variances, as one vector."""
        self.space.check(subnet)
        expected = 2 * sum(norm.channels_of(subnet) for norm in self._norms_in(subnet))
        if flat.shape != (expected,):
            raise SupernetError(f"statistics of {subnet.name} have shape {tuple(flat.shape)}, expected ({expected},)")
        if not bool(torch.isfinite(flat).all()):
            raise SupernetError(f"statistics of {subnet.name} contain values that are not finite")
        if bool((flat[expected // 2 :] < 0).any()):
            raise SupernetError(f"statistics of {subnet.name} contain negative variances")
        self.statistics[subnet] = flat.to(self.operators.subnet_norms[0].running_mean)
        self._actuated.pop(subnet, None)

    @torch.no_grad()
    def extract(self, subnet: Subnet) -> nn.Module:
        """The subnet as a plain standalone network with its own weights and none of the operators."""
        self.space.check(subnet)
        norms = self._norm_settings(subnet)
        plain: dict[int, Any] = {id(layer): layer.standalone(subnet) for layer in self.operators.weight_slices}
        for norm in self.operators.subnet_norms:
            if norm.slot in norms:
                plain[id(norm)] = norm.standalone(subnet, norms[norm.slot])
        for select, depth in zip(self.operators.layer_selects, subnet.depths, strict=True):
            blocks = list(select.named_children())[:depth]
            plain[id(select)] = copy.deepcopy(nn.Sequential(OrderedDict(blocks)), plain)
        return copy.deepcopy(self.network, plain).eval()  # the copy finds what stands for each operator there

    def _norms_in(self, subnet: Subnet) -> list[SubnetNorm]:
        skipped: set[int] = set()
        for select, depth in zip(self.operators.layer_selects, subnet.depths, strict=True):
            for block in list(select)[depth:]:
                skipped.update(id(module) for module in block.modules())
        return [norm for norm in self.operators.subnet_norms if id(norm) not in skipped]

    def _norm_settings(self, subnet: Subnet) -> dict[int, NormSettings]:
        flat = self.statistics.get(subnet)
        norms = self._norms_in(subnet)
        if flat is None:
            running = {norm.slot: (norm.running_mean, norm.running_var) for norm in norms}
        else:
            sizes = [norm.channels_of(subnet) for norm in norms]
            parts = torch.split(flat, sizes * 2)
            pairs = zip(parts[: len(norms)], parts[len(norms) :], strict=True)
            running = {norm.slot: pair for norm, pair in zip(norms, pairs, strict=True)}
        return {
            norm.slot: NormSettings(
                running[norm.slot][0][: norm.channels_of(subnet)],
                running[norm.slot][1][: norm.channels_of(subnet)],
                *norm.affine(subnet),
            )
            for norm in norms
        }

    def _settings(self, subnet: Subnet, norms: Mapping[int, NormSettings]) -> tuple[Any, ...]:
        settings: list[Any] = [None] * self.operators.slots
        for select, depth in zip(self.operators.layer_selects, subnet.depths, strict=True):
            settings[select.slot] = tuple(select)[:depth]
        for layer in self.operators.weight_slices:
            settings[layer.slot] = layer.slices(subnet)
        for slot, norm in norms.items():
            settings[slot] = norm
        return tuple(settings)


# ------------------------------------------------------------------------------------------------------------ counting


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values of a standalone network."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def count_macs(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of a standalone network's convolutions and linear layers, for one input (C, H, W)."""
    total = 0

    def add(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * cast(Tensor, module.weight)[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in layers]
    network(torch.zeros(1, *input_shape, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total
