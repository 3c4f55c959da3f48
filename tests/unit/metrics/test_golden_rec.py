"""Referring answers against recordings of the release's evaluation: boxes, overlaps, hits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.paths import GOLDEN
from tinygptv.data.boxes import iou, parse_answer_box, to_pixels
from tinygptv.metrics.metrics import rec_hit
from tinygptv.metrics.released import released_rec


def golden_rec():
    return json.loads((GOLDEN / "10_eval" / "rec.json").read_text())


def test_referring_answers_hit_where_the_release_says_so():
    golden = golden_rec()
    x, y, width, height = golden["gt"]["bbox"]
    for item in golden["items"]:
        hit = rec_hit(item["answer"], (x, y, x + width, y + height), golden["gt"]["width"], golden["gt"]["height"])
        assert bool(hit) == item["hit"], item


def test_overlaps_equal_the_releases():
    for case in golden_rec()["computeIoU"]:
        assert iou(case["a"], case["b"]) == pytest.approx(case["iou"])


def test_released_rec_scores_against_the_last_box_of_an_id():
    golden = golden_rec()["duplicate_img_ids"]

    def truth(item):
        x, y, width, height = item["bbox"]
        size = {"width": item["width"], "height": item["height"]}
        return {"img_id": item["img_id"], "box": (x, y, x + width, y + height), **size}

    truths = [truth(item) for item in golden["items"]]
    scores = released_rec([golden["answer_for_all"]] * len(truths), truths)
    assert 100 * np.mean(scores) == pytest.approx(golden["printed"])
    other = [{**truths[0], "box": (0, 0, 5, 5)}, truths[1]]  # the same id with two boxes
    assert released_rec([golden["answer_for_all"]] * 2, other) == [1.0, 1.0]


def test_boxes_are_read_as_the_release_reads_them():
    record = golden_rec()
    truth = record["gt"]
    x, y, w, h = truth["bbox"]
    for item in record["items"]:
        box = parse_answer_box(item["answer"])
        assert (box is not None) == (item["iou"] is not None), item
        if box is not None:
            assert list(box) == item["integers"]
            overlap = iou(to_pixels(box, truth["width"], truth["height"]), (x, y, x + w, y + h))
            assert overlap == pytest.approx(item["iou"], rel=1e-9, abs=1e-12)
            assert (overlap > 0.5) == item["hit"]
    for pair in record["computeIoU"]:
        assert iou(pair["a"], pair["b"]) == pytest.approx(pair["iou"], rel=1e-12)
