"""An answer as it grows: its events, the whole of it, and the boxes that its text names."""

from __future__ import annotations

import json

import pytest

from pipelines.serving.answers import Answer, find_boxes
from pipelines.serving.backend import Failure, Piece, PromptRead, TokenProbability
from pipelines.serving.errors import ProtocolError
from tinygptv.data.boxes import COLOURS

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "name"}
TEXT = "<p>a dog</p> {<10><20><50><60>}"
BOX = {"label": "a dog", "box": (20.0, 10.0, 100.0, 30.0), "entity": 0, "colour": "#e63946", "image": 2}
PROBABLE = TokenProbability("b", -0.5, b"b\xc3", (TokenProbability("c", -1.0, b"c"),))
CONTENT = [
    {
        "token": "b",
        "logprob": -0.5,
        "bytes": [98, 195],
        "top_logprobs": [{"token": "c", "logprob": -1.0, "bytes": [99]}],
    }
]
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def answer(with_logprobs=False):
    made = Answer("chatcmpl-1", "name", 7, with_logprobs, (200, 50), 2)
    for item in (PromptRead(9), Piece(TEXT[:9], 2, 4), Piece(TEXT[9:], 3, finish_reason="length")):
        made.add(item)
    return made


def event(delta, logprobs=None, finish_reason=None):
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**HEAD, "choices": [choice]}


def sent(text):
    """The JSON of an event."""
    return json.loads(text.removeprefix("data: "))


def test_each_event_of_a_stream():
    made = answer(with_logprobs=True)
    assert [sent(each) for each in made.first_events()] == [event({"role": "assistant", "content": ""})]
    assert sent(made.text_event("b", ())) == event({"content": "b"})
    assert sent(made.text_event("b", (PROBABLE,))) == event({"content": "b"}, {"content": CONTENT})
    assert sent(answer().text_event("b", (PROBABLE,))) == event({"content": "b"})
    *events, done = made.last_events(with_usage=True)
    last = event({"boxes": [{**BOX, "box": [*BOX["box"]]}]}, finish_reason="length")
    assert [sent(each) for each in events] == [last, {**HEAD, "choices": [], "usage": USAGE}]
    assert made.last_events(with_usage=False) == [events[0], done] and done == "data: [DONE]\n\n"


def test_the_last_event_of_an_answer_without_boxes_is_empty():
    made = Answer("chatcmpl-1", "name", 7, False, (200, 50), 0)
    made.add(Piece("words", finish_reason="stop"))
    assert sent(made.last_events(with_usage=False)[0]) == event({}, finish_reason="stop")
    assert made.completion(())["choices"][0]["message"]["boxes"] == []


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_the_whole_answer(with_logprobs):
    message = {"role": "assistant", "content": TEXT, "refusal": None, "boxes": [BOX]}
    logprobs = {"content": CONTENT} if with_logprobs else None
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length"}
    whole = {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    assert answer(with_logprobs).completion((PROBABLE,)) == whole


def test_an_answers_white_space_is_its_own():
    made = answer()
    made.text = ""
    made.add(Piece(" a \n", finish_reason="stop"))
    assert made.completion(())["choices"][0]["message"]["content"] == " a \n"


def test_a_failure_ends_an_answer_and_adds_nothing():
    made = answer()
    with pytest.raises(ProtocolError, match="broken"):
        made.add(Failure("broken", "unavailable"))
    assert made.text == TEXT and made.usage() == USAGE


def test_boxes_are_clipped_to_the_image_and_rounded():
    (found,) = find_boxes("{<0><33><110><101>}", (333, 77), 1)
    assert (found["label"], found["box"], found["image"]) == ("", (0.0, 25.41, 333.0, 77.0), 1)
    (found,) = find_boxes("{<13><7><57><91>}", (333, 777), 2)
    assert found["box"] == (43.29, 54.39, 189.81, 707.07)
    assert find_boxes("{<1><2><3><4>}", None, 0) == [] and find_boxes("no box", (9, 9), 0) == []


def test_boxes_of_a_phrase_share_its_colour_and_colours_come_round():
    text = "".join(f"<p>n{n}</p> {{<1><2><3><{n + 4}>}}" for n in range(9)) + "<delim>{<5><6><7><8>}"
    found = find_boxes(text, (100, 100), 0)
    assert [box["entity"] for box in found] == [*range(9), 8] and [box["label"] for box in found[-2:]] == ["n8", "n8"]
    colours = [box["colour"] for box in found]
    assert len(COLOURS) == 8 and colours[8] == colours[9] == colours[0] != colours[1]
    assert [box["box"][3] for box in found] == [*map(float, range(4, 13)), 8.0], "in the text's order"
