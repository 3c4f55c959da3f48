"""A step's layers in one call: the numbers of the layers one by one, and where it is taken."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from tests.serving_model import make_model
from tinygptv.inference import flat_layer
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.flat_layer import FlatLayer
from tinygptv.inference.flat_step import host_step
from tinygptv.inference.runner import FlatRunner, Piece, Row
from tinygptv.inference.sampling import SamplingParams
from tinygptv.kernels import host_step as kernel
from tinygptv.kernels.host_attention import has_host_attention
from tinygptv.kernels.host_step import HostStep
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear

pytestmark = pytest.mark.skipif(not has_host_attention(16, 64), reason="needs x86 with AVX2 and a C compiler")

KINDS = {8: Int8Linear, 4: Int4Linear}


def quantized(bits, off=""):
    """The model with low-bit layers, norms that differ from 1 and 0, and without those whose names are in ``off``."""
    model = copy.deepcopy(make_model())
    torch.manual_seed(3)
    for layer in model.language_model.layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                nn.init.normal_(module.bias)
                layer.set_submodule(name, KINDS[bits].restore(KINDS[bits].pack(module, "cpu"), "cpu", torch.float32))
            elif name and name.split(".")[-1] in off.split():
                layer.set_submodule(name, nn.Identity())
            elif "norm" in name:
                for parameter in module.parameters():
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def logits_and_cache(decoder, rows, pieces):
    """What a step gives, over a cache with random content."""
    decoder.cache.copy_(torch.randn(decoder.cache.shape, generator=torch.Generator().manual_seed(7)))
    runner, found = FlatRunner(decoder), []
    for slot in range(3):
        runner.admit(slot, SamplingParams(), torch.zeros(1).numpy(), 1)
        runner._last_tokens[slot] = 5 + slot
    forward = decoder.forward
    decoder.forward = lambda *step: found.append(forward(*step)) or found[0]
    runner.launch(rows, pieces)
    decoder.forward = forward
    return found[0], decoder.cache.clone()


def piece(slot, start, end):
    embeds = torch.randn(end - start, 64, generator=torch.Generator().manual_seed(slot))
    return Piece(slot, start, end, embeds, is_last=True)


STEPS = [
    ([Row(0, 40)], []),
    ([Row(0, 70), Row(2, 3)], []),
    ([], [piece(1, 4, 9)]),
    ([Row(2, 7)], [piece(0, 0, 17), piece(1, 3, 4)]),
]


@pytest.mark.parametrize(
    ("bits", "dtype", "off"),
    [(8, None, ""), (4, None, ""), (8, torch.bfloat16, "input_layernorm"), (4, None, "attention_rmsnorm q_layernorm")],
)
def test_one_call_gives_the_numbers_of_the_layers_one_by_one(bits, dtype, off, monkeypatch):
    decoder = FlatDecoder(quantized(bits, off), 3, 80, dtype)
    step, layers = decoder.host_step, FlatLayer.__call__
    for rows, pieces in STEPS:
        decoder.host_step = None
        expected = logits_and_cache(decoder, rows, pieces)
        decoder.host_step = step
        before = [each.inputs_embeds.clone() for each in pieces]
        monkeypatch.setattr(FlatLayer, "__call__", lambda *_: pytest.fail("a layer was called by itself"))
        found = logits_and_cache(decoder, rows, pieces)
        monkeypatch.setattr(FlatLayer, "__call__", layers)
        assert found[0].isfinite().all()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert all(torch.equal(one, each.inputs_embeds) for one, each in zip(before, pieces, strict=True))


def test_a_step_without_memory_is_no_step(monkeypatch):
    step = FlatDecoder(quantized(8), 3, 80).host_step
    assert len(step.layers) == len(step.packed) == 2, "whose tensors live as long as the step"
    monkeypatch.setattr(kernel, "loaded_library", lambda: SimpleNamespace(run_layers=lambda *_: 1))
    with pytest.raises(MemoryError, match="no memory for a step of 5 tokens"):
        step(torch.zeros(5, 64), torch.arange(5), torch.arange(20), 0)


def test_a_long_prompt_is_read_layer_by_layer_and_what_decodes_after_it_is_not(monkeypatch):
    monkeypatch.setattr(flat_layer, "SHORT_PROMPT", 16)
    decoder, called = FlatDecoder(quantized(8), 3, 80), []
    monkeypatch.setattr(HostStep, "__call__", lambda self, hidden, *_: called.append(len(hidden)) or hidden)
    for rows, pieces in (([], [piece(0, 0, 17)]), ([Row(0, 17)], []), ([Row(0, 18)], [piece(1, 0, 16)])):
        logits_and_cache(decoder, rows, pieces)
    assert called == [1, 17]


def changed(name, module):
    model = quantized(8)
    model.language_model.layers[1].set_submodule(name, module)
    return FlatDecoder(model, 1, 16)


def low_bits(kind, inputs, outputs):
    return kind.restore(kind.pack(nn.Linear(inputs, outputs), "cpu"), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("self_attn.dense", nn.Linear(64, 64)),
        ("mlp.activation_fn", ACT2FN["gelu"]),
        ("mlp.fc1", low_bits(Int4Linear, 64, 96)),
        ("mlp.fc2", low_bits(Int4Linear, 96, 64)),
        ("input_layernorm", nn.RMSNorm(64)),
    ],
)
def test_layers_that_have_no_kernel_or_differ_are_called_one_by_one(name, module):
    assert changed(name, module).host_step is None


def test_products_that_share_an_input_round_it_alike():
    model = quantized(8)
    for layer in model.language_model.layers:
        layer.mlp.fc1 = low_bits(Int4Linear, 64, 96)
    assert host_step(FlatDecoder(model, 1, 16).layers) is None
