"""Operations of a decoding, prefill or training step: Triton kernels for a GPU, and the same arithmetic in torch.

``fused`` and ``lowbit`` hold the Triton kernels of the engine, ``reference`` the torch functions that they must agree
with; ``training_rows``, ``training_heads`` and ``training_reference`` are the same for training, and
``training_functions`` joins them to autograd. Nothing here knows the model: tensors in, tensors out.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType


@cache
def step_ops(device_type: str) -> ModuleType:
    """The module whose ``add_norm``, ``bias_gelu``, ``rotate_and_store`` and ``attend`` suit a type of device."""
    if device_type == "cuda" and find_spec("triton"):
        from tinygptv.kernels import fused

        return fused
    from tinygptv.kernels import reference

    return reference


@cache
def lowbit_ops(device_type: str) -> ModuleType:
    """The module whose ``partial_products`` and ``unpack`` suit a type of device."""
    if device_type == "cuda" and find_spec("triton"):
        from tinygptv.kernels import lowbit

        return lowbit
    from tinygptv.kernels import reference

    return reference
