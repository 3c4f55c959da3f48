"""The model's parts: how they are built and initialised, what transformers asks of them, and which images are used."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Blip2QFormerConfig

from tinygptv.config import EvaVisionConfig
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.language_model import Float32LayerNorm, Float32RMSNorm, matrix_input
from tinygptv.model.lora import AdaptedLinear
from tinygptv.model.projector import Projector
from tinygptv.model.qformer import QFormer
from tinygptv.model.tinygptv import FLOAT32_NAMES, TinyGPTVForConditionalGeneration
from tinygptv.model.varlen_attention import has_kernel, varlen_attention
from tinygptv.model.vision_encoder import VisionEncoder, interpolate_position_embedding

LAYER = "language_model.layers.0"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyGPTVForConditionalGeneration(tiny_config()).eval()


def test_adapters_have_the_rank_scale_and_dropout_of_the_configuration():
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=2, lora_alpha=6, lora_dropout=0.25)).train()
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert {(layer.adapter[0].out_features, layer.scale, layer.input_dropout) for layer in layers} == {(2, 3.0, 0.25)}
    assert (
        all(name.endswith(("qkv_proj", "dense")) for name, m in model.named_modules() if m in layers)
        and len(layers) == 4
    )
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=0))
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    model.add_lora(3, 9, 0.5)
    assert (model.config.lora_rank, model.config.lora_alpha, model.config.lora_dropout) == (3, 9, 0.5)
    model.set_lora_dropout(0.1)
    assert (
        model.config.lora_dropout == 0.1 and model.language_model.layers[0].self_attn.dense.train().input_dropout == 0.1
    )


def test_parts_have_the_sizes_of_their_configurations(model):
    config = model.config
    assert (model.projector.linear_1.in_features, model.projector.linear_1.out_features) == (24, 40)
    assert (model.projector.linear_2.in_features, model.projector.linear_2.out_features) == (40, 32)
    assert (model.lm_head.in_features, model.lm_head.out_features) == (32, 256) and model.lm_head.bias is not None
    assert model.qformer.query_tokens.shape == (1, 4, 24) and len(model.language_model.layers) == 2
    vit = model.vision_encoder.vit
    assert len(vit.blocks) == 2 and vit.blocks[0].mlp.fc1.out_features == config.vision_config.intermediate_size == 48
    assert vit.blocks[0].norm1.eps == 1e-6 and model.vision_encoder.ln_vision.eps == 1e-5
    assert vit.patch_embed.proj.kernel_size == (14, 14) and isinstance(vit.norm, nn.Identity)


@torch.no_grad()
def test_what_no_checkpoint_supplied_is_initialised_by_its_kind(model):
    vit = model.vision_encoder.vit
    model.config.initializer_range = 0.5
    for module, parameters, low, high in (
        (model.qformer, ["query_tokens"], 0.35, 0.65),
        (vit, ["pos_embed", "cls_token"], 0.01, 0.03),
        (model.lm_head, ["weight"], 0.4, 0.6),
    ):
        for name in parameters:
            getattr(module, name).fill_(9.0)
        model._init_weights(module)
        for name in parameters:
            assert low < getattr(module, name).std() < high and getattr(module, name).abs().max() < 9, name
    attention = vit.blocks[0].attn
    biases = [attention.q_bias, attention.k_bias, attention.v_bias]
    for bias in biases:
        bias.fill_(9.0)
    model._init_weights(attention)
    assert not any(bias.any() for bias in biases)


def test_what_stages_train_and_the_norms_stay_float32():
    wide = [
        *("projector.linear_1.weight", "projector.linear_2.bias", "language_model.final_layernorm.bias"),
        *(f"{LAYER}.self_attn.q_layernorm.weight", f"{LAYER}.self_attn.k_layernorm.bias"),
        *(f"{LAYER}.input_layernorm.weight", f"{LAYER}.attention_rmsnorm.weight"),
        *(f"{LAYER}.self_attn.dense.lora_A.default.weight", f"{LAYER}.self_attn.qkv_proj.lora_B.default.weight"),
    ]
    narrow = [
        *("lm_head.weight", "language_model.embed_tokens.weight", "qformer.encoder.layernorm.weight"),
        *(f"{LAYER}.mlp.fc1.weight", f"{LAYER}.self_attn.dense.base_layer.weight", "vision_encoder.ln_vision.weight"),
        *("qformer.query_tokens", "vision_encoder.vit.blocks.0.norm1.weight"),
    ]
    assert all(FLOAT32_NAMES.match(name) for name in wide) and not any(FLOAT32_NAMES.match(name) for name in narrow)


def test_embeddings_can_be_read_and_replaced(model):
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    tokens, head = nn.Embedding(3, 32), nn.Linear(32, 3)
    model.set_input_embeddings(tokens)
    model.set_output_embeddings(head)
    assert model.language_model.embed_tokens is tokens and model.lm_head is head


@torch.no_grad()
@torch.no_grad()
def test_an_artifact_is_told_as_such(tmp_path):
    (tmp_path / "quantization.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a quantized artifact, .* give the checkpoint that it was made from"):
        TinyGPTVForConditionalGeneration.from_pretrained(tmp_path)


def test_the_base_model_is_all_but_the_head(model):
    """Trainers with a head of their own (TRL) call it with what they would give to the model."""
    queries = [model.config.image_token_id] * model.config.num_query_tokens
    inputs = {"input_ids": torch.tensor([[5, *queries, 7]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    base = model.base_model
    hidden = base(**inputs, attention_mask=torch.ones(1, 2 + len(queries)), use_cache=False).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
    head = {"lm_head.weight", "lm_head.bias"}
    assert {name: id(p) for name, p in base.named_parameters()} == {
        name: id(p) for name, p in model.named_parameters() if name not in head
    }
    assert base.config is model.config and not model.supports_tp_plan and model.get_encoder() is model


def test_the_image_side_can_be_changed_and_others_are_refused(model):
    pixels = torch.zeros(1, 3, 28, 28)
    assert model.encode_images(pixels).shape == (1, 4, 32)
    with pytest.raises(ValueError) as caught:
        model.set_image_size(50)
    assert str(caught.value) == "image_size 50 is not a multiple of patch_size 14."
    before = model.vision_encoder.vit.pos_embed
    before.requires_grad_(False)
    model.set_image_size(28)
    assert model.vision_encoder.vit.pos_embed is before
    model.set_image_size(42)
    after = model.vision_encoder.vit.pos_embed
    assert after.shape == (1, 10, 32) and not after.requires_grad and torch.equal(after[:, 0], before[:, 0])
    assert model.config.vision_config.image_size == model.vision_encoder.config.image_size == 42
    patches = model.vision_encoder.vit.patch_embed
    assert (patches.img_size, patches.grid_size, patches.num_patches) == ((42, 42), (3, 3), 9)
    for wrong in (pixels, torch.zeros(1, 1, 42, 42), torch.zeros(1, 3, 42, 28)):
        with pytest.raises(ValueError) as caught:
            model.encode_images(wrong)
        assert str(caught.value) == (
            f"pixel_values has shape {tuple(wrong.shape)} but this vision encoder takes [N, 3, 42, 42]: process images "
            "at size 42, or call model.set_image_size()."
        )
    assert model.encode_images(torch.zeros(2, 3, 42, 42)).shape == (2, 4, 32)


@torch.no_grad()
def test_weights_that_are_offloaded_are_fetched_by_their_layers(model, monkeypatch):
    """timm reads the weight of a layer whose bias is not separate itself."""
    vit = model.vision_encoder.vit
    monkeypatch.setattr(vit, "forward", lambda pixels: torch.zeros(1, 5, 32))
    offloaded, there = (block.attn for block in vit.blocks)
    offloaded.qkv.weight = nn.Parameter(offloaded.qkv.weight.to("meta"))
    model.vision_encoder(torch.zeros(1, 3, 28, 28))
    assert offloaded.qkv_bias_separate and not there.qkv_bias_separate


@torch.no_grad()
def test_an_adapter_on_the_encoders_qkv_counts(model):
    """timm would compute with the layer's weight alone: adapters changed nothing, and never trained."""
    encoder = copy.deepcopy(model.vision_encoder)
    before = encoder(torch.ones(1, 3, 28, 28))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False), encoder)
    assert not torch.allclose(encoder(torch.ones(1, 3, 28, 28)), before)
    for block in encoder.vit.blocks:
        block.attn.qkv.enable_adapters(False)
    assert torch.allclose(encoder(torch.ones(1, 3, 28, 28)), before, atol=1e-5)


def test_features_are_not_cast_to_the_type_of_packed_weights():
    projector = Projector(2, 2, 2)
    packed = nn.Identity()
    packed.weight = torch.zeros(2, 2, dtype=torch.int8)  # as bitsandbytes' layers have it
    projector.linear_1 = packed
    features = torch.tensor([[[0.25, -0.5]]])
    assert torch.equal(projector(features), projector.linear_2(features))


def test_a_graph_with_images_can_be_exported(model):
    """Its values are not known while it is traced."""
    part = nn.Module()
    part.forward = lambda ids, embeds: model.embed(ids, image_embeds=embeds)
    ids, embeds = torch.tensor([[1, *[256] * 4]]), torch.rand(1, 4, 32)
    exported = torch.export.export(part, (ids, embeds), strict=False).module()
    assert torch.equal(exported(ids, embeds), model.embed(ids, image_embeds=embeds))


@torch.no_grad()
def test_ready_embeddings_win_over_features_and_these_over_pixels(model, monkeypatch):
    ids = torch.tensor([[1, *[256] * 4]])
    pixels, features, embeds = torch.rand(1, 3, 28, 28), torch.rand(1, 4, 24), torch.rand(1, 4, 32)
    alone = [model.embed(ids, pixels), model.embed(ids, None, features), model.embed(ids, None, None, embeds)]
    assert torch.equal(alone[0][:, 1:], model.projector(model.encode_query_features(pixels)))
    assert torch.equal(alone[1][:, 1:], model.projector(features)) and torch.equal(alone[2][:, 1:], embeds)
    monkeypatch.setattr(model, "encode_query_features", lambda pixels: pytest.fail("encoded for nothing"))
    assert torch.equal(model.embed(ids, pixels, features), alone[1])
    assert torch.equal(model.embed(ids, pixels, features, embeds), alone[2])
    positions = torch.arange(1, 5)
    model.language_model.embed_tokens.to(torch.bfloat16)
    placed = model.embed(torch.ones_like(ids), image_embeds=embeds, image_positions=positions)
    assert placed.dtype == torch.bfloat16 and torch.equal(placed[:, 1:], embeds.bfloat16())
    assert model.embed(ids, image_embeds=embeds).dtype == torch.bfloat16
    words = model.embed(torch.ones_like(ids), image_positions=positions)
    assert torch.equal(words, model.get_input_embeddings()(torch.ones_like(ids)))


@torch.no_grad()
def test_logits_are_those_of_the_positions_that_are_asked_for(model):
    ids = torch.arange(1, 7)[None]
    whole = model(input_ids=ids)
    assert whole.logits.dtype == torch.float32 and whole.loss is None and whole.past_key_values.get_seq_length() == 6
    assert model(input_ids=ids, use_cache=False).past_key_values is None and whole.image_embeds is None
    embeds = torch.rand(1, 4, 32)
    assert model(input_ids=torch.tensor([[1, *[256] * 4]]), image_embeds=embeds).image_embeds is embeds
    for kept, wanted in ((1, [5]), (torch.tensor([0, 3]), [0, 3]), (0, range(6))):
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, whole.logits[:, list(wanted)])
    labels = torch.tensor([[9, 9, -100, 3, 4, -100]])
    scored = nn.functional.cross_entropy(whole.logits[0, [0, 2, 3]], torch.tensor([9, 3, 4]))
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, scored)
    assert model(input_ids=ids, labels=labels, return_dict=False)[0] == model(input_ids=ids, labels=labels).loss
    positions, targets = torch.tensor([0, 2, 3]), torch.tensor([9, 3, 4])
    losses = model.token_losses(model.embed(ids), positions, targets)
    torch.testing.assert_close(losses.mean(), scored)
    masked = model.token_losses(model.embed(ids), positions, targets, torch.tensor([[0, 1, 1, 1, 1, 1]]))
    assert not torch.allclose(masked, losses), "the mask reaches the layers"
    shifted = model.token_losses(model.embed(ids), positions, targets, position_ids=torch.tensor([[0, 5, 9, 1, 2, 3]]))
    assert not torch.allclose(shifted, losses), "and so do positions"
    own = model.token_losses(model.embed(ids), positions, targets, scorer=lambda logits, t, s: (t.float(), logits))
    assert own.tolist() == [9, 3, 4]


def test_the_encoders_own_dtype_and_its_exact_widths_stay():
    config = EvaVisionConfig(
        hidden_size=56, intermediate_size=61, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28
    )
    encoder = VisionEncoder(config).bfloat16()
    assert encoder.vit.blocks[0].mlp.fc1.out_features == 61, "61 / 56 * 56 is a little less"
    same = interpolate_position_embedding(encoder.vit.pos_embed.data, 2)
    assert same.dtype == torch.float32 and torch.equal(same, encoder.vit.pos_embed.float())
    encoder.set_image_size(42)
    assert encoder.vit.pos_embed.dtype == torch.bfloat16 and encoder.vit.pos_embed.requires_grad


@torch.no_grad()
def test_each_part_reads_its_own_dtype():
    projector = Projector(3, 4, 5).to(torch.bfloat16)
    assert (
        projector(torch.zeros(1, 2, 3)).shape == (1, 2, 5) and projector(torch.zeros(1, 2, 3)).dtype == torch.bfloat16
    )
    config = Blip2QFormerConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, encoder_hidden_size=6
    )
    qformer = QFormer(config, 3).eval()
    qformer.query_tokens.normal_()
    features = torch.rand(2, 4, 6)
    found = qformer(features.double())
    assert found.shape == (2, 3, 8) and found.dtype == torch.float32
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    masked = qformer(features, mask)
    torch.testing.assert_close(masked[0], found[0])
    torch.testing.assert_close(masked[1], qformer(features[1:, :2])[0], msg="patches without a mark are not read")
    for norm in (Float32LayerNorm(4), Float32RMSNorm(4, 1e-6).bfloat16(), Float32LayerNorm(4, bias=False).bfloat16()):
        assert norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
        x = torch.tensor([[3.3, 4.7, 0.1, -2.9]]).bfloat16()
        assert torch.equal(norm(x), norm.float()(x.float())), "the numbers of float32"
    x = torch.tensor([3.0, 4.0, 0.0, 0.0])
    rms = Float32RMSNorm(4, 0.75)
    rms.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert rms(x).tolist() == pytest.approx([3 / 7**0.5, 8 / 7**0.5, 0, 0]), "mean square 6.25, and epsilon"
    assert matrix_input(x, nn.Linear(4, 1).bfloat16()).dtype == torch.bfloat16
    packed = nn.Module()
    packed.weight = torch.zeros(1, dtype=torch.int8)
    assert matrix_input(x, packed) is x


def test_sequences_that_lie_one_after_the_other_attend_to_themselves_alone():
    query, key, value = (torch.randn(6, 2, 4) for _ in range(3))
    found = varlen_attention(query, key, value, torch.tensor([0, 2, 6], dtype=torch.int32), 4, 0.3)
    for start, end in ((0, 2), (2, 6)):
        scores = torch.einsum("qnh,knh->nqk", query[start:end], key[start:end]) * 0.3
        scores += torch.full((end - start, end - start), -torch.inf).triu(1)
        wanted = torch.einsum("nqk,knh->qnh", scores.softmax(-1), value[start:end])
        torch.testing.assert_close(found[start:end], wanted)
    assert not has_kernel(query) and not has_kernel(query.bfloat16())
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    assert [has_kernel(SimpleNamespace(is_cuda=True, dtype=kind)) for kind in kinds] == [True, True, False]
