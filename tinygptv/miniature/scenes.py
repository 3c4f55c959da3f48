"""Contents of a scene: objects with shape, colour, size, texture and position, from a generator keyed by the scene.

A scene is a pure function of its key (seed, split, index). Coordinates of boxes are shares of the image's sides (0..1,
origin top left). The ordinary splits ``train``, ``validation`` and ``test`` follow one distribution; the others are
harder in one respect each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, TypeVar

import numpy as np

from tinygptv.data.boxes import Box
from tinygptv.miniature.shapes import SHAPES, outline

T = TypeVar("T")
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (208, 28, 32),
    "orange": (250, 128, 10),
    "yellow": (242, 210, 12),
    "green": (34, 150, 60),
    "blue": (32, 84, 214),
    "purple": (120, 38, 156),
    "pink": (250, 130, 190),
    "black": (26, 26, 28),
}
SIZES: dict[str, float] = {"small": 0.19, "large": 0.33}
"""Longer side of an object's box, as a share of the image's shorter side; jittered by 8%."""
TEXTURES = ("plain", "striped", "dotted")

SPLITS = ("train", "validation", "test", "combination", "crowded", "wording", "large")
"""``combination``: a held-out colour and shape; ``crowded``: 5-6 objects; ``wording``: said in phrasings that are used
nowhere else; ``large``: images of twice the size."""

HELD_OUT = frozenset(
    {
        ("red", "heart"),
        ("blue", "star"),
        ("green", "cross"),
        ("yellow", "triangle"),
        ("purple", "square"),
        ("black", "circle"),
    }
)
"""(colour, shape) pairs that occur in the split ``combination`` only: 6 of 48."""

CELLS = 4
"""The image is a grid of CELLS x CELLS; no two objects have their centres in the same cell."""

_COUNTS = {"crowded": (0.0, 0.0, 0.0, 0.0, 0.5, 0.5)}
_USUAL_COUNTS = (0.1, 0.25, 0.3, 0.35)
_EDGE = 0.025
_GAP = 0.03


@dataclass(frozen=True)
class SceneKey:
    """Key of a scene: it is a pure function of these."""

    seed: int
    split: str
    index: int


class ObjectRecord(TypedDict):
    """An object in the benchmark files; fields as the attributes of ``SceneObject``."""

    shape: str
    colour: str
    size: str
    texture: str
    box: list[float]


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: one of ``SHAPES``.
        colour: key of ``COLOURS``.
        size: key of ``SIZES``.
        texture: one of ``TEXTURES``.
        box: x1, y1, x2, y2 of the drawn outline, as shares of the image's sides.
        rgb: the jittered colour that is drawn.
        angle: rotation in degrees.
    """

    shape: str
    colour: str
    size: str
    texture: str
    box: tuple[float, float, float, float]
    rgb: RGB = (0, 0, 0)
    angle: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box."""
        return ((self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2)

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Size, colour, texture, shape: the order in which words name them."""
        return (self.size, self.colour, self.texture, self.shape)

    def to_dict(self) -> ObjectRecord:
        """Fields of an object in benchmark files."""
        return {
            "shape": self.shape,
            "colour": self.colour,
            "size": self.size,
            "texture": self.texture,
            "box": [round(side, 5) for side in self.box],
        }

    @classmethod
    def from_dict(cls, fields: ObjectRecord) -> SceneObject:
        """The object of ``to_dict``, as far as its meaning goes."""
        x1, y1, x2, y2 = fields["box"]
        return cls(fields["shape"], fields["colour"], fields["size"], fields["texture"], (x1, y1, x2, y2))


@dataclass(frozen=True)
class Background:
    """A light gradient with faint noise.

    Attributes:
        start: colour at one end.
        end: colour at the other end.
        angle: direction of the gradient in radians.
        noise: largest change of a channel by noise, of 255.
    """

    start: RGB
    end: RGB
    angle: float
    noise: int


@dataclass(frozen=True)
class Scene:
    """One image's content.

    Attributes:
        key: seed, split and index that made it.
        width: image width in pixels.
        height: image height in pixels.
        background: how the ground looks.
        objects: in no particular order.
        jpeg_quality: quality of its file.
    """

    key: SceneKey
    width: int
    height: int
    background: Background
    objects: tuple[SceneObject, ...]
    jpeg_quality: int

    @property
    def split(self) -> str:
        """The split that the scene belongs to."""
        return self.key.split

    @property
    def number(self) -> int:
        """A number that no other of the first 100 million scenes of any split has; image files are named by it."""
        return SPLITS.index(self.split) * 100_000_000 + self.key.index + 1

    def cell_of(self, item: SceneObject) -> tuple[int, int]:
        """Row and column of the grid cell (``CELLS`` x ``CELLS``) that holds the object's centre."""
        x, y = item.centre
        return (int(y * CELLS), int(x * CELLS))

    def pixel_box(self, item: SceneObject) -> tuple[float, float, float, float]:
        """The object's box in pixels: x1, y1, x2, y2."""
        x1, y1, x2, y2 = item.box
        return (x1 * self.width, y1 * self.height, x2 * self.width, y2 * self.height)


def generator(key: SceneKey, purpose: str = "scene") -> np.random.Generator:
    """The random generator of a scene for one purpose; generators of different purposes are independent.

    Raises:
        ValueError: the split is unknown, or seed or index is negative.
    """
    if key.split not in SPLITS:
        raise ValueError(f"split is {key.split!r}; known splits: {', '.join(SPLITS)}.")
    words = (key.seed, SPLITS.index(key.split), key.index, zlib.crc32(purpose.encode()))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one element."""
    return options[int(rng.integers(len(options)))]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Draw the content of a scene.

    Args:
        seed: seed of the world.
        split: one of ``SPLITS``.
        index: number of the scene within its split, from 0.

    Returns:
        The same scene for the same arguments, always.
    """
    key = SceneKey(seed, split, index)
    rng = generator(key)
    width, height = _image_size(rng, double=split == "large")
    objects = None
    while objects is None:
        named = _draw_attributes(rng, split)
        objects = _place(rng, named, width, height)
    return Scene(key, width, height, _background(rng), objects, int(rng.integers(88, 96)))


def make_scenes(seed: int, split: str, count: int, start: int = 0) -> list[Scene]:
    """``count`` scenes of a split, from index ``start``."""
    return [make_scene(seed, split, index) for index in range(start, start + count)]


def _image_size(rng: np.random.Generator, double: bool) -> tuple[int, int]:
    while True:
        width, height = (int(side) for side in rng.integers(96, 161, size=2))
        if 0.75 <= width / height <= 1.33:
            return (2 * width, 2 * height) if double else (width, height)


def _background(rng: np.random.Generator) -> Background:
    start, end = ((int(r), int(g), int(b)) for r, g, b in rng.integers(214, 256, size=(2, 3)))
    return Background(start, end, float(rng.uniform(0, 2 * math.pi)), int(rng.integers(1, 5)))


def _draw_attributes(rng: np.random.Generator, split: str) -> list[SceneObject]:
    """Objects without a position. Some share shape or colour with one before, so that words must tell them apart."""
    shares = _COUNTS.get(split, _USUAL_COUNTS)
    count = int(rng.choice(len(shares), p=shares)) + 1
    held_out = split == "combination"
    found: list[SceneObject] = []
    while len(found) < count:
        colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
        if found and rng.random() < 0.35:
            shape = pick(rng, found).shape
        if found and rng.random() < 0.3:
            colour = pick(rng, found).colour
        if held_out and not found:
            colour, shape = pick(rng, sorted(HELD_OUT))
        item = SceneObject(
            shape,
            colour,
            pick(rng, tuple(SIZES)),
            pick(rng, TEXTURES),
            box=(0, 0, 0, 0),
            rgb=jitter(rng, COLOURS[colour]),
            angle=0.0 if shape == "circle" else float(rng.uniform(-12, 12)),
        )
        # Two objects that look alike can be told apart as "the left one of the two"; three often cannot.
        twins = sum(item.attributes == other.attributes for other in found)
        if twins < 2 and (held_out or (colour, shape) not in HELD_OUT):
            found.append(item)
    return [found[int(i)] for i in rng.permutation(count)]


def jitter(rng: np.random.Generator, colour: RGB) -> RGB:
    """A colour within 9 of ``colour`` in each channel, as objects have it."""
    r, g, b = (
        int(np.clip(channel + shift, 0, 255)) for channel, shift in zip(colour, rng.integers(-9, 10, 3), strict=True)
    )
    return (r, g, b)


def _place(
    rng: np.random.Generator, named: Sequence[SceneObject], width: int, height: int
) -> tuple[SceneObject, ...] | None:
    """Give each object a box, in a cell of its own and without touching; None where that does not work out."""
    extents = [_extent(rng, item, width, height) for item in named]
    largest_first = sorted(range(len(named)), key=lambda i: -extents[i][0] * extents[i][1])
    for _ in range(20):
        free = list(range(CELLS * CELLS))
        boxes: dict[int, Box] = {}
        for index in largest_first:
            box, cell = _find_room(rng, extents[index], free, list(boxes.values()))
            if box is None:
                break
            free.remove(cell)
            boxes[index] = box
        if len(boxes) == len(named):
            return tuple(replace(item, box=boxes[index]) for index, item in enumerate(named))
    return None


def _find_room(
    rng: np.random.Generator, extent: tuple[float, float], free: Sequence[int], boxes: Sequence[Box]
) -> tuple[Box | None, int]:
    """A box that touches none of ``boxes``, and its cell; None where a few draws find no room."""
    w, h = extent
    for _ in range(12):
        cell = pick(rng, free)
        row, column = divmod(cell, CELLS)
        x, y = _within(rng, column, w), _within(rng, row, h)
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        if not any(_touch(box, other) for other in boxes):
            return box, cell
    return None, -1


def _extent(rng: np.random.Generator, item: SceneObject, width: int, height: int) -> tuple[float, float]:
    side = SIZES[item.size] * float(rng.uniform(0.92, 1.08)) * min(width, height)
    aspect = outline(item.shape, item.angle)[1]
    w, h = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
    return w / width, h / height


def _within(rng: np.random.Generator, cell: int, extent: float) -> float:
    """A centre coordinate inside the cell that keeps the box off the image's edge."""
    low = max(cell / CELLS, _EDGE + extent / 2)
    high = min((cell + 1) / CELLS - 1e-6, 1 - _EDGE - extent / 2)
    return float(rng.uniform(low, high))


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] + _GAP and b[0] < a[2] + _GAP and a[1] < b[3] + _GAP and b[1] < a[3] + _GAP
