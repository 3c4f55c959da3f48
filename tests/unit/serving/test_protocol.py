"""Requests as OpenAI's clients write them: neutral, unknown and unsupported fields, and what the model is asked."""

from __future__ import annotations

import logging
import re

import pytest
from pydantic import ValidationError

from pipelines.serving.protocol import MAX_BIASES, MAX_STOP_LENGTH, MAX_STOPS, UNSUPPORTED, ChatRequest
from pipelines.settings import ServeSettings
from tests.paths import ROOT
from tests.serving_api import IMAGE, Client, FakeBackend, ask, words
from tests.serving_model import data_url, make_image


@pytest.fixture(scope="module")
def client():
    return Client()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None},
        {"tools": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": None},
        {"parallel_tool_calls": False},
        {"functions": None},
        {"functions": [], "function_call": "none"},
        {"service_tier": "auto"},
        {"reasoning_effort": None},
        {"reasoning_effort": "low"},
        {"modalities": ["text"]},
        {"audio": None},
        {"prediction": None},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"n": 1},
        {"best_of": 1},
        {"typical_p": 1, "mirostat": 0, "dynatemp_range": 0, "xtc_probability": 0, "dry_multiplier": 0.0},
        {"top_k": -1},
        {"user": "somebody", "metadata": {"a": "b"}, "store": False, "safety_identifier": "x"},
        {"logit_bias": {}},
        {"logit_bias": None, "stop": None, "seed": None, "stream": None, "stream_options": None},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": {"include_usage": None}},
        {"a_field_of_next_year": {"deep": [1, 2]}},
    ],
)
def test_what_would_not_change_the_answer_is_taken(client, fields):
    assert client.chat(ask(words("hi"), **fields)).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function"}},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
        {"best_of": 2},
        {"best_of": True},
        {"typical_p": 0.9},
        {"min_tokens": 3},
        {"stop_token_ids": [5]},
        {"echo": True},
        {"chat_template": "x"},
        *({f"guided_{kind}": "x"} for kind in ("json", "regex", "choice", "grammar")),
        {"structured_outputs": {"json": {}}},
        {"use_beam_search": True},
        {"function_call": {"name": "f"}},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(client, fields):
    response = client.chat(ask(words("hi"), **fields))
    assert response.status_code == 400
    error = response.json()["error"]
    name = next(iter(fields))
    assert error["message"] == f"{name} is not supported by this server: leave it out."
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_forms_of_answers_are_refused_with_the_way_to_boxes(kind):
    response = Client().chat(ask(words("hi"), response_format={"type": kind, "json_schema": {"name": "boxes"}}))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert f"{kind} is not supported" in message and "message.boxes" in message


def test_ignored_fields_are_logged_in_one_line_and_once(caplog):
    client = Client()
    caplog.set_level(logging.INFO, "pipelines.serving")
    for _ in range(3):
        client.chat(ask(words("hi"), later="x", never=None, tools=[], **{"evil\nname": 1}))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == r"ignored request fields: 'later', 'tools', 'evil\nname'"
    client.chat(ask(words("hi"), **{f"name{i}": 1 for i in range(1000)}))
    client.chat(ask(words("hi"), another=1))
    assert len(caplog.records) == 2 and len(caplog.text) < 2000, "clients cannot fill the log with names"


def test_fields_that_are_not_used_are_named_unless_they_are_null():
    request = ChatRequest.model_validate(ask(words("hi"), tools=[], later=0, never=None, user="a"))
    assert request.ignored_fields == ["tools", "later", "user"]
    assert ChatRequest.model_validate(ask(words("hi"))).ignored_fields == []


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_each_unsupported_field_is_refused_but_for_null_and_its_neutral_values(name):
    for value in (None, *UNSUPPORTED[name]):
        ChatRequest.model_validate(ask(words("hi"), **{name: value}))
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(ask(words("hi"), **{name: "other"}))
    (error,) = caught.value.errors()
    assert (error["type"], error["ctx"]) == ("unsupported", {"field": name})
    assert error["msg"] == f"{name} is not supported by this server: leave it out"


def test_tools_are_taken_where_none_may_be_chosen_and_what_follows_is_still_looked_at():
    tools = {"tools": [{"type": "function"}]}
    ChatRequest.model_validate(ask(words("hi"), **tools, tool_choice="none"))
    for fields in (tools, {**tools, "tool_choice": "auto"}, {**tools, "tool_choice": "none", "best_of": 2}):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate(ask(words("hi"), **fields))
        assert caught.value.errors()[0]["ctx"] == {"field": "best_of" if "best_of" in fields else "tools"}


@pytest.mark.parametrize("kind", ["json_schema", "json_object", "xml"])
def test_a_form_that_is_not_text_says_where_boxes_are(kind):
    message = refused(response_format={"type": kind})
    if kind == "xml":
        assert "text" in message
    else:
        assert message == (
            f"Value error, {kind} is not supported: this model writes text. Boxes come as numbers in message.boxes, "
            "without another format"
        )


def said(*messages):
    return ChatRequest.model_validate({"model": "m", "messages": list(messages)}).messages


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_message_has_so_many_parts_at_most(role):
    parts = [words("hi")] * 64
    assert len(said({"role": role, "content": parts})[0].content) == 64
    with pytest.raises(ValidationError, match="at most 64 items"):
        said({"role": role, "content": [*parts, words("hi")]})


def test_an_earlier_answer_may_be_empty_and_a_question_may_not():
    assert said({"role": "assistant"}, {"role": "assistant", "content": None})[1].content is None
    for role in ("user", "system", "developer"):
        with pytest.raises(ValidationError):
            said({"role": role, "content": None})


def test_a_request_has_a_message_and_an_image_a_url():
    for messages in ([], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]):
        with pytest.raises(ValidationError, match="at least 1"):
            said(*messages)
    with pytest.raises(ValidationError, match="at least 1"):
        said({"role": "user", "content": [{"type": "image_url", "image_url": ""}]})


def test_the_usage_of_a_stream_is_sent_only_where_it_is_asked_for():
    options = ChatRequest.model_validate(ask(words("hi"), stream_options={})).stream_options
    assert options is not None and options.include_usage is False


def sampling(**fields):
    request = ChatRequest.model_validate(ask(words("hi"), **fields))
    return request.sampling(max_tokens=99, temperature=0.7)


def test_the_servers_defaults_stand_in_for_what_a_request_leaves_out():
    assert sampling(max_tokens=None) == {
        "max_tokens": 99,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": (),
        "seed": None,
        "stop": (),
        "logprobs": None,
        "ignore_end": False,
    }


@pytest.mark.parametrize(
    ("given", "wanted"), [("ab", ("ab",)), ("\n\n", ("\n\n",)), (["ab", "c"], ("ab", "c")), ([], ()), (None, ())]
)
def test_stop_is_a_string_or_a_list(given, wanted):
    assert sampling(stop=given)["stop"] == wanted


def refused(**fields):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(ask(words("hi"), **fields))
    (error,) = caught.value.errors()
    assert error["loc"][0] == next(iter(fields))
    return error["msg"]


@pytest.mark.parametrize("stop", ["x" * MAX_STOP_LENGTH, ["x" * MAX_STOP_LENGTH] * MAX_STOPS])
def test_stops_at_their_bounds_are_taken(stop):
    assert max(len(text) for text in sampling(stop=stop)["stop"]) == 128


@pytest.mark.parametrize("stop", ["", "x" * 129, ["a", ""], ["a", "x" * 129], list("abcde"), 5, ["a", 5], [None]])
def test_stops_beyond_their_bounds_are_refused(stop):
    assert refused(stop=stop).endswith("stop takes up to 4 strings of 1 to 128 characters")


@pytest.mark.parametrize("token", ["-1", "+1", " 1", "1 ", "01", "1.0", "1_0", "", "a", "\u0661", "1" * 10])
def test_keys_of_a_bias_are_token_ids_in_one_form(token):
    """Two forms of one id would be two biases of one token."""
    message = refused(logit_bias={"5": 1, token: 1})
    assert message.endswith(f"logit_bias maps token ids such as '11' to numbers in -100..100, not {token!r}")


@pytest.mark.parametrize("bias", [-100.5, 100.5, "1", None, [1], float("nan")])
def test_a_bias_is_a_number_within_100(bias):
    assert "to numbers in -100..100, not '7'" in refused(logit_bias={"5": 1, "7": bias})


def test_biases_at_their_bounds_are_taken():
    assert sampling(logit_bias={"0": -100, "999999999": 100})["logit_bias"] == ((0, -100.0), (999999999, 100.0))
    many = {str(token): 1 for token in range(MAX_BIASES)}
    assert len(sampling(logit_bias=many)["logit_bias"]) == 300
    message = refused(logit_bias={**many, "300": 1})
    assert message.endswith("logit_bias takes up to 300 entries, not 301")
    assert len(refused(logit_bias={"z" * 1000: 1})) < 150, "a long key is not repeated whole"
    assert "dict" in refused(logit_bias=[5])


@pytest.mark.parametrize(
    ("field", "least", "most", "outside"),
    [
        ("temperature", 0, 2, (-0.1, 2.1)),
        ("top_p", 0, 1, (-0.1, 1.1)),
        ("top_k", 0, 1000, (-2, 1.5)),
        ("min_p", 0, 1, (-0.1, 1.1)),
        ("repetition_penalty", 0.1, 10, (0, 10.1)),
        ("repeat_penalty", 0.1, 10, (0, 10.1)),
        ("frequency_penalty", -2, 2, (-2.1, 2.1)),
        ("presence_penalty", -2, 2, (-2.1, 2.1)),
        ("seed", -(2**63), 2**63 - 1, (-(2**63) - 1, 2**63)),
        ("max_tokens", 1, 10**6, (0, -2)),
        ("max_completion_tokens", 1, 10**6, (0, -2)),
    ],
)
def test_numbers_have_bounds(field, least, most, outside):
    name = {"max_completion_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}.get(field, field)
    assert [sampling(**{field: value})[name] for value in (least, most)] == [least, most]
    for value in outside:
        refused(**{field: value})


def test_more_answers_and_alternatives_than_there_are_are_refused():
    assert refused(n=2) and refused(n=0) and refused(top_logprobs=21) and refused(top_logprobs=-1)
    assert [sampling(logprobs=True, top_logprobs=count)["logprobs"] for count in (0, 20)] == [0, 20]


def test_an_explicit_temperature_of_0_wins():
    assert sampling(temperature=0)["temperature"] == 0


@pytest.mark.parametrize(("temperature", "wanted"), [(1e-9, 0), (0.0099, 0), (0.01, 0.01), (1e-320, 0), (2, 2)])
def test_a_temperature_near_0_is_greedy(temperature, wanted):
    assert sampling(temperature=temperature)["temperature"] == wanted


def test_both_names_of_the_token_limit():
    assert sampling(max_tokens=5)["max_tokens"] == 5
    assert sampling(max_tokens=None, max_completion_tokens=7)["max_tokens"] == 7
    assert sampling(max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7
    assert sampling(max_tokens=-1)["max_tokens"] == 99, "no bound of the client's: the server's"
    assert sampling(max_tokens=5, max_completion_tokens=-1)["max_tokens"] == 5


def test_both_names_of_the_repetition_penalty():
    assert sampling(repeat_penalty=1.25)["repetition_penalty"] == 1.25
    assert sampling(repeat_penalty=1.25, repetition_penalty=1.5)["repetition_penalty"] == 1.5


def test_every_sampling_field_reaches_the_model():
    fields = {
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.25,
        "seed": 11,
        "logit_bias": {"7": -100, "8": 2.5},
        "stop": "x",
        "logprobs": True,
        "top_logprobs": 3,
    }
    wanted = {**fields, "logit_bias": ((7, -100), (8, 2.5)), "stop": ("x",), "logprobs": 3}
    del wanted["top_logprobs"]
    assert wanted.items() <= sampling(**fields).items()
    assert sampling(logprobs=True)["logprobs"] == 0
    assert sampling(logprobs=False, top_logprobs=3)["logprobs"] is None
    assert sampling(top_k=-1)["top_k"] == 0 and sampling(ignore_eos=True)["ignore_end"] is True


@pytest.mark.parametrize("detail", [None, "high", "original", ""])
def test_an_image_url_may_be_a_string_and_its_detail_any(detail):
    client = Client()
    url = data_url(make_image())
    image_url = url if detail is None else {"url": f" {url}\n", "detail": detail}  # as it may come from a file
    assert client.chat(ask(words("hi"), {"type": "image_url", "image_url": image_url})).status_code == 200
    (image,) = client.backend.jobs[0].messages[0].images
    assert (image.width, image.height) == (60, 40)


def test_head_is_get_without_a_body():
    client = Client()
    for path in ("/", "/healthz", "/v1/models", "/metrics"):
        head, get = client.request("HEAD", path), client.request("GET", path)
        assert head.status_code == 200 and head.content == b"" and get.content
        assert head.headers["content-type"] == get.headers["content-type"]
    assert client.request("HEAD", "/nothing").status_code == 404


@pytest.mark.parametrize("name", ["org/name", "a b", "tinygpt-v"])
def test_a_model_of_any_name_is_found_where_it_is_listed(name):
    client = Client(model_name=name)
    (listed,) = client.request("GET", "/v1/models").json()["data"]
    assert listed["id"] == name and listed["scope"] == "drawn scenes"
    for path in (name, name.replace("/", "%2F").replace(" ", "%20")):
        assert client.request("GET", f"/v1/models/{path}").json()["id"] == name
    assert client.request("GET", "/v1/models/org/other").status_code == 404
    assert client.chat({**ask(words("hi")), "model": name}).status_code == 200


def test_boxes_name_the_image_they_lie_on():
    fake = FakeBackend()
    fake.items = (fake.items[0], type(fake.items[1])("<p>it</p> {<0><0><50><50>}", finish_reason="stop"))
    (box,) = Client(fake).chat(ask(IMAGE, IMAGE, words("where")), timeout=60).json()["choices"][0]["message"]["boxes"]
    assert box["image"] == 1 and box["box"] == [0, 0, 30, 20]


def test_the_docs_ask_for_the_served_name():
    """Other harnesses' command lines of docs/evaluation.md name the model that the documented command serves."""
    text = (ROOT / "docs/evaluation.md").read_text()
    names = re.findall(r"model_version=([\w./-]+)", text) + re.findall(r'"model": "([^"]+)"', text)
    assert len(names) >= 2 and set(names) == {ServeSettings().model_name}
