"""Messages -> turns: what is joined, how images are numbered, when a task is worded, and what is refused where."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.serving.errors import ProtocolError
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.turns import read_turns
from tests.serving_api import words
from tinygptv.data.conversation import ChatImage
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def request(*messages, **fields):
    turns = [{"role": role, "content": content} for role, content in messages]
    return ChatRequest.model_validate({"model": "m", "messages": turns, **fields})


def pixels(number, width=100, height=50):
    return ChatImage(number, np.zeros((3, 4, 4), np.uint8), width, height)


def shown(turns):
    return [(turn.role, turn.text, turn.images) for turn in turns]


def refusal(call):
    with pytest.raises(ProtocolError) as caught:
        call()
    return caught.value.status, caught.value.param, caught.value.code, caught.value.message


def test_texts_and_images_keep_their_order_and_their_turn():
    read = read_turns(
        request(
            ("system", "be brief"),
            ("user", [words("a"), image("i0"), words(""), words("b"), image("i1")]),
            ("assistant", None),
            ("user", "c"),
            ("developer", [words("be kind"), words("and fair")]),
            ("user", [image("i2"), words("d")]),
        )
    )
    assert shown(read.turns) == [
        ("user", "be brief\nbe kind\nand fair\na\nb", (0, 1)),
        ("assistant", "", ()),
        ("user", "c\nd", (2,)),
    ]
    fields = [("messages.1.content.1.image_url", "i0"), ("messages.1.content.4.image_url", "i1")]
    assert read.images == [*fields, ("messages.5.content.0.image_url", "i2")]


@pytest.mark.parametrize(
    ("messages", "fields", "param", "message"),
    [
        ([("assistant", "")], {}, "messages.0.content", "the last message is empty."),
        (
            [("user", "a")],
            {"continue_final_message": True},
            "continue_final_message",
            "the last message must be the assistant's, which is to be continued.",
        ),
        ([("user", "a"), ("assistant", "b"), ("user", "")], {}, "messages.2.content", "the last message is empty."),
        ([("user", "a"), ("assistant", "b"), ("user", [])], {}, "messages.2.content", "the last message is empty."),
        (
            [("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "")],
            {},
            "messages.3.content",
            "the last message is empty.",
        ),
    ],
)
def test_a_conversation_ends_with_something_to_be_answered(messages, fields, param, message):
    assert refusal(lambda: read_turns(request(*messages, **fields))) == (400, param, None, message)


@pytest.mark.parametrize(
    ("said", "fields", "added"),
    [
        ([("user", "a"), ("assistant", "b")], {}, [("user", "", ())]),
        ([("user", "a"), ("assistant", "b")], {"continue_final_message": False}, [("user", "", ())]),
        ([("user", "a"), ("assistant", "b")], {"continue_final_message": True, "add_generation_prompt": False}, []),
        ([("assistant", "a"), ("user", "b"), ("assistant", "")], {}, []),
        ([("assistant", "a"), ("user", "b"), ("assistant", None)], {"continue_final_message": True}, []),
    ],
)
def test_after_an_answer_another_one_is_asked_for_unless_it_is_to_be_continued(said, fields, added):
    greeting = [("user", "", ())] if said[0][0] == "assistant" else []
    kept = [(role, text, ()) for role, text in said if text]
    assert shown(read_turns(request(*said, **fields)).turns) == [*greeting, *kept, *added]


def test_a_message_may_say_itself_that_it_is_to_be_continued():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": True}]
    kept = [("user", "a", ()), ("assistant", "b", ())]
    for messages, wanted in ((said, kept), ([*said, said[0]], [*kept, kept[0]])):
        given = ChatRequest.model_validate({"model": "m", "messages": messages})
        assert shown(read_turns(given).turns) == wanted


def test_an_answer_that_is_continued_follows_its_worded_question():
    asked = EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "c")
    said = (*HISTORY, ("user", "c"), ("assistant", "it is a"))
    given = request(*said, task="vqa", continue_final_message=True)
    assert messages(given, pixels(1), pixels(2)) == [("user", asked, [2]), ("assistant", "it is a", [])]
    tagged = request(*said[:-2], ("user", "[vqa] c"), said[-1], continue_final_message=True)
    assert messages(tagged, pixels(1), pixels(2)) == [("user", "[vqa] c", [2]), ("assistant", "it is a", [])]
    assert read_turns(tagged).with_default_task(tagged, "refer").task is None


def test_a_question_may_be_an_image_or_a_task_alone():
    assert shown(read_turns(request(("user", [image("i")]))).turns) == [("user", "", (0,))]
    later = request(("user", [image("i"), words("a")]), ("assistant", "b"), ("user", ""), task="caption")
    assert shown(read_turns(later).turns)[2] == ("user", "", ())


@pytest.mark.parametrize(
    ("content", "default", "task", "wanted"),
    [
        ([image("i"), words("what?")], "vqa", None, "vqa"),
        ([image("i"), words("what?")], "", None, None),
        ([image("i"), words("what?")], "vqa", "refer", "refer"),
        ([image("i"), words(" [refer] it")], "vqa", None, None),
        ([words("what?")], "vqa", None, None),
        ([image("i")], "vqa", None, None),
        ([image("i")], "refer", None, None),
        ([image("i")], "caption", None, "caption"),
        ([image("i")], "grounding", None, "grounding"),
    ],
)
def test_the_default_task_is_of_questions_about_images_that_name_none(content, default, task, wanted):
    given = request(("user", content), task=task, top_k=3)
    made = read_turns(given).with_default_task(given, default)
    assert (made.task, made.top_k) == (wanted, 3)
    assert given.task == task, "the request itself stays"


def test_an_image_of_an_earlier_turn_is_enough_for_the_default_task():
    given = request(("user", [image("i"), words("a")]), ("assistant", "b"), ("user", "what?"))
    assert read_turns(given).with_default_task(given, "vqa").task == "vqa"


HISTORY = (("user", [image("i0"), image("i1"), words("a")]), ("assistant", "b"))


def messages(given, *images):
    return [(m.role, m.text, [i.number for i in m.images]) for m in read_turns(given).messages(images, given)]


def test_a_chat_keeps_its_turns_and_a_task_goes_alone_with_its_own_or_the_last_image():
    first, second, third = pixels(1), pixels(2), pixels(3)
    chat = messages(request(*HISTORY, ("user", "c")), first, second)
    assert chat == [("user", "a", [1, 2]), ("assistant", "b", []), ("user", "c", [])]
    asked = EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "c")
    assert messages(request(*HISTORY, ("user", "c"), task="vqa"), first, second) == [("user", asked, [2])]
    own = request(*HISTORY, ("user", [image("i2"), words("c")]), task="vqa")
    assert messages(own, first, second, third) == [("user", asked, [3])]
    both = request(("user", [image("i0"), words("a"), image("i1"), words("c")]), task="vqa")
    assert messages(both, first, second)[0][2] == [1, 2], "the question's own images stay"
    assert messages(request(*HISTORY, ("user", "[vqa] c")), first, second) == [("user", "[vqa] c", [2])]
    assert messages(request(("user", "[vqa] c"))) == [("user", "[vqa] c", [])]


def test_a_box_is_of_the_last_image_and_its_own_pixels():
    box = request(*HISTORY, ("user", ""), task="identify", box=[20, 5, 100, 25])
    (only,) = messages(box, pixels(1, 999, 999), pixels(2, 200, 50))
    assert only[1].endswith("{<10><10><50><50>}") and only[2] == [2]


@pytest.mark.parametrize(
    ("text", "fields", "images", "refused"),
    [
        ("a", {"box": [1, 2, 3, 4]}, 1, (400, "box", None, "a box goes with task 'identify'.")),
        ("a", {"box": [1, 2, 3, 4], "task": "refer"}, 1, (400, "box", None, "a box goes with task 'identify'.")),
        ("a", {"task": "vqa"}, 0, (400, "task", None, "task 'vqa' is about an image: the request has none.")),
    ],
)
def test_a_task_that_lacks_something_names_the_field(text, fields, images, refused):
    given = request(("user", text), **fields)
    assert refusal(lambda: read_turns(given).messages([pixels(1)] * images, given)) == refused


def test_a_task_without_its_words_or_with_a_box_beside_the_image_is_an_invalid_value():
    for fields, param, message in (
        ({"task": "refer"}, "task", "task 'refer' needs words"),
        ({"task": "identify"}, "task", "task 'identify' needs a box"),
        ({"task": "identify", "box": [500, 1, 600, 2]}, "box", "100 x 50 pixels"),
    ):
        given = request(("user", [image("i")]), **fields)
        found = refusal(lambda given=given: read_turns(given).messages([pixels(1)], given))
        assert found[:3] == (400, param, "invalid_value") and message in found[3]
