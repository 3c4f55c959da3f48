"""Capture a function's work on the device as a CUDA graph, beside other threads that use the device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_one_capture = threading.Lock()


def capture_graph(function: Callable[[], Tensor], pool: Any, changes: Sequence[Tensor] = ()) -> Callable[[], Tensor]:
    """Run a function once, then capture it.

    Args:
        function: reads and writes tensors of fixed addresses, and never waits for the device.
        pool: memory that graphs share, from ``torch.cuda.graph_pool_handle``.
        changes: tensors that the function changes; they keep their values.

    Returns:
        A function that replays the work. It returns the same tensor each time: what ``function`` returned.
    """
    with _one_capture:
        kept = [tensor.clone() for tensor in changes]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries opened before the capture
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            _no_garbage_collection(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            output = function()
        for tensor, value in zip(changes, kept, strict=True):
            tensor.copy_(value)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting an older model in the middle of a capture frees its graphs, which ends the capture with an error."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
