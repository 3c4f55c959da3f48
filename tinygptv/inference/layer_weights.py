"""A layer's norms and rotary tables as kernels take them: plain float32 tensors.

Notation: L positions, H head width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tinygptv.kernels.shapes import AttentionWeights
from tinygptv.model.language_model import Float32LayerNorm, Float32RMSNorm, PhiAttention, PhiDecoderLayer


@dataclass(frozen=True)
class NormWeights:
    """A LayerNorm's parameters in float32; no weight: none is applied."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def layer_norm(module: nn.Module) -> NormWeights:
    """Parameters of a LayerNorm; of ``nn.Identity`` none."""
    if not isinstance(module, Float32LayerNorm):
        return NormWeights(None, None, 0.0)
    bias = None if module.bias is None else module.bias.detach().float()
    return NormWeights(module.weight.detach().float(), bias, module.eps)


def rms_norm(layer: PhiDecoderLayer) -> tuple[Tensor | None, float]:
    """Weight [D] and epsilon of the norm after attention; no weight: none is applied."""
    norm = layer.attention_rmsnorm
    return (norm.weight.detach().float(), norm.eps) if isinstance(norm, Float32RMSNorm) else (None, 0.0)


def attention_weights(attention: PhiAttention, bias: Tensor | None, cos: Tensor, sin: Tensor) -> AttentionWeights:
    """Everything between the q/k/v product and the cache.

    Args:
        attention: its norms are read.
        bias: of the product, where it is not added yet.
        cos: [L, H].
        sin: [L, H].
    """
    query_norm, key_norm = layer_norm(attention.q_layernorm), layer_norm(attention.k_layernorm)
    return AttentionWeights(
        bias=bias,
        q_norm=(query_norm.weight, query_norm.bias),
        k_norm=(key_norm.weight, key_norm.bias),
        eps=query_norm.eps,
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        rotary_dim=attention.rotary_dim,
        scale=attention.scaling,
    )
