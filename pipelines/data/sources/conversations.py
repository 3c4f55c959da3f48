"""Messages of a conversation -> questions and answers, by who says them, never by position."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.data.sources.base import Malformed, shorten
from tinygptv.data.sample import Turn

Side = Literal["user", "assistant", "system"]

_SIDES: dict[str, Side] = {
    **dict.fromkeys(("human", "user", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "bard", "bing", "answer"), "assistant"),
    "system": "system",
}

_MARK = r"(?:<Img>\s*)?<(?:image|ImageHere|image[ _]?\d+|\|image(?:_\d+)?\|)>(?:\s*</Img>)?"
_MARK_AND_BREAK = re.compile(rf"{_MARK}[ \t]*\r?\n|\r?\n[ \t]*{_MARK}|{_MARK} ?", re.IGNORECASE)
_ANY_MARK = re.compile(_MARK, re.IGNORECASE)
_NAMED_IMAGE = re.compile(r"(?:Picture \d+: *)?<img>([^<>\n]+)</img>", re.IGNORECASE)
"""Qwen-VL's files for fine-tuning name an image within the text, with its number before it."""

_IMAGES_OF_PARTS = ("image", "image_url", "url", "path")
"""Where a part of a message has its image, as OpenAI, Qwen and transformers write it."""

_OTHER_MEDIA = re.compile(r"<(?:video|audio|speech)>", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be learned from.

    Attributes:
        turns: questions and answers, marks of images taken out of the questions.
        num_marks: marks of images that were in the questions.
        images: what parts of messages hold as images, or name.
        changes: what was changed: see docs/data_format.md.
    """

    turns: tuple[Turn, ...]
    num_marks: int
    changes: tuple[str, ...]
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Message:
    side: Side
    text: str


def read_conversation(messages: Any, *, takes_marks: bool = True) -> Conversation:
    """Turns of ``[{"from": .., "value": ..}, ..]`` or ``[{"role": .., "content": ..}, ..]``.

    System messages go before the first question, as the server does with them. Neighbouring messages of one side are
    joined. An answer before the first question is dropped, and so is a last question without an answer: nothing could
    be learned from them.

    Args:
        messages: the list.
        takes_marks: take the marks of images out of all questions, and refuse them in answers.

    Raises:
        Malformed: a message names no known side, or there is no question with an answer.
    """
    if isinstance(messages, Mapping) and messages and all(isinstance(column, list) for column in messages.values()):
        # a list of objects as `datasets` may store it: an object of lists
        messages = [dict(zip(messages, cells, strict=True)) for cells in zip(*messages.values(), strict=True)]
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Malformed(f"the conversation is no list of messages but {type(messages).__name__}")
    changes: set[str] = set()
    system: list[str] = []
    images: list[Any] = []
    joined: list[_Message] = []
    for number, message in enumerate(messages, start=1):
        for part in _read_message(message, number, images):
            if part.side == "system":
                system.append(part.text)
                changes.add("system_message_joined")
            elif joined and joined[-1].side == part.side:
                joined[-1] = _Message(part.side, f"{joined[-1].text}\n{part.text}")
                changes.add("messages_joined")
            else:
                joined.append(part)
    if joined and joined[0].side == "assistant":
        del joined[0]
        changes.add("first_answer_dropped")
    if joined and joined[-1].side == "user" and len(joined) > 1:
        del joined[-1]
        changes.add("last_question_dropped")
    if len(joined) < 2:
        raise Malformed("the conversation has no question with an answer")
    joined[0] = _Message("user", "\n".join([*filter(None, system), joined[0].text]))
    return _pair(joined, changes, images, takes_marks=takes_marks)


def _pair(messages: Sequence[_Message], changes: set[str], images: Sequence[Any], *, takes_marks: bool) -> Conversation:
    num_marks, turns = 0, []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        text, marks = take_marks(question.text) if takes_marks else (question.text, 0)
        num_marks += marks
        if takes_marks:
            refuse_marks_in_answer(answer.text)
        turns.append(Turn(text, (answer.text,)))
    return Conversation(tuple(turns), num_marks, tuple(sorted(changes)), tuple(images))


def take_marks(question: str) -> tuple[str, int]:
    """A question without its marks of images (and the line break beside each), and how many there were.

    Raises:
        Malformed: it has a mark of a video or a sound.
    """
    if other := _OTHER_MEDIA.search(question):
        raise Malformed(f"the question is about a video or a sound ({other[0]})")
    marks = [mark.lower() for mark in _ANY_MARK.findall(question)]
    if not marks:
        return question, 0
    numbered = {mark for mark in marks if any(character.isdigit() for character in mark)}
    num_marks = len(numbered) + sum(mark not in numbered for mark in marks)  # <image_1> may be named more than once
    return _MARK_AND_BREAK.sub("", question).strip(), num_marks


def refuse_marks_in_answer(answer: str) -> None:
    """Refuse an answer with the mark of an image: nothing could show it.

    Raises:
        Malformed: it has one.
    """
    if _ANY_MARK.search(answer):
        raise Malformed("an answer holds the mark of an image: an image can only be shown, not answered")


def _read_message(message: Any, number: int, images: list[Any]) -> list[_Message]:
    if not isinstance(message, Mapping):
        raise Malformed(f"message {number} is no object but {type(message).__name__}")
    if "user" in message and "assistant" in message:  # both sides in one
        return [
            _Message("user", _text(message["user"], number, images)),
            _Message("assistant", _text(message["assistant"], number, images)),
        ]
    name = message.get("from", message.get("role"))
    if not isinstance(name, str):
        raise Malformed(f"message {number} does not say who it is from: it has no 'from' or 'role'")
    side = _SIDES.get(name.strip().lower())
    if side is None:
        raise Malformed(f"message {number} is from {shorten(name, 40)!r}; known: {', '.join(sorted(_SIDES))}")
    for field in ("value", "content", "text"):
        if message.get(field) is not None:
            return [_Message(side, _text(message[field], number, images))]
    raise Malformed(f"message {number} has no text: it has no 'value' or 'content'")


def _text(content: Any, number: int, images: list[Any]) -> str:
    """The words of a message; image parts in it become marks, and what they hold goes to ``images``."""
    if type(content) is int:
        return str(content)
    if isinstance(content, str):
        images += _NAMED_IMAGE.findall(content)
        return _NAMED_IMAGE.sub("<image>", content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise Malformed(f"message {number} is no text but {type(content).__name__}")
    words = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            words.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in ("image", "image_url"):
            words.append("<image>")
            images += [part[name] for name in _IMAGES_OF_PARTS if part.get(name)][:1]
        else:
            raise Malformed(f"message {number} has a part of kind {kind!r}; known: text, image")
    return "\n".join(words)
