"""What is elastic in the stages of a residual network, found by following each block with torch.fx; names no family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from operators import Elastic, LayerSelect, Sizes
from subnets import SubnetSpace, SupernetError


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The channels that a stage's expand ratio leaves of ``full``: a whole number of units (heads), at least one.

    Layers with the same Part make, normalise or read the same channels; two Parts are never equal.
    """

    stage: int
    full: int
    unit: int = 1

    def __call__(self, subnet: Any) -> int:
        """The channels that this subnet uses."""
        units: int = max(1, round(self.full // self.unit * subnet.expands[self.stage]))
        return self.unit * units


@dataclass(frozen=True, slots=True)
class First:
    """The first blocks of a stage, as many as its depth."""

    stage: int

    def __call__(self, subnet: Any) -> Sequence[int]:
        """The indices of the blocks that this subnet runs."""
        return range(subnet.depths[self.stage])


def find_elastic(network: nn.Module, stages: Sequence[str], space: SubnetSpace) -> Elastic:
    """What can be elastic in a plain residual network, by its structure.

    ``stages`` names the network's stages in order; each must be an ``nn.Sequential`` of residual blocks. Inside each
    block, traced with torch.fx, the convolutions whose output reaches another convolution are *inner* and get elastic
    outputs; those that reach the residual addition keep the stage's width, since blocks exchange it. Raises
    SupernetError for what cannot be made elastic, naming it.
    """
    if len(stages) != len(space.depths):
        raise SupernetError(f"{len(stages)} stages named, but the space has {len(space.depths)}")
    finding = ResidualFinding(network, space)
    sizes = [finding.stage(index, name) for index, name in enumerate(stages)]
    return Elastic(finding.layers, finding.slices, finding.norms, tuple(sizes))


class ResidualFinding:
    """Collects what is elastic in one residual stage after the other, by path; ``space``: what must be possible."""

    def __init__(self, network: nn.Module, space: SubnetSpace | None = None) -> None:
        self.network, self.space = network, space
        self.layers: dict[str, Callable[[Any], Sequence[int]]] = {}
        self.slices: dict[str, Sizes] = {}
        self.norms: dict[str, Callable[[Any], int] | None] = {}
        self._seen: set[int] = set()

    def stage(self, index: int, name: str) -> int:
        """Follow the blocks of this stage; gives their number."""
        stage = _submodule(self.network, name)
        if not isinstance(stage, nn.Sequential) or isinstance(stage, LayerSelect):
            raise SupernetError(f"stage '{name}' is a {type(stage).__name__}; it must be an nn.Sequential of blocks")
        if self.space is not None and self.space.depths[index][-1] > len(stage):
            raise SupernetError(
                f"stage '{name}' has {len(stage)} blocks, but depths up to {self.space.depths[index][-1]}"
            )
        elastic = [self._block(block, index, f"{name}.{child}") for child, block in stage._modules.items() if block]
        if self.space is not None and not any(elastic) and self.space.expands[index] != (1,):
            ratios = list(self.space.expands[index])
            raise SupernetError(f"stage '{name}': expand ratios {ratios}, but no convolution that can be narrowed")
        self.layers[name] = First(index)
        return len(stage)

    def _block(self, block: nn.Module, stage: int, where: str) -> bool:
        """Whether anything in the block has elastic width."""
        parts = [module for module in block.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
        if not self._seen.isdisjoint(map(id, parts)):
            raise SupernetError(f"block '{where}' shares layers with another one")
        check_types(block, where)
        outputs: dict[fx.Node, Callable[[Any], int] | None] = {}
        for node in traced(block, where).nodes:
            module, path = _module_of(node, block), f"{where}.{node.target}"
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                if id(module) in self._seen:
                    raise SupernetError(f"{path} is used more than once")
                self._seen.add(id(module))
                source = _convolution_before(node, outputs)
                channels = outputs[source] if source is not None else None
                if isinstance(module, nn.Conv2d):
                    outputs[node] = self._outputs(module, stage, path) if _is_inner(node, block) else None
                    self.slices[path] = self._sizes(module, path, outputs[node], channels)
                elif module.running_mean is None:
                    raise SupernetError(f"{path}: {module} keeps no running statistics")
                else:
                    self.norms[path] = channels
        return any(each is not None for each in outputs.values())

    @staticmethod
    def _sizes(layer: nn.Conv2d, where: str, outputs: Any, inputs: Any) -> Sizes:
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise SupernetError(f"{where}: grouped and non-zero-padded convolutions are not elastic")
        return Sizes(outputs, inputs)

    def _outputs(self, layer: nn.Conv2d, stage: int, where: str) -> Callable[[Any], int]:
        full = layer.out_channels
        for ratio in self.space.expands[stage] if self.space is not None else ():
            if round(full * ratio) < 1 or abs(full * ratio - round(full * ratio)) > 1e-6:
                raise SupernetError(f"{where}: expand ratio {ratio:g} of {full} channels is not a whole number")
        return Part(stage, full)


def check_types(block: nn.Module, where: str) -> None:
    """Raise SupernetError for layers that are derived from torch's own: an operator would compute the base's."""
    for name, module in block.named_modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and not kind.startswith("torch.nn."):
            raise SupernetError(f"{where}.{name}: the layer type {kind} is unknown")


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in network.named_children())
        raise SupernetError(f"the network has no stage '{name}'; its parts are: {known}") from None


def traced(block: nn.Module, where: str) -> fx.Graph:
    """The block as a graph; SupernetError where it has control flow that depends on data."""
    try:
        return fx.Tracer().trace(block)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError) as error:
        raise SupernetError(f"block '{where}' has control flow that depends on data: {error}") from error


def _module_of(node: fx.Node, block: nn.Module) -> nn.Module | None:
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def _convolution_before(node: fx.Node, known: Mapping[fx.Node, object]) -> fx.Node | None:
    """The convolution whose channels arrive at this node; None where a block's input or addition comes before it."""
    source = node.all_input_nodes[0]
    while source not in known:
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
        module = _module_of(user, block)
        if isinstance(module, nn.Conv2d):
            continue
        name = type(module).__name__ if module else getattr(user.target, "__name__", str(user.target))
        if name.lower().replace("_", "") not in _CHANNELWISE or not _is_inner(user, block):
            return False
    return True
