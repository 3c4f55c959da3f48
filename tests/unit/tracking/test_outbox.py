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
from pipelines.tracking.outbox import JOURNAL_FILE, Outbox


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
    box.put("image", image=Image.new("RGB", (2, 2), (9, 8, 7)), key="picture", step=3)
    box.put("end", status="FINISHED")
    deadline = time.monotonic() + 20
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
    assert Image.open(image["image"]["png"]).getpixel((0, 0)) == (9, 8, 7)
    assert not (tmp_path / JOURNAL_FILE).exists(), "an end that was never sent does not end the run that continues"


def test_putting_never_waits(service):
    def slow(entries):
        time.sleep(0.5)

    box = Outbox(slow)
    began = time.monotonic()
    for step in range(100):
        box.put("tags", values={}, step=step)
    assert time.monotonic() - began < 0.4


def test_a_damaged_journal_costs_its_damaged_line_only(service, tmp_path, caplog):
    entry = json.dumps({"kind": "tags", "values": {"a": "b"}})
    (tmp_path / JOURNAL_FILE).write_text(entry + "\n" + entry[:9])
    Outbox(service.send, tmp_path).close()
    assert [entry["values"] for entry in service.entries] == [{"a": "b"}] and "damaged line" in caplog.text


def test_what_stays_unsent_is_told_at_the_end(service, tmp_path, caplog):
    service.up = False
    for journal in (tmp_path, None):
        box = Outbox(service.send, journal)
        box.put("tags", values={})
        box.close()
    assert f"1 entries for MLflow wait in {tmp_path / JOURNAL_FILE}" in caplog.text
    assert "1 entries for MLflow could not be sent" in caplog.text
    caplog.clear()
    box = Outbox(service.send)
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
