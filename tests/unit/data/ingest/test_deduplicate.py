"""Exact and near duplicates against a plain double loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.ingest import deduplicate
from pipelines.data.ingest.deduplicate import NearDuplicate, find_near_duplicates, first_occurrences


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_first_occurrence_is_the_first_equal_row(pairs):
    hashes = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    assert first_occurrences(hashes).tolist() == [pairs.index(pair) for pair in pairs]


def hashes_with_neighbours(seed: int, count: int) -> np.ndarray:
    """Random hashes, and others made of them by flipping a few bits."""
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 2**63, count, dtype=np.uint64)
    flips = [
        sum(1 << int(bit) for bit in generator.choice(64, size=int(generator.integers(0, 8)), replace=False))
        for _ in base
    ]
    return generator.permutation(np.concatenate([base, base ^ np.array(flips, dtype=np.uint64)]))


def double_loop(images, hashes, max_bits):
    """The first equal hash before a row's, else the first within ``max_bits``, among the first rows of each image."""
    found, first_rows = [], [row for row, image in enumerate(images) if image and image not in images[:row]]
    for place, row in enumerate(first_rows):
        bits = [bin(hashes[row] ^ hashes[earlier]).count("1") for earlier in first_rows[:place]]
        near = bits.index(0) if 0 in bits else next((n for n, count in enumerate(bits) if count <= max_bits), None)
        if near is not None:
            found.append(NearDuplicate(row, first_rows[near], bits[near]))
    return found


@pytest.mark.parametrize("pairs_at_once", [1, 700, 1 << 22])
@pytest.mark.parametrize("max_bits", [0, 1, 3, 4, 7])
def test_near_duplicates_equal_a_double_loop(max_bits, pairs_at_once, monkeypatch):
    monkeypatch.setattr(deduplicate, "_PAIRS_AT_ONCE", pairs_at_once)
    hashes = hashes_with_neighbours(max_bits, 60)
    hashes = np.concatenate([hashes, hashes[3:20], hashes[:40] ^ np.uint64(1 << 63)])
    images = np.arange(1, len(hashes) + 1, dtype=np.uint64)
    images[5:90:7], images[10:150:9] = 0, images[:16]  # without an image, and seen before
    expected = double_loop(images.tolist(), hashes.tolist(), max_bits)
    assert find_near_duplicates(images, hashes, max_bits) == expected and len(expected) > 10


def test_hashes_of_one_word_are_compared_as_those_of_two():
    hashes = np.array([7, 2**64 - 1, 7, 3, 2**64 - 1, 7], dtype=np.uint64)
    assert first_occurrences(hashes).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_occurrences(hashes).dtype == np.int64


def test_of_several_earlier_images_the_first_is_named():
    """Three hashes that share all bands but one: each is like both others."""
    found = find_near_duplicates(np.arange(1, 4, dtype=np.uint64), np.array([0, 1, 6], dtype=np.uint64), 4)
    assert [(near.row, near.earlier, near.bits) for near in found] == [(1, 0, 1), (2, 0, 2)]


def test_one_image_in_many_rows_is_no_near_duplicate():
    images = np.array([5, 5, 0, 0, 6, 5], dtype=np.uint64)
    hashes = np.array([9, 9, 0, 0, 9, 9], dtype=np.uint64)
    assert [(near.row, near.earlier) for near in find_near_duplicates(images, hashes, 2)] == [(4, 0)]


def test_nothing_and_one_row():
    empty = np.empty(0, dtype=np.uint64)
    assert find_near_duplicates(empty, empty, 4) == []
    assert find_near_duplicates(np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64), 4) == []


def test_a_band_that_all_hashes_share_is_compared_in_bounded_parts(monkeypatch):
    sizes = []
    compare = deduplicate._compare_group

    def recording(hashes, group, *rest):
        sizes.append(len(group))
        compare(hashes, group, *rest)

    monkeypatch.setattr(deduplicate, "_compare_group", recording)
    monkeypatch.setattr(deduplicate, "_LARGEST_GROUP", 500)
    hashes = np.arange(4000, dtype=np.uint64) << np.uint64(40)  # all share their lower bands
    found = find_near_duplicates(np.arange(1, 4001, dtype=np.uint64), hashes, 1)
    assert max(sizes) == 500
    assert len(found) > 3900


@pytest.mark.parametrize(("max_bits", "shift"), [(3, 48), (1, 32), (0, 0)])
def test_only_hashes_that_share_a_band_are_compared(monkeypatch, max_bits, shift):
    """Two hashes within n bits agree in one of n + 1 bands: no pair of others costs time."""
    compared = []
    monkeypatch.setattr(deduplicate, "_compare_group", lambda hashes, group, *rest: compared.append(group.tolist()))
    hashes = np.random.default_rng(0).integers(0, 2**64, 11, dtype=np.uint64)
    assert find_near_duplicates(np.arange(1, 12, dtype=np.uint64), hashes, max_bits) == [] and compared == []
    hashes[9] = hashes[4] ^ np.uint64(1 << shift)
    hashes[2] = (hashes[7] & np.uint64(0xFFFF)) | (~hashes[7] & np.uint64(2**64 - 2**16))
    find_near_duplicates(np.arange(1, 12, dtype=np.uint64), hashes, max_bits)
    assert sorted(compared) == {3: [[2, 7], [4, 9], [4, 9], [4, 9]], 1: [[4, 9]], 0: []}[max_bits]


def test_the_first_hash_before_that_is_near_is_named_with_its_distance():
    hashes = np.array([0, 1, 0xF0F0F0F0F0F0F0F0, 3, 7], dtype=np.uint64)
    earlier, differs = deduplicate._nearest_earlier(hashes, 2)
    assert (earlier.tolist(), differs.tolist()) == ([-1, 0, -1, 0, 1], [0, 1, 0, 2, 2])
    assert [found.tolist() for found in deduplicate._nearest_earlier(hashes[:0], 2)] == [[], []]


def test_groups_beyond_the_bound_are_cut_by_value_into_parts_in_row_order(monkeypatch):
    hashes = np.array([5, 1, 4, 2, 3], dtype=np.uint64)
    group = np.arange(5)
    assert deduplicate._bounded(hashes, group[:1]) == []
    monkeypatch.setattr(deduplicate, "_LARGEST_GROUP", 5)
    assert [part.tolist() for part in deduplicate._bounded(hashes, group)] == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(deduplicate, "_LARGEST_GROUP", 2)
    assert [part.tolist() for part in deduplicate._bounded(hashes, group)] == [[1, 3], [2, 4], [0]]
    assert [part.tolist() for part in deduplicate._bounded(hashes, group[1:4])] == [[1, 3], [2]]


@pytest.mark.parametrize("at_once", [1, 6, 1 << 22])
def test_a_match_is_the_earliest_however_many_rows_are_compared_at_once(monkeypatch, at_once):
    monkeypatch.setattr(deduplicate, "_PAIRS_AT_ONCE", at_once)
    images = np.arange(1, 7, dtype=np.uint64)
    hashes = np.array([0b0000, 0b1111, 0b0001, 0b0011, 0b1110, 0b0000], dtype=np.uint64)
    found = deduplicate.find_near_duplicates(images, hashes, 1)
    assert [(near.row, near.earlier, near.bits) for near in found] == [(2, 0, 1), (3, 2, 1), (4, 1, 1), (5, 0, 0)]
