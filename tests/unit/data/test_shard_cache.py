"""The cache of remote shards: what leaves to make room, what is never touched, what is believed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.data.shard_cache import ShardCache


@pytest.fixture
def copies(tmp_path):
    """Three copies of ten bytes, ``b`` used longest ago, and files that are none."""
    for name, used in (("a.arrow", 200), ("b.arrow", 100), ("c.npy", 300)):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (used, used))
    for name in ("ab.lock", "x.tmp"):
        (tmp_path / name).write_bytes(b"0" * 50)
        os.utime(tmp_path / name, (1, 1))
    return tmp_path


@pytest.mark.parametrize(
    ("max_bytes", "needed", "kept"),
    [(40, 10, "abc"), (39, 10, "ac"), (30, 10, "ac"), (29, 10, "c"), (10, 10, ""), (5, 10, ""), (30, 0, "abc")],
)
def test_no_more_leaves_than_makes_room(copies, max_bytes, needed, kept):
    ShardCache(copies, max_bytes)._make_room(needed)
    assert sorted(path.stem for path in copies.iterdir() if path.suffix in (".arrow", ".npy")) == list(kept)
    assert {path.name for path in copies.iterdir()} >= {"ab.lock", "x.tmp"}, "another process is using them"


def test_a_copy_that_grew_is_read_again(tmp_path):
    data = b"shard"
    name = hashlib.sha256(data).hexdigest()
    place = f"memory://cached/{tmp_path.name}.arrow"
    storage.write_atomically(place, data)
    cache = ShardCache(tmp_path / "cache")
    location = storage.Location.parse(place)
    copy = cache.fetch(location, name)
    assert (copy.name, copy.read_bytes()) == (f"{name}.arrow", data)
    with copy.open("ab") as file:
        file.write(b"!")
    assert cache.fetch(location, name).read_bytes() == data
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".arrow", ".lock"]


def test_a_copy_that_another_process_removes_meanwhile_is_no_trouble(copies, monkeypatch):
    there = sorted(copies.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "gone.arrow", *there]))
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    ShardCache(copies, 20)._make_room(0)
    monkeypatch.undo()
    assert sorted(path.stem for path in copies.iterdir() if path.suffix in (".arrow", ".npy")) == ["a", "c"]
