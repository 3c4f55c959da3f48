"""Plots of training curves (matplotlib, no display)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.training.held_out_record import Evaluation, read_evaluations
from pipelines.training.record import HELD_OUT_FILE, read_record
from tinygptv.training.stages import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_LOSSES = {1: (7.152, 2.620), 2: (2.726, 2.343), 3: (1.992, 1.125), 4: (2.720, 1.399)}
"""Start and end loss of each stage as the paper reports them (section 4.2)."""

PAPER_RECIPES = ("paper", "released")
"""Recipes whose losses are compared with them."""


def loss_curve(metrics: Path, path: Path, stage: Stage, recipe: str) -> Path:
    """Draw a stage's loss and learning rate over its steps; losses that are not finite leave a gap.

    Args:
        metrics: ``metrics.jsonl`` of the stage; ``held_out.jsonl`` beside it is drawn, too.
        path: PNG to write.
        stage: the stage, for its title.
        recipe: at ``paper`` and ``released`` the paper's start and end loss are drawn in.

    Returns:
        ``path``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in read_record(metrics) if math.isfinite(entry["loss"])]
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    means = smooth(losses, max(1, len(losses) // 40))
    held_out = read_evaluations(metrics.with_name(HELD_OUT_FILE))
    has_scores = any(each["scores"] for each in held_out)
    ratios, height = ([2, 1], 6.4) if has_scores else ([1], 4.2)
    figure, panels = plt.subplots(
        len(ratios), sharex=True, squeeze=False, height_ratios=ratios, figsize=(8, height), layout="constrained"
    )
    axis, lowest = panels[0, 0], panels[-1, 0]
    axis.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="loss per step")
    axis.plot(steps, means, color="#1f5a91", linewidth=1.8, label="running mean")
    if held_out:
        points = [each["step"] for each in held_out], [each["loss"] for each in held_out]
        axis.plot(*points, color="#d07a1f", marker="o", markersize=3, linewidth=1.4, label="held-out loss")
    if recipe in PAPER_RECIPES:
        start, end = PAPER_LOSSES[stage.number]
        axis.axhline(start, color="#b04a3a", linestyle=":", label=f"paper, start {start}")
        axis.axhline(end, color="#b04a3a", linestyle="--", label=f"paper, end {end}")
    axis.set(ylabel="loss (nats per token)", title=f"stage {stage.number}: {stage.title} ({recipe})")
    axis.grid(alpha=0.25)
    rates = axis.twinx()
    rates.plot(steps, [e["lr"] for e in entries], color="#6a9a3d", linewidth=0.8, alpha=0.8)
    rates.set_ylabel("learning rate", color="#6a9a3d")
    axis.legend(loc="upper right")
    if has_scores:
        _draw_scores(lowest, held_out)
    lowest.set_xlabel("step")
    return save_figure(figure, path)


def _draw_scores(axis: Axes, held_out: Sequence[Evaluation]) -> None:
    """One line per source with held-out questions."""
    for name in dict.fromkeys(name for each in held_out for name in each["scores"]):
        scores = [(each["step"], each["scores"][name]) for each in held_out if name in each["scores"]]
        axis.plot([step for step, _ in scores], [score for _, score in scores], marker="o", markersize=3, label=name)
    axis.set(ylabel="held-out questions right (%)", ylim=(0, 100))
    axis.grid(alpha=0.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and close it; the file is either absent or complete.

    Returns:
        ``path``.

    Raises:
        DiskFullError: there is no room.
    """
    import matplotlib.pyplot as plt

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    storage.write_atomically(str(path), stream.getvalue())
    return path


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of the last ``width`` values at each position."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out
