"""Returns memory that loading freed to the system.

glibc keeps freed blocks of up to 32 MB for itself, which are most of a model's matrices: packing 4 GB of weights for a
CPU's kernels left 3 GB of holes (benchmarks/results/cpu_decode.md). With other C libraries nothing here does anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

MAPPED_FROM = 2**20
"""While weights are loaded, blocks of this size and more (bytes) get mappings of their own, which end when freed."""
MAPPED_AFTERWARDS = 2**25
"""glibc's own upper bound: activations are then reused, not mapped again and again."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of settings in glibc's malloc.h."""


@contextmanager
def returning_memory() -> Iterator[None]:
    """Load weights within the block, and no more memory stays in use than they take."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_AFTERWARDS)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_AFTERWARDS)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
