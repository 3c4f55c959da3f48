"""Result of a training stage: from its workers to the driver, and from the driver to ``result.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, Self, TypedDict, cast

from pipelines import storage
from pipelines.data.loader import CutCount
from pipelines.json_files import read_json_object, write_json
from pipelines.training.held_out_record import HeldOutResult
from pipelines.training.record import number

RESULT_FILE = "result.json"


def cut_sentence(source: str, count: CutCount) -> str:
    """Number of cut questions of a source, and the setting that decides it."""
    return (
        f"{source}: the first question of {count.questions:,} of {count.samples:,} samples was longer than "
        "stage.limits.max_context_tokens, and its end was cut"
    )


class StageResult(TypedDict):
    """``result.json`` of a stage; losses that are not finite are ``null`` in the file and NaN here.

    Attributes:
        checkpoint: folder or URI of the whole model.
        first_loss: loss of the first step, in nats per token.
        last_loss: loss of the last step.
        steps: optimizer steps of the run.
        cut: samples that were longer than the stage's limits, by source.
        held_out: losses of the held-out rows; None without them.
        stopped_early: ``early_stop`` ended it.
        seconds: time of the command that finished it.
        result: path of the file.
    """

    checkpoint: str
    first_loss: float
    last_loss: float
    steps: int
    cut: dict[str, dict[str, int]]
    held_out: HeldOutResult | None
    stopped_early: bool
    seconds: float
    result: str


class WorkerRecord(TypedDict):
    """A ``WorkerResult`` in a JSON file, where losses that are not finite are ``null``."""

    checkpoint: str
    first_loss: float | None
    last_loss: float | None
    steps: int
    cut: NotRequired[dict[str, dict[str, int]]]
    held_out: NotRequired[HeldOutResult | None]
    stopped_early: NotRequired[bool]


@dataclass(frozen=True)
class WorkerResult:
    """Result that rank 0 returns to the driver.

    Attributes:
        checkpoint: folder or URI of the whole model.
        first_loss: loss of the first step, in nats per token.
        last_loss: loss of the last step.
        steps: optimizer steps of the run.
        cut: samples that were longer than the stage's limits, by source.
        held_out: losses of the held-out rows; None without them.
        stopped_early: ``early_stop`` ended it.
    """

    checkpoint: str
    first_loss: float
    last_loss: float
    steps: int
    cut: dict[str, CutCount] = field(default_factory=dict)
    held_out: HeldOutResult | None = None
    stopped_early: bool = False

    @classmethod
    def from_dict(cls, values: WorkerRecord) -> Self:
        """From the values of a JSON file."""
        cut = {name: CutCount(**count) for name, count in values.get("cut", {}).items()}
        first, last = number(values["first_loss"]), number(values["last_loss"])
        held_out, stopped_early = values.get("held_out"), values.get("stopped_early", False)
        return cls(values["checkpoint"], first, last, values["steps"], cut, held_out, stopped_early)

    def to_dict(self) -> WorkerRecord:
        """For a JSON file."""
        return cast(WorkerRecord, asdict(self))

    def to_stage_result(self, result: str, seconds: float) -> StageResult:
        """Add what the driver knows: the location of ``result.json``, and the time of the command."""
        return cast(StageResult, {**asdict(self), "seconds": round(seconds, 1), "result": result})


def write_result(output: Path, result: StageResult) -> None:
    """Write ``result.json``, atomically."""
    write_json(output / RESULT_FILE, result)


def read_result(output: Path) -> StageResult | None:
    """The result of a finished stage; None where there is none, or its file is damaged."""
    values = read_json_object(output / RESULT_FILE)
    try:
        if not values:
            return None
        location = values.get("result", "")
        if storage.is_local(location or "."):
            location = str(output / RESULT_FILE)  # a folder may have been moved
        return WorkerResult.from_dict(cast(WorkerRecord, values)).to_stage_result(location, values["seconds"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def print_result(result: StageResult) -> None:
    """The closing lines of a stage's job; the last one is the path of result.json."""
    print(
        f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f} in {result['steps']} steps, "
        f"{result['seconds']:.0f} s"
    )
    if held_out := result["held_out"]:
        print(
            f"held-out loss {held_out['first']:.3f} -> {held_out['last']:.3f}, least {held_out['best']:.3f} after step "
            f"{held_out['best_step']}; the checkpoint is of step {held_out['checkpoint_step']}"
        )
    print(f"checkpoint: {result['checkpoint']}\n{result['result']}")
