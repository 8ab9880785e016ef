"""Check that our families compute what the original code computes, on the cases of a folder of fixtures.

Every subfolder with ``cases_NAME.json`` and ``cases_NAME.npz`` is checked: the digests of the generated weights and
inputs first (the generator is the folder's own synth.py), then per case the logits with stored and with recalibrated
norm statistics, in double and single precision; that the extracted subnet computes the same; active channels,
parameters and multiply-adds; and, where there are files for them, the recalibrated statistics, the names and shapes
of the extracted network, and statistics of every block's output.

Double precision must agree to 1e-8. Single precision may differ from the double-precision reference by three times
what the original's own single-precision run differs (``max_abs_diff``), at least by 2e-6 of the largest logit (at
least 1): below that, order of addition decides. Failures are printed a line each; the last line of stdout is JSON.

    python scripts/check_conformance.py ../shared/fixtures
    python scripts/check_conformance.py ../shared/fixtures --family dynabert --cases db_04 db_27
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import supernets
from scripts import official_arguments as official
from supernet import Space, Supernet, SupernetError, count_macs, count_parameters
from supernets import bert, ofa, ofa_mobilenet, ofa_resnet

EXACT, TIMES_NOISE, FLOOR = 1e-8, 3.0, 2e-6
ADDED_UP = 1e-6  # of multiply-adds, which the public counter adds up in single precision
STATISTICS, EXTRACTED = 1e-6, {torch.float64: 1e-12, torch.float32: 1e-6}
Inputs = tuple[Tensor, ...]


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(slots=True)
class Report:
    """What was compared, how far it was off at worst, and one line for each failure."""

    cases: int = 0
    checks: int = 0
    worst: dict[str, float] = field(default_factory=lambda: {"f64": 0.0, "f32": 0.0, "f32_of_limit": 0.0})
    failures: list[str] = field(default_factory=list)

    def fail(self, where: str, what: str) -> None:
        """Note a failure and say it."""
        self.failures.append(f"{where}: {what}")
        tqdm.write(self.failures[-1], file=sys.stdout)

    def same(self, where: str, what: str, ours: object, theirs: object) -> None:
        """Both must be equal."""
        self.checks += 1
        if ours != theirs:
            self.fail(where, f"{what} is {ours!s:.200}, expected {theirs!s:.200}")

    def close(self, where: str, what: str, ours: NDArray[Any], theirs: NDArray[Any], limit: float) -> float:
        """Both must be equal up to the limit; gives the largest difference."""
        self.checks += 1
        if ours.shape != theirs.shape:
            self.fail(where, f"{what} has shape {ours.shape}, expected {theirs.shape}")
            return 0.0
        difference = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0))
        if not difference <= limit:
            self.fail(where, f"{what} is off by {difference:.3g}, allowed is {limit:.3g}")
        return difference


# ------------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True, slots=True)
class Official:
    """How the public code's forms of one family become ours."""

    family: str
    space: Callable[[], Space]
    own_name: Callable[[str, Any], str]
    architecture: Callable[[Mapping[str, Any], str], dict[str, Any]]  # of a document of cases and a model in it
    subnet: Callable[[Any, Mapping[str, Any]], Any]  # of a network and a case
    resolved: Callable[[Supernet, Any], dict[str, Any]]


def _calls(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    args = case["args"]
    return args if isinstance(args, list) else [args]


def _bert_architecture(document: Mapping[str, Any], model: str) -> dict[str, Any]:
    config = document["configs"][model]
    names = {
        "classes": "num_labels", "vocabulary": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "intermediate": "intermediate_size", "positions": "max_position_embeddings",
        "types": "type_vocab_size",
    }  # fmt: skip
    return {ours: config[theirs] for ours, theirs in names.items()}


def _bert_resolved(supernet: Supernet, subnet: Any) -> dict[str, Any]:
    layers = list(enumerate(supernet.network.get_submodule("bert.encoder.layer").children()))
    kept = supernet.operators.layer_selects[0].blocks_of(subnet)
    first = next(iter(supernet.extract(subnet).get_submodule("bert.encoder.layer").children()))
    attention: Any = first.get_submodule("attention.self")
    return {
        "kept_layers": [index for index, layer in layers if layer in kept],
        "heads": attention.query.out_features // attention.head_size,
        "intermediate": first.get_submodule("intermediate.dense").out_features,
    }


def _blocks(supernet: Supernet, subnet: Any) -> list[tuple[int, Any]]:
    """The extracted blocks with their indices in the supernet."""
    select = supernet.network.get_submodule("blocks")
    kept = next(each for each in supernet.operators.layer_selects if each is select).blocks_of(subnet)
    indices = [index for index, block in enumerate(select.children()) if block in kept]
    return list(zip(indices, supernet.extract(subnet).get_submodule("blocks").children(), strict=True))


def _resnet_resolved(supernet: Supernet, subnet: Any) -> dict[str, Any]:
    stem: Any = supernet.extract(subnet).get_submodule("input_stem")
    blocks = [
        {
            "index": index, "in": block.conv1.conv.in_channels, "mid": block.conv2.conv.out_channels,
            "out": block.conv3.conv.out_channels, "stride": block.conv2.conv.stride[0],
        }
        for index, block in _blocks(supernet, subnet)
    ]  # fmt: skip
    kept = {"mid": stem[0].conv.out_channels, "out": stem[-1].conv.out_channels, "skip": len(stem) == 2}
    return {"stem": kept, "blocks": blocks}


def _mobilenet_resolved(supernet: Supernet, subnet: Any) -> dict[str, Any]:
    blocks = []
    for index, block in _blocks(supernet, subnet):
        if index == 0:  # static: not listed
            continue
        depthwise = block.conv.depth_conv
        blocks.append(
            {
                "index": index, "in": block.conv.inverted_bottleneck.conv.in_channels,
                "mid": depthwise.conv.out_channels, "out": block.conv.point_linear.conv.out_channels,
                "stride": depthwise.conv.stride[0], "kernel": depthwise.conv.kernel_size[0],
                "se": int(hasattr(depthwise, "se")), "shortcut": int(block.shortcut),
            }
        )  # fmt: skip
    return {"blocks": blocks}


FAMILIES = {
    "ofa_resnet50": Official(
        "ofa_resnet", ofa_resnet.official_space, ofa.own_name,
        lambda document, model: {"classes": document["n_classes"]},
        lambda network, case: official.ofa_resnet_subnet(network.depths, *_calls(case)), _resnet_resolved,
    ),
    "ofa_mbv3": Official(
        "ofa_mobilenet", ofa_mobilenet.official_space, ofa.own_name,
        lambda document, model: {"classes": document["n_classes"], "width": float(model.removeprefix("w"))},
        lambda network, case: official.ofa_mobilenet_subnet(network.depths, *_calls(case)), _mobilenet_resolved,
    ),
    "dynabert": Official(
        "bert", bert.official_space, bert.own_name, _bert_architecture,
        lambda network, case: official.bert_subnet(case["width_mult"], case["depth_mult"]), _bert_resolved,
    ),
}  # fmt: skip


def widened(space: Space, subnets: Sequence[Any]) -> Space:
    """The space with these subnets in it: the original code takes values that its own lists lack."""
    changed = {}
    for each in dataclasses.fields(space):
        seen = [getattr(subnet, each.name) for subnet in subnets]
        anywhere = {value for values in seen for value in values}
        changed[each.name] = tuple(
            tuple(sorted({*legal, *({values[position] for values in seen} if each.name == "depths" else anywhere)}))
            for position, legal in enumerate(getattr(space, each.name))
        )
    return dataclasses.replace(space, **changed)


# ------------------------------------------------------------------------------------------------------------- fixtures


@dataclass(frozen=True, slots=True)
class Cases:
    """One file of cases with its arrays, and the folder of what belongs to it."""

    path: Path
    document: dict[str, Any]
    cases: tuple[dict[str, Any], ...]

    @property
    def folder(self) -> Path:
        """Where the files of this family are."""
        return self.path.parent


def find_cases(folder: Path, families: Sequence[str], names: Sequence[str]) -> list[Cases]:
    """Every file of cases that has its arrays beside it, with the cases that were asked for (all, if none were)."""
    found = []
    for path in sorted([*folder.glob("cases_*.json"), *folder.glob("*/cases_*.json")]):
        document = json.loads(path.read_text())
        if path.with_suffix(".npz").exists() and document["family"] in FAMILIES:
            cases = tuple(each for each in document["cases"] if not names or each["id"] in names)
            if cases and (not families or document["family"] in families):
                found.append(Cases(path, document, cases))
    return found


def load_generator(folder: Path) -> Any:
    """The module synth.py of a family's folder, or of the one above."""
    path = next(each / "synth.py" for each in (folder, folder.parent) if (each / "synth.py").exists())
    spec = importlib.util.spec_from_file_location("fixtures_synth", path)
    assert spec is not None and spec.loader is not None, "a file of Python has a loader"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(array: NDArray[Any]) -> str:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()


class Model:
    """One synthetic supernet of a file of cases, at both precisions, with its inputs and calibration batches."""

    def __init__(self, cases: Cases, name: str) -> None:
        self.cases, self.name, self.document = cases, name, cases.document
        self.official = FAMILIES[self.document["family"]]
        self.synth = load_generator(cases.folder)
        specific = cases.folder / f"state_dict_spec_{name}.json"
        path = specific if specific.exists() else cases.folder / "state_dict_spec.json"
        self.spec = json.loads(path.read_text())
        self.weights: dict[str, NDArray[Any]] = self.synth.state_dict(self.spec)
        self.architecture = self.official.architecture(self.document, name)

    def subnet(self, case: Mapping[str, Any]) -> Any:
        """The subnet of a case."""
        with torch.device("meta"):
            network, _ = supernets.build(self.official.family, self.architecture)
        return self.official.subnet(network, case)

    @cached_property
    def space(self) -> Space:
        """The official space, and what the cases have beyond it."""
        mine = [case for case in self.cases.cases if model_of(case) == self.name]
        return widened(self.official.space(), [self.subnet(case) for case in mine])

    @cached_property
    def float64(self) -> Supernet:
        """The supernet in double precision."""
        return self._supernet(torch.float64)

    @cached_property
    def float32(self) -> Supernet:
        """The supernet in single precision."""
        return self._supernet(torch.float32)

    def _supernet(self, dtype: torch.dtype) -> Supernet:
        network, elastic = supernets.build(self.official.family, self.architecture)
        known = network.state_dict()
        network.load_state_dict(
            {self.official.own_name(name, known): torch.from_numpy(value) for name, value in self.weights.items()}
        )
        network.to(dtype).requires_grad_(False).eval()
        return Supernet(network, elastic, self.space)

    def sized(self, classes: int) -> Supernet:
        """The supernet with so many classes, without memory for weights: to count."""
        if classes not in self._sized:
            with torch.device("meta"):
                network, elastic = supernets.build(self.official.family, self.architecture | {"classes": classes})
            self._sized[classes] = Supernet(network.eval(), elastic, self.space)
        return self._sized[classes]

    @cached_property
    def _sized(self) -> dict[int, Supernet]:
        return {}

    def inputs(self, name: str, dtype: torch.dtype) -> Inputs:
        """What the network takes for an input of the document."""
        form = self.document["inputs"][name]
        if "seq" not in form:
            return (torch.from_numpy(self.synth.images(form["tag"], form["n"], form["hw"])).to(dtype),)
        ids, mask, types = map(torch.from_numpy, self.tokens(name))
        if form["token_type_ids"]:
            return (ids, mask if form["attention_mask"] else torch.ones_like(mask), types)
        return (ids, mask) if form["attention_mask"] else (ids,)

    def tokens(self, name: str) -> tuple[NDArray[Any], ...]:
        """Ids, attention mask and token types of an input of text."""
        form, vocabulary = self.document["inputs"][name], self.architecture["vocabulary"]
        return tuple(
            self.synth.tokens(f"{form['tag']}/{self.name}", form["n"], form["seq"], vocabulary, form["lengths"])
        )

    def calibration(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """The batches of a calibration set of the document."""
        form = self.document["calibrations"][name]
        images = torch.from_numpy(self.synth.images(form["tag"], form["n"], form["hw"])).to(dtype)
        return list(images.split(form["batches"]))


def model_of(case: Mapping[str, Any]) -> str:
    """The name of the supernet that a case is about."""
    return str(case["model"] if "model" in case else case["config"])


# -------------------------------------------------------------------------------------------------------------- checks


def check_digests(model: Model, report: Report) -> None:
    """The generator must give the weights and inputs with which the reference was computed."""
    digests, where = json.loads((model.cases.folder / "digests.json").read_text()), f"digests of {model.name}"
    expected = digests["weights"].get(model.name)
    if expected is None:
        report.fail(where, "not there")
        return
    whole = hashlib.sha256()
    for name, value in model.weights.items():
        report.same(where, name, _digest(value)[:16], expected["per_tensor_sha256_16"].get(name))
        whole.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    report.same(where, "all weights", whole.hexdigest(), expected["all_sha256"])
    for name, form in digests["inputs"].items():
        for what, array in _arrays_of(model, name):
            report.same(where, f"input {name} {what}", _digest(array), form[what])


def _arrays_of(model: Model, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of an input by the name that digests.json gives it; nothing for other models' and unknown ones."""
    inputs, calibrations = model.document["inputs"], model.document.get("calibrations", {})
    source, _, config = name.partition("/")
    if config:
        if config == model.name and source in inputs:
            yield from zip(("ids_sha256", "mask_sha256", "types_sha256"), model.tokens(source), strict=True)
        return
    form = inputs.get(name) or calibrations.get(name.removeprefix("calib_"))
    if form is not None:
        yield "sha256", model.synth.images(form["tag"], form["n"], form["hw"])


class Check:
    """All that is compared of one case."""

    def __init__(self, model: Model, case: Mapping[str, Any], arrays: Mapping[str, Any], report: Report) -> None:
        self.model, self.case, self.arrays, self.report = model, case, arrays, report
        self.id, self.subnet = str(case["id"]), model.subnet(case)

    def run(self) -> None:
        """Compare everything that the case has."""
        self._counts()
        self._resolved()
        for form, supernet, dtype in (
            ("f64", self.model.float64, torch.float64), ("f32", self.model.float32, torch.float32),
        ):  # fmt: skip
            inputs = self.model.inputs(self.case["input"], dtype)
            self._logits("plain" if f"{self.id}/plain_f64" in self.arrays else "logits", form, supernet, inputs)
            if form == "f64":
                self._trace(supernet, inputs)
                self._extracted_names(supernet)
            if "calibration" in self.case:
                batches = self.model.calibration(self.case["calibration"], dtype)
                supernet.calibrate(self.subnet, batches, pooled=False)
                self._logits("calib", form, supernet, inputs)
                if form == "f64":
                    self._statistics(supernet)
                self._forget(supernet)

    def _forget(self, supernet: Supernet) -> None:
        """The next case of this subnet begins with the stored statistics again."""
        del supernet.statistics[self.subnet]
        supernet.forget()

    @torch.no_grad()
    def _logits(self, what: str, form: str, supernet: Supernet, inputs: Inputs) -> None:
        ours, quantity = supernet.actuate(self.subnet)(*inputs), f"{what}_{form}"
        alone = supernet.extract(self.subnet)(*inputs)
        limit = EXTRACTED[ours.dtype] * max(1.0, float(ours.abs().max()))
        self.report.close(self.id, f"{quantity} of the extracted network", alone.numpy(), ours.numpy(), limit)
        reference = self.arrays[f"{self.id}/{what}_f64"]
        limit = EXACT if form == "f64" else self._single_limit(what, reference)
        difference = self.report.close(self.id, quantity, ours.numpy(), reference, limit)
        worst = self.report.worst
        worst[form] = max(worst[form], difference)
        if form == "f32":
            worst["f32_of_limit"] = max(worst["f32_of_limit"], difference / limit)

    def _single_limit(self, what: str, reference: NDArray[Any]) -> float:
        noise = self.case.get("max_abs_diff", {})
        own = noise.get(f"f32_vs_f64_{what}", noise.get("f32_vs_f64", 0.0))
        return max(TIMES_NOISE * float(own), FLOOR * max(1.0, float(np.abs(reference).max())))

    def _counts(self) -> None:
        for name, expected in self.case.items():
            if match := re.fullmatch(r"params(?:_(\d+)_classes)?", name):
                network = self._counted(match[1])
                self.report.same(self.id, name, count_parameters(network), expected)
            elif match := re.fullmatch(r"macs(?:_(\d+)_classes)?_(\d+)", name):
                ours = count_macs(self._counted(match[1]), (3, int(match[2]), int(match[2])))
                self.report.close(self.id, name, np.array(ours), np.array(expected), ADDED_UP * expected)

    def _counted(self, classes: str | None) -> nn.Module:
        number = int(classes) if classes else self.model.architecture["classes"]
        return self.model.sized(number).extract(self.subnet)

    def _resolved(self) -> None:
        expected = dict(self.case.get("resolved", {}))
        ours = self.model.official.resolved(self.model.sized(self.model.architecture["classes"]), self.subnet)
        columns = expected.pop("blocks_columns", None)
        for name, value in expected.items():
            mine = ours.get(name)
            if name == "blocks" and columns is not None and mine is not None:
                mine = [[block.get(column) for column in columns] for block in mine]
            self.report.same(self.id, f"resolved {name}", mine, value)

    def _extracted_names(self, supernet: Supernet) -> None:
        for path in sorted(self.model.cases.folder.glob("extracted_spec_*.json")):
            (_, case, *_), *expected = json.loads(path.read_text())
            if case == self.id:
                state = supernet.extract(self.subnet).state_dict()
                ours = {name: list(value.shape) for name, value in state.items()}
                theirs = {name: shape for name, shape, _ in expected}
                report = partial(self.report.same, self.id)
                report("names only in the extracted network", sorted(ours.keys() - theirs.keys()), [])
                report("names missing in the extracted network", sorted(theirs.keys() - ours.keys()), [])
                for name in ours.keys() & theirs.keys():
                    report(f"extracted shape of {name}", ours[name], theirs[name])

    def _statistics(self, supernet: Supernet) -> None:
        known = supernet.network.state_dict()
        for path in sorted(self.model.cases.folder.glob("bn_calib_*.npz")):
            with np.load(path) as archive:
                names = [name for name in archive.files if name.startswith(f"{self.id}/")]
                expected = {
                    self.model.official.own_name(name.partition("/")[2], known): archive[name] for name in names
                }
            if not expected:
                continue
            ours: dict[str, Tensor] = {}
            for name, (mean, var) in supernet.statistics_of(self.subnet).items():
                ours |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
            self.report.same(self.id, "calibrated norms", sorted(ours), sorted(expected))
            for name in ours.keys() & expected.keys():
                limit = STATISTICS * max(1.0, float(np.abs(expected[name]).max()))
                self.report.close(self.id, f"calibrated {name}", ours[name].numpy(), expected[name], limit)

    @torch.no_grad()
    def _trace(self, supernet: Supernet, inputs: Inputs) -> None:
        """Mean, deviation and first values of what every block gives."""
        for path in sorted(self.model.cases.folder.glob("trace_*.json")):
            expected = json.loads(path.read_text()).get(self.id)
            if not expected:
                continue
            outputs: dict[str, Tensor] = {}
            hooks = []
            for row in expected:
                module = supernet.network.get_submodule(row["module"])
                hooks.append(module.register_forward_hook(partial(_keep, outputs, row["module"])))
            supernet.actuate(self.subnet)(*inputs)
            for hook in hooks:
                hook.remove()
            for row in expected:
                self._trace_row(row, outputs.get(row["module"]))

    def _trace_row(self, row: Mapping[str, Any], output: Tensor | None) -> None:
        what = f"trace of {row['module']}"
        if output is None:
            self.report.fail(self.id, f"{what}: did not run")
            return
        shape = [size for size in output.shape if size != 1]
        self.report.same(self.id, f"{what}: shape", shape, [size for size in row["shape"] if size != 1])
        first = output.flatten()[: len(row["first4"])]
        ours = np.array([float(output.mean()), float(output.std()), *first.tolist()])
        theirs = np.array([row["mean"], row["std"], *row["first4"]])
        self.report.close(self.id, what, ours, theirs, EXACT)


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    outputs[name] = output


# ----------------------------------------------------------------------------------------------------------------- run


def check(folder: Path, families: Sequence[str] = (), names: Sequence[str] = ()) -> Report:
    """Run the cases of a folder; every failure is said as it is found."""
    found, report = find_cases(folder, families, names), Report()
    with tqdm(total=sum(len(each.cases) for each in found), unit=" cases", disable=None) as bar:
        for cases in found:
            with np.load(cases.path.with_suffix(".npz")) as archive:
                arrays = {name: archive[name] for name in archive.files}
            for name in dict.fromkeys(map(model_of, cases.cases)):
                _check_model(Model(cases, name), arrays, report, bar.update)
    return report


def _check_model(
    model: Model, arrays: Mapping[str, Any], report: Report, step: Callable[[], object]
) -> None:
    check_digests(model, report)
    for case in model.cases.cases:
        if model_of(case) == model.name:
            report.cases += 1
            try:
                Check(model, case, arrays, report).run()
            except (SupernetError, KeyError) as error:
                report.fail(str(case["id"]), f"{type(error).__name__}: {error}")
            step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and print; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="laid out like ../shared/fixtures")
    parser.add_argument("--family", nargs="+", default=[], choices=sorted(FAMILIES), help="only these (default: all)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="ID", help="only these (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = check(options.folder, options.family, options.cases)
    if not report.cases:
        sys.exit(f"check_conformance.py: no cases in {options.folder} (cases_*.json with their .npz in its subfolders)")
    document = {
        "folder": str(options.folder),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cases": report.cases,
        "checks": report.checks,
        "failures": len(report.failures),
        **{f"worst_{name}": value for name, value in report.worst.items()},
    }
    print(json.dumps(document))
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
