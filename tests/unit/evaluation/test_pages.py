"""The page of a score, that of a comparison, and what a tracker is told of them: each number in its own cell."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from pipelines.evaluation import compare_page, page
from pipelines.evaluation import track as module
from pipelines.evaluation.compare import Comparison, comparison_table
from pipelines.evaluation.page import OTHER_COLOUR, PREDICTED_COLOUR, TRUE_COLOUR, drawn_case
from pipelines.evaluation.scoring import score_table
from pipelines.evaluation.track import track_scores
from pipelines.settings import ScoreSettings

WHITE = (255, 255, 255)


def line(key="q", score=1.0, **changes):
    fields = {
        "benchmark": "vqa", "id": key, "score": score, "blind_score": None, "shuffled_score": None, "image": None,
        "answer": "a&b", "blind": None, "shuffled": None, "instruction": "<what>", "truth": {"answer": "<b>"},
        "problem": "", "split": "test", "history": [], "choices": [],
    }  # fmt: skip
    return {**fields, **changes}


def score(**changes):
    fields = {
        "metric": "IoU > 0.5", "value": 51.25, "low": 40.0, "high": 60.5, "n": 1234, "blind": 12.0, "shuffled": 23.0,
        "scoring": "official", "also": {}, "parts": {}, "unanswered": 0, "problems": [], "files": [],
    }  # fmt: skip
    return {**fields, **changes}


def rows_of(table):
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


def solid(tmp_path, size=(100, 50)):
    path = tmp_path / "white.png"
    Image.new("RGB", size, WHITE).save(path)
    return str(path)


def outline(image, colour):
    """(left, top, right, bottom) of the pixels of a colour; None for none."""
    width, height = image.size
    found = [(x, y) for x in range(width) for y in range(height) if image.getpixel((x, y)) == colour]
    xs, ys = [x for x, _ in found], [y for _, y in found]
    return (min(xs), min(ys), max(xs), max(ys)) if found else None


# ---------------------------------------------------------------------- scores


def test_every_number_of_a_score_has_its_column_in_the_order_of_the_run():
    scores = {"vqa<": score(), "a": score(blind=None, shuffled=None, unanswered=7, n=3)}
    head, first, second = rows_of(page._score_table(scores))
    assert head == ["benchmark", "metric", "score", "95% interval", "blind", "shuffled", "questions", "unanswered"]
    assert first == [
        '<a href="#vqa<">vqa&lt;</a>', "IoU &gt; 0.5", "<b>51.2</b>", "40.0 – 60.5", "12.0", "23.0", "1,234", "",
    ]  # fmt: skip
    assert second[4:] == ["", "", "3", "7"]
    lines = score_table(scores).split("\n")
    assert [each.split()[0] for each in lines] == ["benchmark", "vqa<", "a"], "not sorted: as they were asked for"


def test_a_section_counts_all_that_were_not_answered_and_lists_the_named_ones():
    parts = {"test/count": {"value": 1.0, "low": 0.5, "high": 2.0, "n": 4321}}
    text = page._section("vqa", score(unanswered=25, problems=["q1: <gone>"], also={"a<": 3.25}, parts=parts), [], [])
    assert "<summary>25 without an answer</summary><ul><li>q1: &lt;gone&gt;</li></ul>" in text
    assert '<section id="vqa"><h2>vqa</h2><ul class="also"><li>a&lt;: 3.2</li></ul><details>' in text
    assert rows_of(text) == [
        ["part", "score", "95% interval", "questions"],
        ["test/count", "1.0", "0.5 – 2.0", "4,321"],
    ]
    plain = page._section("vqa", score(), [line("worst", instruction="w")], [line("best", instruction="b")])
    assert "details" not in plain and "<table>" not in plain
    assert plain.index("Worst first") < plain.index("<p>w</p>") < plain.index("Best") < plain.index("<p>b</p>")


@pytest.mark.parametrize(("value", "mark"), [(1.0, "right"), (0.0, "wrong"), (0.3, "partly")])
def test_a_case_shows_truth_and_every_view_that_was_asked(value, mark):
    text = page._case(line(score=value, blind="bl<", shuffled="", problem="p<"))
    assert text.startswith(f'<figure class="{mark}"><div class=none>no image</div><figcaption><p>&lt;what&gt;</p>')
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text) == [
        ("truth", "&lt;b&gt;"), ("answer", "a&amp;b"), ("blind", "bl&lt;"), ("shuffled", ""), ("problem", "p&lt;"),
        ("score", f"{value:.2f}"),
    ]  # fmt: skip
    assert [key for key, _ in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page._case(line()))] == [
        "truth",
        "answer",
        "score",
    ]


def test_a_page_has_a_section_of_each_benchmark_with_its_own_cases():
    lines = [line("1", instruction="one"), line("2", instruction="two", benchmark="gqa")]
    text = page.score_page({"vqa": score(), "gqa": score()}, lines, "<title>", 8)
    first, second = text.split("<section ")[1:]
    assert ("<p>one</p>" in first, "<p>two</p>" in first) == (True, False)
    assert ("<p>one</p>" in second, "<p>two</p>" in second) == (False, True)
    assert '<p class="what">&lt;title&gt;</p>' in text


def test_boxes_are_drawn_where_they_are_and_the_answer_over_the_others(tmp_path):
    truth = {"box": [10.0, 10.0, 30.0, 40.0], "width": 100, "height": 50}
    shown = line(image=solid(tmp_path), truth=truth, answer="{<60><20><80><80>}")
    drawn = drawn_case(shown, 200, other="{<40><20><50><80>}")
    assert drawn.size == (200, 100)
    assert outline(drawn, TRUE_COLOUR) == (20, 20, 60, 80)
    left, top, right, bottom = outline(drawn, PREDICTED_COLOUR)
    assert (left, right) == pytest.approx((120, 161), abs=2) and (top, bottom) == pytest.approx((20, 80), abs=2)
    left, _, right, _ = outline(drawn, OTHER_COLOUR)
    assert (left, right) == pytest.approx((80, 101), abs=2)
    same = drawn_case(shown, 200, other=shown["answer"])
    assert outline(same, OTHER_COLOUR) is None, "the answer covers the other's"
    assert outline(drawn_case({**shown, "answer": None}, 200), PREDICTED_COLOUR) is None
    upright = drawn_case(line(image=solid(tmp_path, (50, 100))))
    assert upright.size == (160, 320), "the longer side"
    (tmp_path / "text.png").write_text("no image")
    assert drawn_case(line(image=str(tmp_path / "text.png"))) is None


@pytest.mark.parametrize("box", [(10, 20, 60, 40), (60, 40, 10, 20), (60, 20, 10, 40)])
def test_the_corners_of_a_box_may_come_in_any_order(box):
    image = Image.new("RGB", (100, 50), WHITE)
    page._outline(image, box, TRUE_COLOUR)
    assert outline(image, TRUE_COLOUR) == (10, 20, 60, 40)
    assert image.getpixel((13, 23)) == WHITE and image.getpixel((12, 22)) == TRUE_COLOUR, "three pixels"


def test_boxes_of_a_grounded_answer_are_drawn_where_there_is_no_true_one(tmp_path):
    grounded = line(image=solid(tmp_path), answer="<p>a cat</p> {<10><10><50><50>}")
    drawn, plain = drawn_case(grounded), drawn_case({**grounded, "answer": "a cat"})
    assert plain.tobytes() == b"\xff" * (320 * 160 * 3) != drawn.tobytes()


# ---------------------------------------------------------------------- comparisons


NUMBERS = Comparison(
    ours=61.0, theirs=52.0, difference=9.0, low=-1.25, high=12.0, p=0.0312, better=30, worse=21, n=1100
)


def test_every_number_of_a_comparison_has_its_column():
    head, cells = rows_of(compare_page._table({"v<": NUMBERS}))
    assert head == [
        "benchmark", "before", "after", "difference", "95% interval", "p", "better", "worse", "questions",
    ]  # fmt: skip
    assert cells == [
        '<a href="#v&lt;">v&lt;</a>', "52.0", "<b>61.0</b>", "+9.0", "-1.2 .. +12.0", "0.0312", "30", "21", "1,100",
    ]  # fmt: skip
    assert comparison_table({"v": NUMBERS}).split("\n")[1].split() == [
        "v", "61.0", "52.0", "+9.0", "-1.2", "..", "+12.0", "0.0312", "30", "21", "1100",
    ]  # fmt: skip


@pytest.mark.parametrize(("after", "mark"), [(0.5, "same"), (0.75, "right"), (0.25, "wrong")])
def test_a_compared_case_has_both_answers(after, mark):
    text = compare_page._case((line(score=after, answer="new<"), line(score=0.5, answer=None)))
    assert text.startswith(f'<figure class="{mark}"><div class=none>')
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text) == [
        ("truth", "&lt;b&gt;"),
        ("before", " (0.50)"),
        ("after", f"new&lt; ({after:.2f})"),
    ]


def test_pairs_are_of_one_benchmark_and_one_question():
    """Another benchmark's question of the same id is another; one that is missing on a side is left out."""
    ours = [line("1", 1.0), line("1", 0.0, benchmark="gqa"), line("2", 1.0)]
    theirs = [line("1", 0.0), line("1", 1.0, benchmark="gqa"), line("2", 0.0, instruction="else"), line("3", 1.0)]
    text = compare_page.comparison_page({"vqa": NUMBERS, "gqa": NUMBERS}, ours, theirs, ("<new>", "<old>"), 5)
    first, second = text.split("<section ")[1:]
    assert re.findall(r"<h3>(.*?)</h3>", first) == ["Better after: 1"]
    assert re.findall(r"<h3>(.*?)</h3>", second) == ["Worse after: 1"]
    assert "before: &lt;old&gt;<br>after: &lt;new&gt;" in text


def test_the_other_answers_box_is_the_one_before(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare_page, "drawn_case", lambda shown, other: asked.append((shown["answer"], other)))
    compare_page._case((line(answer="after"), line(answer="before")))
    compare_page._case((line(answer="after"), line(answer=None)))
    assert asked == [("after", "before"), ("after", "")]


# ---------------------------------------------------------------------- tracking


@pytest.mark.parametrize("compared", [False, True])
def test_a_tracker_is_told_all_of_a_score(tmp_path, monkeypatch, compared):
    told = []
    names = ("params", "tags", "inputs", "metrics", "table", "describe", "artifact", "close")
    tracker = SimpleNamespace(**{name: lambda *a, name=name: told.append((name, *a)) for name in names})
    monkeypatch.setattr(module, "continue_tracker", lambda *a, **k: told.append(("begin", a, k)) or tracker)
    monkeypatch.setattr(module, "_worst_cases", lambda lines: [("worst", *lines)])
    monkeypatch.setattr(
        module, "_data_input", lambda settings, name, score: f"{settings.limit} of {name}, {score['value']}"
    )
    files = ["result.json", "report.html", "comparison.html", "predictions.jsonl"]
    for name in files:
        if compared or name != "comparison.html":
            (tmp_path / name).write_text("x")
    settings = ScoreSettings(recipe="mini", checkpoint="c", limit=5)
    result = {"checkpoint": "/c", "benchmarks": {"vqa": score(parts={"p": 1}), "gqa": score(value=7.0)}}
    if compared:
        result["comparison"] = {"vqa": {"ours": 1.0}}
    track_scores(settings, tmp_path, result, ["line"], "parent", 1e9)
    (_, (by, title, folder), how), *told = told
    assert by is settings
    assert title.startswith("mini score vqa, gqa, 2001-09-") and folder == tmp_path
    assert how == {"parent_run_id": "parent", "started": 1e9}
    of = {name: [entry[1:] for entry in told if entry[0] == name] for name in names}
    assert of["params"] == [(settings.model_dump(),)] and of["tags"] == [({"checkpoint": "/c"},)]
    assert of["inputs"] == [(["5 of vqa, 51.25", "5 of gqa, 7.0"],)]
    assert of["metrics"] == [({"score/vqa": 51.25}, 0), ({"score/gqa": 7.0}, 0)]
    numbers = {"benchmark", "metric", "value", "low", "high", "n", "blind", "shuffled", "unanswered"}
    (rows, name), *others = of["table"]
    assert name == "scores" and [row["benchmark"] for row in rows] == ["vqa", "gqa"]
    assert all(numbers <= set(row) and not {"also", "parts", "problems", "scoring"} & set(row) for row in rows)
    comparison = [([{"benchmark": "vqa", "ours": 1.0}], "comparison")] if compared else []
    assert others == [*comparison, ([("worst", "line")], "worst_cases")]
    sent = files if compared else [name for name in files if name != "comparison.html"]
    assert [path.name for (path,) in of["artifact"]] == sent
    head, _, first, second, *_ = of["describe"][0][0].replace("&emsp;", "").splitlines()
    columns = ("benchmark", "metric", "value", "low", "high", "blind", "shuffled", "n")
    assert [name.strip() for name in head.strip("|").split("|")] == list(columns)
    assert first.startswith("| vqa |") and second.startswith("| gqa |")
    assert of["describe"][0][0].endswith("\n\nImages of the worst answers: `report.html` in Artifacts.")
    assert told[-1] == ("close",)
    json.dumps(rows)
    titles = []
    three = {**result, "benchmarks": {name: score() for name in ("vqa", "gqa", "vsr")}}
    monkeypatch.setattr(module, "continue_tracker", lambda *a, **k: titles.append(a[1]) or tracker)
    track_scores(settings, tmp_path, three, [], "", 1e9)
    assert titles[0].startswith("mini score vqa and 2 more, 2001-09-")
