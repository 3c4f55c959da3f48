"""The decoder over flat tokens against the model itself, with its C functions and with torch's operations."""

from __future__ import annotations

import copy
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.serving_model import make_model
from tinygptv.inference import decoder as module
from tinygptv.inference.decoder import FlatDecoder, slots_that_fit
from tinygptv.inference.flat_layer import FlatLayer, HostFlatLayer
from tinygptv.inference.runner import FlatRunner, Piece, Row, _finite_and_largest
from tinygptv.inference.sampling import SamplingParams
from tinygptv.quantization.linear_packed import PackedLinear
from tinygptv.quantization.linear_tinygemm import TinygemmLinear


@pytest.fixture(scope="module")
def model():
    """Norms and biases as trained ones: 1 and 0 would hide which is used."""
    torch.manual_seed(3)
    model = copy.deepcopy(make_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("host", [True, False])
def test_rows_and_pieces_in_any_slots_are_read_as_the_model_reads_each_alone(model, monkeypatch, host):
    asked = []
    if not host:
        monkeypatch.setattr(module, "has_host_attention", lambda *sizes: bool(asked.append(sizes)))
    decoder = FlatDecoder(model, 4, 40)
    assert host or set(asked) == {(decoder.head_dim, model.config.text_config.hidden_size)}
    kinds = {type(layer) for layer in decoder.layers}
    assert host or kinds == {FlatLayer}
    if host and kinds != {HostFlatLayer}:
        pytest.skip("no C functions on this machine")
    decoder.cache.normal_()  # what earlier answers left
    runner = FlatRunner(decoder)
    prompts = {slot: torch.randint(1, 390, (length,)) for slot, length in ((3, 17), (0, 5), (1, 9))}
    found, forward = [], decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *step: found.append(forward(*step)) or found[-1])
    for slot, ids in prompts.items():
        runner.admit(slot, SamplingParams(), ids.numpy(), len(ids))

    def piece(slot, start, end):
        return Piece(slot, start, end, decoder.embed(prompts[slot][start:end]), is_last=end == len(prompts[slot]))

    assert runner.launch([], [piece(3, 0, 4)]).read() == []
    runner.launch([], [piece(3, 4, 6), piece(0, 0, 5)])
    runner.launch([Row(0, 5)], [piece(3, 6, 17), piece(1, 0, 8)])
    runner.launch([Row(0, 6), Row(3, 17)], [piece(1, 8, 9)])
    runner.launch([Row(0, 7), Row(1, 9), Row(3, 18)], [])
    said = {0: [], 1: [], 3: []}
    for step, order in zip(found, [(), (0,), (0, 3), (0, 3, 1), (0, 1, 3)], strict=True):
        assert len(step) == len(order)
        for slot, logits in zip(order, step, strict=True):
            ids = torch.cat([prompts[slot], torch.tensor(said[slot], dtype=torch.int64)])
            with torch.no_grad():
                expected = model(input_ids=ids[None]).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
            said[slot].append(int(logits.argmax()))


def linear_of(kind, dtype, weight_dtype):
    """A matrix as the decoder sees it, without the tensors that it needs to multiply."""
    linear = kind.__new__(kind)
    torch.nn.Module.__init__(linear)
    linear.register_buffer("weight", torch.zeros(1, dtype=weight_dtype))
    if kind is not torch.nn.Linear:
        linear.dtype = dtype
    return linear


@pytest.mark.parametrize(
    ("linear", "dtype"),
    [
        (linear_of(PackedLinear, torch.float16, torch.uint8), torch.float16),
        (linear_of(TinygemmLinear, torch.bfloat16, torch.int32), torch.bfloat16),
        (linear_of(torch.nn.Linear, None, torch.float64), torch.float64),
        (linear_of(torch.nn.Linear, None, torch.int8), torch.float32),
    ],
)
def test_keys_and_values_come_in_the_dtype_of_the_matrix_products(linear, dtype):
    layer = SimpleNamespace(self_attn=SimpleNamespace(qkv_proj=linear))
    asked = SimpleNamespace(dtype=torch.float32, language_model=SimpleNamespace(layers=[layer]))
    assert module._matrix_dtype(asked) == dtype


def test_a_prefix_is_copied_to_its_length_and_a_slot_is_cleared_alone(model):
    decoder = FlatDecoder(model, 3, 8)
    decoder.cache.normal_()
    before = decoder.cache.clone()
    decoder.copy_prefix(2, 0, 5)
    assert torch.equal(decoder.cache[:, :, 0, :, :5], before[:, :, 2, :, :5])
    assert torch.equal(decoder.cache[:, :, 0, :, 5:], before[:, :, 0, :, 5:])
    assert torch.equal(decoder.cache[:, :, 1:], before[:, :, 1:])
    decoder.clear(1)
    assert not decoder.cache[:, :, 1].any() and torch.equal(decoder.cache[:, :, 2], before[:, :, 2])


def test_keys_and_values_are_kept_in_the_dtype_that_is_asked_for(model):
    kept = FlatDecoder(model, 2, 8, torch.bfloat16)
    assert kept.cache.dtype == kept.dtype == kept.prompt_mask(2, 4).dtype == torch.bfloat16
    assert kept.decoding_mask(torch.tensor([1, 3]), 3).dtype == torch.bfloat16 and kept.matrix_dtype == torch.float32
    assert FlatDecoder(model, 2, 8).cache.dtype == torch.float32
    embeds, seen = torch.randn(3, 64).bfloat16(), []
    kept.host_step, kept.layers = None, [lambda hidden, plan: seen.append(hidden) or hidden]
    plan = FlatRunner(kept)._plan([], [Piece(0, 0, 3, embeds, is_last=False)])
    logits = kept.forward(embeds, plan)
    assert torch.equal(seen[0], embeds.float()) and seen[0].dtype == torch.float32, "the stream is float32"
    assert logits.shape == (0, model.config.text_config.vocab_size) and logits.dtype == torch.float32


def test_masks_hide_what_is_beyond_a_sequence_and_after_a_token(model):
    decoder = FlatDecoder(model, 2, 8)
    shown = decoder.decoding_mask(torch.tensor([1, 3]), 3)
    assert (shown.shape, (shown == 0)[:, 0, 0].tolist()) == ((2, 1, 1, 3), [[True, False, False], [True, True, True]])
    assert shown.min() == torch.finfo(torch.float32).min
    piece = decoder.prompt_mask(2, 4)
    assert (piece.shape, (piece == 0)[0, 0].tolist()) == (
        (1, 1, 2, 4),
        [[True, True, True, False], [True, True, True, True]],
    )
    rows = decoder.cache_rows(torch.tensor([0, 1]), torch.tensor([3, 0]))
    assert rows.tolist() == [3, 11, 19, 27, 32, 40, 48, 56], "slot * 4 heads * 8 positions, then each head's 8"


def test_a_step_in_which_no_prompt_ends_draws_nothing(model):
    """As the first pieces of a prompt that is longer than a step, where nobody answers."""
    runner = FlatRunner(FlatDecoder(model, 1, 8))
    launch = runner.launch([], [Piece(0, 0, 3, torch.randn(3, 64), is_last=False)])
    assert launch.read() == []


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), (torch.bfloat16, 2)])
def test_as_many_slots_as_fit_beside_what_else_is_needed(model, monkeypatch, caplog, dtype, itemsize):
    slot = 2 * 2 * 64 * 100 * itemsize
    kept = 768 * 2**20 + 5000 // 50
    device = torch.device("cuda")
    weight = type("Weight", (), {"device": device})()
    monkeypatch.setattr(type(model), "get_input_embeddings", lambda self: type("E", (), {"weight": weight})())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for room, fitting in ((4 * slot, 4), (4 * slot - 1, 3), (slot, 1), (9 * slot, 4)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, room=room: (kept + room, 5000))
        with caplog.at_level(logging.WARNING):
            assert slots_that_fit(model, 4, 100, dtype) == fitting
        assert bool(caplog.messages) == (fitting < 4)
        caplog.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (kept + slot - 1, 5000))
    with pytest.raises(ValueError, match="the cache of one sequence of 100 tokens takes"):
        slots_that_fit(model, 4, 100, dtype)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_rows_with_a_number_that_is_not_finite_are_told_from_the_others(make):
    rows = make([[1.0, 3.0, 2.0], [math.inf, 0.0, 1.0], [0.0, math.nan, -1.0], [-4.0, -5.0, -3.0]])
    is_finite, largest = _finite_and_largest(rows)
    assert is_finite == [True, False, False, True]
    assert (largest[0], largest[3]) == (1, 2)
