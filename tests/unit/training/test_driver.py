"""The driver's side of a stage: what is done in which order, what the tracker is told, what Ray Train is asked for."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import storage
from pipelines.data.loader import CutCount
from pipelines.settings import TrainSettings
from pipelines.tracking.base import NullTracker
from pipelines.tracking.identity import RunIdentity, write_identity
from pipelines.training import run as module
from pipelines.training.job import TrainJob
from pipelines.training.result import WorkerResult, read_result
from tinygptv.training.stages import get_stage

pytestmark = pytest.mark.usefixtures("still_titles")


class Tracker(NullTracker):
    """Notes what it is told."""

    def __init__(self, run_id="run"):
        self.run_id, self.told = run_id, []

    def __getattribute__(self, name):
        if name in ("params", "metrics", "tags", "inputs", "artifact", "image", "model", "close"):
            return lambda *values: self.told.append((name, *values))
        return super().__getattribute__(name)


def job_of(folder, recipe="mini", number=4, **changes):
    settings = TrainSettings(**{"output": str(folder), "num_workers": 0, "recipe": recipe, **changes})
    plan = SimpleNamespace(held_out={})
    return TrainJob(settings, get_stage(recipe, number), plan, 12, str(folder))


# ---------------------------------------------------------------------- the order of a stage


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """Run a stage whose parts note that they were called."""
    notes = []

    def run(*, finished=None, newest=0, parent="parent", **changes):
        job = job_of(tmp_path, **changes)
        work = storage.WorkFolder(str(tmp_path))
        work.publish = lambda *names: notes.append(("publish", *names))
        trained = WorkerResult("/checkpoint", 3.0, 2.0, 12, {"a": CutCount(9, 2, 0), "b": CutCount(9, 0, 1)})

        def note(name, result=None):
            return lambda given, *a, **k: notes.append((name, *a, *k.values())) or check(given) or result

        def check(given):
            assert replace(given, run=None) == job

        @contextlib.contextmanager
        def follow(location, *, quiet):
            notes.append(("follow", location, quiet))
            yield
            notes.append("followed")

        monkeypatch.setattr(module, "resolve_job", lambda *given: given[:2] == (job.settings, 4) and (job, work))
        monkeypatch.setattr(module, "_refuse_shorter_run", note("refuse"))
        monkeypatch.setattr(module, "_finished_result", lambda *given: notes.append(given) or finished)
        monkeypatch.setattr(module, "_send_unsent", note("unsent"))
        monkeypatch.setattr(module, "_begin_tracking", note("begin", RunIdentity(run_id="r")))
        monkeypatch.setattr(
            module, "describe_stage", lambda *given: "the plan" if given == (job.settings, job.stage) else "another"
        )
        monkeypatch.setattr(module.StateStore, "newest_step", lambda self: notes.append(self.location) or newest)
        monkeypatch.setattr(module, "follow", follow)
        for name in ("_run_inline", "_run_on_ray"):
            monkeypatch.setattr(
                module, name, lambda job, name=name: notes.append((name, job.run and job.run.run_id)) or trained
            )
        monkeypatch.setattr(module, "_collect", note("collect", None))
        monkeypatch.setattr(
            module,
            "_log_outcome",
            lambda found, *told: notes.append(("outcome", found.run.run_id, *told)) or check(found),
        )
        above = {"parent_run_id": parent} if parent else {}
        return module.run_stage(job.settings, 4, **above), notes, job

    return run


def test_a_finished_stage_sends_what_waits_and_trains_nothing(staged, tmp_path, caplog):
    caplog.set_level("INFO")
    result, notes, _ = staged(finished={"steps": 12})
    assert result == {"steps": 12}
    assert notes == [("refuse", tmp_path), (tmp_path, 12), ("unsent", tmp_path), ("publish", "unsent.jsonl")]
    assert caplog.messages == [f"stage 4 is finished already: {tmp_path}"]


def test_a_stage_is_tracked_trained_collected_told_and_written_in_this_order(staged, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    ticks = iter((100.0, 161.26))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    result, notes, _ = staged(quiet=True, newest=8, storage_path=str(tmp_path / "shared"))
    shared = str(tmp_path / "shared")
    assert notes == [
        ("refuse", tmp_path),
        (tmp_path, 12),
        ("begin", tmp_path, "parent"),
        ("publish", "run.json", "unsent.jsonl"),
        f"{shared}/states",
        ("follow", f"{shared}/progress.txt", True),
        ("_run_inline", "r"),
        "followed",
        ("collect", notes[8][1]),
        ("outcome", "r", tmp_path, result),
        ("publish", "loss.png", "run.json", "unsent.jsonl", "result.json"),
    ]
    assert notes[8][1].path == tmp_path
    assert read_result(tmp_path) == result and result["result"] == str(tmp_path / "result.json")
    assert (result["checkpoint"], result["first_loss"], result["last_loss"]) == ("/checkpoint", 3.0, 2.0)
    assert result["seconds"] == 61.3
    assert caplog.messages == [
        "\nthe plan",
        f"resuming at step 8 of 12 from {shared}/states",
        "a: the first question of 2 of 9 samples was longer than stage.limits.max_context_tokens, and its end was cut.",
    ]


def test_a_states_place_is_told_without_its_password(staged, caplog):
    caplog.set_level("INFO")
    _, notes, _ = staged(newest=1, storage_path="s3://key:secret@bucket/runs")
    assert "resuming at step 1 of 12 from s3://***@bucket/runs/states" in caplog.messages
    assert "s3://key:secret@bucket/runs/states" in notes, "and asked with it"


def test_a_plan_is_that_of_the_given_start_with_its_adapters(monkeypatch):
    stage, asked = get_stage("mini", 3), []
    monkeypatch.setattr(module, "resolve_stage", lambda given, number: stage if (given.seed, number) == (5, 3) else 0)
    monkeypatch.setattr(
        module, "checked_checkpoint", lambda *given, weights: asked.append((*given, weights)) or Path("/local")
    )
    monkeypatch.setattr(module, "read_config", lambda place: ("config of", place))
    monkeypatch.setattr(module, "with_start_adapters", lambda *given: ("adapted", *given))
    monkeypatch.setattr(module, "refuse_other_model", lambda *given: asked.append(given))
    monkeypatch.setattr(module, "describe_stage", lambda settings, stage: (settings, stage))
    bare = TrainSettings(seed=5)
    assert module.dry_run(bare, 3) == (bare, stage) and asked == []
    given = TrainSettings(seed=5, init_from="s3://bucket/start")
    settings, adapted = module.dry_run(given, 3)
    assert settings == given.model_copy(update={"init_from": "/local"})
    assert adapted == ("adapted", stage, ("config of", Path("/local")))
    assert asked[0] == ("s3://bucket/start", False), "a plan needs no weights"
    assert asked[1:] == [(adapted, ("config of", Path("/local")))]


def test_workers_train_on_ray_and_a_new_run_is_not_resumed(staged, caplog):
    caplog.set_level("INFO")
    _, notes, _ = staged(num_workers=2, parent="")
    assert next(note[2] for note in notes if note[0] == "begin") == "", "a stage alone has no run above it"
    assert ("_run_on_ray", "r") in notes and ("_run_inline", "r") not in notes
    assert not any("resuming" in message for message in caplog.messages)


# ---------------------------------------------------------------------- the tracker


@pytest.fixture
def tracked(monkeypatch):
    tracker, asked = Tracker(), []

    def open_tracker(settings, *given, **options):
        assert isinstance(settings, TrainSettings)
        asked.append((*given, options))
        return tracker

    monkeypatch.setattr(module, "continue_tracker", open_tracker)
    monkeypatch.setattr(module, "open_tracker", open_tracker)
    monkeypatch.setattr(module, "_data_inputs", lambda job: [f"data of {job.output}"])
    monkeypatch.setattr(
        module, "resolved_config", lambda settings, stage: {"seed": settings.seed, "stage": stage.number}
    )
    return tracker, asked


@pytest.mark.parametrize(
    ("known", "given", "parent"), [("kept", "given", "kept"), (None, "given", "given"), (None, "", "of the training")]
)
def test_a_run_is_nested_under_the_one_it_was_begun_under(tmp_path, monkeypatch, tracked, known, given, parent):
    tracker, asked = tracked
    monkeypatch.setattr(module, "_training_run", lambda settings: settings == job.settings and "of the training")
    job = job_of(tmp_path, seed=5)
    if known:
        write_identity(tmp_path, RunIdentity(run_id="r", parent=known))
    module._begin_tracking(job, tmp_path, given)
    assert asked == [(job.title, tmp_path, {"parent_run_id": parent})]
    assert tracker.told == [
        ("params", {"seed": 5, "stage": 4}),
        ("tags", {"stage": "4", "recipe": "mini", "seed": "5"}),
        ("inputs", [f"data of {tmp_path}"]),
        ("artifact", tmp_path / "config.yaml"),
        ("close", "RUNNING"),
    ]


def test_the_papers_losses_are_lines_from_the_first_step_to_the_last(tmp_path, tracked):
    tracker, _ = tracked
    assert module._begin_tracking(job_of(tmp_path, recipe="paper", number=3), tmp_path, "p") is None
    lines = [told[1:] for told in tracker.told if told[0] == "metrics"]
    assert lines == [({"loss/paper_start": 1.992, "loss/paper_end": 1.125}, step) for step in (0, 11)]


def test_without_tracking_nothing_is_begun(tmp_path, tracked):
    assert module._begin_tracking(job_of(tmp_path, tracking_uri="none"), tmp_path, "p") is None
    assert tracked[1] == []


@pytest.mark.parametrize("known", ["", "earlier"])
def test_the_run_of_a_training_is_the_one_of_its_start(tmp_path, monkeypatch, tracked, known):
    tracker, asked = tracked
    monkeypatch.setattr(module, "local_checkpoint", lambda path, *, weights: (path, weights))
    monkeypatch.setattr(
        module, "read_stage", lambda place: {"tracking_parent": known} if known and place == ("start", False) else {}
    )
    assert module._training_run(TrainSettings(init_from="start", recipe="paper")) == "run"
    ((title, options),) = asked
    assert title.startswith("paper training, ") and options["identity"].run_id == known
    assert tracker.told == [("close",)]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_outcome_is_told_with_its_files_and_the_whole_training_follows(tmp_path, monkeypatch, tracked, held_out):
    tracker, asked = tracked
    drawn = []

    def draw(metrics, path, stage, recipe):
        from PIL import Image

        drawn.append((metrics, path, stage.number, recipe))
        Image.new("RGBA", (3, 2)).save(path)
        return path

    monkeypatch.setattr(module, "loss_curve", draw)
    monkeypatch.setattr(module, "_log_to_training", lambda *given: tracker.told.append(("training", *given)))
    if held_out:
        (tmp_path / "held_out.jsonl").write_text("")
    job = replace(job_of(tmp_path), run=RunIdentity())
    module._log_outcome(job, tmp_path, {"steps": 12, "checkpoint": "/checkpoint"})
    assert drawn == [(tmp_path / "metrics.jsonl", tmp_path / "loss.png", 4, "mini")]
    image = next(told for told in tracker.told if told[0] == "image")
    assert image[1].mode == "RGB" and image[2:] == ("loss", 12)
    assert [told for told in tracker.told if told[0] != "image"] == [
        *([("artifact", tmp_path / "held_out.jsonl")] if held_out else []),
        ("artifact", tmp_path / "loss.png"),
        ("artifact", tmp_path / "metrics.jsonl"),
        ("tags", {"checkpoint": "/checkpoint"}),
        ("model", "stage4", "/checkpoint"),
        ("close",),
        ("training", job, tmp_path),
    ]
    assert asked == [(job.title, tmp_path, {"parent_run_id": ""})]


@pytest.mark.parametrize(("run", "quiet", "told"), [(None, True, 0), (None, False, 1), (RunIdentity(), True, 1)])
def test_a_quiet_run_without_tracking_draws_nothing(tmp_path, monkeypatch, tracked, run, quiet, told):
    drawn = []
    monkeypatch.setattr(module, "loss_curve", lambda *a: drawn.append(a) or 1 / 0)
    job = replace(job_of(tmp_path, quiet=quiet), run=run)
    with pytest.raises(ZeroDivisionError) if told else contextlib.nullcontext():
        module._log_outcome(job, tmp_path, {})
    assert len(drawn) == told


@pytest.mark.parametrize(("journal", "uri", "sent"), [(True, "", True), (False, "", False), (True, "none", False)])
def test_what_waits_is_sent_where_there_is_a_tracker(tmp_path, monkeypatch, tracked, journal, uri, sent):
    tracker, asked = tracked
    job = job_of(tmp_path, tracking_uri=uri)
    monkeypatch.setattr(module, "_log_to_training", lambda *given: tracker.told.append(("training", *given)))
    if journal:
        (tmp_path / "unsent.jsonl").write_text("{}")
    module._send_unsent(job, tmp_path)
    assert asked == ([(job.title, tmp_path, {"parent_run_id": ""})] if sent else [])
    assert tracker.told == ([("close",), ("training", job, tmp_path)] if sent else [])


def test_a_stage_without_a_training_above_it_is_not_told_there(tmp_path, tracked):
    for identity in (None, RunIdentity(run_id="r")):
        if identity:
            write_identity(tmp_path, identity)
        module._log_to_training(job_of(tmp_path), tmp_path)
    assert tracked[1] == []
