"""Messages -> questions and answers, by who says them."""

from __future__ import annotations

import pytest

from pipelines.data.sources.base import Malformed
from pipelines.data.sources.conversations import read_conversation, take_marks


def talk(*pairs):
    return [{"from": side, "value": text} for side, text in pairs]


@pytest.mark.parametrize(
    ("messages", "turns", "changes"),
    [
        (talk(("human", "q"), ("gpt", "a")), [("q", "a")], ()),
        (
            talk(("system", "Be careful."), ("human", "q"), ("gpt", "a")),
            [("Be careful.\nq", "a")],
            ("system_message_joined",),
        ),
        (talk(("gpt", "Hello."), ("human", "q"), ("gpt", "a")), [("q", "a")], ("first_answer_dropped",)),
        (talk(("human", "Look."), ("human", "q"), ("gpt", "a")), [("Look.\nq", "a")], ("messages_joined",)),
        (talk(("human", "q"), ("gpt", "a"), ("gpt", "b")), [("q", "a\nb")], ("messages_joined",)),
        (talk(("human", "q"), ("gpt", "a"), ("human", "r")), [("q", "a")], ("last_question_dropped",)),
        (talk(("gpt", "x"), ("gpt", "y"), ("human", "q"), ("gpt", "a")), [("q", "a")], None),
        (talk(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")), [("q", "a"), ("r", "b")], ()),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [("q", "a")], ()),
        ([{"user": "q", "assistant": "a", "source": "x"}], [("q", "a")], ()),
        ([{"user": "q", "assistant": "a"}, {"from": "gpt", "value": "b"}], [("q", "a\nb")], ("messages_joined",)),
        ([{"user": "me", "from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], [("q", "a")], ()),
        ([{"from": "human", "value": "q"}, {"assistant": "me", "from": "gpt", "value": "a"}], [("q", "a")], ()),
        (
            talk(("gpt", "x"), ("system", "S"), ("human", "q"), ("gpt", "a"), ("gpt", "b"), ("human", "r")),
            [("S\nq", "a\nb")],
            ("first_answer_dropped", "last_question_dropped", "messages_joined", "system_message_joined"),
        ),
        ({"from": ["human", "gpt"], "value": ["q", "a"]}, [("q", "a")], ()),
        ([{"from": " Human", "value": "q"}, {"from": "GPT", "value": "a"}], [("q", "a")], ()),
    ],
)
def test_sides_follow_from_and_not_positions(messages, turns, changes):
    found = read_conversation(messages)
    assert [(turn.question, *turn.answers) for turn in found.turns] == turns
    if changes is not None:
        assert found.changes == changes


@pytest.mark.parametrize("user", ["human", "user", "prompter", "question"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bot", "model", "bard", "bing", "answer"])
def test_sides_are_known_by_the_names_that_data_sets_give_them(user, assistant):
    (turn,) = read_conversation(talk((user, "q"), (assistant, "a"))).turns
    assert (turn.question, turn.answers) == ("q", ("a",))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no question with an answer"),
        (talk(("human", "q")), "no question with an answer"),
        (talk(("gpt", "a")), "no question with an answer"),
        (talk(("gpt", "a"), ("human", "q")), "no question with an answer"),
        (talk(("human", "q"), ("tool", "x"), ("gpt", "a")), "message 2 is from 'tool'"),
        ([{"value": "q"}, {"value": "a"}], "message 1 does not say who it is from"),
        ([{"from": "human"}, {"from": "gpt", "value": "a"}], "message 1 has no text"),
        (talk(("human", 0.5), ("gpt", "a")), "message 1 is no text but float"),
        (["q", "a"], "message 1 is no object but str"),
        ("q", "no list of messages but str"),
        (talk(("human", "q"), ("gpt", "see <image>")), "an answer holds the mark of an image"),
        (talk(("human", "<video>\nq"), ("gpt", "a")), "about a video or a sound"),
        (
            [{"role": "user", "content": [{"type": "file"}]}, {"role": "assistant", "content": "a"}],
            "part of kind 'file'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}, {"role": "assistant", "content": "a"}],
            "part of kind 'text'",
        ),
        (talk(("human", b"q"), ("gpt", "a")), "message 1 is no text but bytes"),
        (talk(("human", "<audio>\nq"), ("gpt", "a")), r"about a video or a sound \(<audio>\)"),
    ],
)
def test_what_cannot_be_learned_the_right_way_round_is_refused(messages, reason):
    with pytest.raises(Malformed, match=reason):
        read_conversation(messages)


@pytest.mark.parametrize(
    ("question", "text", "marks"),
    [
        ("<image>\nWhat?", "What?", 1),
        ("What?\n<image>", "What?", 1),
        ("<image> What?", "What?", 1),
        ("Look <image> here", "Look here", 1),
        ("<image>\nWhat brand?\nAnswer briefly.", "What brand?\nAnswer briefly.", 1),
        ("<image>\r\nWhat?", "What?", 1),
        ("<Img><ImageHere></Img> What?", "What?", 1),
        ("<IMAGE>\nWhat?", "What?", 1),
        ("<image>\n<image>\nCompare.", "Compare.", 2),
        ("<image_1> What is in <image_1>?", "What is in ?", 1),
        ("<image_1> and <image_2>", "and", 2),
        ("<image_1> and <IMAGE_1>", "and", 1),
        ("<|image|>What?", "What?", 1),
        (" def f(x):\n    return x\n", " def f(x):\n    return x\n", 0),
        ("an <img src=x> tag", "an <img src=x> tag", 0),
    ],
)
def test_marks_of_images_are_taken_out_with_the_break_beside_them(question, text, marks):
    assert take_marks(question) == (text, marks)


def test_image_parts_of_messages_are_marks():
    content = [{"type": "image"}, "Look.", {"type": "text", "text": "What?"}]
    found = read_conversation([{"role": "user", "content": content}, {"role": "assistant", "content": "a"}])
    assert (found.num_marks, found.turns[0].question) == (1, "Look.\nWhat?")


def test_marks_are_counted_over_all_questions():
    found = read_conversation(talk(("human", "<image> q"), ("gpt", "a"), ("human", "r <image>"), ("gpt", "b")))
    assert (found.num_marks, [turn.question for turn in found.turns]) == (2, ["q", "r"])
    found = read_conversation(talk(("human", "<image> q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")))
    assert found.num_marks == 1
    kept = read_conversation(talk(("human", "<image> q"), ("gpt", "see <image>")), takes_marks=False)
    assert (kept.num_marks, kept.turns[0].question) == (0, "<image> q")


def test_several_system_messages_come_first_in_their_order():
    found = read_conversation(talk(("system", "A"), ("human", "q"), ("system", ""), ("gpt", "a"), ("system", "B")))
    assert found.turns[0].question == "A\nB\nq" and found.changes == ("system_message_joined",)
