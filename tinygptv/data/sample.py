"""The canonical sample, and its rendering to token ids and labels.

Every data set becomes rows of one shape (``SampleRow``). What the release draws at random (instruction wording, answer
by frequency, one of several phrases) is drawn here when a batch is made, never frozen at ingest.

Layout of one training sequence (Q image positions per image; ``-`` is IGNORE_INDEX):

    input_ids  bos ### Human : <Img> # # # </Img> what ? ### Assistant :  a  dog ###   bos ### Human ...  ###
    labels      -   -    -   -   -   - - -   -     -   -  -     -      -  a  dog ###    -   -    -   ...  ###

Labels are unshifted: the model scores its output at s on the label at s + 1. Source: the release's training forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, TypeVar

import numpy as np

from tinygptv.bounds import check_number
from tinygptv.data.boxes import Box, format_box
from tinygptv.data.prompt_layout import Exchange, PromptLayout, TurnIds
from tinygptv.data.prompts import INSTRUCTIONS

IGNORE_INDEX = -100
"""Label of a position that the loss does not count."""

T = TypeVar("T")
Chooser = Callable[[Sequence[T]], T]
"""Draws one element; in training a generator keyed by (seed, source, position), in tests anything."""


@dataclass(frozen=True)
class Turn:
    """A question and the answers that are right for it; an answer given twice is drawn twice as often."""

    question: str
    answers: tuple[str, ...]


class ArrowTurn(TypedDict):
    """An element of the column ``turns``."""

    question: str
    answers: list[str]


class ArrowRow(TypedDict):
    """A row of an Arrow shard, as ``to_pylist`` gives it; columns as the attributes of ``SampleRow``."""

    id: str
    source: str
    task: str
    image: bytes | None
    width: int
    height: int
    turns: list[ArrowTurn]
    boxes: list[list[float]] | None


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
    boxes: tuple[Box, ...] = ()

    @classmethod
    def from_dict(cls, row: ArrowRow) -> SampleRow:
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

    def to_dict(self) -> ArrowRow:
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


def render_sample(row: SampleRow, choose: Chooser[Any]) -> list[Exchange]:
    """Draw wordings, answers and phrases for one sample.

    Args:
        row: a canonical sample.
        choose: draws one element of a sequence.

    Returns:
        One exchange per turn; the image of a sample belongs to the first.

    Raises:
        ValueError: the task is unknown, or a box task has no box.
    """
    if row.task not in INSTRUCTIONS:
        raise ValueError(f"sample {row.id!r} of {row.source!r} has task {row.task!r}; known: {sorted(INSTRUCTIONS)}.")
    wordings = INSTRUCTIONS[row.task]
    exchanges = []
    for index, turn in enumerate(row.turns):
        question, answer = _question_and_answer(row, turn, choose)
        num_images = int(index == 0 and row.image is not None)
        if not wordings:
            return [Exchange(None, answer, num_images)]
        exchanges.append(Exchange(choose(wordings).replace("{}", question, 1), answer, num_images))
    return exchanges


def _question_and_answer(row: SampleRow, turn: Turn, choose: Chooser[Any]) -> tuple[str, str]:
    answer = choose(turn.answers)
    if row.task not in ("refer", "identify"):
        return turn.question, answer
    if not row.boxes:
        raise ValueError(f"sample {row.id!r} of {row.source!r} has task {row.task!r} but no box.")
    box = format_box(row.boxes[0], row.width, row.height)
    return (answer, box) if row.task == "refer" else (box, answer)


@dataclass(frozen=True)
class TextLimits:
    """Length limit of a sequence, and the release's quirks that its layout has.

    Attributes:
        max_text_tokens: tokens of the answer (single turn) or of everything after the first question (several turns).
        max_context_tokens: tokens of the first question with its image and the template's words; the end of the
            question's own words is cut.
        mask_inner_bos: lay out as the release does: the BOS tokens between turns are hidden from attention, because its
            BOS is also its PAD, and a question beyond its limit loses its last tokens, the template's words included.
    """

    max_text_tokens: int
    max_context_tokens: int = 3800
    mask_inner_bos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_text_tokens", "max_context_tokens"):
            check_number(f"limits.{name}", getattr(self, name), 1, whole=True)
        if not isinstance(self.mask_inner_bos, bool):
            raise ValueError(f"limits.mask_inner_bos is {self.mask_inner_bos!r}; it must be true or false.")


@dataclass
class EncodedSample:
    """Token ids, labels and attention of one sequence; equal lengths, no padding.

    Attributes:
        input_ids: the sequence.
        labels: the same where the loss counts, else ``IGNORE_INDEX``.
        attention_mask: 0 where a token is hidden.
        question_cut: the first question was longer than the stage's limit, and its end is missing.
        answer_cut: the answer, or what follows the first question, was longer than the limit, and its end is missing.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    attention_mask: list[int] = field(default_factory=list)
    question_cut: bool = False
    answer_cut: bool = False

    def add(self, ids: Sequence[int], *, learn: bool = False, attend: bool = True) -> None:
        """Append tokens."""
        self.input_ids += ids
        self.labels += ids if learn else [IGNORE_INDEX] * len(ids)
        self.attention_mask += [int(attend)] * len(ids)


class SampleEncoder:
    """Turns exchanges into the token ids and labels of one training sequence, within a stage's limits."""

    def __init__(self, layout: PromptLayout, limits: TextLimits) -> None:
        self.layout, self.limits = layout, limits

    def encode(self, exchanges: Sequence[Exchange]) -> EncodedSample:
        """Lay out one training sequence.

        Args:
            exchanges: rendered turns, each with its answer.

        Returns:
            Ids, labels and attention; the last answer's end symbol is missing where the limit cut it off.

        Raises:
            ValueError: the limit of the first question has no room for the image and the template's words.
        """
        encoded = EncodedSample()
        first, *following = self.layout.encode_turns(exchanges)
        encoded.question_cut = len(first.question) > self.limits.max_context_tokens
        if encoded.question_cut:
            first = self._shortened(exchanges[0], first)
        encoded.add(first.bos)
        encoded.add(first.question)
        end = len(encoded.input_ids) + self.limits.max_text_tokens
        encoded.add(first.answer or [], learn=True)
        for turn in following:
            encoded.add(turn.bos, attend=not self.limits.mask_inner_bos)
            encoded.add(turn.question)
            encoded.add(turn.answer or [], learn=True)
        encoded.answer_cut = len(encoded.input_ids) > end
        for values in (encoded.input_ids, encoded.labels, encoded.attention_mask):
            del values[end:]
        return encoded

    def _shortened(self, exchange: Exchange, turn_ids: TurnIds) -> TurnIds:
        """A turn with as many of its instruction's first characters as the limit has room for."""
        words, room = exchange.instruction or "", self.limits.max_context_tokens
        if self.limits.mask_inner_bos:
            return replace(turn_ids, question=turn_ids.question[:room])

        def turn(length: int) -> TurnIds:
            (ids,) = self.layout.encode_turns([replace(exchange, instruction=words[:length].rstrip())])
            return ids

        length = bisect_left(range(len(words)), True, key=lambda count: len(turn(count + 1).question) > room)
        shortened = turn(length)
        if len(shortened.question) > room:
            raise ValueError(
                f"max_context_tokens={room} has no room for the image and the words of template "
                f"{self.layout.template.name!r}: raise it."
            )
        return shortened


def chooser(generator: np.random.Generator) -> Chooser[Any]:
    """A chooser that draws uniformly from a numpy generator."""

    def choose(options: Sequence[T]) -> T:
        return options[int(generator.integers(len(options)))] if len(options) > 1 else options[0]

    return choose
