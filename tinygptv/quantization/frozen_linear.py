"""Frozen matrices of the language model in low bits while adapters train beside them (QLoRA, arXiv 2305.14314).

A product unpacks its matrix to the dtype of the computation, once forward and once backward, so that between the two
nothing but the packed weights exists. Gradients pass through to the input; the packed weights have none.

Notation: O output width, I input width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from tinygptv.checkpoint.stored_weights import is_rounding
from tinygptv.checkpoint.weight_files import open_weights
from tinygptv.kernels import lowbit_ops
from tinygptv.kernels.shapes import PackedWeight
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.artifact import PACKED, format_class
from tinygptv.quantization.linear_packed import PackedLinear

logger = logging.getLogger(__name__)

FrozenFormat = Literal["int8", "nf4"]
"""Formats that frozen matrices may have while adapters train."""

_ROUNDING = 0.2
"""Largest difference that rounding makes, relative to a matrix's largest value: half of NF4's widest gap is 0.15."""


class FrozenLinear(PackedLinear):
    """``PackedLinear`` that gradients pass through, for training."""

    def unpacked(self) -> Tensor:
        """The matrix [O, I] as it is used."""
        return lowbit_ops(self.weight.device).unpack(self.packed, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., I] to [..., O], in autocast's dtype or else the layer's."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype)
        weight = self.packed
        return _product(
            x, self.bias, weight.codes, weight.scale, weight.offset, weight.table, weight.group, weight.inputs
        )


# One operation for torch.compile, which would otherwise share the unpacked matrix between the forward and the backward
# pass, and so keep it.
@torch.library.custom_op("tinygptv::frozen_product", mutates_args=())
def _product(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None,
    group: int, inputs: int,
) -> Tensor:  # fmt: skip
    matrix_OI = _unpack(codes, scale, offset, table, group, inputs, x.dtype)
    return nn.functional.linear(x, matrix_OI, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("tinygptv::frozen_product_backward", mutates_args=())
def _product_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, group: int, inputs: int
) -> Tensor:
    return grad @ _unpack(codes, scale, offset, table, group, inputs, grad.dtype)


def _unpack(
    codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, group: int, inputs: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return lowbit_ops(codes.device).unpack(PackedWeight(codes, scale, offset, table, group, inputs), dtype)


@_product.register_fake
def _(x: Tensor, bias: Tensor | None, codes: Tensor, *packed: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@_product_backward.register_fake
def _(grad: Tensor, codes: Tensor, *packed: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], packed[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *tensors, ctx.group, ctx.inputs = inputs
    ctx.save_for_backward(*tensors)


def _pass_on(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x = _product_backward(grad, *ctx.saved_tensors, ctx.group, ctx.inputs)
    return to_x, None, None, None, None, None, None, None


_product.register_autograd(_pass_on, setup_context=_keep)


def pack_frozen(model: TinyGPTVForConditionalGeneration, form: FrozenFormat, device: torch.device) -> int:
    """Round the frozen matrices of the language layers to low bits, in place, one after another.

    Embedding, language head, norms, biases and adapters stay as they are.

    Args:
        model: with its adapters added and what trains set.
        form: of the matrices.
        device: where the packed weights will be; the rest of the model stays where it is.

    Returns:
        Number of matrices packed.

    Raises:
        ValueError: the format needs a library that is not installed.
    """
    kind, layers = format_class(form), model.language_model.layers
    found = [(name, module) for name, module in layers.named_modules() if _is_frozen(module, name)]
    for name, linear in found:
        with torch.no_grad():
            packed = cast(PackedLinear, PACKED[form](kind.pack(linear, device), device, linear.weight.dtype))
        layers.set_submodule(name, FrozenLinear(packed.packed, packed.bias, packed.dtype))
    return len(found)


def _is_frozen(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    is_matrix = type(module) is nn.Linear and "lora_" not in name
    return is_matrix and not any(parameter.requires_grad for parameter in module.parameters())


@torch.no_grad()
def unpack_frozen(model: TinyGPTVForConditionalGeneration, start: str | Path) -> None:
    """Put the stored matrices of the start back into a model that is to be written, in place, on the CPU.

    Args:
        model: after ``pack_frozen``; has matrices on several devices afterwards.
        start: local folder of the checkpoint that it was loaded from.
    """
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)]
    stored = open_weights(start) if packed else {}
    for name, layer in packed:
        key = f"{name}.weight" if f"{name}.weight" in stored else f"{name.removesuffix('.base_layer')}.weight"
        used, weight = layer.unpacked().cpu(), stored[key].load().to(layer.dtype, copy=True)
        if not is_rounding(weight, used, _ROUNDING):
            logger.warning("%s of %s has changed since training began: the rounded values are written.", key, start)
            weight = used
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to("cpu", layer.dtype), requires_grad=False)
        model.set_submodule(name, linear)
