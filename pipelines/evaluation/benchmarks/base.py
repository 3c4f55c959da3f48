"""A benchmark: questions with their truth, a score per answer, statistics over all answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from pipelines.evaluation.benchmarks.files import DataFolder
from tinygptv.data.prompt_layout import Exchange
from tinygptv.miniature.scenes import ObjectRecord

MAIN_SPLIT = "test"
"""The split whose questions make a benchmark's value; a benchmark's other splits are parts beside it."""


class Truth(TypedDict, total=False):
    """What a question's score needs; every benchmark sets the keys that it reads. It stands in ``predictions.jsonl``.

    Attributes:
        answer: the right answer.
        answers: right answers, one for each annotator.
        label: 1 for yes, 0 for no.
        box: [x1, y1, x2, y2] in pixels.
        width: of the image in pixels, where boxes or a grounded caption are scored.
        height: the same for the height.
        img_id: the image's name in RefCOCO's lists.
        caption: grounded caption that names every object.
        objects: of the drawn scene.
        index: number of the object that the answer must mean.
        phrases: phrases that mean it.
    """

    answer: str
    answers: list[str]
    label: int
    box: Sequence[float]
    width: int
    height: int
    img_id: str
    caption: str
    objects: list[ObjectRecord]
    index: int
    phrases: list[str]


@dataclass(frozen=True)
class Question:
    """One question to the model.

    Attributes:
        id: unique within its benchmark.
        instruction: the question with its task tag, without image marks and template.
        image: path of the image; None for text only.
        truth: what the score needs.
        kind: category with a score of its own; empty for none.
        split: part of the benchmark; each part has scores of its own.
        history: earlier turns of the conversation, without image marks.
        choices: answers whose losses are compared, where the benchmark ranks them.
    """

    id: str
    instruction: str
    image: Path | None
    truth: Truth
    kind: str = ""
    split: str = MAIN_SPLIT
    history: tuple[Exchange, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A question and the model's answer.

    Attributes:
        question: what was asked.
        answer: the generated text, or the choice of least loss.
        losses: of the question's choices, in nats.
        problem: why there is no answer; empty where there is one. It counts as wrong.
    """

    question: Question
    answer: str
    losses: tuple[float, ...] = ()
    problem: str = ""


Read = Callable[[DataFolder], Iterator[Question]]
Score = Callable[[str, Truth], float]
Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Statistics:
    """Numbers over all answers, where the mean score is not what a benchmark reports.

    Attributes:
        columns: the numbers [k] of one outcome.
        values: name -> function of [n, k], in 0..1; the first is the benchmark's value.
    """

    columns: Callable[[Outcome], Sequence[float]]
    values: Mapping[str, Statistic]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as in ``benchmark=NAME``.
        metric: what its value is.
        read: reads the official files below the user's folder.
        score: answer and truth -> 0..1.
        max_new_tokens: longest answer.
        generates: the answer is generated; otherwise the choice of least loss is the answer.
        statistics: numbers over all answers; None takes the mean score.
        released: scores of all outcomes as the release computes them; None where it has no such benchmark.
    """

    name: str
    metric: str
    read: Read
    score: Score
    max_new_tokens: int = 20
    generates: bool = True
    statistics: Statistics | None = None
    released: Callable[[Sequence[Outcome]], list[float]] | None = field(default=None)


def each(score: Score) -> Callable[[Sequence[Outcome]], list[float]]:
    """Score every outcome by itself."""
    return lambda outcomes: [score(outcome.answer, outcome.question.truth) for outcome in outcomes]
