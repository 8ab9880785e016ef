"""Programs compute what their text says, hold no weights but while they are held, and say what torch says."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

import programs
from programs import CannotWriteError, Hold, Program, lines_of, literal, program_of


def added_to(weight: Tensor) -> Program:
    def write(names: Sequence[str], hold: Hold) -> Iterator[str]:
        yield f"y = {names[0]} + {hold(weight)}"
        yield f"return y * {hold(weight)}"

    return program_of(1, write, keep=True)


def test_a_program_computes_what_is_written() -> None:
    assert torch.equal(added_to(torch.tensor(3.0))(torch.arange(4.0)), (torch.arange(4.0) + 3) * 3)


def test_programs_that_are_kept_share_their_text_and_not_their_weights() -> None:
    first, second = added_to(torch.tensor(3.0)), added_to(torch.tensor(2.0))
    assert first._function is second._function
    assert [float(each(torch.tensor(1.0))) for each in (first, second)] == [12.0, 6.0]


def test_weights_are_freed_with_their_program() -> None:
    gc.disable()
    try:
        weight = torch.ones(3)
        program, freed = added_to(weight), weakref.ref(weight)
        pointer = weight.data_ptr()
        del weight
        assert program._weights[0].data_ptr() == pointer
        program(torch.ones(3))
        del program
        assert freed() is None
    finally:
        gc.enable()


def test_an_error_says_what_torch_says_and_leaves_the_settings_of_the_thread_alone() -> None:
    program = added_to(torch.ones(3))
    with pytest.raises(
        RuntimeError, match=r"^The size of tensor a \(2\) must match the size of tensor b \(3\)"
    ) as told:
        program(torch.ones(2))
    assert "TorchScript" not in str(told.value)
    assert torch._C._get_graph_executor_optimize()


def test_what_torch_has_no_memory_for_is_told_as_such() -> None:
    program = program_of(1, lambda names, _: [f"return {names[0]}.expand([1000000, 1000000, 1000]).clone()"])
    with pytest.raises(RuntimeError, match="allocate memory"):
        program(torch.ones(1))


def test_a_text_that_torch_does_not_take_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no_such_function"):
        program_of(1, lambda names, _: [f"return no_such_function({names[0]})"])


@pytest.mark.parametrize("value", [None, True, 3, -1, 2.5, "same", (1, 2), [3, [4]], ()])
def test_constants_are_written_as_they_are_read(value: object) -> None:
    read = eval(literal(value))
    assert read == (list(value) if isinstance(value, tuple) else value)


def test_other_constants_cannot_be_written() -> None:
    with pytest.raises(CannotWriteError, match="a constant of type dtype"):
        literal(torch.float32)


class Net(nn.Module):
    """Weights, operators, functions and methods; and a module where one is given."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.scale, self.module = nn.Parameter(torch.linspace(1, 2, 3)), module

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x.mean((0, 1), keepdim=True) - 1, x * self.scale / 2], 1)
        return (y if self.module is None else self.module(y)).relu()


def program_of_network(network: nn.Module) -> Program:
    graph = fx.symbolic_trace(network).graph

    def target(node: fx.Node) -> object:
        return operator.attrgetter(str(node.target))(network) if node.op == "get_attr" else node.target

    return program_of(1, lambda names, hold: lines_of(graph, names, hold, False, target))


def test_a_graph_of_weights_operators_functions_and_methods_is_a_program() -> None:
    x = torch.randn(1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(program_of_network(Net())(x), Net()(x))


def test_a_graph_that_calls_modules_cannot_be_written() -> None:
    with pytest.raises(CannotWriteError, match="call_module"):
        program_of_network(Net(nn.GELU()))


def test_a_torch_without_programs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert programs.available()
    monkeypatch.delattr(torch._C, "_jit_pass_inline")
    assert not programs.available.__wrapped__()
