"""Images fit for training: checks and repairs, without Ray and without files.

An image leaves here as a plain upright RGB or grey JPEG. One that is that already, and small enough, keeps its bytes;
every other one is decoded and encoded once. Which way up it is, and what a decoder is spared, is decided by the code
that the loader uses (``tinygptv.data.image_orientation`` and ``image_structure``), so that both see the same image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.data.sources.base import Filtered, Malformed
from pipelines.settings import PrepareDataSettings
from tinygptv.data.image_orientation import is_plain_jpeg, read_orientation
from tinygptv.data.image_structure import Segment, check_structure
from tinygptv.data.images import IMAGE_FORMATS, open_image

HASH_SIDE = 32
"""Side in pixels of the grey image that the perceptual hash looks at."""

_LITTLE_SHRINKING = 1.3


class CheckedImage(NamedTuple):  # made once per image: half of a dataclass's cost
    """An image that is fit for training.

    Attributes:
        data: JPEG bytes.
        width: of the original, upright, in pixels.
        height: the same for the height.
        coarse: uint8 [HASH_SIDE, HASH_SIDE], the grey image that ``perceptual_hashes`` looks at.
        kept: the bytes are the original's.
    """

    data: bytes
    width: int
    height: int
    coarse: np.ndarray
    kept: bool


class Header(NamedTuple):
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
        segments = check_structure(data)
    except ValueError as error:
        raise Malformed(f"cannot decode image: {error}") from error
    header = _read_plain_header(data, segments, settings) or _read_header(data, settings)
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
                grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=HASH_SIDE, min_width=HASH_SIDE)
                return CheckedImage(data, width, height, shrink_for_hash(grey), kept=True)
            return _encode(_decode_shrunk(data, header, settings), width, height, settings)
        except ValueError:
            pass  # libjpeg warns; PIL decides below whether the image can be used, and it is then encoded again
    try:
        with _without_pils_bound():
            image = open_image(data, "image")
        return _encode(_shrink(np.asarray(image), settings.image_size), image.width, image.height, settings)
    except Exception as error:  # whatever a decoder raises on untrusted bytes must not stop the other samples
        raise Malformed(str(error).replace("\n", " ")) from error


def _read_plain_header(data: bytes, segments: Sequence[Segment], settings: PrepareDataSettings) -> Header | None:
    """The header of a JPEG that is certainly upright and of one image, several times faster than PIL; else None."""
    if not is_plain_jpeg(data, segments):
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
        with _without_pils_bound():
            header = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise Malformed("cannot decode image: it is damaged, or no JPEG, PNG, WebP, GIF, BMP or TIFF") from error
    except Exception as error:  # PIL's parsers raise many kinds of errors on damaged bytes
        raise Malformed(f"cannot decode image: {error}".replace("\n", " ")) from error
    _check_area(*header.size, settings)
    orientation = read_orientation(header)
    width, height = header.size if orientation < 5 else header.size[::-1]
    plain = orientation == 1 and header.format == "JPEG"
    return Header(width, height, {"RGB": "RGB", "L": "GRAY"}.get(header.mode, "") if plain else "")


@contextmanager
def _without_pils_bound() -> Iterator[None]:
    """PIL refuses images of more than 179 megapixels; ``max_megapixels`` decides here, before anything is decoded."""
    bound = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


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
    data = simplejpeg.encode_jpeg(pixels, settings.jpeg_quality, colours, sampling)
    return CheckedImage(data, width, height, shrink_for_hash(pixels), kept=False)


def shrink_for_hash(pixels: np.ndarray) -> np.ndarray:
    """The grey image that ``perceptual_hashes`` looks at.

    Four points for each of its pixels are enough for the lowest frequencies, at half the time of an average over all.

    Args:
        pixels: uint8 [height, width], [height, width, 1] or RGB [height, width, 3].

    Returns:
        uint8 [HASH_SIDE, HASH_SIDE].
    """
    points = cv2.resize(pixels, (2 * HASH_SIDE, 2 * HASH_SIDE), interpolation=cv2.INTER_LINEAR)
    coarse = cv2.resize(points, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    return coarse if coarse.ndim == 2 else cv2.cvtColor(coarse, cv2.COLOR_RGB2GRAY)


def _lowest_frequencies() -> np.ndarray:
    """Rows of the orthonormal discrete cosine transform [8, HASH_SIDE], as whole numbers.

    float64 adds up their products with pixels without rounding, so every machine gets the same hashes.
    """
    rows = np.cos(np.pi / (2 * HASH_SIDE) * np.outer(np.arange(8), 2 * np.arange(HASH_SIDE) + 1))
    rows[0] /= np.sqrt(2)
    whole: np.ndarray = np.rint((1 << 16) * rows)
    return whole


_LOWEST_FREQUENCIES = _lowest_frequencies()


def perceptual_hashes(coarse: Sequence[np.ndarray]) -> list[int]:
    """64 bits of the coarse structure of each image: signs of its lowest frequencies around their median.

    They hardly change when an image is scaled or encoded again: near-duplicates differ in few bits.

    Args:
        coarse: images from ``shrink_for_hash``.

    Returns:
        0 .. 2**64 - 1 for each.
    """
    if not len(coarse):
        return []
    pixels = np.stack(coarse).astype(np.float64)
    lowest = (_LOWEST_FREQUENCIES @ pixels @ _LOWEST_FREQUENCIES.T).reshape(len(coarse), -1)
    middle = lowest.shape[1] // 2 - 1
    median = np.partition(lowest[:, 1:], middle, axis=1)[:, middle, None]  # the first one is the mean brightness
    return [int.from_bytes(bits.tobytes(), "big") for bits in np.packbits(lowest > median, axis=1)]
