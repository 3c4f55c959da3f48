"""Which way up an image is: Exif's orientation, else XMP's. Ingest and loader both ask here, so that boxes agree."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

from PIL import ExifTags, Image

from tinygptv.data.image_structure import START_OF_SCAN, Segment, jpeg_segments

_APP1, _APP2 = 0xE1, 0xE2
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)\s*([1-8])")


def is_plain_jpeg(data: bytes, segments: Iterable[Segment] | None = None) -> bool:
    """Whether a JPEG has neither Exif nor XMP nor further images before its pixels: it is certainly upright.

    Args:
        data: an encoded image.
        segments: what ``check_structure`` gave for it; None searches again.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    for segment in jpeg_segments(data) if segments is None else segments:
        marker = segment.marker
        if marker == START_OF_SCAN:
            return True
        if marker == _APP1 or (marker == _APP2 and data.startswith(b"MPF\0", segment.start + 4)):
            return False
    return False


def read_orientation(image: Image.Image) -> int:
    """Orientation of an opened image, 1 (upright) to 8: Exif's, else XMP's; 1 where there is none or it is damaged.

    Reads the one tag alone: a parser of all of them can be made to work for hours. PIL turns a TIFF itself.
    """
    if image.format == "TIFF":
        return 1
    for read in (_exif_orientation, _xmp_orientation):
        try:
            found = read(image)
        except Exception:  # damaged metadata raises many kinds of errors; the image may be sound
            continue
        if found:
            return found
    return 1


def _exif_orientation(image: Image.Image) -> int:
    """0 where there is none."""
    exif = image.info.get("exif")
    raw = image.info.get("Raw profile type exif")  # as ImageMagick writes it: three lines, then hexadecimal
    if exif is None and raw is not None:
        exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    if not exif:
        return 0
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (offset,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, offset)
    for number in range(count):
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, offset + 2 + 12 * number)
        if tag == ExifTags.Base.Orientation and values == 1 and kind in (1, 3, 4):
            form = {1: "B", 3: "H", 4: "I"}[kind]
            return _valid(struct.unpack_from(f"{order}{form}", exif, offset + 2 + 12 * number + 8)[0])
    return 0


def _xmp_orientation(image: Image.Image) -> int:
    """0 where there is none."""
    packets = (image.info.get(name) for name in ("xmp", "XML:com.adobe.xmp"))
    for packet in packets:
        if packet:
            text = packet.encode() if isinstance(packet, str) else bytes(packet)
            match = _XMP_ORIENTATION.search(text)
            return int(match[1]) if match else 0
    return 0


def _valid(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 0


_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(image: Image.Image) -> Image.Image:
    """The image as its orientation says that it is looked at."""
    method = _TRANSPOSED.get(read_orientation(image))
    return image if method is None else image.transpose(method)
