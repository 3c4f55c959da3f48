"""The driver's side of a stage: what is done in which order, what the tracker is told, what Ray Train is asked for."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines import storage
from pipelines.data.loader import CutCount
from pipelines.settings import SettingsError, TrainSettings
from pipelines.tracking.base import NullTracker
from pipelines.tracking.identity import RunIdentity, write_identity
from pipelines.training import run as module
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from pipelines.training.record import WORKER_FILES
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

    def run(*, finished=None, newest=0, **changes):
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

        monkeypatch.setattr(module, "resolve_job", lambda *given: given == (job.settings, 4) and (job, work))
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
        return module.run_stage(job.settings, 4, parent_run_id="parent"), notes, job

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
        ("publish", "run.json"),
        f"{shared}/states",
        ("follow", f"{shared}/progress.txt", True),
        ("_run_inline", "r"),
        "followed",
        ("collect", notes[8][1]),
        ("outcome", "r", tmp_path, result),
        ("publish", "loss.png", "run.json", "result.json"),
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
    monkeypatch.setattr(module, "resolve_stage", lambda settings, number: stage if number == 3 else None)
    monkeypatch.setattr(
        module, "checked_checkpoint", lambda *given, weights: asked.append((*given, weights)) or Path("/local")
    )
    monkeypatch.setattr(module, "read_config", lambda place: ("config of", place))
    monkeypatch.setattr(module, "with_start_adapters", lambda *given: ("adapted", *given))
    monkeypatch.setattr(module, "describe_stage", lambda settings, stage: (settings, stage))
    bare = TrainSettings(seed=5)
    assert module.dry_run(bare, 3) == (bare, stage) and asked == []
    given = TrainSettings(seed=5, init_from="s3://bucket/start")
    settings, adapted = module.dry_run(given, 3)
    assert settings == given.model_copy(update={"init_from": "/local"})
    assert adapted == ("adapted", stage, ("config of", Path("/local")))
    assert asked == [("s3://bucket/start", False)], "a plan needs no weights"


def test_workers_train_on_ray_and_a_new_run_is_not_resumed(staged, caplog):
    caplog.set_level("INFO")
    _, notes, _ = staged(num_workers=2)
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
    monkeypatch.setattr(module, "_data_inputs", lambda job: ["data"])
    monkeypatch.setattr(
        module, "resolved_config", lambda settings, stage: {"seed": settings.seed, "stage": stage.number}
    )
    return tracker, asked


@pytest.mark.parametrize(
    ("known", "given", "parent"), [("kept", "given", "kept"), (None, "given", "given"), (None, "", "of the training")]
)
def test_a_run_is_nested_under_the_one_it_was_begun_under(tmp_path, monkeypatch, tracked, known, given, parent):
    tracker, asked = tracked
    monkeypatch.setattr(module, "_training_run", lambda settings: "of the training")
    if known:
        write_identity(tmp_path, RunIdentity(run_id="r", parent=known))
    job = job_of(tmp_path, seed=5)
    module._begin_tracking(job, tmp_path, given)
    assert asked == [(job.title, tmp_path, {"parent_run_id": parent})]
    assert tracker.told == [
        ("params", {"seed": 5, "stage": 4}),
        ("tags", {"stage": "4", "recipe": "mini", "seed": "5"}),
        ("inputs", ["data"]),
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
    monkeypatch.setattr(module, "_log_to_training", lambda job, output: tracker.told.append(("training", output)))
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
        ("training", tmp_path),
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
    monkeypatch.setattr(module, "_log_to_training", lambda job, output: tracker.told.append(("training", output)))
    if journal:
        (tmp_path / "unsent.jsonl").write_text("{}")
    job = job_of(tmp_path, tracking_uri=uri)
    module._send_unsent(job, tmp_path)
    assert asked == ([(job.title, tmp_path, {"parent_run_id": ""})] if sent else [])
    assert tracker.told == ([("close",), ("training", tmp_path)] if sent else [])


def test_a_stage_without_a_training_above_it_is_not_told_there(tmp_path, tracked):
    for identity in (None, RunIdentity(run_id="r")):
        if identity:
            write_identity(tmp_path, identity)
        module._log_to_training(job_of(tmp_path), tmp_path)
    assert tracked[1] == []


# ---------------------------------------------------------------------- files, errors, words


def test_what_the_workers_wrote_is_collected_from_their_storage(tmp_path):
    shared = f"memory://bucket/{tmp_path.name}"
    storage.write_atomically(f"{shared}/metrics.jsonl", b"one")
    storage.write_atomically(f"{shared}/notes.txt", b"mine")
    work = storage.WorkFolder(str(tmp_path))
    published = []
    work.publish = lambda *names: published.append(names)
    module._collect(job_of(tmp_path, storage_path=shared), work)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"one" and not (tmp_path / "notes.txt").exists()
    assert published == [WORKER_FILES]
    fetched = []
    work.fetch = lambda *names: fetched.append(names)
    module._collect(job_of(tmp_path), work)
    assert fetched == [WORKER_FILES] and len(published) == 1


def test_the_mistake_behind_a_workers_death_is_told():
    class GroupError(Exception):
        def __init__(self, failures):
            self.worker_failures = failures

    def caused(by, cause):
        by.__cause__ = cause
        return by

    wrapped = RuntimeError("task failed")
    wrapped._base_exc = ValueError("a wrong setting")
    for failures, told in (
        ({0: RuntimeError("killed"), 1: caused(RuntimeError("x"), ValueError("why"))}, "why"),
        ({0: wrapped, 1: ValueError("second")}, "a wrong setting"),
    ):
        found = module._cause(GroupError(failures))
        assert isinstance(found, TrainingStopped) and str(found) == told
    unknown = GroupError({0: RuntimeError("killed")})
    assert module._cause(unknown) is unknown


def test_a_call_in_a_thread_is_waited_for_and_its_error_raised_here():
    seen = []
    module.call_in_thread(lambda: seen.append(threading.current_thread()))
    assert seen[0] is not threading.current_thread() and seen[0].daemon and not seen[0].is_alive()

    for error in (KeyError("why"), SystemExit(3), KeyboardInterrupt()):  # a thread would end silently at the last two

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            module.call_in_thread(fail)
        assert caught.value is error


def test_a_gpu_that_is_not_there_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "train_loop", lambda job: pytest.fail("it would train"))
    with pytest.raises(SettingsError, match=r"use_gpu=true: torch .* finds no CUDA GPU here. Give use_gpu=false"):
        module._run_inline(job_of(tmp_path, use_gpu=True))


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_settings_are_for_gpus_and_leave_ones_own(tmp_path, monkeypatch, gpu):
    environment = {"OTHER": "1"}
    monkeypatch.setattr(module.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "train_loop", lambda job: "result")
    assert module._run_inline(job_of(tmp_path, use_gpu=gpu, loader_workers=0)) == "result"
    assert environment == {"OTHER": "1", **(module.GPU_ENVIRONMENT if gpu else {})}
    environment["PYTORCH_ALLOC_CONF"] = "mine"
    module._run_inline(job_of(tmp_path, use_gpu=gpu, loader_workers=0))
    assert environment["PYTORCH_ALLOC_CONF"] == "mine"


@pytest.mark.parametrize(("loaders", "order"), [(1, ["open", "train", "closed"]), (0, ["train"])])
def test_loader_processes_have_a_cluster_of_ours(tmp_path, monkeypatch, loaders, order):
    """Ray Data would start one of its own: without a token, and for everybody on the network."""
    done = []

    @contextlib.contextmanager
    def cluster(settings):
        assert settings.loader_workers == loaders
        done.append("open")
        yield
        done.append("closed")

    monkeypatch.setattr(module, "start_ray", cluster)
    monkeypatch.setattr(module, "train_loop", lambda job: done.append("train") or "result")
    assert module._run_inline(job_of(tmp_path, num_workers=0, loader_workers=loaders)) == "result"
    assert done == order


@pytest.mark.parametrize(
    ("steps", "states", "refused"),
    [(13, 0, 13), (0, 13, 13), (12, 12, 0), (14, 13, 14), (12, 14, 14), (13, 14, 14), (0, 0, 0)],
)
def test_a_run_of_more_steps_is_refused_with_their_number(tmp_path, monkeypatch, steps, states, refused):
    results = {tmp_path: {"steps": steps} if steps else None}
    monkeypatch.setattr(module, "read_result", lambda output: results[output])
    monkeypatch.setattr(
        module.StateStore, "newest_step", lambda self: states if self.location == f"{tmp_path}/states" else 1 / 0
    )
    if not refused:
        return module._refuse_shorter_run(job_of(tmp_path), tmp_path)
    with pytest.raises(SettingsError, match=f"holds a run of {refused} steps, and 12 are asked for"):
        module._refuse_shorter_run(job_of(tmp_path), tmp_path)


def test_the_last_lines_of_a_job(capsys):
    result = WorkerResult("/checkpoint", 3.14159, 2.0, 12).to_stage_result("/out/result.json", 61.6)
    module.print_result(result)
    plain = "loss 3.142 -> 2.000 in 12 steps, 62 s\n", "checkpoint: /checkpoint\n/out/result.json\n"
    assert capsys.readouterr().out == "".join(plain)
    held = {"first": 3.0, "last": 2.5, "best": 2.25, "best_step": 8, "checkpoint_step": 4}
    module.print_result({**result, "held_out": held})
    line = "held-out loss 3.000 -> 2.500, least 2.250 after step 8; the checkpoint is of step 4\n"
    assert capsys.readouterr().out == plain[0] + line + plain[1]
