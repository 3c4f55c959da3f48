"""Bounds on the structure of an encoded image, checked before a decoder sees it.

A few bytes can make a decoder work for minutes: each scan of a progressive JPEG costs a pass over all pixels (250,000
empty scans fit into 10 MB), and each chunk of a PNG a round of Python code. Counting them takes milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_JPEG_SCANS = 100
"""libjpeg's default progressive script has 10 scans; encoders that optimise have up to some 20."""

MAX_JPEG_SEGMENTS = 5_000
MAX_PNG_CHUNKS = 50_000

START_OF_SCAN, PROGRESSIVE, _END_OF_IMAGE = 0xDA, 0xC2, 0xD9
_STANDALONE = {0x01, 0xD8, *range(0xD0, 0xD8)}
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""After a scan's header: a marker that is neither a stuffed byte, a restart mark nor padding."""


def check_structure(data: bytes) -> None:
    """Refuse an image that is cheap to send and dear to decode.

    Args:
        data: an encoded image of any format; formats other than JPEG and PNG pass.

    Raises:
        ValueError: which part there is too much of, and the bound.
    """
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)


@dataclass(frozen=True)
class Segment:
    """A marker segment of a JPEG: bytes ``start`` to ``end``, which lies beyond the file where it is cut off."""

    marker: int
    start: int
    end: int


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Marker segments of a JPEG up to the end of the image, without the entropy-coded data between them."""
    at = 2
    while (match := _NEXT_MARKER.search(data, at)) is not None:
        marker, at = data[match.start() + 1], match.end()
        if marker == _END_OF_IMAGE:
            return
        if marker not in _STANDALONE:
            length = int.from_bytes(data[at : at + 2], "big") if at + 2 <= len(data) else len(data)
            at += max(2, length)
            yield Segment(marker, match.start(), at)


def _check_jpeg(data: bytes) -> None:
    num_scans = 0
    for number, segment in enumerate(jpeg_segments(data), 1):
        num_scans += segment.marker == START_OF_SCAN
        if num_scans > MAX_JPEG_SCANS:
            raise ValueError(f"a JPEG with more than {MAX_JPEG_SCANS} scans is not decoded.")
        if number > MAX_JPEG_SEGMENTS:
            raise ValueError(f"a JPEG with more than {MAX_JPEG_SEGMENTS} segments is not decoded.")


def _check_png(data: bytes) -> None:
    at = 8
    for _ in range(MAX_PNG_CHUNKS):
        if at + 8 > len(data) or data[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise ValueError(f"a PNG with more than {MAX_PNG_CHUNKS} chunks is not decoded.")
