"""Failures of workers are told, and those of the training itself do not repeat for ever; there is no cluster here."""

from __future__ import annotations

import logging

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines import storage
from pipelines.training.guard import TrainingStopped
from pipelines.training.worker_failures import FAILURES_FILE, WorkerFailures, cause_of, told_failures

LOST = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())
BROKEN = RuntimeError("CUDA out of memory\nat http://me:secret@host/x")


def test_each_failure_is_written_down_and_told(tmp_path, caplog):
    (tmp_path / FAILURES_FILE).write_text("of an earlier run\n")
    with caplog.at_level(logging.WARNING), told_failures(str(tmp_path)):
        failures = WorkerFailures(str(tmp_path))
        failures.after_exception(None, {1: LOST, 0: BROKEN})
        failures.after_exception(None, {2: BROKEN, 3: BROKEN})
    again = "; the workers start again from the newest training state"
    assert caplog.messages == [
        f"worker 1 was lost{again}",
        f"worker 2 failed: RuntimeError: CUDA out of memory at http://***@host/x{again}",
    ]


def test_the_last_failure_is_not_said_to_be_followed_by_a_start(tmp_path):
    failures = WorkerFailures(str(tmp_path), 1)
    for _ in range(2):
        failures.after_exception(None, {0: RuntimeError("bad.")})
    lines = (tmp_path / FAILURES_FILE).read_text().splitlines()
    what = "worker 0 failed: RuntimeError: bad; the workers"
    assert lines == [f"{what} start again from the newest training state", f"{what} end"]
    with pytest.raises(ValueError, match=r"^training ended, because worker 3 was lost, and .* of max_failures=0 are"):
        WorkerFailures(str(tmp_path), 0).after_exception(None, {3: LOST})


def test_own_errors_end_a_run_that_gets_no_further(tmp_path):
    failures = WorkerFailures(str(tmp_path))
    for _ in range(20):
        failures.after_exception(None, {0: LOST})  # machines may be lost without end
    for step in (20, 40):
        for _ in range(4):
            failures.after_exception(None, {0: BROKEN})
        failures.after_report(None, [{"next_step": step}, {"next_step": step}], None)
    for _ in range(4):
        failures.after_exception(None, {0: BROKEN})
        failures.after_report(None, [{"next_step": 40}], None)  # the same steps, done again
    with pytest.raises(ValueError, match=r"^training ended, because 5 starts .*: worker 0 failed: RuntimeError: CUDA"):
        failures.after_exception(None, {0: BROKEN})


def test_a_full_disk_does_not_hide_the_failure(tmp_path, monkeypatch):
    def full(*_):
        raise storage.DiskFullError("full")

    monkeypatch.setattr(storage, "write_atomically", full)
    WorkerFailures(str(tmp_path)).after_exception(None, {0: BROKEN})


class RunError(Exception):
    """As Ray Train raises it: with its workers' failures, or its controller's."""

    def __init__(self, **failures):
        super().__init__("training failed")
        vars(self).update(failures)


def _caused(error, cause):
    error.__cause__ = cause
    return error


WRAPPED = RuntimeError("task failed")
WRAPPED._base_exc = ValueError("a wrong setting")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError(worker_failures={0: BROKEN, 1: _caused(RuntimeError("x"), ValueError("why"))}), "why"),
        (RunError(worker_failures={0: WRAPPED, 1: ValueError("second")}), "a wrong setting"),
        (RunError(controller_failure=_caused(RuntimeError("x"), ValueError("ended"))), "ended"),
        (RayActorError(), "the process that leads the training was lost, perhaps with its node (The actor "),
    ],
)
def test_why_a_run_ended_is_one_sentence(error, told):
    found = cause_of(error)
    assert isinstance(found, TrainingStopped) and str(found).startswith(told)


@pytest.mark.parametrize("failures", [{"worker_failures": {0: BROKEN}}, {"controller_failure": BROKEN}, {}])
def test_an_end_without_a_known_cause_stays_rays_own_error(failures):
    error = RunError(**failures)
    assert cause_of(error) is error
    assert error.__notes__[0].startswith("The same command resumes from the newest training state.")
