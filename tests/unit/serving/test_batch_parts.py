"""Answering a file in parts: lines, what is sent for each, what is written of it, and what a run says and passes on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.serving import batch
from pipelines.serving.batch import (
    BatchRequest,
    RequestFiles,
    _answer,
    _local_file,
    _post,
    _refuse_no_requests,
    _request_of,
    _serve_settings,
    finished_answers,
    read_requests,
)
from pipelines.settings import AnswerSettings, BatchSettings, SettingsError
from pipelines.storage import Location, StorageError

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
ASKED = {"input": "hi"}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return list(read_requests(path))


def test_a_line_says_why_it_is_no_request(tmp_path):
    found = lines(
        tmp_path / "r.jsonl",
        "{",
        [1],
        "3",
        {"custom_id": 7, "body": BODY},
        {"custom_id": "u", "url": "/v1/embeddings", "body": BODY},
        {"custom_id": "b", "body": [1]},
        {"custom_id": "m", "body": {"prompt": "x"}},
        {**BODY, "url": CHAT},
        {"custom_id": "r", "url": RESPONSES, "body": ASKED},
        {"custom_id": "w", "url": RESPONSES, "body": BODY},
        {"input": "", "instruction": "a row of Alpaca", "output": "x"},
    )
    assert [request.id for request in found] == [
        "line-1",
        "line-2",
        "line-3",
        "7",
        "u",
        "b",
        "m",
        "line-8",
        "r",
        "w",
        "line-11",
    ]
    none = f"is no request for {CHAT} or {RESPONSES}."
    assert found[0].error.startswith("line 1 is not valid JSON: Expecting property name")
    assert [request.error for request in found[1:]] == [
        "line 2 is a list, not an object.",
        "line 3 is a int, not an object.",
        "",
        *(f"line {number} {none}" for number in (5, 6, 7)),
        "",
        "",
        *(f"line {number} {none}" for number in (10, 11)),
    ]


def test_a_pair_of_surrogates_is_a_character_and_half_of_one_is_none(tmp_path):
    (whole,) = lines(tmp_path / "r.jsonl", {"custom_id": "\U0001f600", **BODY})
    assert (whole.id, whole.error) == ("\U0001f600", "")
    (half,) = lines(tmp_path / "r.jsonl", {"custom_id": "\ud83d", **BODY})
    assert (half.id, half.error) == ("line-1", "line 1 holds half of a surrogate pair, which is no character.")


def test_a_file_is_utf_8_with_its_mark_or_without(tmp_path):
    text = (json.dumps(BODY) + "\n") * 3
    for encoding, reason in (("utf-8-sig", None), ("utf-16", "is not valid JSON"), ("utf-16-be", "is not valid JSON")):
        (tmp_path / "r.jsonl").write_bytes(text.encode(encoding))
        errors = [request.error for request in read_requests(tmp_path / "r.jsonl")]
        assert all(reason in error if reason else not error for error in errors) and len(errors) >= 3


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_costs_its_line(tmp_path, number):
    """Python reads it and cannot send it: the run ended with a trace."""
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**BODY, "temperature": 0.5}).replace("0.5", number) + "\n" + json.dumps(BODY))
    wrong, right = read_requests(path)
    assert (wrong.error, right.error) == (f"line 1 is not valid JSON: {number} is no finite number.", "")


def test_two_lines_of_one_id_are_named_by_their_numbers(tmp_path):
    rows = ("\n", {"custom_id": "a", **BODY}, {"custom_id": "b", **BODY}, {"custom_id": "a", "body": BODY})
    with pytest.raises(SettingsError) as caught:
        lines(tmp_path / "r.jsonl", *rows)
    assert str(caught.value) == f"{tmp_path}/r.jsonl: lines 3 and 5 have the same custom_id 'a'."
    with pytest.raises(SettingsError, match="lines 1 and 2 have the same custom_id 'line-2'"):
        lines(tmp_path / "r.jsonl", {"custom_id": "line-2", **BODY}, BODY)
    with pytest.raises(SettingsError, match="lines 1 and 2 have the same custom_id 'a'"):
        lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY}, {"custom_id": "a"})  # which is no request


@pytest.mark.parametrize(
    ("line", "path", "body"),
    [
        ({"custom_id": "a", "method": "POST", "url": CHAT, "body": {**BODY, "seed": 1}}, CHAT, {**BODY, "seed": 1}),
        ({"custom_id": "a", "method": "POST", "url": CHAT, **BODY, "seed": 2}, CHAT, {**BODY, "seed": 2}),
        ({"url": "/chat/completions", "body": BODY}, CHAT, BODY),  # Azure's
        ({"url": RESPONSES, "body": {**ASKED, "messages": []}}, RESPONSES, {**ASKED, "messages": []}),
        ({"url": "/responses", "body": ASKED}, RESPONSES, ASKED),
    ],
)
def test_a_request_is_the_wrapped_one_or_the_line_without_its_envelope(line, path, body):
    assert _request_of(line) == (path, body)


def test_a_file_without_requests_is_refused_by_its_name():
    good, bad = BatchRequest("a", "", 0, 1), BatchRequest("b", "", 0, 1, "line 1 is bad.")
    _refuse_no_requests("x.jsonl", [bad, good])
    for requests, message in (
        ([], "input=x.jsonl has no lines: give a JSON Lines file of requests."),
        (
            [bad, replace(bad, error="line 2 is worse.")],
            "input=x.jsonl holds no request among its 2 lines: line 1 is bad. Give a JSON Lines file of requests.",
        ),
    ):
        with pytest.raises(SettingsError) as caught:
            _refuse_no_requests("x.jsonl", requests)
        assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------- one request


class Api:
    """Answers with these statuses in turn; notes what is posted."""

    def __init__(self, *answers):
        self.answers, self.posted = list(answers), []

    async def post(self, path, json):
        self.posted.append((path, json))
        status, headers = self.answers.pop(0)
        return SimpleNamespace(status_code=status, headers=headers, json=lambda: {"n": len(self.posted)})


@pytest.fixture
def slept(monkeypatch):
    seconds = []

    async def sleep(wait):
        seconds.append(wait)

    monkeypatch.setattr(batch.asyncio, "sleep", sleep)
    return seconds


@pytest.mark.parametrize(
    ("answers", "found", "waits"),
    [
        ([(200, {})], (200, {"n": 1}), []),
        ([(400, {"retry-after": "9"})], (400, {"n": 1}), []),
        ([(500, {})], (500, {"n": 1}), []),
        ([(429, {"retry-after": "2"}), (503, {}), (200, {})], (200, {"n": 3}), [2.0, 1.0]),
        ([(503, {"retry-after": "5"})] * 6, (503, {"n": 5}), [5.0] * 4),
        ([(429, {})] * 4 + [(404, {})], (404, {"n": 5}), [1.0] * 4),
    ],
)
def test_a_busy_api_is_asked_five_times(slept, answers, found, waits):
    api = Api(*answers)
    assert asyncio.run(_post(api, CHAT, BODY)) == found and slept == waits
    assert api.posted == [(CHAT, BODY)] * found[1]["n"]


def answer(request, folder, path, api=None):
    api = api or Api((200, {}))
    files = RequestFiles(path, Location.parse(str(folder)))
    return asyncio.run(_answer(api, request, "tinygpt-v", files)), api


def test_an_answer_belongs_to_its_request(tmp_path):
    path = tmp_path / "r.jsonl"
    first, second = lines(path, {"custom_id": "a", **BODY, "stream": True}, {**BODY, "model": "other", "seed": 3})
    found, api = answer(first, tmp_path, path)
    assert found == {
        "id": f"batch_req_{first.digest[:24]}",
        "custom_id": "a",
        "request_sha256": first.digest,
        "response": {"status_code": 200, "request_id": first.digest[:24], "body": {"n": 1}},
        "error": None,
    }
    assert api.posted == [(CHAT, {"model": "tinygpt-v", **BODY, "stream": False})]
    found, api = answer(second, tmp_path, path, Api((404, {})))
    assert found["response"]["status_code"] == 404
    assert api.posted[0][1] == {**BODY, "model": "other", "seed": 3, "stream": False}


def test_a_line_for_responses_is_asked_there_with_its_image(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    image = {"type": "input_image", "detail": "low", "image_url": "a"}
    body = {"input": [{"role": "user", "content": [image]}], "seed": 4}
    (request,) = lines(tmp_path / "r.jsonl", {"url": RESPONSES, "body": body})
    sent = [{"role": "user", "content": [{**image, "image_url": "data:;base64,YQ=="}]}]
    _, api = answer(request, tmp_path, tmp_path / "r.jsonl")
    assert api.posted == [(RESPONSES, {"model": "tinygpt-v", "input": sent, "seed": 4, "stream": False})]


def test_a_line_that_is_none_and_a_missing_image_are_refused_without_the_api(tmp_path):
    path = tmp_path / "r.jsonl"
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "none.png"}]}
    bad, lost = lines(path, "{", {"messages": [image]})
    for request, message in (
        (bad, bad.error),
        (lost, f"{tmp_path}/none.png cannot be read: No such file or directory."),
    ):
        found, api = answer(request, tmp_path, path)
        fields = {"type": "invalid_request_error", "param": None, "code": "invalid_request"}
        assert found["response"]["body"] == {"error": {"message": message, **fields}} and not api.posted
        assert found["response"]["status_code"] == 400


# ------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("/bucket/a"), "s3://bucket/a.png cannot be read: No such file or directory."),
        (StorageError("s3://bucket refuses access."), "an image cannot be read: s3://bucket refuses access."),
    ],
)
def test_an_image_that_a_bucket_does_not_give_is_named(tmp_path, monkeypatch, error, message):
    def refuse(location):
        raise error

    path = tmp_path / "r.jsonl"
    (request,) = lines(path, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]})
    monkeypatch.setattr(batch.storage, "read_bytes", refuse)
    found = asyncio.run(_answer(Api(), request, "m", RequestFiles(path, Location.parse("s3://bucket"))))
    assert (found["response"]["status_code"], found["response"]["body"]["error"]["message"]) == (400, message)


def test_a_file_of_a_bucket_is_copied_and_its_copy_removed(tmp_path, monkeypatch):
    copied = []

    def download(source, target):
        copied.append((source.uri, target))
        target.write_text("x")

    monkeypatch.setattr(batch.storage, "download", download)
    with _local_file(Location.parse("s3://bucket/requests.jsonl")) as path:
        assert path.read_text() == "x" and path.name == "requests.jsonl"
    assert copied == [("s3://bucket/requests.jsonl", path)] and not path.parent.exists()
    with _local_file(Location.parse(str(tmp_path / "r"))) as path:
        assert path == tmp_path / "r"
    assert len(copied) == 1


# --------------------------------------------------------------------------------------------- files and settings


def test_answers_that_were_cut_off_are_taken_from_the_file_and_the_rest_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"custom_id": "a", "request_sha256": "d", "response": {"status_code": "200"}}
    path.write_text(json.dumps(row) + "\n")
    before = path.stat().st_mtime_ns
    assert finished_answers(path) == {("a", "d"): 200} and path.stat().st_mtime_ns == before
    path.write_text('{"custom')
    assert finished_answers(path) == {} and path.read_text() == ""


def test_the_api_of_a_batch_has_its_settings_and_a_queue_of_a_batch():
    given = BatchSettings(max_batch_size=5, max_tokens=9, artifact="a", input="i", max_images=2, temperature=0.5)
    made = _serve_settings(given, artifact="b")
    assert (made.artifact, made.max_queue) == ("b", 5)
    own = {name: value for name, value in given.model_dump().items() if name in AnswerSettings.model_fields}
    assert {name: getattr(made, name) for name in own} == {**own, "artifact": "b"}
    assert _serve_settings(given).artifact == "a" and made.max_per_client == 0 and made.api_keys == []


def test_the_model_is_loaded_from_the_folder_that_was_found(monkeypatch):
    monkeypatch.setattr(batch, "ModelBackend", lambda settings: settings.artifact)
    assert batch._load(BatchSettings(artifact="hf://a/b"), Path("/found")) == "/found"
