"""One training stage as a Ray Train job: settings + stage -> TorchTrainer -> checkpoint folder and result.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import yaml

from pipelines.cluster import start_ray
from pipelines.loader import LoadPlan, build_mixture, data_path, open_shards
from pipelines.progress import PROGRESS_FILE, follow
from pipelines.settings import SettingsError, TrainSettings
from pipelines.tracking import NullTracker, open_tracker
from tinygptv.checkpoint import CheckpointError, verify_folder
from tinygptv.config import TinyGPTVConfig
from tinygptv.stages import Stage, StageSource, get_stage

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
        FileNotFoundError: data is missing.
    """
    started = time.perf_counter()
    job, output = resolve_job(settings, number, parent_run_id)
    finished = _finished_result(output, job.num_steps)
    if finished:
        logger.info("stage %d is finished already: %s", number, output)
        return finished
    with follow(output / PROGRESS_FILE, quiet=settings.quiet):
        result = _run_inline(job) if settings.num_workers == 0 else _run_on_ray(job, output)
    result = {**result, "seconds": round(time.perf_counter() - started, 1), "result": str(output / "result.json")}
    (output / "result.json").write_text(json.dumps(result, indent=1))
    _log_outcome(job, output, result)
    return result


def resolve_job(settings: TrainSettings, number: int, parent_run_id: str = "") -> tuple[Any, Path]:
    """Check everything that can be checked before work starts, and fix what every worker must agree on."""
    from pipelines.train_loop import TrainJob

    stage = apply_stage_settings(get_stage(settings.recipe, number), settings.stage)
    if not settings.init_from:
        raise SettingsError(f"stage {number} needs a start: give init_from=DIR, the checkpoint of the stage before.")
    if not settings.data:
        raise SettingsError(f"stage {number} needs data=DIR, the folder with one prepared shard set per source.")
    init_from = str(Path(settings.init_from).expanduser().absolute())
    verify_folder(init_from, hashes=False)
    output = settings.output_dir(f"outputs/{settings.recipe}/stage{number}")
    data = data_path(settings.data)
    build_mixture(stage, open_shards(data, stage), settings.seed)
    settings = settings.model_copy(update={"init_from": init_from, "data": data, "output": str(output)})
    num_steps = min(settings.max_steps or stage.schedule.num_steps, stage.schedule.num_steps)
    config = TinyGPTVConfig.from_pretrained(init_from)
    plan = LoadPlan(
        data=data,
        tokenizer=init_from,
        stage=stage,
        seed=settings.seed,
        image_token_id=config.image_token_id,
        num_query_tokens=config.num_query_tokens,
        micro_batch_size=settings.micro_batch_size,
        pack_length=stage.limits.max_text_tokens if settings.packing else 0,
        feature_key=_feature_key(settings, stage),
    )
    (output / "config.yaml").write_text(yaml.safe_dump(resolved_config(settings, stage), sort_keys=False))
    run_id = _tracking_run(settings, stage, output, parent_run_id)
    return TrainJob(settings, stage, plan, num_steps, str(output), run_id), output


def _feature_key(settings: TrainSettings, stage: Stage) -> str:
    if settings.features == "inline":
        return ""
    from pipelines.features import feature_key

    return feature_key(settings.init_from, stage.image_size)


def apply_stage_settings(stage: Stage, changes: dict[str, Any]) -> Stage:
    """Change fields of a stage by ``stage.*`` settings; ``sources``, ``limits`` and ``schedule`` take mappings.

    Raises:
        SettingsError: a field is unknown.
    """
    values: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in {field.name for field in dataclasses.fields(Stage)}:
            known = ", ".join(field.name for field in dataclasses.fields(Stage))
            raise SettingsError(f"stage.{key} is no field of a stage; known: {known}.")
        try:
            values[key] = _stage_value(stage, key, value)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"stage.{key}={value!r} is not usable: {error}.") from error
    try:
        return dataclasses.replace(stage, **values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _stage_value(stage: Stage, key: str, value: Any) -> Any:
    if key == "sources":
        return tuple(StageSource(name, **facts) for name, facts in value.items())
    if key == "schedule":
        return dataclasses.replace(stage.schedule, **value)
    if key == "limits":
        return dataclasses.replace(stage.limits, **value)
    return tuple(value) if key == "trainable" else value


def resolved_config(settings: TrainSettings, stage: Stage) -> dict[str, Any]:
    """Everything that determines the run, as plain data."""
    return json.loads(json.dumps({**settings.model_dump(), "stage": dataclasses.asdict(stage)}))


def _tracking_run(settings: TrainSettings, stage: Stage, output: Path, parent_run_id: str) -> str:
    """Start the MLflow run in the driver (workers continue it), or find the one that this output began."""
    record = output / "run.json"
    known = json.loads(record.read_text())["run_id"] if record.is_file() else ""
    tracker = open_tracker(settings, f"stage{stage.number}", run_id=known, parent_run_id=parent_run_id)
    if isinstance(tracker, NullTracker):
        return ""
    tracker.params(resolved_config(settings, stage))
    tracker.tags({"stage": str(stage.number), "recipe": settings.recipe, "seed": str(settings.seed)})
    tracker.artifact(output / "config.yaml")
    tracker.close("RUNNING")
    record.write_text(json.dumps({"run_id": tracker.run_id}))
    return tracker.run_id


def _finished_result(output: Path, num_steps: int) -> dict[str, Any] | None:
    path = output / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    try:
        verify_folder(result["checkpoint"], hashes=False)
    except (CheckpointError, KeyError):
        return None
    return result if result.get("steps") == num_steps else None


def _run_inline(job: Any) -> dict[str, Any]:
    from pipelines.train_loop import train_loop

    return train_loop(job)


def _run_on_ray(job: Any, output: Path) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = job.settings
    with start_ray(settings):
        workers: Any = (settings.min_workers, settings.num_workers) if settings.min_workers else settings.num_workers
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            run_config=RunConfig(
                name="ray_train",
                storage_path=str(output),
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        trainer.fit()
    return json.loads((output / "worker_result.json").read_text())


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train

    from pipelines.train_loop import train_loop

    result = train_loop(config["job"])
    if result:
        (Path(config["job"].output) / "worker_result.json").write_text(json.dumps(result))
    ray.train.report({"steps": result.get("steps", 0)})


def _log_outcome(job: Any, output: Path, result: dict[str, Any]) -> None:
    if not job.run_id:
        return
    from pipelines.plots import loss_curve

    tracker = open_tracker(job.settings, job.stage.title, run_id=job.run_id)
    curve = loss_curve(output / "metrics.jsonl", output / "loss.png", job.stage, job.settings.recipe)
    tracker.artifact(curve)
    tracker.artifact(output / "metrics.jsonl")
    tracker.tags({"checkpoint": result["checkpoint"]})
    tracker.close()


def print_result(result: dict[str, Any]) -> None:
    """The closing lines of a stage's job; the last one is the path of result.json."""
    print(
        f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f} in {result['steps']} steps, "
        f"{result['seconds']:.0f} s\ncheckpoint: {result['checkpoint']}\n{result['result']}"
    )
