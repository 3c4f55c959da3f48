"""Cross-entropy of a frozen language head that keeps no logits.

The head is frozen, so the only gradient is that of its input, and it is known as soon as the logits are: it is computed
with the loss, a few rows at a time, and [M, D] numbers are kept instead of [M, K] float32 logits and their gradient.

Notation: M supervised positions, D language width, K vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 512
"""Positions whose logits exist at a time."""
_FP16_SCALE = 1024.0
"""fp16 loses probabilities below 6e-8; times this, the products still stay far below its largest number."""

Scorer = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""``score_logits``, or a compiled form of it."""


def score_logits(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and its gradient.

    Args:
        logits: [M, K].
        targets: [M] ids.
        scale: factor of the gradient.

    Returns:
        Losses [M] float32, and ``scale`` times their gradient [M, K] in the logits' dtype.
    """
    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = normaliser[:, 0] - wide.gather(1, targets[:, None])[:, 0]
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    # In place, so that uncompiled no more than one float32 matrix lives.
    slope = wide.sub_(normaliser).exp_().sub_(is_target.to(logits.dtype)).mul_(scale)
    return losses, slope.to(logits.dtype)


class _FrozenHeadLosses(torch.autograd.Function):
    """Token losses [M] of hidden states [M, D]; the gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_KD: Tensor, bias_K: Tensor, targets_M: Tensor, scorer: Scorer
    ) -> Tensor:
        scale = _FP16_SCALE if weight_KD.dtype == torch.float16 else 1.0
        losses_M = hidden_MD.new_empty(len(hidden_MD), dtype=torch.float32)
        slopes_MD = hidden_MD.new_empty(hidden_MD.shape, dtype=weight_KD.dtype)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for start in range(0, len(hidden_MD), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                logits = torch.addmm(bias_K, hidden_MD[rows].to(weight_KD.dtype), weight_KD.T)
                losses_M[rows], slope = scorer(logits, targets_M[rows], scale)
                torch.mm(slope, weight_KD, out=slopes_MD[rows])
        ctx.save_for_backward(slopes_MD)
        ctx.scale, ctx.dtype = scale, hidden_MD.dtype
        return losses_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_MD,) = ctx.saved_tensors
        gradient_MD = slopes_MD * (gradients[0] / ctx.scale)[:, None]
        return gradient_MD.to(ctx.dtype), None, None, None, None


def frozen_head_losses(
    hidden_MD: Tensor, weight_KD: Tensor, bias_K: Tensor, targets_M: Tensor, scorer: Scorer = score_logits
) -> Tensor:
    """Token losses of a language head that does not train.

    Args:
        hidden_MD: inputs of the head; they get a gradient.
        weight_KD: of the head; the logits are computed in its dtype.
        bias_K: of the head.
        targets_M: ids.
        scorer: ``score_logits``, or a compiled form of it.

    Returns:
        [M] float32, in nats.
    """
    return _FrozenHeadLosses.apply(hidden_MD, weight_KD, bias_K, targets_M, scorer)
