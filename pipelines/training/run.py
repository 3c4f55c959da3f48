"""One training stage as a Ray Train job: settings + stage -> TorchTrainer -> checkpoint folder and result.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import time
import uuid
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.data.loader import data_path
from pipelines.progress import PROGRESS_FILE, follow
from pipelines.settings import TrainSettings
from pipelines.tracking.base import Tracker, open_tracker
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training.describe import describe_stage
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob, resolve_job, resolve_stage, resolved_config
from pipelines.training.ray_entry import WORKER_RESULT, train_worker
from pipelines.training.record import RECORD_FILE
from pipelines.training.worker import train_loop
from tinygptv.checkpoint.checkpoint import MANIFEST, CheckpointError, read_stage, verify_folder

logger = logging.getLogger(__name__)


def run_stage(settings: TrainSettings, number: int, *, parent_run_id: str = "") -> dict[str, Any]:
    """Train one stage to its end, resuming where an earlier run with the same output stopped.

    Args:
        settings: where and how large.
        number: which stage of ``settings.recipe``.
        parent_run_id: MLflow run to nest under.

    Returns:
        ``checkpoint``, ``first_loss``, ``last_loss``, ``steps``, ``seconds``, ``result`` (path of result.json).

    Raises:
        SettingsError: a setting cannot be used.
        CheckpointError: the start is no checkpoint.
        FeatureError: cached features are missing.
        FileNotFoundError: data is missing.
        TrainingStopped: the guard stopped.
    """
    started = time.perf_counter()
    job, output = resolve_job(settings, number)
    finished = _finished_result(output, job.num_steps)
    if finished:
        logger.info("stage %d is finished already: %s", number, output)
        _send_unsent(job, output)
        return finished
    job = dataclasses.replace(job, run=_tracking_run(job, output, parent_run_id))
    logger.info("\n%s", describe_stage(job.settings, job.stage))
    job.stage.schedule.warn_if_rising()
    with follow(output / PROGRESS_FILE, quiet=settings.quiet):
        result = _run_inline(job) if settings.num_workers == 0 else _run_on_ray(job, output)
    result = {**result, "seconds": round(time.perf_counter() - started, 1), "result": str(output / "result.json")}
    (output / "result.json").write_text(json.dumps(result, indent=1))
    _log_outcome(job, output, result)
    return result


def dry_run(settings: TrainSettings, number: int) -> str:
    """What a stage would do, as text; places that are given must be right.

    Raises:
        SettingsError: a setting cannot be used.
        CheckpointError: the start is no checkpoint.
    """
    if settings.init_from and storage.is_local(settings.init_from):
        settings = settings.model_copy(update={"init_from": data_path(settings.init_from)})
        verify_folder(settings.init_from, hashes=False)
    return describe_stage(settings, resolve_stage(settings, number))


def _tracking_run(job: TrainJob, output: Path, parent_run_id: str) -> dict[str, str]:
    """Begin the tracker's run in the driver (workers continue it), or find the one that this output began.

    Returns:
        ``run_id`` (empty while the tracker does not answer), ``key`` to find it by, ``parent``; empty where tracking
        is off.
    """
    settings, stage = job.settings, job.stage
    if settings.tracking_uri == "none":
        return {}
    record = output / "run.json"
    run = json.loads(record.read_text()) if record.is_file() else {"run_id": "", "key": uuid.uuid4().hex}
    run.setdefault("parent", parent_run_id or _training_run(settings))
    tracker = _continue_tracker(job, output, run)
    run["run_id"] = tracker.run_id
    record.write_text(json.dumps(run))
    tracker.params(resolved_config(settings, stage))
    tracker.tags({"stage": str(stage.number), "recipe": settings.recipe, "seed": str(settings.seed)})
    tracker.artifact(output / "config.yaml")
    tracker.close("RUNNING")
    return run


def _training_run(settings: TrainSettings) -> str:
    """The parent of all stages of a training: the one that the start's stage had, or a new one."""
    known = read_stage(settings.init_from).get("tracking_parent", "")
    tracker = open_tracker(settings, "training", run_id=known)
    tracker.close()
    return tracker.run_id


def _finished_result(output: Path, num_steps: int) -> dict[str, Any] | None:
    path = output / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    checkpoint = result.get("checkpoint", "")
    if not checkpoint or result.get("steps") != num_steps:
        return None
    if not storage.is_local(checkpoint):
        return result if storage.exists(storage.join(checkpoint, MANIFEST)) else None
    try:
        verify_folder(checkpoint, hashes=False)
    except CheckpointError:
        return None
    return result


def _run_inline(job: TrainJob) -> dict[str, Any]:
    return train_loop(job)


def _run_on_ray(job: TrainJob, output: Path) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = job.settings
    with start_ray(settings):
        workers: Any = (settings.min_workers, settings.num_workers) if settings.min_workers else settings.num_workers
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": pickle.dumps(job)},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            run_config=RunConfig(
                name="ray_train",
                storage_path=job.storage,
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        trainer.fit()
    result = json.loads(storage.read_bytes(storage.join(job.storage, WORKER_RESULT)))
    if "stopped" in result:
        raise TrainingStopped(result["stopped"])
    return result


def _log_outcome(job: TrainJob, output: Path, result: dict[str, Any]) -> None:
    if not job.run:
        return
    from pipelines.training.plots import loss_curve

    tracker = _continue_tracker(job, output, job.run)
    curve = loss_curve(output / RECORD_FILE, output / "loss.png", job.stage, job.settings.recipe)
    tracker.artifact(curve)
    tracker.artifact(output / RECORD_FILE)
    tracker.tags({"checkpoint": result["checkpoint"]})
    tracker.model(f"stage{job.stage.number}", result["checkpoint"])
    tracker.close()


def _send_unsent(job: TrainJob, output: Path) -> None:
    """Send what an earlier run could not tell its tracker."""
    if not (output / JOURNAL_FILE).is_file() or job.settings.tracking_uri == "none":
        return
    run = json.loads((output / "run.json").read_text())
    _continue_tracker(job, output, run).close()


def _continue_tracker(job: TrainJob, output: Path, run: dict[str, str]) -> Tracker:
    return open_tracker(
        job.settings,
        job.stage.title,
        run_id=run["run_id"],
        key=run["key"],
        parent_run_id=run["parent"],
        journal=output,
    )


def print_result(result: dict[str, Any]) -> None:
    """The closing lines of a stage's job; the last one is the path of result.json."""
    print(
        f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f} in {result['steps']} steps, "
        f"{result['seconds']:.0f} s\ncheckpoint: {result['checkpoint']}\n{result['result']}"
    )
