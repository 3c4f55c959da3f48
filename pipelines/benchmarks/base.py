"""What a benchmark is: questions with their truth, a wording, a score per answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygptv.sample import Exchange


@dataclass(frozen=True)
class Question:
    """One question to the model.

    Attributes:
        id: unique within its benchmark.
        instruction: what is asked, task tag included, image marks and template not.
        image: path of the picture; None for text only.
        truth: what the score needs (answers, box, label, ...), JSON-able.
        kind: sub-score that the question counts for as well; empty for none.
        split: part of the benchmark; sub-scores are kept apart per split.
        history: earlier turns of the conversation, without image marks.
    """

    id: str
    instruction: str
    image: Path | None
    truth: dict[str, Any]
    kind: str = ""
    split: str = "test"
    history: tuple[Exchange, ...] = ()


Read = Callable[[Path], Iterator[Question]]
Score = Callable[[str, dict[str, Any]], float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as in ``benchmark=NAME``.
        metric: name of the score.
        read: reads the official files in a folder.
        score: answer and truth -> 0..1.
        max_new_tokens: longest answer.
        released_score: the release's own scoring, where it differs.
    """

    name: str
    metric: str
    read: Read
    score: Score
    max_new_tokens: int = 20
    released_score: Score | None = field(default=None)
