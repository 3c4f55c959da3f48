"""A step's work between its products on a CPU: the C functions against the torch layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from tests.serving_model import make_model
from tinygptv.inference import flat_layer
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.flat_layer import FlatLayer, HostFlatLayer, Segment, StepPlan
from tinygptv.kernels import host_attention
from tinygptv.kernels.host_attention import add_branches, gelu_rows, has_host_attention, norm_rows

pytestmark = pytest.mark.skipif(not has_host_attention(16, 64), reason="needs x86 with AVX2 and a C compiler")

LENGTH = 160
TORCH_ATTENTION = flat_layer.attend


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = make_model()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # weights of 1 and biases of 0 would hide which is used
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def layers_of(model, dtype=None):
    """The same layer with torch and with C, over caches with the same random content."""
    found = []
    for kind in (FlatLayer, HostFlatLayer):
        decoder = FlatDecoder(model, 3, LENGTH, dtype)
        decoder.cache.copy_(torch.randn(decoder.cache.shape, generator=torch.Generator().manual_seed(7)))
        made = decoder.layers[0]
        assert type(made) is HostFlatLayer
        found.append((decoder, kind(made.layer, made.cache, decoder.rotary)))
    return found


def plan_of(decoder):
    """Two sequences decode, at the positions 130 and 0, and a prompt of slot 1 is read from position 4 on."""
    positions = torch.tensor([130, 0, *range(4, 9)])
    slots = torch.tensor([2, 0] + [1] * 5)
    mask = decoder.prompt_mask(4, 9)
    segments = [
        Segment(slice(0, 1), slice(2, 3), 131),
        Segment(slice(1, 2), slice(0, 1), 1),
        Segment(slice(2, 7), slice(1, 2), 9, mask),
    ]
    return StepPlan(positions, decoder.cache_rows(slots, positions), segments, num_decoding=2)


@pytest.mark.parametrize("short_prompt", [0, 9], ids=["prompt by torch", "prompt by C"])
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_layer_is_the_torch_layer(model, dtype, bound, short_prompt, monkeypatch):
    monkeypatch.setattr(flat_layer, "SHORT_PROMPT", short_prompt)
    calls = []
    monkeypatch.setattr(flat_layer, "attend", lambda *a, **k: calls.append(a) or TORCH_ATTENTION(*a, **k))
    (first, plain), (second, host) = layers_of(model, dtype)
    plain.input_norm = host.input_norm  # so that values are equal to the bit; it is compared by itself below
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = plain(hidden, plan_of(first))
        calls.clear()
        found = host(hidden, plan_of(second))
    assert len(calls) == (short_prompt == 0)
    assert ((found - expected).norm(dim=1) <= bound * expected.norm(dim=1)).all()
    torch.testing.assert_close(second.cache, first.cache, rtol=1e-2 if dtype else 1e-5, atol=1e-5)
    assert torch.equal(second.cache[0, 1], first.cache[0, 1]), "values are stored as they are, rounded to the nearest"
    changed = (second.cache[0] != layers_of(model, dtype)[0][0].cache[0]).any(-1).any(0).any(1)  # [slots, positions]
    assert changed.nonzero().tolist() == [[0, 0], *([1, p] for p in range(4, 9)), [2, 130]]


@pytest.mark.parametrize("off", ["q_layernorm k_layernorm", "attention_rmsnorm", "input_layernorm"])
def test_norms_that_are_switched_off_are_left_out(model, off):
    model = copy.deepcopy(model)
    layer = model.language_model.layers[0]
    for name in off.split():
        setattr(layer if hasattr(layer, name) else layer.self_attn, name, nn.Identity())
    (first, plain), (second, host) = layers_of(model)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(host(hidden, plan_of(second)), plain(hidden, plan_of(first)), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_visible(model):
    _, (decoder, host) = layers_of(model)
    decoder.cache[0, 0, 2, 0, 100] = torch.nan  # a key of the first sequence
    with torch.inference_mode():
        out = host(torch.randn(7, 64), plan_of(decoder))
    assert out.isfinite().all(dim=1).tolist() == [False] + [True] * 6


def test_scores_of_any_size_have_weights_that_add_up(model):
    _, (decoder, host) = layers_of(model)
    decoder.cache[0, 0, 2] *= 1000  # one key takes all
    decoder.cache[0, 1, 2] = 5.0
    with torch.inference_mode():
        attended = host._attend(torch.full((7, 3, *host.shape[2:]), 5.0), plan_of(decoder))
    torch.testing.assert_close(attended[0], torch.full_like(attended[0], 5.0))


@pytest.mark.parametrize("rows", [1, 11])
def test_branches_add_to_the_stream(rows):
    attention, mlp, hidden = torch.randn(3, rows, 64).unbind(0)
    weight = torch.randn(64)
    normed = weight * (attention * torch.rsqrt(attention.pow(2).mean(-1, keepdim=True) + 1e-3))
    torch.testing.assert_close(add_branches(attention, weight, 1e-3, mlp, hidden), normed + mlp + hidden)
    torch.testing.assert_close(add_branches(attention, None, 0.0, mlp, hidden), attention + mlp + hidden)


@pytest.mark.parametrize("bias", [True, False])
def test_norm_is_torchs(bias):
    norm, x = nn.LayerNorm(64, eps=1e-3, bias=bias).requires_grad_(False), torch.randn(11, 64) + 3
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(norm_rows(x, norm), norm(x))


def test_gelu_is_torchs():
    x = torch.cat([torch.linspace(-12, 12, 1000), torch.tensor([0.0, -1e30, 1e30, 1e-30, -60.0, 60.0, 3.0, -3.0])])
    x = torch.stack([x, -x])
    torch.testing.assert_close(gelu_rows(x.clone()), nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert gelu_rows(torch.full((1, 16), torch.nan)).isnan().all()


@pytest.mark.parametrize(("name", "is_host"), [("gelu_pytorch_tanh", True), ("gelu_new", True), ("gelu", False)])
def test_the_tanh_gelu_by_either_name_is_the_kernels(model, name, is_host):
    model = copy.deepcopy(model)
    model.language_model.layers[0].mlp.activation_fn = ACT2FN[name]
    (first, plain), (second, host) = layers_of(model)
    assert (host.activation is gelu_rows) == is_host
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(host(hidden, plan_of(second)), plain(hidden, plan_of(first)), rtol=1e-4, atol=1e-5)


def test_an_activation_of_a_width_without_a_kernel_is_torchs(model):
    layer = copy.deepcopy(model.language_model.layers[0])
    layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(64, 104), nn.Linear(104, 64)
    decoder = FlatDecoder(model, 1, LENGTH)
    assert HostFlatLayer(layer, decoder.layers[0].cache, decoder.rotary).activation is not gelu_rows


def test_norms_of_the_stream_are_the_kernels(model):
    decoder = FlatDecoder(model, 1, 16)
    norms = [*(layer.input_norm for layer in decoder.layers), decoder.final_layernorm]
    assert {norm.func for norm in norms} == {norm_rows}


@pytest.mark.parametrize(
    ("head_dim", "width", "has"),
    [(16, 64, True), (256, 512, True), (272, 544, False), (24, 48, False), (32, 72, False), (8, 64, False)],
)
def test_heads_of_16_to_256_numbers_have_kernels(monkeypatch, head_dim, width, has):
    monkeypatch.setattr(host_attention, "host_library", lambda: "a library")
    assert has_host_attention(head_dim, width) is has
    monkeypatch.setattr(host_attention, "host_library", lambda: None)
    assert not has_host_attention(head_dim, width)


def test_without_the_kernels_layers_are_torchs(model, monkeypatch):
    monkeypatch.setattr(host_attention, "host_library", lambda: None)
    decoder = FlatDecoder(model, 1, 16)
    assert {type(layer) for layer in decoder.layers} == {FlatLayer}
    assert decoder.final_layernorm is model.language_model.final_layernorm
