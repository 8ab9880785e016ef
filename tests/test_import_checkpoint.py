"""Checkpoints in the official naming become servables; what is wrong with a file is told in one line."""

from __future__ import annotations

import importlib.util
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_families import BERT, MOBILENET, RESNET, TINY, Tiny
from torch import Tensor

from scripts import import_checkpoint
from scripts.checkpoints import CheckpointError, read_tensors
from scripts.import_checkpoint import count_tokens, family_of, read_labels
from servable import InputSpec, TokenSpec, load_servable
from supernet import Supernet

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
Tensors = dict[str, Tensor]
FAMILIES = pytest.mark.parametrize("tiny", list(TINY.values()), ids=list(TINY))


def official_name(tiny: Tiny, name: str) -> str:
    """As the public supernets call it."""
    if tiny is RESNET:
        name = name.replace(".conv.weight", ".conv.conv.weight").replace(".bn.", ".bn.bn.")
        return name.replace("classifier.linear.", "classifier.linear.linear.")
    if tiny is MOBILENET and name.startswith("blocks.") and not name.startswith("blocks.0."):
        name = name.replace(".conv.weight", ".conv.conv.weight").replace(".bn.", ".bn.bn.")
    return name


def official(tiny: Tiny) -> Tensors:
    return {official_name(tiny, name): value.clone() for name, value in tiny.network().state_dict().items()}


def architecture(tiny: Tiny) -> list[str]:
    return ["--architecture", json.dumps(tiny.architecture), *(["--image-size", "36"] if tiny is not BERT else [])]


def run(folder: Path, checkpoint: Path, tiny: Tiny, *more: str) -> Supernet:
    labels = folder / "labels.txt"
    labels.write_text("".join(f"class {number}\n" for number in range(tiny.architecture["classes"])))
    import_checkpoint.main(
        [str(checkpoint), "--out", str(folder / "out"), "--labels", str(labels), *architecture(tiny), *more]
    )
    return load_servable(folder / "out").supernet


def refusal(folder: Path, checkpoint: Path, tiny: Tiny, *more: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(folder, checkpoint, tiny, *more)
    message = str(caught.value.code)
    assert message.startswith("import_checkpoint.py: ")
    assert "\n" not in message
    assert not (folder / "out" / "weights.npz").exists()
    return message


def saved(folder: Path, content: object) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(content, path)
    return path


def write_safetensors(path: Path, tensors: Tensors) -> None:
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in tensors.items():
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": types[value.dtype], "shape": list(value.shape), "data_offsets": place}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.slow
@FAMILIES
def test_a_checkpoint_in_the_official_naming_is_served_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    tensors = official(tiny)
    supernet = run(tmp_path, saved(tmp_path, {"state_dict": tensors}), tiny)
    assert supernet.space.size > 1
    inputs = [each.float() if each.is_floating_point() else each for each in tiny.inputs()]
    expected = tiny.network().eval()(*inputs)
    actuated = supernet.actuate(supernet.space.largest)
    torch.testing.assert_close(actuated(*inputs), expected, rtol=0.02, atol=0.02)  # stored in half precision
    assert actuated.calibrated, "its running statistics are those of the largest"
    smallest = supernet.actuate(supernet.space.smallest)
    assert smallest.calibrated == (tiny is BERT), "which has none"
    assert torch.isfinite(smallest(*inputs)).all()


def old_names(name: str) -> str:
    return name.replace(".conv.inverted", ".mobile_inverted_conv.inverted").replace(
        ".conv.depth_conv", ".mobile_inverted_conv.depth_conv"
    ).replace(".conv.point_linear", ".mobile_inverted_conv.point_linear")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["supernet", "before November 2020", "extracted", "of several devices"])
def test_all_spellings_of_the_names_give_the_same_servable(spelling: str, tmp_path: Path) -> None:
    plain = MOBILENET.network().state_dict()
    spelled = {
        "supernet": official(MOBILENET),
        "before November 2020": {old_names(name): value for name, value in official(MOBILENET).items()},
        "extracted": plain,
        "of several devices": {f"module.{name}": value for name, value in official(MOBILENET).items()},
    }[spelling]
    if spelling != "extracted":
        assert spelled.keys() != plain.keys()
    loaded = run(tmp_path, saved(tmp_path, spelled), MOBILENET).network.state_dict()
    assert all(torch.equal(loaded[name], value.half().to(value)) for name, value in plain.items())


def bare(name: str) -> str:
    return name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )  # fmt: skip


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("names", [str, bare], ids=["new", "old and bare"])
def test_bert_is_read_from_both_forms_of_file_and_sizes_from_shapes(
    form: str, names: Callable[[str], str], tmp_path: Path
) -> None:
    tensors = {names(name): value for name, value in official(BERT).items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(8)[None]
    path = tmp_path / f"model.{form}"
    if form == "bin":
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors)
    labels, vocabulary = tmp_path / "config.json", tmp_path / "vocab.txt"
    labels.write_text(json.dumps({"id2label": {"0": "no", "1": "yes", "2": "maybe"}}))
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + "".join(f"word{number}\n" for number in range(26)))
    out = tmp_path / "out"
    import_checkpoint.main(
        [str(path), "--out", str(out), "--labels", str(labels), "--heads", "4", "--tokenizer", str(vocabulary)]
    )
    servable = load_servable(out)
    assert servable.architecture == BERT.architecture | {"types": 2}
    assert servable.classes == ("no", "yes", "maybe")
    assert servable.input == TokenSpec(length=8, vocabulary=30)
    assert (out / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    plain = BERT.network().state_dict()
    loaded = servable.supernet.network.state_dict()
    assert all(torch.equal(loaded[name], value.half().to(value)) for name, value in plain.items())


def test_pre_processing_is_what_was_asked_for(tmp_path: Path) -> None:
    run(tmp_path, saved(tmp_path, official(RESNET)), RESNET, "--mean", "0.1", "0.2", "0.3", "--std", "1", "2", "3")
    expected = InputSpec(height=36, width=36, channels=3, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert load_servable(tmp_path / "out").input == expected


def test_what_was_measured_of_another_network_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("choices.json", "latency-cpu-x.json", "search.jsonl", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    run(tmp_path, saved(tmp_path, official(RESNET)), RESNET)
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == ["norms.npz", "notes.txt", "supernet.json", "weights.npz"]


def test_counts_of_training_steps_may_be_missing(tmp_path: Path) -> None:
    tensors = {name: value for name, value in official(RESNET).items() if "num_batches" not in name}
    run(tmp_path, saved(tmp_path, tensors), RESNET)


def test_the_last_line_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supernet = run(tmp_path, saved(tmp_path, official(RESNET)), RESNET)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["family"] == "ofa_resnet"
    assert line["subnets"] == supernet.space.size
    assert line["calibrated"] == [supernet.space.largest.name]


@pytest.mark.slow
@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the fixtures beside the project (../shared)")
def test_a_checkpoint_of_official_size_is_imported_without_further_options(tmp_path: Path) -> None:
    folder = FIXTURES / "ofa_resnet50"
    spec = importlib.util.spec_from_file_location("fixtures_synth", folder / "synth.py")
    assert spec is not None
    assert spec.loader is not None
    synth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synth)
    listed = json.loads((folder / "state_dict_spec_1000.json").read_text())
    tensors = {name: torch.from_numpy(value) for name, value in synth.state_dict(listed).items()}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([f"class {number}" for number in range(1000)]))
    path = saved(tmp_path, {"state_dict": tensors, "epoch": 3})
    import_checkpoint.main([str(path), "--out", str(tmp_path / "out"), "--labels", str(labels)])
    servable = load_servable(tmp_path / "out")
    assert servable.supernet.space.size > 10**12
    weight = servable.supernet.network.get_parameter("blocks.17.conv3.conv.weight")
    torch.testing.assert_close(weight, tensors["blocks.17.conv3.conv.conv.weight"], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused

CONV = "blocks.0.conv1.conv.conv.weight"


def dropped(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blocks.1.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped, r"missing weights (15): blocks.1.conv1.conv.weight, blocks.1.conv1.bn.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unknown weights (1): extra"),
        (lambda tensors: tensors.update({CONV: torch.zeros(3, 2)}), "another shape (1): blocks.0.conv1.conv.weight is"),
        (lambda tensors: tensors[CONV].view(-1)[3:4].fill_(torch.nan), "not finite numbers (1): blocks.0.conv1.conv.w"),
        (lambda tensors: tensors[CONV].view(-1)[3:4].fill_(torch.inf), "not finite numbers (1): blocks.0.conv1.conv.w"),
        (lambda tensors: tensors[CONV].view(-1)[3:4].fill_(1e6), "not finite in half precision"),
        (lambda tensors: tensors.update({CONV: tensors[CONV].cfloat()}), "not finite numbers (1)"),
        (lambda tensors: tensors.update({"blocks.0.conv1.conv.weight": torch.zeros(1)}), "two weights stand for"),
        (lambda tensors: tensors.pop("classifier.linear.linear.weight"), "missing weights: classifier.linear.linear"),
        (lambda tensors: tensors.update({f"junk.{n}": torch.zeros(1) for n in range(9)}), "and 5 more"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    tensors = official(RESNET)
    change(tensors)
    assert message in refusal(tmp_path, saved(tmp_path, tensors), RESNET)


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["input_stem.0.conv.weight"], "bert", "looks like family ofa_resnet, not bert"),
        (["final_expand_layer.conv.weight"], "ofa_resnet", "looks like family ofa_mobilenet, not ofa_resnet"),
        (["layer1.0.conv1.weight", "fc.weight"], None, "it looks like a ResNet of torchvision or timm"),
        (["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"], "bert", "it looks like a vision transformer of timm"),
        (["distilbert.embeddings.word_embeddings.weight"], None, "it looks like DistilBERT"),
        (["roberta.embeddings.word_embeddings.weight"], None, "it looks like RoBERTa"),
        (["a.b"], None, "it has names such as 'a.b'"),
    ],
)
def test_the_family_that_it_looks_like_is_told(names: list[str], asked: str | None, message: str) -> None:
    tensors = {name: torch.zeros(1) for name in names}
    with pytest.raises(CheckpointError) as caught:
        family_of(tensors, asked)
    assert message in str(caught.value)


def test_an_encoder_without_classifier_is_told_as_such(tmp_path: Path) -> None:
    tensors = {name: value for name, value in official(BERT).items() if "classifier" not in name}
    assert "was not fine-tuned" in refusal(tmp_path, saved(tmp_path, tensors), BERT)


def test_a_gap_between_layers_is_named(tmp_path: Path) -> None:
    tensors = {name: value for name, value in official(BERT).items() if "layer.1." not in name}
    assert "missing weights (16): bert.encoder.layer.1." in refusal(tmp_path, saved(tmp_path, tensors), BERT)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("executed",)


@pytest.mark.parametrize("content", [Trap(), {"state_dict": Trap()}, {"a": torch.zeros(1), "b": Trap()}])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_not_executed(content: object, form: str, tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "refused" in (message := refusal(tmp_path, path, RESNET)) or "pickled code" in message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for form, path in (("pt", saved(tmp_path, official(RESNET))), ("safetensors", tmp_path / "a.safetensors")):
        if form == "safetensors":
            write_safetensors(path, official(RESNET))
        content = path.read_bytes()
        for length in (0, 5, 9, 30, 200, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refusal(tmp_path, path, RESNET)


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"not a checkpoint at all", b"\x80\x02.", b"\x00" * 100])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    refusal(tmp_path, path, RESNET)


@pytest.mark.parametrize(
    "content", [3, [torch.zeros(1)], {}, {"a": 3}, {1: torch.zeros(1)}, {"state_dict": {"a": "b"}}]
)
def test_other_contents_are_refused(content: object, tmp_path: Path) -> None:
    assert "expected tensors by name" in refusal(tmp_path, saved(tmp_path, content), RESNET)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.pt: No such file" in refusal(tmp_path, tmp_path / "nowhere.pt", RESNET)
    assert "Is a directory" in refusal(tmp_path, tmp_path, RESNET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "x"], "--tokenizer and --length are for text"),
        (["--length", "3"], "--tokenizer and --length are for text"),
        (["--std", "0", "1", "1"], "std must be above zero"),
        (["--image-size", "-3"], "height must be 1 to"),
        (["--architecture", '{"depths": "many"}'], "depths"),
        (["--architecture", '{"wings": 2}'], "wings"),
        (["--family", "bert"], "looks like family ofa_resnet, not bert"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, saved(tmp_path, official(RESNET)), RESNET, *options)


@pytest.mark.parametrize("options", [["--colour", "red"], ["--architecture", "{"], ["--architecture", "[]"]])
def test_unknown_options_are_refused(options: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, saved(tmp_path, official(RESNET)), RESNET, *options)
    assert options[0] in message


def test_the_number_of_labels_must_be_that_of_the_classes(tmp_path: Path) -> None:
    labels = tmp_path / "three.txt"
    labels.write_text("a\nb\n\nc\n")
    path = saved(tmp_path, official(RESNET))
    assert "has 5 classes, but there are 3 labels" in refusal(tmp_path, path, RESNET, "--labels", str(labels))


@pytest.mark.parametrize("text", ["{", "3", '{"0": "a", "2": "b"}', "[1, 2]", "[" * 100_000])
def test_other_labels_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        read_labels(path)


def test_tokens_beyond_the_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 29}}, "added_tokens": [{"id": 30}]}))
    assert count_tokens(path) == 31
    checkpoint = saved(tmp_path, official(BERT))
    assert "has 31 tokens, the network knows 30" in refusal(tmp_path, checkpoint, BERT, "--tokenizer", str(path))
    path.write_text('{"model": []}')
    assert "tokenizer.json: expected a vocab.txt" in refusal(tmp_path, checkpoint, BERT, "--tokenizer", str(path))
    assert "has 8 positions" in refusal(tmp_path, checkpoint, BERT, "--length", "9")


# --------------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_are_read_as_the_formats_own_library_writes_them(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randn(3, 4, generator=generator).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool
    )} | {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}  # fmt: skip
    library.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours = read_tensors(tmp_path / "x.safetensors")
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"__metadata__": {}},
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": ENTRY | {"dtype": "F8_E4M3"}},
        {"a": ENTRY | {"dtype": []}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"shape": [2**40, 2**40]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [4, 12]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
    ],
)
def test_impossible_headers_are_refused(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    if text[:1] != b"{":
        text = b"{" + text
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + np.zeros(2, np.float32).tobytes())
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_tensors(path)
