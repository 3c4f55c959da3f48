"""Kernels of the image encoder on CPUs: the same values as torch's, whatever the sizes and the number of threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.models.eva import EvaBlock
from torch import nn
from torch.nn import functional

from tinygptv.kernels import host_encoder, host_library
from tinygptv.kernels.host_encoder import attend, has_encoder_attention, has_host_encoder, round_rows
from tinygptv.quantization.encoder_block import HostEncoderBlock
from tinygptv.quantization.linear_cpu import Int8EncoderLinear, Int8Linear

needs_kernels = pytest.mark.skipif(not has_host_encoder(16), reason="needs a C compiler, AVX-512 VNNI")
needs_bfloat16 = pytest.mark.skipif(not has_encoder_attention(16), reason="needs a C compiler, AVX-512 BF16")


def values(rounded):
    return (rounded.numbers.float() - 128) * rounded.scale[:, None]


def make_rows(rows, width):
    torch.manual_seed(rows + width)
    return torch.randn(rows, width) * 3


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (257, 1408)])
def test_rows_are_rounded_by_their_largest_magnitude(rows, width):
    x = make_rows(rows, width) * torch.logspace(-3, 3, rows)[:, None]
    rounded = round_rows(x)
    torch.testing.assert_close(rounded.scale, x.abs().amax(dim=1) / 127)
    expected = (x / x.abs().amax(dim=1, keepdim=True) * 127).round() + 128
    assert (rounded.numbers.float() - expected).abs().max() <= 1, "the other one where a number lies between two"
    assert (rounded.numbers != expected).float().mean() < 1e-4


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (257, 64)])
def test_norm_and_gelu_are_torchs(rows, width):
    x = make_rows(rows, width)
    norm = nn.LayerNorm(width, eps=1e-3).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for found, expected in ((round_rows(x, norm), norm(x)), (round_rows(x, gelu=True), functional.gelu(x))):
        torch.testing.assert_close(found.scale, expected.abs().amax(dim=1) / 127, rtol=1e-5, atol=1e-8)
        assert ((values(found) - expected).abs() <= found.scale[:, None] * 0.501).all()


@needs_kernels
def test_numbers_go_where_the_caller_wants_them():
    x, out = make_rows(5, 48), torch.zeros(5, 48, dtype=torch.uint8)
    found, own = round_rows(x, out=out), round_rows(x)
    assert found.numbers is out and torch.equal(out, own.numbers) and torch.equal(found.scale, own.scale)


def test_rows_without_memory_are_no_rows(monkeypatch):
    failing = SimpleNamespace(encoder_rows=lambda *_: 1, encoder_attention=lambda *_: 1)
    monkeypatch.setattr(host_encoder, "loaded_library", lambda: failing)
    with pytest.raises(MemoryError, match="no memory for rows of 48 numbers"):
        round_rows(make_rows(5, 48))
    with pytest.raises(MemoryError, match="no memory for the attention of 5 rows"):
        attend(make_rows(5, 48), 2)


@needs_kernels
def test_gelu_is_exact_where_it_is_almost_0():
    x = torch.linspace(-9, 9, 721).unsqueeze(1).repeat(1, 16)  # each row holds one number: none coarsens another
    found = values(round_rows(x, gelu=True))
    torch.testing.assert_close(found, functional.gelu(x.double()).float(), rtol=3e-6, atol=6e-7)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_stay_visible_in_their_row_alone(bad):
    linear = nn.Linear(64, 32).requires_grad_(False)
    layer = Int8EncoderLinear.restore(Int8Linear.pack(linear, "cpu"), "cpu", torch.float32)
    x = torch.randn(3, 64)
    expected = layer(x)
    x[1, 7] = bad
    for found in (layer(x), layer.product.multiply(round_rows(x))):
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()
    torch.testing.assert_close(layer(x)[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    for rounded in (round_rows(x, nn.LayerNorm(64)), round_rows(x, gelu=True)):
        assert values(rounded)[[0, 2]].isfinite().all()
        assert bad == -float("inf") or not values(rounded)[1].isfinite().all()


def torch_attention(qkv, heads):
    q, k, v = qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3)
    return functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(qkv), -1)


@needs_bfloat16
@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 2), (5, 3, 8), (257, 2, 88), (50, 1, 96), (48, 2, 16)])
def test_attention_is_torchs_but_for_the_rounding_of_bfloat16(rows, heads, width):
    qkv = make_rows(rows, 3 * heads * width) * 0.4
    expected = torch_attention(qkv, heads)
    found = attend(qkv, heads)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 6e-3 * expected.norm()


@needs_bfloat16
def test_attention_with_large_scores_takes_one_value():
    qkv = torch.zeros(60, 48)
    qkv[:, 0], qkv[:, 32:] = 100, torch.randn(60, 16).bfloat16().float()
    qkv[:, 16] = torch.arange(60) - 80.0  # scores down to -2,000, all of them below 0
    torch.testing.assert_close(attend(qkv, 1), qkv[59:, 32:].expand(60, 16))


@needs_bfloat16
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_spoils_its_head_alone(bad):
    qkv = make_rows(9, 3 * 32)
    expected = attend(qkv, 2)
    qkv[4, 32 + 3] = bad  # a key of the first head
    found = attend(qkv, 2)
    # A score of minus infinity is a weight of 0.
    assert torch.equal(found.isfinite(), torch_attention(qkv, 2).isfinite()) and not found[:, :16].isfinite().all()
    torch.testing.assert_close(found[:, 16:], expected[:, 16:], rtol=0, atol=0)


@needs_bfloat16
def test_what_follows_the_last_row_is_not_read():
    qkv = make_rows(2 * 9, 3 * 16)
    expected = attend(qkv[:9], 1)
    qkv[9] = float("nan")
    torch.testing.assert_close(attend(qkv[:9], 1), expected, rtol=0, atol=0)


@pytest.fixture
def block():
    torch.manual_seed(0)
    made = EvaBlock(64, num_heads=2, qkv_bias=True, mlp_ratio=2).eval().requires_grad_(False)
    for name, layer in list(made.named_modules()):
        if type(layer) is nn.Linear:
            made.set_submodule(name, Int8EncoderLinear.restore(Int8Linear.pack(layer, "cpu"), "cpu", torch.float32))
    for bias in (made.attn.q_bias, made.attn.v_bias):
        nn.init.normal_(bias)
    made.attn.qkv_bias_separate = True
    return made


@needs_kernels
@pytest.mark.parametrize("host_attention", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 257])
def test_a_block_gives_the_numbers_of_timms(block, rows, host_attention):
    x = torch.randn(2, rows, 64)
    expected = block(x)
    assert HostEncoderBlock.fits(block)
    ours = HostEncoderBlock(block)
    ours.has_host_attention &= host_attention
    given = x.clone()
    # Each product rounds its inputs: what differs in the last bit before may be rounded to the other number.
    assert (ours(x) - expected).norm() <= 5e-3 * expected.norm()
    assert torch.equal(x, given)
    assert dict(ours.named_modules()).keys() >= {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"}


@needs_kernels
def test_one_thread_gives_the_numbers_of_two(block):
    x, ours = torch.randn(2, 257, 64), HostEncoderBlock(block)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = ours(x)
        torch.set_num_threads(1)
        assert torch.equal(ours(x), expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_an_image_does_not_depend_on_the_others_of_its_batch(block):
    x, ours = torch.randn(3, 257, 64), HostEncoderBlock(block)
    torch.testing.assert_close(ours(x[1:2])[0], ours(x)[1], rtol=0, atol=0)


@needs_kernels
def test_a_block_with_other_steps_keeps_timms(block):
    block.gamma_1 = nn.Parameter(torch.ones(64))
    assert not HostEncoderBlock.fits(block)
    block.gamma_1, block.mlp.act = None, nn.GELU(approximate="tanh")
    assert not HostEncoderBlock.fits(block)
    assert not HostEncoderBlock.fits(EvaBlock(64, num_heads=2))
    block.mlp.act = nn.ReLU()
    assert not HostEncoderBlock.fits(block)
    block.mlp.act = nn.GELU()
    assert HostEncoderBlock.fits(block)
    changes = [(block, name) for name in ("gamma_2", "drop_path1", "drop_path2")]
    changes += [(block.attn, name) for name in ("gate", "q_norm", "k_norm", "norm")] + [(block.mlp, "norm")]
    for owner, name in changes:
        was = getattr(owner, name)
        setattr(owner, name, nn.Parameter(torch.ones(64)) if name == "gamma_2" else nn.Linear(64, 64))
        assert not HostEncoderBlock.fits(block), name
        setattr(owner, name, was)
    assert HostEncoderBlock.fits(block)
    for given in ({"rope": torch.zeros(5, 32)}, {"attn_mask": torch.ones(5, 5)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="neither rope nor masks"):
            HostEncoderBlock(block)(torch.zeros(1, 5, 64), **given)


@pytest.mark.parametrize("library", [None, SimpleNamespace()])
def test_without_the_kernels_all_is_torchs(block, monkeypatch, library):
    expected = block(torch.ones(1, 5, 64))
    monkeypatch.setattr(host_encoder, "host_library", lambda: library)
    assert not has_host_encoder(16) and not has_encoder_attention(16)
    assert not HostEncoderBlock.fits(block)
    torch.testing.assert_close(block(torch.ones(1, 5, 64)), expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_widths_without_a_kernel():
    assert not has_host_encoder(24)
    assert not has_encoder_attention(7) and not has_encoder_attention(98)


def test_bfloat16_instructions_are_used_where_the_processor_has_them(monkeypatch):
    for name in ("_is_avx512_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        assert ("-mavx512bf16" in host_library.processor_options()) == has_it
