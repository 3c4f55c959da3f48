"""A file of requests answered without a server: what a line may be, and that a killed run loses and repeats nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from pipelines.serving.backend import Failure
from pipelines.serving.batch import (
    ANSWERS,
    CHANGES_ANSWERS,
    finished_answers,
    read_requests,
    run_batch,
)
from pipelines.settings import AnswerSettings, BatchSettings, SettingsError
from tests.serving_api import READ, FakeBackend, decoders, said, words
from tests.serving_model import data_url, make_image, save_checkpoint


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def body(*content, **fields):
    return {"messages": [{"role": "user", "content": list(content)}], **fields}


class Files:
    def __init__(self, folder, artifact):
        self.input, self.output, self.artifact = folder / "requests.jsonl", folder / "out", artifact
        self.backend = FakeBackend()

    def write(self, *lines):
        self.input.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")

    def run(self, **settings):
        options = {"artifact": str(self.artifact), "input": str(self.input), "output": str(self.output), "quiet": True}
        return run_batch(BatchSettings(**{**options, **settings}), self.backend)

    def answers(self):
        rows = [json.loads(line) for line in (self.output / ANSWERS).read_text().splitlines()]
        return {row["custom_id"]: row["response"] for row in rows}


@pytest.fixture
def files(tmp_path, artifact, monkeypatch):
    monkeypatch.setattr("pipelines.serving.media.ImageDecoders", lambda _: decoders())
    return Files(tmp_path, artifact)


def test_requests_are_answered_in_openais_form(files):
    (files.input.parent / "a.png").write_bytes(make_image())
    image = {"type": "image_url", "image_url": {"url": data_url(make_image(1))}}
    files.write(
        {"custom_id": "wrapped", "method": "POST", "url": "/v1/chat/completions", "body": body(words("hi"), image)},
        {"custom_id": "path", "body": body(words("it"), {"type": "image_url", "image_url": "a.png"}, task="refer")},
        body(words("bare"), stream=True),
        {"custom_id": "responses", "method": "POST", "url": "/v1/responses", "body": {"input": "hi", "store": True}},
    )
    result = files.run()
    assert (result.requests, result.answered, result.failed) == (4, 4, 0)
    assert set(files.answers()) == {"wrapped", "path", "line-3", "responses"}
    answer = files.answers()["responses"]["body"]
    assert (answer["object"], answer["output"][0]["content"][0]["text"]) == ("response", "fine")
    answer = files.answers()["path"]
    assert answer["status_code"] == 200 and answer["body"]["choices"][0]["message"]["content"] == "fine"
    texts = {job.messages[-1].text: job for job in files.backend.jobs}
    assert texts["[refer] give me the location of it"].messages[0].images[0].width == 60
    assert json.loads((files.output / "result.json").read_text())["answered"] == 4


def test_wrong_lines_are_answered_with_their_error_and_stop_nothing(files):
    files.write(
        "{",
        "[1]",
        {"custom_id": "no request", "body": {"prompt": "x"}},
        {"custom_id": "other url", "url": "/v1/embeddings", "body": body(words("x"))},
        {"custom_id": "no file", "body": body({"type": "image_url", "image_url": {"url": "missing.png"}})},
        {"custom_id": "no messages", "body": {"messages": "x"}},
        {"custom_id": "other model", "body": body(words("x"), model="gpt-4o")},
        {"custom_id": "remote", "body": body({"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}})},
        {"custom_id": "good", "body": body(words("hi"))},
    )
    result = files.run()
    assert (result.answered, result.failed) == (1, 8)
    answers = files.answers()
    assert {"line-1", "line-2", "no request", "other url"} < set(answers)
    assert "line 1 is not valid JSON" in answers["line-1"]["body"]["error"]["message"]
    assert "missing.png cannot be read" in answers["no file"]["body"]["error"]["message"]
    assert answers["other model"]["status_code"] == 404
    assert all(answer["status_code"] < 500 for answer in answers.values())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"requests\.jsonl has no lines: give a JSON Lines file of requests"),
        (["{", "[1]"], r"holds no request among its 2 lines: line 1 is not valid JSON"),
        ([{"image": "a.jpg", "question": "x?"}], r"among its 1 lines: line 1 is no request for /v1/chat/completions"),
    ],
)
def test_a_file_without_any_request_is_refused(files, lines, message):
    files.write(*lines)
    with pytest.raises(SettingsError, match=message):
        files.run()
    assert not (files.output / ANSWERS).exists()


def test_a_killed_run_continues(files):
    requests = [{"custom_id": str(i), "body": body(words(f"question {i}"))} for i in range(6)]
    files.write(*requests[:3])
    files.run()
    path = files.output / ANSWERS
    path.write_text(path.read_text() + '{"custom_id": "3", "resp')  # killed while it wrote
    files.write(*requests)  # and three more requests
    files.backend.jobs.clear()
    result = files.run()
    assert sorted(job.messages[0].text for job in files.backend.jobs) == [f"question {i}" for i in (3, 4, 5)]
    assert (result.answered, result.earlier) == (6, 3)
    assert len(path.read_text().splitlines()) == 6
    files.backend.jobs.clear()
    assert files.run().answered == 6 and not files.backend.jobs, "nothing is left to do"


@pytest.mark.parametrize("damage", [b"\0" * 400, b"\xff\xfe", b'{"custom_id": "1", "resp', b"{}", b"[]", b""])
def test_damaged_answers_are_asked_again(files, caplog, damage):
    """A disk that was full, or a machine that lost power: the lines before and behind stay."""
    files.write(*({"custom_id": str(i), "body": body(words(f"question {i}"))} for i in range(3)))
    files.run()
    path = files.output / ANSWERS
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n" + last)
    files.backend.jobs.clear()
    result = files.run()
    assert len(files.backend.jobs) == 1 and (result.answered, result.earlier) == (3, 2)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    assert "answers.jsonl: 1 damaged lines are removed" in caplog.text


def test_a_changed_request_is_asked_again(files):
    files.write({"custom_id": "a", "body": body(words("one"))})
    files.run()
    files.write({"custom_id": "a", "body": body(words("two"))})
    files.run()
    assert [job.messages[0].text for job in files.backend.jobs] == ["one", "two"]


def test_failures_of_the_model_are_tried_again_by_the_next_run(files):
    files.write({"custom_id": "a", "body": body(words("hi"))})
    files.backend.items = (Failure("out of memory"),)
    assert files.run().failed == 1 and files.answers()["a"]["status_code"] == 500
    files.backend.items = (READ, said("now", "stop"))
    assert files.run().answered == 1 and files.answers()["a"]["status_code"] == 200


def test_what_was_refused_is_asked_again_and_a_line_that_is_no_request_is_not(files):
    """The image may be there by now, and a bound may be wider."""
    image = {"type": "image_url", "image_url": "late.png"}
    files.write({"custom_id": "late", "body": body(image)}, "{", {"custom_id": "long", "body": body(words("x"), image)})
    assert files.run().failed == 3 and not files.backend.jobs
    (files.input.parent / "late.png").write_bytes(make_image())
    result = files.run(max_images=0)
    assert (result.answered, result.earlier) == (0, 1)
    result = files.run()
    assert (result.answered, result.failed, result.earlier) == (2, 1, 1) and len(files.backend.jobs) == 2
    assert files.run().earlier == 3 and len(files.backend.jobs) == 2


def test_the_last_answer_to_a_request_counts(tmp_path):
    path = tmp_path / ANSWERS
    rows = [("a", "x", 500), ("b", "x", 404), ("a", "x", 200), ("a", "y", 400)]
    lines = [{"custom_id": i, "request_sha256": d, "response": {"status_code": s}} for i, d, s in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"custom_id"')
    assert finished_answers(path) == {("a", "x"): 200, ("b", "x"): 404, ("a", "y"): 400}
    assert len(path.read_text().splitlines()) == len(rows)


def test_earlier_answers_are_those_of_this_file(files):
    files.write(*[{"custom_id": str(i), "body": body(words(str(i)))} for i in range(3)])
    files.run()
    files.write(*[{"custom_id": str(i), "body": body(words(str(i)))} for i in (2, 3)])
    result = files.run()
    assert (result.requests, result.answered, result.failed, result.earlier) == (2, 2, 0, 1)


def test_a_request_is_found_by_the_bytes_of_its_line(tmp_path):
    path = tmp_path / "requests.jsonl"
    lines = [
        b'{"messages": []}\n',
        b"\n",
        b"  \r\n",
        '{"custom_id": "\u00fc", "messages": []}\r\n'.encode(),
        b'{"messages": 1}',
    ]
    path.write_bytes(b"".join(lines))
    found = list(read_requests(path))
    assert [request.id for request in found] == ["line-1", "\u00fc", "line-5"]
    data = path.read_bytes()
    for request, line in zip(found, (lines[0], lines[3], lines[4]), strict=True):
        assert data[request.start : request.start + request.size] == line
        assert request.digest == hashlib.sha256(line.strip()).hexdigest(), "the end of the line does not matter"


def test_a_busy_server_is_waited_for(files, monkeypatch):
    waits = []
    monkeypatch.setattr("pipelines.serving.batch.asyncio.sleep", lambda seconds: waits.append(seconds) or _nothing())
    files.write({"custom_id": "a", "body": body(words("hi"))})

    class Busy(FakeBackend):
        async def complete(self, job):
            self.jobs.append(job)
            return [Failure("busy", "unavailable")] if len(self.jobs) < 3 else [READ, said("fine", "stop")]

    files.backend = Busy()
    assert files.run().answered == 1 and len(files.backend.jobs) == 3
    assert waits == [5.0, 5.0], "as Retry-After says"


async def _nothing():
    pass


def test_answers_of_other_settings_are_refused(files):
    files.write({"custom_id": "a", "body": body(words("hi"))})
    files.run()
    with pytest.raises(SettingsError, match="max_tokens was 256, is now 5"):
        files.run(max_tokens=5)
    assert files.run(max_tokens=5, overwrite=True).answered == 1
    others = {"temperature": 0.5, "context_length": 99, "default_task": "vqa", "kv_cache_dtype": "bfloat16"}
    for name, value in others.items():
        with pytest.raises(SettingsError, match=f"{name} was "):
            files.run(**{"max_tokens": 5, name: value})
    assert set(CHANGES_ANSWERS) == {*others, "max_tokens"} <= set(AnswerSettings.model_fields)


def test_a_missing_input_and_equal_ids_are_one_sentence(files):
    with pytest.raises(SettingsError, match="is no file"):
        files.run()
    files.write({"custom_id": "a", "body": body(words("x"))}, {"custom_id": "a", "body": body(words("y"))})
    with pytest.raises(SettingsError, match="lines 1 and 2 have the same custom_id 'a'"):
        list(read_requests(files.input))


def test_no_answers_yet(tmp_path):
    assert finished_answers(tmp_path / "nothing") == {}


def test_there_is_an_end_to_requests_in_flight(files):
    in_flight, most = [0], [0]

    class Counting(FakeBackend):
        async def complete(self, job):
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
            await asyncio.sleep(0.001)
            in_flight[0] -= 1
            return [READ, said("fine", "stop")]

    files.backend = Counting()
    files.write(*[{"custom_id": str(i), "body": body(words(str(i)))} for i in range(200)])
    assert files.run(max_batch_size=2).answered == 200
    assert most[0] == 4, "twice a batch"
