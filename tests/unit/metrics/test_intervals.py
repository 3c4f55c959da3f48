"""Intervals and paired comparisons: against normal theory, resampling by hand, and every sign counted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tinygptv.metrics import intervals
from tinygptv.metrics.intervals import bootstrap, paired_difference, sign_flip_test
from tinygptv.metrics.metrics import auroc


def percentiles(drawn):
    low, high = np.percentile(drawn, [2.5, 97.5])
    return round(100 * low, 3), round(100 * high, 3)


def test_bootstrap_of_a_mean():
    scores = [1.0] * 60 + [0.0] * 40
    found = bootstrap(scores)
    assert found.value == 60.0 and found.n == 100
    normal = 196 * np.sqrt(0.6 * 0.4 / 100)
    assert found.low == pytest.approx(60 - normal, abs=1.5) and found.high == pytest.approx(60 + normal, abs=1.5)
    assert bootstrap(scores) == found and bootstrap(scores, seed=1) != found


def test_bootstrap_of_many_samples_is_cut_into_pieces():
    found = bootstrap(np.tile([0.0, 1.0], 20_000), rounds=300)
    assert found.value == 50.0 and 49.0 < found.low < 50.0 < found.high < 51.0


def test_bootstrap_of_a_statistic():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    rows = np.stack([labels + rng.normal(0, 1, 200), labels], axis=1)
    found = bootstrap(rows, lambda r: auroc(r[:, 0], r[:, 1]), rounds=200)
    assert found.value == pytest.approx(100 * roc_auc_score(labels, rows[:, 0]), abs=1e-3)
    assert found.low < found.value < found.high
    lonely = bootstrap(np.array([[1.0, 1.0], [0.0, 0.0]]), lambda r: auroc(r[:, 0], r[:, 1]), rounds=50)
    assert lonely.value == 100.0, "resamples with one class only are left out"


def test_paired_comparison_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(3)
    theirs = (rng.random(400) < 0.5).astype(float)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[:12]] = 1.0  # three points better, on the same questions
    apart, paired = (bootstrap(ours), bootstrap(theirs)), paired_difference(ours, theirs)
    assert apart[0].low < apart[1].high, "the separate intervals overlap"
    assert paired.value == pytest.approx(3.0) and paired.low > 0
    with pytest.raises(ValueError, match="400 and 399"):
        paired_difference(ours, theirs[:-1])


@pytest.mark.parametrize("at_once", [4_000_000, 35, 20, 1])
def test_bootstrap_is_resampling_with_replacement_in_pieces_of_any_size(monkeypatch, at_once):
    """Pieces bound the memory: every round is drawn once, from one stream of random numbers."""
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", at_once)
    scores = np.array([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 1.0])
    drawn = scores[np.random.default_rng(3).integers(0, 7, size=(501, 7))].mean(axis=1)
    found = bootstrap(scores, rounds=501, seed=3)
    assert (found.low, found.high) == percentiles(drawn)
    assert (found.value, found.n) == (45.714, 7)
    calls = []
    bootstrap(scores, lambda rows: calls.append(rows.tolist()) or 0.5, rounds=23)
    assert len(calls) == 23 + 1 and calls[-1] == scores.tolist(), "23 resamples, and the samples themselves"
    assert all(len(rows) == 7 and set(rows) <= set(scores) for rows in calls)


def test_pieces_are_as_large_as_the_bound_allows(monkeypatch):
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 35)
    sizes = []

    class Generator:
        def integers(self, low, high, size):
            sizes.append(size)
            return np.zeros(size, dtype=int) + low

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Generator())
    bootstrap([0.5] * 7, rounds=12)
    assert sizes == [(5, 7), (5, 7), (2, 7)]
    sizes.clear()
    sign_flip_test([0.5] * 7, [0.0] * 7, rounds=12)
    assert sizes == [(5, 7), (5, 7), (2, 7)]
    sizes.clear()
    bootstrap([0.5] * 40, rounds=2)
    assert sizes == [(1, 40), (1, 40)], "a sample set beyond the bound is drawn one round at a time"


def test_rounds_and_seed_that_are_used_where_none_is_given():
    scores = [0.0, 0.3, 1.0, 0.7, 0.2]
    assert intervals.ROUNDS == 1000
    assert bootstrap(scores) == bootstrap(scores, rounds=1000, seed=0)
    assert paired_difference(scores, [0.0] * 5) == bootstrap(scores)
    assert paired_difference(scores, [0.0] * 5, rounds=7, seed=2) == bootstrap(scores, rounds=7, seed=2)


def test_a_statistic_that_no_resample_has_leaves_the_interval_at_its_value():
    values = iter([math.nan] * 5 + [0.25])
    found = bootstrap([1.0, 0.0], lambda rows: next(values), rounds=5)
    assert (found.value, found.low, found.high) == (25.0, 25.0, 25.0)


def test_no_samples_give_no_number():
    found = bootstrap([])
    assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high) and found.n == 0


# ---------------------------------------------------------------------- random signs


def every_sign(difference):
    """Share of all sign assignments whose sum is at least as far from zero."""
    sums = [abs(sum(s * d for s, d in zip(signs, difference, strict=True))) for signs in
            itertools.product((1, -1), repeat=len(difference))]  # fmt: skip
    return float(np.mean([value >= abs(sum(difference)) - 1e-12 for value in sums]))


@pytest.mark.parametrize(
    "difference",
    [
        [1.0],
        [1.0, 1.0, 1.0],
        [1.0, -0.5, 0.25],
        [-1.0, -1.0, 0.5, -0.25, -1.0],
        [0.1] * 7,
        [0.1, 0.2, 0.3, -0.7, 0.4],  # sums that are equal but for rounding
    ],
)
def test_few_samples_are_tested_with_every_sign(difference):
    zeros = [0.0] * len(difference)
    expected = every_sign(difference)
    assert sign_flip_test(difference, zeros) == pytest.approx(expected)
    assert sign_flip_test(zeros, difference) == pytest.approx(expected), "two-sided"
    assert sign_flip_test([*difference, 0.5], [*zeros, 0.5]) == pytest.approx(expected), "equal scores say nothing"
    assert sign_flip_test(difference, zeros, rounds=2 ** len(difference)) == pytest.approx(expected)


def test_samples_without_a_difference_give_one():
    assert sign_flip_test([1, 1, 0], [1, 1, 0]) == 1.0 and sign_flip_test([], []) == 1.0


def test_many_samples_are_tested_with_random_signs(monkeypatch):
    """The observed signs count as one more round, so that the value is never 0."""
    rng = np.random.default_rng(0)
    difference = rng.normal(0.2, 1.0, 30)
    signs = 1 - 2 * np.random.default_rng(5).integers(0, 2, size=(999, 30))
    expected = (int((abs(signs @ difference) >= abs(difference.sum())).sum()) + 1) / 1000
    assert 0.01 < expected < 0.9
    assert sign_flip_test(difference, np.zeros(30), rounds=999, seed=5) == expected
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 100)
    assert sign_flip_test(difference, np.zeros(30), rounds=999, seed=5) == expected, "in pieces"
    assert sign_flip_test([1.0] * 40, [0.0] * 40, rounds=99) == 1 / 100
    assert sign_flip_test(difference, np.zeros(30)) == sign_flip_test(difference, np.zeros(30), rounds=10_000, seed=0)
    one_too_few = sign_flip_test([1.0] * 3, [0.0] * 3, rounds=7, seed=1)
    assert round(one_too_few * 8) == pytest.approx(one_too_few * 8), "7 random rounds, not the 8 that there are"


def test_paired_permutation_test_sees_a_shift():
    rng = np.random.default_rng(0)
    same, shifted = rng.random(200), rng.random(200)
    assert sign_flip_test(same, shifted) > 0.01
    assert sign_flip_test(same + 0.5, same) < 0.001


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_scores_does_not_matter(scale):
    """What counts as equally large is a share of the scores."""
    difference = [3 * scale, scale, scale, -2 * scale]
    assert sign_flip_test(difference, [0.0] * 4) == sign_flip_test([3.0, 1.0, 1.0, -2.0], [0.0] * 4) == 0.625
