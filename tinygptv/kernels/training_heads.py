"""Triton kernels between the q/k/v product and attention in a training step, with the signatures of
``training_reference``.

A head is read in chunks of half its rotated part (five of 16 numbers in Phi-2): a number and its rotary partner lie in
the same lane of the first two, and all chunks have one layout.

Notation: as in ``training_reference``; P programs, C chunks of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinygptv.kernels.training_rows import num_programs

FORWARD_ROWS, BACKWARD_ROWS, WARPS = 64, 32, 4
"""Heads that a program takes at a time, and its warps."""
BACKWARD_PROGRAMS = 4
"""Programs per multiprocessor in the backward pass."""
COPY_BLOCK = 2048


def rotate_heads(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor],
    k_norm: tuple[Tensor, Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """See ``training_reference.rotate_heads``."""
    head_dim = q_norm[0].shape[0]
    num_tokens = qkv.numel() // (3 * num_heads * head_dim)
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    key = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _rotate_heads_kernel[(triton.cdiv(num_tokens * num_heads, FORWARD_ROWS), 2)](
        qkv, *q_norm, *k_norm, cos, sin, query, key, num_tokens * num_heads, eps,
        ROWS=FORWARD_ROWS, num_warps=WARPS, **_head_options(num_heads, head_dim, cos.shape[-1]),
    )  # fmt: skip
    return query, key


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_heads_kernel(
    qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, query, key, num_rows, eps,
    N: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # No pointer is chosen at run time: torch.compile could not tell which tensors are written.
    if tl.program_id(1) == 0:
        _one_forward(qkv, 0, q_weight, q_bias, cos, sin, query, num_rows, eps, N, H, HALF, BLOCK, C, ROWS)
    else:
        _one_forward(qkv, 1, k_weight, k_bias, cos, sin, key, num_rows, eps, N, H, HALF, BLOCK, C, ROWS)


@triton.jit
def _one_forward(
    qkv, which: tl.constexpr, weight, bias, cos, sin, output, num_rows, eps,
    N: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    is_row = row < num_rows
    heads, _ = _normalised(_read_heads(qkv + _start(which, row, N, H), i, is_row, H, HALF, C), i, eps, H, HALF, C)
    scaled = ()
    for chunk in tl.static_range(C):
        w = _read_vector(weight, i, chunk, H, HALF)
        scaled = scaled + (heads[chunk] * w + _read_vector(bias, i, chunk, H, HALF),)
    c, s = _angles(cos, sin, row, i, is_row, N, HALF)
    turned = (scaled[0] * c - scaled[1] * s, scaled[1] * c + scaled[0] * s)
    for chunk in tl.static_range(2, C):
        turned = turned + (scaled[chunk],)
    _write_heads(output + row.to(tl.int64)[:, None] * H, turned, i, is_row, H, HALF, C)


def rotate_heads_backward(
    qkv: Tensor,
    q_weight_H: Tensor,
    k_weight_H: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    weights_train: bool,
    biases_train: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``training_reference.rotate_heads_backward``."""
    num_tokens, num_heads, head_dim = grads[0].shape
    programs = num_programs(qkv, BACKWARD_PROGRAMS)
    output = torch.empty_like(qkv)
    shape, device = (programs, 2, head_dim), qkv.device
    weight_parts = torch.empty(shape, dtype=torch.float32, device=device) if weights_train else None
    bias_parts = torch.empty(shape, dtype=torch.float32, device=device) if biases_train else None
    _rotate_heads_backward_kernel[(programs,)](
        qkv, q_weight_H, k_weight_H, cos, sin, *grads, output,
        output if weight_parts is None else weight_parts, output if bias_parts is None else bias_parts,
        num_tokens * num_heads, eps, WEIGHTS_TRAIN=weights_train, BIASES_TRAIN=biases_train, P=programs,
        COPY=COPY_BLOCK, ROWS=BACKWARD_ROWS, num_warps=WARPS, **_head_options(num_heads, head_dim, cos.shape[-1]),
    )  # fmt: skip
    sums = [None if parts is None else parts.sum(0) for parts in (weight_parts, bias_parts)]
    return output, sums[0], sums[1]


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_heads_backward_kernel(
    qkv, q_weight, k_weight, cos, sin, to_query, to_key, to_value, output, weight_parts, bias_parts, num_rows, eps,
    N: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS_TRAIN: tl.constexpr, BIASES_TRAIN: tl.constexpr, P: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program * (2 * H)
    _one_backward(qkv, 0, q_weight, cos, sin, to_query, output, weight_parts + part, bias_parts + part, program,
                  num_rows, eps, N, H, HALF, BLOCK, C, ROWS, WEIGHTS_TRAIN, BIASES_TRAIN, P)  # fmt: skip
    part += H
    _one_backward(qkv, 1, k_weight, cos, sin, to_key, output, weight_parts + part, bias_parts + part, program,
                  num_rows, eps, N, H, HALF, BLOCK, C, ROWS, WEIGHTS_TRAIN, BIASES_TRAIN, P)  # fmt: skip
    index = program.to(tl.int64) * COPY + tl.arange(0, COPY)
    count = num_rows * tl.full([], H, tl.int64)
    for _ in range(program, tl.cdiv(count, COPY), P):
        value = tl.load(to_value + index, mask=index < count)
        tl.store(output + index + (index // (N * H) + 1) * (2 * N * H), value, mask=index < count)
        index += P * COPY


@triton.jit
def _one_backward(
    qkv, which: tl.constexpr, weight, cos, sin, grad, output, weight_part, bias_part, program, num_rows, eps,
    N: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS_TRAIN: tl.constexpr, BIASES_TRAIN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of queries or keys, and this program's parts of the sums over heads."""
    i = tl.arange(0, BLOCK)
    weight_sums, bias_sums = _zeros(ROWS, BLOCK, C), _zeros(ROWS, BLOCK, C)
    row = program * ROWS + tl.arange(0, ROWS)
    for _ in range(program, tl.cdiv(num_rows, ROWS), P):
        is_row = row < num_rows
        turned = _read_heads(grad + row.to(tl.int64)[:, None] * H, i, is_row, H, HALF, C)
        heads = _read_heads(qkv + _start(which, row, N, H), i, is_row, H, HALF, C)
        c, s = _angles(cos, sin, row, i, is_row, N, HALF)
        grads = (turned[0] * c + turned[1] * s, turned[1] * c - turned[0] * s)
        for chunk in tl.static_range(2, C):
            grads = grads + (turned[chunk],)
        heads, rstd = _normalised(heads, i, eps, H, HALF, C)
        if WEIGHTS_TRAIN:
            weight_sums = _added(weight_sums, grads, heads, C)
        if BIASES_TRAIN:
            bias_sums = _added(bias_sums, grads, None, C)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        along = tl.zeros([ROWS, BLOCK], tl.float32)
        weighted = ()
        for chunk in tl.static_range(C):
            g = grads[chunk] * _read_vector(weight, i, chunk, H, HALF)
            weighted = weighted + (g,)
            total += g
            along += g * heads[chunk]
        mean = (tl.sum(total, 1) / H)[:, None]
        slope = (tl.sum(along, 1) / H)[:, None]
        results = ()
        for chunk in tl.static_range(C):
            results = results + ((weighted[chunk] - mean - heads[chunk] * slope) * rstd,)
        _write_heads(output + _start(which, row, N, H), results, i, is_row, H, HALF, C)
        row += P * ROWS
    if WEIGHTS_TRAIN:
        _write_sums(weight_part, weight_sums, i, H, HALF, C)
    if BIASES_TRAIN:
        _write_sums(bias_part, bias_sums, i, H, HALF, C)


@triton.jit
def _start(which, row, N: tl.constexpr, H: tl.constexpr):
    """Offsets [ROWS, 1] of heads in q/k/v; ``row`` counts the heads of all tokens."""
    token = (row // N).to(tl.int64)
    return (((token * 3 + which) * N + row % N) * H)[:, None]


@triton.jit
def _is_real(i, chunk: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """Which columns [BLOCK] of a chunk are its own."""
    return i < min(HALF, H - chunk * HALF)


@triton.jit
def _read_heads(start, i, is_row, H: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr):
    """Heads as C chunks [ROWS, BLOCK] float32."""
    chunks = ()
    for chunk in tl.static_range(C):
        mask = is_row[:, None] & _is_real(i, chunk, H, HALF)[None, :]
        x = tl.load(start + chunk * HALF + i[None, :], mask=mask, other=0.0)
        chunks = chunks + (x.to(tl.float32),)
    return chunks


@triton.jit
def _write_heads(start, chunks, i, is_row, H: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr):
    for chunk in tl.static_range(C):
        mask = is_row[:, None] & _is_real(i, chunk, H, HALF)[None, :]
        tl.store(start + chunk * HALF + i[None, :], chunks[chunk].to(start.dtype.element_ty), mask=mask)


@triton.jit
def _read_vector(start, i, chunk: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """A chunk [1, BLOCK] of a norm's weight or bias."""
    return tl.load(start + chunk * HALF + i, mask=_is_real(i, chunk, H, HALF), other=0.0)[None, :]


@triton.jit
def _angles(cos, sin, row, i, is_row, N: tl.constexpr, HALF: tl.constexpr):
    offsets = (row // N)[:, None] * (2 * HALF) + i[None, :]
    mask = is_row[:, None] & (i < HALF)[None, :]
    return tl.load(cos + offsets, mask=mask, other=0.0), tl.load(sin + offsets, mask=mask, other=0.0)


@triton.jit
def _normalised(chunks, i, eps, H: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr):
    """Heads of mean 0 and variance 1, and 1 / deviation [ROWS, 1]."""
    total = chunks[0]
    for chunk in tl.static_range(1, C):
        total += chunks[chunk]
    mean = (tl.sum(total, 1) / H)[:, None]
    centred = ()
    squares = tl.zeros(chunks[0].shape, tl.float32)
    for chunk in tl.static_range(C):
        x = tl.where(_is_real(i, chunk, H, HALF)[None, :], chunks[chunk] - mean, 0.0)
        centred = centred + (x,)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 1) / H + tl.cast(eps, tl.float32))[:, None]
    normed = ()
    for chunk in tl.static_range(C):
        normed = normed + (centred[chunk] * rstd,)
    return normed, rstd


@triton.jit
def _zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(C):
        zeros = zeros + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return zeros


@triton.jit
def _added(sums, grads, factors, C: tl.constexpr):
    """sums + grads * factors, chunk by chunk; no factors stand for ones."""
    new = ()
    for chunk in tl.static_range(C):
        g = grads[chunk]
        new = new + (sums[chunk] + (g if factors is None else g * factors[chunk]),)
    return new


@triton.jit
def _write_sums(part, sums, i, H: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr):
    for chunk in tl.static_range(C):
        tl.store(part + chunk * HALF + i, tl.sum(sums[chunk], 0), mask=_is_real(i, chunk, H, HALF))


def _head_options(num_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    half = rotary_dim // 2
    return {
        "N": num_heads,
        "H": head_dim,
        "HALF": half,
        "BLOCK": 1 << (half - 1).bit_length(),
        "C": -(-head_dim // half),
    }
