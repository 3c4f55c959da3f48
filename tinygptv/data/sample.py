"""The canonical sample, and its way to token ids and labels.

Every data set becomes rows of one shape (``SampleRow``). What the release draws at random (instruction wording, answer
by frequency, one of several phrases) is drawn here when a batch is made, never frozen at ingest.

Layout of one training sequence (Q image positions per image; ``-`` is IGNORE_INDEX):

    input_ids  bos ### Human : <Img> # # # </Img> what ? ### Assistant :  a  dog ###   bos ### Human ...  ###
    labels      -   -    -   -   -   - - -   -     -   -  -     -      -  a  dog ###    -   -    -   ...  ###

Labels are unshifted: the model scores its output at s on the label at s + 1. Source: the release's training forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from tinygptv.data.boxes import format_box
from tinygptv.data.prompts import IMAGE_PLACEHOLDER, INSTRUCTIONS, Template, wrap_image

IGNORE_INDEX = -100
"""Label of a position that the loss does not count."""

T = TypeVar("T")
Chooser = Callable[[Sequence[T]], T]
"""Draws one element; in training a generator keyed by (seed, source, position), in tests anything."""


class Tokenizer(Protocol):
    """What this module needs of a transformers tokenizer."""

    bos_token_id: int
    pad_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Ids of ``text``."""


@dataclass(frozen=True)
class Turn:
    """A question and the answers that are right for it; an answer given twice is drawn twice as often."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SampleRow:
    """One canonical sample: the columns of every Arrow shard.

    Attributes:
        id: unique within its source.
        source: data set name, e.g. ``refcoco``.
        task: key of ``prompts.INSTRUCTIONS``; decides the wording and how ``boxes`` are used.
        image: encoded image bytes (JPEG, or the source's own format where that was small enough); None for text-only.
        width: width of the original image in pixels (0 for text-only); boxes refer to it even if ``image`` is smaller.
        height: the same for the height.
        turns: at least one. For ``refer`` and ``identify``, the answers are the phrases that name the box.
        boxes: [x1, y1, x2, y2] in pixels of the original image.
    """

    id: str
    source: str
    task: str
    turns: tuple[Turn, ...]
    image: bytes | None = None
    width: int = 0
    height: int = 0
    boxes: tuple[tuple[float, float, float, float], ...] = ()

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> SampleRow:
        """Build from an Arrow row (``to_pylist`` form)."""
        turns = tuple(Turn(turn["question"], tuple(turn["answers"])) for turn in row["turns"])
        boxes = tuple((float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in row["boxes"] or ())
        return cls(
            id=row["id"],
            source=row["source"],
            task=row["task"],
            turns=turns,
            image=row["image"],
            width=row["width"],
            height=row["height"],
            boxes=boxes,
        )

    def to_dict(self) -> dict[str, Any]:
        """The Arrow row."""
        return {
            "id": self.id,
            "source": self.source,
            "task": self.task,
            "image": self.image,
            "width": self.width,
            "height": self.height,
            "turns": [{"question": turn.question, "answers": list(turn.answers)} for turn in self.turns],
            "boxes": [list(box) for box in self.boxes],
        }


@dataclass(frozen=True)
class Exchange:
    """One rendered turn: the instruction (None for an image without words) and the answer to learn."""

    instruction: str | None
    answer: str


def render_sample(row: SampleRow, choose: Chooser) -> list[Exchange]:
    """Draw wordings, answers and phrases for one sample.

    Args:
        row: a canonical sample.
        choose: draws one element of a sequence.

    Returns:
        One exchange per turn. The first instruction of a sample with an image holds ``<ImageHere>``.

    Raises:
        ValueError: the task is unknown, or a box task has no box.
    """
    if row.task not in INSTRUCTIONS:
        raise ValueError(f"sample {row.id!r} of {row.source!r} has task {row.task!r}; known: {sorted(INSTRUCTIONS)}.")
    exchanges = []
    for index, turn in enumerate(row.turns):
        question, answer = _question_and_answer(row, turn, choose)
        wordings = INSTRUCTIONS[row.task]
        if not wordings:
            return [Exchange(None, answer)]
        instruction = choose(wordings).replace("{}", question, 1)
        if row.image is not None or row.width:
            instruction = wrap_image(instruction) if index == 0 else f"{instruction} "
        exchanges.append(Exchange(instruction, answer))
    return exchanges


def _question_and_answer(row: SampleRow, turn: Turn, choose: Chooser) -> tuple[str, str]:
    answer = choose(turn.answers)
    if row.task not in ("refer", "identify"):
        return turn.question, answer
    if not row.boxes:
        raise ValueError(f"sample {row.id!r} of {row.source!r} has task {row.task!r} but no box.")
    box = format_box(row.boxes[0], row.width, row.height)
    return (answer, box) if row.task == "refer" else (box, answer)


@dataclass(frozen=True)
class TextLimits:
    """How long a sequence may get, and which quirks of the release its layout has.

    Attributes:
        max_text_tokens: tokens of the answer (single turn) or of everything after the first question (several turns).
        max_context_tokens: tokens of the first question with its image; the right end is cut.
        mask_inner_bos: hide the BOS tokens between turns from attention, as the release does because BOS is also PAD.
    """

    max_text_tokens: int
    max_context_tokens: int = 3800
    mask_inner_bos: bool = False


@dataclass
class EncodedSample:
    """Token ids, labels and attention of one sequence; equal lengths, no padding."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    attention_mask: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learn: bool = False, attend: bool = True) -> None:
        """Append tokens."""
        self.input_ids += ids
        self.labels += ids if learn else [IGNORE_INDEX] * len(ids)
        self.attention_mask += [int(attend)] * len(ids)


class SampleEncoder:
    """Turns exchanges into token ids for one stage: a template, limits, and how many positions an image takes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        limits: TextLimits,
        *,
        image_token_id: int,
        num_query_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits
        self.image_ids = [image_token_id] * num_query_tokens

    def encode_text(self, text: str, num_images: int = 0) -> list[int]:
        """Ids of text in which ``<ImageHere>`` stands for an image.

        Each piece between placeholders is tokenised on its own, as the release does.

        Raises:
            ValueError: the text has another number of placeholders than ``num_images``.
        """
        pieces = text.split(IMAGE_PLACEHOLDER)
        if len(pieces) - 1 != num_images:
            raise ValueError(f"the text has {len(pieces) - 1} {IMAGE_PLACEHOLDER} but {num_images} images: {text!r}.")
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += self.image_ids if index else []
            ids += self._ids(piece)
        return ids

    def encode(self, exchanges: Sequence[Exchange], num_images: int) -> EncodedSample:
        """Lay out one training sequence.

        Args:
            exchanges: rendered turns.
            num_images: images of the sample; the first instruction holds that many placeholders.

        Returns:
            Ids, labels and attention; the last answer's end symbol is missing where the limit cut it off.
        """
        first = exchanges[0]
        if first.instruction is None:
            context = self.image_ids * num_images
        else:
            context = self.encode_text(self.template.wrap(first.instruction), num_images)
        encoded = EncodedSample()
        encoded.add([self.tokenizer.bos_token_id])
        encoded.add(context[: self.limits.max_context_tokens])
        start = len(encoded.input_ids)

        for index, exchange in enumerate(exchanges):
            if index:
                encoded.add([self.tokenizer.bos_token_id], attend=not self.limits.mask_inner_bos)
                encoded.add(self._ids(self.template.wrap(exchange.instruction or "")))
            encoded.add(self._ids(exchange.answer + self.template.end_symbol), learn=True)
        end = start + self.limits.max_text_tokens
        return EncodedSample(encoded.input_ids[:end], encoded.labels[:end], encoded.attention_mask[:end])

    def encode_prompt(self, exchanges: Sequence[Exchange], instruction: str, num_images: int = 0) -> list[int]:
        """Ids of a prompt that waits for an answer: earlier exchanges in full, then the new instruction.

        The layout is the one of training, BOS included.
        """
        if not exchanges:
            return [self.tokenizer.bos_token_id, *self.encode_text(self.template.wrap(instruction), num_images)]
        ids = [self.tokenizer.bos_token_id]
        ids += self.encode_text(self.template.wrap(exchanges[0].instruction or ""), num_images)
        ids += self._ids(exchanges[0].answer + self.template.end_symbol)
        for exchange in exchanges[1:]:
            ids += [self.tokenizer.bos_token_id, *self._ids(self.template.wrap(exchange.instruction or ""))]
            ids += self._ids(exchange.answer + self.template.end_symbol)
        return [*ids, self.tokenizer.bos_token_id, *self._ids(self.template.wrap(instruction))]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []


def chooser(generator: np.random.Generator) -> Chooser:
    """A chooser that draws uniformly from a numpy generator."""

    def choose(options: Sequence[T]) -> T:
        return options[int(generator.integers(len(options)))] if len(options) > 1 else options[0]

    return choose
