"""A small language model whose layers can be fused, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.language_model import LanguageModel
from tinygptv.model.lora import add_lora

LENGTHS = (5, 9, 2)


def layer_model(rank: int = 4, dropout: float = 0.0) -> LanguageModel:
    """All added norms, and adapters of that rank; only these train."""
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


def layer_results(model: LanguageModel, fused: bool, seed: int = 1) -> list[Tensor]:
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


def assert_close(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each is its counterpart, within the absolute and the relative tolerance."""
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
