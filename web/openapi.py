"""GET /openapi.json: what the server answers, as OpenAPI 3.1. Errors are those of errors.py; limits are this server's.

openapi_v2.py has the paths of the Open Inference Protocol, schemas.py the pieces that both are made of.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from web.access import METRICS, OPEN
from web.errors import BadRequest, NotReady, Unauthorized, json_response
from web.inputs import IMAGE_FORMATS, LARGEST_VALUE, ImageShape, Limits
from web.live import FIGURES, SPAN_S
from web.openapi_v2 import paths_v2
from web.schemas import (
    QUERY_ERRORS,
    array,
    content,
    error_schema,
    errors,
    integer,
    nullable,
    number,
    objects,
    operation,
    path_parameter,
    reference,
    string,
    tensor,
)
from web.serving import Serving
from web.state import version
from web.texts import IDS, MASK, TEXT, TextForm

Document = dict[str, Any]

IMAGE_TYPES = tuple(f"image/{name.lower()}" for name in IMAGE_FORMATS)
ABOUT = ("version", "torch", "device", "profile", "policy")


class OpenApi:
    """Answers with the document of one server."""

    def __init__(self, serve: Serving) -> None:
        self._serve = serve

    async def handle(self, _: web.Request) -> web.Response:
        """GET /openapi.json: this document."""
        return json_response(document(self._serve))


def document(serve: Serving) -> Document:
    """All paths; accuracies and classes of the model that is served."""
    found = {
        "openapi": "3.1.0",
        "info": {
            "title": "SuperServe",
            "version": version(),
            "description": "Answers every query by its deadline, as accurately as the moment allows.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "paths": {"/predict": {"post": _predict(serve)}} | _server_paths() | paths_v2(serve),
        "components": {"schemas": _components(serve)},
    }
    return found if serve.config.api_key_file is None else _with_keys(found, serve.config.open_metrics)


def _with_keys(document: Document, open_metrics: bool) -> Document:
    """A document of a server that asks for keys: how they are sent, and 401 for all that wants one."""
    free = (*OPEN, METRICS) if open_metrics else OPEN
    for path, item in document["paths"].items():
        for described in item.values():
            if path in free:
                described["security"] = []
            else:
                described["responses"] |= errors(Unauthorized)
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return document | {"security": [{"bearer": []}, {"header": []}]}


def _predict(serve: Serving) -> Document:
    """POST /predict."""
    if isinstance(serve.form, TextForm):
        summary, bodies = "Classify one text by a deadline", _text_bodies(serve.form)
    else:
        summary, bodies = "Classify one image by a deadline", _image_bodies(serve.form.shape)
    return operation(
        "predict", summary,
        {"200": content("Answered; `deadline_met` tells whether in time", reference("Reply"))} | errors(*QUERY_ERRORS),
        "queries",
        parameters=_parameters(serve),
        requestBody={"required": True, "content": bodies},
    )  # fmt: skip


def _image_bodies(side: ImageShape) -> Document:
    values = side.height * side.width * side.channels
    raw = f"{values} bytes (uint8 pixels, H×W×C) or {4 * values} bytes (float32, C×H×W, normalised)"
    encoded = {"schema": {}, "x-description": "an image file; its centre is scaled to the network's size"}
    return dict.fromkeys(IMAGE_TYPES, encoded) | {
        "application/octet-stream": {"schema": {}, "x-description": f"{raw}, or an image file"},
        "application/json": {"schema": reference("Inputs")},
    }


def _text_bodies(form: TextForm) -> Document:
    bodies: Document = {"application/json": {"schema": reference("Inputs")}}
    if form.tokenizer is not None:
        bodies["text/plain"] = {"schema": string("a text", minLength=1, pattern=r"\S")}
    return bodies


def _limits(serve: Serving) -> Limits:
    """Those in force, or while there is no table, the widest that can be."""
    try:
        return serve.limits()
    except NotReady:
        settings = serve.config
        default_s, longest_s = settings.default_slo_ms / 1e3, settings.max_slo_ms / 1e3
        accuracies = {"not known yet": 1.0}
        return Limits(
            default_slo_s=default_s, longest_slo_s=longest_s, accuracies=accuracies, classes=len(serve.classes)
        )


def _parameters(serve: Serving) -> list[Document]:
    """Each in the query string, and as a header, which is read where the query string has none."""
    limits = _limits(serve)
    slo = number(None, limits.longest_slo_s * 1e3, exclusiveMinimum=0)
    schemas = {
        "slo_ms": slo | {"default": limits.default_slo_s * 1e3, "description": "from arrival to deadline"},
        "min_accuracy": number(0, limits.best_accuracy, default=0, description="no subnet below this accuracy"),
        "priority": integer(0, 100, default=0, description="breaks ties between equal deadlines"),
        "top_k": integer(1, limits.classes, default=1, description="how many classes to name"),
        "members": string("the subnet or the members of the ensemble to answer", enum=list(limits.accuracies)),
    }
    headers = {
        "X-SLO-Ms": "slo_ms", "X-Min-Accuracy": "min_accuracy", "X-Priority": "priority", "X-Top-K": "top_k",
        "X-Members": "members",
    }  # fmt: skip
    envoy = {"name": "X-Envoy-Expected-Rq-Timeout-Ms", "in": "header", "schema": slo}
    return [
        *({"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()),
        *({"name": header, "in": "header", "schema": schemas[name]} for header, name in headers.items()),
        envoy | {"description": "the SLO where none is given"},
    ]


def _server_paths() -> dict[str, Document]:
    """What is asked by probes, scrapers and people."""
    not_ready = errors(NotReady)
    alive, ready = objects({"status": string(const="alive")}), objects({"status": string(const="ready")})
    page, unchanged = content("HTML", string(), "text/html"), {"description": "Not changed"}
    since = {"name": "since", "in": "query", "schema": integer(-1, 2**53 - 1, default=-1)}
    upgrade = {"101": {"description": "a WebSocket; docs/api.md says what is sent over it"}}
    found = {
        "/healthz": operation("healthz", "Is the process alive?", {"200": content("Yes", alive)}),
        "/readyz": operation("readyz", "Are queries answered?", {"200": content("Yes", ready)} | not_ready),
        "/profile": operation(
            "profile", "The profile table", {"200": content("As measured", reference("Profile"))} | not_ready
        ),
        "/metrics": operation("metrics", "Metrics for Prometheus", {"200": _metrics_answer()}),
        "/openapi.json": operation("openapi", "This document", {"200": content("OpenAPI 3.1", {"type": "object"})}),
        "/live": operation(
            "live", "What happened in the last minutes, second by second",
            {"200": content("The seconds after `since` that are over", reference("Live"))} | errors(BadRequest),
            parameters=[since],
        ),
        "/": operation("page", "The live page", {"200": page, "304": unchanged}),
        "/static/{name}": operation(
            "file", "A file of the page",
            {"200": {"description": "The file"}, "304": unchanged, "404": content("None such", reference("Error"))},
            parameters=[path_parameter("name", string())],
        ),
        "/stream": operation(
            "stream", "Many queries over one connection", upgrade | errors(BadRequest, NotReady), "queries"
        ),
    }  # fmt: skip
    return {path: {"get": get} for path, get in found.items()}


def _metrics_answer() -> Document:
    kinds = ("text/plain", "application/openmetrics-text")
    return {"description": "docs/metrics.md explains them", "content": {kind: {"schema": string()} for kind in kinds}}


def _components(serve: Serving) -> dict[str, Document]:
    return {
        "Error": error_schema(),
        "Inputs": _text_inputs(serve.form) if isinstance(serve.form, TextForm) else _image_inputs(serve.form.shape),
        "Reply": _reply(serve),
        "Profile": _profile(),
        "Live": _live(),
    }


def _image_inputs(side: ImageShape) -> Document:
    pixels = tensor(integer(0, 255), side.height, side.width, side.channels)
    value = number(-LARGEST_VALUE, LARGEST_VALUE)
    planes = tensor(value, side.channels, side.height, side.width)
    return objects({"inputs": {"description": "whole numbers are pixels, else normalised", "anyOf": [pixels, planes]}})


def _text_inputs(form: TextForm) -> Document:
    ids = array(integer(0, form.vocabulary - 1)) | {"minItems": 1, "maxItems": form.length}
    mask = array(integer(0, 1)) | {"minItems": 1, "contains": {"const": 1}}
    mask["description"] = "as long as the ids; what it leaves out at the end is not computed"
    by_name = objects({IDS: ids, MASK: mask}, optional=[MASK])
    sent = objects({"inputs": {"anyOf": [ids, by_name]}})
    if form.tokenizer is None:
        return sent
    text = string("what is too long is cut off", minLength=1, pattern=r"\S")
    return {"oneOf": [objects({TEXT: text}), sent]}


def _reply(serve: Serving) -> Document:
    prediction = objects(
        {
            "label": string(enum=list(serve.classes)),
            "index": integer(0, len(serve.classes) - 1),
            "probability": number(0, 1),
        }
    )
    return objects(
        {
            "predictions": array(prediction) | {"minItems": 1},
            "subnet": string("what computed it"),
            "members": array(string()) | {"description": "of an ensemble", "minItems": 2},
            "degraded": {"const": True, "description": "there where members of the ensemble failed"},
            "accuracy": number(0, 1, description="of what computed it, as profiled"),
            "batch_size": integer(1),
            "slo_ms": number(),
            "latency_ms": number(description="from arrival to answer"),
            "queue_ms": number(description="of that, before the batch started"),
            "deadline_met": {"type": "boolean"},
        },
        optional=["members", "degraded"],
    )


def _profile() -> Document:
    device = {"kind": string(), "name": string(), "torch": string(), "dtype": string()}
    entry = objects(
        {
            "name": string(),
            "kind": string(),
            "accuracy": number(0, 1),
            "test_accuracy": nullable(number(0, 1)),
            "parameters": integer(),
            "macs": integer(),
            "latency_ms": array(number()) | {"description": "by batch size, as planned with"},
            "correction": number(description="how many times as long it takes at present"),
            "mode": array(string(enum=["parallel", "serial"])) | {"description": "of an ensemble, by batch size"},
            "why": string("of the modes"),
        },
        optional=["mode", "why"],
    )
    return objects(
        {
            "device": nullable(objects(device | {"threads": integer(), "workers": integer(1)})),
            "slowdown": number(1, description="how many times as long all of them take at present"),
            "batch_sizes": array(integer(1)),
            "entries": array(entry),
        }
    )


def _live() -> Document:
    figure = nullable(number())
    choice = objects({"subnet": string(), "batch_size": integer(1), "batches": integer(1)})
    return objects(
        {
            "run": string("changes when the server is started anew"),
            "status": string('"ready", or why not'),
            "now": integer(description="the number of the second that is not over yet"),
            "span_s": integer(const=SPAN_S),
            "waiting": integer(description="queries that wait now"),
            "seconds": objects(
                {"second": array(integer())} | {name: array(figure) for name in FIGURES}, optional=tuple(FIGURES)
            ),
            "recent": objects({"span_s": integer(1)} | dict.fromkeys(FIGURES, figure)),
            "choices": array(choice),
            "about": objects({name: string() for name in ABOUT}),
        }
    )


def add_openapi(app: web.Application, serve: Serving) -> None:
    """Serve the document at /openapi.json."""
    app.router.add_get("/openapi.json", OpenApi(serve).handle)
