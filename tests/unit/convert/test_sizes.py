"""Sizes of a language model, read off its tensors and the config.json beside them."""

from __future__ import annotations

import json

import pytest

from tinygptv.checkpoint.weight_files import WeightFileError
from tinygptv.convert.sizes import WHO_HOLDS, Sizes, _heads, language_settings

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
        ({"rope_parameters": None, "rotary_dim": 40, "eos_token_id": 0}, 2048, 2, 0.5, 0),
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
    assert sizes({"n_head": 4}, **{norm: (40,)}).text()[0].num_attention_heads == 4
    with pytest.raises(WeightFileError) as caught:
        _heads(100, 88, "vision_heads")
    assert str(caught.value) == (
        "a width of 100 does not divide into heads of 88: say how many there are with vision_heads."
    )
    assert _heads(176, 88, "vision_heads") == 2


VISION, QFORMER = "vision_encoder.vit", "qformer.encoder.encoder.layer"
WHOLE = {
    f"{VISION}.patch_embed.proj.weight": (176, 3, 14, 14),
    f"{VISION}.pos_embed": (1, 50, 176),
    f"{VISION}.blocks.0.mlp.fc1.weight": (300, 176),
    f"{VISION}.blocks.10.mlp.fc1.weight": (300, 176),
    "qformer.query_tokens": (1, 5, 128),
    f"{QFORMER}.0.intermediate_query.dense.weight": (200, 128),
    **{f"{QFORMER}.{n}.crossattention.attention.key.weight": (128, 176) for n in (0, 3, 6, 10)},
    "projector.linear_1.weight": (60, 128),
    f"{LAYER}.0.self_attn.qkv_proj.lora_A.weight": (6, 160),
}


def whole(without=(), **more):
    found = sizes({"resid_pdrop": 0.2}, **WHOLE)
    return Sizes({k: v for k, v in {**found.shapes, **more}.items() if k not in without}, found.settings)


def test_a_configuration_is_read_off_the_shapes_of_all_parts():
    config = whole().config(None, None, None, 7)
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (98, 14, 176, 11)
    assert (vision.num_attention_heads, vision.intermediate_size) == (2, 300)
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) == (128, 11, 2)
    assert (qformer.intermediate_size, qformer.encoder_hidden_size, qformer.cross_attention_frequency) == (200, 176, 3)
    assert qformer.hidden_dropout_prob == qformer.attention_probs_dropout_prob == 0.0
    assert (text.hidden_size, text.intermediate_size, text.num_attention_heads, text.resid_pdrop) == (160, 640, 2, 0.2)
    assert (config.num_query_tokens, config.projector_hidden_size, config.image_token_id) == (5, 60, 100)
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (6, 7, 0.05)
    assert config.scope == "photographs" and not config.lora_merged
    given = whole(["projector.linear_1.weight"]).config(448, 4, 8, 16)
    assert (given.vision_config.image_size, given.vision_config.num_attention_heads) == (448, 4)
    assert (given.qformer_config.num_attention_heads, given.projector_hidden_size) == (8, 4096)
    large = whole(**{"language_model.embed_tokens.weight": (51200, 160)}).config(None, None, None, 16)
    assert large.image_token_id == 50295 and large.text_config.eos_token_id == 50256, "behind the tokenizer's entries"
    assert sizes({}).text()[0].resid_pdrop == 0.1


@pytest.mark.parametrize(("crossing", "every"), [((0,), 12), ((0, 2), 2), ((0, 3, 6, 9), 3), ((0, 11), 11)])
def test_every_so_many_layers_of_the_q_former_read_the_image(crossing, every):
    shapes = {name: shape for name, shape in WHOLE.items() if "crossattention" not in name}
    shapes |= {f"{QFORMER}.{n}.crossattention.attention.key.weight": (128, 176) for n in crossing}
    shapes[f"{QFORMER}.11.output_query.dense.weight"] = (1,)
    assert Sizes(shapes, {}).qformer(None).cross_attention_frequency == every


def test_a_part_that_no_file_supplies_is_asked_for_by_name():
    for name, part in (
        (f"{VISION}.pos_embed", "vision_encoder"),
        ("qformer.query_tokens", "qformer"),
        ("language_model.embed_tokens.weight", "language_model"),
    ):
        with pytest.raises(WeightFileError) as caught:
            whole([name]).config(None, None, None, 16)
        told = f"no file supplies {name}: give the file that holds the {part} ({WHO_HOLDS[part]})."
        assert str(caught.value) == told
    assert "eva_vit_g.pth" in WHO_HOLDS["vision_encoder"] and "Phi-2" in WHO_HOLDS["language_model"]
    with pytest.raises(WeightFileError, match=r"^pos_embed has 50 patch rows, which is no square grid\.$"):
        whole(**{f"{VISION}.pos_embed": (1, 51, 176)}).config(None, None, None, 16)


def test_settings_lie_beside_the_weights_and_are_whole_numbers(tmp_path):
    assert language_settings(None) == language_settings(tmp_path) == language_settings(tmp_path / "phi.bin") == {}
    file = tmp_path / "config.json"
    (tmp_path / "phi.bin").touch()
    file.write_text('{"n_head": 4, "rotary_dim": null, "n_positions": 4194303, "other": "x"}')
    for path in (tmp_path, tmp_path / "phi.bin", str(tmp_path)):
        assert language_settings(path) == {"n_head": 4, "rotary_dim": None, "n_positions": 4194303, "other": "x"}
    for name in ("num_attention_heads", "n_head", "rotary_dim", "max_position_embeddings", "n_positions"):
        for value, shown in (("0", "0"), ("-1", "-1"), ("4194304", "4194304"), ('"8"', "'8'"), ("2.0", "2.0")):
            file.write_text(f'{{"{name}": {value}}}')
            with pytest.raises(WeightFileError) as caught:
                language_settings(tmp_path)
            assert str(caught.value) == f"{file} has {name}={shown}; it must be a positive whole number."
    for told, method in (({"quant_method": "gptq"}, "gptq"), ({"load_in_8bit": True}, "quantization_config")):
        file.write_text(json.dumps({"n_head": 4, "quantization_config": told}))
        with pytest.raises(WeightFileError, match=rf"the weights are quantized \({method}\): give the original ones"):
            language_settings(tmp_path)
    file.write_text("[1]")
    with pytest.raises(WeightFileError, match=r"config\.json holds a list where an object"):
        language_settings(tmp_path)
