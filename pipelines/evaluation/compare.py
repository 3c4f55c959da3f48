"""Two score runs compared question by question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypedDict

import numpy as np

from pipelines.evaluation.benchmarks.base import MAIN_SPLIT
from pipelines.evaluation.scoring import PREDICTIONS, Prediction
from pipelines.json_files import read_json_object, to_json
from pipelines.settings import SettingsError
from tinygptv.metrics.intervals import paired_difference, sign_flip_test

_NEEDED = ("benchmark", "id", "score", "split", "instruction", "history", "choices", "image", "truth", "answer")
"""What is read of a line of predictions."""


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
        SettingsError: a folder has no predictions, or damaged ones, or they share no question.
    """
    pairs_of = same_questions(read_predictions(ours), read_predictions(theirs))
    by_benchmark: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for mine, other in pairs_of:
        if mine["split"] == MAIN_SPLIT:
            by_benchmark[mine["benchmark"]].append((mine["score"], other["score"]))
    if not by_benchmark:
        raise SettingsError(f"compare_with={theirs} answers none of the questions of {ours}.")
    compared = {}
    for name, pairs in by_benchmark.items():
        our_scores, their_scores = [p[0] for p in pairs], [p[1] for p in pairs]
        found = paired_difference(our_scores, their_scores)
        compared[name] = Comparison(
            ours=round(100 * float(np.mean(our_scores)), 3),
            theirs=round(100 * float(np.mean(their_scores)), 3),
            difference=found.value,
            low=found.low,
            high=found.high,
            p=round(sign_flip_test(our_scores, their_scores), 5),
            better=sum(m > o for m, o in pairs),
            worse=sum(m < o for m, o in pairs),
            n=found.n,
        )
    return compared


def same_questions(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> Iterator[tuple[Prediction, Prediction]]:
    """The lines of two runs that answer the same question, in our order.

    Ids are often numbers of lines: those of other rows name other questions.
    """
    other = {_question_key(line): line for line in theirs}
    return ((line, other[key]) for line in ours if (key := _question_key(line)) in other)


def _question_key(line: Prediction) -> str:
    """All that is asked and what is right; images may have been moved."""
    image = PurePath(line["image"]).name if line["image"] else None
    asked = [line[key] for key in ("benchmark", "id", "split", "instruction", "history", "choices")]
    return to_json([*asked, image, line["truth"]])


def refuse_other_rules(metrics: Mapping[str, str], theirs: Path) -> None:
    """Raise where scores of an earlier run were made by other rules, and so cannot be compared.

    Args:
        metrics: what is scored now, by benchmark.
        theirs: output folder of the earlier run.

    Raises:
        SettingsError: a benchmark has another metric there.
    """
    scores = (read_json_object(theirs / "result.json") or {}).get("benchmarks", {})
    for name, metric in metrics.items():
        if name in scores and scores[name]["metric"] != metric:
            raise SettingsError(
                f"compare_with={theirs} scored {name} by {scores[name]['metric']!r}, and this run by {metric!r}: score "
                "one of them again with the metric= of the other."
            )


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions of a score run.

    Raises:
        SettingsError: the folder has none, or they are damaged.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise SettingsError(f"{folder} has no {PREDICTIONS}: compare_with= takes the output folder of jobs/score.py.")
    lines = path.read_bytes().splitlines()
    return [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _read_line(line: bytes, where: str) -> Prediction:
    try:
        found: Prediction = json.loads(line)
        lacks = [f"no {key}" for key in _NEEDED if key not in found]
    except (ValueError, TypeError):
        lacks = ["no JSON object"]
    if lacks:
        raise SettingsError(
            f"{where} has {lacks[0]}: it is damaged, or of an earlier version. Run that score again; its answers are "
            "kept."
        )
    return found


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
