"""From an entry to rows: drafts, which the readers of all annotation files make, and their images and cleaned texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.data.sources.base import Changes, Malformed, ReadResult, SourceUnit, rejection
from pipelines.data.sources.images import ImageFolder
from tinygptv.data.boxes import Box
from tinygptv.data.prompts import LONGEST_CAPTION, clean_caption
from tinygptv.data.sample import SampleRow, Turn

_NO_BOUND = 1 << 30


@dataclass(frozen=True)
class Draft:
    """A sample before its image is read.

    Attributes:
        turns: questions and answers, as the entry has them.
        image: name of the image as the entry gives it, or its bytes; None for text only.
        boxes: x1, y1, x2, y2 in pixels of the original image.
        task: overrides the source's.
        cleans_questions: clean the questions as the release does (``clean_caption``).
        cleans_answers: the same for the answers.
        changes: what was changed while the entry was read.
    """

    turns: tuple[Turn, ...]
    image: str | bytes | None = None
    boxes: tuple[Box, ...] = ()
    task: str = ""
    cleans_questions: bool = False
    cleans_answers: bool = False
    changes: tuple[str, ...] = ()


Describe = Callable[[Any, str], Iterator[Draft]]
"""An entry and its key (its number in a list) -> drafts. May raise whatever reading a wrong entry raises."""


def tidy_turn(turn: Turn) -> Turn:
    """A turn as it is trained on and scored: line breaks of Windows are plain ones, empty answers are none."""
    answers = (answer.replace("\r\n", "\n") for answer in turn.answers if answer.strip())
    return Turn(turn.question.replace("\r\n", "\n"), tuple(answers))


def read_drafts(
    unit: SourceUnit,
    key: str,
    drafts: Callable[[], Iterator[Draft]],
    images: ImageFolder | None,
    changes: Changes | None,
) -> Iterator[ReadResult]:
    """Turn the drafts of one entry into rows.

    Args:
        unit: that holds the entry.
        key: of the entry; a number is added where an entry gives several samples.
        drafts: makes them.
        images: where they are read from; None for text only.
        changes: see ``Reader.read``.
    """
    try:
        for number, draft in enumerate(drafts()):
            row_key = f"{key}/{number}" if number else key
            try:
                yield make_row(unit, row_key, draft, images, changes)
            except Exception as error:  # whatever is in an entry costs that entry alone
                yield rejection(unit, row_key, error)
    except Exception as error:
        yield rejection(unit, key, error)


def make_row(
    unit: SourceUnit, key: str, draft: Draft, images: ImageFolder | None, changes: Changes | None = None
) -> SampleRow:
    """A draft with its image and its texts as they are trained on.

    Raises:
        Malformed: the image cannot be used.
    """
    image = draft.image
    if isinstance(image, str):
        if images is None:
            raise Malformed("the entry names an image, and this data set has none")
        image = images.read(image)
    turns, cut = _clean_turns(draft)
    if changes is not None:
        changes.update({*draft.changes, *cut})
    return SampleRow(
        id=unit.row_id(key),
        source=unit.source.name,
        task=draft.task or unit.source.task,
        turns=turns,
        image=image,
        boxes=draft.boxes,
    )


def _clean_turns(draft: Draft) -> tuple[tuple[Turn, ...], set[str]]:
    """Turns with their texts cleaned where the draft says so, and what was cut off in doing so."""
    cut: set[str] = set()

    def clean(text: str, name: str) -> str:
        cleaned = clean_caption(text)
        may_be_cut = cleaned.count(" ") + 1 >= LONGEST_CAPTION
        if may_be_cut and len(cleaned) < len(clean_caption(text, _NO_BOUND)):
            cut.add(name)
        return cleaned

    turns = tuple(
        Turn(
            clean(turn.question, "question_cut") if draft.cleans_questions else turn.question,
            tuple(clean(answer, "answer_cut") if draft.cleans_answers else answer for answer in turn.answers),
        )
        for turn in draft.turns
    )
    return turns, cut
