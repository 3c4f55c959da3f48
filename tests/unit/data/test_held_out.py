"""Which rows are held out: by their image's ends and length, whichever shard and record batch they are in."""

from __future__ import annotations

import numpy as np

from pipelines.data import held_out
from pipelines.data.held_out import hold_out, kept_counts, kept_row, row_hashes
from pipelines.data.shards import ShardSet
from pipelines.miniature.tiny_training import write_shard_set
from tinygptv.data.sample import SampleRow, Turn


def rows_of(images):
    return [SampleRow(f"r{n}", "x", "pair", (Turn("", ("a",)),), image) for n, image in enumerate(images)]


def shard_set(folder, images, rows_per_shard=8):
    return ShardSet.open(str(write_shard_set(folder, rows_of(images), rows_per_shard)))


def test_an_image_is_known_by_both_ends_and_its_length(tmp_path):
    head, tail = b"h" * 2048, b"t" * 2048
    images = [
        head + tail,
        head + b"x" * 9 + tail,
        head + b"y" * 9 + tail,
        b"g" + head[1:] + tail,
        head + tail[1:] + b"u",
    ]
    hashes = row_hashes(shard_set(tmp_path / "a", [*images, None, None])).tolist()
    assert hashes[1] == hashes[2], "the middle is not read"
    assert len(set(hashes)) == len(hashes) - 1, "length, head, tail; rows without an image by their ids"
    assert all(0 <= value < 1 for value in hashes)


def test_hashes_of_some_rows_are_theirs_in_any_shard_and_batch(tmp_path, monkeypatch):
    images = [bytes([n]) * 9 for n in range(150)]
    whole = row_hashes(shard_set(tmp_path / "whole", images, rows_per_shard=150))
    shards = shard_set(tmp_path / "cut", images, rows_per_shard=70)
    assert np.array_equal(row_hashes(shards), whole)
    for rows in ([0, 63, 64, 69, 70, 149], [133], []):
        assert np.array_equal(row_hashes(shards, np.array(rows, dtype=np.int64)), whole[rows])
    assert hold_out({"a": shards}, 0.3)["a"].tolist() == [n for n in range(150) if whole[n] < 0.3]
    monkeypatch.setattr(held_out, "row_hashes", lambda shards: np.array([0.0, 0.5, 0.49]))
    assert hold_out({"a": shards}, 0.5)["a"].tolist() == [0, 2], "below the fraction"


def test_a_row_is_held_out_or_not_in_every_version(tmp_path):
    """Another hash would train on what was evaluated before."""
    images = [b"image", None, b"h" * 2048 + b"m" * 9 + b"t" * 2048]
    found = row_hashes(shard_set(tmp_path / "a", images))
    assert found.tolist() == [0.6844648049004679, 0.19039019081950978, 0.44485220832114647]


def test_kept_rows_are_counted_at_the_borders_of_shards():
    held = np.array([2, 3, 5, 6])
    assert kept_counts((3, 3, 1, 2), held) == (2, 1, 0, 2)
    assert [kept_row(held, index) for index in range(5)] == [0, 1, 4, 7, 8]
    assert kept_counts((3, 3), np.zeros(0, dtype=np.int64)) == (3, 3)


class Rows:
    """Held-out rows that count how many of them are looked at."""

    def __init__(self, held):
        self.held, self.looked_at = held, 0

    def __len__(self):
        return len(self.held)

    def __getitem__(self, place):
        self.looked_at += 1
        return self.held[place]


def test_a_row_is_found_without_looking_at_all_that_are_held_out():
    held = Rows(range(0, 2_000_000, 2))
    assert [kept_row(held, index) for index in (0, 1, 999_999)] == [1, 3, 1_999_999]
    assert held.looked_at < 100
