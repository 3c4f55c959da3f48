"""Images fit for training: checks and repairs, without Ray and without files.

An image leaves here as a plain upright RGB or grey JPEG. One that is that already, and small enough, keeps its bytes;
every other one is decoded and encoded once. Which way up it is, and what a decoder is spared, is decided by the code
that the loader uses (``tinygptv.data.image_orientation`` and ``image_structure``), so that both see the same image.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.data.sources.base import Filtered, Malformed
from pipelines.settings import PrepareDataSettings
from tinygptv.data.image_orientation import is_plain_jpeg, read_orientation
from tinygptv.data.image_structure import check_structure
from tinygptv.data.images import IMAGE_FORMATS, open_image

HASH_SIDE = 32
"""Side in pixels of the grey image that the perceptual hash looks at."""

_LITTLE_SHRINKING = 1.3


@dataclass(frozen=True)
class CheckedImage:
    """An image that is fit for training.

    Attributes:
        data: JPEG bytes.
        width: of the original, upright, in pixels.
        height: the same for the height.
        grey: uint8 [height, width], the image in a size that the perceptual hash can be taken of.
        kept: the bytes are the original's.
    """

    data: bytes
    width: int
    height: int
    grey: np.ndarray
    kept: bool

    @cached_property
    def perceptual_hash(self) -> int:
        """64 bits that hardly change when the image is scaled or encoded again."""
        return perceptual_hash(self.grey)


@dataclass(frozen=True)
class Header:
    """Properties from an image's header: its upright size, and how simplejpeg shall decode it (``RGB`` or ``GRAY``).

    ``colours`` is empty for all but an upright JPEG; PIL decodes those.
    """

    width: int
    height: int
    colours: str = ""


def check_image(data: bytes, settings: PrepareDataSettings) -> CheckedImage:
    """Check, turn upright, convert and shrink an image.

    Args:
        data: an encoded image of any format that ``tinygptv.data.images`` knows.
        settings: size bounds and JPEG quality.

    Raises:
        Malformed: it cannot be decoded, or is a decompression bomb.
        Filtered: a filter on its size or shape removes it.
    """
    return decode_checked(data, read_header(data, settings), settings)


def read_header(data: bytes, settings: PrepareDataSettings) -> Header:
    """Check what can be checked before an image is decoded.

    Raises:
        Malformed: it is no image, or a decompression bomb.
        Filtered: a filter on its size or shape removes it.
    """
    try:
        check_structure(data)
    except ValueError as error:
        raise Malformed(f"cannot decode image: {error}") from error
    header = _read_plain_header(data, settings) or _read_header(data, settings)
    _filter_size(header.width, header.height, settings)
    return header


def decode_checked(data: bytes, header: Header, settings: PrepareDataSettings) -> CheckedImage:
    """Turn upright, convert and shrink an image whose header has been checked.

    Raises:
        Malformed: it cannot be decoded.
    """
    width, height = header.width, header.height
    if header.colours:
        try:
            if min(width, height) <= settings.image_size:
                grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=HASH_SIDE, min_width=HASH_SIDE)[..., 0]
                return CheckedImage(data, width, height, grey, kept=True)
            return _encode(_decode_shrunk(data, header, settings), width, height, settings)
        except ValueError:
            pass  # libjpeg warns; PIL decides below whether the image can be used, and it is then encoded again
    try:
        image = open_image(data, "image")
        return _encode(_shrink(np.asarray(image), settings.image_size), image.width, image.height, settings)
    except Exception as error:  # whatever a decoder raises on untrusted bytes must not stop the other samples
        raise Malformed(str(error).replace("\n", " ")) from error


def _read_plain_header(data: bytes, settings: PrepareDataSettings) -> Header | None:
    """The header of a JPEG that is certainly upright and of one image, several times faster than PIL; else None."""
    if not is_plain_jpeg(data):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    colours = {"YCbCr": "RGB", "Gray": "GRAY"}.get(space)
    if colours:
        _check_area(width, height, settings)
    return Header(width, height, colours) if colours else None


def _read_header(data: bytes, settings: PrepareDataSettings) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            header = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise Malformed(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise Malformed("cannot decode image: it is damaged, or no JPEG, PNG, WebP, GIF, BMP or TIFF") from error
    except Exception as error:  # PIL's parsers raise many kinds of errors on damaged bytes
        raise Malformed(f"cannot decode image: {error}".replace("\n", " ")) from error
    _check_area(*header.size, settings)
    orientation = read_orientation(header)
    width, height = header.size if orientation < 5 else header.size[::-1]
    plain = orientation == 1 and header.format == "JPEG"
    return Header(width, height, {"RGB": "RGB", "L": "GRAY"}.get(header.mode, "") if plain else "")


def _check_area(width: int, height: int, settings: PrepareDataSettings) -> None:
    if width * height > settings.max_megapixels * 1e6:
        raise Malformed(
            f"decompression bomb: {width} x {height} pixels are more than max_megapixels={settings.max_megapixels:g}"
        )
    if width < 1 or height < 1:
        raise Malformed(f"the image has {width} x {height} pixels")


def _filter_size(width: int, height: int, settings: PrepareDataSettings) -> None:
    shorter, longer = sorted((width, height))
    if shorter < settings.min_side:
        raise Filtered("min_side", f"{width} x {height} pixels, shorter side below {settings.min_side}")
    if longer > shorter * settings.max_aspect_ratio:
        raise Filtered(
            "max_aspect_ratio", f"{width} x {height} pixels, aspect ratio above {settings.max_aspect_ratio:g}"
        )


def _decode_shrunk(data: bytes, header: Header, settings: PrepareDataSettings) -> np.ndarray:
    """Decode at the smallest of JPEG's own scales that is large enough, then shrink the rest of the way."""
    target = _target_size(header.width, header.height, settings.image_size)
    pixels = simplejpeg.decode_jpeg(data, header.colours, min_width=target[0], min_height=target[1])
    return _resize(pixels, target)


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(width, height) <= side:
        return pixels
    return _resize(pixels, _target_size(width, height, side))


def _target_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Size whose shorter side is ``side``, with the same aspect ratio."""
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    # Cubic interpolation is closest to a Lanczos filter, and seven times faster, where little is left to shrink; more
    # would alias, and averaging over areas is then the closest. They meet at about 1.3.
    little = pixels.shape[1] <= _LITTLE_SHRINKING * size[0]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if little else cv2.INTER_AREA)


def _encode(pixels: np.ndarray, width: int, height: int, settings: PrepareDataSettings) -> CheckedImage:
    pixels = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])
    colours, sampling = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("RGB", "420")
    grey = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    data = simplejpeg.encode_jpeg(pixels, settings.jpeg_quality, colours, sampling)
    return CheckedImage(data, width, height, grey, kept=False)


def _resize_for_hash(grey: np.ndarray) -> np.ndarray:
    """Average down to ``HASH_SIDE``, by halves as long as that goes: five times faster than at once."""
    while min(grey.shape) >= 2 * HASH_SIDE:
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        grey = cv2.resize(grey[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of an image's coarse structure: signs of its lowest frequencies around their median.

    Args:
        grey: uint8 [height, width].

    Returns:
        0 .. 2**64 - 1; near-duplicates differ in few bits.
    """
    small = _resize_for_hash(grey).astype(np.float32)
    lowest = cv2.dct(small)[:8, :8].ravel()
    middle = len(lowest) // 2 - 1
    bits = lowest > np.partition(lowest[1:], middle)[middle]  # their median; the first one is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
