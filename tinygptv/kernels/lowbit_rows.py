"""Products of few tokens with packed low-bit weights on cards older than Ampere, with the signatures of ``lowbit``.

Triton uses no tensor cores below compute capability 8.0: a product of tiles becomes multiply-adds for 16 tokens,
however few there are, whose operands go through shared memory. Here each weight is multiplied in registers by the
tokens that there are, and what belongs to one output is added up once at the end: 9 instructions for each 4-bit weight
and one token instead of 29, counted in the machine code for 7.5.

Notation: T tokens, O outputs, I inputs, P parts into which the inputs are divided (their products are added later).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinygptv.kernels import lowbit
from tinygptv.kernels.lowbit import Division, half, launch_4, launch_8, look_up, unpack
from tinygptv.kernels.shapes import PackedWeight

__all__ = ["partial_products", "unpack"]

MOST_ROWS = 4
"""With more tokens tiles take fewer instructions, counted the same way."""
DIVISION = Division(512)
"""Programs that keep the memory of a card of 40 multiprocessors busy."""
ROW_OUTPUTS, ROW_WARPS = 32, 4
"""Outputs and warps of a program, 4 bits."""
ROW8_OUTPUTS, ROW8_INPUTS, ROW8_WARPS = 16, 128, 4
"""The same for 8 bits, and the inputs of a step."""


def partial_products(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply few tokens: [T, I] to float32 [P, T, O], whose sum over P is the product."""
    if len(x_TI) > MOST_ROWS:
        return lowbit.partial_products(x_TI, weight)
    block = triton.next_power_of_2(len(x_TI))
    if weight.table is None:
        sizes = ROW8_OUTPUTS, ROW8_INPUTS
        return launch_8(_rows_8_kernel, x_TI, weight, sizes, DIVISION, BLOCK_T=block, num_warps=ROW8_WARPS)
    return launch_4(_rows_4_kernel, x_TI, weight, ROW_OUTPUTS, DIVISION, BLOCK_T=block, num_warps=ROW_WARPS)


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _rows_4_kernel(
    x, codes, scale, offset, table, products, num_tokens, outputs, inputs, words, steps, groups,
    LOOKUP: tl.constexpr, HAS_OFFSET: tl.constexpr, PLANES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    j = tl.arange(0, 16)
    accumulated = tl.zeros([BLOCK_T, BLOCK_O, 16], tl.float32)
    for block in range(part * steps, min((part + 1) * steps, words // 16)):
        loaded = tl.load(codes + o[:, None] * words + block * 16 + j[None, :], mask=is_output[:, None], other=0)
        pairs = look_up(loaded, table, LOOKUP)
        for first in tl.static_range(0, 8, PLANES):
            product = tl.zeros([BLOCK_T, BLOCK_O, 16], tl.float32)
            total = tl.zeros([BLOCK_T, BLOCK_O, 16], tl.float32)
            for k in tl.static_range(first, first + PLANES):
                token = _read_tokens(x, t, block * 128 + k * 16 + j, is_token, inputs, BLOCK_T, BLOCK_O, 16)
                product += token * half(pairs[k // 2], k % 2)[None, :, :]
                if HAS_OFFSET:
                    total += token
            group = block * (8 // PLANES) + first // PLANES
            factor = tl.load(scale + o * groups + group, mask=is_output, other=0.0).to(tl.float32)
            accumulated += product * factor[None, :, None]
            if HAS_OFFSET:
                added = tl.load(offset + o * groups + group, mask=is_output, other=0.0).to(tl.float32)
                accumulated += total * added[None, :, None]
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    tl.store(products + target, tl.sum(accumulated, 2), mask=is_token[:, None] & is_output[None, :])


@triton.jit
def _read_tokens(
    x, t, i, is_token, inputs, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """Inputs [T, O, I] float32 of all tokens, the same for each output.

    Every thread reads what it multiplies, from the first level of cache; handing it round would take barriers.
    """
    pointers = x + t[:, None, None] * inputs + i[None, None, :]
    mask = is_token[:, None, None] & (i < inputs)[None, None, :]
    shape: tl.constexpr = [BLOCK_T, BLOCK_O, BLOCK_I]
    return tl.load(tl.broadcast_to(pointers, shape), mask=tl.broadcast_to(mask, shape), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _rows_8_kernel(
    x, codes, scale, products, num_tokens, outputs, inputs, steps,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    accumulated = tl.zeros([BLOCK_T, BLOCK_O, INPUTS], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        i = step * INPUTS + tl.arange(0, INPUTS)
        mask = is_output[:, None] & (i < inputs)[None, :]
        weight = tl.load(codes + o[:, None] * inputs + i[None, :], mask=mask, other=0).to(tl.float32)
        accumulated += _read_tokens(x, t, i, is_token, inputs, BLOCK_T, BLOCK_O, INPUTS) * weight[None, :, :]
    factor = tl.load(scale + o, mask=is_output, other=0.0).to(tl.float32)
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    product = tl.sum(accumulated, 2) * factor[None, :]
    tl.store(products + target, product, mask=is_token[:, None] & is_output[None, :])
