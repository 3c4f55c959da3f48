"""Rows that are kept from training, chosen by the hash of their image: the same rows when data is added or moved.

Rows of one image stay together, so that no image that is trained on is also evaluated.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.data.shards import ShardSet

_EDGE_BYTES = 2048


def hold_out(shards: Mapping[str, ShardSet], fraction: float) -> dict[str, np.ndarray]:
    """Rows of each source that are held out.

    Args:
        shards: opened shard sets by source; their ids and the ends of their images are read.
        fraction: about this share of the images, 0 to 1.

    Returns:
        Ascending row numbers, for every source.
    """
    return {name: np.flatnonzero(row_hashes(found) < fraction) for name, found in shards.items()}


def row_hashes(shards: ShardSet, rows: np.ndarray | None = None) -> np.ndarray:
    """A number in [0, 1) for each row, from its image; from its id where it has none.

    Args:
        shards: the rows' shard set.
        rows: ascending row numbers; None takes all. Other rows are not read.
    """
    rows = np.arange(len(shards)) if rows is None else rows
    hashes, start = np.empty(len(rows), dtype=np.float64), 0
    for shard in range(len(shards.shard_rows)):
        for batch in shards.batches(shard):
            first, end = np.searchsorted(rows, (start, start + batch.num_rows))
            keys, images = batch.column("id"), batch.column("image")
            hashes[first:end] = [_hash(keys[i], images[i]) for i in (rows[first:end] - start).tolist()]
            start += batch.num_rows
    return hashes


def _hash(key: Any, image: Any) -> float:
    digest = hashlib.blake2b(digest_size=8)
    if image.is_valid:
        data = memoryview(image.as_buffer())  # in place: only the pages of both ends are read
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data[:_EDGE_BYTES])
        digest.update(data[-_EDGE_BYTES:])
    else:
        digest.update(str(key.as_py()).encode(errors="surrogatepass"))
    return int.from_bytes(digest.digest(), "little") / 2**64


def kept_row(held: np.ndarray, index: int) -> int:
    """Row number of the ``index``-th row that is not held out.

    Args:
        held: ascending row numbers.
        index: 0-based, counted without them.
    """
    # Not by numpy: a web-scale set holds out millions of rows, and every sample asks.
    return index + bisect_right(range(len(held)), index, key=lambda place: int(held[place]) - place)


def kept_counts(shard_rows: tuple[int, ...], held: np.ndarray) -> tuple[int, ...]:
    """Rows of each shard that are not held out."""
    ends = np.cumsum(shard_rows)
    before = np.searchsorted(held, ends, side="left")
    return tuple(int(rows) for rows in np.array(shard_rows) - np.diff(before, prepend=0))
