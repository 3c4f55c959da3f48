"""Checks of images and rows: what is decoded how, every reason word for word, each bound of each axis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.data.ingest import check_images, check_rows
from pipelines.data.ingest.check_images import Header, perceptual_hashes, read_header
from pipelines.data.ingest.check_rows import check_boxes, check_row
from pipelines.data.sources.base import Filtered, Malformed
from pipelines.settings import PrepareDataSettings
from tests.source_files import encode, picture
from tinygptv.data.prompts import INSTRUCTIONS
from tinygptv.data.sample import SampleRow, Turn

SETTINGS = PrepareDataSettings(image_size=64)


def refused(act, *arguments, **options):
    with pytest.raises((Malformed, Filtered)) as caught:
        act(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------------- images


def test_a_header_has_the_upright_size_and_says_who_decodes():
    image = picture(0, (90, 64))
    assert read_header(encode(image), SETTINGS) == Header(90, 64, "RGB")
    assert read_header(encode(image.convert("L")), SETTINGS) == Header(90, 64, "GRAY")
    assert read_header(encode(image.convert("CMYK")), SETTINGS) == Header(90, 64, "")
    assert read_header(encode(image, "PNG"), SETTINGS) == Header(90, 64, "")
    exif = type(image.getexif())()
    for orientation, size in ((1, (90, 64)), (4, (90, 64)), (5, (64, 90)), (8, (64, 90))):
        exif[0x0112] = orientation
        assert read_header(encode(image, exif=exif), SETTINGS) == Header(*size, "RGB" if orientation == 1 else "")
        assert read_header(encode(image, "PNG", exif=exif), SETTINGS) == Header(*size, "")


def test_why_an_image_is_not_used_word_for_word():
    few = PrepareDataSettings(max_megapixels=0.005, min_side=30, max_aspect_ratio=2.5)
    for kind in ("JPEG", "PNG"):
        assert refused(read_header, encode(picture(0, (90, 64)), kind), few) == (
            "decompression bomb: 90 x 64 pixels are more than max_megapixels=0.005"
        )
        assert refused(read_header, encode(picture(0, (40, 29)), kind), few) == (
            "40 x 29 pixels, shorter side below 30"
        )
        assert refused(read_header, encode(picture(0, (30, 76)), kind), few) == (
            "30 x 76 pixels, aspect ratio above 2.5"
        )
    assert refused(check_images._check_area, 0, 3, SETTINGS) == "the image has 0 x 3 pixels"
    assert refused(check_images._check_area, 3, 0, SETTINGS) == "the image has 3 x 0 pixels"
    check_images._check_area(1, 1, SETTINGS)
    assert refused(read_header, b"no image", SETTINGS) == (
        "cannot decode image: it is damaged, or no JPEG, PNG, WebP, GIF, BMP or TIFF"
    )


def test_what_a_decoder_says_is_one_line(monkeypatch):
    def fail(*args, **options):
        raise SyntaxError("first\nsecond")

    monkeypatch.setattr(check_images, "check_structure", lambda data: [])
    monkeypatch.setattr(check_images, "is_plain_jpeg", lambda data, segments: False)
    monkeypatch.setattr(check_images.Image, "open", fail)
    assert refused(read_header, b"x", SETTINGS) == "cannot decode image: first second"
    monkeypatch.setattr(check_images, "open_image", fail)
    assert refused(check_images.decode_checked, b"x", Header(9, 9), SETTINGS) == "first second"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_bound_on_pixels_is_the_settings_own(monkeypatch, kind):
    """PIL has one of its own, beyond which no setting reached: 179 megapixels, here 20."""
    monkeypatch.setattr(check_images.Image, "MAX_IMAGE_PIXELS", 10)
    exif = check_images.Image.Exif()
    exif[0x0112] = 6
    checked = check_images.check_image(encode(picture(0, (90, 64)), kind, exif=exif), SETTINGS)
    assert (checked.width, checked.height) == (64, 90)
    assert check_images.Image.MAX_IMAGE_PIXELS == 10, "other images have PIL's again"
    assert "no JPEG, PNG" in refused(read_header, b"x", SETTINGS) and check_images.Image.MAX_IMAGE_PIXELS == 10


def test_a_structure_that_a_decoder_is_spared_is_refused_first(monkeypatch):
    def refuse(data):
        raise ValueError(f"{len(data)} scans")

    monkeypatch.setattr(check_images, "check_structure", refuse)
    assert refused(read_header, encode(picture(0, (90, 64)))[:100], SETTINGS) == "cannot decode image: 100 scans"


def test_a_large_jpeg_is_decoded_at_the_least_scale_that_covers_both_sides(monkeypatch):
    asked = []

    def decode(data, colours, *, min_width, min_height):
        asked.append((data, colours, min_width, min_height))
        return np.zeros((min_height + 1, min_width + 1, 3), np.uint8)

    monkeypatch.setattr(check_images.simplejpeg, "decode_jpeg", decode)
    pixels = check_images._decode_shrunk(b"x", Header(300, 200, "RGB"), SETTINGS)
    assert asked == [(b"x", "RGB", 96, 64)] and pixels.shape == (64, 96, 3)
    assert check_images._target_size(300, 200, 64) == (96, 64) and check_images._target_size(200, 301, 64) == (64, 96)
    assert check_images._target_size(64, 64, 64) == (64, 64)


def test_little_is_shrunk_by_cubics_and_much_by_areas(monkeypatch):
    used = []
    monkeypatch.setattr(
        check_images.cv2,
        "resize",
        lambda pixels, size, interpolation: used.append((pixels.shape[:2], size, interpolation)),
    )
    cubic, area = check_images.cv2.INTER_CUBIC, check_images.cv2.INTER_AREA
    same = np.zeros((10, 20), np.uint8)
    assert check_images._resize(same, (20, 10)) is same and not used
    check_images._resize(np.zeros((65, 130, 3), np.uint8), (100, 50))
    check_images._resize(np.zeros((66, 131, 3), np.uint8), (100, 50))
    check_images._resize(same, (10, 20))
    assert used == [((65, 130), (100, 50), cubic), ((66, 131), (100, 50), area), ((10, 20), (10, 20), area)]
    assert check_images._shrink(same, 10) is same, "the shorter side counts"


def test_a_hash_looks_at_four_points_for_each_pixel_of_a_grey_image():
    pixels = np.random.default_rng(0).integers(0, 255, (129, 301, 3), dtype=np.uint8)
    resize, inter = check_images.cv2.resize, check_images.cv2
    points = resize(pixels, (64, 64), interpolation=inter.INTER_LINEAR).astype(int).reshape(32, 2, 32, 2, 3)
    grey = points.mean(axis=(1, 3)) @ (0.299, 0.587, 0.114)
    coarse = check_images.shrink_for_hash(pixels)
    assert coarse.shape == (32, 32) and coarse.dtype == np.uint8 and np.abs(coarse - grey).max() <= 1.1
    one_plane = check_images.shrink_for_hash(pixels[..., :1].copy())
    assert one_plane.shape == (32, 32) and np.abs(one_plane - points[..., 0].mean(axis=(1, 3))).max() <= 1


def test_bits_of_a_hash_are_the_frequencies_above_their_median_without_the_mean():
    grey = np.zeros((32, 32), np.uint8)
    grey[:, :16] = 200
    (value,) = perceptual_hashes([grey])
    assert [value] * 2 == perceptual_hashes([grey] * 2) and 0 < value < 1 << 64
    lowest = check_images.cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
    median = np.sort(lowest[1:])[31]
    assert value == int("".join("01"[int(number > median)] for number in lowest), 2)


# ---------------------------------------------------------------------- rows


def row(**changes):
    fields = {"id": "a", "source": "s", "task": "vqa", "turns": (Turn("q", ("a",)),), "image": b"x"}
    return SampleRow(**{**fields, **changes})


def test_why_a_row_is_not_used_word_for_word():
    def said(**changes):
        return refused(check_row, row(**changes), web=False, settings=SETTINGS)

    assert said(task="painting") == f"task 'painting' is unknown; known: {', '.join(INSTRUCTIONS)}"
    assert said(turns=()) == "there are no turns"
    assert said(turns=(Turn("q", ("a",)), Turn("q", ()))) == "there is a question without an answer"
    for task in set(INSTRUCTIONS) - {"text"}:
        assert said(task=task, image=None) == f"task {task} needs an image, and there is none"
    assert said(task="refer") == "task refer needs a box, and there is none"
    assert said(task="text", image=None, turns=(Turn(" ", ("a",)),)) == (
        "a question is empty, and there is no image to ask about"
    )
    assert said(turns=(Turn("", (" ", "")),)) == "an answer is empty"
    long = "{<1><2><3><" + "4" * 99 + ">}"
    assert said(turns=(Turn("q", (long,)),)).startswith(f"box text {check_rows.shorten(long, 60)} is not {{<x1>")
    for good in ("{<0><0><100><100>}", "{<5><6><5><6>}", "{x}"):
        assert check_row(row(turns=(Turn(good, (good,)),)), web=False, settings=SETTINGS)
    for bad in ("{<2><0><1><9>}", "{<0><2><9><1>}", "{<0><0><101><9>}", "{<0><0><9><101>}", "{<1><2><3>}", "{<-1>}"):
        assert "x1 <= x2 and y1 <= y2" in said(turns=(Turn(bad, ("a",)),))


def test_line_breaks_of_windows_are_ones_of_unix_in_questions_and_answers():
    found = check_row(row(turns=(Turn("a\r\nb", ("c\r\nd", " ")),)), web=False, settings=SETTINGS)
    assert found.turns == (Turn("a\nb", ("c\nd",)),)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, float("nan"), 1), "has a corner that is no number"),
        ((0, 0.5, 1, 1), "is given in shares of the image: give pixels, of 300 x 200"),
        ((9, 1, 8, 2), "is turned round: give x1, y1, x2, y2 with x1 < x2 and y1 < y2, not width and height"),
        ((1, 9, 2, 8), "is turned round: give x1, y1, x2, y2 with x1 < x2 and y1 < y2, not width and height"),
        ((-6.1, 0, 9, 9), "reaches out of the image of 300 x 200 pixels"),
        ((0, -4.1, 9, 9), "reaches out of the image of 300 x 200 pixels"),
        ((0, 0, 306.1, 9), "reaches out of the image of 300 x 200 pixels"),
        ((0, 0, 9, 204.1), "reaches out of the image of 300 x 200 pixels"),
        ((300, 0, 304, 9), "has no area in the image of 300 x 200 pixels"),
        ((0, 200, 9, 203), "has no area in the image of 300 x 200 pixels"),
        ((5, 5, 5, 9), "has no area in the image of 300 x 200 pixels"),
    ],
)
def test_each_side_of_a_box_has_its_bound(box, reason):
    said = refused(check_boxes, row(boxes=(box,), width=300, height=200))
    assert said == f"box {box[0]:g}, {box[1]:g}, {box[2]:g}, {box[3]:g} {reason}"


def test_boxes_within_the_tolerance_are_clipped_side_by_side():
    sample = row(boxes=((-6, -4, 306, 204), (1, 1, 2, 2)), width=300, height=200)
    assert check_boxes(sample).boxes == ((0, 0, 300, 200), (1, 1, 2, 2))
    for width, height, is_share in ((3, 1, True), (1, 3, True), (2, 2, False)):
        small = replace(sample, boxes=((0, 0, 1, 1),), width=width, height=height)
        if is_share:
            assert "shares of the image" in refused(check_boxes, small)
        else:
            assert check_boxes(small).boxes == ((0, 0, 1, 1),)


def test_filters_of_captions_say_their_numbers():
    settings = PrepareDataSettings(min_words=2, min_letters=0.5, max_repetition=0.5)

    def said(caption):
        sample = row(task="pair", turns=(Turn("", (caption,)),))
        return refused(check_row, sample, web=True, settings=settings)

    assert said("one") == "1 words"
    assert said("a b ! ? .") == "2 letters among 5 characters"
    assert said("go go go go go a b c") == "'go' is 5 of 8 words"
    sample = row(task="pair", turns=(Turn("", ("go go go go a b c d",)),))
    assert check_row(sample, web=True, settings=settings) == sample
