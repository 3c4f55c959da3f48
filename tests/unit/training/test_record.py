"""metrics.jsonl: what is written comes back, and a resumed run repeats no step."""

from __future__ import annotations

import errno
import json
import math

import pytest

from pipelines.storage import DiskFullError
from pipelines.training.record import StepRecord, number, parse_entry, read_record


def entry(step, loss=2.0, **fields):
    known = {"step": step, "loss": loss, "loss_hex": float(loss).hex(), "lr": 1e-3, "grad_norm": 0.5, "skipped": False}
    return {**known, "sample_ids": ["a/1"], **fields}


def write(path, *entries, next_step=0):
    record = StepRecord(path, next_step)
    for each in entries:
        record.write(each)
    record.close()
    return record


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "new/run/metrics.jsonl"
    entries = [entry(0, 3.0, part_norms={"lora": 0.25}), entry(1, 2.5)]
    record = write(path, *entries)
    assert read_record(path) == entries
    assert (record.first_loss, record.last_loss) == (3.0, 2.5)


def test_an_empty_record_has_no_losses(tmp_path):
    record = write(tmp_path / "metrics.jsonl")
    assert math.isnan(record.first_loss) and math.isnan(record.last_loss)
    assert read_record(tmp_path / "nothing") == []


def test_steps_that_will_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(entry(step, 9.0 - step) for step in range(5)))
    record = write(path, entry(3, 1.0), next_step=3)
    assert [(e["step"], e["loss"]) for e in read_record(path)] == [(0, 9.0), (1, 8.0), (2, 7.0), (3, 1.0)]
    assert (record.first_loss, record.last_loss) == (9.0, 1.0)
    shorter = StepRecord(path, 3)
    assert (shorter.first_loss, shorter.last_loss) == (9.0, 7.0)


@pytest.mark.parametrize("half", ['{"step": 2, "lo', "7", '"step"', "[]"])
def test_half_a_line_of_a_kill_ends_the_record(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    write(path, entry(0), entry(1))
    with path.open("a") as file:
        file.write(half + "\n" + json.dumps(entry(2)) + "\n")
    assert [e["step"] for e in read_record(path)] == [0, 1], "as a driver reads it before the run resumes"
    write(path, next_step=9)
    assert [e["step"] for e in read_record(path)] == [0, 1]


def test_damaged_bytes_end_the_record_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, entry(0))
    with path.open("ab") as file:
        file.write(b'{"step": 1, "\xff\xfe')
    assert [e["step"] for e in read_record(path)] == [0]
    write(path, entry(1), next_step=9)
    assert [e["step"] for e in read_record(path)] == [0, 1]


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, entry(0, math.nan, grad_norm=math.inf, part_norms={"lora": -math.inf, "projector": 1.0}))
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is line["grad_norm"] is line["part_norms"]["lora"] is None
    (found,) = read_record(path)
    assert all(math.isnan(value) for value in (found["loss"], found["grad_norm"], found["part_norms"]["lora"]))
    assert found["part_norms"]["projector"] == 1.0 and found["loss_hex"] == "nan"


def test_earlier_versions_wrote_words():
    assert number("inf") == math.inf and number("-2.5") == -2.5 and math.isnan(number(None)) and number(3) == 3.0
    with pytest.raises(ValueError, match="is no JSON object"):
        parse_entry("[1]")


def test_a_full_disk_names_the_record(tmp_path, monkeypatch):
    record = StepRecord(tmp_path / "metrics.jsonl", 0)

    class Full:
        def refuse(self, *words):
            raise OSError(errno.ENOSPC, "No space left on device")

        write = flush = close = refuse

    monkeypatch.setattr(record, "_stream", Full())
    for act in (lambda: record.write(entry(0)), record.flush, record.close):
        with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
            act()


def test_lines_reach_the_file_when_they_are_flushed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = StepRecord(path, 0)
    record.write(entry(0))
    record.flush()
    assert len(read_record(path)) == 1
    record.close()
