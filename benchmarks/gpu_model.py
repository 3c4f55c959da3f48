"""The model and the training step of the GPU benchmarks: random weights, made where they stay."""

from __future__ import annotations

import torch
from gpu_rows import GIB
from torch import nn

from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.load import rebuild_buffers
from tinygptv.model.meta import build_on_meta
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import TrainStep

CAP_BYTES = 24 * GIB
"""The card that training is measured on."""
TRAINED = ("projector", "language_norms", "lora")
"""What stages 2 to 4 train."""


def random_model(
    config: TinyGPTVConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> TinyGPTVForConditionalGeneration:
    """Random weights made where they stay; answers depend on every token of the prompt.

    Args:
        config: sizes.
        device: where they stay.
        dtype: of the matrices; what stages train is float32.
    """
    model = build_on_meta(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        kind = torch.float32 if FLOAT32_NAMES.match(name) else dtype
        value = torch.zeros(parameter.shape, dtype=kind, device=device)
        if parameter.ndim > 1:
            value.normal_(std=0.02, generator=generator)
        elif not name.endswith("bias"):
            value.fill_(1.0)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    for module in model.modules():
        rebuild_buffers(module)
    return model.to(device)


def train_step(model: TinyGPTVForConditionalGeneration, trained: tuple[str, ...] = TRAINED) -> TrainStep:
    """The project's own step, compiled and without padding, on whatever device."""
    set_trainable(model, trained)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    compile_ = "on" if model.device.type == "cuda" else "off"
    return TrainStep(model, optimizer, num_sources=1, precision="bf16", flat=True, compile=compile_)


def checkpointing(model: TinyGPTVForConditionalGeneration, on: bool) -> None:
    """Switch gradient checkpointing of the language layers."""
    if on:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.language_model.gradient_checkpointing_disable()
