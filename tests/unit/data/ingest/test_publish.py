"""Rows that stay are copied from a staged file, whichever of its record batches they are in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.ingest.publish import Piece, ShardPlan, _fits, _is_small, write_shard
from pipelines.data.shard_format import SCHEMA, ShardInfo, record_batch
from pipelines.settings import PrepareDataSettings
from tinygptv.data.sample import SampleRow, Turn


def rows(numbers):
    return [SampleRow(f"row {n}", "x", "text", (Turn("q", (f"a {n}",)),)) for n in numbers]


@pytest.fixture
def staged(tmp_path):
    """Three batches of three rows."""
    path = tmp_path / "unit.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as file:
        for start in (0, 3, 6):
            file.write_batch(record_batch(rows(range(start, start + 3))))
    return str(path)


@pytest.mark.parametrize("stay", [[0, 3, 6], [2, 5, 8], [2, 3], [6, 7, 8], [4], list(range(9))])
def test_rows_that_stay_are_those_of_their_batch(staged, tmp_path, stay):
    plan = ShardPlan(str(tmp_path / "part.arrow"), (Piece(staged, ShardInfo("unit.arrow", 9, 1, ""), np.array(stay)),))
    assert write_shard(plan).rows == len(stay)
    with pa.memory_map(str(tmp_path / "part.arrow")) as file:
        assert pa.ipc.open_file(file).read_all()["id"].to_pylist() == [f"row {n}" for n in stay]


def test_pieces_follow_one_another(staged, tmp_path):
    info = ShardInfo("unit.arrow", 9, 1, "")
    pieces = (Piece(staged, info, np.array([8])), Piece(staged, info, None), Piece(staged, info, np.array([0, 1])))
    assert write_shard(ShardPlan(str(tmp_path / "part.arrow"), pieces)).rows == 12
    with pa.memory_map(str(tmp_path / "part.arrow")) as file:
        found = pa.ipc.open_file(file).read_all()["id"].to_pylist()
    assert found == [f"row {n}" for n in (8, *range(9), 0, 1)]


def test_a_staged_file_that_loses_no_row_becomes_a_shard_under_a_second_name(staged, tmp_path):
    info = ShardInfo("unit.arrow", 9, 77, "its hash", {"words": {"least": 1, "mean": 2, "most": 3}})
    found = write_shard(ShardPlan(str(tmp_path / "part-00004.arrow"), (Piece(staged, info, None),)))
    assert found == replace(info, file="part-00004.arrow")
    assert (tmp_path / "part-00004.arrow").samefile(staged), "no byte is copied"


def test_a_shard_that_cannot_be_written_to_its_end_leaves_nothing(staged, tmp_path):
    pieces = (Piece(staged, ShardInfo("unit.arrow", 9, 1, ""), np.array([8])), Piece(f"{staged}.gone", None, None))
    with pytest.raises(FileNotFoundError):
        write_shard(ShardPlan(str(tmp_path / "part.arrow"), pieces))
    assert [path.name for path in tmp_path.iterdir()] == ["unit.arrow"]


@pytest.mark.parametrize(
    ("rows", "num_bytes", "fits"),
    [((5, 4), (10, 10), True), ((5, 5), (10, 10), False), ((1, 1), (2**19, 2**19), True), ((1, 1), (2**20, 1), False)],
)
def test_a_shard_is_filled_up_to_its_bounds_exactly(rows, num_bytes, fits):
    pieces = [Piece("x", ShardInfo("x", r, b, ""), None) for r, b in zip(rows, num_bytes, strict=True)]
    assert _fits(pieces[:1], pieces[1], PrepareDataSettings(shard_rows=9, shard_mb=1)) is fits


def test_a_piece_counts_the_rows_that_stay():
    info = ShardInfo("x", 10, 1000, "")
    pieces = Piece("x", info, None), Piece("x", info, np.array([3, 4])), Piece("x", ShardInfo("x", 0, 50, ""), None)
    assert [(piece.num_rows, piece.num_bytes) for piece in pieces] == [(10, 1000), (2, 200), (0, 0)]


@pytest.mark.parametrize(
    ("rows", "num_bytes", "small"), [(9, 1, True), (10, 1, False), (1, 2**16 - 1, True), (1, 2**16, False)]
)
def test_a_file_below_a_sixteenth_of_the_bounds_is_gathered(rows, num_bytes, small):
    piece = Piece("x", ShardInfo("x", rows, num_bytes, ""), None)
    assert _is_small(piece, PrepareDataSettings(shard_rows=160, shard_mb=1)) is small
