"""The model of a stage: loaded from its start, with the stage's image size, adapters, frozen parts and dtypes."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.fingerprint import manifest_digest
from pipelines.node_cache import local_checkpoint
from pipelines.redact import redact
from pipelines.training.guard import TrainingStopped
from pipelines.training.job import TrainJob
from tinygptv.checkpoint.checkpoint import load_checkpoint
from tinygptv.checkpoint.stored_weights import restore_rounded
from tinygptv.data.processing import TinyGPTVImageProcessor, TinyGPTVProcessor
from tinygptv.quantization.frozen_linear import pack_frozen
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import PRECISIONS, set_dtypes


def build_model(job: TrainJob) -> tuple[Any, TinyGPTVProcessor]:
    """Load the start checkpoint, set the stage's image size, add LoRA where the stage has it, freeze the rest.

    Raises:
        TrainingStopped: the start was replaced since training began, or ``frozen_weights`` cannot be had.
    """
    settings, stage = job.settings, job.stage
    device = torch.device("cuda", torch.cuda.current_device()) if settings.use_gpu else torch.device("cpu")
    start = local_checkpoint(settings.init_from)
    if job.start and manifest_digest(start) != job.start:
        raise TrainingStopped(
            f"init_from={redact(settings.init_from)} was replaced since training began: put back what it was, or begin "
            "again with overwrite=true."
        )
    dtype = PRECISIONS[settings.precision]
    model, processor, _ = load_checkpoint(start, dtype=dtype, attn_implementation=settings.attention)
    model.set_image_size(stage.image_size)
    if stage.lora_rank and not model.config.lora_rank:
        model.add_lora(stage.lora_rank, stage.lora_alpha, stage.lora_dropout)
    elif stage.lora_rank:
        model.set_lora_dropout(stage.lora_dropout)
    set_trainable(model, stage.trainable)
    set_dtypes(model, device, settings.encoder_precision or settings.precision)
    restore_rounded(model, start, dtype)
    if settings.frozen_weights != "full":
        try:
            pack_frozen(model, settings.frozen_weights, device)
        except ValueError as error:
            raise TrainingStopped(f"frozen_weights={settings.frozen_weights}: {error}") from error
    torch.nn.Module.to(model, device).train()
    if settings.gradient_checkpointing:
        # transformers 5.20 renamed it and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    processor = TinyGPTVProcessor(
        TinyGPTVImageProcessor(stage.image_size),
        processor.tokenizer,
        num_query_tokens=model.config.num_query_tokens,
        image_token_id=model.config.image_token_id,
        template=stage.template,
    )
    return model, processor
