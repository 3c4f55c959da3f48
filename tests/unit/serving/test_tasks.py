"""Tasks, boxes and the turns before a question, through the HTTP API."""

from __future__ import annotations

import json

import pytest

from pipelines.serving.answers import find_boxes
from tests.serving_api import IMAGE, READ, Client, FakeBackend, ask, events, said, words
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS


def test_boxes_are_given_in_pixels_of_the_sent_image():
    text = "<p>a dog</p> {<10><20><50><60>}<delim>{<0><0><100><120>} and {<1><2><3><4>}"
    fake = FakeBackend(READ, said(text[:30]), said(text[30:], "stop"))
    wanted = [
        {"label": "a dog", "box": [6.0, 8.0, 30.0, 24.0], "entity": 0, "colour": "#e63946", "image": 0},
        {"label": "a dog", "box": [0.0, 0.0, 60.0, 40.0], "entity": 0, "colour": "#e63946", "image": 0},
        {"label": "", "box": [0.6, 0.8, 1.8, 1.6], "entity": 1, "colour": "#2a9d8f", "image": 0},
    ]
    client = Client(fake)
    whole = client.chat(ask(words("where"), IMAGE, task="refer")).json()
    assert json.loads(json.dumps(whole["choices"][0]["message"]["boxes"])) == wanted
    assert whole["choices"][0]["message"]["content"] == text
    last = events(client.chat(ask(words("where"), IMAGE, stream=True)))[-2]["choices"][0]
    assert last["finish_reason"] == "stop" and last["delta"]["boxes"] == wanted
    assert find_boxes(text, None, 0) == []


def test_a_task_and_a_drawn_box_word_the_question():
    client = Client()
    client.chat(ask(words("the dog"), IMAGE, task="refer"))
    client.chat(ask(IMAGE, task="identify", box=[30, 40, 0, -5]))
    client.chat(ask(IMAGE, task="caption"))
    assert [job.messages[-1].text for job in client.backend.jobs] == [
        "[refer] give me the location of the dog",
        "[identify] what object is in this location {<0><0><50><100>}",
        "[caption] Briefly describe this image.",
    ]


HISTORY = [
    {"role": "user", "content": [words("what is it?"), IMAGE]},
    {"role": "assistant", "content": "a dog"},
]


@pytest.mark.parametrize(
    ("question", "fields", "text"),
    [
        ("the dog", {"task": "refer"}, "[refer] give me the location of the dog"),
        ("[vqa] what colour?", {}, "[vqa] what colour?"),
        ("[identify] {<1><2><30><40>}", {}, "[identify] {<1><2><30><40>}"),
    ],
)
def test_a_task_goes_without_the_turns_before_it(question, fields, text):
    client = Client()
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": question}], **fields})
    (message,) = client.backend.jobs[0].messages
    assert message.text == text and len(message.images) == 1


def test_the_servers_default_task_words_questions_that_name_none():
    """What evaluation harnesses need: they know no tasks, and their questions want short answers."""
    client = Client(default_task="vqa")
    client.chat(ask(words("what colour?"), IMAGE))
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": "how old is it?"}]})
    client.chat(ask(words("the dog"), IMAGE, task="refer"))
    client.chat(ask(words("[caption] a dog"), IMAGE))
    client.chat(ask(words("no image")))
    client.chat(ask(IMAGE))
    assert [[message.text for message in job.messages] for job in client.backend.jobs] == [
        [EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "what colour?")],
        [EVALUATION_INSTRUCTIONS["vqa"].replace("{}", "how old is it?")],
        ["[refer] give me the location of the dog"],
        ["[caption] a dog"],
        ["no image"],
        [""],
    ]
    assert [len(job.messages[0].images) for job in client.backend.jobs] == [1, 1, 1, 1, 0, 1]


def test_chat_keeps_the_turns_before_it():
    client = Client()
    client.chat({**ask(), "messages": [*HISTORY, {"role": "user", "content": "how old is it?"}]})
    messages = client.backend.jobs[0].messages
    assert [message.text for message in messages] == ["what is it?", "a dog", "how old is it?"]
    assert [len(message.images) for message in messages] == [1, 0, 0]


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ([10, 10, 30, 20], "{<16><25><50><50>}"),
        ([30, 20, 10, 10], "{<16><25><50><50>}"),
        ([50, -20, 200, 10], "{<83><0><100><25>}"),
        ([0, 0, 60, 40], "{<0><0><100><100>}"),
        ([61, 0, 80, 40], None),
        ([-30, -30, -1, -1], None),
        ([0, 41, 60, 80], None),
        ([5, 5, 5, 30], None),
        ([0.1, 0.2, 0.5, 0.7], None),
    ],
)
def test_a_box_is_clipped_to_its_image_or_refused(box, wanted):
    client = Client()
    response = client.chat(ask(IMAGE, task="identify", box=box))
    if wanted:
        assert client.backend.jobs[0].messages[0].text.endswith(wanted)
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "box")
        assert "60 x 40 pixels" in response.json()["error"]["message"]
