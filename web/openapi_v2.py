"""The part of the OpenAPI document that describes /v2, the Open Inference Protocol of open_inference.py."""

from __future__ import annotations

from typing import Any

from web.errors import BadRequest, NotReady, NotSupported, TooLarge, UnknownModel, UnsupportedEncoding
from web.schemas import (
    QUERY_ERRORS,
    Schema,
    array,
    boolean,
    content,
    errors,
    integer,
    objects,
    operation,
    path_parameter,
    string,
)
from web.serving import Serving

TAG = "open inference protocol"
BODY_ERRORS = (BadRequest, TooLarge, UnsupportedEncoding)
OBJECT: Schema = {"type": "object"}


def paths_v2(serve: Serving) -> dict[str, dict[str, Any]]:
    """All paths but those that are refused whatever is sent (shared memory, trace and log settings)."""
    model = path_parameter("model", string("the model's name", examples=[serve.name]))
    versioned = [model, path_parameter("version", string(examples=["1"]))]
    return (
        _server_paths()
        | _repository_paths(model)
        | _model_paths("/v2/models/{model}", [model], "")
        | _model_paths("/v2/models/{model}/versions/{version}", versioned, "_version")
    )


def _server_paths() -> dict[str, dict[str, Any]]:
    metadata = objects({"name": string(), "version": string(), "extensions": array(string())})
    live, ready = objects({"live": boolean()}), objects({"ready": boolean()})
    return {
        "/v2": {"get": _get("server_metadata", "Name, version and extensions", metadata)},
        "/v2/health/live": {"get": _get("server_live", "Is the process alive?", live)},
        "/v2/health/ready": {"get": _get("server_ready", "Are queries answered?", ready, NotReady)},
        "/v2/models/stats": {"get": _get("all_statistics", "Counts and times of all models", _statistics())},
    }


def _repository_paths(model: Schema) -> dict[str, dict[str, Any]]:
    entry = objects({"name": string(), "version": string(), "state": string(), "reason": string()})
    index = {"200": content("The models", array(entry))} | errors(*BODY_ERRORS)
    asked = objects({"ready": boolean("only those that are ready")}, optional=["ready"])
    given = objects({"parameters": {"description": "none can be set; refused with 501"}}, optional=["parameters"])
    load = {"200": content("It is loaded", objects({}))} | errors(*BODY_ERRORS, UnknownModel, NotSupported, NotReady)
    refused = errors(UnknownModel, NotSupported)
    prefix = "/v2/repository/models/{model}"
    return {
        "/v2/repository/index": {"post": _post("repository_index", "All models", index, asked)},
        f"{prefix}/load": {"post": _post("load", "Load the model", load, given, parameters=[model])},
        f"{prefix}/unload": {"post": operation("unload", "Refused", refused, TAG, parameters=[model])},
    }


def _model_paths(prefix: str, parameters: list[Schema], suffix: str) -> dict[str, dict[str, Any]]:
    ready = objects({"name": string(), "ready": boolean()})
    found = {
        "": ("metadata", "Datatypes and shapes", _metadata(), (UnknownModel,)),
        "/ready": ("ready", "Are queries answered?", ready, (UnknownModel, NotReady)),
        "/config": ("config", "What bounds a request", OBJECT, (UnknownModel,)),
        "/stats": ("statistics", "Counts and times", _statistics(), (UnknownModel,)),
    }
    paths = {
        prefix + end: {"get": _get(f"model_{name}{suffix}", text, schema, *raised) | {"parameters": parameters}}
        for end, (name, text, schema, raised) in found.items()
    }
    return paths | {f"{prefix}/infer": {"post": _infer(f"infer{suffix}") | {"parameters": parameters}}}


def _infer(name: str) -> dict[str, Any]:
    answer = content("The outputs of all rows", _infer_answer())
    answer["content"]["application/octet-stream"] = {"schema": {}}
    description = (
        "JSON, with the bytes of binary tensors after it where Inference-Header-Content-Length says where the JSON "
        "ends. docs/api.md has examples."
    )
    answers = {"200": answer} | errors(*QUERY_ERRORS, UnknownModel)
    return operation(
        name, "Answer the rows of one input by one deadline", answers, TAG,
        description=description,
        requestBody={
            "required": True,
            "content": {"application/json": {"schema": OBJECT}, "application/octet-stream": {"schema": {}}},
        },
    )  # fmt: skip


def _infer_answer() -> Schema:
    output = objects(
        {"name": string(), "datatype": string(), "shape": array(integer()), "data": array({}), "parameters": OBJECT},
        optional=["data", "parameters"],
    )
    members = {"model_name": string(), "model_version": string(), "id": string(), "parameters": OBJECT}
    return objects(members | {"outputs": array(output)}, optional=["id"])


def _metadata() -> Schema:
    tensor = objects({"name": string(), "datatype": string(), "shape": array(integer(-1))})
    texts = {"name": string(), "versions": array(string()), "platform": string()}
    return objects(texts | {"inputs": array(tensor), "outputs": array(tensor)})


def _statistics() -> Schema:
    return objects({"model_stats": array(OBJECT)})


def _get(name: str, summary: str, schema: Schema, *raised: type[Any]) -> dict[str, Any]:
    return operation(name, summary, {"200": content("OK", schema)} | errors(*raised), TAG)


def _post(name: str, summary: str, answers: dict[str, Schema], body: Schema, **more: Any) -> dict[str, Any]:
    sent = {"required": False, "content": {"application/json": {"schema": body}}}
    return operation(name, summary, answers, TAG, requestBody=sent, **more)
