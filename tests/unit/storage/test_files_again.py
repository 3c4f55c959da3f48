"""Calls of a storage that fail: tried again without a trace of the first try, or told with the file's address."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem

from pipelines import storage
from pipelines.storage import Location, files, retry


class Failing:
    """A file system whose call of a number fails as a bucket does that is busy."""

    def __init__(self, fails_at):
        self.calls, self.fails_at, self.local, self.names = 0, fails_at, LocalFileSystem(), []

    def __getattr__(self, name):
        def call(*given, **options):
            self.calls += 1
            self.names.append(name)
            if self.calls == self.fails_at:
                raise OSError("503 Slow Down")
            return getattr(self.local, name)(*given, **options)

        return call


CALLS = {
    "exists": lambda place: storage.exists(place / "a"),
    "is_folder": lambda place: storage.is_folder(place / "b"),
    "num_bytes": lambda place: storage.num_bytes(place / "a"),
    "list_names": storage.list_names,
    "list_folders": storage.list_folders,
    "read_bytes": lambda place: storage.read_bytes(place / "a"),
    "sha256": lambda place: storage.sha256(place / "a"),
    "remove_drafts": storage.remove_drafts,
    "write_atomically": lambda place: storage.write_atomically(place / "c", b"new"),
    "write_lines": lambda place: storage.write_lines(place / "c", [{"x": 1}]),
    "make_folder": lambda place: storage.make_folder(place / "c/d"),
    "remove_folder": lambda place: storage.remove_folder(place / "b"),
    "remove_file": lambda place: storage.remove_file(place / "a"),
    "link_or_copy": lambda place: storage.link_or_copy(place / "a", place / "c"),
}


@pytest.mark.parametrize("root", ["s3://bucket", "hdfs://host"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_storage_is_tried_again(tmp_path, monkeypatch, call, root):
    pauses, outcomes, calls = [], [], 1
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    fails_at = 0
    while fails_at <= calls:
        server = tmp_path / f"{fails_at}"
        (server / "b").mkdir(parents=True)
        for name in ("a", ".x.tmp", "b/deep"):
            (server / name).write_text(name)
        system = Failing(fails_at)
        monkeypatch.setattr(files, "resolve", lambda at, one=system, top=server: (one, f"{top}/{at.path}".rstrip("/")))
        result = CALLS[call](Location(root, ""))
        tree = {str(path.relative_to(server)): path.is_file() and path.read_bytes() for path in server.rglob("*")}
        outcomes.append((result, tree))
        calls = calls if fails_at else system.calls
        fails_at += 1
    assert all(outcome == outcomes[0] for outcome in outcomes) and len(pauses) == calls == len(outcomes) - 1


@pytest.mark.parametrize(("root", "moves"), [("s3://bucket", []), ("hdfs://host", ["move"]), ("memory://x", [])])
def test_only_a_draft_is_moved(tmp_path, monkeypatch, root, moves):
    """In a bucket, a file that is moved to its own name would be removed after the copy."""
    system = Failing(0)
    monkeypatch.setattr(files, "resolve", lambda at: (system, f"{tmp_path}/{at.path}"))
    storage.write_atomically(Location(root, "a"), b"x")
    assert system.names == ["open_output_stream", *moves] and (tmp_path / "a").read_bytes() == b"x"


def test_a_copy_in_a_bucket_that_fails_names_the_copy(monkeypatch):
    def copy_file(source, target):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    monkeypatch.setattr(files, "resolve", lambda at: (SimpleNamespace(copy_file=copy_file), at.path))
    with pytest.raises(storage.StorageError, match=r"^s3://bucket/copy failed 6 times, last with: 503 Slow Down"):
        storage.link_or_copy("s3://bucket/a", "s3://bucket/copy")


def test_a_download_that_breaks_off_begins_again(tmp_path, monkeypatch):
    """What came before the fault is not in the file twice."""
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    streams = [[b"ten ", OSError("reset")], [b"ten ", b"byt", OSError("reset")], [b"ten ", b"bytes!", b""]]

    class Stream:
        def __init__(self, parts):
            self.parts = parts

        def read(self, size=-1):
            part = self.parts.pop(0)
            if isinstance(part, OSError):
                raise part
            return part

    opened = iter(streams)
    system = SimpleNamespace(open_input_stream=lambda path, compression: nullcontext(Stream(next(opened))))
    monkeypatch.setattr(files, "resolve", lambda at: (system, at.path))
    storage.download("s3://bucket/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"ten bytes!" and next(opened, None) is None
    opened = iter([[b"ten ", OSError("reset")], [b"ten ", b"bytes!", b""]])
    assert storage.sha256("s3://bucket/a") == hashlib.sha256(b"ten bytes!").hexdigest()
    opened = iter([[PermissionError("no")] for _ in range(3)])
    for read in (storage.sha256, storage.read_bytes, lambda place: storage.download(place, tmp_path / "b")):
        with pytest.raises(storage.StorageError, match="s3://bucket/a refuses access"):
            read("s3://bucket/a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_download_onto_a_full_disk_names_the_file_that_has_no_room(tmp_path):
    storage.write_atomically(f"memory://full/{tmp_path.name}", b"x" * 10)
    (tmp_path / "copy").symlink_to("/dev/full")
    with pytest.raises(storage.DiskFullError, match=f"^no space left while writing {tmp_path}/copy: free some"):
        storage.download(f"memory://full/{tmp_path.name}", tmp_path / "copy")
