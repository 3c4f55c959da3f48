"""From settings to a job, and from a job's end to the tracker: what decides, what is counted, what is told once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train

from pipelines import storage
from pipelines.data.loader import CutCount
from pipelines.data.shards import ShardSet
from pipelines.miniature.tiny_training import train_settings
from pipelines.settings import TrainSettings
from pipelines.tracking.described import run_title
from pipelines.tracking.identity import RunIdentity
from pipelines.training import run as run_module
from pipelines.training.describe import describe_stage
from pipelines.training.job import apply_stage_settings, resolve_job, training_fingerprint
from pipelines.training.memory_plan import _configured, _with_fit
from pipelines.training.record import StepRecord
from pipelines.training.result import RESULT_FILE, WorkerResult, read_result, write_result
from pipelines.training.run import _data_inputs, _finished_result, _log_to_training
from pipelines.training.run_reports import NoReports, RayTrainReports
from tests.unit.training.test_record import entry
from tinygptv.checkpoint.folders import write_folder
from tinygptv.training.memory_plan import MemoryPlan
from tinygptv.training.stages import get_stage

pytestmark = pytest.mark.usefixtures("still_titles")


def job_of(world, output, **changes):
    return resolve_job(train_settings(world, output, **changes), 4)[0]


@pytest.mark.parametrize(("asked", "steps"), [(0, 12), (5, 5), (12, 12), (99, 12)])
def test_a_stage_has_no_more_steps_than_its_schedule(world, tmp_path, asked, steps):
    assert job_of(world, tmp_path, max_steps=asked).num_steps == steps


def test_storage_is_the_shared_folder_where_there_is_one(world, tmp_path):
    job = job_of(world, tmp_path / "a")
    assert job.storage == job.output == str(tmp_path / "a")
    shared = job_of(world, tmp_path / "b", storage_path=str(tmp_path / "shared"))
    assert (shared.storage, shared.output) == (str(tmp_path / "shared"), str(tmp_path / "b"))


def test_packed_rows_are_as_long_as_the_stages_texts(world, tmp_path):
    limits = {"limits": {"max_text_tokens": 77, "max_context_tokens": 99}}
    assert job_of(world, tmp_path / "a", packing=True, stage=limits).plan.pack_length == 77
    assert job_of(world, tmp_path / "b").plan.pack_length == 0


def test_numbers_and_sources_that_are_not_named_stay():
    stage = get_stage("mini", 4)
    changes = {"schedule": {"peak": 5e-4, "warmup_start": -1.0}, "sources": {"gqa": {"weight": 7}}}
    changed = apply_stage_settings(stage, changes)
    assert changed.schedule.peak == changed.schedule.warmup_start == 5e-4, "a negative start is the peak"
    before, after = ({s.name: (s.weight, s.batch_size) for s in each.sources} for each in (stage, changed))
    assert after == {**before, "gqa": (7, before["gqa"][1])}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"eval_every": 5}, True),
        ({"early_stop": 2}, False),
        ({"early_stop": 2, "eval_every": 5}, False),
        ({"early_stop": 2, "eval_rows": 3}, False),
        ({"early_stop": 2, "checkpoint_every": 7}, False),
        ({"use_best": True}, False),
        ({"encoder_precision": "fp32"}, True),
        ({"frozen_weights": "full"}, True),
        ({"frozen_weights": "nf4"}, False),
        ({"max_steps": 3, "packing": True, "guard": "off", "keep_best": False, "eval_questions": 0}, True),
    ],
)
def test_the_fingerprint_has_what_decides_the_weights(world, tmp_path, monkeypatch, changes, same):
    monkeypatch.setattr("pipelines.training.job.checkpoint_digest", lambda path: "start")

    def inputs(**more):
        settings = train_settings(world, tmp_path, **{"eval_data": world["data"], **more})
        return training_fingerprint(settings, get_stage("mini", 4), tmp_path, {"pairs": "x"}).inputs

    assert (inputs(**changes) == inputs()) == same
    if changes.get("early_stop"):
        assert inputs(**changes) != inputs(early_stop=2) or len(changes) == 1
    assert inputs(early_stop=2, eval_every=5, checkpoint_every=7) == inputs(early_stop=2, checkpoint_every=5)


def test_sources_in_another_order_are_another_training(world, tmp_path, monkeypatch):
    """A step's sources are drawn by their place."""
    monkeypatch.setattr("pipelines.training.job.checkpoint_digest", lambda path: "start")
    stage = get_stage("mini", 1)
    turned = replace(stage, sources=stage.sources[::-1])
    one, other = (training_fingerprint(train_settings(world, tmp_path), each, tmp_path, {}) for each in (stage, turned))
    assert other.differences(one) == [
        'stage.source_order was ["laion", "cc_sbu"], is now ["cc_sbu", "laion"]',
    ]


@pytest.mark.parametrize(("changes", "same"), [({}, True), ({"early_stop": 2}, False), ({"use_best": True}, False)])
def test_other_held_out_data_is_another_training_where_it_decides_the_end(world, tmp_path, monkeypatch, changes, same):
    monkeypatch.setattr("pipelines.training.job.checkpoint_digest", lambda path: "start")
    one, other = (
        training_fingerprint(
            train_settings(world, tmp_path, eval_data=f"{world['data']}/{name}", **changes),
            get_stage("mini", 4),
            tmp_path,
            {},
        ).inputs
        for name in ("pairs", "questions")
    )
    assert (one == other) is same and ("eval_data" in one) is not same


# ---------------------------------------------------------------------- the tracker


def test_data_sets_are_told_with_the_rows_that_are_trained_on(world, tmp_path):
    write = f"{world['data']}/pairs"
    job = job_of(world, tmp_path, eval_data=write)
    held = {"pairs": np.array([1, 4, 7])}
    job = replace(job, plan=replace(job.plan, held_out=held))
    told = [(each.name, each.rows, each.context) for each in _data_inputs(job)]
    assert told == [
        ("pairs", 27, "training"),
        ("pairs (held out)", 3, "evaluation"),
        ("questions", 22, "training"),
        ("pairs", 30, "evaluation"),
    ]
    assert _data_inputs(job)[0].digest == ShardSet.open(write).manifest.digest
    assert {each.source for each in _data_inputs(job)} == {write, f"{world['data']}/questions"}


def test_without_held_out_data_none_is_looked_for(world, tmp_path, monkeypatch):
    """Not even in the folder in which the job was started."""
    job = job_of(world, tmp_path)
    monkeypatch.chdir(world["data"])
    assert [each.name for each in _data_inputs(job)] == ["pairs", "questions"]


class Tracker:
    run_id = "p"

    def __init__(self):
        self.steps, self.closed, self.values = [], 0, {}

    def tags(self, values):
        assert values == {"recipe": "paper", "seed": "5"}

    def metrics(self, values, step):
        self.steps.append((step, sorted(values)))
        self.values |= {(name, step): value for name, value in values.items()}

    def inputs(self, found):
        assert found == ["data"]

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, [0, 1, 2]), (999, list(range(999))), (1000, [*range(0, 1000, 2), 999]), (1600, [*range(0, 1600, 3)])],
)
def test_a_training_shows_some_five_hundred_points_of_a_stage_and_the_last(
    world, tmp_path, monkeypatch, count, expected
):
    tracker, opened = Tracker(), []
    monkeypatch.setattr(
        run_module, "open_tracker", lambda *a, **k: opened.append((*a, k["identity"].run_id)) or tracker
    )
    monkeypatch.setattr(run_module, "read_identity", lambda output: RunIdentity(run_id="r", parent="p"))
    monkeypatch.setattr(run_module, "_data_inputs", lambda found: ["data"] if found is job else None)
    record = StepRecord(tmp_path / "metrics.jsonl", 0)
    for step in range(count):
        record.write(entry(step))
    record.close()
    lines = [
        {"step": 0, "loss": 2.0, "sources": {}, "scores": {}},
        {"step": 3, "loss": 1.0, "sources": {}, "scores": {"q": 50}},
    ]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = SimpleNamespace(settings=TrainSettings(recipe="paper", seed=5), stage=get_stage("mini", 4))
    _log_to_training(job, tmp_path)
    assert [step for step, names in tracker.steps if names == ["loss/stage4", "lr/stage4"]] == expected
    first = entry(0)
    assert (tracker.values["loss/stage4", 0], tracker.values["lr/stage4", 0]) == (first["loss"], first["lr"])
    assert [tracker.values["loss/held_out/stage4", step] for step in (0, 3)] == [2.0, 1.0]
    assert tracker.values["score/held_out/stage4/q", 3] == 50
    held = [(step, names) for step, names in tracker.steps if "loss/held_out/stage4" in names]
    assert held == [(0, ["loss/held_out/stage4"]), (3, ["loss/held_out/stage4", "score/held_out/stage4/q"])]
    once = [(job.settings, run_title("paper", "training"), "p")]
    assert opened == once and tracker.closed == 1
    (tmp_path / "unsent.jsonl").write_text("{}")
    _log_to_training(job, tmp_path)
    assert opened == once, "what waits to be sent goes first"


# ---------------------------------------------------------------------- Ray Train


def test_a_node_that_will_be_taken_is_noticed_once(monkeypatch):
    notices = [None, ["a"], ["a"], ["a", "b"], ["b"], ["a"], None]

    def notice():
        taken = notices.pop(0)
        return taken and SimpleNamespace(preempted_node_ids=taken)

    monkeypatch.setattr(ray.train, "get_preemption_info", notice, raising=False)
    reports = RayTrainReports()
    assert [reports.must_save() for _ in range(7)] == [False, True, False, True, False, False, False]
    assert NoReports().must_save() is False, "nobody takes the machine of a run without Ray Train"


def test_ray_is_told_where_the_whole_state_lies(monkeypatch):
    told = []

    def report(metrics, checkpoint=None):
        found = None
        if checkpoint:
            with checkpoint.as_directory() as folder:
                found = json.loads(Path(folder, "state_reference.json").read_text())
        told.append((metrics, found))

    monkeypatch.setattr(ray.train, "report", report)
    metrics = {"next_step": 8.0, "saved_step": 4.0, "loss": 1.5}
    RayTrainReports().saved(metrics, "s3://bucket/states/step-00000004")
    RayTrainReports().saved(metrics, "")
    assert told == [(metrics, {"location": "s3://bucket/states/step-00000004", "next_step": 4}), (metrics, None)]


# ---------------------------------------------------------------------- results and plans


def test_a_result_is_found_where_its_folder_was_moved_to(tmp_path):
    worker = WorkerResult("/old/checkpoint", float("nan"), 1.5, 7)
    assert WorkerResult.from_dict(json.loads(json.dumps({**worker.to_dict(), "first_loss": None}))).steps == 7
    write_result(tmp_path, worker.to_stage_result("/old/result.json", 12.3456))
    found = read_result(tmp_path)
    assert (found["result"], found["seconds"], found["steps"]) == (str(tmp_path / RESULT_FILE), 12.3, 7)
    write_result(tmp_path, worker.to_stage_result("s3://bucket/result.json", 1))
    assert read_result(tmp_path)["result"] == "s3://bucket/result.json"
    whole = {"checkpoint": "x", "first_loss": 2.0, "last_loss": 1.0, "steps": 7, "seconds": 1.0}
    damaged = ({"checkpoint": "x"}, {**whole, "first_loss": "high"}, {**whole, "cut": []}, {**whole, "seconds": None})
    for values in damaged:
        (tmp_path / RESULT_FILE).write_text(json.dumps(values))
        assert read_result(tmp_path) is None, values
    assert read_result(tmp_path / "nothing") is None


def test_a_result_comes_back_whole_and_one_without_the_newer_fields_has_none_of_them(tmp_path):
    held = {"rows": 5, "questions": 2, "first": 3.0, "last": 2.5, "best": 2.0, "best_step": 8, "checkpoint_step": 8}
    result = WorkerResult("/c", 2.0, 1.5, 7, {"a": CutCount(9, 2, 1)}, held, stopped_early=True)
    assert WorkerResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    write_result(tmp_path, result.to_stage_result("/out/result.json", 3))
    found = read_result(tmp_path)
    assert (found["held_out"], found["stopped_early"]) == (held, True)
    assert found["cut"] == {"a": {"samples": 9, "questions": 2, "answers": 1}}
    older = {"checkpoint": "/c", "first_loss": 2.0, "last_loss": 1.5, "steps": 7}
    assert WorkerResult.from_dict(older) == WorkerResult("/c", 2.0, 1.5, 7, {}, None, stopped_early=False)
    assert WorkerResult.from_dict(older).stopped_early is False
    (tmp_path / "result.json").write_text(json.dumps({**older, "seconds": 3.0}))
    assert read_result(tmp_path)["result"] == f"{tmp_path}/result.json"


@pytest.mark.parametrize(
    ("steps", "early", "whole", "finished"),
    [(7, False, True, True), (5, True, True, True), (5, False, True, False), (7, False, False, False)],
)
def test_a_stage_is_finished_with_its_steps_and_a_whole_checkpoint(tmp_path, steps, early, whole, finished):
    checkpoint = write_folder(tmp_path / "checkpoint", lambda folder: (folder / "a").write_text("x"))
    worker = WorkerResult(str(checkpoint), 2.0, 1.5, steps, stopped_early=early)
    write_result(tmp_path, worker.to_stage_result("", 1))
    if not whole:
        (checkpoint / "a").unlink()
    elif finished:
        (checkpoint / "a").write_text("y")  # files are hashed where they are loaded, which takes minutes
    found = _finished_result(tmp_path, 7)
    assert (found is not None) == finished and (not found or found["steps"] == steps)


def test_a_stage_of_a_bucket_is_finished_with_the_manifest_of_its_checkpoint(tmp_path):
    assert _finished_result(tmp_path, 7) is None, "nothing is there"
    place = f"memory://finished/{tmp_path.name}/checkpoint"
    write_result(tmp_path, WorkerResult(place, 2.0, 1.5, 7).to_stage_result("s3://bucket/result.json", 1))
    storage.write_atomically(f"{place}/model.safetensors", b"x")
    assert _finished_result(tmp_path, 7) is None, "the manifest is written last"
    storage.write_atomically(f"{place}/manifest.json", b"{}")
    assert _finished_result(tmp_path, 7) == read_result(tmp_path) and _finished_result(tmp_path, 8) is None


def test_the_plan_of_a_stage_counts_a_step_at_most():
    stage = get_stage("mini", 4)
    text = describe_stage(TrainSettings(micro_batch_size=999), stage)
    assert f"{stage.max_step_samples} samples of" in text and "999 samples of" not in text
    assert "3 samples of" in describe_stage(TrainSettings(micro_batch_size=3), stage)
    paper = describe_stage(TrainSettings(), get_stage("paper", 4))
    assert "samples per step  1 to 3, over 1 worker(s)" in paper


def test_a_card_of_just_the_peak_is_enough():
    plan = MemoryPlan({"projector": 10}, 1, 2, 3, 4, 5)
    assert [_with_fit(plan, plan.peak + more)["fits"] for more in (-1, 0, 1)] == [False, True, True]
    assert [_configured(TrainSettings(gradient_checkpointing=on)) for on in (False, True)] == ["plain", "checkpointing"]
