"""The configuration: the paper's sizes, the miniature's, and what a part that is given in part is filled up with."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from tinygptv.checkpoint import config_file
from tinygptv.config import (
    ATTENTION_IMPLEMENTATIONS,
    LORA_TARGETS,
    EvaVisionConfig,
    TinyGPTVConfig,
    TinyGPTVTextConfig,
)

VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1408,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "layer_norm_eps": 1e-6,
    "output_layer_norm_eps": 1e-5,
}
QFORMER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "encoder_hidden_size": 1408,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXT = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "resid_pdrop": 0.1,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_pytorch_tanh",
    "qk_layernorm": True,
    "attention_rmsnorm": True,
    "input_layernorm": True,
    "attention_rmsnorm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
}
WHOLE = {
    "num_query_tokens": 32,
    "projector_hidden_size": 4096,
    "image_token_id": 50295,
    "template": "human",
    "scope": "photographs",
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_merged": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


def values(config, names):
    return {name: getattr(config, name) for name in names}


def test_the_papers_sizes():
    config = TinyGPTVConfig.phi2()
    assert values(config.vision_config, VISION) == VISION and config.vision_config.num_patches == 256
    assert values(config.qformer_config, QFORMER) == QFORMER and values(config.text_config, TEXT) == TEXT
    assert config.text_config.rope_parameters["partial_rotary_factor"] == 0.4
    assert values(config, WHOLE) == WHOLE
    larger = TinyGPTVConfig.phi2(448, lora_rank=0, vision_config={"image_size": 28, "num_hidden_layers": 2})
    assert values(larger, WHOLE) == {**WHOLE, "lora_rank": 0}
    assert values(larger.vision_config, VISION) == {**VISION, "image_size": 28, "num_hidden_layers": 2}
    assert TinyGPTVConfig.phi2(448).vision_config.num_patches == 1024
    assert TinyGPTVConfig().scope == "", "nobody said"
    config_file._check_values("config.json", TinyGPTVConfig.phi2(896).to_dict())  # twice the paper's side is readable


def test_what_carries_adapters_and_which_attention_there_is():
    assert set(LORA_TARGETS) == {"qkv_proj", "dense"}, "as in the release, whose q, k and v are one layer"
    assert set(ATTENTION_IMPLEMENTATIONS) == {"eager", "sdpa", "flex_attention"}, "others name code to download"


@pytest.mark.parametrize(("side", "patch", "patches"), [(448, 14, 1024), (50, 16, 9), (16, 16, 1)])
def test_patches_that_are_whole_are_counted(side, patch, patches):
    assert EvaVisionConfig(image_size=side, patch_size=patch).num_patches == patches


def test_the_miniatures_sizes():
    config = TinyGPTVConfig.mini(128, 300, scope="", lora_alpha=7)
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    found = [tuple(values(part, names).values()) for part in (vision, qformer, text)]
    assert found == [(128, 5, 4, 384), (128, 4, 4, 256), (192, 5, 6, 576)]
    assert (vision.image_size, vision.patch_size, vision.num_patches, qformer.encoder_hidden_size) == (128, 8, 256, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.resid_pdrop) == (300, 512, 0.0)
    assert text.bos_token_id == text.eos_token_id == text.pad_token_id == 0
    assert text.rope_parameters["partial_rotary_factor"] == 0.4 and qformer.hidden_dropout_prob == 0.0
    assert values(config, WHOLE) == {
        **WHOLE,
        "num_query_tokens": 16,
        "projector_hidden_size": 256,
        "image_token_id": 299,
        "scope": "",
        "lora_rank": 16,
        "lora_alpha": 7,
        "lora_dropout": 0.0,
    }
    small = TinyGPTVConfig.mini()
    assert (small.vision_config.image_size, small.text_config.vocab_size) == (64, 640)
    assert (small.image_token_id, small.scope) == (639, "drawn scenes")


def test_a_part_is_a_mapping_or_its_class_and_the_q_former_reads_the_encoder():
    text = TinyGPTVTextConfig(hidden_size=64, num_attention_heads=4)
    config = TinyGPTVConfig(text_config=text, vision_config={"hidden_size": 1408, "layer_norm_eps": 1e-3})
    assert config.text_config is text and isinstance(config.vision_config, EvaVisionConfig)
    assert config.vision_config.layer_norm_eps == 1e-3
    with pytest.raises(ValueError) as caught:
        TinyGPTVConfig(vision_config={"hidden_size": 96}, qformer_config={"encoder_hidden_size": 128})
    assert str(caught.value) == (
        "qformer_config.encoder_hidden_size is 128 but vision_config.hidden_size is 96: the Q-Former reads the vision "
        "encoder's output, so set both to the same width."
    )
    again = TinyGPTVConfig.from_dict(TinyGPTVConfig.mini(scope="").to_dict())
    assert again.to_dict() == TinyGPTVConfig.mini(scope="").to_dict()


def test_no_code_of_a_folder_is_named():
    """TRL asks every configuration whose model transformers does not have, and ends where nothing is said."""
    config = TinyGPTVConfig.mini()
    assert config.auto_map == {} and "auto_map" not in config.to_dict()


def test_the_configurations_are_known_by_their_types():
    for name, kind in (
        ("tinygptv", TinyGPTVConfig),
        ("tinygptv_vision", EvaVisionConfig),
        ("tinygptv_text", TinyGPTVTextConfig),
    ):
        assert type(AutoConfig.for_model(name)) is kind and kind.model_type == name
