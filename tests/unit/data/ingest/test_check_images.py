"""Images fit for training: repairs, bombs, filters, perceptual hashes."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from PIL.ExifTags import Base

from pipelines.data.ingest.check_images import HASH_SIDE, check_image, perceptual_hashes
from pipelines.data.sources.base import Filtered, Malformed
from pipelines.settings import PrepareDataSettings
from tests.source_files import encode, jpeg, picture, png_chunk
from tinygptv.data.images import open_image

SETTINGS = PrepareDataSettings(image_size=64)


def decoded(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB"), dtype=int)


def likeness(data: bytes, expected: Image.Image) -> float:
    """Mean difference of pixels, 0..255."""
    pixels = decoded(data)
    wanted = np.asarray(expected.convert("RGB").resize(pixels.shape[1::-1], Image.Resampling.BOX), dtype=int)
    return float(np.abs(pixels - wanted).mean())


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    return encode(image, kind, exif=exif)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_small_plain_jpeg_keeps_its_bytes(mode, progressive):
    data = encode(picture(0, (90, 64)).convert(mode), quality=80, progressive=progressive)
    checked = check_image(data, SETTINGS)
    assert checked.kept
    assert checked.data is data
    assert (checked.width, checked.height) == (90, 64)


def test_orientation_1_keeps_its_bytes():
    data = with_orientation(picture(0), 1)
    assert check_image(data, SETTINGS).data is data


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_rotated_image_is_turned_upright(orientation, kind):
    data = with_orientation(picture(0, (60, 40)), orientation, kind)
    checked = check_image(data, SETTINGS)
    upright = open_image(data)
    assert not checked.kept
    assert (checked.width, checked.height) == upright.size == ((60, 40) if orientation < 5 else (40, 60))
    assert decoded(checked.data).shape[1::-1] == upright.size
    assert likeness(checked.data, upright) < 6
    assert "exif" not in Image.open(io.BytesIO(checked.data)).info


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (128, 128), (1000, 65), (641, 479)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_large_image_is_shrunk_to_the_shorter_side(size, mode):
    original = picture(1, size).convert(mode)
    checked = check_image(encode(original, quality=95), SETTINGS)
    stored = Image.open(io.BytesIO(checked.data))
    assert (checked.width, checked.height) == size
    assert min(stored.size) == 64
    assert stored.mode == mode
    assert stored.size[0] / stored.size[1] == pytest.approx(size[0] / size[1], rel=0.02)
    assert likeness(checked.data, original) < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_sound_picture_with_damaged_exif_is_kept(kind):
    data = with_orientation(picture(0, (60, 40)), 6, kind)
    start = data.index(b"MM\0*") if b"MM\0*" in data else data.index(b"II*\0")
    damaged = data[:start] + b"M\xff" + data[start + 2 :]
    if kind == "PNG":  # its chunks have checksums
        chunk = damaged.index(b"eXIf")
        length = int.from_bytes(damaged[chunk - 4 : chunk], "big")
        checksum = zlib.crc32(damaged[chunk : chunk + 4 + length]).to_bytes(4, "big")
        damaged = damaged[: chunk + 4 + length] + checksum + damaged[chunk + 8 + length :]
    checked = check_image(damaged, SETTINGS)
    assert (checked.width, checked.height) == (60, 40)
    assert likeness(checked.data, picture(0, (60, 40))) < 10


ODD = {
    "palette": lambda: encode(picture(2).convert("P"), "PNG"),
    "one bit": lambda: encode(picture(2).convert("1"), "PNG"),
    "transparent": lambda: encode(picture(2).convert("RGBA"), "PNG"),
    "grey with alpha": lambda: encode(picture(2).convert("LA"), "PNG"),
    "16 bit": lambda: encode(Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40), "PNG"),
    "cmyk": lambda: encode(picture(2).convert("CMYK"), "JPEG"),
    "animated gif": lambda: encode(picture(2), "GIF", save_all=True, append_images=[picture(3)]),
    "animated webp": lambda: encode(picture(2), "WEBP", save_all=True, append_images=[picture(3)]),
    "bmp": lambda: encode(picture(2), "BMP"),
    "tiff": lambda: encode(picture(2), "TIFF"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_modes_become_plain_jpegs_of_the_first_frame(name):
    data = ODD[name]()
    checked = check_image(data, SETTINGS)
    assert not checked.kept
    assert (checked.width, checked.height) == (48, 32)
    assert Image.open(io.BytesIO(checked.data)).mode == "RGB"
    assert likeness(checked.data, open_image(data)) < 16


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.security
@pytest.mark.parametrize("size", [(11_000, 10_000), (50_000, 50_000)])
def test_decompression_bombs_are_refused_unread(size):
    with pytest.raises(Malformed, match="bomb"):
        check_image(png_bomb(*size), PrepareDataSettings())


@pytest.mark.security
@pytest.mark.timeout(120)
def test_many_scans_are_refused_unread():
    scan = bytes([0xFF, 0xDA, 0, 12, 3, 1, 0x11, 2, 0x11, 3, 0x11, 0, 0, 0])
    with pytest.raises(Malformed, match="more than 100 scans"):
        check_image(jpeg(0, (600, 500), progressive=True)[:-2] + scan * 100_000 + b"\xff\xd9", PrepareDataSettings())


def jpeg_cut() -> bytes:
    data = jpeg(4, (200, 150))
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "data", [jpeg_cut(), jpeg(4)[:30], b"\xff\xd8\xff\xe0" + b"x" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 60]
)
def test_damaged_images_are_refused(data):
    with pytest.raises(Malformed, match=r"cannot decode|is not an image"):
        check_image(data, SETTINGS)


def test_damage_inside_small_images_is_found_although_their_bytes_are_kept():
    data = jpeg(5, (60, 60))
    with pytest.raises(Malformed):
        check_image(data[: len(data) - 200], SETTINGS)


def test_sound_picture_with_a_strange_tail_is_encoded_anew():
    data = jpeg(6)
    damaged = data[:-2] + b"\x00\x11\x22\x33" + data[-2:]  # bytes before the end mark: decoders warn and go on
    checked = check_image(damaged, SETTINGS)
    assert likeness(checked.data, picture(6)) < 8


@pytest.mark.parametrize(
    ("size", "changes", "name"),
    [((7, 40), {}, "min_side"), ((400, 10), {}, "max_aspect_ratio"), ((48, 32), {"min_side": 33}, "min_side")],
)
def test_filters_on_size_and_shape(size, changes, name):
    with pytest.raises(Filtered) as error:
        check_image(jpeg(0, size), PrepareDataSettings(**changes))
    assert error.value.filter == name


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((40, 8), {"min_side": 8}),
        ((8, 40), {"min_side": 8, "max_aspect_ratio": 5}),
        ((40, 8), {"max_aspect_ratio": 5}),
        ((50, 20), {"max_megapixels": 0.001}),
    ],
)
def test_an_image_exactly_at_a_bound_is_kept(size, changes):
    checked = check_image(jpeg(0, size), PrepareDataSettings(**changes))
    assert (checked.width, checked.height) == size and checked.kept


@pytest.mark.parametrize(
    ("size", "changes", "error"),
    [
        ((40, 7), {"min_side": 8, "max_aspect_ratio": 9}, Filtered),
        ((41, 8), {"max_aspect_ratio": 5}, Filtered),
        ((8, 41), {"max_aspect_ratio": 5}, Filtered),
        ((51, 20), {"max_megapixels": 0.001}, Malformed),
        ((50, 21), {"max_megapixels": 0.001}, Malformed),
    ],
)
def test_an_image_one_pixel_beyond_a_bound_is_not(size, changes, error):
    for kind in ("JPEG", "PNG"):
        with pytest.raises(error):
            check_image(encode(picture(0, size), kind), PrepareDataSettings(**changes))


@pytest.mark.parametrize(("side", "kept"), [(32, True), (33, False)])
def test_an_image_of_exactly_the_size_keeps_its_bytes(side, kept):
    checked = check_image(jpeg(0, (60, side)), PrepareDataSettings(image_size=32))
    assert checked.kept is kept and min(open_image(checked.data).size) == 32


def hashes(*checked):
    return perceptual_hashes([one.coarse for one in checked])


def num_differing(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def test_perceptual_hash_survives_scaling_and_encoding_and_tells_pictures_apart():
    distances = []
    for seed in range(20):
        first, second, other = hashes(
            check_image(encode(picture(seed, (300, 200)), quality=95), PrepareDataSettings()),
            check_image(encode(picture(seed, (300, 200)).resize((150, 100)), quality=60), SETTINGS),
            check_image(jpeg(seed + 100), SETTINGS),
        )
        distances.append((num_differing(first, second), num_differing(first, other)))
    near, far = zip(*distances, strict=True)
    assert sorted(near)[-2] <= 4 < min(far)


def test_perceptual_hashes_are_signs_of_the_cosine_transform_around_its_median():
    """The median leaves out the mean brightness, which is below it where little more than a corner is bright."""
    images = np.random.default_rng(0).integers(0, 256, (5, HASH_SIDE, HASH_SIDE), dtype=np.uint8)
    images[4] = 0
    images[4, :3, :3] = 200, 150, 90
    for image, found in zip(images, perceptual_hashes(images), strict=True):
        lowest = cv2.dct(image.astype(np.float64))[:8, :8].ravel()
        bits = lowest > np.sort(lowest[1:])[31]
        assert found == int("".join(str(int(bit)) for bit in bits), 2)


def test_perceptual_hash_of_a_flat_picture_is_defined_and_of_no_picture_is_none():
    assert all(
        0 <= value < 2**64 for value in perceptual_hashes([np.full((HASH_SIDE, HASH_SIDE), 255, dtype=np.uint8)])
    )
    assert perceptual_hashes([]) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("size", "stored"), [((641, 479), (86, 64)), ((479, 641), (64, 86)), ((96, 64), (96, 64))])
def test_a_shrunk_image_has_the_rounded_size_and_keeps_the_originals_numbers(kind, size, stored):
    checked = check_image(encode(picture(1, size), kind), SETTINGS)
    assert ((checked.width, checked.height), Image.open(io.BytesIO(checked.data)).size) == (size, stored)


@pytest.mark.parametrize("quality", [50, 95])
def test_images_are_encoded_at_the_quality_asked_for(quality):
    checked = check_image(encode(picture(0), "PNG"), PrepareDataSettings(jpeg_quality=quality))
    asked_for = Image.open(io.BytesIO(encode(picture(0), quality=quality)))
    assert Image.open(io.BytesIO(checked.data)).quantization == asked_for.quantization
    assert simplejpeg.decode_jpeg_header(checked.data)[2:] == ("YCbCr", "420")
