"""Networks of TorchScript files: code that is not ours, compiled, checked and run as one block.

A file is data for torch's C++ reader, which runs no Python. But TorchScript is a language of its own, and two things in
it could reach beyond the network: methods that run while a file is read, and operations on files. Files with such
methods are refused before they are read, and those with any operation that does not compute before they are run. What
is left can still compute for ever or take all memory: this is no sandbox.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LARGEST_FILE = 2**30  # bytes
OUTPUTS = ("logits", "probabilities")
LEAST = 1e-12  # of a probability, before its logarithm is taken
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.pt")

# Objects that its reader makes: of the file's own classes, and tensors; not of classes in C++ that restore themselves.
_HARMLESS = re.compile(
    r"__torch__\.(?!torch\.classes\b).*|torch\._utils\._rebuild_\w+|torch\.jit\._pickle\.\w+|torch\.\w+Storage|"
    r"torch\.device|collections\.OrderedDict"
)
_FORBIDDEN = {  # of aten, where all else computes: files, threads, and what belongs to the process
    "save", "from_file", "wait", "warn", "_print", "manual_seed", "seed", "set_grad_enabled", "backward",
}  # fmt: skip
_CONTROL = {  # of prim, where most is for debugging, other processes, or the compiler itself
    "Constant", "GetAttr", "If", "Loop", "ListConstruct", "ListUnpack", "TupleConstruct", "TupleUnpack", "TupleIndex",
    "TupleSlice", "DictConstruct", "NumToTensor", "RaiseException", "Uninitialized", "unchecked_cast",
    "unchecked_unwrap_optional", "isinstance", "dtype", "device", "layout", "data", "is_cuda", "requires_grad", "min",
    "max", "abs", "ConstantChunk",
}  # fmt: skip


class Imported(nn.Module):
    """The network of a TorchScript file: input float32 (N, C, H, W), output (N, classes), logits as others give.

    ``file``: its name in ``folder``. ``outputs``: what the file computes; probabilities are turned into logits.
    ``sha256``: of the file, if another must not take its place. Without a folder, sizes can be looked at, but nothing
    computed. Its weights are parameters here, so that they move and count like others, but belong to no state dict:
    they are in the file. Raises ValueError, naming the file.
    """

    def __init__(
        self, classes: int, file: str, outputs: str = "logits", sha256: str | None = None, folder: Path | None = None
    ) -> None:
        super().__init__()
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise ValueError(f"file must be the name of a .pt file beside supernet.json, not {file!r:.60}")
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs must be {' or '.join(OUTPUTS)}, not {outputs!r:.40}")
        self.classes, self.outputs, self.path = classes, outputs, Path(file)
        self._script: Script | None = None
        if folder is None:
            return
        self.path = folder / file
        try:
            content = read_file(self.path)
            if sha256 is not None and sha256 != hashlib.sha256(content).hexdigest():
                raise ValueError("is not the file that was imported: another sha256")
            self._script, weights = compiled(content)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        for number, weight in enumerate(weights):
            self.register_parameter(f"weight{number}", nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if self._script is None:
            raise ValueError(f"{self.path} was not read: no folder is known")
        # Without profiling: that would make the first batches several times slower, to gain nothing on a CPU.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            outputs = cast(Tensor, self._script.run(x, x.device, *self._parameters.values()))
        return outputs if self.outputs == "logits" else outputs.clamp_min(LEAST).log()

    def macs(self, x: Tensor) -> int:
        """Multiply-adds of its convolutions and matrix products for this batch."""
        with FlopCounterMode(display=False) as counter:
            self.forward(x)  # not by a call, to which the hook of whoever counts belongs
        return int(counter.get_total_flops()) // 2

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        """Raise ValueError unless it computes (N, classes) of one blank input and of two, each input for itself."""
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        alone, beside = (self._checked(batch) for batch in (x, torch.cat((x, noise))))
        if not torch.allclose(alone[0], beside[0], rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{self.path.name}: computes something else of an input when another is beside it, or every time: was "
                "it saved in training mode? Call eval() first"
            )

    def _checked(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        fixed = "; its batch size is fixed" if count > 1 else "; is its batch size fixed, or does it take other inputs?"
        what = f"{self.path.name}: of a batch of {count} inputs {tuple(x.shape[1:])}"
        try:
            outputs = self(x)
        except RuntimeError as error:
            raise ValueError(f"{what} it computes nothing: {said(error)}{fixed}") from error
        if not isinstance(outputs, Tensor) or outputs.shape != (count, self.classes):
            made = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"{what} it computes {made}, expected {(count, self.classes)}{fixed}")
        if outputs.dtype != torch.float32 or not bool(torch.isfinite(outputs).all()):
            raise ValueError(f"{what} it computes {outputs.dtype} that is not finite float32 numbers")
        if self.outputs == "probabilities" and not looks_like_probabilities(outputs.exp()):
            raise ValueError(f"{what} it computes no probabilities, which add up to 1")
        return outputs

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the weights are in the file."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Nothing, likewise."""


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Whether each row adds up to 1 and has nothing below 0."""
    sums = outputs.sum(1)
    return bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def said(error: Exception) -> str:
    """What went wrong, in one line: the first, except of the interpreter, which says where before it says what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith("The following operation failed") else lines[0]
    return line.removeprefix("RuntimeError: ")[:200]


# --------------------------------------------------------------------------------------------------------------- files


def read_file(path: Path) -> bytes:
    """The bytes of a file of this folder; ValueError or OSError for what is none, leads out of it, or is too large."""
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError("is a link that leads out of its folder")
    if not path.exists():
        raise ValueError(f"is not in {path.parent}")
    if not path.is_file():  # a pipe would never end
        raise ValueError("is not a file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"is larger than {LARGEST_FILE:,} bytes")
    return path.read_bytes()


def refuse_what_runs_when_read(content: bytes) -> None:
    """Raise ValueError for what is no TorchScript file, and for one that would run code while it is read."""
    if not content.startswith(b"PK\x03\x04"):  # torch reads other formats too, which hold code that cannot be looked at
        raise ValueError("is no TorchScript file, as torch.jit.save writes; pickle files are not read")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as unread:
            if sum(each.file_size for each in unread.infolist()) > LARGEST_FILE:
                raise ValueError(f"unpacks to more than {LARGEST_FILE:,} bytes")
            if unread.testzip() is not None:  # torch does not look at checksums
                raise ValueError("is damaged: its checksums are wrong")
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        names = archive.get_all_records()
        if "constants.pkl" not in names or any(name.lower() == "model.json" for name in names):
            raise ValueError("is no TorchScript file, as torch.jit.save writes; pickle files are not read")
        # The reader finds records whatever the case of their names.
        code = {name: archive.get_record(name) for name in names if name.lower().startswith("code/")}
        made = [_objects(archive.get_record(name)) for name in ("data.pkl", "constants.pkl")]
    except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"is damaged, or no TorchScript file ({said(error)})") from error
    for name in set().union(*made):
        if not _HARMLESS.fullmatch(name):
            raise ValueError(f"holds a {name:.80}, which restores itself when it is read; refused")
    for name, text in code.items():
        if b"__setstate__" in text:
            raise ValueError(f"{name} has a method __setstate__, which would run when it is read; refused")


def _objects(pickled: bytes) -> set[str]:
    """The classes and functions that are named; nothing is unpickled."""
    try:
        operations = list(pickletools.genops(pickled))
    except ValueError as error:
        raise ValueError(f"is damaged, or no TorchScript file ({error})") from error
    naming = ("GLOBAL", "STACK_GLOBAL", "INST")
    return {str(value).replace(" ", ".") for operation, value, _ in operations if operation.name in naming}


# --------------------------------------------------------------------------------------------------------- compilation


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """A compiled function of inputs, their device and all weights; shared by copies, safe in several threads.

    ``module`` is what it was made of, which must live as long: messages of errors look at its methods.
    """

    run: Any
    module: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Script:
        return self


@contextlib.contextmanager
def deprecation_known() -> Iterator[None]:
    """Inside, torch does not warn that TorchScript is deprecated: nothing else reads a network without unpickling."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning)
        yield


# What torch raises for damaged files; some are exceptions of C++ by the names that Python has for them.
_DAMAGE = (RuntimeError, ValueError, AttributeError, TypeError, IndexError, KeyError, OverflowError, MemoryError)


def compiled(content: bytes) -> tuple[Script, list[Tensor]]:
    """The function of a TorchScript file in evaluation, with batch norms folded, and its weights.

    Weights become arguments: constants of a function could not be moved to another device.
    """
    refuse_what_runs_when_read(content)
    with deprecation_known():
        module = _attempted(lambda: torch.jit.load(io.BytesIO(content), map_location="cpu"))  # type: ignore[no-untyped-call]
        _check_module(module)
        frozen = _attempted(lambda: torch.jit.freeze(module.eval()) if hasattr(module, "training") else module)
    graph = frozen.graph.copy()
    weights = _lifted(graph)
    if not weights:
        raise ValueError("holds no weights")
    for tensor in (each for each in (*module.parameters(), *module.buffers()) if each.dim()):
        tensor.data = tensor.new_empty(0)  # no second copy: what is not folded, the list of weights holds
    return Script(torch._C._create_function_from_graph("forward", graph), module), weights


def _attempted(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except _DAMAGE as error:
        raise ValueError(f"torch cannot read it: {said(error)}") from error


def _check_module(module: Any) -> None:
    if not hasattr(module, "inlined_graph"):
        raise ValueError("has no method forward")
    if module._c._get_forward_hooks() or module._c._get_forward_pre_hooks():
        raise ValueError("has hooks, which are not supported")
    graph = module.inlined_graph
    for node in _nodes(graph):
        space, _, operation = node.kind().partition("::")
        if operation in _FORBIDDEN if space == "aten" else space != "prim" or operation not in _CONTROL:
            raise ValueError(f"has the operation {node.kind()}, which is not supported")
    _, *inputs = graph.inputs()
    if len(inputs) != 1 or str(inputs[0].type()) != "Tensor":
        raise ValueError(f"takes {', '.join(str(each.type()) for each in inputs) or 'nothing'}, expected one Tensor")


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _lifted(graph: Any) -> list[Tensor]:
    """Make the tensors and the device that are constants of a graph its arguments; returns the tensors."""
    weights: list[Tensor] = []
    itself = next(graph.inputs())
    if itself.uses():
        raise ValueError("changes its own attributes when it runs: was it saved in training mode? Call eval() first")
    graph.eraseInput(0)
    device = graph.addInput("device")
    device.setType(torch._C.DeviceObjType.get())
    for node in [each for each in _nodes(graph) if each.kind() == "prim::Constant"]:
        output, kind = node.output(), str(node.output().type())
        if kind == "Device":
            output.replaceAllUsesWith(device)
        elif node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dim():
            weights.append(node.t("value").detach())
            lifted = graph.addInput()
            lifted.setType(torch._C.TensorType.get())
            output.replaceAllUsesWith(lifted)
            node.destroy()
    return weights
