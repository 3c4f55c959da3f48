"""Files that are complete or absent, in every kind of storage; hashes, sizes, second names, what is left behind."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(("root", "made"), [("hdfs://host", True), ("sftp://host", True), ("s3://bucket", False)])
def test_folders_of_object_storages_need_not_be_made(server, root, made):
    storage.make_folder(Location(root, "deep/er"))
    assert (server / "deep/er").is_dir() is made


def test_a_draft_that_fails_is_removed_and_an_earlier_file_stays(server):
    (server / "a").write_bytes(b"before")

    def send(stream):
        stream.write(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        files._send(Location("sftp://host", "a"), send)
    assert [(path.name, path.read_bytes()) for path in server.iterdir()] == [("a", b"before")]


def test_a_storage_that_is_gone_is_told_by_its_first_error(monkeypatch):
    def gone(*_, **__):
        raise OSError("no route")

    def refuse(location, write):
        raise storage.StorageError("told")

    lost = SimpleNamespace(open_output_stream=gone, get_file_info=gone, delete_file=gone)
    monkeypatch.setattr(files, "resolve", lambda location: (lost, "/a"))
    monkeypatch.setattr(files, "with_retries", refuse)
    with pytest.raises(storage.StorageError, match="told"):
        files._send(Location("sftp://host", "a"), lambda stream: None)


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSPC, errno.EDQUOT])
def test_a_second_name_replaces_and_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch, error):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"before")

    def refused(self, target):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    is_full = error in (errno.ENOSPC, errno.EDQUOT)
    if is_full:
        with pytest.raises(storage.DiskFullError, match=f"no space left while writing {tmp_path}/b"):
            storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    else:
        storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    same = (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
    assert (same, (tmp_path / "b").read_bytes()) == (not error, b"before" if is_full else b"new")
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
        (RuntimeError("write failed: Disk quota exceeded"), True),
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
    assert (alone.name, alone.location.path, alone.num_bytes) == ("", f"{tmp_path}/b", 1)
    assert alone.modified_ns == (tmp_path / "b").stat().st_mtime_ns


def test_the_disks_errors_are_no_damage_of_the_data(tmp_path, monkeypatch):
    """A broken disk must not pass for a file that ends there."""

    class Broken:
        def read(self, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    from pipelines.storage import packed

    (tmp_path / "a").write_bytes(b"plain")
    monkeypatch.setattr(packed, "open_unpacked", lambda location: nullcontext(Broken()))
    with pytest.raises(OSError, match="Input/output error"):
        storage.unpack(str(tmp_path / "a"), tmp_path / "b")


@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_compressed_file_is_read_as_it_is_whatever_its_name(tmp_path, root):
    place = storage.join(str(tmp_path) if root == "local" else f"memory://packed/{tmp_path.name}", "a.json.gz")
    packed = gzip.compress(b"{}")
    storage.write_atomically(place, packed)
    storage.download(place, tmp_path / "copy")
    assert storage.read_bytes(place) == (tmp_path / "copy").read_bytes() == packed
    assert storage.sha256(place) == hashlib.sha256(packed).hexdigest()
    assert storage.compression_of(place) == "gzip"
    with storage.open_unpacked(place) as stream:
        assert stream.read() == b"{}"


def test_a_file_is_closed_when_it_is_committed_or_aborted(tmp_path, monkeypatch):
    def not_asked(*given):
        raise AssertionError("a local file is renamed, not copied")

    monkeypatch.setattr(files, "upload", not_asked)
    for name, finish in (("a", "commit"), ("b", "abort")):
        file = storage.AtomicFile(str(tmp_path / name))
        assert file.write(b"xyz") == 3 and not file.closed
        draft = file._draft.stat().st_ino
        getattr(file, finish)()
        assert file.closed and file._file.closed
        file.abort()
        assert storage.list_names(str(tmp_path)) == {"a": 3}, "abort after the end changes nothing"
    assert draft and (tmp_path / "a").read_bytes() == b"xyz"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_commit_that_is_interrupted_leaves_no_draft(tmp_path, monkeypatch, error):
    def interrupted(self, target):
        raise error

    file = storage.AtomicFile(str(tmp_path / "a"))
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(error):
        file.commit()
    assert list(tmp_path.iterdir()) == []


class Refusing:
    """A storage that opens no file; notes what is deleted."""

    def __init__(self):
        self.deleted = []

    def open_output_stream(self, path, compression):
        raise storage.StorageError(f"no {path}")

    def get_file_info(self, path):
        return LocalFileSystem().get_file_info("/etc/hostname" if path.endswith("a") else "/none")

    def delete_file(self, path):
        self.deleted.append(path)


def test_an_upload_that_fails_deletes_nothing_where_there_is_no_draft(monkeypatch):
    """Only a draft is removed, never the earlier file of that name."""
    bucket = Refusing()
    monkeypatch.setattr(files, "resolve", lambda location: (bucket, "bucket/a"))
    for root in ("s3://bucket", "sftp://host"):
        with pytest.raises(storage.StorageError):
            storage.write_atomically(Location(root, "a"), b"x")
    assert bucket.deleted == []


def test_a_draft_lies_hidden_beside_its_file(tmp_path):
    draft = storage.draft_of(tmp_path / "a.json")
    assert draft.parent == tmp_path and re.fullmatch(r"\.a\.json\.[0-9a-f]{12}\.tmp", draft.name)


def test_lines_are_counted_and_stay_readable(tmp_path):
    assert storage.write_lines(str(tmp_path / "none.jsonl"), []) == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    assert files._json_line({"a": "\u00e9\u2028"}) == b'{"a": "\xc3\xa9\\u2028"}\n'


@pytest.mark.parametrize("root", ["local", "memory"])
def test_folders_and_files_are_removed_and_missing_ones_are_fine(tmp_path, root):
    place = str(tmp_path) if root == "local" else f"memory://removed/{tmp_path.name}"
    for name in ("folder/a", "folder/below/b", "folder2/c"):
        storage.make_folder(storage.parent(storage.join(place, name)))
        storage.write_atomically(storage.join(place, name), b"x")
    for _ in range(2):
        storage.remove_folder(storage.join(place, "folder"))
        storage.remove_file(storage.join(place, "folder2"))
        storage.remove_folder(storage.join(place, "folder2/c"))
    assert [file.name for file in storage.find_below(place)] == ["folder2/c"]
    assert storage.is_folder(place) and not storage.is_folder(storage.join(place, "folder2/c"))
    assert [storage.exists(storage.join(place, name)) for name in ("folder2/c", "folder2", "folder")] == [1, 1, 0]


def test_a_second_name_in_a_bucket_is_a_copy(tmp_path):
    folder = f"memory://linked/{tmp_path.name}"
    storage.write_atomically(f"{folder}/a", b"x")
    storage.link_or_copy(f"{folder}/a", f"{folder}/b")
    assert storage.list_names(folder) == {"a": 1, "b": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_block_that_fails_on_a_full_disk_tells_its_own_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "draft_of", lambda target: tmp_path / "draft")
    (tmp_path / "draft").symlink_to("/dev/full")
    with pytest.raises(KeyError, match="mine"), storage.AtomicFile(str(tmp_path / "a")) as file:
        file.write(b"x")
        raise KeyError("mine")
    assert list(tmp_path.iterdir()) == []


def test_what_is_flushed_can_be_read(tmp_path):
    with storage.AtomicFile(str(tmp_path / "a")) as file:
        file.write(b"xyz")
        assert file._draft.stat().st_size == 0
        file.flush()
        assert file._draft.read_bytes() == b"xyz" and not (tmp_path / "a").exists()
