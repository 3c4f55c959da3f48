"""All layers of the language model in one call on a CPU, by the C function of ``host_step.c``.

Notation: T tokens, D width, N heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinygptv.kernels.host_attention import HostAttention
from tinygptv.kernels.host_library import address, loaded_library
from tinygptv.kernels.host_linear import HostInt4, HostInt8
from tinygptv.kernels.host_structs import Layer, Norm, Sum

Product = HostInt8 | HostInt4


@dataclass(frozen=True)
class LayerParts:
    """What a layer of the language model is made of.

    Attributes:
        qkv: [3 D, D].
        dense: [D, D].
        fc1: first matrix of the MLP; a tanh GELU follows.
        fc2: second matrix.
        attention: between ``qkv`` and ``dense``.
        norm: of the layer's input; None for none.
        rms_weight: [D] of the norm after attention; None for none.
        rms_eps: its epsilon.
    """

    qkv: Product
    dense: Product
    fc1: Product
    fc2: Product
    attention: HostAttention
    norm: nn.LayerNorm | None
    rms_weight: Tensor | None
    rms_eps: float

    def packed(self) -> Layer:
        """As the C function takes it; the tensors have to live as long."""
        width = self.qkv.inputs
        matrices = (product.matrix(product.bias) for product in (self.qkv, self.dense, self.fc1, self.fc2))
        norm = Norm(width=width)
        if self.norm is not None:
            norm.weight, norm.bias, norm.eps = address(self.norm.weight), address(self.norm.bias), self.norm.eps
        rms = Sum(weight=address(self.rms_weight), eps=self.rms_eps, width=width)
        return Layer(*matrices, self.attention.of_layer, norm, rms)


class HostStep:
    """Maps the residual stream of a step's tokens through all layers."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        """Take layers of equal size and format (``are_alike``)."""
        self.layers = layers  # their tensors live as long as the addresses below
        self.packed = (Layer * len(layers))(*(layer.packed() for layer in layers))

    @staticmethod
    def are_alike(layers: Sequence[LayerParts]) -> bool:
        """Whether all layers have the same sizes and bits, and the products that share an input round it alike."""
        packed = [layer.packed() for layer in layers]
        matrices = [(layer.qkv, layer.dense, layer.fc1, layer.fc2) for layer in packed]
        formats = [[(matrix.inputs, matrix.outputs, matrix.group) for matrix in each] for each in matrices]
        return all(each == formats[0] for each in formats) and packed[0].qkv.group == packed[0].fc1.group

    def __call__(self, hidden: Tensor, positions: Tensor, cache_rows: Tensor, num_decoding: int) -> Tensor:
        """Run the layers, extending their caches.

        Args:
            hidden: float32 [T, D].
            positions: int64 [T].
            cache_rows: int64 [T * N] as in ``StepPlan``.
            num_decoding: the first so many tokens are a new one each of as many sequences.

        Returns:
            [T, D].
        """
        out = hidden.clone(memory_format=torch.contiguous_format)
        failed = loaded_library().run_layers(
            self.packed, len(self.packed), out.data_ptr(), positions.data_ptr(), cache_rows.data_ptr(), len(out),
            num_decoding, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for a step of {len(out)} tokens.")
        return out
