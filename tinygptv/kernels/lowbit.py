"""Products with packed low-bit weights, and unpacking them; Triton.

A step of few tokens reads every weight once, so it is as fast as its weights are small: the kernels unpack weights in
registers. ``PackedWeight`` describes the layout. A table of 16 values is looked up by byte permutations (PTX ``prmt``),
four codes at a time: loads from memory, even from its fastest level, would take longer than the product.

Notation: T tokens, O outputs, I inputs, P parts into which the inputs are divided (their products are added later).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tinygptv.kernels.shapes import BLOCK_INPUTS, BLOCK_WORDS, PackedWeight


class Division(NamedTuple):
    """How a product is divided among programs.

    Attributes:
        programs: so many keep the card busy; the inputs are divided until there are.
        most_parts: of the inputs; their products are written and read once more.
        least_steps: of a program; shorter ones are all start and end.
    """

    programs: int
    most_parts: int = 8
    least_steps: int = 2


DIVISION, FEW_TOKENS, FEW_DIVISION = Division(1056), 16, Division(1056, most_parts=16)
"""4 bits: eight programs for each multiprocessor of a large GPU; other parts where few tokens' products are small."""
DIVISION8 = Division(480, least_steps=5)
"""8 bits."""

TILE_OUTPUTS, TILE_WARPS, TILE_STAGES = 64, 4, 2
"""Outputs, warps and pipeline stages of a program, 4 bits."""
TILE8_OUTPUTS, TILE8_INPUTS, TILE8_WARPS, TILE8_STAGES = 32, 128, 4, 3
"""The same for 8 bits, and the inputs of a step."""


def partial_products(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply few tokens: [T, I] to float32 [P, T, O], whose sum over P is the product."""
    block = max(16, triton.next_power_of_2(len(x_TI)))
    if weight.table is None:
        return launch_8(
            _tile_8_kernel, x_TI, weight, (TILE8_OUTPUTS, TILE8_INPUTS), DIVISION8,
            BLOCK_T=block, num_warps=TILE8_WARPS, num_stages=TILE8_STAGES,
        )  # fmt: skip
    table_dtype = torch.float16 if x_TI.dtype == torch.float16 else torch.bfloat16
    return launch_4(
        _tile_4_kernel, x_TI, weight, TILE_OUTPUTS, FEW_DIVISION if len(x_TI) <= FEW_TOKENS else DIVISION, table_dtype,
        BLOCK_T=block, num_warps=TILE_WARPS, num_stages=TILE_STAGES,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 4 bits


def launch_4(
    kernel: Any, x_TI: Tensor, weight: PackedWeight, block_outputs: int, division: Division,
    table_dtype: torch.dtype = torch.bfloat16, **options: int,
) -> Tensor:  # fmt: skip
    """Run a kernel with the arguments of ``_tile_4_kernel``.

    Args:
        kernel: each of its programs takes some outputs and a part of the inputs.
        x_TI: tokens.
        weight: of 4 bits.
        block_outputs: outputs of a program.
        division: among programs.
        table_dtype: 16-bit dtype in which the kernel looks the table up.
        options: ``BLOCK_T``, and how the kernel is compiled.

    Returns:
        float32 [P, T, O].
    """
    num_tokens = len(x_TI)
    outputs, words = weight.codes.shape
    parts, steps = _parts(outputs, block_outputs, words, BLOCK_WORDS, division)
    products = torch.empty(parts, num_tokens, outputs, dtype=torch.float32, device=x_TI.device)
    kernel[(triton.cdiv(outputs, block_outputs), parts)](
        x_TI, weight.codes, weight.scale, _or(weight.offset, weight.scale), _table(weight, table_dtype), products,
        num_tokens, outputs, weight.inputs, words, steps, weight.scale.shape[1], LOOKUP=_lookup(weight, table_dtype),
        HAS_OFFSET=weight.offset is not None, PLANES=weight.group // BLOCK_WORDS, BLOCK_O=block_outputs, **options,
    )  # fmt: skip
    return products


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _tile_4_kernel(
    x, codes, scale, offset, table, products, num_tokens, outputs, inputs, words, steps, groups,
    LOOKUP: tl.constexpr, HAS_OFFSET: tl.constexpr, PLANES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    j = tl.arange(0, 16)
    accumulated = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for block in range(part * steps, min((part + 1) * steps, words // 16)):
        loaded = tl.load(codes + o[None, :] * words + block * 16 + j[:, None], mask=is_output[None, :], other=0)
        pairs = look_up(loaded, table, LOOKUP)
        for first in tl.static_range(0, 8, PLANES):
            product = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
            total = tl.zeros([BLOCK_T], tl.float32)
            for k in tl.static_range(first, first + PLANES):
                i = block * 128 + k * 16 + j
                mask = is_token[:, None] & (i < inputs)[None, :]
                token = tl.load(x + t[:, None] * inputs + i[None, :], mask=mask, other=0.0)
                plane = _half_of(pairs[k // 2], k % 2, x.dtype.element_ty)
                product = tl.dot(token, plane, product, input_precision="ieee")
                if HAS_OFFSET:
                    total += tl.sum(token.to(tl.float32), 1)
            group = block * (8 // PLANES) + first // PLANES
            factor = tl.load(scale + o * groups + group, mask=is_output, other=0.0).to(tl.float32)
            accumulated += product * factor[None, :]
            if HAS_OFFSET:
                added = tl.load(offset + o * groups + group, mask=is_output, other=0.0).to(tl.float32)
                accumulated += total[:, None] * added[None, :]
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    tl.store(products + target, accumulated, mask=is_token[:, None] & is_output[None, :])


@triton.jit
def look_up(words, table, LOOKUP: tl.constexpr):
    """Eight codes of each word as 16-bit numbers, two in each of four int32."""
    if LOOKUP != "":
        return tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    return (
        tl.load(table + (words & 15)) | (tl.load(table + ((words >> 4) & 15)) << 16),
        tl.load(table + ((words >> 8) & 15)) | (tl.load(table + ((words >> 12) & 15)) << 16),
        tl.load(table + ((words >> 16) & 15)) | (tl.load(table + ((words >> 20) & 15)) << 16),
        tl.load(table + ((words >> 24) & 15)) | (tl.load(table + ((words >> 28) & 15)) << 16),
    )


@triton.jit
def half(pair, which: tl.constexpr):
    """One of the two bfloat16 numbers in an int32, as float32."""
    bits = pair & -65536 if which else pair << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _half_of(pair, which: tl.constexpr, dtype: tl.constexpr):
    """One of the two numbers in an int32: those of a 16-bit dtype are its own, others come from bfloat16."""
    if dtype.primitive_bitwidth == 16:
        return (pair >> 16 * which).to(tl.int16).to(dtype, bitcast=True)
    return half(pair, which).to(dtype)


_known_tables: MutableMapping[Tensor, dict[torch.dtype, tuple[Tensor, str]]] = WeakTensorKeyDictionary()
"""By the tensor itself, and as long as it lives: memory of one that is gone is given to others."""


def _table(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The table as int32 bit patterns of 16-bit numbers, for kernels that look it up in memory."""
    return _known(weight, dtype)[0]


def _lookup(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> str:
    """PTX that looks the table up in registers; empty where Triton interprets instead of compiling."""
    return "" if not weight.codes.is_cuda else _known(weight, dtype)[1]


def _known(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, str]:
    """The table's values are those of bfloat16, in whichever dtype."""
    table = weight.table
    assert table is not None, "only 4-bit weights have a table"
    forms = _known_tables.setdefault(table, {})
    if dtype not in forms:
        bits = table.bfloat16().to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
        forms[dtype] = bits, lookup_ptx(tuple(bits.tolist()))
    return forms[dtype]


@cache
def lookup_ptx(bits: tuple[int, ...]) -> str:
    """PTX that turns a word of eight codes into four pairs of 16-bit numbers.

    ``prmt`` picks four bytes out of eight by the lower three bits of four codes: once for the table's first half, once
    for its second, and once more to choose between both by the codes' highest bits; the same for the upper bytes.

    Args:
        bits: the table's 16 numbers.
    """
    low, high = ([f"0x{_four(bits, shift, i):08x}" for i in range(0, 16, 4)] for shift in (0, 8))
    lines = [".reg .b32 s, m, a, b, lo, hi;", "and.b32 s, $4, 0x77777777;"]
    lines += ["shr.b32 m, $4, 1;", "and.b32 m, m, 0x44444444;", "or.b32 m, m, 0x32103210;"]
    for half in range(2):
        if half:
            lines += ["shr.b32 s, s, 16;", "shr.b32 m, m, 16;"]
        for name, table in (("lo", low), ("hi", high)):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, s;",
                f"prmt.b32 b, {table[2]}, {table[3]}, s;",
                f"prmt.b32 {name}, a, b, m;",
            ]
        lines += [f"prmt.b32 ${2 * half}, lo, hi, 0x5140;", f"prmt.b32 ${2 * half + 1}, lo, hi, 0x7362;"]
    return "{ " + " ".join(lines) + " }"


def _four(bits: tuple[int, ...], shift: int, first: int) -> int:
    """Four bytes of the table in one number."""
    return sum(((bits[first + i] >> shift) & 0xFF) << (8 * i) for i in range(4))


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in ``dtype``."""
    if weight.table is None:
        return weight.codes.to(dtype) * weight.scale.to(dtype)
    outputs, words = weight.codes.shape
    matrix = torch.empty(outputs, weight.inputs, dtype=dtype, device=weight.codes.device)
    block = 256
    _unpack_kernel[(outputs, triton.cdiv(words, block))](
        weight.codes, weight.scale, _or(weight.offset, weight.scale), _table(weight), matrix, weight.inputs, words,
        weight.scale.shape[1], LOOKUP=_lookup(weight), HAS_OFFSET=weight.offset is not None,
        PLANES=weight.group // BLOCK_WORDS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return matrix


@triton.jit
def _unpack_kernel(
    codes, scale, offset, table, matrix, inputs, words, groups, LOOKUP: tl.constexpr, HAS_OFFSET: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    block = w // 16
    pairs = look_up(tl.load(codes + row * words + w, mask=w < words, other=0), table, LOOKUP)
    for k in tl.static_range(8):
        i = block * 128 + k * 16 + w % 16
        is_real = i < inputs
        group = row * groups + block * (8 // PLANES) + k // PLANES
        value = half(pairs[k // 2], k % 2) * tl.load(scale + group, mask=is_real, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            value += tl.load(offset + group, mask=is_real, other=0.0).to(tl.float32)
        tl.store(matrix + row * inputs + i, value.to(matrix.dtype.element_ty), mask=is_real)


# ---------------------------------------------------------------------------------------------------- 8 bits


def launch_8(
    kernel: Any, x_TI: Tensor, weight: PackedWeight, block: tuple[int, int], division: Division, **options: int
) -> Tensor:
    """As ``launch_4`` for 8 bits, with the arguments of ``_tile_8_kernel``; block: outputs, and inputs of a step."""
    num_tokens = len(x_TI)
    outputs, inputs = weight.shape
    parts, steps = _parts(outputs, block[0], inputs, block[1], division)
    products = torch.empty(parts, num_tokens, outputs, dtype=torch.float32, device=x_TI.device)
    kernel[(triton.cdiv(outputs, block[0]), parts)](
        x_TI, weight.codes, weight.scale, products, num_tokens, outputs, inputs, steps,
        BLOCK_O=block[0], INPUTS=block[1], **options,
    )  # fmt: skip
    return products


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _tile_8_kernel(
    x, codes, scale, products, num_tokens, outputs, inputs, steps,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    is_token, is_output = t < num_tokens, o < outputs
    accumulated = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        i = step * INPUTS + tl.arange(0, INPUTS)
        is_input = i < inputs
        weight = tl.load(codes + o[None, :] * inputs + i[:, None], mask=is_output[None, :] & is_input[:, None], other=0)
        token = tl.load(x + t[:, None] * inputs + i[None, :], mask=is_token[:, None] & is_input[None, :], other=0.0)
        accumulated = tl.dot(token, weight.to(x.dtype.element_ty), accumulated, input_precision="ieee")
    factor = tl.load(scale + o, mask=is_output, other=0.0).to(tl.float32)
    target = (part * num_tokens + t[:, None]).to(tl.int64) * outputs + o[None, :]
    tl.store(products + target, accumulated * factor[None, :], mask=is_token[:, None] & is_output[None, :])


def _parts(outputs: int, block_outputs: int, length: int, step: int, division: Division) -> tuple[int, int]:
    """Into how many parts the inputs are divided so that enough programs run, and the steps of each part."""
    blocks, steps, parts = triton.cdiv(outputs, block_outputs), triton.cdiv(length, step), 1
    programs, most_parts, least_steps = division
    while parts < most_parts and parts * blocks < programs and parts * 2 * least_steps <= steps:
        parts *= 2
    return parts, triton.cdiv(steps, parts)


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor


assert (BLOCK_INPUTS, BLOCK_WORDS) == (128, 16), "the kernels count on it"
