"""Arguments of the C functions for CPUs that come in groups, as the header files of this folder declare them.

They hold addresses: whoever makes one keeps the tensors.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p


class Matrix(ctypes.Structure):
    """A matrix in low bits (``host_linear.h``)."""

    inputs: int
    outputs: int
    group: int
    _fields_ = [
        *((name, c_void_p) for name in ("weights", "scale", "totals", "bias")),
        *((name, c_int64) for name in ("inputs", "outputs", "group")),
    ]


class Attention(ctypes.Structure):
    """Attention of a step's tokens (``host_attention.h``)."""

    qkv: int
    out: int
    positions: int
    cache_rows: int
    decoding: int
    heads: int
    width: int
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin")),
        *((name, c_void_p) for name in ("positions", "cache_rows", "keys", "values", "out")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_int64) for name in ("decoding", "heads")),
        *((name, c_int) for name in ("rotary", "half", "width")),
    ]


class Sum(ctypes.Structure):
    """The sum of a layer's branches (``host_attention.h``)."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention", "weight", "mlp", "hidden", "out")),
        ("eps", c_float),
        ("width", c_int64),
    ]


class Norm(ctypes.Structure):
    """A LayerNorm (``host_attention.h``)."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "out")),
        ("eps", c_float),
        ("width", c_int64),
    ]


class Layer(ctypes.Structure):
    """A layer of the language model (``host_step.c``)."""

    qkv: Matrix
    dense: Matrix
    fc1: Matrix
    fc2: Matrix
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "dense", "fc1", "fc2")),
        ("attention", Attention),
        ("norm", Norm),
        ("sum", Sum),
    ]
