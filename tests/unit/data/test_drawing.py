"""Boxes of an answer on its image: where they are, in which colour, and where their labels go."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image, ImageDraw, ImageFont

from tinygptv.data.boxes import COLOURS
from tinygptv.data.drawing import _place_label, _readable_on, draw_boxes

WHITE = (255, 255, 255)


def white(width=200, height=100, mode="RGB"):
    return Image.new(mode, (width, height), "white")


def extent(image, colour):
    found = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == colour]
    across, down = zip(*found, strict=True)
    return min(across), min(down), max(across), max(down)


@pytest.mark.parametrize("answer", ["{<10><20><50><80>}", "{<50><80><10><20>}"], ids=["ordered", "turned"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_box_is_an_outline_of_two_pixels_on_a_copy(answer, mode):
    image = white(mode=mode)
    drawn = draw_boxes(image, answer)
    assert (drawn.mode, drawn.size) == ("RGB", (200, 100))
    assert extent(drawn, COLOURS[0]) == (20, 20, 100, 80)
    line = [drawn.getpixel((x, 50)) for x in range(18, 26)]
    assert line == [WHITE] * 2 + [COLOURS[0]] * 2 + [WHITE] * 4
    assert image.getcolors() == [(200 * 100, 255 if mode == "L" else WHITE)]


def test_lines_grow_with_the_longer_side():
    for size, width in (((1000, 500), 4), ((500, 1000), 4), ((600, 300), 2), ((700, 10), 3)):
        drawn = draw_boxes(white(*size), "{<10><0><100><100>}")
        start = size[0] // 10
        line = [drawn.getpixel((x, size[1] // 2)) == COLOURS[0] for x in range(start, start + 8)]
        assert line == [True] * width + [False] * (8 - width)


def test_each_phrase_has_a_colour_and_all_its_boxes_have_it():
    answer = "<p>a</p> {<5><50><15><90>}<delim>{<25><50><35><90>} <p>b</p> {<60><50><90><90>}"
    drawn = draw_boxes(white(400, 200), answer)
    for x, colour in ((20, 0), (100, 0), (240, 1)):
        assert drawn.getpixel((x, 140)) == COLOURS[colour]
    many = " ".join(f"<p>p</p> {{<{n * 8}><50><{n * 8 + 4}><90>}}" for n in range(len(COLOURS) + 1))
    last = draw_boxes(white(400, 200), many)
    assert last.getpixel((len(COLOURS) * 32, 140)) == COLOURS[0], "colours come again"


def test_no_box_changes_nothing():
    assert draw_boxes(white(), "a dog").tobytes() == white().tobytes()


@pytest.fixture(scope="module")
def place():
    image = white(200, 100)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    left, _, right, bottom = draw.textbbox((0, 0), "word", font=font)
    size = (right - left + 4, bottom + 3)
    return size, lambda box, taken=(): _place_label(draw, "word", font, box, list(taken))


def test_a_label_stands_above_its_box_or_inside_it(place):
    (width, height), label = place
    assert label((30, 50, 90, 90)) == (30, 50 - height, 30 + width, 50)
    assert label((30, height, 90, 90)) == (30, 0, 30 + width, height), "there is just room"
    assert label((30, height - 1, 90, 90))[1] == height - 1, "inside"
    assert label((190, 50, 199, 90))[::2] == (200 - width, 200)
    assert label((-5, 50, 9, 90))[0] == 0


def test_labels_that_would_overlap_go_below_each_other(place):
    (width, height), label = place
    first = label((30, 40, 90, 90))
    second = label((30, 40, 60, 80), [first])
    assert second == (30, first[3], 30 + width, first[3] + height)
    assert label((30, 40, 60, 80), [first, second])[1] == second[3]
    beside = label((30 + width, 40, 199, 80), [first])
    assert beside[1] == first[1], "those that touch do not overlap"
    assert label((30, 95, 60, 99), [(0, 0, 200, 100)])[1] == 95 - height, "there is no room below"


def test_a_label_is_filled_with_its_boxes_colour_and_can_be_read():
    drawn = draw_boxes(white(400, 200), "<p>a long phrase</p> {<10><50><40><90>}")
    assert drawn.getpixel((41, 99)) == COLOURS[0] and drawn.getpixel((60, 99)) == COLOURS[0]
    assert _readable_on(COLOURS[0]) == "white"
    assert max(min(drawn.getpixel((x, y))) for x in range(42, 80) for y in range(88, 99)) > 200


@pytest.mark.parametrize(
    ("colour", "text"),
    [
        ((0, 255, 0), "white"),
        ((1, 255, 1), "black"),
        ((255, 0, 255), "white"),
        ((255, 128, 0), "black"),
        ((255, 125, 0), "white"),
        ((0, 240, 85), "black"),
        ((0, 240, 75), "white"),
    ],
)
def test_letters_are_black_on_light_colours(colour, text):
    assert _readable_on(colour) == text


@pytest.fixture
def written(monkeypatch):
    """Texts that are written: where, what and in which colour; and the sizes of letters that were asked for."""
    texts, sizes = [], []
    text, load = ImageDraw.ImageDraw.text, ImageFont.load_default

    def note(self, xy, words, **how):
        texts.append((xy, words, how["fill"]))
        text(self, xy, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: sizes.append(size) or load(size))
    return texts, sizes


@pytest.mark.parametrize(
    ("size", "letters"), [((200, 100), 10), ((384, 10), 10), ((500, 100), 13), ((100, 1000), 26), ((750, 750), 20)]
)
def test_letters_grow_with_the_longer_side_and_can_always_be_read(written, size, letters):
    draw_boxes(white(*size), "{<10><10><90><90>}")
    assert written == ([], [letters])


def test_phrases_stand_in_their_labels_clear_of_each_other_and_in_the_colour_that_can_be_read(written):
    light = next(number for number, colour in enumerate(COLOURS) if _readable_on(colour) == "black")
    phrases = [f"<p>p{number}</p> {{<10><40><50><80>}}" for number in range(light + 1)]
    draw_boxes(white(900, 900), " ".join(phrases))
    texts, _ = written
    assert [words for _, words, _ in texts] == [f"p{number}" for number in range(light + 1)]
    assert [fill for _, _, fill in texts] == [_readable_on(colour) for colour in COLOURS[: light + 1]]
    assert {x for (x, _), _, _ in texts} == {92.0}, "two pixels within the label, which begins with its box"
    tops = [y for (_, y), _, _ in texts]
    heights = {after - before for before, after in itertools.pairwise(tops)}
    assert len(heights) == 1 and heights.pop() > 20, "one below the other, as high as a label"
    above, height = tops[0] - 1, tops[1] - tops[0]
    assert above + height == 360, "the first label ends where the boxes begin"


def test_there_is_room_for_a_label_down_to_the_last_pixel(place):
    (width, height), label = place
    for top in (100 - 2 * height, 100 - 2 * height + 1):
        low = (30, top + height, 90, 99)  # a label above it, from ``top`` on, is taken
        found = label(low, [(30, top, 30 + width, top + height)])
        assert found[1] == (100 - height if top == 100 - 2 * height else top), "there is room for one more, or not"
