"""4-bit linear layers through torch's own CUDA kernel (``_weight_int4pack_mm``): the fastest for one to a few answers.

The kernel keeps weights in an order of its own. ``Layout`` finds out once per process how that order and the format of
``linear_cpu.Int4Linear`` correspond, by packing and multiplying a small matrix; where they do not, ``usable`` says no
and ``linear_packed`` takes over. Beyond some tokens the kernel falls behind: then the matrix is unpacked.

Notation: O output width, I input width, T tokens, g inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

INNER_TILES = 8
"""Tiles of 16 inputs that the kernel's packed form puts together."""
TILE_OUTPUTS, TILE_INPUTS = 8, 16 * INNER_TILES
GROUPS = (32, 64, 128, 256)
MOST_TOKENS = 128
"""Beyond so many tokens unpacking the matrix and multiplying plainly is faster."""


@dataclass(frozen=True)
class Layout:
    """Order of weights in the kernel.

    Attributes:
        even_is_high: whether the even input of a pair goes into the upper half of a byte before packing.
        positions: int64 [8 * 128] index into a tile's codes (word by word, lowest first) of each output and input.
    """

    even_is_high: bool
    positions: Tensor


@cache
def find_layout(device: torch.device) -> Layout | None:
    """The kernel's order on a device; None where the device or torch lacks the kernel."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    number = torch.arange(TILE_OUTPUTS * TILE_INPUTS, device=device).view(TILE_OUTPUTS, TILE_INPUTS)
    try:
        for even_is_high in (True, False):
            codes = torch.randint(0, 16, (TILE_OUTPUTS, TILE_INPUTS), device=device)
            scales = torch.tensor([1.0, 0.0], device=device).bfloat16().expand(TILE_INPUTS // 32, TILE_OUTPUTS, 2)
            unit = torch.eye(TILE_INPUTS, device=device, dtype=torch.bfloat16)
            packed = _pack(codes, even_is_high)
            product = torch.ops.aten._weight_int4pack_mm(unit, packed, 32, scales.contiguous())
            if torch.equal(product.T, (codes - 8).bfloat16()):
                # A number of ten bits at each position, four bits at a time, tells where the position has gone.
                source = sum(_codes(_pack((number >> shift) & 15, even_is_high)).long() << shift for shift in (0, 4, 8))
                return Layout(even_is_high, source.flatten().argsort())
    except (RuntimeError, AttributeError):
        return None
    return None


def _pack(codes_OI: Tensor, even_is_high: bool) -> Tensor:
    even, odd = codes_OI[:, ::2].to(torch.uint8), codes_OI[:, 1::2].to(torch.uint8)
    pairs = (even << 4) | odd if even_is_high else (odd << 4) | even
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)


def _codes(packed: Tensor) -> Tensor:
    """Packed words to [tiles of outputs, tiles of inputs, codes of a tile]."""
    words = packed.view(*packed.shape[:2], -1, 1)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((words >> shifts) & 15).flatten(2)


class TinygemmLinear(nn.Module):
    """``nn.Linear`` over 4-bit weights in the kernel's order: input of any float type [..., I], output bfloat16."""

    dtype = torch.bfloat16

    def __init__(self, codes_OI: Tensor, scales: Tensor, bias: Tensor | None, layout: Layout) -> None:
        """Pack the weights.

        Args:
            codes_OI: uint8 [O, I] within 0..15.
            scales: bfloat16 [I / g, O, 2]: a weight is ``(code - 8) * scale + offset``.
            bias: [O], or None.
            layout: from ``find_layout``.
        """
        super().__init__()
        self.out_features, self.in_features = codes_OI.shape
        self.group = self.in_features // len(scales)
        self.layout = layout
        self.weight: Tensor
        self.scales: Tensor
        self.register_buffer("weight", _pack(codes_OI, layout.even_is_high))
        self.register_buffer("scales", scales.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    @staticmethod
    def usable(codes_OI: Tensor, scales: Tensor, dtype: torch.dtype) -> bool:
        """Whether the kernel takes such a matrix."""
        outputs, inputs = codes_OI.shape
        fits = outputs % TILE_OUTPUTS == 0 and inputs % TILE_INPUTS == 0 and inputs // len(scales) in GROUPS
        return fits and dtype == torch.bfloat16 and find_layout(codes_OI.device) is not None

    def partial_products(self, x_TI: Tensor) -> Tensor:
        """Product without bias: [T, I] to [1, T, O]."""
        x_TI = x_TI.to(self.dtype)
        if len(x_TI) <= MOST_TOKENS:
            product = torch.ops.aten._weight_int4pack_mm(x_TI, self.weight, self.group, self.scales)
        else:
            product = nn.functional.linear(x_TI, self.unpack())
        return product.unsqueeze(0)

    def unpack(self) -> Tensor:
        """The matrix [O, I] in bfloat16."""
        tiles = _codes(self.weight).index_select(2, self.layout.positions)
        codes = tiles.unflatten(2, (TILE_OUTPUTS, TILE_INPUTS)).transpose(1, 2).flatten(2).flatten(0, 1)
        scale, offset = (part.T.repeat_interleave(self.group, dim=1) for part in self.scales.unbind(-1))
        return (codes - 8).to(self.dtype) * scale + offset

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        product = self.partial_products(x.reshape(-1, self.in_features))[0]
        product = product if self.bias is None else (product + self.bias).to(self.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
