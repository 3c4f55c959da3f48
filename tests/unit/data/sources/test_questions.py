"""Questions and answers in two files: each slice carries the answers of its own questions."""

from __future__ import annotations

import gzip
import json

import pytest

from pipelines import storage
from pipelines.data.sources import json_entries, locate, questions
from pipelines.data.sources.base import Malformed, Rejected, SourceInput
from pipelines.data.sources.json_entries import JsonForm
from pipelines.data.sources.json_rows import id_of
from pipelines.data.sources.questions import ImagesAndAnswers, has_questions_alone, with_answers
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import Location
from tests.source_files import jpeg, refused

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


@pytest.mark.parametrize(
    ("content", "alone"),
    [
        ({"questions": [{"question_id": 1, "question": "q"}]}, True),
        *(
            ({"questions": [{"question_id": 1, name: "a"}, {"question_id": 2}]}, False)
            for name in ("answer", "answers", "direct_answers", "multiple_choice_answer")
        ),
        ({"questions": []}, False),
        ({"questions": ["answerless"]}, False),
        ({"other": [{"question_id": 1}]}, False),
    ],
)
def test_a_file_of_questions_is_known_by_its_first_entry(tmp_path, content, alone):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    (file,) = storage.find_files(str(path))
    assert has_questions_alone(file, JsonForm("member", "questions")) is alone
    assert not has_questions_alone(file, JsonForm("list"))
    path.write_text(json.dumps({"annotations": content.get("questions", [])}))
    assert not has_questions_alone(file, JsonForm("member", "annotations")), "as captions are: they have no answers"


def test_a_file_of_questions_that_is_cut_off_gives_what_is_before(tmp_path):
    write(tmp_path)
    (tmp_path / QUESTIONS).write_bytes((tmp_path / QUESTIONS).read_bytes()[:-9])
    reader, units = plan(tmp_path)
    *rows, rest = [found for unit in units for found in reader.read(unit)]
    assert len(rows) == 4 and isinstance(rest, Rejected) and "the file is cut off" in rest.reason


@pytest.mark.parametrize("damage", [b'{"questions": [', gzip.compress(b'{"questions": [{}]}', mtime=0)[:14]])
def test_a_damaged_file_is_told_when_it_is_read(tmp_path, damage):
    (tmp_path / "a.json.gz").write_bytes(damage)
    (file,) = storage.find_files(str(tmp_path / "a.json.gz"))
    assert has_questions_alone(file, JsonForm("member", "questions")) is False


def test_questions_are_known_by_numbers_and_by_texts():
    extra = ImagesAndAnswers(None, {7: ("a",), "x7": ("b", "c"), 8: ()})
    for number, answers in ((7, ("a",)), ("x7", ("b", "c")), (8, ())):
        assert with_answers({"question_id": number, "image": "i"}, extra) == {
            "question_id": number,
            "image": "i",
            "answers": answers,
        }
    for entry, told in (({"question_id": 9}, 9), ({"question_id": [7]}, None), ({}, None), ("text", None)):
        with pytest.raises(Malformed, match=f"^question {told} has no answers in the annotations file$"):
            with_answers(entry, extra)


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


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ('{"questions": [{"question": "q"}]}', True),
        ('{"questions": [{"question": "q", "answer": "a"}]}', False),
        ('{"questions": [{"multiple_choice_answer": "a"}]}', False),
        ('{"questions": []}', False),
        ('{"questions": [3]}', False),
        ('{"questions": [', False),
    ],
)
def test_questions_without_answers(tmp_path, text, alone):
    (tmp_path / "a.json").write_text(text)
    (file,) = storage.find_files(str(tmp_path / "a.json"))
    assert questions.has_questions_alone(file, JsonForm("member", "questions")) is alone
    assert questions.has_questions_alone(file, JsonForm("list")) is False


def test_answers_are_looked_up_by_ids_that_can_be_compared(tmp_path):
    path = tmp_path / "a.json"
    entries = [{"question_id": 1, "answers": [{"answer": "a"}, "b"]}, 3, {"question_id": 2, "answers": "x"}]
    path.write_text(json.dumps({"annotations": entries}))
    assert questions._read_answers(Location.parse(str(path))) == {1: ("a", "b")}
    ids = [id_of(entry, "question_id") for entry in ({"question_id": "7"}, {"question_id": [1]}, {}, 3)]
    assert ids == ["7", None, None, None]
    assert [questions._utf8(text) for text in ("caf\u00c3\u00a9", "caf\u00e9", "\u4e2d")] == [
        "caf\u00e9",
        "caf\u00e9",
        "\u4e2d",
    ]
    path.write_text('{"annotations": [}')
    assert refused(SettingsError, questions._read_answers, Location.parse(str(path))).startswith(
        f"{path} cannot be used: the file is cut off"
    )
    path.write_text('{"annotations": []}')
    assert refused(SettingsError, questions._read_answers, Location.parse(str(path))) == (
        f"{path} holds no answers in 'annotations': is it the right file?"
    )
    (tmp_path / "questions.json").touch()
    (file,) = storage.find_files(str(tmp_path / "questions.json"))
    assert refused(SettingsError, questions._answers_file, SourceInput("ok_vqa", "", "", "", ""), file) == (
        f"{tmp_path}/questions.json holds questions without answers: put annotations.json beside it, or give "
        "source=ok_vqa a file that holds both."
    )
