"""The model's answers to the questions of benchmarks, and the files that keep them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Self, TypedDict, cast

from pipelines import storage
from pipelines.evaluation.benchmarks.base import Question
from pipelines.json_files import to_json

View = Literal["answer", "blind", "shuffled"]

VIEWS: tuple[View, ...] = ("answer", "blind", "shuffled")
"""With the question's own image, with a blank one, with another question's."""


@dataclass(frozen=True)
class ViewAnswer:
    """An answer to one question with one image.

    Attributes:
        text: generated, or the choice of least loss.
        losses: of the question's choices, in nats; empty where it has none. Infinite where a choice cannot be scored.
    """

    text: str
    losses: tuple[float, ...] = ()


class AnswerRecord(TypedDict):
    """The answers to one question in the files.

    Attributes:
        answer: text with the question's own image; None where it was not asked for, or cannot be had.
        blind: the same with a blank image.
        shuffled: the same with another question's image.
        id: of the question.
        problem: why there is no answer; empty where there is one.
        answer_losses: losses of the choices, in nats, where choices are ranked; ``null`` for infinity in the file.
        blind_losses: the same with a blank image.
        shuffled_losses: the same with another question's image.
    """

    answer: str | None
    blind: str | None
    shuffled: str | None
    id: str
    problem: str
    answer_losses: NotRequired[list[float]]
    blind_losses: NotRequired[list[float]]
    shuffled_losses: NotRequired[list[float]]


@dataclass
class Answers:
    """All answers to one question.

    Attributes:
        id: of the question.
        problem: why there is no answer, in one sentence; empty where there is one.
        views: the answers that were asked for.
    """

    id: str
    problem: str = ""
    views: dict[View, ViewAnswer] = field(default_factory=dict)

    def to_dict(self) -> AnswerRecord:
        """As in ``predictions.jsonl``: a text per view, and ``<view>_losses`` where choices are ranked."""
        texts = {view: self.views[view].text if view in self.views else None for view in VIEWS}
        losses = {f"{view}_losses": list(answer.losses) for view, answer in self.views.items() if answer.losses}
        return cast(AnswerRecord, {**texts, "id": self.id, "problem": self.problem, **losses})

    @classmethod
    def from_dict(cls, values: AnswerRecord) -> Self:
        """The inverse of ``to_dict``."""
        found: Any = values
        views = {
            view: ViewAnswer(found[view], tuple(_loss(value) for value in found.get(f"{view}_losses") or ()))
            for view in VIEWS
            if found.get(view) is not None
        }
        return cls(values["id"], values["problem"], views)


Answered = Sequence[tuple[Question, Answers]]
"""Questions of one benchmark with their answers, in order."""


def write_answers(location: str, answers: Iterable[Answers]) -> None:
    """Write answers as JSON lines; the file is either absent or complete.

    Raises:
        DiskFullError: there is no room.
    """
    storage.write_atomically(location, "".join(to_json(each.to_dict()) + "\n" for each in answers).encode())


def read_answers(location: str, questions: Sequence[Question]) -> list[Answers]:
    """Read what ``write_answers`` wrote.

    Args:
        location: of the file.
        questions: that it answers, in order.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = [Answers.from_dict(json.loads(line)) for line in storage.read_bytes(location).splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if [each.id for each in found] != [question.id for question in questions]:
        raise ValueError(f"{location} is damaged: run the same command again, which answers its questions again.")
    return found


def _loss(value: float | None) -> float:
    return math.inf if value is None else value
