"""fp16's range on hardware that computes in float32: what would overflow becomes infinite, what would underflow 0.

An ablation asks which norm keeps fp16 training alive, and no GPU is needed to see it: every tensor that autocast would
hold in fp16 (inputs and outputs of linear layers, attention scores and weights, and their gradients) is rounded to the
nearest fp16 number. Sums inside a matrix product stay float32, as in the hardware.

Notation: B batch, N heads, S sequence, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.linear_packed import PackedLinear

HALF_RANGE_ATTENTION = "half_range"


class _RoundToHalf(torch.autograd.Function):
    """x -> the nearest fp16 number, in float32; the same for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].half().float()


def round_to_half(x: Tensor) -> Tensor:
    """Round a float32 tensor, and later its gradient, to fp16's precision and range."""
    return _RoundToHalf.apply(x)


def half_range_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as the release computes it in fp16: scores are scaled after the product, the softmax is float32.

    Args:
        module: the attention layer.
        query: [B, N, S, H].
        key: the same.
        value: the same.
        attention_mask: [B, 1, S, S], added to the scores.
        scaling: factor of the scores.
        dropout: share of the attention weights that are dropped.
        kwargs: not used.

    Returns:
        [B, S, N, H] and the weights [B, N, S, S].
    """
    query, key, value = (round_to_half(x) for x in (query, key, value))
    scores = round_to_half(round_to_half(query @ key.transpose(2, 3)) * scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = round_to_half(nn.functional.softmax(scores, dim=-1))
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return round_to_half(weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(HALF_RANGE_ATTENTION, half_range_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(HALF_RANGE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def emulate_half_range(model: TinyGPTVForConditionalGeneration) -> None:
    """Make a float32 model train as if in fp16, in place: projector, language model and head.

    The frozen vision encoder and Q-Former stay as they are; their features do not depend on what is trained.
    """
    for part in (model.projector, model.language_model, model.lm_head):
        for module in part.modules():
            if isinstance(module, nn.Linear | PackedLinear):
                module.register_forward_pre_hook(_round_input)
                module.register_forward_hook(_round_output)
    model.language_model.set_attn_implementation(HALF_RANGE_ATTENTION)


def _round_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_to_half(arguments[0]), *arguments[1:])


def _round_output(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return round_to_half(output)
