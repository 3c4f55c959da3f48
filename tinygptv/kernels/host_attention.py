"""What a CPU does between the matrix products of a decoding step, by the C functions of ``host_attention.c``.

Notation: T tokens, N heads, H head width, D width, G slots, L cache length.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from tinygptv.kernels.host_library import BLOCK, address, host_library, loaded_library
from tinygptv.kernels.host_structs import Attention
from tinygptv.kernels.shapes import AttentionWeights, Cache

MAX_HEAD_WIDTH = 256


def has_host_attention(head_dim: int, width: int) -> bool:
    """Whether models of this size have these kernels on this machine."""
    return head_dim % BLOCK == 0 and head_dim <= MAX_HEAD_WIDTH and width % BLOCK == 0 and host_library() is not None


class HostAttention:
    """Attention of a layer over its cache, for tokens of many sequences."""

    def __init__(self, weights: AttentionWeights, cache: Cache) -> None:
        """Take a layer's weights and cache.

        Args:
            weights: norms, tables and scale; a bias has to be in the product already.
            cache: float32 or bfloat16 [G, N, L, H], contiguous; extended in place.
        """
        self.library, self.weights, self.cache = loaded_library(), weights, cache
        _, heads, _, width = cache.keys.shape
        (q_weight, q_bias), (k_weight, k_bias) = weights.q_norm, weights.k_norm
        self.of_layer = Attention(
            q_weight=address(q_weight), q_bias=address(q_bias), k_weight=address(k_weight), k_bias=address(k_bias),
            cos=address(weights.cos), sin=address(weights.sin), keys=address(cache.keys), values=address(cache.values),
            eps=weights.eps, scale=weights.scale, heads=heads, rotary=weights.rotary_dim,
            half=cache.keys.dtype == torch.bfloat16, width=width,
        )  # fmt: skip

    def __call__(
        self, qkv: Tensor, positions: Tensor, cache_rows: Tensor, num_decoding: int, num_attended: int
    ) -> Tensor:
        """Normalise, rotate and store, and attend.

        Args:
            qkv: float32 [T, 3, N, H], contiguous.
            positions: int64 [T].
            cache_rows: int64 [T * N] as in ``StepPlan``.
            num_decoding: the first so many tokens are a new one each of as many sequences.
            num_attended: the first so many tokens attend, at least those.

        Returns:
            float32 [T, N, H]: what the first tokens attended to; of those after them the rotated query.
        """
        tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(tokens, heads, width)
        step = Attention.from_buffer_copy(self.of_layer)
        step.qkv, step.out, step.decoding = qkv.data_ptr(), out.data_ptr(), num_decoding
        step.positions, step.cache_rows = positions.data_ptr(), cache_rows.data_ptr()
        self.library.attend_tokens(ctypes.byref(step), tokens, num_attended, torch.get_num_threads())
        return out


def add_branches(attention: Tensor, rms_weight: Tensor | None, eps: float, mlp: Tensor, hidden: Tensor) -> Tensor:
    """The residual stream after a layer: float32 [T, D], all contiguous.

    Args:
        attention: output of the attention branch, before its RMSNorm.
        rms_weight: [D] of that norm; None is no norm.
        eps: of the norm.
        mlp: output of the MLP branch.
        hidden: the stream before the layer.
    """
    out = torch.empty_like(hidden)
    loaded_library().add_branches(
        attention.data_ptr(), address(rms_weight), eps, mlp.data_ptr(), hidden.data_ptr(), len(hidden), hidden.shape[1],
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def norm_rows(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of float32 [T, D], contiguous."""
    out = torch.empty_like(x)
    loaded_library().norm_rows(
        x.data_ptr(), norm.weight.data_ptr(), address(norm.bias), norm.eps, len(x), x.shape[1], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def gelu_rows(x: Tensor) -> Tensor:
    """Tanh GELU of float32 [T, D], contiguous, in place."""
    loaded_library().gelu_rows(x.data_ptr(), len(x), x.shape[1], torch.get_num_threads())
    return x
