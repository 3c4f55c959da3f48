"""The worker's bookkeeping: what is read, evaluated, saved and told at which step. Nothing is computed here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from pipelines.data.loader import BatchMaker, CutCount, StepBatch
from pipelines.miniature.tiny_training import train_settings
from pipelines.tracking.identity import RunIdentity
from pipelines.training import worker as worker_module
from pipelines.training.guard import Diagnosis, Fault, TrainingStopped
from pipelines.training.held_out import HeldOutShare
from pipelines.training.job import resolve_job
from pipelines.training.record import WORKER_FILES
from pipelines.training.run_reports import NoReports
from pipelines.training.worker import TrainWorker, _dropout_seed
from tests.scripted_worker import STAGE, TENSORS, Reporter, Reports, Scripted


@pytest.fixture
def steps(monkeypatch):
    """Batches without samples, one for each step, and states without tensors."""
    monkeypatch.setattr(worker_module, "collect_state", lambda step: ({}, {"scaler": {}}))
    monkeypatch.setattr(
        worker_module,
        "iterate_steps",
        lambda plan, start, stop, **_: (StepBatch(k, [], [], {"q": CutCount(1)}) for k in range(start, stop)),
    )


def timeline(worker, monkeypatch, start=0):
    """What happens after how many steps, by kind."""
    found, done = {}, [start]

    def at(kind):
        return lambda *_, **__: found.setdefault(kind, []).append(done[0])

    original = worker._step
    monkeypatch.setattr(worker, "_step", lambda batch: (done.__setitem__(0, batch.step + 1), original(batch)))
    check, evaluate, save = worker._check_steps, worker._evaluate, worker._save_and_report
    monkeypatch.setattr(worker, "_check_steps", lambda: (at("read")(), check())[1])
    monkeypatch.setattr(worker, "_evaluate", lambda steps: (at("evaluate")(), evaluate(steps)))
    monkeypatch.setattr(worker, "_save_and_report", lambda *a, **k: (at("save")(), save(*a, **k)))
    worker.reporter.predictions = at("predict")
    found["end"] = worker.train(start)
    return found


FALLING = {step: 9.0 - step / 10 for step in range(20)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoint_every": 4}, {"read": [4, 8, 10], "save": [4, 8], "end": 10}),
        ({"checkpoint_every": 5}, {"read": [5, 10], "save": [5], "end": 10}),
        ({"checkpoint_every": 99, "log_every": 3}, {"read": [3, 6, 9, 10], "end": 10}),
        ({"checkpoint_every": 99, "predict_every": 4}, {"read": [10], "predict": [4, 8, 10], "end": 10}),
        (
            {"checkpoint_every": 4, "eval_fraction": 0.1, "losses": FALLING},
            {"read": [4, 8, 10], "evaluate": [4, 8, 10], "save": [4, 8], "end": 10},
        ),
        (
            {
                "checkpoint_every": 99,
                "eval_every": 3,
                "eval_fraction": 0.1,
                "losses": {3: 5.0, 6: 7.0, 9: 4.0, 10: 3.0},
            },
            {"read": [3, 6, 9, 10], "evaluate": [3, 6, 9, 10], "save": [3, 9], "end": 10},
        ),
        (
            {"checkpoint_every": 2, "eval_every": 2, "early_stop": 2, "eval_fraction": 0.1, "losses": {2: 5.0}},
            {"read": [2, 4, 6], "evaluate": [2, 4, 6], "save": [2, 4], "end": 6},
        ),
        (
            {"checkpoint_every": 99, "eval_every": 2, "early_stop": 2, "eval_fraction": 0.1, "losses": FALLING},
            {"read": [2, 4, 6, 8, 10], "evaluate": [2, 4, 6, 8, 10], "save": [2, 4, 6, 8], "end": 10},
        ),
        (
            {"checkpoint_every": 99, "log_every": 3, "reports": Reports(notice_at=2)},
            {"read": [3, 6, 9, 10], "save": [6], "end": 10},
        ),
    ],
)
def test_what_happens_at_which_step(steps, tmp_path, monkeypatch, changes, expected):
    """The last step is read and evaluated, and the checkpoint takes the place of its state."""
    changes = dict(changes)
    log_every, predict_every = changes.pop("log_every", 100), changes.pop("predict_every", 0)
    worker = Scripted(tmp_path, losses=changes.pop("losses", ()), reports=changes.pop("reports", None), **changes)
    update = {"log_every": log_every, "predict_every": predict_every}
    worker.job = replace(worker.job, settings=worker.job.settings.model_copy(update=update))
    if not worker.job.evaluates:
        worker.held_out = None
    assert timeline(worker, monkeypatch) == expected
    assert worker.cut == {"q": CutCount(expected["end"])}, "every sample is counted"


def test_training_continues_at_its_step(steps, tmp_path, monkeypatch):
    worker = Scripted(tmp_path, checkpoint_every=4)
    worker.held_out = None
    assert timeline(worker, monkeypatch, start=6) == {"read": [8, 10], "save": [8], "end": 10}


def test_a_notice_waits_for_its_state_and_other_saves_tell_the_one_before(steps, tmp_path):
    reports = Reports(notice_at=3)
    worker = Scripted(tmp_path, 14, checkpoint_every=4, reports=reports)
    worker.held_out = None
    worker.store.whole_step = 3
    worker.train(0)
    told = [(m["next_step"], m["saved_step"], m["loss"], location) for m, location in reports.told]
    assert told == [(4, 3, 1.5, "states/3"), (8, 3, 1.5, "states/3"), (12, 12, 1.5, "states/12")]


def test_other_ranks_report_without_a_location(steps, tmp_path):
    reports = Reports()
    worker = Scripted(tmp_path, 6, checkpoint_every=4, reports=reports, rank=1)
    worker.held_out = None
    worker.train(0)
    ((metrics, location),) = reports.told
    assert (
        metrics["next_step"] == 4 and math.isnan(metrics["loss"]) and location == "" and worker.notes.count("wait") == 0
    )
    assert worker.cut == {}, "rank 0 has counted them"


def test_a_notice_reaches_other_ranks_without_a_location(steps, tmp_path):
    reports = Reports(notice_at=1)
    worker = Scripted(tmp_path, 6, checkpoint_every=4, reports=reports, rank=1)
    worker.held_out = None
    worker.train(0)
    assert [(metrics["saved_step"], location) for metrics, location in reports.told] == [(4, "")]


def test_a_state_has_the_counts_of_all_workers(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "gather", lambda cut: [cut, {"q": CutCount(10, 1)}])
    worker = Scripted(tmp_path, 6, checkpoint_every=4)
    worker.held_out = None
    worker.train(0)
    assert worker.store.saved[4][1]["cut"] == {"q": {"samples": 14, "questions": 1, "answers": 0}}
    assert worker.cut == {"q": CutCount(26, 2)}, "others count again from zero"


def test_a_step_has_its_rate_and_its_seed(tmp_path):
    worker = Scripted(tmp_path, seed=7)
    batch = StepBatch(5, ["micro-batch"], [], {"q": CutCount(3, 1, 0)})
    worker.compiling = True
    worker._step(batch)
    rate = STAGE.schedule.learning_rate(5)
    assert worker.notes == [
        ("run", ["micro-batch"], rate, _dropout_seed(7, 5, 0)),
        ("add", batch, "result", rate),
        ("compiled",),
    ]
    assert [(step, result) for step, result in worker.guard._waiting] == [(5, "result")]
    worker.notes.clear()
    worker.left_out.add(5)
    worker._step(batch)
    assert worker.notes == [("add_skipped", batch, rate)]
    assert worker.cut == {"q": CutCount(6, 2, 0)}, "samples that are left out are counted, too"


@pytest.mark.parametrize(("guard", "watched"), [("off", 0), ("skip", 1)])
def test_the_guard_sees_the_steps_unless_it_is_off(tmp_path, guard, watched):
    worker = Scripted(tmp_path, guard=guard)
    worker._report(StepBatch(0, [], [], {}), None, 1e-3)
    assert len(worker.guard._waiting) == watched


# ---------------------------------------------------------------------- faults


def faulty(folder, monkeypatch, **changes):
    worker = Scripted(folder, **{"guard_patience": 2, **changes})
    monkeypatch.setattr(worker, "_diagnose", lambda fault: Diagnosis("layer", "forward", [f"a/{fault.step}"]))
    return worker


FAULTS = [Fault(step, "spike", 9.0, 0.5) for step in (3, 4, 5)]


def test_as_many_faults_as_the_patience_are_logged_and_none_is_lost(tmp_path, monkeypatch, caplog):
    worker = faulty(tmp_path, monkeypatch, guard="skip")
    assert worker._handle(FAULTS) is None and worker._handle(FAULTS[:1]) is None
    lines = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert [(line["step"], line["samples"], line["action"]) for line in lines] == [
        (step, [f"a/{step}"], "skip") for step in (3, 4, 3)
    ]
    assert caplog.messages == [
        f"guard (skip): step {step}: the loss jumps (loss 9, gradient norm 0.5), first in the forward of layer; "
        f"samples a/{step}"
        for step in (3, 4, 3)
    ]
    assert {key: lines[0][key] for key in ("kind", "loss", "grad_norm", "part", "layer", "where")} == {
        "kind": "spike",
        "loss": 9.0,
        "grad_norm": 0.5,
        "part": "",
        "layer": "layer",
        "where": "forward",
    }


@pytest.mark.parametrize(("in_a_row", "stops"), [(1, False), (2, True), (3, True)])
def test_training_stops_when_the_patience_is_used_up(tmp_path, monkeypatch, in_a_row, stops):
    worker = faulty(tmp_path, monkeypatch, guard="skip")
    worker.guard.faults_in_a_row = in_a_row
    if not stops:
        assert worker._handle(FAULTS[:1]) is None
        return
    with pytest.raises(TrainingStopped, match=rf"step 3: .*; {in_a_row} steps in a row failed"):
        worker._handle(FAULTS)


@pytest.fixture
def rolling(tmp_path, monkeypatch):
    worker = faulty(tmp_path, monkeypatch, guard="rollback")
    monkeypatch.setattr(worker, "_restore", lambda: worker.notes.append("restore") or 3)
    return worker


def test_a_roll_back_waits_for_the_state_in_writing_and_leaves_out_all_bad_steps(rolling):
    rolling.left_out = {1}
    assert rolling._handle(FAULTS[:2]) == 3
    assert rolling.notes == ["wait", "restore", ("rewind", 3), ("rewind_held_out", rolling.history)]
    assert rolling.left_out == {1, 3, 4}


def test_a_state_is_rolled_back_to_as_often_as_the_patience_says(rolling):
    assert [rolling._roll_back({step}) for step in (3, 4)] == [3, 3]
    with pytest.raises(TrainingStopped, match="rolled back to step 3 3 times"):
        rolling._roll_back({5})


def test_training_ends_where_it_is_rolled_back_to(steps, rolling, monkeypatch):
    rolling.held_out = None
    rolling.job = replace(rolling.job, settings=rolling.job.settings.model_copy(update={"checkpoint_every": 4}))
    rolling.faults = FAULTS[:1]
    assert timeline(rolling, monkeypatch) == {"read": [4], "end": 3}, "nothing is saved with a fault in it"


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize(("mean", "written"), [(2.5, 2.5), (math.inf, None)])
def test_a_state_has_the_guard_the_counts_and_the_evaluations(tmp_path, monkeypatch, mean, written):
    worker = Scripted(tmp_path)
    monkeypatch.setattr(worker_module, "collect_state", lambda step: (dict(TENSORS), {"scaler": {}}))
    worker.cut = {"q": CutCount(5, 2, 1)}
    worker.guard.statistics += 4
    worker.reporter.mean_loss = mean
    worker.history.add(4, [HeldOutShare({"q": (3.0, 2)}, {})])
    worker.save(4)
    assert worker.notes == [("flush",), ("publish", *WORKER_FILES), ("state of", 4)], "the record is never behind"
    tensors, record = worker.store.saved[4]
    assert set(tensors) == {"parameter/x", "guard/statistics"} and tensors["guard/statistics"].tolist() == [4.0] * 3
    assert record["mean_loss"] == written and record["held_out_loss"] == 1.5 and record["scaler"] == {}
    assert record["cut"] == {"q": {"samples": 5, "questions": 2, "answers": 1}}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_comes_back(tmp_path, monkeypatch, rank):
    restored = []
    monkeypatch.setattr(worker_module, "restore_state", lambda *arguments: restored.append(arguments))
    record = {"cut": {"q": asdict(CutCount(5, 2, 1))}, "evaluations": [{"step": 4, "loss": None, "sources": {}}]}
    tensors = {**TENSORS, "guard/statistics": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    worker = Scripted(tmp_path, found=(4, tensors, record), rank=rank)
    worker.held_out.digest = "of today's rows"
    worker.cut = {"q": CutCount(9)}
    assert worker._restore() == 4
    assert restored == [(worker.train_step, tensors, record)]
    assert worker.guard.statistics.tolist() == [1.0, 2.0, 3.0]
    assert worker.cut == ({"q": CutCount(5, 2, 1)} if rank == 0 else {}), "only rank 0 continues the counts of all"
    assert [each["step"] for each in worker.history.evaluations] == [4]
    assert worker.history.rows == "of today's rows"
    worker.store.found = (2, tensors, {**record, "evaluations": []})
    assert worker._restore() == 2 and (worker.cut != {}) == (rank == 0) and worker.history.evaluations == []
    worker.store.found = None
    assert worker._restore() == 0 and worker.cut == {} and worker.history.evaluations == []
    assert worker.history.rows == "of today's rows"


@pytest.mark.parametrize(
    ("changes", "next_step", "expected"),
    [
        ({"guard": "skip"}, 0, []),
        ({"guard": "rollback"}, 0, ["save 0"]),
        ({"guard": "rollback"}, 4, []),
        ({"guard": "skip", "eval_fraction": 0.1}, 0, ["evaluate 0"]),
        ({"guard": "skip", "eval_fraction": 0.1, "use_best": True}, 0, ["evaluate 0", "save 0"]),
        ({"guard": "rollback", "eval_fraction": 0.1, "use_best": True}, 4, []),
        ({"guard": "rollback", "eval_fraction": 0.1, "rank": 1}, 0, ["evaluate 0"]),
        ({"eval_fraction": 0.1}, 10, ["evaluate 10"]),  # max_steps is lowered to where it is
        ({"eval_fraction": 0.1, "num_steps": 8}, 8, []),
    ],
)
def test_the_start_is_evaluated_and_saved_once(tmp_path, monkeypatch, changes, next_step, expected):
    worker, done = Scripted(tmp_path, **changes), []
    if not worker.job.evaluates:
        worker.held_out = None
    worker.history.evaluations = [{"step": step, "loss": 1.0} for step in (4, 8)]
    monkeypatch.setattr(worker, "_restore", lambda: next_step)
    monkeypatch.setattr(worker, "_evaluate", lambda step: done.append(f"evaluate {step}"))
    monkeypatch.setattr(worker, "save", lambda step: done.append(f"save {step}"))
    monkeypatch.setattr(worker_module, "Reporter", lambda job, work, step, size: Reporter(worker.notes))
    assert worker.resume() == next_step and done == expected


def test_an_abort_ends_the_writing_and_publishes_the_record(tmp_path):
    worker = Scripted(tmp_path)
    worker.abort()
    assert worker.notes == ["wait", ("abort",), ("publish", *WORKER_FILES)]
    other = Scripted(tmp_path, rank=1)
    other.abort()
    assert other.notes == []


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize(("use_best", "end", "of"), [(False, 8, 8), (True, 8, 4), (True, 4, 4)])
def test_the_checkpoint_is_of_the_last_step_or_of_the_best(tmp_path, monkeypatch, use_best, end, of):
    worker, restored = Scripted(tmp_path, use_best=use_best, eval_fraction=0.1), []
    monkeypatch.setattr(worker_module, "restore_parameters", lambda step, tensors: restored.append(tensors))
    monkeypatch.setattr(worker, "_save_checkpoint", lambda: "/here")
    worker.end, worker.cut = end, {"q": CutCount(5)}
    for step, loss in ((0, 3.0), (4, 1.0), (8, 2.0)):
        if step <= end:
            worker.history.add(step, [HeldOutShare({"q": (2 * loss, 2)}, {})])
    worker.finish()
    assert restored == ([{"weights of": 4}] if of != end else [])
    (call,) = [note for note in worker.notes if note[0] == "finish"]
    _, checkpoint, cut, steps, held_out = call
    assert (checkpoint, cut, steps) == ("/here", {"q": CutCount(5)}, end)
    assert (held_out["checkpoint_step"], held_out["best_step"], held_out["rows"]) == (of, 4, {"q": 4})
    assert worker.notes[0] == "wait" and worker.notes[-1] == ("publish", *WORKER_FILES)
    assert Scripted(tmp_path, rank=1).finish() is None


def test_the_record_of_a_stage(tmp_path):
    worker = Scripted(tmp_path, recipe="paper", seed=7, init_from="s3://key:secret@host/start")
    worker.end = 8
    record = worker._stage_record()
    assert "secret" not in record.pop("init_from")
    assert record == {"recipe": "paper", "stage": 4, "title": STAGE.title, "steps": 8, "seed": 7}
    worker.job = replace(worker.job, run=RunIdentity(run_id="r", parent="p"))
    assert worker._stage_record()["tracking_parent"] == "p"


# ---------------------------------------------------------------------- a worker with a model


@pytest.fixture(scope="module")
def job(world, tmp_path_factory):
    return resolve_job(train_settings(world, tmp_path_factory.mktemp("out"), threads_per_worker=1), 4)[0]


@pytest.mark.parametrize(
    ("changes", "keeps_best", "judges"),
    [
        ({"keep_best": False, "use_best": False}, False, True),
        ({"keep_best": False, "use_best": True}, True, True),
        ({"keep_best": True, "guard": "off"}, True, False),
    ],
)
def test_settings_reach_the_parts_of_a_worker(job, monkeypatch, changes, keeps_best, judges):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    update = {"keep_checkpoints": 5, "threads_per_worker": 3, **changes}
    worker = TrainWorker(replace(job, settings=job.settings.model_copy(update=update)), NoReports())
    assert threads == [3] and worker.store.keep == 5
    assert worker.store.keep_best == keeps_best and (worker.train_step.reject is not None) == judges
    assert worker.store.location == f"{job.output}/states" and worker.end == 12 and worker.held_out is None


def test_a_fault_is_named_by_the_sample_that_causes_it(job, monkeypatch):
    """Samples of unequal length, which micro-batches hold in the order of their lengths."""
    worker = TrainWorker(job, NoReports())
    maker = BatchMaker(worker.plan)
    refs, ids = maker.mixture.step(0), maker.sample_ids(0)
    lengths = [len(maker.load(ref).encoded.input_ids) for ref in refs]
    bad = int(np.argmax(lengths))
    assert bad != len(ids) - 1, "the longest one is not the last of the step"
    original = BatchMaker.load

    def load(self, ref):
        sample = original(self, ref)
        features = np.full((4, 24), math.nan, np.float32)
        return replace(sample, pixels=None, query_features=features) if ref == refs[bad] else sample

    monkeypatch.setattr(BatchMaker, "load", load)
    assert worker._diagnose(Fault(0, "nonfinite_loss", math.nan, 0.5)).samples == [ids[bad]]
