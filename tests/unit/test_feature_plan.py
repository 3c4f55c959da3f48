"""Cached or inline features: what pays, with the paper's numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.feature_plan import FeaturePlan, expected_draws, plan_features
from pipelines.training import stage_features
from tinygptv.training.stages import RECIPES

PAPER = RECIPES["paper"]
ROWS = {source.name: 1000 for stage in PAPER for source in stage.sources}


def plan(rows, free=10**12, **settings):
    return plan_features(PAPER, {**ROWS, **rows}, free, **settings)


def test_draws_are_those_of_the_schedules():
    draws = [expected_draws(stage) for stage in PAPER]
    assert draws[:3] == [17 * 1000 * 64, 20_000 * 64, 1000 * 6]
    assert draws[3] / 50_000 == pytest.approx(1.90, abs=0.005)  # samples per step of the release's stage 4
    assert expected_draws(PAPER[0], max_steps=10) == 640
    assert expected_draws(replace(PAPER[0], draws_per_step=3), max_steps=10) == 1920
    assert [each.draws for each in plan({}, max_steps=10)[:2]] == [2 * 640, 10 * 6]


def test_a_plan_is_one_line_with_both_costs():
    found = FeaturePlan((1, 2), 224, ("a", "b"), "cached", 1_234_567, 89_000, 2_600_000_000, 1.27, 30.06, "it pays")
    assert str(found) == (
        "Stage 1 and 2 (224 px): cached, because it pays. Cached: 1,234,567 images, 1.3 h, 3 GB; inline: 89,000 "
        "images, 30.1 h."
    )
    assert str(replace(found, stages=(3,))).startswith("Stage 3 (224 px): cached")


def test_five_million_pairs_are_not_cached_for_two_million_draws():
    warm_up = plan({"laion": 4_500_000, "cc_sbu": 500_000})[0]
    assert warm_up.stages == (1, 2) and warm_up.choice == "inline" and "fewer images" in warm_up.reason
    assert warm_up.draws == 2_368_000 and warm_up.bytes == 5_000_000 * 32 * 768 * 2  # 246 GB
    assert warm_up.hours_inline < warm_up.hours_cached
    assert "inline, because it draws fewer images than there are" in str(warm_up) and "246 GB" in str(warm_up)


def test_a_million_pairs_are_cached_where_the_disk_is_large_enough():
    rows = {"laion": 900_000, "cc_sbu": 100_000}
    assert (plan(rows)[0].choice, plan(rows)[0].reason) == ("cached", "it draws images several times")
    assert plan(rows, free=50 * 10**9)[0].reason == "the disk has 50 GB free"
    assert plan(rows, dtype="float32")[0].bytes == 2 * plan(rows)[0].bytes


def test_what_is_chosen_is_taken_off_the_disk():
    rows = {"laion": 900_000, "cc_sbu": 100_000}
    plans = plan(rows, free=55 * 10**9)  # 49 GB for stages 1 and 2
    assert [each.stages for each in plans] == [(1, 2), (3,), (4,)]
    assert [each.choice for each in plans] == ["cached", "cached", "cached"]
    assert plans[2].bytes == 20 * 1000 * 32 * 768 * 2


@pytest.mark.parametrize("wanted", ["cached", "inline"])
def test_the_settings_decide(wanted):
    found = plan({"laion": 10**9}, wanted=wanted)
    assert {(each.choice, each.reason) for each in found} == {(wanted, "the settings say so")}


def test_each_cache_takes_nine_tenths_at_most_of_what_those_before_it_leave():
    stages = [PAPER[1], replace(PAPER[1], number=3, image_size=448)]
    rows = {"laion": 90_000, "cc_sbu": 10_000}
    size = 100_000 * 32 * 768 * 2
    for free, choices in (
        (int(size / 0.9) - 1, ["inline", "inline"]),
        (int(size / 0.9) + 1, ["cached", "inline"]),
        (int(size + size / 0.9) - 1, ["cached", "inline"]),
        (int(size + size / 0.9) + 2, ["cached", "cached"]),
    ):
        assert [each.choice for each in plan_features(stages, rows, free)] == choices, free
    for images, choice in ((20_000 * 64 - 1, "cached"), (20_000 * 64, "inline")):
        assert plan_features(stages[:1], {"laion": images, "cc_sbu": 0}, 10**15)[0].choice == choice
    assert expected_draws(PAPER[0], max_steps=10**9) == expected_draws(PAPER[0])


def test_features_are_computed_once_for_each_image_size(monkeypatch):
    computed = []
    monkeypatch.setattr(stage_features, "cache_features", computed.append)
    stages = [PAPER[3], replace(PAPER[1], number=1), PAPER[1], replace(PAPER[2], image_size=448)]
    stage_features.cache_stage_features(stages, dict)
    large = {source.name for stage in (PAPER[2], PAPER[3]) for source in stage.sources}
    assert computed == [
        {"image_size": 224, "sources": ["cc_sbu", "laion"]},
        {"image_size": 448, "sources": sorted(large)},
    ]


@pytest.mark.parametrize(("size", "flop"), [(224, 0.52e12), (448, 2.3e12), (1344, 9 * 2.3e12)])
def test_hours_are_those_of_the_encoders_operations(size, flop):
    stage = replace(PAPER[1], image_size=size)
    rows = {"laion": 7000, "cc_sbu": 200}
    (found,) = plan_features([stage], rows, 0, tflops=2.0)
    assert found.hours_cached == pytest.approx(7200 * flop / 2e12 / 3600)
    assert found.hours_inline == pytest.approx(20_000 * 64 * flop / 2e12 / 3600)
    assert (found.image_size, found.rows, found.draws) == (size, 7200, 20_000 * 64)
    assert (found.stages, found.sources) == ((2,), ("cc_sbu", "laion"))
    (usual,) = plan_features([stage], rows, 0)
    assert usual.hours_cached == pytest.approx(found.hours_cached / 20), "40 TFLOPS where nothing is said"


def test_an_inline_group_leaves_the_disk_to_the_next():
    stages = [PAPER[1], replace(PAPER[1], number=3, image_size=448, sources=PAPER[2].sources)]
    rows = {**ROWS, "laion": 10**7}
    size = sum(rows[name] for name in plan_features(stages, rows, 0)[1].sources) * 32 * 768 * 2
    choices = [each.choice for each in plan_features(stages, rows, int(size / 0.9) + 1)]
    assert choices == ["inline", "cached"]
