"""Micro-batch size for this worker's device: decided before a model is loaded, and logged."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch

from pipelines.node_cache import local_checkpoint
from pipelines.settings import TrainSettings
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from tinygptv.config import TinyGPTVConfig
from tinygptv.model.varlen_attention import runs_flash_attention
from tinygptv.training.compilation import wants_compilation
from tinygptv.training.memory_plan import CUDA_CONTEXT_BYTES, GIB, TrainingMemory
from tinygptv.training.step_memory import Computation
from tinygptv.training.train_step import FUSED_LAYERS

logger = logging.getLogger(__name__)

CPU_MICRO_BATCH = 64
"""Samples of a forward pass where ``micro_batch_size`` is ``auto`` and there is no GPU."""


@dataclass(frozen=True)
class Card:
    """A worker's GPU.

    Attributes:
        name: its maker's.
        capacity: bytes that this process may take, CUDA's own share included.
        has_bfloat16: in hardware; elsewhere torch emulates it, many times slower.
        has_flash_attention: batches are computed without padding.
    """

    name: str
    capacity: int
    has_bfloat16: bool = True
    has_flash_attention: bool = True


def current_card() -> Card:
    """The GPU of this process, with its free memory and what this process holds of it."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Card(
        torch.cuda.get_device_name(device),
        torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() + CUDA_CONTEXT_BYTES,
        torch.cuda.is_bf16_supported(including_emulation=False),
        runs_flash_attention(device),
    )


def computation_of(settings: TrainSettings, card: Card | None = None) -> Computation:
    """Computation of a stage with these settings: precision, features, compilation, padding, fused layers.

    Args:
        settings: of the stage.
        card: where it is known; None: of Ampere or newer.
    """
    device = torch.device("cuda" if settings.use_gpu else "cpu")
    return Computation(
        precision=settings.precision,
        frozen_weights=settings.frozen_weights,
        features=settings.features,
        compiled=wants_compilation(settings.compile, device),
        fused=FUSED_LAYERS,
        gradient_checkpointing=settings.gradient_checkpointing,
        on_gpu=settings.use_gpu,
        flat=settings.attention == "sdpa" and (card is None or card.has_flash_attention),
    )


def fit_to_device(job: TrainJob, card: Card | None) -> TrainJob:
    """The job with micro-batches that fit the worker's GPU.

    Micro-batches are cut by their tokens, so that long samples cannot make one too large. How a step is cut changes its
    result by rounding only.

    Args:
        job: as resolved by the driver.
        card: the worker's GPU; None on a CPU, where ``auto`` takes ``CPU_MICRO_BATCH`` samples and nothing is cut.

    Raises:
        TrainingStopped: not even the longest single sample fits, or the GPU has no numbers of this precision.
    """
    settings, stage = job.settings, job.stage
    automatic = settings.micro_batch_size == "auto"
    if card is None:
        return _with_plan(job, CPU_MICRO_BATCH if automatic else int(settings.micro_batch_size), 0, padded=True)
    _check_precision(settings, card)
    capacity = card.capacity
    start = local_checkpoint(settings.init_from, weights=False)
    memory = TrainingMemory(TinyGPTVConfig.from_pretrained(start), stage, computation_of(settings, card))
    with_checkpointing = memory.computed(gradient_checkpointing=True)
    if automatic and not memory.largest_micro_batch(capacity) and with_checkpointing.largest_micro_batch(capacity):
        logger.warning("no sample fits without gradient checkpointing, so it is switched on.")
        memory = with_checkpointing
        job = dataclasses.replace(job, settings=settings.model_copy(update={"gradient_checkpointing": True}))
    tokens = memory.largest_tokens(capacity)
    if not tokens:
        raise TrainingStopped(_does_not_fit(memory, card))
    size = stage.max_step_samples if automatic else int(settings.micro_batch_size)
    largest = memory.largest_micro_batch(capacity)
    if automatic or min(size, stage.max_step_samples) > largest:
        logger.info(
            "micro-batches of at most %d samples are cut at %s tokens: %d samples of the greatest length (%d tokens) "
            "fit into %.1f GiB (%s)",
            size,
            f"{tokens:,}",
            largest,
            memory.num_tokens,
            capacity / GIB,
            memory.computation,
        )
    return _with_plan(job, size, tokens, padded=not memory.computation.has_no_padding)


def _check_precision(settings: TrainSettings, card: Card) -> None:
    for key in ("precision", "encoder_precision"):
        if getattr(settings, key) == "bf16" and not card.has_bfloat16:
            raise TrainingStopped(f"{key}=bf16: the GPU ({card.name}) has no bfloat16; set {key}=fp16.")


def _with_plan(job: TrainJob, size: int, tokens: int, *, padded: bool) -> TrainJob:
    plan = dataclasses.replace(job.plan, micro_batch_size=size, micro_batch_tokens=tokens, padded=padded)
    return dataclasses.replace(job, plan=plan)


def _does_not_fit(memory: TrainingMemory, card: Card) -> str:
    needed, capacity = memory.plan(1).peak, card.capacity
    half = "bf16" if card.has_bfloat16 else "fp16"
    how = memory.computation
    savers = {
        "gradient_checkpointing=true": memory.computed(gradient_checkpointing=True),
        "compile=on": memory.computed(compiled=True),
        "features=cached": memory.computed(features="cached"),
        f"precision={half}": memory.computed(precision=half),
        "frozen_weights=nf4": memory.computed(frozen_weights="nf4"),
    }
    helps = [name for name, other in savers.items() if other.computation != how and other.plan(1).peak <= capacity]
    fix = f"try {' or '.join(helps)}" if helps else "use a larger GPU, or a smaller stage.limits.max_text_tokens"
    return (
        f"stage {memory.stage.number}: one sample of {memory.num_tokens} tokens takes {needed / GIB:.1f} GiB and the "
        f"GPU has {capacity / GIB:.1f} GiB ({how}): {fix}."
    )
