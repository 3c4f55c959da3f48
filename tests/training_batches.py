"""A tiny model, and batches of samples of different lengths, for tests of the training step."""

from __future__ import annotations

import numpy as np
import torch

from tinygptv.data.collate import LoadedSample
from tinygptv.data.sample import EncodedSample
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import TrainStep

TRAINED = ("projector", "language_norms", "lora")


def tiny_model(device="cpu", dtype=torch.float32, **changes) -> TinyGPTVForConditionalGeneration:
    """Random weights, adapters that change something, frozen parts in ``dtype``; the stage's parts train."""
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config(**changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("layernorm.bias"):
            parameter.data.normal_(std=0.1)
    set_trainable(model, TRAINED)
    for part in (model.vision_encoder, model.qformer):
        part.to(dtype)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return torch.nn.Module.to(model, device).train()


def make_sample(answer: int, *, image: bool = True, seed: int = 0) -> LoadedSample:
    """BOS, an image or none, five tokens of a question, and an answer."""
    rng = np.random.default_rng((seed, answer))
    encoded = EncodedSample()
    encoded.add([0, *([256] * 4 if image else []), *rng.integers(1, 255, 5).tolist()])
    encoded.add(rng.integers(1, 255, answer).tolist(), learn=True)
    pixels = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8) if image else None
    return LoadedSample(encoded, 0, pixels=pixels)


def mixed_samples() -> list[LoadedSample]:
    """Five samples of 8 to 40 tokens, one without an image."""
    return [make_sample(5), make_sample(17), make_sample(2, image=False), make_sample(9), make_sample(30)]


def loss_and_gradient(model, batch, **options) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of one micro-batch; the weights stay as they are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=trained[0].is_cuda)  # fused, as the scaler of fp16 needs
    step = TrainStep(model, optimizer, num_sources=1, **options)
    result = step.run([batch], 0.0)
    return float(result.loss), step.gradient.clone()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of two gradients, as a share of the second's norm."""
    return float((one.cpu() - other.cpu()).norm() / other.norm())
