"""A model without memory has the names and shapes of the real one, and initialising nothing changes nothing."""

from __future__ import annotations

import pytest
import torch

from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.meta import build_on_meta, tensor_shapes
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.model.vision_encoder import interpolate_position_embedding


def test_names_and_shapes_are_those_of_the_model():
    config = tiny_config(lora_rank=4)
    model = build_on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    real = TinyGPTVForConditionalGeneration(config).state_dict()
    assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in real.items()}
    tensor_shapes(config).clear()  # the caller's own copy
    assert tensor_shapes(config).keys() == real.keys()
    assert tensor_shapes(tiny_config(lora_rank=2)) != tensor_shapes(config)


@pytest.mark.parametrize("patches", [3, 5, 8, 15])
def test_position_embeddings_are_of_square_grids(patches):
    with pytest.raises(ValueError, match=f"a position embedding of {patches} patches is no square grid"):
        interpolate_position_embedding(torch.zeros(1, patches + 1, 4), 2)
    assert interpolate_position_embedding(torch.zeros(1, 10, 4), 3).shape == (1, 10, 4)
    assert interpolate_position_embedding(torch.zeros(1, 10, 4), 5).shape == (1, 26, 4)


def test_a_real_encoder_is_initialised_as_timm_does_it():
    torch.manual_seed(0)
    encoder = TinyGPTVForConditionalGeneration(tiny_config()).vision_encoder.vit
    weight = encoder.blocks[1].attn.proj.weight
    assert 0.003 < weight.std() < 0.02, "0.02, divided by the root of twice the block's number"
    assert encoder.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert 0.015 < encoder.pos_embed.std() < 0.025 and 0.01 < encoder.cls_token.std() < 0.03
