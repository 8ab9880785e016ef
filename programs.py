"""Programs: what executables compute, as TorchScript, which needs neither Python nor its interpreter meanwhile.

Called from Python, a network is a hundred short calls, each of which costs some microseconds of Python and lets go of
the interpreter and wants it back, while the event loop keeps it. A program is one call. Its text names no weights: they
are given to it with each call, so that what is held goes when it is let go, and steps of one form share their text.

``lines_of`` writes a graph of torch.fx whose functions are writable (steps.py) or torch's own; ``program_of`` compiles.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Hold = Callable[[Tensor], str]  # takes a weight to be given with each call; what stands for it in the text

_WEIGHTS = "weights"
_OPERATORS = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/"}
# What torch has in Python, by the functions of its own around which it stands.
NAMES: Mapping[Any, str] = {
    F.relu: "torch.relu", F.hardswish: "torch._C._nn.hardswish", F.hardsigmoid: "torch._C._nn.hardsigmoid",
    F.silu: "torch._C._nn.silu", F.adaptive_avg_pool2d: "torch._C._nn.adaptive_avg_pool2d",
}  # fmt: skip
# What is written in several places; inlined where it is called. None calls one that comes after it.
_HELPERS = {
    "added": """
def added(outputs: Tensor, residual: Tensor) -> Tensor:
    alike = outputs.size() == residual.size() and outputs.dtype == residual.dtype
    return outputs.add_(residual) if alike else outputs + residual
""",
    "accumulated": """
def accumulated(outputs: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    form, fits = torch.channels_last, x.size(1) == matrix.size(0)
    dense = outputs.is_contiguous(memory_format=form) and x.is_contiguous(memory_format=form)
    if dense and fits and outputs.size() == [x.size(0), matrix.size(1), x.size(2), x.size(3)]:
        pixels, inputs, channels = x.size(0) * x.size(2) * x.size(3), matrix.size(0), matrix.size(1)
        rows = x.as_strided([pixels, inputs], [inputs, 1])
        outputs.as_strided([pixels, channels], [channels, 1]).addmm_(rows, matrix)
        return outputs
    return outputs + torch.matmul(x.permute([0, 2, 3, 1]), matrix).permute([0, 3, 1, 2])
""",
    "averaged": """
def averaged(x: Tensor, keep: bool) -> Tensor:
    pixels = x.size(2) * x.size(3) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else 0
    if pixels == 0 or pixels > 1024 or not x.is_floating_point():
        return x.mean([2, 3], keep)
    means = torch._C._nn.avg_pool2d(x, [x.size(2), x.size(3)])
    return means if keep else means.flatten(1)
""",
    "fits": """
def fits(residual: Tensor, x: Tensor, channels: int, reach: List[int], stride: List[int]) -> bool:
    rows, columns = (x.size(2) - reach[0]) // stride[0] + 1, (x.size(3) - reach[1]) // stride[1] + 1
    return residual.size() == [x.size(0), channels, rows, columns] and residual.dtype == x.dtype
""",
    "parted": """
def parted(pairs: Tensor, channels: int) -> Tensor:
    pixels = pairs.permute([0, 2, 3, 1])
    return pixels.reshape([pixels.size(0), pixels.size(1), -1, channels]).permute([0, 3, 1, 2])
""",
}


@runtime_checkable
class Writable(Protocol):
    """A function that can be written."""

    def written(self, arguments: Sequence[str], hold: Hold, many: bool) -> str:
        """The expression of its result for these arguments, for batches of one or of ``many`` inputs."""


class CannotWriteError(ValueError):
    """Something of which no text can be made."""


class Program:
    """A function of tensors, with its weights; safe to call from several threads at once."""

    def __init__(self, function: Callable[..., Tensor], weights: list[Tensor]) -> None:
        self._function = function
        self._weights: Any = torch._C.ScriptList(weights)  # a list would be converted with each call

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the text says; raises RuntimeError with what torch said, and not where in the text."""
        optimised = torch._C._get_graph_executor_optimize()
        # Else the first calls with new shapes would be watched, and the text compiled anew for them: 40 ms each. The
        # setting is of the calling thread.
        torch._C._set_graph_executor_optimize(False)
        try:
            return self._function(*inputs, self._weights)
        except RuntimeError as error:
            raise RuntimeError(str(error).rpartition("RuntimeError: ")[2].rstrip()) from error
        finally:
            torch._C._set_graph_executor_optimize(optimised)


def literal(value: Any) -> str:
    """A constant as it is written; raises CannotWriteError."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(literal, value))}]"
    raise CannotWriteError(f"a constant of type {type(value).__name__}")


def program_of(inputs: int, write: Callable[[Sequence[str], Hold], Iterable[str]], keep: bool = False) -> Program:
    """What ``write`` writes, given the names of so many inputs: lines, the last of which returns a tensor.

    ``keep``: for others that are written in the same way. Raises CannotWriteError where it cannot be written, and
    RuntimeError where torch does not take it.
    """
    weights: list[Tensor] = []

    def hold(tensor: Tensor) -> str:
        numbers = (number for number, each in enumerate(weights) if each is tensor)
        number = next(numbers, len(weights))
        if number == len(weights):
            weights.append(tensor)
        return f"{_WEIGHTS}[{number}]"

    names = [f"x{number}" for number in range(inputs)]
    lines = "\n".join(f"    {line}" for line in write(names, hold))
    parameters = ", ".join([*(f"{name}: Tensor" for name in names), f"{_WEIGHTS}: List[Tensor]"])
    function = (_kept if keep else _compiled)(_with_helpers(f"\ndef run({parameters}) -> Tensor:\n{lines}\n"))
    return Program(function, [each.detach() for each in weights])


@functools.cache
def available() -> bool:
    """Whether this torch takes programs: TorchScript is on its way out, and some of what is used of it is private."""
    try:
        one = program_of(1, lambda names, _: [f"return {names[0]} + 1"])
        return one(torch.zeros(1)).item() == 1
    except (AttributeError, RuntimeError, TypeError):
        return False


def _with_helpers(text: str) -> str:
    """A text preceded by what it calls of the helpers: each costs memory and time of its own in every program."""
    for name, helper in reversed(_HELPERS.items()):
        text = helper + text if f"{name}(" in text else text
    return text


def _compiled(text: str) -> Callable[..., Tensor]:
    """The function ``run`` of a text; keeps the interpreter for a tenth of a millisecond a line."""
    function = torch.jit.CompilationUnit(text).run
    torch._C._jit_pass_inline(function.graph)
    torch._C._jit_pass_constant_propagation(function.graph)  # of lists, which were made anew with each call
    return cast("Callable[..., Tensor]", function)


_kept = functools.lru_cache(512)(_compiled)


def lines_of(
    graph: fx.Graph, inputs: Sequence[str], hold: Hold, many: bool, target: Callable[[fx.Node], Any]
) -> Iterable[str]:
    """The text of a graph, line by line; ``target``: what a node calls, or the tensor of the network that it reads.

    Raises CannotWriteError.
    """
    names: dict[fx.Node, str] = {}
    left = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = next(left)
        elif node.op == "get_attr":
            names[node] = hold(target(node))
        elif node.op == "output":
            yield f"return {_value(node.args[0], names)}"
        else:
            names[node] = f"y{len(names)}"
            yield f"{names[node]} = {_expression(node, target(node), names, hold, many)}"


def _expression(node: fx.Node, called: Any, names: Mapping[fx.Node, str], hold: Hold, many: bool) -> str:
    arguments = [_value(each, names) for each in node.args]
    if isinstance(called, Writable):
        return called.written(arguments, hold, many)
    arguments += [f"{name}={_value(each, names)}" for name, each in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{called}({', '.join(arguments[1:])})"
    if node.op == "call_function" and called in _OPERATORS and len(arguments) == 2:
        return f" {_OPERATORS[called]} ".join(arguments)
    if node.op == "call_function" and called in NAMES and not any(node.kwargs.values()):  # in place, for example
        return f"{NAMES[called]}({', '.join(arguments[: len(node.args)])})"
    name = getattr(called, "__name__", "")
    for where, prefix in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):
        if node.op == "call_function" and name and getattr(where, name, None) is called:
            return f"{prefix}.{name}({', '.join(arguments)})"
    raise CannotWriteError(f"{node.op} {called}")


def _value(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(each, names) for each in value)}]"
    return literal(value)
