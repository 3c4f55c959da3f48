"""The language model's layers as one call on a CPU (``kernels.host_step``), where all of them have the kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tinygptv.inference.flat_layer import FlatLayer, HostFlatLayer
from tinygptv.kernels.host_attention import gelu_rows
from tinygptv.kernels.host_linear import HostInt4, HostInt8
from tinygptv.kernels.host_step import HostStep, LayerParts, Product
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear


def host_step(layers: Sequence[FlatLayer]) -> HostStep | None:
    """The step, or None where a layer has matrices, an activation or sizes without a kernel."""
    parts = [_parts(layer) for layer in layers]
    found = [part for part in parts if part is not None]
    return HostStep(found) if len(found) == len(parts) and HostStep.are_alike(found) else None


def _parts(flat: FlatLayer) -> LayerParts | None:
    if not isinstance(flat, HostFlatLayer) or flat.activation is not gelu_rows:
        return None
    layer, attention, mlp = flat.layer, flat.attention, flat.layer.mlp
    modules = (attention.qkv_proj, attention.dense, mlp.fc1, mlp.fc2)
    products = [product for module in modules if (product := _product(module)) is not None]
    norm = layer.input_layernorm
    if len(products) < len(modules) or not isinstance(norm, nn.LayerNorm | nn.Identity):
        return None
    qkv, dense, fc1, fc2 = products
    rms_weight, rms_eps = flat.rms
    return LayerParts(
        qkv, dense, fc1, fc2, flat.host, norm if isinstance(norm, nn.LayerNorm) else None, rms_weight, rms_eps
    )


def _product(module: nn.Module) -> Product | None:
    """The C function's product of a low-bit layer; None of any other."""
    is_packed = isinstance(module, Int8Linear | Int4Linear)
    return module.product if is_packed and isinstance(module.product, HostInt8 | HostInt4) else None
