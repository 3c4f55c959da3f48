"""Every name that a layout knows, and the row orders of the fused projection on matrices, biases and adapters."""

from __future__ import annotations

import itertools

import pytest
import torch

from tinygptv.convert.layouts import (
    Ignored,
    Target,
    interleave_heads,
    language_target,
    plain_key,
    qformer_target,
    separate_heads,
    split_phi_tensors,
    vision_target,
)

BOTH = ("weight", "bias")


@pytest.mark.parametrize(
    "name",
    ["cls_token", "pos_embed", *(f"patch_embed.proj.{leaf}" for leaf in BOTH),
     *(f"blocks.12.{part}.{leaf}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for leaf in BOTH),
     "blocks.12.attn.q_bias", "blocks.12.attn.v_bias", "blocks.12.attn.qkv.weight"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
def test_all_that_the_encoder_has(name, prefix):
    assert vision_target(prefix + name, 13) == Target(f"vision_encoder.vit.{name}")
    for other in (f"{name}x", f"{name}.x"):
        found = vision_target(prefix + other, 13)
        assert isinstance(found, Ignored) if prefix or name.startswith("blocks") else found is None
    if name.startswith("blocks"):
        assert vision_target(prefix + name, 12) == Ignored("the model ends after block 11")


@pytest.mark.parametrize("name", ["norm", "fc_norm", "head", "rel_pos_bias", "mask_token", "lm_head"])
@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
def test_all_that_the_encoder_leaves_out(name, prefix):
    told = Ignored("the encoder has no final norm, head or relative position bias")
    for key in (f"{name}.weight", f"{name}.bias", name):
        assert vision_target(prefix + key, 3) == told
    for key in ("blocks.0.attn.qkv.bias", "blocks.0.attn.k_bias", "blocks.2.gamma_1", "blocks.0.norm3.weight"):
        assert vision_target(prefix + key, 3) == told


@pytest.mark.parametrize("prefix", ["", "Qformer."])
@pytest.mark.parametrize("leaf", BOTH)
def test_all_that_the_q_former_has_and_leaves_out(prefix, leaf):
    layer = "bert.encoder.layer.11"
    kept = [f"{kind}.self.{part}" for kind in ("attention", "crossattention") for part in ("query", "key", "value")]
    kept += [f"{kind}.output.{part}" for kind in ("attention", "crossattention") for part in ("dense", "LayerNorm")]
    kept += ["intermediate_query.dense", "output_query.dense", "output_query.LayerNorm"]
    for part in kept:
        ours = part.replace(".self.", ".attention.")
        wanted = Target(f"qformer.encoder.encoder.layer.11.{ours}.{leaf}")
        assert qformer_target(f"{prefix}{layer}.{part}.{leaf}") == wanted
    text = Ignored("text branch of the Q-Former, which the model does not build")
    others = ["intermediate.dense", "output.dense", "output.LayerNorm", "attention.self.query.x"]
    for key in (*(f"{layer}.{other}.{leaf}" for other in others), f"cls.predictions.{leaf}"):
        assert qformer_target(prefix + key) == text
    for part in ("word_embeddings", "position_embeddings", "position_ids"):
        assert qformer_target(f"{prefix}bert.embeddings.{part}.{leaf}") == text
    norm = qformer_target(f"{prefix}bert.embeddings.LayerNorm.{leaf}")
    assert norm == Target(f"qformer.encoder.layernorm.{leaf}")


@pytest.mark.parametrize(
    "key", ["t5_proj.weight", "opt_proj.bias", "llm_proj.weight", "vision_proj.bias", "text_proj.weight",
            "itm_head.weight", "temp", "t5_model.x", "opt_model.x"],
)  # fmt: skip
def test_other_models_projections_are_left_out_by_name(key):
    assert qformer_target(key) == Ignored("another language model's projection or head")
    assert qformer_target(f"x{key}") is None and qformer_target("temperature") is None


@pytest.mark.parametrize("prefix", ["", "llama_model."])
def test_buffers_of_the_language_model_are_computed(prefix):
    names = ["self_attn.rotary_emb.inv_freq", "mixer.rotary_emb.cos", "mixer.inner_attn.scale", "attn.bias"]
    names += ["mixer.inner_cross_attn.scale", "attn.masked_bias", "x.inv_freq"]
    for name in names:
        assert language_target(f"{prefix}transformer.h.0.{name}") == Ignored("a buffer that is computed")
    for leaf in BOTH:
        dense = Target(f"language_model.layers.2.self_attn.dense.{leaf}")
        assert language_target(f"{prefix}model.layers.2.self_attn.dense.{leaf}") == dense
        for ours, theirs in (
            ("lm_head", "lm_head"),
            ("lm_head", "lm_head.linear"),
            ("language_model.final_layernorm", "lm_head.ln"),
            ("language_model.final_layernorm", "model.final_layernorm"),
        ):
            assert language_target(f"{prefix}{theirs}.{leaf}") == Target(f"{ours}.{leaf}")
    assert language_target(f"{prefix}model.layers.0.self_attn.Wqkv.lora_B.weight") == Target(
        "language_model.layers.0.self_attn.qkv_proj.lora_B.weight"
    ), "in the order of layouts 1 and 2"


def test_wrappers_may_be_nested_in_any_order():
    for number in range(1, 4):
        for wrappers in itertools.product(("module.", "model.module.", "_orig_mod."), repeat=number):
            assert plain_key("".join(wrappers) + "llama_proj.weight") == "llama_proj.weight"
    inside = "model.layers.0.self_attn.dense"
    for start, end in (("base_model.model.", ""), ("llama_model.base_model.model.", "llama_model.")):
        assert plain_key(f"module.{start}{inside}.base_layer.bias") == f"{end}{inside}.bias"
        for part in ("lora_A", "lora_B"):
            assert plain_key(f"{start}{inside}.{part}.default.weight") == f"{end}{inside}.{part}.weight"
            assert plain_key(f"{start}{inside}.{part}.weight") == f"{end}{inside}.{part}.weight"


@pytest.mark.parametrize("more", [(), (5,)], ids=["bias", "matrix"])
def test_rows_go_from_all_q_first_to_each_heads_q_k_v_and_back(more):
    """Two heads of width 3: rows are numbered by part, head and row."""
    numbers = torch.tensor([100 * part + 10 * head + row for part in range(3) for head in range(2) for row in range(3)])
    rows = numbers.view(-1, *[1] * len(more)).expand(-1, *more).float()
    theirs = interleave_heads(rows, 2)
    wanted = [100 * part + 10 * head + row for head in range(2) for part in range(3) for row in range(3)]
    assert theirs.view(18, -1)[:, -1].tolist() == wanted and theirs.shape == rows.shape and theirs.is_contiguous()
    back = separate_heads(theirs, 2)
    assert torch.equal(back, rows) and back.is_contiguous()


def test_thirds_have_memory_of_their_own_and_the_name_of_their_leaf():
    rows = torch.arange(18.0).view(9, 2).T.contiguous().T  # columns lie one after the other
    for leaf in BOTH:
        found = split_phi_tensors(f"language_model.layers.3.self_attn.qkv_proj.{leaf}", rows)
        assert list(found) == [f"model.layers.3.self_attn.{part}_proj.{leaf}" for part in "qkv"]
        assert all(part.is_contiguous() and part.shape == (3, 2) for part in found.values())
