"""Operations of a training step's language layers for autograd: Triton kernels on a GPU, plain torch elsewhere.

Each function stands for a chain of elementwise operations and reductions, forward and backward, and keeps its inputs
alone: normalised values and dropout masks are computed again. They trace under ``torch.compile`` (``fullgraph=True``).
Outputs that are an input as it was exist so that its gradient arrives at the same kernel and needs no addition.

Notation: T tokens, D width, N heads, H head width, R numbers of a head that are rotated.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tinygptv.kernels import training_reference

if find_spec("triton"):
    from tinygptv.kernels import training_heads, training_rows

HAS_TRITON = find_spec("triton") is not None

QKV_ADAPTER, DENSE_ADAPTER, ATTENTION, MLP = range(4)
"""Sites of a layer that drop; each has a seed of its own."""


def draw_seeds(num_layers: int, device: torch.device) -> tuple[Tensor, ...]:
    """Seeds of all dropouts of a forward pass, from torch's generator: int64 [4] for each layer."""
    limit = torch.iinfo(torch.int64)
    return torch.randint(limit.min, limit.max, (num_layers, 4), device=device).unbind(0)


def _row_ops(x: Tensor) -> ModuleType:
    return training_rows if HAS_TRITON and x.is_cuda else training_reference


def _head_ops(x: Tensor) -> ModuleType:
    return training_heads if HAS_TRITON and x.is_cuda else training_reference


class NormAndDrop(torch.autograd.Function):
    """LayerNorm of the residual stream in 16 bits, for both branches and after dropout for the adapter."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_D: Tensor, bias_D: Tensor, seeds: Tensor, eps: float, p: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Residual stream [..., D] float32 -> itself, its normalised form twice, and with p > 0 that after dropout."""
        ops = _row_ops(hidden)
        normed, dropped, mean, rstd = ops.norm_and_drop(hidden, weight_D, bias_D, eps, seeds, QKV_ADAPTER, p, dtype)
        ctx.save_for_backward(hidden, weight_D, mean, rstd, seeds)
        ctx.p = p
        outputs = hidden.view_as(hidden), normed, normed.view_as(normed)
        return outputs if dropped is None else (*outputs, dropped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the residual stream and the LayerNorm's parameters."""
        hidden, weight_D, mean, rstd, seeds = ctx.saved_tensors
        passed, first, second, *dropped = (g.contiguous() for g in grads)
        found = _row_ops(hidden).norm_and_drop_backward(
            hidden, weight_D, mean, rstd, seeds, QKV_ADAPTER, ctx.p,
            (passed, first, second, dropped[0] if dropped else None),
            ctx.needs_input_grad[1], ctx.needs_input_grad[2],
        )  # fmt: skip
        return (*found, None, None, None, None)


class AddBranches(torch.autograd.Function):
    """The next residual stream: RMSNorm of the attention branch, dropout of both branches, and their sum."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, attention: Tensor, rms_weight_D: Tensor, mlp: Tensor, seeds: Tensor, eps: float,
        p: float,
    ) -> Tensor:  # fmt: skip
        """Residual stream and both branches [..., D] -> the next stream [..., D] float32."""
        output, rstd = _row_ops(hidden).add_branches(
            hidden, attention, rms_weight_D, eps, mlp, seeds, (ATTENTION, MLP), p
        )
        ctx.save_for_backward(attention, rms_weight_D, rstd, seeds)
        ctx.p = p
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The residual stream's gradient as it came, the branches' and the weight's."""
        attention, rms_weight_D, rstd, seeds = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_attention, to_mlp, to_weight = _row_ops(grad).add_branches_backward(
            grad, attention, rms_weight_D, rstd, seeds, (ATTENTION, MLP), ctx.p, ctx.needs_input_grad[2]
        )
        return grad, to_attention, to_weight, to_mlp, None, None, None


class DropForAdapter(torch.autograd.Function):
    """A tensor as it is for a frozen matrix, and after dropout for its adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """[...] -> itself, and after dropout; p > 0."""
        ctx.save_for_backward(seeds)
        ctx.p = p
        return x.view_as(x), _row_ops(x).drop(x, seeds, DENSE_ADAPTER, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        passed, dropped = (g.contiguous() for g in grads)
        (seeds,) = ctx.saved_tensors
        return _row_ops(passed).drop_backward(passed, dropped, seeds, DENSE_ADAPTER, ctx.p), None, None


class RotateHeads(torch.autograd.Function):
    """LayerNorm per head and rotary embedding of queries and keys; values stay where they are."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight_H: Tensor, q_bias_H: Tensor, k_weight_H: Tensor, k_bias_H: Tensor,
        cos: Tensor, sin: Tensor, eps: float, num_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """[..., 3 * N * H] -> queries, keys and values [T, N, H]; cos and sin are [..., R]."""
        query, key = _head_ops(qkv).rotate_heads(
            qkv, (q_weight_H, q_bias_H), (k_weight_H, k_bias_H), eps, cos, sin, num_heads
        )
        ctx.save_for_backward(qkv, q_weight_H, k_weight_H, cos, sin)
        ctx.eps = eps
        return query, key, qkv.view(-1, 3, num_heads, q_weight_H.shape[0])[:, 2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q/k/v and the norms' parameters."""
        qkv, q_weight_H, k_weight_H, cos, sin = ctx.saved_tensors
        needed = ctx.needs_input_grad
        query, key, value = (g.contiguous() for g in grads)
        to_qkv, weights, biases = _head_ops(qkv).rotate_heads_backward(
            qkv, q_weight_H, k_weight_H, ctx.eps, cos, sin, (query, key, value),
            needed[1] or needed[3], needed[2] or needed[4],
        )  # fmt: skip
        q_weight, k_weight = (None, None) if weights is None else weights.unbind(0)
        q_bias, k_bias = (None, None) if biases is None else biases.unbind(0)
        return to_qkv, q_weight, q_bias, k_weight, k_bias, None, None, None, None


class AdaptedProduct(torch.autograd.Function):
    """A frozen linear layer with its adapter: the adapter's product is added in the matrix product's own epilogue."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight_OD: Tensor, bias_O: Tensor, down_RD: Tensor, up_OR: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Input [..., D], the adapter's input [..., D] and their matrices -> [..., O] in the dtype of x.

        ``dropped`` is None where the adapter reads x: torch.compile loses gradients of a tensor that is given twice.
        """
        down, up = down_RD.to(x.dtype), up_OR.to(x.dtype)
        adapted = x if dropped is None else dropped
        with torch.autocast(x.device.type, enabled=False):
            narrow = torch.mm(adapted.flatten(0, -2), down.t()) * scale
            output = torch.addmm(bias_O, x.flatten(0, -2), weight_OD.t()).addmm_(narrow, up.t())
        ctx.save_for_backward(adapted, weight_OD, down, up, narrow)
        ctx.scale = scale
        ctx.is_dropped = dropped is not None
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both inputs and of the adapter's matrices."""
        adapted, weight_OD, down, up, narrow = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        to_narrow = torch.mm(grad, up) * ctx.scale
        to_down = torch.mm(to_narrow.t(), adapted.flatten(0, -2)).float()
        to_up = torch.mm(grad.t(), narrow).float()
        to_x, to_dropped = torch.mm(grad, weight_OD), None
        if ctx.is_dropped:
            to_dropped = torch.mm(to_narrow, down).view(adapted.shape)
        else:
            to_x = to_x.addmm_(to_narrow, down)
        return to_x.view(adapted.shape), to_dropped, None, None, to_down, to_up, None
