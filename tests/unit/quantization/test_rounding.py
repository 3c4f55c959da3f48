"""How weights are rounded and packed for CPUs, number by number, and what a layer hands its product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinygptv.quantization import linear_cpu
from tinygptv.quantization.linear_cpu import (
    Int4Linear,
    Int8EncoderLinear,
    Int8Linear,
    round_groups,
    round_rows,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def back(numbers, scales):
    """The matrix that 4-bit numbers stand for."""
    group = numbers.shape[1] // len(scales)
    scale, offset = (part.T.float().repeat_interleave(group, 1) for part in scales.unbind(-1))
    return (numbers.float() - 8) * scale + offset


def test_8_bits_are_127_steps_to_either_side():
    rounded, scale = round_rows(torch.tensor([[1.27, -0.014, 0.016, -1.27], [0.0, 2.54, 0.03, -0.051]]))
    assert rounded.tolist() == [[127, -1, 2, -127], [0, 127, 2, -3]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.02]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_dtype_are_rounded_as_float32(dtype):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    for found, wanted in ((round_rows(weight), round_rows(weight.float())),
                          (round_groups(weight, 32), round_groups(weight.float(), 32))):  # fmt: skip
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        assert [t.dtype for t in found] == [t.dtype for t in wanted] and not found[1].requires_grad
    assert round_rows(weight)[1].dtype == torch.float32


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_small_and_large_weights_are_rounded_alike(size):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * size
    rounded, scale = round_rows(weight)
    assert ((rounded * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all() and rounded.abs().max() == 127
    numbers, scales = round_groups(weight, 64)
    assert (back(numbers, scales) - weight).norm() < 0.1 * weight.norm()


def test_a_group_far_from_zero_stays_within_16_numbers():
    """The offset is rounded too, and may be some steps away from the smallest weight."""
    weight = 100 + torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) / 10
    numbers, _ = round_groups(weight, 32)
    assert numbers.dtype == torch.uint8 and int(numbers.max()) == 15 and int(numbers.min()) >= 0


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_group_of_equal_weights_is_kept(value):
    weight = torch.full((2, 64), value)
    weight[1, 32:] = torch.linspace(0, 15, 32)
    numbers, scales = round_groups(weight, 32)
    found = back(numbers, scales)
    assert (found[0] == value).all() and (found[1, :32] == value).all() and scales.isfinite().all()
    assert set(numbers[0].tolist()) == {8 if value else 0}, "a step is small, and not 0"
    assert numbers[1, 32:].tolist() == [round(number * 15 / 31) for number in range(32)] and found[1, 32:].max() == 15


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4_bit_layers_are_packed_two_in_a_byte_and_multiply_what_was_packed(bias, dtype):
    torch.manual_seed(2)
    linear = nn.Linear(96, 16, bias=bias).to(dtype)
    packed = Int4Linear.pack(linear, "cpu")
    numbers, scales = round_groups(linear.weight, 32)
    assert torch.equal(packed["weight"] & 15, numbers[:, 0::2]) and torch.equal(packed["weight"] >> 4, numbers[:, 1::2])
    assert torch.equal(packed["scale"], scales) and set(packed) == {"weight", "scale"} | ({"bias"} if bias else set())
    given = {**packed, "scale": packed["scale"].float()}  # whatever dtype a file has
    layer = Int4Linear.restore(given, "cpu", torch.float32)
    x = torch.randn(3, 2, 96)
    shift = linear.bias.detach().float() if bias else 0
    torch.testing.assert_close(layer(x), x @ back(numbers, scales).T + shift, atol=0.02, rtol=0.02)
    assert layer(x.half()).shape == (3, 2, 16) and layer(x.half()).dtype == torch.float32
    assert (layer.weight.dtype, layer.group, layer.in_features, layer.out_features) == (torch.uint8, 32, 96, 16)
    assert repr(layer) == f"Int4Linear(in_features=96, out_features=16, bias={bias})"


@pytest.mark.parametrize("kind", [Int8Linear, Int8EncoderLinear])
def test_8_bit_layers_keep_their_numbers_scales_and_bias(kind):
    torch.manual_seed(2)
    linear = nn.Linear(64, 32).bfloat16()
    packed = kind.pack(linear, "cpu")
    rounded, scale = round_rows(linear.weight)
    assert torch.equal(packed["weight"], rounded) and torch.equal(packed["scale"], scale)
    assert packed["bias"].dtype == torch.float32 and torch.equal(packed["bias"], linear.bias.detach().float())
    layer = kind.restore(packed, "cpu", torch.float32)
    x = torch.randn(5, 64)
    wanted = x @ (rounded * scale[:, None]).T + packed["bias"]
    assert (layer(x) - wanted).norm() < 0.01 * wanted.norm() and layer.weight.dtype == torch.int8


def test_a_product_gets_scales_and_bias_in_float32_side_by_side(monkeypatch):
    asked = []
    monkeypatch.setattr(linear_cpu, "has_host_linear", lambda *size: True)
    for name in ("HostInt8", "HostInt4"):
        monkeypatch.setattr(linear_cpu, name, lambda *given: asked.append(given) or (lambda rows: rows.sum(1, True)))
    bias = torch.arange(4.0).bfloat16()[::2]
    weight = torch.zeros(2, 64, dtype=torch.int8)
    eight = Int8Linear(weight, torch.ones(2).half(), bias)
    four = Int4Linear(weight.to(torch.uint8), torch.zeros(2, 2, 2).bfloat16(), bias)
    for given, layer, dtype in zip(asked, (eight, four), (torch.float32, torch.bfloat16), strict=True):
        _, scale, handed = given
        assert handed is layer.bias and handed.tolist() == [0, 2] and scale.dtype == dtype
        assert handed.dtype == torch.float32 and handed.is_contiguous() and not handed.requires_grad
    monkeypatch.setattr(eight, "product", lambda rows: rows[:, :2] if rows.dtype == torch.float32 else None)
    x = torch.arange(2 * 3 * 64).view(2, 3, 64).half()
    assert eight(x).tolist() == x[..., :2].tolist() and eight(x[0, 0]).shape == (2,)
