"""Torch's own low-bit products on CPUs: plain arithmetic with the numbers that are stored."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from tinygptv.quantization import linear_cpu, torch_products
from tinygptv.quantization.linear_cpu import Int4Linear, Int8EncoderLinear, Int8Linear, round_groups, round_rows
from tinygptv.quantization.torch_products import AtenInt4, AtenInt8, FbgemmInt8, OnednnInt8

MATRIX = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [None, torch.arange(32.0)])
def test_8_bits_without_rounded_inputs(bias):
    weight, scale = round_rows(MATRIX * torch.logspace(-2, 2, 32)[:, None])
    product = AtenInt8(weight, scale, bias)
    expected = X @ (weight * scale[:, None]).T + (0 if bias is None else bias)
    for _ in range(2):  # the bias stays as it is
        torch.testing.assert_close(product(X), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [None, torch.arange(32.0)])
@pytest.mark.parametrize("group", [32, 64])
def test_4_bits_with_inputs_in_bfloat16(group, bias):
    numbers, scales = round_groups(MATRIX, group)
    product = AtenInt4(numbers, scales, bias)
    scale, offset = (part.T.float().repeat_interleave(group, 1) for part in scales.unbind(-1))
    expected = X.bfloat16().float() @ ((numbers.float() - 8) * scale + offset).T + (0 if bias is None else bias)
    assert product.group == group and product(X).dtype == torch.float32
    torch.testing.assert_close(product(X), expected, atol=0.15, rtol=0.02)


@pytest.mark.parametrize(
    ("host", "fbgemm", "onednn", "kind", "encoder"),
    [
        (True, True, True, "host", "host"),
        (False, True, True, FbgemmInt8, OnednnInt8),
        (False, True, False, FbgemmInt8, FbgemmInt8),
        (False, False, True, AtenInt8, OnednnInt8),
        (False, False, False, AtenInt8, AtenInt8),
    ],
)
def test_the_best_product_that_the_machine_has(monkeypatch, host, fbgemm, onednn, kind, encoder):
    asked = []
    monkeypatch.setattr(linear_cpu, "has_host_linear", lambda *size: asked.append(size) or host)
    monkeypatch.setattr(linear_cpu, "has_fbgemm", lambda: fbgemm)
    monkeypatch.setattr(linear_cpu, "has_onednn", lambda: onednn)
    monkeypatch.setattr(linear_cpu, "HostInt8", "host")
    for cls, expected in ((Int8Linear, kind), (Int8EncoderLinear, encoder)):
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.out_features, layer.in_features = 48, 64
        assert layer._choose() == expected
    assert asked == [(48, 64)] * 2
    monkeypatch.setattr(linear_cpu, "HostInt4", lambda *given: "host")
    packed = Int4Linear.pack(torch.nn.Linear(128, 32), "cpu")
    assert (Int4Linear.restore(packed, "cpu", torch.float32).product == "host") == host and asked[-1] == (32, 128)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_what_a_processor_has(monkeypatch, vnni, onednn):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert torch_products.has_vnni() is vnni and torch_products.has_onednn() is (vnni and onednn)
    for engines, has in ((["none", "fbgemm"], True), (["qnnpack"], False)):
        monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=engines))
        assert torch_products.has_fbgemm() is has


def test_onednns_rows_are_rounded_by_their_largest_magnitude(monkeypatch):
    """A negative number may be the largest; a row of zeros gives the bias."""
    asked = []

    def product(numbers, in_scale, zero, packed, scale, *more):
        asked.append((numbers.tolist(), in_scale, zero, packed))
        return (numbers.float() - 128) * scale

    ops = SimpleNamespace(qlinear_prepack=lambda weight, shape: ("packed", shape), qlinear_pointwise=product)
    monkeypatch.setattr(torch.ops, "onednn", ops)
    weight, scale = torch.ones(3, 3, dtype=torch.int8), torch.tensor([1.0, 2.0, 4.0])
    rows = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.0, 1.0, 3.0], [0.0, 1e-30, -1e-30]])
    layer = OnednnInt8(weight, scale, None)
    found = layer(rows)
    (numbers, in_scale, zero, packed) = asked[0]
    assert numbers == [[192, 1, 160], [128, 128, 128], [255, 170, 255], [128, 255, 1]]
    assert (in_scale, zero, packed) == (1.0, 128, ("packed", [1025, 3]))
    torch.testing.assert_close(found, rows * scale, atol=0.04, rtol=0)
    bias = torch.tensor([10.0, 20.0, 30.0])
    with_bias = OnednnInt8(weight, scale, bias)
    for _ in range(2):
        torch.testing.assert_close(with_bias(rows), rows * scale + bias, atol=0.04, rtol=0)


@pytest.mark.skipif(not torch_products.has_fbgemm(), reason="torch was built without FBGEMM")
@pytest.mark.parametrize("bias", [None, torch.arange(32.0)])
@pytest.mark.parametrize(("vnni", "levels", "error"), [(True, 127, 0.02), (False, 63, 0.03)])
def test_fbgemms_rows_are_rounded_to_the_levels_that_a_processor_can_sum(monkeypatch, vnni, levels, error, bias):
    """Each row by its own largest magnitude; sums of 7-bit inputs cannot overflow, those of 8 bits need VNNI."""
    exact = torch_products.has_vnni() or not vnni
    monkeypatch.setattr(torch_products, "has_vnni", lambda: vnni)
    weight, scale = round_rows(MATRIX)
    product = FbgemmInt8(weight, scale, bias)
    assert product.levels == levels
    if not exact:  # this processor's sums may overflow
        return
    rows = X * torch.logspace(-3, 3, 5)[:, None]
    wanted = rows @ (weight * scale[:, None]).T
    shift = 0 if bias is None else bias
    for _ in range(2):  # the bias stays as it is
        found = product(rows)
        assert ((found - shift - wanted).norm(dim=1) <= error * wanted.norm(dim=1) + 1e-5).all()
        torch.testing.assert_close(product(torch.zeros(1, 128))[0], torch.zeros(32) + shift)
    if bias is None:
        torch.testing.assert_close(product(X * 1e-25) * 1e25, product(X))


def test_the_warning_of_quantized_tensors_is_silent_in_every_thread():
    """Layers are packed by several threads."""
    inside, left = threading.Event(), threading.Event()

    def pack_slowly() -> None:
        with torch_products._quantized_tensors():
            inside.set()
            left.wait(0.05)

    thread = threading.Thread(target=pack_slowly)
    thread.start()
    inside.wait()
    with torch_products._quantized_tensors():
        left.set()
        thread.join()  # its filters are gone
        with warnings.catch_warnings(record=True) as told:
            warnings.warn("quantized tensor creation functions", stacklevel=1)
    assert told == []
