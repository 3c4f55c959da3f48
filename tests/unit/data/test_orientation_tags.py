"""Where an orientation stands in Exif and XMP, byte by byte, and which JPEGs certainly have none."""

from __future__ import annotations

import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.source_files import encode
from tinygptv.data.image_orientation import is_plain_jpeg, read_orientation, turn_upright
from tinygptv.data.image_structure import START_OF_SCAN, Segment, check_structure


def exif(*entries, order="<", start=8, head=b"Exif\0\0"):
    """A directory of (tag, kind, number of values, the value's four bytes) at an offset."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    directory = struct.pack(f"{order}H", len(entries)) + body + bytes(4)
    return head + mark + struct.pack(f"{order}I", start) + bytes(start - 8) + directory


def found(info, kind="JPEG"):
    return read_orientation(SimpleNamespace(format=kind, info=info))


OTHER = (0x0110, 2, 4, b"abcd")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("kind", "code"), [(1, "B"), (3, "H"), (4, "I")])
@pytest.mark.parametrize(("before", "start"), [(0, 8), (1, 12), (7, 8)])
@pytest.mark.parametrize("head", [b"Exif\0\0", b""])
def test_the_tag_is_found_in_any_order_type_and_place(order, kind, code, before, start, head):
    value = struct.pack(f"{order}{code}", 5)
    data = exif(*[OTHER] * before, (0x0112, kind, 1, value), OTHER, order=order, start=start, head=head)
    assert found({"exif": data}) == 5


@pytest.mark.parametrize(("value", "orientation"), [(0, 1), (1, 1), (2, 2), (8, 8), (9, 1), (255, 1)])
def test_orientations_are_1_to_8(value, orientation):
    assert found({"exif": exif((0x0112, 1, 1, bytes([value])))}) == orientation


def test_what_is_damaged_or_of_another_form_is_none():
    six = struct.pack("<H", 6)
    for entry in ((0x0112, 3, 2, six), (0x0112, 2, 1, six), (0x0112, 5, 1, six), (0x0113, 3, 1, six)):
        assert found({"exif": exif(entry)}) == 1, "two values, a text, a fraction, another tag"
    assert found({"exif": exif((0x0112, 3, 2, six), (0x0112, 3, 1, six))}) == 6, "the next one counts"
    whole = exif((0x0112, 3, 1, six))
    assert found({"exif": whole[:-4]}) == 6 and found({"exif": whole[: -4 - 4]}) == 1, "cut off before the value"
    assert found({"exif": b""}) == found({"exif": b"Exif\0\0XX"}) == found({}) == 1


def raw_profile(data):
    """As ImageMagick writes Exif into a PNG."""
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return f"\nexif\n{len(data):8}\n{lines}\n"


def test_exif_in_hexadecimal_is_read_where_there_is_no_other():
    six, three = (exif((0x0112, 3, 1, struct.pack("<H", n)), OTHER, OTHER, OTHER) for n in (6, 3))
    assert found({"Raw profile type exif": raw_profile(six)}) == 6
    assert found({"exif": three, "Raw profile type exif": raw_profile(six)}) == 3
    assert found({"Raw profile type exif": "\nexif\n 4\nzz"}) == 1


@pytest.mark.parametrize(
    ("text", "orientation"),
    [
        ('tiff:Orientation="3"', 3),
        ('tiff:Orientation=" 3"', 3),
        ("<tiff:Orientation>8</tiff:Orientation>", 8),
        ("<tiff:Orientation>\n  8</tiff:Orientation>", 8),
        ('tiff:Orientation="0"', 1),
        ('tiff:Orientation="9"', 1),
        ("exif:Orientation>8<", 1),
        ("", 1),
    ],
)
@pytest.mark.parametrize("name", ["xmp", "XML:com.adobe.xmp"])
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_xmp_has_it_as_attribute_or_element(text, orientation, name, kind):
    content = text if kind is str else kind(text.encode())
    assert found({name: content}) == orientation
    assert found({"xmp": b"", "XML:com.adobe.xmp": content}) == orientation, "an empty packet says nothing"


def test_exif_counts_before_xmp_and_a_tiff_is_turned_by_its_decoder():
    xmp = b'tiff:Orientation="3"'
    of = lambda n: exif((0x0112, 3, 1, struct.pack("<H", n)))  # noqa: E731
    assert found({"exif": of(6), "xmp": xmp}) == 6 and found({"exif": of(1), "xmp": xmp}) == 1
    assert found({"exif": of(0), "xmp": xmp}) == found({"exif": b"damaged", "xmp": xmp}) == 3
    assert found({"exif": of(6)}, "TIFF") == found({"xmp": xmp}, "TIFF") == 1
    assert found({"exif": of(6)}, "PNG") == found({"exif": of(6)}, None) == 6


@pytest.mark.parametrize(
    ("orientation", "rows"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
def test_pixels_go_where_the_orientation_says(orientation, rows):
    image = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    image.info["exif"] = exif((0x0112, 3, 1, struct.pack("<H", orientation)))
    turned = turn_upright(image)
    assert np.asarray(turned).tolist() == rows and (turned is image) == (orientation == 1)


# ---------------------------------------------------------------------- JPEGs without a word of it

PLAIN = encode(Image.new("RGB", (8, 8)), "JPEG")


def with_segment(marker, body):
    return PLAIN[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + PLAIN[2:]


def test_a_jpeg_is_plain_without_exif_xmp_and_further_images():
    assert is_plain_jpeg(PLAIN) and is_plain_jpeg(with_segment(0xE2, b"ICC_PROFILE\0"))
    assert is_plain_jpeg(with_segment(0xED, b"MPF\0")), "of another program"
    assert is_plain_jpeg(with_segment(0xE2, b"..MPF\0")) and not is_plain_jpeg(with_segment(0xE2, b"MPF\0.."))
    for body in (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b""):
        assert not is_plain_jpeg(with_segment(0xE1, body))
    scan = next(segment for segment in check_structure(PLAIN) if segment.marker == START_OF_SCAN)
    assert is_plain_jpeg(PLAIN[: scan.end]), "what follows does not matter"
    assert not is_plain_jpeg(PLAIN[: scan.start]), "there is no pixel, so nobody knows"
    assert not is_plain_jpeg(PLAIN[1:]) and not is_plain_jpeg(b"\xff" + PLAIN) and not is_plain_jpeg(b"")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    assert not is_plain_jpeg(stream.getvalue())


def test_segments_that_were_found_before_are_not_looked_for_again():
    assert not is_plain_jpeg(PLAIN, [Segment(0xE1, 2, 4), Segment(START_OF_SCAN, 4, 6)])
    assert not is_plain_jpeg(PLAIN, [])
    assert is_plain_jpeg(with_segment(0xE1, b"Exif\0\0"), [Segment(START_OF_SCAN, 2, 4)])
