"""The settings of every job, one class and one section of a configuration file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from pipelines.settings.base import Settings

QuantizationMethod = Literal["nf4", "int4", "int8", "cpu", "cpu4"]
"""Keys of ``tinygptv.quantization.artifact.METHODS``, which need torch to be imported."""


class PrepareDataSettings(Settings):
    """``jobs/prepare_data.py``: source files -> Arrow shards."""

    section = "prepare_data"

    source: str = Field(
        "", description="data set name, e.g. laion, refcoco; own data: jsonl, csv, hf, parquet, webdataset"
    )
    input: str = Field("", description="tar glob, annotation file or folder, local or any pyarrow / fsspec URI")
    images: str = Field("", description="image folder, for sources whose annotations are elsewhere")
    name: str = Field("", description="name of own data in the rows; empty is the source's")
    task: str = Field("", description="task of own data that names none (key of tinygptv.data.prompts.INSTRUCTIONS)")
    split: str = Field(
        "train", description="own rows with a field split: train leaves out val, dev, test; else this one; empty: all"
    )
    image_size: int = Field(448, ge=14, description="shrink images whose shorter side is larger than this, in pixels")
    jpeg_quality: int = Field(90, ge=1, le=100, description="quality of images that had to be encoded again")
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
    num_workers: int | None = Field(
        None, ge=0, description="files read at a time; empty: one per CPU of the cluster; 0 works without a cluster"
    )
    overwrite: bool = Field(False, description="prepare again, even if the output holds a finished result already")


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
    overwrite: bool = Field(False, description="compute again what is finished already")


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
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="samples of one forward; a step is cut into as many as it takes; auto: what fits the GPU"
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
    frozen_weights: Literal["full", "int8", "nf4"] = Field(
        "full", description="frozen matrices of the language layers: as precision, or in 8 or 4 bits (QLoRA), smaller"
    )
    packing: bool = Field(False, description="several samples in one sequence, attention kept apart")
    gradient_checkpointing: bool = Field(False, description="recompute language layers in the backward pass")
    attention: Literal["eager", "sdpa", "flex_attention"] = Field("sdpa", description="eager, sdpa or flex_attention")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile each layer: faster and smaller, half a minute at the start; auto: on GPUs"
    )
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
    eval_data: str = Field(
        "", description="held-out shard sets, whose loss is computed while training: one, or a folder"
    )
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the images of data that is held out instead, by hash, e.g. 0.05"
    )
    eval_rows: int = Field(256, ge=1, description="held-out rows of each source whose loss is computed")
    eval_questions: int = Field(
        32, ge=0, description="held-out questions of each source that are answered and scored, too; 0: none"
    )
    eval_every: int = Field(0, ge=0, description="steps between evaluations on held-out rows; 0: checkpoint_every")
    early_stop: int = Field(0, ge=0, description="evaluations in a row without a lower loss that end training; 0: none")
    use_best: bool = Field(False, description="write the weights of the least held-out loss, not the last ones")
    predict_every: int = Field(200, ge=0, description="steps between sample predictions for the tracker; 0 makes none")
    dry_run: bool = Field(
        False, description="print the resolved stage, parameters, memory plan and data counts; train nothing"
    )
    stage: dict[str, Any] = Field(
        default_factory=dict, description="fields of the stage to change, e.g. stage.lora_rank=16"
    )
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")

    @field_validator("compile", mode="before")
    def _switch(cls, value: Any) -> Any:
        return {"true": "on", "false": "off"}.get(str(value).lower(), value)


class ScoreSettings(Settings):
    """``jobs/score.py``: a checkpoint or artifact on benchmarks."""

    section = "score"

    checkpoint: str = Field("", description="checkpoint or artifact folder")
    benchmark: str | list[str] = Field(
        "miniature",
        description="benchmark, group or list of them (docs/evaluation.md); own: the rows of data=rows.jsonl",
    )
    data: str = Field("", description="folder with the benchmarks' official files, at any depth; own: file of rows")
    images: str = Field("", description="folder of the benchmarks' images, at any depth; empty looks below data")
    limit: int = Field(0, ge=0, description="questions per benchmark; 0 takes all")
    batch_size: int = Field(64, ge=1, description="answers generated together")
    num_workers: int = Field(1, ge=0, description="evaluation actors; 0 evaluates in the driver's process")
    threads_per_worker: int = Field(0, ge=0, description="torch threads of an actor; 0 shares the machine's cores")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs (or a fraction of one) of each actor; 0 runs on the CPU")
    metric: Literal["official", "released", "exact", "vqa", "iou"] = Field(
        "official",
        description="released: the original's prompts and scoring, defects included; own rows: exact, vqa or iou",
    )
    baselines: bool = Field(True, description="also answer with a blank image and with another question's")
    compare_with: str = Field("", description="output folder of another score run, for a paired comparison")
    page_cases: int = Field(24, ge=0, description="images per benchmark on the report page")
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")


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
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")


class QuantizeSettings(Settings):
    """``jobs/quantize.py``: checkpoint -> artifact."""

    section = "quantize"

    checkpoint: str = Field("", description="checkpoint folder")
    method: QuantizationMethod = Field(
        "cpu", description="nf4, int4 or int8 for a GPU, cpu (8 bits) or cpu4 (4 bits) for a CPU (docs/quantization.md)"
    )
    encoder: Literal["", "half", "int8"] = Field(
        "", description="image encoder in half precision or int8; empty: int8 for CPUs, half for GPUs"
    )
    keep_lora: bool = Field(False, description="store LoRA adapters beside the low-bit weights instead of merging them")
    data: str = Field("", description="held-out shard sets for the drift check; empty takes drawn scenes")
    drift_samples: int = Field(64, ge=1, description="samples of the drift check")
    max_drift: float = Field(0.5, gt=0, description="largest rise of held-out loss that passes, in nats per token")
    register_as: str = Field("", description="name in MLflow's model registry; empty does not register")
    alias: str = Field("champion", description="alias that the registered version gets")
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")


class PlanMemorySettings(Settings):
    """``jobs/plan_memory.py``: will it fit?"""

    section = "plan_memory"

    gpu: str = Field("24GB", description="memory of the card that trains, e.g. 24GB")
    inference_gpu: str = Field("8GB", description="memory of the card that answers")
    precision: Literal["", "fp32", "bf16", "fp16"] = Field("", description="while training; empty: as in train")
    features: Literal["", "inline", "cached"] = Field("", description="while training; empty: as in train")
    micro_batch_size: int = Field(0, ge=0, description="samples of one forward; 0: as in train")
    context_length: int = Field(2048, ge=1, description="tokens of prompt and answer when answering")
    train: dict[str, Any] = Field(
        default_factory=dict, description="other keys of the train section; the file's own are read, e.g. train.compile"
    )

    @classmethod
    def load(cls, config: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read the job's section, and the train section of the same file."""
        own = [override for override in overrides if not override.startswith("train.")]
        of_train = [override.removeprefix("train.") for override in overrides if override.startswith("train.")]
        settings = super().load(config, own)
        train = TrainSettings.load(config, of_train).model_dump(exclude_unset=True)
        return settings.model_copy(update={"train": {**train, **settings.train}})

    def train_settings(self) -> TrainSettings:
        """Training settings of the plan, on a GPU."""
        given = {key: getattr(self, key) for key in ("precision", "features", "micro_batch_size") if getattr(self, key)}
        values = {**self.train, **given, "recipe": self.recipe, "use_gpu": True}
        return TrainSettings.parse(values, "plan_memory")


class MiniatureSettings(Settings):
    """``jobs/miniature.py``: draw the miniature world, pretrain its backbones, or ship trained weights."""

    section = "miniature"

    task: str = Field(
        "draw",
        description="draw (the data sets), example (own data to fine-tune on), pretrain (the backbones) or ship",
    )
    train_scenes: int = Field(4000, ge=1, description="scenes of the training split")
    test_scenes: int = Field(2000, ge=1, description="held-out scenes")
    example_scenes: int = Field(50, ge=1, description="example: scenes to learn from; twice as many to score")
    max_steps: int = Field(0, ge=0, description="pretraining steps per part; 0 takes the documented number")
    parts: Literal["all", "vision", "language"] = Field(
        "all", description="vision or language alone pretrains that part: two processes side by side"
    )
    backbones: str = Field("", description="ship: checkpoint of the backbones to keep as package data")
    stages: str = Field("", description="ship: folder with stage1/checkpoint .. stage4/checkpoint to keep")
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")


class DemoSettings(Settings):
    """``jobs/demo.py``: the whole pipeline."""

    section = "demo"

    port: int = Field(8001, ge=0, le=65535, description="port of the endpoint that the demo starts and stops")
    overwrite: bool = Field(False, description="remove the results of an earlier run in the output folder first")
