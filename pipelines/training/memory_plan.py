"""Will it fit? The memory plan of a recipe's stages and of answering questions, as a table and as numbers."""

from __future__ import annotations

import json
from typing import Any

from pipelines.settings import PlanMemorySettings
from tinygptv.config import TinyGPTVConfig
from tinygptv.quantization.artifact import METHODS
from tinygptv.training.memory_plan import GIB, MemoryPlan, TrainingMemory, inference_memory, parse_bytes
from tinygptv.training.stages import RECIPES, Stage, get_stage

INFERENCE_FORMATS: dict[str, dict[str, str]] = {
    "bf16": dict.fromkeys(("vision_encoder", "qformer", "language_model", "lm_head"), "bf16") | {"projector": "full"},
    **{name: vars(METHODS[name]) for name in ("int8", "nf4")},
}
"""Rows of the inference table -> format of each part."""

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "workspace", "peak")


def plan_memory(settings: PlanMemorySettings) -> dict[str, Any]:
    """Count what every stage and every way of answering takes.

    Args:
        settings: the cards, precision and batch.

    Returns:
        What stands in result.json (bytes per part and stage), the ``table`` as text, and ``result``, that file's path.

    Raises:
        ValueError: a size or the recipe cannot be read.
    """
    card, small_card = parse_bytes(settings.gpu), parse_bytes(settings.inference_gpu)
    if settings.recipe not in RECIPES:
        raise ValueError(f"recipe is {settings.recipe!r}; known recipes: {sorted(RECIPES)}.")
    training = {str(s.number): _plan_stage(settings, s, card) for s in RECIPES[settings.recipe]}
    inference = {name: _plan_inference(settings, formats, small_card) for name, formats in INFERENCE_FORMATS.items()}
    result = {
        "gpu_bytes": card,
        "inference_gpu_bytes": small_card,
        "precision": settings.precision,
        "features": settings.features,
        "context_length": settings.context_length,
        "stages": training,
        "inference": inference,
    }
    output = settings.output_dir(f"outputs/{settings.recipe}/plan_memory")
    (output / "result.json").write_text(json.dumps(result, indent=1))
    return {**result, "table": _table(settings, result), "result": str(output / "result.json")}


def recipe_config(recipe: str, stage: Stage) -> TinyGPTVConfig:
    """The model that a stage of a recipe trains."""
    build = TinyGPTVConfig.mini if recipe == "mini" else TinyGPTVConfig.phi2
    return build(image_size=stage.image_size, lora_rank=stage.lora_rank)


def _plan_stage(settings: PlanMemorySettings, stage: Stage, card: int) -> dict[str, Any]:
    memory = TrainingMemory(
        recipe_config(settings.recipe, stage),
        stage,
        precision=settings.precision,
        features=settings.features,
    )
    size = settings.micro_batch_size or stage.max_step_samples
    plans = {"plain": memory.plan(size), "checkpointing": memory.plan(size, gradient_checkpointing=True)}
    return {
        "micro_batch_size": size,
        "tokens_per_sample": memory.num_tokens,
        **{name: _with_fit(plan, card) for name, plan in plans.items()},
        "largest_micro_batch": {
            name: memory.largest_micro_batch(card, gradient_checkpointing=name == "checkpointing") for name in plans
        },
    }


def _plan_inference(settings: PlanMemorySettings, formats: dict[str, str], card: int) -> dict[str, Any]:
    config = recipe_config(settings.recipe, get_stage(settings.recipe, 4))
    return _with_fit(inference_memory(config, formats, num_tokens=settings.context_length), card)


def _with_fit(plan: MemoryPlan, card: int) -> dict[str, Any]:
    return {**plan.to_dict(), "fits": plan.peak <= card}


def _table(settings: PlanMemorySettings, result: dict[str, Any]) -> str:
    heads = "".join(f"{name:>13}" for name in _COLUMNS)
    lines = [
        f"training, recipe {settings.recipe}, {settings.precision}, images {settings.features}, on {settings.gpu} "
        "(GiB; peak includes CUDA's own share)",
        f"{'stage':7}{'micro-batch':>12}{'':15}{heads}  fits{'largest micro-batch':>21}",
    ]
    for number, facts in result["stages"].items():
        for name in ("plain", "checkpointing"):
            lines.append(
                f"{number:7}{facts['micro_batch_size']:12}  {name:13}{_row(facts[name])}"
                f"{facts['largest_micro_batch'][name]:21}"
            )
    lines += [
        "",
        f"answering, {settings.context_length} tokens, one request, on {settings.inference_gpu}",
        f"{'weights as':34}{heads}  fits",
    ]
    lines += [f"{name:34}{_row(facts)}" for name, facts in result["inference"].items()]
    return "\n".join(lines)


def _row(facts: dict[str, Any]) -> str:
    sizes = [sum(facts["weights"].values()), *(facts[name] for name in _COLUMNS[1:])]
    return "".join(f"{size / GIB:13.2f}" for size in sizes) + ("   yes" if facts["fits"] else "    no")
