"""Turn an official checkpoint into a servable: its weights, labels and pre-processing as a folder under profiles/.

CHECKPOINT is a file of tensors: a Once-for-All supernet (ResNet50 or MobileNetV3, with the names of any of its
versions, or those of the extracted largest network), or a BERT sequence classifier of Hugging Face or DynaBERT (.bin
or .safetensors). The family is read from the names; classes, the width of MobileNetV3 and all sizes of BERT from the
shapes. Other networks of these families need --architecture. Nothing in the file is executed: what needs pickled code
is refused. Every weight must be there, fit, and be finite.

The servable has the running statistics of the checkpoint, which are those of the largest subnet. Until
scripts/profile_supernet.py has calibrated the others on your data, they are served with the leading part of the same
statistics, which costs accuracy. That script (profile_texts.py for texts) also measures accuracies and latencies,
without which nothing is served; but if you know how accurate the checkpoint is (--accuracy), its largest subnet alone
can be served at once.

    python scripts/import_checkpoint.py ofa_resnet50.pth --out profiles/ofa --labels imagenet.txt
    python scripts/import_checkpoint.py model.safetensors --out profiles/sst2 --labels labels.txt --tokenizer vocab.txt
    python scripts/profile_supernet.py --profile profiles/ofa --data FOLDER
    python scripts/profile_texts.py --profile profiles/sst2 --data dev.tsv
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import supernets
from profiletable import Choice, save_choices
from scripts.checkpoints import CheckpointError, read_tensors
from scripts.train import STALE
from servable import InputSpec, Servable, TokenSpec, create_servable, save_servable
from supernet import Space, SupernetError, count_macs, count_parameters
from supernets import bert, ofa, ofa_mobilenet, ofa_resnet
from web.tokenizer import FILES as TOKENIZER_FILES
from web.tokenizer import NO_PACKAGE, load_tokenizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which the public checkpoints were trained
NAMED = 4  # names that a message lists
Tensors = Mapping[str, Tensor]


# ------------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True, slots=True)
class Official:
    """How checkpoints of a family are recognised, and what their shapes tell of the network."""

    mark: str  # part of a name that no other family has
    own_name: Callable[[str, Any], str]
    architecture: Callable[[Tensors], dict[str, Any]]
    space: Callable[[Mapping[str, Any]], Space]
    ignored: tuple[str, ...] = ()  # ends of names that hold no weights


def _outputs(tensors: Tensors, *names: str) -> int:
    """Output channels of the first of these layers that there is."""
    for name in names:
        if name in tensors and tensors[name].dim():
            return tensors[name].shape[0]
    raise CheckpointError(f"missing weights: {names[0]}")


def _resnet(tensors: Tensors) -> dict[str, Any]:
    return {"classes": _outputs(tensors, "classifier.linear.linear.weight", "classifier.linear.weight")}


def _mobilenet(tensors: Tensors) -> dict[str, Any]:
    classes = _outputs(tensors, "classifier.linear.weight", "classifier.linear.linear.weight")
    mixed = _outputs(tensors, "feature_mix_layer.conv.weight", "feature_mix_layer.conv.conv.weight")
    return {"classes": classes, "width": 1.2 if mixed == ofa.round_channels(1280 * 1.2) else 1.0}


def _bert(tensors: Tensors) -> dict[str, Any]:
    def shape(name: str) -> Sequence[int]:
        for full in (name, f"bert.{name}"):
            if full in tensors and tensors[full].dim() == 2:
                return tensors[full].shape
        raise CheckpointError(f"missing weights: bert.{name}" if name != "classifier.weight" else _NO_CLASSIFIER)

    numbers = [int(found[1]) for name in tensors if (found := re.search(r"encoder\.layer\.(\d{1,4})\.", name))]
    vocabulary, hidden = shape("embeddings.word_embeddings.weight")
    return {
        "classes": shape("classifier.weight")[0],
        "vocabulary": vocabulary,
        "hidden": hidden,
        "layers": max(numbers, default=0) + 1,
        "heads": max(1, hidden // 64),  # shapes do not tell; all public sizes of BERT have heads of 64
        "intermediate": shape("encoder.layer.0.intermediate.dense.weight")[0],
        "positions": shape("embeddings.position_embeddings.weight")[0],
        "types": shape("embeddings.token_type_embeddings.weight")[0],
    }


_NO_CLASSIFIER = "missing weights: classifier.weight (an encoder that was not fine-tuned has no classes to serve)"


OFFICIAL = {
    "bert": Official(
        "embeddings.word_embeddings.weight", bert.own_name, _bert,
        lambda architecture: bert.official_space(), ignored=("embeddings.position_ids",),
    ),
    "ofa_mobilenet": Official(
        "final_expand_layer.", ofa.own_name, _mobilenet,
        lambda architecture: ofa_mobilenet.official_space(
            architecture.get("depths", ofa_mobilenet.DEPTH), _kernels(architecture.get("kernel", 7)),
            [each for each in (3, 4, 6) if each <= architecture.get("expand", 6)] or [architecture["expand"]],
        ),
    ),
    "ofa_resnet": Official(
        "input_stem.", ofa.own_name, _resnet,
        lambda architecture: ofa_resnet.official_space(
            architecture.get("depths", ofa_resnet.DEPTH),
            sorted({*(each for each in (0.2, 0.25) if each < architecture.get("expand", 0.35)),
                    architecture.get("expand", 0.35)}),
        ),
    ),
}  # fmt: skip
# What else people have, to say what it looks like.
_FOREIGN = (
    ("distilbert.", "DistilBERT"),
    ("roberta.", "RoBERTa"),
    ("layer1.0.conv1.weight", "a ResNet of torchvision or timm"),
    ("patch_embed.proj.weight", "a vision transformer of timm"),
    ("features.0.0.weight", "a MobileNet of torchvision"),
)


def _kernels(largest: int) -> tuple[int, ...]:
    return tuple(each for each in (3, 5, 7) if each <= largest) or (largest,)


def looks_like(tensors: Tensors) -> str | None:
    """The family whose names these are; None if it is none of ours."""
    if any("roberta." in name or "distilbert." in name for name in tensors):
        return None  # have names of BERT inside
    return next((name for name, each in OFFICIAL.items() if any(each.mark in key for key in tensors)), None)


def family_of(tensors: Tensors, asked: str | None) -> str:
    """The family to import; raises CheckpointError, saying what it looks like, where that is another or none."""
    found = looks_like(tensors)
    foreign = next((what for mark, what in _FOREIGN if any(mark in name for name in tensors)), None)
    if found is None:
        what = f"looks like {foreign}" if foreign else f"has names such as {next(iter(tensors))!r:.80}"
        raise CheckpointError(f"belongs to no family that can be imported ({', '.join(OFFICIAL)}): it {what}")
    if asked is not None and asked != found:
        raise CheckpointError(f"looks like family {found}, not {asked}")
    return found


# ------------------------------------------------------------------------------------------------------------- weights


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def renamed(tensors: Tensors, expected: Tensors, official: Official) -> dict[str, Tensor]:
    """The tensors by our names; raises CheckpointError where two get the same."""
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not name.endswith(official.ignored or ("\0",)):
            ours = official.own_name(name, expected.keys())
            if ours in own:
                raise CheckpointError(f"two weights stand for {ours}; one of them is {name}")
            own[ours] = value
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):  # counts training steps: no weight, and older files lack it
            own.setdefault(name, torch.zeros_like(value, device="cpu"))
    return own


def check_weights(own: Tensors, expected: Tensors) -> None:
    """Raise CheckpointError, naming them, for weights that are missing, unknown, misshapen or not finite."""
    for what, names in (
        ("missing weights", [name for name in expected if name not in own]),
        ("unknown weights", [name for name in own if name not in expected]),
    ):
        if names:
            raise CheckpointError(f"{what} ({len(names)}): {_listed(names)}")
    wrong = [
        f"{name} is {list(own[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if own[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(f"weights of another shape ({len(wrong)}): {_listed(wrong)}")
    bar = tqdm(expected.items(), desc="check", unit="tensor", disable=None, leave=False)
    bad = [name for name, _ in bar if own[name].is_complex() or not bool(torch.isfinite(own[name]).all())]
    if bad:
        raise CheckpointError(f"weights with values that are not finite numbers ({len(bad)}): {_listed(bad)}")


def keep_own_statistics(servable: Servable) -> None:
    """Keep the checkpoint's running statistics as those of the largest subnet, to which they belong."""
    supernet = servable.supernet
    pairs = list(supernet.statistics_of(supernet.space.largest).values())
    if pairs:
        flat = torch.cat([*(mean for mean, _ in pairs), *(var for _, var in pairs)])
        supernet.set_statistics(supernet.space.largest, flat.clone())


def import_tensors(tensors: Tensors, options: argparse.Namespace, classes: Sequence[str]) -> Servable:
    """The servable of a checkpoint's tensors."""
    family = family_of(tensors, options.family)
    official = OFFICIAL[family]
    architecture = {**official.architecture(tensors), **options.architecture}
    if family == "bert" and options.heads:
        architecture["heads"] = options.heads
    with torch.device("meta"):
        supernets.build(family, architecture)  # refuses sizes that cannot be
    if len(classes) != architecture["classes"]:
        raise CheckpointError(f"has {architecture['classes']} classes, but there are {len(classes)} labels")
    servable = create_servable(
        name=options.name or options.out.resolve().name, family=family, architecture=architecture,
        space=official.space(architecture), input=input_of(family, architecture, options), classes=classes,
    )  # fmt: skip
    expected = servable.supernet.network.state_dict()
    own = renamed(tensors, expected, official)
    check_weights(own, expected)
    servable.supernet.network.load_state_dict(own)
    servable.supernet.network.requires_grad_(False).eval()
    keep_own_statistics(servable)
    return servable


def largest_choice(servable: Servable, accuracy: float, samples: float) -> Choice:
    """The largest subnet, which computes what the checkpoint does, with the accuracy that is known of it."""
    if accuracy > 1 or samples < 1 or samples != int(samples):
        raise CheckpointError(f"--accuracy: a share up to 1 of a number of inputs, not {accuracy:g} {samples:g}")
    subnet = servable.supernet.space.largest
    extracted = servable.supernet.extract(subnet)
    return Choice(
        name=subnet.name, kind="subnet", accuracy=accuracy, accuracy_samples=int(samples), test_accuracy=None,
        parameters=count_parameters(extracted), macs=count_macs(extracted, *servable.input.example()), frontier=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- labels and tokenizers


def read_labels(path: Path) -> list[str]:
    """A line each; or JSON: a list, or an object from numbers to labels (also under ``id2label``, as config.json)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text)
        content = content.get("id2label", content) if isinstance(content, dict) else content
        labels = [content[str(number)] for number in range(len(content))] if isinstance(content, dict) else content
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: has no label {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: expected a list of labels, or an object from 0, 1, … to labels")
    return labels


def count_tokens(path: Path) -> int:
    """How many tokens a vocab.txt (a line each) or a tokenizer.json has, by the greatest number."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return len(text.splitlines())
        content = json.loads(text)
        numbers = [*content["model"]["vocab"].values(), *(each["id"] for each in content.get("added_tokens", []))]
        return int(max(numbers)) + 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a vocab.txt, or a tokenizer.json that has one ({error})") from error


def input_of(family: str, architecture: Mapping[str, Any], options: argparse.Namespace) -> InputSpec | TokenSpec:
    """What the options say of the input."""
    if not supernets.family_of(family).text:
        if options.tokenizer or options.length:
            raise CheckpointError("--tokenizer and --length are for text, this is a network for images")
        return InputSpec(
            height=options.image_size or 224, width=options.image_size or 224, channels=3,
            mean=tuple(options.mean or MEAN), std=tuple(options.std or STD),
        )  # fmt: skip
    if options.image_size or options.mean or options.std:
        raise CheckpointError("--image-size, --mean and --std are for images, this is a network for text")
    if options.tokenizer:
        tokens, known = count_tokens(options.tokenizer), architecture["vocabulary"]
        if tokens > known:
            raise CheckpointError(f"{options.tokenizer} has {tokens} tokens, the network knows {known}")
    length = options.length or min(128, architecture["positions"])
    if length > architecture["positions"]:
        raise CheckpointError(f"--length {length}: the network has {architecture['positions']} positions")
    if options.tokenizer and load_tokenizer(options.tokenizer, length, architecture["vocabulary"]) is None:
        print(f"{options.tokenizer} is copied, but not tried: {NO_PACKAGE}")
    return TokenSpec(length=length, vocabulary=architecture["vocabulary"])


# -------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, as of everything else."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"import_checkpoint.py: {message} (--help tells more)")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file of PyTorch's, or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, such as profiles/ofa")
    parser.add_argument("--labels", type=Path, required=True, help="text file, a label a line; or .json (config.json)")
    parser.add_argument("--name", help="of the servable (default: the folder's)")
    parser.add_argument("--family", choices=sorted(OFFICIAL), help="default: what the checkpoint looks like")
    parser.add_argument("--image-size", type=int, help="side of an image in pixels (default: 224)")
    parser.add_argument("--mean", type=float, nargs=3, help="of each channel, of pixels 0 to 1 (default: ImageNet's)")
    parser.add_argument("--std", type=float, nargs=3, help="of each channel, likewise")
    parser.add_argument("--tokenizer", type=Path, help="of a text network: vocab.txt or tokenizer.json, to be copied")
    parser.add_argument(
        "--accuracy", type=_share, nargs=2, metavar=("SHARE", "SAMPLES"),
        help="of the checkpoint, as its authors measured it on so many inputs: serve the largest subnet at once",
    )  # fmt: skip
    parser.add_argument("--length", type=int, help="most tokens of a text (default: 128, or all positions if fewer)")
    parser.add_argument("--heads", type=int, help="of a text network (default: one for every 64 of its width)")
    parser.add_argument(
        "--architecture", type=_object, default={}, metavar="JSON", help="sizes that are not the official ones"
    )
    return parser.parse_args(arguments)


def _share(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text:.40}")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected an object such as {{\"depths\": [4, 4, 6, 4]}}, not {text:.40}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, check, convert, write; the last line printed is JSON."""
    options = parse_arguments(arguments)
    try:
        classes = read_labels(options.labels)
        tensors = read_tensors(options.checkpoint)
        try:
            servable = import_tensors(tensors, options, classes)
            choices = [largest_choice(servable, *options.accuracy)] if options.accuracy else []
        except (CheckpointError, SupernetError) as error:
            raise CheckpointError(f"{options.checkpoint}: {error}") from error
        for pattern in STALE:  # of a network that was there before
            for stale in options.out.glob(pattern):
                stale.unlink()
        save_servable(servable, options.out)
        if options.tokenizer:
            _keep_tokenizer(options.tokenizer, options.out)
        if choices:
            save_choices(options.out, choices)
    except (ValueError, OSError) as error:
        sys.exit(f"import_checkpoint.py: {error}")
    script = "profile_texts" if isinstance(servable.input, TokenSpec) else "profile_supernet"
    print(f"next: python scripts/{script}.py --profile {options.out} --data DATA")
    weights = sum(value.numel() for value in servable.supernet.network.parameters())
    print(json.dumps({
        "out": str(options.out), "family": servable.family, "weights": weights, "classes": len(classes),
        "subnets": servable.supernet.space.size, "calibrated": [each.name for each in servable.supernet.statistics],
    }))  # fmt: skip


def _keep_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy it, in place of one that was there before, which may be itself."""
    content, kept = tokenizer.read_bytes(), "vocab.txt" if tokenizer.suffix == ".txt" else "tokenizer.json"
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / kept).write_bytes(content)


if __name__ == "__main__":
    main()
