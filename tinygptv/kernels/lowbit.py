"""Products with packed low-bit weights, and unpacking them; Triton.

A step of few tokens reads every weight once, so it is as fast as its weights are small: the kernel unpacks weights in
registers. ``PackedWeight`` describes the formats.

Notation: T tokens, O outputs, I inputs, P parts into which the inputs are divided (their products are added later).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinygptv.kernels.shapes import PackedWeight

MOST_TOKENS = 64
"""Beyond so many tokens unpacking the matrix once and multiplying plainly is faster."""

WANTED_PROGRAMS = 528
"""Four for each multiprocessor of a large GPU: enough reads in flight to keep its memory busy."""
MOST_PARTS = 8

TILE_OUTPUTS, TILE_WARPS, TILE_STAGES = 16, 4, 4
"""Outputs, warps and pipeline stages of a program for several tokens."""
ROW_BLOCK, ROW_BYTES, ROW_WARPS = 4, 512, 4
"""Rows and bytes of a row that a program reads at a time for one token: 16 bytes a thread."""


def partial_products(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply few tokens: [T, I] to float32 [P, T, O], whose sum over P is the product."""
    if len(x_TI) == 1:
        return _row_products(x_TI, weight)
    num_tokens = len(x_TI)
    outputs, inputs = weight.shape
    block_o = TILE_OUTPUTS
    block_t = max(16, triton.next_power_of_2(num_tokens))
    step = _inputs_per_step(weight)
    parts = _parts(triton.cdiv(outputs, block_o), triton.cdiv(inputs, step))
    products = torch.empty(parts, num_tokens, outputs, dtype=torch.float32, device=x_TI.device)
    steps = triton.cdiv(triton.cdiv(inputs, step), parts)
    kernel = _int8_kernel if weight.kind == "int8" else _int4_kernel
    kernel[(triton.cdiv(outputs, block_o), parts)](
        x_TI, weight.codes, weight.scale, _or(weight.offset, weight.scale), _or(weight.table, weight.scale), products,
        num_tokens, outputs, inputs, steps,
        GROUP=weight.group if weight.kind != "int8" else step,
        BLOCK_T=block_t, BLOCK_O=block_o, STEP=step, IS_TABLE=weight.kind == "nf4",
        num_warps=TILE_WARPS, num_stages=TILE_STAGES,
    )  # fmt: skip
    return products


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _int4_kernel(
    x, codes, scale, offset, table, products, num_tokens, outputs, inputs, steps,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, STEP: tl.constexpr, IS_TABLE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    half = tl.arange(0, GROUP // 2)
    num_groups = inputs // GROUP
    accumulated = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for group in range(part * steps, min((part + 1) * steps, num_groups)):
        packed = tl.load(
            codes + o[None, :].to(tl.int64) * (inputs // 2) + group * (GROUP // 2) + half[:, None],
            mask=is_output[None, :], other=0,
        )  # fmt: skip
        place = t[:, None] * inputs + group * GROUP + 2 * half[None, :]
        even = tl.load(x + place, mask=is_token[:, None], other=0.0)
        odd = tl.load(x + place + 1, mask=is_token[:, None], other=0.0)
        high, low = (packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)
        if IS_TABLE:
            product = tl.dot(even, tl.load(table + high).to(x.dtype.element_ty), input_precision="ieee")
            product = tl.dot(odd, tl.load(table + low).to(x.dtype.element_ty), product, input_precision="ieee")
        else:
            product = tl.dot(even, (high - 8).to(x.dtype.element_ty), input_precision="ieee")
            product = tl.dot(odd, (low - 8).to(x.dtype.element_ty), product, input_precision="ieee")
        factor = tl.load(scale + o * num_groups + group, mask=is_output, other=0.0).to(tl.float32)
        accumulated += product * factor[None, :]
        if not IS_TABLE:
            added = tl.load(offset + o * num_groups + group, mask=is_output, other=0.0).to(tl.float32)
            total = tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)
            accumulated += total[:, None] * added[None, :]
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    tl.store(products + target, accumulated, mask=is_token[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _int8_kernel(
    x, codes, scale, offset, table, products, num_tokens, outputs, inputs, steps,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, STEP: tl.constexpr, IS_TABLE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    accumulated = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        i = step * STEP + tl.arange(0, STEP)
        is_input = i < inputs
        weight = tl.load(
            codes + o[None, :].to(tl.int64) * inputs + i[:, None], mask=is_output[None, :] & is_input[:, None], other=0
        )
        tokens = tl.load(x + t[:, None] * inputs + i[None, :], mask=is_token[:, None] & is_input[None, :], other=0.0)
        accumulated = tl.dot(tokens, weight.to(x.dtype.element_ty), accumulated, input_precision="ieee")
    factor = tl.load(scale + o, mask=is_output, other=0.0).to(tl.float32)
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    tl.store(products + target, accumulated * factor[None, :], mask=is_token[:, None] & is_output[None, :])


def _row_products(x_1I: Tensor, weight: PackedWeight) -> Tensor:
    """``partial_products`` of one token, without tensor cores: each thread adds up its own share of a row."""
    outputs, columns = weight.codes.shape
    parts = _parts(triton.cdiv(outputs, ROW_BLOCK), triton.cdiv(columns, ROW_BYTES))
    steps = triton.cdiv(triton.cdiv(columns, ROW_BYTES), parts)
    products = torch.empty(parts, 1, outputs, dtype=torch.float32, device=x_1I.device)
    _row_kernel[(triton.cdiv(outputs, ROW_BLOCK), parts)](
        x_1I, weight.codes, weight.scale, _or(weight.offset, weight.scale), _or(weight.table, weight.scale), products,
        outputs, columns, steps, GROUP_BYTES=columns if weight.kind == "int8" else weight.group // 2,
        BLOCK_O=ROW_BLOCK, BYTES=ROW_BYTES, KIND=weight.kind, num_warps=ROW_WARPS,
    )  # fmt: skip
    return products


@triton.jit(do_not_specialize=["steps"])
def _row_kernel(
    x, codes, scale, offset, table, products, outputs, columns, steps,
    GROUP_BYTES: tl.constexpr, BLOCK_O: tl.constexpr, BYTES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    is_output = o < outputs
    num_groups = columns // GROUP_BYTES
    accumulated = tl.zeros([BLOCK_O, BYTES], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        i = step * BYTES + tl.arange(0, BYTES)
        mask = is_output[:, None] & (i < columns)[None, :]
        packed = tl.load(codes + o[:, None].to(tl.int64) * columns + i[None, :], mask=mask, other=0)
        if KIND == "int8":
            tokens = tl.load(x + i, mask=i < columns, other=0.0).to(tl.float32)
            accumulated += packed.to(tl.float32) * tokens[None, :]
        else:
            j = step * 2 * BYTES + tl.arange(0, 2 * BYTES)
            tokens = tl.load(x + j, mask=j < 2 * columns, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(tokens, [BYTES, 2]))
            place = o[:, None] * num_groups + (i // GROUP_BYTES)[None, :]
            factor = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
            high, low = (packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)
            if KIND == "nf4":
                product = tl.load(table + high) * even[None, :] + tl.load(table + low) * odd[None, :]
                accumulated += product * factor
            else:
                added = tl.load(offset + place, mask=mask, other=0.0).to(tl.float32)
                product = (high - 8).to(tl.float32) * even[None, :] + (low - 8).to(tl.float32) * odd[None, :]
                accumulated += product * factor + added * (even + odd)[None, :]
    result = tl.sum(accumulated, 1)
    if KIND == "int8":
        result *= tl.load(scale + o, mask=is_output, other=0.0).to(tl.float32)
    tl.store(products + part * outputs + o, result, mask=is_output)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in ``dtype``."""
    outputs, inputs = weight.shape
    if weight.kind == "int8":
        return (weight.codes.to(dtype) * weight.scale.to(dtype)).view(outputs, inputs)
    matrix = torch.empty(outputs, inputs, dtype=dtype, device=weight.codes.device)
    block = 1024
    _unpack_kernel[(outputs, triton.cdiv(inputs // 2, block))](
        weight.codes, weight.scale, _or(weight.offset, weight.scale), _or(weight.table, weight.scale), matrix, inputs,
        GROUP=weight.group, BLOCK=block, IS_TABLE=weight.kind == "nf4", num_warps=4,
    )  # fmt: skip
    return matrix


@triton.jit
def _unpack_kernel(
    codes, scale, offset, table, matrix, inputs, GROUP: tl.constexpr, BLOCK: tl.constexpr, IS_TABLE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = i < inputs // 2
    packed = tl.load(codes + row * (inputs // 2) + i, mask=is_real, other=0)
    group = row * (inputs // GROUP) + i // (GROUP // 2)
    factor = tl.load(scale + group, mask=is_real, other=0.0).to(tl.float32)
    high, low = (packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)
    if IS_TABLE:
        first, second = tl.load(table + high) * factor, tl.load(table + low) * factor
    else:
        added = tl.load(offset + group, mask=is_real, other=0.0).to(tl.float32)
        first, second = (high - 8).to(tl.float32) * factor + added, (low - 8).to(tl.float32) * factor + added
    both = tl.interleave(first, second)
    places = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(matrix + row * inputs + places, both.to(matrix.dtype.element_ty), mask=places < inputs)


def _inputs_per_step(weight: PackedWeight) -> int:
    return 128 if weight.kind == "int8" else weight.group


def _parts(blocks: int, steps: int) -> int:
    """Into how many parts the inputs are divided so that enough programs run."""
    parts = 1
    while parts < MOST_PARTS and parts * blocks < WANTED_PROGRAMS and parts * 2 <= steps:
        parts *= 2
    return parts


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor
