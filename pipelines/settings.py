"""Settings of a job: where and how large. The science of the stages is in ``tinygptv.training.stages``.

A configuration file has common keys at the top and one section per job; command-line ``key=value`` pairs override both.
Unknown keys are errors. Every field is documented by its description, and ``--help`` prints them.

    recipe: mini
    seed: 0
    train:
      num_workers: 2
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

ROOT = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """A user's mistake in a configuration: one sentence that names the value, the place and the mend."""


class Settings(BaseModel):
    """Keys that every job understands."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())
    section: ClassVar[str] = ""

    recipe: str = Field("mini", description="paper, released or mini: which stages (tinygptv.training.stages)")
    seed: int = Field(0, ge=0, description="everything random follows from it")
    output: str = Field("", description="folder (or URI, where the job says so) for the results")
    tracking_uri: str = Field("", description="MLflow tracking URI; empty is sqlite:///<root>/mlflow.db; 'none' is off")
    experiment: str = Field("", description="MLflow experiment; empty is tinygptv-<recipe>")
    ray_address: str = Field("", description="Ray cluster to join; empty joins the current one or starts a local one")
    num_cpus: int = Field(0, ge=0, description="logical CPUs of a local cluster; 0 takes the machine's")
    object_store_mb: int = Field(0, ge=0, description="object store of a local cluster in MB; 0 leaves it to Ray")
    quiet: bool = Field(False, description="no progress bars")

    @classmethod
    def load(cls, config: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file and apply overrides.

        Args:
            config: YAML file; None takes the defaults.
            overrides: ``key=value`` or ``key.sub=value``; values are read as YAML.

        Raises:
            SettingsError: the file is missing or no mapping, a key is unknown, or a value is of the wrong kind.
        """
        values = _read_yaml(Path(config)) if config else {}
        own = values.get(cls.section) or {}
        common = {key: value for key, value in values.items() if key not in SECTIONS}
        unknown = sorted(set(common) - set(Settings.model_fields))
        if unknown:
            raise SettingsError(_unknown_key(unknown[0], str(config), {*Settings.model_fields, *SECTIONS}))
        merged = {**common, **own}
        for override in overrides:
            _apply_override(merged, override)
        return cls.parse(merged, str(config) if config else "the command line")

    @classmethod
    def parse(cls, values: dict[str, Any], place: str) -> Self:
        """Validate a plain mapping."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise SettingsError(_unknown_key(key, place, set(cls.model_fields))) from error
            raise SettingsError(f"{place}: {key}={first['input']!r} is not usable: {first['msg']}.") from error

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None, description: str) -> Self:
        """Parse ``--config FILE [key=value ...]``; a mistake ends the program with one sentence on stderr."""
        lines = [f"  {name:22} {field.description} [{field.default!r}]" for name, field in cls.model_fields.items()]
        parser = argparse.ArgumentParser(
            description=description,
            epilog="keys:\n" + "\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--config", help="YAML file, e.g. configs/mini.yaml")
        flags = [name for name, field in cls.model_fields.items() if field.annotation is bool]
        for name in flags:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("overrides", nargs="*", metavar="key=value")
        parsed = parser.parse_intermixed_args(argv)
        overrides = parsed.overrides + [f"{name}=true" for name in flags if getattr(parsed, name)]
        try:
            return cls.load(parsed.config, overrides)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def output_dir(self, default: str) -> Path:
        """The result folder as an absolute path, made where it is missing."""
        path = Path(self.output or default).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        return path


class PrepareDataSettings(Settings):
    """``jobs/prepare_data.py``: source files -> Arrow shards."""

    section = "prepare_data"

    source: str = Field("", description="data set name, e.g. laion, refcoco; own data: jsonl, hf, parquet, webdataset")
    input: str = Field("", description="tar glob, annotation file or folder, local or any pyarrow / fsspec URI")
    images: str = Field("", description="image folder, for sources whose annotations lie elsewhere")
    name: str = Field("", description="name of own data in the rows; empty is the source's")
    task: str = Field("", description="task of own data that names none (key of tinygptv.data.prompts.INSTRUCTIONS)")
    image_size: int = Field(448, ge=14, description="shrink images whose shorter side is larger than this, in pixels")
    jpeg_quality: int = Field(90, ge=1, le=100, description="quality of images that had to be encoded anew")
    shard_rows: int = Field(10_000, ge=1, description="most rows of an Arrow shard")
    shard_mb: int = Field(256, ge=1, description="most megabytes of an Arrow shard")
    min_side: int = Field(8, ge=1, description="filter: least pixels of an image's shorter side")
    max_aspect_ratio: float = Field(20.0, ge=1, description="filter: most an image's longer side exceeds its shorter")
    max_megapixels: float = Field(100.0, gt=0, description="larger images are set apart unread, as decompression bombs")
    min_words: int = Field(1, ge=0, description="filter, web captions: least words")
    min_letters: float = Field(0.3, ge=0, le=1, description="filter, web captions: least share of letters and digits")
    max_repetition: float = Field(
        0.7, gt=0, le=1, description="filter, web captions of 8 words: share of the commonest"
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="what happens to samples that occur twice")
    near_duplicate_bits: int = Field(
        4, ge=0, le=7, description="flag images whose 64-bit hashes differ by at most this"
    )
    overwrite: bool = Field(False, description="prepare anew, even if the output holds the finished result already")


class CacheFeaturesSettings(Settings):
    """``jobs/cache_features.py``: shards -> query features beside them."""

    section = "cache_features"

    data: str = Field("", description="folder that holds one shard set per source")
    checkpoint: str = Field("", description="checkpoint folder whose vision encoder and Q-Former are used")
    image_size: int = Field(0, ge=0, description="input side in pixels; 0 takes the checkpoint's")
    batch_size: int = Field(0, ge=0, description="images per forward; 0 finds the largest that fits")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored features")
    sources: list[str] = Field(default_factory=list, description="shard sets to do; empty takes all in the folder")
    num_workers: int = Field(1, ge=0, description="Ray Data actors; 0 computes in the driver's process")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs (or a fraction of one) of each actor")


class TrainSettings(Settings):
    """``jobs/stage1.py`` .. ``stage4.py``: one training stage."""

    section = "train"

    data: str = Field("", description="folder that holds one shard set per source")
    init_from: str = Field("", description="checkpoint folder to start from; the stage before, or converted backbones")
    max_steps: int = Field(0, ge=0, description="stop after so many optimizer steps; 0 runs the whole stage")
    num_workers: int = Field(1, ge=0, description="Ray Train workers; 0 trains in the driver's process")
    min_workers: int = Field(0, ge=0, description="elastic lower bound of num_workers; 0 keeps the number fixed")
    use_gpu: bool = Field(False, description="one GPU per worker")
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs of a training worker")
    threads_per_worker: int = Field(0, ge=0, description="torch threads of a worker; 0 shares the machine's cores")
    micro_batch_size: int = Field(
        64, ge=1, description="samples of one forward; a step is cut into as many as it takes"
    )
    precision: Literal["fp32", "bf16", "fp16", "fp16_range"] = Field(
        "fp32", description="fp32, bf16, fp16 (with a GradScaler), or fp16_range, which emulates fp16 on a CPU"
    )
    encoder_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the frozen encoder where features=inline; empty: as precision"
    )
    features: Literal["inline", "cached"] = Field(
        "inline", description="inline encodes images in every step; cached reads cache_features' files"
    )
    packing: bool = Field(False, description="several samples in one sequence, attention kept apart")
    gradient_checkpointing: bool = Field(False, description="recompute language layers in the backward pass")
    attention: Literal["eager", "sdpa", "flex_attention"] = Field("sdpa", description="eager, sdpa or flex_attention")
    compile: bool = Field(False, description="torch.compile the language model")
    loader_workers: int = Field(1, ge=0, description="loader processes per training worker; 0 loads in the worker")
    prefetch_steps: int = Field(8, ge=1, description="steps that are made ready ahead")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept while training")
    keep_best: bool = Field(True, description="also keep the checkpoint with the least mean loss since the one before")
    storage_path: str = Field(
        "", description="folder or URI that all nodes reach, for checkpoints; empty is the output folder"
    )
    guard: Literal["skip", "rollback", "stop", "off"] = Field(
        "skip", description="at a bad loss or gradient: leave the step out, go back to a checkpoint, or stop"
    )
    guard_spike: float = Field(
        8.0, ge=0, description="a loss so many deviations above the running mean is bad; 0: none"
    )
    guard_vanishing: float = Field(1e-9, ge=0, description="a part's gradient norm below this is vanishing; 0: none")
    guard_patience: int = Field(5, ge=1, description="bad steps in a row after which training stops in any case")
    max_failures: int = Field(3, ge=-1, description="restarts after a worker's death; -1 is without bound")
    log_every: int = Field(10, ge=1, description="steps between readings of losses and of the guard's verdicts")
    predict_every: int = Field(200, ge=0, description="steps between sample predictions for the tracker; 0 makes none")
    dry_run: bool = Field(
        False, description="print the resolved stage, parameters, memory plan and data counts; train nothing"
    )
    stage: dict[str, Any] = Field(
        default_factory=dict, description="fields of the stage to change, e.g. stage.lora_rank=16"
    )


class ScoreSettings(Settings):
    """``jobs/score.py``: a checkpoint or artifact on benchmarks."""

    section = "score"

    checkpoint: str = Field("", description="checkpoint or artifact folder")
    benchmark: str | list[str] = Field("miniature", description="benchmark, group or list of them (docs/evaluation.md)")
    data: str = Field("", description="folder with the benchmarks' official files")
    limit: int = Field(0, ge=0, description="questions per benchmark; 0 takes all")
    batch_size: int = Field(64, ge=1, description="answers generated together")
    num_workers: int = Field(1, ge=0, description="evaluation actors; 0 evaluates in the driver's process")
    threads_per_worker: int = Field(0, ge=0, description="torch threads of an actor; 0 shares the machine's cores")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs (or a fraction of one) of each actor; 0 runs on the CPU")
    metric: Literal["official", "released"] = Field(
        "official", description="released: the original's prompts and scoring, defects included"
    )
    baselines: bool = Field(True, description="also answer with a blank picture and with another question's")
    compare_with: str = Field("", description="output folder of another score run, for a paired comparison")
    page_cases: int = Field(24, ge=0, description="pictures per benchmark on the report page")


class AblateSettings(Settings):
    """``jobs/ablate.py``: the ablation matrix."""

    section = "ablate"

    variants: list[str] = Field(
        default_factory=lambda: ["full", "no_lora", "frozen_input_norm", "no_input_norm", "no_rms_norm", "no_qk_norm"],
        description="rows of the table: names of pipelines.ablation.variants, or changes like stage.lora_rank=4",
    )
    stages: list[int] = Field(default_factory=lambda: [1, 2, 3, 4], description="columns of the table")
    precisions: list[str] = Field(
        default_factory=lambda: ["fp32", "fp16_range"], description="one table each: fp32, bf16, fp16 (GPU), fp16_range"
    )
    data: str = Field("", description="folder that holds one shard set per source; empty draws a miniature world")
    init_from: str = Field("", description="backbones to start every variant from; empty takes the shipped ones")
    max_steps: int = Field(100, ge=0, description="steps per stage; 0 takes the stage's own")
    benchmark: str | list[str] = Field(
        "miniature_vqa", description="scored at the end of each variant; empty scores none"
    )
    benchmark_data: str = Field("", description="folder of the benchmark's files; empty is the drawn world")
    score_limit: int = Field(200, ge=0, description="questions per benchmark; 0 takes all")
    world_scenes: int = Field(1000, ge=1, description="training scenes of the world that is drawn where data is empty")
    features: Literal["cached", "inline"] = Field("cached", description="cached computes query features once for all")
    num_workers: int = Field(2, ge=0, description="variants trained at a time; 0 trains in the driver's process")
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs of a variant's task")
    threads_per_worker: int = Field(1, ge=1, description="torch threads of a variant's task")
    use_gpu: bool = Field(False, description="one GPU per variant")
    train: dict[str, Any] = Field(
        default_factory=dict, description="further keys of the train section, for all variants"
    )
    stage: dict[str, Any] = Field(default_factory=dict, description="fields of every stage to change, for all variants")


class QuantizeSettings(Settings):
    """``jobs/quantize.py``: checkpoint -> artifact."""

    section = "quantize"

    checkpoint: str = Field("", description="checkpoint folder")
    method: str = Field("cpu", description="nf4 or int8 (bitsandbytes), cpu (8 bits) or cpu4 (4 bits)")
    encoder: Literal["", "half", "int8"] = Field(
        "", description="image encoder in half precision or int8; empty: int8 for CPUs, half for GPUs"
    )
    keep_lora: bool = Field(False, description="store LoRA adapters beside the low-bit weights instead of merging them")
    data: str = Field("", description="held-out shard sets for the drift check; empty takes drawn scenes")
    drift_samples: int = Field(64, ge=1, description="samples of the drift check")
    max_drift: float = Field(0.5, gt=0, description="largest rise of held-out loss that passes, in nats per token")
    register_as: str = Field("", description="name in MLflow's model registry; empty does not register")
    alias: str = Field("champion", description="alias that the registered version gets")


class ServeSettings(Settings):
    """``jobs/serve_http.py``: artifact -> HTTP."""

    section = "serve"

    artifact: str = Field(
        "", description="artifact or checkpoint folder, or models:/name@alias; empty is the shipped one"
    )
    model_name: str = Field("tinygpt-v", min_length=1, description="name that requests call the model by")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    num_replicas: int = Field(1, ge=1, description="copies of the model")
    max_replicas: int = Field(0, ge=0, description="autoscale from num_replicas up to this; 0 keeps the number fixed")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction lets replicas share one")
    cpus_per_replica: float = Field(1.0, ge=0, description="logical CPUs of a replica")
    threads: int = Field(0, ge=0, description="torch threads of a replica; 0: one for a small model, else all cores")
    max_batch_size: int = Field(16, ge=1, description="answers generated together in one replica")
    max_queue: int = Field(64, ge=0, description="requests that may wait; more are refused with 429")
    context_length: int = Field(0, ge=0, description="tokens of prompt and answer; 0 is the model's, at most 2048")
    prefill_tokens: int = Field(128, ge=1, description="prompt tokens read per step while answers are being written")
    kv_cache_dtype: Literal["auto", "bfloat16"] = Field(
        "auto", description="keys and values; bfloat16 halves their memory on a CPU, and is slower in long contexts"
    )
    max_tokens: int = Field(256, ge=1, description="answer length where a request names none")
    temperature: float = Field(0.0, ge=0, le=2, description="temperature where a request names none; 0 is greedy")
    stream_interval_ms: float = Field(25, ge=0, description="shortest time between two events of a stream")
    request_timeout_s: float = Field(300, gt=0, description="longest time of a request, waiting included")
    api_keys: list[SecretStr] = Field(
        default_factory=list, description="accepted bearer tokens; empty accepts everybody"
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="web origins that may call the API; none by default"
    )
    allowed_image_hosts: list[str] = Field(
        default_factory=list, description="hosts that images may be fetched from; none by default"
    )
    max_images: int = Field(8, ge=0, description="images of one request")
    max_image_mb: float = Field(10, gt=0, description="size of an encoded image")
    max_image_megapixels: float = Field(24, gt=0, description="width x height of an image")
    max_body_mb: float = Field(32, gt=0, description="size of a request")
    image_timeout_s: float = Field(10, gt=0, description="time to fetch an image, and to decode it")
    stuck_after_s: float = Field(
        300,
        gt=0,
        description="longest step or batch of images; beyond it the replica is unhealthy and is replaced",
    )
    kept_images: int = Field(256, ge=1, description="images whose embeddings a replica keeps for later turns")


class PlanMemorySettings(Settings):
    """``jobs/plan_memory.py``: will it fit?"""

    section = "plan_memory"

    gpu: str = Field("24GB", description="memory of the card that trains, e.g. 24GB")
    inference_gpu: str = Field("8GB", description="memory of the card that answers")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="of the frozen matrices and the products")
    features: Literal["inline", "cached"] = Field("inline", description="inline encodes images in every step")
    micro_batch_size: int = Field(0, ge=0, description="samples of one forward; 0 takes the largest step of the stage")
    context_length: int = Field(2048, ge=1, description="tokens of prompt and answer when answering")


class MiniatureSettings(Settings):
    """``jobs/miniature.py``: draw the miniature world, pretrain its backbones, or ship trained weights."""

    section = "miniature"

    task: str = Field("draw", description="draw (write the data sets), pretrain (make the backbones) or ship")
    train_scenes: int = Field(4000, ge=1, description="scenes of the training split")
    test_scenes: int = Field(2000, ge=1, description="held-out scenes")
    max_steps: int = Field(0, ge=0, description="pretraining steps per part; 0 takes the documented number")
    parts: Literal["all", "vision", "language"] = Field(
        "all", description="vision or language alone pretrains that part: two processes side by side"
    )
    backbones: str = Field("", description="ship: checkpoint of the backbones to keep as package data")
    stages: str = Field("", description="ship: folder with stage1/checkpoint .. stage4/checkpoint to keep")


class DemoSettings(Settings):
    """``jobs/demo.py``: the whole way."""

    section = "demo"

    port: int = Field(8001, ge=0, le=65535, description="port of the endpoint that the demo starts and stops")


SECTIONS: dict[str, type[Settings]] = {
    settings.section: settings
    for settings in (
        PrepareDataSettings,
        CacheFeaturesSettings,
        TrainSettings,
        ScoreSettings,
        AblateSettings,
        QuantizeSettings,
        ServeSettings,
        PlanMemorySettings,
        MiniatureSettings,
        DemoSettings,
    )
}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"configuration {path} does not exist; the shipped ones are in {ROOT / 'configs'}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"configuration {path} is no valid YAML: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"configuration {path} holds a {type(values).__name__}; it must be a mapping of keys.")
    return values


def _unknown_key(key: str, place: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}."
    return f"{place}: unknown key {key!r}; {hint}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"cannot read {override!r}: write settings as key=value.")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise SettingsError(f"cannot read the value of {override!r}: {error}.") from error
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SettingsError(f"cannot set {key!r}: {parent!r} is a plain value, not a group of settings.")
    values[last] = value
