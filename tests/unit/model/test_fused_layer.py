"""A language layer with fused operations is the plain one, but for which elements dropout drops."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from tinygptv.kernels.training_functions import draw_seeds
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.fused_layer import can_fuse
from tinygptv.model.language_model import LanguageModel
from tinygptv.model.lora import add_lora

LENGTHS = (5, 9, 2)


def _model(rank: int = 4, dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(0)
    config = tiny_config().text_config
    config.input_layernorm = config.qk_layernorm = config.attention_rmsnorm = True
    config.resid_pdrop = dropout
    model = LanguageModel(config).train()
    if rank:
        add_lora(model, rank, 16, dropout)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_("lora_" in name or "norm" in name)
    return model


def _results(model: LanguageModel, fused: bool, seed: int = 1) -> list[torch.Tensor]:
    """Output, and gradients of the input and of all that trains."""
    torch.manual_seed(2)
    embeds = torch.randn(1, sum(LENGTHS), model.config.hidden_size, requires_grad=True)
    factor = torch.randn(embeds.shape)
    torch.manual_seed(seed)
    output = model(
        inputs_embeds=embeds,
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        cu_seq_lens_q=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        max_length_q=max(LENGTHS),
        use_cache=False,
        fused=fused,
    ).last_hidden_state
    trained = [p for p in model.parameters() if p.requires_grad]
    return [output.detach(), *torch.autograd.grad((output * factor).sum(), (embeds, *trained))]


def _assert_close(results, expected, tolerance):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rank", [0, 4])
def test_fused_is_plain_without_dropout(rank):
    model = _model(rank)
    _assert_close(_results(model, True), _results(model, False), 2e-4)


def test_evaluation_drops_nothing():
    model = _model(dropout=0.3).eval()
    _assert_close(_results(model, True), _results(model, True, seed=3), 0)


def test_masks_are_those_of_the_seed_and_the_same_when_computed_again():
    model = _model(dropout=0.3)
    first = _results(model, True)
    assert not torch.allclose(_results(model, True, seed=3)[0], first[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _assert_close(_results(model, True), first, 0)


def test_a_compiled_fused_layer_is_the_eager_one():
    """One graph; the same masks, and no gradient counted twice. One layer is compiled: each costs seconds."""
    model = _model(dropout=0.3)
    expected = _results(model, True)
    model.layers[0].compile(dynamic=True, backend="aot_eager", fullgraph=True)
    try:
        _assert_close(_results(model, True), expected, 1e-4)
    finally:
        torch._dynamo.reset()


def test_what_cannot_be_fused_is_computed_plainly():
    model = _model()
    model.config.qk_layernorm = False
    assert not can_fuse(model.config)


def test_each_layer_has_its_own_seeds():
    seeds = torch.stack(draw_seeds(3, torch.device("cpu")))
    assert seeds.shape == (3, 4) and seeds.unique().numel() == 12
