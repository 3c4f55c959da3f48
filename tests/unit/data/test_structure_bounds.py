"""The structure of encoded images, byte by byte: which segments there are, and both sides of each bound."""

from __future__ import annotations

import struct

import pytest

from tinygptv.data.image_structure import START_OF_SCAN, Segment, check_structure, jpeg_segments

pytestmark = pytest.mark.security


def segment(marker, body=b"", length=None):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2 if length is None else length) + body


def frame(marker, components=3):
    return segment(marker, bytes([8, 0, 9, 0, 9, components]) + bytes(3 * components))


def scan(components=3):
    return segment(START_OF_SCAN, bytes([components]) + bytes(2 * components) + bytes([0, 63, 0]))


def found(data):
    return [tuple(each) for each in jpeg_segments(data)]


def refused(data):
    with pytest.raises(ValueError) as caught:
        check_structure(data)
    return str(caught.value)


START, END = b"\xff\xd8", b"\xff\xd9"


def test_segments_are_given_with_their_place():
    data = START + segment(0xE0, b"abc") + segment(0xFE, b"") + b"\xff\xff" + segment(0xDB, b"\xff\xda") + END
    assert found(data) == [(0xE0, 2, 9), (0xFE, 9, 13), (0xDB, 15, 21)]
    assert found(data[:-2]) == found(data) == found(data + segment(0xE1)), "up to the end of the image"
    assert found(START) == found(b"") == []


def test_pixels_between_segments_hold_none():
    pixels = b"\x12\xff\x00\xff\xd0\xff\xd7\xff\x01\xff\xd8\x34"
    data = START + scan() + pixels + segment(0xC4, b"x") + scan(1) + END
    second = 2 + len(scan()) + len(pixels)
    assert found(data) == [
        (START_OF_SCAN, 2, 2 + len(scan())),
        (0xC4, second, second + 5),
        (START_OF_SCAN, second + 5, second + 5 + len(scan(1))),
    ]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_length_below_its_own_two_bytes_is_two(length):
    """Else a search would stand still or find segments within the length."""
    assert found(START + segment(0xE5, length=length) + segment(0xE6)) == [(0xE5, 2, 6), (0xE6, 6, 10)]


def test_what_is_cut_off_lies_beyond_the_file():
    data = START + segment(0xE1, b"abcdef")
    assert found(data[:-1]) == [(0xE1, 2, 12)] and found(data[:5])[0][:2] == (0xE1, 2)
    for cut in (4, 5):
        assert found(data[:cut])[0][2] > cut, "not even its length is there"
    assert found(START + segment(0xE1, length=0x0102)) == [(0xE1, 2, 2 + 2 + 0x0102)], "the high byte comes first"


def test_the_head_ends_with_the_first_scan():
    data = START + segment(0xE0) + frame(0xC2) + scan(1) + segment(0xC4) + scan(2) + END
    assert check_structure(data) == [Segment(*each) for each in found(data)[:3]]


@pytest.mark.parametrize("marker", [0xC4, 0xC8, 0xCC, 0xE0, 0xDB])
@pytest.mark.parametrize("sequential", [0xC0, 0xC1])
def test_scans_behind_one_with_the_whole_image_do_not_count(marker, sequential):
    check_structure(START + frame(sequential) + segment(marker, bytes(6) + b"\x02") + scan() + scan(1) * 200)


@pytest.mark.parametrize("marker", sorted({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}))
def test_a_second_frame_makes_them_count(marker):
    told = "a JPEG with more than 100 scans is not decoded."
    assert refused(START + frame(0xC0) + frame(marker) + scan() + scan(1) * 100) == told
    if marker not in (0xC0, 0xC1):
        assert refused(START + frame(marker) + scan() + scan(1) * 100) == told


def test_scans_count_where_the_first_is_no_whole_image():
    told = "a JPEG with more than 100 scans is not decoded."
    for start in (frame(0xC0, 4) + scan(3), frame(0xC0, 1) + scan(3), scan(3)):
        assert refused(START + start + scan(1) * 100) == told
    check_structure(START + frame(0xC2) + scan(1) * 100)
    assert refused(START + frame(0xC2) + scan(1) * 101) == told
    check_structure(START + frame(0xC2) + scan(1) * 100 + END + scan(1) * 100)
    cut = START + frame(0xC0) + scan()
    assert check_structure(cut)[-1] == check_structure(cut[:-1])[-1], "cut off in its header"


def test_so_many_segments_may_stand_before_the_pixels():
    check_structure(START + segment(0xE5) * 5000)
    assert refused(START + segment(0xE5) * 5001) == "a JPEG with more than 5000 segments is not decoded."
    check_structure(START + segment(0xE5) * 4000 + frame(0xC0) + scan() + segment(0xE5) * 5000)


def png(chunks, end=True):
    chunk = struct.pack(">I", 0) + b"prVt" + bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk * chunks + (struct.pack(">I", 0) + b"IEND" + bytes(4) if end else b"")


def test_so_many_chunks_may_a_png_have():
    check_structure(png(49_999))
    assert (
        refused(png(50_000)) == refused(png(50_000, end=False)) == ("a PNG with more than 50000 chunks is not decoded.")
    )
    check_structure(png(49_999, end=False))
    long = struct.pack(">I", 0x01000000) + b"IDAT"
    check_structure(png(10, end=False) + long + png(60_000)), "the length is high byte first, and jumped over"


@pytest.mark.parametrize(("version", "flags"), [(b"GIF87a", 0), (b"GIF89a", 7), (b"GIF89a", 0x80), (b"GIF87a", 0x87)])
def test_so_many_blocks_may_stand_before_a_gifs_first_frame(version, flags):
    table = bytes([0x3B]) * (3 << ((flags & 7) + 1)) if flags & 0x80 else b""
    start = version + bytes(4) + bytes([flags]) + bytes(2) + table
    comment = b"\x21\xfe" + b"\x01\x2c" * 24_999 + b"\0"  # the extension and its parts, which look like a frame
    check_structure(start + comment * 2)
    told = "a GIF with more than 50000 blocks before its first frame is not decoded."
    assert refused(start + comment * 2 + b"\0") == refused(start + b"\0" * 50_001) == told
    check_structure(start + b"\0" * 49_999 + b"\x2c" + b"\0" * 50_001)
    check_structure(start + b"\x3b" + b"\0" * 50_001)


@pytest.mark.parametrize("order", "<>")
def test_so_many_tags_may_a_tiff_have(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = lambda count: mark + struct.pack(f"{order}IH", 8, count)  # noqa: E731
    check_structure(head(2000) + bytes(12 * 2000))
    assert refused(head(2001)) == "a TIFF with more than 2000 tags is not decoded."
    for cut in range(10):
        check_structure(head(2001)[:cut])
    unknown = struct.pack(f"{order}HHII", 256, 99, 1 << 31, 0)
    check_structure(head(1) + unknown), "of a type that nobody knows, nothing is read"


@pytest.mark.parametrize("mark", [b"II+\0", b"MM\0+"])
def test_a_bigtiff_is_refused_and_other_formats_pass(mark):
    assert refused(mark + bytes(9)) == "a BigTIFF is not decoded: convert it to JPEG or PNG."
    for data in (b"", b"RIFF....WEBP", b"BM", b"\xff\xd9", b"II+", mark[::-1], b"GIF7" + bytes(60_000)):
        assert check_structure(data) == []
