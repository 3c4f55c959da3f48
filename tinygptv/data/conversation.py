"""Messages of a conversation with images -> the turns and the prompt that the model was trained on.

Notation: S prompt length, R image side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

from tinygptv.data.boxes import clip_box, format_box
from tinygptv.data.images import open_image, resize_pixels
from tinygptv.data.prompt_layout import Exchange, PromptLayout
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS, INSTRUCTIONS
from tinygptv.data.truncated_jpeg import complete_jpeg

Role = Literal["system", "developer", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

TASKS = ("vqa", "caption", "refer", "identify", "grounding", "detection")
"""Tasks with a tag that a question can begin with."""


@dataclass(frozen=True, eq=False)
class ChatImage:
    """An image, ready for the model.

    Attributes:
        number: negative 63-bit number made from the encoded bytes; equal images have equal numbers.
        pixels: uint8 [3, R, R].
        width: of the image as it was sent, upright, in pixels.
        height: the same.
    """

    number: int
    pixels: np.ndarray
    width: int
    height: int

    @classmethod
    def from_bytes(cls, data: bytes, image_size: int) -> ChatImage:
        """Decode and resize; a JPEG may lack its last bytes.

        Raises:
            ValueError: the bytes are no image in a known format.
        """
        try:
            image = open_image(data)
        except ValueError as error:
            try:
                image = open_image(complete_jpeg(data))
            except ValueError:
                raise error from None
        return cls(image_number(data), resize_pixels(image, image_size), image.width, image.height)


ImageT = TypeVar("ImageT")


@dataclass(frozen=True, eq=False)
class ChatMessage(Generic[ImageT]):
    """One message of a conversation: words, and the images that come with them.

    Attributes:
        role: who speaks; after ``join_messages`` user and assistant in turn.
        text: the words.
        images: only users send them; they stand before the words. ``ChatImage`` for chat and serving.
    """

    role: Role
    text: str
    images: tuple[ImageT, ...] = ()


def image_number(data: bytes) -> int:
    """The number that stands for encoded image bytes (``ChatImage.number``)."""
    return -1 - (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1)


def join_messages(messages: Sequence[ChatMessage[ImageT]]) -> list[ChatMessage[ImageT]]:
    """Regroup messages into what a model was trained on: user and assistant in turn.

    System (or developer) messages go before the first question, neighbouring messages of one role become one; their
    texts are joined by line breaks, and empty ones are dropped. Where the user does not speak first, an empty question
    stands there.

    Raises:
        ValueError: a role is unknown, or another one than the user sends an image.
    """
    system: list[str] = []
    turns: list[tuple[Role, list[str], list[ImageT]]] = []
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"a message has the role {message.role!r}; roles are {', '.join(ROLES)}.")
        if message.images and message.role != "user":
            raise ValueError(f"a message of the {message.role} holds an image; only the user sends images.")
        if message.role in ("system", "developer"):
            system.append(message.text)
            continue
        if not turns or turns[-1][0] != message.role:
            turns.append((message.role, [], []))
        turns[-1][1].append(message.text)
        turns[-1][2].extend(message.images)
    if messages and (not turns or turns[0][0] != "user"):
        turns.insert(0, ("user", [], []))
    if turns:
        turns[0][1][:0] = system
    return [ChatMessage(role, "\n".join(t for t in texts if t), tuple(images)) for role, texts, images in turns]


def conversation_exchanges(messages: Sequence[ChatMessage[Any]]) -> list[Exchange]:
    """The turns of a conversation whose roles alternate; the last is open where nobody has answered it yet.

    Raises:
        ValueError: the roles do not alternate, or the assistant speaks first.
    """
    roles = [message.role for message in messages]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError(f"messages have the roles {roles}: they must start with user, then assistant, user, ...")
    answers = [message.text for message in messages[1::2]] + [None] * (len(messages) % 2)
    return [Exchange(m.text, answer, len(m.images)) for m, answer in zip(messages[::2], answers, strict=True)]


def encode_conversation(
    messages: Sequence[ChatMessage[ChatImage]], layout: PromptLayout
) -> tuple[np.ndarray, list[ChatImage]]:
    """Lay out a conversation that waits for an answer, or for the rest of one.

    A ``caption`` checkpoint (stages 1 and 2) knows no questions: its prompt is BOS, the images and the words, if any,
    that the caption should begin with.

    Args:
        messages: user and assistant in turn, user first; where the assistant is last, its answer is continued.
        layout: the checkpoint's (``processor.layout``).

    Returns:
        Ids [S] with ``image_token_id`` at image positions, and the images in order.

    Raises:
        ValueError: the roles do not alternate, or a text is no Unicode.
    """
    exchanges = conversation_exchanges(messages)
    for message in messages:
        try:
            message.text.encode()
        except UnicodeEncodeError:
            raise ValueError("a message holds half of a surrogate pair, which is no character.") from None
    exchanges[-1] = replace(exchanges[-1], is_complete=False)
    images = [image for message in messages for image in message.images]
    return np.array(layout.encode_prompt(exchanges), dtype=np.int64), images


def task_of(text: str) -> str | None:
    """The task whose tag a question begins with, if any."""
    return next((task for task in TASKS if text.lstrip().startswith(f"[{task}]")), None)


def task_instruction(task: str, text: str, box: Sequence[float] | None = None, size: tuple[int, int] = (0, 0)) -> str:
    """The wording of a task, as benchmarks use it.

    Args:
        task: one of ``TASKS``.
        text: the question or phrase; a task that needs none (caption, grounding) has a wording of its own.
        box: for ``identify``, x1, y1, x2, y2 in pixels of the image.
        size: the image's width and height, where a box is given.

    Raises:
        ValueError: the task is unknown, or lacks the words or the box that it needs, or the box is not on the image.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; known: {', '.join(TASKS)}.")
    text = text.strip()
    if box is not None:
        text = f"{text} {format_box(clip_box(box, *size), *size)}".strip()
    if text.startswith(f"[{task}]"):
        return text
    wording = EVALUATION_INSTRUCTIONS[task]
    if "{}" not in wording:
        return f"[{task}] {text}" if text else wording
    if not text:
        raise ValueError(
            f"task {task!r} needs {'a box' if task == 'identify' else 'words'}: {INSTRUCTIONS[task][0]!r}."
        )
    # A question that already holds its box ("what is in {<1><2><3><4>}?") is asked as it stands.
    return f"[{task}] {text}" if task == "identify" and not text.startswith("{") else wording.replace("{}", text, 1)
