"""Triton kernels of a training step that work on rows of the residual stream, with the signatures of
``training_reference``.

Rows of 2,560 numbers are no power of two: a row is read as its largest power of two and the rest (2,048 + 512), so that
no lane idles. All compute in float32. What is summed over tokens (gradients of norm weights) is summed in registers by
few programs that take many rows each, and then over the programs, in a fixed order.

Notation: as in ``training_reference``; P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinygptv.kernels.training_reference import drop_threshold

FORWARD_WARPS, BACKWARD_WARPS = 4, 8
BACKWARD_PROGRAMS = 2
"""Programs per multiprocessor that share the rows in the backward pass: as many as fit with 128 registers."""
DROP_BLOCK = 2048


def num_programs(x: Tensor, per_multiprocessor: int) -> int:
    """Programs that run at the same time on the tensor's GPU; a few in Triton's interpreter."""
    if not x.is_cuda:
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(x.device).multi_processor_count


@triton.jit
def _is_kept(key, index, THRESHOLD: tl.constexpr):
    """Whether dropout keeps the element; see ``training_reference.is_kept``."""
    x = index.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) ^ (key >> 32).to(tl.uint32)
    x = x * 0x846CA68B
    return (x ^ (x >> 16)) >= THRESHOLD


@triton.jit
def _load(start, d, D: tl.constexpr):
    return tl.load(start + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _store(start, d, x, D: tl.constexpr):
    tl.store(start + d, x.to(start.dtype.element_ty), mask=d < D)


def norm_and_drop(
    hidden: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, seeds: Tensor, site: int, p: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See ``training_reference.norm_and_drop``."""
    width = hidden.shape[-1]
    num_rows = hidden.numel() // width
    normed = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    dropped = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if p else None
    mean = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    _norm_and_drop_kernel[(num_rows,)](
        hidden, weight_D, bias_D, seeds, normed, normed if dropped is None else dropped, mean, rstd, eps,
        1 / (1 - p), SITE=site, THRESHOLD=drop_threshold(p), num_warps=FORWARD_WARPS, **_row_options(width),
    )  # fmt: skip
    return normed, dropped, mean, rstd


@triton.jit
def _norm_and_drop_kernel(
    hidden, weight, bias, seeds, normed, dropped, means, rstds, eps, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SITE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    eps, scale = tl.cast(eps, tl.float32), tl.cast(scale, tl.float32)  # torch.compile passes float64
    row = tl.program_id(0).to(tl.int64)
    start = row * D
    key = tl.load(seeds + SITE)
    d = tl.arange(0, HEAD)
    x = _load(hidden + start, d, D)
    total = tl.sum(x, 0)
    if TAIL > 0:
        e = HEAD + tl.arange(0, TAIL)
        y = _load(hidden + start, e, D)
        total += tl.sum(y, 0)
    mean = total / D
    x = x - mean
    squares = tl.sum(x * x, 0)
    if TAIL > 0:
        y = tl.where(e < D, y - mean, 0.0)
        squares += tl.sum(y * y, 0)
    rstd = tl.rsqrt(squares / D + eps)
    _write_normed(x * rstd, weight, bias, key, normed, dropped, start, d, scale, D, THRESHOLD)
    if TAIL > 0:
        _write_normed(y * rstd, weight, bias, key, normed, dropped, start, e, scale, D, THRESHOLD)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@triton.jit
def _write_normed(x, weight, bias, key, normed, dropped, start, d, scale, D: tl.constexpr, THRESHOLD: tl.constexpr):
    x = (x * _load(weight, d, D) + _load(bias, d, D)).to(normed.dtype.element_ty)
    _store(normed + start, d, x, D)
    if THRESHOLD > 0:
        kept = tl.where(_is_kept(key, start + d, THRESHOLD), x.to(tl.float32) * scale, 0.0)
        _store(dropped + start, d, kept, D)


def norm_and_drop_backward(
    hidden: Tensor,
    weight_D: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    seeds: Tensor,
    site: int,
    p: float,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weight_trains: bool,
    bias_trains: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``training_reference.norm_and_drop_backward``."""
    width = hidden.shape[-1]
    passed, first, second, dropped = grads
    programs = num_programs(hidden, BACKWARD_PROGRAMS)
    output = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    weight_parts = torch.empty((programs, width), dtype=torch.float32, device=hidden.device) if weight_trains else None
    bias_parts = torch.empty((programs, width), dtype=torch.float32, device=hidden.device) if bias_trains else None
    _norm_and_drop_backward_kernel[(programs,)](
        hidden, weight_D, mean_T, rstd_T, seeds, passed, first, second, first if dropped is None else dropped, output,
        output if weight_parts is None else weight_parts, output if bias_parts is None else bias_parts,
        hidden.numel() // width, 1 / (1 - p),
        SITE=site, THRESHOLD=drop_threshold(p), WEIGHT_TRAINS=weight_trains, BIAS_TRAINS=bias_trains,
        P=programs, num_warps=BACKWARD_WARPS, **_row_options(width),
    )  # fmt: skip
    return output, _sum(weight_parts), _sum(bias_parts)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_and_drop_backward_kernel(
    hidden, weight, means, rstds, seeds, passed, first, second, dropped, output, weight_parts, bias_parts,
    num_rows, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SITE: tl.constexpr, THRESHOLD: tl.constexpr,
    WEIGHT_TRAINS: tl.constexpr, BIAS_TRAINS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)  # torch.compile passes float64
    program = tl.program_id(0)
    key = tl.load(seeds + SITE)
    d = tl.arange(0, HEAD)
    w = _load(weight, d, D)
    weight_sum, bias_sum = tl.zeros([HEAD], tl.float32), tl.zeros([HEAD], tl.float32)
    if TAIL > 0:
        e = HEAD + tl.arange(0, TAIL)
        v = _load(weight, e, D)
        weight_rest, bias_rest = tl.zeros([TAIL], tl.float32), tl.zeros([TAIL], tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, num_rows, P):
        start = row * D
        mean, rstd = tl.load(means + row), tl.load(rstds + row)
        x = (_load(hidden + start, d, D) - mean) * rstd
        g = _normed_gradient(first, second, dropped, key, start, d, scale, D, THRESHOLD)
        along = tl.sum(w * g * x, 0)
        total = tl.sum(w * g, 0)
        if TAIL > 0:
            y = (_load(hidden + start, e, D) - mean) * rstd
            h = _normed_gradient(first, second, dropped, key, start, e, scale, D, THRESHOLD)
            along += tl.sum(v * h * y, 0)
            total += tl.sum(v * h, 0)
        along, total = along / D, total / D
        _store(output + start, d, (w * g - total - x * along) * rstd + _load(passed + start, d, D), D)
        if WEIGHT_TRAINS:
            weight_sum += g * x
        if BIAS_TRAINS:
            bias_sum += g
        if TAIL > 0:
            _store(output + start, e, (v * h - total - y * along) * rstd + _load(passed + start, e, D), D)
            if WEIGHT_TRAINS:
                weight_rest += h * y
            if BIAS_TRAINS:
                bias_rest += h
        row += P
    if WEIGHT_TRAINS:
        _store(weight_parts + program * D, d, weight_sum, D)
        if TAIL > 0:
            _store(weight_parts + program * D, e, weight_rest, D)
    if BIAS_TRAINS:
        _store(bias_parts + program * D, d, bias_sum, D)
        if TAIL > 0:
            _store(bias_parts + program * D, e, bias_rest, D)


@triton.jit
def _normed_gradient(first, second, dropped, key, start, d, scale, D: tl.constexpr, THRESHOLD: tl.constexpr):
    g = _load(first + start, d, D) + _load(second + start, d, D)
    if THRESHOLD > 0:
        g += tl.where(_is_kept(key, start + d, THRESHOLD), _load(dropped + start, d, D) * scale, 0.0)
    return g


def add_branches(
    hidden: Tensor,
    attention: Tensor,
    rms_weight_D: Tensor,
    rms_eps: float,
    mlp: Tensor,
    seeds: Tensor,
    sites: tuple[int, int],
    p: float,
) -> tuple[Tensor, Tensor]:
    """See ``training_reference.add_branches``."""
    width = hidden.shape[-1]
    num_rows = hidden.numel() // width
    output = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    _add_branches_kernel[(num_rows,)](
        hidden, attention, rms_weight_D, mlp, seeds, output, rstd, rms_eps, 1 / (1 - p),
        ATTENTION_SITE=sites[0], MLP_SITE=sites[1], THRESHOLD=drop_threshold(p), num_warps=FORWARD_WARPS,
        **_row_options(width),
    )  # fmt: skip
    return output, rstd


@triton.jit
def _add_branches_kernel(
    hidden, attention, weight, mlp, seeds, output, rstds, eps, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    ATTENTION_SITE: tl.constexpr, MLP_SITE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    eps, scale = tl.cast(eps, tl.float32), tl.cast(scale, tl.float32)  # torch.compile passes float64
    row = tl.program_id(0).to(tl.int64)
    start = row * D
    attention_key, mlp_key = tl.load(seeds + ATTENTION_SITE), tl.load(seeds + MLP_SITE)
    d = tl.arange(0, HEAD)
    a = _load(attention + start, d, D)
    squares = tl.sum(a * a, 0)
    if TAIL > 0:
        e = HEAD + tl.arange(0, TAIL)
        b = _load(attention + start, e, D)
        squares += tl.sum(b * b, 0)
    rstd = tl.rsqrt(squares / D + eps)
    _write_sum(a * rstd, hidden, weight, mlp, attention_key, mlp_key, output, start, d, scale, D, THRESHOLD)
    if TAIL > 0:
        _write_sum(b * rstd, hidden, weight, mlp, attention_key, mlp_key, output, start, e, scale, D, THRESHOLD)
    tl.store(rstds + row, rstd)


@triton.jit
def _write_sum(
    a, hidden, weight, mlp, attention_key, mlp_key, output, start, d, scale, D: tl.constexpr, THRESHOLD: tl.constexpr
):
    a = a * _load(weight, d, D)
    m = _load(mlp + start, d, D)
    if THRESHOLD > 0:
        a = tl.where(_is_kept(attention_key, start + d, THRESHOLD), a * scale, 0.0)
        m = tl.where(_is_kept(mlp_key, start + d, THRESHOLD), m * scale, 0.0)
    _store(output + start, d, a + m + _load(hidden + start, d, D), D)


def add_branches_backward(
    grad: Tensor,
    attention: Tensor,
    rms_weight_D: Tensor,
    rstd_T: Tensor,
    seeds: Tensor,
    sites: tuple[int, int],
    p: float,
    weight_trains: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``training_reference.add_branches_backward``."""
    width = grad.shape[-1]
    programs = num_programs(grad, BACKWARD_PROGRAMS)
    to_attention, to_mlp = torch.empty_like(attention), torch.empty_like(attention)
    parts = torch.empty((programs, width), dtype=torch.float32, device=grad.device) if weight_trains else None
    _add_branches_backward_kernel[(programs,)](
        grad, attention, rms_weight_D, rstd_T, seeds, to_attention, to_mlp, grad if parts is None else parts,
        grad.numel() // width, 1 / (1 - p),
        ATTENTION_SITE=sites[0], MLP_SITE=sites[1], THRESHOLD=drop_threshold(p), WEIGHT_TRAINS=weight_trains,
        P=programs, num_warps=BACKWARD_WARPS, **_row_options(width),
    )  # fmt: skip
    return to_attention, to_mlp, _sum(parts)


@triton.jit(do_not_specialize=["num_rows"])
def _add_branches_backward_kernel(
    grad, attention, weight, rstds, seeds, to_attention, to_mlp, weight_parts, num_rows, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    ATTENTION_SITE: tl.constexpr, MLP_SITE: tl.constexpr, THRESHOLD: tl.constexpr,
    WEIGHT_TRAINS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)  # torch.compile passes float64
    program = tl.program_id(0)
    attention_key, mlp_key = tl.load(seeds + ATTENTION_SITE), tl.load(seeds + MLP_SITE)
    d = tl.arange(0, HEAD)
    w = _load(weight, d, D)
    weight_sum = tl.zeros([HEAD], tl.float32)
    if TAIL > 0:
        e = HEAD + tl.arange(0, TAIL)
        v = _load(weight, e, D)
        weight_rest = tl.zeros([TAIL], tl.float32)
    row = program.to(tl.int64)
    for _ in range(program, num_rows, P):
        start = row * D
        rstd = tl.load(rstds + row)
        a = _load(attention + start, d, D) * rstd
        g = _branch_gradients(grad, to_mlp, attention_key, mlp_key, start, d, scale, D, THRESHOLD)
        along = tl.sum(w * g * a, 0)
        if TAIL > 0:
            b = _load(attention + start, e, D) * rstd
            h = _branch_gradients(grad, to_mlp, attention_key, mlp_key, start, e, scale, D, THRESHOLD)
            along += tl.sum(v * h * b, 0)
        along = along / D
        _store(to_attention + start, d, (w * g - a * along) * rstd, D)
        if WEIGHT_TRAINS:
            weight_sum += g * a
        if TAIL > 0:
            _store(to_attention + start, e, (v * h - b * along) * rstd, D)
            if WEIGHT_TRAINS:
                weight_rest += h * b
        row += P
    if WEIGHT_TRAINS:
        _store(weight_parts + program * D, d, weight_sum, D)
        if TAIL > 0:
            _store(weight_parts + program * D, e, weight_rest, D)


@triton.jit
def _branch_gradients(grad, to_mlp, attention_key, mlp_key, start, d, scale, D: tl.constexpr, THRESHOLD: tl.constexpr):
    """Write the MLP branch's gradient; return that of the normalised attention branch."""
    g = _load(grad + start, d, D)
    m = g
    if THRESHOLD > 0:
        m = tl.where(_is_kept(mlp_key, start + d, THRESHOLD), g * scale, 0.0)
        g = tl.where(_is_kept(attention_key, start + d, THRESHOLD), g * scale, 0.0)
    _store(to_mlp + start, d, m, D)
    return g


def drop(x: Tensor, seeds: Tensor, site: int, p: float) -> Tensor:
    """See ``training_reference.drop``."""
    output = torch.empty_like(x)
    _drop_kernel[(triton.cdiv(x.numel(), DROP_BLOCK),)](
        x, x, seeds, output, x.numel(), 1 / (1 - p), SITE=site, THRESHOLD=drop_threshold(p), ADDS=False,
        BLOCK=DROP_BLOCK, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return output


def drop_backward(passed: Tensor, dropped: Tensor, seeds: Tensor, site: int, p: float) -> Tensor:
    """See ``training_reference.drop_backward``."""
    output = torch.empty_like(dropped)
    _drop_kernel[(triton.cdiv(dropped.numel(), DROP_BLOCK),)](
        dropped, passed, seeds, output, dropped.numel(), 1 / (1 - p), SITE=site, THRESHOLD=drop_threshold(p), ADDS=True,
        BLOCK=DROP_BLOCK, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return output


@triton.jit
def _drop_kernel(
    x, addend, seeds, output, count, scale,
    SITE: tl.constexpr, THRESHOLD: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)  # torch.compile passes float64
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_real = index < count
    y = tl.load(x + index, mask=is_real, other=0.0).to(tl.float32) * scale
    y = tl.where(_is_kept(tl.load(seeds + SITE), index, THRESHOLD), y, 0.0)
    if ADDS:
        y += tl.load(addend + index, mask=is_real, other=0.0).to(tl.float32)
    tl.store(output + index, y.to(output.dtype.element_ty), mask=is_real)


def _row_options(width: int) -> dict[str, int]:
    """A row's largest power of two, and a power of two that holds the rest."""
    head = 1 << (width.bit_length() - 1)
    rest = width - head
    return {"D": width, "HEAD": head, "TAIL": 1 << (rest - 1).bit_length() if rest else 0}


def _sum(parts_PD: Tensor | None) -> Tensor | None:
    return None if parts_PD is None else parts_PD.sum(0)
