"""Entries for a service that is away now and then: order, nothing lost, nothing sent twice."""

from __future__ import annotations

import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from pipelines.tracking import outbox
from pipelines.tracking.outbox import JOURNAL_FILE, Outbox, as_image


class Service:
    def __init__(self):
        self.up, self.calls = True, []

    def send(self, entries):
        if not self.up:
            raise ConnectionError("away")
        self.calls.append(entries)

    @property
    def entries(self):
        return [entry for call in self.calls for entry in call]


@pytest.fixture
def service():
    return Service()


def test_everything_arrives_in_order_and_metrics_travel_together(service):
    box = Outbox(service.send)
    for step in range(50):
        box.put("metrics", values={"a": 1.0, "b": 2.0}, step=step)
    box.put("tags", values={"x": "y"})
    box.put("metrics", values={"a": 1.0}, step=50)
    box.close()
    assert [entry.get("step", "tags") for entry in service.entries] == [*range(50), "tags", 50]
    assert len(service.calls) < 10


def test_the_values_of_a_step_stay_together(service, monkeypatch):
    monkeypatch.setattr(outbox, "MAX_BATCH_VALUES", 3)
    service.up = False
    box = Outbox(service.send)
    for step in range(4):
        box.put("metrics", values={"a": 1.0, "b": 2.0}, step=step)
    service.up = True
    box.close()
    assert [len(call) for call in service.calls] == [1, 1, 1, 1], "two steps have four numbers"


def test_what_waits_is_kept_on_disk_and_sent_by_the_next(service, tmp_path):
    service.up = False
    box = Outbox(service.send, tmp_path)
    box.put("metrics", values={"loss": float("nan")}, step=3)
    box.put("image", image=Image.new("RGB", (3, 2), (9, 8, 7)), key="picture", step=3)
    box.put("end", status="FINISHED")
    deadline = time.monotonic() + 60
    while not (tmp_path / JOURNAL_FILE).is_file():  # it does not wait for the end: a kill must lose nothing
        assert time.monotonic() < deadline
        time.sleep(0.01)
    box.close()
    for line in (tmp_path / JOURNAL_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # valid JSON has no NaN

    service.up = True
    Outbox(service.send, tmp_path).close()
    metrics, image = service.entries
    assert metrics["step"] == 3 and math.isnan(float(metrics["values"]["loss"]))
    picture = as_image(image["image"])
    assert (picture.size, picture.getpixel((0, 0))) == ((3, 2), (9, 8, 7))
    assert not list(tmp_path.iterdir()), "an end that was never sent does not end the run that continues"


def test_what_waits_for_a_slow_answer_is_kept_when_it_is_asked_for(tmp_path):
    """A training state is saved: whoever resumes there does the steps before it no more."""
    asked, answered = threading.Event(), threading.Event()
    box = Outbox(lambda entries: [asked.set(), answered.wait(60)], tmp_path)
    box.put("tags", values={"a": "b"})
    assert asked.wait(60)
    box.put("metrics", values={"loss": 1.5}, step=7)
    assert not (tmp_path / JOURNAL_FILE).exists()
    box.keep()
    lines = [json.loads(line) for line in (tmp_path / JOURNAL_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["tags", "metrics"], "the one under way has not arrived yet"
    answered.set()
    box.close()
    assert not list(tmp_path.iterdir())


def test_putting_never_waits(service):
    put, waited = threading.Event(), []
    box = Outbox(lambda entries: waited.append(put.wait(60)))
    for step in range(100):
        box.put("tags", values={}, step=step)
    put.set()
    box.close()
    assert waited and all(waited), "the service had not answered when all were put"


def test_a_damaged_journal_costs_its_damaged_line_only(service, tmp_path, caplog):
    entry = json.dumps({"kind": "tags", "values": {"a": "b"}})
    (tmp_path / JOURNAL_FILE).write_text("\n".join([entry, entry[:9], "3", "{}"]))
    Outbox(service.send, tmp_path).close()
    assert [entry["values"] for entry in service.entries] == [{"a": "b"}]
    assert caplog.messages == [f"{tmp_path}/unsent.jsonl has a damaged line, which is left out."] * 3


def test_a_reason_is_told_once_until_something_is_sent(caplog):
    answers = ["known", "away", "away", "", "away", "full", "full"]
    box = object.__new__(Outbox)
    box._told, box._journal, box._queue, box._lock = "known", None, [], threading.Lock()

    def send(entries):
        if answer := answers.pop(0):
            raise ConnectionError(answer)

    box._send = send
    for sent in (False, False, False, True, False, False, False):
        box._queue = [{"kind": "tags", "values": {}}]
        assert box._send_all() is sent
    reasons = [message.rpartition(": ")[2] for message in caplog.messages]
    assert reasons == ["away", "away", "full"]


def test_a_long_reason_is_cut_behind_its_password(caplog):
    def send(entries):
        raise ConnectionError("x" * 180 + " http://me:secret@host")

    box = Outbox(send)
    box.put("tags", values={})
    box.close()
    assert "http://***@" in caplog.text and "secret" not in caplog.text


def test_what_stays_unsent_is_told_at_the_end(service, tmp_path, caplog):
    service.up = False
    for journal in (tmp_path, None):
        box = Outbox(service.send, journal)
        box.put("tags", values={})
        box.close()
    assert f"1 entries for MLflow wait in {tmp_path / JOURNAL_FILE}" in caplog.text
    assert "1 entries for MLflow could not be sent" in caplog.text
    caplog.clear()
    (tmp_path / JOURNAL_FILE).unlink()
    for journal in (tmp_path, None):
        box = Outbox(service.send, journal)
        box.put("end", status="FINISHED")
        box.close()
    assert "entries for MLflow" not in caplog.text, "an end alone is nothing to send"


def test_pauses_double_while_the_service_is_away_and_begin_again(monkeypatch):
    answers, waited = [False, False, True, False] + [False] * 7, []
    box = object.__new__(Outbox)
    box._closing = False

    def wait(timeout):
        waited.append(timeout)
        box._closing = len(waited) == len(answers)

    box._wake = SimpleNamespace(wait=wait, clear=lambda: None)
    monkeypatch.setattr(box, "_send_all", lambda: answers[len(waited) - 1])
    box._send_loop()
    assert waited == [1, 2, 4, 1, 2, 4, 8, 16, 32, 60, 60]


def test_only_metrics_wait_for_company():
    box = object.__new__(Outbox)
    woken = []
    box._queue, box._lock, box._wake = [], threading.Lock(), SimpleNamespace(set=lambda: woken.append(len(box._queue)))
    for kind in ("metrics", "tags", "metrics", "end"):
        box.put(kind)
    assert woken == [2, 4] and [entry["kind"] for entry in box._queue] == ["metrics", "tags", "metrics", "end"]


def standing(tmp_path, send=None) -> Outbox:
    """An outbox without a thread."""
    box = object.__new__(Outbox)
    box._told = ""
    box._journal, box._queue, box._lock = tmp_path / JOURNAL_FILE, [], threading.Lock()
    box._journal_lock = threading.Lock()
    box._send, box._wake, box._closing = send, threading.Event(), False
    return box


def test_what_cannot_be_kept_costs_itself_and_never_the_job(tmp_path, caplog, monkeypatch):
    class Full:
        def save(self, stream, format):
            raise OSError("no space left")

    box = standing(tmp_path)
    box.put("image", image=Full(), key="a", step=1)
    box.put("table", rows=[{"a": object()}], name="odd")
    box.put("params", values={"a": math.nan})
    box.put("table", rows=[{"a": math.nan, "b": 1.5, "c": -math.inf}], name="scores")
    box._write_journal()
    (line,) = map(json.loads, (tmp_path / JOURNAL_FILE).read_text().splitlines())
    assert line == {"kind": "table", "rows": [{"a": None, "b": 1.5, "c": None}], "name": "scores"}
    assert "(image) cannot be kept: no space left" in caplog.text and "(table) cannot be kept: object is" in caplog.text
    assert "(params) cannot be kept: Out of range float" in caplog.text, "JSON has no NaN"

    for error in (OSError("no room"), outbox.storage.DiskFullError("a full disk")):

        def full(place, data, error=error):
            raise error

        monkeypatch.setattr(outbox.storage, "write_atomically", full)
        box._write_journal()
        assert f"what MLflow did not get cannot be kept: {error}" in caplog.text


def test_a_service_that_is_away_is_told_with_its_reason_and_what_waits(tmp_path, caplog):
    def away(entries):
        raise ConnectionError("no\n answer of http://me:secret@host " + "x" * 300)

    box = standing(tmp_path, away)
    for step in (1, 2):
        box.put("tags", values={}, step=step)
    assert box._send_all() is False and len(box._queue) == 2
    (message,) = caplog.messages
    assert message.startswith("2 entries wait for the tracking service: no answer of http://***@host xxx")
    assert len(message) < 260 and len((tmp_path / JOURNAL_FILE).read_text().splitlines()) == 2
    box._send = lambda entries: None
    assert box._send_all() is True and box._queue == []
    assert (tmp_path / JOURNAL_FILE).exists(), "the thread that sends removes no file that another one may be copying"
    box.keep()
    assert not (tmp_path / JOURNAL_FILE).exists()


def test_an_entry_without_values_travels_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "MAX_BATCH_VALUES", 4)
    box = standing(tmp_path)
    for kind, values in (("end", None), ("metrics", "abc"), ("metrics", "d"), ("metrics", "e"), ("tags", "a")):
        box.put(kind, **({"values": dict.fromkeys(values, 1.0)} if values else {}))
    sizes = []
    while box._queue:
        sizes.append(len(box._next_entries()))
        del box._queue[: sizes[-1]]
    assert sizes == [1, 2, 1, 1]


def test_closing_wakes_the_thread_and_waits_a_minute_for_it(tmp_path, monkeypatch):
    started = []

    def thread(**options):
        started.append(options)
        return SimpleNamespace(start=lambda: None, join=lambda timeout: started.append((timeout, box._wake.is_set())))

    monkeypatch.setattr(outbox.threading, "Thread", thread)
    box = Outbox(lambda entries: None, tmp_path)
    assert started[0]["daemon"] is True, "the process does not wait for it"
    box.close()
    assert started[1:] == [(60, True)] and box._closing
