"""What can be elastic in a network that was not written for it: stages of residual blocks, stacks of encoder layers.

Blocks are found by their structure, never by names of classes: a sequence whose members each add what convolutions
make of their input to it; or whose members each hold self-attention and two linear layers after it. Residual blocks
are followed with torch.fx, encoder layers by watching which layers run, in which order, on an example. Everything that
is found is said (``Structure.report``), and of what looked alike but cannot be elastic, why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from operators import Elastic, Sizes
from residual import First, Part, ResidualFinding, check_types, traced
from subnets import SubnetSpace, SupernetError

RATIOS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class EveryOther:
    """Blocks spread evenly over a stage, as many as its depth: the rule of DynaBERT (Hou et al., NeurIPS 2020)."""

    stage: int
    blocks: int

    def __call__(self, subnet: Any) -> Sequence[int]:
        """The indices of the blocks that this subnet runs."""
        depth = subnet.depths[self.stage]
        return [number * self.blocks // depth for number in range(depth)]


@dataclass(frozen=True, slots=True)
class Stage:
    """A sequence of blocks of which subnets run some, and what of these is elastic in width.

    ``needed``: the leading blocks that all subnets run, because they change the shape of what they are given.
    ``heads`` are those of one layer, 0 for convolutions. ``parts`` are the elastic channels by the layer that makes
    them (of attention: heads times their size).
    """

    path: str
    blocks: int
    needed: int
    heads: int
    parts: Mapping[str, Part]
    layers: Callable[[Any], Sequence[int]]
    slices: Mapping[str, Sizes] = field(repr=False)
    norms: Mapping[str, Callable[[Any], int] | None] = field(repr=False)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of the usual expand ratios those that leave whole channels and heads; else those that leave whole heads."""
        units = {part.full // part.unit for part in self.parts.values()}
        usual = [ratio for ratio in RATIOS if all((each * ratio).is_integer() for each in units)]
        if len(usual) == 1 and self.heads:
            return tuple(round(heads / self.heads, 2) for heads in range(1, self.heads + 1))
        return tuple(usual) if self.parts else (1.0,)

    def __str__(self) -> str:
        kind = f"encoder layers, {self.heads} heads each" if self.heads else "residual blocks"
        least = max(1, self.needed)
        depths = f"{least} to {self.blocks}" if least < self.blocks else f"always {self.blocks}"
        inside = [path[len(self.path) + 1 :].partition(".")[2] for path in self.parts]
        counted = Counter(zip(inside, (part.full for part in self.parts.values()), strict=True))
        channels = ", ".join(
            f"{name} ({full})" + ("" if count == self.blocks else f" in {count} of them")
            for (name, full), count in counted.items()
        )
        return f"{self.path}: {self.blocks} {kind}; depth {depths}; elastic channels: {channels or 'none'}"


@dataclass(frozen=True, slots=True)
class Structure:
    """The stages that can be elastic, and for each that looked like one but cannot, the reason."""

    stages: tuple[Stage, ...]
    refused: tuple[str, ...]

    def report(self) -> str:
        """What was found, a line for each stage."""
        found = [f"stage {number}: {stage}" for number, stage in enumerate(self.stages)]
        return "\n".join([*found, *(f"left as it is: {reason}" for reason in self.refused)])

    def elastic(self) -> Elastic:
        """What is to be inserted."""
        return Elastic(
            layers={stage.path: stage.layers for stage in self.stages},
            slices={path: sizes for stage in self.stages for path, sizes in stage.slices.items()},
            norms={path: size for stage in self.stages for path, size in stage.norms.items()},
            stages=tuple(stage.blocks for stage in self.stages),
        )

    def space(self) -> SubnetSpace:
        """All depths that are possible, of encoders those from one half; and the usual ratios, where they fit."""
        depths = []
        for stage in self.stages:
            least = max(1, stage.needed, (stage.blocks + 1) // 2 if stage.heads else 1)
            depths.append(tuple(range(least, stage.blocks + 1)))
        return SubnetSpace(tuple(depths), tuple(stage.ratios for stage in self.stages))

    def check(self, space: SubnetSpace) -> None:
        """Raise SupernetError for a space with depths or ratios that the network cannot have."""
        if len(space.depths) != len(self.stages):
            raise SupernetError(f"the network has {len(self.stages)} stages, but the space has {len(space.depths)}")
        for stage, depths, ratios in zip(self.stages, space.depths, space.expands, strict=True):
            if not max(1, stage.needed) <= depths[0] <= depths[-1] <= stage.blocks:
                raise SupernetError(
                    f"{stage.path}: depths must be {max(1, stage.needed)} to {stage.blocks}, not {list(depths)}"
                )
            for path, part in stage.parts.items():
                units = part.full // part.unit
                used = [round(units * ratio) for ratio in ratios]
                if used[0] < 1 or len(set(used)) < len(used):
                    raise SupernetError(f"{path}: expand ratios {list(ratios)} of {units} leave {used}")


# ------------------------------------------------------------------------------------------------------------ watching


@dataclass(slots=True)
class Watched:
    """What an example's way through the network showed, by module path."""

    linears: list[str] = field(default_factory=list)  # in the order in which they ran
    kept_shape: dict[str, bool] = field(default_factory=dict)  # of blocks
    runs: dict[str, int] = field(default_factory=dict)  # of blocks
    asked: set[str] = field(default_factory=set)  # blocks that turned values into decisions


class _Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the block that is running when a value is taken out of a tensor, as for a branch that depends on it."""

    def __init__(self, watched: Watched, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched, self.running = watched, running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.watched.asked.update(self.running)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def watch(network: nn.Module, blocks: Mapping[str, nn.Module], example: Sequence[Any]) -> Watched:
    """Run the example, in inference mode, and note what the blocks and linear layers do."""
    watched = Watched()
    running: list[str] = []
    hooks: list[Any] = []

    def start(path: str) -> Callable[..., None]:
        return lambda *_: running.append(path)

    def end(path: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            running.remove(path)
            watched.runs[path] = watched.runs.get(path, 0) + 1
            watched.kept_shape[path] = bool(inputs) and _shape(inputs[0]) == _shape(output)

        return note

    for path, module in network.named_modules():
        if path in blocks:
            hooks += [module.register_forward_pre_hook(start(path)), module.register_forward_hook(end(path))]
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda *_, path=path: watched.linears.append(path)))
    training = network.training
    try:
        with _Decisions(watched, running):
            network.eval()(*example)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return watched


def _shape(value: Any) -> Any:
    value = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else None


# ------------------------------------------------------------------------------------------------------------- finding


def examine(network: nn.Module, *example: Any, depth_rule: str = "every-other") -> Structure:
    """What can be elastic in the network; ``example`` are inputs that it takes.

    ``depth_rule``: which layers of a stack of encoders run, "every-other" or "first". Attention with packed weights is
    elastic after ``split_attention`` only. Raises SupernetError, with the reasons, where nothing can be elastic.
    """
    if depth_rule not in ("every-other", "first"):
        raise SupernetError(f"the depth rule must be every-other or first, not {depth_rule!r:.40}")
    candidates = dict(_candidates(network))
    blocks = {f"{path}.{name}": block for path, each in candidates.items() for name, block in each.named_children()}
    try:
        watched = watch(network, blocks, example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SupernetError(f"the example does not fit the network: {first_line(error)}") from error
    finding = _Finding(network, watched, depth_rule)
    for path, container in candidates.items():
        finding.look_at(path, container)
    if not finding.stages:
        reasons = "; ".join(finding.refused) or "no sequence of residual blocks or encoder layers was found"
        raise SupernetError(f"nothing in the network can be elastic: {reasons}")
    return Structure(tuple(finding.stages), tuple(finding.refused))


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Sequences whose members all look like blocks, none inside another."""
    inside = ""
    for path, module in network.named_modules():
        if not path or (inside and path.startswith(inside)):
            continue
        members = list(module.children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
        if members and (all(map(_holds_attention, members)) or all(map(_holds_convolutions, members))):
            inside = f"{path}."
            yield path, module


def _holds_convolutions(block: nn.Module) -> bool:
    nested = isinstance(block, nn.Sequential | nn.ModuleList)
    return not nested and sum(isinstance(module, nn.Conv2d) for module in block.modules()) >= 2


def _holds_attention(block: nn.Module) -> bool:
    nested = isinstance(block, nn.Sequential | nn.ModuleList)
    return not nested and any(_is_attention(module) for module in block.modules())


_TRIPLES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")


def _is_attention(module: nn.Module) -> bool:
    """Split or not: three layers for queries, keys and values, or one for all, and a number of heads."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    packed = isinstance(getattr(module, "qkv", None), nn.Linear)
    return (packed or _triple(module) is not None) and _heads(module) > 0


def _triple(module: nn.Module) -> tuple[str, ...] | None:
    children = dict(module.named_children())
    return next((names for names in _TRIPLES if all(isinstance(children.get(name), nn.Linear) for name in names)), None)


def _heads(module: nn.Module) -> int:
    return next((value for name in _HEADS if type(value := getattr(module, name, None)) is int and value > 0), 0)


class _Finding:
    """Looks at one candidate after the other; collects stages and reasons."""

    def __init__(self, network: nn.Module, watched: Watched, depth_rule: str) -> None:
        self.network, self.watched, self.depth_rule = network, watched, depth_rule
        self.stages: list[Stage] = []
        self.refused: list[str] = []
        self._tied = _tied(network)

    def look_at(self, path: str, container: nn.Module) -> None:
        blocks = dict(container.named_children())
        try:
            for name, block in blocks.items():
                check_types(block, f"{path}.{name}")
            if any(map(_holds_attention, blocks.values())):
                self.stages.append(self._encoder(path, blocks))
            elif self._adds(path, blocks):
                self.stages.append(self._residual(path, blocks))
        except SupernetError as error:
            self.refused.append(str(error))

    def _adds(self, path: str, blocks: Mapping[str, nn.Module]) -> bool:
        """Whether all members are residual: somewhere inside, two tensors are added."""
        return all(
            any(_is_addition(node) for node in traced(block, f"{path}.{name}").nodes) for name, block in blocks.items()
        )

    def _check(self, path: str, blocks: Mapping[str, nn.Module]) -> None:
        for name, block in blocks.items():
            where = f"{path}.{name}"
            if where in self.watched.asked:
                raise SupernetError(f"block '{where}' has control flow that depends on data")
            if self.watched.runs.get(where) != 1:
                times = self.watched.runs.get(where, 0)
                raise SupernetError(f"block '{where}' runs {times} times on the example; it must run once")
            for parameter, value in block.named_parameters():
                if id(value) in self._tied:
                    others = [each for each in self._tied[id(value)] if each != f"{where}.{parameter}"]
                    raise SupernetError(f"{where}.{parameter} is tied: it is {others[0] if others else 'another'} too")

    def _needed(self, path: str, blocks: Mapping[str, nn.Module]) -> int:
        kept = [self.watched.kept_shape[f"{path}.{name}"] for name in blocks]
        return max((number + 1 for number, same in enumerate(kept) if not same), default=0)

    def _residual(self, path: str, blocks: Mapping[str, nn.Module]) -> Stage:
        self._check(path, blocks)
        finding, index = ResidualFinding(self.network), len(self.stages)
        finding.stage(index, path)
        needed = self._needed(path, blocks)
        parts = {where: sizes.outputs for where, sizes in finding.slices.items() if isinstance(sizes.outputs, Part)}
        if not parts and needed == len(blocks):
            raise SupernetError(f"'{path}': no block can be left out, and no convolution be narrowed")
        return Stage(path, len(blocks), needed, 0, parts, First(index), finding.slices, finding.norms)

    def _encoder(self, path: str, blocks: Mapping[str, nn.Module]) -> Stage:
        self._check(path, blocks)
        index, heads = len(self.stages), set()
        slices: dict[str, Sizes] = {}
        parts: dict[str, Part] = {}
        for name, block in blocks.items():
            layers = self._layers(f"{path}.{name}", block)
            attended = Part(index, layers.width, layers.width // layers.heads)
            inner = Part(index, self.network.get_submodule(layers.first).out_features)  # type: ignore[arg-type]
            slices |= {each: Sizes(outputs=attended) for each in layers.projections}
            slices |= {layers.output: Sizes(inputs=attended), layers.first: Sizes(outputs=inner)}
            slices[layers.second] = Sizes(inputs=inner)
            parts |= {layers.projections[0]: attended, layers.first: inner}
            heads.add(layers.heads)
        if len(heads) > 1:
            raise SupernetError(f"'{path}': layers differ in their number of heads")
        needed = self._needed(path, blocks)
        if needed:
            raise SupernetError(f"'{path}': layer {needed - 1} changes the shape of what it is given")
        rule: Callable[[Any], Sequence[int]] = (
            EveryOther(index, len(blocks)) if self.depth_rule == "every-other" else First(index)
        )
        return Stage(path, len(blocks), 0, heads.pop(), parts, rule, slices, {})

    def _layers(self, where: str, block: nn.Module) -> EncoderLayers:
        """The linear layers of an encoder layer, by what they are for."""
        attentions = [(name, module) for name, module in block.named_modules() if _is_attention(module)]
        if len(attentions) != 1:
            raise SupernetError(f"block '{where}' has {len(attentions)} attentions; one is expected")
        [(inside, attention)] = attentions
        names, heads = _triple(attention), _heads(attention)
        if names is None:
            raise SupernetError(f"{where}.{inside}: attention of type {type(attention).__name__} cannot be split")
        projections = [".".join(filter(None, (where, inside, name))) for name in names]
        ran = [path for path in self.watched.linears if path.startswith(f"{where}.")]
        rest = [path for path in ran if path not in projections]
        sizes = [self._size(path) for path in rest]
        width = self._size(projections[0]).outputs
        if any(self._size(path).outputs != width for path in projections) or width % heads:
            raise SupernetError(f"{where}.{inside}: queries, keys and values must have {heads} heads of one size")
        fits = len(ran) == 6 and len(rest) == 3 and sizes[0].inputs == width and sizes[1].outputs == sizes[2].inputs
        if not fits:
            raise SupernetError(
                f"block '{where}': after queries, keys and values an output layer and two more linear layers are "
                f"expected, but these ran: {', '.join(path.removeprefix(f'{where}.') for path in ran)}"
            )
        return EncoderLayers(heads, width, tuple(projections), *rest)

    def _size(self, path: str) -> _Size:
        layer: Any = self.network.get_submodule(path)
        return _Size(layer.in_features, layer.out_features)


@dataclass(frozen=True, slots=True)
class _Size:
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class EncoderLayers:
    """Paths of an encoder layer's linear layers: queries, keys and values, the output of attention, and two more."""

    heads: int
    width: int
    projections: tuple[str, ...]
    output: str
    first: str
    second: str


def _is_addition(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    return name in ("add", "iadd") and len(node.all_input_nodes) == 2


def _tied(network: nn.Module) -> dict[int, list[str]]:
    """Parameters that have several names, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}
