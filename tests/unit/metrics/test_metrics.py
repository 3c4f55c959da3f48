"""Scores: hand-worked cases, the release's golden numbers, and other libraries' values of the same metric."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from tinygptv.data.boxes import iou
from tinygptv.metrics.metrics import (
    auroc,
    direct_answer_accuracy,
    exact_match,
    f1,
    grounded_f1,
    pope_answer,
    precision,
    rec_hit,
    recall,
    vizwiz_accuracy,
    vqa_accuracy,
    yes_no,
)
from tinygptv.metrics.released import (
    contains_answer,
    released_hateful,
    released_okvqa,
    released_rec,
    released_text,
    released_vizwiz,
)
from tinygptv.metrics.vqa_text import CONTRACTIONS, normalise_answer

# ---------------------------------------------------------------------- VQA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("it's 1,000 m", "it's 1000 m"),  # a thousands comma: every mark is deleted, wherever it stands
        ("red/blue", "red blue"),  # a mark between letters becomes a space
        ("red / blue", "red blue"),  # one that touches a space is deleted
        ("x,y, z", "xy z"),  # ... and so are the others of its kind
        ("x,y ,z", "xy z"),
        ("x,y,\nz", "xy z"),  # a line break or tab is a space
        ("x,y,\tz", "xy z"),
        ("x,y", "x y"),
        ("x;/y/z", "x y z"),  # spaces are those of the text as it was given
        ("3.5", "3.5"),
        ("no. 5.", "no 5"),  # a period that no digit follows goes
        ("a  the an", ""),
        ("yes!\n", "yes"),
        ("somebody'd", "somebodyd"),  # mistyped in the published table, and kept
    ],
)
def test_normalisation_by_hand(text, expected):
    assert normalise_answer(text) == expected


def test_every_number_word_is_its_digit():
    words = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert [normalise_answer(word) for word in words] == ["0", *(str(number) for number in range(11))]
    assert normalise_answer("eleven twenty once") == "eleven twenty once"
    assert normalise_answer("Ten dogs, nine cats") == "10 dogs 9 cats"


def test_contractions_are_those_of_the_published_table():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["couldve"] == "could've" and CONTRACTIONS["notve"] == "not've" and "let's" in CONTRACTIONS


@pytest.mark.parametrize(
    ("num_same", "expected"),
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_vqa_accuracy_by_hand(num_same, expected):
    answers = ["blue"] * num_same + [f"other {i}" for i in range(10 - num_same)]
    assert vqa_accuracy("blue", answers) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["x", "y", "c d", "1"]), min_size=1, max_size=10), st.sampled_from(["x", "y", "z", ""]))
def test_vqa_accuracy_equals_leaving_out_each_annotator(answers, prediction):
    scores = [min(1.0, sum(a == prediction for j, a in enumerate(answers) if j != i) / 3) for i in range(len(answers))]
    assert vqa_accuracy(prediction, answers) == pytest.approx(np.mean(scores))
    assert vizwiz_accuracy(prediction, answers) == pytest.approx(np.mean(scores))


def test_vqa_normalises_only_where_annotators_disagree():
    assert vqa_accuracy("The dog.", ["dog"] * 10) == 0.0
    assert vqa_accuracy("The dog.", ["dog"] * 9 + ["cat"]) == 1.0
    assert vqa_accuracy("2", ["Two"] * 5 + ["three"] * 5) == 1.0
    assert vqa_accuracy("red\nbig\tdog ", ["red big dog"] * 10) == 1.0, "but a line break is always a space"
    assert vqa_accuracy("red big dog", ["red\nbig\tdog "] * 10) == 1.0
    assert vqa_accuracy("", []) == 0.0


@pytest.mark.parametrize("mark", ';/[]"{}()=+\\_-><@`,?!')
def test_each_mark_is_a_space_between_words_and_nothing_beside_one(mark):
    assert normalise_answer(f"red{mark}dog") == "red dog" and normalise_answer(f"red{mark} dog") == "red dog"
    assert normalise_answer(f"1,000{mark}dogs") == "1000dogs", "in a text with a thousands comma, too"


def test_the_released_vizwiz_reads_the_last_turn_and_no_case():
    assert released_vizwiz("Assistant: a car Assistant: Dog", ["DOG", "Dog", "dog"]) == 1.0
    assert released_vizwiz("###Human: dog", ["dog"] * 3) == 1.0, "an empty answer agrees with everybody"
    assert released_vizwiz("Human: cat Assistant: dog", ["cat"] * 3) == 0.0


def test_vizwiz_normalises_the_prediction_alone_and_always():
    assert vizwiz_accuracy("The Dog.", ["dog"] * 10) == 1.0
    assert vizwiz_accuracy("dog", ["The Dog"] * 10) == 0.0
    curly = "don\u2019t"  # as the published script writes most of its contractions
    for prediction, answer, score in (
        ("dont", "don't", 0.0),
        ("dont", curly, 1.0),
        ("don't", "don't", 1.0),
        ("weve", "we've", 1.0),
        ("hadn'tve", "hadn\u2019t\u2019ve", 1.0),
    ):
        assert vizwiz_accuracy(prediction, [answer] * 10) == score
    assert vizwiz_accuracy("unanswerable", ["unanswerable"] * 3 + ["a"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


def test_direct_answers_count_to_three_without_leaving_anybody_out():
    assert direct_answer_accuracy("candle ", ["candle", "cake", "candle"]) == pytest.approx(2 / 3)
    assert direct_answer_accuracy("Candle", ["candle"] * 10) == 0.0, "the published code compares letter for letter"
    assert direct_answer_accuracy("candle", ["candle"] * 10) == 1.0


def test_exact_match_ignores_case_and_space_alone():
    assert exact_match(" Yes ", "yes") == 1.0
    assert exact_match("yes.", "yes") == 0.0


# ---------------------------------------------------------------------- yes or no, classes


def test_yes_no_reads_the_first_word():
    assert yes_no("Yes, it is") == "yes"
    assert yes_no("no") == "no"
    assert yes_no("it is, yes") is None and yes_no("") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No, there is none", "no"),
        ("there is not one", "no"),
        ("there is no dog", "no"),
        ("there is\tno dog", "yes"),  # as published: words are what single spaces part
        ("Yes. There is no other", "yes"),  # only the first sentence
        ("", "yes"),
        ("NO", "yes"),  # as published: the word is No, no or not
        ("nothing", "yes"),
    ],
)
def test_pope_answers(text, expected):
    assert pope_answer(text) == expected


def test_class_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, predicted = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        assert f1(predicted, truth) == pytest.approx(f1_score(truth, predicted))
        assert precision(predicted, truth) == pytest.approx(precision_score(truth, predicted))
        assert recall(predicted, truth) == pytest.approx(recall_score(truth, predicted))
    nothing = np.zeros(5)
    assert f1(nothing, nothing) == precision(nothing, nothing) == recall(nothing, nothing) == 0.0


def test_auroc_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels = rng.permutation([0] * 17 + [1] * 13)
        scores = rng.integers(0, 6, 30) + 0.25 * labels  # many ties
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auroc([0.1, 0.9], [0, 1]) == 1.0 and auroc([0.9, 0.1], [0, 1]) == 0.0
    assert np.isnan(auroc([1.0, 2.0], [1, 1]))


# ---------------------------------------------------------------------- boxes


def test_a_referring_answer_hits_above_half():
    """IoU counts both border pixels: {<0><0><49><99>} of 100 x 100 is 50 x 100 pixels."""
    truth = (0, 0, 99, 99)
    assert rec_hit("{<0><0><50><99>}", truth, 100, 100) == 1.0
    assert rec_hit("{<0><0><49><99>}", truth, 100, 100) == 0.0, "exactly 0.5 is no hit"
    assert rec_hit("<unk>{ <0><0> <99><99>}", truth, 100, 100) == 1.0
    assert rec_hit("it is at {<0><0><99><99>}", truth, 100, 100) == 0.0, "the box must come first"
    assert rec_hit("{<0><0><99><99>} and {<1><2><3><4>}", truth, 100, 100) == 0.0
    assert rec_hit("{<0><0><99>}", truth, 100, 100) == 0.0
    assert iou((0, 0, 9, 9), (5, 5, 14, 14)) == pytest.approx(25 / 175)


def test_released_rec_scores_against_the_last_box_of_an_id():
    size = {"width": 100, "height": 100}
    truths = [
        {"img_id": "a", "box": (60, 60, 99, 99), **size},
        {"img_id": "b", "box": (0, 0, 10, 10), **size},
        {"img_id": "a", "box": (0, 0, 50, 50), **size},
    ]
    assert released_rec(["{<0><0><50><50>}"] * 3, truths) == [1.0, 0.0, 1.0]


def test_grounded_f1_by_hand():
    truth = "<p>red circle</p> {<0><0><50><50>} <p>blue star</p> {<50><50><90><90>}"
    assert grounded_f1(truth, truth, 100, 100) == 1.0
    assert grounded_f1("<p>red circle</p> {<0><0><50><50>}", truth, 100, 100) == pytest.approx(2 / 3)
    assert grounded_f1("<p>red circle</p> {<60><60><99><99>}", truth, 100, 100) == 0.0
    assert grounded_f1("<p>green circle</p> {<0><0><50><50>}", truth, 100, 100) == 0.0
    twice = "<p>red circle</p> {<0><0><50><50>} <p>red circle</p> {<0><0><50><50>}"
    assert grounded_f1(twice, truth, 100, 100) == pytest.approx(2 / 4), "a true box is found once"
    three = " ".join([twice.partition(" <p>")[0]] * 3)
    assert grounded_f1(twice.partition(" <p>")[0], three, 100, 100) == pytest.approx(2 / 4), (
        "and a predicted one finds one"
    )
    assert grounded_f1("", truth, 100, 100) == grounded_f1(truth, "", 100, 100) == grounded_f1("", "", 100, 100) == 0.0
    one, half = "<p>a</p> {<0><0><99><99>}", "<p>A </p> {<0><0><49><99>}"
    assert grounded_f1(half, one, 100, 100) == 0.0, "IoU of exactly the threshold is no hit"
    assert grounded_f1(half, one, 100, 100, threshold=0.49) == 1.0


# ---------------------------------------------------------------------- captions


def test_released_scores_show_their_defects():
    assert contains_answer("I do not know", "no") == 1.0 and exact_match("I do not know", "no") == 0.0
    assert contains_answer("It is RED", "red") == 1.0 and contains_answer("it is red", "Red") == 0.0, "as it stands"
    assert released_vizwiz("", ["dog"] * 10) == 1.0 and vizwiz_accuracy("", ["dog"] * 10) == 0.0
    assert released_vizwiz("Assistant: a DOG###Human: x", ["dog", "cat", "a_b"]) == pytest.approx(2 / 3)
    assert released_hateful("yes and no", 1) == 1.0 and released_hateful("I know", 0) == 1.0
    assert released_hateful("yes Assistant: no", 0) == 1.0 and released_hateful("yes assistant: no", 0) == 0.0
    assert released_hateful("maybe", 0) == 0.0 and released_hateful("###yes", 1) == 0.0
    assert released_okvqa("Two### three", ["2"] * 5 + ["4"] * 5) == 1.0
    assert released_okvqa("two ###3### 4", ["2"] * 5 + ["4"] * 5) == 1.0, "cut at the first"
    assert released_hateful("no###1###yes", 0) == 1.0 and released_vizwiz("a###b###", ["b"] * 3) == 0.0


def test_released_text_is_cut_as_the_release_cuts():
    assert released_text("a<s> b</s> c") == "a b"
    assert released_text("x [/INST] y ###Human") == "y ###Human"
