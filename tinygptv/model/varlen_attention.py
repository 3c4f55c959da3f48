"""Causal attention over sequences that lie one after the other, without padding and without a mask.

In 16 bits on a GPU torch's own ``varlen_attn`` (FlashAttention) computes it; everywhere else scaled-dot-product
attention under a block-diagonal mask, which is exact but needs T * T bytes: for tests.

Notation: T tokens, L sequences, N heads, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scaling: float
) -> Tensor:
    """Attend inside each sequence.

    Args:
        query: [T, N, H].
        key: the same.
        value: the same.
        cu_seqlens: int32 [L + 1] first token of each sequence, and T.
        max_length: at least the length of the longest sequence.
        scaling: factor of the scores.

    Returns:
        [T, N, H].
    """
    if has_kernel(query):
        output = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(output, Tensor)
        return output
    positions = torch.arange(query.shape[0], device=query.device)
    sequence = torch.bucketize(positions, cu_seqlens[1:], right=True)
    seen = (sequence[:, None] == sequence[None, :]) & (positions[:, None] >= positions[None, :])
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output[0].transpose(0, 1)


def has_kernel(query: Tensor) -> bool:
    """Whether ``varlen_attn`` can compute it: FlashAttention knows 16 bits on CUDA alone.

    Compiled layers ask this; callers ask ``runs_flash_attention`` before they make batches that need it.
    """
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def runs_flash_attention(device: torch.device) -> bool:
    """Whether a device has FlashAttention: CUDA cards of compute capability 8.0 (Ampere) and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
