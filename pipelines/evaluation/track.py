"""A score run in the tracker: its numbers, tables, data and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from pipelines.evaluation.compare import Comparison
from pipelines.evaluation.compare_page import COMPARISON_PAGE
from pipelines.evaluation.page import drawn_case, worst_first
from pipelines.evaluation.scoring import PREDICTIONS, BenchmarkScore, Prediction
from pipelines.fingerprint import digest_of
from pipelines.settings import ScoreSettings
from pipelines.tracking.base import continue_tracker
from pipelines.tracking.described import DataInput, markdown_table, run_title

_TABLE_IMAGES = 24
_TITLE_NAMES = 2
_TABLE_COLUMNS = ("benchmark", "instruction", "answer", "truth", "score", "blind", "shuffled")


class ScoreResult(TypedDict):
    """``result.json`` of a score run.

    Attributes:
        checkpoint: what was scored.
        metric: rules of scoring, ``official`` or ``released``.
        benchmarks: name -> its numbers.
        questions_per_second: answered in this run.
        seconds: of this run.
        predictions: path of ``predictions.jsonl``.
        page: path of ``report.html``.
        result: path of this file.
        comparison: benchmark -> paired comparison, where one was asked for.
        comparison_page: path of ``comparison.html``, with it.
    """

    checkpoint: str
    metric: str
    benchmarks: dict[str, BenchmarkScore]
    questions_per_second: float
    seconds: float
    predictions: str
    page: str
    result: str
    comparison: NotRequired[dict[str, Comparison]]
    comparison_page: NotRequired[str]


def track_scores(
    settings: ScoreSettings,
    output: Path,
    result: ScoreResult,
    lines: Sequence[Prediction],
    parent_run_id: str,
    began: float,
) -> None:
    """Log the numbers, their table, the worst cases and the files to the tracker.

    Args:
        settings: of the score run.
        output: its local folder.
        result: what stands in its ``result.json``.
        lines: of ``predictions.jsonl``.
        parent_run_id: MLflow run to nest under; empty for none.
        began: time of the start, in seconds since 1970.
    """
    names = list(result["benchmarks"])
    what = ", ".join(names) if len(names) <= _TITLE_NAMES else f"{names[0]} and {len(names) - 1} more"
    title = run_title(settings.recipe, f"score {what}", began)
    tracker = continue_tracker(settings, title, output, parent_run_id=parent_run_id, started=began)
    tracker.params(settings.model_dump())
    tracker.tags({"checkpoint": result["checkpoint"]})
    tracker.inputs([_data_input(settings, name, score) for name, score in result["benchmarks"].items()])
    for name, score in result["benchmarks"].items():
        tracker.metrics({f"score/{name}": score["value"]}, 0)  # the baselines are in the table beside it
    left_out = ("scoring", "also", "parts", "problems")
    rows = [
        {"benchmark": name, **{key: value for key, value in score.items() if key not in left_out}}
        for name, score in result["benchmarks"].items()
    ]
    tracker.table(rows, "scores")
    shown = ("benchmark", "metric", "value", "low", "high", "blind", "shuffled", "n")
    table = markdown_table([{key: row[key] for key in shown} for row in rows])
    tracker.describe(f"{table}\n\nImages of the worst answers: `report.html` in Artifacts.")
    if "comparison" in result:
        tracker.table([{"benchmark": name, **found} for name, found in result["comparison"].items()], "comparison")
    tracker.table(_worst_cases(lines), "worst_cases")
    for name in ("result.json", "report.html", COMPARISON_PAGE, PREDICTIONS):
        if (output / name).is_file():
            tracker.artifact(output / name)
    tracker.close()


def _data_input(settings: ScoreSettings, name: str, score: BenchmarkScore) -> DataInput:
    """A benchmark's questions; where it has no files, its name is its digest."""
    files = [file["sha256"] for file in score["files"]]
    return DataInput(name, digest_of(files or name), settings.data or name, score["n"], "evaluation")


def _worst_cases(lines: Sequence[Prediction]) -> list[dict[str, object]]:
    """The worst answers with their images, for the tracker's table."""
    rows: list[dict[str, object]] = []
    for line in worst_first([line for line in lines if line["image"]])[:_TABLE_IMAGES]:
        image = drawn_case(line, 224)
        if image is not None:
            values = dict(line.items())
            texts = {c: v if isinstance(v := values[c], str | float) else json.dumps(v) for c in _TABLE_COLUMNS}
            rows.append({"image": image, **texts})
    return rows
