"""Operations of a decoding, prefill or training step: Triton kernels for a GPU, and the same arithmetic in torch.

``fused`` and ``lowbit`` hold the Triton kernels of the engine, ``reference`` the torch functions that they must agree
with; ``lowbit_rows`` stands for ``lowbit`` on cards older than Ampere. ``training_rows``, ``training_heads`` and
``training_reference`` are the same for training, and ``training_functions`` joins them to autograd. Nothing here knows
the model: tensors in, tensors out.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch


@cache
def step_ops(device_type: str) -> ModuleType:
    """The module whose ``add_norm``, ``bias_gelu``, ``rotate_and_store`` and ``attend`` suit a type of device."""
    if device_type == "cuda" and find_spec("triton"):
        from tinygptv.kernels import fused

        return fused
    from tinygptv.kernels import reference

    return reference


@cache
def lowbit_ops(device: torch.device) -> ModuleType:
    """The module whose ``partial_products`` and ``unpack`` suit a device."""
    if device.type != "cuda" or not find_spec("triton"):
        from tinygptv.kernels import reference

        return reference
    if torch.cuda.get_device_capability(device) < (8, 0):
        from tinygptv.kernels import lowbit_rows

        return lowbit_rows
    from tinygptv.kernels import lowbit

    return lowbit
