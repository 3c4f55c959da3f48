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


def check(model, ops=reference, lengths=(20, 9), piece=13, tolerance=2e-4):
    """Logits of two prompts, the first in two pieces, then of one step for both, against plain forward passes."""
    layers = FusedLayers(FlatDecoder(model, 3, LENGTH), ops)
    long, short = lengths
    prompts = [torch.randint(1, 390, (length,)) for length in lengths]
    embed = model.get_input_embeddings()
    first = layers.prefill(
        torch.cat([embed(prompts[0][:piece]), embed(prompts[1])]),
        [Span(2, 0, piece), Span(0, 0, short)],
        [piece + short - 1],
    )
    second = layers.prefill(embed(prompts[0][piece:]), [Span(2, piece, long)], [long - piece - 1])
    expected = [model(input_ids=ids[None]).logits[0, -1] for ids in prompts]
    torch.testing.assert_close(first[0], expected[1], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(second[0], expected[0], atol=tolerance, rtol=tolerance)

    tokens, lengths = torch.tensor([5, 0, 6, 0]), torch.tensor([short, 0, long, 0])
    logits = layers.decode(torch.tensor([0, 2, 3]), tokens, lengths)
    for row, (ids, token) in enumerate(((prompts[1], 5), (prompts[0], 6))):
        expected = model(input_ids=torch.cat([ids, torch.tensor([token])])[None]).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=tolerance, rtol=tolerance)


def biased(model):
    """A model whose biases are not zero, as those of trained weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_logits_are_those_of_the_model(lora):
    torch.manual_seed(0)
    check(make_model(lora=lora))


def test_logits_with_triton_kernels(monkeypatch):
    torch.manual_seed(0)
    fused = pytest.importorskip("tinygptv.kernels.fused")
    monkeypatch.setattr(fused, "WANTED_PROGRAMS", 16)  # two parts of a context: the interpreter runs them one by one
    check(make_model(lora=False), fused, lengths=(5, 3), piece=3)


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
    check(biased(TinyGPTVForConditionalGeneration(config).eval().requires_grad_(False)))


def test_every_bias_is_added_once():
    torch.manual_seed(3)
    check(biased(TinyGPTVForConditionalGeneration(make_config(lora_rank=0)).eval().requires_grad_(False)))


def test_the_operations_that_are_given_are_used():
    decoder, given = FlatDecoder(make_model(lora=False), 1, 8), object()
    layers = FusedLayers(decoder, given)
    assert layers.ops is given and all(layer.ops is given for layer in layers.layers)
    assert FusedLayers(decoder).ops is reference


def test_a_piece_may_begin_at_the_second_position():
    torch.manual_seed(0)
    check(make_model(lora=False), lengths=(5, 3), piece=1)
