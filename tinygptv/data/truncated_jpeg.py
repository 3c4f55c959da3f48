"""JPEGs that lack their last bytes (interrupted downloads, cut copies): usable where next to no pixels are missing."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image

from tinygptv.data.image_structure import PROGRESSIVE, jpeg_segments

END_OF_IMAGE = b"\xff\xd9"
MAX_MISSING = 0.2
"""Largest share of an image's rows that may be missing."""

DETAIL = 16.0
"""Mean absolute difference of a row, of 255, up to which what a progressive JPEG lacks is detail."""

_SMALL = 256
_NOISE = hashlib.shake_128(b"what might have followed").digest(4096).replace(b"\xff", b"\xfe")


def complete_jpeg(data: bytes) -> bytes:
    """End a truncated JPEG properly; the decoder fills in what is missing.

    How much is missing follows from decoding it twice, with the end mark and with noise before it: rows that differ are
    not determined by the file. A progressive JPEG that lacks some of its last scan differs by details only.

    Args:
        data: a JPEG that does not decode.

    Returns:
        A JPEG that decodes.

    Raises:
        ValueError: it is no JPEG, lacks more than ``MAX_MISSING`` of its rows, or is damaged elsewhere.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("it is not a JPEG.")
    segments = list(jpeg_segments(data))
    if segments and segments[-1].end > len(data):  # cut off within a header
        data = data[: segments.pop().start]
    data = data.removesuffix(b"\xff")
    noise = _NOISE * (len(data) // len(_NOISE) + 1)  # enough for as many rows as there may be
    difference = np.abs(_pixels(data + END_OF_IMAGE) - _pixels(data + noise + END_OF_IMAGE))
    by_row = difference.reshape(len(difference), -1).mean(axis=1)
    if any(segment.marker == PROGRESSIVE for segment in segments):
        missing = float((by_row > DETAIL).mean())
    else:  # rows come from top to bottom
        missing = float(np.maximum.accumulate(by_row > 1).mean())
    if missing > MAX_MISSING:
        raise ValueError(f"the JPEG is cut off: {missing:.0%} of its rows are missing.")
    return data + END_OF_IMAGE


def _pixels(data: bytes) -> np.ndarray:
    """The image, made small while it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.draft(image.mode, (_SMALL, _SMALL))
            return np.asarray(image, dtype=np.float32)
    except Exception as error:  # PIL raises many kinds of errors on damaged files
        raise ValueError(f"the JPEG is damaged: {error}") from error
