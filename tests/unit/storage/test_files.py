"""Files that are complete or absent, in every kind of storage; hashes, sizes, second names, what is left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from pipelines import storage
from pipelines.storage import Location, files
from pipelines.storage import location as location_module


def test_hashes_and_copies_are_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "COPY_BYTES", 4)
    (tmp_path / "a").write_bytes(b"ten bytes!")
    assert storage.sha256(str(tmp_path / "a")) == hashlib.sha256(b"ten bytes!").hexdigest()
    assert storage.sha256(str(tmp_path / "none")) == ""
    storage.upload(tmp_path / "a", "memory://copied/a")
    storage.download("memory://copied/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == storage.read_bytes("memory://copied/a") == b"ten bytes!"


def test_sizes_and_kinds(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "b").mkdir(), (tmp_path / "a").mkdir()
    (tmp_path / "x").write_bytes(b"xyz")
    sizes = [storage.num_bytes(str(tmp_path / name)) for name in ("x", "empty", "a", "none")]
    assert sizes == [3, 0, -1, -1]
    assert storage.list_names(str(tmp_path)) == {"x": 3, "empty": 0}
    assert storage.list_folders(str(tmp_path)) == ["a", "b"]
    assert storage.list_names(str(tmp_path / "none")) == {} and storage.list_folders(str(tmp_path / "none")) == []


def test_only_drafts_are_removed_as_drafts(tmp_path):
    for name in (".a.0123.tmp", "result.tmp", ".hidden", "a"):
        (tmp_path / name).touch()
    storage.remove_drafts(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a", "result.tmp"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_goes_to_a_bucket_leaves_no_temporary_file(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def failing(source, location):
        raise storage.StorageError("away")

    if fails:
        monkeypatch.setattr(files, "upload", failing)
    with storage.disk_full_as_error("x"):
        try:
            assert storage.write_lines(f"memory://left/{tmp_path.name}", [{"a": 1}]) == 1 and not fails
        except storage.StorageError:
            assert fails
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder of this disk as the root of any remote storage."""
    monkeypatch.setattr(location_module, "_connect", lambda root: (LocalFileSystem(), str(tmp_path)))
    return tmp_path


@pytest.mark.parametrize(("root", "names"), [("sftp://host", ["."]), ("hdfs://host", ["."]), ("s3://bucket", ["a"])])
def test_storages_that_show_unfinished_files_get_a_draft_first(server, root, names):
    location, while_writing = Location(root, "a"), []

    def send(stream):
        stream.write(b"whole")
        while_writing.extend(path.name for path in server.iterdir())

    files._send(location, send)
    assert [name[: len(begin)] for name, begin in zip(while_writing, names, strict=True)] == names
    assert [(path.name, path.read_bytes()) for path in server.iterdir()] == [("a", b"whole")]


def test_a_draft_that_fails_is_removed_and_an_earlier_file_stays(server):
    (server / "a").write_bytes(b"before")

    def send(stream):
        stream.write(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        files._send(Location("sftp://host", "a"), send)
    assert [(path.name, path.read_bytes()) for path in server.iterdir()] == [("a", b"before")]


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSPC])
def test_a_second_name_replaces_and_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch, error):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"before")

    def refused(self, target):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    if error == errno.ENOSPC:
        with pytest.raises(storage.DiskFullError):
            storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    else:
        storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    same = (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
    assert (same, (tmp_path / "b").read_bytes()) == (not error, b"before" if error == errno.ENOSPC else b"new")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"new")

    def no_links(self, target):
        raise OSError(errno.EPERM, "no links")

    def full(source, target):
        target.write_bytes(b"n")
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    monkeypatch.setattr(files.shutil, "copyfile", full)
    with pytest.raises(storage.DiskFullError, match="no space left"):
        storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("write failed: No space left on device"), True),
        (OSError(errno.EIO, "x"), False),
    ],
)
def test_a_full_disk_is_known_by_number_or_by_words(error, is_full):
    assert files._is_disk_full(error) is is_full
    with pytest.raises(storage.DiskFullError if is_full else OSError), storage.disk_full_as_error("x"):
        raise error


def test_files_below_a_folder_come_by_name(tmp_path):
    for name in ("b", "a/z", "a/y", "c/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = storage.find_below(str(tmp_path))
    assert [(file.name, file.num_bytes) for file in found] == [("a/y", 3), ("a/z", 3), ("b", 1), ("c/1", 3)]
    assert all(file.modified_ns == (tmp_path / file.name).stat().st_mtime_ns for file in found)
    (alone,) = storage.find_below(str(tmp_path / "b"))
    assert (alone.name, alone.location.path) == ("", f"{tmp_path}/b")


def test_the_disks_errors_are_no_damage_of_the_data(tmp_path, monkeypatch):
    """A broken disk must not pass for a file that ends there."""

    class Broken:
        def read(self, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    from contextlib import nullcontext

    from pipelines.storage import packed

    (tmp_path / "a").write_bytes(b"plain")
    monkeypatch.setattr(packed, "open_unpacked", lambda location: nullcontext(Broken()))
    with pytest.raises(OSError, match="Input/output error"):
        storage.unpack(str(tmp_path / "a"), tmp_path / "b")
