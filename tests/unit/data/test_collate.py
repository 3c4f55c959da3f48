"""Micro-batches: every array of them by hand, padded and packed; cutting and packing."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptv.data.collate import LoadedSample, collate, cut, pack
from tinygptv.data.sample import EncodedSample


def make(question, answer, source=0, **images):
    encoded = EncodedSample()
    encoded.add(question)
    encoded.add(answer, learn=True)
    return LoadedSample(encoded, source, **images)


def image(value):
    return np.full((3, 2, 2), value, dtype=np.uint8)


def test_padded():
    batch = collate([make([1, 2], [3]), make([4], [5, 6, 7, 8], source=2)], 99, pad_to_multiple=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 99, 99, 99, 99, 99], [4, 5, 6, 7, 8, 99, 99, 99]]
    assert batch.attention_mask is None and batch.position_ids is None
    assert batch.supervised_positions.tolist() == [1, 8, 9, 10, 11]
    assert batch.supervised_ids.tolist() == [3, 5, 6, 7, 8]
    assert batch.supervised_sources.tolist() == [0, 2, 2, 2, 2]
    assert (batch.num_samples, batch.num_real, batch.lengths) == (2, 8, ((3,), (5,)))
    assert batch.pixels is None and batch.query_features is None
    assert {array.dtype for array in (batch.input_ids, batch.supervised_positions, batch.supervised_ids)} == {
        np.dtype(np.int64)
    }


def test_packed():
    samples = [make([1], [2], pixels=image(1)), make([3, 4, 5], [6], source=1, pixels=image(2)), make([7], [8, 9], 2)]
    batch = collate(samples, 0, pack_length=5)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 0], [7, 8, 9, 1, 2]], "longest first, each where there is room"
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.supervised_positions.tolist() == [2, 5, 6, 8]
    assert batch.supervised_ids.tolist() == [6, 8, 9, 2]
    assert batch.supervised_sources.tolist() == [1, 2, 2, 0]
    assert batch.pixels[:, 0, 0, 0].tolist() == [2, 1], "images follow their samples"
    assert (batch.num_samples, batch.num_real, batch.lengths) == (3, 9, ((4,), (3, 2)))
    assert batch.attention_mask is None


def test_a_row_is_as_long_as_the_longest_sample():
    batch = collate([make([1, 2, 3, 4], [5]), make([6], [7])], 0, pack_length=3)
    assert batch.input_ids.shape == (2, 5)
    batch = collate([make([1], [2]), make([3], [4])], 0, pack_length=100, pad_to_multiple=3)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 0, 0]], "no longer than what it holds"


def test_the_first_token_of_a_packed_sample_is_no_target():
    """Its predecessor belongs to another sample."""
    whole = LoadedSample(EncodedSample(), 0)
    whole.encoded.add([5, 6], learn=True)
    batch = collate([make([1], [2]), whole], 0, pack_length=4)
    assert batch.supervised_ids.tolist() == [2, 6]


def test_hidden_tokens_are_masked_and_cannot_be_packed():
    hidden = EncodedSample()
    hidden.add([1])
    hidden.add([2], attend=False)
    hidden.add([3], learn=True)
    samples = [LoadedSample(hidden, 0), make([1, 1, 1], [4])]
    batch = collate(samples, 0)
    assert batch.attention_mask.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    with pytest.raises(ValueError, match="cannot be packed"):
        collate(samples, 0, pack_length=8)


def test_cached_features_stand_in_order():
    features = [np.full((2, 3), value, dtype=np.float32) for value in (1, 2)]
    samples = [make([1], [2], query_features=features[0]), make([1], [2]), make([1], [2], query_features=features[1])]
    assert collate(samples, 0).query_features[:, 0, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([5, 3, 4, 1], 5, [[0], [2, 3], [1]]),
        ([2, 2, 2], 6, [[0, 1, 2]]),
        ([2, 2, 2], 5, [[0, 1], [2]]),
        ([3, 3, 2, 2], 5, [[0, 2], [1, 3]]),
        ([], 5, []),
    ],
)
def test_samples_go_into_the_first_row_with_room(lengths, capacity, rows):
    assert pack(lengths, capacity) == rows


def pieces(*arguments, **options):
    return [(piece.start, piece.stop) for piece in cut(*arguments, **options)]


def test_cut_by_samples():
    assert pieces([1] * 5, 2) == [(0, 2), (2, 4), (4, 6)]
    assert pieces([], 2) == pieces([], 2, 10) == []
    assert pieces([1] * 4, 4) == [(0, 4)]


def test_cut_by_tokens():
    assert pieces([1, 1, 2, 4], 9, 8, padded=False) == [(0, 4)]
    assert pieces([1, 1, 2, 4], 9, 8) == [(0, 3), (3, 4)], "padded they are sixteen"
    assert pieces([1, 1, 2, 4], 9, 7, padded=False) == [(0, 3), (3, 4)]
    assert pieces([2, 2, 2, 2], 9, 6) == [(0, 2), (2, 4)], "two of as many tokens, not three and one"
    assert pieces([2, 2, 2, 2], 3, 100) == [(0, 2), (2, 4)]
    assert pieces([2] * 5, 3, 100) == [(0, 3), (3, 5)]
    assert pieces([1, 50], 9, 8) == [(0, 1), (1, 2)], "a longer one stands alone"
    assert pieces([50, 60], 9, 8) == [(0, 1), (1, 2)]
    assert pieces([3], 9, 1) == [(0, 1)]
