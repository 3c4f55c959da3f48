"""Weights of a stage's start as they are stored, where loading in half precision rounds them.

What a stage trains begins with the stored values, and the frozen image encoder and Q-Former are handed on with them:
cached features are named by these, so that the next stage finds the features of this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.weight_files import open_weights
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.model.vision_encoder import interpolate_position_embedding

logger = logging.getLogger(__name__)

ENCODER_PARTS = ("vision_encoder.", "qformer.")
_POSITIONS = "vision_encoder.vit.pos_embed"
_ROUNDING = 2**-7
"""Largest difference that two roundings to bfloat16 make, relative to a tensor's largest value."""


def stored_weights(checkpoint: str | Path, image_size: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """List the tensors of a checkpoint by name in sorted order, each with what reads it in the dtype it is stored in.

    The position embedding is resampled to the image size. So the checkpoint of a stage, whose embedding was resampled
    to the stage's size, gives the values of the stage's start.

    Args:
        checkpoint: local folder.
        image_size: side in pixels.
    """
    tensors = open_weights(checkpoint)

    def load(name: str) -> Tensor:
        values = tensors[name].load()
        if name != _POSITIONS:
            return values
        grid = image_size // read_config(Path(checkpoint)).vision_config.patch_size
        return interpolate_position_embedding(values, grid).to(values.dtype)

    return ((name, partial(load, name)) for name in sorted(tensors))


def stored_encoder(checkpoint: str | Path, image_size: int) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of the image encoder and Q-Former one by one, as ``stored_weights`` gives them."""
    return ((name, load()) for name, load in stored_weights(checkpoint, image_size) if name.startswith(ENCODER_PARTS))


@torch.no_grad()
def restore_rounded(model: TinyGPTVForConditionalGeneration, start: str | Path, loaded: torch.dtype) -> None:
    """Copy stored values into parameters that are no longer in the dtype they were loaded in, and were rounded to.

    Args:
        model: loaded from ``start`` and then brought to the dtypes of training; its image size may differ.
        start: local folder of the checkpoint.
        loaded: dtype that it was loaded in.
    """
    if loaded == torch.float32:
        return
    changed = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype != loaded}
    for name, load in stored_weights(start, model.config.vision_config.image_size):
        if name in changed:
            changed[name].copy_(load())


@torch.no_grad()
def take_stored(model: TinyGPTVForConditionalGeneration, start: str | Path) -> None:
    """Give a model that is to be written, not trained, the stored values that loading rounded, one tensor at a time.

    A checkpoint that was converted holds float16 and names bfloat16 to load it in. What takes more memory as it is
    stored (float32), and matrices that LoRA was merged into, stay as they are.

    Args:
        model: loaded from ``start``; has several dtypes afterwards.
        start: local folder of the checkpoint.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    for name, load in stored_weights(start, model.config.vision_config.image_size):
        if name in parameters and (values := load()).element_size() == 2:
            parameters[name].data = values.clone()  # a mapped file must not stay open through its tensor


def unrounded_encoder(model: TinyGPTVForConditionalGeneration, start: str | Path) -> dict[str, Tensor]:
    """The frozen encoder of a model that was loaded from ``start``, as it is stored there.

    Args:
        model: in the dtype of training; its image size may differ from its start's.
        start: local folder of the checkpoint.

    Returns:
        Name -> stored values, on the CPU; without what trains.
    """
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    found: dict[str, Tensor] = {}
    for name, stored in stored_encoder(start, model.config.vision_config.image_size):
        if name not in frozen:
            continue
        if not is_rounding(stored, frozen[name].detach().cpu(), _ROUNDING):
            logger.warning("%s of %s has changed since training began: the values in memory are written.", name, start)
            return {}
        found[name] = stored
    return found


def is_rounding(stored: Tensor, used: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the first one's largest value."""
    stored, used = stored.float(), used.float()
    return stored.shape == used.shape and bool((stored - used).abs().max() <= tolerance * stored.abs().max())
