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
    ("given", "wanted"),
    [
        ({"status": 400}, (400, "no.", INVALID, None, None, {})),
        (
            {"status": 413, "kind": SERVER, "param": "a.0", "code": "c", "retry_after_s": 7, "closes": True},
            (413, "no.", SERVER, "a.0", "c", {"Retry-After": "7", "Connection": "close"}),
        ),
        ({"status": 401, "code": "k"}, (401, "no.", INVALID, None, "k", {"WWW-Authenticate": "Bearer"})),
        ({"status": 408, "closes": True}, (408, "no.", INVALID, None, None, {"Connection": "close"})),
        ({"status": 403, "retry_after_s": 0}, (403, "no.", INVALID, None, None, {})),
    ],
)
def test_a_refusal_says_what_is_wrong_and_when_to_come_back(given, wanted):
    assert shown(ProtocolError(message="no.", **given)) == wanted


def test_what_the_server_cannot_do_is_not_the_clients_fault():
    failed = (500, "the server failed to answer; its log says why.", SERVER, None, None, {})
    assert shown(server_failed()) == failed
    message = "the model is not available; try again soon."
    assert shown(model_unavailable()) == (503, message, SERVER, None, "unavailable", {"Retry-After": "5"})


@pytest.mark.parametrize(("asked", "told"), [(7, "7"), (0, "1"), (-3, "1"), (60, "60"), (61, "60")])
def test_who_comes_too_early_waits_a_second_to_a_minute(asked, told):
    wanted = (429, "full.", "rate_limit_error", None, "rate_limit_exceeded", {"Retry-After": told})
    assert shown(too_busy("full.", asked)) == wanted


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
