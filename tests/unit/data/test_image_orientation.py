"""Images whose structure would make a decoder work for minutes, and which way up an image is."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.data.ingest.check_images import check_image
from pipelines.data.sources.base import Malformed
from pipelines.settings import PrepareDataSettings
from tests.source_files import encode, jpeg, picture, png_chunk
from tinygptv.data.image_orientation import is_plain_jpeg, read_orientation, turn_upright
from tinygptv.data.image_structure import MAX_JPEG_SCANS, check_structure
from tinygptv.data.images import open_image, to_rgb


def with_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(picture(0), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (number - data.count(b"\xff\xda")) + b"\xff\xd9"


def png(*more: bytes) -> bytes:
    data = encode(picture(0), "PNG")
    end = data.index(b"IDAT") - 4
    return data[:end] + b"".join(more) + data[end:]


def tiff(count: int, values: int, order: str = "<") -> bytes:
    entries = b"".join(struct.pack(f"{order}HHII", 30_000 + n % 1000, 7, values, 8) for n in range(count))
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IH", 8, count) + entries + bytes(4)


HOSTILE = {
    "scans": lambda: with_scans(250_000),
    "one scan too many": lambda: with_scans(MAX_JPEG_SCANS + 1),
    "markers": lambda: b"\xff\xd8" + b"\xff\xe5\x00\x02" * 200_000 + jpeg(0)[2:],
    "scans behind garbage": lambda: b"\xff\xd8garbage" + with_scans(120)[2:],
    "scans with fill bytes": lambda: with_scans(120).replace(b"\xff\xda", b"\xff\xff\xff\xda"),
    "empty PNG chunks": lambda: png(png_chunk(b"teXt") * 300_000),
    "empty pixels": lambda: png(png_chunk(b"IDAT") * 300_000),
    "GIF comments": lambda: b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01x" * 500_000 + b"\0",
    "GIF extensions": lambda: b"GIF89a" + bytes(7) + b"\x21\xf9\x00" * 500_000,
    "bytes between GIF blocks": lambda: b"GIF89a" + bytes(7) + bytes(1_000_000),
    "TIFF tags": lambda: tiff(60_000, 1),
    "TIFF tags that share megabytes": lambda: tiff(1000, 1_000_000),
    "big-endian TIFF tags": lambda: tiff(60_000, 1, ">"),
    "big-endian TIFF tags that share megabytes": lambda: tiff(1000, 1_000_000, ">"),
    "BigTIFF": lambda: b"II+\0" + bytes(100),
    "big-endian BigTIFF": lambda: b"MM\0+" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures_are_refused_at_once(name):
    data = HOSTILE[name]()
    started = time.process_time()
    with pytest.raises(ValueError, match=r"more than|more data|BigTIFF"):
        check_structure(data)
    with pytest.raises(ValueError, match="cannot decode"):
        open_image(data)
    with pytest.raises(Malformed, match="cannot decode image"):
        check_image(data, PrepareDataSettings())
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "data",
    [
        jpeg(0),
        jpeg(0, progressive=True),
        with_scans(MAX_JPEG_SCANS),
        encode(picture(0), "PNG"),
        png(png_chunk(b"tEXt", b"a\0b") * 100),
        encode(picture(0), "GIF", save_all=True, append_images=[picture(n) for n in range(1, 9)]),
        encode(picture(0), "TIFF"),
        encode(picture(0), "WEBP"),
        encode(picture(0), "BMP"),
    ],
)
def test_real_images_pass(data):
    segments = check_structure(data)
    assert open_image(data).size == (48, 32)
    assert is_plain_jpeg(data, segments) == is_plain_jpeg(data) == data.startswith(b"\xff\xd8")


# ---------------------------------------------------------------- which way up

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
)


def exif(orientation, order="II", kind=3) -> bytes:
    mark = {"II": "<", "MM": ">"}[order]
    value = struct.pack(f"{mark}H", orientation).ljust(4, b"\0") if kind == 3 else struct.pack(f"{mark}I", orientation)
    head = order.encode() + struct.pack(f"{mark}HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(f"{mark}HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def segment(body: bytes, marker: int = 0xE1, fill: int = 1) -> bytes:
    return b"\xff" * fill + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


PLAIN = encode(picture(0, (60, 40)))


def turned(*segments: bytes) -> bytes:
    return PLAIN[:2] + b"".join(segments) + PLAIN[2:]


def xmp(orientation: int) -> bytes:
    return b"http://ns.adobe.com/xap/1.0/\0" + XMP % orientation


TURNED = {
    "Exif": turned(segment(exif(6))),
    "Exif, big-endian": turned(segment(exif(6, "MM"))),
    "Exif, long": turned(segment(exif(6, kind=4))),
    "Exif behind fill bytes": turned(segment(exif(6), fill=4)),
    "Exif behind other segments": turned(segment(b"x" * 50, 0xED), segment(exif(6))),
    "Exif behind a segment that looks like pixels": turned(segment(b"\xff\xda" * 9, 0xED), segment(exif(6))),
    "XMP": turned(segment(xmp(6))),
    "Exif wins over XMP": turned(segment(exif(6)), segment(xmp(3))),
    "XMP where Exif says nothing": turned(segment(exif(6)[:16] + bytes(6)), segment(xmp(6))),
}


@pytest.mark.parametrize("name", TURNED)
def test_ingest_and_loader_agree_which_way_up_an_image_is(name):
    data = TURNED[name]
    assert not is_plain_jpeg(data) and not is_plain_jpeg(data, check_structure(data))
    checked = check_image(data, PrepareDataSettings())
    assert (checked.width, checked.height) == open_image(checked.data).size == open_image(data).size == (40, 60)


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        turned(segment(exif(1))),
        turned(segment(exif(9))),
        turned(segment(exif(0))),
        turned(segment(b"Exif\0\0II*\0\xff\xff\xff\xff")),
        turned(segment(b"Exif\0\0XX")),
        turned(segment(exif(1)), segment(xmp(6))),
    ],
)
def test_upright_images_keep_their_bytes(data):
    checked = check_image(data, PrepareDataSettings())
    assert checked.kept
    assert (checked.width, checked.height) == open_image(checked.data).size == (60, 40)


@pytest.mark.parametrize("orientation", range(9))
def test_each_orientation_is_pils(orientation):
    image = Image.open(io.BytesIO(turned(segment(exif(orientation)))))
    assert read_orientation(image) == (orientation or 1)
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(turn_upright(image)), expected)
    assert np.array_equal(np.asarray(open_image(turned(segment(exif(orientation))))), expected)
    by_xmp = Image.open(io.BytesIO(turned(segment(xmp(orientation)))))
    assert read_orientation(by_xmp) == (orientation or 1)


def test_a_flood_of_tags_costs_nothing():
    entries = struct.pack("<HHII", 0x9000, 7, 60_000, 8) * 5400
    data = turned(segment(b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5400) + entries))
    started = time.process_time()
    assert check_image(data, PrepareDataSettings()).kept
    assert time.process_time() - started < 10


# ---------------------------------------------------------------- more than 8 bits


def twelve_bit_tiff(values) -> bytes:
    """One row of grey values of 12 bits, as scanners write them."""
    bits = "".join(f"{value:012b}" for value in values)
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + body + bytes(4)


def test_the_depth_that_a_file_declares_is_its_range():
    assert np.asarray(open_image(twelve_bit_tiff([0, 4095, 2048, 1024])))[0, :, 0].tolist() == [0, 255, 128, 64]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535, 32768]], dtype=np.uint16), [0, 255, 128]),
        (np.array([[0.0, 1.0, 0.5]], dtype=np.float32), [0, 255, 128]),
        (np.array([[0.0, 255.0, 100.0]], dtype=np.float32), [0, 255, 100]),
        (np.array([[0, 70, 255]], dtype=np.int32), [0, 70, 255]),
    ],
)
def test_ingest_scales_deep_images_as_the_loader_does(values, expected):
    buffer = io.BytesIO()
    Image.fromarray(values.repeat(8, 0).repeat(8, 1)).save(buffer, "TIFF")
    checked = check_image(buffer.getvalue(), PrepareDataSettings())
    assert np.asarray(open_image(checked.data))[0, ::8, 0].tolist() == pytest.approx(expected, abs=3)
    assert np.asarray(open_image(buffer.getvalue()))[0, ::8, 0].tolist() == expected


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e9])
def test_numbers_that_are_no_brightness_are_refused(value):
    image = Image.fromarray(np.array([[0.0, value]], dtype=np.float32))
    with pytest.raises(ValueError, match="values from"):
        to_rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    with pytest.raises(Malformed, match="values from"):
        check_image(buffer.getvalue(), PrepareDataSettings(min_side=1))
