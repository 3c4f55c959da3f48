"""What one entry of each format says, field by field."""

from __future__ import annotations

import pytest

from pipelines.data.sources import entries
from pipelines.data.sources.base import Filtered, Malformed
from tinygptv.data.sample import Turn

LLAVA = {
    "id": "000000000009",
    "conversations": [
        {"from": "human", "value": "What is\n it?\n<image>"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Sure?\nReally?"},
        {"from": "gpt", "value": "Yes."},
    ],
}


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"image": "train2014/a.jpg", "image_id": 7}, "train2014/a.jpg"),
        ({"imageId": "2405722", "image_id": 7}, "2405722.jpg"),
        ({"image_id": 9}, "000000000009.jpg"),
        ({"image_id": "000012"}, "000000000012.jpg"),
    ],
)
def test_the_image_of_an_entry(entry, name):
    assert entries.image_of(entry) == name


@pytest.mark.parametrize("entry", [{}, {"image_id": None}, {"image_id": [1]}, {"image": 3}])
def test_an_entry_without_an_image(entry):
    with pytest.raises(Malformed):
        entries.image_of(entry)


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        ({"answer": "yes"}, ("yes",)),
        ({"answer": ["yes", "no", "yes"], "answers": ["x"]}, ("yes", "no", "yes")),
        ({"answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}], "direct_answers": ["x"]}, ("a", "b")),
        ({"answers": ["a"], "answer": "x"}, None),
        ({"direct_answers": ["a", "b"]}, ("a", "b")),
    ],
)
def test_the_answers_of_a_question(entry, answers):
    if answers is None:  # a field of the name asked for comes first; else `answers`, `answer`, `direct_answers`
        assert entries.answers_of(entry, "answer") == ("x",) and entries.answers_of(entry, "other") == ("a",)
    else:
        assert entries.answers_of(entry, "answer") == answers


@pytest.mark.parametrize("entry", [{"answer": []}, {"answer": 3}, {"answer": [3]}, {"answers": [{"text": "a"}]}])
def test_answers_that_are_none(entry):
    with pytest.raises(Malformed):
        entries.answers_of(entry, "answer")


def test_answers_are_found_under_their_other_names_in_a_fixed_order():
    entry = {"direct_answers": ["c"], "answer": "b", "answers": "a", "own": "d"}
    assert entries.answers_of(entry, "own") == ("d",)
    for name, found in (("answers", "a"), ("answer", "b"), ("direct_answers", "c")):
        assert entries.answers_of(entry, "no") == (found,)
        del entry[name]
    with pytest.raises(KeyError):
        entries.answers_of(entry, "no")


def test_validation_images_and_other_splits_do_not_train():
    def drafts(describe, entry):
        return [draft.image for draft in describe(entry, "k")]

    assert drafts(entries.coco_caption, {"image": "train2014/a.jpg", "caption": "c"}) == ["train2014/a.jpg"]
    assert drafts(entries.coco_caption, {"image_id": 9, "caption": "c"}) == ["000000000009.jpg"]
    ocr = {"imageURL": "x/a.gif", "questions": ["q", "r"], "answers": ["a", "b"]}
    assert drafts(entries.ocrvqa, {**ocr, "split": 1}) == ["k.gif", "k.gif"]
    for describe, entry in (
        *(
            (entries.coco_caption, {"image": image, "caption": "c"})
            for image in ("val2014/COCO_val2014_000000000009.jpg", "test2015/a.jpg", "a.jpg")
        ),
        (entries.vqa("answer"), {"image_id": 9, "split": "val", "question": "q", "answer": "a"}),
        (entries.ocrvqa, {**ocr, "split": 0}),
        (entries.ocrvqa, {**ocr, "split": 2}),
        (entries.ocrvqa, {**ocr, "split": 3}),
    ):
        with pytest.raises(Filtered) as removed:
            drafts(describe, entry)
        assert removed.value.filter == "split"


@pytest.mark.parametrize(
    ("describe", "entry", "turns", "image"),
    [
        (entries.align, {"image_id": "7", "caption": "A."}, (Turn("", ("A.",)),), "7.jpg"),
        (entries.textcaps, {"image_id": "x7", "caption_str": "A."}, (Turn("", ("A.",)),), "x7.jpg"),
        (
            entries.coco_caption,
            {"image": "train2014/a.jpg", "caption": "C", "image_id": 7},
            (Turn("", ("C",)),),
            "train2014/a.jpg",
        ),
        (
            entries.vqa("direct_answers"),
            {"imageId": 7, "question": "Q", "direct_answers": ["A", "B", "A"], "answer": "C"},
            (Turn("Q", ("A", "B", "A")),),
            "7.jpg",
        ),
        (
            entries.ocrvqa,
            {"imageURL": "http://a.b/c.d/e.gif", "questions": ["Q"], "answers": ["A"], "split": 1},
            (Turn("Q", ("A",)),),
            "k.gif",
        ),
        (
            entries.ocrvqa,
            {"imageURL": "http://a.b/e", "questions": ["Q"], "answers": ["A"], "split": 1},
            (Turn("Q", ("A",)),),
            "k",
        ),
        (
            entries.grounded_caption,
            {"image_id": "7", "grounded_caption": "<p>a</p>", "caption": "no"},
            (Turn("", ("<p>a</p>",)),),
            "7.jpg",
        ),
        (entries.caption_to_phrase, {"image_id": "7", "caption": "C", "output": "O"}, (Turn("C", ("O",)),), "7.jpg"),
        (
            entries.object_to_phrase,
            {"image_id": "7", "phrase": "a dog", "bbox": "{<1><2><3><4>}"},
            (Turn("a dog", ("<p>a dog</p> {<1><2><3><4>}",)),),
            "7.jpg",
        ),
        (
            entries.unnatural,
            {"instances": [{"instruction_with_input": "I", "constraints": "C", "output": "O"}, {}]},
            (Turn("I C", ("O",)),),
            None,
        ),
        (
            entries.unnatural,
            {"instances": [{"instruction_with_input": "I", "constraints": None, "output": "O"}]},
            (Turn("I", ("O",)),),
            None,
        ),
        (entries.llava_single, LLAVA, (Turn("What is it?", ("A dog.",)),), "COCO_train2014_000000000009.jpg"),
        (
            entries.llava_conversation,
            LLAVA,
            (Turn("What is it?", ("A dog.",)), Turn("Sure?\nReally?", ("Yes.",))),
            "COCO_train2014_000000000009.jpg",
        ),
    ],
)
def test_what_an_entry_says(describe, entry, turns, image):
    (draft,) = describe(entry, "k")
    assert (draft.turns, draft.image, draft.boxes, draft.task) == (turns, image, (), "")


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("gqa/images/498027.jpg", "gqa/images/498027.jpg"),
        ("coco/train2017/000000000009.jpg", "coco/train2017/000000000009.jpg"),
        *((none, "COCO_train2014_498027.jpg") for none in (None, "")),
    ],
)
def test_an_entry_of_llavas_mixtures_names_its_image(image, found):
    """COCO may have an image of the number that another data set's entry has for its id."""
    (draft,) = entries.llava_conversation({**LLAVA, "id": "498027", "image": image}, "k")
    assert draft.image == found


def test_each_question_of_a_book_is_a_sample_with_its_answer():
    book = {"imageURL": "x/a.jpg", "questions": ["Q", "R"], "answers": ["A", "B"], "split": 1}
    assert [draft.turns for draft in entries.ocrvqa(book, "7")] == [(Turn("Q", ("A",)),), (Turn("R", ("B",)),)]
    with pytest.raises(ValueError, match="zip"):
        list(entries.ocrvqa({**book, "answers": ["A"]}, "7"))


@pytest.mark.parametrize(
    ("describe", "entry", "cleans"),
    [
        (entries.align, {"image_id": 7, "caption": "A"}, (False, False)),
        (entries.textcaps, {"image_id": 7, "caption_str": "A"}, (False, True)),
        (entries.coco_caption, {"image_id": 7, "caption": "A"}, (False, True)),
        (entries.grounded_caption, {"image_id": 7, "grounded_caption": "A"}, (False, False)),
        (entries.caption_to_phrase, {"image_id": 7, "caption": "A", "output": "B"}, (False, False)),
        (entries.object_to_phrase, {"image_id": 7, "phrase": "A", "bbox": "B"}, (False, False)),
        (entries.vqa("answer"), {"image_id": 7, "question": "A", "answer": "B"}, (True, True)),
        (
            entries.ocrvqa,
            {"imageURL": "a.jpg", "questions": ["A"], "answers": ["B"], "split": 1},
            (True, True),
        ),
        (
            entries.unnatural,
            {"instances": [{"instruction_with_input": "A", "constraints": None, "output": "B"}]},
            (True, True),
        ),
        (entries.llava_single, LLAVA, (True, False)),
        (entries.llava_conversation, LLAVA, (False, False)),
    ],
)
def test_texts_are_cleaned_where_the_release_cleans_them(describe, entry, cleans):
    (draft,) = describe(entry, "k")
    assert (draft.cleans_questions, draft.cleans_answers) == cleans


@pytest.mark.parametrize("describe", [entries.llava_single, entries.llava_conversation])
def test_what_is_changed_in_a_conversation_goes_with_its_draft(describe):
    talk = [{"from": "system", "value": "S"}, *LLAVA["conversations"], {"from": "human", "value": "And?"}]
    (draft,) = describe({**LLAVA, "conversations": talk}, "k")
    assert draft.changes == ("last_question_dropped", "system_message_joined")
    assert draft.turns[0].question == "SWhat is it?", "line breaks go, as in the release"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("k.gif", ("k.gif", "images/k.gif", "k.jpg", "images/k.jpg")),
        ("k.jpg", ("k.jpg", "images/k.jpg")),
        ("k", ("k", "images/k", "k.jpg", "images/k.jpg")),
        ("k.1.png", ("k.1.png", "images/k.1.png", "k.1.jpg", "images/k.1.jpg")),
    ],
)
def test_names_of_ocrvqas_images(name, names):
    assert entries.ocrvqa_names(name) == names
