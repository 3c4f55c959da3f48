"""Tar shards: sound ones, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from pipelines.data.sources import locate
from pipelines.data.sources import tar as tar_module
from pipelines.data.sources.base import Rejected
from pipelines.data.sources.tar_scan import Member, TarScan, _plain_member
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
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": null}')], "has no caption among caption"),
        ([("a.jpg", jpeg(0)), ("a.json", b"{")], "no valid JSON"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": "caf\xe9"}')], "not UTF-8"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"caption": "x"}'), ("a.txt", b"caf\xe9")], "not UTF-8"),
        ([("a.jpg", b""), ("a.json", b'{"caption": "x"}')], "empty (0 bytes)"),
        ([("a.jpg", b"hello"), ("a.json", b'{"caption": "x"}')], "known format"),
        ([("a.jpg", encode(picture(0), "PNG")), ("a.json", b'{"caption": "x"}')], "wrong extension: it holds a PNG"),
        ([("a.png", encode(picture(0), "PNG")), ("a.json", b'{"caption": "x"}')], "only .png"),
        ([("../a.jpg", jpeg(0)), ("../a.json", b'{"caption": "x"}')], "outside of its folder"),
        ([("/etc/a.jpg", jpeg(0)), ("/etc/a.json", b'{"caption": "x"}')], "outside of its folder"),
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


@pytest.mark.security
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
    rows, rejected = read(path, "webdataset")
    assert captions(rows) == ["picture number 0", "picture number 1", "picture number 2"], "the caption is in the .txt"


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


# ---------------------------------------------------------------- hostile and unusual tars


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header block with any bytes as its size."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124 : 124 + len(size)], block[136:148], block[156:157] = size, b"00000000000\0", kind
    block[257:265] = b"ustar  \0"
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def long_name(name: bytes) -> bytes:
    data = name + b"\0"
    return raw_header(b"././@LongLink", f"{len(data):011o}".encode(), b"L") + data.ljust(
        -(-len(data) // 512) * 512, b"\0"
    )


def sound(tmp_path) -> bytes:
    return write_web_tar(tmp_path / "sound.tar", 0, 2).read_bytes().rstrip(b"\0").ljust(10240, b"\0")


# 1,200: more than Python nests calls, as tarfile does for each.
HOSTILE = {
    "negative size": raw_header(b"evil.jpg", b"\xff" * 12),
    "most negative size": raw_header(b"evil.jpg", b"\x80" + b"\0" * 11),
    "negative size of a pax header": raw_header(b"evil.jpg", b"\xff" * 12, b"x"),
    "giant pax header": raw_header(b"evil.jpg", b"77777777777", b"x"),
    "giant long name": raw_header(b"././@LongLink", b"77777777777", b"L"),
    "1,200 long names in a row": long_name(b"a" * 200) * 1200,
    "1,200 pax headers in a row": raw_header(b"p", b"00000000000", b"x") * 1200,
    "pax sizes that lie": raw_header(b"p", f"{20:011o}".encode(), b"x") + b"20 size=-99999999999\n".ljust(512, b"\0"),
}


@pytest.mark.security
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_passed_over_in_bounded_time(tmp_path, name):
    (tmp_path / "0.tar").write_bytes(HOSTILE[name] + sound(tmp_path))
    (tmp_path / "sound.tar").unlink()
    rows, rejected = read(tmp_path / "0.tar")
    # A long name that stands right before the first member is its name: that sample is lost, and no other.
    assert captions(rows)[-1:] == ["picture number 1"]
    assert captions(rows) == ["picture number 0", "picture number 1"] or "long names" in name
    assert rejected or "lie" in name


def test_a_plain_header_is_read_as_tarfile_reads_it():
    info = tarfile.TarInfo("folder/\u00e4.jpg")
    info.size, info.uid, info.mtime = 0o1234567, 1000, 1_700_000_000
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        block = info.tobuf(form, "utf-8", "surrogateescape")[:512]
        member = _plain_member(block, 1024)
        assert member == Member("folder/\u00e4.jpg", 1536, 0o1234567, 1024, is_file=True, is_folder=False)
        scan = TarScan(io.BytesIO(bytes(1024) + block), 1536)
        assert member == scan._member_at(1024)
        for byte in range(512):  # one damaged byte anywhere, and the header is refused or read by tarfile
            damaged = block[:byte] + bytes([block[byte] ^ 1]) + block[byte + 1 :]
            assert _plain_member(damaged, 0) is None


def test_a_header_with_more_than_a_short_name_is_left_to_tarfile():
    prefixed = tarfile.TarInfo("f" * 60 + "/" + "n" * 90)
    large = tarfile.TarInfo("a.jpg")
    large.size = 1 << 40
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    for info, form in ((prefixed, tarfile.USTAR_FORMAT), (large, tarfile.GNU_FORMAT), (folder, tarfile.GNU_FORMAT)):
        assert _plain_member(info.tobuf(form, "utf-8", "surrogateescape")[:512], 0) is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_of_every_format(tmp_path, form):
    keys = ["d" * 40 + "/" + "e" * 60 + "/000", "caf\u00e9/\u4e2d", "x" * 90]
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for n, key in enumerate(keys):
            for name, data in sample(key, jpeg(n), f"text {n}"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows, rejected = read(tmp_path / "0.tar")
    assert [row.id for row in rows] == [f"0/{key}" for key in keys]
    assert not rejected


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar", "0.tar.bz2", "0.tar.xz"])
def test_compressed_tars_are_known_by_their_bytes(tmp_path, name):
    import bz2
    import lzma

    plain = write_web_tar(tmp_path / "plain", 0, 3).read_bytes()
    pack = {"bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], gzip.compress)
    (tmp_path / name).write_bytes(pack(plain))
    (tmp_path / "plain").unlink()
    for given in (tmp_path, tmp_path / name):
        rows, rejected = read(given)
        assert captions(rows) == [f"picture number {n}" for n in range(3)]
        assert not rejected


@pytest.mark.security
def test_a_tar_in_a_bucket_is_found_and_read_whatever_its_name(tmp_path):
    import fsspec

    name = "0.tar?endpoint_override=evil:9000"
    data = write_web_tar(tmp_path / "0.tar", 0, 2).read_bytes()
    fsspec.filesystem("memory").pipe(f"/tar-bucket/{name}", data)
    rows, rejected = read("memory://tar-bucket/*tar*")
    assert captions(rows) == ["picture number 0", "picture number 1"]
    assert not rejected


def test_files_of_operating_systems_are_no_samples(tmp_path):
    good = sample("a", jpeg(0), "a star")
    junk = [
        ("._a.jpg", b"x"),
        ("./._a.json", b"x"),
        (".DS_Store", b"x"),
        ("__MACOSX/._a.jpg", b"x"),
        ("Thumbs.db", b"x"),
    ]
    write_tar(tmp_path / "0.tar", [*junk, *good])
    write_tar(tmp_path / "._0.tar", [("x", b"no tar")])
    rows, rejected = read(tmp_path)
    assert (captions(rows), rejected) == (["a star"], [])


def test_keys_with_dots_are_keys(tmp_path):
    members = [m for key in ("photo.2020.01", "photo.2021.05", "b.c") for m in sample(key, jpeg(len(key)), f"of {key}")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert [row.id for row in rows] == ["0/photo.2020.01", "0/photo.2021.05", "0/b.c"]
    assert not rejected
    more = [*sample("a", jpeg(0), "a star"), ("a.seg.png", encode(picture(1), "PNG")), ("a.cls", b"1")]
    rows, rejected = read(write_tar(tmp_path / "1.tar", more))
    assert ([row.id for row in rows], rejected) == (["1/a"], [])


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({"url": "u"}, "from the text"),
        ({"caption": None}, "from the text"),
        ({"caption": 3}, "from the text"),
        ({"caption": "from json"}, "from json"),
        ({"TEXT": "from json"}, "from json"),
    ],
)
def test_the_first_usable_caption_counts(tmp_path, fields, caption):
    members = [("a.jpg", jpeg(0)), ("a.json", json.dumps(fields).encode()), ("a.txt", b"\xef\xbb\xbffrom the text")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members), "webdataset")
    assert (captions(rows), rejected) == ([caption], [])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"caption": ' + "9" * 5000 + "}"], ids=["depth", "digits"])
def test_json_that_breaks_the_parser_costs_its_sample(tmp_path, text):
    members = [("a.jpg", jpeg(0)), ("a.json", text.encode()), *sample("b", jpeg(1), "next")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert captions(rows) == ["next"]
    assert [found.key for found in rejected] == ["a"]


def test_an_upper_case_member_is_read(tmp_path):
    members = [("A.JPG", jpeg(0)), ("A.JSON", b'{"caption": "loud"}')]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert (captions(rows), rejected) == (["loud"], [])


def test_of_several_captions_in_one_member_the_field_caption_counts(tmp_path):
    for fields, caption in (({"text": "b", "caption": "a"}, "a"), ({"TEXT": "c", "text": "b"}, "b")):
        members = [("k.jpg", jpeg(0)), ("k.json", json.dumps(fields).encode())]
        assert captions(read(write_tar(tmp_path / "0.tar", members))[0]) == [caption]


def test_damage_of_the_compression_is_told_beside_that_of_the_tar(tmp_path):
    whole = gzip.compress(b"\xff" * 1024 + write_web_tar(tmp_path / "plain/0.tar", 0, 20).read_bytes())
    (tmp_path / "0.tar.gz").write_bytes(whole[: len(whole) // 2])
    _, rejected = read(tmp_path / "0.tar.gz")
    told = [found.reason for found in rejected if found.key == ""]
    for reason in ("compressed data is damaged or cut off", "bytes 0 to 1024 hold no readable member"):
        assert any(reason in text for text in told), told


def test_names_may_begin_with_the_folder_itself(tmp_path):
    members = [(f"./{name}", data) for name, data in sample("a/b", jpeg(0), "x")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert ([row.id for row in rows], rejected) == (["0/a/b"], [])


def test_a_text_of_absurd_size_is_no_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "_MOST_TEXT_BYTES", 40)
    members = [*sample("a", jpeg(0), "x" * 30), *sample("b", jpeg(1), "y")]
    rows, rejected = read(write_tar(tmp_path / "0.tar", members))
    assert captions(rows) == ["y"] and "the .json member has" in rejected[0].reason
