"""Modes, positions and gradients of the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.training_batches import tiny_model
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.language_model import PhiDecoderLayer

IDS = torch.arange(1, 13).reshape(2, 6)


def test_the_frozen_encoder_and_q_former_stay_in_evaluation_mode():
    model = tiny_model()
    assert model.training and model.language_model.training and model.projector.training
    assert not any(module.training for part in (model.vision_encoder, model.qformer) for module in part.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train(True)
    assert not model.qformer.encoder.training and model.language_model.layers[0].training


def test_features_carry_a_gradient_only_where_their_parts_train():
    model, pixels = tiny_model(), torch.randn(1, 3, 28, 28)
    assert not model.encode_query_features(pixels).requires_grad
    assert model.encode_images(pixels).requires_grad, "the projector trains"
    model.qformer.query_tokens.requires_grad_(True)
    assert model.encode_query_features(pixels).requires_grad
    with torch.no_grad():
        assert not model.encode_query_features(pixels).requires_grad


def test_positions_continue_behind_the_cache():
    model = tiny_model().eval()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        for first in (1, 4):
            cache = DynamicCache(config=model.config.text_config)
            start = model(input_ids=IDS[:, :first], past_key_values=cache, use_cache=True)
            rest = model(input_ids=IDS[:, first:], past_key_values=start.past_key_values, use_cache=True)
            together = torch.cat([start.logits, rest.logits], dim=1)
            torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-5)


def test_positions_count_from_the_first_token_whatever_the_mask_says():
    model = tiny_model().eval()
    mask = torch.ones_like(IDS)
    mask[:, 0] = 0
    with torch.no_grad():
        hidden = model(input_ids=IDS, attention_mask=mask).logits
        explicit = model(input_ids=IDS, attention_mask=mask, position_ids=torch.arange(6).unsqueeze(0)).logits
    assert torch.equal(hidden, explicit)


def test_inputs_are_ids_or_embeddings():
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.language_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.language_model(input_ids=IDS, inputs_embeds=torch.zeros(2, 6, 32))


def test_images_and_places_must_agree():
    model = tiny_model().eval()
    ids = torch.tensor([[1, *[256] * 4, 2]])
    with pytest.raises(ValueError, match="marks 4 image positions but no image was given"):
        model.embed(ids)
    with pytest.raises(ValueError, match="marks 4 image positions but 2 images of 4 query tokens"):
        model.embed(ids, query_features=torch.zeros(2, 4, 24))
    embeds = torch.randn(1, 4, 32)
    placed = model.embed(ids, image_embeds=embeds)
    assert torch.equal(placed[0, 1:5], embeds[0])
    words = model.get_input_embeddings()(torch.tensor([1, 2]))
    assert torch.equal(placed[0, [0, 5]], words)
    known = model.embed(torch.tensor([[1, 0, 0, 0, 0, 2]]), image_embeds=embeds, image_positions=torch.arange(1, 5))
    assert torch.equal(known, placed)


def test_the_loss_is_a_mean_or_a_share_of_all_items():
    model = tiny_model().eval()
    labels = IDS.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        mean = model(input_ids=IDS, labels=labels).loss
        share = model(input_ids=IDS, labels=labels, num_items_in_batch=24).loss
        last = model(input_ids=IDS, logits_to_keep=2).logits
        whole = model(input_ids=IDS).logits
    assert float(share) == pytest.approx(float(mean) * 6 / 24, rel=1e-5), "six labels are scored"
    torch.testing.assert_close(last, whole[:, -2:])


@pytest.mark.parametrize("attention_rmsnorm", [False, True])
@pytest.mark.parametrize("input_layernorm", [False, True])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_each_added_norm_can_be_left_out_alone(qk_layernorm, input_layernorm, attention_rmsnorm):
    config = tiny_config().text_config
    config.qk_layernorm, config.input_layernorm, config.attention_rmsnorm = (
        qk_layernorm, input_layernorm, attention_rmsnorm,
    )  # fmt: skip
    config.resid_pdrop, config.attention_dropout = 0.25, 0.5
    layer = PhiDecoderLayer(config, 0)
    assert layer.resid_dropout.p == 0.25
    found = [layer.self_attn.q_layernorm, layer.self_attn.k_layernorm, layer.input_layernorm, layer.attention_rmsnorm]
    there = [type(norm) is not torch.nn.Identity for norm in found]
    assert there == [qk_layernorm, qk_layernorm, input_layernorm, attention_rmsnorm]


@torch.no_grad()
def test_the_residual_stream_and_its_positions_are_float32_whatever_the_embeddings_are():
    language, seen = tiny_model().eval().language_model, []
    language.embed_tokens.to(torch.bfloat16)

    def note(layer, inputs, options):
        seen.append((inputs[0].dtype, *(table.dtype for table in options["position_embeddings"])))

    language.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    assert language(input_ids=IDS).last_hidden_state.dtype == torch.float32
    assert seen == [(torch.float32,) * 3]


def test_dropout_is_of_both_branches_and_of_attention_while_training(monkeypatch):
    model = tiny_model()
    model.language_model.config.attention_dropout = 0.25
    layer = model.language_model.layers[0]
    shares = []

    def attend(module, query, *args, dropout, **kwargs):
        shares.append(dropout)
        return query.transpose(1, 2), None

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *names: attend)
    layer.resid_dropout.p = 1.0
    stream = torch.randn(1, 3, 32)
    given = {"position_embeddings": model.language_model.rotary_emb(stream, torch.arange(3)[None])}
    assert torch.equal(layer.train()(stream, **given), stream), "all of both branches is dropped"
    assert not torch.allclose(layer.eval()(stream, **given), stream) and shares == [0.25, 0.0]
