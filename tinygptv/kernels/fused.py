"""Triton kernels of a decoding or prefill step, with the signatures of ``reference``.

A step of one token per sequence is bound by memory and by the number of launches: each kernel here stands for five to
ten elementwise ones. All compute in float32. Widths that are no power of two (Phi-2: 2,560 and heads of 80) are padded
with masked lanes, which read no memory.

Notation: as in ``reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinygptv.kernels.shapes import AttentionWeights, Branch, Cache

FEW_PROGRAMS, MANY_PROGRAMS = (128, 8), (64, 4)
"""Cache positions that a program reads at a time, and its warps: where a program has a multiprocessor for itself, and
where several share one."""
WANTED_PROGRAMS = 256
"""Programs that keep a large GPU's memory busy; with fewer heads than that, a sequence's context is divided."""
MOST_CONTEXT_PARTS = 8


def add_norm(
    hidden_TD: Tensor,
    branches: tuple[Branch, Branch] | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``reference.add_norm``."""
    num_tokens, width = hidden_TD.shape
    normed_TD = torch.empty(num_tokens, width, dtype=dtype, device=hidden_TD.device)
    none = hidden_TD
    attention, mlp = branches or (Branch(none, None), Branch(none, None))
    _add_norm_kernel[(num_tokens,)](
        hidden_TD,
        attention.partials,
        _or(attention.bias, none),
        _or(attention.rms_weight, none),
        mlp.partials,
        _or(mlp.bias, none),
        _or(weight_D, none),
        _or(bias_D, none),
        normed_TD,
        num_tokens,
        attention.rms_eps,
        eps,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        ATTENTION_PARTS=len(attention.partials) if branches else 0,
        MLP_PARTS=len(mlp.partials) if branches else 0,
        HAS_ATTENTION_BIAS=attention.bias is not None,
        HAS_RMS=attention.rms_weight is not None,
        HAS_MLP_BIAS=mlp.bias is not None,
        HAS_NORM=weight_D is not None,
        HAS_NORM_BIAS=bias_D is not None,
        num_warps=8 if width > 1024 else 4,
    )
    return normed_TD


@triton.jit(do_not_specialize=["num_tokens"])
def _add_norm_kernel(
    hidden, attention, attention_bias, rms_weight, mlp, mlp_bias, weight, bias, normed, num_tokens, rms_eps, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ATTENTION_PARTS: tl.constexpr, MLP_PARTS: tl.constexpr,
    HAS_ATTENTION_BIAS: tl.constexpr, HAS_RMS: tl.constexpr, HAS_MLP_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_real = d < D
    x = tl.load(hidden + row * D + d, mask=is_real, other=0.0)
    if ATTENTION_PARTS > 0:
        a = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(ATTENTION_PARTS):
            a += tl.load(attention + (part * num_tokens + row) * D + d, mask=is_real, other=0.0).to(tl.float32)
        if HAS_ATTENTION_BIAS:
            a += tl.load(attention_bias + d, mask=is_real, other=0.0)
        if HAS_RMS:
            rms = tl.rsqrt(tl.sum(a * a, 0) / D + rms_eps)
            a = tl.load(rms_weight + d, mask=is_real, other=0.0) * (a * rms)
        m = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(MLP_PARTS):
            m += tl.load(mlp + (part * num_tokens + row) * D + d, mask=is_real, other=0.0).to(tl.float32)
        if HAS_MLP_BIAS:
            m += tl.load(mlp_bias + d, mask=is_real, other=0.0)
        x += a + m
        tl.store(hidden + row * D + d, x, mask=is_real)
    if HAS_NORM:
        mean = tl.sum(x, 0) / D
        centred = tl.where(is_real, x - mean, 0.0)
        x = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        x *= tl.load(weight + d, mask=is_real, other=0.0)
        if HAS_NORM_BIAS:
            x += tl.load(bias + d, mask=is_real, other=0.0)
    tl.store(normed + row * D + d, x.to(normed.dtype.element_ty), mask=is_real)


def bias_gelu(partials_PTI: Tensor, bias_I: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See ``reference.bias_gelu``."""
    parts, num_tokens, width = partials_PTI.shape
    output_TI = torch.empty(num_tokens, width, dtype=dtype, device=partials_PTI.device)
    block = 1024
    _bias_gelu_kernel[(num_tokens, triton.cdiv(width, block))](
        partials_PTI, _or(bias_I, partials_PTI), output_TI, num_tokens, width, PARTS=parts,
        HAS_BIAS=bias_I is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return output_TI


@triton.jit(do_not_specialize=["num_tokens"])
def _bias_gelu_kernel(
    partials, bias, output, num_tokens, width, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = i < width
    x = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(partials + (part * num_tokens + row) * width + i, mask=is_real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + i, mask=is_real, other=0.0)
    # tanh(u) = 2 * sigmoid(2u) - 1
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x * tl.sigmoid(2.0 * u)
    tl.store(output + row * width + i, y.to(output.dtype.element_ty), mask=is_real)


def rotate_and_store(
    partials: Tensor, weights: AttentionWeights, cache: Cache, slots_T: Tensor, positions_T: Tensor
) -> Tensor:
    """See ``reference.rotate_and_store``."""
    num_slots, num_heads, length, head_dim = cache.keys.shape
    num_tokens = len(slots_T)
    query_TNH = torch.empty(num_tokens, num_heads, head_dim, dtype=cache.keys.dtype, device=partials.device)
    _rotate_and_store_kernel[(num_tokens, num_heads)](
        partials, *_tables(weights, partials), cache.keys, cache.values, slots_T, positions_T, query_TNH,
        num_tokens, num_slots, length, weights.eps, num_warps=1, **_head_options(partials, weights, cache),
    )  # fmt: skip
    return query_TNH


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "length"])
def _rotate_and_store_kernel(
    qkv, qkv_bias, q_weight, q_bias, k_weight, k_bias, cos, sin, keys, values, slots, positions, query,
    num_tokens, num_slots, length, eps,
    N: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= num_slots:
        return
    position = tl.load(positions + row).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    is_real = h < H
    q = _rotated_head(qkv, qkv_bias, q_weight, q_bias, cos, sin, row, head, 0, position, num_tokens, eps,
                      N, H, BLOCK_H, HALF, PARTS, HAS_BIAS, HAS_Q_NORM)  # fmt: skip
    k = _rotated_head(qkv, qkv_bias, k_weight, k_bias, cos, sin, row, head, 1, position, num_tokens, eps,
                      N, H, BLOCK_H, HALF, PARTS, HAS_BIAS, HAS_K_NORM)  # fmt: skip
    v = _head(qkv, qkv_bias, row, (2 * N + head) * H + h, is_real, num_tokens, 3 * N * H, PARTS, HAS_BIAS)
    tl.store(query + (row * N + head) * H + h, q.to(query.dtype.element_ty), mask=is_real)
    target = ((slot * N + head) * length + position) * H + h
    tl.store(keys + target, k.to(keys.dtype.element_ty), mask=is_real)
    tl.store(values + target, v.to(values.dtype.element_ty), mask=is_real)


def attend(partials: Tensor, weights: AttentionWeights, cache: Cache, slots_T: Tensor, lengths_G: Tensor) -> Tensor:
    """See ``reference.attend``."""
    num_slots, num_heads, length, head_dim = cache.keys.shape
    num_tokens, device = len(slots_T), partials.device
    context_parts = _context_parts(num_tokens * num_heads)
    block, warps = FEW_PROGRAMS if num_tokens * num_heads < WANTED_PROGRAMS else MANY_PROGRAMS
    options = _head_options(partials, weights, cache)
    output = torch.empty(num_tokens, num_heads * head_dim, dtype=cache.keys.dtype, device=device)
    if context_parts == 1:
        summed, most, total = output, output, output
    else:
        summed = torch.empty(num_tokens, num_heads, context_parts, head_dim, dtype=torch.float32, device=device)
        most = torch.empty(num_tokens, num_heads, context_parts, dtype=torch.float32, device=device)
        total = torch.empty_like(most)
    _attend_kernel[(num_tokens, num_heads, context_parts)](
        partials, *_tables(weights, partials), cache.keys, cache.values, slots_T, lengths_G, summed, most, total,
        num_tokens, num_slots, length, weights.eps, weights.scale,
        CONTEXT_PARTS=context_parts, BLOCK_L=block, num_warps=warps, **options,
    )  # fmt: skip
    if context_parts > 1:
        _combine_kernel[(num_tokens, num_heads)](
            summed, most, total, output, CONTEXT_PARTS=context_parts, N=num_heads, H=head_dim,
            BLOCK_H=options["BLOCK_H"], num_warps=1,
        )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "length"])
def _attend_kernel(
    qkv, qkv_bias, q_weight, q_bias, k_weight, k_bias, cos, sin, keys, values, slots, lengths, summed, most, total,
    num_tokens, num_slots, length, eps, scale,
    CONTEXT_PARTS: tl.constexpr, BLOCK_L: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    h = tl.arange(0, BLOCK_H)
    is_real = h < H
    slot = tl.load(slots + row).to(tl.int64)
    is_nobody = slot >= num_slots
    slot = tl.where(is_nobody, 0, slot)
    position = tl.where(is_nobody, 0, tl.load(lengths + tl.load(slots + row)).to(tl.int64))
    q = _rotated_head(qkv, qkv_bias, q_weight, q_bias, cos, sin, row, head, 0, position, num_tokens, eps,
                      N, H, BLOCK_H, HALF, PARTS, HAS_BIAS, HAS_Q_NORM)  # fmt: skip
    q = q.to(keys.dtype.element_ty).to(tl.float32)
    start = (slot * N + head) * length * H

    accumulated = tl.zeros([BLOCK_H], tl.float32)
    largest = tl.full([], -float("inf"), tl.float32)
    weight_sum = tl.zeros([], tl.float32)
    if part == 0:  # the token itself: its key and value go to the cache and are used from here
        k = _rotated_head(qkv, qkv_bias, k_weight, k_bias, cos, sin, row, head, 1, position, num_tokens, eps,
                          N, H, BLOCK_H, HALF, PARTS, HAS_BIAS, HAS_K_NORM)  # fmt: skip
        v = _head(qkv, qkv_bias, row, (2 * N + head) * H + h, is_real, num_tokens, 3 * N * H, PARTS, HAS_BIAS)
        k, v = k.to(keys.dtype.element_ty), v.to(values.dtype.element_ty)
        tl.store(keys + start + position * H + h, k, mask=is_real & (not is_nobody))
        tl.store(values + start + position * H + h, v, mask=is_real & (not is_nobody))
        largest = tl.sum(q * k.to(tl.float32), 0) * scale
        weight_sum += 1.0
        accumulated += v.to(tl.float32)

    share = tl.cdiv(tl.cdiv(position, CONTEXT_PARTS), BLOCK_L) * BLOCK_L
    first = part * share
    end = tl.minimum(first + share, position)
    for block in range(first, end, BLOCK_L):
        positions = block + tl.arange(0, BLOCK_L)
        is_past = positions < end
        offsets = start + positions[:, None] * H + h[None, :]
        mask = is_past[:, None] & is_real[None, :]
        k = tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_past, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink = tl.exp(largest - new_largest)
        probabilities = tl.exp(scores - new_largest)
        accumulated = accumulated * shrink + tl.sum(probabilities[:, None] * v, 0)
        weight_sum = weight_sum * shrink + tl.sum(probabilities, 0)
        largest = new_largest

    if CONTEXT_PARTS == 1:
        result = tl.where(is_nobody, 0.0, accumulated / weight_sum)
        tl.store(summed + (row * N + head) * H + h, result.to(summed.dtype.element_ty), mask=is_real)
    else:
        index = (row * N + head) * CONTEXT_PARTS + part
        tl.store(summed + index * H + h, tl.where(is_nobody, 0.0, accumulated), mask=is_real)
        tl.store(most + index, largest)
        tl.store(total + index, weight_sum)


@triton.jit
def _combine_kernel(
    summed, most, total, output, CONTEXT_PARTS: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * N + tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    parts = tl.arange(0, CONTEXT_PARTS)
    largest = tl.load(most + index * CONTEXT_PARTS + parts)
    factors = tl.exp(largest - tl.max(largest, 0))
    weight_sum = tl.sum(factors * tl.load(total + index * CONTEXT_PARTS + parts), 0)
    offsets = (index * CONTEXT_PARTS + parts[:, None]) * H + h[None, :]
    values = tl.load(summed + offsets, mask=(h < H)[None, :], other=0.0)
    result = tl.sum(values * factors[:, None], 0) / weight_sum
    tl.store(output + index * H + h, result.to(output.dtype.element_ty), mask=h < H)


@triton.jit
def _head(
    qkv, bias, row, columns, is_real, num_tokens, width: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    x = tl.zeros(columns.shape, tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(qkv + (part * num_tokens + row) * width + columns, mask=is_real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=is_real, other=0.0)
    return x


@triton.jit
def _rotated_head(
    qkv, qkv_bias, norm_weight, norm_bias, cos, sin, row, head, which: tl.constexpr, position, num_tokens, eps,
    N: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK_H)
    is_real = h < H
    partner = tl.where(h < HALF, h + HALF, tl.where(h < 2 * HALF, h - HALF, h))
    start = (which * N + head) * H
    x = _head(qkv, qkv_bias, row, start + h, is_real, num_tokens, 3 * N * H, PARTS, HAS_BIAS)
    y = _head(qkv, qkv_bias, row, start + partner, is_real, num_tokens, 3 * N * H, PARTS, HAS_BIAS)
    if HAS_NORM:
        mean = tl.sum(x, 0) / H
        centred = tl.where(is_real, x - mean, 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)
        x = centred * factor * tl.load(norm_weight + h, mask=is_real, other=0.0)
        x += tl.load(norm_bias + h, mask=is_real, other=0.0)
        y = (y - mean) * factor * tl.load(norm_weight + partner, mask=is_real, other=0.0)
        y += tl.load(norm_bias + partner, mask=is_real, other=0.0)
    c = tl.load(cos + position * H + h, mask=is_real, other=0.0)
    s = tl.load(sin + position * H + h, mask=is_real, other=0.0)
    return tl.where(is_real, x * c + y * s, 0.0)


def _tables(weights: AttentionWeights, none: Tensor) -> tuple[Tensor, ...]:
    """Bias, norms and rotary tables as kernel arguments; ``none`` stands for what is missing and is not read."""
    parts = (weights.bias, *weights.q_norm, *weights.k_norm, weights.cos, weights.sin)
    return tuple(_or(part, none) for part in parts)


def _head_options(partials: Tensor, weights: AttentionWeights, cache: Cache) -> dict[str, int | bool]:
    _, num_heads, _, head_dim = cache.keys.shape
    return {
        "N": num_heads,
        "H": head_dim,
        "BLOCK_H": triton.next_power_of_2(head_dim),
        "HALF": weights.rotary_dim // 2,
        "PARTS": len(partials),
        "HAS_BIAS": weights.bias is not None,
        "HAS_Q_NORM": weights.q_norm[0] is not None,
        "HAS_K_NORM": weights.k_norm[0] is not None,
    }


def _context_parts(num_heads: int) -> int:
    """Into how many parts a sequence's context is divided so that enough programs run; a power of two."""
    parts = 1
    while parts < MOST_CONTEXT_PARTS and parts * num_heads < WANTED_PROGRAMS:
        parts *= 2
    return parts


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor
