"""Requests that nobody meant: the answer is a completion, or a refusal in OpenAI's shape, and never a 5xx."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.serving.model_backend import ModelBackend
from pipelines.serving.protocol import ChatRequest
from pipelines.settings import ServeSettings
from tests.serving_api import Client
from tests.serving_model import data_url, make_image, save_checkpoint

pytestmark = pytest.mark.security

VALID = {
    "model": "tinygpt-v",
    "max_tokens": 2,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is it?"},
                {"type": "image_url", "image_url": {"url": data_url(make_image(width=9, height=7)), "detail": "low"}},
            ],
        },
    ],
}
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 0.5, 2, 1e308, 2**63, -(2**70)])
# Lone surrogates cannot be sent as JSON in UTF-8; test_a_body_of_any_bytes sends them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "",
        "<|endoftext|>",
        "<ImageHere>",
        "[refer]",
        "user",
        "{<1><2><3><4>}",
        "data:image/png;base64,AAAA",
        "http://[::1]/",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, "tools", ""])
# What a field should hold, so that most requests get past the types and reach the model.
LIKELY = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.001, 1),
    "top_k": st.integers(0, 1000),
    "min_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 10**9),
    "seed": st.integers(),
    "stop": TEXTS | st.lists(TEXTS, max_size=4),
    "stream": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "repetition_penalty": st.floats(0.001, 10),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 10**9).map(str), st.floats(-100, 100), max_size=3),
    "task": st.sampled_from(["vqa", "caption", "refer", "identify", "grounding", "detection"]),
    "box": st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    backend = ModelBackend(ServeSettings(artifact=str(folder), max_batch_size=2, context_length=96))
    yield Client(backend, max_tokens=2)
    backend.assistant.close()


def is_clean(response):
    assert response.status_code < 500, (response.status_code, response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text
    elif response.status_code == 200:
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert ".py" not in response.text and "Traceback" not in response.text
    return response.status_code


def places_in(value, path=()):
    """Paths to every member of nested lists and dicts."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*path, key)
        yield from places_in(member, (*path, key))


def test_one_place_of_a_good_request_holds_anything(client):
    statuses = []

    @settings(max_examples=150)
    @given(place=st.sampled_from(list(places_in(VALID))), value=VALUES)
    def send(place, value):
        body = copy.deepcopy(VALID)
        parent = body
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        statuses.append(is_clean(post(client, body)))

    send()
    assert {200, 400} <= set(statuses), "some are good and some are not, or nothing was tried"


def test_fields_hold_anything_likely_or_not(client):
    statuses = []
    some = {name: st.one_of(strategy, VALUES) for name, strategy in LIKELY.items()}

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(likely=st.fixed_dictionaries({}, optional=LIKELY), other=st.fixed_dictionaries({}, optional=some))
    def send(likely, other):
        statuses.append(is_clean(post(client, {**VALID, **likely})))
        is_clean(post(client, {**VALID, **dict(list(other.items())[:2])}))

    send()
    assert {200, 400} <= set(statuses)


def test_a_body_of_any_bytes(client):
    @settings(max_examples=50)
    @given(st.binary(max_size=60) | FIELDS.map(lambda name: f'{{"{name}": "\\ud800"}}'.encode()))
    def send(body):
        assert 400 <= is_clean(client.request("POST", "/v1/chat/completions", content=body)) < 500

    send()


def post(client, body):
    # As a hostile client would: NaN and Infinity are no JSON, yet some write them.
    content = json.dumps(body, allow_nan=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return client.request("POST", "/v1/chat/completions", content=content)
