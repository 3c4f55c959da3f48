"""A language layer with fused operations is the plain one, but for which elements dropout drops."""

from __future__ import annotations

import pytest
import torch

from tests.language_layers import assert_close, layer_model, layer_results
from tinygptv.kernels.training_functions import draw_seeds
from tinygptv.model.fused_layer import can_fuse


@pytest.mark.parametrize("rank", [0, 4])
def test_fused_is_plain_without_dropout(rank):
    model = layer_model(rank)
    assert_close(layer_results(model, True), layer_results(model, False), 2e-4)


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


def test_each_layer_has_its_own_seeds():
    seeds = torch.stack(draw_seeds(3, torch.device("cpu")))
    assert seeds.shape == (3, 4) and seeds.unique().numel() == 12
