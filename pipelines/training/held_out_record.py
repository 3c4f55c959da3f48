"""The evaluations of a run on held-out rows: history, least loss, ``held_out.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypedDict

from pipelines import storage
from pipelines.json_files import to_json
from pipelines.training.record import number


class Evaluation(TypedDict):
    """One line of ``held_out.jsonl``.

    Attributes:
        step: optimizer steps that were done.
        loss: mean over the held-out tokens of all sources, in nats.
        sources: the same for each source.
    """

    step: int
    loss: float
    sources: dict[str, float]


class HeldOutResult(TypedDict):
    """Entry of ``result.json`` for the held-out rows; losses in nats per token.

    Attributes:
        first: before the first step.
        last: after the last one.
        best: the least one.
        best_step: steps done at the least one.
        checkpoint_step: steps done of the weights in the checkpoint.
        rows: evaluated, by source.
    """

    first: float
    last: float
    best: float
    best_step: int
    checkpoint_step: int
    rows: dict[str, int]


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

    def __init__(self, evaluations: list[Evaluation] | None = None) -> None:
        self.evaluations = evaluations or []

    def add(self, step: int, shares: list[dict[str, tuple[float, int]]]) -> Evaluation:
        """Take the sums of all workers."""
        totals = {name: [sum(share[name][i] for share in shares) for i in (0, 1)] for name in shares[0]}
        loss = sum(total for total, _ in totals.values()) / max(1, sum(tokens for _, tokens in totals.values()))
        sources = {name: total / tokens for name, (total, tokens) in totals.items() if tokens}
        found = Evaluation(step=step, loss=loss, sources=sources)
        self.evaluations.append(found)
        return found

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

    def result(self, checkpoint_step: int, rows: dict[str, int]) -> HeldOutResult:
        """For ``result.json``."""
        return HeldOutResult(
            first=self.evaluations[0]["loss"],
            last=self.evaluations[-1]["loss"],
            best=self.best["loss"],
            best_step=self.best["step"],
            checkpoint_step=checkpoint_step,
            rows=rows,
        )

    def write(self, path: Path) -> None:
        """Write ``held_out.jsonl``.

        Raises:
            DiskFullError: there is no room.
        """
        storage.write_atomically(str(path), "".join(to_json(each) + "\n" for each in self.evaluations).encode())


def read_evaluations(path: Path) -> list[Evaluation]:
    """The lines of a ``held_out.jsonl``; empty where there is none."""
    return [parse_evaluation(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def parse_evaluation(values: Evaluation) -> Evaluation:
    """One line of the file; losses that are ``null`` become NaN."""
    sources = {name: number(loss) for name, loss in values["sources"].items()}
    return Evaluation(step=int(values["step"]), loss=number(values["loss"]), sources=sources)
