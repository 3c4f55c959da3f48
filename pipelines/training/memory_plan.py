"""Will it fit? The memory plan of a recipe's stages and of answering questions, as a table and as numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, TypedDict

from pipelines import storage
from pipelines.json_files import write_json
from pipelines.settings import PlanMemorySettings, TrainSettings
from pipelines.settings.memory_size import parse_bytes
from pipelines.training.fit import computation_of
from pipelines.training.job import apply_stage_settings
from tinygptv.config import TinyGPTVConfig
from tinygptv.quantization.artifact import METHODS
from tinygptv.training.memory_plan import GIB, MemoryPlan, PlanBytes, TrainingMemory, inference_memory
from tinygptv.training.stages import Stage, get_recipe, get_stage

INFERENCE_FORMATS: dict[str, dict[str, str]] = {
    "bf16": dict.fromkeys(("vision_encoder", "qformer", "language_model", "lm_head"), "bf16") | {"projector": "full"},
    **{name: vars(METHODS[name]) for name in ("int8", "nf4")},
}
"""Rows of the inference table -> format of each part."""

Way = Literal["plain", "checkpointing"]

WAYS: tuple[Way, ...] = ("plain", "checkpointing")
"""Rows of a stage: without and with gradient checkpointing."""

_COLUMNS: tuple[Literal["gradients", "optimizer", "activations", "workspace", "margin", "peak"], ...] = (
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "margin",
    "peak",
)
"""Columns after the weights."""


class PlanRecord(PlanBytes):
    """The bytes of a plan, and whether it fits on the card."""

    fits: bool


class StagePlan(TypedDict):
    """Plan of a stage.

    Attributes:
        micro_batch_size: that the plans are for.
        tokens_per_sample: the stage's greatest length.
        plain: without gradient checkpointing.
        checkpointing: with it.
        largest_micro_batch: that fits, by row.
        largest_tokens: longest sample that fits, by row.
    """

    micro_batch_size: int
    tokens_per_sample: int
    plain: PlanRecord
    checkpointing: PlanRecord
    largest_micro_batch: dict[Way, int]
    largest_tokens: dict[Way, int]


class MemoryReport(TypedDict):
    """``result.json`` of ``plan_memory``; sizes in bytes.

    Attributes:
        gpu_bytes: of the card to train on.
        inference_gpu_bytes: of the card to answer on.
        computation: fields of ``Computation``.
        precision: of training.
        features: ``inline`` or ``cached``.
        context_length: tokens of a conversation.
        stages: by number.
        inference: by the format of the weights.
    """

    gpu_bytes: int
    inference_gpu_bytes: int
    computation: dict[str, str | bool]
    precision: str
    features: str
    context_length: int
    stages: dict[str, StagePlan]
    inference: dict[str, PlanRecord]


class MemoryResult(MemoryReport):
    """The report, as a table too, and the path of its file."""

    table: str
    result: str


def plan_memory(settings: PlanMemorySettings) -> MemoryResult:
    """Count what every stage and every way of answering takes.

    Args:
        settings: the cards, and how the stages will be trained.

    Returns:
        What stands in result.json, the table as text, and that file's path.

    Raises:
        ValueError: a size or the recipe cannot be read.
    """
    card, small_card = parse_bytes(settings.gpu), parse_bytes(settings.inference_gpu)
    stages, train = get_recipe(settings.recipe), settings.train_settings()
    training = {str(stage.number): _plan_stage(train, stage, card) for stage in stages}
    inference = {name: _plan_inference(settings, formats, small_card) for name, formats in INFERENCE_FORMATS.items()}
    report: MemoryReport = {
        "gpu_bytes": card,
        "inference_gpu_bytes": small_card,
        "computation": asdict(computation_of(train)),
        "precision": train.precision,
        "features": train.features,
        "context_length": settings.context_length,
        "stages": training,
        "inference": inference,
    }
    output = storage.WorkFolder(settings.output_location(f"outputs/{settings.recipe}/plan_memory"))
    write_json(output.uri("result.json"), report)
    return {**report, "table": _table(settings, train, report), "result": output.uri("result.json")}


def recipe_config(recipe: str, stage: Stage) -> TinyGPTVConfig:
    """The model that a stage of a recipe trains."""
    build = TinyGPTVConfig.mini if recipe == "mini" else TinyGPTVConfig.phi2
    return build(image_size=stage.image_size, lora_rank=stage.lora_rank)


def _plan_stage(train: TrainSettings, stage: Stage, card: int) -> StagePlan:
    stage = apply_stage_settings(stage, train.stage)
    memory = TrainingMemory(recipe_config(train.recipe, stage), stage, computation_of(train))
    ways: dict[Way, TrainingMemory] = {
        name: memory.computed(gradient_checkpointing=name == "checkpointing") for name in WAYS
    }
    largest = {name: way.largest_micro_batch(card) for name, way in ways.items()}
    chosen = largest[_configured(train)] if train.micro_batch_size == "auto" else train.micro_batch_size
    size = max(1, min(chosen, stage.max_step_samples))
    return {
        "micro_batch_size": size,
        "tokens_per_sample": memory.num_tokens,
        "plain": _with_fit(ways["plain"].plan(size), card),
        "checkpointing": _with_fit(ways["checkpointing"].plan(size), card),
        "largest_micro_batch": largest,
        "largest_tokens": {name: way.largest_tokens(card) for name, way in ways.items()},
    }


def _configured(train: TrainSettings) -> Way:
    return "checkpointing" if train.gradient_checkpointing else "plain"


def _plan_inference(settings: PlanMemorySettings, formats: dict[str, str], card: int) -> PlanRecord:
    config = recipe_config(settings.recipe, get_stage(settings.recipe, 4))
    return _with_fit(inference_memory(config, formats, num_tokens=settings.context_length), card)


def _with_fit(plan: MemoryPlan, card: int) -> PlanRecord:
    return {**plan.to_dict(), "fits": plan.peak <= card}


def _table(settings: PlanMemorySettings, train: TrainSettings, report: MemoryReport) -> str:
    heads = "".join(f"{name:>13}" for name in ("weights", *_COLUMNS))
    lines = [
        f"training, recipe {settings.recipe}, on {settings.gpu}: {computation_of(train)}, "
        f"micro_batch_size={train.micro_batch_size}",
        "GiB; samples of the stage's greatest length; peak includes the allocator's margin and CUDA's own share; "
        "* as configured",
        f"{'stage':7}{'micro-batch':>12}{'':15}{heads}  fits{'largest micro-batch':>21}{'tokens':>9}",
    ]
    for number, entry in report["stages"].items():
        for name in WAYS:
            mark = "*" if name == _configured(train) else " "
            lines.append(
                f"{number:7}{entry['micro_batch_size']:12} {mark}{name:13}{_row(entry[name])}"
                f"{entry['largest_micro_batch'][name]:21}{entry['largest_tokens'][name]:9,}"
            )
    lines += [
        "",
        f"answering, {settings.context_length} tokens, one request, on {settings.inference_gpu}",
        f"{'weights as':34}{heads}  fits",
    ]
    lines += [f"{name:34}{_row(entry)}" for name, entry in report["inference"].items()]
    return "\n".join(lines)


def _row(entry: PlanRecord) -> str:
    sizes = [sum(entry["weights"].values()), *(entry[name] for name in _COLUMNS)]
    return "".join(f"{size / GIB:13.2f}" for size in sizes) + ("   yes" if entry["fits"] else "    no")
