#!/usr/bin/env python3
"""Does the memory plan hold? Training steps and answers at the paper's size with random weights, under a hard cap.

    python benchmarks/gpu_memory.py                    # four stages under 24 GB, answering under 8 GB
    python benchmarks/gpu_memory.py --recipe mini      # the same code in seconds

Needs a CUDA card and torch, transformers, timm, peft; bitsandbytes for the int8 and NF4 rows. The cap is
``torch.cuda.set_per_process_memory_fraction``, set once the weights are in place: what does not fit fails, as it would
on the smaller card. Compared are the planned and the measured peak of torch's allocator; the claim is a difference
below 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.load import rebuild_buffers
from tinygptv.data.collate import MicroBatch
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.training.memory_plan import (
    CUDA_CONTEXT_BYTES,
    GIB,
    MemoryPlan,
    TrainingMemory,
    build_on_meta,
    inference_memory,
    parse_bytes,
)
from tinygptv.training.optim import build_optimizer
from tinygptv.training.stages import RECIPES, Stage, set_trainable
from tinygptv.training.train_step import TrainStep

FORMATS = {
    "bf16": {"language_model": "bf16"},
    "int8": {"language_model": "llm_int8"},
    "nf4": {"language_model": "nf4"},
}
OTHER_PARTS = {"vision_encoder": "half", "qformer": "half", "lm_head": "half", "projector": "full"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="paper")
    parser.add_argument("--gpu", default="24GB", help="cap while training")
    parser.add_argument("--inference-gpu", default="8GB", help="cap while answering")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA card here: nothing can be measured.")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, recipe {arguments.recipe}")
    for stage in RECIPES[arguments.recipe]:
        measure_stage(arguments.recipe, stage, parse_bytes(arguments.gpu), arguments.device)
    for name, formats in FORMATS.items():
        measure_inference(arguments.recipe, name, formats, parse_bytes(arguments.inference_gpu), arguments.device)
    return 0


def config_of(recipe: str, stage: Stage) -> TinyGPTVConfig:
    build = TinyGPTVConfig.mini if recipe == "mini" else TinyGPTVConfig.phi2
    return build(image_size=stage.image_size, lora_rank=stage.lora_rank, lora_dropout=stage.lora_dropout)


def measure_stage(recipe: str, stage: Stage, capacity: int, device: str) -> None:
    """The stage's own step, and the largest micro-batch that the plan allows, with and without checkpointing."""
    config = config_of(recipe, stage)
    memory = TrainingMemory(config, stage)
    for checkpointing in (False, True):
        largest = memory.largest_micro_batch(capacity, gradient_checkpointing=checkpointing)
        for size in sorted({stage.max_step_samples, min(largest, 8 * stage.max_step_samples)} - {0}):
            plan = memory.plan(size, gradient_checkpointing=checkpointing)

            report(
                f"stage {stage.number}, batch {size}, checkpointing {checkpointing}",
                plan,
                capacity,
                partial(random_model, config, device),
                partial(train, stage=stage, num_tokens=memory.num_tokens, size=size, checkpointing=checkpointing),
            )


def train(
    model: TinyGPTVForConditionalGeneration,
    *,
    stage: Stage,
    num_tokens: int,
    size: int,
    checkpointing: bool,
    steps: int = 2,
) -> None:
    """Optimizer steps on random samples of the stage's greatest length."""
    set_trainable(model, stage.trainable)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, stage.schedule, stage.weight_decay, stage.beta2)
    step = TrainStep(model, optimizer, num_sources=1, precision="bf16", max_grad_norm=1.0)
    for _ in range(steps):
        step.run([random_batch(model.config, stage, num_tokens, size)], 1e-5)


def measure_inference(recipe: str, name: str, formats: dict[str, str], capacity: int, device: str) -> None:
    """One question about one image, up to the longest context."""
    stage = RECIPES[recipe][3]
    config = config_of(recipe, stage)
    config.lora_rank = 0
    length = config.text_config.max_position_embeddings
    plan = inference_memory(config, {**OTHER_PARTS, **formats}, num_tokens=length)

    def prepare() -> TinyGPTVForConditionalGeneration:
        model = random_model(config, device).eval().requires_grad_(False)
        low_bit(model, formats["language_model"], device)
        return model

    def work(model: TinyGPTVForConditionalGeneration) -> None:
        ids = torch.full((1, length - 8), 5, device=device)
        ids[0, 1 : 1 + config.num_query_tokens] = config.image_token_id
        pixels = torch.randn(1, 3, stage.image_size, stage.image_size, device=device)
        model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, eos_token_id=None, do_sample=False)

    try:
        report(f"answering as {name}", plan, capacity, prepare, work)
    except ImportError as error:
        print(f"answering as {name}: not measured, {error}")


def random_model(config: TinyGPTVConfig, device: str) -> TinyGPTVForConditionalGeneration:
    """Random weights made where they stay, in the dtypes of training."""
    model = build_on_meta(config)
    for name, parameter in list(model.named_parameters()):
        dtype = torch.float32 if FLOAT32_NAMES.match(name) else torch.bfloat16
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = nn.Parameter(value.fill_(1.0) if parameter.ndim == 1 else value.normal_(std=0.02))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    for module in model.modules():
        rebuild_buffers(module)
    return model.to(device)


def low_bit(model: TinyGPTVForConditionalGeneration, form: str, device: str) -> None:
    """Round the language model's linear layers, one at a time."""
    if form == "bf16":
        return
    from tinygptv.quantization.linear_bnb import LLMInt8Linear, NF4Linear

    kind = NF4Linear if form == "nf4" else LLMInt8Linear
    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            packed = kind.restore(kind.pack(module, device), device, torch.bfloat16)
            setattr(model.language_model.get_submodule(owner), leaf, packed)


def random_batch(config: TinyGPTVConfig, stage: Stage, num_tokens: int, size: int) -> MicroBatch:
    """Samples of one length, all of whose answers are as long as they may be."""
    answer = stage.limits.max_text_tokens
    ids = np.full((size, num_tokens), 5, dtype=np.int64)
    ids[:, 1 : 1 + config.num_query_tokens] = config.image_token_id
    positions = np.arange(num_tokens - answer - 1, num_tokens - 1)
    side = config.vision_config.image_size
    return MicroBatch(
        input_ids=ids,
        attention_mask=None,
        position_ids=None,
        supervised_positions=(np.arange(size)[:, None] * num_tokens + positions).ravel(),
        supervised_ids=np.full(size * answer, 5, dtype=np.int64),
        supervised_sources=np.zeros(size * answer, dtype=np.int64),
        pixels=np.zeros((size, 3, side, side), dtype=np.uint8),
        query_features=None,
        num_samples=size,
        num_real=size * num_tokens,
    )


def report(
    title: str,
    plan: MemoryPlan,
    capacity: int,
    prepare: Callable[[], TinyGPTVForConditionalGeneration],
    work: Callable[[TinyGPTVForConditionalGeneration], None],
) -> None:
    """Run under the cap and print planned and measured peak as one line of JSON."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0)
    model = prepare()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min((capacity - CUDA_CONTEXT_BYTES) / total, 1.0))
    torch.cuda.reset_peak_memory_stats()
    fits = True
    try:
        work(model)
    except torch.cuda.OutOfMemoryError:
        fits = False
    measured = torch.cuda.max_memory_allocated()
    facts = {
        "what": title,
        "planned_gib": round(plan.allocated / GIB, 2),
        "measured_gib": round(measured / GIB, 2) if fits else None,
        "difference": round(plan.allocated / measured - 1, 3) if fits else None,
        "planned_to_fit": plan.peak <= capacity,
        "fits": fits,
    }
    print(json.dumps(facts), flush=True)
    del model
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
