"""The chat command with many images: questions of folders and files, and the file of answers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.noting_assistant import PARAMS, NotingAssistant, options
from tinygptv import chat
from tinygptv.chat import Question


def test_images_of_a_folder_are_asked_in_the_order_of_their_names(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.jpeg", "d.webp", "e.gif", "f.bmp", "g.txt", "h.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "rows.json").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(ValueError, match=r"rows\.json"):
        chat._read_questions(options(str(tmp_path / "rows.json"), "what?"))
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match=r"one holds no image \(\.bmp, "):
        chat._read_questions(options(str(tmp_path / "one"), "what?"))
    (tmp_path / "one/a.jpg").touch()
    assert len(chat._read_questions(options(str(tmp_path / "one"), "what?"))) == 1
    found = chat._read_questions(options(str(tmp_path), "what?"))
    paths = [tmp_path / name for name in ("a.jpg", "b.PNG", "c.jpeg", "d.webp", "e.gif", "f.bmp")]
    assert found == [Question(path, "what?", None, {"image": str(path)}) for path in paths]
    for task in ("caption", "grounding"):
        assert {(q.text, q.task) for q in chat._read_questions(options(str(tmp_path), "--task", task))} == {("", task)}
    for words in ((), ("",), ("--task", "refer"), ("", "--task", "identify")):
        with pytest.raises(ValueError) as caught:
            chat._read_questions(options(str(tmp_path), *words))
        assert str(caught.value) == f"{tmp_path} is a folder: give the question to ask about each of its images."
    boxed = chat._read_questions(options(str(tmp_path), "--task", "identify"), (1.0, 2.0, 3.0, 4.0))
    assert [(q.text, q.task, q.box) for q in boxed] == [("", "identify", [1, 2, 3, 4])] * 6


def test_lines_of_a_file_have_their_own_question_and_task_or_the_commands(tmp_path):
    rows = [{"image": "a"}, {"image": "b", "question": "own", "task": "vqa"}, {"image": "/c", "question": None}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = chat._read_questions(options(str(path), "all", "--task", "refer"))
    assert found == [
        Question(tmp_path / "a", "all", "refer", rows[0]),
        Question(tmp_path / "b", "own", "vqa", rows[1]),
        Question(Path("/c"), "", "refer", rows[2]),
    ]
    # A box of the command line is for rows without their own that ask for it. Texts may hold other line ends.
    rows = [
        {"image": "a"},
        {"image": "b", "task": "refer"},
        {"image": "c\u2028\x85", "box": None},
        {"image": "d", "box": 1},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, "utf-8-sig")
    found = chat._read_questions(options(str(path), "--task", "identify"), (1.0, 2.0, 3.0, 4.0))
    assert [q.box for q in found] == [[1, 2, 3, 4], None, None, 1] and [q.row for q in found] == rows
    assert found[2].image == tmp_path / rows[2]["image"]


def test_a_row_may_say_that_it_has_no_task_question_or_box(tmp_path):
    rows = [{"image": "a", "task": None, "question": "own"}, {"image": "b", "question": ""}, {"image": "c", "box": []}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = chat._read_questions(options(str(path), "all", "--task", "identify"), (1.0, 2.0, 3.0, 4.0))
    assert [(q.text, q.task, q.box) for q in found] == [
        ("own", None, None),
        ("", "identify", [1, 2, 3, 4]),
        ("all", "identify", []),
    ]


def test_twice_as_many_are_asked_at_a_time_as_fit_a_batch(tmp_path, monkeypatch):
    """So that the next images are read while a batch is answered."""
    (tmp_path / "a").write_bytes(b"1")
    meeting = threading.Barrier(2 * NotingAssistant.max_batch_size, timeout=20)
    monkeypatch.setattr(NotingAssistant, "answer", lambda self, messages, params: str(meeting.wait() >= 0))
    questions = [Question(tmp_path / "a", "q", None, {"id": n}) for n in range(4)]
    assert chat._answer_batch(NotingAssistant(), questions, PARAMS, tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert rows == [{"id": n, "answer": "True", "boxes": []} for n in range(4)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "x"}', "'image'"),
        (b"nonsense", "Expecting value: line 1 column 1 (char 0)"),
        (b"[1]", "list indices must be integers or slices, not str"),
        (b'{"image": 5}', "unsupported operand type(s) for /: 'PosixPath' and 'int'"),
        (b'{"image": "a", "question": 5}', "question is 5, which is no text"),
        (b'{"image": "a", "task": ["vqa"]}', "task is ['vqa'], which is no text"),
        (b"[" * 100_000, ""),  # Python 3.14 has other words for it
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, reason):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"image": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as caught:
        chat._read_questions(options(str(path)))
    assert str(caught.value).startswith(f'{path}, line 3 is not {{"image": ..., "question": ...}}: {reason}')


def test_a_file_without_questions_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    for content, told in (
        (b"\n\xff", "is no text in UTF-8: invalid start byte at byte 1."),
        (b" \n", 'has no lines: write {"image": ..., "question": ...} in each.'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            chat._read_questions(options(str(path)))
        assert str(caught.value) == f"{path} {told}"
    path.unlink()
    with pytest.raises(ValueError, match=r"q\.jsonl does not exist\.$"):
        chat._read_questions(options(str(path)))


def test_rows_are_answered_in_order_with_boxes_in_pixels_and_failures_with_their_reason(tmp_path, capsys):
    for name, data in (("a", b"1"), ("b", b"broken"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)
    texts = {b"1": "<p>a dog</p> {<10><20><50><60>}", b"2": RuntimeError("the engine thread has ended.")}
    questions = [
        Question(tmp_path / name, f"q{name}", task, {"image": name, "id": n})
        for n, (name, task) in enumerate((("a", None), ("b", None), ("none", None), ("c", "refer"), ("c", "vqa")))
    ]
    questions[4] = Question(tmp_path / "c", "", "vqa", {"image": "c"})
    assert chat._answer_batch(NotingAssistant(texts), questions, PARAMS, tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert rows[0] == {
        "image": "a",
        "id": 0,
        "answer": texts[b"1"],
        "boxes": [{"label": "a dog", "box": [20.0, 20.0, 100.0, 60.0]}],
    }
    assert rows[1] == {"image": "b", "id": 1, "error": "it is no image."}
    assert rows[2]["id"] == 2 and "No such file" in rows[2]["error"]
    assert rows[3] == {"image": "c", "id": 3, "error": "the engine thread has ended."}
    assert "needs words" in rows[4]["error"]
    assert capsys.readouterr().out == f"1 answers, 4 failures: {tmp_path}/out\n"
    again = [Question(tmp_path / "a", "q", None, {"id": "ä"})]
    assert chat._answer_batch(NotingAssistant("naïve"), again, PARAMS, tmp_path / "out") == 0
    assert (tmp_path / "out").read_text() == '{"id": "ä", "answer": "naïve", "boxes": []}\n', (
        "in place of the rows before"
    )
    half = [Question(tmp_path / "a", "q", None, {"id": "\ud800"})]
    chat._answer_batch(NotingAssistant("x"), half, PARAMS, tmp_path / "out")
    assert json.loads((tmp_path / "out").read_text())["id"] == "\ud800"


@pytest.mark.parametrize(("texts", "status"), [((ValueError("x"), ValueError("y")), 1), (("a", ValueError("x")), 0)])
def test_a_batch_without_one_answer_has_failed(tmp_path, texts, status):
    (tmp_path / "a").write_bytes(b"1")
    questions = [Question(tmp_path / "a", "q", None, {}) for _ in texts]
    assert chat._answer_batch(NotingAssistant(*texts), questions, PARAMS, tmp_path / "out") == status


def test_a_row_is_worded_as_its_task_with_its_box(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assistant = NotingAssistant("x", "y")
    for box, task in (([20, 10, 100, 50], "identify"), ("ignored", None)):
        chat._answer_one(assistant, Question(tmp_path / "a", "q" if task is None else "", task, {}, box), PARAMS)
    (first, _), (second, _) = assistant.asked
    assert first[0].text == "[identify] what object is in this location {<10><10><50><50>}" and second[0].text == "q"
    assert first[0].role == "user" and first[0].images[0].data == b"1"
    bad = chat._answer_one(assistant, Question(tmp_path / "a", "", "identify", {"box": [1, 2]}, [1, 2]), PARAMS)
    assert bad == {"box": [1, 2], "error": "box [1, 2] must be [x1, y1, x2, y2] in pixels."}
    bad = chat._answer_one(assistant, Question(tmp_path / "a", "", "identify", {}, "x" * 1000), PARAMS)
    assert len(bad["error"]) < 130
    with pytest.raises(KeyError):  # a bug ends the command
        chat._answer_one(NotingAssistant(KeyError("bug")), Question(tmp_path / "a", "q", None, {}), PARAMS)


def test_boxes_of_a_row_are_rounded_to_hundredths_of_pixels(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(NotingAssistant, "open", lambda self, data: SimpleNamespace(width=333, height=77))
    answer = "{<1><1><99><99>}<delim>{<50><50><60><60>}"
    row = chat._answer_one(NotingAssistant(answer), Question(tmp_path / "a", "q", None, {}), PARAMS)
    assert [box["box"] for box in row["boxes"]] == [[3.33, 0.77, 329.67, 76.23], [166.5, 38.5, 199.8, 46.2]]
