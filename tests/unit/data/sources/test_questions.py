"""Questions and answers in two files: each slice carries the answers of its own questions."""

from __future__ import annotations

import json

import pytest

from pipelines.data.sources import json_entries, locate
from pipelines.data.sources.base import Rejected
from pipelines.data.sources.questions import ImagesAndAnswers, with_answers
from pipelines.settings import PrepareDataSettings, SettingsError
from tests.source_files import jpeg

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"


def plan(folder):
    chosen, given = locate(PrepareDataSettings(source="coco_vqa", input=str(folder / QUESTIONS), images=str(folder)))
    return chosen.reader, list(chosen.reader.plan(given))


def write(folder, name="v2_mscoco_train2014_annotations.json", count=5):
    (folder / "000000000009.jpg").write_bytes(jpeg(0))
    questions = [{"question_id": n, "image_id": 9, "question": f"q{n}"} for n in range(count)]
    annotations = [
        {"question_id": n, "answers": [{"answer": f"caf\u00e9 {n}"}, {"answer": "x"}, {"answer": 3}, {"answer": "x"}]}
        for n in range(count - 1)
    ]
    (folder / QUESTIONS).write_text(json.dumps({"questions": questions}))
    text = json.dumps({"annotations": annotations, "info": 1}, ensure_ascii=False)
    (folder / name).write_text(text.replace("\u00e9 1", "\\u00e9 1"))


def test_a_slice_carries_the_answers_of_its_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(json_entries.plan_entries, "__kwdefaults__", {"about": None, "entries_per_unit": 2})
    write(tmp_path)
    reader, units = plan(tmp_path)
    assert [list(unit.details.extra.answers) for unit in units] == [[0, 1], [2, 3], []]
    rows = [found for unit in units for found in reader.read(unit)]
    assert [row.turns[0].answers for row in rows[:4]] == [(f"caf\u00e9 {n}", "x", "x") for n in range(4)], (
        "given twice, drawn twice"
    )
    assert isinstance(rows[4], Rejected) and "question 4 has no answers" in rows[4].reason


def test_the_file_of_answers_is_beside_it_under_either_name(tmp_path):
    write(tmp_path, "v2_OpenEnded_mscoco_train2014_annotations.json")
    assert len(plan(tmp_path)[1]) == 1
    (tmp_path / "v2_OpenEnded_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(SettingsError, match=r"put v2_mscoco_train2014_annotations\.json beside it"):
        plan(tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(SettingsError, match="holds no answers in 'annotations'"):
        plan(tmp_path)


def test_entries_with_their_answers_are_left_alone():
    entry = {"question_id": 1, "answer": "a"}
    assert with_answers(entry, ImagesAndAnswers(None)) is entry
    assert with_answers({"question_id": 1}, ImagesAndAnswers(None, {1: ("b",)})) == {
        "question_id": 1,
        "answers": ("b",),
    }


def test_a_file_of_questions_by_another_name_is_told_what_it_needs(tmp_path):
    write(tmp_path)
    (tmp_path / "list.json").write_text((tmp_path / QUESTIONS).read_text())
    settings = PrepareDataSettings(source="coco_vqa", input=str(tmp_path / "list.json"), images=str(tmp_path))
    chosen, given = locate(settings)
    with pytest.raises(SettingsError, match=r"put its annotations \(as v2_mscoco_train2014_annotations\.json\) beside"):
        list(chosen.reader.plan(given))
