"""Products with 8-bit and 4-bit matrices on CPUs, by the C functions of ``host_linear.c``.

Inputs are rounded to 8 bits: each row with one scale for 8-bit weights, each group of a row (the 32 or 64 inputs that
meet one scale of the weights) for 4-bit ones. Products and their sums within a row or group are exact integers.

Notation: M rows of the input (tokens), I input width, O output width, G weights that share a 4-bit scale.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tinygptv.kernels.host_encoder import RoundedRows
from tinygptv.kernels.host_library import BLOCK, address, host_library, loaded_library
from tinygptv.kernels.host_structs import Matrix
from tinygptv.kernels.pages import huge_zeros


def has_host_linear(outputs: int, inputs: int) -> bool:
    """Whether matrices [O, I] of this size have a kernel on this machine."""
    return outputs % BLOCK == 0 and inputs % BLOCK == 0 and host_library() is not None


class HostInt8:
    """Product with an int8 matrix whose rows have one scale each: float32 [M, I] to [M, O]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Put weights into the order in which the kernel reads them.

        Args:
            weight: int8 [O, I], multiples of 16.
            scale: float32 [O].
            bias: float32 [O], or None.
        """
        self.outputs, self.inputs = weight.shape
        lines = weight.view(-1, BLOCK, self.inputs // 4, 4).transpose(1, 2)
        self.lines = huge_zeros(lines.shape, torch.int8).copy_(lines)
        self.scale, self.bias = scale.contiguous(), bias
        self.totals = weight.sum(dim=1, dtype=torch.int32)

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        return _multiply(self.matrix(self.bias), rows)

    def matrix(self, bias: Tensor | None) -> Matrix:
        """As the C functions take it; the tensors have to live as long."""
        return Matrix(
            address(self.lines), address(self.scale), address(self.totals), address(bias), self.inputs, self.outputs, 0
        )

    def multiply(
        self,
        rows: RoundedRows,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Multiply rows [M, I] that are rounded already (on machines with ``has_host_encoder``).

        Args:
            rows: as ``round_rows`` makes them.
            bias: [O], in place of the layer's.
            residual: contiguous float32 [M, O], added to the product.
            out: contiguous float32 [M, O] for the product.
        """
        product = rows.scale.new_empty(len(rows.numbers), self.outputs) if out is None else out
        matrix = self.matrix(self.bias if bias is None else bias)
        loaded_library().multiply_rounded(
            ctypes.byref(matrix), rows.numbers.data_ptr(), rows.scale.data_ptr(), address(residual), product.data_ptr(),
            len(product), torch.get_num_threads(),
        )  # fmt: skip
        return product


class HostInt4:
    """Product with a matrix of 4-bit numbers, whose groups have scale and offset: float32 [M, I] to [M, O]."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Put weights into the order in which the kernel reads them.

        Args:
            numbers: uint8 [O, I] within 0..15; O a multiple of 16.
            scales: bfloat16 [I / G, O, 2]: a weight is ``(number - 8) * scale + offset``. G is a multiple of 16.
            bias: float32 [O], or None.
        """
        self.outputs, self.inputs = numbers.shape
        self.group = self.inputs // len(scales)
        eights = numbers.view(-1, BLOCK, self.inputs // 8, 2, 4)
        lines = (eights[..., 0, :] | (eights[..., 1, :] << 4)).transpose(1, 2)  # [O / 16, I / 8, 16, 4]
        of_groups = scales.view(len(scales), -1, BLOCK, 2).permute(1, 0, 3, 2)  # [O / 16, I / G, 2, 16]
        parts = (lines.reshape(len(lines), len(scales), -1), of_groups.contiguous().view(torch.uint8).flatten(2))
        widths = [part.shape[-1] for part in parts]
        self.lines = huge_zeros((len(lines), len(scales), sum(widths)), torch.uint8)
        for target, part in zip(self.lines.split(widths, dim=-1), parts, strict=True):
            target.copy_(part)
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply."""
        return _multiply(self.matrix(self.bias), rows)

    def matrix(self, bias: Tensor | None) -> Matrix:
        """As the C functions take it; the tensors have to live as long."""
        return Matrix(address(self.lines), None, None, address(bias), self.inputs, self.outputs, self.group)


def _multiply(matrix: Matrix, rows: Tensor) -> Tensor:
    rows, product = rows.contiguous(), rows.new_empty(len(rows), matrix.outputs)
    failed = loaded_library().multiply_rows(
        ctypes.byref(matrix), rows.data_ptr(), product.data_ptr(), len(rows), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"no memory to round {len(rows)} rows of {matrix.inputs} inputs.")
    return product
