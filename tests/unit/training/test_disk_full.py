"""A full disk is one sentence, leaves nothing truncated, and costs no finished step."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from pipelines.miniature.tiny_training import train_settings
from pipelines.storage import LOCK, DiskFullError, disk_full_as_error
from pipelines.storage.files import AtomicFile
from pipelines.training import worker
from pipelines.training.plots import loss_curve
from pipelines.training.run import run_stage
from tests.training_runs import losses
from tinygptv.training.stages import get_stage

pytestmark = pytest.mark.security


def leftovers(output):
    found = [path for path in output.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    return [path for path in found if path.name != LOCK]


def full(*arguments, **more):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_state_that_does_not_fit(world, straight, tmp_path, monkeypatch):
    import safetensors.torch

    original, calls = safetensors.torch.save_file, []

    def second_fails(*arguments, **more):
        calls.append(1)
        return full() if len(calls) == 2 else original(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match=r"training state of step 6 in .*/states"):
        patch.setattr(safetensors.torch, "save_file", second_fails)
        run_stage(train_settings(world, tmp_path, max_steps=7), 4)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000003"] and not leftovers(tmp_path)
    run_stage(train_settings(world, tmp_path, max_steps=7), 4)
    assert losses(tmp_path) == losses(straight[1])[:7]


def test_a_checkpoint_that_does_not_fit(world, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match=f"while writing {tmp_path}/checkpoint"):
        patch.setattr(worker, "save_checkpoint", full)
        run_stage(train_settings(world, tmp_path, max_steps=5), 4)
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "result.json").exists()
    assert run_stage(train_settings(world, tmp_path, max_steps=5), 4)["steps"] == 5
    assert losses(tmp_path) == losses(straight[1])[:5]


def test_a_record_that_does_not_fit(world, straight, tmp_path, monkeypatch):
    def flush(self):
        with disk_full_as_error(self.path):
            self._stream.write('{"step": 5, "lo')
            self._stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match=r"metrics\.jsonl: free some"):
        patch.setattr("pipelines.training.record.StepRecord.flush", flush)
        run_stage(train_settings(world, tmp_path, max_steps=5), 4)
    run_stage(train_settings(world, tmp_path, max_steps=5), 4)
    assert losses(tmp_path) == losses(straight[1])[:5]


def test_plots_are_written_whole_or_not_at_all(straight, tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    loss_curve(straight[1] / "metrics.jsonl", path, get_stage("mini", 4), "mini")
    before = path.read_bytes()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AtomicFile, "write", write)
    with pytest.raises(DiskFullError, match=r"loss\.png"):
        loss_curve(straight[1] / "metrics.jsonl", path, get_stage("mini", 4), "mini")
    assert path.read_bytes() == before and not leftovers(tmp_path)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(OSError, match="Input/output"), disk_full_as_error("x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
