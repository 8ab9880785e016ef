"""Coverage-guided fuzzing of everything that reads what strangers send, with atheris (libFuzzer for Python).

Five readers are fed: bodies of POST /predict (web/inputs.py: images, raw tensors, JSON), infer requests of the Open
Inference Protocol (web/infer_requests.py, binary tensors included), messages of /stream (web/stream.py), the WebSocket
frames that these come in (web/frames.py), and parameters with the plain requests that are refused at the door
(web/inputs.py, web/door.py). The first byte of an input says which. Frames must be read alike in one piece and in many,
and a message whose header is known must be read as if it were not. Each must end in an input that the network can take,
or in a ServeError whose answer is JSON; any other exception, an input that takes 10 s, and 2 GB of memory are findings.
Coverage is counted in the project's own readers and in Pillow's Python; C code is run and not counted.

    python scripts/fuzz.py --seconds 600
    python scripts/fuzz.py --replay finding    what a stored finding does

Findings are stored in --findings. The last line of stdout is one JSON document; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

CASES = ("predict", "infer", "stream", "parameters", "frames")
SIDE = 8
LONGEST_INPUT = 8192
FINDING = "=== Uncaught Python exception: ==="  # what atheris prints before a traceback
SLOWEST_S, MOST_MEMORY_MB = 10, 2048
COUNTED = ("web", "PIL")
IMAGE_READERS = ("BmpImagePlugin", "GifImagePlugin", "JpegImagePlugin", "PngImagePlugin", "WebPImagePlugin")
CONTENT_TYPES = ("application/octet-stream", "image/*", "application/json", "", "text/plain")
MOST_PIXELS = 10_000
HEADER_LENGTHS = (None, "0", "{json}", "-1", "99999999999")


@dataclass(frozen=True, slots=True)
class Shape:
    """The input of a network as small as can be."""

    height: int = SIDE
    width: int = SIDE
    channels: int = 3


# ---------------------------------------------------------------------------------------------------------- the readers


def readers() -> dict[str, Callable[[bytes], object]]:
    """What reads an input without its first byte, by case; imported late, so that a worker counts their coverage."""
    from web import inputs

    limits = inputs.Limits(default_slo_s=0.1, longest_slo_s=60.0, accuracies={"small": 0.7, "large": 0.9}, classes=5)
    return {
        "predict": read_predict,
        "infer": partial(read_infer, limits),
        "stream": StreamReader(limits).read,
        "parameters": partial(read_parameters, limits),
        "frames": read_frames,
    }


def check_input(array: Any) -> None:
    """Raise AssertionError for what the network cannot take."""
    import numpy as np

    pixels, planes = (SIDE, SIDE, 3), (3, SIDE, SIDE)
    good = (array.dtype == np.uint8 and array.shape == pixels) or (array.dtype == "<f4" and array.shape == planes)
    assert good, f"{array.dtype} {array.shape}"
    assert np.isfinite(array).all(), "not finite"


def read_predict(data: bytes) -> None:
    """A body of POST /predict; its first byte says of which type."""
    from web import inputs

    check_input(inputs.decode(data[1:], CONTENT_TYPES[data[0] % len(CONTENT_TYPES)], Shape(), MOST_PIXELS))


def read_infer(limits: Any, data: bytes) -> None:
    """An infer request; its first byte says what the header of its length is."""
    from web import infer_reading, infer_requests, inputs

    form = infer_requests.ModelForm(
        name="tiny", version="1", input=Shape(), most_rows=64, max_pixels=MOST_PIXELS, longest_slo_s=60.0, classes=5,
    )
    body, length = data[1:], HEADER_LENGTHS[data[0] % len(HEADER_LENGTHS)]
    if length == "{json}":  # in front of binary data: as long as the next two bytes say
        length, body = str(int.from_bytes(body[:2], "little")), body[2:]
    reading = infer_reading.Reading(clock=float, arrival_s=0.0, slo_s=60.0, inline=bool(data[0] & 128))
    asked = infer_requests.read_infer_request(body, length, form, reading)
    for row in asked.rows:
        check_input(row)
    inputs.parse_parameters(asked.texts, {}, limits)


class StreamReader:
    """Reads messages of /stream, and remembers headers as a connection does."""

    def __init__(self, limits: Any) -> None:
        from web import stream

        self._limits, self._headers = limits, stream.Headers()

    def read(self, data: bytes) -> None:
        """One message; read alike whether its header is known or not."""
        from web import inputs, stream

        known = self._headers.recall(bytearray(data))
        split = stream.split_message(data)
        json.dumps(split.id)
        asked = split.parameters(self._limits)
        tensor = split.tensor()
        if known is not None:
            _check_alike(known, split.id, asked, tensor, data)
        elif tensor is not None:
            self._headers.remember(data, split, asked)
        if tensor is None:
            check_input(inputs.decode(split.payload, split.content_type(), Shape(), MOST_PIXELS))
        else:
            check_input(inputs.check_array(tensor, Shape()))


def _check_alike(known: Any, message_id: object, asked: object, tensor: Any, data: bytes) -> None:
    import numpy as np

    assert json.loads(known[0]) == message_id, known[0]
    assert known[1].parameters == asked, known[1]
    assert tensor is not None, known[1]
    assert (known[1].input(bytearray(data), known[2]) == tensor).all() or np.isnan(tensor).any(), known[1]


def read_frames(data: bytes) -> None:
    """What a WebSocket client sends, in one piece and in pieces; its first byte says how long these are."""
    size, sent = data[0] + 1, data[1:]
    assert _framed([sent]) == _framed([sent[at : at + size] for at in range(0, len(sent), size)])


def _framed(pieces: list[bytes]) -> tuple[list[tuple[int, bytes]], int | None]:
    """The messages, and the code of what is wrong with what follows."""
    from web import frames

    reader, read = frames.Frames(LONGEST_INPUT // 2), []
    try:
        for piece in pieces:
            reader.feed(piece)
            for kind, payload in reader.messages():
                read.append((kind, bytes(payload)))
    except frames.FrameError as error:
        return read, error.code
    return read, None


def read_parameters(limits: Any, data: bytes) -> None:
    """Parameters, and a request that is read at the door if it is one."""
    from web import door, inputs

    if door.head_of(data) is not None:
        door.Door(Crowded(limits), lambda *_: None).answer(data, connection=None)
    lines = [line.partition("=") for line in data.decode("utf-8", "surrogateescape").split("&")]
    inputs.parse_parameters({name: value for name, _, value in lines}, {}, limits)


class Crowded:
    """A server that refuses all queries, so that the door reads them."""

    clock = staticmethod(lambda: 0.0)
    flooded = True

    def __init__(self, limits: Any) -> None:
        self._limits = limits

    def limits(self) -> Any:
        """What parameters may be."""
        return self._limits

    def turn_away(self, arrival_s: float, parameters: Any, coming: int = 0, delay_s: float = 0.0) -> None:
        """Refuse."""
        from web.errors import QueueFull

        raise QueueFull("full", retry_after_s=1)


def one_input(found: dict[str, Callable[[bytes], object]], data: bytes) -> str:
    """Read one input; what became of it. Raises whatever is a finding."""
    from web.errors import ServeError, error_response

    if len(data) < 2:
        return "too short"
    try:
        found[CASES[data[0] % len(CASES)]](data[1:])
    except ServeError as error:
        document = json.loads(error_response(error).body or b"")  # type: ignore[arg-type]
        assert document["error"], document
        assert document["reason"], document
        assert len(document["error"]) < 2000, "an error repeats what was sent"
        return f"{error.status} {document['error']}"
    return "read"


# ---------------------------------------------------------------------------------------------------------------- seeds


def seeds() -> dict[str, bytes]:
    """Good inputs of every kind, from which fuzzing begins."""
    import numpy as np
    from PIL import Image

    pixels = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    planes = np.linspace(-1, 1, 3 * SIDE * SIDE, dtype="<f4").reshape(3, SIDE, SIDE)
    bodies = {"raw": pixels.tobytes(), "float": planes.tobytes()}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(np.tile(pixels, (2, 2, 1))).save(file, kind)
        bodies[kind] = file.getvalue()
    for name, progressive in (("JPEG-plain", False), ("JPEG-progressive", True)):  # of the network's size
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", progressive=progressive)
        bodies[name] = file.getvalue()
    as_json = {"pixels": json.dumps({"inputs": pixels.tolist()}), "planes": json.dumps({"inputs": planes.tolist()})}
    found = {f"predict-{name}": b"\0\0" + body for name, body in bodies.items()}
    found |= {f"predict-json-{name}": b"\0\2" + text.encode() for name, text in as_json.items()}
    found |= {f"infer-raw-{name}": b"\1\1" + body for name, body in bodies.items()}
    found |= {
        f"infer-{name}": b"\1\2" + struct.pack("<H", len(head)) + head + body
        for name, (head, body) in _infer_seeds(bodies, pixels).items()
    }
    for name, body in bodies.items():
        header = json.dumps({"id": 1, "slo_ms": 50, "min_accuracy": 0.5, "priority": 1, "top_k": 2}).encode()
        found[f"stream-{name}"] = b"\2" + struct.pack("<I", len(header)) + header + body
    header = json.dumps({"id": "x", "dtype": "uint8", "shape": [SIDE, SIDE, 3]}).encode()
    found["stream-tensor"] = b"\2" + struct.pack("<I", len(header)) + header + bodies["raw"]
    masked = b"\1\2\3\4" + b"\1\2\3\4" * 2
    found["frames"] = b"\4\6\x82\x88" + masked + b"\x01\x88" + masked + b"\x89\x80" + bytes(4) + b"\x80\x80" + bytes(4)
    found["frames-long"] = b"\4\xff\x82\xfe\1\0" + bytes(4 + 256) + b"\x88\x82" + bytes(4) + b"\x03\xe8"
    found["parameters"] = b"\3slo_ms=50&min_accuracy=0.5&priority=3&top_k=2"
    found["request"] = b"\3POST /predict?slo_ms=50 HTTP/1.1\r\nHost: x\r\nX-Top-K: 2\r\nContent-Length: 3\r\n\r\nabc"
    return found


def _infer_seeds(bodies: dict[str, bytes], pixels: Any) -> dict[str, tuple[bytes, bytes]]:
    def head(shape: list[int], datatype: str, **more: object) -> bytes:
        tensor = {"name": "input", "shape": shape, "datatype": datatype, **more}
        output = {"name": "probabilities", "parameters": {"binary_data": True, "classification": 2}}
        wishes = {"timeout": 50_000, "priority": 1}
        return json.dumps({"id": "1", "parameters": wishes, "inputs": [tensor], "outputs": [output]}).encode()

    def binary(data: bytes) -> dict[str, object]:
        return {"parameters": {"binary_data_size": len(data)}}

    half = bytes(2 * 3 * SIDE * SIDE)
    images = b"".join(struct.pack("<I", len(bodies[kind])) + bodies[kind] for kind in ("PNG", "JPEG"))
    return {
        "uint8": (head([1, SIDE, SIDE, 3], "UINT8", **binary(bodies["raw"])), bodies["raw"]),
        "fp32": (head([1, 3, SIDE, SIDE], "FP32", **binary(bodies["float"])), bodies["float"]),
        "fp16": (head([1, 3, SIDE, SIDE], "FP16", **binary(half)), half),
        "bytes": (head([2], "BYTES", **binary(images)), images),
        "json": (head([1, SIDE, SIDE, 3], "UINT8", data=pixels.reshape(-1).tolist()), b""),
    }


# -------------------------------------------------------------------------------------------------------------- running


def work(arguments: Sequence[str]) -> None:
    """Fuzz in this process, which libFuzzer then ends."""
    import atheris

    with atheris.instrument_imports(include=list(COUNTED)):
        found = readers()
        for name in IMAGE_READERS:
            importlib.import_module(f"PIL.{name}")
    atheris.Setup([sys.argv[0], *arguments], lambda data: one_input(found, data))
    atheris.Fuzz()


def fuzz(seconds: int, findings: Path, seed: int) -> dict[str, Any]:
    """Fuzz for so long, in a process of its own; what libFuzzer tells at the end."""
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in seeds().items():
            (Path(folder) / name).write_bytes(data)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", folder, f"-max_total_time={seconds}"]
        command += [f"-max_len={LONGEST_INPUT}", f"-timeout={SLOWEST_S}", f"-rss_limit_mb={MOST_MEMORY_MB}"]
        command += [f"-artifact_prefix={findings}/", "-print_final_stats=1", f"-seed={seed}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    return summary(ended.stdout + ended.stderr, ended.returncode)


def summary(told: str, code: int) -> dict[str, Any]:
    """The figures in what libFuzzer printed."""
    progress = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", told)
    executed = re.search(r"stat::number_of_executed_units: (\d+)", told)
    peak = re.search(r"stat::peak_rss_mb: *(\d+)", told)
    stored = re.findall(r"Test unit written to (\S+)", told)
    coverage, features, corpus = map(int, progress[-1]) if progress else (0, 0, 0)
    tail = (told[told.find(FINDING) :] if FINDING in told else told[-4000:]).splitlines() if code or stored else []
    return {
        "executions": int(executed[1]) if executed else 0, "coverage": coverage, "features": features,
        "corpus": corpus, "peak_rss_mb": int(peak[1]) if peak else None, "findings": stored,
        "exit_code": code, "last_words": tail,
    }  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="for how long (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's choices (default: 1)")
    parser.add_argument(
        "--findings", type=Path, default=Path(tempfile.gettempdir()) / "superserve-findings", metavar="FOLDER",
        help="where inputs are stored that fail (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one stored input, and show what happens")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz, and print what came of it."""
    options = parse_arguments(arguments)
    if options.replay is not None:
        print(one_input(readers(), options.replay.read_bytes()))
        return
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzz.py: atheris is not installed; see requirements-dev.txt")
    if options.seconds < 1:
        sys.exit("fuzz.py: --seconds must be at least 1")
    found = fuzz(options.seconds, options.findings, options.seed)
    for line in found.pop("last_words"):
        print(line)
    print(json.dumps({"seconds": options.seconds, "seed": options.seed, **found}))
    sys.exit(1 if found["findings"] or found["exit_code"] else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2:])
    else:
        main()
