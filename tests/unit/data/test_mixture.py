"""The order of samples: every sample once per epoch, the same for the same step, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv.data.mixture import Mixture, MixtureSource

shard_rows = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)
sources = st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 4), shard_rows), min_size=1, max_size=4).map(
    lambda items: tuple(MixtureSource(f"s{i}", w, b, tuple(rows)) for i, (w, b, rows) in enumerate(items))
)
mixtures = st.builds(
    Mixture, sources, seed=st.integers(0, 2**31), draws_per_step=st.integers(1, 5), window_shards=st.integers(1, 4)
)


@given(mixtures)
@settings(max_examples=60, deadline=None)
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
@settings(max_examples=40, deadline=None)
def test_a_jump_gives_what_walking_gives(mixture, k):
    fresh = Mixture(mixture.sources, mixture.seed, mixture.draws_per_step, mixture.window_shards)
    mixture.step(0), mixture.step(max(k - 1, 0))
    assert mixture.step(k) == fresh.step(k)


@given(mixtures, st.integers(0, 100), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_workers_share_a_step_without_changing_it(mixture, k, world_size):
    shares = [mixture.rank_step(k, rank, world_size) for rank in range(world_size)]
    assert sorted((ref.source, ref.position) for share in shares for ref in share) == sorted(
        (ref.source, ref.position) for ref in mixture.step(k)
    )


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


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="'b' has no rows"):
        Mixture((MixtureSource("a", 1, 1, (1,)), MixtureSource("b", 1, 1, (0, 0))), seed=0)
    with pytest.raises(ValueError, match="weight 0"):
        Mixture((MixtureSource("a", 0, 1, (1,)),), seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        Mixture((), seed=0)
    with pytest.raises(ValueError, match="rank 2 does not exist among 2"):
        Mixture((MixtureSource("a", 1, 1, (1,)),), seed=0).rank_step(0, 2, 2)
