"""What a reporter opens, says and leaves open; and a stage's result on its way to its file."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.data.loader import CutCount, StepBatch
from pipelines.progress import PROGRESS_FILE
from pipelines.settings import TrainSettings
from pipelines.storage import DiskFullError, WorkFolder
from pipelines.tracking.base import NullTracker
from pipelines.tracking.identity import RunIdentity
from pipelines.training import reporter as module
from pipelines.training import sample_predictions as predictions
from pipelines.training.job import TrainJob
from pipelines.training.reporter import Reporter
from pipelines.training.result import WorkerResult, cut_sentence, read_result, write_result
from pipelines.training.sample_predictions import SampleAnswer
from tinygptv.training.stages import get_stage
from tinygptv.training.train_step import StepResult

STAGE = get_stage("mini", 4)
RUN = RunIdentity(run_id="r")
TITLE = f"stage 4 ({STAGE.title})"


class Tracker:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *values: self.told.append((name, *values))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A reporter of a tracked run; time stands still until it is moved."""
    tracker, clock, opened = Tracker(), [100.0], []
    monkeypatch.setattr(module, "open_tracker", lambda *a, **k: opened.append((*a, k)) or tracker)
    monkeypatch.setattr(module, "hardware_tags", lambda size: {"workers": str(size)})
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.psutil, "cpu_percent", lambda: 50.0)

    def make(run=RUN, next_step=0):
        job = TrainJob(TrainSettings(output=str(tmp_path)), STAGE, "plan", 12, str(tmp_path), run)
        reporter = Reporter(job, WorkFolder(str(tmp_path)), next_step, 3)
        reporter.shown = []
        reporter.work.publish_soon = reporter.shown.append
        return SimpleNamespace(reporter=reporter, tracker=tracker, clock=clock, opened=opened, job=job, folder=tmp_path)

    return make


def result(loss=2.0):
    zeros, nan = torch.zeros(len(STAGE.sources)), torch.tensor(0.5)
    return StepResult(torch.tensor(loss).double(), zeros, zeros, nan, torch.tensor(0.0), torch.tensor(False), 0.0)


def shown(made):
    return (made.folder / PROGRESS_FILE).read_text()


def test_the_run_of_the_job_is_continued_with_a_journal_beside_the_record(made):
    one = made(next_step=4)
    assert one.opened == [(one.job.settings, one.job.title, {"identity": one.job.run, "journal": one.folder})]
    assert one.tracker.told == [("tags", {"workers": "3"})]
    progress = one.reporter.progress
    assert (progress.title, progress.start, progress.stop) == (TITLE, 4, 12)
    assert one.reporter.path == one.folder / "metrics.jsonl" and one.reporter.path.exists()
    untracked = made(run=None)
    assert len(untracked.opened) == 1 and isinstance(untracked.reporter.tracker, NullTracker)


def test_the_record_is_cut_back_to_the_next_step(made):
    one = made()
    (one.folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k, "loss": 9.0 - k}) + "\n" for k in range(5))
    )
    assert made(next_step=2).reporter.last_loss == 8.0


def test_compiling_is_told_and_takes_no_time_of_the_steps(made, caplog):
    caplog.set_level("INFO")
    one = made()
    one.reporter.compiling()
    assert shown(one) == f"{TITLE}: compiling the layers in the first step"
    one.clock[0] += 41.6
    one.reporter.compiled()
    assert shown(one) == f"{TITLE}: layers compiled in 42 s"
    assert caplog.messages == ["the first step took 41.6 s, in which the layers were compiled"]
    assert one.reporter.clock == one.reporter.progress.began == 141.6
    assert one.reporter.shown == [PROGRESS_FILE] * 2
    one.clock[0] += 10
    one.reporter.compiling()
    assert one.reporter.clock == 151.6, "loading data before it is no part of it"


@pytest.mark.parametrize("fails", [False, True])
def test_samples_are_answered_uncompiled_and_without_gradients_and_training_goes_on(monkeypatch, fails):
    """Each has a length of its own: layers would be compiled again for every one."""
    notes = []

    @contextlib.contextmanager
    def run_eagerly():
        notes.append("eager")
        yield
        notes.append("compiled")

    def answer(self, model, ref):
        notes.append((ref, torch.is_grad_enabled()))
        return 1 / 0 if fails else f"answer to {ref}"

    monkeypatch.setattr(predictions, "run_eagerly", run_eagerly)
    monkeypatch.setattr(predictions.SamplePredictor, "_predict", answer)
    predictor = object.__new__(predictions.SamplePredictor)
    predictor.refs = ["a", "b"]
    model = SimpleNamespace(eval=lambda: notes.append("eval"), train=lambda: notes.append("train"))
    if fails:
        with pytest.raises(ZeroDivisionError):
            predictor.predict(model)
        assert notes == ["eval", "eager", ("a", False), "train"]
    else:
        assert predictor.predict(model) == ["answer to a", "answer to b"]
        assert notes == ["eval", "eager", ("a", False), ("b", False), "compiled", "train"]


def test_a_line_that_cannot_be_shown_stops_nothing(made):
    one = made()
    (one.folder / PROGRESS_FILE).mkdir()
    one.reporter.compiling()
    assert one.reporter.shown == []


def test_numbers_of_the_machine_have_their_units(made, monkeypatch):
    one = made()
    monkeypatch.setattr(module.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3e9)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    for initialized, gpu in ((False, {}), (True, {"system/gpu_memory_gb": 5.0})):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        one.reporter.add(StepBatch(0, [], ["a/1"], {}, 9.0), result(), 1e-3)
        one.clock[0] += 2.0
        assert one.reporter._rates() == {
            "tokens_per_second": 0.0,
            "samples_per_second": 0.5,
            "data_wait_share": 1.0,
            "reduce_share": 0.0,
            "system/memory_gb": 3.0,
            "system/cpu_percent": 50.0,
            **gpu,
        }
        one.reporter.pending.clear()


def test_a_step_that_is_left_out_has_its_rate_and_its_samples_and_no_tokens(made):
    one = made()
    one.reporter.add_skipped(StepBatch(3, [], ["a/1"], {}), 0.25)
    (step,) = one.reporter.pending
    assert (step.batch.step, step.learning_rate, bool(step.result.skipped)) == (3, 0.25, True)
    assert len(step.result.source_tokens) == len(STAGE.sources) and not step.result.source_tokens.any()
    assert (
        math.isnan(step.result.loss) and math.isnan(step.result.grad_norm) and step.result.rejected.dtype == torch.bool
    )
    one.reporter.write_pending({})
    (_, values, number) = one.tracker.told[-1]
    assert number == 3 and values["skipped"] == 1.0 and values["lr"] == 0.25
    assert not [name for name in values if name.startswith("loss/")], "no source has a loss"


class Predictor:
    made = 0

    def __init__(self, maker):
        type(self).made += 1
        self.maker = maker

    def predict(self, model):
        from PIL import Image

        picture = Image.new("RGB", (2, 2))
        return [SampleAnswer("a/1", picture, "q", "x", "y"), SampleAnswer("b/2", None, "r", "z", "z")]


def test_predictions_are_shown_with_their_images_and_take_no_time_of_the_steps(made, monkeypatch):
    monkeypatch.setattr(module, "SamplePredictor", Predictor)
    monkeypatch.setattr(module, "BatchMaker", lambda plan: plan)
    monkeypatch.setattr(Predictor, "made", 0)
    one = made()
    one.clock[0] += 50
    for step in (4, 9):
        one.reporter.predictions("model", step)
    told = one.tracker.told[1:]
    assert [(each[0], each[-1]) for each in told] == [
        ("table", "predictions/step_000005"),
        ("image", 4),
        ("table", "predictions/step_000010"),
        ("image", 9),
    ]
    assert told[1][2] == "predictions/0" and told[0][1][1] == vars(Predictor("").predict("")[1])
    assert one.reporter._predictor.maker == "plan" and Predictor.made == 2, "one of the reporter's, one of this test"
    assert one.reporter.clock == 150.0
    rows = json.loads((one.folder / "predictions/step_000005.json").read_text())
    assert rows[0] == {"sample": "a/1", "image": None, "question": "q", "answer": "x", "expected": "y"}


def test_without_a_tracker_nothing_is_predicted(made, monkeypatch):
    monkeypatch.setattr(module, "SamplePredictor", lambda maker: pytest.fail("nobody would look at it"))
    one = made(run=None)
    one.reporter.predictions("model", 4)
    assert not (one.folder / "predictions").exists()


def test_the_record_reaches_the_file_when_it_is_flushed(made):
    one = made()
    one.reporter.add(StepBatch(0, [], [], {}), result(2.5), 1e-3)
    one.reporter.write_pending({})
    assert one.reporter.path.read_text() == "" and one.reporter.last_loss == 2.5
    assert one.reporter.flush() == 2.5
    assert len(one.reporter.path.read_text().splitlines()) == 1
    assert one.tracker.told[-1] == ("keep",), "what the tracker has not sent is on disk, too, before a state is saved"


@pytest.mark.parametrize("error", [OSError("gone"), DiskFullError("full")])
def test_an_abort_closes_the_tracker_whatever_the_disk_says(made, monkeypatch, error):
    one = made()

    def close():
        raise error

    monkeypatch.setattr(one.reporter.record, "close", close)
    one.reporter.abort()
    assert one.tracker.told[-1] == ("close", "FAILED")


def test_the_end_closes_the_record_before_the_tracker(made):
    one = made()
    one.reporter.add(StepBatch(0, [], [], {}), result(2.5), 1e-3)
    one.reporter.write_pending({})
    found = one.reporter.finish("/here", {"a": CutCount(4, 0, 1)}, 12, {"first": 1.0})
    assert len(one.reporter.path.read_text().splitlines()) == 1
    assert one.tracker.told[-2:] == [("tags", {}), ("close",)]
    assert found == WorkerResult("/here", 2.5, 2.5, 12, {"a": CutCount(4, 0, 1)}, {"first": 1.0}, False)


# ---------------------------------------------------------------------- results


HELD = {"first": 3.0, "last": 2.0, "best": 1.5, "best_step": 4, "checkpoint_step": 4, "rows": {"q": 2}, "scores": {}}


@pytest.mark.parametrize(
    "found",
    [
        WorkerResult("/here", 3.0, 2.0, 12),
        WorkerResult("/here", 3.0, 2.0, 8, {"a": CutCount(9, 2, 1), "b": CutCount(1)}, HELD, True),
    ],
)
def test_a_result_comes_back_from_files_whole(tmp_path, found):
    assert WorkerResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    stage = found.to_stage_result(str(tmp_path / "result.json"), 12.34)
    assert stage["seconds"] == 12.3 and stage["stopped_early"] is found.stopped_early
    write_result(tmp_path, stage)
    assert read_result(tmp_path) == stage
    assert (stage["first_loss"], stage["last_loss"], stage["held_out"]) == (3.0, 2.0, found.held_out)
    assert stage["cut"] == {name: vars(count) for name, count in found.cut.items()}


def test_results_of_earlier_versions_are_read():
    old = {"checkpoint": "/here", "first_loss": None, "last_loss": 2.0, "steps": 12}
    found = WorkerResult.from_dict(old)
    assert math.isnan(found.first_loss) and found.last_loss == 2.0
    assert (found.cut, found.held_out, found.stopped_early) == ({}, None, False)


def test_what_was_cut_is_told_by_source_and_setting():
    assert cut_sentence("gqa", CutCount(12_345, 2_000, 7)) == (
        "gqa: the first question of 2,000 of 12,345 samples was longer than stage.limits.max_context_tokens, and "
        "its end was cut"
    )


def test_a_damaged_result_is_none(tmp_path):
    for text in (
        "",
        "[]",
        "{",
        '{"checkpoint": 1, "cut": 3, "first_loss": 1, "last_loss": 1, "steps": 1, "seconds": 1}',
    ):
        Path(tmp_path, "result.json").write_text(text)
        assert read_result(tmp_path) is None
