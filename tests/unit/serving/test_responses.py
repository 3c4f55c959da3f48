"""Requests of the Responses API: the chat request that each of them is, and what is refused under its own name."""

from __future__ import annotations

import pytest

from pipelines.serving.backend import Failure
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.responses import ResponsesRequest
from tests.serving_api import IMAGE, Client, FakeBackend, words

URL = IMAGE["image_url"]["url"]
PICTURE = {"type": "input_image", "image_url": URL, "detail": "auto"}
EARLIER = {  # an item of our own answers
    "type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "boxes": [],
    "content": [{"type": "output_text", "text": "a dog", "annotations": [], "logprobs": []}],
}  # fmt: skip


def typed(text):
    return {"type": "input_text", "text": text}


def respond(client, input="hi", **fields):
    return client.request("POST", "/v1/responses", json={"model": "tinygpt-v", "input": input, **fields})


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"input": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}),
        (
            {"input": "hi", "instructions": "be brief", "max_output_tokens": 5, "temperature": 0.5, "seed": 1},
            {
                "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
                "max_completion_tokens": 5, "temperature": 0.5, "seed": 1,
            },
        ),
        (
            {
                "input": [
                    {"role": "developer", "content": "d"}, {"role": "user", "content": [PICTURE, typed("what?")]},
                    EARLIER, {"type": "message", "role": "user", "content": "sure?"},
                ],
                "task": "vqa", "stream": True,
            },
            {
                "messages": [
                    {"role": "developer", "content": "d"}, {"role": "user", "content": [IMAGE, words("what?")]},
                    {"role": "assistant", "content": [words("a dog")]}, {"role": "user", "content": "sure?"},
                ],
                "task": "vqa", "stream": True,
            },
        ),
        (
            {"input": "hi", "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
            {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2, "logprobs": True},
        ),
        (
            {"input": "hi", "text": {"format": {"type": "text"}, "verbosity": "low"}, "include": [], "store": True,
             "user": "u", "metadata": {"a": "b"}, "truncation": "auto", "background": False, "conversation": None,
             "tools": [], "tool_choice": "auto", "previous_response_id": None},
            {"messages": [{"role": "user", "content": "hi"}], "tools": [], "tool_choice": "auto", "background": False,
             "conversation": None, "previous_response_id": None},
        ),
    ],
)  # fmt: skip
def test_a_request_is_a_chat_request(fields, chat):
    asked = ResponsesRequest.model_validate({"model": "m", **fields})
    assert asked.chat == ChatRequest.model_validate({"model": "m", **chat})
    assert asked.ignored_fields == asked.chat.ignored_fields


def parts(*content):
    return {"input": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("fields", "param", "code", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter", "leave it out"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter", "leave it out"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter", "leave it out"),
        ({"background": True}, "background", "unsupported_parameter", "leave it out"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter", "leave it out"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type", "invalid_value", "this model writes text"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value", "greater than or equal to 1"),
        ({"input": []}, "input", "invalid_value", "at least 1 item"),
        ({"input": None}, "input", "invalid_value", "valid string"),
        ({"input": ""}, "input", "invalid_value", "at least 1 item"),
        ({"input": [{"role": "user", "content": ""}]}, "input.0.content", None, "the last message is empty"),
        ({"input": "hi", "task": "vqa"}, "task", None, "about an image"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input.0", "invalid_value",
         "an item of type 'function_call_output' is not supported: this server takes messages, and stores none"),
        ({"input": [EARLIER, {"type": "reasoning", "id": "rs_1", "summary": []}]}, "input.1", "invalid_value",
         "'reasoning' is not supported"),
        (parts({"type": "input_file", "file_id": "f"}), "input.0.content.0", "invalid_value", "input_file"),
        (parts({"type": "input_audio", "input_audio": {}}), "input.0.content.0", "invalid_value", "input_audio"),
        (parts({"type": "input_image", "file_id": "f", "image_url": None}), "input.0.content.0.file_id",
         "invalid_value", "send the image itself as image_url"),
        (parts(typed("a"), {"type": "input_image", "image_url": "data:text/plain,x"}), "input.0.content.1.image_url",
         "invalid_image_url", "not an image"),
        ({**parts({"type": "input_image", "image_url": "data:text/plain,"}), "instructions": "i"},
         "input.0.content.0.image_url",
         "invalid_image_url", "not an image"),
        ({"input": [{"role": "assistant", "content": [PICTURE]}]}, "input.0.content.0.type", "invalid_value", "text"),
        ({"input": [{"role": "user", "content": "x"}] * 4}, "input", "too_many_messages", "4 messages"),
        ({"model": "gpt-5"}, "model", "model_not_found", "gpt-5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_names_the_field_that_the_request_has(fields, param, code, told, stream):
    client = Client(max_messages=3)
    response = respond(client, **fields, stream=stream)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400), error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error") and told in error[
        "message"
    ]
    status = str(response.status_code)
    assert client.metrics.registry.get_sample_value("tinygptv_requests_total", {"status": status}) == 1


@pytest.mark.parametrize(
    ("fields", "param", "where"),
    [
        ({}, None, None),
        ({}, "box", "box"),
        ({}, "messages", "input"),
        ({}, "messages.0.content", "input"),
        ({"instructions": "i"}, "messages", "input"),
        ({"instructions": "i"}, "messages.0.content", "instructions"),
        ({"instructions": "i"}, "messages.1.content", "input"),
        ({"input": [{"role": "user", "content": "x"}]}, "messages", "input"),
        ({"input": [{"role": "user", "content": "x"}]}, "messages.0", "input.0"),
        ({"input": [{"role": "user", "content": "x"}], "instructions": "i"}, "messages", "input"),
        ({"input": [{"role": "user", "content": "x"}], "instructions": "i"}, "messages.0.content", "instructions"),
        (
            {"input": [{"role": "user", "content": "x"}] * 2, "instructions": "i"},
            "messages.2.content",
            "input.1.content",
        ),
    ],
)
def test_a_field_of_the_chat_request_is_named_as_the_client_wrote_it(fields, param, where):
    assert ResponsesRequest.model_validate({"model": "m", "input": "hi", **fields}).field_of(param) == where


def test_an_item_that_is_no_object_is_refused_in_a_sentence():
    error = respond(Client(), input=["hi"]).json()["error"]
    assert error["param"] == "input.0" and "dictionary" in error["message"]


@pytest.mark.parametrize("fields", [{}, {"instructions": "i"}, {"input": [{"role": "user", "content": "x"}]}])
def test_a_conversation_that_does_not_fit_is_an_input_that_does_not(fields):
    response = respond(Client(FakeBackend(Failure("too long.", "too_long"))), **fields)
    assert response.json()["error"] == {
        "message": "too long.", "type": "invalid_request_error", "param": "input", "code": "context_length_exceeded"
    }  # fmt: skip


def test_keys_and_busy_servers_are_those_of_chats():
    assert respond(Client(api_keys=["key"])).status_code == 401
    closed = Client()
    closed.app.state.gate.is_closed = True
    assert respond(closed).status_code == 503
