"""Answers in the shape of the Responses API, read with the types of OpenAI's client."""

from __future__ import annotations

import asyncio
import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pipelines.serving.backend import Failure, Piece, PromptRead, TokenProbability
from pipelines.serving.response_answers import ResponseObject
from tests.serving_api import IMAGE, Client, FakeBackend, TimedClient, ask, said, words

INPUT = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "where?"},
            {"type": "input_image", "image_url": IMAGE["image_url"]["url"]},
        ],
    }
]
PROBABLE = (TokenProbability("b", -0.5, b"b", (TokenProbability("c", -1.0, b"c"),)),)
FIRST = (TokenProbability("a", -0.25, b"a", ()),)
TEXT = "<p>a dog</p> {<10><20><50><60>}\n\nyes"
ITEMS = (
    PromptRead(5),
    Piece("", num_tokens=1, cached_tokens=3),
    Piece(TEXT[:9], num_tokens=2, logprobs=FIRST),
    Piece(TEXT[9:], num_tokens=1, logprobs=PROBABLE),
    Piece("", num_tokens=4, finish_reason="stop"),
)
EVENT = TypeAdapter(ResponseStreamEvent)


def respond(client, **fields):
    return client.request("POST", "/v1/responses", json={"model": "tinygpt-v", "input": INPUT, **fields})


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for number, block in enumerate(response.text.split("\n\n")[:-1]):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        EVENT.validate_python(event)
        found.append(event)
    return found


def without_names(value):
    return json.loads(
        json.dumps(value), object_hook=lambda d: {k: v for k, v in d.items() if k not in ("id", "created_at")}
    )


def test_an_answer_is_the_one_of_a_chat():
    client = Client(FakeBackend(*ITEMS))
    answer = respond(client, metadata={"a": "b"}, instructions="i", temperature=0.5).json()
    read = Response.model_validate(answer, strict=True)
    TypeAdapter(ResponseObject).validate_python(answer)  # what the API's schema says
    assert set(answer) == set(ResponseObject.__annotations__)
    chat = client.chat(ask(words("where?"), IMAGE)).json()
    message = chat["choices"][0]["message"]
    assert read.output_text == message["content"] == TEXT
    assert answer["output"][0]["boxes"] == message["boxes"] != []
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (5, 8, 13)
    assert read.usage.input_tokens_details.cached_tokens == 3
    assert read.id.startswith("resp_") and read.output[0].id.startswith("msg_")
    assert (read.status, read.output[0].status, read.incomplete_details) == ("completed", "completed", None)
    told = (read.metadata, read.instructions, read.temperature, read.top_p, answer["store"], read.truncation)
    assert told == ({"a": "b"}, "i", 0.5, 1.0, False, "disabled")
    assert answer["parallel_tool_calls"] is True and answer["reasoning"] == {"effort": None, "summary": None}
    assert answer["text"] == {"format": {"type": "text"}} and answer["top_logprobs"] == 0
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 0}
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    value = client.metrics.registry.get_sample_value
    assert value("tinygptv_requests_total", {"status": "200"}) == 2 == value("tinygptv_request_seconds_count")
    assert value("tinygptv_tokens_total", {"kind": "answer"}) == 16


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("include", [[], ["message.output_text.logprobs"]])
def test_a_stream_ends_with_the_whole_answer(reason, include):
    client = Client(FakeBackend(*ITEMS[:-1], Piece("", num_tokens=4, finish_reason=reason)))
    fields = {"include": include, "top_logprobs": 1, "max_output_tokens": 9, "user": "u"}
    whole = respond(client, **fields).json()
    found = events(respond(client, stream=True, **fields))
    status = "completed" if reason == "stop" else "incomplete"
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", status,
    ]  # fmt: skip
    last = found[-1]["response"]
    assert without_names(last) == without_names(whole) and whole["status"] == status
    assert whole["incomplete_details"] == (None if reason == "stop" else {"reason": "max_output_tokens"})
    assert found[-2]["item"] == last["output"][0] and found[-3]["part"] == last["output"][0]["content"][0]
    assert {event["item_id"] for event in found if "item_id" in event} == {last["output"][0]["id"]}
    assert "".join(event["delta"] for event in found if "delta" in event) == found[-4]["text"] == TEXT
    entry = {"token": "b", "logprob": -0.5, "bytes": [98]}
    entry["top_logprobs"] = [{"token": "c", "logprob": -1.0, "bytes": [99]}]
    first = {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": []}
    told = whole["output"][0]["content"][0]["logprobs"]
    assert told == found[-4]["logprobs"] == ([first, entry] if include else [])
    assert [found[4]["logprobs"], found[5]["logprobs"]] == ([[first], [entry]] if include else [[], []])
    started, item = found[0]["response"], found[2]["item"]
    assert (started["status"], started["output"], started["usage"]) == ("in_progress", [], None)
    assert (item["status"], item["content"], item["boxes"]) == ("in_progress", [], [])
    assert found[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert {event["output_index"] for event in found if "output_index" in event} == {0}


@pytest.mark.parametrize(
    ("end", "code"), [(Failure("stopped.", "unavailable"), "unavailable"), (RuntimeError("secret"), None)]
)
def test_a_stream_that_fails_says_so_in_its_last_events(end, code):
    *_, told, failed = events(respond(Client(FakeBackend(PromptRead(1), said("a"), end)), stream=True))
    assert told["type"] == "error" and told["code"] == told["error"]["code"] == code
    assert told["message"] == told["error"]["message"] == failed["response"]["error"]["message"] != "secret"
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")


def test_a_stream_that_takes_too_long_says_so():
    client = TimedClient(FakeBackend(PromptRead(1), said("a"), said("b", "stop"), wait=3), request_timeout_s=7)
    body = {"model": "tinygpt-v", "input": "hi", "stream": True}
    *_, told, failed = events(client.request("POST", "/v1/responses", json=body))
    assert (told["code"], failed["response"]["status"]) == ("timeout", "failed") and client.backend.closed


def test_openais_client_reads_answers_and_streams():
    import openai

    async def use():
        client = Client(FakeBackend(*ITEMS))
        async with client.open() as http:
            api = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http, max_retries=0)
            body = {"model": "tinygpt-v", "input": INPUT}
            whole = await api.responses.create(**body)
            later = await api.responses.create(
                model="tinygpt-v", input=[*INPUT, *whole.output, {"role": "user", "content": "?"}]
            )
            async with api.responses.stream(**body) as stream:
                pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
                final = await stream.get_final_response()
            client.backend.items = (PromptRead(1), said("a"), Failure("stopped.", "unavailable"))
            with pytest.raises(openai.APIError, match="stopped"):
                async for _ in await api.responses.create(**body, stream=True):
                    pass
        return whole, later, pieces, final, client.backend.jobs

    whole, later, pieces, final, jobs = asyncio.run(use())
    assert whole.output_text == later.output_text == "".join(pieces) == final.output_text == TEXT
    assert whole.output[0].boxes == final.output[0].boxes and whole.output[0].boxes[0]["label"] == "a dog"
    assert [(message.role, message.text) for message in jobs[1].messages] == [
        ("user", "where?"), ("assistant", TEXT), ("user", "?"),
    ]  # fmt: skip
