"""Box text and pixel boxes: ``{<x1><y1><x2><y2>}`` with integers 0..100, relative to the image's sides.

A grounded phrase is ``<p>phrase</p> {<..>}``; several boxes of one phrase are joined by ``<delim>``.
Source: MiniGPT-v2's box format as TinyGPT-V uses it (upstream release, demo_v2.py and eval_ref.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Corners x1, y1, x2, y2; in pixels or on the 0..100 grid, as the function says."""

GRID = 100

BOX_TOLERANCE = 0.02
"""Tolerated reach of a box out of its image, as a share of the image's side; it is then clipped."""

_LEAST_TOLERANCE = 2.0
"""The same in pixels, for small images."""

_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")
_PHRASE = re.compile(
    r"<p>(?P<phrase>(?:(?!<p>).)*?)</p>\s*(?P<boxes>\{<[\d<>]*\}(?:\s*(?:<delim>)?\s*\{<[\d<>]*\})*)", re.DOTALL
)

COLOURS: tuple[tuple[int, int, int], ...] = (
    (230, 57, 70),
    (42, 157, 143),
    (69, 123, 230),
    (244, 162, 42),
    (155, 89, 208),
    (46, 196, 222),
    (120, 170, 40),
    (226, 84, 160),
)
"""RGB colours for drawn boxes; entity i takes colour i modulo their number, on images and in the web page alike."""


@dataclass(frozen=True)
class GroundedBox:
    """A box found in text.

    Attributes:
        phrase: words that the box belongs to; empty for a bare box.
        box: corners on the 0..100 grid, as written.
        entity: index of the phrase in the text; boxes of one phrase share it.
    """

    phrase: str
    box: Box
    entity: int


def format_box(box: Sequence[float], width: float, height: float) -> str:
    """Write a pixel box as text.

    Args:
        box: x1, y1, x2, y2 in pixels of the original image.
        width: width of the original image in pixels.
        height: height of the original image in pixels.

    Returns:
        ``{<x1><y1><x2><y2>}``; each coordinate is truncated, not rounded, as in the release's data sets.

    Raises:
        ValueError: the image has no area.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"an image of {width} x {height} pixels has no boxes: give its original width and height.")
    x1, y1, x2, y2 = box
    cells = (x1 / width * GRID, y1 / height * GRID, x2 / width * GRID, y2 / height * GRID)
    return "{" + "".join(f"<{int(cell)}>" for cell in cells) + "}"


def clip_box(box: Sequence[float], width: float, height: float) -> Box:
    """The part of a pixel box that lies on its image, for boxes that people draw or type.

    Args:
        box: two opposite corners x1, y1, x2, y2 in pixels, in any order.
        width: of the image in pixels.
        height: the same.

    Returns:
        Top left and bottom right corner, in pixels within the image.

    Raises:
        ValueError: the box lies outside of the image, or covers less than a pixel of it.
    """
    x1, y1, x2, y2 = ordered([float(corner) for corner in box])
    if not (x2 > 0 and y2 > 0 and x1 < width and y1 < height):
        raise ValueError(f"the box [{in_words(box)}] lies outside of the image of {width:g} x {height:g} pixels.")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if x2 - x1 < 1 or y2 - y1 < 1:
        raise ValueError(
            f"the box [{in_words(box)}] covers less than a pixel of the image of {width:g} x {height:g} pixels: "
            "give x1, y1, x2, y2 in pixels."
        )
    return x1, y1, x2, y2


def parse_boxes(text: str) -> list[GroundedBox]:
    """Find every box in a model's answer, with its phrase where it has one.

    Args:
        text: e.g. ``<p>a dog</p> {<1><2><3><4>}<delim>{<5><6><7><8>}`` or a bare ``{<1><2><3><4>}``.

    Returns:
        Boxes in text order. Malformed boxes (not four integers) are left out.
    """
    found: list[GroundedBox] = []
    claimed: list[tuple[int, int]] = []
    entity = 0
    spans: list[tuple[int, str, str]] = []
    for match in _PHRASE.finditer(text):
        claimed.append(match.span("boxes"))
        spans.append((match.start(), match["phrase"].strip(), match["boxes"]))
    for match in _BOX.finditer(text):
        if not any(start <= match.start() < end for start, end in claimed):
            spans.append((match.start(), "", match.group()))
    for _, phrase, boxes in sorted(spans):
        corners = [_corners(match) for match in _BOX.finditer(boxes)]
        found += [GroundedBox(phrase, box, entity) for box in corners]
        entity += bool(corners)
    return found


def strip_boxes(text: str) -> str:
    """Remove box text and phrase marks, leaving the words that a person reads."""
    text = re.sub(r"\s*\{<[\d<>]*\}|<delim>", "", text)
    return re.sub(r"</?p>", "", text).strip()


def parse_answer_box(answer: str) -> Box | None:
    """Read the box of a [refer] answer as the release's evaluation does.

    Args:
        answer: generated text; ``<unk>`` and spaces are ignored, and the box must come first.

    Returns:
        Corners on the 0..100 grid; None where the answer does not start with a well-formed box, or holds more numbers.
    """
    kept = answer.replace("<unk>", "").replace(" ", "").strip()
    match = _BOX.match(kept)
    if match is None or len(re.findall(r"\d+", kept)) != 4:
        return None
    return _corners(match)


def _corners(match: re.Match[str]) -> Box:
    x1, y1, x2, y2 = map(float, match.groups())
    return x1, y1, x2, y2


def to_pixels(box: Sequence[float], width: float, height: float) -> Box:
    """Scale a box from the 0..100 grid to pixels of an image of width x height."""
    x1, y1, x2, y2 = box
    return (x1 / GRID * width, y1 / GRID * height, x2 / GRID * width, y2 / GRID * height)


def box_fault(box: Sequence[float], width: float, height: float) -> str:
    """What keeps a box from being x1, y1, x2, y2 in pixels of its image, in words; empty where nothing does.

    Args:
        box: the box; it may reach a little out of the image.
        width: of the image, in pixels.
        height: the same for the height.
    """
    x1, y1, x2, y2 = box
    what = f"box {in_words(box)}"
    if not all(math.isfinite(corner) for corner in box):
        return f"{what} has a corner that is no number"
    if max(box) <= 1 and min(box) >= 0 and (width > 2 or height > 2):
        return f"{what} is given in shares of the image: give pixels, of {width} x {height}"
    if x2 < x1 or y2 < y1:
        return f"{what} is turned round: give x1, y1, x2, y2 with x1 < x2 and y1 < y2, not width and height"
    near_x, near_y = (max(_LEAST_TOLERANCE, BOX_TOLERANCE * side) for side in (width, height))
    if x1 < -near_x or y1 < -near_y or x2 > width + near_x or y2 > height + near_y:
        return f"{what} reaches out of the image of {width} x {height} pixels"
    if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        return f"{what} has no area in the image of {width} x {height} pixels"
    return ""


def in_words(box: Sequence[float]) -> str:
    """A box's numbers in a message."""
    return ", ".join(f"{corner:g}" for corner in box)


def ordered(box: Sequence[float]) -> Box:
    """A box with its top left corner first, whichever two opposite corners are given."""
    x1, y1, x2, y2 = box
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def iou(a: Sequence[float], b: Sequence[float], *, pixel_grid: bool = True) -> float:
    """Intersection over union of two boxes.

    Args:
        a: x1, y1, x2, y2.
        b: the same.
        pixel_grid: count both border pixels (width = x2 - x1 + 1), the convention of the RefCOCO scripts.

    Returns:
        0..1.
    """
    extra = 1.0 if pixel_grid else 0.0
    overlap_width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    overlap_height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    overlap = overlap_width * overlap_height
    area_a = (a[2] - a[0] + extra) * (a[3] - a[1] + extra)
    area_b = (b[2] - b[0] + extra) * (b[3] - b[1] + extra)
    union = area_a + area_b - overlap
    return overlap / union if union > 0 else 0.0
