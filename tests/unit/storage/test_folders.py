"""Whole folders: what completes one is removed first and written last; access is asked for without a trace."""

from __future__ import annotations

import os

import pytest
from pyarrow.fs import LocalFileSystem

from pipelines import storage
from pipelines.storage import StorageError, folders, upload_folder
from pipelines.storage import location as location_module


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "manifest.json", "sub/z"):
        (folder / name).write_text(f"new {name}")
    return folder


def test_the_file_that_completes_a_folder_comes_last(source, tmp_path, monkeypatch):
    target, sent, upload = f"memory://uploaded/{tmp_path.name}", [], folders.upload
    monkeypatch.setattr(folders, "upload", lambda path, to: (sent.append(path.name), upload(path, to))[1])
    upload_folder(source, target, "manifest.json")
    assert sorted(sent[:2]) == ["a", "z"] and sent[2:] == ["manifest.json"]
    assert [file.name for file in storage.find_below(target)] == ["a", "manifest.json", "sub/z"]
    copy = storage.download_files(target, [file.name for file in storage.find_below(target)], tmp_path / "copy/deep")
    assert {path.relative_to(copy).as_posix(): path.read_text() for path in copy.rglob("*") if path.is_file()} == {
        name: f"new {name}" for name in ("a", "manifest.json", "sub/z")
    }


def test_a_folder_may_lack_the_file_that_completes_others(source, tmp_path):
    target = f"memory://uploaded/{tmp_path.name}"
    storage.write_atomically(f"{target}/done.json", b"old")
    upload_folder(source, target, "done.json")
    assert [file.name for file in storage.find_below(target)] == ["a", "manifest.json", "sub/z"]


def test_a_folder_that_is_replaced_is_not_complete_until_it_is(source, tmp_path, monkeypatch):
    target = f"memory://replaced/{tmp_path.name}"
    storage.write_atomically(f"{target}/manifest.json", b"old")

    def failing(path, to):
        raise StorageError("away")

    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(folders, "upload", failing)
        upload_folder(source, target, "manifest.json")
    assert storage.list_names(target) == {}


@pytest.mark.parametrize("writes", [True, False])
def test_asking_for_access_leaves_nothing(tmp_path, monkeypatch, writes):
    place, written, write = f"memory://asked-{writes}/{tmp_path.name}", [], folders.write_atomically
    monkeypatch.setattr(
        folders, "write_atomically", lambda to, data: (written.append((to.name, data)), write(to, data))
    )
    storage.check_access(place, **({"writes": True} if writes else {}))
    assert storage.list_names(place) == {}
    assert written == ([(".write-check", b"")] if writes else []) and storage.is_folder(place) is writes


def test_a_folder_that_may_not_be_listed_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def refused(location):
        raise StorageError(f"{location} refuses access")

    monkeypatch.setattr(folders, "list_names", refused)
    for writes in (False, True):
        with pytest.raises(StorageError, match="refuses access"):
            storage.check_access(f"memory://listed/{tmp_path.name}", writes=writes)
    assert not storage.exists(f"memory://listed/{tmp_path.name}")


def test_a_bucket_that_is_not_there_is_told_and_a_local_folder_need_not_be(tmp_path, monkeypatch):
    storage.check_access(str(tmp_path / "nowhere"), writes=True)
    assert not (tmp_path / "nowhere").exists()
    asked = []
    connected = (LocalFileSystem(), str(tmp_path / "bucket"))
    monkeypatch.setattr(location_module, "_connect", lambda root: (asked.append(root), connected)[1])
    with pytest.raises(StorageError, match="the bucket of s3://bucket/x does not exist: check the name"):
        storage.check_access("s3://bucket/x")
    assert asked == ["s3://bucket"]
    (tmp_path / "bucket").mkdir()
    storage.check_access("s3://bucket/x")


def test_a_tree_is_copied_into_one_that_is_there(source, tmp_path):
    for _ in range(2):
        storage.copy_tree(source, tmp_path / "target", ["sub", "a", "missing"])
    found = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*")}
    assert found == {"sub", "sub/z", "a"}


def test_files_are_sent_in_order_of_their_names_into_folders_that_are_there(tmp_path, monkeypatch):
    made, sent = [], []
    for name in ("b/x", "a/y", "a/deep/z", "last"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    monkeypatch.setattr(folders, "_COPIES_AT_ONCE", 1)
    monkeypatch.setattr(folders, "make_folder", lambda place: made.append(place.path))
    monkeypatch.setattr(folders, "upload", lambda path, to: sent.append(to.path))
    upload_folder(tmp_path / "from", "memory://ordered/to", "last")
    assert sent == ["to/a/deep/z", "to/a/y", "to/b/x", "to/last"]
    assert made == ["to", "to/a", "to/a/deep", "to/b"], "those above come first"


def test_nothing_is_downloaded_into_a_folder_that_is_made(tmp_path):
    assert storage.download_files("memory://x", [], tmp_path / "a/b") == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()
    storage.copy_tree(tmp_path, tmp_path / "c/d", ["none"])
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("x")
    os.utime(tmp_path / "file", (1000, 1000))
    storage.copy_tree(tmp_path, tmp_path / "c/d", ["file"])
    assert (tmp_path / "c/d/file").read_text() == "x" and (tmp_path / "c/d/file").stat().st_mtime == 1000
