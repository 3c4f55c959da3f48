"""Places: patterns, folders, paths that climb, files that are whole or absent."""

from __future__ import annotations

import errno
import os

import pytest

from pipelines import storage
from pipelines.settings import SettingsError


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("a/b.tar", ["a/b.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("x/{train,val}.json", ["x/train.json", "x/val.json"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{single}", ["{single}"]),
    ],
)
def test_braces(pattern, places):
    assert storage.expand_braces(pattern) == places


@pytest.mark.parametrize("root", ["local", "memory"])
def test_patterns_find_files_in_order(tmp_path, root):
    place = str(tmp_path) if root == "local" else "memory://patterns"
    for name in ("b/2.tar", "b/1.tar", "a/1.tar", "a/1.txt", "a/deep/3.tar"):
        storage.make_folder(storage.parent(storage.join(place, name)))
        storage.write_atomically(storage.join(place, name), b"x" * 3)
    found = storage.find_files(storage.join(place, "*", "?.tar"))
    assert [file.name for file in found] == ["a/1.tar", "b/1.tar", "b/2.tar"]
    assert [storage.read_bytes(file.place) for file in found] == [b"xxx"] * 3
    assert [file.name for file in storage.find_files(storage.join(place, "b/1.tar"))] == ["1.tar"]
    assert storage.find_files(storage.join(place, "c*", "1.tar")) == []
    assert storage.list_names(storage.join(place, "a")) == {"1.tar": 3, "1.txt": 3}


def test_files_that_are_named_and_missing_are_told(tmp_path, caplog):
    for number in (0, 2):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"x")
    found = storage.find_files(str(tmp_path / "{00000..00003}.tar"))
    assert [file.name for file in found] == ["00000.tar", "00002.tar"]
    assert "2 of 4 are missing" in caplog.text
    assert "00001.tar" in caplog.text


def test_one_connection_serves_a_remote_folder(monkeypatch):
    import fsspec

    opened = []
    connect = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda place: (opened.append(place), connect(place))[1])
    for number in range(5):
        storage.write_atomically(f"memory://connected/folder/{number}", b"x")
        assert storage.read_bytes(f"memory://connected/folder/{number}") == b"x"
    assert opened == ["memory://connected/folder"]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "..", "", "a\\..\\..\\b"])
def test_paths_that_climb_out(name):
    assert storage.safe_path("/data", name) is None


@pytest.mark.parametrize(
    ("name", "place"), [("a.jpg", "/data/a.jpg"), ("./a/b c.jpg", "/data/a/b c.jpg"), ("a..b", "/data/a..b")]
)
def test_paths_that_stay(name, place):
    assert storage.safe_path("/data", name) == place


def test_query_of_a_uri_stays_at_its_end():
    place = "s3://bucket/set?endpoint_override=localhost:9000"
    assert storage.join(place, "a", "b.arrow") == "s3://bucket/set/a/b.arrow?endpoint_override=localhost:9000"
    assert storage.parent("s3://bucket/set/a?region=x") == "s3://bucket/set?region=x"
    assert storage.file_name("s3://bucket/set/a?region=x") == "a"
    assert storage.join("a?b", "*.tar") == "a?b/*.tar"


def test_unknown_protocol_is_the_users_mistake():
    with pytest.raises(SettingsError, match="cannot open"):
        storage.resolve("nonsense://a/b")


def test_full_disk_becomes_one_sentence_and_other_errors_pass():
    with pytest.raises(storage.DiskFullError, match="no space left while writing x"), storage.disk_full_as_error("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), storage.disk_full_as_error("x"):
        raise PermissionError


def test_device_that_is_really_full(tmp_path, monkeypatch):
    full = tmp_path / "draft"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(storage, "draft_of", lambda target: full)
    with pytest.raises(storage.DiskFullError, match="run the same command again"):
        storage.write_atomically(str(tmp_path / "a"), b"x" * 100_000)
    assert not (tmp_path / "a").exists()


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path):
    names = {storage.draft_of(tmp_path / "a") for _ in range(20)}
    assert len(names) == 20
    for name in names:
        name.write_bytes(b"unfinished")
    storage.write_atomically(str(tmp_path / "a"), b"x")
    storage.remove_drafts(str(tmp_path))
    assert storage.list_names(str(tmp_path)) == {"a": 1}


def test_second_name_costs_no_copy(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
