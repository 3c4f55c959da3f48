"""What an image encoder with 8-bit weights does between its products on CPUs, by the C functions of ``host_encoder.c``.

The products (``host_linear``) take rows that were rounded to 8 bits, each with a scale of its own.

Notation: N rows of an image, M rows, W width of a row, H heads, C width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinygptv.kernels.host_library import BLOCK, address, host_library, loaded_library

MAX_HEAD_WIDTH = 96


@dataclass(frozen=True)
class RoundedRows:
    """Rows of 8 bits: ``(numbers - 128) * scale``."""

    numbers: Tensor
    """uint8 [M, W]."""
    scale: Tensor
    """float32 [M]."""


def has_host_encoder(width: int) -> bool:
    """Whether rows of this width have a kernel on this machine."""
    return width % BLOCK == 0 and hasattr(host_library(), "encoder_rows")


def has_encoder_attention(head_width: int) -> bool:
    """Whether heads of this width have a kernel on this machine (AVX-512 BF16)."""
    return head_width % 2 == 0 and head_width <= MAX_HEAD_WIDTH and hasattr(host_library(), "encoder_attention")


def round_rows(
    rows: Tensor, norm: nn.LayerNorm | None = None, *, gelu: bool = False, out: Tensor | None = None
) -> RoundedRows:
    """Round float32 rows [M, W], or what ``norm`` or GELU (one of them) makes of them.

    Args:
        rows: contiguous.
        norm: of all W columns.
        gelu: the exact one.
        out: uint8 [M, W], contiguous, for the numbers.
    """
    numbers = torch.empty(rows.shape, dtype=torch.uint8) if out is None else out
    rounded = RoundedRows(numbers, torch.empty(len(rows)))
    failed = loaded_library().encoder_rows(
        rows.data_ptr(), norm and address(norm.weight), norm and address(norm.bias), norm.eps if norm else 0.0, gelu,
        rounded.numbers.data_ptr(), rounded.scale.data_ptr(), *rows.shape, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for rows of {rows.shape[1]} numbers.")
    return rounded


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention of an image's rows to one another; Q, K, V and weights are bfloat16, sums float32.

    Args:
        qkv: float32 [N, 3 H C], contiguous.
        heads: H.

    Returns:
        float32 [N, H C].
    """
    width = qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv), width)
    failed = loaded_library().encoder_attention(
        qkv.data_ptr(), out.data_ptr(), len(qkv), heads, width // heads, torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"no memory for the attention of {len(qkv)} rows.")
    return out
