"""Images that are cheap to send and dear to decode, and JPEGs that lack their last bytes."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.serving_model import make_image
from tests.source_files import encode
from tinygptv.data.conversation import ChatImage
from tinygptv.data.image_structure import MAX_JPEG_SCANS, MAX_PNG_CHUNKS, START_OF_SCAN, check_structure, jpeg_segments
from tinygptv.data.images import open_image
from tinygptv.data.truncated_jpeg import complete_jpeg

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
    assert time.process_time() - started < 1


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


@pytest.mark.parametrize("image", [PHOTO, NOISE, Image.new("RGB", (320, 240), "red")], ids=["smooth", "noisy", "flat"])
def test_a_jpeg_that_lacks_rows_is_refused(image):
    data = encode(image, quality=90)
    header = [segment.end for segment in jpeg_segments(data)][-1]
    for kept in (0.75, 0.5, 0.1):
        with pytest.raises(ValueError, match="cut off"):
            complete_jpeg(data[: header + int(kept * (len(data) - header))])
        with pytest.raises(ValueError, match="truncated"):
            ChatImage.from_bytes(data[: header + int(kept * (len(data) - header))], 64)


@pytest.mark.parametrize("at", [3, 20, 200])
def test_a_jpeg_that_ends_in_its_header_is_refused(at):
    with pytest.raises(ValueError, match="damaged"):
        complete_jpeg(encode(PHOTO)[:at])
    with pytest.raises(ValueError):
        ChatImage.from_bytes(encode(PHOTO)[:at], 64)


def test_other_formats_are_not_completed():
    with pytest.raises(ValueError, match="not a JPEG"):
        complete_jpeg(encode(PHOTO, "PNG")[:-20])
