"""Texts and boxes fit for training: checks and repairs of one row, without Ray and without files."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from pipelines.data.sources.base import Changes, Filtered, Malformed, shorten
from pipelines.data.sources.drafts import tidy_turn
from pipelines.settings import PrepareDataSettings
from tinygptv.data.boxes import Box, box_fault
from tinygptv.data.prompts import INSTRUCTIONS, TEMPLATES, escape_markers
from tinygptv.data.sample import SampleRow, Turn

BOX_TASKS = ("refer", "identify")

_LEAST_REPEATED = 8
"""Words of a caption from which on repetitions count."""

_WORD = re.compile(r"\w+")
_BOX_TEXT = re.compile(r"\{<\s*-?[\d.][^{}]*\}")
_GOOD_BOX_TEXT = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def check_row(row: SampleRow, *, web: bool, settings: PrepareDataSettings, changes: Changes | None = None) -> SampleRow:
    """Check the texts of a row.

    Args:
        row: as its source gives it.
        web: its captions are from the open web, as those of the task ``pair`` are: filters for captions apply.
        settings: bounds of those filters.
        changes: counts what is changed.

    Returns:
        The row. Marks that would be read as an image or as the end of an answer are made harmless; of several answers,
        empty ones are dropped.

    Raises:
        Malformed: it cannot be trained on.
        Filtered: a filter removes it.
    """
    if row.task not in INSTRUCTIONS:
        raise Malformed(f"task {shorten(row.task)!r} is unknown; known: {', '.join(INSTRUCTIONS)}")
    if not row.turns or not all(turn.answers for turn in row.turns):
        raise Malformed("there is a question without an answer" if row.turns else "there are no turns")
    if row.image is None and row.task != "text":
        raise Malformed(f"task {row.task} needs an image, and there is none")
    if row.task in BOX_TASKS and not row.boxes:
        raise Malformed(f"task {row.task} needs a box, and there is none")
    for text in _texts(row):
        _check_text(text)
    if web or row.task == "pair":
        for turn in row.turns:
            _filter_caption(turn.answers[0], settings)
    found: set[str] = set()
    turns = tuple(_check_turn(row, turn, found) for turn in row.turns)
    if changes is not None:
        changes.update(found)
    return row if turns == row.turns else replace(row, turns=turns)


def _check_turn(row: SampleRow, turn: Turn, changes: set[str]) -> Turn:
    tidied = tidy_turn(turn)
    question = escape_markers(tidied.question)
    if row.image is None and not question.strip():
        raise Malformed("a question is empty, and there is no image to ask about")
    if not tidied.answers:
        raise Malformed("an answer is empty")
    if len(tidied.answers) < len(turn.answers):
        changes.add("empty_answer_dropped")
    answers = []
    for answer in tidied.answers:
        plain = escape_markers(answer)
        harmless = _escape_end_symbols(row.task, plain)
        if harmless != plain:
            changes.add("end_symbol_escaped")
        answers.append(harmless)
    if row.image is not None:
        for text in (question, *answers):
            _check_box_text(text)
    return Turn(question, tuple(answers))


def _escape_end_symbols(task: str, answer: str) -> str:
    """Keep an answer's own words from ending it: what follows an end symbol could never be generated."""
    answer = TEMPLATES["human"].escape_end_symbol(answer)
    return TEMPLATES["caption"].escape_end_symbol(answer).strip() if task == "pair" else answer


def _texts(row: SampleRow) -> list[str]:
    return [row.id, *(text for turn in row.turns for text in (turn.question, *turn.answers))]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed("text holds half of a surrogate pair, which is no character") from error


def _check_box_text(text: str) -> None:
    """Refuse box text that a model could learn and nobody could read.

    Raises:
        Malformed: its corners are not whole numbers of 0 to 100, or not in order.
    """
    for found in _BOX_TEXT.findall(text):
        match = _GOOD_BOX_TEXT.fullmatch(found)
        x1, y1, x2, y2 = (int(corner) for corner in match.groups()) if match else (1, 1, 0, 0)
        if not (x1 <= x2 <= 100 and y1 <= y2 <= 100):
            raise Malformed(
                f"box text {shorten(found, 60)} is not {{<x1><y1><x2><y2>}} with whole numbers of 0 to 100, x1 <= x2 "
                "and y1 <= y2"
            )


def check_boxes(row: SampleRow, changes: Changes | None = None) -> SampleRow:
    """Check the boxes of a row against its image.

    Args:
        row: with the width and height of the original image.
        changes: counts rows with clipped boxes.

    Returns:
        The row, boxes clipped to the image where they reach a little out of it.

    Raises:
        Malformed: a box has no numbers, is turned round, has no area, or reaches far outside of the image.
    """
    if not row.boxes:
        return row
    if row.image is None:
        raise Malformed("the row has boxes and no image")
    boxes = tuple(_check_box(box, row.width, row.height) for box in row.boxes)
    if boxes != row.boxes and changes is not None:
        changes.update(["box_clipped"])
    return replace(row, boxes=boxes)


def _check_box(box: Box, width: int, height: int) -> Box:
    if fault := box_fault(box, width, height):
        raise Malformed(fault)
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _filter_caption(caption: str, settings: PrepareDataSettings) -> None:
    """Filters that know no language: they count words, letters of any script, and repetitions."""
    words = caption.split()
    if len(words) < settings.min_words:
        raise Filtered("min_words", f"{len(words)} words")
    characters = "".join(words)
    letters = sum(map(str.isalnum, characters))
    if characters and letters < settings.min_letters * len(characters):
        raise Filtered("min_letters", f"{letters} letters among {len(characters)} characters")
    if len(words) < _LEAST_REPEATED:
        return
    commonest = Counter(_WORD.findall(caption)).most_common(1)
    if commonest and commonest[0][1] > settings.max_repetition * len(words):
        raise Filtered("max_repetition", f"{commonest[0][0]!r} is {commonest[0][1]} of {len(words)} words")
