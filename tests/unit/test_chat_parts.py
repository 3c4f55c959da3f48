"""The chat command in parts: what is read, asked and printed, with an assistant that only notes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.noting_assistant import PARAMS, NotingAssistant, options
from tests.serving_model import make_image
from tinygptv import chat
from tinygptv.chat import LoadedImage
from tinygptv.data.conversation import ChatMessage
from tinygptv.inference.request import Delta
from tinygptv.inference.sampling import SamplingParams


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(make_image())
    return tmp_path / "a.png"


def test_the_words_and_their_defaults():
    found = vars(options("a.png"))
    assert found == {
        "image": Path("a.png"),
        "question": None,
        "model": None,
        "task": None,
        "box": None,
        "draw": None,
        "output": Path("answers.jsonl"),
        "max_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
        "batch_size": 16,
        "device": "cpu",
    }


def test_what_is_given_reaches_the_model(image, monkeypatch):
    made = {}

    def assistant(model, processor, **how):
        made.update(model=model, processor=processor, **how)
        return NotingAssistant("red")

    monkeypatch.setattr(chat, "shipped_model", lambda: "/shipped")
    monkeypatch.setattr(chat, "load_for_inference", lambda folder, device: ((folder, device), "processor"))
    monkeypatch.setattr(chat, "Assistant", assistant)
    monkeypatch.setattr(
        chat, "_converse", lambda assistant, o, source, box, params: made.update(box=box, params=params)
    )
    sampling = ["--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--seed", "7", "--batch-size", "3"]
    chat.main([str(image), "", "--task", "identify", "--box", "1,2,30,4.5", *sampling])
    assert made["model"] == ("/shipped", "cpu") and made["processor"] == "processor" and made["max_batch_size"] == 3
    assert made["params"] == SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, seed=7)
    assert made["box"] == (1.0, 2.0, 30.0, 4.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (image.parent / "answers.jsonl").write_text("of another")  # one image's answer goes to the terminal
    assert chat.main([str(image), "x", "--model", "here", "--device", "cuda:1", "--batch-size", "1"]) is None
    assert made["model"] == ("here", "cuda:1") and made["box"] is None and made["max_batch_size"] == 1
    assert chat.main([str(image), "x", "--draw", "boxes"]) == 1
    monkeypatch.setattr(
        chat, "_answer_batch", lambda assistant, rows, params, output: made.update(rows=rows, to=output)
    )
    chat.main([".", "", "--task", "identify", "--box", "1,2,3,4", "--output", "other.jsonl", "--draw", "unused"])
    assert [row.box for row in made["rows"]] == [[1, 2, 3, 4]] and made["to"] == Path("other.jsonl")
    assert made["params"].max_tokens == 256 and made["max_batch_size"] == 16


@pytest.mark.parametrize("error", [OSError("no memory"), ValueError("no memory")])
def test_what_cannot_be_done_is_one_sentence_and_a_bug_is_not(image, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(chat, "load_for_inference", fail)
    assert chat.main([str(image), "x", "--model", "here"]) == 1  # the shipped one may have to be made first
    assert capsys.readouterr() == ("", "error: no memory\n")
    error = KeyError("bug")
    with pytest.raises(KeyError):
        chat.main([str(image), "x", "--model", "here"])


def test_help_shows_the_ways_to_ask(capsys):
    with pytest.raises(SystemExit) as ended:
        chat.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.startswith("usage: python -m tinygptv.chat ") and chat.__doc__ in out
    assert "--task {vqa,caption,refer,identify,grounding,detection}" in out
    with pytest.raises(SystemExit) as ended:
        chat.main(["a.png", "x", "--task", "other"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("draw", "wrong"),
    [
        ("a.boxes.PNG", ""),
        ("a.jpeg", ""),
        ("answers.png", ""),
        ("a.psd", "--draw a.psd is no name of an image file: end it with .png or .jpg."),
        ("boxes.txt", "--draw boxes.txt is no name of an image file: end it with .png or .jpg."),
        ("no/a.png", "no/a.png cannot be written: its folder is missing."),
        ("there", "there cannot be written: it is a folder."),
        ("link.png", "link.png is the input: give another file to write to."),
    ],
)
def test_where_boxes_can_be_drawn(image, draw, wrong):
    Path("there").mkdir()
    Path("link.png").symlink_to(image)
    Path("answers.png").write_text("replaced, whatever it is")
    given = options(str(image), "x", "--draw", draw)
    if not wrong:
        chat._check_output(given, given.draw)
        return
    with pytest.raises(ValueError) as caught:
        chat._check_output(given, given.draw)
    assert str(caught.value) == wrong


def test_a_file_of_others_is_no_output(image):
    Path("mine.jsonl").write_text('{"image": "a"}\n{"answer": 1}\n')
    given = options(".", "x")
    with pytest.raises(ValueError) as caught:
        chat._check_output(given, Path("mine.jsonl"))
    assert str(caught.value) == "mine.jsonl exists and holds no answers of this command: give another --output."
    chat._check_output(given, Path("new.jsonl"))


def test_ctrl_c_ends_with_its_status_and_a_new_line(image, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "load_for_inference", interrupt)
    assert chat.main([str(image), "x", "--model", "here"]) == 130 and capsys.readouterr().err == "\n"


@pytest.mark.parametrize("box", [[1, 2, 3, 4], [1.5, 2, 3, 4]])
def test_a_box_is_four_numbers(box):
    assert chat._is_box(box)
    assert not any(chat._is_box(other) for other in (box[:3], [*box, 5], tuple(box), "1234", [*box[:3], "4"]))


def test_a_gpu_is_one_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        chat._check_device("cuda:1")
    assert str(caught.value) == f"--device cuda:1: torch {torch.__version__} finds no CUDA GPU here."
    with pytest.raises(ValueError, match=r"^--device gpu is unknown: give cpu, cuda or cuda:<number>\.$"):
        chat._check_device("gpu")
    chat._check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chat._check_device("cuda")


@pytest.mark.parametrize(
    ("content", "is_answers"),
    [
        ("", True),
        ('{"answer": 1}\nx', True),
        ('{"error": 1}', True),
        ('{"image": 1}', False),
        ("x", False),
        ("5", False),
        ('["answer"]', True),
        pytest.param("[" * 100_000, False, id="deep"),
    ],
)
def test_only_answers_are_written_over(tmp_path, content, is_answers):
    (tmp_path / "a").write_text(content)
    assert chat._is_answers(tmp_path / "a") is is_answers


# ----------------------------------------------------------------------------------------------------- one image


def converse(image, assistant, *words, lines=(), box=None):
    loaded = LoadedImage(image.read_bytes(), Image.open(image))
    given = options(str(image), *words)
    return chat._converse(assistant, given, loaded, box, PARAMS)


def test_one_question_is_asked_with_the_image_and_its_answer_printed(image, capsys):
    assistant = NotingAssistant("red star")
    assert converse(image, assistant, "what?") == 0
    ((messages, params),) = assistant.asked
    assert [(m.role, m.text, len(m.images)) for m in messages] == [("user", "what?", 1)] and params is PARAMS
    assert messages[0].images[0].data == image.read_bytes()
    assert capsys.readouterr().out == "red star\n" and not list(image.parent.glob("*.boxes.png"))


def test_a_conversation_carries_its_answers_and_the_image_once(image, monkeypatch):
    monkeypatch.setattr(chat, "_prompted", lambda: iter(["one", "two", "three"]))
    assistant = NotingAssistant("A1", "A2", "A3")
    converse(image, assistant)
    texts = [[(m.role, m.text, len(m.images)) for m in messages] for messages, _ in assistant.asked]
    first = ("user", "one", 1)
    assert texts[0] == [first] and texts[1] == [first, ("assistant", "A1", 0), ("user", "two", 0)]
    assert texts[2] == [*texts[1], ("assistant", "A2", 0), ("user", "three", 0)]


def test_a_task_leaves_nothing_behind_in_the_conversation(image, monkeypatch):
    monkeypatch.setattr(chat, "_prompted", lambda: iter(["[vqa] what?", "hello", "[vqa] why?", "so?"]))
    assistant = NotingAssistant("A1", "A2", "A3", "A4")
    converse(image, assistant)
    texts = [[m.text for m in messages] for messages, _ in assistant.asked]
    assert texts == [["[vqa] what?"], ["hello"], ["[vqa] why?"], ["hello", "A2", "so?"]]


def test_boxes_are_drawn_where_it_is_asked_for_and_told(image, capsys, monkeypatch):
    answer = "{<10><10><60><60>}"
    for words, name in (((), "a.boxes.png"), (("--draw", "other.png"), "other.png")):
        converse(image, NotingAssistant(answer), "it", *words)
        assert Image.open(name).convert("RGB").getpixel((6, 14)) == (230, 57, 70), "a corner of the box"
        assert capsys.readouterr().err == f"boxes drawn in {name}\n" and Image.open(name).size == (60, 40)


def test_a_question_that_cannot_be_worded_ends_one_and_not_a_conversation(image, monkeypatch, capsys):
    with pytest.raises(ValueError, match="needs words"):
        converse(image, NotingAssistant(), "", "--task", "refer")
    monkeypatch.setattr(chat, "_prompted", lambda: iter(["", "the dog"]))
    assistant = NotingAssistant("yes")
    assert converse(image, assistant, "--task", "refer") == 0
    assert [messages[0].text for messages, _ in assistant.asked] == ["[refer] give me the location of the dog"]
    assert capsys.readouterr().err.startswith("error: task 'refer' needs words")


def test_a_box_is_of_the_images_width_and_height(image):
    """The image has 60 x 40 pixels."""
    assistant = NotingAssistant("a dog")
    converse(image, assistant, "", "--task", "identify", box=(6, 4, 30, 20))
    ((messages, _),) = assistant.asked
    assert messages[0].text == "[identify] what object is in this location {<10><10><50><50>}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--batch-size", "0"), "--batch-size 0 is no number of answers: give 1 or more."),
        (("--device", "gpu"), "--device gpu is unknown: give cpu, cuda or cuda:<number>."),
        (("--task", "identify", "--box", "1,2,3,4,5"), "--box 1,2,3,4,5 must be x1,y1,x2,y2 in pixels, and goes with"),
        (("--task", "identify", "--box", "1,2,3"), "--box 1,2,3 must be x1,y1,x2,y2 in pixels, and goes with"),
        (("--task", "refer"), "task 'refer' needs words"),
        (("--draw", "no/a.png"), "no/a.png cannot be written: its folder is missing."),
    ],
)
def test_mistakes_of_one_image_are_found_before_its_model_is_loaded(image, monkeypatch, capsys, words, told):
    monkeypatch.setattr(chat, "load_for_inference", lambda *_: pytest.fail("loaded"))
    assert chat.main([str(image), "", "--model", "here", *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_lines_are_read_until_an_empty_one_or_the_end(monkeypatch):
    lines, prompts = iter([" A  b ", "b", "  ", "c"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    assert list(chat._prompted()) == ["A  b", "b"] and prompts == ["> "] * 3

    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert list(chat._prompted()) == []

    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat._prompted())


def test_an_error_of_the_engine_is_raised():
    failing = SimpleNamespace(iterate=lambda *_: iter([Delta("a"), Delta(finish_reason="error", error="no memory")]))
    with pytest.raises(ValueError, match=r"^no memory$"):
        chat._stream(failing, [ChatMessage("user", "x")], PARAMS)


def test_an_answer_is_shown_while_it_comes(monkeypatch):
    shown = []

    class Terminal:
        def write(self, text):
            shown.append(text)

        def flush(self):
            shown.append("shown")

    def iterate(*_):
        for text in ("a", "", "b c"):
            yield Delta(text)
        yield Delta(finish_reason="length")

    monkeypatch.setattr("sys.stdout", Terminal())
    assert chat._stream(SimpleNamespace(iterate=iterate), [ChatMessage("user", "x")], PARAMS) == "ab c"
    words = [text for text in shown if text]
    assert words[:2] == ["a", "shown"] and words[-1] == "\n" and words.index("b c") < len(words) - 2
