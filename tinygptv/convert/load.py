"""Foreign weights -> our model, strictly: ``match`` says which tensor of which file goes where; here they are read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.match import Release, decorator, match_release
from tinygptv.model.meta import build_on_meta, tensor_shapes
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration


def load_release(
    vision: str | Path | None = None,
    qformer: str | Path | None = None,
    language: str | Path | None = None,
    projection: str | Path | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
    lora_alpha: int = 16,
    dtype: torch.dtype = torch.float32,
) -> TinyGPTVForConditionalGeneration:
    """Build a model from files in the original layouts; sizes are read from the tensors.

    Args:
        vision: ``eva_vit_g.pth``.
        qformer: BLIP-2's file (Q-Former, query tokens, ``ln_vision``).
        language: Phi-2, a folder or file in any of its four layouts.
        projection: MiniGPT-4's projection (first linear layer), for a start at stage 1.
        checkpoint: a stage file of the release, or a file of the whole model; its tensors win over the others'.
        image_size: side of the input in pixels; None keeps the position embedding's. Another one resamples it.
        vision_heads: attention heads of the ViT; None assumes the release's head width, 88.
        qformer_heads: attention heads of the Q-Former; None assumes the release's head width, 64.
        lora_alpha: LoRA scale numerator, which no file records.
        dtype: dtype of the frozen matrices; projector, LoRA and the language model's norms stay float32.

    Returns:
        The model in evaluation mode, with the ``LoadReport`` as ``model.load_report``.

    Raises:
        WeightFileError: a file is unusable, or a tensor is missing, misshapen, or belongs to another model.
    """
    release = match_release(
        vision, qformer, language, projection, checkpoint, image_size, vision_heads, qformer_heads, lora_alpha
    )
    model = build_on_meta(release.config)
    model = build_from_tensors(model, chain(release.tensors(dtype), build_fresh(release, dtype)))
    model.load_report = release.report
    return model.eval()


def build_from_tensors(
    model: TinyGPTVForConditionalGeneration, tensors: Iterator[tuple[str, Tensor]]
) -> TinyGPTVForConditionalGeneration:
    """Fill a model that was built on the meta device, and recompute its buffers.

    Args:
        model: on the meta device.
        tensors: (state-dict name, value) of every parameter.
    """
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    for module in model.modules():
        rebuild_buffers(module)
    return model


def build_fresh(release: Release, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Initialise what no file supplied and a fresh start may lack: (state-dict name, value)."""
    decorate = decorator(release.config)
    shapes = tensor_shapes(release.config)
    for plain in release.report.fresh:
        name = decorate(plain)
        value = _fresh(name, shapes[name], release.config)
        yield name, value.to(torch.float32 if FLOAT32_NAMES.match(name) else dtype)


def _fresh(name: str, shape: tuple[int, ...], config: TinyGPTVConfig) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.nn.init.normal_(torch.empty(shape), std=config.initializer_range)


def rebuild_buffers(module: torch.nn.Module) -> None:
    """Buffers that no file holds (rotary frequencies, EVA's zero key bias) are on meta after a meta build."""
    if type(module).__name__ == "PhiRotaryEmbedding":
        inv_freq, _ = module.compute_default_rope_parameters(module.config)
        module.inv_freq = inv_freq
        module.original_inv_freq = inv_freq.clone()
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.device.type == "meta":
            dtype = next((p.dtype for p in module.parameters(recurse=False)), buffer.dtype)
            setattr(module, name, torch.zeros(buffer.shape, dtype=dtype))
