"""The Jinja template alone, with strings that are all different: what each message becomes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tinygptv.data.chat_template import jinja_template
from tinygptv.data.prompts import TEMPLATES, Template

TEMPLATE = Template("odd", "Q {} A ", "##", image="[<ImageHere>]", after_instruction="~", bos=True, opening="!")
TOKENS = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>", "unk_token": "<u>"}
IMAGE = {"type": "image"}


def rendered(messages: Sequence[Mapping[str, Any]], template: Template = TEMPLATE, **tokens: str) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=jinja_template(template), **{**TOKENS, **tokens})
    return str(text)


def user(*parts: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_turns_are_wrapped_and_what_follows_an_instruction_depends_on_the_images_up_to_there():
    talk = [
        user("a"),
        assistant("b"),
        user("c", IMAGE, {"type": "image_url"}),
        assistant("d"),
        user("e"),
        assistant(""),
    ]
    assert rendered(talk) == "<b>!Q a A b##<b>Q [<ImageHere>][<ImageHere>]c~ A d##<b>Q e~ A ##"
    bare = Template("bare", "{}", "\n", image="<ImageHere>", after_instruction="", bos=False)
    assert rendered([user(IMAGE, "a"), assistant("b\nc\n\nd"), user("e")], bare) == "<ImageHere>ab c  d\ne"


def test_neighbours_are_joined_and_the_system_goes_before_the_first_question():
    talk = [
        user(IMAGE, "a", ""),
        {"role": "system", "content": "s"},
        {"role": "user", "content": "b"},
        user(IMAGE),
        assistant("c"),
        {"role": "assistant", "content": None},
        assistant("d"),
        {"role": "developer", "content": [{"type": "text", "text": "t"}]},
        user("e"),
    ]
    assert rendered(talk) == "<b>!Q [<ImageHere>][<ImageHere>]s\nt\na\nb~ A c\nd##<b>Q e~ A "


def test_an_empty_question_stands_before_a_greeting_and_asks_for_another_answer():
    system = {"role": "system", "content": "s"}
    assert rendered([assistant("hi"), user("a")]) == "<b>!Q  A hi##<b>Q a A "
    assert rendered([system, assistant("hi")]) == "<b>!Q s A hi##" and rendered([system]) == "<b>!Q s A "
    (text,), _ = render_jinja_template(
        [[user("a", IMAGE), assistant("b")]],
        chat_template=jinja_template(TEMPLATE),
        add_generation_prompt=True,
        **TOKENS,
    )
    assert text == "<b>!Q [<ImageHere>]a~ A b##<b>Q ~ A " and rendered([]) == ""


def test_answers_and_their_end_symbols_are_what_trainers_mark_as_generated():
    talk = [user("a"), assistant("b"), user("c", IMAGE), assistant("d ##")]
    source = jinja_template(TEMPLATE)
    (text,), (spans,) = render_jinja_template([talk], chat_template=source, return_assistant_tokens_mask=True, **TOKENS)
    assert [text[start:end] for start, end in spans] == ["b##", "d # ###"]


def test_marks_special_tokens_and_end_symbols_become_words():
    written = "<ImageHere><b><e><p><u>"
    apart = "< ImageHere>< b>< e>< p>< u>"
    assert rendered([user(written), assistant(f"{written} ###")]) == f"<b>!Q {apart} A {apart} # # ###"
    assert rendered([user("<u><p>")], unk_token="", pad_token="") == "<b>!Q <u><p> A "


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([user({"type": "video"})], "a message has a part of type video; types are text and image."),
        (
            [{"role": "tool", "content": "x"}],
            "a message has the role tool; roles are system, developer, user, assistant.",
        ),
        *[
            ([user("x"), {"role": role, "content": [IMAGE]}], f"a message of the {role} holds an image; only the user")
            for role in ("system", "developer", "assistant")
        ],
    ],
)
def test_what_no_turn_can_hold_is_refused(messages, told):
    with pytest.raises(Exception, match=told.replace(".", r"\.")):
        rendered(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_has_one_text_which_holds_no_line_break(name):
    text = jinja_template(TEMPLATES[name])
    assert text is jinja_template(TEMPLATES[name]) and "\n" not in text and repr(TEMPLATES[name].end_symbol) in text
