"""What schemathesis cannot know by itself: how an image looks, and that 503 and 504 are right answers but 500 is none.

    SCHEMATHESIS_HOOKS=schemathesis_hooks schemathesis --config-file tests/schemathesis.toml run URL/openapi.json
"""

from __future__ import annotations

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.core.parameters import ParameterLocation


def _image(format: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((20, 12), 60).convert("RGB").save(file, format)
    return file.getvalue()


_IMAGES = st.sampled_from([_image("PNG"), _image("JPEG"), _image("BMP")])
for _name in ("jpeg", "png", "webp", "gif", "bmp"):
    schemathesis.openapi.media_type(f"image/{_name}", _IMAGES)
# Raw pixels of the tiny servable of the tests, or an image.
schemathesis.openapi.media_type("application/octet-stream", _IMAGES | st.binary(min_size=192, max_size=192))


# Headers that are not read where a parameter of the query string, or another header, says the same.
_OVERRIDDEN = {
    "x-slo-ms": ("slo_ms",), "x-min-accuracy": ("min_accuracy",), "x-priority": ("priority",), "x-top-k": ("top_k",),
    "x-members": ("members",), "x-envoy-expected-rq-timeout-ms": ("slo_ms", "x-slo-ms"),
}  # fmt: skip
# A choice below the floor that is asked for with it is refused, which no schema can say.
_FLOORS, _MEMBERS = {"min_accuracy", "x-min-accuracy"}, {"members", "x-members"}


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """Leave out headers that are wrong but not read, unknown ones included: whoever stands between adds some.

    Also a floor together with a choice, and token ids with a mask of another length.
    """
    if _lengths_differ(case.body):
        return False
    asked = {name.lower() for name in (*(case.headers or {}), *(case.query or {}))}
    if asked & _FLOORS and asked & _MEMBERS:
        return False
    made = case.meta.components.get(ParameterLocation.HEADER) if case.meta is not None else None
    if made is None or not made.mode.is_negative:
        return True
    headers = {name.lower() for name in case.headers or {}}
    given = headers | set(case.query or {})
    unread = any(name in headers and given.intersection(_OVERRIDDEN[name]) for name in _OVERRIDDEN)
    return not unread and not any(name.startswith("x-schemathesis-unknown") for name in headers)


def _lengths_differ(body: object) -> bool:
    """Whether inputs by name are lists of different lengths, which is refused and no schema can say."""
    inputs = body.get("inputs") if isinstance(body, dict) else None
    lists = [each for each in inputs.values() if isinstance(each, list)] if isinstance(inputs, dict) else []
    return len({len(each) for each in lists}) > 1


@schemathesis.check
def no_internal_error(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """500 says that the server failed."""
    assert response.status_code != 500, "the server failed at this request"
