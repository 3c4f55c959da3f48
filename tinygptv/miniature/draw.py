"""A scene's image: light gradient, faint noise, anti-aliased objects.

Objects are drawn with ``_SUPERSAMPLING`` times the resolution, in their own boxes only, and laid on the background.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from tinygptv.miniature.scenes import Background, Scene, SceneObject, generator
from tinygptv.miniature.shapes import outline

_SUPERSAMPLING = 4
_RIM = 0.055
"""Width of the darker rim, as a share of the object's shorter side."""


def render(scene: Scene) -> Image.Image:
    """Draw a scene.

    Returns:
        An RGB image of ``scene.width`` x ``scene.height``; the same pixels for the same scene, always.
    """
    rng = generator(scene.key, "pixels")
    canvas = _draw_background(scene.background, scene.width, scene.height, rng)
    for item in scene.objects:
        _draw_object(canvas, item, float(rng.random()), float(rng.random()))
    noise = scene.background.noise
    grain = rng.integers(-noise, noise + 1, size=canvas.shape[:2], dtype=np.int8)
    return Image.fromarray(np.clip(canvas + grain[..., None] + 0.5, 0, 255).astype(np.uint8))


def encode_jpeg(scene: Scene) -> bytes:
    """The scene's file: its image as JPEG at ``scene.jpeg_quality``."""
    stream = io.BytesIO()
    render(scene).save(stream, format="JPEG", quality=scene.jpeg_quality, optimize=True)
    return stream.getvalue()


def _draw_background(ground: Background, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width, 3]: a linear gradient between the two colours."""
    dx, dy = math.cos(ground.angle), math.sin(ground.angle)
    across, down = np.linspace(0, dx, width, dtype=np.float32), np.linspace(0, dy, height, dtype=np.float32)
    along: np.ndarray = across[None, :] + down[:, None]
    share = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
    start, end = (np.array(colour, dtype=np.float32) for colour in (ground.start, ground.end))
    colours: np.ndarray = start + share[..., None] * (end - start)
    return colours


def _draw_object(canvas: np.ndarray, item: SceneObject, phase: float, slant: float) -> None:
    """Lay one object on the canvas, in place."""
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = item.box[0] * width, item.box[1] * height, item.box[2] * width, item.box[3] * height
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    scale = _SUPERSAMPLING
    size = ((right - left) * scale, (bottom - top) * scale)

    vertices, _ = outline(item.shape, item.angle)
    corners = (vertices * (x2 - x1, y2 - y1) + (x1 - left, y1 - top)) * scale
    points = [(float(x), float(y)) for x, y in corners]
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(points, fill=255)

    colour = np.array(item.rgb, dtype=np.float32)
    partner, rim = _shades(item)
    side = max(x2 - x1, y2 - y1) * scale
    share = _texture(item.texture, size, side, phase, slant)
    paint = Image.fromarray((colour + share[..., None] * (partner - colour)).astype(np.uint8))
    width_px = max(1, round(_RIM * min(x2 - x1, y2 - y1) * scale))
    ImageDraw.Draw(paint).line([*points, points[0]], fill=rim, width=2 * width_px, joint="curve")

    small = (right - left, bottom - top)
    cover = np.asarray(mask.reduce(scale), dtype=np.float32)[..., None] / 255.0
    pixels = np.asarray(paint.reduce(scale), dtype=np.float32)
    assert cover.shape[1::-1] == small
    area = canvas[top:bottom, left:right]
    area += cover * (pixels - area)


def _shades(item: SceneObject) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The texture's second colour and the rim's colour. Light colours carry dark marks, dark ones light marks."""
    colour = np.array(item.rgb, dtype=np.float32)
    light = item.colour in ("yellow", "orange", "pink")
    partner = colour * 0.3 if light else colour + 0.9 * (255.0 - colour)
    r, g, b = (int(channel) for channel in colour * 0.72)
    return partner, (r, g, b)


def _texture(texture: str, size: tuple[int, int], side: float, phase: float, slant: float) -> np.ndarray:
    """float32 [height, width]: 1 where the second colour shows."""
    width, height = size
    if texture == "plain":
        return np.zeros((height, width), dtype=np.float32)
    x = (np.arange(width, dtype=np.float32)[None, :] - width / 2) / side
    y = (np.arange(height, dtype=np.float32)[:, None] - height / 2) / side
    if texture == "striped":
        # Oblique, so that no stripe can hide along an edge or an arm.
        angle = math.radians(30 + 30 * slant) * (1 if phase < 0.5 else -1)
        along = (x * math.cos(angle) + y * math.sin(angle)) * 3.9 + 2 * phase
        return ((along % 1.0) < 0.45).astype(np.float32)
    # A dot in the middle, six around it.
    row = y * 3.4 + 0.2 * (phase - 0.5)
    column = x * 3.2 + 0.2 * (slant - 0.5) + 0.5 * (np.round(row) % 2)
    return ((row - np.round(row)) ** 2 + (column - np.round(column)) ** 2 < 0.31**2).astype(np.float32)
