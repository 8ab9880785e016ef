"""A supernet from a network that was not written for it: insertion, importance, and the proof that nothing changed.

``make_elastic`` finds what can be elastic (structure.py), sorts channels and heads so that what matters most comes
first, inserts the operators, and checks on an example that the largest subnet computes what the network did, and that
narrow subnets compute what the network would if nothing read the channels that are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention import split_attention
from operators import Elastic
from structure import Structure, examine, first_line
from subnets import Subnet, SubnetSpace, SupernetError
from supernet import Supernet

TOLERANCE = 1e-3  # of the largest value, in single precision: order of addition differs


@dataclass(frozen=True, slots=True)
class Insertion:
    """A supernet, and what was found in the network that it is made of."""

    supernet: Supernet
    structure: Structure


@torch.no_grad()
def make_elastic(
    network: nn.Module, *example: Any, space: SubnetSpace | None = None, sort: bool = True,
    depth_rule: str = "every-other",
) -> Insertion:  # fmt: skip
    """Make, in place, a supernet of a plain network; ``example`` are inputs that it takes.

    ``space``: its subnets (default: ``Structure.space``). ``sort``: order channels and heads by importance. Raises
    SupernetError with what cannot be elastic, and why; the network's weights may have been reordered by then, which
    changes nothing that it computes.
    """
    expected = _outcome(network.eval(), example)
    split_attention(network)
    structure = examine(network, *example, depth_rule=depth_rule)
    space = space or structure.space()
    structure.check(space)
    elastic = structure.elastic()
    if sort:
        sort_channels(network, elastic)
    proof = SubnetSpace(
        tuple((stage.blocks,) for stage in structure.stages),
        tuple(tuple(sorted({ratios[0], 1.0})) for ratios in space.expands),
    )
    disconnected = _outputs_disconnected(network, elastic, proof.smallest, example)
    supernet = Supernet(network, elastic, proof)
    _check_largest(supernet, expected, example)
    _check_narrow(supernet, proof.smallest, disconnected, example)
    return Insertion(supernet.restricted(space), structure)


def _outcome(network: nn.Module, example: Sequence[Any]) -> Tensor:
    try:
        return _tensor(network(*example))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SupernetError(f"the example does not fit the network: {first_line(error)}") from error


def _tensor(output: Any) -> Tensor:
    """The tensor of an output: itself, its logits, or the first of several."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise SupernetError(f"the network gives a {type(output).__name__}; a tensor is expected")
    return found


# -------------------------------------------------------------------------------------------------- what matters most


@dataclass(slots=True)
class Group:
    """Layers that share channels: those that make them, their norms, and those that read them."""

    unit: int = 1
    makers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def groups_of(elastic: Elastic) -> list[Group]:
    """The groups of what is elastic; layers of the same have the same size function."""
    groups: dict[int, Group] = {}

    def group(size: Any) -> Group:
        return groups.setdefault(id(size), Group(getattr(size, "unit", 1)))

    for path, sizes in elastic.slices.items():
        if sizes.outputs is not None:
            group(sizes.outputs).makers.append(path)
        if sizes.inputs is not None:
            group(sizes.inputs).readers.append(path)
    for path, size in elastic.norms.items():
        if size is not None:
            group(size).norms.append(path)
    return [each for each in groups.values() if each.makers]


@torch.no_grad()
def sort_channels(network: nn.Module, elastic: Elastic) -> None:
    """Reorder elastic channels (of attention: heads) by how much the layers that read them weigh them, most first.

    Importance is the L1 norm of the readers' weights, as in Once-for-All. Only the order in memory changes, so that
    the largest subnet computes what it did, and smaller ones, which use the leading part, keep what matters most.
    """
    for group in groups_of(elastic):
        if not group.readers:
            continue
        weights = [_weight(network, path).abs().float() for path in group.readers]
        importance = torch.stack([each.transpose(0, 1).flatten(1).sum(1) for each in weights]).sum(0)
        units = importance.view(-1, group.unit).sum(1).argsort(descending=True, stable=True)
        order = (units[:, None] * group.unit + torch.arange(group.unit, device=units.device)).flatten()
        for path in (*group.makers, *group.norms):
            module = network.get_submodule(path)
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is not None and value.dim():
                    value.copy_(value[order])
        for path in group.readers:
            weight = _weight(network, path)
            weight.copy_(weight[:, order])


def _weight(network: nn.Module, path: str) -> Tensor:
    return network.get_parameter(f"{path}.weight").detach()


# ---------------------------------------------------------------------------------------------------------------- proof


def _outputs_disconnected(
    network: nn.Module, elastic: Elastic, subnet: Subnet, example: Sequence[Any]
) -> dict[str, Tensor]:
    """What readers in the plain network give of the subnet's channels, when they read none but the subnet's."""
    readers = {path: sizes for path, sizes in elastic.slices.items() if sizes.inputs is not None}
    kept = {path: _weight(network, path).clone() for path in readers}
    for path, sizes in readers.items():
        _weight(network, path)[:, sizes.inputs(subnet) :] = 0  # type: ignore[misc]
    used = {path: sizes.outputs(subnet) if sizes.outputs else None for path, sizes in readers.items()}
    try:
        return _outputs(network, used, lambda: network(*example))
    finally:
        for path, weight in kept.items():
            _weight(network, path).copy_(weight)


def _outputs(network: nn.Module, used: Mapping[str, int | None], run: Callable[[], Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(path: str, channels: int | None) -> Callable[..., None]:
        def hook(module: Any, _: Any, output: Tensor) -> None:
            axis = 1 if module.weight.dim() == 4 else output.dim() - 1
            found[path] = output.narrow(axis, 0, channels or output.shape[axis]).clone()

        return hook

    hooks = [
        network.get_submodule(path).register_forward_hook(keep(path, channels)) for path, channels in used.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return bool(torch.isfinite(ours).all()) and float((ours - theirs).abs().max()) <= TOLERANCE * scale + 1e-6


def _check_largest(supernet: Supernet, expected: Tensor, example: Sequence[Any]) -> None:
    if not _close(_tensor(supernet.actuate(supernet.space.largest)(*example)), expected):
        raise SupernetError("with the operators inserted the network computes something else")


def _check_narrow(supernet: Supernet, subnet: Subnet, expected: Mapping[str, Tensor], example: Sequence[Any]) -> None:
    actuated = supernet.actuate(subnet)
    try:
        found = _outputs(supernet.network, dict.fromkeys(expected), lambda: actuated(*example))
    except RuntimeError as error:
        raise SupernetError(f"the network does not run with fewer channels or heads: {first_line(error)}") from error
    for path, theirs in expected.items():
        if not _close(found[path], theirs):
            raise SupernetError(f"{path}: what is computed before it mixes channels, so that none can be left out")
