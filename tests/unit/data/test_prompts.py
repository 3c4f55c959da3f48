"""Strings of prompts: templates field by field, wordings that weights were trained with, and captions made clean."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, replace

import pytest

from tinygptv.data.conversation import TASKS
from tinygptv.data.prompts import (
    EVALUATION_INSTRUCTIONS,
    INSTRUCTIONS,
    LONGEST_CAPTION,
    TEMPLATES,
    clean_caption,
    escape_markers,
)

IMAGE = "<Img><ImageHere></Img> "


def test_templates_are_the_releases():
    """Weights know these strings alone."""
    assert {name: astuple(template)[1:] for name, template in TEMPLATES.items()} == {
        "caption": ("{}", "\n", "<ImageHere>", "", True, ""),
        "human": ("###Human: {} ###Assistant: ", "###", IMAGE, " ", True, ""),
        "inst": ("[INST] {} [/INST]", "###", IMAGE, " ", True, ""),
        "released_eval": ("Human: {}###Assistant: ", "###", IMAGE, "", False, "###"),
        "released_chat": ("<s>[INST] {} [/INST]", "###", IMAGE, " ", True, ""),
    }
    assert all(template.name == name for name, template in TEMPLATES.items())


def test_wordings_are_the_releases():
    """Another comma is another prompt: the checksum is of the wordings as they were compared with the release."""
    numbers = {"pair": 0, "align": 4, "vqa": 2, "caption": 17, "refer": 7, "identify": 7, "grounding": 4}
    assert {task: len(wordings) for task, wordings in INSTRUCTIONS.items()} == numbers | dict.fromkeys(
        ("detection", "conversation", "instruct", "text"), 1
    )
    text = "\n".join(f"{task}: {wording}" for task, wordings in INSTRUCTIONS.items() for wording in wordings)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "500ad28ee26e5fc3"
    for task in TASKS:
        assert EVALUATION_INSTRUCTIONS[task] in INSTRUCTIONS[task], "benchmarks ask as training did"
        for wording in INSTRUCTIONS[task]:
            assert wording.startswith(f"[{task}] ") and wording.count("{}") == (task not in ("caption", "grounding"))


def test_benchmarks_have_one_wording_each():
    assert EVALUATION_INSTRUCTIONS == {
        "vqa": "[vqa] Based on the image, respond to this question with a short answer: {}",
        "refer": "[refer] give me the location of {}",
        "identify": "[identify] what object is in this location {}",
        "caption": "[caption] Briefly describe this image.",
        "grounding": "[grounding] please describe this image in details",
        "detection": "[detection] {}",
        "true_false": "[vqa] Based on the image, is this statement true or false? {}",
        "vizwiz": "[vqa] The question is '{}' Based on the image, answer the question with a single word or phrase. "
        "and reply 'unanswerable' when the provided information is insufficient",
        "hateful": "This is an image writting '{}'. Is this image hateful? Answer yes or no. Answer: ",
    }


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Dog's Bone", "a dog's bone"),
        ('a.b!c"d(e)f*g#h:i;j~k', "a b c d e f g h i j k"),
        ("what is it?, he said - [no] {x} a/b & c", "what is it?, he said - [no] {x} a/b & c"),
        ("a  b\t\tc \n d", "a b c d"),
        ("a\tb", "a\tb"),
        (" . a dog. \n", "a dog"),
        ("a dog\n", "a dog"),
        ("\na dog", "\na dog"),
        ("ÄPFEL!", "äpfel"),
        ("", ""),
        ("...", ""),
    ],
)
def test_captions_are_cleaned_as_in_the_release(text, cleaned):
    assert clean_caption(text) == cleaned


def test_captions_keep_their_first_words():
    words = [f"w{n}" for n in range(60)]
    assert LONGEST_CAPTION == 50 and clean_caption(" ".join(words)) == " ".join(words[:50])
    assert clean_caption("One, two. Three four", 3) == "one, two three" and clean_caption("a b", 2) == "a b"


def test_marks_and_special_tokens_become_words():
    text = "<ImageHere> <|endoftext|><s> <ImageHere>x"
    assert escape_markers(text) == "< ImageHere> < |endoftext|><s> < ImageHere>x"
    assert escape_markers(text, ["<s>", "<q>"]) == "< ImageHere> <|endoftext|>< s> < ImageHere>x"
    assert escape_markers(text, ()) == "< ImageHere> <|endoftext|><s> < ImageHere>x"


def test_an_instruction_is_wrapped_once_and_as_it_stands():
    human = TEMPLATES["human"]
    assert human.wrap("is {} {0} a set?") == "###Human: is {} {0} a set? ###Assistant: "
    assert replace(human, turn="{} {}").wrap("x") == "x {}"


@pytest.mark.parametrize(
    ("template", "answer", "kept"),
    [
        ("human", "## a", "## a"),
        ("human", "a ### b", "a # # # b"),
        ("human", "#####", "# # # # #"),
        ("human", "######", "# # ## # #"),
        ("human", "####", "# # ##"),
        ("caption", "a\nb\n\nc", "a b  c"),
    ],
)
def test_an_answers_own_end_symbols_are_taken_apart(template, answer, kept):
    assert TEMPLATES[template].escape_end_symbol(answer) == kept and TEMPLATES[template].end_symbol not in kept


def test_an_answer_is_cut_at_its_first_end_and_trimmed():
    assert TEMPLATES["caption"].cut_answer(" a dog \nand\nmore") == "a dog"
    assert TEMPLATES["human"].cut_answer("\n a\nb ### c ###") == "a\nb"
