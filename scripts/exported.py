"""Turns a file of torch.export into TorchScript, reading nothing but JSON and numbers.

torch.export.load unpickles what a file brings along, evaluates its expressions and calls any function of torch that it
names. This reads the same archive with none of that: the graph is JSON, weights are plain bytes, and of the functions
only those of aten are written down, by name, as a TorchScript function. What would have to be unpickled is refused.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import serialize

from supernets.imported import deprecation_known

LARGEST_FILE = 2**30  # bytes, unpacked
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_][A-Za-z0-9_]*)\.[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_OPERATORS = {
    "_operator.add": "+", "_operator.sub": "-", "_operator.mul": "*", "_operator.floordiv": "//", "_operator.mod": "%",
    "_operator.ge": ">=", "_operator.gt": ">", "_operator.le": "<=", "_operator.lt": "<", "_operator.eq": "==",
}  # fmt: skip
# Checks of sizes, which the compiler of torch.export adds.
_CHECKS = {"_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range"}
_CHECKS |= {"sym_constrain_range_for_size"}


class ExportedError(ValueError):
    """A file of torch.export that cannot be turned into TorchScript; says why."""


@dataclass(frozen=True, slots=True)
class Program:
    """A graph and the tensors that it names."""

    graph: Mapping[str, Any]
    inputs: Sequence[str]
    output: str
    tensors: Mapping[str, Tensor]


def to_torchscript(path: Path) -> Any:
    """The network of a .pt2 file as a ScriptModule that can be saved. Raises ExportedError."""
    try:
        program = _read(path)
        source = _source(program)
    except (zipfile.BadZipFile, OSError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise ExportedError(f"is no file of torch.export, or damaged ({type(error).__name__}: {error})") from error
    holder = type("Converted", (nn.Module,), {})()  # a class of its own: methods are defined once for each
    for name, tensor in program.tensors.items():
        holder.register_parameter(_variable(name), nn.Parameter(tensor, requires_grad=False))
    try:
        with deprecation_known():
            module: Any = torch.jit.script(holder.eval())
            module.define(source)
    except RuntimeError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ExportedError(f"cannot be written as TorchScript: {said}") from error
    return module


# ------------------------------------------------------------------------------------------------------------- archive


def _read(path: Path) -> Program:
    with zipfile.ZipFile(path) as archive:
        if sum(each.file_size for each in archive.infolist()) > LARGEST_FILE:
            raise ExportedError(f"unpacks to more than {LARGEST_FILE:,} bytes")
        files = {name.partition("/")[2]: name for name in archive.namelist()}
        if "models/model.json" not in files:
            raise ExportedError("is no file of torch.export: it has no models/model.json")
        if archive.read(files["byteorder"]) != b"little":
            raise ExportedError("was written on a machine of another byte order")
        document = json.loads(archive.read(files["models/model.json"]))["graph_module"]
        named: dict[str, Tensor] = {}
        for kind in ("weights", "constants"):
            config = json.loads(archive.read(files[f"data/{kind}/model_{kind}_config.json"]))["config"]
            for name, entry in config.items():
                named[name] = _tensor(name, entry, archive, files, kind)
    return _program(document["graph"], document["signature"], named)


def _tensor(name: str, entry: Any, archive: zipfile.ZipFile, files: Mapping[str, str], kind: str) -> Tensor:
    if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
        raise ExportedError(f"{name} would have to be unpickled, which could run code; refused")
    meta = entry["tensor_meta"]
    content = bytearray(archive.read(files[f"data/{kind}/{entry['path_name']}"]))
    dtype = serialize._SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    sizes, strides = ([each["as_int"] for each in meta[field]] for field in ("sizes", "strides"))
    try:
        return torch.as_strided(flat, sizes, strides, meta["storage_offset"]["as_int"]).clone()
    except RuntimeError as error:
        raise ExportedError(f"{name} does not fit its bytes: {error}") from error


def _program(graph: Mapping[str, Any], signature: Mapping[str, Any], named: Mapping[str, Tensor]) -> Program:
    inputs: list[str] = []
    tensors: dict[str, Tensor] = {}
    for spec in signature["input_specs"]:
        ((kind, value),) = spec.items()
        if kind == "user_input":
            inputs.append(value["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            tensors[value["arg"]["name"]] = named[value[f"{kind}_name"]]
        else:
            raise ExportedError(f"has an input that is a {kind}, which is not supported")
    kinds = [next(iter(spec)) for spec in signature["output_specs"]]
    if kinds != ["user_output"]:
        raise ExportedError(
            f"has the outputs {', '.join(kinds)}, expected one tensor (of a network in training mode, it has more)"
        )
    (output,) = graph["outputs"]
    return Program(graph, inputs, output["as_tensor"]["name"], tensors)


# -------------------------------------------------------------------------------------------------------------- source


def _variable(name: Any) -> str:
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise ExportedError(f"has the name {name!r:.60}, which is none")
    return f"v_{name}"


def _source(program: Program) -> str:
    """The graph as the text of one method; every name and value in it was checked."""
    lines = [f"def forward(self, {', '.join(map(_variable, program.inputs))}):"]
    lines += [f"    {_variable(name)} = self.{_variable(name)}" for name in program.tensors]
    for node in program.graph["nodes"]:
        line = _statement(node)
        if line:
            lines.append(f"    {line}")
    lines.append(f"    return {_variable(program.output)}")
    return "\n".join(lines) + "\n"


def _statement(node: Mapping[str, Any]) -> str:
    target, given = node["target"], node["inputs"]
    values = [_value(each["arg"]) for each in given]
    found = _ATEN.fullmatch(target)
    if found and found[1] in _CHECKS:
        return ""
    results = [name for each in node["outputs"] for name in _results(each)]
    if target in _OPERATORS and len(values) == 2:
        call = f"{values[0]} {_OPERATORS[target]} {values[1]}"
    elif found and found[1] == "sym_size":
        call = f"{values[0]}.size({values[1]})"
    elif found:
        named = zip((each["name"] for each in given), (each.get("kind", 1) for each in given), values, strict=True)
        arguments = [f"{_word(name)}={value}" if kind == 2 else value for name, kind, value in named]
        call = f"torch.ops.aten.{found[1]}({', '.join(arguments)})"
    else:
        raise ExportedError(f"calls {target!r:.80}, which is not supported")
    if "as_tensors" in node["outputs"][0]:  # a list, of which the graph names the parts
        return f"{', '.join(results)}{',' if len(results) == 1 else ''} = {call}"
    return f"{', '.join(results)} = {call}"


def _results(output: Mapping[str, Any]) -> list[str]:
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return [_variable(each["name"]) for each in value]
    if kind == "as_tensor":
        return [_variable(value["name"])]
    if kind in ("as_sym_int", "as_sym_bool"):
        return [_variable(value["as_name"])]
    raise ExportedError(f"computes a {kind}, which is not supported")


def _word(name: Any) -> str:
    return _variable(name).removeprefix("v_")


def _value(argument: Mapping[str, Any]) -> str:
    """One argument as text, by its kind."""
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return "None"
        case "as_tensor":
            return _variable(value["name"])
        case "as_tensors":
            return f"[{', '.join(_variable(each['name']) for each in value)}]"
        case "as_optional_tensors":
            return f"[{', '.join(_value(each) for each in value)}]"
        case "as_int" | "as_float" | "as_bool":
            return _number(value)
        case "as_ints" | "as_floats" | "as_bools":
            return f"[{', '.join(map(_number, value))}]"
        case "as_sym_int" | "as_sym_bool":
            return _symbol(value)
        case "as_sym_ints":
            return f"[{', '.join(map(_symbol, value))}]"
        case "as_string":
            return repr(_word(value))
        case "as_scalar_type":
            return str(serialize._SERIALIZE_TO_TORCH_DTYPE[value])
        case "as_memory_format":
            return str(serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT[value])
        case "as_layout":
            return str(serialize._SERIALIZE_TO_TORCH_LAYOUT[value])
        case "as_device":
            return f"torch.device({_word(value['type'])!r})"
    raise ExportedError(f"has an argument {kind}, which is not supported")


def _symbol(value: Mapping[str, Any]) -> str:
    return _number(value["as_int"]) if "as_int" in value else _variable(value["as_name"])


def _number(value: Any) -> str:
    if type(value) not in (int, float, bool):
        if value in ("Infinity", "-Infinity", "NaN"):  # as torch writes them
            return f"float('{value.replace('Infinity', 'inf').lower()}')"
        raise ExportedError(f"has the number {value!r:.40}, which is none")
    return f"float('{value}')" if value != value or value in (float("inf"), float("-inf")) else repr(value)
