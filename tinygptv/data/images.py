"""The one image path: bytes -> RGB -> R x R pixels -> normalised tensor. Training, evaluation and serving share it.

The release resizes straight to the square (aspect ratio not kept, no crop, no flip) with PIL's bicubic filter, then
normalises with CLIP's statistics. Pixels travel as uint8, a quarter of the bytes, and are normalised where the model
runs.
"""

from __future__ import annotations

import errno
import io
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinygptv.data.data_url import DataURL, DataURLError
from tinygptv.data.image_orientation import turn_upright
from tinygptv.data.image_structure import check_structure

PixelsT = TypeVar("PixelsT")

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's training images, for pixels in 0..1."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded (MPO opens as JPEG); anything else is refused before a decoder sees it."""

_BITS_PER_SAMPLE = 258  # tag of a TIFF
_DOWNLOAD_TIMEOUT_S = 30


def load_image(source: Any) -> Image.Image:
    """An RGB image, upright, from whatever stands for one.

    Args:
        source: a PIL image, an array [H, W], [H, W, C] or [C, H, W] (numpy or torch), encoded bytes, an open file, a
            path, or text: a path, an http(s) or data URL, or base64.

    Raises:
        ValueError: it is none of these, or no image.
    """
    if isinstance(source, Image.Image):
        return to_rgb(turn_upright(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return open_image(bytes(source))
    if hasattr(source, "read"):  # an open file
        return open_image(source.read())
    if isinstance(source, str | os.PathLike):
        return _load_named(os.fspath(source))
    if hasattr(source, "detach"):  # a torch tensor, on any device
        source = source.detach().cpu()
        source = source.float() if str(source.dtype) == "torch.bfloat16" else source  # NumPy has no such type
    return _from_array(np.asarray(source))


def _load_named(name: str) -> Image.Image:
    if name.startswith(("http://", "https://")):
        request = urllib.request.Request(name, headers={"User-Agent": "tinygptv"})  # many servers refuse Python's own
        with urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_S) as response:
            return open_image(response.read())
    if name[:5].lower() == "data:":
        try:
            return open_image(DataURL.split(name).decode())
        except DataURLError as error:
            raise ValueError(f"the data URL {name:.40} cannot be read: {error}.") from None
    path = without_file_scheme(name)
    if _is_file(path):
        return open_image(Path(path).read_bytes(), path)
    try:
        return open_image(DataURL("", is_base64=True, text=name).decode())
    except ValueError:
        raise ValueError(f"{name:.200} is no image file, http(s) or data URL, nor base64 of an image.") from None


def without_file_scheme(name: str) -> str:
    """The path of a ``file://`` URL (RFC 8089: its special characters are percent-encoded); other names as they are."""
    if not name.startswith("file://"):
        return name
    path = name.removeprefix("file://")
    return unquote(path.removeprefix("localhost") if path.startswith("localhost/") else path)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # base64
            return False
        raise


def _from_array(array: np.ndarray) -> Image.Image:
    """An image from numbers: uint8, or floats in 0..1 or in 0..255."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype == object or not is_image or array.size == 0:
        raise ValueError(
            "an image is a PIL image, bytes, a path, a URL or an array [H, W], [H, W, C] or [C, H, W], not an array of "
            f"shape {list(array.shape)} and type {array.dtype}."
        )
    if array.dtype != np.uint8:
        array = _to_uint8(array)
    return to_rgb(Image.fromarray(array))


def _to_uint8(numbers: np.ndarray) -> np.ndarray:
    """Scale numbers in 0..1 (floats), 0..255 or 0..65535 to 0..255; the range follows from the largest.

    Raises:
        ValueError: there are numbers outside of these ranges.
    """
    low, high = (float(f(numbers)) for f in (np.min, np.max)) if numbers.size else (0.0, 0.0)
    if not (low >= 0.0 and high <= 65535.0):  # also refuses NaN
        raise ValueError(
            f"an image has values from {low:g} to {high:g}: give 0..1 (floats), 0..255 or 0..65535, not normalised."
        )
    is_unit = high <= 1.0 and not np.issubdtype(numbers.dtype, np.integer)
    scale = 255.0 if is_unit else 1.0 if high <= 255.0 else 255.0 / 65535.0
    return np.rint(numbers.astype(np.float64) * scale).astype(np.uint8)


def open_image(data: bytes, name: str = "the file") -> Image.Image:
    """Decode image bytes to RGB, upright.

    Its orientation is applied (Exif's, else XMP's); palette, grey, CMYK and 16-bit images are converted; transparency
    is laid on white; of an animation the first frame is taken.

    Args:
        data: an encoded image.
        name: what errors call it.

    Returns:
        A loaded RGB image.

    Raises:
        ValueError: the bytes are no image in a known format, are damaged, or exceed ``image_structure``'s bounds.
    """
    try:
        check_structure(data)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image (JPEG, PNG, WebP, GIF, BMP).") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {name} of {len(data)} bytes: {error}") from error
    try:
        return to_rgb(turn_upright(image))
    except ValueError as error:  # numbers that are no brightness
        raise ValueError(f"cannot use {name}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: transparency on white, more than 8 bits and floats scaled by their range.

    Raises:
        ValueError: numbers that are no brightness (negative, not finite, above 65535).
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        full = (1 << _stored_bits(image)) - 1
        numbers = np.asarray(image, dtype=np.uint16).clip(max=full) * (255.0 / full)
        return Image.fromarray(numbers.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # PIL knows no direct way
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _stored_bits(image: Image.Image) -> int:
    """Bits of a grey value: 16, or what a TIFF declares (12 of a scanner)."""
    declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    bits = declared[0] if isinstance(declared, tuple) else declared
    return bits if bits in (10, 12, 14) else 16


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


def normalise_pixels(pixels: PixelsT) -> PixelsT:
    """The model's ``pixel_values``: scaled to 0..1 and normalised with CLIP's statistics.

    Args:
        pixels: uint8 [..., 3, R, R], a numpy array or a torch tensor on any device.

    Returns:
        float32, of the same kind and on the same device.
    """
    given: Any = pixels  # torch is not imported here: loader processes do without it
    if isinstance(given, np.ndarray):
        mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        return cast(PixelsT, (given.astype(np.float32) / np.float32(255.0) - mean) / std)
    floats = given.float() / 255.0
    # Channel by channel: tensors of the statistics would have to be copied to a GPU, which waits for the copy.
    for channel, (channel_mean, channel_std) in enumerate(zip(IMAGE_MEAN, IMAGE_STD, strict=True)):
        floats[..., channel, :, :].sub_(channel_mean).div_(channel_std)
    return cast(PixelsT, floats)


def stack_pixels(images: Sequence[Image.Image], image_size: int) -> np.ndarray:
    """uint8 [N, 3, R, R] of several RGB images."""
    if not images:
        return np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    return np.stack([resize_pixels(image, image_size) for image in images])
