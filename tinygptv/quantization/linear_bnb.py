"""bitsandbytes' 4-bit (NF4) and 8-bit (LLM.int8) linear layers, made from and restored to plain tensors.

On CUDA these are the usual choice. On a CPU both work; NF4 is fast there only with AVX-512 BF16 (docs/quantization.md).
Source: bitsandbytes; NF4 with double quantization as in arXiv 2305.14314, LLM.int8 as in arXiv 2208.07339.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

OUTLIER_THRESHOLD = 6.0
"""LLM.int8: input columns with a larger value are multiplied in half precision."""


class NF4Linear(bnb.nn.Linear4bit):
    """4-bit weights in blocks of 64; the blocks' scales are rounded to 8 bits themselves (double quantization)."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias is not None,
            compute_dtype=_product_dtype(dtype),
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        self.output_dtype = dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        if out_features % 32 or in_features % 64:
            self.support_avx512bf16_for_cpu = False  # bitsandbytes' fast kernel takes whole blocks only

    @classmethod
    def pack(cls, linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights."""
        layer = cls(linear.in_features, linear.out_features, _moved(linear.bias, device), torch.float32)
        weight = linear.weight.detach().to(device, torch.float32).contiguous()
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer).to(device)
        return layer.state_dict()

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> NF4Linear:
        """Build from what ``pack`` returned; output is ``dtype``."""
        tensors = dict(tensors)
        weight, bias = tensors.pop("weight"), tensors.pop("bias", None)
        statistics = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
        parameter = bnb.nn.Params4bit.from_prequantized(weight, statistics, device=device)
        out_features, in_features = parameter.quant_state.shape
        layer = cls(in_features, out_features, _moved(bias, device), dtype)
        layer.weight, layer.quant_state = parameter, parameter.quant_state
        parameter.module = layer
        return layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O] in ``output_dtype``."""
        return super().forward(x.to(self.output_dtype))


class LLMInt8Linear(bnb.nn.Linear8bitLt):
    """8-bit weights, one scale per output row; large input columns are multiplied in half precision."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias is not None,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
            device="meta",
        )
        self.output_dtype = dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def pack(cls, linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights."""
        layer = cls(linear.in_features, linear.out_features, _moved(linear.bias, device), torch.float32)
        rounded, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.detach().to(device, torch.float16))
        layer.weight = bnb.nn.Int8Params(rounded, requires_grad=False, CB=rounded, SCB=scale)
        return layer.state_dict()

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> LLMInt8Linear:
        """Build from what ``pack`` returned; output is ``dtype``."""
        weight, scale = tensors["weight"].to(device), tensors["SCB"].to(device)
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, _moved(tensors.get("bias"), device), dtype)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        return layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O] in ``output_dtype``."""
        # float16 is what bitsandbytes computes with; it would cast itself, with a warning each time.
        return super().forward(x.to(torch.float16)).to(self.output_dtype)


def _moved(bias: Tensor | None, device: str | torch.device) -> Tensor | None:
    return None if bias is None else bias.detach().to(device, torch.float32, copy=True)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products inside: bfloat16 on a CPU that has instructions for it, as bitsandbytes' kernel needs."""
    return torch.bfloat16 if dtype == torch.float32 and bnb.functional.has_avx512bf16() else dtype
