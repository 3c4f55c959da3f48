"""Two score runs question by question: which questions count, and what better and worse mean."""

from __future__ import annotations

import json

import pytest

from pipelines.evaluation.compare import compare, comparison_table, read_predictions
from pipelines.settings import SettingsError


def write(folder, scores, split="test", benchmark="vqa", **asked):
    folder.mkdir(exist_ok=True)
    same = {
        "answer": "a",
        "history": [],
        "choices": [],
        "image": None,
        "truth": {"answer": "a"},
        "instruction": "what?",
    }
    lines = [
        {**same, **asked, "benchmark": benchmark, "id": key, "score": score, "split": split}
        for key, score in scores.items()
    ]
    with (folder / "predictions.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_questions_that_both_answered_are_compared(tmp_path):
    ours = write(tmp_path / "ours", {"a": 1.0, "b": 0.5, "c": 0.0, "d": 1.0, "only ours": 1.0})
    theirs = write(tmp_path / "theirs", {"d": 1.0, "c": 1.0, "b": 0.0, "a": 0.0, "only theirs": 1.0})
    (found,) = compare(ours, theirs).values()
    assert (found["ours"], found["theirs"], found["n"]) == (62.5, 50.0, 4)
    assert (found["better"], found["worse"]) == (2, 1), "an equal score is neither"
    assert found["difference"] == 12.5 and found["low"] < 12.5 < found["high"] and 0 < found["p"] <= 1
    assert list(found) == ["ours", "theirs", "difference", "low", "high", "p", "better", "worse", "n"]
    (back,) = compare(theirs, ours).values()
    assert (back["better"], back["worse"], back["difference"]) == (1, 2, -12.5)


def test_means_and_p_are_rounded(tmp_path):
    """Of three questions that one model alone answers, one sign pattern in four is as extreme."""
    ours, theirs = (
        write(tmp_path / name, dict.fromkeys("abc", score)) for name, score in (("ours", 2 / 3), ("theirs", 1 / 3))
    )
    (found,) = compare(ours, theirs).values()
    assert (found["ours"], found["theirs"], found["p"]) == (66.667, 33.333, 0.25)
    assert (found["low"], found["difference"], found["high"]) == (33.333,) * 3, "the same difference everywhere"


def test_p_has_five_places(tmp_path):
    """Of seven questions that one model alone answers, two sign patterns in 128 are as extreme."""
    ours, theirs = (write(tmp_path / name, dict.fromkeys("abcdefg", n)) for n, name in ((1.0, "ours"), (0.0, "theirs")))
    (found,) = compare(ours, theirs).values()
    assert (found["p"], found["better"], found["worse"], found["n"]) == (pytest.approx(2 / 128, abs=5.1e-6), 7, 0, 7)
    assert found["p"] == round(found["p"], 5) != round(found["p"], 4)


def test_the_numbers_of_a_comparison_stand_below_their_names():
    sure = {"ours": 61.04, "theirs": 52.0, "difference": 9.04, "low": 0.3, "high": 17.8, "p": 0.03125}
    unsure = {"ours": 7.0, "theirs": 18.0, "difference": -11.0, "low": -25.0, "high": 0.0, "p": 0.5}
    counts = {"better": 30, "worse": 21, "n": 1100}
    table = comparison_table({"vqa": {**sure, **counts}, "gqa": {**unsure, **counts}})
    assert table.split("\n") == [
        "benchmark                  ours theirs  difference     95% interval        p better  worse      n",
        "vqa                        61.0   52.0       +9.0*    +0.3 .. +17.8   0.0312     30     21   1100",
        "gqa                         7.0   18.0      -11.0     -25.0 .. +0.0   0.5000     30     21   1100",
    ]


def test_other_splits_do_not_count(tmp_path):
    folders = [write(tmp_path / name, {"a": 1.0, "b": 0.0}) for name in ("ours", "theirs")]
    for folder, score in zip(folders, (1.0, 0.0), strict=True):
        write(folder, {"x": score, "y": score}, split="val")
    (found,) = compare(*folders).values()
    assert (found["n"], found["better"], found["worse"], found["ours"]) == (2, 0, 0, 50.0)


def test_each_benchmark_is_compared_by_itself(tmp_path):
    ours, theirs = (write(tmp_path / name, {"a": 1.0}) for name in ("ours", "theirs"))
    write(ours, {"a": 1.0}, benchmark="gqa"), write(theirs, {"a": 0.0}, benchmark="gqa")
    compared = compare(ours, theirs)
    assert [(name, found["difference"]) for name, found in compared.items()] == [("vqa", 0.0), ("gqa", 100.0)]
    assert [line.split()[3] for line in comparison_table(compared).splitlines()[1:]] == ["+0.0", "+100.0*"]


def test_nothing_in_common_is_told(tmp_path):
    ours, theirs = write(tmp_path / "ours", {"a": 1.0}), write(tmp_path / "theirs", {"b": 1.0})
    with pytest.raises(SettingsError, match=r"compare_with=.*theirs answers none of the questions of .*ours"):
        compare(ours, theirs)
    (theirs / "predictions.jsonl").unlink()
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"theirs has no predictions\.jsonl"):
            compare(ours, theirs)
        (theirs / "predictions.jsonl").mkdir(exist_ok=True)  # a folder of that name is none


@pytest.mark.parametrize(
    "other",
    [{"instruction": "how many?"}, {"truth": {"answer": "b"}}, {"image": "/a/2.png"}, {"image": None},
     {"history": [["what?", "a"]]}, {"choices": ["a", "b"]}],
)  # fmt: skip
def test_lines_of_one_number_that_ask_something_else_are_not_compared(tmp_path, other):
    """Rows of another file have the same ids: line 1, line 2, .."""
    ours = write(tmp_path / "ours", {"line 1": 1.0, "line 2": 1.0}, image="/a/1.png")
    theirs = write(tmp_path / "theirs", {"line 1": 0.0}, **{"image": "/moved/1.png", **other})
    with pytest.raises(SettingsError, match="answers none of the questions"):
        compare(ours, theirs)
    write(theirs, {"line 2": 0.0}, image="/moved/1.png", truth={"answer": "a"})
    assert compare(ours, theirs)["vqa"]["n"] == 1, "images may be moved"


@pytest.mark.parametrize("line", [b"", b"{", b"\xef\xbb\xbf{}", b"5", b"[]", b"\xff", b"null"])
def test_damaged_predictions_are_named_with_their_line(tmp_path, line):
    ours = write(tmp_path / "ours", {"a": 1.0})
    theirs = write(tmp_path / "theirs", {"a": 1.0})
    path = theirs / "predictions.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SettingsError, match=r"theirs/predictions\.jsonl, line 2 has no .*: it is damaged"):
        compare(ours, theirs)


def test_a_line_of_an_earlier_version_says_what_it_lacks(tmp_path):
    ours = write(tmp_path / "ours", {"a": 1.0})
    path = ours / "predictions.jsonl"
    path.write_text(path.read_text().replace('"truth"', '"right"'))
    with pytest.raises(SettingsError, match=r"line 1 has no truth: .*\. Run that score again; its answers are kept\."):
        read_predictions(ours)
