"""Untrusted images: what is taken, what is refused, and that refusing is cheap."""

from __future__ import annotations

import asyncio
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.serving.decoders import DecoderBusy
from pipelines.serving.errors import ProtocolError
from pipelines.serving.media import MediaLoader
from pipelines.serving.turns import ImageReference
from pipelines.settings import ServeSettings
from tests.serving_api import decoders
from tests.serving_model import data_url, make_image
from tests.source_files import encode, png_chunk

pytestmark = pytest.mark.security


def load(*urls, side=16, **settings):
    loader = MediaLoader(ServeSettings(**settings), decoders())
    images = [ImageReference(f"messages.0.content.{i}", url) for i, url in enumerate(urls)]
    return asyncio.run(loader.load(images, side))


def refusal(*urls, **settings):
    with pytest.raises(ProtocolError) as caught:
        load(*urls, **settings)
    return caught.value


def png_header(width, height, body=b""):
    """A PNG that claims to be of this size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_usual_formats_are_taken(kind):
    image = load(data_url(make_image(width=60, height=40, kind=kind), f"image/{kind.lower()}"))[0]
    assert (image.width, image.height, image.pixels.shape) == (60, 40, (3, 16, 16))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_unusual_pixels_are_taken(mode):
    image = Image.new(mode, (30, 20))
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert load(data_url(encode(image, kind)))[0].pixels.shape == (3, 16, 16)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    red, green, blue = load(data_url(data, "image/gif"))[0].pixels[:, 8, 8].tolist()
    assert red > 200 and green < 50 and blue < 50


def test_a_wrong_label_does_no_harm():
    assert load(data_url(make_image(kind="JPEG"), "image/png"))[0].width == 60


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,####", "invalid_base64"),
        ("data:image/png;base64,QUJDQ", "invalid_base64"),
        ("data:image/png;base64,QUJD\nQUJD", "invalid_image"),
        ("data:image/png,%89PNG", "invalid_image"),
        ("data:text/html;base64,PGI+", "invalid_image_url"),
        ("data:" + "x" * 300, "invalid_image_url"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "invalid_image"),
        (data_url(b"%PDF-1.7", "image/png"), "invalid_image"),
        (data_url(encode(Image.new("RGB", (8, 8)), "TIFF"), "image/tiff"), "invalid_image"),
        (data_url(make_image(kind="JPEG")[:300]), "invalid_image"),
        (data_url(make_image(kind="PNG")[:100]), "invalid_image"),
        (data_url(png_header(0, 10)), "invalid_image"),
        (data_url(png_header(10, 10, zlib.compress(b"x"))), "invalid_image"),
        (data_url(np.random.default_rng(0).bytes(5000)), "invalid_image"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("http://127.0.0.1/x.png", "invalid_image_url"),
    ],
)
def test_everything_else_is_refused_with_its_field(url, code):
    error = refusal(data_url(make_image()), url)
    assert (error.status in (400, 413), error.code) == (True, code)
    assert error.param.startswith("messages.0.content.1")
    assert "/usr" not in error.message and "0x" not in error.message and "passwd" not in error.message


def test_a_decompression_bomb_is_refused_by_its_header():
    gif = encode(Image.new("P", (8, 8)), "GIF")
    bombs = [
        png_header(60_000, 60_000, zlib.compress(b"\0" * 1_000_000)),
        encode(Image.new("1", (6_000, 6_000)), "PNG"),
        gif[:6] + struct.pack("<HH", 6_000, 6_000) + gif[10:],
    ]
    for bomb in bombs:
        url = data_url(bomb)
        tracemalloc.start()
        error = refusal(url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (error.status, error.code) == (413, "image_too_large")
        assert "megapixels" in error.message
        assert peak < 20 * len(url) + 5_000_000


def test_a_text_bomb_in_a_small_png_is_refused_or_harmless():
    text = zlib.compress(b"a" * 50_000_000)
    data = b"bomb\0\0" + text
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    image = make_image()
    assert refusal(data_url(image[:33] + chunk + image[33:])).code == "invalid_image"


def test_size_is_checked_before_decoding_base64():
    assert refusal("data:image/png;base64," + "A" * 2_000_000, max_image_mb=1).status == 413


def test_number_of_images_is_bounded():
    url = data_url(make_image())
    assert refusal(url, url, url, max_images=2).code == "too_many_images"
    assert len(load(url, url, max_images=2)) == 2


class Decoders:
    """Decoders that never decode."""

    def __init__(self, error):
        self.error = error

    async def decode(self, job, **_):
        raise self.error


def test_an_image_that_takes_too_long_is_the_clients_mistake_and_a_busy_decoder_is_not():
    image = ImageReference("messages.0.content.0", data_url(make_image()))
    for error, status, code in ((TimeoutError(), 400, "image_timeout"), (DecoderBusy(), 503, "unavailable")):
        loader = MediaLoader(ServeSettings(), Decoders(error))
        with pytest.raises(ProtocolError) as caught:
            asyncio.run(loader.load([image], 16))
        assert (caught.value.status, caught.value.code) == (status, code)
        assert bool(caught.value.retry_after_s) == (status == 503)


@pytest.mark.parametrize("pixels", [2400, 2399])
def test_the_pixel_bound_is_exact(pixels):
    url = data_url(make_image(width=60, height=40))
    if pixels == 2400:
        assert load(url, max_image_megapixels=pixels / 1e6)[0].width == 60
    else:
        assert refusal(url, max_image_megapixels=pixels / 1e6).code == "image_too_large"


def test_the_byte_bound_is_exact():
    data = make_image()
    assert load(data_url(data), max_image_mb=len(data) / 1e6)[0].width == 60
    assert refusal(data_url(data), max_image_mb=(len(data) - 1) / 1e6).status == 413
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    assert load(percent, max_image_mb=len(data) / 1e6)[0].width == 60
    assert refusal(percent, max_image_mb=(len(data) - 1) / 1e6).status == 413


def test_what_follows_the_image_in_a_file_does_not_matter():
    polyglot = make_image(kind="JPEG") + b"PK\x03\x04<script>alert(1)</script>"
    assert load(data_url(polyglot))[0].width == 60
