"""Bounds on the structure of an encoded image, checked before a decoder sees it.

A few bytes can make a decoder work for minutes: each scan of a progressive JPEG costs a pass over all pixels (250,000
empty scans fit into 10 MB), each chunk of a PNG and each block of a GIF a round of Python code, and the tags of a TIFF
may all point at the same megabytes. Counting them takes milliseconds.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

MAX_JPEG_SCANS = 100
"""libjpeg's default progressive script has 10 scans; encoders that optimise have up to some 20."""

MAX_JPEG_SEGMENTS = 5_000
MAX_PNG_CHUNKS = 50_000
MAX_GIF_BLOCKS = 50_000
"""Before the first frame."""

MAX_TIFF_TAGS = 2_000
"""In the first directory."""

_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}

START_OF_SCAN, PROGRESSIVE, _END_OF_IMAGE = 0xDA, 0xC2, 0xD9
_SEQUENTIAL = {0xC0, 0xC1}
"""Frames of a sequential JPEG with Huffman codes."""

_STARTS_OF_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_STANDALONE = {0x01, 0xD8, *range(0xD0, 0xD8)}
_WITH_LENGTH = frozenset(range(0x02, 0xFF)) - _STANDALONE - {_END_OF_IMAGE}
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""After a scan's header: a marker that is neither a stuffed byte, a restart mark nor padding."""


def check_structure(data: bytes) -> list[Segment]:
    """Refuse an image that is cheap to send and dear to decode.

    Args:
        data: an encoded image; formats other than JPEG, PNG, GIF and TIFF pass, and so does what is damaged.

    Returns:
        A JPEG's segments up to its first scan, that included, which spares who needs them a second search.

    Raises:
        ValueError: which part there is too much of, and the bound.
    """
    if data[:2] == b"\xff\xd8":
        return _check_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    elif data[:4] == b"GIF8":
        _check_gif(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        _check_tiff(data)
    elif data[:4] in (b"II+\0", b"MM\0+"):
        raise ValueError("a BigTIFF is not decoded: convert it to JPEG or PNG.")
    return []


class Segment(NamedTuple):  # made ten times per image: a third of a dataclass's cost
    """A marker segment of a JPEG: bytes ``start`` to ``end``, which lies beyond the file where it is cut off."""

    marker: int
    start: int
    end: int


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Marker segments of a JPEG up to the end of the image, without the entropy-coded data between them."""
    at, last = 2, len(data) - 4
    while True:
        if at <= last and data[at] == 0xFF and data[at + 1] in _WITH_LENGTH:  # the next segment follows at once
            start, marker = at, data[at + 1]
        else:
            match = _NEXT_MARKER.search(data, at)
            if match is None:
                return
            start, at = match.span()
            marker = data[start + 1]
            if marker == _END_OF_IMAGE:
                return
            if marker in _STANDALONE:
                continue
        length = data[start + 2] << 8 | data[start + 3] if start <= last else len(data)
        at = start + 2 + max(2, length)
        yield Segment(marker, start, at)


def _check_jpeg(data: bytes) -> list[Segment]:
    head: list[Segment] = []
    num_scans = 0
    for number, segment in enumerate(jpeg_segments(data), 1):
        if num_scans == 0:
            head.append(segment)
        if segment.marker == START_OF_SCAN:
            num_scans += 1
            if num_scans == 1 and _is_whole_image(data, head):
                break
        if num_scans > MAX_JPEG_SCANS:
            raise ValueError(f"a JPEG with more than {MAX_JPEG_SCANS} scans is not decoded.")
        if number > MAX_JPEG_SEGMENTS:
            raise ValueError(f"a JPEG with more than {MAX_JPEG_SEGMENTS} segments is not decoded.")
    return head


def _is_whole_image(data: bytes, head: list[Segment]) -> bool:
    """Whether a JPEG's first scan, the last of these segments, has all of its components.

    libjpeg decodes one such scan and refuses a second one (its ``jdinput.c``: ``has_multiple_scans``). Nothing behind
    this scan can make it work longer, so the pixels, which are most of the file, need not be searched for segments.
    """
    frames, scan = [segment for segment in head if segment.marker in _STARTS_OF_FRAMES], head[-1]
    if len(frames) != 1 or frames[0].marker not in _SEQUENTIAL or scan.end > len(data):
        return False
    num_components = data[frames[0].start + 9 : frames[0].start + 10]
    return num_components == data[scan.start + 4 : scan.start + 5]


def _check_png(data: bytes) -> None:
    at = 8
    for _ in range(MAX_PNG_CHUNKS):
        if at + 8 > len(data) or data[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise ValueError(f"a PNG with more than {MAX_PNG_CHUNKS} chunks is not decoded.")


def _check_gif(data: bytes) -> None:
    """Blocks before the first frame; PIL takes them one by one, unknown bytes between them, too."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = 0
    while position < len(data) and blocks <= MAX_GIF_BLOCKS:
        kind = data[position]
        blocks += 1
        position += 1
        if kind in (0x2C, 0x3B):  # a frame, or the end
            return
        if kind == 0x21:  # an extension: a label, then sub-blocks up to an empty one
            position += 1
            while position < len(data) and data[position] and blocks <= MAX_GIF_BLOCKS:
                position += 1 + data[position]
                blocks += 1
            position += 1
    if blocks > MAX_GIF_BLOCKS:
        raise ValueError(f"a GIF with more than {MAX_GIF_BLOCKS} blocks before its first frame is not decoded.")


def _check_tiff(data: bytes) -> None:
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8:
        return
    (offset,) = struct.unpack_from(f"{order}I", data, 4)
    if offset + 2 > len(data):
        return
    (count,) = struct.unpack_from(f"{order}H", data, offset)
    if count > MAX_TIFF_TAGS:
        raise ValueError(f"a TIFF with more than {MAX_TIFF_TAGS} tags is not decoded.")
    referred = 0
    for number in range(count):
        entry = offset + 2 + 12 * number
        if entry + 12 > len(data):
            return
        _, kind, values = struct.unpack_from(f"{order}HHI", data, entry)
        referred += _TIFF_TYPE_BYTES.get(kind, 0) * values
    if referred > 4 * len(data):
        raise ValueError("a TIFF whose tags refer to more data than the file has is not decoded.")
