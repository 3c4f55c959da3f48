"""The order of samples: every sample once per epoch, the same for the same step, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv.data.mixture import _BLOCK, Mixture, MixtureSource, SampleRef

PINNED = [
    [(1, 0, 0), (1, 3, 1)],
    [(0, 5, 0), (0, 3, 1), (0, 4, 2), (0, 7, 3)],
    [(0, 0, 15048), (0, 1, 15049), (0, 2, 15050), (0, 7, 15051)],
]
PINNED_DRAWS = [293, 247, 711]

shard_rows = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)
sources = st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 4), shard_rows), min_size=1, max_size=4).map(
    lambda items: tuple(MixtureSource(f"s{i}", w, b, tuple(rows)) for i, (w, b, rows) in enumerate(items))
)
mixtures = st.builds(
    Mixture, sources, seed=st.integers(0, 2**31), draws_per_step=st.integers(1, 5), window_shards=st.integers(1, 4)
)


@given(mixtures)
@settings(max_examples=60)
def test_every_row_exactly_once_per_epoch(mixture):
    drawn = {i: [] for i in range(len(mixture.sources))}
    for k in range(40):
        for ref in mixture.step(k):
            assert ref.position == len(drawn[ref.source])
            drawn[ref.source].append(ref.row)
    for i, source in enumerate(mixture.sources):
        n = source.num_rows
        for epoch in range(len(drawn[i]) // n):
            assert sorted(drawn[i][epoch * n : (epoch + 1) * n]) == list(range(n))


@given(mixtures, st.integers(0, 9000))
@settings(max_examples=40)
def test_a_jump_gives_what_walking_gives(mixture, k):
    fresh = Mixture(mixture.sources, mixture.seed, mixture.draws_per_step, mixture.window_shards)
    mixture.step(0), mixture.step(max(k - 1, 0))
    assert mixture.step(k) == fresh.step(k)


@given(mixtures, st.integers(0, 100), st.integers(1, 6))
@settings(max_examples=40)
def test_workers_share_a_step_without_changing_it(mixture, k, world_size):
    shares = [mixture.rank_step(k, rank, world_size) for rank in range(world_size)]
    step = mixture.step(k)
    assert shares == [step[rank::world_size] for rank in range(world_size)], "in turn: each of every source"


def test_weights_decide_the_shares():
    mixture = Mixture((MixtureSource("a", 115, 1, (1000,)), MixtureSource("b", 14, 1, (1000,))), seed=3)
    drawn = np.array([mixture.step(k)[0].source for k in range(5000)])
    assert abs((drawn == 0).mean() - 115 / 129) < 0.015


def test_one_draw_takes_a_whole_batch_from_one_source():
    mixture = Mixture((MixtureSource("a", 1, 3, (10,)), MixtureSource("b", 1, 2, (10,))), seed=0)
    for k in range(20):
        refs = mixture.step(k)
        assert len({ref.source for ref in refs}) == 1
        assert len(refs) == mixture.sources[refs[0].source].batch_size


def test_shuffling_stays_within_the_window():
    mixture = Mixture((MixtureSource("a", 1, 1, (100,) * 20),), seed=1, window_shards=4)
    rows = [mixture.step(k)[0].row for k in range(400)]
    assert len({row // 100 for row in rows}) == 4
    assert rows != sorted(rows)


def test_epochs_and_seeds_differ():
    source = (MixtureSource("a", 1, 1, (50, 50)),)
    one = Mixture(source, seed=1)
    first, second = [one.step(k)[0].row for k in range(100)], [one.step(k)[0].row for k in range(100, 200)]
    assert first != second
    assert first != [Mixture(source, seed=2).step(k)[0].row for k in range(100)]


def test_random_choices_depend_on_the_draw_alone():
    mixture = Mixture((MixtureSource("a", 1, 2, (5,)),), seed=7)
    again = Mixture((MixtureSource("a", 1, 2, (5,)),), seed=7)
    one, two = (m.generator(m.step(9)[1]).integers(1 << 30, size=4).tolist() for m in (mixture, again))
    assert one == two
    assert one != mixture.generator(mixture.step(9)[0]).integers(1 << 30, size=4).tolist()


def test_the_order_is_pinned():
    """Another numpy, or another key, must not change which samples a seed means: runs would not resume."""
    sources = (MixtureSource("a", 3, 2, (3, 2, 4)), MixtureSource("b", 1, 1, (2, 2)))
    mixture = Mixture(sources, seed=5, draws_per_step=2, window_shards=2)
    found = [[(ref.source, ref.row, ref.position) for ref in mixture.step(k)] for k in (0, 1, 5000)]
    assert found == PINNED
    assert mixture.generator(mixture.step(0)[0]).integers(1000, size=3).tolist() == PINNED_DRAWS


def rows_of_epoch(mixture, epoch, source=0):
    count = mixture.sources[source].num_rows
    return [mixture.step(k)[0].row for k in range(epoch * count, (epoch + 1) * count)]


def test_shards_come_in_another_order_in_each_epoch():
    """One row per shard and one shard per window: the order of rows is the order of shards."""
    mixture = Mixture((MixtureSource("a", 1, 1, (1,) * 30),), seed=1, window_shards=1)
    orders = [rows_of_epoch(mixture, epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    other = Mixture(mixture.sources, seed=2, window_shards=1)
    assert rows_of_epoch(other, 0) != orders[0], "and with each seed"


def test_rows_are_shuffled_in_another_way_in_each_epoch_and_window():
    mixture = Mixture((MixtureSource("a", 1, 1, (30,)),), seed=1)
    orders = [rows_of_epoch(mixture, epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3 and all(order != sorted(order) for order in orders)
    assert rows_of_epoch(Mixture(mixture.sources, seed=2), 0) != orders[0]
    two = Mixture((MixtureSource("a", 1, 1, (30, 30)),), seed=1, window_shards=1)
    rows = rows_of_epoch(two, 0)
    first, second = rows[:30], rows[30:]
    assert [row % 30 for row in first] != [row % 30 for row in second], "two windows of one epoch"


def test_sources_of_equal_shape_come_in_different_orders():
    sources = tuple(MixtureSource(name, 1, 1, (1,) * 30) for name in "ab")
    mixture = Mixture(sources, seed=1, window_shards=1)
    orders = [[], []]
    for k in range(200):
        ref = mixture.step(k)[0]
        orders[ref.source].append(ref.row)
    assert orders[0][:30] != orders[1][:30]


def test_draws_differ_between_epochs_sources_and_seeds():
    mixture = Mixture((MixtureSource("a", 1, 1, (3,)), MixtureSource("b", 1, 1, (3,))), seed=1)

    def draws(source, position, seed=1):
        ref = SampleRef(source, 0, position)
        return Mixture(mixture.sources, seed=seed).generator(ref).integers(1 << 30, size=4).tolist()

    assert draws(0, 1) != draws(0, 4), "the same row in the next epoch"
    assert draws(0, 1) != draws(1, 1) and draws(0, 1) != draws(0, 1, seed=2)


def test_blocks_of_steps_draw_differently():
    mixture = Mixture((MixtureSource("a", 1, 1, (9,)), MixtureSource("b", 1, 1, (9,))), seed=1)
    first, second = ([mixture.step(k)[0].source for k in range(start, start + 64)] for start in (0, _BLOCK))
    assert first != second
    other = Mixture(mixture.sources, seed=2)
    assert [other.step(k)[0].source for k in range(64)] != first


def test_positions_count_on_over_many_blocks():
    mixture = Mixture((MixtureSource("a", 1, 2, (7,)), MixtureSource("b", 2, 3, (5,))), seed=3)
    k = 3 * _BLOCK + 17
    before = [0, 0]
    for block in range(4):
        draws = mixture._draws(block)[: k - block * _BLOCK].ravel()
        for index, source in enumerate(mixture.sources):
            before[index] += int((draws == index).sum()) * source.batch_size
    ref = mixture.step(k)[0]
    assert ref.position == before[ref.source] > 7000


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step -1 is negative"):
        Mixture((MixtureSource("a", 1, 1, (1,)),), seed=0).step(-1)


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="'b' has no rows"):
        Mixture((MixtureSource("a", 1, 1, (1,)), MixtureSource("b", 1, 1, (0, 0))), seed=0)
    with pytest.raises(ValueError, match="weight 0"):
        Mixture((MixtureSource("a", 0, 1, (1,)),), seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        Mixture((), seed=0)
    with pytest.raises(ValueError, match="rank 2 does not exist among 2"):
        Mixture((MixtureSource("a", 1, 1, (1,)),), seed=0).rank_step(0, 2, 2)
