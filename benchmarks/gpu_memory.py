"""Does the memory plan hold? Each stage at the largest micro-batch that the plan allows, under a hard cap of 24 GiB.

Samples are as long as the stage lets them be. Compared are the plan's peak and what torch's allocator took from the
device, CUDA's own share assumed in both: the plan must not be below it, and at most 10 % above.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from gpu_model import CAP_BYTES, checkpointing, random_model, train_step
from gpu_rows import GIB, Clock, Peak, Row, Rows, memory_cap, sentence

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import MicroBatch
from tinygptv.quantization.frozen_linear import FrozenFormat, pack_frozen
from tinygptv.training.compilation import run_eagerly
from tinygptv.training.memory_plan import CUDA_CONTEXT_BYTES, TrainingMemory
from tinygptv.training.stages import Stage, get_stage, set_trainable
from tinygptv.training.step_memory import Computation
from tinygptv.training.train_step import FUSED_LAYERS, TrainStep


@dataclass(frozen=True)
class Case:
    """A way to train a stage."""

    stage: int
    compiled: bool = True
    gradient_checkpointing: bool = False
    frozen_weights: FrozenFormat | Literal["full"] = "full"

    def __str__(self) -> str:
        compiled = "compiled" if self.compiled else "not compiled"
        frozen = "" if self.frozen_weights == "full" else f", frozen weights {self.frozen_weights}"
        return f"stage {self.stage}, {compiled}{frozen}{', checkpointing' if self.gradient_checkpointing else ''}"


CASES = (
    Case(2),
    Case(4),
    Case(4, gradient_checkpointing=True),
    Case(2, compiled=False),
    Case(2, gradient_checkpointing=True),
    Case(4, compiled=False),
    Case(4, compiled=False, gradient_checkpointing=True),
    Case(3),
    Case(1),
    Case(1, compiled=False),
    Case(4, gradient_checkpointing=True, frozen_weights="nf4"),
    Case(2, frozen_weights="nf4"),
    Case(2, frozen_weights="int8"),
)
"""Most important first; stages that share a model stand together."""


def memory_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """The plan against the card.

    Args:
        deadline_s: seconds for all cases.
        size: ``paper``, or ``tiny``: two samples of the miniature's stages.
        device: where to run; on a CPU nothing is compared.

    Returns:
        Rows, which were also printed one by one.
    """
    rows = Rows("memory")
    clock = Clock(rows, deadline_s)
    recipe = "paper" if size == "paper" else "mini"
    step: TrainStep | None = None
    built: tuple[tuple[str, ...], str] | None = None
    for case in CASES:
        if not clock.allows(str(case), 20 if size == "paper" else 0):
            continue
        stage = get_stage(recipe, case.stage)
        if step is None or built != (stage.trainable, case.frozen_weights):
            step = None
            gc.collect()
            step = build(recipe, stage, torch.device(device), case.frozen_weights)
            built = stage.trainable, case.frozen_weights
        measure(rows, case, stage, step, most=1 << 20 if size == "paper" else 2)
    return rows


def build(recipe: str, stage: Stage, device: torch.device, frozen_weights: FrozenFormat | Literal["full"]) -> TrainStep:
    """The stage's step on random weights."""
    model = random_model(recipe_config(recipe, stage), device)
    set_trainable(model, stage.trainable)
    if frozen_weights != "full":
        pack_frozen(model, frozen_weights, device)
    return train_step(model, stage.trainable)


def recipe_config(recipe: str, stage: Stage) -> TinyGPTVConfig:
    """Configuration of the model that a stage trains."""
    make = TinyGPTVConfig.phi2 if recipe == "paper" else TinyGPTVConfig.mini
    return make(image_size=stage.image_size, lora_rank=stage.lora_rank, lora_dropout=stage.lora_dropout)


def measure(rows: Rows, case: Case, stage: Stage, step: TrainStep, most: int) -> None:
    """Two steps of the largest micro-batch that the plan allows."""
    model = step.model
    model.set_image_size(stage.image_size)
    computation = Computation(
        compiled=case.compiled,
        gradient_checkpointing=case.gradient_checkpointing,
        fused=FUSED_LAYERS,
        frozen_weights=case.frozen_weights,
    )
    memory = TrainingMemory(model.config, stage, computation)
    samples = min(memory.largest_micro_batch(CAP_BYTES), most)
    plan = memory.plan(samples)
    batch = longest_batch(model.config, stage, memory.num_tokens, samples)
    checkpointing(model, case.gradient_checkpointing)
    peak = Peak()
    error = ""
    try:
        with memory_cap(model.device, CAP_BYTES) as peak, nullcontext() if case.compiled else run_eagerly():
            for _ in range(2):
                step.run([batch], 1e-5)
    except torch.cuda.OutOfMemoryError:
        error = "ran out of memory"
    except Exception as failure:  # the other cases must still run
        error = sentence(failure)
    what = f"{case}, {samples} samples of {memory.num_tokens} tokens: plan above the peak"
    note = (
        f"{error + '; ' if error else ''}planned {plan.peak / GIB:.2f} GiB (tensors {plan.allocated / GIB:.2f}); "
        f"tensors {peak.allocated / GIB:.2f}, taken {(peak.reserved + CUDA_CONTEXT_BYTES) / GIB:.2f}"
    )
    measured = peak.reserved and not error
    value = (plan.peak / (peak.reserved + CUDA_CONTEXT_BYTES) - 1) * 100 if measured else None
    on_card = model.device.type == "cuda"
    rows.put(what, value, "%", floor=0 if on_card else None, ceiling=10 if on_card else None, note=note)


def longest_batch(config: TinyGPTVConfig, stage: Stage, num_tokens: int, samples: int) -> MicroBatch:
    """Samples of the stage's greatest length, whose whole answers are learned."""
    answer = stage.limits.max_text_tokens
    ids = np.full((samples, num_tokens), 5, dtype=np.int64)
    ids[:, 1 : 1 + config.num_query_tokens] = config.image_token_id
    positions = np.arange(num_tokens - answer - 1, num_tokens - 1)
    side = config.vision_config.image_size
    return MicroBatch(
        input_ids=ids,
        attention_mask=None,
        position_ids=None,
        supervised_positions=(np.arange(samples)[:, None] * num_tokens + positions).ravel(),
        supervised_ids=np.full(samples * answer, 5, dtype=np.int64),
        supervised_sources=np.zeros(samples * answer, dtype=np.int64),
        pixels=np.zeros((samples, 3, side, side), dtype=np.uint8),
        query_features=None,
        num_samples=samples,
        num_real=samples * num_tokens,
    )
