"""The step's operations in plain torch: what the Triton kernels must agree with, and the path where Triton is missing.

Shapes are static and nothing is read back to the host, so these run inside a CUDA graph too.

Notation: T tokens of a step, D width, N heads, H head width, G slots, L cache length, I width of the MLP, P partial
products of a low-bit matrix (their sum is the product; 1 for a plain one).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinygptv.kernels.shapes import AttentionWeights, Branch, Cache, PackedWeight, unpack_codes


def add_norm(
    hidden_TD: Tensor,
    branches: tuple[Branch, Branch] | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Add a layer's two branches to the residual stream, in place, then normalise it for the next layer.

    Args:
        hidden_TD: residual stream [T, D] float32; changed in place where there are branches.
        branches: outputs of the attention branch, with its RMSNorm, and of the MLP branch; None before the first layer.
        weight_D: LayerNorm weight; None casts without normalising.
        bias_D: LayerNorm bias.
        eps: of the LayerNorm.
        dtype: of the result.

    Returns:
        The normalised stream [T, D] in ``dtype``.
    """
    if branches is not None:
        hidden_TD += _branch(branches[0]) + _branch(branches[1])
    if weight_D is None:
        return hidden_TD.to(dtype)
    return nn.functional.layer_norm(hidden_TD, hidden_TD.shape[-1:], weight_D, bias_D, eps).to(dtype)


def _branch(branch: Branch) -> Tensor:
    output = branch.partials.float().sum(0)
    if branch.bias is not None:
        output = output + branch.bias
    if branch.rms_weight is not None:
        output = branch.rms_weight * (output * torch.rsqrt(output.square().mean(-1, keepdim=True) + branch.rms_eps))
    return output


def bias_gelu(partials_PTI: Tensor, bias_I: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Tanh GELU of a product and its bias: [P, T, I] to [T, I] in ``dtype``."""
    x = partials_PTI.float().sum(0)
    return nn.functional.gelu(x if bias_I is None else x + bias_I, approximate="tanh").to(dtype)


def rotate_and_store(
    partials: Tensor, weights: AttentionWeights, cache: Cache, slots_T: Tensor, positions_T: Tensor
) -> Tensor:
    """Normalise and rotate queries and keys; write keys and values to the cache.

    Args:
        partials: product of the fused q/k/v matrix [P, T, 3 * N * H], without bias.
        weights: bias, norms and rotary tables.
        cache: keys and values; rows of ``positions_T`` in ``slots_T`` are written, slot G is ignored.
        slots_T: int64 [T].
        positions_T: int64 [T].

    Returns:
        Queries [T, N, H] in the cache's dtype.
    """
    query, key, value = _heads(partials, weights, positions_T, cache.keys.dtype)
    num_slots = cache.keys.shape[0]
    is_real = (slots_T < num_slots)[:, None, None]
    slots = slots_T.clamp(max=num_slots - 1)
    for stored, new in ((cache.keys, key), (cache.values, value)):
        stored[slots, :, positions_T] = torch.where(is_real, new, stored[slots, :, positions_T])
    return query


def attend(partials: Tensor, weights: AttentionWeights, cache: Cache, slots_T: Tensor, lengths_G: Tensor) -> Tensor:
    """Attention of one new token per sequence: rotate, extend the cache, attend over it.

    Args:
        partials: as for ``rotate_and_store``.
        weights: bias, norms and rotary tables.
        cache: keys and values; extended in place.
        slots_T: int64 [T] slot of each token's sequence; slot G marks a row that belongs to nobody.
        lengths_G: int64 [G + 1] positions that each slot holds; the new token stands at that position.

    Returns:
        [T, N * H] in the cache's dtype; rows of slot G are zero.
    """
    positions_T = lengths_G.index_select(0, slots_T)
    query_TNH = rotate_and_store(partials, weights, cache, slots_T, positions_T)
    num_slots, _, length, _ = cache.keys.shape
    slots = slots_T.clamp(max=num_slots - 1)
    keys, values = cache.keys[slots], cache.values[slots]  # [T, N, L, H]
    scores = torch.einsum("tnh,tnlh->tnl", query_TNH.float(), keys.float()) * weights.scale
    is_hidden = torch.arange(length, device=slots_T.device) > positions_T[:, None]
    scores = scores.masked_fill(is_hidden[:, None], -torch.inf)
    values = values.float().masked_fill(is_hidden[:, None, :, None], 0.0)
    output = torch.einsum("tnl,tnlh->tnh", scores.softmax(-1), values)
    return (output * (slots_T < num_slots)[:, None, None]).flatten(1).to(cache.keys.dtype)


def _heads(
    partials: Tensor, weights: AttentionWeights, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys and plain values, [T, N, H] each, in the cache's dtype."""
    qkv = partials.float().sum(0)
    if weights.bias is not None:
        qkv = qkv + weights.bias
    head_dim = weights.cos.shape[-1]
    query, key, value = qkv.view(len(qkv), 3, -1, head_dim).unbind(1)
    cos, sin = weights.cos[positions_T].unsqueeze(1), weights.sin[positions_T].unsqueeze(1)  # [T, 1, H]
    half = weights.rotary_dim // 2
    swap = torch.arange(head_dim, device=qkv.device)
    swap = torch.where(swap < half, swap + half, torch.where(swap < 2 * half, swap - half, swap))
    rotated = []
    for x, weight, bias in ((query, *weights.q_norm), (key, *weights.k_norm)):
        normed = x if weight is None else nn.functional.layer_norm(x, (head_dim,), weight, bias, weights.eps)
        rotated.append((normed * cos + normed.index_select(-1, swap) * sin).to(dtype))
    return rotated[0], rotated[1], value.to(dtype)


def partial_products(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply by a packed matrix: [T, I] to float32 [P, T, O], whose sum over P is the product; here P is 1."""
    return nn.functional.linear(x_TI.float(), unpack(weight, torch.float32)).unsqueeze(0)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in ``dtype``."""
    if weight.table is None:
        return (weight.codes.float() * weight.scale.float()).to(dtype)
    scale, offset = (
        None if part is None else part.float().repeat_interleave(weight.group, dim=1)[:, : weight.inputs]
        for part in (weight.scale, weight.offset)
    )
    assert scale is not None, "every format has scales"
    values = weight.table[unpack_codes(weight.codes, weight.inputs)] * scale
    return (values if offset is None else values + offset).to(dtype)
