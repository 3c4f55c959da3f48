"""The encoder's block in 8 bits: which blocks it takes, what it keeps, and images in any order of memory."""

from __future__ import annotations

import pytest
import torch
from timm.models.eva import EvaBlock
from torch import nn

from tinygptv.kernels.host_encoder import attend, has_host_encoder
from tinygptv.quantization import encoder_block
from tinygptv.quantization.encoder_block import HostEncoderBlock, _Scratch
from tinygptv.quantization.linear_cpu import Int8EncoderLinear, Int8Linear

needs_kernels = pytest.mark.skipif(not has_host_encoder(16), reason="needs a C compiler, AVX-512 VNNI")


def make_block(qkv_bias: bool = True, in_8_bits: bool = True) -> EvaBlock:
    torch.manual_seed(0)
    made = EvaBlock(64, num_heads=2, qkv_bias=qkv_bias, mlp_ratio=2).eval().requires_grad_(False)
    for name, layer in list(made.named_modules()):
        if type(layer) is nn.Linear and in_8_bits:
            made.set_submodule(name, Int8EncoderLinear.restore(Int8Linear.pack(layer, "cpu"), "cpu", torch.float32))
    for number, name in enumerate(("q_bias", "k_bias", "v_bias")):
        if qkv_bias:
            setattr(made.attn, name, nn.Parameter(torch.full((64,), float(number)), requires_grad=False))
    return made


@needs_kernels
def test_a_block_without_biases_of_q_and_v_is_left_to_timm():
    assert HostEncoderBlock.fits(make_block()) and not HostEncoderBlock.fits(make_block(qkv_bias=False))


@needs_kernels
@pytest.mark.parametrize(
    ("part", "other"),
    [
        *((part, nn.LayerNorm(64)) for part in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")),
        *((part, nn.Dropout()) for part in ("drop_path1", "drop_path2")),
        *((part, nn.Parameter(torch.ones(64))) for part in ("gamma_1", "gamma_2")),
        ("attn.gate", nn.Linear(64, 64)),
        ("mlp.act", nn.ReLU()),
        ("mlp.act", nn.GELU("tanh")),
        ("mlp.fc2", nn.Linear(128, 64)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_block_with_a_step_that_would_be_left_out_is_left_to_timm(part, other):
    block = make_block()
    owner, _, name = part.rpartition(".")
    setattr(block.get_submodule(owner), name, other)
    assert not HostEncoderBlock.fits(block)


@needs_kernels
@pytest.mark.parametrize("host_attention", [True, False])
def test_a_block_computes_what_timms_does(host_attention, monkeypatch):
    asked = []
    monkeypatch.setattr(encoder_block, "attend", lambda *given: asked.append(given) or attend(*given))
    ours, x = HostEncoderBlock(make_block()), torch.randn(2, 5, 64)
    if host_attention and not ours.has_host_attention:
        pytest.skip("needs AVX-512 BF16")
    ours.has_host_attention = host_attention
    wanted, found = make_block(in_8_bits=False)(x), ours(x)
    assert (found - wanted).norm() < 0.03 * (wanted - x).norm() and len(asked) == 2 * host_attention


@needs_kernels
def test_biases_stand_side_by_side_and_in_no_file():
    ours = HostEncoderBlock(make_block())
    assert ours.qkv_bias.tolist() == [0.0] * 64 + [1.0] * 64 + [2.0] * 64 and not ours.qkv_bias.requires_grad
    assert "qkv_bias" not in ours.state_dict() and "qkv_bias" in dict(ours.named_buffers())


@needs_kernels
def test_images_may_lie_in_memory_in_any_order():
    ours, x = HostEncoderBlock(make_block()), torch.randn(3, 5, 64)
    wanted = ours(x)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        found = ours(other)
        assert not other.is_contiguous() and found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("more", [{"attn_mask": torch.ones(5, 5)}, {"is_causal": True}, {"rope": torch.zeros(5, 32)}])
def test_what_this_attention_has_not_is_refused(more):
    with pytest.raises(ValueError, match=r"^this encoder's attention takes neither rope nor masks\.$"):
        HostEncoderBlock(make_block())(torch.zeros(1, 5, 64), **more)


def test_scratch_memory_is_kept_until_more_is_wanted():
    scratch = _Scratch()
    first = scratch.take(torch.float32, 2, 3)
    first.copy_(torch.arange(6.0).view(2, 3))
    again = scratch.take(torch.float32, 3, 2)
    assert again.tolist() == [[0, 1], [2, 3], [4, 5]] and again.data_ptr() == first.data_ptr(), "the same memory"
    assert scratch.take(torch.float32, 2).tolist() == [0, 1]
    other = scratch.take(torch.uint8, 4)
    assert other.dtype == torch.uint8 and other.data_ptr() != first.data_ptr()
    larger = scratch.take(torch.float32, 7)
    assert larger.shape == (7,) and larger.data_ptr() != first.data_ptr()
    assert scratch.take(torch.float32, 2).data_ptr() == larger.data_ptr()
