"""A conversation with pictures -> the prompt that the model was trained on.

Every turn is laid out as in training: BOS, the template's wrapping, images before the words, each piece tokenised on
its own. Words from people pass ``escape_markers``, so that nobody writes a placeholder or a special token.

Notation: S prompt length, R image side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygptv.data.boxes import format_box
from tinygptv.data.images import open_image, resize_pixels
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS, IMAGE_TURN, INSTRUCTIONS, escape_markers
from tinygptv.data.sample import SampleEncoder

TASKS = ("vqa", "caption", "refer", "identify", "grounding", "detection")
"""Tasks with a tag that a question can begin with."""


@dataclass(frozen=True, eq=False)
class ChatImage:
    """A picture, ready for the model.

    Attributes:
        number: negative 63-bit number made from the encoded bytes; equal pictures have equal numbers.
        pixels: uint8 [3, R, R].
        width: of the picture as it was sent, upright, in pixels.
        height: the same.
    """

    number: int
    pixels: np.ndarray
    width: int
    height: int

    @classmethod
    def from_bytes(cls, data: bytes, image_size: int) -> ChatImage:
        """Decode and resize.

        Raises:
            ValueError: the bytes are no image in a known format.
        """
        image = open_image(data)
        return cls(image_number(data), resize_pixels(image, image_size), image.width, image.height)


@dataclass(frozen=True, eq=False)
class ChatMessage:
    """One message: ``role`` is ``user`` or ``assistant``; only users send images."""

    role: str
    text: str
    images: tuple[ChatImage, ...] = ()


def image_number(data: bytes) -> int:
    """The number that stands for encoded image bytes (``ChatImage.number``)."""
    return -1 - (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1)


def encode_conversation(
    messages: Sequence[ChatMessage], encoder: SampleEncoder, special_tokens: Sequence[str] = ("<|endoftext|>",)
) -> tuple[np.ndarray, list[ChatImage]]:
    """Lay out a conversation that waits for an answer.

    A ``caption`` checkpoint (stages 1 and 2) knows no questions: its prompt is BOS, the images and the words, if any,
    that the caption should begin with.

    Args:
        messages: user and assistant in turn, user first and last.
        encoder: the checkpoint's layout (``processor.encoder()``).
        special_tokens: strings of the tokenizer that must not be read as tokens.

    Returns:
        Ids [S] with ``image_token_id`` at image positions, and the images in order.

    Raises:
        ValueError: the roles do not alternate from user to user.
    """
    roles = [message.role for message in messages]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
        raise ValueError(
            f"messages have the roles {roles}: they must alternate user, assistant, ... and end with user."
        )
    bos = encoder.tokenizer.bos_token_id
    ids: list[int] = []
    images: list[ChatImage] = []
    for message in messages:
        text = escape_markers(message.text, tuple(special_tokens))
        if message.role == "assistant":
            ids += encoder.encode_text(text + encoder.template.end_symbol)
            continue
        ids.append(bos)
        images += message.images
        if encoder.template.turn == "{}":
            ids += encoder.image_ids * len(message.images)
            ids += encoder.encode_text(text) if text else []
        else:
            # In a conversation about an image every instruction ends with a space (prompts.wrap_image).
            instruction = IMAGE_TURN * len(message.images) + text + (" " if images else "")
            ids += encoder.encode_text(encoder.template.wrap(instruction), len(message.images))
    return np.array(ids, dtype=np.int64), images


def task_instruction(task: str, text: str, box: Sequence[float] | None = None, size: tuple[int, int] = (0, 0)) -> str:
    """The wording of a task, as benchmarks use it.

    Args:
        task: one of ``TASKS``.
        text: the question or phrase; a task that needs none (caption, grounding) has a wording of its own.
        box: for ``identify``, x1, y1, x2, y2 in pixels of the picture.
        size: the picture's width and height, where a box is given.

    Raises:
        ValueError: the task is unknown, or lacks the words or the box that it needs.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; known: {', '.join(TASKS)}.")
    text = text.strip()
    if text.startswith(f"[{task}]"):
        return text
    if box is not None:
        text = f"{text} {format_box(box, *size)}".strip()
    wording = EVALUATION_INSTRUCTIONS[task]
    if "{}" not in wording:
        return f"[{task}] {text}" if text else wording
    if not text:
        raise ValueError(
            f"task {task!r} needs {'a box' if task == 'identify' else 'words'}: {INSTRUCTIONS[task][0]!r}."
        )
    # A question that already holds its box ("what is in {<1><2><3><4>}?") is asked as it stands.
    return f"[{task}] {text}" if task == "identify" and not text.startswith("{") else wording.replace("{}", text, 1)
