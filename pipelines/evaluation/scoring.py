"""Answers -> scores: a value with its interval per benchmark, baselines, parts; predictions.jsonl; tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np

from pipelines import storage
from pipelines.evaluation.answers import VIEWS, Answered, AnswerRecord, View, ViewAnswer
from pipelines.evaluation.benchmarks.base import MAIN_SPLIT, Benchmark, Outcome, Truth
from pipelines.json_files import to_json
from tinygptv.metrics.intervals import Interval, bootstrap

PREDICTIONS = "predictions.jsonl"

_PROBLEMS_NAMED = 20


class PartScore(TypedDict):
    """A score with its 95% interval, in per cent, over ``n`` questions."""

    value: float
    low: float
    high: float
    n: int


class BenchmarkScore(TypedDict):
    """All numbers of a benchmark, in per cent.

    Attributes:
        metric: what ``value`` is.
        value: of the split ``test``.
        low: lower end of the 95% interval.
        high: upper end.
        n: questions.
        blind: value with a blank image; None where it was not asked for.
        shuffled: value with another question's image; None where it was not asked for.
        scoring: which rules scored it.
        also: other statistics, by name.
        parts: per split and kind.
        unanswered: questions without an answer; they count as wrong.
        problems: the first reasons, ``id: reason``.
        files: official files that it was read from, each with its path and SHA-256; empty where a benchmark has none.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    blind: float | None
    shuffled: float | None
    scoring: Literal["official", "released"]
    also: dict[str, float]
    parts: dict[str, PartScore]
    unanswered: int
    problems: list[str]
    files: list[dict[str, str]]


class Prediction(AnswerRecord):
    """A line of ``predictions.jsonl`` (docs/evaluation.md): question, truth, the answer and the score of every view.

    Attributes:
        benchmark: name.
        score: of the answer, in 0..1.
        blind_score: of the answer with a blank image; None where it was not asked for.
        shuffled_score: of the answer with another question's image; None where it was not asked for.
        instruction: the question with its task tag.
        history: [question, answer] of the turns before it.
        choices: answers whose losses are compared; empty where the answer is generated.
        image: path; None for text only.
        split: part of the benchmark.
        kind: category; empty for none.
        truth: what the score was computed with.
    """

    benchmark: str
    score: float
    blind_score: float | None
    shuffled_score: float | None
    instruction: str
    history: list[list[str | None]]
    choices: list[str]
    image: str | None
    split: str
    kind: str
    truth: Truth


def outcomes_of(answered: Answered, view: View) -> list[Outcome]:
    """The outcomes of one view; empty where it was not asked for."""
    return [
        Outcome(question, answer.text, answer.losses, answers.problem)
        for question, answers in answered
        if answers.problem or view in answers.views
        for answer in [answers.views.get(view, ViewAnswer(""))]
    ]


def metric_of(benchmark: Benchmark, *, released: bool) -> str:
    """Name of the metric; ``released`` counts only where the release has the benchmark."""
    return "as released" if released and benchmark.released is not None else benchmark.metric


def score_each(benchmark: Benchmark, outcomes: Sequence[Outcome], *, released: bool = False) -> list[float]:
    """The score of every outcome; one with a problem scores 0."""
    if released and benchmark.released:
        scores = benchmark.released(outcomes)
    else:
        scores = [benchmark.score(outcome.answer, outcome.question.truth) for outcome in outcomes]
    return [0.0 if outcome.problem else score for outcome, score in zip(outcomes, scores, strict=True)]


def score_benchmark(benchmark: Benchmark, answered: Answered, *, released: bool = False) -> BenchmarkScore:
    """All numbers of a benchmark.

    Args:
        benchmark: how it is scored.
        answered: its questions with the answers.
        released: score as the release does, where it has the benchmark.
    """
    released = released and benchmark.released is not None
    own = _values(benchmark, outcomes_of(answered, "answer"), released)
    baselines: dict[View, float | None] = {}
    for view in VIEWS[1:]:
        asked = any(view in answers.views for _, answers in answered)
        baselines[view] = _values(benchmark, outcomes_of(answered, view), released).main.value if asked else None
    problems = [f"{question.id}: {answers.problem}" for question, answers in answered if answers.problem]
    return BenchmarkScore(
        metric=metric_of(benchmark, released=released),
        value=own.main.value,
        low=own.main.low,
        high=own.main.high,
        n=own.main.n,
        blind=baselines["blind"],
        shuffled=baselines["shuffled"],
        scoring="released" if released else "official",
        also=own.also,
        parts=own.parts,
        unanswered=len(problems),
        problems=problems[:_PROBLEMS_NAMED],
        files=[],
    )


@dataclass(frozen=True)
class _Values:
    """The numbers of one view."""

    main: Interval
    also: dict[str, float]
    parts: dict[str, PartScore]


def _values(benchmark: Benchmark, outcomes: Sequence[Outcome], released: bool) -> _Values:
    statistics = None if released else benchmark.statistics
    if statistics:
        rows = [statistics.columns(outcome) for outcome in outcomes]
        main_statistic = next(iter(statistics.values.values()))
    else:
        rows = [(score,) for score in score_each(benchmark, outcomes, released=released)]
        main_statistic = None
    groups: dict[str, list[int]] = defaultdict(list)
    for index, outcome in enumerate(outcomes):
        groups[outcome.question.split].append(index)
        if outcome.question.kind:
            groups[f"{outcome.question.split}/{outcome.question.kind}"].append(index)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), -1)

    def interval(indices: Sequence[int]) -> Interval:
        chosen = table[list(indices)]
        return bootstrap(chosen, main_statistic) if main_statistic else bootstrap(chosen.reshape(-1))

    main_places = groups.get(MAIN_SPLIT, [])
    also = {}
    if statistics and main_places:
        others = list(statistics.values.items())[1:]
        also = {name: round(100 * float(value(table[main_places])), 3) for name, value in others}
    parts = {name: _part(interval(indices)) for name, indices in sorted(groups.items()) if name != MAIN_SPLIT}
    return _Values(interval(main_places), also, parts)


def _part(found: Interval) -> PartScore:
    return PartScore(value=found.value, low=found.low, high=found.high, n=found.n)


# ---------------------------------------------------------------------- files and tables


def write_predictions(
    path: Path, benchmarks: Sequence[Benchmark], answered: Mapping[str, Answered], *, released: bool = False
) -> list[Prediction]:
    """Write one JSON line per question: question, truth, the answer and the score of every view.

    Returns:
        The lines.

    Raises:
        DiskFullError: there is no room.
    """
    lines: list[Prediction] = []
    for benchmark in benchmarks:
        pairs = answered[benchmark.name]
        scores: dict[View, list[float | None]] = {}
        for view in VIEWS:
            view_scores = score_each(benchmark, outcomes_of(pairs, view), released=released)
            found = dict(zip(_asked(pairs, view), view_scores, strict=True))
            scores[view] = [found.get(index) for index in range(len(pairs))]
        for index, (question, answers) in enumerate(pairs):
            lines.append(
                {
                    "benchmark": benchmark.name,
                    **answers.to_dict(),
                    "score": cast(float, scores["answer"][index]),
                    "blind_score": scores["blind"][index],
                    "shuffled_score": scores["shuffled"][index],
                    "instruction": question.instruction,
                    "history": [[turn.instruction, turn.answer] for turn in question.history],
                    "choices": list(question.choices),
                    "image": str(question.image) if question.image else None,
                    "split": question.split,
                    "kind": question.kind,
                    "truth": question.truth,
                }
            )
    storage.write_atomically(str(path), "".join(to_json(line) + "\n" for line in lines).encode())
    return lines


def _asked(answered: Answered, view: View) -> list[int]:
    """Indices of the questions that ``outcomes_of`` takes."""
    return [index for index, (_, answers) in enumerate(answered) if answers.problem or view in answers.views]


def score_table(scores: Mapping[str, BenchmarkScore]) -> str:
    """The scores as an aligned text table."""
    lines = [f"{'benchmark':24} {'metric':22} {'score':>6} {'95% interval':>14} {'blind':>6} {'shuffled':>8} {'n':>6}"]
    for name, score in scores.items():
        interval = f"{format_number(score['low'])} .. {format_number(score['high'])}"
        unanswered = f"  ({score['unanswered']} unanswered)" if score["unanswered"] else ""
        lines.append(
            f"{name:24} {score['metric']:22} {format_number(score['value']):>6} {interval:>14} "
            f"{format_number(score['blind']):>6} {format_number(score['shuffled']):>8} {score['n']:6}{unanswered}"
        )
    return "\n".join(lines)


def format_number(value: float | None) -> str:
    """One decimal; empty for what is unknown or not finite."""
    return "" if value is None or not math.isfinite(value) else f"{value:.1f}"
