"""The staged units of a run, read back from their files."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from pipelines.data.ingest.checked_rows import IndexEntry
from pipelines.data.ingest.lists import Staging
from pipelines.data.ingest.staging import UnitRecord, _write_index
from pipelines.data.sources.base import Rejected


@pytest.fixture
def run(tmp_path) -> tuple[Staging, list[UnitRecord]]:
    """A run of two units in a folder that has the files of three."""
    records = []
    for number in range(3):
        rejected = [Rejected(f"{number}/{n}", f"{number}.tar", "bad") for n in range(number + 1)]
        record = UnitRecord("f", f"{number}.tar", f"{number}/", rows_in=9, rejected=rejected)
        record.missing = [("s3://b", f"{number}.jpg")] * (number + 1)
        (tmp_path / f"unit-{number:06d}.json").write_text(json.dumps(asdict(record)))
        entries = [IndexEntry(f"{number}/{n}", bytes(16), words=n) for n in range(number + 2)]
        _write_index(f"{tmp_path}/unit-{number:06d}.index.arrow", entries)
        records.append(record)
    return Staging(str(tmp_path), 2), records


def test_units_are_read_by_their_number(run):
    staging, records = run
    assert [staging.record(number) for number in range(2)] == records[:2]
    assert staging.index(1).select(["id", "words"]).to_pydict() == {"id": ["1/0", "1/1", "1/2"], "words": [0, 1, 2]}
    assert staging.index(0, ["words", "id"]).to_pydict() == {"words": [0, 1], "id": ["0/0", "0/1"]}
    with pytest.raises(AssertionError, match="unit 7 was reported as finished but has no record"):
        staging.record(7)


def test_all_units_together_and_none_of_another_run(run):
    staging, records = run
    assert list(staging.rejected()) == [*records[0].rejected, *records[1].rejected]
    assert staging.missing() == [("s3://b", "0.jpg"), ("s3://b", "1.jpg"), ("s3://b", "1.jpg")]
