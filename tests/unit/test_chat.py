"""The command line without a server: one image, a conversation, a folder, a file of questions."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.serving_model import make_image, save_checkpoint
from tinygptv import chat
from tinygptv.data.drawing import draw_boxes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(3):
        (pictures / f"{seed}.png").write_bytes(make_image(seed))
    (pictures / "notes.txt").write_text("not a picture")
    return tmp_path


def run(checkpoint, *arguments):
    return chat.main([*arguments, "--model", checkpoint, "--max-tokens", "8"])


def test_one_question_is_answered(checkpoint, folder, capsys):
    assert run(checkpoint, "pictures/0.png", "what is it?") == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert run(checkpoint, "pictures/0.png", "what is it?") == 0
    assert capsys.readouterr().out == first


def test_a_conversation_goes_on_until_an_empty_line(checkpoint, folder, capsys, monkeypatch):
    lines = iter(["what is it?", "sure?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(checkpoint, "pictures/0.png") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_boxes_are_drawn_to_a_file(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr(chat, "_stream", lambda *_: "<p>it</p> {<10><10><60><60>}")
    assert run(checkpoint, "pictures/0.png", "it", "--task", "refer") == 0
    drawn = Image.open("0.boxes.png").convert("RGB")
    assert drawn.size == (60, 40)
    assert drawn.getpixel((6, 14)) == (230, 57, 70), "a corner of the box, in the first colour"
    assert "0.boxes.png" in capsys.readouterr().err
    assert run(checkpoint, "pictures/0.png", "it", "--draw", "other.png") == 0
    assert Image.open("other.png").size == (60, 40)


def test_a_folder_is_asked_one_question(checkpoint, folder, capsys):
    (folder / "pictures/broken.jpg").write_bytes(b"no picture")
    assert run(checkpoint, "pictures", "what is it?") == 0
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"pictures/{name}" for name in ("0.png", "1.png", "2.png", "broken.jpg")]
    assert all(row["answer"] for row in rows[:3]) and "is not an image (JPEG, PNG, WebP, GIF, BMP)" in rows[3]["error"]
    assert "3 answers, 1 failures" in capsys.readouterr().out
    (folder / "broken").mkdir()
    (folder / "pictures/broken.jpg").rename(folder / "broken/broken.jpg")
    assert run(checkpoint, "broken", "what is it?") == 1, "not one answer"


def test_a_file_of_questions_keeps_its_rows(checkpoint, folder):
    rows = [
        {"image": "pictures/0.png", "question": "what is it?", "id": 7},
        {"image": "pictures/1.png", "question": "", "task": "caption"},
        {"image": "pictures/2.png", "question": "", "task": "vqa"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert run(checkpoint, "questions.jsonl", "--output", "out.jsonl") == 0
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert answers[0]["id"] == 7 and answers[0]["answer"] and answers[1]["answer"]
    assert "needs words" in answers[2]["error"]


def test_a_box_of_a_row_is_asked_about(checkpoint, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(chat.Assistant, "answer", lambda self, messages, params: asked.append(messages) or "it")
    rows = [
        {"image": "pictures/0.png", "task": "identify", "box": box}
        for box in ([6, 4, 30, 20], [600, 4, 700, 20], [1, 2], None)
    ]
    (folder / "boxes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(checkpoint, "boxes.jsonl") == 0
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [message.text for (message,) in asked] == ["[identify] what object is in this location {<10><10><50><50>}"]
    errors = [row.get("error", "") for row in answers]
    assert "outside of the image" in errors[1] and "[x1, y1, x2, y2]" in errors[2] and "needs a box" in errors[3]


def test_options_may_stand_before_the_question(checkpoint, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(chat, "_stream", lambda assistant, messages, params: asked.append(messages[0].text) or "")
    assert run(checkpoint, "pictures/0.png", "--task", "refer", "the dog") == 0
    assert run(checkpoint, "--task", "refer", "pictures/0.png", "the dog") == 0
    assert asked == ["[refer] give me the location of the dog"] * 2


def test_tasks_are_asked_without_the_turns_before(checkpoint, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(chat, "_stream", lambda assistant, messages, params: asked.append(messages) or "yes")
    lines = iter(["hello", "[vqa] what colour?", "sure?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(checkpoint, "pictures/0.png") == 0
    assert [[m.text for m in messages] for messages in asked] == [
        ["hello"],
        ["[vqa] what colour?"],
        ["hello", "yes", "sure?"],
    ]
    assert [[len(m.images) for m in messages] for messages in asked] == [[1], [1], [1, 0, 0]]


def test_a_task_that_lacks_words_asks_again(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr(chat, "_stream", lambda *_: "yes")
    monkeypatch.setattr(chat, "_prompted", lambda: iter(["", "the dog"]))
    assert run(checkpoint, "pictures/0.png", "--task", "refer") == 0
    assert "needs words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.png", "x"), "nothing.png does not exist"),
        (("nothing.jsonl",), "nothing.jsonl does not exist"),
        (("none.jsonl",), "none.jsonl has no lines"),
        (("pictures/0.png", "x", "--batch-size", "0"), "--batch-size 0 is no number of answers"),
        (("pictures/notes.txt", "x"), "pictures/notes.txt is not an image (JPEG, PNG, WebP, GIF, BMP)."),
        (("pictures",), "give the question"),
        (("pictures", ""), "give the question"),
        (("pictures", "x", "--box", "1,2,3"), "must be x1,y1,x2,y2"),
        (("pictures/0.png", "", "--task", "identify", "--box", "1,2,3,4,5"), "must be x1,y1,x2,y2"),
        (("empty", "x"), "holds no image"),
        (("bad.jsonl",), "line 2 is not"),
        (("pictures/0.png", "x", "--temperature", "-1"), "temperature"),
        (("pictures/0.png", "", "--task", "identify", "--box", "1,2,3"), "must be x1,y1,x2,y2"),
        (("pictures/0.png", "", "--task", "identify", "--box", "a,b,c,d"), "must be x1,y1,x2,y2"),
        (("pictures/0.png", "", "--task", "identify", "--box", "100,100,120,120"), "outside of the image of 60 x 40"),
        (("pictures/0.png", "x", "--box", "1,2,3,4"), "goes with --task identify"),
        (("pictures/0.png", "", "--task", "refer"), "needs words"),
        (("pictures/0.png", "x", "--device", "gpu"), "--device gpu is unknown"),
        (("pictures", "x", "--output", "missing/answers.jsonl"), "its folder is missing"),
        (("pictures", "x", "--output", "pictures"), "it is a folder"),
        (("pictures", "x", "--output", "pictures/notes.txt"), "holds no answers"),
        (("good.jsonl", "--output", "good.jsonl"), "is the input"),
        (("pictures/0.png", "x", "--draw", "pictures/0.png"), "is the input"),
        (("pictures/0.png", "x", "--draw", "boxes"), "no name of an image file"),
    ],
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(chat, "load_for_inference", lambda *_: pytest.fail("a model was loaded"))
    (folder / "empty").mkdir()
    (folder / "good.jsonl").write_text('{"image": "pictures/0.png", "question": "x"}\n')
    (folder / "none.jsonl").write_text("\n")
    (folder / "bad.jsonl").write_text('{"image": "pictures/0.png", "question": "x"}\nnonsense\n')
    assert run("unused", *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_a_missing_model_is_named(folder, capsys):
    assert chat.main(["pictures/0.png", "x", "--model", "nowhere"]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_drawing_leaves_the_picture_as_it_is():
    picture = Image.new("RGB", (200, 100), "white")
    assert draw_boxes(picture, "no box here").tobytes() == picture.tobytes()
    drawn = draw_boxes(picture, "{<50><50><10><10>} <p>a very long phrase that does not fit</p> {<90><90><100><100>}")
    assert drawn.size == picture.size and drawn.tobytes() != picture.tobytes()
    assert picture.getcolors() == [(20000, (255, 255, 255))]


@pytest.mark.parametrize(("given", "policy"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_the_command_sleep_while_they_wait(monkeypatch, capsys, given, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", given)
    if not given:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("sys.argv", ["chat", "--help"])
    seen = []

    def watch(name, *arguments, **options):
        if name.startswith("tinygptv."):
            seen.append(os.environ.get("OMP_WAIT_POLICY"))
        return load(name, *arguments, **options)

    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", watch)
    with pytest.raises(SystemExit):
        exec(compile(Path(chat.__file__).read_text(), chat.__file__, "exec"), {"__name__": "__main__"})
    assert seen[0] == policy, "OpenMP reads it when torch is imported"
