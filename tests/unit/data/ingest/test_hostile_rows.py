"""One row never ends an ingest: whatever is in it, it is set apart with a reason, and the others are kept."""

from __future__ import annotations

import json

import pytest

from pipelines.data.ingest import checked_rows
from pipelines.data.ingest.job import UnreadableError, ingest
from pipelines.data.shards import ShardSet
from pipelines.settings import PrepareDataSettings
from pipelines.storage import DiskFullError
from tests.source_files import jpeg

pytestmark = pytest.mark.security

GOOD = '{"image": "0.jpg", "question": "what?", "answer": "good"}'
HOSTILE = {
    "depth": '{"image": "0.jpg", "question": ' + "[" * 50_000 + "]" * 50_000 + ', "answer": "x"}',
    "huge corner": '{"image": "0.jpg", "task": "refer", "turns": [{"question": "", "answers": ["x"]}], "boxes": '
    + f"[[0, 0, {10**400}, 9]]}}",
    "half a character in a name": '{"image": "\\ud800.jpg", "question": "q", "answer": "a"}',
    "half a character in a text": '{"image": "0.jpg", "question": "\\udfff", "answer": "a"}',
    "zero byte in a name": '{"image": "0\\u0000.jpg", "question": "q", "answer": "a"}',
    "endless name": '{"image": "' + "x/" * 100_000 + '", "question": "q", "answer": "a"}',
    "a name that climbs out": '{"image": "../../../../etc/passwd", "question": "q", "answer": "a"}',
    "an absolute name": '{"image": "/etc/passwd", "question": "q", "answer": "a"}',
    "a name with options": '{"image": "0.jpg?endpoint_override=127.0.0.1&scheme=http", "question": "q", "answer": "a"}',
    "another type": '{"image": {"bytes": [1, 2]}, "question": 7, "answer": null}',
    "no object": "[[[]]]",
    "many digits": '{"image": "0.jpg", "question": "q", "answer": ' + "7" * 10_000 + "}",
    "image that is text": '{"image": "own.jsonl", "question": "q", "answer": "a"}',
    "endless data url": '{"image": "data:image/png;base64,' + "A" * 300_000 + '", "question": "q", "answer": "a"}',
}


def settings(folder, **changes):
    known = {"source": "jsonl", "input": str(folder / "own.jsonl"), "output": str(folder / "out"), "quiet": True}
    return PrepareDataSettings(**known, num_workers=0, tracking_uri="none", **changes)


def write(folder, *rows):
    (folder / "0.jpg").write_bytes(jpeg(0))
    (folder / "own.jsonl").write_text("\n".join([GOOD, *rows, GOOD.replace("good", "last")]) + "\n")


def quarantine(folder):
    return [json.loads(line) for line in (folder / "out/quarantine.jsonl").read_text().splitlines()]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_costs_itself_alone(tmp_path, name):
    write(tmp_path, HOSTILE[name])
    result = ingest(settings(tmp_path))
    assert (result["rows_in"], result["rows_out"], result["quarantined"]) == (3, 2, 1)
    (found,) = quarantine(tmp_path)
    assert found["key"] == "line 2" and 0 < len(found["reason"]) <= 320
    assert [row.turns[0].answers[0] for row in ShardSet.open(result["output"])] == ["good", "last"]


def test_all_of_them_together(tmp_path):
    write(tmp_path, *HOSTILE.values())
    result = ingest(settings(tmp_path))
    assert (result["rows_in"], result["rows_out"], result["quarantined"]) == (2 + len(HOSTILE), 2, len(HOSTILE))
    assert [found["key"] for found in quarantine(tmp_path)] == [f"line {n}" for n in range(2, 2 + len(HOSTILE))]


@pytest.mark.parametrize("error", [ZeroDivisionError, RecursionError, AssertionError, OverflowError, StopIteration])
def test_an_error_that_nobody_thought_of_costs_its_row(tmp_path, monkeypatch, error):
    write(tmp_path, GOOD.replace("good", "bad"))
    check = checked_rows.check_row

    def broken(row, **options):
        if row.turns[0].answers[0] == "bad":
            raise error("of a library")
        return check(row, **options)

    monkeypatch.setattr(checked_rows, "check_row", broken)
    assert ingest(settings(tmp_path))["rows_out"] == 2
    assert f"{error.__name__} of a library" in quarantine(tmp_path)[0]["reason"]


@pytest.mark.parametrize(
    ("error", "told"),
    [(MemoryError(), MemoryError), (DiskFullError("full"), DiskFullError), (OSError(5, "I/O error"), UnreadableError)],
)
def test_what_is_not_the_rows_fault_ends_the_ingest_and_keeps_what_is_done(tmp_path, monkeypatch, error, told):
    write(tmp_path)

    def broken(row, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checked_rows, "check_row", broken)
        with pytest.raises(told):
            ingest(settings(tmp_path))
    assert not (tmp_path / "out/manifest.json").exists()
    assert ingest(settings(tmp_path))["rows_out"] == 2
