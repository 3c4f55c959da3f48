"""Plots of an ablation and of a stage: which numbers are drawn, under which names, and into which files."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from pipelines.ablation import report, run
from pipelines.ablation.findings import StageOutcome
from pipelines.ablation.report import AblationRow, draw_depths, draw_losses, write_report
from pipelines.ablation.variants import Variant
from pipelines.settings import AblateSettings
from pipelines.tracking.base import NullTracker
from pipelines.training import plots
from pipelines.training.plots import loss_curve
from tinygptv.training.stages import get_stage


def record(step, loss, lr=0.1):
    return {"step": step, "loss": loss, "grad_norm": 1.0, "lr": lr, "part_norms": {}}


def row(name, precision="fp32", losses=(2.0, 1.0), depth=None):
    outcomes = [StageOutcome(number, depth=depth or {}) for number in (2, 3)]
    records = {2: [record(step, loss) for step, loss in enumerate(losses)]}
    return AblationRow(Variant(name, name.upper()), precision, outcomes, records, {})


def lines_of(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, with their paths."""
    figures = []

    def save(figure, path):
        figures.append((figure, path))
        return path

    monkeypatch.setattr(report, "save_figure", save)
    monkeypatch.setattr(plots, "save_figure", save)
    yield figures
    import matplotlib.pyplot as plt

    for figure, _ in figures:
        plt.close(figure)


def test_a_plot_of_losses_has_a_panel_of_each_stage_and_a_line_of_each_variant(tmp_path, drawn):
    long = [float(n) for n in range(60)]
    rows = [row("a", losses=(2.0, math.nan, 1.0, math.inf)), row("b", losses=long)]
    assert draw_losses(tmp_path / "x.png", rows, "the title") == tmp_path / "x.png"
    ((figure, path),) = drawn
    first, second = figure.axes
    assert (path, figure.get_suptitle()) == (tmp_path / "x.png", "the title")
    assert [(axis.get_title(), axis.get_xlabel()) for axis in figure.axes] == [("stage 2", "step"), ("stage 3", "step")]
    found = lines_of(first)
    assert found["A"] == ([0, 2], [2.0, 1.0]), "what is not finite is left out"
    assert found["B"][1][:3] == [0.0, 0.5, 1.5], "a mean of a thirtieth of the steps"
    assert lines_of(second) == {"A": ([], []), "B": ([], [])} and first.get_ylabel() == "loss (nats per token)"
    colours = [line.get_color() for line in first.get_lines()]
    assert colours[0] != colours[1] and [text.get_text() for text in second.get_legend().get_texts()] == ["A", "B"]


def test_a_plot_of_depths_has_the_norm_of_each_part_on_a_logarithmic_axis(tmp_path, drawn):
    depth = {"projector": 1.0, "layer_00": 0.5}
    rows = [row("a", depth=depth), row("none"), row("one", depth={"projector": 2.0})]
    assert draw_depths(tmp_path / "x.png", rows, "the title") == tmp_path / "x.png"
    ((figure, path),) = drawn
    assert (path, figure.get_suptitle()) == (tmp_path / "x.png", "the title")
    shown = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert shown == ["A", "ONE"] and figure.axes[0].get_legend() is None, "what has no norms is not in the legend"
    for axis in figure.axes:
        assert lines_of(axis) == {"A": (["projector", "layer_00"], [1.0, 0.5]), "ONE": (["projector"], [2.0])}
        assert axis.get_yscale() == "log"
    assert [axis.get_title() for axis in figure.axes] == ["stage 2", "stage 3"]
    assert figure.axes[0].get_ylabel() == "gradient norm, median over the stage"


def test_the_eleventh_variant_has_the_first_ones_colour():
    colours = report._colours(12)
    assert len(set(colours[:10])) == 10 and colours[10:] == colours[:2]


def test_each_precision_has_its_own_rows_and_files(tmp_path, monkeypatch):
    asked = []

    def draw(kind):
        def write(path, rows, title):
            asked.append((kind, path.name, [each.variant.name for each in rows], title))
            path.write_bytes(b"x")
            return path

        return write

    monkeypatch.setattr(report, "draw_losses", draw("losses"))
    monkeypatch.setattr(report, "draw_depths", draw("depths"))
    rows = [row("a", "bf16"), row("b", "fp32"), row("c", "bf16")]
    found = write_report(tmp_path, rows, AblateSettings(), 90)
    assert asked == [
        ("losses", "losses_bf16.png", ["a", "c"], "bf16"),
        ("depths", "gradients_bf16.png", ["a", "c"], "bf16"),
        ("losses", "losses_fp32.png", ["b"], "fp32"),
        ("depths", "gradients_fp32.png", ["b"], "fp32"),
    ]
    names = ["losses_bf16.png", "gradients_bf16.png", "losses_fp32.png", "gradients_fp32.png"]
    assert found["plots"] == [str(tmp_path / name) for name in names]
    assert (found["report"], found["page"]) == (str(tmp_path / "report.md"), str(tmp_path / "report.html"))
    assert ", 1.5 minutes." in (tmp_path / "report.md").read_text()


def test_an_ablations_time_is_that_of_the_whole_command(tmp_path, monkeypatch):
    clock, told = iter([100.0, 190.0, 200.06]), []
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(run, "_refuse_unusable_inputs", lambda *given: None)
    monkeypatch.setattr(run, "start_ray", lambda settings: nullcontext())
    monkeypatch.setattr(run, "_shared_inputs", lambda *arguments: None)
    monkeypatch.setattr(run, "_run_all", lambda *arguments: iter(()))
    monkeypatch.setattr(run, "_rows", lambda *arguments: [])
    monkeypatch.setattr(run, "text_table", lambda rows: "the table")
    monkeypatch.setattr(run, "continue_tracker", lambda *arguments: NullTracker())
    monkeypatch.setattr(run, "_track_report", lambda *arguments: None)
    paths = {"report": "/x/a.md", "page": "/x/b.html", "plots": ["/x/c.png"]}
    monkeypatch.setattr(run, "write_report", lambda output, rows, settings, seconds: told.append(seconds) or paths)
    output = tmp_path / "out"
    settings = AblateSettings(recipe="mini", output=str(output), features="inline", num_workers=0)
    result = run.ablate(settings)
    assert told == [90.0] and result["seconds"] == 100.1 and result["text"] == "the table"
    names = {"report": "a.md", "page": "b.html", "result": "result.json"}
    assert {key: result[key] for key in names} == {key: str(output / name) for key, name in names.items()}
    assert result["plots"] == [str(output / "c.png")]


# ---------------------------------------------------------------------- a stage's own curve


@pytest.mark.parametrize(("recipe", "paper"), [("mini", []), ("paper", [2.72, 1.399]), ("released", [2.72, 1.399])])
def test_a_stages_curve_has_losses_means_rates_and_the_papers_ends(tmp_path, drawn, recipe, paper):
    records = [record(step, None if step == 3 else float(step % 2), lr=step / 100) for step in range(80)]
    records[5]["loss"] = "inf"  # as an earlier version wrote what is not finite
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(each) + "\n" for each in records))
    held_out = [{"step": step, "loss": loss, "sources": {}, "scores": {}} for step, loss in ((40, 1.5), (80, 0.75))]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(each) + "\n" for each in held_out))
    assert loss_curve(metrics, tmp_path / "loss.png", get_stage("mini", 4), recipe) == tmp_path / "loss.png"
    ((figure, _),) = drawn
    axis, rates = figure.axes
    found = lines_of(axis)
    steps, losses = found["loss per step"]
    assert steps == [step for step in range(80) if step not in (3, 5)] and losses == [float(step % 2) for step in steps]
    assert found["running mean"][0] == steps and found["running mean"][1][0] == 0.0
    assert found["held-out loss"] == ([40, 80], [1.5, 0.75])
    ends = [line for line in axis.get_lines() if line.get_label().startswith("paper")]
    assert [float(line.get_ydata()[0]) for line in ends] == paper
    assert [line.get_label() for line in ends] == (["paper, start 2.72", "paper, end 1.399"] if paper else [])
    (line,) = rates.get_lines()
    assert list(line.get_ydata()) == [step / 100 for step in steps] and rates.get_ylabel() == "learning rate"
    assert axis.get_title() == f"stage 4: multi-task learning ({recipe})" and axis.get_xlabel() == "step"


def test_the_papers_losses_are_those_of_section_4_2():
    assert plots.PAPER_LOSSES == {1: (7.152, 2.62), 2: (2.726, 2.343), 3: (1.992, 1.125), 4: (2.72, 1.399)}


def test_scores_have_a_panel_in_per_cent_and_each_source_the_steps_it_was_asked_at(drawn, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(0, 1.0)) + "\n")
    scores = [(0, {"vqa": 10.0}), (8, {"vqa": 30.0, "gqa": 20.0})]
    lines = [json.dumps({"step": step, "loss": 1.0, "sources": {}, "scores": each}) + "\n" for step, each in scores]
    (tmp_path / "held_out.jsonl").write_text("".join(lines))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", get_stage("mini", 4), "mini")
    ((figure, _),) = drawn
    panel = next(axis for axis in figure.axes if axis.get_ylabel() == "held-out questions right (%)")
    assert lines_of(panel) == {"vqa": ([0, 8], [10.0, 30.0]), "gqa": ([8], [20.0])} and panel.get_ylim() == (0, 100)
    assert panel.get_xlabel() == "step" and figure.axes[0].get_xlabel() == ""


@pytest.mark.parametrize(
    ("width", "means"),
    [(1, [4.0, 2.0, 6.0, 0.0]), (2, [4.0, 3.0, 4.0, 3.0]), (3, [4.0, 3.0, 4.0, 8 / 3]), (9, [4.0, 3.0, 4.0, 3.0])],
)
def test_a_running_mean_is_of_the_last_values(width, means):
    assert plots.smooth([4.0, 2.0, 6.0, 0.0], width) == pytest.approx(means)
    assert plots.smooth([], width) == []
