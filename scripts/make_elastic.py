"""Make a network of timm's elastic, train it a little, and write a servable (docs/bring-your-own.md).

Finds what can be elastic in the network and says it; sorts channels and heads by importance, so that a network that
was trained loses as little as it can; inserts the operators and proves on an example that the largest subnet computes
what the network did; fine-tunes with the sandwich rule of scripts/train.py, calibrates the largest and the smallest
subnet, and writes supernet.json, weights and norm statistics. scripts/profile_supernet.py makes the servable complete.

    python scripts/make_elastic.py --model resnet18 --data digits --out profiles/mine --epochs 8 --arguments \\
        '{"channels": [16, 32, 64, 64], "output_stride": 8}'
    python scripts/make_elastic.py --model vit_tiny_patch16_224 --data digits --out profiles/vit --arguments \\
        '{"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 4}'
    python scripts/make_elastic.py --model resnet18 --weights trained.pt --report-only --input-size 3 32 32 --classes 10
    python scripts/profile_supernet.py --profile profiles/mine --data digits --candidates 40
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from insertion import Insertion, make_elastic
from scripts import datasets, train
from scripts.checkpoints import read_tensors
from servable import InputSpec, Servable, create_servable
from subnets import SubnetSpace
from supernets.timm_models import TimmNetwork


def with_weights(network: TimmNetwork, path: Path) -> None:
    """Load the state dict of timm's own network, whose attention is packed; ValueError if it does not fit."""
    tensors = read_tensors(path)
    plain, known = {}, network.network.state_dict()
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".qkv.")
        if owner and f"{owner}.query.{leaf}" in known and value.shape[0] % 3 == 0:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            plain |= {f"{owner}.{part}.{leaf}": third for part, third in parts}
        else:
            plain[name] = value
    try:
        network.network.load_state_dict(plain)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    if not all(bool(torch.isfinite(value).all()) for value in plain.values()):
        raise ValueError(f"{path}: weights with values that are not finite")


def elastic_network(options: argparse.Namespace, architecture: dict[str, Any]) -> tuple[TimmNetwork, Insertion]:
    """The network with its weights, sorted, and the supernet that it became."""
    network = TimmNetwork(**architecture)
    if options.weights:
        with_weights(network, options.weights)
    example = torch.randn(2, *architecture["input_size"], generator=torch.Generator().manual_seed(0))
    space = None
    if options.depths or options.expands:
        default = make_elastic(TimmNetwork(**architecture), example, sort=False).supernet.space
        space = SubnetSpace(_tuples(options.depths, default.depths), _tuples(options.expands, default.expands))
    return network, make_elastic(
        network, example, space=space, sort=not options.unsorted, depth_rule=options.depth_rule
    )


def _tuples(given: list[list[Any]] | None, default: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    return default if given is None else tuple(map(tuple, given))


def servable_of(
    name: str, architecture: dict[str, Any], insertion: Insertion, data: datasets.Dataset
) -> Servable:
    """A servable with the weights of the network that was made elastic."""
    channels, height, width = architecture["input_size"]
    pixels = data.train.images[:10_000].reshape(-1, channels) / 255
    servable = create_servable(
        name=name, family="timm", architecture=architecture, space=insertion.supernet.space,
        input=InputSpec(
            height=height, width=width, channels=channels,
            mean=tuple(np.round(pixels.mean(0), 4).tolist()), std=tuple(np.round(pixels.std(0), 4).tolist()),
        ),
        classes=data.classes,
    )  # fmt: skip
    servable.supernet.network.load_state_dict(insertion.supernet.network.state_dict())
    return servable


def architecture_of(options: argparse.Namespace, data: datasets.Dataset | None) -> dict[str, Any]:
    """What supernet.json says of the network; its input and classes are those of the data, where there are any."""
    input_size, classes = options.input_size or [3, 224, 224], options.classes or 1000
    if data is not None:
        height, width, channels = data.train.images.shape[1:]
        input_size, classes = [channels, height, width], len(data.classes)
    return {
        "model": options.model, "classes": classes, "input_size": input_size, "arguments": options.arguments,
        "depth_rule": options.depth_rule,
    }  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="as timm calls it, such as resnet18 or vit_tiny_patch16_224")
    parser.add_argument("--arguments", type=_json_object, default={}, help="more for timm.create_model, as JSON")
    parser.add_argument("--weights", type=Path, help="state dict of the trained network (default: random weights)")
    parser.add_argument("--data", help="digits, FILE.npz of JPEGs, cifar-10-batches-py folder, image folder")
    parser.add_argument("--out", type=Path, help="folder of the servable, such as profiles/mine")
    parser.add_argument("--report-only", action="store_true", help="say what can be elastic, and do no more")
    parser.add_argument("--input-size", type=int, nargs=3, help="channels, height, width; without --data")
    parser.add_argument("--classes", type=int, help="without --data (default: 1000)")
    parser.add_argument("--depths", type=_lists, help="legal depths of each stage as JSON, such as [[1,2],[1,2]]")
    parser.add_argument("--expands", type=_lists, help="legal expand ratios of each stage as JSON, likewise")
    parser.add_argument("--depth-rule", choices=["every-other", "first"], default="every-other", help="of encoders")
    parser.add_argument("--unsorted", action="store_true", help="leave channels and heads in the order that they have")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning (default: 4)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="default: adamw for encoders, sgd for others")
    parser.add_argument("--learning-rate", type=float, help="peak (default: 0.1, of adamw 0.002)")
    parser.add_argument("--middle", type=int, default=1, help="random subnets per step beside largest and smallest")
    parser.add_argument("--image-size", type=int, default=32, help="side to which a folder's images are resized")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of images and subnets")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice")
    options = parser.parse_args(arguments)
    if not options.report_only and (options.data is None or options.out is None):
        parser.error("--data and --out are needed, except with --report-only")
    return options


def _json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected an object, not {text:.40}")
    return value


def _lists(text: str) -> list[list[Any]]:
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(each, list) for each in value):
        raise argparse.ArgumentTypeError(f"expected a list of lists, not {text:.40}")
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error


def trainer_of(
    options: argparse.Namespace, servable: Servable, data: datasets.Dataset, encoders: bool
) -> train.Trainer:
    """What fine-tunes the servable as the options say."""
    optimizer = options.optimizer or ("adamw" if encoders else "sgd")
    recipe = train.Recipe(
        epochs=options.epochs, batch_size=options.batch_size, middle=options.middle, seed=options.seed,
        learning_rate=options.learning_rate or (0.1 if optimizer == "sgd" else 0.002),
        crop=train.preset_of(data).crop,
    )  # fmt: skip
    trainer = train.Trainer(servable, data, recipe)
    if optimizer == "adamw":
        groups = [{name: each[name] for name in ("params", "weight_decay")} for each in trainer.optimizer.param_groups]
        trainer.optimizer = torch.optim.AdamW(groups, lr=0.0)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Find, insert, fine-tune, calibrate, write; the last line printed is JSON."""
    options = parse_arguments(arguments)
    try:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        data = datasets.load(options.data, options.image_size) if options.data else None
        architecture = architecture_of(options, data)
        _, insertion = elastic_network(options, architecture)
        print(insertion.structure.report())
        if options.report_only or data is None:
            print(json.dumps({"stages": len(insertion.structure.stages), "subnets": insertion.supernet.space.size}))
            return
        servable = servable_of(options.out.resolve().name, architecture, insertion, data)
        servable.supernet.to(torch.device(options.device))
        encoders = any(stage.heads for stage in insertion.structure.stages)
        train.train(trainer_of(options, servable, data, encoders), options.out, fresh=True)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"make_elastic.py: {error}")


if __name__ == "__main__":
    main()
