"""Whatever stands for an image becomes the same pixels, or is refused in one sentence."""

from __future__ import annotations

import base64
import io
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from tests.source_files import encode
from tinygptv.data.images import load_image, normalise_pixels, open_image, stack_pixels, to_rgb
from tinygptv.data.processing import TinyGPTVImageProcessor, flatten_images

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    return encode(image, kind, **options)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS)))
    return path


@pytest.fixture
def url(png):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert "python" not in self.headers["User-Agent"].lower(), "many servers refuse it"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png.read_bytes())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image"
    server.shutdown()
    server.server_close()


def test_every_form_gives_the_same_pixels(png, url):
    data = png.read_bytes()
    text = base64.b64encode(data).decode()
    forms = [
        Image.fromarray(PIXELS), data, bytearray(data), memoryview(data), io.BytesIO(data), png.open("rb"),
        png, str(png), f"file://{png}", url, text, base64.encodebytes(data).decode(), text.rstrip("="),
        "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().replace("=", "%3D"),
        f"file://localhost{png}", f"data:image/png;base64,{text}", f"DATA:image/png;name=x;base64,{text}",
        PIXELS, torch.from_numpy(PIXELS), PIXELS.transpose(2, 0, 1), torch.from_numpy(PIXELS).permute(2, 0, 1),
        PIXELS / 255.0, torch.from_numpy(PIXELS) / 255.0, PIXELS.astype(np.float32), PIXELS.astype(np.int64),
        torch.from_numpy(PIXELS).bfloat16(),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(np.asarray(load_image(form)), PIXELS), type(form)
    batch = TinyGPTVImageProcessor(28)([[forms[0], forms[1]], str(png)], return_tensors="pt")["pixel_values"]
    assert batch.shape == (3, 3, 28, 28) and torch.equal(batch[0], batch[1]) and torch.equal(batch[0], batch[2])


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.full((4, 4), 0.5, np.float32), 128),
        (np.array([[0.0, 1.0]], np.float32), 255),
        (np.full((4, 4), 200.0), 200),
        (np.array([[0, 65535]], np.uint16), 255),
        (np.array([[True, False]]), 255),
        (np.array([[0, 1]], np.int32), 1),
    ],
)
def test_numbers_are_scaled_by_their_range(array, wanted):
    assert np.asarray(load_image(array)).max() == wanted


@pytest.mark.parametrize("array", [np.full((4, 4, 3), -1.8), np.full((4, 4), np.nan), np.full((4, 4), 1e6)])
def test_normalised_or_endless_numbers_are_refused(array):
    with pytest.raises(ValueError, match="an image has values from"):
        load_image(array)


@pytest.mark.parametrize("thing", [object(), np.zeros(5), np.zeros((2, 3, 4, 5, 6)), np.zeros((5, 5, 7)), None])
def test_what_is_no_image_is_refused(thing):
    with pytest.raises(ValueError, match="an image is a PIL image, bytes, a path"):
        load_image(thing)


def test_files_that_are_no_images_are_named(tmp_path, png):
    readme = tmp_path / "README.md"
    readme.write_text("# words")
    with pytest.raises(ValueError, match=r"README.md is not an image \(JPEG, PNG, WebP, GIF, BMP\)"):
        load_image(readme)
    (tmp_path / "half.png").write_bytes(png.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot decode .*half.png of 100 bytes"):
        load_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"missing\.png is no image file, http"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"the data URL data:image/png;base64,!!! cannot be read: it is not valid"):
        load_image("data:image/png;base64,!!!")


def test_sixteen_bits_are_scaled_by_their_own_range():
    """Also where every value is small: 255 of 65535 is nearly black."""
    values = np.array([[0, 255, 65535, 32768]], np.uint16)
    assert np.asarray(open_image(encoded(Image.fromarray(values))))[0, :, 0].tolist() == [0, 1, 255, 128]
    dark = np.full((2, 2), 200, np.uint16)
    assert np.asarray(open_image(encoded(Image.fromarray(dark)))).max() == 1
    floats = Image.fromarray(np.array([[0.0, 0.25]], np.float32))
    assert np.asarray(open_image(encoded(floats, "TIFF")))[0, :, 0].tolist() == [0, 64]


@pytest.mark.parametrize(
    ("declared", "white"),
    [((12,), 4095), (12, 4095), ((10,), 1023), ((14,), 16383), ((16,), 65535), ((9,), 65535), (None, 65535)],
)
def test_grey_values_are_scaled_by_the_bits_that_a_scanner_declares(declared, white):
    image = Image.fromarray(np.array([[0, white // 2 + 1, white]], np.uint16))
    if declared is not None:
        image.tag_v2 = {258: declared}
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<"), ("I;16L", "<"), ("I;16B", ">")])
def test_16_bits_may_stand_in_either_order(mode, order):
    values = np.array([[0, 257, 65535]], f"{order}u2")
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_may_stand_first_or_last(channels):
    numbers = np.random.default_rng(0).integers(0, 256, (12, 16, channels), dtype=np.uint8)
    last, first = load_image(numbers), load_image(numbers.transpose(2, 0, 1))
    assert last.size == (16, 12) and np.array_equal(np.asarray(last), np.asarray(first))
    assert load_image(np.zeros((3, 16, 3), np.uint8)).size == (16, 3), "a narrow image with its channels last"


def test_transparency_is_laid_on_white_and_pictures_stand_upright(tmp_path):
    assert np.asarray(to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).min() == 255
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    path.write_bytes(encoded(turned, exif=exif))
    for form in (path, Image.open(path)):
        assert load_image(form).size == (12, 16)


def test_normalisation_is_one_formula():
    pixels = stack_pixels([Image.fromarray(PIXELS), load_image(PIXELS[:, ::-1])], 14)
    ours = normalise_pixels(pixels)
    assert ours.dtype == np.float32 and ours.shape == (2, 3, 14, 14)
    assert torch.equal(normalise_pixels(torch.from_numpy(pixels)), torch.from_numpy(ours))
    white = normalise_pixels(np.full((3, 1, 1), 255, np.uint8)).ravel()
    assert white.tolist() == pytest.approx([1.93033, 2.07489, 2.14590], abs=1e-4)


def test_nested_lists_and_batches_are_flattened():
    assert flatten_images(None) == [] and flatten_images("a.png") == ["a.png"]
    assert flatten_images([["a"], ("b", ["c"])]) == ["a", "b", "c"]
    load = partial(map, np.shape)
    assert list(load(flatten_images([np.zeros((2, 4, 4, 3)), np.zeros((5, 5))]))) == [(4, 4, 3), (4, 4, 3), (5, 5)]
