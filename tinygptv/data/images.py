"""The one image path: bytes -> RGB -> R x R pixels -> normalised tensor. Training, evaluation and serving share it.

The release resizes straight to the square (aspect ratio not kept, no crop, no flip) with PIL's bicubic filter, then
normalises with CLIP's statistics. Pixels travel as uint8, a quarter of the bytes, and are normalised where the model
runs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's training images, for pixels in 0..1."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded (MPO opens as JPEG); anything else is refused before a decoder sees it."""


def open_image(data: bytes) -> Image.Image:
    """Decode image bytes to RGB, upright.

    EXIF rotation is applied; palette, grey, CMYK and 16-bit images are converted; transparency is laid on white; of an
    animation the first frame is taken.

    Args:
        data: an encoded image.

    Returns:
        A loaded RGB image.

    Raises:
        ValueError: the bytes are no image in a known format, or are damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode image of {len(data)} bytes: {error}") from error
    return to_rgb(_turn_upright(image))


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply EXIF rotation; a picture with damaged EXIF data stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # PIL's EXIF parser raises many kinds of errors, SyntaxError among them
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: transparency on white, 16-bit scaled to 8."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        scale = 255.0 / 65535.0 if pixels.max(initial=0.0) > 255.0 else 1.0
        return Image.fromarray(np.clip(pixels * scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def resize_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """Resize to the model's square input.

    Args:
        image: an RGB image.
        image_size: side R in pixels.

    Returns:
        uint8 [3, R, R].
    """
    resized = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def normalise_pixels(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 3, R, R] to the model's float32 ``pixel_values`` (numpy, for the loader and the processor)."""
    mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.astype(np.float32) / np.float32(255.0) - mean) / std


def stack_pixels(images: Sequence[Image.Image], image_size: int) -> np.ndarray:
    """uint8 [N, 3, R, R] of several RGB images."""
    if not images:
        return np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    return np.stack([resize_pixels(image, image_size) for image in images])
