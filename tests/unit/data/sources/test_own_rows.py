"""A row of one's own data, field by field."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.sources.base import Filtered, Malformed
from pipelines.data.sources.own_rows import own_draft, read_own_row
from tests.source_files import encode, jpeg, own_unit, picture, refused
from tinygptv.data.sample import Turn

NO_FIELDS = (
    "no turns, conversations, messages, conversation, texts, question, query, instruction, caption, text or description"
)
QA = "question and answer"
BARE_CHOICE = "stands for one of the row's choices: write its words, or the choices into the question"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"turns": "q"}, "turns is no list but str"),
        ({"turns": 3}, "turns is no list but int"),
        ({"turns": b"q"}, "turns is no list but bytes"),
        ({"caption": "x", "boxes": {"a": 1}}, "boxes is no list but dict"),
        ([1], "the row is no object but list"),
        ({"image": 3, "caption": "x"}, "image is no path but int"),
        ({"img_path": {"bytes": 3}, "caption": "x"}, "img_path is no path but int"),
        ({"photo": ["a", None, "b", "c"], "caption": "x"}, "photo holds 3 images; a sample has one"),
        *(
            ({"question": "q", "answers": answers}, "answers is not a list of texts")
            for answers in (
                ["a", 0.5],
                "a",
                3,
                b"a",
                {"text": ["a"], "start": [0]},
                [{"text": "a"}],
                [{"answer": True}],
            )
        ),
        *(({"caption": texts}, "caption is not a list of texts") for texts in (["a", None], [0.5])),
        *(
            ({"question": "q", "answer": one}, f"answer is no text but {kind}")
            for one, kind in ((True, "bool"), (0.5, "float"))
        ),
        ({"answer": {"text": ["a"]}, "question": "q"}, "answer is no text but dict"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": name} for name in ("a.jpg", "b.jpg")]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages holds 2 images; a sample has one",
        ),
        ({"system": 3, "question": "q", "answer": "a"}, "system is no text but int"),
        ({"query": "q", "response": "a", "history": "h"}, "history is no list but str"),
        *(
            ({"query": "q", "response": "a", "history": [pair]}, f"history holds {pair!r}, which is no pair of {QA}")
            for pair in ({"q": "q", "a": "a"}, "qa", ["q"], ["q", 3])
        ),
        ({"question": "q", "answer": "B", "A": "a dog", "B": "a cat"}, f"answer 'B' {BARE_CHOICE}"),
        ({"question": "q", "answer": "A", "choice_a": "a dog", "choice_b": "a cat"}, f"answer 'A' {BARE_CHOICE}"),
        ({"question": "q", "answer": "(B).", "options": "['a dog', \"a cat's\"]"}, f"answer '(B).' {BARE_CHOICE}"),
        ({"question": "q", "answer": "B", "options": "a dog, a cat"}, f"answer 'B' {BARE_CHOICE}"),
        *(
            ({"question": "q", "answer": one, "options": ["a dog", "a cat"]}, f"answer {one!r} {BARE_CHOICE}")
            for one in ("1", 1)
        ),
        *(
            (
                {"image": "i", "bbox": [1, 2, 3, 4], **row},
                "the row has 'bbox' but no 'boxes': give its corners as 'boxes', [[x1, y1, x2, y2]] in pixels (COCO's "
                "bbox is x, y, width, height)",
            )
            for row in ({"caption": "x"}, {"question": "q", "answer": ["a"]})
        ),
        *(
            (
                {"query": f"find {asked}", "response": answer, "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}},
                f"{mark} stands for an entry of 'objects': write a row for each box, its phrase as 'answer' and its "
                "corners as 'boxes', [[x1, y1, x2, y2]] in pixels",
            )
            for asked, answer, mark in (("it", "<bbox>", "<bbox>"), ("<ref-object>", "a", "<ref-object>"))
        ),
        ({"turns": [5]}, "what should have 'question' is no object but int"),
        ({"caption": "x", "boxes": [[1, 2, 3]]}, "box [1, 2, 3] is not x1, y1, x2, y2"),
        ({"caption": "x", "boxes": [5]}, "box 5 is not x1, y1, x2, y2"),
        ({"caption": "x", "boxes": [[1, 2, 3, "x"]]}, "box [1, 2, 3, 'x'] is not x1, y1, x2, y2"),
        (
            {"question": "<image>q", "answer": "a"},
            "the questions have 1 marks of images (<image>), and the row has no image",
        ),
        (
            {},
            f"{NO_FIELDS} among no fields",
        ),
        (
            {"a": 1, "b": 2},
            f"{NO_FIELDS} among a, b",
        ),
        ({"caption": "x", "photo_id": "7"}, "the row has 'photo_id' but no 'image': name the image's file in 'image'"),
        (
            {"caption": "x", "flickr_url": "u"},
            "the row has a link in 'flickr_url' but no image: download it, and name the file in 'image'",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row, told):
    assert refused(Malformed, own_draft, row, "") == told


@pytest.mark.parametrize(
    ("row", "default", "task"),
    [
        ({"caption": "x"}, "", "caption"),
        ({"question": "q", "answer": "a"}, "", "text"),
        ({"image": "i", "question": "q", "answer": "a"}, "", "instruct"),
        ({"image": "i", "turns": [{"question": "q", "answer": "a"}] * 2}, "", "conversation"),
        ({"image": "i", "question": "q", "answer": "a"}, "vqa", "vqa"),
        ({"image": "i", "question": "q", "answer": "a", "task": "refer"}, "vqa", "refer"),
        ({"caption": "x", "task": ""}, "pair", "pair"),
    ],
)
def test_the_task_is_the_rows_own_or_the_inputs_or_that_of_its_form(row, default, task):
    assert own_draft(row, default).task == task


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("a.jpg", "a.jpg"),
        (["a.jpg"], "a.jpg"),
        ([None, "a.jpg"], "a.jpg"),
        ({"bytes": None, "path": "a.jpg"}, "a.jpg"),
        ({"url": "b.jpg"}, "b.jpg"),
        ({"bytes": jpeg(0), "path": "a.jpg"}, jpeg(0)),
        (["", "a.jpg"], "a.jpg"),
        ("", None),
        ([" "], None),
        (None, None),
        ([], None),
        (jpeg(0), jpeg(0)),
    ],
)
def test_an_image_is_a_name_or_bytes_in_any_form(image, found):
    draft = own_draft({"image": image, "caption": "x", 7: "odd key", "url_of_page": "p"}, "")
    assert draft.image == found


@pytest.mark.parametrize(
    ("row", "image", "turns"),
    [
        ({"query": "<image>q", "response": "a", "images": ["i.jpg"]}, "i.jpg", [("q", "a")]),
        ({"query": "q", "response": "a", "history": [["q1", "a1"]]}, None, [("q1", "a1"), ("q", "a")]),
        ({"instruction": "q", "input": "", "output": "a", "text": "all of it"}, None, [("q", "a")]),
        ({"instruction": "q", "input": "x", "output": "a", "image": "i.jpg"}, "i.jpg", [("q\nx", "a")]),
        ({"question": "q: dog or cat?", "answer": "A", "A": "dog"}, None, [("q: dog or cat?", "A")]),
        ({"question": "q", "answer": "Yes", "choices": ["yes", "no"]}, None, [("q", "Yes")]),
        ({"question": "q", "answer": "dog", "options": "['cat', 'dog']"}, None, [("q", "dog")]),
        ({"question": "q", "answer": "B", "options": "[]"}, None, [("q", "B")]),
        ({"question": "q", "answer": "a", "options": [{"text": "a"}]}, None, [("q", "a")]),
        ({"question": "q", "answer": "B", "options": ["A", "B"], "bbox": []}, None, [("q", "B")]),
        ({"question": 1, "answer": 3}, None, [("1", "3")]),
        ({"messages": [{"role": "user", "content": 1}, {"role": "bot", "content": 3}]}, None, [("1", "3")]),
        ({"turns": [{"question": "q", "answer": "a"}], "bbox": [1, 2, 3, 4]}, None, [("q", "a")]),
        ({"query": "q", "response": "a", "objects": {"bbox": [[1, 2, 3, 4]]}}, None, [("q", "a")]),
        ({"query": "what is <bbox>?", "response": "a"}, None, [("what is <bbox>?", "a")]),
        (
            {
                "conversations": [
                    {"from": "user", "value": "Picture 1: <img>d/i.jpg</img>\nq"},
                    {"from": "assistant", "value": "a"},
                ]
            },
            "d/i.jpg",
            [("q", "a")],
        ),
    ],
)
def test_forms_of_other_tools_are_read(row, image, turns):
    draft = own_draft(row, "")
    assert (draft.image, draft.turns) == (image, tuple(Turn(question, (answer,)) for question, answer in turns))


def test_the_field_of_the_image_has_many_names():
    names = ["image", "images", "img", "image_path", "image_file", "img_path", "file_name", "image_name", "picture"]
    names += ["photo", "jpg", "png", "webp"]
    assert [own_draft({name: f"{name}.x", "caption": "c"}, "").image for name in names] == [f"{n}.x" for n in names]
    several = {**dict.fromkeys(reversed(names), "b"), "image": "a", "caption": "c"}
    assert own_draft(several, "").image == "a", "the first of them counts"


def test_bytes_are_called_by_their_path_or_column():
    png = encode(picture(0), "PNG")
    for row, name in (
        ({"jpg": b"junk", "text": "x"}, "in jpg"),
        ({"img": {"bytes": png, "path": "a.jpg"}}, "a.jpg"),
        ({"img": {"bytes": png, "url": "https://h/a.jpg"}}, "https://h/a.jpg"),
        ({"img": {"bytes": b"", "path": "a.jpg"}}, "a.jpg is empty (0 bytes)"),
        ({"image": b""}, "in image is empty (0 bytes)"),
    ):
        assert refused(Malformed, own_draft, {"caption": "x", **row}, "").startswith(f"image {name}")


def test_forms_come_in_their_order_and_keep_what_was_changed():
    talk = [{"from": "gpt", "value": "x"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    draft = own_draft({"messages": talk, "question": "no", "caption": "no"}, "")
    assert (draft.turns, draft.changes, draft.task) == ((Turn("q", ("a",)),), ("first_answer_dropped",), "text")
    turns = own_draft({"turns": [{"question": "<image>t", "answers": ["u", "v"]}], "image": "i", "messages": talk}, "")
    assert turns.turns == (Turn("t", ("u", "v")),) and turns.changes == ()
    assert own_draft({"description": "d", "caption": None, "question": None}, "").turns == (Turn("", ("d",)),)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"url": "u", "status": "failed", "error_message": "404"}, "img2dataset: 404"),
        ({"url": "u", "status": "failed", "error_message": None}, "img2dataset: failed"),
    ],
)
def test_failed_downloads_are_filtered(row, told):
    with pytest.raises(Filtered) as removed:
        own_draft({"caption": "x", **row}, "")
    assert (str(removed.value), removed.value.filter) == (told, "not_downloaded")
    assert own_draft({"caption": "x", "status": "draft"}, "").task == "caption", "a status of one's own"
    assert "a link in 'url'" in refused(Malformed, own_draft, {"caption": "x", "url": "u", "status": 3}, "")


@pytest.mark.parametrize("system", ["S", {"from": "system", "value": "S"}, {"role": "system", "content": "S"}])
def test_a_system_text_beside_a_conversation_goes_before_its_first_question(system):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2
    for row in ({"conversations": talk}, {"conversations": [{"from": "system", "value": "S"}, *talk]}):
        draft = own_draft({**row, "system": system}, "")
        assert [turn.question for turn in draft.turns] == ["S\nq", "q"]
        assert draft.changes == ("system_message_joined",)
    assert own_draft({"question": "q", "answer": "a", "system": system}, "").turns == (Turn("S\nq", ("a",)),)
    for row in ({"image": "a.jpg", "caption": "c", "system": system}, {"question": "q", "answer": "a", "system": ""}):
        draft = own_draft(row, "")
        assert not draft.turns[0].question.startswith("S") and not draft.changes


@pytest.mark.parametrize("field", ["answer", "caption", "text", "description"])
def test_several_texts_that_would_do_may_stand_where_one_does(field):
    row = {"image": "a.jpg", "question": "q"} if field == "answer" else {"image": "a.jpg"}
    turn = Turn(row.get("question", ""), ("a dog", "a dog", "the dog"))
    assert own_draft({**row, field: ["a dog", "a dog", "the dog"]}, "").turns == (turn,)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "url": "a.jpg", "text": None},
        {"type": "image", "image": None, "path": "a.jpg"},
    ],
)
def test_an_image_may_stand_in_a_message(part):
    content = [{"type": "text", "text": "q"}, part]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    draft = own_draft(row, "")
    assert (draft.image, draft.turns) == ("a.jpg", (Turn("q", ("a",)),))
    assert own_draft({**row, "image": "b.jpg"}, "").image == "b.jpg", "the row's own comes first"


def test_answers_may_be_as_the_hub_has_vqav2():
    given = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}, {"answer": "no"}]
    assert own_draft({"question": "q", "answers": given}, "").turns == (Turn("q", ("yes", "no")),)
    assert own_draft({"question": "q", "answers": [3, {"answer": 4}]}, "").turns == (Turn("q", ("3", "4")),)


SPLITS = ("train", "restval", "trainval", "val", "test", "TEST ", "testA", "dev", "minival", "held-out", 1, None, "")


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("train", ["train", "restval", "trainval", 1, None, ""]),
        ("test", ["test", "TEST ", 1, None, ""]),
        ("", [*SPLITS]),
    ],
)
def test_rows_of_another_split_are_left_out(wanted, taken):
    """Flickr30k on the hub has train, val and test in one table."""
    unit = own_unit(Path("a.parquet"))
    unit = replace(unit, source=replace(unit.source, split=wanted))
    found = []
    for split in SPLITS:
        with suppress(Filtered):
            found += [split for _ in read_own_row(unit, {"image": "a.jpg", "caption": "c", "split": split})]
    assert found == taken
    assert own_unit(Path("a.parquet")).source.split == "train", "of whoever says nothing else"
    told = refused(Filtered, list, read_own_row(own_unit(Path("a")), {"caption": "c", "split": "val"}))
    assert told == "the row's split 'val' is not split=train"


@pytest.mark.parametrize(
    "empty", [None, "", " ", {}, {"bytes": None, "path": None}, [], [None], [""], [{"bytes": None, "path": ""}]]
)
def test_there_are_many_ways_to_say_that_there_is_no_image(empty):
    draft = own_draft({"image": empty, "question": "q", "answer": "a"}, "")
    assert (draft.image, draft.task) == (None, "text")
    assert "and the row has no image" in refused(
        Malformed, own_draft, {"image": empty, "question": "<image>q", "answer": "a"}, ""
    )
    assert own_draft({"image": empty, "photo": "a.jpg", "caption": "c"}, "").image == "a.jpg"


@pytest.mark.parametrize(
    "name",
    ["image_id", "imageId", "imageURL", "ImageID", "imgname", "image-path", "image.file", "IMG_FILE", "sourceImage"],
)
def test_a_row_that_names_its_image_in_another_field_is_not_text(name):
    told = refused(Malformed, own_draft, {name: "n161313", "question": "q", "answer": "a"}, "")
    assert told == f"the row has {name!r} but no 'image': name the image's file in 'image'"
    assert own_draft({name: "", "question": "q", "answer": "a"}, "").task == "text"


def test_nor_is_one_with_the_name_of_an_images_file():
    row = {"question": "q", "answer": "a", "filename": "train/1.JPG"}
    assert "the row has 'filename' but no 'image'" in refused(Malformed, own_draft, row, "")
    for fields in (
        {"question": "what is in a.jpg"},
        {"answer": "a.png"},
        {"imagination": "x"},
        {"source": "a.jpg or so"},
    ):
        assert own_draft({"question": "q", "answer": "a", **fields}, "").task == "text"
