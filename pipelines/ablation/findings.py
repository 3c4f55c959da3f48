"""Findings of a training record: loss, and steps at which gradients vanish or turn NaN. Pure functions of its steps.

A part's gradient **vanishes at step k** where its norm, before clipping, stays below ``VANISHED`` times the reference
in the ``WINDOW`` steps from k on. The parts are the projector and each language layer; the reference is the median norm
of the same part over the first ``WINDOW`` steps of the full model, in the same stage and precision.

Training **turns NaN at step k** where the loss of step k is not finite, or where the gradients of the ``WINDOW`` steps
from k on are not: single overflows are how a loss scale finds its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypedDict, cast

import numpy as np

from pipelines.training.record import StepEntry

Status = Literal["trained", "failed", "not run"]

WINDOW = 10
VANISHED = 1e-3


def depth_norms(record: StepEntry) -> dict[str, float]:
    """Gradient norm of the projector and of each language layer (``layer_00``, ...) at one step, input end first."""
    squares: dict[str, float] = {}
    for part, norm in record.get("part_norms", {}).items():
        name = part.partition("/")[2] or part
        if name == "projector" or name.startswith("layer_"):
            squares[name] = squares.get(name, 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in sorted(squares.items(), key=_input_end_first)}


def _input_end_first(item: tuple[str, float]) -> tuple[bool, str]:
    return (item[0] != "projector", item[0])


def typical_norms(records: Sequence[StepEntry]) -> dict[str, float]:
    """Median norm per part over the first ``WINDOW`` steps: the reference of ``find_event``."""
    return {name: float(np.median(values[:WINDOW])) for name, values in norms_over_time(records).items()}


def norms_over_time(records: Sequence[StepEntry]) -> dict[str, list[float]]:
    """Finite norms of each part, in the order of the steps."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, norm in depth_norms(record).items():
            if math.isfinite(norm):
                found.setdefault(name, []).append(norm)
    return found


@dataclass(frozen=True)
class Event:
    """Gradients vanish or turn NaN.

    Attributes:
        kind: which of the two.
        step: first step of it.
        part: where the gradient vanishes first (``projector``, ``layer_03``); empty for NaN.
    """

    kind: Literal["vanishing", "nan"]
    step: int
    part: str = ""

    def __str__(self) -> str:
        if self.kind == "nan":
            return f"NaN at step {self.step}"
        return f"gradient vanishing at step {self.step} ({self.part})"


def find_event(records: Sequence[StepEntry], reference: dict[str, float]) -> Event | None:
    """The first event; None where there is none.

    Args:
        records: every step of a stage, with ``part_norms``.
        reference: typical norm per part (``typical_norms`` of the full model).
    """
    events = [event for event in (_find_nan(records), _find_vanishing(records, reference)) if event]
    return min(events, key=lambda event: event.step, default=None)


def _find_nan(records: Sequence[StepEntry]) -> Event | None:
    lost_loss = next((r["step"] for r in records if not math.isfinite(r["loss"])), None)
    lost_gradient = _first_run(records, [not math.isfinite(r["grad_norm"]) for r in records])
    steps = [step for step in (lost_loss, lost_gradient) if step is not None]
    return Event("nan", min(steps)) if steps else None


def _find_vanishing(records: Sequence[StepEntry], reference: dict[str, float]) -> Event | None:
    found: list[Event] = []
    norms = [depth_norms(record) for record in records]
    for part, typical in reference.items():
        small = [each.get(part, math.inf) < VANISHED * typical for each in norms]
        step = _first_run(records, small)
        if step is not None:
            found.append(Event("vanishing", step, part))
    return min(found, key=lambda event: event.step, default=None)


def _first_run(records: Sequence[StepEntry], flags: Sequence[bool]) -> int | None:
    """Step at which the first ``WINDOW`` flags in a row begin; fewer are enough where all steps to the end have them
    and there are no more than ``WINDOW`` steps."""
    needed = min(WINDOW, len(records))
    length = 0
    for index, flag in enumerate(flags):
        length = length + 1 if flag else 0
        if length == needed:
            return records[index - needed + 1]["step"]
    return None


class EventRecord(TypedDict):
    """Fields of an ``Event``."""

    kind: Literal["vanishing", "nan"]
    step: int
    part: str


class OutcomeRecord(TypedDict):
    """A ``StageOutcome`` in ``result.json``; numbers that are not finite are None. ``cell``: its text in the table."""

    stage: int
    status: Status
    steps: int
    first_loss: float | None
    last_loss: float | None
    event: EventRecord | None
    depth: dict[str, float]
    note: str
    cell: str


@dataclass
class StageOutcome:
    """One cell of the table.

    Attributes:
        stage: its number.
        status: how it ended.
        steps: optimizer steps done.
        first_loss: mean loss of the first steps (at most ``WINDOW``), in nats per token; NaN where unknown.
        last_loss: mean loss of the last steps, likewise.
        event: the first loss of gradients; None for none.
        depth: median gradient norm per part over the stage.
        note: why it was not run, or what failed.
    """

    stage: int
    status: Status = "trained"
    steps: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    event: Event | None = None
    depth: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def cell(self) -> str:
        """Text of the table's cell: the event, or the loss where there is none."""
        if self.status != "trained":
            return self.status
        return str(self.event) if self.event else f"{self.last_loss:.3f}"

    def to_dict(self) -> OutcomeRecord:
        """JSON-able; numbers that are not finite become None."""
        values = asdict(self) | {"cell": self.cell}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return cast(OutcomeRecord, finite)


def outcome_of(stage: int, records: Sequence[StepEntry], reference: dict[str, float], note: str = "") -> StageOutcome:
    """Judge a finished stage by its record."""
    losses = [record["loss"] for record in records]
    width = min(WINDOW, len(losses))
    return StageOutcome(
        stage=stage,
        steps=len(records),
        first_loss=float(np.mean(losses[:width])) if losses else math.nan,
        last_loss=float(np.mean(losses[-width:])) if losses else math.nan,
        event=find_event(records, reference),
        depth={name: float(np.median(norms)) for name, norms in norms_over_time(records).items()},
        note=note,
    )
