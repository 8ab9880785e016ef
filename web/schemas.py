"""Pieces of an OpenAPI document: schemas, answers, and the errors of errors.py as answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from web.errors import (
    BadRequest,
    BatchFailed,
    DeadlineExceeded,
    NotReady,
    QueueFull,
    ServeError,
    TooLarge,
    UnsupportedEncoding,
    UnsupportedMedia,
)

Schema = dict[str, Any]

# What a query may meet, whichever way it came.
QUERY_ERRORS = (
    BadRequest, TooLarge, UnsupportedMedia, QueueFull, BatchFailed, UnsupportedEncoding, NotReady, DeadlineExceeded
)  # fmt: skip
RETRIED = (429, 503)


def integer(least: int = 0, most: int | None = None, **more: Any) -> Schema:
    """A whole number between limits."""
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most}) | more


def number(least: float | None = 0, most: float | None = None, **more: Any) -> Schema:
    """A number between limits."""
    low = {} if least is None else {"minimum": least}
    return {"type": "number"} | low | ({} if most is None else {"maximum": most}) | more


def string(description: str = "", **more: Any) -> Schema:
    """A text."""
    return {"type": "string"} | ({"description": description} if description else {}) | more


def boolean(description: str = "") -> Schema:
    """True or false."""
    return {"type": "boolean"} | ({"description": description} if description else {})


def array(items: Schema, length: int | None = None) -> Schema:
    """A list, of exactly this length if one is given."""
    return {"type": "array", "items": items} | ({} if length is None else {"minItems": length, "maxItems": length})


def tensor(items: Schema, *shape: int) -> Schema:
    """Nested lists."""
    schema = items
    for length in reversed(shape):
        schema = array(schema, length)
    return schema


def objects(properties: Mapping[str, Schema], optional: Sequence[str] = ()) -> Schema:
    """An object with these members and no others; all but the optional ones are always there."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def nullable(schema: Schema) -> Schema:
    """Also null."""
    return schema | {"type": [schema["type"], "null"]}


def reference(name: str) -> Schema:
    """A schema among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def content(description: str, schema: Schema, media_type: str = "application/json") -> Schema:
    """An answer with a body."""
    return {"description": description, "content": {media_type: {"schema": schema}}}


def errors(*classes: type[ServeError]) -> dict[str, Schema]:
    """Answers by status; each tells its reasons."""
    found: dict[str, Schema] = {}
    for status in sorted({each.status for each in classes}):
        there = [each for each in classes if each.status == status]
        text = " ".join(f"`{each.reason}`: {(each.__doc__ or '').splitlines()[0]}" for each in there)
        found[str(status)] = content(text, reference("Error"))
        if status in RETRIED:
            found[str(status)]["headers"] = {"Retry-After": {"description": "seconds", "schema": integer()}}
    return found


def error_schema() -> Schema:
    """The form of every error; what more an error tells stands beside."""
    reasons = sorted({each.reason for each in _all_errors(ServeError)})
    return {
        "type": "object",
        "properties": {
            "error": string("what was wrong, and what is allowed"),
            "reason": string("for programs", examples=reasons),
            "slo_ms": number(description="of a deadline that cannot be met or has passed"),
            "predicted_ms": nullable(number(description="by when the answer would have come")),
            "queue_depth": integer(description="queries that were waiting"),
        },
        "required": ["error", "reason"],
    }


def _all_errors(base: type[ServeError]) -> list[type[ServeError]]:
    return [base, *(each for child in base.__subclasses__() for each in _all_errors(child))]


def operation(
    name: str, summary: str, responses: Mapping[str, Schema], tag: str = "server", **more: Any
) -> dict[str, Any]:
    """One operation of a path; answers by status."""
    return {"operationId": name, "summary": summary, "tags": [tag], "responses": dict(responses)} | more


def path_parameter(name: str, schema: Schema) -> Schema:
    """A part of the path."""
    return {"name": name, "in": "path", "required": True, "schema": schema}
