"""Training as if in fp16: what overflows, what underflows, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.fp16_emulation import (
    HALF_RANGE_ATTENTION,
    emulate_half_range,
    half_range_attention,
    round_to_half,
)


def test_rounding_of_values_and_gradients():
    x = torch.tensor([1.0, 1 / 3, 7e4, 1e-9, -7e4], requires_grad=True)
    y = round_to_half(x)
    assert y.tolist() == [1.0, float(torch.tensor(1 / 3).half()), float("inf"), 0.0, float("-inf")]
    y.backward(torch.tensor([1e-9, 1 / 3, 1.0, 1e5, 1.0]))
    assert x.grad.tolist() == [0.0, float(torch.tensor(1 / 3).half()), 1.0, float("inf"), 1.0]


def test_attention_equals_the_usual_one_where_nothing_overflows():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4).half().float().requires_grad_() for _ in range(3))
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    ours, weights = half_range_attention(torch.nn.Module().eval(), query, key, value, mask, scaling=0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5), atol=1e-3, rtol=1e-3)
    ours.backward(torch.randn_like(ours))
    for each in (ours, weights, query.grad, key.grad, value.grad):
        assert torch.equal(each, each.half().float()), "numbers of fp16"


@pytest.mark.parametrize(("training", "kept"), [(True, 0.0), (False, 1.0)])
def test_weights_are_dropped_while_training(training, kept):
    module, ones = torch.nn.Module().train(training), torch.ones(1, 1, 4, 2)
    output, weights = half_range_attention(module, ones, ones, ones, None, scaling=0.5, dropout=1.0)
    assert weights.sum(-1).tolist() == [[[kept] * 4]] and output.tolist() == [[[[kept] * 2]] * 4]


def test_scores_that_fp16_cannot_hold_end_in_nan():
    big = torch.full((1, 1, 2, 4), 200.0)
    for scaling in (0.5, 0.001):  # which comes after the product
        output, _ = half_range_attention(torch.nn.Module().eval(), big, big, big, None, scaling=scaling)
        assert torch.isnan(output).all(), "4 * 200 * 200 is more than fp16 holds, and inf - inf is not a number"


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 250, (2, 12)), "labels": torch.randint(1, 250, (2, 12))}


def test_a_model_of_usual_size_trains_almost_as_in_float32(batch):
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config()).train()
    exact = model(**batch).loss
    exact.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    emulate_half_range(model)
    rounded = model(**batch).loss
    (1024 * rounded).backward()  # as the GradScaler does
    assert rounded.item() != exact.item() and rounded.item() == pytest.approx(exact.item(), rel=1e-3)
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad / 1024
        assert (found - gradient).norm() <= 0.05 * gradient.norm() + 1e-7, name


def test_a_layer_that_overflows_gives_a_loss_that_is_not_finite(batch):
    model = TinyGPTVForConditionalGeneration(tiny_config()).train()
    with torch.no_grad():
        model.language_model.layers[1].mlp.fc2.bias.fill_(7e4)  # float32 does not mind
    assert torch.isfinite(model(**batch).loss)
    emulate_half_range(model)
    assert not torch.isfinite(model(**batch).loss)


def test_every_linear_layer_of_what_trains_is_rounded_and_none_of_the_frozen_encoders():
    model = TinyGPTVForConditionalGeneration(tiny_config())
    emulate_half_range(model)
    parts = {"projector", "language_model", "lm_head"}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.split(".")[0] for name in linear} == {*parts, "vision_encoder", "qformer"}
    for name, module in linear.items():
        expected = name.split(".")[0] in parts
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        assert hooks == ((1, 1) if expected else (0, 0)), name
    assert model.language_model.config._attn_implementation == HALF_RANGE_ATTENTION
    head = model.lm_head
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
        width = head.in_features
        assert head(torch.full((1, width), 1e-9)).abs().max() == 0.0, "its input underflows"
        assert head(torch.full((1, width), 7e4 / width)).isinf().all(), "its output overflows"
