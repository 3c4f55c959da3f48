"""What the HTTP API refuses, how it says so, and what happens where an answer ends early."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from pipelines.serving.backend import ChatJob, Failure, ModelInfo
from pipelines.serving.errors import ProtocolError
from tests import virtual_time
from tests.serving_api import (
    CHAT,
    IMAGE,
    READ,
    Client,
    FakeBackend,
    TimedClient,
    ask,
    events,
    said,
    scope_of,
    words,
)
from tests.serving_model import make_image
from tinygptv.data.conversation import ChatImage, ChatMessage


@pytest.mark.security
@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages.0.content.0"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"n": 2}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, None),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, 400, "logit_bias"),
        ({"logit_bias": {"11": 1, "011": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"11": 101}}, 400, "logit_bias"),
        ({"stop": "x" * 129}, 400, "stop"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"seed": 2**63}, 400, "seed"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format.type"),
        ({"task": "dance"}, 400, "task"),
        ({"task": "vqa"}, 400, "task"),
        ({"box": [1, 2, 3, 4]}, 400, "box"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [words("x")] * 65}]}, 400, "messages.0.content"),
    ],
)
def test_mistakes_are_answered_in_openais_shape(client, change, status, param):
    response = client.chat({**ask(words("hi")), **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") and error["type"] == "invalid_request_error"


def test_a_full_context_has_openais_code(client):
    error = client.chat(ask(words("word " * 1000))).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 256 tokens")
    assert re.search(r" The prompt has \d+ tokens ", error["message"]) and error["message"].count("256") == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 2000, b"[" * 100_000])
def test_what_is_no_request_is_refused(client, body):
    response = client.request("POST", "/v1/chat/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_shape(client):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/ui/../api.py", 404),
        ("GET", "/ui/%2e%2e/api.py", 404),
    ):
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


def test_a_full_server_refuses_at_once_and_says_when_to_come_back():
    fake = FakeBackend(READ, said("x", "stop"), wait=2.0)
    client = Client(fake, max_batch_size=2, max_queue=3, max_per_client=5)

    async def flood():
        async with client.open() as http:
            answers = await asyncio.gather(
                *(http.post(CHAT, json=ask(words("hi"), stream=i % 2 == 0)) for i in range(20))
            )
            after = await http.post(CHAT, json=ask(words("hi")))
            return answers, after

    answers, after = virtual_time.run(flood())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 15 and sum(answer.status_code == 200 for answer in answers) == 5
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert after.status_code == 200, "every place was given back"


@pytest.mark.parametrize("stream", [True, False])
def test_a_place_is_held_until_the_answer_ends(stream):
    """Neither a stream nor a whole answer gives its place in the gate back before its end, or keeps it after."""
    seen = []

    class Counting(FakeBackend):
        async def stream(self, job):
            async for item in super().stream(job):
                seen.append(in_flight())
                yield item

    client = Client(Counting(READ, said("a"), said("b", "stop")))
    registry = client.metrics.registry

    def in_flight():
        return registry.get_sample_value("tinygptv_in_flight_requests")

    response = client.chat(ask(words("hi"), stream=stream))
    assert response.status_code == 200
    assert seen == [1, 1, 1] and in_flight() == 0


def test_a_slow_model_is_given_up():
    fake = FakeBackend(READ, said("a"), said("b", "stop"), wait=1.5)
    client = TimedClient(fake, request_timeout_s=1)
    assert client.chat(ask(words("hi"))).status_code == 504
    client = TimedClient(fake, request_timeout_s=2)
    assert events(client.chat(ask(words("hi"), stream=True)))[-1]["error"]["code"] == "timeout"
    assert fake.closed


def test_errors_within_a_stream_are_an_event():
    for broken, message in (
        (RuntimeError("secret path /root"), "the server failed"),
        (Failure("the model's replica stopped.", "unavailable"), "replica stopped"),
        (ProtocolError(503, "gone.", kind="server_error"), "gone"),
    ):
        client = Client(FakeBackend(READ, said("a"), broken))
        *_, last = events(client.chat(ask(words("hi"), stream=True)))
        assert message in last["error"]["message"] and "/root" not in str(last)
        whole = client.chat(ask(words("hi")))
        assert whole.status_code >= 500 and "/root" not in whole.text


def test_a_refusal_before_the_first_word_has_a_status():
    client = Client(FakeBackend(Failure("the prompt is too long.", "too_long")))
    assert client.chat(ask(words("hi"), stream=True)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_new_model_with_another_image_size_is_noticed(stream):
    class Replaced(FakeBackend):
        side = 16

        async def describe(self):
            return ModelInfo(self.side, 100, 1)

        async def stream(self, job):
            self.side = 32  # from now on
            if job.messages[-1].images[0].pixels.shape != (3, 32, 32):
                yield Failure("the model now takes images of 32 pixels.", "stale_image")
                return
            async for item in super().stream(job):
                yield item

    client = Client(Replaced(READ, said("fine", "stop")))
    response = client.chat(ask(words("hi"), IMAGE, stream=stream))
    assert response.status_code == 200 and "fine" in response.text


def test_a_replica_says_that_an_image_does_not_fit(backend):
    job = ChatJob((ChatMessage("user", "hi", (ChatImage.from_bytes(make_image(), 16),)),), {})
    (item,) = asyncio.run(backend.complete(job))
    assert item.kind == "stale_image" and item.error().status == 503


def test_a_client_that_leaves_frees_everything():
    fake = FakeBackend(READ, *[said("x")] * 1000, wait=0.01)
    client = TimedClient(fake, max_batch_size=1, max_queue=0)

    async def leave():
        body = json.dumps(ask(words("hi"), stream=True)).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await asyncio.wait_for(client.app(scope_of(), receive, send), 5)

    virtual_time.run(leave())
    assert fake.closed
    fake.items, fake.wait = (READ, said("x", "stop")), 0
    assert client.chat(ask(words("hi"))).status_code == 200
