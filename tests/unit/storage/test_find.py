"""Patterns: what they match, what they leave out, what of them is warned about, and how found files are named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pyarrow.fs import FileSelector, LocalFileSystem

from pipelines import storage
from pipelines.storage import Location, find, retry
from pipelines.storage.find import FoundFile, find_below, find_files


@pytest.fixture
def tree(tmp_path):
    for name in ("a1/x.tar", "a2/x.tar", "b/x.tar", "b/y.txt", "b/deep/x.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.tar").mkdir()
    (tmp_path / "d.tar").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.tar", ["d.tar"]),
        ("{a1,b}/x.tar", ["a1/x.tar", "b/x.tar"]),
        ("a[12]/*", ["a1/x.tar", "a2/x.tar"]),
        ("b/{x.tar,y.txt}", ["x.tar", "y.txt"]),
        ("b/*/x.tar", ["x.tar"]),
        ("?/y.*", ["y.txt"]),
        ("{a{1..2},b}/x.tar", ["a1/x.tar", "a2/x.tar", "b/x.tar"]),
        ("*/x.tar/z", []),
        ("{c.tar,d.tar}", ["d.tar"]),
        ("*.TAR", []),
        ("nowhere/*.tar", []),
        ("nowhere/*/x.tar", []),
        ("b", []),
    ],
)
def test_a_pattern_matches_files_level_by_level(tree, pattern, names):
    found = find_files(f"{tree}/{pattern}")
    assert [file.name for file in found] == names
    assert all(file.location.path.endswith(file.name) for file in found)
    for file in found:
        stat = (tree / file.location.path).stat()
        assert (file.num_bytes, file.modified_ns) == (stat.st_size, stat.st_mtime_ns)


def test_a_name_that_is_there_as_it_is_written_is_no_pattern(tree):
    for folder in ("a[1]", "a[1]b"):
        (tree / folder).mkdir()
        (tree / folder / "x.tar").touch()
    for pattern in ("a[1]/*.tar", "?[[]1[]]/x.tar"):
        assert [file.location.path for file in find_files(f"{tree}/{pattern}")] == [f"{tree}/a[1]/x.tar"], pattern
    for name in ("x[1].tar", "x[1].tar.gz", "x1.tar"):
        (tree / "b" / name).touch()
    assert [file.location.name for file in find_files(f"{tree}/?/x[1].tar")] == ["x[1].tar"]


@pytest.mark.parametrize(
    ("look", "pattern"),
    [*((find_files, pattern) for pattern in ("a[12]/*", "{a1,a2}/x.tar", "a1/x.tar")), (find_below, "b")],
)
def test_every_look_at_a_bucket_is_tried_again(tree, monkeypatch, look, pattern):
    pauses, calls = [], []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)

    def get_file_info(asked):
        calls.append(asked)
        if len(calls) == fails_at:
            raise OSError("503 Slow Down")
        return LocalFileSystem().get_file_info(asked)

    flaky = SimpleNamespace(get_file_info=get_file_info)
    monkeypatch.setattr(find, "resolve", lambda location: (flaky, f"{tree}/{location.path}"))
    fails_at = 0
    expected = look(Location("s3://bucket", pattern))
    assert expected and not pauses
    for fails_at in range(1, len(calls) + 1):
        calls.clear()
        assert look(Location("s3://bucket", pattern)) == expected
        assert len(pauses) == fails_at


def test_a_folder_is_listed_once_for_all_alternatives(tree, monkeypatch):
    """A folder of a hundred thousand objects is a hundred requests."""
    listed = []

    def get_file_info(asked):
        if isinstance(asked, FileSelector):
            listed.append(asked.base_dir)
        return LocalFileSystem().get_file_info(asked)

    asked_for = SimpleNamespace(get_file_info=get_file_info)
    monkeypatch.setattr(find, "resolve", lambda location: (asked_for, f"{tree}/{location.path}"))
    found = find_files(Location("s3://bucket", "*/*.{tar,tgz,txt}"))
    assert [file.name for file in found] == ["a1/x.tar", "a2/x.tar", "b/x.tar", "b/y.txt"]
    assert sorted(listed) == [f"{tree}{folder}" for folder in ("", "/a1", "/a2", "/b", "/c.tar")]


@pytest.mark.parametrize(("pattern", "num_names"), [("b/{x.tar,y.txt,deep,z}", 4), ("{c.tar,d.tar,e.tar,f.tar}", 4)])
def test_many_names_in_a_folder_are_looked_up_in_its_listing(tree, monkeypatch, caplog, pattern, num_names):
    """In a bucket, ten thousand names of tars were ten thousand requests, one after the other."""
    asked = []

    def get_file_info(look):
        asked.extend(look if isinstance(look, list) else [])
        return LocalFileSystem().get_file_info(look)

    monkeypatch.setattr(
        find, "resolve", lambda loc: (SimpleNamespace(get_file_info=get_file_info), f"{tree}/{loc.path}")
    )
    both = []
    for bound in (num_names, num_names - 1):
        monkeypatch.setattr(find, "_MOST_ASKED", bound)
        both.append((find_files(Location("s3://bucket", pattern)), caplog.messages))
        caplog.clear()
    assert both[0] == both[1] and both[0][0] and len(asked) == num_names


def test_a_name_that_is_there_is_no_pattern_in_its_folder(tmp_path):
    for name in ("b/x[1].tar", "b/x1.tar", "e/x1.tar", "e/x2.tar", "f/[y]/1", "f/y/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_files(f"{tmp_path}/?/x[1].tar")] == ["b/x[1].tar", "e/x1.tar"]
    assert [file.location.path for file in find_files(f"{tmp_path}/?/[y]/*")] == [f"{tmp_path}/f/[y]/1"]


def test_a_pattern_may_begin_at_the_root(tree):
    first, *rest = tree.parts[1:]
    (found,) = find_files("/".join(["", f"[{first[0]}]{first[1:]}", *rest, "d.tar"]))
    assert (found.location.path, found.name) == (f"{tree}/d.tar", "d.tar")


def test_only_what_is_named_and_missing_beside_what_is_there_is_warned_about(tree, caplog):
    for pattern, tells in (("{a1,a2}/x.tar", True), ("{a1,a3}/x.tar", False), ("{n1,n2}/x.tar", True)):
        find_files(f"{tree}/{pattern}", tells_missing=tells)
    assert caplog.text == ""
    find_files(f"{tree}/a{{0..6}}/x.tar")
    assert caplog.messages == ["5 of 7 are missing: a0/x.tar, a3/x.tar, a4/x.tar .."]


@pytest.mark.parametrize("slash", ["", "/"])
def test_all_files_below_a_folder_come_by_name_and_a_file_is_found_itself(tree, slash):
    found = find_below(Location("", f"{tree}{slash}"))
    assert [file.name for file in found] == ["a1/x.tar", "a2/x.tar", "b/deep/x.tar", "b/x.tar", "b/y.txt", "d.tar"]
    for file in found:
        stat = (tree / file.name).stat()
        assert file.location == Location("", f"{tree}/{file.name}")
        assert (file.num_bytes, file.modified_ns) == (stat.st_size, stat.st_mtime_ns)
        assert find_below(file.location) == [FoundFile(file.location, "", stat.st_size, stat.st_mtime_ns)]
    storage.write_atomically(f"memory://empty/{tree.name}", b"")
    (empty,) = find_below(f"memory://empty/{tree.name}")
    assert (empty.name, empty.num_bytes) == ("", 0)


def test_below_a_folder_that_is_missing_is_nothing(tmp_path):
    assert find_below(str(tmp_path / "none")) == [] == find_below("memory://nothing/none")
    storage.write_atomically("memory://root-of/a", b"xy")
    assert [(file.name, file.num_bytes) for file in find_below("memory://root-of")] == [("a", 2)]


@pytest.mark.parametrize(
    ("paths", "common"),
    [
        (["/a/b/c/1", "/a/b/d/2"], "/a/b/"),
        (["/x/a/z/1", "/x/b/z/2"], "/x/"),
        (["/a/b/1"], "/a/b/"),
        (["/a/b/1", "/a/2"], "/a/"),
        (["/a/1", "/b/1"], "/"),
    ],
)
def test_names_are_relative_to_the_folder_that_all_share(paths, common):
    assert find._common_folder(paths) == common


@pytest.mark.parametrize("path", ["bucket/a", "/bucket/a"])
@pytest.mark.parametrize("prefix", ["bucket/", "/bucket/"])
def test_file_systems_may_begin_their_paths_with_a_slash(path, prefix):
    assert find._without_prefix(path, prefix) == "a"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("{9..11}", ["9", "10", "11"]), ("{08..10}", ["08", "09", "10"]), ("{3..2}", []), ("{,a}b", ["b", "ab"])],
)
def test_numbers_have_the_width_of_the_first_bound(pattern, names):
    assert storage.expand_braces(pattern) == names
