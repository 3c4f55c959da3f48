"""From answers to numbers, tables and pages: exact values, in their order."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.answers import Answers, ViewAnswer, read_answers, write_answers
from pipelines.evaluation.benchmarks.base import Benchmark, Outcome, Question, Statistics
from pipelines.evaluation.benchmarks.grounding import OVERLAPS, REFERRING
from pipelines.evaluation.compare import Comparison, comparison_table
from pipelines.evaluation.compare_page import comparison_page
from pipelines.evaluation.page import TRUE_COLOUR, drawn_case, score_page, worst_first
from pipelines.evaluation.scoring import format_number, score_benchmark, write_predictions
from tinygptv.data.prompt_layout import Exchange
from tinygptv.metrics.intervals import bootstrap
from tinygptv.metrics.metrics import exact_match

EXACT = Benchmark("exact", "exact match", lambda data: iter(()), lambda a, t: exact_match(a, t["answer"]))


def question(number, truth="yes", kind="", split="test"):
    return Question(f"q{number}", "what?", None, {"answer": truth}, kind, split)


def answers(number, problem="", **views):
    return Answers(f"q{number}", problem, {name: ViewAnswer(text) for name, text in views.items()})


def test_answers_come_back_from_their_file(tmp_path):
    written = [
        Answers("a", "", {"answer": ViewAnswer("", (1.5, math.inf)), "shuffled": ViewAnswer("x", (0.5, 2.0))}),
        Answers("b", "gone", {}),
    ]
    path = str(tmp_path / "answers.jsonl")
    write_answers(path, written)
    assert read_answers(path, [Question(key, "", None, {}) for key in "ab"]) == written
    first = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert (first["answer"], first["blind"], first["answer_losses"]) == ("", None, [1.5, None])
    assert Answers.from_dict({"id": "c", "problem": "gone"}) == Answers("c", "gone"), "a view that is not there"


def test_each_view_has_its_own_scores_in_the_predictions(tmp_path):
    answered = [
        (question(0), answers(0, answer="yes")),
        (question(1), answers(1, answer="no", blind="yes", shuffled="no")),
        (question(2), answers(2, "gone")),
        (question(3), answers(3, answer="yes", blind="no", shuffled="yes")),
    ]
    lines = write_predictions(tmp_path / "predictions.jsonl", [EXACT], {"exact": answered})
    found = [(line["id"], line["score"], line["blind_score"], line["shuffled_score"]) for line in lines]
    assert found == [("q0", 1.0, None, None), ("q1", 0.0, 1.0, 0.0), ("q2", 0.0, 0.0, 0.0), ("q3", 1.0, 0.0, 1.0)]
    assert [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == lines


def test_a_line_of_the_predictions_has_all_of_its_question(tmp_path):
    asked = Question(
        "q", "which?", tmp_path / "a.png", {"answer": "b"}, "colour", "val", (Exchange("before?", "yes"),), ("a", "b")
    )
    views = {"answer": ViewAnswer("b", (2.0, math.inf)), "blind": ViewAnswer("a")}
    benchmark = Benchmark("x", "m", EXACT.read, EXACT.score, released=lambda outcomes: [0.25] * len(outcomes))
    given = [benchmark], {"x": [(asked, Answers("q", "", views))]}
    (line,) = write_predictions(tmp_path / "p.jsonl", *given)
    assert line == {
        "benchmark": "x", "id": "q", "problem": "", "answer": "b", "blind": "a", "shuffled": None,
        "answer_losses": [2.0, math.inf], "score": 1.0, "blind_score": 0.0, "shuffled_score": None,
        "instruction": "which?", "history": [["before?", "yes"]], "choices": ["a", "b"],
        "image": str(tmp_path / "a.png"), "split": "val", "kind": "colour", "truth": {"answer": "b"},
    }  # fmt: skip
    (released,) = write_predictions(tmp_path / "p.jsonl", *given, released=True)
    assert released == {**line, "score": 0.25, "blind_score": 0.25}
    text_only = replace(asked, image=None)
    assert write_predictions(tmp_path / "p.jsonl", [EXACT], {"exact": [(text_only, Answers("q", "", views))]}) == [
        {**line, "benchmark": "exact", "image": None}
    ]


def test_twenty_problems_are_named_and_all_are_counted():
    answered = [(question(n), answers(n, f"reason {n}")) for n in range(25)]
    found = score_benchmark(EXACT, answered)
    assert found["unanswered"] == 25 and found["problems"] == [f"q{n}: reason {n}" for n in range(20)]


def test_other_splits_are_parts_and_in_no_number_of_the_benchmark():
    statistics = Statistics(lambda o: (float(o.answer == "yes"),), {"m": lambda t: t.mean(), "also": lambda t: t.sum()})
    benchmark = Benchmark("x", "m", EXACT.read, EXACT.score, statistics=statistics)
    answered = [(question(n, split="test" if n < 2 else "val"), answers(n, answer="yes")) for n in range(6)]
    found = score_benchmark(benchmark, answered)
    assert (found["n"], found["also"], found["parts"]["val"]["n"]) == (2, {"also": 200.0}, 4)


def test_a_value_and_its_parts_have_their_own_intervals():
    """95% by resampling the questions of each: those of ``intervals.bootstrap``, whatever the other parts hold."""
    right = {"test": [1, 1, 0, 1, 0, 1, 1, 1], "val": [0, 0, 1, 0, 0]}
    answered = [
        (question(f"{split}{n}", split=split), Answers(f"q{n}", "", {"answer": ViewAnswer("yes" if hit else "no")}))
        for split, hits in right.items()
        for n, hit in enumerate(hits)
    ]
    own = bootstrap([float(hit) for hit in right["test"]])
    part = bootstrap([float(hit) for hit in right["val"]])
    found = score_benchmark(EXACT, answered)
    assert (found["value"], found["low"], found["high"], found["n"]) == (75.0, own.low, own.high, 8)
    assert found["parts"] == {"val": {"value": 20.0, "low": part.low, "high": part.high, "n": 5}}
    assert own.low < 75 < own.high and part.low < 20 < part.high
    statistics = Statistics(lambda o: (float(o.answer == "yes"), 7.0), {"m": lambda t: t[:, 0].mean(), "n": len})
    counted = score_benchmark(replace(EXACT, statistics=statistics), answered)
    assert {key: counted[key] for key in ("value", "low", "high", "n", "parts")} == {
        key: found[key] for key in ("value", "low", "high", "n", "parts")
    }
    assert counted["also"] == {"n": 800.0}, "of the main split alone"


@pytest.mark.parametrize(("released", "value", "also"), [(False, 75.0, {"n": 400.0}), (True, 12.5, {})])
def test_the_releases_score_is_a_mean_also_where_a_benchmark_has_statistics(released, value, also):
    """As for RefCOCO and Hateful Memes; its other numbers are of the official rule alone."""
    statistics = Statistics(lambda o: (float(o.answer == "yes"),), {"m": lambda t: t.mean(), "n": len})
    benchmark = replace(EXACT, statistics=statistics, released=lambda outcomes: [0.5] + [0.0] * (len(outcomes) - 1))
    answered = [(question(n), answers(n, answer="no" if n == 3 else "yes", blind="no")) for n in range(4)]
    found = score_benchmark(benchmark, answered, released=released)
    assert (found["value"], found["also"], found["n"]) == (value, also, 4)
    assert found["blind"] == (12.5 if released else 0.0)


def test_a_benchmark_without_a_main_split_has_parts_alone():
    found = score_benchmark(EXACT, [(question(0, split="val"), answers(0, answer="yes"))])
    assert math.isnan(found["value"]) and (found["n"], found["also"]) == (0, {})
    assert list(found["parts"]) == ["val"] and found["parts"]["val"]["value"] == 100.0


def test_overlaps_have_their_thresholds():
    rows = np.array([[1.0], [0.5], [0.4], [0.3], [0.2]])
    values = {name: round(value(rows), 6) for name, value in OVERLAPS.values.items()}
    assert values == {"IoU > 0.5": 0.2, "IoU > 0.3": 0.6, "mean IoU": 0.48}, "an overlap of just a half is none"
    truth = {"box": [0, 0, 51, 100], "width": 100, "height": 100}
    replies = {"{<0><0><51><100>}": 1.0, "{<0><0><25><100>}": 0.5, "nothing": 0.0}
    asked = [Question(text, "x", None, truth) for text in replies]
    found = [OVERLAPS.columns(Outcome(question, question.id)) for question in asked]
    assert found == [(value,) for value in replies.values()]
    answered = [(each, Answers(each.id, "", {"answer": ViewAnswer(each.id)})) for each in asked]
    score = score_benchmark(REFERRING[0], answered)
    assert score["value"] == pytest.approx(100 / 3, abs=1e-3)
    assert score["also"] == {"IoU > 0.3": pytest.approx(200 / 3, abs=1e-3), "mean IoU": 50.0}


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (math.nan, ""), (math.inf, ""), (0.0, "0.0"), (12.345, "12.3"), (-1, "-1.0")]
)
def test_numbers_of_tables(value, text):
    assert format_number(value) == text


# ---------------------------------------------------------------------- pages


def line(key, score, *, blind=None, image=None, truth=None, answer="a", benchmark="exact"):
    return {
        "benchmark": benchmark, "id": key, "score": score, "blind_score": blind, "image": image, "answer": answer,
        "blind": None, "shuffled": None, "instruction": f"<{key}>", "truth": truth or {"answer": "a"}, "problem": "",
        "split": "test", "history": [], "choices": [],
    }  # fmt: skip


def shown(page):
    return [part.partition("&gt;")[0] for part in page.split("&lt;")[1:]]


def test_the_worst_come_first_and_those_a_blank_image_answers_better():
    lines = [line("a", 1.0), line("b", 0.0), line("c", 0.5, blind=1.0), line("d", 0.0, blind=1.0), line("e", 0.5)]
    assert [each["id"] for each in worst_first(lines)] == ["d", "b", "c", "e", "a"]


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        (8, ["0", "1", "2", "3", "4", "5", "9", "8"]),
        (4, ["0", "1", "2", "9"]),
        (3, ["0", "1", "2"]),
        (0, []),
        (40, ["9", "8", "7", "6", "5", "4", "3", "2", "1", "0"]),
        (12, ["0", "1", "2", "3", "4", "5", "6", "9", "8", "7"]),
    ],
)
def test_three_quarters_of_a_page_are_the_worst_and_the_rest_the_best(cases, expected):
    lines = [line(str(n), n / 10) for n in range(10)]
    page = score_page({"exact": score_benchmark(EXACT, [(question(0), answers(0, answer="yes"))])}, lines, "x", cases)
    assert shown(page.partition("<h3>Worst")[2]) == expected, "none is shown twice"


def test_a_comparison_shows_the_largest_changes_first():
    before = [line(str(n), score) for n, score in enumerate((0.0, 0.5, 1.0, 1.0, 0.2, 0.2, 0.2))]
    after = [line(str(n), score) for n, score in enumerate((1.0, 0.6, 0.0, 0.9, 0.2, 0.2, 0.2))]
    numbers = Comparison(ours=1, theirs=2, difference=-1, low=-2, high=-0.5, p=0.5, better=2, worse=2, n=7)
    page = comparison_page({"exact": numbers}, after, before, ("new", "old"), 2)
    sections = page.partition("Better after")[2]
    assert shown(sections) == ["0", "1", "2", "3", "4", "5"], "two of each, most gained or lost first"
    assert "before: old<br>after: new" in page and "The same score: 3" in page
    assert "-1.0*" in comparison_table({"exact": numbers}), "the interval leaves out 0"


@pytest.mark.parametrize(("low", "high", "star"), [(0.1, 2, True), (-2, -0.1, True), (-1, 1, False), (0, 2, False)])
def test_a_star_marks_what_is_sure(low, high, star):
    numbers = Comparison(ours=1, theirs=1, difference=1, low=low, high=high, p=0.5, better=0, worse=0, n=1)
    assert ("*" in comparison_table({"x": numbers})) == star


def test_a_true_box_is_scaled_with_its_image(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (80, 40), (255, 255, 255)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    truth = {"box": [20, 10, 60, 30], "width": 80, "height": 40}
    drawn = drawn_case(line("a", 1.0, image=str(tmp_path / "a.png"), truth=truth), 160)
    assert drawn.size == (160, 80)
    green = {(x, y) for x in range(160) for y in range(80) if drawn.getpixel((x, y)) == TRUE_COLOUR}
    assert (min(x for x, _ in green), min(y for _, y in green)) == (40, 20)
    assert (max(x for x, _ in green), max(y for _, y in green)) == (120, 60)
    assert drawn_case(line("a", 1.0)) is None and drawn_case(line("a", 1.0, image="/nowhere.png")) is None
