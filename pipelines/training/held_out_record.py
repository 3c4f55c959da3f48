"""The evaluations of a run on held-out rows: losses, scores, least loss, ``held_out.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from pipelines import storage
from pipelines.json_files import to_json
from pipelines.training.record import number

if TYPE_CHECKING:
    from pipelines.training.held_out import HeldOutShare


class Evaluation(TypedDict):
    """One line of ``held_out.jsonl``.

    Attributes:
        step: optimizer steps that were done.
        loss: mean over the held-out tokens of all sources, in nats.
        sources: the same for each source.
        scores: share of the held-out questions that are answered rightly, in per cent, by source; boxes count from an
            overlap (IoU) of 0.5.
        rows: short hash of the data and row numbers; losses of other rows cannot be compared. Lines of earlier versions
            have none.
    """

    step: int
    loss: float
    sources: dict[str, float]
    scores: dict[str, float]
    rows: NotRequired[str]


class HeldOutScores(TypedDict):
    """Scores of a source's held-out questions in ``result.json``, in per cent."""

    first: float
    last: float
    questions: int


class HeldOutResult(TypedDict):
    """Entry of ``result.json`` for the held-out rows; losses in nats per token.

    Attributes:
        first: before the first step.
        last: after the last one.
        best: the least one.
        best_step: steps done at the least one.
        checkpoint_step: steps done of the weights in the checkpoint.
        rows: evaluated, by source.
        scores: of the answers, by source; sources without questions are missing.
    """

    first: float
    last: float
    best: float
    best_step: int
    checkpoint_step: int
    rows: dict[str, int]
    scores: dict[str, HeldOutScores]


class HeldOutState(TypedDict, total=False):
    """What a training state keeps of the evaluations.

    Attributes:
        evaluations: so far.
        held_out_loss: that of the weights in this state; None where they were not evaluated.
    """

    evaluations: list[Evaluation]
    held_out_loss: float | None


class HeldOutHistory:
    """The evaluations of a run; kept in training states, so that all workers of a resumed run have the same."""

    def __init__(self, evaluations: list[Evaluation] | None = None, rows: str = "") -> None:
        """Begin, or continue.

        Args:
            evaluations: so far.
            rows: hash of the rows that are evaluated from now on.
        """
        self.evaluations = evaluations or []
        self.rows = rows

    def add(self, step: int, shares: Sequence[HeldOutShare]) -> Evaluation:
        """Take the sums of all workers."""
        losses = _totals([share.losses for share in shares])
        scores = _totals([share.scores for share in shares])
        loss = sum(total for total, _ in losses.values()) / max(1, sum(tokens for _, tokens in losses.values()))
        found = Evaluation(
            step=step,
            loss=loss,
            sources={name: total / tokens for name, (total, tokens) in losses.items() if tokens},
            scores={name: 100 * total / questions for name, (total, questions) in scores.items() if questions},
        )
        if self.rows:
            found["rows"] = self.rows
        self.evaluations.append(found)
        return found

    @property
    def newest_is_of_other_rows(self) -> bool:
        """Whether the newest one cannot be compared with the one before."""
        rows = {each["rows"] for each in self.evaluations[-2:] if "rows" in each}
        return len(rows) > 1

    @property
    def best(self) -> Evaluation:
        """That of the least loss; the first of several."""
        return min(self.evaluations, key=lambda each: each["loss"] if math.isfinite(each["loss"]) else math.inf)

    @property
    def newest_is_best(self) -> bool:
        """Whether the newest one is the best."""
        return self.best is self.evaluations[-1]

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        return len(self.evaluations) - 1 - self.evaluations.index(self.best)

    def has(self, step: int) -> bool:
        """Whether the weights after so many steps were evaluated."""
        return any(each["step"] == step for each in self.evaluations)

    def state(self, next_step: int) -> HeldOutState:
        """For the training state of a step: the evaluations so far, and the loss of just this state."""
        if not self.evaluations:
            return {}
        evaluations = json.loads(to_json(self.evaluations))
        newest = evaluations[-1]
        return {
            "evaluations": evaluations,
            "held_out_loss": newest["loss"] if newest["step"] == next_step else None,
        }

    def result(self, checkpoint_step: int, rows: dict[str, int], questions: dict[str, int]) -> HeldOutResult:
        """For ``result.json``."""
        first, last = self.evaluations[0], self.evaluations[-1]
        # A run may be continued with questions that it was not asked before.
        scores = [each["scores"] for each in self.evaluations]
        asked = {name: [found[name] for found in scores if name in found] for name in questions}
        return HeldOutResult(
            first=first["loss"],
            last=last["loss"],
            best=self.best["loss"],
            best_step=self.best["step"],
            checkpoint_step=checkpoint_step,
            rows=rows,
            scores={
                name: HeldOutScores(first=asked[name][0], last=asked[name][-1], questions=number)
                for name, number in questions.items()
                if asked[name]
            },
        )

    def write(self, path: Path) -> None:
        """Write ``held_out.jsonl``.

        Raises:
            DiskFullError: there is no room.
        """
        storage.write_atomically(str(path), "".join(to_json(each) + "\n" for each in self.evaluations).encode())


def _totals(shares: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Sums over all workers."""
    return {
        name: (sum(share[name][0] for share in shares), sum(share[name][1] for share in shares)) for name in shares[0]
    }


def read_evaluations(path: Path) -> list[Evaluation]:
    """The lines of a ``held_out.jsonl``; empty where there is none."""
    return [parse_evaluation(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def parse_evaluation(values: Evaluation) -> Evaluation:
    """One line of the file; losses that are ``null`` become NaN. Earlier versions wrote no scores and no ``rows``."""
    sources = {name: number(loss) for name, loss in values["sources"].items()}
    scores = {name: float(score) for name, score in values.get("scores", {}).items()}
    found = Evaluation(step=int(values["step"]), loss=number(values["loss"]), sources=sources, scores=scores)
    return {**found, "rows": values["rows"]} if "rows" in values else found
