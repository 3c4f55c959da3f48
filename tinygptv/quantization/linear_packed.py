"""Linear layers with packed low-bit weights on a GPU: few tokens are multiplied by the packed weights themselves.

One layer for three formats of an artifact's files: ``nf4`` and ``llm_int8`` in bitsandbytes' layout (read here without
bitsandbytes), ``int8`` and ``int4`` as ``linear_cpu`` writes them. Only weights are rounded; inputs and sums are not.

Notation: O output width, I input width, T tokens, P partial products.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor, nn

from tinygptv.kernels import lowbit_ops
from tinygptv.kernels.shapes import PackedWeight, pack_codes, pad_groups
from tinygptv.quantization.linear_tinygemm import TinygemmLinear, find_layout

MOST_TOKENS = 64
"""Beyond so many tokens unpacking the matrix and multiplying plainly is faster."""


class PackedLinear(nn.Module):
    """``nn.Linear`` over packed weights: input of any float type [..., I], output ``dtype`` [..., O]."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Keep the weights where they lie.

        Args:
            packed: matrix [O, I].
            bias: [O], or None.
            dtype: of inputs and outputs of the product.
        """
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.group, self.dtype = packed.group, dtype
        self.weight: Tensor
        self.scale: Tensor
        self.offset: Tensor | None
        self.table: Tensor | None
        self.register_buffer("weight", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("offset", packed.offset)
        self.register_buffer("table", packed.table)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    @property
    def packed(self) -> PackedWeight:
        """The matrix."""
        return PackedWeight(self.weight, self.scale, self.offset, self.table, self.group, self.in_features)

    def partial_products(self, x_TI: Tensor) -> Tensor:
        """Products without bias: [T, I] to [P, T, O], to be summed over P."""
        x_TI, ops = x_TI.to(self.dtype), lowbit_ops(x_TI.device)
        if len(x_TI) <= MOST_TOKENS:
            return ops.partial_products(x_TI, self.packed)
        return nn.functional.linear(x_TI, ops.unpack(self.packed, self.dtype)).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        rows = x.reshape(-1, self.in_features)
        product = self.partial_products(rows)
        product = product.squeeze(0) if len(product) == 1 else product.sum(0)
        product = product if self.bias is None else product + self.bias
        return product.to(self.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        bias = self.bias is not None
        bits = 8 if self.table is None else 4
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, bits={bits}"


def from_nf4(tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> PackedLinear:
    """Build from bitsandbytes' NF4 tensors with double quantization.

    The scales of the blocks of 64, 8 bits each in the file, are restored to float16.
    """
    state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].cpu().tolist()))
    out_features, in_features = state["shape"]
    pairs = tensors["weight"].to(device).view(out_features, in_features // 2)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1)
    # Where rows are no whole number of blocks, a block continues in the next row: then groups are parts of a block.
    block = state["blocksize"]
    group = math.gcd(block, in_features)
    scale = _nested_scale(tensors, state).repeat_interleave(block // group)[: codes.numel() // group]
    return PackedLinear(
        PackedWeight(
            codes=pack_codes(codes),
            scale=pad_groups(scale.view(out_features, -1).half().to(device), group),
            offset=None,
            table=tensors["weight.quant_map"].float().to(device),
            group=group,
            inputs=in_features,
        ),
        _moved(tensors.get("bias"), device),
        dtype,
    )


def _nested_scale(tensors: dict[str, Tensor], state: dict[str, float]) -> Tensor:
    """Scales of all blocks, float32; a scale is table[code] * scale of its 256 + mean."""
    codes = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return codes.float()
    block = int(state["nested_blocksize"])
    nested = tensors["weight.nested_absmax"].float().repeat_interleave(block)[: codes.numel()]
    return tensors["weight.nested_quant_map"].float()[codes.long().flatten()] * nested + state["nested_offset"]


def from_llm_int8(tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> PackedLinear:
    """Build from bitsandbytes' LLM.int8 tensors: a weight is code * row scale / 127."""
    return from_int8({**tensors, "scale": tensors["SCB"].float() / 127}, device, dtype)


def from_int8(tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> PackedLinear:
    """Build from int8 rows with one scale each (``linear_cpu.Int8Linear.pack``)."""
    codes, scale = tensors["weight"].to(device), tensors["scale"].float().unsqueeze(1).to(device)
    weight = PackedWeight(codes, scale, None, None, group=codes.shape[1], inputs=codes.shape[1])
    return PackedLinear(weight, _moved(tensors.get("bias"), device), dtype)


def from_int4(
    tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> PackedLinear | TinygemmLinear:
    """Build from 4-bit groups with scale and offset (``linear_cpu.Int4Linear.pack``)."""
    pairs, scales = tensors["weight"].to(device), tensors["scale"].to(device)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    layout = find_layout(codes.device)
    if layout is not None and TinygemmLinear.usable(codes, scales, dtype):
        return TinygemmLinear(codes, scales.bfloat16(), _moved(tensors.get("bias"), device), layout)
    group = codes.shape[1] // len(scales)
    scale, offset = (pad_groups(part.T, group) for part in scales.unbind(-1))
    table = torch.arange(-8.0, 8.0, device=device)
    weight = PackedWeight(pack_codes(codes), scale, offset, table, group, codes.shape[1])
    return PackedLinear(weight, _moved(tensors.get("bias"), device), dtype)


def _moved(bias: Tensor | None, device: str | torch.device) -> Tensor | None:
    return None if bias is None else bias.detach().to(device, torch.float32)
