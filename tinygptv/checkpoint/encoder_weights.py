"""The frozen image encoder and Q-Former of a checkpoint, as they are stored.

Cached features are named by these values, so a stage hands them on as its start has them: what training in half
precision rounds away stays in the files, and the next stage finds the features of this one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

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


def stored_encoder(checkpoint: str | Path, image_size: int) -> Iterator[tuple[str, Tensor]]:
    """Read the encoder's tensors one by one, by name in sorted order, each in the dtype it is stored in.

    The position embedding is resampled to the image size. So the checkpoint of a stage, whose embedding was resampled
    to the stage's size, gives the values of the stage's start.

    Args:
        checkpoint: local folder.
        image_size: side in pixels.
    """
    tensors = open_weights(checkpoint)
    for name in sorted(name for name in tensors if name.startswith(ENCODER_PARTS)):
        values = tensors[name].load()
        if name == _POSITIONS:
            grid = image_size // read_config(Path(checkpoint)).vision_config.patch_size
            values = interpolate_position_embedding(values, grid).to(values.dtype)
        yield name, values


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
        if not _is_rounding(stored.float(), frozen[name].detach().float().cpu()):
            logger.warning("%s of %s has changed since training began: the values in memory are written.", name, start)
            return {}
        found[name] = stored
    return found


def _is_rounding(stored: Tensor, used: Tensor) -> bool:
    return stored.shape == used.shape and bool((stored - used).abs().max() <= _ROUNDING * stored.abs().max())
