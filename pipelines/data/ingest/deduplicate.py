"""Samples and images that occur twice, found over all shards at once from their hashes alone. numpy only.

Memory is 32 bytes per row, so a hundred million rows fit into a few gigabytes of the driver.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_BITS = 64
_PAIRS_AT_ONCE = 1 << 22
_LARGEST_GROUP = 1 << 13


@dataclass(frozen=True)
class NearDuplicate:
    """An image that hardly differs from an earlier one.

    Attributes:
        row: its row.
        earlier: row of the first image like it.
        bits: in how many bits their perceptual hashes differ.
    """

    row: int
    earlier: int
    bits: int


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """For each row, the first row with the same hash.

    Args:
        hashes: uint64 [rows, words] or [rows].

    Returns:
        int64 [rows]; a row that is the first of its kind names itself.
    """
    words = hashes if hashes.ndim == 2 else hashes[:, None]
    order = np.lexsort(words.T)  # stable: equal hashes stay in row order
    changes = np.ones(len(order), dtype=bool)
    changes[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    heads = order[changes]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = heads[np.cumsum(changes) - 1]
    return first


def find_near_duplicates(image_hashes: np.ndarray, perceptual_hashes: np.ndarray, max_bits: int) -> list[NearDuplicate]:
    """Images whose perceptual hashes differ by at most ``max_bits`` from an earlier image's.

    Rows that share one image, to the byte, are no near-duplicates of each other.

    Args:
        image_hashes: uint64 [rows], of the encoded image; 0 where a row has none.
        perceptual_hashes: uint64 [rows].
        max_bits: 0 asks for equal hashes.

    Returns:
        One entry per flagged row, in row order.
    """
    with_image = np.flatnonzero((image_hashes != 0) & (first_occurrences(image_hashes) == np.arange(len(image_hashes))))
    hashes = perceptual_hashes[with_image]
    same = first_occurrences(hashes)
    earliest, bits = same.copy(), np.zeros(len(same), dtype=np.int64)
    kinds = np.flatnonzero(same == np.arange(len(same)))
    earlier, differs = _nearest_earlier(hashes[kinds], max_bits)
    found = np.flatnonzero(earlier >= 0)
    earliest[kinds[found]], bits[kinds[found]] = kinds[earlier[found]], differs[found]
    flagged = np.flatnonzero(earliest != np.arange(len(earliest)))
    columns = with_image[flagged], with_image[earliest[flagged]], bits[flagged]
    return list(map(NearDuplicate, *(column.tolist() for column in columns)))


def _nearest_earlier(hashes: np.ndarray, max_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of several different hashes, the first one before it within ``max_bits``, or -1, and the distance.

    Two hashes that differ in at most n bits agree in at least one of n + 1 bands, so only those that share a band are
    compared.
    """
    earlier = np.full(len(hashes), len(hashes), dtype=np.int64)
    differs = np.zeros(len(hashes), dtype=np.int64)
    borders = np.linspace(0, _BITS, max_bits + 2).astype(int)
    for low, high in itertools.pairwise(borders):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = (
            np.flatnonzero(np.r_[True, band[order[1:]] != band[order[:-1]]]) if len(order) else np.empty(0, dtype=int)
        )
        for group in np.split(order, starts[1:]):
            for part in _bounded(hashes, group):
                _compare_group(hashes, part, max_bits, earlier, differs)
    earlier[earlier == len(hashes)] = -1
    return earlier, differs


def _bounded(hashes: np.ndarray, group: np.ndarray) -> list[np.ndarray]:
    """A group cut into parts of bounded size, neighbours by value together: pairs grow with the square of a group.

    Groups of this size come from flat images; rows of different parts are then not compared in this band.
    """
    if len(group) <= _LARGEST_GROUP:
        return [group] if len(group) > 1 else []
    by_value = group[np.argsort(hashes[group], kind="stable")]
    return [np.sort(by_value[i : i + _LARGEST_GROUP]) for i in range(0, len(group), _LARGEST_GROUP)]


def _compare_group(
    hashes: np.ndarray, group: np.ndarray, max_bits: int, earlier: np.ndarray, differs: np.ndarray
) -> None:
    """Compare all members of a group, which is in row order; keeps the earliest match of each in ``earlier``."""
    rows_at_once = max(1, _PAIRS_AT_ONCE // len(group))
    for start in range(0, len(group), rows_at_once):
        later = group[start : start + rows_at_once]
        distance = np.bitwise_count(hashes[later][:, None] ^ hashes[group][None, :])
        near = (distance <= max_bits) & (group[None, :] < later[:, None])
        hit = near.any(axis=1)
        column = near.argmax(axis=1)
        better = hit & (group[column] < earlier[later])
        earlier[later[better]] = group[column[better]]
        differs[later[better]] = distance[np.flatnonzero(better), column[better]]
