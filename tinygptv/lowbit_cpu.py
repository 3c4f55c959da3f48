"""A linear layer with 8-bit weights for CPUs, and a token embedding with 16-bit rows.

One token of an answer needs every weight once, so its time is the time to read the weights: a quarter of the bytes is
close to a quarter of the time, where the kernel keeps up with the memory. FBGEMM's, which comes with torch, does
(docs/quantization.md has the comparison).

Weights have one scale per output row. Inputs are rounded as they come, each row (token) with its own scale: so an
answer does not depend on the other answers of its batch, and one large token does not coarsen the rest.

Notation: M rows of the input (tokens), I input width, O output width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def _has_vnni() -> bool:
    """Whether 8-bit products are summed without saturating on the way (AVX-512 VNNI)."""
    return torch.cpu._is_vnni_supported()


def has_fbgemm() -> bool:
    """Whether torch was built with FBGEMM (x86 processors)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


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


class Int8Linear(nn.Module):
    """``nn.Linear`` whose weights are int8: input of any float type [..., I], output float32 [..., O]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Pack weights for the kernel.

        Args:
            weight: int8 [O, I].
            scale: [O] float32.
            bias: [O] float32, or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        # The packed weight is opaque; this stands for it where callers look at the type of the weights.
        self.weight = torch.empty(0, dtype=torch.int8)
        self._packed = _pack(weight, scale) if has_fbgemm() else (weight, scale)
        # Without VNNI, sums of two 8-bit products can overflow 16 bits; with 7-bit inputs they cannot.
        self._levels = 127 if _has_vnni() else 63

    @classmethod
    def quantize(cls, linear: nn.Linear, device: str | torch.device, dtype: torch.dtype) -> Int8Linear:
        """Round a layer's weights; ``device`` has to be a CPU, ``dtype`` is float32 here."""
        return cls(*round_rows(linear.weight), None if linear.bias is None else linear.bias.detach())

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Int8Linear:
        """Build from what ``state_dict`` holds."""
        return cls(tensors["weight"], tensors["scale"], tensors.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        rows = x.reshape(-1, self.in_features).float()
        peak = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        if has_fbgemm():
            product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                rows / peak, 1 / self._levels, self._levels + 1, self._packed
            )
            product = product.mul_(peak) if self.bias is None else torch.addcmul(self.bias, product, peak)
        else:
            product = torch.ops.aten._weight_int8pack_mm(rows, *self._packed)
            product = product if self.bias is None else product.add_(self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"], destination[prefix + "scale"] = self.unpacked()

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """int8 weights [O, I] and their scales [O]."""
        if not has_fbgemm():
            return self._packed
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        return weight.int_repr(), weight.q_per_channel_scales().float()

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _pack(weight: Tensor, scale: Tensor) -> Any:
    zero_points = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


class HalfEmbedding(nn.Embedding):
    """Token embedding that keeps its rows in 16 bits and looks them up as float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to float32 [..., D]."""
        return super().forward(input).float()
