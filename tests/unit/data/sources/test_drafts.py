"""Drafts of an entry: keys, tasks, cleaned texts, and what is counted as changed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines.data.sources.base import Changes, Malformed, Rejected, SourceInput, SourceUnit
from pipelines.data.sources.drafts import Draft, make_row, read_drafts
from pipelines.storage import Location
from tinygptv.data.prompts import LONGEST_CAPTION
from tinygptv.data.sample import Turn

UNIT = SourceUnit(SourceInput("jsonl", "", "", "own", "vqa"), Location("", "/a.jsonl"), "a.jsonl")


def words(count):
    return " ".join(["w"] * count)


def test_samples_of_an_entry_are_numbered_from_the_second_on_and_an_error_costs_its_own():
    def drafts():
        yield Draft((Turn("", ("a",)),))
        yield Draft((Turn("", ("b",)),), image="b.jpg")
        yield Draft((Turn("", ("c",)),), task="caption")
        raise Malformed("no more")

    first, second, third, rest = read_drafts(UNIT, "k", drafts, None, None)
    assert (first.id, first.task, first.source) == ("a/k", "vqa", "own")
    assert (second.key, second.reason) == ("k/1", "the entry names an image, and this data set has none")
    assert (third.id, third.task) == ("a/k/2", "caption"), "a draft's own task wins"
    assert rest == Rejected("k", "a.jsonl", "no more")


def test_a_row_has_the_drafts_image_boxes_and_changes():
    images, counted, boxes = SimpleNamespace(read=lambda name: name.encode() * 2), Changes(), ((1.0, 2.0, 3.0, 4.0),)
    named = Draft((Turn("q", ("a",)),), image="b.jpg", boxes=boxes, changes=("messages_joined",))
    given = replace(named, image=b"bytes", boxes=())
    rows = list(read_drafts(UNIT, "k", lambda: iter([named, given]), images, counted))
    assert [(row.image, row.boxes) for row in rows] == [(b"b.jpgb.jpg", boxes), (b"bytes", ())]
    assert counted == {"messages_joined": 2}


@pytest.mark.parametrize(
    ("question", "answers", "cleans", "changes"),
    [
        (LONGEST_CAPTION, (1, LONGEST_CAPTION), (True, True), {}),
        (LONGEST_CAPTION + 1, (1,), (True, False), {"question_cut": 1}),
        (1, (1, LONGEST_CAPTION + 1, LONGEST_CAPTION + 9), (True, True), {"answer_cut": 1}),
        (LONGEST_CAPTION + 1, (LONGEST_CAPTION + 1,), (False, False), {}),
    ],
)
def test_texts_are_cut_at_the_longest_and_counted_by_row(question, answers, cleans, changes):
    counted = Changes()
    draft = Draft(
        (Turn(words(question), tuple(map(words, answers))),),
        cleans_questions=cleans[0],
        cleans_answers=cleans[1],
    )
    row = make_row(UNIT, "k", draft, None, counted)
    assert counted == changes
    longest = [LONGEST_CAPTION if clean else 10**9 for clean in cleans]
    assert row.turns[0].question == words(min(question, longest[0]))
    assert row.turns[0].answers == tuple(words(min(count, longest[1])) for count in answers)


def test_what_was_changed_while_reading_is_counted_with_it():
    counted = Changes()
    turns = (Turn("", (words(LONGEST_CAPTION + 1),)),)
    make_row(UNIT, "k", Draft(turns, changes=("messages_joined",), cleans_answers=True), None, counted)
    make_row(UNIT, "l", Draft((Turn("", ("a",)),), changes=("messages_joined",)), None, counted)
    with pytest.raises(Malformed):
        make_row(UNIT, "m", Draft((Turn("", ("a",)),), image="x.jpg", changes=("messages_joined",)), None, counted)
    assert counted == {"messages_joined": 2, "answer_cut": 1}
