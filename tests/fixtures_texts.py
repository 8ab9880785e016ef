"""A tiny BERT servable, made by the import script of a state dict with Hugging Face's names, and its tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import slackfit
import supernets
from scripts import import_checkpoint
from servable import load_servable
from slackfit import Choice
from supernets.bert import official_space

LENGTH = 40
LABELS = ("negative", "neutral", "positive")
WORDS = ("the", "a", "film", "plot", "was", "is", "not", "very", "good", "bad", "great", "poor", ",", ".", "!")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = (*SPECIAL, *WORDS, *(c for c in LETTERS if c != "a"), *(f"##{c}" for c in LETTERS))
SIZES = {"hidden": 32, "layers": 2, "heads": 4, "intermediate": 64, "positions": 64, "types": 2}
LARGEST, SMALLEST = official_space().largest.name, official_space().smallest.name


def write_tokenizer(path: Path, *, vocabulary: tuple[str, ...] = VOCABULARY, **truncation: object) -> Path:
    """A WordPiece tokenizer of BERT's kind, as tokenizer.json; skips the test where the package is not installed."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    from tokenizers import models, normalizers, pre_tokenizers, processors

    numbers = {token: number for number, token in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, numbers[token]) for token in ("[SEP]", "[CLS]")]
    made.post_processor = processors.BertProcessing(*ends)
    if truncation:
        made.enable_truncation(**truncation)
    made.save(str(path))
    return path


def ids_of(text: str) -> list[int]:
    """What the tokenizer makes of words that it has."""
    return [VOCABULARY.index(token) for token in ("[CLS]", *text.split(), "[SEP]")]


def state_dict() -> dict[str, torch.Tensor]:
    """Random weights that answer each text differently."""
    torch.manual_seed(0)
    network, _ = supernets.build("bert", {"classes": len(LABELS), "vocabulary": len(VOCABULARY), **SIZES})
    return {
        name: torch.randn_like(value) * (0.02 if name.endswith("bias") else 1.0 if "Norm" in name else 0.5)
        for name, value in network.state_dict().items()
    }


def import_text_servable(folder: Path, *more: str, tokenizer: Path | None = None) -> Path:
    """Run the import script; the folder of the servable."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, labels = folder / "model.bin", folder / "labels.txt"
    torch.save(state_dict(), checkpoint)
    labels.write_text("\n".join(LABELS))
    arguments = [str(checkpoint), "--out", str(folder / "tinybert"), "--labels", str(labels), "--heads", "4"]
    arguments += ["--length", str(LENGTH), *more, *([] if tokenizer is None else ["--tokenizer", str(tokenizer)])]
    import_checkpoint.main(arguments)
    return folder / "tinybert"


def write_text_servable(folder: Path, *, with_tokenizer: bool = True) -> Path:
    """The servable with two choices and no latency table; skips the test where the tokenizer cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder / "given.json") if with_tokenizer else None
    made = import_text_servable(folder, tokenizer=tokenizer)
    choices = [
        Choice(name=name, kind="subnet", accuracy=accuracy, accuracy_samples=100, test_accuracy=None,
               parameters=1000, macs=1000, frontier=True)
        for name, accuracy in ((SMALLEST, 0.7), (LARGEST, 0.9))
    ]  # fmt: skip
    slackfit.save_choices(made, choices)
    return made


def tokens(*ids: int) -> NDArray[np.int32]:
    """Ids that all are attended to."""
    return np.array([ids, [1] * len(ids)], np.int32)


def plain_probabilities(folder: Path, name: str, ids: list[int], mask: list[int] | None = None) -> NDArray[np.float32]:
    """What the subnet, extracted and on its own, makes of one unpadded text."""
    network = _extracted(folder, name)
    attended = torch.tensor([mask or [1] * len(ids)])
    with torch.inference_mode():
        found: NDArray[np.float32] = network(torch.tensor([ids]), attended).softmax(1)[0].numpy()
    return found


@functools.cache
def _extracted(folder: Path, name: str) -> nn.Module:
    supernet = load_servable(folder).supernet
    return supernet.extract(supernet.space.parse(name)).eval()


def predictions(answer: str | bytes) -> dict[str, float]:
    """Probabilities by label in a reply with all of them."""
    return {each["label"]: each["probability"] for each in json.loads(answer)["predictions"]}
