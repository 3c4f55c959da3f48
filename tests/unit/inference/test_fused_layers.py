"""Layers with fused operations against the model itself, with Triton's kernels and with plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.serving_model import make_config, make_model
from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.fused_layers import FusedLayers, Span
from tinygptv.kernels import reference

LENGTH = 40


def check(model, ops=reference, tolerance=2e-4):
    """Logits of two prompts read in pieces, then of one step for both, against plain forward passes."""
    layers = FusedLayers(FlatDecoder(model, 3, LENGTH), ops)
    prompts = [torch.randint(1, 390, (20,)), torch.randint(1, 390, (9,))]
    embed = model.get_input_embeddings()
    first = layers.prefill(
        torch.cat([embed(prompts[0][:13]), embed(prompts[1])]), [Span(2, 0, 13), Span(0, 0, 9)], [21]
    )
    second = layers.prefill(embed(prompts[0][13:]), [Span(2, 13, 20)], [6])
    expected = [model(input_ids=ids[None]).logits[0, -1] for ids in prompts]
    torch.testing.assert_close(first[0], expected[1], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(second[0], expected[0], atol=tolerance, rtol=tolerance)

    tokens, lengths = torch.tensor([5, 0, 6, 0]), torch.tensor([9, 0, 20, 0])
    logits = layers.decode(torch.tensor([0, 2, 3]), tokens, lengths)
    for row, (ids, token) in enumerate(((prompts[1], 5), (prompts[0], 6))):
        expected = model(input_ids=torch.cat([ids, torch.tensor([token])])[None]).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lora", [False, True])
def test_logits_are_those_of_the_model(lora):
    torch.manual_seed(0)
    check(make_model(lora=lora))


def test_logits_with_triton_kernels():
    torch.manual_seed(0)
    check(make_model(lora=False), pytest.importorskip("tinygptv.kernels.fused"))


@pytest.mark.parametrize("norm", ["qk_layernorm", "attention_rmsnorm", "input_layernorm"])
def test_switched_off_norms(norm):
    torch.manual_seed(3)
    config = make_config(lora_rank=0)
    setattr(config.text_config, norm, False)
    check(TinyGPTVForConditionalGeneration(config).eval().requires_grad_(False))


def test_another_activation():
    torch.manual_seed(3)
    config = make_config(lora_rank=0)
    config.text_config.hidden_act = "silu"
    check(TinyGPTVForConditionalGeneration(config).eval().requires_grad_(False))
