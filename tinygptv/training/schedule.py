"""Learning-rate schedules: the rate of a step as a pure function of the step.

Source: paper section 4.1 (stage-1 saw-tooth) and the release's ``linear_warmup_cosine_lr`` with its quirks.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from tinygptv.bounds import check_number


@dataclass(frozen=True)
class Schedule:
    """Learning rate per step, as data.

    Attributes:
        kind: key of ``SCHEDULES``.
        peak: learning rate at the end of the warm-up.
        minimum: where ``warmup_cosine`` ends. May exceed ``peak`` (the release's stage 4): the rate then rises.
        warmup_start: learning rate of step 0; a negative value means ``peak``, as in the release.
        warmup_steps: steps of linear warm-up.
        steps_per_epoch: length of an epoch in steps.
        epochs: number of epochs.
    """

    kind: str
    peak: float
    minimum: float
    warmup_start: float
    warmup_steps: int
    steps_per_epoch: int
    epochs: int

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule kind is {self.kind!r}; known kinds: {sorted(SCHEDULES)}.")
        for name, least in (("steps_per_epoch", 1), ("epochs", 1), ("warmup_steps", 0)):
            check_number(f"schedule.{name}", getattr(self, name), least, whole=True)
        for name in ("peak", "minimum"):
            check_number(f"schedule.{name}", getattr(self, name), 0)
        check_number("schedule.warmup_start", self.warmup_start, -math.inf)
        if self.warmup_start < 0:
            object.__setattr__(self, "warmup_start", self.peak)

    @property
    def num_steps(self) -> int:
        """Steps of the whole stage."""
        return self.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        return SCHEDULES[self.kind](self, step)

    def warn_if_rising(self) -> None:
        """Warn where the rate rises instead of decaying."""
        if self.kind == "sawtooth" or self.minimum <= self.peak:
            return
        warnings.warn(
            f"the schedule ends at {self.minimum:g}, above its peak {self.peak:g}: after the warm-up the learning rate "
            "rises instead of decaying. This is what the published configuration does, and it is kept.",
            stacklevel=2,
        )


def warmup_cosine(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then cosine from ``peak`` to ``minimum``, exactly as released.

    The warm-up counts steps within the epoch, so a warm-up longer than an epoch starts again in each; and the cosine
    runs from step 0 of the stage, so the rate drops a little where the warm-up ends.
    """
    s = schedule
    if step < s.warmup_steps:
        in_epoch = step % s.steps_per_epoch
        return min(s.peak, s.warmup_start + (s.peak - s.warmup_start) * in_epoch / max(s.warmup_steps, 1))
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / s.num_steps))
    return (s.peak - s.minimum) * cosine + s.minimum


def sawtooth(schedule: Schedule, step: int) -> float:
    """Rise linearly from ``warmup_start`` to ``peak`` within every epoch, then start again (paper, stage 1)."""
    in_epoch = step % schedule.steps_per_epoch
    return schedule.warmup_start + (schedule.peak - schedule.warmup_start) * in_epoch / max(
        schedule.steps_per_epoch - 1, 1
    )


def warmup_decay(schedule: Schedule, step: int) -> float:
    """Linear warm-up over the stage's first steps, then cosine from ``peak`` to ``minimum`` over the rest."""
    s = schedule
    if step < s.warmup_steps:
        return s.warmup_start + (s.peak - s.warmup_start) * step / max(s.warmup_steps, 1)
    progress = (step - s.warmup_steps) / max(s.num_steps - s.warmup_steps, 1)
    return s.minimum + (s.peak - s.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES = {"warmup_cosine": warmup_cosine, "sawtooth": sawtooth, "warmup_decay": warmup_decay}
