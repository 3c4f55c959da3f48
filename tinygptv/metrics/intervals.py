"""Uncertainty of scores: bootstrap intervals, and a paired comparison of two models on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 1000
_NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95% bootstrap interval, all in per cent.

    Attributes:
        value: the statistic.
        low: 2.5th percentile of the resampled statistics.
        high: 97.5th percentile.
        n: number of samples.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    samples: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Interval:
    """A statistic (the mean, where none is given) with its 95% percentile interval.

    Args:
        samples: [n] scores in 0..1; or [n, k] numbers per sample, where a statistic needs more than one.
        statistic: function of resampled rows, in 0..1.
        rounds: resamplings.
        seed: makes the interval reproducible.

    Returns:
        Per cent, rounded to three places; not numbers where there are no samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    drawn: list[float] = []
    at_once = max(1, _NUMBERS_AT_ONCE // n)
    for start in range(0, rounds, at_once):
        rows = rng.integers(0, n, size=(min(at_once, rounds - start), n))
        drawn += values[rows].mean(axis=1).tolist() if statistic is None else [statistic(values[row]) for row in rows]
    centre = float(values.mean()) if statistic is None else statistic(values)
    finite = [value for value in drawn if np.isfinite(value)]  # a resample may lack a class that the statistic needs
    low, high = np.percentile(finite, [2.5, 97.5]) if finite else (centre, centre)
    value, low, high = (round(100 * float(v), 3) for v in (centre, low, high))
    return Interval(value, low, high, n)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], rounds: int = ROUNDS, seed: int = 0) -> Interval:
    """Mean difference of two models' scores on the same samples, in points; the models differ where 0 is outside.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"a paired comparison needs the same samples: {len(ours)} and {len(theirs)} scores were given."
        )
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return bootstrap(difference, rounds=rounds, seed=seed)


def sign_flip_test(ours: Sequence[float], theirs: Sequence[float], rounds: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test: how often differences of random signs have as large a mean.

    Without an effect, each sample's difference is as likely with the other sign. Samples of equal scores say nothing.

    Args:
        ours: scores of one model.
        theirs: scores of another on the same samples.
        rounds: random sign assignments; where fewer exist, each is counted once.
        seed: makes the value reproducible.

    Returns:
        0..1; 1 where no score differs.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    difference = difference[difference != 0]
    if len(difference) == 0:
        return 1.0
    observed = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    if 2 ** len(difference) <= rounds:
        signs = 1 - 2 * ((np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference))) & 1)
        return float((np.abs(signs @ difference) >= observed).mean())
    rng, found = np.random.default_rng(seed), 0
    at_once = max(1, _NUMBERS_AT_ONCE // len(difference))
    for start in range(0, rounds, at_once):
        signs = 1 - 2 * rng.integers(0, 2, size=(min(at_once, rounds - start), len(difference)))
        found += int((np.abs(signs @ difference) >= observed).sum())
    return (found + 1) / (rounds + 1)
