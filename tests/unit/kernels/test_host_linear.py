"""Products of low-bit matrices on CPUs: the C kernels against plain arithmetic and against torch's kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinygptv.kernels import host_linear
from tinygptv.kernels.host_encoder import has_host_encoder
from tinygptv.kernels.host_encoder import round_rows as host_rows
from tinygptv.kernels.host_linear import HostInt4, HostInt8, has_host_linear
from tinygptv.quantization import torch_products
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear, round_groups, round_rows
from tinygptv.quantization.torch_products import AtenInt4, FbgemmInt8, has_fbgemm, has_vnni

pytestmark = pytest.mark.skipif(not has_host_linear(16, 16), reason="needs x86 with AVX2 and a C compiler")

ROWS = [0, 1, 2, 3, 5, 8, 9, 10, 11, 13, 14, 261]
"""One row, a tile that is full or not, and several: the last with each number of rows, and more rows than an item's."""
OUTPUTS = 80
"""Four blocks of 16, which are multiplied together, and one more."""


def make(outputs=OUTPUTS, inputs=128, bias=True):
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator) if bias else None


def inputs_of(rows, width):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    return x * torch.logspace(-3, 3, max(rows, 1))[:rows, None]


def rounded(x, group):
    """Inputs as the kernel sees them."""
    groups = x.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((groups / scale).round() * scale).flatten(1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_8_bits_are_the_product_of_rounded_rows(rows, bias):
    matrix, add = make(bias=bias)
    weight, scale = round_rows(matrix)
    x = inputs_of(rows, 128)
    expected = rounded(x, 128) @ (weight * scale[:, None]).T + (0 if add is None else add)
    product = HostInt8(weight, scale, add)(x)
    assert product.shape == (rows, OUTPUTS) and product.dtype == torch.float32
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().amax() if rows else 0))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (96, 32), (64, 16)])
def test_4_bits_are_the_product_of_rounded_groups(rows, inputs, group):
    matrix, add = make(inputs=inputs)
    numbers, scales = round_groups(matrix, group)
    x = inputs_of(rows, inputs)
    scale, offset = scales.float().transpose(0, 1).unbind(-1)
    weight = (numbers.float().unflatten(1, (-1, group)) - 8) * scale[..., None] + offset[..., None]
    expected = rounded(x, group) @ weight.flatten(1).T + add
    product = HostInt4(numbers, scales, add)(x)
    assert product.shape == (rows, OUTPUTS) and product.dtype == torch.float32
    error = (product - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 1e-5).all()
    torch.testing.assert_close(HostInt4(numbers, scales, None)(x) + add, product)


@pytest.mark.skipif(not (has_fbgemm() and has_vnni()), reason="needs FBGEMM and AVX-512 VNNI")
@pytest.mark.parametrize("rows", [1, 9])
def test_8_bits_give_the_numbers_of_torchs_kernel(rows):
    weight, scale = round_rows(make()[0])
    x = inputs_of(rows, 128)
    expected = FbgemmInt8(weight, scale, None)(x)
    error = (HostInt8(weight, scale, None)(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 1e-6).all()


def test_4_bits_are_within_the_rounding_of_inputs_of_torchs_kernel():
    numbers, scales = round_groups(make(outputs=64, inputs=256)[0], 64)
    x = inputs_of(7, 256)
    expected = AtenInt4(numbers, scales, None)(x)
    error = (HostInt4(numbers, scales, None)(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 0.01).all()


@pytest.mark.skipif(not has_fbgemm(), reason="needs FBGEMM")
@pytest.mark.parametrize(("vnni", "levels"), [(True, 127), (False, 63)])
def test_torchs_kernel_rounds_to_7_bits_without_vnni(monkeypatch, vnni, levels):
    monkeypatch.setattr(torch_products, "has_vnni", lambda: vnni)
    weight, scale, bias = torch.randint(-20, 21, (16, 32), dtype=torch.int8), torch.rand(16) + 0.1, torch.randn(16)
    x = torch.randn(3, 32)
    peak = x.abs().amax(1, keepdim=True)
    rounded = (x / peak * levels).round() / levels * peak
    expected = rounded @ (weight * scale[:, None]).T
    torch.testing.assert_close(FbgemmInt8(weight, scale, bias)(x), expected + bias, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(FbgemmInt8(weight, scale, None)(x), expected, atol=1e-3, rtol=1e-3)


def test_a_row_does_not_depend_on_its_neighbours():
    x = inputs_of(11, 128)
    weight, scale = round_rows(make()[0])
    numbers, scales = round_groups(make()[0], 64)
    for product in (HostInt8(weight, scale, None), HostInt4(numbers, scales, None)):
        together = product(x)
        for row in range(11):
            torch.testing.assert_close(product(x[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_visible(bad):
    weight, scale = round_rows(make()[0])
    numbers, scales = round_groups(make()[0], 64)
    x = inputs_of(3, 128)
    x[1, 77] = bad
    for product in (HostInt8(weight, scale, None), HostInt4(numbers, scales, None)):
        is_finite = product(x).isfinite().all(dim=1)
        assert is_finite.tolist() == [True, False, True]


def test_inputs_may_have_gaps_between_rows_and_threads_share_the_work(monkeypatch):
    weight, scale = round_rows(make(outputs=272)[0])
    numbers, scales = round_groups(make(outputs=272)[0], 64)
    wide = inputs_of(9, 256)
    for product in (HostInt8(weight, scale, None), HostInt4(numbers, scales, None)):
        products = []
        for threads in (1, 2, 3):  # 17 blocks of outputs: items of two with one thread, the last one is half
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            products.append(product(wide[:, 64:192]))
        assert all(torch.equal(products[0], other) for other in products[1:])
        assert torch.equal(products[0], product(wide[:, 64:192].contiguous())), "the gaps are not read"


def test_scales_may_have_gaps_between_them():
    weight, scale = round_rows(make()[0])
    wide = scale.repeat_interleave(2)
    wide[1::2] = 99
    x = inputs_of(3, 128)
    assert torch.equal(HostInt8(weight, wide[::2], None)(x), HostInt8(weight, scale, None)(x))


def test_a_product_without_memory_is_no_product(monkeypatch):
    weight, scale = round_rows(make()[0])
    product = HostInt8(weight, scale, None)
    monkeypatch.setattr(host_linear, "loaded_library", lambda: SimpleNamespace(multiply_rows=lambda *_: 1))
    with pytest.raises(MemoryError, match=r"no memory to round 3 rows of 128 inputs"):
        product(inputs_of(3, 128))


@pytest.mark.skipif(not has_host_encoder(16), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("rows", [2, 14])
def test_rows_that_are_rounded_already_give_the_same_product_to_which_a_residual_is_added(rows):
    (weight, scale), (_, bias) = round_rows(make()[0]), make()
    x, residual = inputs_of(rows, 128), torch.randn(rows, OUTPUTS)
    expected = HostInt8(weight, scale, bias)(x)
    product = HostInt8(weight, scale, bias)
    largest = float(expected.abs().amax())
    torch.testing.assert_close(product.multiply(host_rows(x)), expected, rtol=1e-3, atol=1e-5 * largest)
    found = product.multiply(host_rows(x), bias=bias + 1, residual=residual)
    torch.testing.assert_close(found, expected + 1 + residual, rtol=1e-3, atol=1e-5 * largest)


def test_layers_of_other_sizes_and_processors_keep_torchs_kernels(monkeypatch):
    for odd in (nn.Linear(40, 32), nn.Linear(64, 24)):
        assert not isinstance(Int8Linear.restore(Int8Linear.pack(odd, "cpu"), "cpu", torch.float32).product, HostInt8)
    even = nn.Linear(64, 32)
    layers = [(Int8Linear, HostInt8), (Int4Linear, HostInt4)]
    for kind, host in layers:
        assert isinstance(kind.restore(kind.pack(even, "cpu"), "cpu", torch.float32).product, host)
    monkeypatch.setattr(host_linear, "host_library", lambda: None)
    for kind, host in layers:
        assert not isinstance(kind.restore(kind.pack(even, "cpu"), "cpu", torch.float32).product, host)
