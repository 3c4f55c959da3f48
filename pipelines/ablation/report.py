"""The report of an ablation: a table (variant x stage) per precision, scores, curves; Markdown and HTML."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypedDict

from pipelines import storage
from pipelines.ablation.findings import VANISHED, WINDOW, OutcomeRecord, StageOutcome
from pipelines.ablation.variants import Variant
from pipelines.evaluation.scoring import BenchmarkScore
from pipelines.settings import AblateSettings
from pipelines.training.plots import save_figure, smooth
from pipelines.training.record import StepEntry


class RowRecord(TypedDict):
    """A row in ``result.json``; fields as the attributes of ``AblationRow``."""

    variant: str
    title: str
    precision: str
    stages: dict[str, OutcomeRecord]
    scores: dict[str, BenchmarkScore]


class ReportFiles(TypedDict):
    """Paths of the report: Markdown, HTML, plots."""

    report: str
    page: str
    plots: list[str]


@dataclass
class AblationRow:
    """One variant at one precision.

    Attributes:
        variant: what was changed.
        precision: of the training.
        outcomes: one per stage.
        records: the steps of each stage, by number.
        scores: per benchmark.
    """

    variant: Variant
    precision: str
    outcomes: list[StageOutcome]
    records: dict[int, list[StepEntry]]
    scores: dict[str, BenchmarkScore]

    def cells(self) -> dict[str, str]:
        """The row as short texts."""
        cells = {"variant": self.variant.title, "precision": self.precision}
        cells |= {f"stage {outcome.stage}": outcome.cell for outcome in self.outcomes}
        return cells | {name: _score_cell(score) for name, score in self.scores.items()}

    def to_dict(self) -> RowRecord:
        """JSON-able."""
        return {
            "variant": self.variant.name,
            "title": self.variant.title,
            "precision": self.precision,
            "stages": {str(outcome.stage): outcome.to_dict() for outcome in self.outcomes},
            "scores": self.scores,
        }


def _score_cell(score: BenchmarkScore) -> str:
    """A score, with the scores for a blank image and for another question's image behind it."""
    views = {"blind": score["blind"], "shuffled": score["shuffled"]}
    baselines = [f"{name} {value:.1f}" for name, value in views.items() if value is not None]
    return f"{score['value']:.1f}" + (f" ({', '.join(baselines)})" if baselines else "")


def text_table(rows: Sequence[AblationRow]) -> str:
    """All rows as an aligned text table."""
    cells = [row.cells() for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    widths = [max(len(name), *(len(row.get(name, "")) for row in cells)) for name in columns]
    lines = ["  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()]
    for row in cells:
        lines.append("  ".join(row.get(n, "").ljust(w) for n, w in zip(columns, widths, strict=True)).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class _Table:
    """The rows of one precision, their columns, and the plots of them."""

    precision: str
    rows: list[AblationRow]
    columns: list[str]
    plots: list[Path]


def write_report(output: Path, rows: Sequence[AblationRow], settings: AblateSettings, seconds: float) -> ReportFiles:
    """Write ``report.md``, ``report.html`` and the plots; returns their paths."""
    tables = [_table(output, rows, precision) for precision in dict.fromkeys(row.precision for row in rows)]
    storage.write_atomically(str(output / "report.md"), _markdown(tables, settings, seconds).encode())
    storage.write_atomically(str(output / "report.html"), _page(tables, settings, seconds).encode())
    return {
        "report": str(output / "report.md"),
        "page": str(output / "report.html"),
        "plots": [str(plot) for table in tables for plot in table.plots],
    }


def _table(output: Path, rows: Sequence[AblationRow], precision: str) -> _Table:
    own = [row for row in rows if row.precision == precision]
    columns = list(dict.fromkeys(name for row in own for name in row.cells() if name != "precision"))
    losses = draw_losses(output / f"losses_{precision}.png", own, precision)
    return _Table(precision, own, columns, [losses, draw_depths(output / f"gradients_{precision}.png", own, precision)])


DEFINITIONS = (
    f"A cell is the mean loss (nats per token) of the stage's last {WINDOW} steps, or what happened to its gradients. "
    f"*Gradient vanishing at step k (part)*: the gradient norm of that part (the projector, or a language layer), "
    f"before clipping, stays below {VANISHED:g} of the full model's typical norm in the {WINDOW} steps from k on. "
    f"*NaN at step k*: the loss of step k is not finite, or the gradients of {WINDOW} steps in a row are not. "
    "Behind a score: the scores of the same model with a blank image and with another question's image."
)


def _how(settings: AblateSettings, seconds: float) -> str:
    steps = f"{settings.max_steps} steps per stage" if settings.max_steps else "each stage's own number of steps"
    return (
        f"Recipe {settings.recipe}, seed {settings.seed}, {steps}, {settings.features} features, "
        f"{settings.num_workers or 1} variants at a time, {seconds / 60:.1f} minutes."
    )


def _markdown(tables: Sequence[_Table], settings: AblateSettings, seconds: float) -> str:
    lines = ["# Ablation", "", _how(settings, seconds), "", DEFINITIONS]
    for table in tables:
        columns = table.columns
        lines += ["", f"## {table.precision}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(row.cells().get(name, "") for name in columns) + " |" for row in table.rows]
        lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in table.plots)]
    notes = [
        f"- {row.variant.title} ({row.precision}), stage {outcome.stage}: {outcome.note}"
        for table in tables
        for row in table.rows
        for outcome in row.outcomes
        if outcome.note
    ]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def _page(tables: Sequence[_Table], settings: AblateSettings, seconds: float) -> str:
    parts = []
    for table in tables:
        cells = (map(_cell, (row.cells().get(name, "") for name in table.columns)) for row in table.rows)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        images = "".join(
            f'<img alt="{plot.stem}" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">'
            for plot in table.plots
        )
        parts.append(f"<h2>{table.precision}</h2><table><tr>{head}</tr>{body}</table>{images}")
    definitions = html.escape(DEFINITIONS).replace("*G", "<i>G").replace("*N", "<i>N").replace("*:", "</i>:")
    return _PAGE.substitute(how=html.escape(_how(settings, seconds)), definitions=definitions, tables="".join(parts))


def _cell(text: str) -> str:
    lost = any(word in text for word in ("vanishing", "NaN", "failed", "not run"))
    return f'<td class="lost">{html.escape(text)}</td>' if lost else f"<td>{html.escape(text)}</td>"


# ---------------------------------------------------------------------- plots


def draw_losses(path: Path, rows: Sequence[AblationRow], title: str) -> Path:
    """Loss curves, a panel per stage and a line per variant.

    Returns:
        ``path``.
    """
    figure, axes = _panels(rows, title)
    for axis, outcome in zip(axes, rows[0].outcomes, strict=True):
        for colour, row in zip(_colours(len(rows)), rows, strict=True):
            records = [r for r in row.records.get(outcome.stage, []) if math.isfinite(r["loss"])]
            losses = [record["loss"] for record in records]
            steps = [record["step"] for record in records]
            axis.plot(steps, smooth(losses, max(1, len(losses) // 30)), color=colour, label=row.variant.title, lw=1.4)
        axis.set(title=f"stage {outcome.stage}", xlabel="step")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss (nats per token)")
    axes[-1].legend(loc="upper right", fontsize=7)
    return save_figure(figure, path)


def draw_depths(path: Path, rows: Sequence[AblationRow], title: str) -> Path:
    """Median gradient norm per depth, a panel per stage and a line per variant.

    Returns:
        ``path``.
    """
    figure, axes = _panels(rows, title)
    for index, axis in enumerate(axes):
        for colour, row in zip(_colours(len(rows)), rows, strict=True):
            depth = row.outcomes[index].depth
            if depth:
                axis.plot(
                    list(depth), list(depth.values()), color=colour, marker="o", ms=3, label=row.variant.title, lw=1.2
                )
        axis.set(title=f"stage {rows[0].outcomes[index].stage}", yscale="log")
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("gradient norm, median over the stage")
    axes[-1].legend(loc="upper right", fontsize=7)
    return save_figure(figure, path)


def _panels(rows: Sequence[AblationRow], title: str) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(rows[0].outcomes)
    figure, axes = plt.subplots(1, count, figsize=(3.1 * count + 1, 3.6), layout="constrained", squeeze=False)
    figure.suptitle(title)
    return figure, list(axes[0])


def _colours(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["tab10"](i % 10) for i in range(count)]


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ablation</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --soft: #66758a; --line: #dde3ea; --page: #fbfcfd; --lost: #c2303c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #93a1b3; --line: #2c3744; --page: #131a22; --lost: #ff7b86; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } p { color: var(--soft); }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem 1.2rem .25rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
td.lost { color: var(--lost); } img { display: block; max-width: 100%; margin-top: 1rem; background: white; }
</style></head><body>
<h1>Ablation</h1><p>$how</p><p>$definitions</p>
$tables
</body></html>
""")
