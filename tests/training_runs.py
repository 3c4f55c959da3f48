"""Training runs that end in the middle."""

from __future__ import annotations

import pytest

from pipelines.settings import TrainSettings
from pipelines.training.run import run_stage
from tinygptv.training.train_step import TrainStep


class Stop(Exception):
    pass


def run_until(monkeypatch: pytest.MonkeyPatch, at: int, settings: TrainSettings, number: int = 4) -> None:
    """Train until the step after ``at`` steps fails."""
    original, calls = TrainStep.run, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > at:
            raise Stop
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainStep, "run", failing)
        run_stage(settings, number)
