"""One training stage as a Ray Train job: settings + stage -> TorchTrainer -> checkpoint folder and result.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from pipelines import storage
from pipelines.cluster import check_resources, is_own_cluster, lacking, start_ray
from pipelines.data.loader import LOADER_CPUS, open_shards
from pipelines.data.shards import ShardSet, find_shard_sets
from pipelines.node_cache import checked_checkpoint, local_checkpoint
from pipelines.progress import PROGRESS_FILE, follow
from pipelines.redact import redact
from pipelines.settings import SettingsError, TrainSettings
from pipelines.tracking.base import Tracker, continue_tracker, open_tracker
from pipelines.tracking.described import DataInput, run_title
from pipelines.tracking.identity import RUN_FILE, RunIdentity, read_identity
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training.describe import describe_stage
from pipelines.training.guard import TrainingStopped
from pipelines.training.held_out_record import read_evaluations
from pipelines.training.job import (
    TrainJob,
    refuse_other_model,
    refuse_trained_parts,
    resolve_job,
    resolve_stage,
    resolved_config,
    with_start_adapters,
)
from pipelines.training.plots import PAPER_LOSSES, PAPER_RECIPES, loss_curve
from pipelines.training.ray_entry import WORKER_RESULT, train_worker
from pipelines.training.record import HELD_OUT_FILE, RECORD_FILE, WORKER_FILES, read_record
from pipelines.training.result import RESULT_FILE, StageResult, WorkerResult, cut_sentence, read_result, write_result
from pipelines.training.states import StateStore
from pipelines.training.worker import train_loop
from tinygptv.checkpoint.checkpoint import read_stage
from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.folders import MANIFEST, is_whole

logger = logging.getLogger(__name__)

LOSS_PLOT = "loss.png"

_RAY_FOLDER = "ray_train"
"""Where Ray Train keeps what it is told, beside the training states."""

GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}
"""Of training workers with a GPU: memory is taken in segments that grow, so that little is lost between tensors."""

_TRAINING_POINTS = 500
"""About so many steps of a stage are shown in the run of its training."""


def run_stage(settings: TrainSettings, number: int, *, parent_run_id: str = "") -> StageResult:
    """Train one stage to its end, resuming where an earlier run with the same output stopped.

    Args:
        settings: where and how large.
        number: which stage of ``settings.recipe``.
        parent_run_id: MLflow run to nest under.

    Raises:
        SettingsError: a setting cannot be used.
        CheckpointError: the start is no checkpoint.
        FeatureError: cached features are missing.
        FileNotFoundError: data is missing.
        TrainingStopped: the guard stopped.
    """
    started = time.perf_counter()
    with ExitStack() as locks:
        job, work = resolve_job(settings, number, locks)
        return _run_job(job, work, parent_run_id, started)


def _run_job(job: TrainJob, work: storage.WorkFolder, parent_run_id: str, started: float) -> StageResult:
    settings, number, output = job.settings, job.stage.number, work.path
    _refuse_shorter_run(job, output)
    finished = _finished_result(output, job.num_steps)
    if finished:
        logger.info("stage %d is finished already: %s", number, work.location)
        _send_unsent(job, output)
        work.publish(JOURNAL_FILE)
        return finished
    job = dataclasses.replace(job, run=_begin_tracking(job, output, parent_run_id))
    work.publish(RUN_FILE, JOURNAL_FILE)  # the worker takes over what waits, if it writes there too
    logger.info("\n%s", describe_stage(job.settings, job.stage))
    next_step = _newest_step(job)
    if next_step:
        logger.info("resuming at step %d of %d from %s/states", next_step, job.num_steps, redact(job.storage))
    job.stage.schedule.warn_if_rising()
    progress = storage.join(job.storage, PROGRESS_FILE)
    with follow(progress, quiet=settings.quiet):
        trained = _run_inline(job) if settings.num_workers == 0 else _run_on_ray(job)
    _collect(job, work)
    result = trained.to_stage_result(work.uri(RESULT_FILE), time.perf_counter() - started)
    _log_outcome(job, output, result)
    write_result(output, result)
    work.publish(LOSS_PLOT, RUN_FILE, JOURNAL_FILE, RESULT_FILE)
    for name, count in trained.cut.items():
        if count.questions:
            logger.warning("%s.", cut_sentence(name, count))
    return result


def dry_run(settings: TrainSettings, number: int) -> str:
    """Plan of a stage, as text; paths that are given must be right.

    Raises:
        SettingsError: a setting cannot be used.
        CheckpointError: the start is no checkpoint.
    """
    stage = resolve_stage(settings, number)
    refuse_trained_parts(settings, stage)
    if settings.init_from:
        start = checked_checkpoint(settings.init_from, weights=False)
        config = read_config(start)
        stage = with_start_adapters(stage, config)
        refuse_other_model(stage, config)
        settings = settings.model_copy(update={"init_from": str(start)})
    return describe_stage(settings, stage)


def _begin_tracking(job: TrainJob, output: Path, parent_run_id: str) -> RunIdentity | None:
    """Begin the tracker's run in the driver, or continue the one of this output folder; workers continue it.

    Returns:
        Its identity; None where tracking is off.
    """
    settings, stage = job.settings, job.stage
    if settings.tracking_uri == "none":
        return None
    known = read_identity(output)
    parent = known.parent if known else parent_run_id or _training_run(settings)
    tracker = _continue_tracker(job, output, parent)
    tracker.params(resolved_config(settings, stage))
    tracker.tags({"stage": str(stage.number), "recipe": settings.recipe, "seed": str(settings.seed)})
    tracker.inputs(_data_inputs(job))
    if settings.recipe in PAPER_RECIPES:
        start, end = PAPER_LOSSES[stage.number]
        for step in (0, job.num_steps - 1):
            tracker.metrics({"loss/paper_start": start, "loss/paper_end": end}, step)
    tracker.artifact(output / "config.yaml")
    tracker.close("RUNNING")
    return read_identity(output)


def _data_inputs(job: TrainJob) -> list[DataInput]:
    """The data sets of the stage, and those whose loss is computed."""

    def describe(name: str, shards: ShardSet, rows: int, context: Literal["training", "evaluation"]) -> DataInput:
        return DataInput(name, shards.manifest.digest, shards.uri, rows, context)

    held = job.plan.held_out
    found = []
    for name, shards in open_shards(job.settings.data, job.stage).items():
        found.append(describe(name, shards, len(shards) - len(held.get(name, ())), "training"))
        if name in held:
            found.append(describe(f"{name} (held out)", shards, len(held[name]), "evaluation"))
    for folder in find_shard_sets(job.settings.eval_data) if job.settings.eval_data else []:
        shards = ShardSet.open(folder)
        found.append(describe(storage.file_name(folder), shards, len(shards), "evaluation"))
    return found


def _training_run(settings: TrainSettings) -> str:
    """The parent run of all stages of a training: the one of the start's stage, or a new one."""
    known = read_stage(local_checkpoint(settings.init_from, weights=False)).get("tracking_parent", "")
    tracker = open_tracker(settings, run_title(settings.recipe, "training"), identity=RunIdentity(run_id=known))
    tracker.close()
    return tracker.run_id


def _refuse_shorter_run(job: TrainJob, output: Path) -> None:
    """Raise where the output holds more steps than are asked for: its states cannot be cut back."""
    finished = read_result(output)
    done = max(finished["steps"] if finished else 0, _newest_step(job))
    if done > job.num_steps:
        raise SettingsError(
            f"{job.output} holds a run of {done} steps, and {job.num_steps} are asked for (max_steps, stage.schedule): "
            "give another output=, or overwrite=true to begin again."
        )


def _newest_step(job: TrainJob) -> int:
    return StateStore(storage.join(job.storage, "states"), 1).newest_step()


def _finished_result(output: Path, num_steps: int) -> StageResult | None:
    result = read_result(output)
    if result is None or (result["steps"] != num_steps and not result["stopped_early"]):
        return None
    checkpoint = result["checkpoint"]
    if not storage.is_local(checkpoint):
        return result if storage.exists(storage.join(checkpoint, MANIFEST)) else None
    return result if is_whole(checkpoint) else None


def _run_inline(job: TrainJob) -> WorkerResult:
    if job.settings.use_gpu:
        import torch

        if not torch.cuda.is_available():
            raise SettingsError(
                f"use_gpu=true: torch {torch.__version__} finds no CUDA GPU here. Give use_gpu=false, or num_workers=1 "
                "and the cluster that has GPUs as ray_address=HOST:PORT."
            )
        for name, value in GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    with start_ray(job.settings) if job.settings.loader_workers else nullcontext():
        result = train_loop(job)
    assert result is not None, "a single process is rank 0"
    return result


def _run_on_ray(job: TrainJob) -> WorkerResult:
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from pipelines.training.worker_failures import WorkerFailures, cause_of, told_failures

    settings = job.settings
    gpu_options: Any = {"worker_runtime_env": {"env_vars": dict(GPU_ENVIRONMENT)}} if settings.use_gpu else {}
    filesystem, storage_path = storage.resolve(job.storage)
    # Ray Train would resume from its own snapshot, and fail for ever where a kill or a full disk left half of one.
    storage.remove_folder(storage.join(job.storage, _RAY_FOLDER))
    with start_ray(settings):
        least = settings.min_workers or settings.num_workers
        worker = {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if settings.use_gpu else {})}
        check_resources(worker, f"training (num_workers={least}, use_gpu={str(settings.use_gpu).lower()})", least)
        job = _with_loaders_that_fit(job)
        workers: Any = (settings.min_workers, settings.num_workers) if settings.min_workers else settings.num_workers
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": pickle.dumps(job)},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=settings.use_gpu,
                resources_per_worker=worker,
            ),
            run_config=RunConfig(
                name=_RAY_FOLDER,
                storage_path=storage_path,
                storage_filesystem=filesystem,
                checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                failure_config=FailureConfig(max_failures=settings.max_failures),
                callbacks=[WorkerFailures(job.storage, settings.max_failures)],  # type: ignore[list-item]  # annotated as Ray Tune's
                **gpu_options,
            ),
        )
        try:
            with told_failures(job.storage):
                call_in_thread(trainer.fit)
        except (TrainingFailedError, RayActorError) as error:
            raise cause_of(error) from error
    outcome = json.loads(storage.read_bytes(storage.join(job.storage, WORKER_RESULT)))
    if "stopped" in outcome:
        raise TrainingStopped(outcome["stopped"])
    return WorkerResult.from_dict(outcome)


def _with_loaders_that_fit(job: TrainJob) -> TrainJob:
    """The job, its batches made in the workers themselves where these leave no CPU to the loaders of a local cluster.

    A worker would wait for its first batch for ever. Batches are the same wherever they are made.
    """
    import ray

    settings = job.settings
    room = int(ray.cluster_resources().get("CPU", 0) / settings.cpus_per_worker)
    workers = max(1, min(settings.num_workers, room))  # an elastic training takes what there is
    lacks = lacking({"CPU": workers * (settings.cpus_per_worker + LOADER_CPUS)})
    if not settings.loader_workers or not lacks:
        return job
    what = f"training with num_workers={workers} and loader processes needs {lacks}"
    if not is_own_cluster():
        logger.warning("%s: loaders wait for nodes to join the Ray cluster; loader_workers=0 needs none.", what)
        return job
    logger.warning("%s: each worker makes its own batches (loader_workers=0).", what)
    return dataclasses.replace(job, settings=settings.model_copy(update={"loader_workers": 0}))


def call_in_thread(function: Callable[[], object]) -> None:
    """Call a function in a thread and wait for it; an error of its is raised here.

    Ray Train's handler of Ctrl-C, which it sets only in the main thread, ends the process without a word and stays set
    for whatever the process does next.
    """
    failures: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)  # a wait without end would not hear Ctrl-C on every system
    if failures:
        raise failures[0]


def _collect(job: TrainJob, work: storage.WorkFolder) -> None:
    """Have what rank 0 wrote, perhaps on another machine, in the driver's output folder."""
    if job.storage == job.output:
        work.fetch(*WORKER_FILES)
        return
    written = storage.WorkFolder(job.storage)
    written.fetch(*WORKER_FILES)
    storage.copy_tree(written.path, work.path, [name for name in WORKER_FILES if name != JOURNAL_FILE])
    unsent = written.path / JOURNAL_FILE
    if unsent.is_file():
        with (work.path / JOURNAL_FILE).open("ab") as journal:
            journal.write(unsent.read_bytes())
    work.publish(*WORKER_FILES)
    unsent.unlink(missing_ok=True)  # it is sent from here on; a longer run would send it again
    written.publish(JOURNAL_FILE)


def _log_outcome(job: TrainJob, output: Path, result: StageResult) -> None:
    """Draw the loss curve, and log it with the checkpoint; a quiet run without tracking has nobody to look at it."""
    if not job.run and job.settings.quiet:
        return
    curve = loss_curve(output / RECORD_FILE, output / LOSS_PLOT, job.stage, job.settings.recipe)
    tracker = _continue_tracker(job, output)
    if (output / HELD_OUT_FILE).is_file():
        tracker.artifact(output / HELD_OUT_FILE)
    with Image.open(curve) as image:
        tracker.image(image.convert("RGB"), "loss", result["steps"])
    tracker.artifact(curve)
    tracker.artifact(output / RECORD_FILE)
    tracker.tags({"checkpoint": result["checkpoint"]})
    tracker.model(f"stage{job.stage.number}", result["checkpoint"])
    tracker.close()
    _log_to_training(job, output)


def _log_to_training(job: TrainJob, output: Path) -> None:
    """Log the stage's curve to the run of the whole training, so that its charts show all stages.

    The names are those of an ablation's variants. Where the stage's own entries still wait, these wait for the next run
    of the same command, too.
    """
    identity = read_identity(output)
    if identity is None or not identity.parent or (output / JOURNAL_FILE).is_file():
        return
    entries, stage = read_record(output / RECORD_FILE), f"stage{job.stage.number}"
    name = run_title(job.settings.recipe, "training")
    tracker = open_tracker(job.settings, name, identity=RunIdentity(run_id=identity.parent))
    tracker.tags({"recipe": job.settings.recipe, "seed": str(job.settings.seed)})
    tracker.inputs(_data_inputs(job))
    every = max(1, len(entries) // _TRAINING_POINTS)
    for entry in entries:
        if entry["step"] % every == 0 or entry is entries[-1]:
            tracker.metrics({f"loss/{stage}": entry["loss"], f"lr/{stage}": entry["lr"]}, entry["step"])
    for each in read_evaluations(output / HELD_OUT_FILE):
        scores = {f"score/held_out/{stage}/{name}": score for name, score in each["scores"].items()}
        tracker.metrics({f"loss/held_out/{stage}": each["loss"], **scores}, each["step"])
    tracker.close()


def _send_unsent(job: TrainJob, output: Path) -> None:
    """Send what an earlier run could not send to its tracker."""
    if (output / JOURNAL_FILE).is_file() and job.settings.tracking_uri != "none":
        _continue_tracker(job, output).close()
        _log_to_training(job, output)


def _continue_tracker(job: TrainJob, output: Path, parent_run_id: str = "") -> Tracker:
    return continue_tracker(job.settings, job.title, output, parent_run_id=parent_run_id)
