"""The HTTP API over a model in this process, spoken to as clients do: by hand and with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from pipelines.serving.answers import Answer
from pipelines.serving.backend import Piece
from pipelines.serving.model_backend import ModelBackend
from pipelines.settings import ServeSettings
from tests.serving_api import IMAGE, READ, Client, FakeBackend, ask, events, words


def test_an_answer_has_openais_shape(client):
    body = client.chat(ask(words("what is it?"), IMAGE)).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body["id"])
    assert (body["object"], body["model"]) == ("chat.completion", "tinygpt-v")
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
    usage = body["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_tokens_of_all_pieces_are_counted():
    answer = Answer("id", "name", 0, False, None, 0)
    for item in (READ, Piece("a", num_tokens=2, cached_tokens=5), Piece("b", num_tokens=3, finish_reason="stop")):
        answer.add(item)
    usage = answer.usage()
    assert (usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (5, 5)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5 and usage["prompt_tokens"] == READ.prompt_tokens > 0


def test_a_stream_says_the_same_as_a_whole_answer(client):
    body = ask(words("tell me more"), IMAGE, max_tokens=40)
    whole = client.chat(body).json()
    response = client.chat({**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done is None and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_openais_client_works_unchanged(client):
    import openai

    async def use():
        async with client.open() as http:
            api = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http, max_retries=0)
            body = ask(words("what is it?"), IMAGE, logprobs=True, top_logprobs=2, seed=1)
            whole = await api.chat.completions.create(**body)
            stream = await api.chat.completions.create(**ask(words("what is it?"), IMAGE), stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            later = await api.chat.completions.create(
                **{**body, "messages": [*body["messages"], whole.choices[0].message, {"role": "user", "content": "?"}]}
            )
            models = [model.id async for model in api.models.list()]
            one = await api.models.retrieve("tinygpt-v")
            with pytest.raises(openai.NotFoundError) as unknown:
                await api.chat.completions.create(**{**body, "model": "gpt-4o"})
            with pytest.raises(openai.BadRequestError) as wrong:
                await api.chat.completions.create(**{**body, "temperature": 3})
        return whole, pieces, later, models, one, unknown.value, wrong.value

    whole, pieces, later, models, one, unknown, wrong = asyncio.run(use())
    assert whole.choices[0].message.content == "".join(pieces)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 12 and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert entries[0].top_logprobs[0].logprob >= entries[0].logprob
    assert later.usage.prompt_tokens > whole.usage.prompt_tokens
    assert later.usage.prompt_tokens_details.cached_tokens > whole.usage.prompt_tokens - 5
    assert models == ["tinygpt-v"] and one.id == "tinygpt-v"
    assert unknown.code == "model_not_found" and wrong.param == "temperature"


def test_keys_do_not_see_each_others_prompts_in_the_cache(backend):
    """``cached_tokens`` would tell a client token by token what another one asked."""
    client = Client(backend, api_keys=["one", "two"])
    body = ask(words("a secret question about this image"), IMAGE, max_tokens=2)

    def cached(key):
        answer = client.chat(body, headers={"Authorization": f"Bearer {key}"}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    encoded = backend.assistant.images.num_encoded
    assert [cached(key) for key in ("one", "two")] == [0, 0]
    assert cached("one") >= 8 and cached("two") >= 8
    assert backend.assistant.images.num_encoded == encoded + 2, "nor in the time that an image takes"


def test_sampling_fields_reach_the_model(client):
    body = ask(words("hi"), temperature=1.5, seed=3, max_tokens=30)
    first, again = client.chat(body).json(), client.chat(body).json()
    other = client.chat({**body, "seed": 4}).json()
    text = [answer["choices"][0]["message"]["content"] for answer in (first, again, other)]
    assert text[0] == text[1] != text[2]
    stop = text[0][5:8]
    stopped = client.chat({**body, "stop": stop}).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and stop not in stopped["message"]["content"]


def test_messages_are_regrouped(client):
    plain = client.chat(ask(words("be brief\nwhat is it?"))).json()
    body = ask()
    body["messages"] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [words("what is it?")]},
    ]
    assert client.chat(body).json()["choices"] == plain["choices"]


def test_health_follows_the_model(client):
    for path in ("/healthz", "/health"):  # the second is what GuideLLM asks for
        assert client.request("GET", path).json() == {"status": "ok"}

    fake = FakeBackend()
    fake.healthy = False
    response = Client(fake).request("GET", "/healthz")
    assert response.status_code == 503 and "retry-after" in response.headers


def test_a_server_that_stops_is_not_ready_and_takes_no_requests():
    client = Client()
    client.app.state.gate.is_closed = True
    for response in (client.request("GET", "/healthz"), client.chat(ask(words("hi")))):
        assert response.status_code == 503 and response.headers["retry-after"] == "5"
        assert response.json()["error"]["message"] == "the server stops."


@pytest.mark.parametrize("thread", ["loop", "images"])
def test_health_sees_dead_and_stuck_threads(client, backend, monkeypatch, thread):
    watched = getattr(backend.assistant, thread).thread
    with monkeypatch.context() as patch:
        patch.setattr(watched, "is_alive", lambda: False)
        assert client.request("GET", "/healthz").status_code == 503
    with monkeypatch.context() as patch:
        patch.setattr(type(watched), "busy_s", 301.0)
        assert client.request("GET", "/healthz").status_code == 503
    assert client.request("GET", "/healthz").status_code == 200


def test_metrics_count(backend):
    client = Client(backend)
    client.chat(ask(words("count me")))
    client.chat(ask(words("count me"), stream=True))
    client.chat(ask(words("hi"), temperature=9))
    text = client.request("GET", "/metrics").text
    assert 'tinygptv_requests_total{status="200"} 2.0' in text
    assert 'tinygptv_requests_total{status="400"} 1.0' in text
    assert "tinygptv_request_seconds_count 2.0" in text
    assert 'tinygptv_tokens_total{kind="answer"} 24.0' in text
    assert "tinygptv_in_flight_requests 0.0" in text
    assert re.search(r'tinygptv_engine_slots\{replica="\d+"\} 4.0', text)
    assert Client(FakeBackend()).request("GET", "/metrics").status_code == 200


def test_the_schema_describes_the_request(client):
    schema = client.request("GET", "/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert "task" in schema["components"]["schemas"]["ChatRequest"]["properties"]
    known = set(schema["components"]["schemas"])
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)))
    assert used <= known


def test_other_web_sites_may_not_call_unless_allowed(backend):
    origin = {"Origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in Client(backend).chat(ask(words("hi")), headers=origin).headers
    allowed = Client(backend, cors_origins=["https://elsewhere.example"])
    assert allowed.chat(ask(words("hi")), headers=origin).headers["access-control-allow-origin"] == origin["Origin"]


def test_a_missing_artifact_is_named():
    with pytest.raises(ValueError, match="no checkpoint folder"):
        ModelBackend(ServeSettings(artifact="/nowhere"))
