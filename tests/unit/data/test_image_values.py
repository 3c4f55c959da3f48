"""Where each pixel goes on its way to the model, and what stands for an image."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests.source_files import encode
from tinygptv.data import images as module
from tinygptv.data.images import load_image, normalise_pixels, open_image, resize_pixels, stack_pixels, to_rgb

PIXELS = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def refused(act, *arguments):
    with pytest.raises(ValueError) as caught:
        act(*arguments)
    return str(caught.value)


def test_rows_stay_rows_and_columns_columns():
    found = resize_pixels(Image.fromarray(PIXELS), 4)
    assert found.shape == (3, 4, 4) and found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    assert all(found[c, y, x] == PIXELS[y, x, c] for c in range(3) for y in range(4) for x in range(4))
    both = stack_pixels([Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())], 4)
    assert both.shape == (2, 3, 4, 4) and np.array_equal(both[0], found) and np.array_equal(both[1], found[:, ::-1])
    none = stack_pixels([], 5)
    assert none.shape == (0, 3, 5, 5) and none.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa", "P"])
def test_what_is_transparent_is_white_in_every_mode(mode):
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([10, 10, 10, 90, 90, 90])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    elif mode == "PA":
        image = Image.new("PA", (2, 1), (1, 255))
        image.putpalette([0, 0, 0, 10, 10, 10])
        image.putpixel((1, 0), (0, 0))
    elif mode == "La":
        image = image.convert("LA").convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    found = to_rgb(image)
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(10, 10, 10), (255, 255, 255)]
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert half.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_so_many_channels_may_have_them_first(channels):
    array = np.full((channels, 5, 6), 255, dtype=np.uint8)
    array[0, 1, 2] = 0
    found = load_image(array)
    assert found.size == (6, 5) and found.getpixel((2, 1))[0] == 0 and found.getpixel((1, 2))[0] == 255
    assert np.array_equal(np.asarray(load_image(array.transpose(1, 2, 0))), np.asarray(found))


@pytest.mark.parametrize("length", [0, 255, 600])
def test_base64_of_any_length_is_an_image(length):
    """A name of more than 255 characters without a slash is no file, and the system raises for it."""
    for side in range(1, 60):
        image = Image.new("RGB", (side, side))
        text = base64.b64encode(encode(image, "PNG", compress_level=0)).decode()
        if len(text.partition("/")[0]) > length:
            assert load_image(text).tobytes() == image.tobytes()
            return
    raise AssertionError("no text of such a length")


def test_what_is_no_image_is_told_in_words(tmp_path, monkeypatch):
    no_pixels = (np.zeros((0, 5)), np.zeros((4, 0, 3), np.uint8))
    for array in (*no_pixels, *map(np.zeros, ((2, 2, 2), 3, (1, 2, 2, 3))), np.array([["a"]], dtype=object)):
        assert refused(load_image, array).endswith(f"not an array of shape {list(array.shape)} and type {array.dtype}.")
    assert refused(load_image, np.array([[-1.0, 2.0]])).startswith("an image has values from -1 to 2: give 0..1")
    long = "x" * 300
    assert refused(load_image, long) == f"{long[:200]} is no image file, http(s) or data URL, nor base64 of an image."
    (tmp_path / "a.png").write_bytes(b"none")
    path = str(tmp_path / "a.png")
    assert refused(load_image, path) == f"{path} is not an image (JPEG, PNG, WebP, GIF, BMP)."
    assert refused(open_image, b"none") == "the file is not an image (JPEG, PNG, WebP, GIF, BMP)."
    cut = encode(Image.fromarray(PIXELS), "PNG")[:60]
    assert refused(open_image, cut, "it").startswith("cannot decode it of 60 bytes: ")
    stream = io.BytesIO()
    Image.fromarray(np.array([[-5.0]], dtype=np.float32)).save(stream, "TIFF")
    assert refused(open_image, stream.getvalue(), "it").startswith("cannot use it: an image has values from -5 to -5")
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "ICO", sizes=[(4, 4)])
    assert "is not an image" in refused(open_image, stream.getvalue()), "of no format that is known here"


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, Image.DecompressionBombError])
def test_a_decoders_errors_are_one_sentence(monkeypatch, error):
    def fail(*given, formats):
        assert formats == ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
        raise error("broken")

    monkeypatch.setattr(module.Image, "open", fail)
    assert refused(open_image, b"123", "it") == "cannot decode it of 3 bytes: broken"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_addresses_are_asked_with_a_bound_on_the_wait(monkeypatch, scheme):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, timeout))
        return io.BytesIO(encode(Image.fromarray(PIXELS), "PNG"))

    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)
    assert np.array_equal(np.asarray(load_image(f"{scheme}://h/a")), PIXELS) and asked == [(f"{scheme}://h/a", 30)]


def test_a_path_may_be_escaped_in_an_address_and_never_is_elsewhere(tmp_path):
    for name in ("a b.png", "a%20c.png"):
        (tmp_path / name).write_bytes(encode(Image.fromarray(PIXELS), "PNG"))
    for source in (
        f"file://{tmp_path}/a%20b.png",
        f"{tmp_path}/a b.png",
        f"{tmp_path}/a%20c.png",
        tmp_path / "a b.png",
    ):
        assert np.array_equal(np.asarray(load_image(source)), PIXELS)
    assert "is no image file" in refused(load_image, f"{tmp_path}/a%20b.png")


@pytest.mark.parametrize(("side", "expected"), [
    (16, [0, 0, 0, 0, 0, 52, 203, 255, 255, 255, 255, 255, 255, 199, 48, 0]),
    (4, [0, 126, 255, 137]),
])  # fmt: skip
def test_pixels_are_resized_by_pils_bicubic_filter(side, expected):
    """As the release did: other filters give other numbers."""
    row = np.array([0, 0, 0, 255, 255, 255, 255, 0], np.uint8)
    across = Image.fromarray(np.tile(row, (8, 1))).convert("RGB")
    assert resize_pixels(across, side)[0].tolist() == [expected] * side
    assert resize_pixels(across.transpose(Image.Transpose.TRANSPOSE), side)[2].T.tolist() == [expected] * side


def test_pixels_are_normalised_with_clips_own_statistics():
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == (module.IMAGE_MEAN, module.IMAGE_STD)
    given = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 2, 2)
    mean, std = (np.array(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    np.testing.assert_allclose(normalise_pixels(given), (given / 255 - mean) / std, rtol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (np.array([[0.0, 0.4, 1.5]]), [0, 0, 2]),  # beyond 1 they are of 255
        (np.array([[0, 128, 256]]), [0, 0, 1]),  # beyond 255 of 65535
        (np.array([[0, 40000, 51529, 65535]]), [0, 156, 201, 255]),
        (np.array([[0.0, 1 / 510 + 1e-9, 0.5, 1.0]]), [0, 1, 128, 255]),
        (np.array([[1, 0]], np.uint8), [1, 0]),
    ],
)
def test_the_largest_number_tells_the_range(numbers, expected):
    assert np.asarray(load_image(numbers))[0, :, 0].tolist() == expected
    assert refused(load_image, np.append(numbers, 65536)[None]).startswith("an image has values from 0 to 65536: ")


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 5, 1), (5, 3)), ((3, 5, 4), (5, 3)), ((4, 6, 3), (6, 4)), ((1, 6, 1), (6, 1)), ((3, 6, 5), (5, 6))],
)
def test_channels_are_last_where_both_ends_could_be_channels(shape, size):
    assert load_image(np.full(shape, 7, np.uint8)).size == size


def test_deep_grey_images_are_scaled_and_nothing_is_beyond_white():
    values = np.array([[0, 40000, 65535]], np.int32)
    deep = Image.fromarray(values)
    assert deep.mode == "I" and np.asarray(to_rgb(deep))[0].tolist() == [[0] * 3, [156] * 3, [255] * 3]
    scanned = Image.fromarray(np.array([[0, 2048, 4095, 5000]], np.uint16))
    scanned.tag_v2 = {258: (12,)}
    assert np.asarray(to_rgb(scanned))[0, :, 1].tolist() == [0, 128, 255, 255]


def test_an_image_that_is_ready_is_taken_as_it_is():
    image = Image.fromarray(PIXELS)
    assert to_rgb(image) is image and load_image(image) is image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P"])
def test_images_of_every_mode_are_turned_upright(mode):
    """What tells the orientation may be lost with the mode, so that is read first."""
    image = Image.new(mode, (3, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    assert open_image(encode(image, "PNG", exif=exif)).size == (2, 3)


def test_numbers_may_lie_on_another_device_and_belong_to_a_graph():
    there = SimpleNamespace(cpu=lambda: PIXELS)
    assert np.array_equal(np.asarray(load_image(SimpleNamespace(detach=lambda: there))), PIXELS)
    numbers = torch.from_numpy(PIXELS / 255.0).requires_grad_()
    assert np.array_equal(np.asarray(load_image(numbers)), PIXELS)


def test_a_structure_beyond_its_bounds_is_told_before_anything_is_decoded(monkeypatch):
    def check(data):
        raise ValueError(f"too much of {data!r}.")

    monkeypatch.setattr(module, "check_structure", check)
    monkeypatch.setattr(module.Image, "open", lambda *_, **__: pytest.fail("decoded"))
    assert refused(open_image, b"abc", "it") == "cannot decode it of 3 bytes: too much of b'abc'."


def test_base64_holds_nothing_else():
    text = base64.b64encode(encode(Image.fromarray(PIXELS), "PNG")).decode()
    assert load_image(text).size == (4, 4)
    assert load_image(f"{text[:20]}\n{text[20:]}").size == (4, 4), "in lines, as programs write it"
    for wrong in (f"{text[:20]}*{text[20:]}", text[:-3]):
        assert "nor base64 of an image" in refused(load_image, wrong)


def test_a_file_that_cannot_be_looked_at_is_the_systems_error(monkeypatch, tmp_path):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    assert refused(load_image, f"file://{tmp_path}/a.txt").startswith(f"{tmp_path}/a.txt is not an image"), "its path"
    monkeypatch.setattr(module.Path, "is_file", denied)
    with pytest.raises(PermissionError):
        load_image("/secret.png")
