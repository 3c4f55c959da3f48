"""Messages of transformers and OpenAI: what a message may hold, and which image belongs to which part."""

from __future__ import annotations

import base64
from collections import UserDict

import pytest
from PIL import Image

from tests.source_files import encode
from tinygptv.data.chat_messages import load_images, read_messages
from tinygptv.data.conversation import ChatMessage


def refused(act, *arguments):
    with pytest.raises(ValueError) as caught:
        act(*arguments)
    return str(caught.value)


def test_messages_of_every_form_become_texts_and_images():
    found = read_messages(
        [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "a"},
                    {"type": "image", "path": "p.png"},
                    {"type": "text", "text": ""},
                    {"type": "image_url", "image_url": {"url": "u"}},
                    {"type": "image", "url": "w", "base64": "b"},
                    {"type": "text", "text": "b"},
                ],
            },
            {"role": "assistant", "content": None},
            {"role": "user"},
        ]
    )
    assert [(m.role, m.text, m.images) for m in found] == [
        ("system", "be brief", ()),
        ("user", "a\nb", (None, "p.png", "u", "w")),
        ("assistant", "", ()),
        ("user", "", ()),
    ]


def test_messages_of_another_form_are_named_by_their_number():
    assert refused(read_messages, []) == "the conversation has no messages."
    good = {"role": "user", "content": "x"}
    for bad in ("text", {"content": "x"}):
        said = refused(read_messages, [good, bad])
        assert said == f'message 1 is {bad!r}: a message is {{"role": ..., "content": ...}}.'
    for part in ("x", {"type": "video"}, {"type": "text"}, {"type": "text", "text": 3}, {"text": "x"}):
        said = refused(read_messages, [{"role": "user", "content": [part]}])
        assert said.startswith(f'message 0 has the part {part!r}: a part is {{"type": "text"')


def test_images_that_are_given_go_to_the_parts_that_name_none_in_order():
    colours = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in range(4)]
    text = base64.b64encode(encode(colours[1], "PNG")).decode()
    messages = [ChatMessage("user", "", (None, text)), ChatMessage("user", "", (None, colours[3]))]
    found = load_images(messages, [colours[0], colours[2]])
    assert [image.getpixel((0, 0))[0] for image in found] == [0, 1, 2, 3]
    for given in ([], colours[:1], colours[:3]):
        assert refused(load_images, messages, given).startswith(
            f"2 image parts name no image and {len(given)} images were given: "
        )
    assert load_images([]) == []


def test_the_first_name_that_an_image_part_has_counts():
    """By transformers' names, then OpenAI's; what is None is not named, and an empty text is."""
    parts = [
        {"image": "i", "url": "u", "path": "p", "base64": "b"},
        {"url": "u", "path": "p", "base64": "b", "image_url": "o"},
        {"image": None, "path": "p", "base64": "b"},
        {"base64": "b", "image_url": {"url": "o"}},
        {"image_url": "plain"},
        {"image_url": {"detail": "low"}},
        {"path": ""},
    ]
    (found,) = read_messages([{"role": "user", "content": [{"type": "image", **part} for part in parts]}])
    assert found.images == ("i", "u", "p", "b", "plain", None, "")


def test_messages_may_be_mappings_of_any_kind_and_keep_their_order_and_numbers():
    part = UserDict(type="text", text="b")
    found = read_messages((UserDict(role="assistant", content="a"), UserDict(role="user", content=(part, part))))
    assert [(m.role, m.text) for m in found] == [("assistant", "a"), ("user", "b\nb")]
    for wrong in (3, None, [], "x" * 200):
        said = refused(read_messages, [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}, wrong])
        assert said.startswith(f"message 2 is {wrong!r:.80}: a message is ")
    long = {"type": "video", "url": "x" * 200}
    said = refused(read_messages, [{"role": "a"}, {"role": "user", "content": [{"type": "image"}, long]}])
    assert said.startswith(f"message 1 has the part {long!r:.80}: a part is ")


def test_an_image_that_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png is no image file"):
        load_images([ChatMessage("user", "", (str(tmp_path / "nowhere.png"),))])
    assert "is no image file" in refused(load_images, [ChatMessage("user", "", ("",))]), "an empty name is a name"
    assert refused(load_images, [], [Image.new("RGB", (1, 1))]).startswith("0 image parts name no image and 1 images")
