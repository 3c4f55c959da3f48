"""What each word of ``python -m tinygptv.convert`` reaches, with conversions that only note it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinygptv.convert import __main__ as command
from tinygptv.convert.__main__ import main


@pytest.fixture
def asked(monkeypatch):
    """What is called, in order."""
    done = []

    def note(name, answer=None):
        return lambda *given, **options: done.append((name, *given, *([options] if options else []))) or answer

    monkeypatch.setattr(command.logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(command, "check_output", note("output"))
    monkeypatch.setattr(command, "language_settings", note("language"))
    monkeypatch.setattr(command, "load_tokenizer", note("tokenizer", "the tokenizer"))
    monkeypatch.setattr(command, "match_release", note("match", SimpleNamespace(report="layout 3")))
    monkeypatch.setattr(command, "convert_release", note("convert"))
    monkeypatch.setattr(command, "write_release_stage", note("stage"))
    monkeypatch.setattr(command, "write_split_phi", note("phi", ["a", "b"]))
    return done


def test_a_release_is_matched_and_written_as_its_words_say(asked, capsys):
    paths = {"vision": "v", "qformer": "q", "language": "l", "projection": "p", "checkpoint": "c"}
    words = [f"--{name}={path}" for name, path in paths.items()]
    sizes = ["--image-size=448", "--vision-heads=4", "--qformer-heads=5", "--lora-alpha=7"]
    more = ["--dtype=float16", "--template=inst", "--tokenizer=t", "--output=out"]
    assert main(["release", *words, *sizes, *more]) == 0
    release = asked[3]
    assert asked[:3] == [("output", Path("out"), ["v", "q", "l", "p", "c", "t"]), ("language", "l"), ("tokenizer", "t")]
    options = {"image_size": 448, "vision_heads": 4, "qformer_heads": 5, "lora_alpha": 7}
    assert release == ("match", {**paths, **options})
    name, found, *rest = asked[4]
    assert (name, found.report, rest) == ("convert", "layout 3", [Path("out"), "the tokenizer", torch.float16, "inst"])
    assert capsys.readouterr().out == "layout 3\nout\n" and len(asked) == 5


def test_what_is_left_out_has_its_default(asked):
    assert main(["release", "--language=l", "--output=out"]) == 0
    assert asked[0] == ("output", Path("out"), ["l"]) and asked[2] == ("tokenizer", "l")
    roles = dict.fromkeys(("vision", "qformer", "projection", "checkpoint"))
    sizes = dict.fromkeys(("image_size", "vision_heads", "qformer_heads"))
    assert asked[3] == ("match", {**roles, "language": "l", **sizes, "lora_alpha": 16})
    assert asked[4][2:] == (Path("out"), "the tokenizer", None, "human")
    assert main(["release", "--tokenizer=t", "--output=out", "--dtype=float32"]) == 0
    assert asked[6:8] == [("language", None), ("tokenizer", "t")] and asked[9][4] is torch.float32


@pytest.mark.parametrize("merge", [True, False])
def test_the_other_layouts(asked, capsys, merge):
    assert main(["to-phi2", "source", "--output=out", *(["--merge-lora"] if merge else [])]) == 0
    assert asked == [
        ("output", Path("out"), [Path("source")]),
        ("phi", Path("source"), Path("out"), {"merge_lora": merge}),
    ]
    told = "left out 2 tensors of added norms, which plain Phi-2 does not have\nout\n"
    assert capsys.readouterr().out == told
    asked.clear()
    assert main(["to-release", "source", "--output=out.pth"]) == 0
    assert asked == [("stage", Path("source"), Path("out.pth"))] and capsys.readouterr().out == "out.pth\n"


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("wrong")])
def test_a_mistake_is_one_sentence_and_a_bug_is_not(asked, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(command, "write_release_stage", fails)
    assert main(["to-release", "source", "--output=out"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: wrong\n")
    error = KeyError("bug")
    with pytest.raises(KeyError):
        main(["to-release", "source", "--output=out"])


def test_what_is_wrong_is_told_before_anything_is_read(asked, tmp_path, capsys):
    assert main(["release", "--output=out", "--vision=v"]) == 2
    assert capsys.readouterr().err == "error: give --tokenizer, the folder of Phi-2's tokenizer.\n"
    assert main(["release", "--output=out", "--language=l", "--template=x"]) == 2
    names = ", ".join(command.TEMPLATES)
    assert capsys.readouterr().err == f"error: --template x is unknown; there are: {names}.\n"
    assert main(["release", "--output=out", "--language=l", "--template="]) == 2
    assert capsys.readouterr().err == f"error: --template  is unknown; there are: {names}.\n"
    (tmp_path / "page").write_bytes(b"<!doctype html>")
    assert main(["release", "--output=out", "--language=l", f"--qformer={tmp_path}/page"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/page is a web page")
    assert {entry[0] for entry in asked} == {"output"}


def test_lines_of_the_work_go_beside_the_result(asked, monkeypatch):
    configured = []
    monkeypatch.setattr(command.logging, "basicConfig", lambda **options: configured.append(options))
    main(["to-release", "source", "--output=out"])
    (options,) = configured
    assert options["level"] == logging.INFO and options["stream"] is command.sys.stderr
    assert options["format"] == "%(message)s"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ("to-phi2 checkpoint folder -> plain Phi-2, split layout", command.__doc__.split("\n\n")[1].split()[0])),
        (
            ("release",),
            (
                "--vision VISION eva_vit_g.pth",
                "--qformer QFORMER BLIP-2's file",
                "--language LANGUAGE Phi-2, a folder or file",
                "--projection PROJECTION MiniGPT-4's projection",
                "--checkpoint CHECKPOINT a stage file of the release",
                "--image-size IMAGE_SIZE side of the input in pixels [that of the position embedding]",
                "--vision-heads VISION_HEADS attention heads of the ViT [width / 88]",
                "--qformer-heads QFORMER_HEADS attention heads of the Q-Former [width / 64]",
                "LoRA scale numerator [16]",
                "of frozen matrices [the files', at most 16 bits]",
                "stage 4 of the release: inst [human]",
            ),
        ),
        (("to-release",), ("source checkpoint folder", "--output OUTPUT new .pth file")),
        (("to-phi2",), ("--merge-lora fold LoRA adapters into the weights", "--output OUTPUT folder, new or empty")),
    ],
)
def test_help_says_what_each_word_is(capsys, monkeypatch, words, told):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and all(text in out for text in told), out


@pytest.mark.parametrize("words", [(), ("release",), ("to-phi2", "source"), ("release", "--output=o", "--dtype=int8")])
def test_a_word_that_is_lacking_or_unknown_ends_with_its_usage(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("usage: python -m tinygptv.convert")
