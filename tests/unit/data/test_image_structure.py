"""Images that are cheap to send and dear to decode, and JPEGs that lack their last bytes."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.serving_model import make_image
from tests.source_files import encode
from tinygptv.data import image_structure, truncated_jpeg
from tinygptv.data.conversation import ChatImage
from tinygptv.data.image_structure import MAX_JPEG_SCANS, MAX_PNG_CHUNKS, START_OF_SCAN, check_structure, jpeg_segments
from tinygptv.data.images import open_image
from tinygptv.data.truncated_jpeg import _pixels, complete_jpeg

pytestmark = pytest.mark.security


PHOTO = Image.effect_mandelbrot((320, 240), (-2, -1.5, 1, 1.5), 60).convert("RGB")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8))


def with_scans(count):
    """A progressive JPEG whose last scan is repeated."""
    data = encode(PHOTO, progressive=True)
    *_, last = [segment for segment in jpeg_segments(data) if segment.marker == START_OF_SCAN]
    have = sum(segment.marker == START_OF_SCAN for segment in jpeg_segments(data))
    return data[:-2] + data[last.start : -2] * (count - have) + data[-2:]


def test_scans_are_counted():
    assert sum(segment.marker == START_OF_SCAN for segment in jpeg_segments(with_scans(40))) == 40
    check_structure(with_scans(MAX_JPEG_SCANS))
    with pytest.raises(ValueError, match="more than 100 scans"):
        check_structure(with_scans(MAX_JPEG_SCANS + 1))
    with pytest.raises(ValueError, match="scans"):
        open_image(with_scans(MAX_JPEG_SCANS + 1))


def test_counting_very_many_scans_is_cheap():
    scan = bytes([0xFF, 0xDA, 0, 12, 3, 1, 0x11, 2, 0x11, 3, 0x11, 0, 0, 0])
    bomb = encode(PHOTO, progressive=True)[:-2] + scan * 250_000
    started = time.process_time()
    with pytest.raises(ValueError, match="scans"):
        check_structure(bomb)
    with pytest.raises(ValueError, match="segments"):
        check_structure(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000)
    check_structure(b"\xff\xd8" + b"\xff" * 10_000_000)
    assert time.process_time() - started < 10


def scan_of(*components):
    """A scan's header with no pixels behind it."""
    body = bytes([len(components), *(byte for component in components for byte in (component, 0)), 0, 63, 0])
    return b"\xff\xda" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("progressive", [False, True])
def test_segments_up_to_the_first_scan_are_given_to_who_needs_them(progressive):
    data = encode(PHOTO, progressive=progressive)
    segments = list(jpeg_segments(data))
    first = next(number for number, segment in enumerate(segments) if segment.marker == START_OF_SCAN)
    assert check_structure(data) == segments[: first + 1]
    assert check_structure(data[: segments[first].start]) == segments[:first]
    assert check_structure(encode(PHOTO, "PNG")) == []


def test_scans_of_a_sequential_jpeg_count_where_the_first_one_lacks_components():
    data = encode(PHOTO)
    header = data[: next(segment.start for segment in jpeg_segments(data) if segment.marker == START_OF_SCAN)]
    check_structure(header + scan_of(1) + scan_of(2) * (MAX_JPEG_SCANS - 1))
    with pytest.raises(ValueError, match="scans"):
        check_structure(header + scan_of(1) + scan_of(2) * MAX_JPEG_SCANS)
    with pytest.raises(ValueError, match="scans"):  # a second frame: which one counts is the decoder's choice
        check_structure(header + encode(PHOTO, progressive=True)[2:-2] + scan_of(1, 2, 3) * MAX_JPEG_SCANS)


@pytest.mark.parametrize("image", [PHOTO, PHOTO.convert("L")], ids=["colours", "grey"])
def test_a_decoder_refuses_scans_behind_one_that_has_the_whole_image(image):
    data = encode(image)
    scan = scan_of(1) if image.mode == "L" else scan_of(1, 2, 3)
    bomb = data[:-2] + scan * 250_000 + data[-2:]
    started = time.process_time()
    check_structure(bomb)
    with pytest.raises(ValueError, match="broken data stream"):
        open_image(bomb)
    with pytest.raises(ValueError, match="more than one scan"):
        simplejpeg.decode_jpeg(bomb)
    assert time.process_time() - started < 10


def test_segments_are_found_behind_fill_bytes_and_restart_marks():
    data = encode(PHOTO)
    markers = [segment.marker for segment in jpeg_segments(data)]
    scan = next(segment for segment in jpeg_segments(data) if segment.marker == START_OF_SCAN)
    padded = data[:2] + b"\xff" * 5 + data[2 : scan.start] + b"\xff\xd0\xff\x01" + data[scan.start :]
    assert [segment.marker for segment in jpeg_segments(padded)] == markers
    (cut,) = jpeg_segments(b"\xff\xd8\xff\xe0\x00")
    assert cut.start == 2 and cut.end > 5


def test_scans_of_an_embedded_thumbnail_do_not_count():
    thumbnail = with_scans(80)[:65_000]
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = encode(PHOTO, progressive=True)
    check_structure(data[:2] + segment * 3 + data[2:])


def test_chunks_of_a_png_are_counted():
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    data = encode(PHOTO, "PNG")
    check_structure(data[:33] + empty * 1000 + data[33:])
    with pytest.raises(ValueError, match="chunks"):
        check_structure(data[:33] + empty * MAX_PNG_CHUNKS + data[33:])


@pytest.mark.parametrize("end", [b"\x2c", b"\x3b"], ids=["frame", "end of the file"])
def test_what_follows_a_gifs_first_frame_is_not_counted(end):
    check_structure(b"GIF89a" + bytes(7) + b"\x21\xf9\x01x\x00" * 3 + end + bytes(1_000_000))
    with pytest.raises(ValueError, match="blocks before its first frame"):
        check_structure(b"GIF89a" + bytes(7) + bytes(1_000_000) + end)


@pytest.mark.parametrize("table", [0, 7], ids=["no color table", "256 colors"])
def test_as_many_parts_as_are_allowed_are_taken_and_no_more(monkeypatch, table):
    """Of a GIF blocks, of a PNG chunks, of a TIFF tags; whatever stands before them."""
    for name in ("MAX_GIF_BLOCKS", "MAX_PNG_CHUNKS", "MAX_TIFF_TAGS"):
        monkeypatch.setattr(image_structure, name, 5)
    colours = bytes([0x2C] * 3 * 256) if table else b""
    start = b"GIF89a" + bytes(4) + bytes([0x80 + table if table else 0]) + bytes(2) + colours
    comment = b"\x21\xfe" + b"\x01x" * 2 + b"\x00"  # an extension and two sub-blocks: three in all
    for blocks in (comment + bytes(2), bytes(5), b"\x21\xfe" + b"\x01,\x01,\x01,\x01,\x00"):
        check_structure(start + blocks)
        with pytest.raises(ValueError, match=r"^a GIF with more than 5 blocks before its first frame is not decoded"):
            check_structure(start + blocks + b"\x00")
    chunk = struct.pack(">I", 3) + b"prVt" + bytes(7)
    png = b"\x89PNG\r\n\x1a\n"
    check_structure(png + chunk * 4 + struct.pack(">I", 0) + b"IEND" + bytes(4))
    check_structure(png + chunk * 4 + chunk[:7])
    with pytest.raises(ValueError, match=r"^a PNG with more than 5 chunks is not decoded"):
        check_structure(png + chunk * 5 + struct.pack(">I", 0) + b"IEND" + bytes(4))
    for order, mark in ((">", b"MM\x00*"), ("<", b"II*\x00")):
        for count, offset in ((5, 8), (5, 11), (6, 8), (6, 11)):
            data = mark + struct.pack(f"{order}I", offset) + bytes(offset - 8) + struct.pack(f"{order}H", count)
            if count == 5:
                check_structure(data)
                continue
            with pytest.raises(ValueError, match=r"^a TIFF with more than 5 tags is not decoded"):
                check_structure(data)
            check_structure(data[:-1])  # the number itself is cut off: others say so


@pytest.mark.parametrize(("kind", "size"), [*zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True)])
@pytest.mark.parametrize("order", "<>")
def test_the_tags_of_a_tiff_refer_to_four_times_the_file_at_most(kind, size, order):
    def tiff(*values):
        mark = b"II*\0" if order == "<" else b"MM\0*"
        entries = b"".join(struct.pack(f"{order}HHII", 256, kind, number, 0) for number in values)
        return mark + struct.pack(f"{order}IH", 8, len(values)) + entries

    most = 4 * (10 + 2 * 12)  # bytes that two tags at the end of such a file may refer to
    check_structure(tiff(1, most // size - 1))
    with pytest.raises(ValueError, match=r"^a TIFF whose tags refer to more data than the file has is not decoded\.$"):
        check_structure(tiff(1, most // size))
    check_structure(tiff(1, most // size)[:-1])  # the second is cut off


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_ordinary_images_pass(kind):
    check_structure(make_image(kind=kind))
    check_structure(make_image(kind=kind)[:50])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("image", [PHOTO, NOISE], ids=["smooth", "noisy"])
@pytest.mark.parametrize("lacking", [1, 2, 3, 50, 200])
def test_a_jpeg_that_lacks_its_last_bytes_is_taken(image, progressive, lacking):
    data = encode(image, progressive=progressive, quality=90)
    whole, cut = ChatImage.from_bytes(data, 64), ChatImage.from_bytes(data[:-lacking], 64)
    assert (cut.width, cut.height) == (320, 240)
    difference = np.abs(whole.pixels.astype(int) - cut.pixels).mean()
    assert difference < 12


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("rows", [0, 2, 3, 40])
def test_rows_that_the_file_does_not_decide_are_missing(monkeypatch, sign, progressive, rows):
    """Brighter or darker with noise than without; at most a fiftieth of them is taken."""
    data, given = encode(PHOTO, progressive=progressive)[:-2], []

    def pixels(jpeg):
        given.append(jpeg)
        image = np.zeros((100, 8, 3), dtype=np.float32)
        if len(given) == 2 and rows:
            image[-rows] = 90 * sign  # those below a row that differs are missing, too, but not their details
            image[-rows + 1 :] = 90 * sign if progressive and rows > 1 else 0
        return image

    monkeypatch.setattr(truncated_jpeg, "MAX_MISSING", 0.02)
    monkeypatch.setattr(truncated_jpeg, "_pixels", pixels)
    if rows > 2:
        with pytest.raises(ValueError, match=rf"^the JPEG is cut off: {rows}% of its rows are missing\.$"):
            complete_jpeg(data)
    else:
        assert complete_jpeg(data) == data + b"\xff\xd9"
    assert given[0] == data + b"\xff\xd9" and given[1].startswith(data) and given[1].endswith(b"\xff\xd9")
    assert len(given[1]) > 2 * len(data)


@pytest.mark.parametrize(("progressive", "least"), [(False, 1.0), (True, 16.0)])
@pytest.mark.parametrize("beyond", [False, True])
def test_a_row_is_missing_from_so_large_a_difference_on(monkeypatch, progressive, least, beyond):
    """On average over its columns and colours, and up to a fifth of the rows may be."""
    data = encode(PHOTO, progressive=progressive)[:-2]
    images = []

    def pixels(jpeg):
        image = np.zeros((50, 4, 2), dtype=np.float32)
        images.append(image)
        image[39 if beyond else 40 :, ::2, 0] = (4 * least + 0.25) * (len(images) == 1)  # a quarter of each row
        image[20:39, :, :] = least * (len(images) == 2)  # not beyond it
        return image

    monkeypatch.setattr(truncated_jpeg, "_pixels", pixels)
    if beyond:
        with pytest.raises(ValueError, match=r"^the JPEG is cut off: 22% of its rows are missing\.$"):
            complete_jpeg(data)
    else:
        assert complete_jpeg(data) == data + b"\xff\xd9"


@pytest.mark.parametrize("cut", [1, 2, 5, 0])
def test_a_header_that_is_cut_off_and_half_a_mark_are_left_out(monkeypatch, cut):
    given = []
    monkeypatch.setattr(truncated_jpeg, "_pixels", lambda jpeg: given.append(jpeg) or np.zeros((2, 2, 3), np.float32))
    data = encode(PHOTO)[:-2]
    segment = b"\xff\xe5\x00\x06abcd"
    expected = data if cut else data + segment
    assert complete_jpeg(data + segment[: len(segment) - cut] + (b"" if cut else b"\xff")) == expected + b"\xff\xd9"
    assert given[0] == expected + b"\xff\xd9" and given[1].startswith(expected)
    noise = given[1][len(expected) : -2]
    assert len(noise) >= len(expected) and b"\xff" not in noise and len(set(noise[:4096])) == 255


def test_what_is_missing_is_looked_for_in_a_small_copy_with_all_its_colours():
    large = Image.new("RGB", (1024, 600), "red")
    assert _pixels(encode(large)).shape == (300, 512, 3), "half of it: the smaller side stays above 256"
    assert _pixels(encode(large.convert("L"))).shape == (300, 512)
    assert _pixels(encode(large)).dtype == np.float32, "differences may be negative"
    with pytest.raises(ValueError, match=r"^the JPEG is damaged: "):
        _pixels(encode(large)[:100])


@pytest.mark.parametrize("image", [PHOTO, NOISE, Image.new("RGB", (320, 240), "red")], ids=["smooth", "noisy", "flat"])
def test_a_jpeg_that_lacks_rows_is_refused(image):
    data = encode(image, quality=90)
    header = [segment.end for segment in jpeg_segments(data)][-1]
    for kept in (0.75, 0.5, 0.1):
        with pytest.raises(ValueError, match="cut off"):
            complete_jpeg(data[: header + int(kept * (len(data) - header))])
        with pytest.raises(ValueError, match="truncated"):
            ChatImage.from_bytes(data[: header + int(kept * (len(data) - header))], 64)


@pytest.mark.parametrize("level", [0, 40, 215, 255])
def test_missing_rows_are_found_in_dark_and_in_light_images(level):
    """What the decoder fills in may be darker or lighter than what might have followed."""
    noise = np.random.default_rng(0).integers(-40, 41, size=(240, 320, 3))
    data = encode(Image.fromarray(np.clip(level + noise, 0, 255).astype(np.uint8)))
    scan = [segment.end for segment in jpeg_segments(data)][-1]
    with pytest.raises(ValueError, match=r"cut off: \d+% of its rows are missing"):
        complete_jpeg(data[: scan + (len(data) - scan) // 20])


def test_a_jpeg_that_ends_with_its_header_lacks_all_rows():
    data = encode(PHOTO)
    with pytest.raises(ValueError, match="100% of its rows"):
        complete_jpeg(data[: [segment.end for segment in jpeg_segments(data)][-1]])


@pytest.mark.parametrize("at", [3, 20, 200])
def test_a_jpeg_that_ends_in_its_header_is_refused(at):
    with pytest.raises(ValueError, match="damaged"):
        complete_jpeg(encode(PHOTO)[:at])
    with pytest.raises(ValueError):
        ChatImage.from_bytes(encode(PHOTO)[:at], 64)


def test_other_formats_are_not_completed():
    with pytest.raises(ValueError, match="not a JPEG"):
        complete_jpeg(encode(PHOTO, "PNG")[:-20])
