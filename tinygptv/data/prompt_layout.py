"""The one layout of a prompt: turns of a conversation -> token ids, text, or a Jinja template.

Training, evaluation, chat, serving, ``processor.apply_chat_template``, sample predictions and the drift measurement all
call ``PromptLayout``, so that a model is asked exactly as it was taught. For template ``human``:

    <bos>###Human: <Img><ImageHere></Img> what is it?  ###Assistant: |a dog###|<bos>###Human: big?  ###Assistant: |yes
    question of turn 1                                               |answer   |question of turn 2               |answer

Each question and each answer is tokenised on its own, and so is the text on either side of an image, as in the release.
Words of people and of data sets pass ``escape_markers``: nobody writes an image placeholder or a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinygptv.data.prompts import IMAGE_PLACEHOLDER, Template, escape_markers


class Tokenizer(Protocol):
    """Methods of a transformers tokenizer that the layout uses."""

    bos_token: str
    bos_token_id: int

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Ids of ``text``."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Text of a token; None where no token has that id."""


@dataclass(frozen=True)
class Exchange:
    """One turn of a conversation.

    Attributes:
        instruction: what is asked, task tag included, image marks and template not; None for images without a question
            (a caption's), which no template wraps.
        answer: the answer; None where the model is to write it (the last turn of a prompt).
        num_images: images of the turn; they stand before the instruction.
        is_complete: the answer has ended; where it has not, no end symbol follows and the model continues it.
    """

    instruction: str | None
    answer: str | None = None
    num_images: int = 0
    is_complete: bool = True


def turn_texts(
    exchanges: Sequence[Exchange], template: Template, special_tokens: Sequence[str] = ()
) -> list[tuple[str, str | None]]:
    """The layout itself: question (with image placeholders) and answer of every turn, without BOS.

    Args:
        exchanges: the turns.
        template: wraps them.
        special_tokens: strings of the tokenizer that become ordinary words where a person writes them.
    """
    texts: list[tuple[str, str | None]] = []
    num_images = 0
    for exchange in exchanges:
        num_images += exchange.num_images
        if exchange.instruction is None:
            question = IMAGE_PLACEHOLDER * exchange.num_images
        else:
            words = escape_markers(exchange.instruction, special_tokens)
            words += template.after_instruction if num_images else ""
            question = template.wrap(template.image * exchange.num_images + words)
        opening = "" if texts else template.opening
        texts.append((opening + question, _answer_text(exchange, template, special_tokens)))
    return texts


def _answer_text(exchange: Exchange, template: Template, special_tokens: Sequence[str]) -> str | None:
    if exchange.answer is None:
        return None
    words = template.escape_end_symbol(escape_markers(exchange.answer, special_tokens))
    return words + (template.end_symbol if exchange.is_complete else "")


@dataclass(frozen=True)
class TurnIds:
    """Token ids of one turn.

    Attributes:
        bos: the BOS token, or nothing where the template has none.
        question: the wrapped instruction, with ``image_token_id`` at image positions.
        answer: the answer with its end symbol; None where it is to be written.
    """

    bos: list[int]
    question: list[int]
    answer: list[int] | None


class PromptLayout:
    """Lays out turns by one template for one tokenizer.

    Attributes:
        tokenizer: of the checkpoint.
        template: wraps the turns.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, *, image_token_id: int, num_query_tokens: int) -> None:
        """Prepare.

        Args:
            tokenizer: of the checkpoint.
            template: wraps the turns.
            image_token_id: id of an image position.
            num_query_tokens: positions that one image takes (Q).

        Raises:
            ValueError: ``image_token_id`` is a token of text, which would be taken for an image.
        """
        taken = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id >= 0 else None
        if taken is not None:
            raise ValueError(
                f"image_token_id {image_token_id} is the tokenizer's token {taken!r}, which was added to it: set "
                "image_token_id of the model's config and of the processor to an id that no token has."
            )
        self.tokenizer = tokenizer
        self.template = template
        self._image_ids = [image_token_id] * num_query_tokens
        self._special_tokens = tuple(tokenizer.all_special_tokens)

    # ------------------------------------------------------------------ turns -> ids

    def encode_turns(self, exchanges: Sequence[Exchange]) -> list[TurnIds]:
        """Token ids of every turn, for those who treat questions and answers differently."""
        bos = [self.tokenizer.bos_token_id] if self.template.bos else []
        return [
            TurnIds(bos, self.encode_text(question), None if answer is None else self._ids(answer))
            for question, answer in turn_texts(exchanges, self.template, self._special_tokens)
        ]

    def encode_prompt(self, exchanges: Sequence[Exchange]) -> list[int]:
        """Token ids [S] of a conversation; one whose last answer is None waits for it."""
        return [
            token
            for turn in self.encode_turns(exchanges)
            for token in (*turn.bos, *turn.question, *(turn.answer or ()))
        ]

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer with its end symbol, as they follow a prompt."""
        return self._ids(_answer_text(Exchange(None, answer), self.template, self._special_tokens) or "")

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text as it is, with images at its placeholders."""
        ids: list[int] = []
        for index, segment in enumerate(text.split(IMAGE_PLACEHOLDER)):
            ids += self._image_ids if index else []
            ids += self._ids(segment)
        return ids

    # ------------------------------------------------------------------ turns -> text -> ids

    def render(self, exchanges: Sequence[Exchange]) -> str:
        """The conversation as text, special tokens and image placeholders included."""
        bos = self.tokenizer.bos_token if self.template.bos else ""
        texts = turn_texts(exchanges, self.template, self._special_tokens)
        return "".join(bos + question + (answer or "") for question, answer in texts)

    def add_images(self, text: str, num_images: int) -> str:
        """Put images into text that has no placeholder: into the first question of rendered text, else before plain
        words, which are then asked as one question."""
        opening = (self.tokenizer.bos_token if self.template.bos else "") + self.template.opening
        opening += self.template.turn.split("{}")[0]
        if opening and text.startswith(opening):
            return opening + self.template.image * num_images + text.removeprefix(opening)
        return self.render([Exchange(text, None, num_images)])

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what ``render`` or the chat template wrote, equal to ``encode_prompt`` of its turns.

        Text of any other form is tokenised as it is, in one piece between images. (The ``caption`` template does not
        show where the words end and the caption begins; these two are one piece.)
        """
        return [token for piece in self._pieces(text) for token in self.encode_text(piece)]

    def _pieces(self, text: str) -> list[str]:
        """Rendered text as BOS, questions and answers; text of any other form in one piece."""
        before, after = self.template.turn.split("{}")
        bos, opening = self.tokenizer.bos_token if self.template.bos else "", self.template.opening
        start, end = bos + before, self.template.end_symbol
        body = text.removeprefix(opening)
        turns = re.split(f"(?<={re.escape(end)})(?={re.escape(start)})", body) if start else [body]
        pieces: list[str] = []
        for turn in turns:
            # The last mark: no answer holds the end symbol that most templates have there.
            question, mark, answer = (
                turn.removeprefix(bos).rpartition(after) if after else ("", "", turn.removeprefix(bos))
            )
            if not turn.startswith(start) or mark != after:
                return [text]
            pieces += [bos, question + mark, answer]
        pieces[1] = opening + pieces[1]
        return pieces if text.startswith(opening) else [text]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []
