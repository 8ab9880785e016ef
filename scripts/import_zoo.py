"""Turn networks of your own into a zoo that is served: TorchScript or torch.export files, and a JSON about them.

SPEC is a JSON file. Files of members are looked for beside it:

    {"name": "birds",
     "classes": ["crow", "gull", "wren"],
     "input": {"height": 64, "width": 64, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
     "members": {"vgg": {"file": "vgg.pt"},
                 "tiny": {"file": "tiny.pt2", "outputs": "probabilities"}}}

Every network takes float32 (N, channels, height, width), any N, of pixels normalised as (pixel / 255 - mean) / std, and
computes (N, classes): logits, or probabilities where "outputs" says so. Files end in .pt (torch.jit.save) or .pt2
(torch.export.save, with a dynamic batch dimension), of networks after eval(). No Python in them is run, and nothing is
unpickled. A .pt2 file is turned into TorchScript here, once.

Accuracies are needed next, to choose by. With --data they are measured here, as scripts/profile_supernet.py does, and
latencies too. Or tell them: "accuracy": 0.91 and "accuracy_samples": 10000 in every member, measured on images that it
was not trained on; the server then measures latencies when it starts. See docs/zoo.md.

    python scripts/import_zoo.py --spec spec.json --out profiles/birds --data FOLDER
    python superserve.py --profile profiles/birds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from scripts import profile_supernet
from scripts.exported import ExportedError, to_torchscript
from scripts.train import STALE
from servable import InputSpec, Servable, create_servable, record, save_servable
from supernet import SupernetError, count_macs, count_parameters
from supernets import imported
from supernets.zoo import ZooSpace
from wholefile import read_text

SPEC = ("name", "classes", "input", "members")
INPUT = ("height", "width", "channels", "mean", "std")
MEMBER = ("file", "outputs", "accuracy", "accuracy_samples")


class SpecError(ValueError):
    """A spec that cannot be imported; says which field and why."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """As the spec tells it of one member."""

    value: float
    samples: int


# ---------------------------------------------------------------------------------------------------------------- spec


def read_spec(path: Path) -> dict[str, Any]:
    """The document, its fields checked as far as they can be without the files. Raises a ValueError or OSError."""
    try:
        spec = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"is no JSON: {error}") from error
    record(spec, "", SPEC)
    record(spec["input"], "input", INPUT)
    if not isinstance(spec["classes"], list):
        raise SpecError(f"classes must be a list of names, not {spec['classes']!r:.40}")
    if not isinstance(spec["members"], dict) or not spec["members"]:
        raise SpecError(f"members must be an object from names to files, not {spec['members']!r:.40}")
    for name, member in spec["members"].items():
        record(member, f"members.{name}", MEMBER[:1], MEMBER[1:])
    return spec


def input_of(spec: Mapping[str, Any]) -> InputSpec:
    """The form of the input."""
    form = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["input"].items()}
    try:
        return InputSpec(**form)
    except SupernetError as error:
        raise SpecError(f"input: {error}") from error


def accuracies_of(spec: Mapping[str, Any]) -> dict[str, Accuracy]:
    """What the spec tells of every member; nothing if it tells nothing of any."""
    told = {name: member for name, member in spec["members"].items() if "accuracy" in member}
    for name, member in spec["members"].items():
        if told and name not in told:
            raise SpecError(f"members.{name}.accuracy is missing, while others have it")
        if ("accuracy" in member) != ("accuracy_samples" in member):
            raise SpecError(f"members.{name}: accuracy and accuracy_samples need each other")
        value, samples = member.get("accuracy", 0), member.get("accuracy_samples", 1)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise SpecError(f"members.{name}.accuracy must be 0 to 1, not {value!r:.40}")
        if type(samples) is not int or samples < 1:
            raise SpecError(f"members.{name}.accuracy_samples must be a whole number from 1, not {samples!r:.40}")
    return {name: Accuracy(member["accuracy"], member["accuracy_samples"]) for name, member in told.items()}


# --------------------------------------------------------------------------------------------------------------- files


def member_of(name: str, spec: Mapping[str, Any], beside: Path, folder: Path) -> dict[str, Any]:
    """What supernet.json says of a member, whose file is copied into ``folder`` (TorchScript, if it was not)."""
    if not isinstance(spec["file"], str) or not spec["file"]:
        raise SpecError(f"members.{name}.file must be the name of a file, not {spec['file']!r:.60}")
    source, target = beside / spec["file"], folder / f"{name}.pt"
    if not imported.FILE_NAME.fullmatch(target.name):
        raise SpecError(f"members: '{name:.60}' is no name: letters, digits and underscores")
    try:
        if source.suffix == ".pt2":
            if not source.is_file():
                raise ExportedError("is not there, or no file")
            with imported.deprecation_known():
                torch.jit.save(to_torchscript(source), target)
        else:
            target.write_bytes(_content(source))
        sha256 = hashlib.sha256(target.read_bytes()).hexdigest()
    except (ValueError, OSError) as error:
        raise SpecError(f"members.{name}: {source}: {error}") from error
    outputs = {"outputs": spec["outputs"]} if "outputs" in spec else {}
    return {"architecture": "torchscript", "file": target.name, **outputs, "sha256": sha256}


def _content(source: Path) -> bytes:
    """Of a file that may be anywhere, as whoever imports it says so."""
    return imported.read_file(source.resolve())


def check_outputs(servable: Servable, spec: Mapping[str, Any]) -> None:
    """Raise SpecError for a member that seems to compute probabilities, where the spec does not say what it does."""
    (blank,) = servable.input.example()
    noise = torch.randn(4, *blank.shape[1:], generator=torch.Generator().manual_seed(0))
    for name, member in spec["members"].items():
        actuated = servable.supernet.actuate(servable.supernet.space.parse(name))
        with torch.inference_mode():
            if "outputs" not in member and imported.looks_like_probabilities(actuated(noise)):
                raise SpecError(
                    f'members.{name}: its outputs look like probabilities; say "outputs": "probabilities" or "logits"'
                )


def import_members(spec: Mapping[str, Any], beside: Path, out: Path) -> Servable:
    """Copy, check and write the zoo; nothing is written to ``out`` before all is well."""
    form = input_of(spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bar = tqdm(spec["members"].items(), desc="import", unit="network", disable=None)
        members = {member: member_of(member, each, beside, folder) for member, each in bar}
        servable = create_servable(
            name=spec["name"], family="zoo", space=ZooSpace((tuple(sorted(members)),)), input=form,
            classes=spec["classes"], folder=folder,
            architecture={"channels": form.channels, "classes": len(spec["classes"]), "members": members},
        )  # fmt: skip
        servable.supernet.network.requires_grad_(False).eval()
        check_outputs(servable, spec)
        out.mkdir(parents=True, exist_ok=True)
        for stale in (path for pattern in STALE for path in out.glob(pattern)):  # of a network that was there before
            stale.unlink()
        save_servable(servable, out)
    return servable


def choices_of(servable: Servable, accuracies: Mapping[str, Accuracy]) -> list[slackfit.Choice]:
    """The members with the accuracies that the spec told."""
    supernet, shape = servable.supernet, servable.input.example()[0].shape[1:]
    choices = []
    for member in supernet.space:
        alone, told = supernet.extract(member), accuracies[member.name]
        choices.append(slackfit.Choice(
            name=member.name, kind="subnet", accuracy=told.value, accuracy_samples=told.samples, test_accuracy=None,
            parameters=count_parameters(alone), macs=count_macs(alone, tuple(shape)), frontier=True,
        ))  # fmt: skip
    return choices


# -------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, as of everything else."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"import_zoo.py: {message} (--help tells more)")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--spec", type=Path, required=True, help="the JSON about the networks")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, such as profiles/birds")
    parser.add_argument("--data", help="measure accuracies on it: digits, FILE.npz of JPEGs, image folder (train.py)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, check, copy, write, measure; the last line printed is JSON."""
    options = parse_arguments(arguments)
    try:
        spec = read_spec(options.spec)
        accuracies = accuracies_of(spec)
        if accuracies and options.data:
            raise SpecError("tells accuracies, which --data would measure: leave one of them out")
        servable = import_members(spec, options.spec.parent, options.out)
        if accuracies:
            slackfit.save_choices(options.out, choices_of(servable, accuracies))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"import_zoo.py: {options.spec}: {error}")
    names = [member.name for member in servable.supernet.space]
    imported_line = json.dumps({"out": str(options.out), "members": names, "classes": len(servable.classes)})
    if options.data:
        print(imported_line)
        profile_supernet.main(["--profile", str(options.out), "--data", options.data])
        return
    then = f"superserve.py --profile {options.out}"
    print(f"next: python {then if accuracies else f'scripts/profile_supernet.py --profile {options.out} --data DATA'}")
    print(imported_line)


if __name__ == "__main__":
    main()
