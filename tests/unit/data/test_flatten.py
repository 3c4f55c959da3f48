"""The flat form of a micro-batch: the same tokens in the same order, without padding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training_batches import make_sample, mixed_samples
from tinygptv.data.collate import LoadedSample, MicroBatch, collate
from tinygptv.data.flatten import flatten
from tinygptv.data.sample import EncodedSample

IMAGE = 256


@pytest.mark.parametrize("pack_length", [0, 64])
def test_flat_batches_hold_each_sample_once_and_whole(pack_length):
    samples = mixed_samples()
    batch = collate(samples, 0, pack_length=pack_length)
    flat = flatten(batch, IMAGE)
    pieces = [
        flat.input_ids[start:stop].tolist()
        for start, stop in zip(flat.cu_seqlens[:-1], flat.cu_seqlens[1:], strict=True)
        if stop > start
    ]
    whole = [[0 if i == IMAGE else i for i in s.encoded.input_ids] for s in samples]
    assert sorted(pieces[:-1]) == sorted(whole) and set(pieces[-1]) == {0}  # the last is padding
    for start, stop in zip(flat.cu_seqlens[:-1], flat.cu_seqlens[1:], strict=True):
        assert flat.position_ids[start:stop].tolist() == list(range(stop - start))
    assert flat.max_length == 64 >= max(map(len, whole))
    assert len(flat.image_positions) == 4 * 4


@pytest.mark.parametrize("pack_length", [0, 64])
def test_supervised_positions_name_the_same_tokens(pack_length):
    batch = collate(mixed_samples(), 0, pack_length=pack_length)
    flat = flatten(batch, IMAGE)
    before = batch.input_ids.ravel()[batch.supervised_positions]
    assert np.where(before == IMAGE, 0, before).tolist() == flat.input_ids[flat.supervised_positions].tolist()
    assert flat.input_ids[flat.supervised_positions + 1].tolist() == flat.supervised_ids.tolist()
    assert flat.supervised_sources.tolist() == batch.supervised_sources.tolist()
    assert flat.supervised_ids.tolist() == batch.supervised_ids.tolist()


def test_every_index_of_a_packed_batch_with_a_hidden_token():
    """Two rows, three samples, a token that nobody sees; every number is another one."""
    batch = MicroBatch(
        input_ids=np.array([[11, IMAGE, 13, 21, 22, 7], [IMAGE, 32, 33, 34, 7, 7]]),
        attention_mask=np.array([[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0]]),
        position_ids=None,
        supervised_positions=np.array([1, 3, 8]),
        supervised_ids=np.array([13, 22, 34]),
        supervised_sources=np.array([5, 6, 4]),
        pixels=None,
        query_features=None,
        num_samples=3,
        num_real=9,
        lengths=((3, 2), (4,)),
    )
    before = batch.input_ids.copy()
    flat = flatten(batch, IMAGE, pad_token_id=99)
    assert flat.input_ids.tolist() == [11, 0, 13, 21, 22, 0, 33, 34, *[99] * 56] and flat.input_ids.dtype == np.int64
    assert flat.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 2, 3, *range(56)]
    assert flat.image_positions.tolist() == [1, 5] and flat.supervised_positions.tolist() == [1, 3, 6]
    assert (flat.supervised_ids.tolist(), flat.supervised_sources.tolist()) == ([13, 22, 34], [5, 6, 4])
    assert flat.cu_seqlens.tolist() == [0, 3, 5, 8, *[64] * 13] and len(flat.cu_seqlens) == 17
    assert flat.max_length == 64 and np.array_equal(batch.input_ids, before), "the batch stays as it is"
    assert set(flatten(batch, IMAGE).input_ids[8:]) == {0}
    batch.attention_mask[0, 1] = 0
    assert flatten(batch, IMAGE) is None, "a token is predicted where nobody looks"


def test_a_sample_that_nobody_sees_is_an_empty_sequence_of_its_own():
    nothing, ids = np.zeros(0, dtype=np.int64), np.arange(1, 9).reshape(2, 4)
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    batch = MicroBatch(ids, mask, None, nothing, nothing, nothing, None, None, 2, 4)
    assert flatten(batch, IMAGE).cu_seqlens[:4].tolist() == [0, 4, 4, 64]


def test_as_many_sequences_as_fit_are_not_filled_up():
    """16 with the padding's are whole; 16 without leave room for 15 more."""
    nothing = np.zeros(0, dtype=np.int64)

    def bounds(*lengths):
        ids = np.arange(1, sum(lengths) + 1)[None]
        batch = MicroBatch(ids, None, None, nothing, nothing, nothing, None, None, 1, ids.size, (lengths,))
        return flatten(batch, IMAGE + 999).cu_seqlens.tolist()

    assert bounds(*[4] * 15) == [*range(0, 61, 4), 64] and bounds(*[4] * 16) == [*range(0, 65, 4)]
    assert bounds(*[4] * 14) == [*range(0, 57, 4), 64, 64]
    assert bounds(*[1] * 16) == [*range(17), *[64] * 16], "17 with the padding's: 32"


def test_shapes_come_in_few_sizes():
    sizes = set()
    for answer in range(1, 60):
        flat = flatten(collate([make_sample(answer), make_sample(3)], 0), IMAGE)
        sizes.add((len(flat.input_ids), len(flat.cu_seqlens), flat.max_length))
    assert sizes == {(64, 17, 64), (128, 17, 64), (128, 17, 128)}


@pytest.mark.parametrize(("length", "bound"), [(9, 64), (64, 64), (65, 128), (128, 128), (129, 256)])
def test_the_longest_sequence_is_bounded_by_a_power_of_two(length, bound):
    ids = np.arange(1, length + 1)[None]
    nothing = np.zeros(0, dtype=np.int64)
    batch = MicroBatch(ids, None, None, nothing, nothing, nothing, None, None, 1, length)
    flat = flatten(batch, IMAGE + 999)
    assert flat.max_length == bound and len(flat.input_ids) == -(-length // 64) * 64, "whole tiles have no padding"
    assert flat.cu_seqlens[:2].tolist() == [0, length] and set(flat.cu_seqlens[2:].tolist()) == {len(flat.input_ids)}


def test_rows_without_lengths_are_sequences():
    ids = np.arange(1, 13).reshape(2, 6)
    nothing = np.zeros(0, dtype=np.int64)
    batch = MicroBatch(ids, None, None, np.array([2, 8]), np.array([4, 10]), nothing, None, None, 2, 12)
    flat = flatten(batch, IMAGE)
    assert flat.cu_seqlens[:4].tolist() == [0, 6, 12, 64] and flat.supervised_positions.tolist() == [2, 8]


def test_hidden_tokens_are_left_out_and_the_others_keep_their_positions():
    batch = collate([hidden_sample(), make_sample(3, image=False)], 0)
    flat = flatten(batch, IMAGE)
    assert flat.input_ids[:4].tolist() == [7, 9, 10, 11] and flat.position_ids[:4].tolist() == [0, 2, 3, 4]
    assert flat.cu_seqlens[:3].tolist() == [0, 4, 13]
    assert flat.supervised_positions[:2].tolist() == [1, 2] and flat.supervised_ids[:2].tolist() == [10, 11]


def hidden_sample() -> LoadedSample:
    encoded = EncodedSample()
    encoded.add([7])
    encoded.add([8], attend=False)
    encoded.add([9])
    encoded.add([10, 11], learn=True)
    return LoadedSample(encoded, 0)


def test_a_prediction_at_a_hidden_position_has_no_flat_form():
    encoded = EncodedSample()
    encoded.add([7])
    encoded.add([8], attend=False)
    encoded.add([9], learn=True)
    assert flatten(collate([LoadedSample(encoded, 0)], 0), IMAGE) is None
