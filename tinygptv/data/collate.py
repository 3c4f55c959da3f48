"""Encoded samples -> one micro-batch of arrays, padded or packed. numpy only: it runs in loader processes.

Padded, a row is one sample and padding stands at its end. Packed, a row holds several samples; their positions start at
0 again, and transformers' causal mask keeps samples apart wherever positions restart.

Notation: B rows, S sequence, N images, R image side, Q query tokens, F Q-Former width, M supervised positions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tinygptv.data.sample import IGNORE_INDEX, EncodedSample


@dataclass
class LoadedSample:
    """A sample that is ready to be batched.

    Attributes:
        encoded: ids, labels, attention.
        source: index of its data set in the stage's sources.
        pixels: uint8 [3, R, R], or None.
        query_features: [Q, F] cached features, or None.
    """

    encoded: EncodedSample
    source: int
    pixels: np.ndarray | None = None
    query_features: np.ndarray | None = None


@dataclass
class MicroBatch:
    """Arrays of one forward pass.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S]; None where it would hide tail padding only, which a causal model never looks at.
        position_ids: int64 [B, S] where packed; None counts from 0.
        supervised_positions: int64 [M] indices into [B * S] whose next token is scored.
        supervised_ids: int64 [M] those tokens.
        supervised_sources: int64 [M] data set index of each.
        pixels: uint8 [N, 3, R, R] in placeholder order, or None.
        query_features: [N, Q, F] in placeholder order, or None.
        num_samples: samples in the batch.
        num_real: tokens that are no padding.
        lengths: tokens of each sample, row by row from the start of the row; None where every row is one sequence of
            full width.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    position_ids: np.ndarray | None
    supervised_positions: np.ndarray
    supervised_ids: np.ndarray
    supervised_sources: np.ndarray
    pixels: np.ndarray | None
    query_features: np.ndarray | None
    num_samples: int
    num_real: int
    lengths: tuple[tuple[int, ...], ...] | None = None


def collate(
    samples: Sequence[LoadedSample], pad_token_id: int, *, pack_length: int = 0, pad_to_multiple: int = 1
) -> MicroBatch:
    """Batch samples.

    Args:
        samples: at least one.
        pad_token_id: fills the ends of rows.
        pack_length: 0 gives each sample a row; else rows of at least so many tokens hold several samples.
        pad_to_multiple: the width of the batch is a multiple of this, so that fewer shapes occur.

    Raises:
        ValueError: samples hide tokens inside their text and packing is asked for.
    """
    lengths = [len(sample.encoded.input_ids) for sample in samples]
    bins = pack(lengths, max(pack_length, *lengths)) if pack_length else [[i] for i in range(len(samples))]
    width = -(-max(sum(lengths[i] for i in row) for row in bins) // pad_to_multiple) * pad_to_multiple
    input_ids = np.full((len(bins), width), pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    attention_mask = np.zeros_like(input_ids)
    position_ids = np.zeros_like(input_ids)
    sources = np.zeros_like(input_ids)
    for row, members in enumerate(bins):
        start = 0
        for i in members:
            encoded, span = samples[i].encoded, slice(start, start + lengths[i])
            input_ids[row, span] = encoded.input_ids
            labels[row, span] = encoded.labels
            labels[row, start] = IGNORE_INDEX  # the token before it belongs to another sample
            attention_mask[row, span] = encoded.attention_mask
            position_ids[row, span] = np.arange(lengths[i])
            sources[row, span] = samples[i].source
            start += lengths[i]
        position_ids[row, start:] = np.arange(width - start)
    has_holes = any(0 in sample.encoded.attention_mask for sample in samples)
    if has_holes and pack_length:
        raise ValueError(
            "samples with hidden tokens inside (the release's inner BOS) cannot be packed: switch packing off."
        )
    rows, columns = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    order = [i for members in bins for i in members]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask if has_holes else None,
        position_ids=position_ids if pack_length else None,
        supervised_positions=rows * width + columns,
        supervised_ids=labels[rows, columns + 1],
        supervised_sources=sources[rows, columns + 1],
        pixels=_stack([samples[i].pixels for i in order]),
        query_features=_stack([samples[i].query_features for i in order]),
        num_samples=len(samples),
        num_real=sum(lengths),
        lengths=tuple(tuple(lengths[i] for i in members) for members in bins),
    )


def cut(lengths: Sequence[int], most_samples: int, most_tokens: int = 0, *, padded: bool = True) -> list[slice]:
    """Cut a step's samples into micro-batches.

    Args:
        lengths: tokens of each sample, ascending.
        most_samples: of a micro-batch.
        most_tokens: of a micro-batch; 0 does not count them. A longer sample stands alone.
        padded: count the padding to the longest sample, too.

    Returns:
        Slices of the samples: as few as possible and, where tokens are counted, of about as many tokens.
    """
    if not most_tokens:
        return [slice(i, i + most_samples) for i in range(0, len(lengths), most_samples)]
    before = list(accumulate(lengths, initial=0))

    def pieces(limit: int) -> list[slice]:
        found, start = [], 0
        for i, length in enumerate(lengths):
            tokens = (i - start + 1) * length if padded else before[i + 1] - before[start]
            if i > start and (i - start == most_samples or tokens > limit):
                found.append(slice(start, i))
                start = i
        return [*found, slice(start, len(lengths))] if lengths else []

    fewest = len(pieces(most_tokens))
    return pieces(bisect_left(range(most_tokens), True, key=lambda limit: len(pieces(limit)) <= fewest))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into rows, longest first, each into the first row with room.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row; no sample may be longer.

    Returns:
        Sample indices per row. The result depends on the lengths alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            bins.append([])
            room.append(capacity)
            row = len(bins) - 1
        bins[row].append(i)
        room[row] -= lengths[i]
    return bins


def _stack(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.stack(present) if present else None
