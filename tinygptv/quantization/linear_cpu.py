"""Linear layers with 8-bit and 4-bit weights for CPUs, and a token embedding with 16-bit rows.

One token of an answer needs every weight once, so its time is the time to read the weights, where the kernel keeps up
with the memory: those of ``host_linear`` do. Where they cannot be compiled, torch's are used: the same numbers with 8
bits, inputs of bfloat16 with 4 (docs/quantization.md has the comparison).

Notation: M rows of the input (tokens), I input width, O output width, G weights that share a 4-bit scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tinygptv.kernels.host_linear import HostInt4, HostInt8, has_host_linear
from tinygptv.quantization.torch_products import AtenInt4, AtenInt8, FbgemmInt8, OnednnInt8, has_fbgemm, has_onednn

INT4_GROUPS = (64, 32)
"""Weights that share a 4-bit scale: the first that divides the input width."""


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8 bits.

    Args:
        weight: [O, I] of any float type.

    Returns:
        int8 [O, I] within -127..127, and the float32 scale [O] of each row.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


class _PackedLinear(nn.Module):
    """``nn.Linear`` whose weights lie in the order of a kernel."""

    def __init__(self, stored: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.bias = None if bias is None else nn.Parameter(bias.float().contiguous(), requires_grad=False)
        # The weights in the kernel's order are opaque; this stands for them where callers look at their type.
        self.weight = torch.empty(0, dtype=stored.dtype)
        self.product: Callable[[Tensor], Tensor]
        """Float32 [M, I] to [M, O], bias included."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        rows = x.reshape(-1, self.in_features).float()
        return self.product(rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(_PackedLinear):
    """``nn.Linear`` whose weights are int8: input of any float type [..., I], output float32 [..., O].

    Weights have one scale per output row. Inputs are rounded as they come, each row (token) with its own scale: so an
    answer does not depend on the other answers of its batch, and one large token does not coarsen the rest.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Pack weights for the kernel.

        Args:
            weight: int8 [O, I].
            scale: [O] float32.
            bias: [O] float32, or None.
        """
        super().__init__(weight, bias)
        self.product = self._choose()(weight, scale.float(), self.bias)

    def _choose(self) -> Callable[[Tensor, Tensor, Tensor | None], Callable[[Tensor], Tensor]]:
        if has_host_linear(self.out_features, self.in_features):
            return HostInt8
        return FbgemmInt8 if has_fbgemm() else AtenInt8

    @staticmethod
    def pack(linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights; ``device`` has to be a CPU."""
        weight, scale = round_rows(linear.weight)
        return {"weight": weight, "scale": scale, **_bias_of(linear)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Int8Linear:
        """Build from what ``pack`` returned; ``dtype`` is float32 on a CPU."""
        return cls(tensors["weight"], tensors["scale"], tensors.get("bias"))


class Int8EncoderLinear(Int8Linear):
    """``Int8Linear`` for the hundreds of rows of an image: the same numbers, by oneDNN without the C functions.

    It is the fastest of torch's kernels for many rows, and a slow one for single rows.
    """

    def _choose(self) -> Callable[[Tensor, Tensor, Tensor | None], Callable[[Tensor], Tensor]]:
        kind = super()._choose()
        return OnednnInt8 if kind is not HostInt8 and has_onednn() else kind


def round_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to 4 bits; the numbers of a group spread evenly from its smallest to its largest weight.

    Args:
        weight: [O, I] of any float type.
        group: neighbouring weights of a row that share scale and offset (G); divides I.

    Returns:
        uint8 [O, I] within 0..15, and bfloat16 [I / G, O, 2]: a weight is ``(number - 8) * scale + offset``.
    """
    groups = weight.detach().float().unflatten(1, (-1, group))
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min_(torch.finfo(torch.bfloat16).tiny).bfloat16()
    offset = (low + 8 * scale.float()).bfloat16()
    # Rounded with the scale and offset as they are stored, so that their own rounding costs nothing more.
    numbers = (groups - offset.float()[..., None]).div_(scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return numbers.to(torch.uint8).flatten(1), torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous()


class Int4Linear(_PackedLinear):
    """``nn.Linear`` whose weights have 4 bits: input of any float type [..., I], output float32 [..., O]."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Pack weights for the kernel.

        Args:
            numbers: uint8 [O, I] within 0..15.
            scales: bfloat16 [I / G, O, 2].
            bias: [O] float32, or None.
        """
        super().__init__(numbers, bias)
        self.group = self.in_features // len(scales)
        kind = HostInt4 if has_host_linear(self.out_features, self.in_features) else AtenInt4
        self.product = kind(numbers, scales, self.bias)

    @staticmethod
    def pack(linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights; ``device`` has to be a CPU.

        Raises:
            ValueError: the layer's sizes are not those of whole blocks.
        """
        group = next((size for size in INT4_GROUPS if linear.in_features % size == 0), 0)
        if not group or linear.out_features % 16:
            raise ValueError(
                f"a layer of {linear.in_features} to {linear.out_features} cannot have 4-bit weights: that needs "
                "multiples of 32 and of 16; take method=cpu."
            )
        numbers, scales = round_groups(linear.weight, group)
        # Two numbers in a byte, the even column low: the kernel's own order differs between processors.
        return {"weight": numbers[:, ::2] | (numbers[:, 1::2] << 4), "scale": scales, **_bias_of(linear)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Int4Linear:
        """Build from what ``pack`` returned; ``dtype`` is float32 on a CPU."""
        pairs = tensors["weight"]
        numbers = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        return cls(numbers, tensors["scale"].bfloat16(), tensors.get("bias"))


def _bias_of(linear: nn.Linear) -> dict[str, Tensor]:
    return {} if linear.bias is None else {"bias": linear.bias.detach().float()}


class HalfEmbedding(nn.Embedding):
    """Token embedding that keeps its rows in 16 bits and looks them up as float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to float32 [..., D]."""
        return super().forward(input).float()
