"""Box text, parsing and overlap; where the release's numbers are at hand, against them."""

from __future__ import annotations

import pytest

from tinygptv.data.boxes import (
    COLOURS,
    box_fault,
    clip_box,
    format_box,
    iou,
    parse_answer_box,
    parse_boxes,
    strip_boxes,
    to_pixels,
)


def test_coordinates_are_truncated():
    assert format_box((16.9, 0, 100, 99.9), 100, 100) == "{<16><0><100><99>}"
    assert format_box((64, 96, 320, 288), 640, 480) == "{<10><20><50><60>}"
    with pytest.raises(ValueError, match="0 x 10"):
        format_box((0, 0, 1, 1), 0, 10)


def test_phrases_and_their_boxes():
    text = "<p>two dogs</p> {<1><2><3><4>}<delim>{<5><6><7><8>} near <p>a cat</p> {<9><10><11><12>}, and {<0><0><1><1>}"
    found = parse_boxes(text)
    assert [(b.phrase, b.entity) for b in found] == [("two dogs", 0), ("two dogs", 0), ("a cat", 1), ("", 2)]
    assert found[1].box == (5, 6, 7, 8)
    assert strip_boxes(text) == "two dogs near a cat, and"
    spaced = "{<1><2><3><4>} a <p> dog </p> {<1><2><3><4>} "
    assert strip_boxes(spaced) == "a  dog", "no space at either end"
    assert [box.phrase for box in parse_boxes(spaced)] == ["", "dog"]


@pytest.mark.parametrize("text", ["", "no box", "{<1><2><3>}", "{<a><b><c><d>}", "{1 2 3 4}", "<p>x</p>"])
def test_malformed_boxes_are_no_boxes(text):
    assert parse_boxes(text) == []
    assert parse_answer_box(text) is None


def test_answer_boxes_come_first():
    assert parse_answer_box(" {<1> <2><3><4>}###") == (1, 2, 3, 4)
    assert parse_answer_box("it is {<1><2><3><4>}") is None
    assert to_pixels((10, 20, 50, 60), 640, 480) == (64, 96, 320, 288)


def test_overlap():
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert iou((0, 0, 4, 4), (10, 10, 20, 20)) == 0.0
    assert iou((0, 0, 2, 2), (1, 0, 3, 2), pixel_grid=False) == pytest.approx(1 / 3)


def test_a_phrase_without_a_box_does_not_swallow_the_next_one():
    found = parse_boxes("<p>two people</p> stand beside <p>a dog</p> {<1><2><3><4>}")
    assert [(box.phrase, box.box) for box in found] == [("a dog", (1, 2, 3, 4))]


def test_each_side_is_its_own_scale():
    assert format_box((10, 20, 30, 40), 1000, 100) == "{<1><20><3><40>}"
    assert to_pixels((1, 20, 3, 40), 1000, 100) == (10, 20, 30, 40)
    assert format_box((0.5, 0.5, 1, 1), 1, 1) == "{<50><50><100><100>}"
    for size in ((0, 10), (10, 0), (-1, 10)):
        with pytest.raises(ValueError, match="pixels has no boxes"):
            format_box((0, 0, 1, 1), *size)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ((1, 2, 30, 40), (1, 2, 30, 40)),
        ((30, 40, 1, 2), (1, 2, 30, 40)),
        ((1, 40, 30, 2), (1, 2, 30, 40)),
        ((-5, -6, 30, 40), (0, 0, 30, 40)),
        ((50, 60, 500, 600), (50, 60, 100, 80)),
        ((-9, -9, 999, 999), (0, 0, 100, 80)),
        ((0, 0, 1, 1), (0, 0, 1, 1)),
        ((99, 79, 100, 80), (99, 79, 100, 80)),
    ],
)
def test_boxes_that_people_draw_are_clipped(box, clipped):
    assert clip_box(box, 100, 80) == clipped


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((-9, 5, 0, 9), r"\[-9, 5, 0, 9\] lies outside of the image of 100 x 80 pixels"),
        ((5, -9, 9, 0), "lies outside"),
        ((100, 5, 120, 9), "lies outside"),
        ((5, 80, 9, 99), "lies outside"),
        ((5, 5, 5.9, 9), r"\[5, 5, 5.9, 9\] covers less than a pixel of the image of 100 x 80 pixels"),
        ((5, 5, 9, 5.9), "covers less than a pixel"),
        ((99.5, 5, 120, 9), "covers less than a pixel"),
        ((-9, 5, 0.5, 9), "covers less than a pixel"),
        ((5, -9, 9, 0.5), "covers less than a pixel.* give x1, y1, x2, y2 in pixels\\.$"),
        ((float("nan"), 5, 120, 9), "lies outside"),
    ],
)
def test_boxes_that_cover_nothing_are_refused(box, reason):
    with pytest.raises(ValueError, match=reason):
        clip_box(box, 100, 80)


def test_overlap_by_hand():
    assert iou((0, 0, 3, 1), (2, 0, 5, 1)) == pytest.approx(2 * 2 / (8 + 8 - 4)), "border pixels count"
    assert iou((0, 0, 3, 1), (2, 0, 5, 1), pixel_grid=False) == pytest.approx(1 / 5)
    assert iou((0, 0, 9, 9), (0, 5, 9, 9)) == pytest.approx(50 / 100)
    assert iou((2, 3, 4, 5), (0, 0, 9, 9)) == pytest.approx(9 / 100)
    assert iou((0, 0, 1, 9), (5, 0, 6, 9)) == 0.0 == iou((0, 0, 9, 1), (0, 5, 9, 6)), "apart in one direction"
    assert iou((3, 3, 3, 3), (3, 3, 3, 3), pixel_grid=False) == 0.0, "no area"
    assert iou((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), pixel_grid=False) == 1.0
    assert iou((1, 2, 7, 8), (3, 1, 9, 5)) == iou((3, 1, 9, 5), (1, 2, 7, 8))


def test_an_answer_is_one_box_and_nothing_else():
    assert parse_answer_box("<unk>{<1><2><3><4>} ") == (1, 2, 3, 4)
    assert parse_answer_box("{<1><2><3><4>} or {<5><6><7><8>}") is None
    assert parse_answer_box("{<1><2><3><4>} 5") is None
    assert parse_answer_box("{<1><2><3><4>} yes") == (1, 2, 3, 4)
    assert parse_answer_box("x{<1><2><3><4>}") is None


def test_boxes_come_in_text_order_and_malformed_ones_count_for_nothing():
    text = "{<9><9><9><9>} <p>a</p> {<1><2><3>} <p>b</p> {<1><2><3><4>} {<5><6><7><8>} {<1234><1><1><1>}"
    found = parse_boxes(text)
    assert [(box.phrase, box.box, box.entity) for box in found] == [
        ("", (9, 9, 9, 9), 0),
        ("b", (1, 2, 3, 4), 1),
        ("b", (5, 6, 7, 8), 1),
    ]
    assert strip_boxes("<p>a</p> {<1><2><3>} and <p>b</p>{<1><2><3><4>}<delim>{<5><6><7><8>}") == "a and b"


def test_colours_are_apart():
    assert len(set(COLOURS)) == len(COLOURS) == 8 and all(0 <= value <= 255 for colour in COLOURS for value in colour)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((0, 0, 60, 40), ""),
        ((-2, -2, 62, 42), ""),
        ((5, 5, 6, 6), ""),
        ((5, 5, 5, 6), "box 5, 5, 5, 6 has no area in the image of 60 x 40 pixels"),
        ((5, 5, 6, 5), "box 5, 5, 6, 5 has no area"),
        ((60, 5, 62, 9), "box 60, 5, 62, 9 has no area"),
        ((5, -2, 9, 0), "box 5, -2, 9, 0 has no area"),
        ((0, 0, 63, 40), "box 0, 0, 63, 40 reaches out of the image of 60 x 40 pixels"),
        ((0, -3, 9, 9), "box 0, -3, 9, 9 reaches out of the image of 60 x 40 pixels"),
        ((0.1, 0.2, 1, 1), "box 0.1, 0.2, 1, 1 is given in shares of the image: give pixels, of 60 x 40"),
        ((9, 9, 8, 20), "box 9, 9, 8, 20 is turned round: give x1, y1, x2, y2"),
        ((9, 9, float("nan"), 20), "box 9, 9, nan, 20 has a corner that is no number"),
    ],
)
def test_what_keeps_four_numbers_from_being_a_box_of_an_image(box, fault):
    found = box_fault(box, 60, 40)
    assert found.startswith(fault) and bool(found) == bool(fault)
