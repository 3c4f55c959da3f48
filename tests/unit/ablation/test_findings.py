"""What a record says of a stage: exact outcomes, steps by their own numbers, and which of several events is told."""

from __future__ import annotations

import json
import math

import pytest

from pipelines.ablation.findings import (
    VANISHED,
    WINDOW,
    Event,
    StageOutcome,
    depth_norms,
    find_event,
    outcome_of,
    typical_norms,
)


def step(number, loss=2.0, grad_norm=1.0, **norms):
    """A step of a record; a part is named by its last word, as ``lora/layer_00``."""
    parts = {name if name == "projector" else f"lora/{name}": norm for name, norm in norms.items()}
    return {"step": number, "loss": loss, "grad_norm": grad_norm, "part_norms": parts}


def test_the_outcome_of_a_stage_is_all_of_its_numbers():
    losses = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    records = [step(30 + n, loss, projector=n + 1.0, layer_03=0.5) for n, loss in enumerate(losses)]
    found = outcome_of(3, records, {"projector": 1.0, "layer_03": 0.5}, "a note")
    assert found == StageOutcome(
        stage=3,
        status="trained",
        steps=12,
        first_loss=pytest.approx(4.55),
        last_loss=pytest.approx(2.8875),
        event=None,
        depth={"projector": 6.5, "layer_03": 0.5},
        note="a note",
    )
    assert list(found.depth) == ["projector", "layer_03"], "input end first"


def test_an_outcome_in_the_result_has_every_field_and_its_cell():
    outcome = StageOutcome(
        4, steps=7, first_loss=3.5, last_loss=2.25, event=Event("vanishing", 5, "layer_01"),
        depth={"projector": 1.5}, note="why",
    )  # fmt: skip
    told = json.loads(json.dumps(outcome.to_dict(), allow_nan=False))
    assert told == {
        "stage": 4, "status": "trained", "steps": 7, "first_loss": 3.5, "last_loss": 2.25,
        "event": {"kind": "vanishing", "step": 5, "part": "layer_01"}, "depth": {"projector": 1.5}, "note": "why",
        "cell": "gradient vanishing at step 5 (layer_01)",
    }  # fmt: skip
    lost = StageOutcome(1, "failed", first_loss=math.inf, last_loss=-math.inf).to_dict()
    assert (lost["first_loss"], lost["last_loss"], lost["cell"]) == (None, None, "failed")


def test_a_stage_without_steps_has_no_losses_and_no_event(recwarn):
    found = outcome_of(2, [], {"projector": 1.0})
    assert (found.steps, found.event, found.depth, found.note) == (0, None, {}, "")
    assert math.isnan(found.first_loss) and math.isnan(found.last_loss) and found.cell == "nan"
    assert found.to_dict()["last_loss"] is None and not recwarn.list
    untouched = StageOutcome(5)
    assert (untouched.status, untouched.steps, untouched.cell, untouched.event) == ("trained", 0, "nan", None)


def test_events_are_dated_by_the_steps_of_the_record():
    """A record may begin anywhere, as that of a run that was resumed without its first steps."""
    gone = [step(100 + 2 * n, projector=1.0 if n < 3 else 0.0) for n in range(3 + WINDOW)]
    assert find_event(gone, {"projector": 1.0}) == Event("vanishing", 106, "projector")
    lost = [step(50 + n, grad_norm=1.0 if n < 4 else math.nan) for n in range(4 + WINDOW)]
    assert find_event(lost, {}) == Event("nan", 54)
    assert find_event([step(70), step(71, loss=math.inf), step(72, loss=math.nan)], {}) == Event("nan", 71)


@pytest.mark.parametrize(("loss_step", "first"), [(3, 3), (5, 5), (8, 5)])
def test_the_loss_or_the_gradients_whichever_is_lost_first(loss_step, first):
    records = [
        step(n, loss=math.nan if n >= loss_step else 1.0, grad_norm=math.inf if n >= 5 else 1.0) for n in range(20)
    ]
    assert find_event(records, {}) == Event("nan", first)


def test_the_part_whose_gradient_vanishes_first_is_named():
    norms = [{"projector": float(n < 9), "layer_00": float(n < 6), "layer_01": float(n < 6)} for n in range(25)]
    records = [step(n, **each) for n, each in enumerate(norms)]
    reference = typical_norms([step(0, projector=1.0, layer_00=1.0, layer_01=1.0)])
    assert find_event(records, reference) == Event("vanishing", 6, "layer_00"), "of equals the one at the input end"
    assert find_event(records, {"projector": 1.0}) == Event("vanishing", 9, "projector"), (
        "what has no reference is free"
    )
    records[6]["loss"] = math.nan
    assert find_event(records, reference) == Event("nan", 6), "a loss that is lost at the same step says more"


def test_a_part_that_a_stage_does_not_train_does_not_vanish():
    """Without LoRA a layer has no norm; the full model, whose reference it is, has one."""
    records = [step(n, projector=1.0) for n in range(20)]
    assert find_event(records, {"projector": 1.0, "layer_00": 5.0}) is None
    bare = [{key: value for key, value in each.items() if key != "part_norms"} for each in records]
    assert find_event(bare, {"projector": 1.0}) is None
    assert depth_norms(bare[0]) == {} and typical_norms(bare) == {}


def test_parts_of_a_layer_are_summed_by_squares_and_other_parts_left_out():
    norms = {"lora": 9.0, "lora/layer_10": 3.0, "language_norms/layer_10": 4.0, "lora/layer_02": 0.25, "head": 7.0}
    norms |= {"projector": 2.0, "lora/other": 1.0}
    assert list(depth_norms({"part_norms": norms}).items()) == [
        ("projector", 2.0),
        ("layer_02", 0.25),
        ("layer_10", 5.0),
    ]


def test_a_norm_of_just_the_limit_has_not_vanished():
    reference, limit = {"layer_05": 4.0}, VANISHED * 4.0
    assert VANISHED == 1e-3 and WINDOW == 10, "as docs/ablations.md says"
    at, below = ([step(n, layer_05=norm) for n in range(WINDOW)] for norm in (limit, limit * 0.999))
    assert find_event(at, reference) is None
    assert find_event(below, reference) == Event("vanishing", 0, "layer_05")
    assert find_event(below[:-1] + at[:1], reference) is None, "a window is ten of them"
    assert find_event([step(0, layer_05=1.0), *below[:-1]], reference) is None
    assert find_event(below[:3], reference) == Event("vanishing", 0, "layer_05"), (
        "a stage that is shorter than a window"
    )
