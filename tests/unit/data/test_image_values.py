"""Where each pixel goes on its way to the model, what stands for an image, and what a message may hold."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.source_files import encode
from tinygptv.data import images as module
from tinygptv.data.chat_messages import load_images, read_messages
from tinygptv.data.conversation import ChatMessage
from tinygptv.data.images import load_image, open_image, resize_pixels, stack_pixels, to_rgb

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

    def urlopen(url, timeout):
        asked.append((url, timeout))
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


# ---------------------------------------------------------------------- messages


def test_messages_of_every_form_become_texts_and_images():
    found = read_messages(
        [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "a"},
                    {"type": "image", "path": "p.png"},
                    {"type": "text", "text": ""},
                    {"type": "image_url", "image_url": {"url": "u"}},
                    {"type": "image", "url": "w", "base64": "b"},
                    {"type": "text", "text": "b"},
                ],
            },
            {"role": "assistant", "content": None},
            {"role": "user"},
        ]
    )
    assert [(m.role, m.text, m.images) for m in found] == [
        ("system", "be brief", ()),
        ("user", "a\nb", (None, "p.png", "u", "w")),
        ("assistant", "", ()),
        ("user", "", ()),
    ]


def test_messages_of_another_form_are_named_by_their_number():
    assert refused(read_messages, []) == "the conversation has no messages."
    good = {"role": "user", "content": "x"}
    for bad in ("text", {"content": "x"}):
        said = refused(read_messages, [good, bad])
        assert said == f'message 1 is {bad!r}: a message is {{"role": ..., "content": ...}}.'
    for part in ("x", {"type": "video"}, {"type": "text"}, {"type": "text", "text": 3}, {"text": "x"}):
        said = refused(read_messages, [{"role": "user", "content": [part]}])
        assert said.startswith(f'message 0 has the part {part!r}: a part is {{"type": "text"')


def test_images_that_are_given_go_to_the_parts_that_name_none_in_order():
    colours = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in range(4)]
    text = base64.b64encode(encode(colours[1], "PNG")).decode()
    messages = [ChatMessage("user", "", (None, text)), ChatMessage("user", "", (None, colours[3]))]
    found = load_images(messages, [colours[0], colours[2]])
    assert [image.getpixel((0, 0))[0] for image in found] == [0, 1, 2, 3]
    for given in ([], colours[:1], colours[:3]):
        assert refused(load_images, messages, given).startswith(
            f"2 image parts name no image and {len(given)} images were given: "
        )
    assert load_images([]) == []
