"""Training teaches all subnets at once, can be taken up where it stopped, and repeats itself from a seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_supernet import digits, noise, trained_digits
from torch import Tensor

from scripts import datasets, train
from scripts.datasets import Dataset
from scripts.train import Augmented, Recipe, Trainer, accuracy, calibration_batches, new_servable, normalise
from servable import load_servable
from supernet import Subnet, SubnetSpace

RECIPE = Recipe(epochs=2, batch_size=64, learning_rate=0.05, middle=1, seed=3, crop=1)


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_digits(tmp_path_factory.getbasetemp())


def few_arguments(folder: Path, *more: str) -> list[str]:
    return ["--data", "digits", "--out", str(folder), "--batch-size", "575", "--seed", "3", *more]


def new_trainer(data: Dataset, recipe: Recipe = RECIPE, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(new_servable(data), data, recipe)


def weights(trainer: Trainer) -> list[Tensor]:
    return [value.clone() for value in trainer.supernet.network.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------- trained for real


@pytest.mark.slow
def test_the_largest_digits_subnet_learns_to_read(profile: Path) -> None:
    servable = load_servable(profile)
    assert accuracy(servable, servable.supernet.space.largest, digits().test) >= 0.9


@pytest.mark.slow
def test_the_smallest_learns_too(profile: Path) -> None:
    servable = load_servable(profile)
    assert accuracy(servable, servable.supernet.space.smallest, digits().test) >= 0.75


@pytest.mark.slow
def test_the_statistics_of_another_subnet_ruin_accuracy(profile: Path) -> None:
    servable, data = load_servable(profile), digits()
    subnet = Subnet((2, 2, 2), (0.25, 0.25, 0.25))
    leading_part_of_the_largest = torch.cat(leading_statistics(servable.supernet, subnet))
    servable.supernet.set_statistics(subnet, leading_part_of_the_largest)
    wrong = accuracy(servable, subnet, data.test)
    servable.supernet.calibrate(subnet, calibration_batches(data, servable))
    assert accuracy(servable, subnet, data.test) > wrong + 0.05


def leading_statistics(supernet: object, subnet: Subnet) -> list[Tensor]:
    """What a subnet would use if it had no statistics of its own: the leading part of the largest's."""
    modules = dict(supernet.extract(supernet.space.largest).named_modules())
    names = {id(module): name for name, module in supernet.network.named_modules()}
    used = supernet._norms_in(subnet)
    return [
        getattr(modules[names[id(norm)]], what)[: norm.channels_of(subnet)]
        for what in ("running_mean", "running_var")
        for norm in used
    ]


@pytest.mark.slow
def test_the_log_has_one_line_per_epoch(profile: Path) -> None:
    rows = [json.loads(line) for line in (profile / "train_log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == {"epoch", "loss", "seconds", "largest", "smallest"} for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["largest"] > rows[0]["largest"]


@pytest.mark.slow
def test_what_is_saved_is_calibrated_at_both_ends(profile: Path) -> None:
    servable = load_servable(profile)
    assert set(servable.supernet.statistics) == {servable.supernet.space.largest, servable.supernet.space.smallest}
    assert {path.name for path in profile.iterdir()} >= {"supernet.json", "weights.npz", "norms.npz", "checkpoint.pt"}
    assert not list(profile.glob("*.partial"))


# --------------------------------------------------------------------------------------------- repeating and resuming


@pytest.mark.slow
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    data = noise()
    whole, first = new_trainer(data), new_trainer(data)
    whole.run_epoch()
    whole.run_epoch()
    first.run_epoch()
    train.evaluate(first.servable, data)
    first.save(tmp_path / "checkpoint.pt")
    second = new_trainer(data, seed=9)
    second.resume(tmp_path / "checkpoint.pt")
    assert second.epoch == 1
    second.run_epoch()
    assert equal(weights(second), weights(whole))
    assert not equal(weights(first), weights(whole))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result_and_another_does_not() -> None:
    data = noise()
    runs = [new_trainer(data), new_trainer(data), new_trainer(data, replace(RECIPE, seed=4))]
    losses = [trainer.run_epoch()["loss"] for trainer in runs]
    assert losses[0] == losses[1] != losses[2]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert not equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.slow
def test_the_command_resumes_and_replaces_what_belonged_to_other_weights(tmp_path: Path) -> None:
    for stale in ("search.jsonl", "choices.json", "latency-cpu-x.json", "notes.md"):
        (tmp_path / stale).write_text("of another network")
    train.main(few_arguments(tmp_path, "--epochs", "1"))
    assert not list(tmp_path.glob("latency-*"))
    assert not (tmp_path / "choices.json").exists()
    assert not (tmp_path / "search.jsonl").exists()
    assert (tmp_path / "notes.md").exists()
    train.main(few_arguments(tmp_path, "--epochs", "2", "--resume"))
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert epochs == [1, 2]
    before = (tmp_path / "norms.npz").read_bytes()
    train.main(few_arguments(tmp_path, "--epochs", "2", "--resume"))
    assert (tmp_path / "norms.npz").read_bytes() == before, "nothing left to train; statistics are saved all the same"
    assert len(load_servable(tmp_path).supernet.statistics) == 2


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.slow
def test_resuming_from_nothing_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.py: .*checkpoint\.pt"):
        train.main(few_arguments(tmp_path, "--resume"))


def test_unknown_data_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.py: numbers: expected 'digits'"):
        train.main(["--data", "numbers", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1150 training images are fewer than a batch of 5000"):
        train.main(["--data", "digits", "--out", str(tmp_path / "new"), "--batch-size", "5000"])
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------- recipe


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [RECIPE.learning_rate_at(step / 100) for step in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[20] == RECIPE.learning_rate
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_defaults_depend_on_the_data() -> None:
    small, large = noise(), noise(10_000, "cifar10", side=2, channels=3)
    recipes = [train.recipe_of(train.parse_arguments(["--data", "x", "--out", "y"]), data) for data in (small, large)]
    assert [recipe.epochs for recipe in recipes] == [8, 18]
    assert [recipe.batch_size for recipe in recipes] == [64, 500]
    assert [recipe.learning_rate for recipe in recipes] == pytest.approx([0.05, 0.390625])
    assert [recipe.crop for recipe in recipes] == [1, 4]


def test_the_bundled_cifar_network_keeps_its_form() -> None:
    preset = train.PRESETS["cifar10"]
    space = SubnetSpace(preset.depths, preset.expands)
    assert (preset.widths, preset.stem_width, preset.pooled) == ((64, 128, 256), 24, True)
    assert (len(space), space.smallest.name, space.largest.name) == (500, "d1-1-2-e0.125-0.125-0.25", "d2-2-2-e1")


def test_other_photographs_get_the_network_of_cifar() -> None:
    pictures = noise(name="flowers", side=32, channels=3)
    assert train.preset_of(pictures) is train.PRESETS["cifar10"]


# ------------------------------------------------------------------------------------------------------------- images


def test_a_new_servable_fits_its_data() -> None:
    servable = new_servable(noise())
    assert (servable.input.height, servable.input.width, servable.input.channels) == (8, 8, 1)
    assert servable.classes == tuple("0123456789")
    x = normalise(noise().train.images, servable.input)
    assert x.shape == (128, 1, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last) or x.shape[1] == 1
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05


def test_an_epoch_shows_every_image_once_beside_its_label() -> None:
    numbered = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 8, 8, 1))
    data = replace(noise(), mirrored=True, train=datasets.Split(np.ascontiguousarray(numbered), np.arange(60)))
    batches = list(Augmented(data, crop=2).batches(20, np.random.default_rng(0)))
    assert [images.shape for images, _ in batches] == [(20, 8, 8, 1)] * 3
    assert sorted(label for _, labels in batches for label in labels) == list(range(60))
    assert all((images[:, :, :, 0] == labels[:, None, None]).all() for images, labels in batches)


def test_every_image_is_seen_both_ways_in_any_two_epochs() -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None], (64, 8, 8, 1)).copy()
    data = replace(noise(), train=datasets.Split(ramp, np.arange(64)), mirrored=True)
    augmented, seen = Augmented(data, crop=0), []
    for epoch in (3, 4):
        ((images, labels),) = augmented.batches(64, np.random.default_rng(epoch), epoch)
        seen.append((images[:, 0, 0, 0] > 3)[np.argsort(labels)])
    assert (seen[0] != seen[1]).all()
    assert 16 < seen[0].sum() < 48


def test_a_square_of_the_mean_colour_is_cut_out_of_every_image() -> None:
    bright = np.full((64, 8, 8, 1), 200, np.uint8)
    bright[::2] = 100
    data = replace(noise(), train=datasets.Split(bright, np.zeros(64, np.int64)))
    ((images, _),) = Augmented(data, crop=0, cutout=3).batches(64, np.random.default_rng(0))
    cut = images[:, :, :, 0] == 150
    assert (cut.sum((1, 2)) == 9).all()
    assert all(mask.any(0).sum() == mask.any(1).sum() == 3 for mask in cut), "a square"
    assert len(np.unique(cut, axis=0)) > 10, "not always at the same place"


def test_smaller_subnets_may_learn_from_a_part_of_each_batch() -> None:
    servable, data = new_servable(noise()), noise()
    trainer, sizes = Trainer(servable, data, replace(RECIPE, batch_size=32, share=0.25)), []
    servable.supernet.network.classifier.register_forward_hook(lambda *given: sizes.append(len(given[2])))
    trainer.run_epoch()
    assert set(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True)) == {(32, 8, 8)}
    for wrong in ("0", "1.5"):
        with pytest.raises(SystemExit):
            train.parse_arguments(["--data", "x", "--out", "y", "--share", wrong])


def test_images_are_shifted_by_at_most_the_crop_and_mirrored_only_where_that_keeps_the_class() -> None:
    ramp = np.broadcast_to(np.arange(100, 108, dtype=np.uint8)[None, None, :, None], (64, 8, 8, 1)).copy()
    plain = replace(noise(), train=datasets.Split(ramp, np.zeros(64, np.int64)), mirrored=False)
    for data, signs in ((plain, {1}), (replace(plain, mirrored=True), {-1, 1})):
        ((images, _),) = Augmented(data, crop=1).batches(64, np.random.default_rng(0))
        middle = images[:, 4, 3:5, 0].astype(int)
        assert set(middle[:, 1] - middle[:, 0]) == signs
        assert set(middle[:, 0]) <= {102, 103, 104, 105}
