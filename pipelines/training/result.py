"""What a training stage returns: from its workers to the driver, and from the driver to ``result.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

from pipelines.json_files import read_json_object, write_json
from pipelines.training.record import number

RESULT_FILE = "result.json"


class StageResult(TypedDict):
    """``result.json`` of a stage; losses that are not finite are ``null`` in the file and NaN here.

    Attributes:
        checkpoint: folder or URI of the whole model.
        first_loss: loss of the first step, in nats per token.
        last_loss: loss of the last step.
        steps: optimizer steps of the run.
        seconds: time of the command that finished it.
        result: path of the file.
    """

    checkpoint: str
    first_loss: float
    last_loss: float
    steps: int
    seconds: float
    result: str


@dataclass(frozen=True)
class WorkerResult:
    """What rank 0 hands to the driver.

    Attributes:
        checkpoint: folder or URI of the whole model.
        first_loss: loss of the first step, in nats per token.
        last_loss: loss of the last step.
        steps: optimizer steps of the run.
    """

    checkpoint: str
    first_loss: float
    last_loss: float
    steps: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From the values of a JSON file."""
        return cls(values["checkpoint"], number(values["first_loss"]), number(values["last_loss"]), values["steps"])

    def to_stage_result(self, output: Path, seconds: float) -> StageResult:
        """Add what the driver knows."""
        return StageResult(
            checkpoint=self.checkpoint,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            steps=self.steps,
            seconds=round(seconds, 1),
            result=str(output / RESULT_FILE),
        )


def write_result(output: Path, result: StageResult) -> None:
    """Write ``result.json``, atomically."""
    write_json(output / RESULT_FILE, result)


def read_result(output: Path) -> StageResult | None:
    """The result of a finished stage; None where there is none, or its file is damaged."""
    values = read_json_object(output / RESULT_FILE)
    try:
        return WorkerResult.from_dict(values).to_stage_result(output, values["seconds"]) if values else None
    except (KeyError, TypeError, ValueError):
        return None
