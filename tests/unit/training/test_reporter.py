"""What rank 0 reports: numbers of the record and the tracker, rates, and mean losses of the states."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from pipelines.data.loader import CutCount, StepBatch
from pipelines.miniature.tiny_training import train_settings
from pipelines.storage import WorkFolder
from pipelines.tracking.identity import RunIdentity
from pipelines.training import reporter as reporter_module
from pipelines.training.held_out import HeldOutShare
from pipelines.training.held_out_record import HeldOutHistory, read_evaluations
from pipelines.training.job import resolve_job
from pipelines.training.record import HELD_OUT_FILE
from pipelines.training.reporter import Reporter
from pipelines.training.sample_predictions import SamplePredictor
from tests.training_batches import make_sample
from tinygptv.data.collate import collate
from tinygptv.data.prompt_layout import Exchange
from tinygptv.training.train_step import StepResult


class FakeTracker:
    """Keeps what it is told."""

    def __init__(self):
        self.values, self.tagged, self.tables, self.images, self.closed = [], {}, [], [], []

    def metrics(self, values, step):
        self.values.append((step, values))

    def tags(self, values):
        self.tagged |= values

    def table(self, rows, name):
        self.tables.append((name, rows))

    def image(self, image, key, step):
        self.images.append((key, step))

    def keep(self):
        pass

    def close(self, status="FINISHED"):
        self.closed.append(status)


@pytest.fixture
def job(world, tmp_path):
    found, _ = resolve_job(train_settings(world, tmp_path), 4)
    return replace(found, run=RunIdentity())


@pytest.fixture
def made(job, monkeypatch):
    """Makes reporters that share one tracker; time stands still until it is moved."""
    tracker, clock = FakeTracker(), [100.0]
    monkeypatch.setattr(reporter_module, "open_tracker", lambda *a, **k: tracker)
    monkeypatch.setattr(reporter_module.time, "perf_counter", lambda: clock[0])
    return lambda next_step=0, world_size=1: (
        Reporter(job, WorkFolder(job.storage), next_step, world_size),
        tracker,
        clock,
    )


def step_batch(step, answers=(3, 5), wait_s=0.0):
    batch = collate([make_sample(length) for length in answers], 0)
    return StepBatch(step, [batch], [f"pairs/p{i}" for i in range(len(answers))], {}, wait_s)


def result(loss, *, grad_norm=0.5, skipped=0.0, reduce_s=0.0, sums=(6.0, 0.0), tokens=(3.0, 0.0)):
    return StepResult(
        torch.tensor(loss, dtype=torch.float64),
        torch.tensor(sums, dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.float64),
        torch.tensor(grad_norm),
        torch.tensor(skipped),
        torch.tensor(bool(skipped)),
        reduce_s,
    )


def record(job):
    from pathlib import Path

    return [json.loads(line) for line in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]


def test_each_step_reaches_record_and_tracker_with_its_own_numbers(job, made):
    reporter, tracker, _ = made()
    for step, loss in enumerate((2.5, 2.25, math.nan)):
        reporter.add(step_batch(step), result(loss, skipped=float(math.isnan(loss))), 1e-3 * (step + 1))
    assert tracker.values == [], "nothing is read before it is asked for"
    reporter.write_pending({"lora": 0.25})
    reporter.flush()
    first, second, third = record(job)
    assert (first["step"], first["loss"], first["loss_hex"], first["lr"]) == (0, 2.5, (2.5).hex(), 1e-3)
    assert first["grad_norm"] == 0.5 and first["skipped"] is False and first["sample_ids"] == ["pairs/p0", "pairs/p1"]
    assert "part_norms" not in first and "part_norms" not in second and third["part_norms"] == {"lora": 0.25}
    assert third["loss"] is None and third["skipped"] is True and third["loss_hex"] == "nan"
    assert [step for step, _ in tracker.values] == [0, 1, 2]
    values = dict(tracker.values)
    assert values[0] == {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "loss/pairs": 2.0}, "no tokens, no loss of a source"
    assert values[2]["skipped"] == 1.0 and values[2]["norms/lora"] == 0.25 and "samples_per_second" in values[2]
    reporter.write_pending({"lora": 1.0})
    assert len(tracker.values) == 3, "each step is reported once"


def test_rates_are_those_since_the_last_report(made):
    reporter, tracker, clock = made(world_size=2)
    real = step_batch(0).micro_batches[0].num_real
    reporter.add(step_batch(0, wait_s=1.0), result(2.0, reduce_s=0.5), 1e-3)
    reporter.add(step_batch(1, wait_s=1.0), result(2.0, reduce_s=0.25), 1e-3)
    clock[0] += 4.0
    reporter.write_pending({})
    rates = tracker.values[1][1]
    assert rates["samples_per_second"] == pytest.approx(4 / 4.0)
    assert rates["tokens_per_second"] == pytest.approx(2 * 2 * real / 4.0), "of both workers"
    assert rates["data_wait_share"] == pytest.approx(2.0 / 4.0)
    assert rates["reduce_share"] == pytest.approx(0.75 / 4.0)
    assert 0.05 < rates["system/memory_gb"] < 100
    reporter.add(step_batch(2, wait_s=9.0), result(2.0, reduce_s=7.0), 1e-3)
    clock[0] += 2.0
    reporter.write_pending({})
    rates = tracker.values[2][1]
    assert rates["samples_per_second"] == pytest.approx(2 / 2.0) and rates["data_wait_share"] == 1.0
    assert rates["reduce_share"] == 1.0


def test_the_progress_line_is_of_the_newest_step(job, made, monkeypatch):
    reporter, tracker, clock = made(next_step=2)
    monkeypatch.setattr("pipelines.progress.time.perf_counter", lambda: clock[0])
    reporter.progress.began = 100.0
    for step, loss in ((2, 3.0), (3, 2.5)):
        reporter.add(step_batch(step, wait_s=0.5), result(loss), 1e-3 * step)
    clock[0] += 4.0
    reporter.write_pending({})
    line = reporter.progress_file.read_text()
    assert line.startswith(f"stage 4 ({job.stage.title}): step 4/12  loss 2.500  lr 3.00e-03  1.0 samples/s")
    assert "data wait 25%" in line and line.endswith("left 0:16"), "2 s a step, 8 steps"
    assert len(tracker.values) == 2


def test_a_loss_of_zero_is_a_loss(made):
    reporter, tracker, _ = made()
    reporter.add(step_batch(0), result(0.0, sums=(0.0, 3.0), tokens=(2.0, 2.0)), 1e-3)
    reporter.write_pending({})
    values = tracker.values[0][1]
    assert (values["loss/pairs"], values["loss/questions"]) == (0.0, 1.5)


def test_evaluations_are_told_and_cost_no_rate(job, made, caplog):
    from pathlib import Path

    caplog.set_level("INFO")
    reporter, tracker, clock = made()
    history = HeldOutHistory()
    for step, total in ((0, 6.0), (4, 2.0), (8, 4.0)):
        clock[0] += 100.0
        found = history.add(step, [HeldOutShare({"pairs": (total, 2)}, {"questions": (1.0, 4)})])
        reporter.evaluation(found, history)
    line = reporter.progress_file.read_text()
    assert line == f"{reporter.progress.title}: held-out loss 2.000 after step 8 (least 1.0000 after step 4)"
    reporter.add(step_batch(0), result(2.0), 1e-3)
    clock[0] += 2.0
    reporter.write_pending({})
    assert tracker.values[-1][1]["samples_per_second"] == 1.0, "two samples in 2 s"
    told = [(step, values) for step, values in tracker.values if "loss/held_out" in values]
    assert told[1] == (4, {"loss/held_out": 1.0, "loss/held_out/pairs": 1.0, "score/held_out/questions": 25.0})
    lines = [record.getMessage() for record in caplog.records if "held-out loss" in record.getMessage()]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert lines[1].endswith("after step 4: 1.0000 (the least so far), questions 25.0%")
    assert lines[2].endswith("after step 8: 2.0000 (least 1.0000 after step 4), questions 25.0%")
    path = Path(job.output) / HELD_OUT_FILE
    assert [each["step"] for each in read_evaluations(path)] == [0, 4, 8]
    for step, rows, warned in ((12, "a", 0), (16, "a", 0), (20, "b", 1), (24, "b", 0)):
        caplog.clear()
        resumed = HeldOutHistory(read_evaluations(path), rows)
        reporter.evaluation(resumed.add(step, [HeldOutShare({"pairs": (4.0, 2)}, {})]), resumed)
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == warned and all("held-out rows from step 20 on are others" in each for each in told)
    assert [each.get("rows") for each in read_evaluations(path)] == [None, None, None, "a", "a", "b", "b"]
    reporter.rewind_held_out(HeldOutHistory(history.evaluations[:1]))
    assert [each["step"] for each in read_evaluations(path)] == [0]
    reporter.rewind_held_out(HeldOutHistory())
    assert read_evaluations(path) == [], "what will be done again is gone"
    path.unlink()
    reporter.rewind_held_out(HeldOutHistory())
    assert not path.exists(), "a run without evaluations has no file"


def test_a_states_mean_loss_covers_the_steps_since_the_one_before(made):
    reporter, _, _ = made()
    for step, loss in enumerate((4.0, 2.0, math.nan)):
        reporter.add(step_batch(step), result(loss), 1e-3)
    reporter.write_pending({})
    assert reporter.flush() == 3.0
    assert reporter.flush() == math.inf
    reporter.add(step_batch(3), result(1.0), 1e-3)
    reporter.write_pending({})
    assert reporter.flush() == 1.0


def test_a_roll_back_takes_back_record_and_losses(job, made):
    reporter, _, _ = made()
    for step in range(4):
        reporter.add(step_batch(step), result(2.0 + step), 1e-3)
    reporter.write_pending({})
    reporter.add(step_batch(4), result(9.0), 1e-3)
    reporter.rewind(2)
    assert [entry["step"] for entry in record(job)] == [0, 1] and reporter.pending == []
    reporter.add(step_batch(2), result(1.0), 1e-3)
    reporter.write_pending({})
    assert reporter.flush() == 1.0
    assert [entry["loss"] for entry in record(job)] == [2.0, 3.0, 1.0]


def test_steps_that_are_left_out_have_no_loss(job, made):
    reporter, _, _ = made()
    reporter.add_skipped(step_batch(0), 1e-3)
    reporter.write_pending({})
    assert reporter.flush() == math.inf
    (entry,) = record(job)
    assert entry["skipped"] is True and entry["loss"] is None and entry["loss_hex"] == "nan"


@pytest.mark.parametrize(("steps", "early"), [(12, False), (8, True)])
def test_the_end_names_first_and_last_loss_and_what_was_cut(made, steps, early):
    reporter, tracker, _ = made()
    for step, loss in enumerate((4.0, 2.0)):
        reporter.add(step_batch(step), result(loss), 1e-3)
    reporter.write_pending({})
    found = reporter.finish("/here", {"pairs": CutCount(10, 2, 0), "questions": CutCount(10, 0, 3)}, steps, None)
    assert (found.checkpoint, found.first_loss, found.last_loss, found.steps) == ("/here", 4.0, 2.0, steps)
    assert found.stopped_early is early
    assert [name for name in tracker.tagged if name.startswith("cut.")] == ["cut.pairs"]
    assert "2 of 10 samples" in tracker.tagged["cut.pairs"]
    assert tracker.closed == ["FINISHED"]


def test_an_end_before_the_end_is_a_failed_run(made):
    reporter, tracker, _ = made()
    reporter.abort()
    assert tracker.closed == ["FAILED"]


# ---------------------------------------------------------------------- sample predictions


@pytest.fixture(scope="module")
def worker(world, tmp_path_factory):
    from pipelines.training.run_reports import NoReports
    from pipelines.training.worker import TrainWorker

    found, _ = resolve_job(train_settings(world, tmp_path_factory.mktemp("worker")), 4)
    return TrainWorker(found, NoReports())


def test_the_same_samples_are_answered_each_time(worker, monkeypatch):
    from pipelines.data.loader import BatchMaker

    predictor, worded = SamplePredictor(BatchMaker(worker.plan)), []
    generator = type(predictor.maker.mixture).generator
    monkeypatch.setattr(
        type(predictor.maker.mixture), "generator", lambda self, ref: worded.append(ref) or generator(self, ref)
    )
    worker.model.train()
    answers = predictor.predict(worker.model)
    assert [answer.sample for answer in answers] == ["pairs/p0", "questions/q0", "pairs/p1", "questions/q1"]
    assert worded == predictor.refs, "each is worded as its own row is in training"
    assert worker.model.training and worker.model.language_model.training
    assert all(answer.image is not None for answer in answers)
    assert answers[1].question == "[vqa] what?" or answers[1].question.endswith("what?")
    assert answers[1].expected in (*predictor.maker.shards["questions"].row(0).turns[0].answers,)
    assert predictor.predict(worker.model) == answers
    processor = worker.processor
    chosen = answers[1]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": chosen.question}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor(text=prompt, images=[chosen.image], return_tensors="pt")
    with torch.no_grad():
        worker.model.eval()
        output = worker.model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chosen.answer == processor.layout().template.cut_answer(text)


def test_two_rows_of_a_source_are_asked_and_four_in_all(worker, monkeypatch):
    from pipelines.data.loader import BatchMaker

    maker = BatchMaker(worker.plan)
    asked = [(ref.source, ref.row) for ref in SamplePredictor(maker).refs]
    assert asked == [(0, 0), (1, 0), (0, 1), (1, 1)]
    monkeypatch.setattr(maker, "names", ["pairs"])
    assert [ref.row for ref in SamplePredictor(maker).refs] == [0, 1]


def test_the_true_answer_is_not_in_the_prompt(worker, monkeypatch):
    from pipelines.data.loader import BatchMaker

    predictor, asked = SamplePredictor(BatchMaker(worker.plan)), []

    def generate(self, input_ids, **_):
        asked.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(type(worker.model), "generate", generate)
    answers = predictor.predict(worker.model)
    layout = predictor.maker.encoder.layout
    for answer, ids in zip(answers, asked, strict=True):
        assert ids == layout.encode_prompt([Exchange(answer.question or None, None, 1)])
        assert answer.expected and answer.answer == ""


def test_predictions_are_logged_once_per_step_and_never_stop_training(job, made, worker, monkeypatch, caplog):
    from pathlib import Path

    reporter, tracker, clock = made()
    reporter.predictions(worker.model, 5)
    written = Path(job.output) / "predictions/step_000006.json"
    assert [row["sample"] for row in json.loads(written.read_text())] == [row["sample"] for row in tracker.tables[0][1]]
    assert tracker.tables[0][0] == "predictions/step_000006"
    assert tracker.images == [(f"predictions/{number}", 5) for number in range(4)]
    reporter.predictions(worker.model, 5)
    assert len(tracker.tables) == 1, "a step that is done again is not asked again"

    def slow(self, model):
        clock[0] += 100.0
        return []

    with monkeypatch.context() as patch:
        patch.setattr(SamplePredictor, "predict", slow)
        reporter.predictions(worker.model, 6)
    reporter.add(step_batch(7), result(2.0), 1e-3)
    clock[0] += 2.0
    reporter.write_pending({})
    assert tracker.values[-1][1]["samples_per_second"] == 1.0, "two samples in 2 s: what is looked at is no training"

    def broken(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(SamplePredictor, "predict", broken)
    reporter.predictions(worker.model, 8)
    assert "no sample predictions at step 9" in caplog.text and len(tracker.tables) == 2
    assert "RuntimeError: no memory" in caplog.text and caplog.records[-1].levelname == "ERROR"
