"""The cache of remote shards: what leaves to make room, what is never touched, what is believed."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipelines import storage
from pipelines.data import shard_cache
from pipelines.data.shard_cache import ShardCache


@pytest.fixture
def copies(tmp_path):
    """Three copies of ten bytes, ``b`` used longest ago, and files that are none."""
    for name, used in (("a.arrow", 200), ("b.arrow", 100), ("c.npy", 300)):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (used, used))
    for name in ("ab.lock", "x.tmp", "dead.tmp"):
        (tmp_path / name).write_bytes(b"0" * 50)
    os.utime(tmp_path / "ab.lock", (1, 1))
    for name, age in (("x.tmp", 6 * 3600 - 60), ("dead.tmp", 6 * 3600 + 60)):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    return tmp_path


@pytest.mark.parametrize(
    ("max_bytes", "needed", "kept"),
    [(40, 10, "abc"), (39, 10, "ac"), (30, 10, "ac"), (29, 10, "c"), (10, 10, ""), (5, 10, ""), (30, 0, "abc")],
)
def test_no_more_leaves_than_makes_room(copies, max_bytes, needed, kept):
    ShardCache(copies, max_bytes)._make_room(needed)
    assert sorted(path.stem for path in copies.iterdir() if path.suffix in (".arrow", ".npy")) == list(kept)
    rest = {path.name for path in copies.iterdir() if path.suffix in (".lock", ".tmp")}
    assert rest == {"ab.lock", "x.tmp"}, "another process may be using them; nobody has written to the third for hours"


def test_so_much_is_kept_where_nothing_is_said(tmp_path):
    assert ShardCache(tmp_path).max_bytes == 20 * 2**30


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


def test_a_file_with_the_inode_and_size_of_a_copy_is_not_taken_for_it(tmp_path):
    location = storage.Location.parse(f"memory://reused/{tmp_path.name}.arrow")
    storage.write_atomically(location, b"shard")
    cache, name = ShardCache(tmp_path), hashlib.sha256(b"shard").hexdigest()
    for _ in range(2):  # the second time it is compared
        copy = cache.fetch(location, name)
    before = copy.stat()
    with copy.open("r+b") as file:
        file.write(b"drahs")
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    after = copy.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert cache.fetch(location, name).read_bytes() == b"shard"
    cache.fetch(location, name)
    other = hashlib.sha256(b"other").hexdigest()
    (tmp_path / f"{name}.arrow").rename(tmp_path / f"{other}.arrow")  # the same file under another hash
    storage.write_atomically(location, b"other")
    assert cache.fetch(location, other).read_bytes() == b"other"


def test_a_copy_that_is_used_is_not_read_again(tmp_path, monkeypatch):
    location = storage.Location.parse(f"memory://used/{tmp_path.name}.arrow")
    storage.write_atomically(location, b"shard")
    cache, name = ShardCache(tmp_path), hashlib.sha256(b"shard").hexdigest()
    cache.fetch(location, name)
    cache.fetch(location, name)  # the first time it is compared
    monkeypatch.setattr(storage, "sha256", Mock(side_effect=AssertionError))
    assert cache.fetch(location, name).read_bytes() == b"shard"
    monkeypatch.undo()

    def gone(path, **times):
        Path(path).unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "utime", gone)  # another process makes room
    assert cache.fetch(location, name).read_bytes() == b"shard"


def test_a_shard_is_downloaded_beside_the_copies(tmp_path, monkeypatch):
    """A draft elsewhere could be on another disk, and in a folder of others."""
    drafts = []
    monkeypatch.setattr(
        storage,
        "download",
        lambda at, draft: drafts.append((draft.parent, draft.suffix)) or draft.write_bytes(b"shard"),
    )
    name = hashlib.sha256(b"shard").hexdigest()
    copy = ShardCache(tmp_path / "cache").fetch(storage.Location.parse("memory://b/part-00000.arrow"), name)
    assert copy.read_bytes() == b"shard" and drafts == [(tmp_path / "cache", ".tmp")]


def test_a_use_is_noted_and_the_time_of_the_last_change_stays(tmp_path, monkeypatch):
    location = storage.Location.parse(f"memory://noted/{tmp_path.name}.arrow")
    storage.write_atomically(location, b"shard")
    cache, name = ShardCache(tmp_path), hashlib.sha256(b"shard").hexdigest()
    copy = cache.fetch(location, name)
    os.utime(copy, ns=(111, 222))
    monkeypatch.setattr(shard_cache.time, "time_ns", lambda: 7_000_000_123)
    assert cache.fetch(location, name) == copy == tmp_path / f"{name}.arrow"
    assert (copy.stat().st_atime_ns, copy.stat().st_mtime_ns) == (7_000_000_123, 222)


def test_what_another_process_fetched_meanwhile_is_not_fetched_again(tmp_path, monkeypatch):
    name, locks = hashlib.sha256(b"shard").hexdigest(), []

    @contextmanager
    def locked(path):
        locks.append(path)
        (tmp_path / f"{name}.arrow").write_bytes(b"shard")
        yield

    monkeypatch.setattr(storage, "locked", locked)
    monkeypatch.setattr(storage, "download", Mock(side_effect=AssertionError))
    copy = ShardCache(tmp_path).fetch(storage.Location.parse("memory://b/part-00000.arrow"), name)
    assert copy == tmp_path / f"{name}.arrow" and locks == [tmp_path / f"{name[:2]}.lock"]


def test_a_copy_that_another_process_removes_meanwhile_is_no_trouble(copies, monkeypatch):
    there = sorted(copies.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "gone.arrow", *there]))
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **more: (unlink(path), unlink(path, **more))
    )  # the other is faster
    ShardCache(copies, 20)._make_room(0)
    monkeypatch.undo()
    assert sorted(path.stem for path in copies.iterdir() if path.suffix in (".arrow", ".npy")) == ["a", "c"]
