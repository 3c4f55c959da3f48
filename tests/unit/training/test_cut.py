"""Samples that are longer than a stage's limits are counted by source, and told in the run's summary."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from pipelines.data.loader import BatchMaker, CutCount
from pipelines.miniature.tiny_training import train_settings
from pipelines.training.job import resolve_job
from pipelines.training.run import run_stage
from pipelines.training.worker import TrainWorker, add_counts

LIMITS = {"max_text_tokens": 12, "max_context_tokens": 44}
"""Some questions of the test's data are longer, some are not; likewise answers."""


def settings(world, output, **changes):
    return train_settings(world, output, stage={"limits": LIMITS}, **changes)


def counted(world, folder, steps):
    """What the data itself says."""
    maker = BatchMaker(resolve_job(settings(world, folder), 4)[0].plan)
    return add_counts(*(maker.make(step).cut for step in range(steps)))


def test_cut_questions_are_counted_and_told(world, tmp_path, caplog):
    expected = counted(world, tmp_path / "a", 12)
    assert 0 < expected["questions"].questions < expected["questions"].samples
    assert 0 < expected["pairs"].answers < expected["pairs"].samples and expected["pairs"].questions == 0
    result = run_stage(settings(world, tmp_path / "b"), 4)
    assert result["cut"] == {name: asdict(count) for name, count in expected.items()}
    assert json.loads((tmp_path / "b/result.json").read_text())["cut"] == result["cut"]
    count = expected["questions"]
    assert f"questions: the first question of {count.questions} of {count.samples} samples was longer" in caplog.text
    assert "pairs: the first question" not in caplog.text


@pytest.mark.parametrize("at", [2, 7])
def test_a_resumed_run_counts_every_sample_once(world, tmp_path, monkeypatch, at):
    steps = []
    original = TrainWorker._report

    def failing(self, batch, *arguments):
        steps.append(batch.step)
        if batch.step == at and len(steps) == at + 1:
            raise KeyboardInterrupt
        return original(self, batch, *arguments)

    monkeypatch.setattr(TrainWorker, "_report", failing)
    with pytest.raises(KeyboardInterrupt):
        run_stage(settings(world, tmp_path, max_steps=9), 4)
    result = run_stage(settings(world, tmp_path, max_steps=9), 4)
    assert result["cut"] == {name: asdict(count) for name, count in counted(world, tmp_path / "a", 9).items()}


def test_counts_of_workers_add_up():
    one, two = {"a": CutCount(3, 1, 2)}, {"a": CutCount(1, 1, 0), "b": CutCount(2)}
    assert add_counts(one, two) == {"a": CutCount(4, 2, 2), "b": CutCount(2, 0, 0)}
