"""Training runs that end in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.settings import TrainSettings
from pipelines.training.record import StepEntry
from pipelines.training.run import run_stage
from tinygptv.training.train_step import TrainStep


def record(output: Path) -> list[StepEntry]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[str]:
    """The losses of a run, to the last bit."""
    return [entry["loss_hex"] for entry in record(output)]


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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
