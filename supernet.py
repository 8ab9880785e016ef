"""SubNetAct: many subnets in one weight-shared network, switched without copying anything.

Parts of a plain torch network are replaced by the three operators of operators.py (SuperServe, arXiv 2312.16733,
section 4): ``LayerSelect`` runs some blocks of a stage, ``WeightSlice`` uses the leading channels of a shared weight,
and ``SubnetNorm`` normalises with statistics that were calibrated for one subnet. Which parts, a family declares, or
``find_elastic`` finds by structure. What a subnet needs of the operators is built once into an immutable
``ActuatedSubnet`` and found by dictionary look-up, so that two subnets of the same weights can run at the same time.

This file knows torch, but no policy, no HTTP and no architecture (those are in supernets/).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from operators import (
    Elastic,
    LayerSelect,
    NormSettings,
    StatisticsRecorder,
    SubnetNorm,
    WeightSlice,
    active,
    pack,
    packed_size,
    unpack,
)
from residual import find_elastic
from subnets import IllegalSubnetError, Space, Subnet, SubnetSpace, SupernetError

__all__ = [
    "ActuatedSubnet",
    "Elastic",
    "IllegalSubnetError",
    "LayerSelect",
    "NormSettings",
    "Operators",
    "Space",
    "Subnet",
    "SubnetNorm",
    "SubnetSpace",
    "Supernet",
    "SupernetError",
    "WeightSlice",
    "count_macs",
    "count_parameters",
    "find_elastic",
    "insert",
    "insert_operators",
]


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
        return len(self.layer_selects) + len(self.sized)

    @property
    def sized(self) -> tuple[WeightSlice | SubnetNorm, ...]:
        """Those that have channels."""
        return self.weight_slices + self.subnet_norms


def insert_operators(network: nn.Module, stages: Sequence[str], space: SubnetSpace) -> Operators:
    """Replace, in place, what must be elastic in a plain residual network; parameter names stay as they were.

    Raises SupernetError for what cannot be made elastic, naming it.
    """
    return insert(network, find_elastic(network, stages, space))


def insert(network: nn.Module, elastic: Elastic) -> Operators:
    """Replace, in place, what was declared elastic, and every other batch norm; parameter names stay as they were."""
    norms = dict(elastic.norms)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # the stem's too: full width, statistics per subnet
            norms.setdefault(name, None)
    slots = iter(range(len(elastic.slices) + len(norms) + len(elastic.layers)))
    slices = [WeightSlice(_part(network, name), next(slots), sizes) for name, sizes in elastic.slices.items()]
    replaced = [SubnetNorm(_part(network, name), next(slots), channels) for name, channels in norms.items()]
    for name, operator in zip([*elastic.slices, *norms], [*slices, *replaced], strict=True):
        _replace(network, name, operator)
    selects = [LayerSelect(_part(network, name), next(slots), kept) for name, kept in elastic.layers.items()]
    for name, select in zip(elastic.layers, selects, strict=True):
        _replace(network, name, select)
    return Operators(tuple(selects), tuple(slices), tuple(replaced))


def _part(network: nn.Module, path: str) -> Any:
    return network.get_submodule(path)


def _replace(parent: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(parent.get_submodule(owner), name, module)


# ------------------------------------------------------------------------------------------------------------ supernet


@dataclass(frozen=True, slots=True, eq=False)
class ActuatedSubnet:
    """A subnet ready to run: immutable, shares the supernet's weights, safe to call from several threads at once."""

    subnet: Any
    calibrated: bool
    network: nn.Module = field(repr=False)
    settings: Sequence[Any] = field(repr=False)

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Logits of a batch of inputs."""
        with self.active():
            return cast(Tensor, self.network(*inputs, **named))

    def hold(self) -> None:
        """Leave what it computes with where it is from now on: CUDA graphs know addresses, and keep nothing alive."""
        if isinstance(self.settings, PackedSettings):
            self.settings.hold()

    def active(self) -> AbstractContextManager[None]:
        """In this context the network itself computes this subnet, for those that follow it from inside."""
        settings = self.settings
        return active(settings.unpacked() if isinstance(settings, PackedSettings) else settings)


class PackedSettings(Sequence[Any]):
    """Settings of a subnet whose statistics are kept packed.

    They are unpacked when the subnet runs, and stay so while it is among the last ``Recent.MOST`` that ran, or for good
    once they are held.
    """

    __slots__ = ("_dtype", "_held", "_packed", "_recent", "_sizes", "_template")

    def __init__(
        self, template: tuple[Any, ...], packed: Tensor, sizes: tuple[int, ...], dtype: torch.dtype, recent: Recent
    ) -> None:
        self._template, self._packed, self._sizes = template, packed, sizes
        self._dtype, self._recent = dtype, recent
        self._held: tuple[Any, ...] | None = None

    def unpacked(self) -> tuple[Any, ...]:
        """The settings in full."""
        return self._held or self._recent.get(self, self._unpack)

    def hold(self) -> None:
        """Keep them unpacked, always the same tensors."""
        self._held = self.unpacked()

    @torch.no_grad()
    def _unpack(self) -> tuple[Any, ...]:
        flat = unpack(self._packed, self._sizes, self._dtype)
        if flat.is_cuda:
            # Other streams, which find them from now on, do not wait for this one.
            torch.cuda.current_stream(flat.device).synchronize()
        parts = torch.split(flat, [*self._sizes, *self._sizes])
        pairs = zip(parts, parts[len(self._sizes) :], strict=False)
        return tuple(
            NormSettings(*next(pairs), each.weight, each.bias) if isinstance(each, NormSettings) else each
            for each in self._template
        )

    @overload
    def __getitem__(self, slot: int) -> Any: ...
    @overload
    def __getitem__(self, slot: slice) -> Sequence[Any]: ...
    def __getitem__(self, slot: int | slice) -> Any:
        return self.unpacked()[slot]

    def __len__(self) -> int:
        return len(self._template)


class Recent:
    """The settings that were unpacked last; safe to use from several threads."""

    MOST = 32

    def __init__(self) -> None:
        self._held: OrderedDict[int, tuple[PackedSettings, tuple[Any, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: PackedSettings, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What is held for these, or was just made for them."""
        with self._lock:
            found = self._held.get(id(key))
            if found is not None:
                self._held.move_to_end(id(key))
                return found[1]
        made = make()
        with self._lock:
            self._held[id(key)] = key, made
            while len(self._held) > self.MOST:
                self._held.popitem(last=False)
        return made


class Supernet:
    """A network with the operators inserted, its space of subnets, and the norm statistics of those calibrated.

    ``elastic``: what was declared, or the names of the stages in which ``find_elastic`` looks for it.
    """

    def __init__(self, network: nn.Module, elastic: Elastic | Sequence[str], space: Space) -> None:
        if not isinstance(elastic, Elastic):
            if not isinstance(space, SubnetSpace):
                raise SupernetError(f"a network without declared parts needs a SubnetSpace, not {type(space).__name__}")
            elastic = find_elastic(network, elastic, space)
        _check_depths(elastic, space)
        self.network, self.space = network, space
        self.operators = insert(network, elastic)
        self.statistics: dict[Any, Tensor] = {}  # floating: as computed; bytes: packed
        self._actuated: dict[Any, ActuatedSubnet] = {}
        self._recent = Recent()
        self._check_sizes()

    def restricted(self, space: Space) -> Supernet:
        """The same network and operators with another space, and nothing calibrated; the two share their weights."""
        other = copy.copy(self)
        other.space, other.statistics, other._actuated, other._recent = space, {}, {}, Recent()
        other._check_sizes()
        return other

    def _check_sizes(self) -> None:
        """The ends of the space must fit the weights; what lies between does too."""
        names = {id(module): name for name, module in self.network.named_modules()}
        for subnet in (self.space.smallest, self.space.largest):
            running = self._running(subnet)
            for operator in self.operators.sized:
                if id(operator) in running:
                    operator.check(subnet, names[id(operator)])

    @property
    def device(self) -> torch.device:
        """Where weights and statistics are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in, and computed with."""
        weights = (each for module in _computing(self.network) for each in module.parameters(recurse=False))
        return next((each.dtype for each in weights if each.is_floating_point()), torch.float32)

    @property
    def nbytes(self) -> int:
        """Size of the shared weights; statistics of the subnets come on top."""
        return sum(parameter.nbytes for parameter in self.network.parameters())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move weights and statistics to a device; forgets what was actuated before.

        With ``dtype`` the weights are kept in it from now on. Batch norms and their statistics stay as precise as they
        are, which takes little.
        """
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype is not None:
            for module in _computing(self.network):
                _cast(module, dtype)
        self.statistics = {subnet: flat.to(device) for subnet, flat in self.statistics.items()}
        self.forget()

    def forget(self) -> None:
        """Actuate anew from now on: weights moved, or those changed from which kernels were computed."""
        for operator in self.operators.sized:
            operator.forget_views()
        self._actuated.clear()

    def actuate(self, subnet: Any) -> ActuatedSubnet:
        """The subnet, ready for inference: a look-up after the first time.

        A subnet that was never calibrated is actuated with the network's own running statistics and says so
        (``calibrated`` is False). Raises IllegalSubnetError outside the space.
        """
        actuated = self._actuated.get(subnet)
        if actuated is None:
            self.space.check(subnet)
            with torch.no_grad():
                settings = self._inference_settings(subnet)
            actuated = ActuatedSubnet(subnet, self.is_calibrated(subnet), self.network, settings)
            self._actuated[subnet] = actuated
        return actuated

    def is_calibrated(self, subnet: Any) -> bool:
        """Whether it has statistics of its own, or runs no norm that would need them."""
        return subnet in self.statistics or not self._norms_in(subnet)

    def for_training(self, subnet: Any) -> ActuatedSubnet:
        """The subnet with batch statistics and with gradients flowing to the shared weights; valid for one step."""
        self.space.check(subnet)
        if any(layer.computes for layer in self.operators.weight_slices):
            self.forget()
        return ActuatedSubnet(subnet, False, self.network, self._settings(subnet))

    @torch.no_grad()
    def calibrate(self, subnet: Any, batches: Iterable[Any], pooled: bool = True) -> None:
        """Compute and keep the subnet's norm statistics by passing calibration data, in large batches, through it.

        Each batch is one input tensor, or a tuple of all inputs. ``pooled`` as StatisticsRecorder says.
        """
        self.space.check(subnet)
        norms = self._norms_in(subnet)
        if not norms:
            return  # no statistics differ between its subnets
        recorders = [StatisticsRecorder(pooled) for _ in norms]
        settings = list(self._settings(subnet))
        for norm, recorder in zip(norms, recorders, strict=True):
            settings[norm.slot] = settings[norm.slot]._replace(recorder=recorder)
        run = ActuatedSubnet(subnet, False, self.network, settings)
        for batch in batches:
            run(*(batch if isinstance(batch, tuple) else (batch,)))
        pairs = [recorder.statistics() for recorder in recorders]
        self.set_statistics(subnet, torch.cat([*(mean for mean, _ in pairs), *(var for _, var in pairs)]))

    def set_statistics(self, subnet: Any, flat: Tensor) -> None:
        """Keep statistics: means of all the subnet's norms in order, then variances, as one vector; or these packed."""
        self.space.check(subnet)
        sizes, packed = self._norm_sizes(subnet), flat.dtype == torch.uint8
        expected = packed_size(sizes) if packed else 2 * sum(sizes)
        if flat.shape != (expected,):
            raise SupernetError(f"statistics of {subnet.name} have shape {tuple(flat.shape)}, expected ({expected},)")
        values = unpack(flat.contiguous(), sizes) if packed else flat
        if not bool(torch.isfinite(values).all()):
            raise SupernetError(f"statistics of {subnet.name} contain values that are not finite")
        if bool((values[sum(sizes) :] < 0).any()):
            raise SupernetError(f"statistics of {subnet.name} contain negative variances")
        like = self.operators.subnet_norms[0].running_mean if self.operators.subnet_norms else flat
        self.statistics[subnet] = flat.to(like.device) if packed else flat.to(like)
        self._actuated.pop(subnet, None)

    def statistics_of(self, subnet: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and variance that the subnet uses, by the path of each norm that it runs."""
        names = {id(module): name for name, module in self.network.named_modules()}
        pairs = self._running_statistics(subnet)
        return {names[id(norm)]: pair for norm, pair in zip(self._norms_in(subnet), pairs, strict=True)}

    def pack_statistics(self) -> None:
        """Keep all statistics so far in a quarter of their memory, to the precision that ``pack`` says.

        A subnet that did not run lately unpacks them at its next batch (scripts/bench_families.py measures it).
        """
        for subnet, flat in self.statistics.items():
            if flat.dtype != torch.uint8:
                self.set_statistics(subnet, pack(flat, self._norm_sizes(subnet)))

    @torch.no_grad()
    def extract(self, subnet: Any) -> nn.Module:
        """The subnet as a plain standalone network with its own weights and none of the operators."""
        self.space.check(subnet)
        settings, running = self._inference_settings(subnet), self._running(subnet)
        plain: dict[int, Any] = {
            id(layer): layer.standalone(subnet) for layer in self.operators.weight_slices if id(layer) in running
        }
        plain |= {id(norm): norm.standalone(settings[norm.slot]) for norm in self._norms_in(subnet)}
        plain |= {id(select): select.standalone(subnet, plain) for select in self.operators.layer_selects}
        return copy.deepcopy(self.network, plain).eval()  # the copy finds what stands for each operator there

    def _running(self, subnet: Any) -> set[int]:
        """Identities of the operators that the subnet runs."""
        operators = self.operators
        running = {id(each) for each in operators.sized}
        for select in operators.layer_selects:
            kept = select.blocks_of(subnet)
            for block in select.children():
                if block not in kept:
                    running.difference_update(id(module) for module in block.modules())
        return running

    def _norms_in(self, subnet: Any) -> list[SubnetNorm]:
        running = self._running(subnet)
        return [norm for norm in self.operators.subnet_norms if id(norm) in running]

    def _norm_sizes(self, subnet: Any) -> tuple[int, ...]:
        return tuple(norm.channels_of(subnet) for norm in self._norms_in(subnet))

    def _running_statistics(self, subnet: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each norm that the subnet runs: calibrated, or the leading part of the network's own."""
        norms, flat = self._norms_in(subnet), self.statistics.get(subnet)
        sizes = [norm.channels_of(subnet) for norm in norms]
        if flat is None:
            for norm, size in zip(norms, sizes, strict=True):
                yield norm.running_mean[:size], norm.running_var[:size]
        else:
            packed = flat.dtype == torch.uint8
            parts = torch.split(unpack(flat, sizes, norms[0].running_mean.dtype) if packed else flat, sizes * 2)
            yield from zip(parts[: len(norms)], parts[len(norms) :], strict=True)

    def _inference_settings(self, subnet: Any) -> Sequence[Any]:
        settings, flat = list(self._settings(subnet)), self.statistics.get(subnet)
        if flat is not None and flat.dtype == torch.uint8:
            dtype = self.operators.subnet_norms[0].running_mean.dtype
            return PackedSettings(tuple(settings), flat, self._norm_sizes(subnet), dtype, self._recent)
        for norm, (mean, var) in zip(self._norms_in(subnet), self._running_statistics(subnet), strict=True):
            settings[norm.slot] = settings[norm.slot]._replace(mean=mean, var=var)
        return tuple(settings)

    def _settings(self, subnet: Any) -> tuple[Any, ...]:
        """What the operators that the subnet runs use of the weights; None for the others."""
        settings: list[Any] = [None] * self.operators.slots
        running = self._running(subnet)
        for select in self.operators.layer_selects:
            settings[select.slot] = select.blocks_of(subnet)
        for operator in self.operators.sized:
            if id(operator) in running:
                settings[operator.slot] = operator.settings(subnet)
        return tuple(settings)


def _computing(network: nn.Module) -> Iterator[nn.Module]:
    """All that it computes with, but for batch norms."""
    norms = SubnetNorm | nn.modules.batchnorm._BatchNorm
    return (module for module in network.modules() if not isinstance(module, norms))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """What the module itself holds, and not those within it."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _check_depths(elastic: Elastic, space: Space) -> None:
    """The space must have the network's stages, and no depth beyond their blocks."""
    depths = cast("tuple[tuple[int, ...], ...]", getattr(space, "depths", ()))
    if len(depths) != len(elastic.stages):
        raise SupernetError(f"the network has {len(elastic.stages)} stages, but the space has {len(depths)}")
    for stage, (blocks, legal) in enumerate(zip(elastic.stages, depths, strict=True)):
        if legal[-1] > blocks:
            raise SupernetError(f"stage {stage} has {blocks} blocks, but depths up to {legal[-1]}")


# ------------------------------------------------------------------------------------------------------------ counting


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values of a standalone network."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def count_macs(network: nn.Module, *inputs: Tensor | Sequence[int]) -> int:
    """Multiply-adds of a standalone network's convolutions and linear layers, for one input.

    A module that hides its layers tells its own, by a method ``macs`` of its input.

    ``inputs`` are the shape of an image (C, H, W), or the tensors that the network takes. On the device "meta" this
    computes nothing.
    """
    total = 0

    def add(module: Any, given: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        total += module.macs(*given) if hasattr(module, "macs") else output.numel() * module.weight[0].numel()

    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear) or hasattr(each, "macs")]
    hooks = [module.register_forward_hook(add) for module in layers]
    like = next(network.parameters())
    network(*(each if isinstance(each, Tensor) else like.new_zeros(1, *each) for each in inputs))
    for hook in hooks:
        hook.remove()
    return total
