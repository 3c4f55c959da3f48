"""Memory in pages of a size that suits its use. Beyond Linux, and for less than 2 MB, it is the system's choice."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2**21
IS_LINUX = hasattr(mmap, "MADV_HUGEPAGE")


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for what is read from end to end, as weights: in pages of 2 MB, where the system has some free.

    A processor has to look up each page before it can read ahead in it. No memory is taken beyond the tensor's own:
    what is left of it after whole large pages stays in small ones.
    """
    return _zeros(shape, dtype, "MADV_HUGEPAGE")


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for what is filled bit by bit, as a cache: pages of 4 KB take memory, and time, when they are written."""
    return _zeros(shape, dtype, "MADV_NOHUGEPAGE")


def _zeros(shape: Sequence[int], dtype: torch.dtype, advice: str) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    if not IS_LINUX:  # torch would write the zeros; NumPy leaves that to the system
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(*shape)
    mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a system without large pages
        mapping.madvise(getattr(mmap, advice), start, size // HUGE_PAGE * HUGE_PAGE)
    return whole[start : start + size].view(dtype).view(*shape)
