"""Requests that Ray Serve's proxy gives up, because the ingress that answered them has died."""

from __future__ import annotations

import asyncio
import json

import pytest

from pipelines.serving.errors import model_unavailable
from pipelines.serving.lost_answers import LostAnswers

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
START = {"type": "http.response.start", "status": 200, "headers": [EVENTS]}
EVENT = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b""}


def sent(*messages, kind="http", path="/v1/chat/completions"):
    """What a client gets of an application that sends these and returns."""
    got = []

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    async def note(message):
        got.append(message)

    asyncio.run(LostAnswers(app)({"type": kind, "path": path}, None, note))
    return got


def test_a_request_without_an_answer_is_to_be_sent_again():
    start, body = sent()
    assert start["status"] == 503 and dict(start["headers"])[b"retry-after"] == b"5"
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert json.loads(body["body"]) == model_unavailable().body()


@pytest.mark.parametrize("messages", [(START,), (START, EVENT)])
def test_a_stream_that_is_cut_ends_with_an_error_event(messages):
    *before, last = sent(*messages)
    assert before == list(messages)
    name, event = last["body"].decode().split(": ", 1)
    assert (name, json.loads(event), event[-2:]) == ("data", model_unavailable().body(), "\n\n")
    assert not last.get("more_body", False)


def test_a_stream_of_named_events_ends_with_one():
    *_, last = sent(START, EVENT, EVENT, path="/v1/responses/")
    name, data = last["body"].decode().removesuffix("\n\n").split("\n")
    told = model_unavailable().body()
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {**told["error"], **told, "type": "error", "sequence_number": 2}


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ((START, EVENT, END), "http"),
        (({**START, "headers": [(b"content-type", b"application/json")]}, EVENT), "http"),  # has its length
        ((), "lifespan"),
    ],
)
def test_everything_else_is_as_it_was(messages, kind):
    assert sent(*messages, kind=kind) == list(messages)
