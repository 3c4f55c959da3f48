"""The HTTP API over a model in this process, spoken to as clients do: by hand and with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re

import openai
import pytest

from pipelines.serving.answers import Answer, find_boxes
from pipelines.serving.backend import ChatJob, Failure, ModelInfo, Piece
from pipelines.serving.errors import ProtocolError
from pipelines.serving.model_backend import ModelBackend
from pipelines.settings import ServeSettings
from tests.serving_api import CHAT, IMAGE, READ, Client, FakeBackend, ask, events, said, scope_of, words
from tests.serving_model import make_image, save_checkpoint
from tinygptv.data.conversation import ChatImage, ChatMessage
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def backend(checkpoint):
    backend = ModelBackend(ServeSettings(artifact=str(checkpoint), max_batch_size=4))
    yield backend
    backend.assistant.close()


@pytest.fixture(scope="module")
def client(backend):
    return Client(backend)


# ---------------------------------------------------------------------------------------------------- answers


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


def test_boxes_are_given_in_pixels_of_the_sent_image():
    text = "<p>a dog</p> {<10><20><50><60>}<delim>{<0><0><100><120>} and {<1><2><3><4>}"
    fake = FakeBackend(READ, said(text[:30]), said(text[30:], "stop"))
    wanted = [
        {"label": "a dog", "box": [6.0, 8.0, 30.0, 24.0], "entity": 0, "colour": "#e63946", "image": 0},
        {"label": "a dog", "box": [0.0, 0.0, 60.0, 40.0], "entity": 0, "colour": "#e63946", "image": 0},
        {"label": "", "box": [0.6, 0.8, 1.8, 1.6], "entity": 1, "colour": "#2a9d8f", "image": 0},
    ]
    client = Client(fake)
    whole = client.chat(ask(words("where"), IMAGE, task="refer")).json()
    assert json.loads(json.dumps(whole["choices"][0]["message"]["boxes"])) == wanted
    assert whole["choices"][0]["message"]["content"] == text
    last = events(client.chat(ask(words("where"), IMAGE, stream=True)))[-2]["choices"][0]
    assert last["finish_reason"] == "stop" and last["delta"]["boxes"] == wanted
    assert find_boxes(text, None, 0) == []


def test_a_task_and_a_drawn_box_word_the_question():
    client = Client()
    client.chat(ask(words("the dog"), IMAGE, task="refer"))
    client.chat(ask(IMAGE, task="identify", box=[30, 40, 0, -5]))
    client.chat(ask(IMAGE, task="caption"))
    assert [job.messages[-1].text for job in client.backend.jobs] == [
        "[refer] give me the location of the dog",
        "[identify] what object is in this location {<0><0><50><100>}",
        "[caption] Briefly describe this image.",
    ]


HISTORY = [
    {"role": "user", "content": [words("what is it?"), IMAGE]},
    {"role": "assistant", "content": "a dog"},
]


@pytest.mark.parametrize(
    ("question", "fields", "text"),
    [
        ("the dog", {"task": "refer"}, "[refer] give me the location of the dog"),
        ("[vqa] what colour?", {}, "[vqa] what colour?"),
        ("[identify] {<1><2><30><40>}", {}, "[identify] {<1><2><30><40>}"),
    ],
)
def test_a_task_goes_without_the_turns_before_it(question, fields, text):
    client = Client()
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": question}], **fields})
    (message,) = client.backend.jobs[0].messages
    assert message.text == text and len(message.images) == 1


def test_the_servers_default_task_words_questions_that_name_none():
    """What evaluation harnesses need: they know no tasks, and their questions want short answers."""
    client = Client(default_task="vqa")
    client.chat(ask(words("what colour?"), IMAGE))
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": "how old is it?"}]})
    client.chat(ask(words("the dog"), IMAGE, task="refer"))
    client.chat(ask(words("[caption] a dog"), IMAGE))
    client.chat(ask(words("no image")))
    client.chat(ask(IMAGE))
    assert [[message.text for message in job.messages] for job in client.backend.jobs] == [
        [EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "what colour?")],
        [EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "how old is it?")],
        ["[refer] give me the location of the dog"],
        ["[caption] a dog"],
        ["no image"],
        [""],
    ]
    assert [len(job.messages[0].images) for job in client.backend.jobs] == [1, 1, 1, 1, 0, 1]


def test_chat_keeps_the_turns_before_it():
    client = Client()
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": "how old is it?"}]})
    messages = client.backend.jobs[0].messages
    assert [message.text for message in messages] == ["what is it?", "a dog", "how old is it?"]
    assert [len(message.images) for message in messages] == [1, 0, 0]


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ([10, 10, 30, 20], "{<16><25><50><50>}"),
        ([30, 20, 10, 10], "{<16><25><50><50>}"),
        ([50, -20, 200, 10], "{<83><0><100><25>}"),
        ([0, 0, 60, 40], "{<0><0><100><100>}"),
        ([61, 0, 80, 40], None),
        ([-30, -30, -1, -1], None),
        ([0, 41, 60, 80], None),
        ([5, 5, 5, 30], None),
        ([0.1, 0.2, 0.5, 0.7], None),
    ],
)
def test_a_box_is_clipped_to_its_image_or_refused(box, wanted):
    client = Client()
    response = client.chat(ask(IMAGE, task="identify", box=box))
    if wanted:
        assert client.backend.jobs[0].messages[0].text.endswith(wanted)
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "box")
        assert "60 x 40 pixels" in response.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------- refusals


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
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            400,
            "messages",
        ),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
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
    assert re.search(r"has \d+ tokens .* context is 256 tokens", error["message"])


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
    fake = FakeBackend(READ, said("x", "stop"), wait=0.2)
    client = Client(fake, max_batch_size=2, max_queue=3, max_per_client=5)

    async def flood():
        async with client.open() as http:
            answers = await asyncio.gather(
                *(http.post(CHAT, json=ask(words("hi"), stream=i % 2 == 0)) for i in range(20))
            )
            after = await http.post(CHAT, json=ask(words("hi")))
            return answers, after

    answers, after = asyncio.run(flood())
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
    fake = FakeBackend(READ, said("a"), said("b", "stop"), wait=0.15)
    client = Client(fake, request_timeout_s=0.1)
    assert client.chat(ask(words("hi"))).status_code == 504
    client = Client(fake, request_timeout_s=0.2)
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
    client = Client(fake, max_batch_size=1, max_queue=0)

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

    asyncio.run(leave())
    assert fake.closed
    fake.items, fake.wait = (READ, said("x", "stop")), 0
    assert client.chat(ask(words("hi"))).status_code == 200


# ---------------------------------------------------------------------------------------------------- the rest


def test_health_follows_the_model(client):
    assert client.request("GET", "/healthz").json() == {"status": "ok"}

    fake = FakeBackend()
    fake.healthy = False
    response = Client(fake).request("GET", "/healthz")
    assert response.status_code == 503 and "retry-after" in response.headers


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
