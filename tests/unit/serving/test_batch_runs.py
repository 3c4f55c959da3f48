"""A run over a file of requests: what is loaded, written, counted, sent and refused."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.fingerprint import OtherInputsError
from pipelines.serving import batch
from pipelines.serving.batch import finished_answers, read_requests, run_batch
from pipelines.serving.clients import KEYS_VARIABLE
from pipelines.settings import BatchSettings, SettingsError
from pipelines.storage import DiskFullError
from tests.serving_api import FakeBackend

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return list(read_requests(path))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose model is found, loaded and asked as it is told; ``run.done`` notes what happens."""
    done = []
    monkeypatch.setattr(batch, "resolve_artifact", lambda settings: Path("/found", settings.artifact))
    monkeypatch.setattr(batch, "checkpoint_digest", lambda path: f"digest of {path}")
    monkeypatch.setattr(batch, "_load", lambda settings, artifact: done.append(("load", artifact)) or FakeBackend())

    def call(backend=None, **settings):
        options = {"artifact": "a", "input": str(tmp_path / "r.jsonl"), "output": str(tmp_path / "out"), "quiet": True}
        return run_batch(BatchSettings(**{**options, **settings}), backend)

    call.done = done
    return call


def test_a_run_says_what_became_of_its_requests(tmp_path, run):
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY}, "{", {"custom_id": "b", **BODY, "model": "other"})
    result = run()
    shown = {"requests": 3, "answered": 1, "failed": 2, "earlier": 0, "seconds": result.seconds}
    paths = {"answers": f"{tmp_path}/out/answers.jsonl", "result": f"{tmp_path}/out/result.json"}
    assert asdict(result) == {**shown, **paths} and 0 <= result.seconds < 60
    assert json.loads((tmp_path / "out/result.json").read_text()) == asdict(result)
    assert run.done == [("load", Path("/found/a"))]
    again = run()
    assert (again.earlier, again.answered, again.failed) == (2, 1, 2)
    assert len(run.done) == 2, "one was refused"
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY}, "", "{")
    assert run().earlier == 1, "its id is line-3 now"
    assert run().earlier == 2 and len(run.done) == 3, "no model is loaded where nothing is left to answer"
    given = FakeBackend()
    lines(tmp_path / "r.jsonl", {"custom_id": "c", **BODY})
    assert run(given).answered == 1 and len(given.jobs) == 1 and len(run.done) == 3


def test_keys_of_a_server_on_this_machine_are_no_bound_on_a_file(tmp_path, run, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, "a-key")
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    assert run().answered == 1


@pytest.mark.parametrize("named", ["context_length", "default_task", "kv_cache_dtype", "max_tokens", "temperature"])
def test_a_setting_that_changes_answers_is_told_from_that_of_the_output(tmp_path, run, named):
    others = {
        "context_length": 99, "default_task": "vqa", "kv_cache_dtype": "bfloat16", "max_tokens": 9, "temperature": 0.5,
    }  # fmt: skip
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    run()
    with pytest.raises(OtherInputsError, match=named):
        run(**{named: others[named]})


def test_an_output_is_of_one_model_and_one_set_of_settings(tmp_path, run, monkeypatch):
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    run()
    assert run(max_batch_size=3, model_name="tinygpt-v", request_timeout_s=5).earlier == 1, "they change no answer"
    monkeypatch.setattr(batch, "checkpoint_digest", lambda path: "another")
    with pytest.raises(OtherInputsError, match='artifact was "digest of /found/a", is now "another"'):
        run()
    assert run(overwrite=True).earlier == 0
    before = (tmp_path / "out/answers.jsonl").read_text()
    with pytest.raises(SettingsError, match=r"out/answers\.jsonl"):
        run(input=str(tmp_path / "out/answers.jsonl"), overwrite=True)
    assert (tmp_path / "out/answers.jsonl").read_text() == before, "it would be written over"
    for name in ("", str(tmp_path / "none")):
        with pytest.raises(SettingsError) as caught:
            run(input=name)
        assert str(caught.value) == f"input={name!r} is no file: give a JSON Lines file of requests."


def test_input_and_output_are_looked_at_before_a_model(tmp_path, run, monkeypatch):
    looked = []
    monkeypatch.setattr(batch.storage, "check_access", lambda place, **how: looked.append((Path(place.path).name, how)))
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    run()
    assert looked == [("r.jsonl", {}), ("out", {"writes": True})]


@pytest.mark.parametrize("quiet", [True, False])
def test_answers_are_written_and_counted_one_by_one(tmp_path, run, monkeypatch, quiet):
    shown = []

    class Bar:
        def __init__(self, title, quiet):
            shown.append((title, quiet))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            shown.append("end")

        def update(self, *given):
            shown.append((*given, (tmp_path / "out/answers.jsonl").read_text().count("\n")))

    monkeypatch.setattr(batch, "Bar", Bar)
    lines(tmp_path / "r.jsonl", {"custom_id": "\u00fc", **BODY}, "{", "5", {"custom_id": "d", **BODY})
    run(FakeBackend(), quiet=quiet, max_batch_size=1)
    assert shown[0] == ("answering", quiet) and shown[-1] == "end"
    assert [(done, total, written) for done, total, _, written in shown[1:-1]] == [(n, 4, n) for n in (1, 2, 3, 4)]
    notes = [note for _, _, note, _ in shown[1:-1]]
    assert notes[-1] == "2 failed" and set(notes) <= {"", "1 failed", "2 failed"}
    shown.clear()
    lines(tmp_path / "r.jsonl", *({"custom_id": name, **BODY} for name in "efg"))
    run(FakeBackend(), max_batch_size=1)
    assert [note for _, _, note, _ in shown[1:-1]] == ["", "", ""]
    assert '"custom_id": "\u00fc"' in (tmp_path / "out/answers.jsonl").read_text(), "letters as they are"


def test_a_full_disk_is_one_sentence(tmp_path, run):
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    run()
    (tmp_path / "out/answers.jsonl").unlink()
    (tmp_path / "out/answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"while writing .*/out/answers.jsonl: free some, and run the same command"):
        run()


def test_an_error_of_one_request_at_work_is_shown_as_itself(tmp_path, run, monkeypatch):
    async def broken(*given):
        raise PermissionError("not yours")

    monkeypatch.setattr(batch, "_answer", broken)
    lines(tmp_path / "r.jsonl", *({"custom_id": name, **BODY} for name in "abc"))
    with pytest.raises(PermissionError, match="not yours"):
        run()


def test_answers_in_a_bucket_are_brought_continued_and_sent_now_and_then(tmp_path, run, monkeypatch):
    done = []

    @contextmanager
    def poll(action, every_s):
        done.append(every_s)
        yield
        action()

    monkeypatch.setattr(batch, "poll", poll)
    monkeypatch.setattr(batch.storage.WorkFolder, "fetch", lambda self, *names: done.append(("fetch", *names)))
    monkeypatch.setattr(batch.storage.WorkFolder, "publish", lambda self, *names: done.append(("publish", *names)))
    lines(tmp_path / "r.jsonl", BODY)
    run()
    assert done == [("fetch", "answers.jsonl"), 30.0, ("publish", "answers.jsonl")]
    done.clear()
    run()
    assert done == [("fetch", "answers.jsonl")], "nothing is left to answer"


def test_so_many_requests_are_in_flight(tmp_path, run, monkeypatch):
    in_flight, most = [0], []

    async def answer(client, request, model, files):
        in_flight[0] += 1
        most.append(in_flight[0])
        await asyncio.sleep(0)
        in_flight[0] -= 1
        return {"custom_id": request.id, "request_sha256": request.digest, "response": {"status_code": 200}}

    monkeypatch.setattr(batch, "_answer", answer)
    for count, size, wanted in ((9, 2, 4), (3, 2, 3), (1, 5, 1)):
        most.clear()
        lines(tmp_path / "r.jsonl", *[{"custom_id": f"{count}-{n}", **BODY} for n in range(count)])
        assert run(max_batch_size=size).answered == count and max(most) == wanted


def test_a_bug_costs_its_request_alone(tmp_path, run):
    class Broken(FakeBackend):
        async def complete(self, job):
            if job.messages[0].text == "bad":
                raise RuntimeError("bug")
            return await super().complete(job)

    bad = {"messages": [{"role": "user", "content": "bad"}]}
    lines(tmp_path / "r.jsonl", {"custom_id": "a", **bad}, {"custom_id": "b", **BODY})
    result = run(Broken())
    assert (result.answered, result.failed) == (1, 1)
    assert finished_answers(tmp_path / "out/answers.jsonl").keys() == {
        (request.id, request.digest) for request in read_requests(tmp_path / "r.jsonl")
    }


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a\0b.png"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "\ud800.png"}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"custom_id": "\ud800", **BODY},
        {"messages": [{"role": "user", "content": "hi"}], "model": "\ud800"},
        {"messages": {"\ud800": 1}},
        '{"messages": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"messages": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=range(8),
)
def test_odd_characters_cost_their_request_alone(tmp_path, run, odd):
    requests = lines(tmp_path / "r.jsonl", odd, {"custom_id": "b", **BODY})
    result = run()
    done = finished_answers(tmp_path / "out/answers.jsonl")
    assert len(done) == 2 and done["b", requests[1].digest] == 200
    assert result.answered + result.failed == 2 and run().answered == result.answered


def test_an_empty_file_is_a_file_without_lines(tmp_path, run):
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(SettingsError, match="has no lines"):
        run()


def test_a_missing_model_is_told_before_the_output_is_claimed(tmp_path, run, monkeypatch):
    def missing(settings):
        raise ValueError("artifact 'a' is no checkpoint folder")

    lines(tmp_path / "r.jsonl", {"custom_id": "a", **BODY})
    monkeypatch.setattr(batch, "resolve_artifact", missing)
    with pytest.raises(SettingsError, match="artifact 'a' is no checkpoint folder"):
        run()
    assert not (tmp_path / "out/run.json").exists()
