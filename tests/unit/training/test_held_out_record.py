"""The evaluations of a run: sums of workers, the least loss, what a state keeps, the file and its earlier versions."""

from __future__ import annotations

import json
import math

import pytest

from pipelines.training.held_out import HeldOutShare
from pipelines.training.held_out_record import HeldOutHistory, parse_evaluation, read_evaluations


def history_of(*losses, start=3, every=4):
    """Evaluations after 3, 7, 11 .. steps."""
    history = HeldOutHistory()
    for number, loss in enumerate(losses):
        history.add(start + every * number, [HeldOutShare({"q": (2 * loss, 2)}, {"q": (number + 1.0, 8)})])
    return history


def test_the_loss_is_a_mean_over_tokens_and_scores_are_per_cent_over_all_workers():
    shares = [
        HeldOutShare({"a": (6.0, 2), "b": (1.0, 8), "none": (0.0, 0)}, {"a": (1.5, 2), "none": (0.0, 0)}),
        HeldOutShare({"a": (3.0, 4), "b": (5.0, 6), "none": (0.0, 0)}, {"a": (0.0, 1), "none": (0.0, 0)}),
    ]
    history = HeldOutHistory()
    found = history.add(5, shares)
    assert found == {"step": 5, "loss": 0.75, "sources": {"a": 1.5, "b": 3 / 7}, "scores": {"a": 50.0}}
    assert history.evaluations == [found]
    assert HeldOutHistory().add(0, [HeldOutShare({"none": (0.0, 0)}, {})])["loss"] == 0.0


@pytest.mark.parametrize(
    ("losses", "best", "since"),
    [
        ([2.0], 0, 0),
        ([2.0, 1.0], 1, 0),
        ([2.0, 1.0, 1.0], 1, 1),
        ([1.0, 3.0, 2.0], 0, 2),
        ([math.nan, 2.0, 3.0], 1, 1),
        ([2.0, math.nan, 1.0], 2, 0),
        ([2.0, -math.inf], 0, 1),
        ([math.inf, math.nan], 0, 1),
    ],
)
def test_the_best_is_the_first_of_the_least_finite_losses(losses, best, since):
    history = history_of(*losses)
    assert history.best is history.evaluations[best]
    assert history.since_best == since and history.newest_is_best is (since == 0)


def test_a_state_keeps_all_evaluations_and_the_loss_of_its_own_weights():
    history = history_of(2.0, 1.5, math.nan)
    lost = {"step": 11, "loss": None, "sources": {"q": None}, "scores": {"q": 37.5}}
    kept = [*map(dict, history.evaluations[:2]), lost]
    assert history.state(11) == {"evaluations": kept, "held_out_loss": None}
    del history.evaluations[2]
    assert history.state(7) == {"evaluations": kept[:2], "held_out_loss": 1.5}
    assert history.state(8) == {"evaluations": kept[:2], "held_out_loss": None}, "these weights were not evaluated"
    history.state(7)["evaluations"].clear()
    assert len(history.evaluations) == 2, "a state is a copy"
    assert HeldOutHistory().state(3) == {}


def test_a_run_without_evaluations_has_a_list_of_its_own():
    one, other = HeldOutHistory(), HeldOutHistory([])
    one.evaluations.append("x")
    assert other.evaluations == [] and HeldOutHistory().evaluations == []


def test_the_result_has_first_last_and_least_and_scores_of_what_was_asked():
    found = history_of(3.0, 1.0, 2.0).result(7, {"q": 6, "r": 5}, {"q": 4})
    assert found == {
        "first": 3.0,
        "last": 2.0,
        "best": 1.0,
        "best_step": 7,
        "checkpoint_step": 7,
        "rows": {"q": 6, "r": 5},
        "scores": {"q": {"first": 12.5, "last": 37.5, "questions": 4}},
    }
    assert history_of(3.0, 1.0, 2.0).result(11, {}, {})["checkpoint_step"] == 11


def test_questions_that_a_run_was_not_asked_from_its_start_count_from_their_first_answers():
    history = history_of(3.0, 1.0, 2.0)
    history.evaluations[0]["scores"] = {}
    second = history.evaluations[1]["scores"]["q"]
    scores = history.result(7, {}, {"q": 4, "never": 2})["scores"]
    assert scores == {"q": {"first": second, "last": 37.5, "questions": 4}}


def test_the_file_has_a_line_for_each_and_comes_back(tmp_path):
    path = tmp_path / "held_out.jsonl"
    history = history_of(3.0, math.nan)
    history.write(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [3.0, None] and path.read_text().endswith("}\n")
    first, second = read_evaluations(path)
    assert first == history.evaluations[0] and math.isnan(second["loss"]) and math.isnan(second["sources"]["q"])
    assert read_evaluations(tmp_path / "none.jsonl") == []


def test_lines_of_earlier_versions_have_no_scores():
    line = {"step": "4", "loss": "1.5", "sources": {"a": "2", "b": None}}
    found = parse_evaluation(line)
    assert (found["step"], found["loss"], found["scores"]) == (4, 1.5, {})
    assert found["sources"]["a"] == 2.0 and math.isnan(found["sources"]["b"])
    assert parse_evaluation({**line, "scores": {"a": 50}})["scores"] == {"a": 50.0}
    assert "rows" not in found and parse_evaluation({**line, "rows": "0a"})["rows"] == "0a"
