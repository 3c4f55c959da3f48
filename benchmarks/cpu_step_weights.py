"""What the graphs of ``cpu_step_onnx`` and ``cpu_step_openvino`` are made from: rounded matrices, norms, rotary tables.

Notation: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.inference.flat_layer import rotary_tables

_RANDOM = np.random.default_rng(0)

Rounded = tuple[np.ndarray, np.ndarray]
"""Numbers int8 [O, I] and float32 scales [O, I / block] of a matrix."""


def round_blocks(matrix: nn.Linear, bits: int, block: int) -> Rounded:
    """Round a matrix in blocks of each row; a matrix on torch's meta device gets random numbers."""
    outputs, inputs = matrix.out_features, matrix.in_features
    if matrix.weight.is_meta:
        # Others than before each time: a library may keep equal matrices once.
        numbers = np.frombuffer(_RANDOM.bytes(outputs * inputs), np.int8).reshape(outputs, inputs)
        return numbers >> (8 - bits), np.full((outputs, inputs // block), 2e-4 * 2 ** (8 - bits), np.float32)
    peak = 2 ** (bits - 1) - 1
    weights = matrix.weight.detach().float().numpy().reshape(outputs, -1, block)
    scales = np.maximum(np.abs(weights).max(-1, keepdims=True) / peak, 1e-20)
    return np.rint(weights / scales).astype(np.int8).reshape(outputs, inputs), scales[..., 0]


def pairs(numbers: np.ndarray) -> np.ndarray:
    """Two 4-bit numbers of a row in a byte, the even column low."""
    low = numbers.astype(np.uint8) & 15
    return low[:, ::2] | (low[:, 1::2] << 4)


def vector(parameter: Tensor | None, size: int = 0) -> np.ndarray:
    """Numbers of a norm or bias; zeros for none and on the meta device."""
    if parameter is None or parameter.is_meta:
        return np.zeros(size if parameter is None else parameter.shape, np.float32)
    return parameter.detach().float().numpy()


class TextModel:
    """Sizes and rotary tables of a language model."""

    def __init__(self, model: TinyGPTVForConditionalGeneration, length: int) -> None:
        attention = model.language_model.layers[0].self_attn
        self.heads, self.head_dim, self.rotary = attention.num_heads, attention.head_dim, attention.rotary_dim
        self.width, self.scale = self.heads * self.head_dim, attention.scaling
        tables = rotary_tables(model.language_model, length, self.head_dim, self.rotary)
        self.cos, self.sin = (table[:, 0, self.rotary // 2 : self.rotary].numpy() for table in (tables.cos, tables.sin))
        self.embedding = model.language_model.embed_tokens.weight.detach().numpy()
        self.vocabulary = model.lm_head.out_features
