"""A job's working folder and the location at which its files are published."""

from __future__ import annotations

import os

import pytest

from pipelines import storage
from pipelines.storage import WorkFolder, folders


@pytest.fixture
def location(tmp_path):
    return f"memory://published/{tmp_path.name}"


def published(location):
    return {name: storage.read_bytes(storage.join(location, name)) for name in storage.list_names(location)}


@pytest.fixture
def uploads(monkeypatch):
    found, original = [], folders.upload
    monkeypatch.setattr(folders, "upload", lambda path, to: (found.append(path.name), original(path, to))[1])
    return found


def test_only_what_changed_is_published_again(location, uploads):
    work = WorkFolder(location)
    (work.path / "a.txt").write_text("one")
    (work.path / "b.txt").write_text("two")
    work.publish()
    assert published(location) == {"a.txt": b"one", "b.txt": b"two"} and uploads == ["a.txt", "b.txt"]
    (work.path / "b.txt").write_text("two, longer")
    work.publish("a.txt", "b.txt", "missing.txt")
    assert published(location) == {"a.txt": b"one", "b.txt": b"two, longer"} and uploads == ["a.txt", "b.txt", "b.txt"]


def test_a_file_of_the_same_size_that_changed_is_published_again(location, uploads):
    work = WorkFolder(location)
    for text, nanoseconds in (("one", 1), ("two", 2), ("two", 2), ("three", 2)):
        (work.path / "a").write_text(text)
        os.utime(work.path / "a", ns=(nanoseconds, nanoseconds))
        work.publish("a")
    assert uploads == ["a"] * 3 and published(location) == {"a": b"three"}


def test_files_are_published_in_the_order_given(location, uploads):
    work = WorkFolder(location)
    for name in ("a", "b", "c"):
        (work.path / name).write_text(name)
    work.publish("c", "a", "b")
    assert uploads == ["c", "a", "b"]


def test_a_file_that_is_gone_is_removed_there(location):
    work = WorkFolder(location)
    (work.path / "folder").mkdir()
    for name in ("folder/a", "folder/b", "folder.txt"):
        (work.path / name).write_text(name)
    work.publish()
    (work.path / "folder/a").unlink()
    work.publish("folder")
    assert list(storage.list_names(f"{location}/folder")) == ["b"]
    assert storage.exists(f"{location}/folder.txt"), "of a name that begins alike"
    storage.write_atomically(f"{location}/folder/a", b"another job's")
    work.publish("folder")
    assert storage.exists(f"{location}/folder/a"), "only what this folder published is removed"


def test_everything_that_is_gone_is_removed_where_all_is_published(location):
    work = WorkFolder(location)
    (work.path / "unsent.jsonl").write_text("x")
    (work.path / "result.json").write_text("{}")
    work.publish()
    again = WorkFolder(location)
    again.fetch("unsent.jsonl", "result.json")
    (again.path / "unsent.jsonl").unlink()
    again.publish()
    assert list(storage.list_names(location)) == ["result.json"]


def test_a_file_that_is_being_written_is_not_published(location, uploads):
    work = WorkFolder(location)
    (work.path / "folder").mkdir()
    for name in ("folder/.a.123.tmp", "folder/a", ".b.456.tmp", ".hidden"):
        (work.path / name).write_text(name)
    work.publish()
    assert uploads == [".hidden", "a"]


def test_progress_is_published_in_the_background_every_few_seconds(location, uploads, monkeypatch, tmp_path):
    now = 1000.0
    monkeypatch.setattr(folders.time, "monotonic", lambda: now)
    work = WorkFolder(location)
    (work.path / "progress.txt").write_text("step 1")
    for now, sent in ((1000.0, 1), (1004.9, 1), (1005.0, 2), (1009.0, 2)):
        work.publish_soon("progress.txt")
        work._thread.join(60)
        assert len(uploads) == sent, now
    assert published(location) == {"progress.txt": b"step 1"}
    local = WorkFolder(str(tmp_path / "out"))
    local.publish_soon("progress.txt")
    assert local._thread is None and len(uploads) == 2


def test_a_failing_background_upload_stops_nothing(location, monkeypatch):
    def failing(path, to):
        raise OSError("away")

    monkeypatch.setattr(folders, "upload", failing)
    work = WorkFolder(location)
    work._try_to_publish("progress.txt")


def test_what_another_run_published_is_fetched_and_not_sent_again(location, uploads):
    first = WorkFolder(location)
    (first.path / "record.jsonl").write_text("1\n")
    (first.path / "folder/deep").mkdir(parents=True)
    (first.path / "folder/x").write_text("x")
    (first.path / "folder/deep/y").write_text("y")
    first.publish()
    uploads.clear()
    second = WorkFolder(location)
    second.fetch("record.jsonl", "folder", "never-written")
    assert (second.path / "folder/deep/y").read_text() == "y"
    assert (second.path / "record.jsonl").read_text() == "1\n" and (second.path / "folder/x").read_text() == "x"
    second.publish("record.jsonl", "folder")
    assert uploads == []
    assert second.uri("record.jsonl") == f"{location}/record.jsonl" and second.uri() == location


def test_a_published_file_that_another_process_removed_is_removed_by_fetching(location):
    work, other = WorkFolder(location), WorkFolder(location)
    (work.path / "folder").mkdir()
    for name in ("unsent.jsonl", "folder/a", "folder/b", "folder.txt"):
        (work.path / name).write_text(name)
    work.publish()
    (work.path / "notes.txt").write_text("never published")
    other.fetch("unsent.jsonl", "folder", "folder.txt")
    for name in ("unsent.jsonl", "folder/a", "folder.txt"):
        (other.path / name).unlink()
    other.publish()
    work.fetch("unsent.jsonl", "folder", "notes.txt")
    assert sorted(path.name for path in work.path.rglob("*")) == ["b", "folder", "folder.txt", "notes.txt"]
    (work.path / "unsent.jsonl").write_text("unsent.jsonl")
    work.publish("unsent.jsonl")
    assert storage.exists(f"{location}/unsent.jsonl"), "what was removed is sent when it is there again"


def test_a_local_folder_is_the_location_itself(tmp_path):
    work = WorkFolder(str(tmp_path / "out"))
    (work.path / "a").write_text("a")
    work.publish(), work.fetch("a")
    assert (tmp_path / "out/a").read_text() == "a" and work.uri("a") == str(tmp_path / "out/a")


def test_a_local_folder_is_made_with_its_parents_and_a_copy_lies_among_temporary_files(tmp_path, location):
    for _ in range(2):
        assert WorkFolder(str(tmp_path / "deep/er")).path == tmp_path / "deep/er"
    copy = WorkFolder(location)
    assert copy.path.name.startswith("tinygptv-work-") and copy.path.is_dir() and copy.path != tmp_path


def test_everything_is_published_by_name(location, uploads, monkeypatch):
    work = WorkFolder(location)
    for name in ("c", "a", "b"):
        (work.path / name).write_text(name)
    there = sorted(work.path.iterdir(), reverse=True)
    monkeypatch.setattr(type(work.path), "iterdir", lambda path: iter(there))
    work.publish()
    assert uploads == ["a", "b", "c"]


def test_a_background_upload_does_not_hold_up_the_end_of_the_process(location, monkeypatch):
    started = []
    monkeypatch.setattr(folders.threading, "Thread", lambda **options: started.append(options) or FakeThread())
    work = WorkFolder(location)
    work.publish_soon("progress.txt")
    monkeypatch.setattr(folders.time, "monotonic", lambda: work._sent_at + 99)
    work.publish_soon("progress.txt")
    assert [(each["args"], each["daemon"]) for each in started] == [(("progress.txt",), True)], "one at a time"


class FakeThread:
    """A thread that never ends."""

    def start(self):
        pass

    def is_alive(self):
        return True
