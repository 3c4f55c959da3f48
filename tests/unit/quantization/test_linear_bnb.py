"""bitsandbytes' layers from plain tensors: their dtypes, biases, and what a CPU's kernel takes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tinygptv.quantization import linear_bnb
from tinygptv.quantization.linear_bnb import OUTLIER_THRESHOLD, LLMInt8Linear, NF4Linear

KINDS = [NF4Linear, LLMInt8Linear]


def make_linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(128, 64, bias=bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_layer_multiplies_in_the_dtype_that_was_asked_for(kind, bias, dtype):
    linear = make_linear(bias)
    stored = kind.pack(linear, "cpu")
    given = {name: tensor.clone() for name, tensor in stored.items()}
    layer = kind.restore(given, "cpu", dtype)
    assert given.keys() == stored.keys() and all(torch.equal(given[n], stored[n]) for n in stored), "left as given"
    assert not layer.training and not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.bias is None if not bias else torch.equal(layer.bias.float(), linear.bias.detach())
    assert (layer.in_features, layer.out_features) == (128, 64)
    x = torch.randn(2, 3, 128)
    product = layer(x.double())
    assert product.shape == (2, 3, 64) and product.dtype == dtype
    error = (product.float() - linear(x)).norm() / linear(x).norm()
    assert error < (0.12 if kind is NF4Linear else 0.02)
    if bias:
        with torch.no_grad():
            linear.bias.zero_()
        assert stored["bias"].any(), "a copy"


def test_blocks_have_64_weights_and_scales_of_8_bits():
    stored = NF4Linear.pack(make_linear(), "cpu")
    assert stored["weight"].numel() == 128 * 64 // 2 and stored["weight"].dtype == torch.uint8
    assert stored["weight.absmax"].shape == (128 * 64 // 64,) and stored["weight.absmax"].dtype == torch.uint8
    assert "weight.nested_absmax" in stored and any("nf4" in name for name in stored)


def test_rows_of_8_bits_have_their_largest_magnitude_as_scale():
    linear = make_linear()
    stored = LLMInt8Linear.pack(linear, "cpu")
    assert {"SCB", "bias", "weight"} <= set(stored) and stored["weight"].dtype == torch.int8
    torch.testing.assert_close(stored["SCB"].float(), linear.weight.detach().abs().amax(1), rtol=2e-3, atol=0)
    layer = LLMInt8Linear.restore(stored, "cpu", torch.float32)
    assert layer.state.threshold == OUTLIER_THRESHOLD == 6.0 and not layer.state.has_fp16_weights


@pytest.mark.parametrize(
    ("outputs", "inputs", "whole"), [(64, 128, True), (32, 64, True), (48, 64, False), (64, 96, False)]
)
def test_the_fast_kernel_takes_whole_blocks(monkeypatch, outputs, inputs, whole):
    monkeypatch.setattr(bnb.nn.Linear4bit, "support_avx512bf16_for_cpu", True, raising=False)
    init = bnb.nn.Linear4bit.__init__

    def supported(self, *given, **options):
        init(self, *given, **options)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(bnb.nn.Linear4bit, "__init__", supported)
    assert NF4Linear(inputs, outputs, None, torch.float32).support_avx512bf16_for_cpu is whole


@pytest.mark.parametrize(
    ("dtype", "has_bfloat16", "product"),
    [
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float16, True, torch.float16),
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
def test_products_are_in_bfloat16_where_a_cpu_has_it(monkeypatch, dtype, has_bfloat16, product):
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: has_bfloat16)
    layer = NF4Linear(64, 32, None, dtype)
    assert linear_bnb._product_dtype(dtype) == layer.compute_dtype == product and layer.output_dtype == dtype
