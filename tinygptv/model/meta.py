"""The model on torch's meta device: names, shapes and dtypes of all tensors, without memory for them."""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from tinygptv.config import TinyGPTVConfig
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


def build_on_meta(config: TinyGPTVConfig) -> TinyGPTVForConditionalGeneration:
    """A model whose tensors have no values yet.

    Raises:
        Exception: whatever torch, timm and transformers raise on sizes that do not fit each other.
    """
    with torch.device("meta"):
        return TinyGPTVForConditionalGeneration(config)


def tensor_shapes(config: TinyGPTVConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of a model.

    Raises:
        Exception: as ``build_on_meta``.
    """
    return dict(_tensor_shapes(config.to_json_string(use_diff=False)))


@lru_cache(maxsize=8)
def _tensor_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    model = build_on_meta(TinyGPTVConfig(**json.loads(config_json)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
