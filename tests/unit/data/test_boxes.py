"""Box text, parsing and overlap; where the release's numbers are at hand, against them."""

from __future__ import annotations

import pytest

from tinygptv.data.boxes import format_box, iou, parse_answer_box, parse_boxes, strip_boxes, to_pixels


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
