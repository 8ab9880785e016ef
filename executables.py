"""Executables: an actuated subnet rewritten into the fewest calls that compute it; CPU, float32.

``trace`` follows an actuated subnet once with torch.fx and returns an ``Executable`` that gives the same outputs: batch
norm folded into the convolution before it, activation and residual addition done by oneDNN while it has the result in
cache, 1x1 convolutions as matrix products, and no module, context variable or look-up on the way. It computes from the
shared weights, folding each slice as it goes; ``Executable.packed`` gives one that holds its own folded weights in the
layout that the kernels read: as fast as a model on its own, and as large. ``ExecutableCache`` decides which subnets are
held packed within a budget of memory.

The rewriting goes by type of operation and knows no architecture; what it does not recognise stays as it was.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from supernet import ActuatedSubnet, SubnetNorm, WeightSlice

_ADDITIONS = (operator.add, torch.add)  # torch.fx writes += as +
_RELUS = (F.relu, torch.relu, torch.relu_)


class CannotFuseError(RuntimeError):
    """A subnet that cannot be made an executable, or a torch that cannot run one; says why."""


# --------------------------------------------------------------------------------------------------------------- steps


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


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Statistics and affine weights of a batch norm in evaluation."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Step:
    """What the rewritten network calls in place of a module; a plain callable, since modules make small calls slow."""

    nbytes = 0  # that it holds of its own
    packed_nbytes = 0  # that it would hold when packed

    def __init__(self, name: str) -> None:
        self.__name__ = name  # torch.fx writes it into the code that it generates

    def packed(self) -> Step:
        """The same step with weights of its own, in the kernels' layout; itself where nothing is gained."""
        return self


class Call(Step):
    """A function with its settings."""

    def __init__(self, name: str, function: Callable[..., Tensor], *settings: Any) -> None:
        super().__init__(name)
        self._function, self._settings = function, settings

    def __call__(self, x: Tensor) -> Tensor:
        """The function of ``x`` and the settings."""
        return self._function(x, *self._settings)


class Convolve(Step):
    """A convolution with bias and activation as one oneDNN call."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        """``activation``: none or relu."""
        super().__init__("convolution")
        self._layer, self._activation = layer, activation
        self._bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        self._form = layer.padding, layer.stride, layer.dilation, layer.groups
        self.packed_nbytes = _packed_nbytes(tuple(layer.weight.shape), *self._form)
        self._packed: Tensor | None = None
        self._kernel = torch.ops.mkldnn._convolution_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """Activation of the convolution."""
        if self._packed is None and x.shape[0] == 1:
            return self._unfused(x, None)
        return cast(Tensor, self._kernel(x, self._weight(), self._bias, *self._form, self._activation, [], ""))

    def _unfused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """For one image, folding and reordering the weights costs more than passing over the outputs again."""
        layer = self._layer
        outputs = torch.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        bias = self._bias.view(-1, 1, 1)
        outputs = outputs.add_(bias) if layer.scale is None else torch.addcmul(bias, outputs, layer.scale[:, :, 0])
        if residual is not None:
            outputs = outputs.add_(residual) if residual.shape == outputs.shape else outputs + residual
        return outputs.relu_() if self._activation == "relu" else outputs

    def _weight(self) -> Tensor:
        return self._layer.folded() if self._packed is None else self._packed

    def packed(self) -> Self:  # noqa: D102
        step = self.__class__.__new__(self.__class__)
        step.__dict__.update(self.__dict__)
        step._packed = _packed(self._layer.folded(), *self._form)
        step.nbytes = step.packed_nbytes
        return step


class ConvolveAndAdd(Convolve):
    """A convolution to whose result a residual is added before the activation."""

    def __init__(self, layer: Convolution, activation: str) -> None:
        super().__init__(layer, activation)
        self._kernel, self._overwrites = torch.ops.mkldnn._convolution_pointwise.binary, False
        self._done = "add", 1.0, None if activation == "none" else activation, (), ""
        spans = zip(layer.weight.shape[2:], layer.dilation, layer.padding, strict=True)
        self._reach = [dilation * (size - 1) + 1 - 2 * padding for size, dilation, padding in spans]

    def overwrite(self) -> None:
        """Let the sum take the memory of the residual from now on."""
        self._kernel, self._overwrites = torch.ops.mkldnn._convolution_pointwise_.binary, True

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Activation of (convolution + residual)."""
        if (self._packed is None and x.shape[0] == 1) or not self._fits(x, residual):
            return self._unfused(x, residual)
        first, second = (residual, x) if self._overwrites else (x, residual)
        return cast(Tensor, self._kernel(first, second, self._weight(), self._bias, *self._form, *self._done))

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the shape of the result; the kernels do not broadcast."""
        (batch, _, height, width), (down, across) = x.shape, self._layer.stride
        rows, columns = (height - self._reach[0]) // down + 1, (width - self._reach[1]) // across + 1
        return residual.shape == (batch, self._bias.shape[0], rows, columns)


class Multiply(Step):
    """A 1x1 convolution as a matrix product, which costs less to call; input and output are channels-last."""

    def __init__(self, layer: Convolution) -> None:
        super().__init__("pointwise")
        self._layer, self._matrix = layer, cast("Tensor | None", None)
        self.packed_nbytes = 4 * layer.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution."""
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        matrix = self._layer.folded().flatten(1).t() if self._matrix is None else self._matrix
        bias = self._layer.bias
        product = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        return product.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def packed(self) -> Multiply:  # noqa: D102
        step = Multiply(self._layer)
        step._matrix = self._layer.folded().flatten(1).t().contiguous()
        step.nbytes = step.packed_nbytes
        return step


def _packed(weight: Tensor, *form: Any) -> Tensor:
    plain = weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *form, None)  # type: ignore[call-arg]


@functools.cache
def _packed_nbytes(shape: tuple[int, ...], *form: Any) -> int:
    """What a convolution's weight takes in the kernels' layout, which fills channels up to whole vectors."""
    return int(torch.ops.mkldnn._nbytes(_packed(torch.zeros(shape), *form)))


# --------------------------------------------------------------------------------------------------------- executables


class Executable:
    """A subnet as a flat sequence of steps; immutable, safe to call from several threads at once.

    ``names``: what the names in the network's code stand for; what it was generated with unless given. One that
    is packed has no part in a reference cycle, as all graphs and modules of torch.fx have: its weights are to be freed
    when it is let go, and not at some collection of garbage, which hardly ever looks at what is so old.
    """

    def __init__(self, network: fx.GraphModule, names: Mapping[str, Any] | None = None) -> None:
        forward = cast(MethodType, network.forward).__func__
        self._network, self._names = network, dict(forward.__globals__ if names is None else names)
        self._run = MethodType(FunctionType(forward.__code__, self._names, argdefs=forward.__defaults__), network)
        self.nbytes = sum(step.nbytes for step in _steps(self._names))

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a batch of inputs (N, C, H, W), channels-last in memory."""
        return cast(Tensor, self._run(x))

    @property
    def packed_nbytes(self) -> int:
        """How much memory ``packed`` would take."""
        return sum(step.packed_nbytes for step in _steps(self._names))

    @torch.no_grad()
    def packed(self) -> Executable:
        """The same subnet with weights of its own, ready for the kernels."""
        names = {name: each.packed() if isinstance(each, Step) else each for name, each in self._names.items()}
        return Executable(self._network, names)


def _steps(names: Mapping[str, Any]) -> Iterable[Step]:
    return (each for each in names.values() if isinstance(each, Step))


def can_fuse() -> bool:
    """Whether this torch has the kernels."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


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
        raise CannotFuseError("this torch was built without oneDNN")
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
            self._drop_identities, self._fold_norms, self._fuse_convolutions, self._call_functions, self._overwrite
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
            step = Convolve(layer, activation)
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
        if other in self._layers and self._layers[node].pointwise:
            return None, None  # of a shortcut and the branch beside it, the larger convolution does it
        return addition, other

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
            step = _call_of(self._module(node), self._actuated)
            if step is not None and len(node.args) == 1:
                self._replace(node, step, node.args, node)

    def _overwrite(self) -> None:
        """Additions take the memory of what nothing else needs afterwards; last, when every step has its place."""
        for node in self._graph.nodes:
            if isinstance(node.target, ConvolveAndAdd) and _may_overwrite(node):
                node.target.overwrite()

    def _replace(self, node: fx.Node, step: Step, arguments: tuple[Any, ...], place: fx.Node) -> None:
        with self._graph.inserting_before(place):
            node.replace_all_uses_with(self._graph.call_function(cast("Callable[..., Any]", step), arguments))


def _convolution_of(module: nn.Module | None, actuated: ActuatedSubnet) -> Convolution | None:
    if isinstance(module, WeightSlice):
        weight, bias, form = actuated.settings[module.slot]
        if form is not None and not isinstance(form["padding"], str):
            return Convolution(weight, bias, **form)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        stride, padding, dilation = ((each[0], each[1]) for each in (module.stride, module.padding, module.dilation))
        return Convolution(module.weight, module.bias, stride, padding, dilation, module.groups)
    return None


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
            return Call("max_pool", torch.max_pool2d, *form)
        case nn.AvgPool2d(divisor_override=None) as pool:
            form = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad
            return Call("avg_pool", torch._C._nn.avg_pool2d, *form)
        case nn.Linear() as layer:
            return Call("linear", F.linear, layer.weight, layer.bias)
        case WeightSlice() as layer:
            weight, bias, form = actuated.settings[layer.slot]
            if form is None:
                return Call("linear", F.linear, weight, bias)
            return Call("convolution", torch.conv2d, weight, bias, *form.values())  # padded by name
        case SubnetNorm() as norm:
            mean, var, weight, bias, _ = actuated.settings[norm.slot]
            return Call("norm", F.batch_norm, mean, var, weight, bias, False, 0.0, norm.eps)
    return None


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
        return sum(packed.nbytes for packed in list(self._packed.values()))

    @property
    def held(self) -> tuple[str, ...]:
        """The subnets that are held packed."""
        return tuple(self._packed)

    def fill(self, step: Callable[[], object] = lambda: None) -> None:
        """Hold subnets in the order in which they were added, as far as the budget goes; ``step`` after each."""
        self._hold(self._order, step)

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
        left, chosen = self.budget, []
        for name in order:
            shared = self._shared[name]
            if isinstance(shared, Executable) and shared.packed_nbytes <= left:
                left -= shared.packed_nbytes
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
                    self._packed[name] = cast(Executable, self._shared[name]).packed()
                step()
