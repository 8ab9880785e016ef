"""Train a weight-shared supernet: every step the largest, the smallest and some random subnets (the sandwich rule).

The largest learns from the labels; the others learn from the largest's probabilities of the same step (in-place
distillation; Yu et al., "Universally Slimmable Networks", ICCV 2019). Writes a servable (supernet.json, weights, norm
statistics of the largest and the smallest) and train_log.jsonl; scripts/profile_supernet.py makes it complete.

With --zoo: separate networks of three architectures instead, each from the labels, on images in an order of its own.

    python scripts/train.py --data digits --out profiles/digits
    python scripts/train.py --data ../shared/data/cifar10_jpeg.npz --out profiles/cifar10 --bfloat16 --share 0.5
    python scripts/train.py --data ../shared/data/cifar10_jpeg.npz --out /tmp/longer --start profiles/cifar10
    python scripts/train.py --data ../shared/data/cifar10_jpeg.npz --zoo --out profiles/cifar10-zoo --bfloat16
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import datasets
from servable import InputSpec, Servable, create_servable, load_servable, save_servable
from supernet import Subnet, SubnetSpace
from supernets.zoo import ZooSpace
from wholefile import replacing, write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What suits a data set: the network and its space of subnets, and how to train it."""

    widths: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]  # by stage
    expands: tuple[tuple[float, ...], ...]
    crop: int
    epochs: int
    stem_width: int = 0
    pooled: bool = False
    cutout: int = 0
    threads: int = 0  # 0: torch's choice; for tensors this small, threads cost more than they save


PRESETS = {
    # The last stage always has both blocks: they cost little at a low resolution, and nothing else is worth as much.
    "cifar10": Preset(
        widths=(64, 128, 256),
        depths=((1, 2), (1, 2), (2,)),
        expands=((0.125, 0.25, 0.5, 0.75, 1.0), (0.125, 0.25, 0.5, 0.75, 1.0), (0.25, 0.375, 0.5, 0.75, 1.0)),
        crop=4,
        epochs=18,
        stem_width=24,
        pooled=True,
        cutout=8,
    ),
    "digits": Preset(
        widths=(8, 16, 32), depths=((1, 2, 3),) * 3, expands=((0.125, 0.25, 0.5, 1.0),) * 3, crop=1, epochs=8, threads=1
    ),
}
# The networks of a zoo, without channels and classes; for images of 32 pixels a side.
ZOO = {
    "branched": {"architecture": "branched", "stem": 32, "widths": (128, 192, 256), "depths": (1, 1, 2)},
    "inverted": {
        "architecture": "inverted", "stem": 24, "widths": (32, 64, 128), "depths": (1, 2, 2), "strides": (2, 2, 2),
        "expand": 4, "head": 256, "fused": True,
    },
    "residual": {
        "architecture": "residual", "widths": (40, 80, 160), "depths": (1, 1, 1), "stem_stride": 1, "stem_width": 24,
        "pooled": True,
    },
}  # fmt: skip
# Of a network that was trained before: profile_supernet.py makes them anew.
STALE = ("search.jsonl", "choices.json", "latency-*.json")


def preset_of(data: datasets.Dataset) -> Preset:
    """The preset for this data; that of CIFAR-10 for other photographs."""
    return PRESETS.get(data.name, PRESETS["cifar10"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train; the learning rate rises linearly for ``warmup`` of all steps, then falls to zero as a cosine."""

    epochs: int
    batch_size: int
    learning_rate: float
    middle: int
    seed: int
    crop: int
    cutout: int = 0
    distill_weight: float = 1.0
    share: float = 1.0
    label_smoothing: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.2
    bfloat16: bool = False

    def learning_rate_at(self, progress: float) -> float:
        """The rate when this part (0..1) of the training is done."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


def new_servable(data: datasets.Dataset) -> Servable:
    """A servable with random weights for this data: a ResNet whose input size, channels and classes fit."""
    preset, spec = preset_of(data), input_of(data)
    return create_servable(
        name=data.name,
        family="resnet",
        architecture={
            "channels": spec.channels, "widths": preset.widths, "depths": tuple(each[-1] for each in preset.depths),
            "classes": len(data.classes), "stem_stride": 1, "stem_width": preset.stem_width, "pooled": preset.pooled,
        },
        space=SubnetSpace(preset.depths, preset.expands),
        input=spec,
        classes=data.classes,
    )  # fmt: skip


def new_zoo(data: datasets.Dataset) -> Servable:
    """A servable of separate networks with random weights."""
    spec = input_of(data)
    return create_servable(
        name=f"{data.name}-zoo",
        family="zoo",
        architecture={"channels": spec.channels, "classes": len(data.classes), "members": ZOO},
        space=ZooSpace((tuple(sorted(ZOO)),)),
        input=spec,
        classes=data.classes,
    )


def input_of(data: datasets.Dataset) -> InputSpec:
    """The size of these images, and how to normalise their colours."""
    height, width, channels = data.train.images.shape[1:]
    pixels = data.train.images[:10_000].reshape(-1, channels) / 255
    mean, std = (tuple(np.round(each, 4).tolist()) for each in (pixels.mean(0), pixels.std(0)))
    return InputSpec(height=height, width=width, channels=channels, mean=mean, std=std)


def normalise(images: np.ndarray, spec: InputSpec) -> Tensor:
    """Network inputs (N, C, H, W), channels last in memory, of uint8 images (N, H, W, C)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(torch.tensor(spec.mean).view(1, -1, 1, 1)).div_(torch.tensor(spec.std).view(1, -1, 1, 1))


class Augmented:
    """Batches of training images: shifted, mirrored where the data allow it, and with a square cut out of each.

    ``crop``: by how many pixels at most; ``cutout``: side of the square, which is filled with the mean colour
    (DeVries and Taylor, 2017; 0: none). Which half of the images is mirrored alternates from epoch to epoch, so that
    every image is seen both ways in any two of them (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024).
    """

    def __init__(self, data: datasets.Dataset, crop: int, cutout: int = 0) -> None:
        pad = ((0, 0), (crop, crop), (crop, crop), (0, 0))
        self._padded = np.pad(data.train.images, pad, mode="reflect")
        self._data, self._crop, self._cutout = data, crop, cutout
        self._mean = data.train.images[:10_000].mean((0, 1, 2)).astype(np.uint8)

    def batches(self, size: int, rng: np.random.Generator, epoch: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch in random order, dropping an incomplete last batch."""
        order = rng.permutation(len(self._data.train))
        for start in range(0, len(order) - size + 1, size):
            indices = order[start : start + size]
            yield self._images(indices, rng, epoch), self._data.train.labels[indices]

    def _images(self, indices: np.ndarray, rng: np.random.Generator, epoch: int) -> np.ndarray:
        height, width = self._data.train.images.shape[1:3]
        rows = rng.integers(0, 2 * self._crop + 1, (len(indices), 1)) + np.arange(height)
        columns = rng.integers(0, 2 * self._crop + 1, (len(indices), 1)) + np.arange(width)
        if self._data.mirrored:
            # A fixed pseudo-random bit of the image's number (Knuth's multiplicative hash), flipped every epoch.
            mirrored = ((indices * 2654435761 >> 16) + epoch) % 2 == 1
            columns[mirrored] = columns[mirrored, ::-1]
        images = self._padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self._cutout:
            self._cut(images, rng)
        return images

    def _cut(self, images: np.ndarray, rng: np.random.Generator) -> None:
        count, height, width = images.shape[:3]
        tops = rng.integers(0, height - self._cutout + 1, count)
        lefts = rng.integers(0, width - self._cutout + 1, count)
        for image, top, left in zip(images, tops, lefts, strict=True):
            image[top : top + self._cutout, left : left + self._cutout] = self._mean


class Trainer:
    """Training state that can be saved after each epoch and taken up again."""

    def __init__(self, servable: Servable, data: datasets.Dataset, recipe: Recipe) -> None:
        if len(data.train) < recipe.batch_size:
            raise ValueError(f"{len(data.train)} training images are fewer than a batch of {recipe.batch_size}")
        self.servable, self.data, self.recipe = servable, data, recipe
        self.supernet, self.epoch = servable.supernet, 0
        self._augmented = Augmented(data, recipe.crop, recipe.cutout)
        network = self.supernet.network.to(memory_format=torch.channels_last)
        decayed = [p for p in network.parameters() if p.dim() > 1]
        plain = [p for p in network.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch; returns mean loss of the largest subnet and seconds taken."""
        recipe, started = self.recipe, time.perf_counter()
        numpy_rng = np.random.default_rng((recipe.seed, self.epoch))
        python_rng = random.Random(recipe.seed * 1000 + self.epoch)
        steps = len(self.data.train) // recipe.batch_size
        losses = []
        bar = tqdm(desc=f"epoch {self.epoch + 1}/{recipe.epochs}", total=steps, disable=None, leave=False)
        batches = [self._batches(rng) for rng in numpy_rng.spawn(self.streams)]
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at((self.epoch + (step + 1) / steps) / recipe.epochs)
            losses.append(self._step(batches, python_rng))
            self.optimizer.step()
            self.optimizer.zero_grad()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
        bar.close()
        self.epoch += 1
        return {"loss": float(np.mean(losses)), "seconds": round(time.perf_counter() - started, 1)}

    @property
    def streams(self) -> int:
        """How many sequences of images there are, each in an order of its own."""
        return 1

    def _batches(self, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs and labels of one epoch, on the device."""
        device = self.supernet.device
        for images, labels in self._augmented.batches(self.recipe.batch_size, rng, self.epoch):
            yield normalise(images, self.servable.input).to(device), torch.from_numpy(labels).to(device)

    def _step(self, batches: Sequence[Iterator[tuple[Tensor, Tensor]]], rng: random.Random) -> float:
        """The loss, of which gradients were computed, on the next batch."""
        x, labels = next(batches[0])
        space = self.supernet.space
        logits = self._logits(space.largest, x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        some = math.ceil(len(x) * self.recipe.share)
        teacher = logits.detach()[:some].softmax(1)
        for subnet in (space.smallest, *(space.sample(rng) for _ in range(self.recipe.middle))):
            (self.recipe.distill_weight * F.cross_entropy(self._logits(subnet, x[:some]), teacher)).backward()
        return loss.item()

    def _logits(self, subnet: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            return self.supernet.for_training(subnet)(x).float()

    def save(self, path: Path) -> None:
        """Write everything that continuing needs; whole or not at all."""
        state = {
            "epoch": self.epoch,
            "network": self.supernet.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> None:
        """Continue from what ``save`` wrote, for a network of the same form."""
        state = torch.load(path, weights_only=True, map_location=self.supernet.device)
        self.supernet.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


class ZooTrainer(Trainer):
    """Trains the networks of a zoo side by side; they share nothing, not even the order of the images.

    On a CPU, each step of a member has a thread of its own and computes with that one: networks this small gain less
    from two threads for one of them, and lose much when something else wants a core.
    """

    def __init__(self, servable: Servable, data: datasets.Dataset, recipe: Recipe) -> None:
        super().__init__(servable, data, recipe)
        hands = min(torch.get_num_threads(), self.streams) if self.supernet.device.type == "cpu" else 1
        if hands > 1:
            torch.set_num_threads(1)
        self._hands = ThreadPoolExecutor(hands, "member")

    @property
    def streams(self) -> int:
        """One for each member."""
        return len(self.supernet.space)

    def _step(self, batches: Sequence[Iterator[tuple[Tensor, Tensor]]], rng: random.Random) -> float:
        return float(np.mean(list(self._hands.map(self._member_step, self.supernet.space, batches))))

    def _member_step(self, member: Any, batch: Iterator[tuple[Tensor, Tensor]]) -> float:
        x, labels = next(batch)
        loss = F.cross_entropy(self._logits(member, x), labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        return loss.item()


@torch.inference_mode()
def predict(network: Callable[[Tensor], Tensor], images: np.ndarray, spec: InputSpec, device: torch.device) -> Tensor:
    """Logits of all images, on the host."""
    return torch.cat([network(normalise(part, spec).to(device)).cpu() for part in _in_batches(images)])


def calibration_batches(data: datasets.Dataset, servable: Servable, images: int = 2000) -> list[Tensor]:
    """Training images, unaugmented, in large batches on the supernet's device, for ``Supernet.calibrate``."""
    chosen = _in_batches(data.train.images[:images])
    return [normalise(part, servable.input).to(servable.supernet.device) for part in chosen]


def _in_batches(images: np.ndarray, size: int = 250) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def hits(
    servable: Servable, subnet: Subnet, split: datasets.Split, network: Callable[[Tensor], Tensor] | None = None
) -> np.ndarray:
    """For each image, whether the (calibrated) subnet, or ``network`` in its place, classifies it correctly."""
    network = network or servable.supernet.actuate(subnet)
    logits = predict(network, split.images, servable.input, servable.supernet.device)
    return logits.argmax(1).numpy() == split.labels


def accuracy(
    servable: Servable, subnet: Subnet, split: datasets.Split, network: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Part of the images that the (calibrated) subnet, or ``network`` in its place, classifies correctly."""
    return float(hits(servable, subnet, split, network).mean())


def evaluate(servable: Servable, data: datasets.Dataset) -> dict[str, float]:
    """Validation accuracy of the largest and the smallest subnet, or of a zoo's members, freshly calibrated."""
    space = servable.supernet.space
    batches = calibration_batches(data, servable)
    looked_at = {"largest": space.largest, "smallest": space.smallest}
    if isinstance(space, ZooSpace):
        looked_at = {member.name: member for member in space}
    result = {}
    for name, subnet in looked_at.items():
        servable.supernet.calibrate(subnet, batches)
        result[name] = round(accuracy(servable, subnet, data.validation), 4)
    return result


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="digits, FILE.npz of JPEGs, cifar-10-batches-py folder, image folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the servable, such as profiles/cifar10")
    parser.add_argument("--epochs", type=int, default=0, help="default: 18, or 8 for digits")
    parser.add_argument("--batch-size", type=int, default=0, help="default: 500, or 64 for fewer than 10,000 images")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="peak; default: 0.1 x batch size / 128")
    parser.add_argument(
        "--warmup", type=_part, default=0.2, help="part of all steps in which the rate rises, before it falls"
    )
    parser.add_argument("--zoo", action="store_true", help="train separate networks, not a supernet")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with the weights of this servable")
    parser.add_argument("--middle", type=int, default=1, help="random subnets per step beside largest and smallest")
    parser.add_argument("--distill-weight", type=float, default=1.0, help="loss of each smaller subnet counts so much")
    parser.add_argument(
        "--share", type=_part, default=1.0, help="part of each batch that the smaller subnets learn from; saves time"
    )
    parser.add_argument("--cutout", type=int, help="side of the square cut out of each image (default: 8, digits: 0)")
    parser.add_argument(
        "--label-smoothing", type=float, default=0.1, metavar="PART", help="part of each label spread over all classes"
    )
    parser.add_argument("--image-size", type=int, default=32, help="side to which a folder's images are resized")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of images and subnets")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice, or 1 for digits")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where the processor is fast at it")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    return parser.parse_args(arguments)


def _part(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0, up to 1, not {text}")
    return value


def recipe_of(options: argparse.Namespace, data: datasets.Dataset) -> Recipe:
    """The recipe that the options ask for, with defaults that depend on the data."""
    batch_size = options.batch_size or (500 if len(data.train) >= datasets.SMALL else 64)
    return Recipe(
        epochs=options.epochs or preset_of(data).epochs,
        batch_size=batch_size,
        learning_rate=options.learning_rate or 0.1 * batch_size / 128,
        middle=options.middle,
        seed=options.seed,
        crop=preset_of(data).crop,
        cutout=preset_of(data).cutout if options.cutout is None else options.cutout,
        distill_weight=options.distill_weight,
        share=options.share,
        label_smoothing=options.label_smoothing,
        warmup=options.warmup,
        bfloat16=options.bfloat16,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save after every epoch, and write the servable."""
    options = parse_arguments(arguments)
    try:
        data = datasets.load(options.data, options.image_size)
        torch.set_num_threads(options.threads or preset_of(data).threads or torch.get_num_threads())
        torch.manual_seed(options.seed)
        servable = new_zoo(data) if options.zoo else new_servable(data)
        if options.start:
            servable.supernet.network.load_state_dict(load_servable(options.start).supernet.network.state_dict())
        servable.supernet.to(torch.device(options.device))
        trainer = (ZooTrainer if options.zoo else Trainer)(servable, data, recipe_of(options, data))
        if options.resume:
            trainer.resume(options.out / "checkpoint.pt")
        train(trainer, options.out, fresh=not options.resume)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"train.py: {error}")


def _log_epoch(log: Path, row: dict[str, float]) -> None:
    """Add a line, in place of what a run that was interrupted before its checkpoint logged of this epoch and later."""
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < row["epoch"]]
    write_text(log, "".join([*kept, json.dumps(row) + "\n"]))


def train(trainer: Trainer, folder: Path, fresh: bool) -> None:
    """Run the epochs that remain, saving after each, then write the servable; the last line printed is JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    log, epochs = folder / "train_log.jsonl", trainer.recipe.epochs
    if fresh:
        log.unlink(missing_ok=True)
    while trainer.epoch < epochs:
        row = {**trainer.run_epoch(), **evaluate(trainer.servable, trainer.data)}
        _log_epoch(log, {"epoch": trainer.epoch, **row})
        trainer.save(folder / "checkpoint.pt")
        figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"epoch {trainer.epoch}/{epochs}: {figures}", flush=True)
    accuracies = evaluate(trainer.servable, trainer.data)  # calibrates what is saved
    for stale in itertools.chain.from_iterable(folder.glob(pattern) for pattern in STALE):
        stale.unlink()
    save_servable(trainer.servable, folder)
    print(json.dumps({"out": str(folder), "subnets": len(trainer.supernet.space), **accuracies}))


if __name__ == "__main__":
    main()
