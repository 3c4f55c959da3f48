"""A block of the vision encoder with 8-bit weights, by this project's C functions for CPUs.

Notation: B images, N rows of an image (patches and the class token), V vision width.
"""

from __future__ import annotations

import math
import threading
from typing import Any, cast

import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional

from tinygptv.kernels.host_encoder import attend, has_encoder_attention, has_host_encoder, round_rows
from tinygptv.kernels.host_linear import HostInt8


class _Scratch(threading.local):
    """Memory for one image in one block, kept by each thread for the next block.

    Allocated for every block, the 30 MB of an image of 448 pixels come and go page by page: 4 % of the block's time.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor that holds what was last written there: one of each dtype is in use at a time."""
        count = math.prod(shape)
        if len(self._buffers.get(dtype, ())) < count:
            self._buffers[dtype] = torch.empty(count, dtype=dtype)
        return self._buffers[dtype][:count].view(shape)


_scratch = _Scratch()


class HostEncoderBlock(nn.Module):
    """timm's ``EvaBlock``, made of the same parts: attention and MLP, each behind a LayerNorm."""

    def __init__(self, block: EvaBlock) -> None:
        """Take the parts of ``block``, for which ``fits`` is true."""
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        biases = (self.attn.q_bias, self.attn.k_bias, self.attn.v_bias)
        self.qkv_bias: Tensor
        self.register_buffer("qkv_bias", torch.cat(cast(tuple[Tensor, ...], biases)).detach(), persistent=False)
        self.has_host_attention = has_encoder_attention(self.attn.head_dim)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this machine has the kernels for a block, and the block no steps that they leave out."""
        products = [getattr(layer, "product", None) for layer in _layers(block)]
        if not all(isinstance(product, HostInt8) and has_host_encoder(product.inputs) for product in products):
            return False
        attention, mlp = block.attn, block.mlp
        left_out = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm, block.drop_path1, block.drop_path2)
        return (
            all(type(module) is nn.Identity for module in left_out)
            and block.gamma_1 is None
            and block.gamma_2 is None
            and attention.gate is None
            and attention.q_bias is not None
            and type(mlp.act) is nn.GELU
            and mlp.act.approximate == "none"
        )

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Float32 [B, N, V] to [B, N, V].

        Raises:
            ValueError: positions by rotation, or masks, which this encoder has not.
        """
        if rope is not None or attn_mask is not None or is_causal:
            raise ValueError("this encoder's attention takes neither rope nor masks.")
        x = x.contiguous()
        out = torch.empty_like(x)
        for rows, to in zip(x, out, strict=True):
            self._encode(rows, to)
        return out

    def _encode(self, rows: Tensor, out: Tensor) -> None:
        """One image: [N, V] to ``out``."""
        qkv, proj, fc1, fc2 = (layer.product for layer in _layers(self))
        narrow, wide = ((torch.uint8, len(rows), width) for width in (rows.shape[1], fc2.inputs))
        product = qkv.multiply(
            round_rows(rows, self.norm1, out=_scratch.take(*narrow)),
            bias=self.qkv_bias,
            out=_scratch.take(torch.float32, len(rows), qkv.outputs),
        )
        attended = round_rows(self._attend(product), out=_scratch.take(*narrow))
        middle = proj.multiply(attended, residual=rows)
        hidden = fc1.multiply(
            round_rows(middle, self.norm2, out=_scratch.take(*narrow)),
            out=_scratch.take(torch.float32, len(rows), fc1.outputs),
        )
        fc2.multiply(round_rows(hidden, gelu=True, out=_scratch.take(*wide)), residual=middle, out=out)

    def _attend(self, qkv: Tensor) -> Tensor:
        if self.has_host_attention:
            return attend(qkv, self.attn.num_heads)
        q, k, v = qkv.view(len(qkv), 3, self.attn.num_heads, self.attn.head_dim).permute(1, 2, 0, 3)
        return functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(qkv), -1)


def _layers(block: nn.Module) -> tuple[Any, Any, Any, Any]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
