"""Errors as clients see them."""

import json

import pytest

from web.errors import BatchFailed, DeadlineExceeded, QueueFull, ServeError, error_response


def all_errors() -> list[type[ServeError]]:
    found = [ServeError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_the_tree_in_the_docstring_has_every_error_with_its_status() -> None:
    import web.errors

    words = (web.errors.__doc__ or "").replace("├── ", "").replace("└── ", "").splitlines()
    drawn = {
        line.split()[0]: int(line.split()[1]) for line in words if line[:1].isupper() and line.split()[1].isdigit()
    }
    assert drawn == {kind.__name__: kind.status for kind in all_errors()}


def test_reasons_are_words_of_their_own() -> None:
    reasons = [kind.reason for kind in all_errors()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.replace("_", "").islower() for reason in reasons)


def test_the_answer_has_error_and_reason_and_the_details() -> None:
    response = error_response(DeadlineExceeded("too late", slo_ms=10.0, predicted_ms=None, queue_depth=3))
    assert (response.status, response.content_type) == (504, "application/json")
    expected = {"error": "too late", "reason": "deadline", "slo_ms": 10.0, "predicted_ms": None, "queue_depth": 3}
    assert json.loads(response.body) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "value"), [(QueueFull("full", retry_after_s=1), "1"), (BatchFailed("no"), None)])
def test_retry_after_is_sent_where_trying_again_helps(error: ServeError, value: str | None) -> None:
    assert error_response(error).headers.get("Retry-After") == value
