"""Tar shards: sound ones, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from pipelines.data.sources import locate
from pipelines.data.sources.base import Rejected
from pipelines.settings import PrepareDataSettings, SettingsError
from tests.source_files import encode, jpeg, picture, sample, write_tar, write_web_tar


def read(path, source="laion"):
    """Rows and rejections of a source, each by key in order."""
    reader, location = locate(PrepareDataSettings(source=source, input=str(path)))
    found = [found for unit in reader.reader.plan(location) for found in reader.reader.read(unit)]
    rows = [entry for entry in found if not isinstance(entry, Rejected)]
    return rows, [entry for entry in found if isinstance(entry, Rejected)]


def captions(rows):
    return [row.turns[0].answers[0] for row in rows]


def test_plain_tar_gives_cleaned_captions_and_untouched_bytes(tmp_path):
    write_tar(tmp_path / "00000.tar", sample("a", jpeg(0), 'A "Dog", running.'))
    rows, rejected = read(tmp_path / "00000.tar")
    assert rejected == []
    assert (rows[0].id, rows[0].source, rows[0].task, rows[0].image) == ("00000/a", "laion", "pair", jpeg(0))
    assert captions(rows) == ["a dog , running"]


def test_folder_glob_and_braces_find_the_same_tars(tmp_path):
    for number in range(3):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 2, 2)
    ids = [
        [row.id for row in read(place)[0]] for place in (tmp_path, tmp_path / "*.tar", tmp_path / "{00000..00002}.tar")
    ]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 6


def test_ids_stay_apart_when_folders_repeat_file_names(tmp_path):
    for folder in ("x", "y"):
        write_web_tar(tmp_path / folder / "00000.tar", 0, 1)
    rows, _ = read(tmp_path / "*/00000.tar")
    assert [row.id for row in rows] == ["x/00000/000000", "y/00000/000000"]


def test_members_of_a_sample_may_lie_apart(tmp_path):
    first, second = sample("a", jpeg(0), "one"), sample("b", jpeg(1), "two")
    mixed = [first[0], second[0], second[1], first[1]]
    rows, rejected = read(write_tar(tmp_path / "0.tar", mixed))
    assert captions(rows) == ["one", "two"]
    assert rejected == []


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", jpeg(0))], "no .json member"),
        ([("a.json", b'{"caption": "x"}')], "no .jpg member"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"url": "x"}')], "no caption"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": null}')], "no text but NoneType"),
        ([("a.jpg", jpeg(0)), ("a.json", b"{")], "no valid JSON"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": "caf\xe9"}')], "not UTF-8"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": "x"}'), ("a.txt", b"caf\xe9")], "not UTF-8"),
        ([("a.jpg", b""), ("a.json", b'{"caption": "x"}')], "empty (0 bytes)"),
        ([("a.jpg", b"hello"), ("a.json", b'{"caption": "x"}')], "known format"),
        ([("a.jpg", encode(picture(0), "PNG")), ("a.json", b'{"caption": "x"}')], "wrong extension: it holds a PNG"),
        ([("a.png", encode(picture(0), "PNG")), ("a.json", b'{"caption": "x"}')], "only .png"),
        ([("../a.jpg", jpeg(0)), ("../a.json", b'{"caption": "x"}')], "climbs out"),
        ([("/etc/a.jpg", jpeg(0)), ("/etc/a.json", b'{"caption": "x"}')], "climbs out"),
        ([("README", b"hello")], "not named key.extension"),
    ],
)
def test_a_broken_sample_is_set_apart_and_the_next_one_read(tmp_path, members, reason):
    rows, rejected = read(write_tar(tmp_path / "0.tar", [*members, *sample("good", jpeg(1), "good")]))
    assert captions(rows) == ["good"]
    assert [reason in found.reason for found in rejected] == [True], rejected
    assert rejected[0].key
    assert rejected[0].shard == "0.tar"


def test_duplicate_key_keeps_the_first(tmp_path):
    members = [*sample("a", jpeg(0), "first"), *sample("b", jpeg(1), "other"), *sample("a", jpeg(2), "second")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert captions(rows) == ["first", "other"]
    assert [(found.key, "duplicate key" in found.reason) for found in rejected] == [("a", True)]


def test_links_are_refused(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("a.json")
        text.size = 15
        tar.addfile(text, io.BytesIO(b'{"caption":"x"}'))
    rows, rejected = read(path)
    assert rows == []
    assert "link" in rejected[0].reason


def test_member_name_that_is_no_utf8(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.jpg")
        tar.addfile(info)
    _, rejected = read(path)
    assert "UTF-8" in rejected[0].reason
    json.dumps(rejected[0].key).encode("utf-8")


def test_every_cut_of_a_tar_gives_what_lies_before_it(tmp_path):
    whole = write_web_tar(tmp_path / "whole.tar", 0, 3).read_bytes()
    cut = tmp_path / "cut.tar"
    counts = {}
    end = len(whole.rstrip(b"\0"))
    for size in [*range(1, end, 331), *range(512, end, 512)]:
        cut.write_bytes(whole[:size])
        rows, rejected = read(cut)
        counts[size] = len(rows)
        assert captions(rows) == [f"picture number {n}" for n in range(len(rows))]
        assert 1 <= len(rejected) <= 2, "a cut is never silent"
    assert [counts[size] for size in sorted(counts)] == sorted(counts.values())
    assert set(counts.values()) == {0, 1, 2, 3}


def test_cut_inside_a_member_names_its_sample(tmp_path):
    whole = write_web_tar(tmp_path / "whole.tar", 0, 2).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member = tar.getmember("000001.jpg")
    (tmp_path / "cut.tar").write_bytes(whole[: member.offset_data + 100])
    rows, rejected = read(tmp_path / "cut.tar")
    assert captions(rows) == ["picture number 0"]
    assert [(found.key, "cut off" in found.reason) for found in rejected] == [("000001", True)]


def test_damaged_header_loses_its_sample_alone(tmp_path):
    path = write_web_tar(tmp_path / "0.tar", 0, 3)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember("000001.json")
    data[member.offset : member.offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    rows, rejected = read(path)
    assert captions(rows) == ["picture number 0", "picture number 2"]
    assert {found.key for found in rejected} == {"000001", ""}
    assert any("damaged" in found.reason for found in rejected)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"no tar at all " * 100, "no tar")])
def test_file_that_is_no_tar(tmp_path, data, reason):
    (tmp_path / "0.tar").write_bytes(data)
    write_web_tar(tmp_path / "1.tar", 0, 1)
    rows, rejected = read(tmp_path)
    assert len(rows) == 1
    assert [(found.key, found.shard, reason in found.reason) for found in rejected] == [("", "0.tar", True)]


def test_empty_archive_is_no_trouble(tmp_path):
    assert read(write_tar(tmp_path / "0.tar", [])) == ([], [])


def test_compressed_tar_whole_and_cut(tmp_path):
    data = gzip.compress(write_web_tar(tmp_path / "plain/0.tar", 0, 20).read_bytes())
    (tmp_path / "0.tar.gz").write_bytes(data)
    assert len(read(tmp_path / "0.tar.gz")[0]) == 20
    (tmp_path / "0.tar.gz").write_bytes(data[: len(data) // 2])
    rows, rejected = read(tmp_path / "0.tar.gz")
    assert 0 < len(rows) < 20
    assert rejected


def test_webdataset_source_reads_other_formats_and_text_captions(tmp_path):
    members = [("a.png", encode(picture(0), "PNG")), ("a.txt", b"From a .txt")]
    reader, location = locate(
        PrepareDataSettings(source="webdataset", input=str(write_tar(tmp_path / "0.tar", members)))
    )
    rows = [row for unit in reader.reader.plan(location) for row in reader.reader.read(unit)]
    assert captions(rows) == ["from a txt"]


def test_remote_tar_is_read_like_a_local_one(tmp_path):
    import fsspec

    path = write_web_tar(tmp_path / "0.tar", 0, 4)
    memory = fsspec.filesystem("memory")
    memory.pipe("/tars/0.tar", path.read_bytes())
    assert read("memory://tars/*.tar")[0] == read(path)[0]


def test_missing_input_names_the_pattern(tmp_path):
    with pytest.raises(SettingsError, match="matches no file"):
        read(tmp_path / "none" / "*.tar")


def test_unknown_source_offers_a_near_name():
    with pytest.raises(SettingsError, match="did you mean 'refcoco'"):
        locate(PrepareDataSettings(source="refcoko"))
