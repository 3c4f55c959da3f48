"""A language layer with fused operations is the plain one, but for which elements dropout drops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.language_layers import assert_close, layer_model, layer_results
from tinygptv.kernels.training_functions import draw_seeds
from tinygptv.model import fused_layer
from tinygptv.model.fused_layer import _matrix_dtype, can_fuse


@pytest.mark.parametrize("rank", [0, 4])
def test_fused_is_plain_without_dropout(rank):
    model = layer_model(rank)
    for layer in model.layers:  # each norm divides by its own
        norms = (
            layer.input_layernorm,
            layer.attention_rmsnorm,
            layer.self_attn.q_layernorm,
            layer.self_attn.k_layernorm,
        )
        for norm, eps in zip(norms, (0.1, 0.4, 0.7, 0.7), strict=True):
            norm.eps = eps
    assert_close(layer_results(model, True), layer_results(model, False), 2e-4)


def test_each_adapter_and_branch_has_its_own_dropout(monkeypatch):
    model, given = layer_model(dropout=0.3), []
    for layer in model.layers:
        for linear, p in ((layer.self_attn.qkv_proj, 0.1), (layer.self_attn.dense, 0.2)):
            linear.lora_dropout["default"].p = p
    for name, at in (("NormAndDrop", 5), ("DropForAdapter", 2), ("AddBranches", 6)):
        operation = getattr(fused_layer, name)

        def note(*arguments, apply=operation.apply, at=at):
            given.append(arguments[at])
            return apply(*arguments)

        monkeypatch.setattr(fused_layer, name, SimpleNamespace(apply=note))
    layer_results(model, True)
    assert given == [0.1, 0.2, 0.3] * 2
    given.clear()
    layer_results(model.eval(), True)
    assert given == [0.0, 0.0] * 2


def test_matrices_compute_in_their_own_dtype():
    model = layer_model(rank=0)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.to(torch.bfloat16)
    assert_close(layer_results(model, True), layer_results(model, False), 0.1)


def test_under_autocast_matrices_compute_in_its_dtype():
    linear, x = torch.nn.Linear(2, 2).half(), torch.zeros(2)
    assert _matrix_dtype(linear, x) == torch.float16
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            assert _matrix_dtype(linear.float(), x) == dtype


def test_evaluation_drops_nothing():
    model = layer_model(dropout=0.3).eval()
    assert_close(layer_results(model, True), layer_results(model, True, seed=3), 0)


def test_masks_are_those_of_the_seed_and_the_same_when_computed_again():
    model = layer_model(dropout=0.3)
    first = layer_results(model, True)
    assert not torch.allclose(layer_results(model, True, seed=3)[0], first[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(layer_results(model, True), first, 0)


def test_what_cannot_be_fused_is_computed_plainly():
    model = layer_model()
    model.config.qk_layernorm = False
    assert not can_fuse(model.config)
    config = layer_model().config
    assert can_fuse(config)
    config.resid_pdrop = 1.0
    assert not can_fuse(config), "nothing is left to be scaled"


def test_each_layer_has_its_own_seeds():
    seeds = torch.stack(draw_seeds(3, torch.device("cpu")))
    assert seeds.shape == (3, 4) and seeds.unique().numel() == 12


@torch.no_grad()
def test_rows_that_are_padded_are_computed_plainly():
    language, ids = layer_model(4).eval(), torch.arange(1, 13).reshape(2, 6)
    outputs = [language(input_ids=ids, fused=fused).last_hidden_state for fused in (True, False)]
    assert torch.equal(*outputs)
