"""Two score runs compared question by question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from pipelines.evaluation.benchmarks.base import MAIN_SPLIT
from pipelines.evaluation.scoring import PREDICTIONS, Prediction
from pipelines.settings import SettingsError
from tinygptv.metrics.intervals import paired_difference, sign_flip_test


class Comparison(TypedDict):
    """Mean scores of two models on the same questions, in per cent.

    Attributes:
        ours: mean of one.
        theirs: mean of the other.
        difference: ours minus theirs, in points.
        low: lower end of its 95% interval.
        high: upper end.
        p: of the paired permutation test (``intervals.sign_flip_test``).
        better: questions that ours answers better.
        worse: questions that theirs answers better.
        n: questions.
    """

    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    n: int


def compare(ours: Path, theirs: Path) -> dict[str, Comparison]:
    """Compare two models question by question.

    Args:
        ours: output folder of one score run.
        theirs: output folder of another.

    Returns:
        Per benchmark that both have, over the questions that both answered.

    Raises:
        SettingsError: a folder has no predictions, or they share no question.
    """
    scores = [_scores_of(folder) for folder in (ours, theirs)]
    shared = [key for key in scores[0] if key in scores[1]]
    if not shared:
        raise SettingsError(f"compare_with={theirs} answers none of the questions of {ours}.")
    by_benchmark: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key in shared:
        by_benchmark[key[0]].append((scores[0][key], scores[1][key]))
    compared = {}
    for name, pairs in by_benchmark.items():
        mine, other = [p[0] for p in pairs], [p[1] for p in pairs]
        found = paired_difference(mine, other)
        compared[name] = Comparison(
            ours=round(100 * float(np.mean(mine)), 3),
            theirs=round(100 * float(np.mean(other)), 3),
            difference=found.value,
            low=found.low,
            high=found.high,
            p=round(sign_flip_test(mine, other), 5),
            better=sum(m > o for m, o in pairs),
            worse=sum(m < o for m, o in pairs),
            n=found.n,
        )
    return compared


def _scores_of(folder: Path) -> dict[tuple[str, str], float]:
    return {
        (row["benchmark"], row["id"]): row["score"] for row in read_predictions(folder) if row["split"] == MAIN_SPLIT
    }


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions of a score run.

    Raises:
        SettingsError: the folder has none.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise SettingsError(f"{folder} has no {PREDICTIONS}: compare_with= takes the output folder of jobs/score.py.")
    with path.open() as stream:
        return [json.loads(line) for line in stream]


def comparison_table(compared: Mapping[str, Comparison]) -> str:
    """A comparison as an aligned text table; a star marks differences whose interval excludes 0."""
    lines = [
        f"{'benchmark':24} {'ours':>6} {'theirs':>6} {'difference':>11} {'95% interval':>16} {'p':>8} {'better':>6} "
        f"{'worse':>6} {'n':>6}"
    ]
    for name, found in compared.items():
        sure = "*" if found["low"] > 0 or found["high"] < 0 else ""
        interval = f"{found['low']:+.1f} .. {found['high']:+.1f}"
        lines.append(
            f"{name:24} {found['ours']:6.1f} {found['theirs']:6.1f} {found['difference']:+10.1f}{sure:1} "
            f"{interval:>16} {found['p']:8.4f} {found['better']:6} {found['worse']:6} {found['n']:6}"
        )
    return "\n".join(lines)
