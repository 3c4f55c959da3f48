"""Micro-batch size for this worker's device: decided before a model is loaded, and logged."""

from __future__ import annotations

import dataclasses
import logging

import torch

from pipelines.node_cache import local_checkpoint
from pipelines.settings import TrainSettings
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from tinygptv.config import TinyGPTVConfig
from tinygptv.training.compilation import wants_compilation
from tinygptv.training.memory_plan import CUDA_CONTEXT_BYTES, GIB, Computation, TrainingMemory
from tinygptv.training.train_step import FUSED_LAYERS

logger = logging.getLogger(__name__)

CPU_MICRO_BATCH = 64
"""Samples of a forward pass where ``micro_batch_size`` is ``auto`` and there is no GPU."""


def computation_of(settings: TrainSettings) -> Computation:
    """Computation of a stage with these settings: precision, features, compilation, fused layers."""
    device = torch.device("cuda" if settings.use_gpu else "cpu")
    return Computation(
        precision=settings.precision,
        features=settings.features,
        compiled=wants_compilation(settings.compile, device),
        fused=FUSED_LAYERS,
        gradient_checkpointing=settings.gradient_checkpointing,
        on_gpu=settings.use_gpu,
    )


def device_capacity() -> int:
    """Bytes that this process may take of its GPU, CUDA's own share included."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() + CUDA_CONTEXT_BYTES


def fit_to_device(job: TrainJob, capacity: int | None) -> TrainJob:
    """The job with micro-batches that fit the worker's GPU.

    Micro-batches are cut by their tokens, so that long samples cannot make one too large. How a step is cut changes its
    result by rounding only.

    Args:
        job: as resolved by the driver.
        capacity: bytes of the GPU; None on a CPU, where ``auto`` takes ``CPU_MICRO_BATCH`` samples and nothing is cut.

    Raises:
        TrainingStopped: not even the longest single sample fits.
    """
    settings, stage = job.settings, job.stage
    automatic = settings.micro_batch_size == "auto"
    if capacity is None:
        return _with_plan(job, CPU_MICRO_BATCH if automatic else int(settings.micro_batch_size), 0)
    start = local_checkpoint(settings.init_from, weights=False)
    memory = TrainingMemory(TinyGPTVConfig.from_pretrained(start), stage, computation_of(settings))
    with_checkpointing = memory.computed(gradient_checkpointing=True)
    if automatic and not memory.largest_micro_batch(capacity) and with_checkpointing.largest_micro_batch(capacity):
        logger.warning("no sample fits without gradient checkpointing, so it is switched on.")
        memory = with_checkpointing
        job = dataclasses.replace(job, settings=settings.model_copy(update={"gradient_checkpointing": True}))
    tokens = memory.largest_tokens(capacity)
    if not tokens:
        raise TrainingStopped(_does_not_fit(memory, capacity))
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
    return _with_plan(job, size, tokens)


def _with_plan(job: TrainJob, size: int, tokens: int) -> TrainJob:
    flat = computation_of(job.settings).half and job.settings.attention == "sdpa"
    plan = dataclasses.replace(job.plan, micro_batch_size=size, micro_batch_tokens=tokens, padded=not flat)
    return dataclasses.replace(job, plan=plan)


def _does_not_fit(memory: TrainingMemory, capacity: int) -> str:
    needed = memory.plan(1).peak
    how = memory.computation
    savers = {
        "gradient_checkpointing=true": memory.computed(gradient_checkpointing=True),
        "compile=on": memory.computed(compiled=True),
        "features=cached": memory.computed(features="cached"),
        "precision=bf16": memory.computed(precision="bf16"),
    }
    helps = [name for name, other in savers.items() if other.computation != how and other.plan(1).peak <= capacity]
    fix = f"try {' or '.join(helps)}" if helps else "use a larger GPU, or a smaller stage.limits.max_text_tokens"
    return (
        f"stage {memory.stage.number}: one sample of {memory.num_tokens} tokens takes {needed / GIB:.1f} GiB and the "
        f"GPU has {capacity / GIB:.1f} GiB ({how}): {fix}."
    )
