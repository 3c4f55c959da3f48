"""Answers -> scores: a value with its interval per benchmark, its baselines and parts; two models compared; tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.benchmarks.base import MAIN_SPLIT, Benchmark, Outcome, Question
from pipelines.settings import SettingsError
from tinygptv.metrics.intervals import Interval, bootstrap, paired_difference

PREDICTIONS = "predictions.jsonl"
VIEWS = ("answer", "blind", "shuffled")
"""With the question's own picture, with a blank one, with another question's."""

_PROBLEMS_NAMED = 20

Row = dict[str, Any]
"""What was answered to a question: ``id``, ``problem``, a text per view; ``<view>_losses`` where choices are ranked."""

Answered = Sequence[tuple[Question, Row]]


def outcomes_of(answered: Answered, view: str) -> list[Outcome]:
    """The outcomes of one view; empty where it was not asked for."""
    return [
        Outcome(question, row.get(view) or "", tuple(row.get(f"{view}_losses") or ()), row["problem"])
        for question, row in answered
        if row["problem"] or row.get(view) is not None
    ]


def score_each(benchmark: Benchmark, outcomes: Sequence[Outcome], *, released: bool = False) -> list[float]:
    """The score of every outcome; one with a problem scores 0."""
    if released and benchmark.released:
        scores = benchmark.released(outcomes)
    else:
        scores = [benchmark.score(outcome.answer, outcome.question.truth) for outcome in outcomes]
    return [0.0 if outcome.problem else score for outcome, score in zip(outcomes, scores, strict=True)]


def score_benchmark(benchmark: Benchmark, answered: Answered, *, released: bool = False) -> dict[str, Any]:
    """All numbers of a benchmark.

    Args:
        benchmark: how it is scored.
        answered: its questions with the answers.
        released: score as the release does, where it has the benchmark.

    Returns:
        ``metric, value, low, high, n, blind, shuffled`` in per cent (the baselines None where they were not asked for),
        ``scoring``, ``also`` (other statistics), ``parts`` (per split and kind), ``unanswered`` and ``problems``.
    """
    released = released and benchmark.released is not None
    own = _values(benchmark, outcomes_of(answered, "answer"), released)
    baselines = {}
    for view in VIEWS[1:]:
        asked = any(row.get(view) is not None for _, row in answered)
        baselines[view] = _values(benchmark, outcomes_of(answered, view), released).main.value if asked else None
    problems = [f"{question.id}: {row['problem']}" for question, row in answered if row["problem"]]
    return {
        "metric": "as released" if released else benchmark.metric,
        **asdict(own.main),
        **baselines,
        "scoring": "released" if released else "official",
        "also": own.also,
        "parts": own.parts,
        "unanswered": len(problems),
        "problems": problems[:_PROBLEMS_NAMED],
    }


class _Values:
    """The numbers of one view."""

    def __init__(self, main: Interval, also: dict[str, float], parts: dict[str, Any]) -> None:
        self.main, self.also, self.parts = main, also, parts


def _values(benchmark: Benchmark, outcomes: Sequence[Outcome], released: bool) -> _Values:
    statistics = None if released else benchmark.statistics
    if statistics:
        rows = [statistics.columns(outcome) for outcome in outcomes]
        main_statistic = next(iter(statistics.values.values()))
    else:
        rows = [(score,) for score in score_each(benchmark, outcomes, released=released)]
        main_statistic = None
    groups: dict[str, list[int]] = defaultdict(list)
    for place, outcome in enumerate(outcomes):
        groups[outcome.question.split].append(place)
        if outcome.question.kind:
            groups[f"{outcome.question.split}/{outcome.question.kind}"].append(place)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), -1)

    def interval(places: Sequence[int]) -> Interval:
        chosen = table[list(places)]
        return bootstrap(chosen, main_statistic) if main_statistic else bootstrap(chosen.reshape(-1))

    main_places = groups.get(MAIN_SPLIT, [])
    also = {}
    if statistics and main_places:
        others = list(statistics.values.items())[1:]
        also = {name: round(100 * float(value(table[main_places])), 3) for name, value in others}
    parts = {name: asdict(interval(places)) for name, places in sorted(groups.items()) if name != MAIN_SPLIT}
    return _Values(interval(main_places), also, parts)


# ---------------------------------------------------------------------- files and tables


def write_predictions(
    path: Path, benchmarks: Sequence[Benchmark], answered: Mapping[str, Answered], *, released: bool = False
) -> list[Row]:
    """Write one JSON line per question: what was asked, answered, true, and the score of every view.

    Returns:
        The lines.
    """
    lines = []
    for benchmark in benchmarks:
        pairs = answered[benchmark.name]
        scores: dict[str, list[float | None]] = {}
        for view in VIEWS:
            view_scores = score_each(benchmark, outcomes_of(pairs, view), released=released)
            found = dict(zip(_asked(pairs, view), view_scores, strict=True))
            scores[view] = [found.get(place) for place in range(len(pairs))]
        for place, (question, row) in enumerate(pairs):
            lines.append(
                {
                    "benchmark": benchmark.name,
                    **dict.fromkeys(VIEWS),
                    **row,
                    "score": scores["answer"][place],
                    "blind_score": scores["blind"][place],
                    "shuffled_score": scores["shuffled"][place],
                    "instruction": question.instruction,
                    "history": [[turn.instruction, turn.answer] for turn in question.history],
                    "choices": list(question.choices),
                    "image": str(question.image) if question.image else None,
                    "split": question.split,
                    "kind": question.kind,
                    "truth": question.truth,
                }
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _asked(answered: Answered, view: str) -> list[int]:
    """Places of the questions that ``outcomes_of`` takes."""
    return [place for place, (_, row) in enumerate(answered) if row["problem"] or row.get(view) is not None]


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, Any]]:
    """Compare two models question by question.

    Args:
        ours: output folder of one score run.
        theirs: output folder of another.

    Returns:
        Per benchmark that both have: mean scores, ``difference`` (ours minus theirs, in points) with its 95% interval,
        and over how many questions.

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
        found = asdict(paired_difference(mine, other))
        compared[name] = {
            "ours": round(100 * float(np.mean(mine)), 3),
            "theirs": round(100 * float(np.mean(other)), 3),
            "difference": found.pop("value"),
            **found,
        }
    return compared


def _scores_of(folder: Path) -> dict[tuple[str, str], float]:
    path = folder / PREDICTIONS
    if not path.is_file():
        raise SettingsError(f"{folder} has no {PREDICTIONS}: compare_with= takes the output folder of jobs/score.py.")
    with path.open() as stream:
        rows = [json.loads(line) for line in stream]
    return {(row["benchmark"], row["id"]): row["score"] for row in rows if row["split"] == MAIN_SPLIT}


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as an aligned text table."""
    lines = [f"{'benchmark':24} {'metric':22} {'score':>6} {'95% interval':>14} {'blind':>6} {'shuffled':>8} {'n':>6}"]
    for name, facts in scores.items():
        interval = f"{_number(facts['low'])} .. {_number(facts['high'])}"
        unanswered = f"  ({facts['unanswered']} unanswered)" if facts["unanswered"] else ""
        lines.append(
            f"{name:24} {facts['metric']:22} {_number(facts['value']):>6} {interval:>14} "
            f"{_number(facts['blind']):>6} {_number(facts['shuffled']):>8} {facts['n']:6}{unanswered}"
        )
    return "\n".join(lines)


def comparison_table(compared: dict[str, dict[str, Any]]) -> str:
    """A comparison as an aligned text table; a star marks differences whose interval does not hold 0."""
    lines = [f"{'benchmark':24} {'ours':>6} {'theirs':>6} {'difference':>11} {'95% interval':>16} {'n':>6}"]
    for name, facts in compared.items():
        sure = "*" if facts["low"] > 0 or facts["high"] < 0 else ""
        interval = f"{facts['low']:+.1f} .. {facts['high']:+.1f}"
        lines.append(
            f"{name:24} {facts['ours']:6.1f} {facts['theirs']:6.1f} {facts['difference']:+10.1f}{sure:1} "
            f"{interval:>16} {facts['n']:6}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.1f}"
