"""What a request becomes on its way to the model, and what is counted of its answer."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest
from starlette.requests import ClientDisconnect

from pipelines.serving.backend import ChatJob, Failure, ModelInfo, Piece, PromptRead, TokenProbability
from pipelines.serving.clients import ClientIdentifier
from pipelines.serving.decoders import ImageDecoders
from pipelines.serving.media import MediaLoader
from pipelines.serving.metrics import Metrics
from pipelines.serving.service import ChatService, EventStream
from pipelines.settings import ServeSettings
from tests import virtual_time
from tests.serving_api import CHAT, IMAGE, READ, Client, FakeBackend, TimedClient, ask, events, said, scope_of, words
from tinygptv.data.conversation import ChatImage, ChatMessage


def image(number, width, height):
    return ChatImage(number, np.zeros((3, 16, 16), np.uint8), width, height)


@pytest.mark.parametrize(
    ("changes", "capacity", "parallel"),
    [
        ({}, 7, 4),
        ({"num_replicas": 2}, 11, 8),
        ({"num_replicas": 2, "max_replicas": 3}, 15, 12),
        ({"num_replicas": 3, "max_replicas": 2}, 15, 12),
    ],
)
def test_places_are_those_of_all_replicas_and_of_the_queue(changes, capacity, parallel):
    settings = ServeSettings(max_batch_size=4, max_queue=3, **changes)
    metrics, shared = Metrics(), ImageDecoders(1)
    service = ChatService(settings, FakeBackend(), metrics, ClientIdentifier(()), shared)
    assert (service.gate.capacity, service.gate.parallel) == (capacity, parallel)
    assert service.line.places == 2 * parallel, "what the replicas take"
    assert service.gate.on_change == metrics.in_flight.set and service.media.decoders is shared


def test_settings_and_fields_make_the_job():
    client = Client(stream_interval_ms=40, max_tokens=33, temperature=0.5, api_keys=["one"])
    headers = {"Authorization": "Bearer one"}
    client.chat(ask(words("hi")), headers=headers)
    client.chat({**ask(words("hi"), temperature=0), "max_tokens": None}, headers=headers)
    first, second = client.backend.jobs
    assert first.interval_s == 0.04 and first.salt == second.salt != 0
    assert [(job.sampling["max_tokens"], job.sampling["temperature"]) for job in (first, second)] == [
        (12, 0.5),
        (33, 0),
    ]


def test_boxes_lie_on_the_last_image(monkeypatch):
    async def load(self, references, side, client):
        return [image(1, 100, 50), image(2, 400, 200)]

    monkeypatch.setattr(MediaLoader, "load", load)
    client = Client(FakeBackend(PromptRead(3), said("<p>a dog</p> {<10><20><50><60>}", "stop")))
    (box,) = client.chat(ask(words("where"), IMAGE, IMAGE)).json()["choices"][0]["message"]["boxes"]
    assert box["box"] == [40.0, 40.0, 200.0, 120.0] and box["image"] == 1


PROBABLE = (TokenProbability("b", -0.5, b"b", (TokenProbability("c", -1.0, b"c"),)),)
ITEMS = (
    PromptRead(5),
    Piece("", num_tokens=1, cached_tokens=3),
    Piece("a", num_tokens=2),
    Piece("b", num_tokens=1, logprobs=PROBABLE),
    Piece("", num_tokens=4, finish_reason="length"),
)


def texts(found):
    return [event["choices"][0]["delta"].get("content") for event in found if event and event["choices"]]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_times_are_counted_once(stream):
    client = Client(FakeBackend(*ITEMS))
    assert client.chat(ask(words("hi"), stream=stream)).status_code == 200
    value = client.metrics.registry.get_sample_value
    counted = {kind: value("tinygptv_tokens_total", {"kind": kind}) for kind in ("prompt", "cached", "answer")}
    assert counted == {"prompt": 5, "cached": 3, "answer": 8}
    assert value("tinygptv_request_seconds_count") == 1 and value("tinygptv_requests_total", {"status": "200"}) == 1
    assert value("tinygptv_first_token_seconds_count") == int(stream)


def test_pieces_without_text_are_no_events_and_the_reason_is_the_last():
    found = events(Client(FakeBackend(*ITEMS)).chat(ask(words("hi"), stream=True)))
    assert texts(found) == ["", "a", "b", None]
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]] == [None, None, None, "length"]


def test_a_token_that_completes_no_letter_has_its_probability_in_an_event():
    items = (PromptRead(1), Piece("", logprobs=PROBABLE), Piece("b", finish_reason="stop"))
    found = events(Client(FakeBackend(*items)).chat(ask(words("hi"), stream=True, logprobs=True)))
    assert texts(found) == ["", "", "b", None]
    assert [entry["token"] for entry in found[1]["choices"][0]["logprobs"]["content"]] == ["b"]


@pytest.mark.parametrize(("options", "told"), [({"include_usage": True}, True), ({"include_usage": False}, False)])
def test_usage_of_a_stream_is_told_where_it_is_asked_for(options, told):
    found = events(Client(FakeBackend(*ITEMS)).chat(ask(words("hi"), stream=True, stream_options=options)))
    usage = [event["usage"] for event in found[:-1] if "usage" in event]
    wanted = {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert usage == ([{**wanted, "prompt_tokens_details": {"cached_tokens": 3}}] if told else [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_probabilities_are_told_where_they_are_asked_for(stream, asked):
    fields = {"logprobs": True, "top_logprobs": 1} if asked else {"logprobs": asked}
    response = Client(FakeBackend(*ITEMS)).chat(ask(words("hi"), stream=stream, **fields))
    body = [event for event in events(response)[:-1]] if stream else [response.json()]
    found = [event["choices"][0]["logprobs"] for event in body if event["choices"][0]["logprobs"] is not None]
    entry = {"token": "b", "logprob": -0.5, "bytes": [98]}
    alternatives = [{"token": "c", "logprob": -1.0, "bytes": [99]}]
    assert found == ([{"content": [{**entry, "top_logprobs": alternatives}]}] if asked else [])


@pytest.mark.parametrize(
    ("kind", "status", "code", "retry"),
    [
        ("request", 400, None, None),
        ("too_long", 400, "context_length_exceeded", None),
        ("unavailable", 503, "unavailable", "5"),
        ("stale_image", 503, "unavailable", "1"),
        ("model", 500, None, None),
    ],
)
def test_failures_have_their_status_and_say_when_to_come_back(kind, status, code, retry):
    response = Client(FakeBackend(Failure("no answer.", kind))).chat(ask(words("hi")))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (status, code, "no answer.")
    assert response.headers.get("retry-after") == retry


def test_only_requests_of_chats_are_counted():
    client = Client()
    for method, path in (("GET", "/v1/models/other"), ("GET", "/v1/nothing"), ("POST", "/v1/models")):
        assert client.request(method, path).status_code >= 400
    counted = [
        s for family in client.metrics.registry.collect() for s in family.samples if s.name == "tinygptv_requests_total"
    ]
    assert counted == []


def test_keys_of_the_api_are_not_answered_with_a_browsers_question():
    client = Client(api_keys=["one"])
    asked = {path: client.request("GET", path).headers["www-authenticate"] for path in ("/v1/models", "/metrics")}
    assert asked["/v1/models"] == "Bearer" and asked["/metrics"].startswith("Basic")


def test_a_job_and_a_piece_say_nothing_that_they_are_not_told():
    assert ChatJob((), {}) == ChatJob((), {}, interval_s=0.0, salt=0)
    assert Piece("x") == Piece("x", num_tokens=1, cached_tokens=0, logprobs=(), finish_reason=None)
    assert ModelInfo(1, 2, 3) == ModelInfo(1, 2, 3, scope="")


def test_a_conversation_stays_with_its_first_image():
    turns = [ChatMessage("user", "x", (image(7, 1, 1), image(8, 1, 1))), ChatMessage("user", "y", (image(9, 1, 1),))]
    assert ChatJob(tuple(turns), {}).conversation == "7"
    other = [ChatJob((ChatMessage("user", text, ()),), {}).conversation for text in ("a", "a", "b")]
    assert other[0] == other[1] != other[2]
    greeted = [ChatMessage("user", ""), ChatMessage("assistant", "hi"), ChatMessage("user", "a")]
    assert ChatJob(tuple(greeted), {}).conversation == other[0], "a greeting is common to all"


def test_the_time_limit_is_of_the_whole_answer():
    fake = FakeBackend(PromptRead(1), *[said("x")] * 20, said("", "stop"), wait=2.0)
    client = TimedClient(fake, request_timeout_s=9)
    found = events(client.chat(ask(words("hi"), stream=True)))
    assert found[-1]["error"]["code"] == "timeout" and len(found) == 5, "a role, three letters and the refusal"


@pytest.mark.parametrize("stream", [False, True])
def test_one_question_does_not_wait_for_all_those_of_another_client(stream):
    async def run():
        client = TimedClient(FakeBackend(READ, said("fine", "stop"), wait=1), max_batch_size=1, max_queue=20)
        loop = asyncio.get_running_loop()

        async def one(address, name):
            async with client.open((address, 1)) as http:
                assert (await http.post(CHAT, json=ask(words(name), stream=stream))).status_code == 200
            ends[name] = loop.time()

        ends, started = {}, loop.time()
        many = [asyncio.create_task(one("10.0.0.1", f"many {i}")) for i in range(12)]
        await asyncio.sleep(0.5)
        await asyncio.gather(*many, one("10.0.0.2", "single"))
        return ends["single"] - started, max(ends.values()) - started

    single, last = virtual_time.run(run())
    # Two at the model at a time, each for two seconds: the single one is next.
    assert (single, last) == (4, 14)


def test_who_waits_for_an_image_has_no_place_at_the_model(monkeypatch):
    async def load(self, references, side, client):
        await asyncio.sleep(100 if references else 0)
        return [image(number, 1, 1) for number, _ in enumerate(references)]

    monkeypatch.setattr(MediaLoader, "load", load)

    async def run():
        client = TimedClient(max_batch_size=1, max_queue=20)
        started = asyncio.get_running_loop().time()
        async with client.open() as http:
            slow = [asyncio.create_task(http.post(CHAT, json=ask(words("hi"), IMAGE))) for _ in range(8)]
            await asyncio.sleep(1)
            assert (await http.post(CHAT, json=ask(words("hi")))).status_code == 200
            waited = asyncio.get_running_loop().time() - started
            assert [response.status_code for response in await asyncio.gather(*slow)] == [200] * 8
        return waited

    assert virtual_time.run(run()) == 1


def test_the_time_in_line_is_of_the_answers_time():
    client = TimedClient(FakeBackend(READ, said("fine", "stop"), wait=2), max_batch_size=1, request_timeout_s=5)

    async def run():
        async with client.open() as http:
            found = await asyncio.gather(*[http.post(CHAT, json=ask(words(str(i)))) for i in range(4)])
        return [response.status_code for response in found]

    assert virtual_time.run(run()) == [200, 200, 504, 504]
    assert client.app.state.gate.in_flight == 0
    client.backend.wait = 0
    assert client.chat(ask(words("hi"))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_comes_slowly_takes_nothing_of_the_answers_time_and_is_counted(stream):
    fake = FakeBackend(PromptRead(1), said("a"), said("", "stop"), wait=1.5)
    client = TimedClient(fake, request_timeout_s=5, body_timeout_s=60)

    async def slowly():
        await asyncio.sleep(4)
        yield json.dumps(ask(words("hi"), stream=stream)).encode()

    response = client.request("POST", CHAT, content=slowly())
    assert response.status_code == 200 and "timeout" not in response.text
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_request_seconds_sum") == pytest.approx(4 + 4.5)
    assert value("tinygptv_first_token_seconds_sum") == (pytest.approx(4 + 3) if stream else 0)


def test_a_task_is_about_the_last_image_of_the_conversation(monkeypatch):
    seen = []

    async def load(self, references, side, client):
        seen.extend(reference.param for reference in references)
        return [image(1, 100, 50), image(2, 400, 200)]

    monkeypatch.setattr(MediaLoader, "load", load)
    client = Client()
    history = [
        {"role": "user", "content": [words("look"), IMAGE, words("and"), IMAGE]},
        {"role": "assistant", "content": "yes"},
    ]
    client.chat({**ask(), "messages": [*history, {"role": "user", "content": "the dog"}], "task": "refer"})
    (message,) = client.backend.jobs[0].messages
    assert [shown.number for shown in message.images] == [2]
    assert seen == ["messages.0.content.1.image_url", "messages.0.content.3.image_url"], "as the client numbers them"


# ------------------------------------------------------------------------------------------------ what is sent and when


def error_of(response):
    return {"status": response.status_code, **response.json()["error"]}


def test_another_model_is_named_and_so_is_the_served_one():
    client = Client()
    assert error_of(client.chat({**ask(words("hi")), "model": "x" * 90})) == {
        "status": 404,
        "message": f"the model '{'x' * 80}' does not exist; this server has 'tinygpt-v'.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert not client.backend.jobs


def test_a_stream_is_no_page_to_be_kept_and_its_letters_stay():
    response = Client(FakeBackend(READ, said("für 😀", "stop"))).chat(ask(words("hi"), stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "für 😀" in response.text and response.text.endswith("data: [DONE]\n\n")
    assert events(response)[0]["created"] == pytest.approx(time.time(), abs=60)


def test_times_are_counted_from_the_request_on():
    client = TimedClient(FakeBackend(READ, said(""), said("a"), said("b"), said("", "stop"), wait=2.0))
    client.chat(ask(words("hi"), stream=True))
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_first_token_seconds_count") == 1
    first, whole = value("tinygptv_first_token_seconds_sum"), value("tinygptv_request_seconds_sum")
    assert (first, whole) == (pytest.approx(6), pytest.approx(10))


def test_a_stream_has_no_event_before_the_first_token():
    """Benchmark clients (vLLM's) take the first event for it, whatever is in it."""
    client = TimedClient(FakeBackend(READ, said("fine"), said("", "stop"), wait=3))
    found = []

    async def run():
        body = json.dumps(ask(words("hi"), stream=True)).encode()
        clock = asyncio.get_running_loop().time
        started = clock()

        messages = [{"type": "http.request", "body": body}]

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            found.append((clock() - started, message.get("body")))

        await client.app(scope_of(), receive, send)

    virtual_time.run(run())
    times = [time for time, body in found if body]
    assert times == [6, 6, 9, 9], "role and text, then reason and end; the prompt was read after 3"
    assert b'"role": "assistant"' in next(body for _, body in found if body)


def test_a_stream_that_fails_is_counted_as_begun_and_not_as_finished(caplog):
    client = Client(FakeBackend(PromptRead(5), said("a"), RuntimeError("bug")))
    *_, last = events(client.chat(ask(words("hi"), stream=True)))
    assert last == {"error": {**last["error"], "type": "server_error", "param": None, "code": None}}
    assert [record.getMessage() for record in caplog.records] == ["a stream failed"] and "bug" in caplog.text
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_requests_total", {"status": "200"}) == 1
    assert value("tinygptv_request_seconds_count") == 0 and value("tinygptv_in_flight_requests") == 0
    assert value("tinygptv_tokens_total", {"kind": "prompt"}) is None and client.backend.closed


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_model_has_its_status_counted_and_gives_its_slot_back(stream):
    client = Client(FakeBackend(Failure("full.", "unavailable")), max_batch_size=1, max_queue=0)
    for _ in range(2):
        assert client.chat(ask(words("hi"), stream=stream)).status_code == 503
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_requests_total", {"status": "503"}) == 2
    assert value("tinygptv_requests_total", {"status": "200"}) is None
    assert value("tinygptv_in_flight_requests") == 0 and client.backend.closed


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_answer_is_told_the_limit(stream):
    client = TimedClient(FakeBackend(READ, said("a", "stop"), wait=5.5), request_timeout_s=5.25)
    wanted = {"message": "the answer took more than 5.25 s; it was cancelled.", "type": "server_error"}
    response = client.chat(ask(words("hi"), stream=stream))
    assert error_of(response) == {"status": 504, **wanted, "param": None, "code": "timeout"}
    assert client.backend.closed and client.metrics.registry.get_sample_value("tinygptv_in_flight_requests") == 0


@pytest.mark.parametrize(
    ("items", "status"),
    [((Failure("no."),), 500), ((RuntimeError("bug"),), 500), ((), 504), ((READ, said("a", "stop")), 200)],
)
def test_the_models_answer_is_closed_before_the_response_has_ended(items, status):
    """Not by the end of the event loop: a slot of the engine is free at once."""
    client = Client(FakeBackend(*(items or (READ,)), wait=0.0 if items else 60.0), request_timeout_s=30)

    async def send():
        async with client.open() as http:
            response = await http.post(CHAT, json=ask(words("hi"), stream=True))
            return response.status_code, client.backend.closed

    assert virtual_time.run(send()) == (status, True)


class Changing(FakeBackend):
    """A model that is replaced by one of another image size while it is asked."""

    sizes: list[int]

    async def describe(self):
        return ModelInfo(self.sizes.pop(0), 100, 1)

    async def complete(self, job):
        self.jobs.append(job)
        side = job.messages[0].images[0].pixels.shape[1]
        return [Failure("resized.", "stale_image")] if side == 16 else [READ, said("fine", "stop")]


def test_a_model_is_asked_for_its_size_once_and_again_where_it_was_replaced():
    client = Client(Changing())
    client.backend.sizes = [16, 24]
    for _ in range(2):
        assert client.chat(ask(words("hi"), IMAGE)).status_code == 200
    assert [job.messages[0].images[0].pixels.shape for job in client.backend.jobs] == [(3, s, s) for s in (16, 24, 24)]
    client = Client(Changing())
    client.backend.sizes = [16, 16]
    assert error_of(client.chat(ask(words("hi"), IMAGE)))["message"] == "resized.", "not a third time"
    assert len(client.backend.jobs) == 2
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_requests_total", {"status": "503"}) == 1


def test_only_a_stream_that_asks_for_it_is_one():
    client = Client()
    for stream, kind in ((None, "application/json"), (False, "application/json"), (True, "text/event-stream")):
        assert client.chat(ask(words("hi"), stream=stream)).headers["content-type"].startswith(kind)
    ids = {client.chat(ask(words("hi"))).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def closing_order(error=None):
    """What ends in which order where an event stream is sent, or its client is gone at once."""
    order = []

    async def source():
        try:
            yield 1
        finally:
            order.append("source")

    async def lines():
        try:
            yield "data: a\n\n"
        finally:
            order.append("events")

    async def send(message):
        order.append(message["type"])
        if error:
            raise error

    async def run():
        items = source()
        await anext(items)
        stream = EventStream(lines(), items, lambda: order.append("slot"))
        never = asyncio.Event()
        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, never.wait, send)

    if error:
        with pytest.raises(ClientDisconnect):
            asyncio.run(run())
    else:
        asyncio.run(run())
    return order


def test_however_a_stream_ends_its_source_is_closed_and_then_its_slot_is_given_back():
    assert closing_order()[-2:] == ["source", "slot"] and closing_order().count("slot") == 1
    assert closing_order(OSError("gone")) == ["http.response.start", "source", "slot"]
