"""Headers of clients that would command Ray Serve's proxy."""

from __future__ import annotations

import asyncio

import pytest
from ray.serve._private import constants

from pipelines.serving.client_headers import COMMANDS, ClientHeaders

pytestmark = pytest.mark.security


def passed(*headers):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    scope = {"type": "http", "path": "/", "headers": list(headers)}
    asyncio.run(ClientHeaders(app)(scope, None, None))
    assert scope["headers"] == list(headers) and seen[0]["path"] == "/"
    return seen[0]["headers"]


@pytest.mark.parametrize(
    "constant",
    [
        "SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER",
        "SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER",
        "SERVE_SESSION_ID",
        "SERVE_MULTIPLEXED_MODEL_ID",
    ],
)
@pytest.mark.parametrize("spelled", [str.lower, str.title, lambda name: name.replace("-", "_")])
def test_commands_of_ray_serve_do_not_reach_it(constant, spelled):
    name = getattr(constants, constant)
    kept = (b"authorization", b"Bearer x")
    assert passed(kept, (spelled(name).encode(), b"?1")) == [kept]
    assert name.lower().replace("_", "-").encode() in COMMANDS


def test_a_request_id_is_text():
    good, bad = (b"x-request-id", b"7f-1"), (b"X-Request-ID", "Jürgen".encode("latin-1"))
    assert passed(good) == [good]
    assert passed(bad) == []
    other = (b"x-title", "Jürgen".encode("latin-1"))
    assert passed(other) == [other], "nobody reads it"


def test_what_has_no_headers_passes():
    async def app(scope, receive, send):
        assert scope == {"type": "lifespan"}

    asyncio.run(ClientHeaders(app)({"type": "lifespan"}, None, None))
