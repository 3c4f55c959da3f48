"""Learning rates: their values at the steps that matter."""

from __future__ import annotations

import math
import warnings

import pytest

from tinygptv.training.schedule import SCHEDULES, Schedule


def schedule(kind="warmup_decay", **changes):
    fields = {
        "peak": 1e-3,
        "minimum": 1e-4,
        "warmup_start": 1e-5,
        "warmup_steps": 10,
        "steps_per_epoch": 20,
        "epochs": 3,
    }
    return Schedule(kind, **{**fields, **changes})


def test_the_number_of_steps():
    assert schedule().num_steps == 60
    assert schedule(steps_per_epoch=1, epochs=1).num_steps == 1


@pytest.mark.parametrize("kind", ["warmup_cosine", "warmup_decay"])
def test_the_warm_up_is_a_straight_line(kind):
    rates = [schedule(kind).learning_rate(step) for step in range(10)]
    assert rates == pytest.approx([1e-5 + 9.9e-5 * step for step in range(10)])


def test_the_rate_is_the_peak_where_the_warm_up_ends():
    assert schedule().learning_rate(10) == pytest.approx(1e-3)
    assert schedule(warmup_steps=0).learning_rate(0) == pytest.approx(1e-3)
    assert schedule("warmup_cosine", warmup_steps=0).learning_rate(0) == pytest.approx(1e-3)


def test_the_decay_is_half_a_cosine():
    decaying = schedule()
    assert decaying.learning_rate(35) == pytest.approx((1e-3 + 1e-4) / 2), "half way between steps 10 and 60"
    assert decaying.learning_rate(60) == pytest.approx(1e-4)
    assert decaying.learning_rate(22) == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 12 / 50)))
    assert schedule(steps_per_epoch=11, epochs=1).learning_rate(11) == pytest.approx(1e-4), "one step of decay"
    rates = [decaying.learning_rate(step) for step in range(10, 61)]
    assert rates == sorted(rates, reverse=True)


def test_the_releases_cosine_starts_at_step_0_so_that_the_rate_drops_behind_the_warm_up():
    released = schedule("warmup_cosine")
    expected = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 10 / 60))
    assert released.learning_rate(10) == pytest.approx(expected) and expected < 1e-3
    assert released.learning_rate(30) == pytest.approx(5.5e-4)
    assert released.learning_rate(60) == pytest.approx(1e-4)


def test_a_releases_warm_up_longer_than_an_epoch_starts_again():
    released = schedule("warmup_cosine", warmup_steps=50)
    assert released.learning_rate(19) == pytest.approx(1e-5 + 9.9e-4 * 19 / 50)
    assert released.learning_rate(20) == released.learning_rate(40) == pytest.approx(1e-5)
    assert released.learning_rate(45) == pytest.approx(1e-5 + 9.9e-4 * 5 / 50)
    assert schedule(warmup_steps=50).learning_rate(45) == pytest.approx(1e-5 + 9.9e-4 * 45 / 50), "ours goes on"


def test_the_releases_warm_up_never_exceeds_the_peak():
    falling = schedule("warmup_cosine", warmup_start=2e-3)
    assert falling.learning_rate(0) == pytest.approx(1e-3)


def test_a_saw_tooth_rises_to_the_peak_in_every_epoch():
    teeth = schedule("sawtooth")
    for epoch in range(3):
        first, last = teeth.learning_rate(20 * epoch), teeth.learning_rate(20 * epoch + 19)
        assert (first, last) == (pytest.approx(1e-5), pytest.approx(1e-3)), epoch
    assert teeth.learning_rate(7) == pytest.approx(1e-5 + 9.9e-4 * 7 / 19)
    assert schedule("sawtooth", steps_per_epoch=2).learning_rate(1) == pytest.approx(1e-3)
    assert schedule("sawtooth", steps_per_epoch=1).learning_rate(0) == pytest.approx(1e-5)


def test_a_negative_start_is_the_peak():
    assert schedule(warmup_start=-1.0).learning_rate(0) == pytest.approx(1e-3)
    assert schedule(warmup_start=0.0).learning_rate(0) == 0.0


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("minimum", "warns"), [(1e-4, False), (1e-3, False), (1.1e-3, True)])
def test_only_a_rise_in_place_of_a_decay_is_told(kind, minimum, warns):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        schedule(kind, minimum=minimum).warn_if_rising()
    assert bool(told) is (warns and kind != "sawtooth")
    assert all("0.0011, above its peak 0.001" in str(each.message) for each in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "schedule kind is 'linear'; known kinds"),
        ({"steps_per_epoch": 0}, "schedule.steps_per_epoch"),
        ({"epochs": 0}, "schedule.epochs"),
        ({"epochs": 1.5}, "schedule.epochs"),
        ({"warmup_steps": -1}, "schedule.warmup_steps"),
        ({"peak": -1e-9}, "schedule.peak"),
        ({"minimum": math.nan}, "schedule.minimum"),
        ({"warmup_start": math.nan}, "schedule.warmup_start"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        schedule(**changes)
