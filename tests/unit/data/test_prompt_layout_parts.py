"""The layout's parts, with a template and a tokenizer whose every string is another."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tinygptv.data.prompt_layout import Exchange, PromptLayout, TurnIds, turn_texts
from tinygptv.data.prompts import TEMPLATES, Template

TEMPLATE = Template("odd", "Q {} A ", "##", image="[<ImageHere>]", after_instruction="~", bos=True, opening="!")
IMAGE, SPECIAL = 900, 1


class Letters(SimpleNamespace):
    """One id per letter; special tokens have names of several."""

    bos_token, bos_token_id, all_special_tokens = "<b>", SPECIAL, ["<b>", "<s>"]
    convert_ids_to_tokens = {}.get  # no token is at the images' id

    def encode(self, text, *, add_special_tokens):
        assert text and not add_special_tokens, "BOS stands where the layout puts it"
        self.asked.append(text)
        return [SPECIAL] if text == self.bos_token else [ord(letter) for letter in text]


def layout(template=TEMPLATE):
    return PromptLayout(Letters(asked=[]), template, image_token_id=IMAGE, num_query_tokens=3)


def ids(*parts):
    """Text, images (numbers of them) and BOS (None) to ids."""
    found = []
    for part in parts:
        found += [SPECIAL] if part is None else [IMAGE] * 3 * part if isinstance(part, int) else map(ord, part)
    return found


def test_what_follows_an_instruction_depends_on_the_images_up_to_there():
    turns = [Exchange("a", "b"), Exchange("c", "d", 2), Exchange("e", "f"), Exchange("g", None, 1), Exchange("", "")]
    assert turn_texts(turns, TEMPLATE) == [
        ("!Q a A ", "b##"),
        ("Q [<ImageHere>][<ImageHere>]c~ A ", "d##"),
        ("Q e~ A ", "f##"),
        ("Q [<ImageHere>]g~ A ", None),
        ("Q ~ A ", "##"),
    ]
    assert turn_texts([], TEMPLATE) == []


def test_a_caption_has_its_images_and_no_wrapping():
    assert turn_texts([Exchange(None, "a", 2)], TEMPLATE) == [("!<ImageHere><ImageHere>", "a##")]
    assert turn_texts([Exchange(None, "a")], TEMPLATE) == [("!", "a##")]
    assert turn_texts([Exchange("", "a", 1)], TEMPLATE) == [("!Q [<ImageHere>]~ A ", "a##")]


def test_an_answer_that_goes_on_has_no_end():
    turns = [Exchange("a", "b"), Exchange("c", "d", is_complete=False)]
    assert [answer for _, answer in turn_texts(turns, TEMPLATE)] == ["b##", "d"]
    assert layout().encode_prompt(turns) == ids(None, "!Q a A ", "b##", None, "Q c A ", "d")


def test_words_of_people_are_words():
    turns = [Exchange("<s> <ImageHere>", "<b># ## ###", 1)]
    question, answer = "!Q [<ImageHere>]< s> < ImageHere>~ A ", "< b># # # # # ###"
    assert turn_texts(turns, TEMPLATE, ["<b>", "<s>"]) == [(question, answer)]
    assert turn_texts([Exchange("<s>", "<s>")], TEMPLATE) == [("!Q <s> A ", "<s>##")], "where nobody names them"
    found = layout().encode_turns(turns)[0]
    assert found.question == ids("!Q [", 1, "]< s> < ImageHere>~ A ")
    assert found.answer == ids(answer) and layout().render(turns) == f"<b>{question}{answer}"
    assert layout().encode_answer("<s>##") == ids("< s># #", "##")


def test_each_piece_is_tokenised_on_its_own():
    made = layout()
    assert made.encode_turns([Exchange("a", "b", 2), Exchange("c")]) == [
        TurnIds([SPECIAL], ids("!Q [", 1, "][", 1, "]a~ A "), ids("b##")),
        TurnIds([SPECIAL], ids("Q c~ A "), None),
    ]
    assert made.tokenizer.asked == ["!Q [", "][", "]a~ A ", "b##", "Q c~ A "]
    for complete, answer in ((True, "##"), (False, "")):
        assert made.encode_turns([Exchange("a", "", 0, complete)])[0].answer == ids(answer), "an empty answer is one"
    plain = layout(Template("plain", "{}", "#", image="<ImageHere>", after_instruction="", bos=False))
    assert plain.encode_turns([Exchange("", None, 1)]) == [TurnIds([], ids(1), None)]
    assert plain.encode_text("<ImageHere><ImageHere>a") == ids(2, "a") and plain.encode_text("") == []
    assert plain.encode_prompt([Exchange("a", "b"), Exchange("c")]) == ids("a", "b#", "c")


def test_rendered_text_has_the_ids_of_its_turns():
    made = layout(replace(TEMPLATE, turn="Q {} ##A ", opening=""))
    turns = [Exchange("a ##A b", "c A d", 1), Exchange("e", "f", 1), Exchange("g", "h", is_complete=False)]
    text = made.render(turns)
    assert text == "<b>Q [<ImageHere>]a ##A b~ ##A c A d##<b>Q [<ImageHere>]e~ ##A f##<b>Q g~ ##A h"
    for number in range(1, 4):
        assert made.encode_rendered(made.render(turns[:number])) == made.encode_prompt(turns[:number])
        pieces = [piece for piece in made.tokenizer.asked if piece != "<b>"]
        assert pieces == pieces[: len(pieces) // 2] * 2, "in the same pieces, whatever the words hold"
        made.tokenizer.asked.clear()
    made.tokenizer.asked.clear()
    assert made.encode_rendered("Q a ##A b##") == ids("Q a ##A b##") and made.tokenizer.asked == ["Q a ##A b##"], (
        "no BOS"
    )
    without = Template("bare", "Q {} A", "##", after_instruction="", bos=False, opening="!")
    made = layout(without)
    turns = [Exchange("a", "b"), Exchange("c")]
    assert made.render(turns) == "!Q a Ab##Q c A" and made.encode_rendered("!Q a Ab##Q c A") == made.encode_prompt(
        turns
    )
    assert made.tokenizer.asked[:3] == ["!Q a A", "b##", "Q c A"]
    made.tokenizer.asked.clear()
    assert made.encode_rendered("Q a Ab##") == ids("Q a Ab##") and made.tokenizer.asked == ["Q a Ab##"], "no opening"


@pytest.mark.parametrize("name", TEMPLATES)
def test_images_are_put_into_the_first_question_of_any_text(name):
    made = layout(TEMPLATES[name])
    turns = [Exchange("a", "b"), Exchange("c", "d"), Exchange("e")]
    with_images = made.render([Exchange("a", "b", 2), *turns[1:]])
    after = made.template.after_instruction
    if name != "caption":  # text without an image lacks what follows the instructions of a talk about one
        assert made.add_images(made.render(turns), 2) == with_images.replace(f"a{after}", "a").replace(
            f"c{after}", "c"
        ).replace(f"e{after}", "e")
    assert made.add_images("what?", 2) == made.render([Exchange("what?", None, 2)])
    assert made.add_images("what?", 0) == made.render([Exchange("what?")])
