"""Entries for a service that is away now and then: order, nothing lost, nothing sent twice."""

from __future__ import annotations

import time

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


def test_a_steps_numbers_stay_together(service, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_NUMBERS", 3)
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

    service.up = True
    Outbox(service.send, tmp_path).close()
    metrics, image = service.entries
    assert metrics["step"] == 3 and str(metrics["values"]["loss"]) == "nan"
    assert Image.open(image["image"]["png"]).getpixel((0, 0)) == (9, 8, 7)
    assert not (tmp_path / JOURNAL_FILE).exists(), "an end that was never sent does not end the run that goes on"


def test_putting_never_waits(service):
    def slow(entries):
        time.sleep(0.5)

    box = Outbox(slow)
    began = time.monotonic()
    for step in range(100):
        box.put("tags", values={}, step=step)
    assert time.monotonic() - began < 0.4
