"""A stage as a Ray Train job: one worker or two, one stage after another, and the same numbers as in one process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipelines.data.features import cache_features
from pipelines.miniature.tiny_training import as_words, make_world, train_settings
from pipelines.settings import CacheFeaturesSettings
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training.held_out_record import read_evaluations
from pipelines.training.record import HELD_OUT_FILE
from pipelines.training.run import run_stage
from tests.killed_jobs import run_killed
from tests.paths import ROOT
from tests.training_runs import assert_same_weights, losses, record, run_until
from tinygptv.checkpoint.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """An uninterrupted run in this process."""
    output = tmp_path_factory.mktemp("straight")
    run_stage(train_settings(world, output), 4)
    return output


def assert_same_run(one, two):
    """Two finished runs agree to the last bit."""
    assert losses(one) == losses(two)
    assert [e["sample_ids"] for e in record(one)] == [e["sample_ids"] for e in record(two)]
    assert_same_weights(*(load_checkpoint(output / "checkpoint")[0] for output in (one, two)))


def test_a_worker_trains_as_this_process_does(ray_cluster, world, straight, tmp_path):
    result = run_stage(train_settings(world, tmp_path, num_workers=1), 4)
    assert losses(tmp_path) == losses(straight)
    assert result["steps"] == 12 and json.loads((tmp_path / "result.json").read_text()) == result
    model, _, metadata = load_checkpoint(result["checkpoint"])
    expected, _, _ = load_checkpoint(straight / "checkpoint")
    assert metadata["stage"] == 4
    assert_same_weights(model, expected)


@pytest.mark.slow
def test_two_workers_and_the_next_stage(ray_cluster, world, straight, tmp_path):
    """The samples of a step are the same whatever the number of workers; the losses are, to rounding."""
    first = run_stage(train_settings(world, tmp_path / "1", num_workers=2, stage={"sources": PAIRS}), 1)
    second = run_stage(
        train_settings({**world, "init_from": first["checkpoint"]}, tmp_path / "2", num_workers=2, loader_workers=1), 4
    )
    inline = run_stage(train_settings({**world, "init_from": first["checkpoint"]}, tmp_path / "inline"), 4)
    assert load_checkpoint(second["checkpoint"])[2]["init_from"] == first["checkpoint"]
    for a, b in zip(record(tmp_path / "2"), record(tmp_path / "inline"), strict=True):
        assert a["sample_ids"] == b["sample_ids"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    assert second["last_loss"] == pytest.approx(inline["last_loss"], rel=2e-4)


@pytest.mark.slow
def test_two_workers_share_the_held_out_rows(ray_cluster, world, tmp_path):
    """Each computes its share; losses and scores are those of one worker."""
    found = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        settings = train_settings(world, output, num_workers=workers, eval_fraction=0.3, eval_every=4, use_best=True)
        run_stage(settings, 4)
        found.append(read_evaluations(output / HELD_OUT_FILE))
    assert [each["step"] for each in found[0]] == [0, 4, 8, 12]
    for one, two in zip(*found, strict=True):
        assert two["step"] == one["step"] and two["scores"] == one["scores"]
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert two["sources"] == pytest.approx(one["sources"], rel=2e-4)


@pytest.mark.slow
def test_features_by_actors_train_to_the_same_losses(ray_cluster, tmp_path):
    own = make_world(tmp_path / "world")
    reference = tmp_path / "inline"
    run_stage(train_settings(own, reference, max_steps=4), 4)
    cache = {"data": own["data"], "checkpoint": own["init_from"], "output": str(tmp_path / "cache")}
    found = cache_features(CacheFeaturesSettings(num_workers=2, quiet=True, **cache))
    assert found["rows"] == 52 and found["parts"] == 7
    run_stage(train_settings(own, tmp_path / "cached", max_steps=4, features="cached"), 4)
    for a, b in zip(record(tmp_path / "cached"), record(reference), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


PAIRS = {"pairs": {"weight": 1, "batch_size": 4}}


# ---------------------------------------------------------------------- kills

LONG = {"schedule": {"steps_per_epoch": 40, "epochs": 2, "peak": 1e-2, "minimum": 1e-3, "warmup_start": 1e-3}}


@pytest.fixture(scope="module")
def long_run(world, tmp_path_factory):
    """80 undisturbed steps."""
    output = tmp_path_factory.mktemp("long")
    run_stage(train_settings(world, output, stage=LONG), 4)
    return output


def steps_done(output):
    try:
        match = re.search(r"step (\d+)/", (output / "progress.txt").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0


def kill_worker(output, at):
    """SIGKILL a training worker of this process's cluster once the run has come so far."""
    deadline = time.monotonic() + 200
    while steps_done(output) < at and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            (output / "killed").touch()
            return


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(ray_cluster, world, long_run, tmp_path):
    killer = threading.Thread(target=kill_worker, args=(tmp_path, 20))
    killer.start()
    run_stage(train_settings(world, tmp_path, num_workers=1, max_failures=2, stage=LONG), 4)
    killer.join()
    assert (tmp_path / "killed").is_file()
    assert_same_run(tmp_path, long_run)


def test_a_killed_driver_goes_on_by_the_same_command(world, long_run, tmp_path):
    words = as_words(train_settings(world, tmp_path, stage=LONG))
    run_killed("jobs/stage4.py", words, "tinygptv.training.train_step:TrainStep.run", 24)
    assert steps_done(tmp_path) >= 20 and not (tmp_path / "result.json").exists()
    command = [sys.executable, "jobs/stage4.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "result.json")
    assert_same_run(tmp_path, long_run)


@pytest.mark.slow
def test_going_on_with_more_workers_keeps_the_order(ray_cluster, world, straight, tmp_path, monkeypatch):
    run_until(monkeypatch, 7, train_settings(world, tmp_path))
    run_stage(train_settings(world, tmp_path, num_workers=2), 4)
    for a, b in zip(record(tmp_path), record(straight), strict=True):
        assert a["sample_ids"] == b["sample_ids"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    assert losses(tmp_path)[:6] == losses(straight)[:6]


def test_states_and_checkpoint_in_object_storage(world, straight, tmp_path, monkeypatch):
    """fsspec's memory file system stands for a bucket; another node with an empty disk resumes from it."""
    place = f"memory://bucket/{tmp_path.name}"
    run_until(monkeypatch, 7, train_settings(world, tmp_path / "a", storage_path=place))
    result = run_stage(train_settings(world, tmp_path / "b", storage_path=place), 4)
    assert result["checkpoint"] == f"{place}/checkpoint"
    assert losses(tmp_path / "b") == losses(straight)
    again = run_stage(train_settings({**world, "init_from": result["checkpoint"]}, tmp_path / "c", max_steps=1), 4)
    assert again["steps"] == 1


# ---------------------------------------------------------------------- MLflow


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(client):
    experiment = client.get_experiment_by_name("tinygptv-mini")
    runs = client.search_runs([experiment.experiment_id])
    return {run.info.run_name.partition(",")[0].removeprefix("mini "): run for run in runs}


def steps_of(client, run, key="loss"):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


def test_a_resumed_run_continues_its_curve_and_stages_share_a_parent(world, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = train_settings(world, tmp_path / "1", tracking_uri=uri, predict_every=6)
    run_until(monkeypatch, 8, first)  # two steps beyond the last state are on record, and will be done again
    result = run_stage(first, 4)
    second = {**world, "init_from": result["checkpoint"]}
    run_stage(train_settings(second, tmp_path / "2", tracking_uri=uri, stage={"sources": PAIRS}, max_steps=3), 2)

    client = client_of(uri)
    runs = runs_of(client)
    names = ("stage 4 multi-task learning", "stage 2 pre-training")
    assert set(runs) == {"training", *names}
    run = runs[names[0]]
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in names} == {runs["training"].info.run_id}
    inputs = {found.dataset.name: json.loads(found.dataset.profile) for found in run.inputs.dataset_inputs}
    assert inputs == {"pairs": {"num_rows": 30}, "questions": {"num_rows": 22}}
    assert {"hardware.cpus", "mlflow.source.name"} <= set(run.data.tags)
    for key in ("loss", "lr", "grad_norm"):
        assert steps_of(client, run, key) == list(range(12)), key
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.value for metric in history] == [entry["loss"] for entry in record(tmp_path / "1")]
    assert {"tokens_per_second", "data_wait_share", "norms/lora/layer_01", "loss/pairs"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED" and run.data.params["stage.lora_rank"] == "2"
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "predictions"} <= names
    training = runs["training"]
    assert steps_of(client, training, "loss/stage4") == list(range(12)), "its charts show all stages"
    assert steps_of(client, training, "loss/stage2") == list(range(3))
    assert training.inputs.dataset_inputs and training.data.tags["recipe"] == run.data.tags["recipe"]
    tables = {file.path for file in client.list_artifacts(run.info.run_id, "predictions")}
    assert {"predictions/step_000006.json", "predictions/step_000012.json"} <= tables
    (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert model.tags["location"] == result["checkpoint"]


def test_mlflow_away_stops_nothing_and_is_told_later(world, straight, tmp_path):
    output = tmp_path / "run"
    run_stage(train_settings(world, output, tracking_uri="http://127.0.0.1:9"), 4)
    assert losses(output) == losses(straight)
    assert (output / JOURNAL_FILE).is_file()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_stage(train_settings(world, output, tracking_uri=uri), 4)  # finished: nothing is trained, what waited is sent
    assert not (output / JOURNAL_FILE).exists()
    client = client_of(uri)
    runs = runs_of(client)
    assert steps_of(client, runs["stage 4 multi-task learning"]) == list(range(12))
