"""Packed low-bit layers for GPUs, with the CPU's operations: the weights that each format's files stand for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tinygptv.kernels import reference
from tinygptv.quantization import linear_packed, linear_tinygemm
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear
from tinygptv.quantization.linear_packed import PackedLinear, from_int4, from_int8, from_llm_int8, from_nf4
from tinygptv.quantization.linear_tinygemm import TinygemmLinear, find_layout

OUTPUTS, INPUTS = 6, 192
TABLE = torch.linspace(-1, 1, 16) ** 3


def check(layer, matrix, bias, dtype=torch.float32):
    """The layer multiplies by this matrix, whatever the shape and number of its inputs."""
    assert isinstance(layer, PackedLinear) and (layer.out_features, layer.in_features) == tuple(matrix.shape)
    torch.testing.assert_close(reference.unpack(layer.packed, torch.float32), matrix)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    for shape in ((3, INPUTS), (INPUTS,), (2, 2, INPUTS), (linear_packed.MOST_TOKENS + 1, INPUTS)):
        x = torch.randn(shape)
        expected = nn.functional.linear(x.to(dtype).float(), matrix, bias)
        product = layer(x.to(torch.float64))
        assert product.dtype == dtype
        torch.testing.assert_close(product.float(), expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=1e-2)


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_8_bits_with_a_scale_each(bias, dtype):
    codes, scale = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8), torch.rand(OUTPUTS) / 100 + 0.001
    tensors = {"weight": codes, "scale": scale} | ({} if bias is None else {"bias": bias.bfloat16()})
    layer = from_int8(tensors, "cpu", dtype)
    check(layer, codes.float() * scale[:, None], bias, dtype)
    assert f"in_features=192, out_features=6, bias={bias is not None}, bits=8" in repr(layer)
    assert (layer.group, layer.packed.inputs, layer.packed.table, layer.packed.offset) == (192, 192, None, None)
    assert bias is None or layer.bias.dtype == torch.float32


def test_bitsandbytes_rows_of_8_bits_have_a_127th_of_their_scale():
    codes, largest = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8), torch.rand(OUTPUTS) + 0.1
    bias = torch.randn(OUTPUTS)
    layer = from_llm_int8({"weight": codes, "SCB": largest, "bias": bias}, "cpu", torch.float32)
    check(layer, codes.float() * largest[:, None] / 127, bias)


def test_groups_of_4_bits_have_a_scale_and_an_offset():
    linear = nn.Linear(INPUTS, 16)
    tensors = Int4Linear.pack(linear, "cpu")
    numbers, scales = tensors["weight"], tensors["scale"].float()
    codes = torch.stack([numbers & 15, numbers >> 4], -1).flatten(1).float()
    scale, offset = (part.T.repeat_interleave(INPUTS // len(scales), 1) for part in scales.unbind(-1))
    layer = from_int4(tensors, "cpu", torch.float32)
    check(layer, (codes - 8) * scale + offset, linear.bias.detach())
    assert "bits=4" in repr(layer)
    torch.testing.assert_close(reference.unpack(layer.packed, torch.float32), linear.weight.detach(), atol=0.01, rtol=0)
    eight = from_int8(Int8Linear.pack(linear, "cpu"), "cpu", torch.float32)
    torch.testing.assert_close(reference.unpack(eight.packed, torch.float32), linear.weight.detach(), atol=1e-3, rtol=0)


def nf4_file(outputs, inputs, *, nested=True, block=64):
    """Tensors as bitsandbytes stores them, and the matrix that they stand for."""
    codes = torch.randint(0, 16, (outputs * inputs,), dtype=torch.uint8)
    num_blocks = -(-outputs * inputs // block)
    state = {"shape": [outputs, inputs], "blocksize": block}
    tensors = {"weight": (codes[::2] << 4 | codes[1::2]).view(-1, 1), "weight.quant_map": TABLE}
    if nested:
        state |= {"nested_blocksize": 4, "nested_offset": 0.5}
        chosen = torch.randint(0, 256, (num_blocks,), dtype=torch.uint8)
        outer, levels = torch.rand(-(-num_blocks // 4)) + 0.5, torch.linspace(-1, 1, 256)
        absmax = levels[chosen.long()] * outer.repeat_interleave(4)[:num_blocks] + 0.5
        tensors |= {"weight.absmax": chosen, "weight.nested_absmax": outer, "weight.nested_quant_map": levels}
    else:
        absmax = torch.rand(num_blocks).half().float()
        tensors["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    scale = absmax.half().float().repeat_interleave(block)[: outputs * inputs]
    return tensors, (TABLE[codes.long()] * scale).view(outputs, inputs)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("inputs", [192, 96], ids=["whole blocks", "blocks that go on in the next row"])
def test_nf4_is_read_without_bitsandbytes(nested, inputs):
    tensors, matrix = nf4_file(OUTPUTS, inputs, nested=nested)
    bias = torch.randn(OUTPUTS)
    layer = from_nf4(tensors | {"bias": bias}, "cpu", torch.float32)
    assert layer.group == (64 if inputs == 192 else 32) and layer.packed.offset is None
    torch.testing.assert_close(reference.unpack(layer.packed, torch.float32), matrix)
    x = torch.randn(5, inputs)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, matrix, bias), atol=1e-4, rtol=1e-4)
    assert from_nf4(tensors, "cpu", torch.float32).bias is None


def test_a_last_block_that_is_not_full_belongs_to_the_last_row():
    tensors, matrix = nf4_file(5, 96)
    layer = from_nf4(tensors, "cpu", torch.float32)
    torch.testing.assert_close(reference.unpack(layer.packed, torch.float32), matrix)


def test_the_bias_is_added_in_float32_and_the_sum_rounded_once():
    codes, scale = torch.ones(1, 256, dtype=torch.int8), torch.ones(1)
    layer = from_int8({"weight": codes, "scale": scale, "bias": torch.tensor([1.001])}, "cpu", torch.bfloat16)
    assert layer(torch.ones(1, 256)).item() == 258, "of 257.001; the bias in 16 bits would give 256"
    weight = layer.packed
    assert PackedLinear(weight, torch.ones(1).half(), torch.bfloat16).bias.dtype == torch.float32


def test_partial_products_are_summed(monkeypatch):
    layer = from_int8({"weight": torch.ones(2, INPUTS, dtype=torch.int8), "scale": torch.ones(2)}, "cpu", torch.float32)
    halves = lambda x, weight: torch.stack([x[:, :2], x[:, 2:4]])  # noqa: E731
    ops = {"cpu": type("Ops", (), {"partial_products": halves})}
    monkeypatch.setattr(linear_packed, "lowbit_ops", lambda device: ops[device.type])
    x = torch.arange(float(INPUTS)).view(1, -1)
    assert layer(x).tolist() == [[0.0 + 2.0, 1.0 + 3.0]]
    ops["meta"] = type("Ops", (), {"partial_products": lambda x, weight: "the other device's"})
    assert layer.partial_products(x.to("meta")) == "the other device's"


@pytest.mark.parametrize(("tokens", "packed"), [(1, True), (64, True), (65, False)])
def test_many_tokens_are_multiplied_by_the_unpacked_matrix(monkeypatch, tokens, packed):
    layer = from_int8({"weight": torch.ones(2, INPUTS, dtype=torch.int8), "scale": torch.ones(2)}, "cpu", torch.float32)
    asked = []
    for name in ("partial_products", "unpack"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, o=original, n=name: (asked.append(n), o(*a))[1])
    product = layer.partial_products(torch.ones(tokens, INPUTS))
    assert product.shape == (1, tokens, 2) and asked[0] == ("partial_products" if packed else "unpack")


# ---------------------------------------------------------------------- torch's kernel for 4 bits


def test_torchs_kernel_is_cudas():
    assert find_layout(torch.device("cpu")) is None
    codes, scales = torch.zeros(8, 128, dtype=torch.uint8), torch.zeros(4, 8, 2)
    assert not TinygemmLinear.usable(codes, scales, torch.bfloat16)


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "dtype", "usable"),
    [
        (8, 128, 4, torch.bfloat16, True),
        (16, 256, 1, torch.bfloat16, True),
        (12, 128, 4, torch.bfloat16, False),
        (8, 192, 6, torch.bfloat16, False),
        (8, 128, 8, torch.bfloat16, False),
        (8, 128, 4, torch.float16, False),
    ],
)
def test_sizes_of_torchs_kernel(monkeypatch, outputs, inputs, groups, dtype, usable):
    monkeypatch.setattr(linear_tinygemm, "find_layout", lambda device: "layout")
    codes, scales = torch.zeros(outputs, inputs, dtype=torch.uint8), torch.zeros(groups, outputs, 2)
    assert TinygemmLinear.usable(codes, scales, dtype) is usable


class Kernel:
    """Torch's kernel, whose order of weights is that of the pairs' bytes."""

    def __init__(self, even_is_high):
        self.even_is_high, self.asked = even_is_high, []

    def replace(self, monkeypatch):
        for name in ("_convert_weight_to_int4pack", "_weight_int4pack_mm"):
            monkeypatch.setattr(torch.ops.aten, name, getattr(self, name))

    def _convert_weight_to_int4pack(self, pairs, inner_tiles):
        assert inner_tiles == 8
        outputs, half = pairs.shape
        tiles = pairs.view(outputs // 8, 8, half // 64, 64).transpose(1, 2)  # [tiles, tiles, 8, 64]
        return tiles.contiguous().view(torch.int32).view(outputs // 8, half // 64, 8, 16)

    def codes(self, packed):
        pairs = packed.contiguous().view(torch.uint8).view(*packed.shape[:2], 8, 64)
        parts = (pairs >> 4, pairs & 15) if self.even_is_high else (pairs & 15, pairs >> 4)
        return torch.stack(parts, -1).flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)

    def _weight_int4pack_mm(self, x, packed, group, scales):
        self.asked.append(len(x))
        scale, offset = (part.T.float().repeat_interleave(group, 1) for part in scales.unbind(-1))
        return (x.float() @ ((self.codes(packed).float() - 8) * scale + offset).T).to(x.dtype)


@pytest.mark.parametrize("even_is_high", [True, False])
def test_the_order_of_torchs_kernel_is_found_and_undone(monkeypatch, even_is_high):
    kernel = Kernel(even_is_high)
    kernel.replace(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    arange, randint, eye, tensor = torch.arange, torch.randint, torch.eye, torch.tensor
    for name, make in (("arange", arange), ("randint", randint), ("eye", eye), ("tensor", tensor)):
        there = lambda *a, make=make, **k: make(*a, **{**k, **({"device": "cpu"} if "device" in k else {})})  # noqa: E731
        monkeypatch.setattr(torch, name, there)
    layout = find_layout.__wrapped__(torch.device("cuda"))
    monkeypatch.undo()
    assert layout is not None and layout.even_is_high is even_is_high
    kernel.replace(monkeypatch)
    codes = torch.randint(0, 16, (16, 256), dtype=torch.uint8)
    scales = (torch.rand(256 // 32, 16, 2) + 0.1).bfloat16()
    bias = torch.randn(16).bfloat16()
    layer = TinygemmLinear(codes, scales.transpose(0, 1).contiguous().transpose(0, 1), bias, layout)
    assert layer.scales.is_contiguous() and torch.equal(layer.scales, scales), "as the kernel wants them"
    scale, offset = (part.T.repeat_interleave(32, 1).float() for part in scales.unbind(-1))
    matrix = (codes.float() - 8) * scale + offset
    torch.testing.assert_close(layer.unpack().float(), matrix, atol=0.05, rtol=0.02)
    kernel.asked.clear()
    for shape in ((3, 256), (2, 2, 256), (129, 256), (128, 256)):
        x = torch.randn(shape)
        product = layer(x)
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(
            product.float(), nn.functional.linear(x.bfloat16().float(), matrix, bias.float()), atol=1.0, rtol=0.05
        )
    assert kernel.asked == [3, 4, 128], "more are multiplied by the unpacked matrix"
    assert layer.bias.dtype == torch.float32 and layer.group == 32
    assert repr(layer) == "TinygemmLinear(in_features=256, out_features=16, bias=True)"
    assert TinygemmLinear(codes, scales, None, layout).bias is None


def test_the_bias_of_torchs_kernel_is_added_in_float32_and_the_sum_rounded_once():
    layer = TinygemmLinear.__new__(TinygemmLinear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 2, 1
    layer.bias = nn.Parameter(torch.tensor([1.001]))
    layer.partial_products = lambda rows: torch.full((1, len(rows), 1), 256.0, dtype=torch.bfloat16)
    found = layer(torch.ones(3, 2))
    assert found.dtype == torch.bfloat16 and found.tolist() == [[258]] * 3, "of 257.001; in 16 bits it would be 256"


def test_a_device_without_torchs_kernel_has_no_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert find_layout.__wrapped__(torch.device("cuda")) is None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_torch_without_the_kernel_or_with_another_has_no_order(monkeypatch, error):
    def fail(*arguments, **options):
        raise error("_convert_weight_to_int4pack")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "arange", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(torch, "randint", fail)
    assert find_layout.__wrapped__(torch.device("cuda")) is None


def test_4_bits_take_torchs_kernel_where_it_can(monkeypatch):
    tensors = Int4Linear.pack(nn.Linear(128, 16), "cpu")
    tensors["scale"] = tensors["scale"].float()  # whatever dtype a file has
    made = []

    class Layer:
        usable = staticmethod(lambda codes, scales, dtype: dtype == torch.bfloat16)

        def __init__(self, codes, scales, bias, layout):
            made.append((codes.shape, scales.dtype, bias.dtype, layout))

    monkeypatch.setattr(linear_packed, "find_layout", lambda device: "layout")
    monkeypatch.setattr(linear_packed, "TinygemmLinear", Layer)
    assert isinstance(from_int4(tensors, "cpu", torch.bfloat16), Layer)
    assert made == [((16, 128), torch.bfloat16, torch.float32, "layout")]
    assert isinstance(from_int4(tensors, "cpu", torch.float32), PackedLinear)
