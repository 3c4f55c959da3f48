"""A training stage, resolved: settings + stage of the recipe -> a job that is the same for every worker."""

from __future__ import annotations

import dataclasses
import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines import storage
from pipelines.data.feature_set import FeatureSet, feature_key
from pipelines.data.held_out import hold_out
from pipelines.data.loader import LoadPlan, build_mixture, open_shards
from pipelines.data.shards import ShardSet, find_shard_sets
from pipelines.fingerprint import Fingerprint, checkpoint_digest, claim, digest_of, manifest_digest
from pipelines.node_cache import checked_checkpoint
from pipelines.redact import redact
from pipelines.settings import AblateSettings, SettingsError, TrainSettings
from pipelines.settings.folders import refuse_no_folder, refuse_unwritable
from pipelines.settings.near_match import near_match
from pipelines.tracking.base import reachable_uri
from pipelines.tracking.described import run_title
from pipelines.tracking.identity import RunIdentity
from tinygptv.checkpoint.config_file import read_config
from tinygptv.config import TinyGPTVConfig
from tinygptv.json_object import JsonObject
from tinygptv.training.stages import Stage, StageSource, get_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """One stage, resolved; the driver sends it to every worker.

    Attributes:
        settings: where and how large.
        stage: the stage with its changes applied.
        plan: how batches are made.
        num_steps: optimizer steps to reach.
        output: output folder, absolute, or its URI.
        run: the tracker's run to log into; None for none.
        start: digest of the start's manifest, empty without one; a start that has another was replaced.
    """

    settings: TrainSettings
    stage: Stage
    plan: LoadPlan
    num_steps: int
    output: str
    run: RunIdentity | None = None
    start: str = ""

    @property
    def storage(self) -> str:
        """Folder or URI that every node reaches, for training states and the final checkpoint."""
        return self.settings.storage_path or self.output

    @property
    def title(self) -> str:
        """Name of the tracker's run."""
        return run_title(self.settings.recipe, f"stage {self.stage.number} {self.stage.title}")

    @property
    def evaluates(self) -> bool:
        """Whether the loss of held-out rows is computed while training."""
        return bool(self.settings.eval_data or self.settings.eval_fraction)


RESULTS = (
    "checkpoint",
    "states",
    "metrics.jsonl",
    "guard.jsonl",
    "held_out.jsonl",
    "predictions",
    "loss.png",
    "config.yaml",
    "run.json",
    "unsent.jsonl",
    "worker_result.json",
    "progress.txt",
    "failures.txt",
    "ray_train",
    "result.json",
)
"""Files of a stage in its output folder or its storage."""

DRIVER_FILES = ("run.json", "result.json", "unsent.jsonl")
"""Those that the driver reads again when the same command is run once more."""


def resolve_job(
    settings: TrainSettings, number: int, locks: ExitStack | None = None
) -> tuple[TrainJob, storage.WorkFolder]:
    """Check everything that can be checked before work starts, and resolve what must be the same for every worker.

    Args:
        settings: where and how large.
        number: of the stage.
        locks: keeps other runs from the folders that are claimed until it is closed; None keeps none.

    Returns:
        The job, and the driver's side of its output folder.

    Raises:
        OtherInputsError: the output folder, or ``storage_path``, holds a run of other inputs.
        SettingsError: a setting cannot be used, or another run is writing there.
        CheckpointError: the start is no checkpoint.
        FeatureError: cached features are missing.
        FileNotFoundError: data is missing.
        StorageError: a bucket does not exist or refuses access.
    """
    output = settings.output_location(f"outputs/{settings.recipe}/stage{number}")
    stage = resolve_stage(settings, number)
    given = (settings.init_from, settings.data)
    settings = resolve_paths(settings, number, output)
    start = checked_checkpoint(settings.init_from, weights=settings.features == "cached")
    if settings.storage_path and storage.is_local(settings.storage_path):
        refuse_unwritable("storage_path", Path(storage.absolute(settings.storage_path)))
    for folder in dict.fromkeys((output, settings.storage_path or output)):
        storage.check_access(folder, writes=True)
    refuse_no_folder("data", settings.data, "prepared shard sets (jobs/prepare_data.py)")
    shards = open_shards(settings.data, stage)
    held = _hold_out(settings, shards)
    build_mixture(stage, shards, settings.seed, held)
    config = read_config(start)
    stage = with_start_adapters(stage, config)
    refuse_other_model(stage, config)
    refuse_trained_parts(settings, stage)
    if settings.attention == "flex_attention" and not settings.use_gpu:
        raise SettingsError(
            "attention=flex_attention: torch has its gradient on GPUs only. Give use_gpu=true, or sdpa."
        )
    digests = {name: each.manifest.digest for name, each in shards.items()}
    plan = dataclasses.replace(_load_plan(settings, stage, start, config), held_out=held, digests=digests)
    if plan.feature_key:
        for shard_set in shards.values():
            FeatureSet.open(shard_set.uri, plan.feature_key)
    num_steps = min(settings.max_steps or stage.schedule.num_steps, stage.schedule.num_steps)
    job = TrainJob(settings, stage, plan, num_steps, output, start=manifest_digest(start))
    fingerprint = training_fingerprint(settings, stage, start, digests)
    for folder in dict.fromkeys((job.storage, job.output)):
        if locks is not None:
            locks.enter_context(storage.alone(folder))
        claim(folder, fingerprint, RESULTS, overwrite=settings.overwrite, inputs=given)
    work = storage.WorkFolder(output)
    work.fetch(*DRIVER_FILES)
    resolved = yaml.safe_dump(resolved_config(settings, stage), sort_keys=False)
    storage.write_atomically(str(work.path / "config.yaml"), resolved.encode())
    work.publish("config.yaml")
    return job, work


def _hold_out(settings: TrainSettings, shards: dict[str, ShardSet]) -> dict[str, np.ndarray]:
    """Rows of each source that are kept from training.

    Raises:
        SettingsError: there are none, though some are asked for, or none are left to train on.
    """
    for key in ("early_stop", "use_best"):
        if getattr(settings, key) and not (settings.eval_data or settings.eval_fraction):
            raise SettingsError(f"{key} needs held-out rows: give eval_data=DIR or eval_fraction=0.05.")
    if settings.eval_data and settings.eval_fraction:
        raise SettingsError("eval_data and eval_fraction are both given: give the one that holds the held-out rows.")
    if settings.eval_data:
        refuse_no_folder("eval_data", settings.eval_data, "held-out shard sets")
        if not any(len(ShardSet.open(folder)) for folder in find_shard_sets(settings.eval_data)):
            raise SettingsError(
                f"eval_data={settings.eval_data} holds no row, whose loss would always be 0: prepare some."
            )
    if not settings.eval_fraction:
        return {}
    held = hold_out(shards, settings.eval_fraction)
    for name, rows in held.items():
        logger.info("%s: %d of %d rows are held out of training", name, len(rows), len(shards[name]))
        if len(rows) == len(shards[name]):
            raise SettingsError(f"eval_fraction={settings.eval_fraction} leaves no row of {name} to train on.")
    if not any(len(rows) for rows in held.values()):
        raise SettingsError(f"eval_fraction={settings.eval_fraction} holds out none of so few rows: give a larger one.")
    return held


def training_fingerprint(settings: TrainSettings, stage: Stage, start: Path, data: dict[str, str]) -> Fingerprint:
    """Inputs that decide the weights at a stage's end, up to rounding.

    Left out is how the same steps are computed (workers, micro-batches, memory savers), how far (``max_steps``), and
    what is done at faults (``guard``): a run may be resumed with others.

    Args:
        settings: of the run.
        stage: with its changes applied.
        start: local folder of the start; its manifest is enough.
        data: digest of the shard set of each source.
    """
    fields = dataclasses.asdict(stage)
    fields["sources"] = {
        source.name: {"weight": source.weight, "batch_size": source.batch_size} for source in stage.sources
    }
    fields["source_order"] = list(fields["sources"])  # draws are by place, and the fingerprint sorts its names
    return Fingerprint.of(
        "train",
        recipe=settings.recipe,
        seed=settings.seed,
        precision=settings.precision,
        encoder_precision=settings.encoder_precision or settings.precision,
        start=checkpoint_digest(start),
        data=data,
        stage=fields,
        **({} if settings.frozen_weights == "full" else {"frozen_weights": settings.frozen_weights}),
        **_held_out_inputs(settings),
    )


def _held_out_inputs(settings: TrainSettings) -> dict[str, object]:
    """Effect of held-out rows on the weights: which rows are left to train on, and which step is the last."""
    inputs: dict[str, object] = {}
    if settings.eval_fraction:
        inputs["eval_fraction"] = settings.eval_fraction
    if settings.early_stop or settings.use_best:
        sets = [ShardSet.open(folder) for folder in find_shard_sets(settings.eval_data)] if settings.eval_data else []
        inputs["eval_data"] = digest_of([each.manifest.digest for each in sets])
        inputs["eval_every"] = settings.eval_every or settings.checkpoint_every
        inputs |= {key: getattr(settings, key) for key in ("eval_rows", "early_stop", "use_best")}
    return inputs


def resolve_stage(settings: TrainSettings | AblateSettings, number: int) -> Stage:
    """The stage of the recipe with the changes of the settings."""
    return apply_stage_settings(get_stage(settings.recipe, number), settings.stage)


def resolve_paths(settings: TrainSettings, number: int, output: str) -> TrainSettings:
    """The settings with every local path absolute; URIs stay as they are.

    Raises:
        SettingsError: a path is not given.
    """
    if not settings.init_from:
        raise SettingsError(f"stage {number} needs a start: give init_from=DIR, the checkpoint of the stage before.")
    if not settings.data:
        raise SettingsError(f"stage {number} needs data=DIR, the folder with one prepared shard set per source.")
    changes = {
        "init_from": storage.absolute(settings.init_from),
        "data": storage.absolute(settings.data),
        "eval_data": storage.absolute(settings.eval_data) if settings.eval_data else "",
        "output": output,
        "storage_path": storage.absolute(settings.storage_path) if settings.storage_path else "",
        "tracking_uri": reachable_uri(settings.tracking_uri, settings.storage_path or output),
    }
    return settings.model_copy(update=changes)


def with_start_adapters(stage: Stage, config: TinyGPTVConfig) -> Stage:
    """The stage with the LoRA adapters that will train: those of its start, where it has some.

    Their rank and alpha belong to their weights. The dropout is the stage's own.
    """
    if not config.lora_rank or not stage.lora_rank:
        return stage
    for name in ("lora_rank", "lora_alpha"):
        told, known = getattr(stage, name), getattr(config, name)
        if told != known:
            logger.warning(
                "stage.%s=%s is ignored: the start has LoRA adapters of %s %s, and these are trained. "
                "A start without them (merged) gets new ones.",
                name,
                told,
                name.removeprefix("lora_"),
                known,
            )
    return dataclasses.replace(stage, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)


def refuse_other_model(stage: Stage, config: TinyGPTVConfig) -> None:
    """Raise where the start's model cannot be that of the stage.

    Raises:
        SettingsError: its patches do not fill the image, or a part that shall train is not there.
    """
    patch = config.vision_config.patch_size
    if stage.image_size % patch:
        raise SettingsError(f"stage.image_size={stage.image_size} is no multiple of {patch}, the side of a patch.")
    if "lora" in stage.trainable and not (stage.lora_rank or config.lora_rank):
        raise SettingsError(
            "stage.trainable names lora, and neither the start nor the stage has adapters: give stage.lora_rank=64, or "
            "leave lora out."
        )


def refuse_trained_parts(settings: TrainSettings, stage: Stage) -> None:
    """Raise where a part trains that the settings need frozen.

    Raises:
        SettingsError: matrices in low bits, or the encoder of cached features, would train.
    """
    if settings.frozen_weights != "full" and "language_model" in stage.trainable:
        raise SettingsError(
            f"frozen_weights={settings.frozen_weights}: stage.trainable names language_model, so its matrices are not "
            "frozen: leave one of the two out."
        )
    trained = [part for part in ("vision_encoder", "qformer") if part in stage.trainable]
    if settings.features == "cached" and trained:
        raise SettingsError(
            f"features=cached: stage.trainable names {' and '.join(trained)}, through which no cached feature goes: "
            "give features=inline, or leave it out."
        )


def _load_plan(settings: TrainSettings, stage: Stage, start: Path, config: TinyGPTVConfig) -> LoadPlan:
    return LoadPlan(
        data=settings.data,
        tokenizer=settings.init_from,
        stage=stage,
        seed=settings.seed,
        image_token_id=config.image_token_id,
        num_query_tokens=config.num_query_tokens,
        micro_batch_size=1 if settings.micro_batch_size == "auto" else settings.micro_batch_size,
        pack_length=stage.limits.max_text_tokens if settings.packing else 0,
        feature_key=feature_key(start, stage.image_size) if settings.features == "cached" else "",
    )


def apply_stage_settings(stage: Stage, changes: dict[str, Any]) -> Stage:
    """Change fields of a stage by ``stage.*`` settings; ``limits`` and ``schedule`` take mappings of what changes.

    ``sources`` as a list of ``{name, weight, batch_size}``, or as a mapping from names to both values, replaces the
    stage's; a mapping with only one of the values changes the sources that it names. A weight of 0 leaves a source out.

    Raises:
        SettingsError: a field is unknown.
    """
    known = sorted(field.name for field in dataclasses.fields(Stage))
    values: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in known:
            raise SettingsError(f"stage.{key} is no field of a stage; {near_match(key, known)}")
        try:
            values[key] = _stage_value(stage, key, value)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"stage.{key}={value!r} is not usable: {str(error).rstrip('.')}.") from error
    try:
        return dataclasses.replace(stage, **values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _stage_value(stage: Stage, key: str, value: Any) -> Any:
    if key == "sources":
        return tuple(source for source in _sources_value(stage, value) if source.weight)
    if key in ("schedule", "limits"):
        return _with_fields(getattr(stage, key), value)
    if key == "trainable":
        if not isinstance(value, list):
            raise ValueError("a list of parts is wanted, e.g. [projector, lora]")
        return tuple(map(str, value))
    return value


def _with_fields(whole: Any, changes: Any) -> Any:
    """A dataclass with some of its fields changed.

    Raises:
        ValueError: ``changes`` is no mapping, or has an unknown field.
    """
    known = [field.name for field in dataclasses.fields(whole)]
    if not isinstance(changes, dict):
        raise ValueError(f"a mapping of {', '.join(known)} is wanted")
    for name in changes:
        if name not in known:
            raise ValueError(f"{name!r} is unknown; {near_match(name, sorted(known))}")
    return dataclasses.replace(whole, **changes)


def _sources_value(stage: Stage, value: Any) -> tuple[StageSource, ...]:
    known = {"weight", "batch_size"}
    if isinstance(value, list) and all(isinstance(f, dict) and set(f) == {"name", *known} for f in value):
        # A name such as 2024 is a number in YAML.
        return tuple(StageSource(str(f["name"]), f["weight"], f["batch_size"]) for f in value)
    if not isinstance(value, dict) or not all(isinstance(f, dict) and set(f) <= known for f in value.values()):
        raise ValueError("write {NAME: {weight: 1, batch_size: 1}} or [{name: NAME, weight: 1, batch_size: 1}]")
    if all(known <= set(fields) for fields in value.values()):
        return tuple(StageSource(str(name), **fields) for name, fields in value.items())
    unknown = sorted(set(value) - {source.name for source in stage.sources})
    if unknown:
        raise ValueError(f"source {unknown[0]!r} is not one of the stage's; a new one needs weight and batch_size")
    return tuple(dataclasses.replace(source, **value.get(source.name, {})) for source in stage.sources)


def resolved_config(settings: TrainSettings, stage: Stage) -> JsonObject:
    """Everything that determines the run, as plain data, without the passwords of URIs."""
    return json.loads(json.dumps(redact({**settings.model_dump(), "stage": dataclasses.asdict(stage)})))
