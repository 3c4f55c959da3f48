"""What Ray Train is asked for, and what comes back from its workers; there is no cluster here."""

from __future__ import annotations

import contextlib
import json
import pickle
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from pipelines import storage
from pipelines.data.loader import CutCount
from pipelines.settings import SettingsError, TrainSettings
from pipelines.training import ray_entry
from pipelines.training import run as module
from pipelines.training import worker as worker_module
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from pipelines.training.ray_entry import train_worker
from pipelines.training.result import WorkerResult
from pipelines.training.run_reports import RayTrainReports
from tinygptv.training.stages import get_stage

RESULT = WorkerResult("/checkpoint", 3.0, 2.0, 12, {"a": CutCount(5, 1, 2)}, None, True)


def job_of(folder, **changes):
    return TrainJob(TrainSettings(output=str(folder), **changes), get_stage("mini", 4), None, 12, str(folder))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Run a job whose trainer writes an outcome and keeps what it was made with."""

    def run(outcome, **changes):
        asked = {}

        class Trainer:
            def __init__(self, function, **options):
                asked.update(options, function=function, left=sorted(path.name for path in tmp_path.iterdir()))

            def fit(self):
                assert asked["cluster"] == "open"
                if isinstance(outcome, Exception):
                    raise outcome
                storage.write_atomically(storage.join(job.storage, "worker_result.json"), json.dumps(outcome).encode())

        @contextlib.contextmanager
        def cluster(settings):
            assert settings == job.settings
            asked["cluster"] = "open"
            yield
            asked["cluster"] = "closed"

        job = job_of(tmp_path, **changes)
        monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
        monkeypatch.setattr(module, "start_ray", cluster)
        monkeypatch.setattr(module, "check_resources", lambda *told: asked.update(told=told))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
        return module._run_on_ray(job), asked, job

    return run


@pytest.mark.parametrize(
    ("changes", "workers", "told"),
    [
        ({"num_workers": 3}, 3, ({"CPU": 2.0}, "training (num_workers=3, use_gpu=false)", 3)),
        (
            {"num_workers": 3, "min_workers": 2, "use_gpu": True},
            (2, 3),
            ({"CPU": 2.0, "GPU": 1.0}, "training (num_workers=2, use_gpu=true)", 2),
        ),
    ],
)
def test_ray_train_is_asked_for_what_the_settings_say(trained, tmp_path, changes, workers, told):
    changes = {"cpus_per_worker": 2.0, "keep_checkpoints": 4, "max_failures": 5, **changes}
    for name, content in (("states/state", "ours"), ("ray_train/checkpoint_manager_snapshot.json", '{"half')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    result, asked, job = trained(RESULT.to_dict(), **changes)
    assert result == RESULT
    assert (asked["function"], pickle.loads(asked["train_loop_config"]["job"])) == (train_worker, job)
    assert (asked["told"], asked["cluster"]) == (told, "closed")
    scaling, run = asked["scaling_config"], asked["run_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (workers, job.settings.use_gpu)
    assert scaling.resources_per_worker == told[0]
    assert asked["left"] == ["states"], "Ray's half-written snapshot of a killed run would end every later one"
    assert (run.name, run.storage_path) == ("ray_train", str(tmp_path))
    assert run.storage_filesystem == storage.resolve(str(tmp_path))[0] is not None
    assert (run.checkpoint_config.num_to_keep, run.failure_config.max_failures) == (4, 5)
    (callback,) = run.callbacks
    assert callback.path == str(tmp_path / "failures.txt")
    environment = run.worker_runtime_env or {}
    assert environment == ({"env_vars": module.GPU_ENVIRONMENT} if job.settings.use_gpu else {})


@pytest.mark.parametrize(
    ("changes", "cpus", "workers", "needed"),
    [
        ({"num_workers": 1}, 1.0, 1, "1.75"),
        ({"num_workers": 1}, 1.75, 1, ""),
        ({"num_workers": 2, "cpus_per_worker": 2.0}, 5.4, 2, "5.5"),
        ({"num_workers": 2, "cpus_per_worker": 2.0}, 5.5, 2, ""),
        ({"num_workers": 8, "min_workers": 1}, 4.0, 4, "7"),  # an elastic training takes all four
        ({"num_workers": 1, "loader_workers": 0}, 1.0, 1, ""),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_loaders_that_a_local_cluster_has_no_cpu_for_are_done_without(
    tmp_path, monkeypatch, caplog, changes, cpus, workers, needed, own
):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    monkeypatch.setattr(module, "is_own_cluster", lambda: own)
    job = job_of(tmp_path, **changes)
    found = module._with_loaders_that_fit(job)
    told = f"training with num_workers={workers} and loader processes needs {needed} CPUs, and {cpus:g} are there: "
    if not needed:
        assert found is job and not caplog.text
    elif own:
        assert (found.settings.loader_workers, found.settings.num_workers) == (0, job.settings.num_workers)
        assert f"{told}each worker makes its own batches (loader_workers=0)." in caplog.text
    else:
        assert found is job
        assert f"{told}loaders wait for nodes to join the Ray cluster; loader_workers=0 needs none." in caplog.text


def test_workers_get_the_job_whose_loaders_fit(trained, monkeypatch):
    monkeypatch.setattr(module, "_with_loaders_that_fit", lambda job: job_of(job.output, loader_workers=0))
    _, asked, job = trained(RESULT.to_dict())
    assert pickle.loads(asked["train_loop_config"]["job"]).settings.loader_workers == 0 != job.settings.loader_workers


def test_a_stop_of_the_workers_is_one_of_the_driver(trained):
    with pytest.raises(TrainingStopped, match=r"^the guard stopped$"):
        trained({"stopped": "the guard stopped"})


# ---------------------------------------------------------------------- in a worker


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """Call the worker's function with a loop that gives or raises something; returns outcome and report."""

    def work(found, *, rank=0, size=1, **changes):
        told = []

        def loop(job, reports):
            assert isinstance(reports, RayTrainReports) and job.output == str(tmp_path)
            if isinstance(found, Exception):
                raise found
            return found

        context = SimpleNamespace(get_world_size=lambda: size, get_world_rank=lambda: rank)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(worker_module, "train_loop", loop)
        monkeypatch.setattr(RayTrainReports, "saved", lambda self, *values: told.append(values))
        job = job_of(tmp_path, **changes)
        train_worker({"job": pickle.dumps(job)})
        path = storage.join(job.storage, ray_entry.WORKER_RESULT)
        return json.loads(storage.read_bytes(path)) if storage.exists(path) else None, told

    return work


def test_the_result_of_the_first_rank_is_written_and_reported_as_a_state_is(worked, tmp_path):
    outcome, told = worked(RESULT, storage_path=str(tmp_path / "new/shared"))
    assert WorkerResult.from_dict(outcome) == RESULT
    assert told == [({"next_step": 12.0, "saved_step": 12.0, "loss": 2.0}, "/checkpoint")]


def test_other_ranks_write_nothing_and_report_too(worked):
    assert worked(None, rank=1, size=2) == (None, [({"next_step": 0.0, "saved_step": 0.0, "loss": 0.0}, "")])


@pytest.mark.parametrize(
    "error",
    [TrainingStopped("why"), SettingsError("why"), storage.DiskFullError("why")],
    ids=lambda e: type(e).__name__,
)
def test_a_mistake_is_told_and_not_tried_again(worked, error):
    outcome, told = worked(error)
    assert outcome == {"stopped": "why"} and told[0][1] == ""


def test_what_one_of_several_workers_meets_ends_all_of_them(worked):
    with pytest.raises(storage.DiskFullError):
        worked(storage.DiskFullError("why"), size=2)
    assert worked(TrainingStopped("why"), rank=1, size=2)[0] is None, "the guard stops all, and the first rank tells it"
    assert worked(TrainingStopped("why"), size=2)[0] == {"stopped": "why"}
    with pytest.raises(RuntimeError):
        worked(RuntimeError("a fault"))


def test_a_users_mistake_that_a_worker_met_is_the_drivers_error(trained):
    failure = WorkerGroupError("workers failed", {0: ValueError("data has no rows")})
    with pytest.raises(TrainingStopped, match=r"^data has no rows$"):
        trained(failure)
    with pytest.raises(WorkerGroupError):
        trained(WorkerGroupError("workers failed", {0: RuntimeError("killed")}))
    with pytest.raises(TrainingStopped, match=r"^5 starts failed$"):
        trained(ControllerError(ValueError("5 starts failed")))  # of our callback, in Ray Train's controller
    with pytest.raises(ControllerError):
        trained(ControllerError(RuntimeError("no workers")))
    with pytest.raises(TrainingStopped, match=r"^the process that leads the training was lost, .*: the same command"):
        trained(ActorDiedError())
