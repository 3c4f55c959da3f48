"""Sizes of a language model, read off its tensors and the config.json beside them."""

from __future__ import annotations

import pytest

from tinygptv.checkpoint.weight_files import WeightFileError
from tinygptv.convert.sizes import Sizes, _heads

LAYER = "language_model.layers"


def sizes(settings, **more):
    shapes = {
        "language_model.embed_tokens.weight": (100, 160),
        f"{LAYER}.0.mlp.fc1.weight": (640, 160),
        f"{LAYER}.10.mlp.fc1.weight": (640, 160),
        **more,
    }
    return Sizes(shapes, settings)


@pytest.mark.parametrize(
    ("settings", "positions", "heads", "rotary", "end"),
    [
        ({}, 2048, 2, 0.4, 99),
        ({"n_positions": 512, "n_head": 4, "rotary_dim": 10}, 512, 4, 0.25, 99),
        ({"max_position_embeddings": 256, "n_positions": 512, "num_attention_heads": 8, "n_head": 4}, 256, 8, 0.4, 99),
        ({"partial_rotary_factor": 0.5, "rotary_dim": 10, "eos_token_id": 7}, 2048, 2, 0.5, 7),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}, "eos_token_id": [1, 2]}, 2048, 2, 0.75, 99),
    ],
)
def test_settings_of_both_names_are_read(settings, positions, heads, rotary, end):
    config, rank = sizes(settings).text()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (100, 160, 11)
    assert (config.max_position_embeddings, config.num_attention_heads, rank) == (positions, heads, 0)
    assert config.rope_parameters["partial_rotary_factor"] == rotary
    assert config.eos_token_id == config.bos_token_id == config.pad_token_id == end


def test_added_norms_tell_the_heads_and_adapters_the_rank():
    norm, lora = f"{LAYER}.0.self_attn.q_layernorm.weight", f"{LAYER}.0.self_attn.qkv_proj.lora_A.weight"
    config, rank = sizes({}, **{norm: (40,), lora: (6, 160)}).text()
    assert (config.num_attention_heads, rank) == (4, 6)
    with pytest.raises(WeightFileError, match=r"config\.json says 2 heads but q_layernorm has width 40"):
        sizes({"n_head": 2}, **{norm: (40,)}).text()
    with pytest.raises(WeightFileError, match="say how many there are with vision_heads"):
        _heads(100, 88, "vision_heads")
