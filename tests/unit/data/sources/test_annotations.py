"""Annotation files and an image folder: which entries are read, with which images, and what an entry alone is."""

from __future__ import annotations

import json

import pytest

from pipelines.data.sources.annotations import AnnotationReader
from pipelines.data.sources.base import Changes, Rejected, SourceInput
from pipelines.data.sources.drafts import Draft
from pipelines.data.sources.images import ImageLayout, below
from pipelines.data.sources.questions import ImagesAndAnswers
from pipelines.storage import Location
from tests.source_files import jpeg
from tinygptv.data.sample import Turn


def describe(entry, key):
    """An entry as its own answer, asked for by its key."""
    yield Draft((Turn(key, (json.dumps(entry),)),), entry.get("picture"), changes=("seen",))


def read(reader, path, text, images=""):
    """Units, and the rows of all of them with what was changed."""
    path.write_text(text)
    units = list(reader.plan(SourceInput("x", str(path), str(images), "mine", "caption")))
    changes = Changes()
    return units, [found for unit in units for found in reader.read(unit, changes)], changes


FIELDS = ["image", "image_id", "imageId", "question", "caption", "conversations", "instances"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_object_on_one_line_with_a_field_of_entries_is_an_entry(tmp_path, field):
    entry = {field: [{"a": 1}]}
    _, rows, _ = read(AnnotationReader(describe, ("a.json",)), tmp_path / "a.json", json.dumps(entry))
    assert [(row.id, row.turns) for row in rows] == [("a/line 1", (Turn("line 1", (json.dumps(entry),)),))]


def test_any_other_object_holds_entries(tmp_path):
    reader = AnnotationReader(describe, ("a.json",))
    _, rows, _ = read(reader, tmp_path / "a.json", json.dumps({"things": [{"a": 1}, {"a": 2}]}))
    assert [row.turns[0].answers for row in rows] == [('{"a": 1}',), ('{"a": 2}',)]


def test_entries_of_the_official_list_have_their_images_and_broken_ones_cost_themselves(tmp_path):
    (tmp_path / "pictures/deep").mkdir(parents=True)
    (tmp_path / "pictures/deep/b.jpg").write_bytes(jpeg(1))
    reader = AnnotationReader(describe, ("a.json",), "entries", ImageLayout(("pictures",), below("deep")))
    text = '{"data": [{"no": 1}], "entries": [{"picture": "b.jpg"}, {"a": 1,}, {"picture": "c.jpg"}, {"a": 4}]}'
    (unit,), (first, broken, gone, last), changes = read(reader, tmp_path / "a.json", text)
    assert unit.details.extra == ImagesAndAnswers(Location("", str(tmp_path / "pictures")))
    assert (first.id, first.source, first.task, first.image) == ("a/0", "mine", "caption", jpeg(1))
    assert isinstance(broken, Rejected) and (broken.key, "no valid JSON" in broken.reason) == ("1", True)
    assert (gone.key, [path.rsplit("/", 2)[1:] for _, path in gone.missing]) == (
        "2",
        [["pictures", "c.jpg"], ["deep", "c.jpg"]],
    )
    assert (last.id, last.turns, last.image) == ("a/3", (Turn("3", ('{"a": 4}',)),), None)
    assert changes == {"seen": 2}, "of the samples that are kept"
    given = tmp_path / "elsewhere"
    given.mkdir()
    (given / "b.jpg").write_bytes(jpeg(2))
    _, rows, _ = read(reader, tmp_path / "a.json", text, images=given)
    assert rows[0].image == jpeg(2), "images= wins"


def test_a_data_set_of_texts_has_no_images(tmp_path):
    reader = AnnotationReader(describe, ("a.json",))
    (unit,), (row, refused), _ = read(reader, tmp_path / "a.json", '[{"a": 1}, {"picture": "b.jpg"}]')
    assert unit.details.extra == ImagesAndAnswers(None) and row.image is None
    assert (refused.key, refused.reason) == ("1", "the entry names an image, and this data set has none")


def test_questions_with_their_answers_need_no_second_file(tmp_path):
    reader = AnnotationReader(describe, ("a.json",))
    entry = {"question_id": 1, "question": "q", "answer": "a"}
    (unit,), (row,), _ = read(reader, tmp_path / "a.json", json.dumps({"questions": [entry]}))
    assert unit.details.extra.answers is None and json.loads(row.turns[0].answers[0]) == entry
    (tmp_path / "annotations.json").write_text('{"annotations": [{"question_id": 1, "answers": ["b"]}]}')
    del entry["answer"]
    (unit,), (row,), _ = read(reader, tmp_path / "questions.json", json.dumps({"questions": [entry]}))
    assert unit.details.extra.answers == {1: ("b",)}
    assert json.loads(row.turns[0].answers[0]) == {**entry, "answers": ["b"]}


def test_every_official_file_that_is_there_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.json", "a.json", "c.json"):
        (tmp_path / name).write_text(json.dumps([{"name": name}]))
    source = SourceInput("x", str(tmp_path), "", "mine", "caption")
    reader = AnnotationReader(describe, ("{a,b}.json", "c.json"))
    assert [unit.shard for unit in reader.plan(source)] == ["a.json", "b.json"]
