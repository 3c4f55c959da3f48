"""Texts and boxes fit for training."""

from __future__ import annotations

import contextlib

import pytest

from pipelines.data.ingest.check_rows import check_boxes, check_row
from pipelines.data.sources.base import Changes, Filtered, Malformed
from pipelines.settings import PrepareDataSettings
from tinygptv.data.boxes import parse_boxes
from tinygptv.data.sample import SampleRow, Turn, render_sample

SETTINGS = PrepareDataSettings(image_size=64)


def row(**changes) -> SampleRow:
    return SampleRow(
        **{"id": "a", "source": "s", "task": "vqa", "turns": (Turn("q", ("a",)),), "image": b"x", **changes}
    )


def filter_of(given: SampleRow, settings: PrepareDataSettings, *, web: bool) -> str:
    """The filter that takes a row out; empty where none does."""
    try:
        check_row(given, web=web, settings=settings)
    except Filtered as error:
        return error.filter
    return ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "painting"}, "unknown"),
        ({"turns": ()}, "no turns"),
        ({"turns": (Turn("q", ()),)}, "without an answer"),
        ({"image": None}, "needs an image"),
        ({"task": "refer"}, "needs a box"),
        ({"task": "identify"}, "needs a box"),
        ({"turns": (Turn("q", ("\ud800",)),)}, "surrogate"),
        ({"turns": (Turn("\ud800", ("a",)),)}, "surrogate"),
        ({"id": "\udfff"}, "surrogate"),
    ],
)
def test_rows_that_cannot_be_trained_on(changes, reason):
    with pytest.raises(Malformed, match=reason):
        check_row(row(**changes), web=False, settings=SETTINGS)


def test_markers_in_texts_are_made_harmless():
    checked = check_row(row(turns=(Turn("what is <ImageHere>?", ("<|endoftext|>",)),)), web=False, settings=SETTINGS)
    assert "<ImageHere>" not in checked.turns[0].question
    assert "<|endoftext|>" not in checked.turns[0].answers[0]


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("", "min_words"),
        ("---- ==== //// $$$$ a", "min_letters"),
        ("buy now " * 5, ""),
        ("buy buy buy buy buy buy buy now", "max_repetition"),
        ("一只狗在草地上奔跑", ""),
        ("ein Hund läuft über die Wiese", ""),
        ("собака бежит по траве", ""),
    ],
)
def test_caption_filters_know_no_language(caption, name):
    if caption:
        check_row(row(task="caption", turns=(Turn("", (caption,)),)), web=False, settings=SETTINGS)
    for task, web in (("caption", True), ("pair", False)):
        assert filter_of(row(task=task, turns=(Turn("", (caption,)),)), SETTINGS, web=web) == name


@pytest.mark.parametrize(
    ("caption", "changes", "name"),
    [
        ("a b c", {"min_words": 3}, ""),
        ("a b", {"min_words": 3}, "min_words"),
        ("ab -- ----", {"min_letters": 0.25}, ""),
        ("ab -- -----", {"min_letters": 0.25}, "min_letters"),
        ("1 2\u3000-- ----", {"min_letters": 0.25}, ""),
        ("go go go go a b c d", {"max_repetition": 0.5}, ""),
        ("go go go go go b c d", {"max_repetition": 0.5}, "max_repetition"),
        ("go go go go go go go", {"max_repetition": 0.5}, ""),
    ],
)
def test_caption_filters_exactly_at_their_bounds(caption, changes, name):
    given, bounds = row(task="pair", turns=(Turn("", (caption,)),)), PrepareDataSettings(**changes)
    assert filter_of(given, bounds, web=True) == name


def test_the_caption_that_is_judged_is_the_first_answer_of_every_turn():
    good, bad = "a red star", "---- ===="
    for turns, removed in (
        ((Turn("", (good, bad)),), False),
        ((Turn("", (bad, good)),), True),
        ((Turn("", (good,)), Turn("", (bad,))), True),
    ):
        with pytest.raises(Filtered) if removed else contextlib.nullcontext():
            check_row(row(task="pair", turns=turns), web=True, settings=SETTINGS)


@pytest.mark.parametrize(
    ("task", "answer", "stored"),
    [
        ("instruct", "## Summary\n### Objects\n- a star", "## Summary\n# # # Objects\n- a star"),
        ("instruct", "#####", "# # # # #"),
        ("instruct", "line one\r\nline two", "line one\nline two"),
        ("pair", "a star\nand a moon", "a star and a moon"),
        ("pair", "\na star\n", "a star"),
    ],
)
def test_end_symbols_in_answers_are_escaped_and_counted(task, answer, stored):
    changes = Changes()
    checked = check_row(row(task=task, turns=(Turn("q", (answer,)),)), web=False, settings=SETTINGS, changes=changes)
    assert checked.turns[0].answers == (stored,)
    assert changes == ({} if "\r" in answer else {"end_symbol_escaped": 1})


def test_empty_answers_are_dropped_where_there_are_others():
    changes = Changes()
    turns = (Turn("q", ("", "a", "a")), Turn("r", ("b###", " ")))
    checked = check_row(row(turns=turns), web=False, settings=SETTINGS, changes=changes)
    assert [turn.answers for turn in checked.turns] == [("a", "a"), ("b# # #",)]
    assert changes == {"empty_answer_dropped": 1, "end_symbol_escaped": 1}, "rows are counted"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"turns": (Turn("q", ("  ",)),)}, "an answer is empty"),
        ({"turns": (Turn("q", ("a",)), Turn("r", ("",)))}, "an answer is empty"),
        ({"turns": (Turn(" ", ("a",)),), "image": None, "task": "text"}, "a question is empty"),
        ({"turns": (Turn("q", ("<p>a</p> {<1><2><300><4>}",)),)}, "box text"),
        ({"turns": (Turn("q", ("{<50><2><30><4>}",)),)}, "box text"),
        ({"turns": (Turn("where is {<0.1><0.2><0.3><0.4>}", ("a",)),)}, "box text"),
        ({"turns": (Turn("q", ("{<-1><2><3><4>}",)),)}, "box text"),
    ],
)
def test_texts_that_nothing_good_could_be_learned_from(changes, reason):
    with pytest.raises(Malformed, match=reason):
        check_row(row(**changes), web=False, settings=SETTINGS)


def test_box_text_of_every_task_that_is_kept_can_be_read():
    answer = "<p>two dogs</p> {<0><0><100><100>}<delim>{<5><6><7><8>} and {braces} {<no box>}"
    checked = check_row(row(task="grounding", turns=(Turn("", (answer,)),)), web=False, settings=SETTINGS)
    assert len(parse_boxes(checked.turns[0].answers[0])) == 2


# ---------------------------------------------------------------- boxes


def boxed(*boxes, size=(96, 64)):
    return row(task="refer", turns=(Turn("", ("the star",)),), boxes=boxes, width=size[0], height=size[1])


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0.1, 0.2, 0.5, 0.6), "shares of the image: give pixels, of 96 x 64"),
        ((0, 0, 1, 1), "shares of the image"),
        ((300, 200, 620, 460), "reaches out of the image of 96 x 64"),
        ((-30, -5, 40, 40), "reaches out"),
        ((10, 10, 40, 66.1), "reaches out"),
        ((50, 60, 10, 20), "turned round"),
        ((10, 20, 30, 5), "turned round"),
        ((10, 10, 10, 10), "no area"),
        ((10, 10, 10, 40), "no area"),
        ((96, 10, 98, 20), "no area"),
        ((0, 0, float("nan"), 1), "no number"),
        ((0, 0, float("inf"), 1), "no number"),
        ((float("-inf"), 0, 10, 10), "no number"),
    ],
)
def test_boxes_that_cannot_be_meant(box, reason):
    with pytest.raises(Malformed, match=reason):
        check_boxes(boxed((1, 2, 30, 40), box))


@pytest.mark.parametrize(
    ("box", "stored"),
    [
        ((0, 0, 96, 64), (0, 0, 96, 64)),
        ((-2, -2, 98, 66), (0, 0, 96, 64)),
        ((10.5, 3, 97.9, 64.0), (10.5, 3, 96, 64)),
        ((0, 0, 0.5, 2), (0, 0, 0.5, 2)),
    ],
)
def test_boxes_a_little_outside_are_clipped_and_counted(box, stored):
    changes = Changes()
    checked = check_boxes(boxed(box), changes)
    assert checked.boxes == (stored,)
    assert changes == ({} if box == stored else {"box_clipped": 1})
    answer = render_sample(checked, lambda options: options[0])[0].answer
    assert len(parse_boxes(answer)) == 1


def test_the_tolerance_grows_with_the_image():
    assert check_boxes(boxed((0, 0, 1020, 10), size=(1000, 500))).boxes == ((0, 0, 1000, 10),)
    with pytest.raises(Malformed, match="reaches out"):
        check_boxes(boxed((0, 0, 1021, 10), size=(1000, 500)))


def test_boxes_without_an_image_are_refused():
    with pytest.raises(Malformed, match="boxes and no image"):
        check_boxes(row(task="text", image=None, boxes=((1, 2, 3, 4),)))
