"""One language layer of a training step with its small operations fused: the formula of ``language_model``, faster.

Beside the matrix products, attention and the MLP's activation there are four operations (``training_functions``), each
one kernel forward and one backward. They differ from the plain layer by rounding, and in which elements dropout drops:
masks are functions of seeds, so nothing keeps them.

Notation: S tokens of all sequences, D width, N heads, H head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from tinygptv.config import TinyGPTVTextConfig
from tinygptv.kernels.training_functions import AdaptedProduct, AddBranches, DropForAdapter, NormAndDrop, RotateHeads
from tinygptv.model.varlen_attention import varlen_attention

if TYPE_CHECKING:
    from tinygptv.model.lora import AdaptedLinear


def can_fuse(config: TinyGPTVTextConfig) -> bool:
    """Whether the layers have what is fused: all norms, and dropout that leaves something."""
    has_norms = config.input_layernorm and config.qk_layernorm and config.attention_rmsnorm
    return bool(has_norms) and config.resid_pdrop < 1.0


def fused_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    dropout_seeds: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> Tensor:
    """Output of ``PhiDecoderLayer.forward`` for a flat batch.

    Args:
        layer: a ``PhiDecoderLayer`` with all norms.
        hidden_states: residual stream [1, S, D] float32.
        dropout_seeds: of this layer, from ``draw_seeds``.
        position_embeddings: cosine and sine, float32 [1, S, rotary_dim] each.
        cu_seq_lens_q: as for ``PhiAttention.forward``.
        max_length_q: the same.
        kwargs: not used: a flat batch has no mask and no cache.

    Returns:
        The next residual stream [1, S, D].
    """
    parts, attention = cast(Any, layer), cast(Any, layer).self_attn
    q_norm, k_norm = attention.q_layernorm, attention.k_layernorm
    norm, rms_norm = parts.input_layernorm, parts.attention_rmsnorm
    residual, for_attention, for_mlp, *dropped = NormAndDrop.apply(
        hidden_states,
        norm.weight,
        norm.bias,
        dropout_seeds,
        norm.eps,
        _adapter_dropout(attention.qkv_proj),
        _matrix_dtype(attention.qkv_proj, hidden_states),
    )
    qkv = _project(attention.qkv_proj, for_attention, *dropped)
    query, key, value = RotateHeads.apply(
        qkv, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, *position_embeddings, q_norm.eps,
        attention.num_heads,
    )  # fmt: skip
    attended = varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, attention.scaling)
    attended = attended.view(hidden_states.shape)
    dropout, dropped = _adapter_dropout(attention.dense), []
    if dropout:
        attended, *dropped = DropForAdapter.apply(attended, dropout_seeds, dropout)
    return AddBranches.apply(
        residual,
        _project(attention.dense, attended, *dropped),
        rms_norm.weight,
        parts.mlp(for_mlp),
        dropout_seeds,
        rms_norm.eps,
        parts.resid_dropout.p if layer.training else 0.0,
    )


def _project(linear: nn.Module, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """A linear layer, whose adapter reads ``dropped`` where there is one."""
    if not _is_adapted(linear):
        return linear(x)
    base = linear.base_layer
    if base.weight.requires_grad or base.weight.dtype != x.dtype:
        return linear.forward_dropped(x, x if dropped is None else dropped)
    down, up = linear.adapter
    return AdaptedProduct.apply(x, dropped, base.weight, base.bias, down.weight, up.weight, linear.scale)


def _adapter_dropout(linear: nn.Module) -> float:
    """Dropout on the input of a linear layer's adapter; 0 where there is none, or where it is not ours to drop."""
    return linear.input_dropout if _is_adapted(linear) else 0.0


def _is_adapted(linear: nn.Module) -> TypeGuard[AdaptedLinear]:
    """Whether a layer has the model's own adapter; asked by attribute, because its class imports peft."""
    return getattr(linear, "is_adapted", False) is True


def _matrix_dtype(linear: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a linear layer reads; packed low-bit weights cast their input themselves."""
    device, weight = x.device.type, cast(Tensor, linear.weight)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.is_floating_point() else x.dtype
