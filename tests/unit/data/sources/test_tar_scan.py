"""Where the members of a tar are, and what is told of what cannot be read."""

from __future__ import annotations

import io
import tarfile

import pytest

from pipelines.data.sources import tar_scan
from pipelines.data.sources.tar_scan import TarScan, _number, _pax_records, _plain_member


def scan(data):
    walk = TarScan(io.BytesIO(data), len(data))
    return [(member.name, member.start, member.size) for member in walk.members()], walk.problems


def blocks(*members, form=tarfile.GNU_FORMAT, records=None):
    """Headers and data without an end mark; a size may be told by a pax record."""
    found = b""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = len(data), dict(records or {})
        found += info.tobuf(form) + data + bytes(-len(data) % 512)
    return found


def test_members_lie_behind_one_another_at_whole_blocks():
    data = blocks(("a", b"x" * 512), ("b", b""), ("c", b"x" * 513), ("d", b"x")) + bytes(1024)
    assert scan(data) == ([("a", 512, 512), ("b", 1536, 0), ("c", 2048, 513), ("d", 3584, 1)], [])


def test_a_size_in_a_pax_record_counts():
    header = blocks(("a", b"x" * 600), form=tarfile.PAX_FORMAT, records={"size": "600", "path": "long"})
    plain = header.rfind(b"ustar") - 257  # the member's own header: its size is a lie
    info = tarfile.TarInfo("a")
    info.size = 0
    data = header[:plain] + info.tobuf(tarfile.USTAR_FORMAT) + header[plain + 512 :] + blocks(("b", b"y")) + bytes(1024)
    assert scan(data) == ([("long", plain + 512, 600), ("b", plain + 512 + 1024 + 512, 1)], [])


def test_a_later_record_without_a_size_leaves_the_one_before():
    def pax(records):
        data = b"".join(b"%d %s=%s\n" % (len(k) + len(v) + 5, k, v) for k, v in records.items())  # of two digits
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(data)
        return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(512 - len(data))

    info = tarfile.TarInfo("a")  # its own header says that it is empty
    data = pax({b"size": b"600", b"path": b"first"}) + pax({b"path": b"second"}) + info.tobuf(tarfile.USTAR_FORMAT)
    start = len(data)
    assert scan(data + bytes(1024) + bytes(1024))[0] == [("second", start, 600)]
    swapped = pax({b"path": b"first"}) + pax({b"size": b"600"}) + info.tobuf(tarfile.USTAR_FORMAT)
    assert scan(swapped + bytes(1024) + bytes(1024))[0] == [("first", start, 600)]


def test_the_walk_continues_at_the_next_readable_header():
    good = blocks(("a", b"x" * 10), ("b", b"y"))
    data = good[:1024] + b"\xff" * 512 * 3 + good[1024:] + bytes(1024)
    members, problems = scan(data)
    assert members == [("a", 512, 10), ("b", 3072, 1)]
    assert problems == ["the tar is damaged: bytes 1024 to 2560 hold no readable member"]


def test_what_is_told_of_a_tars_end():
    one = blocks(("a", b"x"))
    assert scan(one + bytes(1024))[1] == []
    assert scan(one)[1] == ["the tar has no end mark, so it may be cut off between two samples"]
    assert scan(one + b"\xff" * 100)[1] == ["the tar is cut off or damaged after byte 1024: nothing readable follows"]
    assert scan(blocks(("a", b"x" * 600))[:-500])[1] == [], "its sample says so"
    assert scan(b"")[1] == ["the tar is empty (0 bytes)"]


def test_links_have_no_data_whatever_they_say():
    info = tarfile.TarInfo("l")
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "a", 700
    members, _ = scan(info.tobuf(tarfile.GNU_FORMAT) + blocks(("b", b"y")) + bytes(1024))
    assert members == [("l", 512, 0), ("b", 1024, 1)]


def test_one_damaged_block_costs_its_member_alone():
    good = blocks(("a", b"x"), ("b", b"y"), ("c", b"z"))
    members, problems = scan(good[:1024] + b"\xff" * 512 + good[1536:] + bytes(1024))
    assert [name for name, _, _ in members] == ["a", "c"]
    assert problems == ["the tar is damaged: bytes 1024 to 2048 hold no readable member"]
    members, problems = scan(good[:1024] + b"\xff" * 512 + good[1024:] + bytes(1024))
    assert [name for name, _, _ in members] == ["a", "b", "c"]
    assert problems == ["the tar is damaged: bytes 1024 to 1536 hold no readable member"]


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("12", 12), ("9" * 19, 10**19 - 1), ("9" * 20, None), ("-1", None), ("\u0663", None)]
)
def test_numbers_are_plain_digits_of_bounded_length(text, number):
    assert _number(text) == number
    assert _number("") is None and _number("1 ") is None


@pytest.mark.parametrize(
    ("data", "records"),
    [
        (b"", {}),
        (b"9 path=a\n", {"path": "a"}),
        (b"9 path=a\n10 size=12\n", {"path": "a", "size": "12"}),
        (b"5 a=\n", {"a": ""}),
        (b"9 path=\xe9\n", {"path": "\udce9"}),
        (b"8 k=a=b\n", {"k": "a=b"}),
        (b"11 path=a\n", {}),  # longer than the data
        (b"9 path=a\n99 size=1\n", {"path": "a"}),
        (b"9 path=a\nx size=1\n", {"path": "a"}),
        (b"9 path=a\n2 \n", {"path": "a"}),
        (b"9 path=a\n3 \n\n", {"path": "a", "": ""}),
        (b"9", {}),
        (b"1" * 30, {}),
    ],
)
def test_a_malformed_record_ends_those_of_a_header(data, records):
    assert _pax_records(data) == records


def header(name="a", size=3, form=tarfile.USTAR_FORMAT, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form)


def resummed(block):
    """A header with its checksum made right again."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def test_only_a_plain_file_with_a_short_name_is_read_the_fast_way():
    found = _plain_member(header("n" * 100), 512)
    assert (found.name, found.start, found.size, found.offset) == ("n" * 100, 1024, 3, 512)
    assert found.is_file and not found.is_folder
    plain = header()
    for block in (
        header(type=tarfile.DIRTYPE),
        header("d/" * 60 + "x", form=tarfile.USTAR_FORMAT),  # its folder is in the prefix
        resummed(b"\0" + plain[1:]),  # no name
        resummed(plain[:329] + b"x" + plain[330:]),  # a device's number that is none
        resummed(plain[:344] + b"x" + plain[345:]),
        plain[:148] + b"000001\0 " + plain[156:],  # a wrong checksum
        plain[:124] + b"\x80" + plain[125:],  # a size in binary
        bytes(512),
    ):
        assert _plain_member(block, 0) is None
    assert _plain_member(resummed(plain[:345] + b"\0" * 155 + plain[500:]), 0) is not None


def test_the_next_header_is_found_in_pieces_of_the_file(monkeypatch):
    monkeypatch.setattr(tar_scan, "_SEARCH_BYTES", 1024)
    old = bytearray(header())
    old[257:265] = bytes(8)  # before POSIX there was no mark
    looks_alike = bytearray(512)
    looks_alike[257:262] = b"ustar"
    for good in (header(), resummed(bytes(old))):
        for before in range(6):
            data = b"\xff" * 512 * before + bytes(looks_alike) + good + b"\xff" * 700
            walk = TarScan(io.BytesIO(data), len(data))
            assert walk._next_header(0) == 512 * (before + 1)
            assert walk._next_header(512 * (before + 2)) is None
    assert TarScan(io.BytesIO(good), 512)._next_header(0) == 0, "the last block"
    assert TarScan(io.BytesIO(good), 512)._next_header(512) is None


def test_what_is_zero_is_looked_at_to_its_end(monkeypatch):
    monkeypatch.setattr(tar_scan, "_SEARCH_BYTES", 100)
    for data, start, zero in (
        (bytes(450), 0, True),
        (bytes(449) + b"x", 0, False),
        (b"x" + bytes(449), 1, True),
        (bytes(250) + b"x" + bytes(199), 0, False),
        (bytes(250) + b"x" + bytes(199), 251, True),
    ):
        assert TarScan(io.BytesIO(data), 450)._is_zero(start, 450 - start) is zero
    short = bytes(200)
    assert TarScan(io.BytesIO(short), 450)._is_zero(0, 450) is True, "the file has shrunk"


def test_a_rest_of_zeros_is_no_damage_and_one_block_is_an_end_mark():
    one = blocks(("a", b"x"))
    assert scan(one + bytes(512))[1] == [] == scan(one + bytes(512) + bytes(100))[1]
    assert scan(one + bytes(100))[1] == ["the tar has no end mark, so it may be cut off between two samples"]
    assert scan(one + bytes(1024) + one)[0] == [("a", 512, 1), ("a", 2560, 1)], "two tars that were joined"
    assert scan(one + bytes(1024) + one)[1] == ["the tar has no end mark, so it may be cut off between two samples"]
    assert scan(bytes(1024)) == ([], [])
    for size in (1, 511, 512, 1024):
        assert scan(b"\xff" * size) == ([], ["the file is no tar, or its first header is damaged"])
    assert scan(bytes(512) + b"\xff" * 1024)[1] == ["the file is no tar, or its first header is damaged"]
    assert scan(blocks(("a", b"x" * 512)))[1] == ["the tar has no end mark, so it may be cut off between two samples"]


def test_headers_that_extend_the_next_are_bounded(monkeypatch):
    monkeypatch.setattr(tar_scan, "_LONGEST_NAME", 600)
    monkeypatch.setattr(tar_scan, "_MOST_EXTENSIONS", 3)

    def long_name(size, name=b"long\0rest"):
        return header("././@LongLink", size, type=tarfile.GNUTYPE_LONGNAME) + name.ljust(-(-size // 512) * 512, b"\0")

    assert scan(long_name(600) + blocks(("b", b"y")) + bytes(1024)) == ([("long", 2048, 1)], [])
    foreign = scan(long_name(9, b"caf\xe9\0") + blocks(("b", b"y")) + bytes(1024))
    assert foreign == ([("caf\udce9", 1536, 1)], [])
    for data in (long_name(601) + blocks(("b", b"y")), long_name(9) * 3 + blocks(("b", b"y"))):
        members, problems = scan(data + bytes(1024))
        assert members[-1][0] in ("b", "long") and "hold no readable member" in problems[0]
    assert scan(long_name(0, b"") + blocks(("b", b"y")) + bytes(1024))[0] == [("b", 1024, 1)]
    cut = long_name(600)[:700]
    assert scan(cut)[0] == [] and "no tar" in scan(cut)[1][0]
    assert scan(long_name(9))[0] == [], "nothing follows"


def test_types_that_are_not_known_have_the_data_that_they_say():
    data = header("v", 600, type=b"V") + bytes(1024) + header("u", 600, type=b"9") + bytes(1024)
    data += blocks(("b", b"y")) + bytes(1024)
    assert scan(data)[0] == [("v", 512, 600), ("u", 2048, 600), ("b", 3584, 1)]
    negative = resummed(header()[:124] + b"\xff" * 12 + header()[136:])
    assert scan(negative + blocks(("b", b"y")) + bytes(1024))[0] == [("b", 1024, 1)]
