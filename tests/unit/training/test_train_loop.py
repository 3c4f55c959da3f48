"""From the first step to the result, or to an error that leaves everything closed."""

from __future__ import annotations

import pytest

from pipelines.storage import DiskFullError
from pipelines.training import worker as worker_module
from pipelines.training.record import WORKER_FILES
from pipelines.training.run_reports import NoReports
from pipelines.training.worker import train_loop
from tests.scripted_worker import Reports, Scripted


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Make the loop's worker a scripted one, which resumes at step 2 and trains as the script says."""

    def begin(*trained, **changes):
        worker = Scripted(tmp_path, **changes)
        worker.held_out, worker.starts, script = None, [], iter(trained)

        def train(start):
            worker.starts.append(start)
            found = next(script)
            if isinstance(found, BaseException):
                raise found
            return found

        def build(job, reports):
            worker.reports = reports
            return worker

        monkeypatch.setattr(worker, "resume", lambda: 2)
        monkeypatch.setattr(worker, "train", train)
        monkeypatch.setattr(worker, "_save_checkpoint", lambda: worker.notes.append("checkpoint") or "/here")
        monkeypatch.setattr(worker_module, "TrainWorker", build)
        return worker

    return begin


ABORTED = ["wait", ("abort",), ("publish", *WORKER_FILES)]


def test_steps_are_trained_from_the_newest_state_to_the_end_and_again_after_a_roll_back(begun):
    worker = begun(4, 10)
    worker.end = 10
    assert train_loop(worker.job) == 2.5, "what the reporter gives"
    assert worker.starts == [2, 4] and isinstance(worker.reports, NoReports)
    assert worker.notes == [
        "wait",
        ("flush",),
        "checkpoint",
        ("finish", "/here", {}, 10, None),
        ("publish", *WORKER_FILES),
    ]


def test_a_run_that_has_all_its_steps_only_writes_its_end(begun):
    worker, reports = begun(), Reports()
    worker.end = 2
    train_loop(worker.job, reports)
    assert worker.starts == [] and worker.reports is reports and "checkpoint" in worker.notes


@pytest.mark.parametrize("error", [ValueError("why"), KeyboardInterrupt()])
def test_an_error_closes_everything_and_stays_the_one_that_is_told(begun, error):
    worker = begun(4, error)
    with pytest.raises(type(error)) as caught:
        train_loop(worker.job)
    assert caught.value is error and worker.notes == ABORTED


def test_an_error_while_it_resumes_closes_everything_too(begun, monkeypatch):
    worker = begun()
    monkeypatch.setattr(worker, "resume", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_loop(worker.job)
    assert worker.notes == ABORTED


@pytest.mark.parametrize("failure", [OSError("the disk is gone"), DiskFullError("no space left")])
def test_a_state_that_could_not_be_written_hides_no_other_error(begun, monkeypatch, caplog, failure):
    worker = begun(ValueError("why"))

    def wait():
        raise failure

    monkeypatch.setattr(worker.store, "wait", wait)
    with pytest.raises(ValueError, match="why"):
        train_loop(worker.job)
    assert worker.notes == ABORTED[1:]
    assert caplog.messages == [f"the newest training state was not written: {failure}"]


def test_an_end_that_cannot_be_written_is_an_error_like_others(begun, monkeypatch):
    worker = begun(10)

    def save():
        raise DiskFullError("no space left")

    monkeypatch.setattr(worker, "_save_checkpoint", save)
    with pytest.raises(DiskFullError):
        train_loop(worker.job)
    assert worker.notes == ["wait", ("flush",), *ABORTED]


def test_what_is_closed_is_not_closed_again(begun, monkeypatch):
    """The tracker's run was ended, and its files are in the bucket or will be."""
    worker = begun(10)

    def publish(*names):
        raise OSError("no connection")

    monkeypatch.setattr(worker.work, "publish", publish)
    with pytest.raises(OSError, match="no connection"):
        train_loop(worker.job)
    assert [note[0] for note in worker.notes if isinstance(note, tuple)] == ["flush", "finish"]


def test_other_ranks_have_no_result_and_nothing_to_close(begun):
    worker = begun(10, rank=1)
    assert train_loop(worker.job) is None and worker.notes == []
