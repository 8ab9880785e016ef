"""Executables: an actuated subnet rewritten into the fewest calls that compute it; CPU, float32.

``trace`` follows an actuated subnet once with torch.fx and returns an ``Executable`` that gives the same outputs: batch
norm folded into the convolution before it, activation and residual addition done by oneDNN while it has the result in
cache, 1x1 convolutions as matrix products (steps.py), and all of it in one call where it can be written (programs.py).
It computes from the supernet's weights, folding each slice as it goes; ``Executable.packed`` gives one with weights in
the layout that the kernels read: as fast as a model on its own. ``ExecutableCache`` decides which subnets are held
packed within a budget of memory; large slices that several of them use are held once.

The rewriting goes by type of operation and knows no architecture; what it does not recognise stays as it was.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from programs import NAMES, CannotWriteError, Hold, available, lines_of, program_of
from steps import (
    Average,
    Call,
    Convolution,
    Convolve,
    ConvolveAndAdd,
    ConvolveAndMultiply,
    ConvolveNarrowly,
    Larder,
    Multiply,
    Norm,
    Step,
)
from supernet import ActuatedSubnet, SubnetNorm, WeightSlice

_ADDITIONS = (operator.add, torch.add)  # torch.fx writes += as +
_RELUS = (F.relu, torch.relu, torch.relu_)
# Modules that are a function of their input, which some may overwrite.
_ACTIVATIONS: Mapping[type[nn.Module], str] = {
    nn.ReLU: NAMES[F.relu], nn.Hardswish: NAMES[F.hardswish], nn.Hardsigmoid: NAMES[F.hardsigmoid],
    nn.SiLU: NAMES[F.silu], nn.ReLU6: "torch._C._nn.relu6", nn.Sigmoid: "torch.sigmoid",
}  # fmt: skip
# Programs take memory by the node, in part for each size of batch: those of deep networks are for the few that are
# packed, and count as held (another such subnet of OFA MobileNet added 25 to 36 kB a node to a process, beside its
# weights). Those of smaller networks are written even if nothing is held, so that they do not count.
DEEP, PROGRAM_BYTES_A_NODE = 64, 40_000
_NUMBERS = ("size", "dim", "numel", "ndimension", "item")  # methods that give no tensor


class CannotFuseError(RuntimeError):
    """A subnet that cannot be made an executable, or a torch that cannot run one; says why."""


# --------------------------------------------------------------------------------------------------------- executables


class Executable:
    """A subnet as a flat sequence of steps; immutable, safe to call from several threads at once.

    ``packed``: steps by those of the network's graph that they replace. An executable that has such has no part in a
    reference cycle, as all graphs and modules of torch.fx have: its weights are to be freed when it is let go, and not
    at some collection of garbage, which hardly ever looks at what is so old.
    """

    def __init__(self, network: fx.GraphModule, packed: Mapping[Step, Step] | None = None) -> None:
        self._network = network
        self._steps = {step: step for step in _steps(network.graph)} if packed is None else dict(packed)
        self._written: dict[bool, Callable[[Tensor], Tensor]] = {}
        self.packs = frozenset(pack for step in self._steps.values() for pack in step.packs)
        nodes = len(network.graph.nodes)
        self._deep = nodes > DEEP
        self._packed_program_nbytes = PROGRAM_BYTES_A_NODE * nodes if self._deep and self._has_program() else 0

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a batch of inputs (N, C, H, W), channels-last in memory."""
        many = x.shape[0] > 1
        run = self._written.get(many) or self.write(many)
        return run(x)

    def write(self, many: bool) -> Callable[[Tensor], Tensor]:
        """Get ready for batches of one or of ``many``, which the first such batch would have to wait for otherwise."""
        self._written[many] = run = self._program(many)
        return run

    def _program(self, many: bool) -> Callable[[Tensor], Tensor]:
        """All of it as one program; step by step where not all of it can be written, or it is deep and not packed."""
        if self._deep and not self.packs:
            return self._stepwise(many)
        try:
            return program_of(1, functools.partial(self._lines, many=many))
        except (CannotWriteError, RuntimeError):
            return self._stepwise(many)

    def _lines(self, names: Sequence[str], hold: Hold, many: bool) -> Iterable[str]:
        def target(node: fx.Node) -> Any:
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(self._network)
            return self._steps.get(node.target, node.target)  # type: ignore[call-overload]

        return lines_of(self._network.graph, names, hold, many, target)

    def _has_program(self) -> bool:
        """Whether it becomes one program when it is packed."""
        try:
            list(self._lines(["x"], lambda _: "weight", many=True))
        except CannotWriteError:
            return False
        return any(part.packed_nbytes for step in self.steps for part in step.parts)

    def _stepwise(self, many: bool) -> Callable[[Tensor], Tensor]:
        for node in self._network.graph.nodes:
            if isinstance(node.target, Step):
                self._steps[node.target].write(len(node.args), many)
        forward = cast(MethodType, self._network.forward).__func__
        names = {
            name: self._steps.get(each, each) if isinstance(each, Step) else each
            for name, each in forward.__globals__.items()
        }
        return MethodType(FunctionType(forward.__code__, names, argdefs=forward.__defaults__), self._network)

    @property
    def nbytes(self) -> int:
        """What it holds, alone or with others: packed weights, and its program if that counts."""
        return sum(pack.nbytes for pack in self.packs) + self.program_nbytes

    @property
    def program_nbytes(self) -> int:
        """What its program takes of that."""
        return self._packed_program_nbytes if self.packs else 0

    @property
    def steps(self) -> Iterable[Step]:
        """What it calls, but for functions of torch."""
        return self._steps.values()

    @torch.no_grad()
    def packed(self, larder: Larder | None = None) -> Executable:
        """The same subnet with weights ready for the kernels, all of its own unless there is a larder."""
        larder = Larder() if larder is None else larder
        return Executable(self._network, {step: each.packed(larder) for step, each in self._steps.items()})

    def needs(self, larder: Larder) -> Mapping[Any, int]:
        """Bytes of what it holds if it is packed, and else would hold, by what tells that from what others hold."""
        parts = (part for step in self._steps.values() for part in step.parts)
        needs: dict[Any, int] = {part.slice if larder.shares(part) else part: part.packed_nbytes for part in parts}
        return needs | {self: self._packed_program_nbytes}


def _steps(graph: fx.Graph) -> Iterable[Step]:
    return (node.target for node in graph.nodes if isinstance(node.target, Step))


def can_fuse() -> bool:
    """Whether this torch has the kernels."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and hasattr(torch.ops.mkldnn, "_convolution_pointwise_") and available()


class _Tracer(fx.Tracer):
    """Follows one thread: while it traces, torch.fx passes to it what every thread does with modules."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, WeightSlice | SubnetNorm) or super().is_leaf_module(module, qualified_name)


_tracing = threading.Lock()  # two tracers would replace methods of nn.Module at once


@torch.no_grad()
def trace(actuated: ActuatedSubnet) -> Executable:
    """The executable of an actuated subnet, on shared weights.

    Raises CannotFuseError where the network has control flow that depends on data, takes several inputs, or torch has
    no oneDNN.
    """
    if not can_fuse():
        raise CannotFuseError("this torch has no oneDNN, or no TorchScript")
    try:
        with _tracing, actuated.active():
            graph = _Tracer().trace(actuated.network)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError) as error:
        raise CannotFuseError(f"the network has control flow that depends on data: {error}") from error
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise CannotFuseError("the network has several inputs")
    _Rewriting(actuated, graph).run()
    graph.lint()
    return Executable(fx.GraphModule(actuated.network, graph))


class _Rewriting:
    """One pass over a traced subnet, from modules to steps."""

    def __init__(self, actuated: ActuatedSubnet, graph: fx.Graph) -> None:
        self._actuated, self._graph = actuated, graph
        self._layers: dict[fx.Node, Convolution] = {}

    def run(self) -> None:
        for rewrite in (
            self._drop_identities, self._fold_norms, self._fuse_convolutions, self._join_products, self._call_functions,
            self._overwrite,
        ):  # fmt: skip
            rewrite()
            for node in reversed(self._graph.nodes):
                if not node.users and node.op not in ("placeholder", "output") and not self._writes(node):
                    self._graph.erase_node(node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._actuated.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _drop_identities(self) -> None:
        for node in self._graph.nodes:
            if isinstance(self._module(node), nn.Identity | nn.Dropout | nn.Dropout2d):
                node.replace_all_uses_with(node.args[0])
                self._graph.erase_node(node)

    def _fold_norms(self) -> None:
        """Find the convolutions; a norm after one becomes part of it."""
        for node in self._graph.nodes:
            module, source = self._module(node), node.args[0] if node.args else None
            layer = _convolution_of(module, self._actuated)
            if layer is not None:
                self._layers[node] = layer
            norm = _norm_of(module, self._actuated)
            if norm is not None and source in self._layers and len(source.users) == 1:
                self._layers[source] = self._layers[source].followed_by(norm)
                node.replace_all_uses_with(source)

    def _fuse_convolutions(self) -> None:
        for node, layer in self._layers.items():
            self._fuse_convolution(node, layer)

    def _fuse_convolution(self, node: fx.Node, layer: Convolution) -> None:
        """A convolution becomes one step, with the addition and the activation that follow it where they can."""
        addition, residual = self._addition_after(node)
        relu = _only_user(addition or node, self._is_relu)
        activation = "relu" if relu else "none"
        replaced = [each for each in (relu, addition, node) if each is not None]
        step: Step
        if residual is not None:
            step = ConvolveAndAdd(layer, activation)
        elif relu is None and layer.pointwise:
            step = Multiply(layer)
        else:
            step = (ConvolveNarrowly if ConvolveNarrowly.suits(layer) else Convolve)(layer, activation)
        arguments = (node.args[0],) if residual is None else (node.args[0], residual)
        self._replace(replaced[0], step, arguments, addition or node)
        for dead in replaced:
            self._graph.erase_node(dead)

    def _addition_after(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition of two tensors that alone reads this convolution, if it should do it; and what else it adds."""
        addition = _only_user(node, lambda user: user.op == "call_function" and user.target in _ADDITIONS)
        if addition is None or len(addition.all_input_nodes) != 2 or addition.kwargs:
            return None, None
        if any(map(self._writes, _between(node, addition))):
            return None, None  # computed later, the convolution could read what was overwritten meanwhile
        (other,) = (each for each in addition.all_input_nodes if each is not node)
        if other.op == "call_method" and other.target in _NUMBERS:
            return None, None
        if other in self._layers and self._layers[node].pointwise:
            return None, None  # of a shortcut and the branch beside it, the larger convolution does it
        return addition, other

    def _join_products(self) -> None:
        """The 1x1 convolution of a shortcut becomes part of the step that adds it, if nothing else reads it."""
        for node in self._graph.nodes:
            if not isinstance(node.target, ConvolveAndAdd):
                continue
            x, residual = node.args
            alone = isinstance(residual.target, Multiply) and len(residual.users) == 1 and residual is not x
            if alone and not any(map(self._writes, _between(residual, node))):
                self._join(node, x, residual)

    def _join(self, node: fx.Node, x: fx.Node, residual: fx.Node) -> None:
        step = cast(ConvolveAndAdd, node.target).joined(cast(Multiply, residual.target))
        if step is not None:
            self._replace(node, step, (x, *residual.args), node)
            for dead in (node, residual):
                self._graph.erase_node(dead)

    def _writes(self, node: fx.Node) -> bool:
        """Whether it may change in place what it reads."""
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        name = getattr(node.target, "__name__", str(node.target))
        return name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), nn.ReLU)
        return node.target in (_RELUS if node.op == "call_function" else ("relu", "relu_"))

    def _call_functions(self) -> None:
        for node in self._graph.nodes:
            if _averages_pixels(node):
                self._replace(node, Average(bool(node.kwargs.get("keepdim", False))), node.args[:1], node)
            step = _call_of(self._module(node), self._actuated)
            if step is not None and len(node.args) == 1 and (not self._writes(node) or _is_alone(node)):
                self._replace(node, step, node.args, node)
                self._graph.erase_node(node)

    def _overwrite(self) -> None:
        """Additions take the memory of what nothing else needs afterwards; last, when every step has its place."""
        for node in self._graph.nodes:
            sums = isinstance(node.target, ConvolveAndAdd) and not isinstance(node.target, ConvolveAndMultiply)
            if sums and _may_overwrite(node):
                node.target.overwrite()

    def _replace(self, node: fx.Node, step: Step, arguments: tuple[Any, ...], place: fx.Node) -> None:
        with self._graph.inserting_before(place):
            node.replace_all_uses_with(self._graph.call_function(cast("Callable[..., Any]", step), arguments))


def _convolution_of(module: nn.Module | None, actuated: ActuatedSubnet) -> Convolution | None:
    if isinstance(module, WeightSlice):
        weight, bias, form = actuated.settings[module.slot]
        if form is not None and not isinstance(form["padding"], str):
            return _undilated(Convolution(weight, bias, **form))
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        stride, padding, dilation = ((each[0], each[1]) for each in (module.stride, module.padding, module.dilation))
        return _undilated(Convolution(module.weight, module.bias, stride, padding, dilation, module.groups))
    return None


def _undilated(layer: Convolution) -> Convolution:
    """The same without a dilation of what is one wide, which says nothing; oneDNN crashes on some such."""
    sizes = zip(layer.weight.shape[2:], layer.dilation, strict=True)
    down, across = (1 if size == 1 else dilation for size, dilation in sizes)
    return replace(layer, dilation=(down, across))


def _norm_of(module: nn.Module | None, actuated: ActuatedSubnet) -> Norm | None:
    if isinstance(module, SubnetNorm):
        mean, var, weight, bias, _ = actuated.settings[module.slot]
        return Norm(mean, var, weight, bias, module.eps)
    return None


def _call_of(module: nn.Module | None, actuated: ActuatedSubnet) -> Call | None:
    """The call that stands for a pooling layer, a linear layer or a norm after something else; None for others."""
    match module:
        case nn.MaxPool2d(return_indices=False) as pool:
            form = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
            return Call("max_pool", "torch.max_pool2d", *form)
        case nn.AvgPool2d(divisor_override=None) as pool:
            form = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad
            return Call("avg_pool", "torch._C._nn.avg_pool2d", *form)
        case nn.AdaptiveAvgPool2d() as pool:
            return Call("adaptive_avg_pool", NAMES[F.adaptive_avg_pool2d], pool.output_size)
        case nn.Linear() as layer:
            return Call("linear", "torch._C._nn.linear", layer.weight, layer.bias)
        case nn.Module() if type(module) in _ACTIVATIONS:
            return Call("activation", _ACTIVATIONS[type(module)])
        case WeightSlice() as layer:
            weight, bias, form = actuated.settings[layer.slot]
            if form is None:
                return Call("linear", "torch._C._nn.linear", weight, bias)
            return Call("convolution", "torch.conv2d", weight, bias, *form.values())  # padded by name
        case SubnetNorm() as norm:
            mean, var, weight, bias, _ = actuated.settings[norm.slot]
            return Call("norm", "torch.batch_norm", weight, bias, mean, var, False, 0.0, norm.eps, False)
    return None


def _averages_pixels(node: fx.Node) -> bool:
    called = (node.op, node.target) in (("call_method", "mean"), ("call_function", torch.mean))
    if not called or len(node.args) != 2 or set(node.kwargs) - {"keepdim"}:
        return False
    axes = node.args[1]
    return isinstance(axes, tuple | list) and set(axes) == {2, 3} and len(axes) == 2


def _is_alone(node: fx.Node) -> bool:
    """Whether nothing else reads what this node reads, and may overwrite: the result of a step, which is no view."""
    (source,) = node.all_input_nodes
    return isinstance(source.target, Step) and len(source.users) == 1


def _only_user(node: fx.Node, fits: Callable[[fx.Node], bool]) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and fits(users[0]) else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _may_overwrite(end: fx.Node) -> bool:
    """Whether the residual of an addition has memory of its own that nothing needs while and after it is computed.

    Steps give no views; anything else that reads the residual may.
    """
    x, residual = cast("tuple[fx.Node, fx.Node]", end.args)
    reads = (user is end or (user < end and isinstance(user.target, Step)) for user in residual.users)
    return isinstance(residual.target, Step) and residual is not x and all(reads)


# --------------------------------------------------------------------------------------------------------------- cache


class ExecutableCache:
    """Which subnets are held packed, within a budget in bytes; the others run on shared weights.

    ``fill`` holds the subnets that are named first; afterwards ``rebalance`` gives the budget to those that were used
    most of late. Safe to use from several threads; a batch that runs on an executable keeps it until it ends.
    """

    REBALANCE_EVERY = 256  # uses of subnets that are not held

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._shared: dict[str, Executable | ActuatedSubnet] = {}
        self._packed: dict[str, Executable] = {}
        self._larder = Larder()
        self._order: list[str] = []  # as named by fill: what comes first is preferred among equals
        self._uses: Counter[str] = Counter()
        self._misses = 0
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._shared

    def add(self, name: str, actuated: ActuatedSubnet) -> None:
        """Make a subnet known; it runs as it is where it cannot be made an executable."""
        if name not in self._shared:
            shared: Executable | ActuatedSubnet
            try:
                shared = trace(actuated)
            except CannotFuseError:
                shared = actuated
            if self._shared.setdefault(name, shared) is shared:  # another thread may have been faster
                self._order.append(name)
                if isinstance(shared, Executable):
                    self._larder.add(shared.steps)

    def get(self, name: str) -> Executable | ActuatedSubnet:
        """What runs this subnet best now; KeyError for one that was not added."""
        self._uses[name] += 1
        packed = self._packed.get(name)
        if packed is not None:
            return packed
        shared = self._shared[name]
        self._misses += isinstance(shared, Executable)
        return shared

    @property
    def nbytes(self) -> int:
        """What the packed executables hold."""
        packed = list(self._packed.values())
        packs = {pack for each in packed for pack in each.packs}
        return sum(pack.nbytes for pack in packs) + sum(each.program_nbytes for each in packed)

    @property
    def held(self) -> tuple[str, ...]:
        """The subnets that are held packed."""
        return tuple(self._packed)

    def fill(self, step: Callable[[], object] = lambda: None) -> None:
        """Hold subnets in the order in which they were added, as far as the budget goes; ``step`` after each.

        Those left out are written now, too: that keeps the interpreter, which batches in service would wait for.
        """
        self._hold(self._order, step)
        for name in self._order:
            shared = self._shared[name]
            if name not in self._packed and isinstance(shared, Executable):
                shared.write(many=False)
                shared.write(many=True)

    def drop(self) -> None:
        """Hold nothing, and nothing ever again: memory has run out."""
        self.budget = 0
        self._hold((), lambda: None)

    @property
    def stale(self) -> bool:
        """Whether so many batches ran on subnets not held that ``rebalance`` should look at it."""
        return self._misses >= self.REBALANCE_EVERY

    def rebalance(self) -> None:
        """Hold the subnets that were used most of late; what was used longer ago counts half as much each time."""
        self._misses = 0
        by_use = sorted(self._order, key=lambda name: -self._uses[name])
        self._hold(by_use, lambda: None)
        for name in self._order:
            self._uses[name] //= 2

    def _chosen(self, order: Iterable[str]) -> list[str]:
        held: dict[Any, int] = {}
        left, chosen = self.budget, []
        for name in order:
            found = self._packed.get(name, self._shared[name])
            if not isinstance(found, Executable):
                continue
            needs = {each: nbytes for each, nbytes in found.needs(self._larder).items() if each not in held}
            if sum(needs.values()) <= left:
                left -= sum(needs.values())
                held |= needs
                chosen.append(name)
        return chosen

    def _hold(self, order: Iterable[str], step: Callable[[], object]) -> None:
        """Drop first, then pack, so that the budget holds throughout."""
        with self._lock:
            names = self._chosen(order)
            for name in set(self._packed) - set(names):
                del self._packed[name]
            for name in names:
                if name not in self._packed:
                    packed = cast(Executable, self._shared[name]).packed(self._larder)
                    packed.write(many=False)
                    packed.write(many=True)
                    self._packed[name] = packed
                step()
