"""Products with 8-bit and 4-bit matrices on CPUs, by kernels that come with torch.

Each maps float32 rows [M, I] to float32 [M, O], bias included, as the kernels of ``host_linear`` do. All that round
inputs of 8-bit products give the same numbers.

Notation: M rows of the input (tokens), I input width, O output width, G weights that share a 4-bit scale.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ENCODER_ROWS = 1025
"""Rows for which oneDNN orders the weights: patches of an image of 448 pixels and the class token."""
TINY = torch.finfo(torch.float32).tiny


def has_vnni() -> bool:
    """Whether 8-bit products are summed without saturating on the way (AVX-512 VNNI)."""
    return torch.cpu._is_vnni_supported()


def has_fbgemm() -> bool:
    """Whether torch was built with FBGEMM (x86 processors)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def has_onednn() -> bool:
    """Whether oneDNN's 8-bit products are exact on this processor."""
    return has_vnni() and torch.backends.mkldnn.is_available()


_filter_lock = threading.Lock()


@contextmanager
def _quantized_tensors() -> Iterator[None]:
    """Without the warning that torch's quantized dtypes will go.

    Filters are the process's: of two threads, the first to leave would end the other's.
    """
    with _filter_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        yield


class FbgemmInt8:
    """FBGEMM's product with an int8 matrix, whose inputs are rounded row by row."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Pack int8 [O, I] with the float32 scale [O] of each row."""
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        with _quantized_tensors():
            quantized = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = bias
        # Without VNNI, sums of two 8-bit products can overflow 16 bits; with 7-bit inputs they cannot.
        self.levels = 127 if has_vnni() else 63

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        peak = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / peak, 1 / self.levels, self.levels + 1, self.packed
        )
        return product.mul_(peak) if self.bias is None else torch.addcmul(self.bias, product, peak)


class OnednnInt8:
    """oneDNN's product with an int8 matrix, whose inputs are rounded row by row."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Pack int8 [O, I] with the float32 scale [O] of each row."""
        self.packed = torch.ops.onednn.qlinear_prepack(weight, [ENCODER_ROWS, weight.shape[1]])
        self.scale, self.zero_points = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        # Two passes over the rows cost a third of the time that their absolute values in new memory take.
        peak = torch.maximum(rows.amax(dim=-1, keepdim=True), rows.amin(dim=-1, keepdim=True).neg_()).clamp_min_(TINY)
        numbers = (rows / peak).mul_(127).add_(128.5).to(torch.uint8)  # which cuts off
        product = torch.ops.onednn.qlinear_pointwise(
            numbers, 1.0, 128, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        scale = peak / 127
        return product.mul_(scale) if self.bias is None else torch.addcmul(self.bias, product, scale, out=product)


class AtenInt8:
    """aten's product with an int8 matrix, for processors without FBGEMM; inputs are not rounded."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Keep int8 [O, I] and the float32 scale [O] of each row."""
        self.weight, self.scale, self.bias = weight, scale, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        product = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        return product if self.bias is None else product.add_(self.bias)


class AtenInt4:
    """aten's product with 4-bit groups; inputs and products are bfloat16, because it is fast with no other type."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Pack uint8 [O, I] within 0..15 with bfloat16 scales and offsets [I / G, O, 2]."""
        self.group = numbers.shape[1] // len(scales)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        self.scales, self.bias = scales, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), self.packed, self.group, self.scales
        ).float()
        return product if self.bias is None else product.add_(self.bias)
