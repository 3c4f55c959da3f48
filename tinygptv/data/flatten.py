"""A micro-batch without padding: the real tokens of all samples one after the other. numpy only.

Flat, a batch is one row of T tokens. ``cu_seqlens`` says where each sample begins, so that attention stays inside it;
positions start at 0 with each sample. T is rounded up with one sequence of padding tokens, so that few shapes occur.

Notation: T tokens, L sequences, M supervised positions, I image positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygptv.data.collate import MicroBatch

TOKENS_MULTIPLE = 64
"""T is a multiple of this: whole tiles of the matrix products, and few sizes for the memory allocator."""
SEQUENCES_MULTIPLE = 16
"""L is a multiple of this; the sequences beyond the real ones are empty."""
LEAST_MAX_LENGTH = 64
"""``max_length`` is a power of two from here on."""


@dataclass(frozen=True)
class FlatBatch:
    """Indices of a micro-batch in its flat form; images and features stay in the ``MicroBatch``.

    Attributes:
        input_ids: int64 [T]; 0 at image positions.
        position_ids: int64 [T], from 0 in each sequence; hidden tokens leave gaps.
        image_positions: int64 [I] indices into [T] of image positions, in placeholder order.
        supervised_positions: int64 [M] indices into [T] whose next token is scored.
        supervised_ids: int64 [M] those tokens.
        supervised_sources: int64 [M] data set index of each.
        cu_seqlens: int64 [L + 1] first token of each sequence, and T.
        max_length: at least the tokens of the longest sequence.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    image_positions: np.ndarray
    supervised_positions: np.ndarray
    supervised_ids: np.ndarray
    supervised_sources: np.ndarray
    cu_seqlens: np.ndarray
    max_length: int


def flatten(batch: MicroBatch, image_token_id: int, pad_token_id: int = 0) -> FlatBatch | None:
    """Take the padding out of a padded or packed micro-batch.

    Tokens that the attention mask hides are left out, too: nobody looks at them, and the others keep their positions.

    Args:
        batch: padded or packed.
        image_token_id: marks image positions in ``input_ids``.
        pad_token_id: fills the last sequence up to a multiple of ``TOKENS_MULTIPLE``.

    Returns:
        The flat batch; None where a token is predicted at a hidden position, which has no flat form.
    """
    rows, width = batch.input_ids.shape
    row_lengths = batch.lengths or ((width,),) * rows
    in_row = np.array([sum(lengths) for lengths in row_lengths])
    lengths = np.array([length for row in row_lengths for length in row])
    is_real = np.arange(width)[None, :] < in_row[:, None]
    is_visible = is_real if batch.attention_mask is None else is_real & (batch.attention_mask > 0)
    if not is_visible.ravel()[batch.supervised_positions].all():
        return None

    sequence = np.full((rows, width), -1)
    sequence[is_real] = np.repeat(np.arange(len(lengths)), lengths)
    position = np.zeros_like(sequence)
    position[is_real] = np.arange(len(is_real.nonzero()[0])) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    num_visible = int(is_visible.sum())
    padding = -num_visible % TOKENS_MULTIPLE

    input_ids = np.concatenate([batch.input_ids[is_visible], np.full(padding, pad_token_id, dtype=np.int64)])
    image_positions = np.flatnonzero(input_ids == image_token_id)
    input_ids[image_positions] = 0
    bounds = np.concatenate([[0], np.cumsum(np.bincount(sequence[is_visible], minlength=len(lengths)))])
    if padding:
        bounds = np.append(bounds, num_visible + padding)
    num_empty = -(len(bounds) - 1) % SEQUENCES_MULTIPLE
    longest = int(np.diff(bounds).max())
    return FlatBatch(
        input_ids=input_ids,
        position_ids=np.concatenate([position[is_visible], np.arange(padding)]),
        image_positions=image_positions,
        supervised_positions=(np.cumsum(is_visible) - 1)[batch.supervised_positions],
        supervised_ids=batch.supervised_ids,
        supervised_sources=batch.supervised_sources,
        cu_seqlens=np.pad(bounds, (0, num_empty), mode="edge"),
        max_length=max(LEAST_MAX_LENGTH, 1 << (longest - 1).bit_length()),
    )
