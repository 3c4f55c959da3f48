"""Linear layers with 8-bit and 4-bit weights for CPUs, and a token embedding with 16-bit rows.

One token of an answer needs every weight once, so its time is the time to read the weights: a quarter of the bytes is
close to a quarter of the time, where the kernel keeps up with the memory. FBGEMM's 8-bit one, which comes with torch,
does; torch's 4-bit one halves the memory again but takes longer to unpack than it saves in reading
(docs/quantization.md has the comparison).

Notation: M rows of the input (tokens), I input width, O output width, G weights that share a 4-bit scale.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

_ENCODER_ROWS = 1025
"""Rows for which oneDNN orders the weights: patches of an image of 448 pixels and the class token."""

INT4_GROUPS = (64, 32)
"""Weights that share a 4-bit scale: the first that divides the input width."""


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
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        # The packed weight is opaque; this stands for it where callers look at the type of the weights.
        self.weight = torch.empty(0, dtype=torch.int8)
        self._packed = self._prepack(weight, scale)
        # Without VNNI, sums of two 8-bit products can overflow 16 bits; with 7-bit inputs they cannot.
        self._levels = 127 if _has_vnni() else 63

    def _prepack(self, weight: Tensor, scale: Tensor) -> Any:
        """Weights in the kernel's order."""
        return _pack(weight, scale) if has_fbgemm() else (weight, scale)

    @staticmethod
    def pack(linear: nn.Linear, device: str | torch.device) -> dict[str, Tensor]:
        """Round a layer's weights; ``device`` has to be a CPU."""
        weight, scale = round_rows(linear.weight)
        return {"weight": weight, "scale": scale, **_bias_of(linear)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Int8Linear:
        """Build from what ``pack`` returned; ``dtype`` is float32 on a CPU."""
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

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8EncoderLinear(Int8Linear):
    """``Int8Linear`` for the hundreds of rows of an image: the same numbers, multiplied by oneDNN.

    Its kernel does 700 billion operations per second on two cores with AVX-512 VNNI where FBGEMM's does 500. For one
    row it is the slower one (docs/quantization.md).
    """

    def _prepack(self, weight: Tensor, scale: Tensor) -> Any:
        self._scale, self._zero_points = scale.float(), torch.zeros(len(scale), dtype=torch.int32)
        return torch.ops.onednn.qlinear_prepack(weight, [_ENCODER_ROWS, self.in_features])

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Int8Linear:
        """Build from what ``pack`` returned; an ``Int8Linear`` where this processor lacks the kernel."""
        kind = cls if _has_vnni() and torch.backends.mkldnn.is_available() else Int8Linear
        return kind(tensors["weight"], tensors["scale"], tensors.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        rows = x.reshape(-1, self.in_features).float()
        # Two passes over the rows cost a third of the time that their absolute values in new memory take.
        peak = torch.maximum(rows.amax(dim=-1, keepdim=True), rows.amin(dim=-1, keepdim=True).neg_())
        peak.clamp_min_(torch.finfo(torch.float32).tiny)
        rounded = torch.quantize_per_tensor(rows / peak, 1 / 127, 128, torch.quint8).int_repr()
        product = torch.ops.onednn.qlinear_pointwise(
            rounded, 1 / 127, 128, self._packed, self._scale, self._zero_points, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        product = product.mul_(peak) if self.bias is None else torch.addcmul(self.bias, product, peak, out=product)
        return product.view(*x.shape[:-1], self.out_features)


def _pack(weight: Tensor, scale: Tensor) -> Any:
    zero_points = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


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


class Int4Linear(nn.Module):
    """``nn.Linear`` whose weights have 4 bits: input of any float type [..., I], output float32 [..., O].

    Inputs and products are bfloat16, because torch's kernel is fast with no other type.
    """

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Pack weights for the kernel.

        Args:
            numbers: uint8 [O, I] within 0..15.
            scales: bfloat16 [I / G, O, 2].
            bias: [O] float32, or None.
        """
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        self.group = self.in_features // len(scales)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.weight = torch.empty(0, dtype=torch.uint8)  # stands for the opaque one, as in ``Int8Linear``
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        self._scales = scales

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

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O]."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, self.group, self._scales).float()
        product = product if self.bias is None else product.add_(self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _bias_of(linear: nn.Linear) -> dict[str, Tensor]:
    return {} if linear.bias is None else {"bias": linear.bias.detach().float()}


class HalfEmbedding(nn.Embedding):
    """Token embedding that keeps its rows in 16 bits and looks them up as float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to float32 [..., D]."""
        return super().forward(input).float()
