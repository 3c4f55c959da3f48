"""Refusals: status, body and headers of each kind, as clients get them."""

from __future__ import annotations

import pytest

from pipelines.serving.backend import Failure, StaleImage
from pipelines.serving.errors import ProtocolError, model_unavailable, server_failed, too_busy


def shown(error):
    found = error.body()["error"]
    assert list(error.body()) == ["error"] and list(found) == ["message", "type", "param", "code"]
    assert found["message"] == str(error)
    return error.status, found["message"], found["type"], found["param"], found["code"], error.headers()


INVALID, SERVER = "invalid_request_error", "server_error"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ProtocolError(400, "no."), (400, "no.", INVALID, None, None, {})),
        (
            ProtocolError(413, "no.", kind=SERVER, param="a.0", code="c", retry_after_s=7, closes=True),
            (413, "no.", SERVER, "a.0", "c", {"Retry-After": "7", "Connection": "close"}),
        ),
        (ProtocolError(401, "no.", code="k"), (401, "no.", INVALID, None, "k", {"WWW-Authenticate": "Bearer"})),
        (ProtocolError(408, "no.", closes=True), (408, "no.", INVALID, None, None, {"Connection": "close"})),
        (ProtocolError(403, "no.", retry_after_s=0), (403, "no.", INVALID, None, None, {})),
        (server_failed(), (500, "the server failed to answer; its log says why.", SERVER, None, None, {})),
        (
            model_unavailable(),
            (503, "the model is not available; try again soon.", SERVER, None, "unavailable", {"Retry-After": "5"}),
        ),
        *(
            (
                too_busy("full.", asked),
                (429, "full.", "rate_limit_error", None, "rate_limit_exceeded", {"Retry-After": told}),
            )
            for asked, told in ((7, "7"), (0, "1"), (-3, "1"), (60, "60"), (61, "60"))
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_when_to_come_back(error, wanted):
    assert shown(error) == wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("request", (400, "m.", INVALID, None, None, {})),
        ("too_long", (400, "m.", INVALID, "messages", "context_length_exceeded", {})),
        ("stale_image", (503, "m.", SERVER, None, "unavailable", {"Retry-After": "1"})),
        ("unavailable", (503, "m.", SERVER, None, "unavailable", {"Retry-After": "5"})),
        ("model", (500, "m.", SERVER, None, None, {})),
    ],
)
def test_a_failure_of_the_model_is_the_clients_or_the_servers(kind, wanted):
    error = Failure("m.", kind).error()
    assert shown(error) == wanted and isinstance(error, StaleImage) is (kind == "stale_image")
    assert Failure("m.").kind == "model"
