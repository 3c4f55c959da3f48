"""The guard's sentences, and its diagnosis on a model of two layers whose values are chosen."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipelines.training.guard import Diagnosis, Fault, Guard, _bad_parameter, _depth, _probe, describe, diagnose
from tinygptv.training.train_step import StepResult

SPIKE = Fault(3, "spike", 9.87654, 0.5)


@pytest.mark.parametrize(
    ("fault", "diagnosis", "sentence"),
    [
        (SPIKE, Diagnosis(), "step 3: the loss jumps (loss 9.877, gradient norm 0.5)"),
        (
            SPIKE,
            Diagnosis(samples=["a/1", "b/2"]),
            "step 3: the loss jumps (loss 9.877, gradient norm 0.5); samples a/1, b/2",
        ),
        (
            Fault(0, "nonfinite_loss", math.nan, math.inf),
            Diagnosis("head", "forward", ["a/1"]),
            "step 0: the loss is not finite (loss nan, gradient norm inf), first in the forward of head; samples a/1",
        ),
        (
            Fault(1, "nonfinite_gradient", 2.0, math.inf),
            Diagnosis("body", "backward"),
            "step 1: the gradient is not finite (loss 2, gradient norm inf), first in the backward of body",
        ),
        (
            Fault(4, "vanishing_gradient", 2.0, 1e-7, "lora/layer_03"),
            Diagnosis(),
            "step 4: a gradient vanishes (loss 2, gradient norm 1e-07), first in lora/layer_03",
        ),
    ],
)
def test_a_fault_in_one_sentence(fault, diagnosis, sentence):
    assert describe(fault, diagnosis) == sentence


# ---------------------------------------------------------------------- readings


def result(loss=2.0, norm=0.5, rejected=False):
    zeros = torch.zeros(1)
    return StepResult(
        torch.tensor(loss, dtype=torch.float64), zeros, zeros, torch.tensor(norm), zeros, torch.tensor(rejected), 0.0
    )


def guard_of(**changes):
    return Guard(**{"spike": 8.0, "vanishing": 1e-3, "patience": 1, "device": torch.device("cpu"), **changes})


def step_of(scale=None):
    scaler = SimpleNamespace(is_enabled=lambda: scale is not None, get_scale=lambda: scale)
    return SimpleNamespace(scaler=scaler)


def test_a_fault_has_the_numbers_of_its_own_step():
    guard = guard_of()
    for step, (loss, norm, rejected) in enumerate([(2.0, 0.1, False), (9.0, 0.2, True), (math.inf, 0.25, True)], 5):
        guard.watch(step, result(loss, norm, rejected))
    found = guard.check(step_of())
    assert found == [Fault(6, "spike", 9.0, pytest.approx(0.2)), Fault(7, "nonfinite_loss", math.inf, 0.25)]
    assert guard.faults_in_a_row == 2 and guard.check(step_of()) == [] and guard.faults_in_a_row == 2


def test_a_vanishing_gradient_is_told_of_the_newest_step():
    guard = guard_of()
    guard.watch(5, result(3.0, 0.1))
    guard.watch(6, result(2.0, 0.25))
    norms = {"projector": 1e-4, "lora/layer_01": 0.0, "lora/layer_00": 0.0, "lora": 1e-3}
    assert guard.check(step_of(), norms) == [Fault(6, "vanishing_gradient", 2.0, 0.25, "lora/layer_01")]
    assert guard.faults_in_a_row == 0


@pytest.mark.parametrize(
    ("changes", "norms"), [({"vanishing": 0.0}, {"lora": 0.0}), ({}, None), ({}, {}), ({}, {"lora": 1e-3})]
)
def test_no_gradient_vanishes_where_none_is_read_or_looked_for(changes, norms):
    guard = guard_of(**changes)
    guard.watch(0, result())
    assert guard.check(step_of(), norms) == []


def test_beside_another_fault_no_gradient_is_looked_at():
    guard = guard_of(patience=2)
    for rejected, expected in ((False, []), (True, ["spike"]), (False, ["vanishing_gradient"])):
        guard.watch(0, result(rejected=rejected))
        assert [fault.kind for fault in guard.check(step_of(), {"lora": 0.0})] == expected


@pytest.mark.parametrize(("scale", "faults"), [(None, 1), (0.5, 1), (1.0, 0), (2.0, 0)])
def test_an_infinite_gradient_at_a_scale_of_one_or_more_is_a_search(scale, faults):
    guard = guard_of()
    guard.watch(0, result(norm=math.inf))
    assert len(guard.check(step_of(scale))) == faults == guard.faults_in_a_row


def test_layers_are_ordered_by_their_number():
    assert [_depth(part) for part in ("lora/layer_09", "lora/layer_10", "lora", "qk_norms_2")] == [9, 10, -1, -1]


def test_statistics_are_float64_and_restored_whole():
    guard = guard_of()
    assert guard.statistics.dtype == torch.float64 and guard.statistics.tolist() == [0.0, 0.0, 0.0]
    guard.load_state({"statistics": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)})
    assert guard.state()["statistics"].tolist() == [1.0, 2.0, 3.0] and set(guard.state()) == {"statistics"}


@pytest.mark.parametrize(
    ("mean", "variance", "deviation"), [(2.0, 0.25, 0.5), (2.0, 0.0001, 0.04), (-2.0, 0.0, 0.04), (2.0, 4.0, 2.0)]
)
def test_a_spike_is_so_many_deviations_above_the_mean_and_enters_it_clipped(mean, variance, deviation):
    limit = mean + 3.0 * deviation
    for loss, rejected, counted in ((limit, False, limit), (limit + 1e-6, True, limit), (99.0, True, limit)):
        guard = guard_of(spike=3.0)
        guard.statistics = torch.tensor([mean, variance, 40.0], dtype=torch.float64)
        assert bool(guard.reject(torch.tensor(loss, dtype=torch.float64))) is rejected
        change = counted - mean
        moved = [mean + 0.05 * change, 0.95 * (variance + 0.05 * change**2), 41.0]
        assert guard.statistics.tolist() == pytest.approx(moved)


# ---------------------------------------------------------------------- diagnosis


class Model(nn.Module):
    """Two layers of one weight each; ``mask`` gives no float."""

    def __init__(self):
        super().__init__()
        self.body, self.mask, self.head = nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.body.weight)
        nn.init.ones_(self.head.weight)

    def forward(self, values):
        self.mask(values.long())
        return self.head(self.body(values[:, None]))[:, 0]


class Step:
    """As much of a training step as the diagnosis uses; a batch is the losses of its tokens."""

    def __init__(self, scale=1.0):
        self.model, self.eager = Model(), []
        self.named = list(self.model.named_parameters())
        self.gradient = torch.full((2,), 7.0)
        for place, (_, parameter) in enumerate(self.named):
            parameter.grad = self.gradient[place : place + 1].view(1, 1)
        self.scaler = SimpleNamespace(scale=lambda loss: loss * scale)

    def forward(self, batch):
        assert self.eager == [True] and not self.gradient.any(), "each sample alone, and every module is called"
        return self.model(torch.tensor(batch))

    @contextmanager
    def as_written(self):
        self.eager.append(True)
        yield
        self.eager.pop()


def test_the_samples_with_a_bad_value_are_named_and_its_first_layer():
    step = Step()
    found = diagnose(step, [("a/1", [1.0]), ("a/2", [math.nan, 1.0]), ("a/3", [2.0]), ("a/4", [math.inf])], spike=False)
    assert found == Diagnosis("body", "forward", ["a/2", "a/4"])
    assert not step.gradient.any() and step.eager == []


def test_a_sample_without_tokens_causes_nothing():
    for spike, expected in ((False, []), (True, ["b", "a"])):
        assert diagnose(Step(), [("a", []), ("b", [1.0])], spike=spike) == Diagnosis(samples=expected)


def test_a_gradient_that_overflows_is_found_from_the_loss_backwards():
    step = Step(scale=math.inf)
    found = diagnose(step, [("a", []), ("b", [1.0]), ("c", [2.0])], spike=False)
    assert found == Diagnosis("head", "backward", ["b", "c"]) and not step.gradient.any()


def test_of_several_samples_the_first_one_names_the_layer():
    step = Step()
    step.model.head.register_forward_hook(lambda module, inputs, output: output * (math.nan if inputs[0] > 1 else 1.0))
    found = diagnose(step, [("a", [1.0]), ("b", [2.0]), ("c", [math.nan])], spike=False)
    assert found.samples == ["b", "c"] and found.layer == "head"


def test_a_spike_names_the_largest_mean_losses_first_and_no_layer():
    losses = [1.0, 5.0, 3.0, 2.0, 4.0, 9.0, 6.0, 7.0, 8.0, 0.5]
    batches = [(f"a/{loss}", [loss]) for loss in losses] + [("long", [2.5, 2.5, 2.5])]
    found = diagnose(Step(scale=math.inf), batches, spike=True)
    assert found == Diagnosis(samples=["a/9.0", "a/8.0", "a/7.0", "a/6.0", "a/5.0", "a/4.0", "a/3.0", "long"])


def test_eight_samples_are_named_at_most():
    found = diagnose(Step(), [(f"a/{number}", [math.nan]) for number in range(9)], spike=False)
    assert found.samples == [f"a/{number}" for number in range(8)]


def test_a_parameter_is_named_where_no_output_is_bad():
    step = Step()
    assert _bad_parameter(step) == ""
    step.gradient[1] = math.nan
    assert _bad_parameter(step) == "head.weight"
    step.named[0][1].grad = None
    step.gradient[0] = math.inf
    assert _bad_parameter(step) == "head.weight"


def test_leaf_modules_are_observed_in_order_and_only_inside():
    model = Model()
    with pytest.raises(RuntimeError, match="out of memory"), _probe(model) as probe:
        model(torch.tensor([2.0])).sum().backward()
        assert [(name, bool(finite)) for name, finite in probe.outputs] == [("body", True), ("head", True)]
        assert [(name, bool(finite)) for name, finite in probe.gradients] == [("head", True), ("body", True)]
        assert probe.first() == "" and probe.first_of_gradients() == ""
        probe.outputs += [("x", torch.tensor(False)), ("y", torch.tensor(False))]
        probe.gradients += [("v", torch.tensor(False)), ("w", torch.tensor(False))]
        assert (probe.first(), probe.first_of_gradients()) == ("x", "v")
        raise RuntimeError("out of memory")
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad(), _probe(model) as probe:
        model(torch.tensor([2.0]))
        assert len(probe.outputs) == 2 and not probe.gradients


def test_a_block_is_known_by_its_layers():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), nn.Identity())
    with _probe(model) as probe:
        model(torch.ones(1, 1))
    assert [name for name, _ in probe.outputs] == ["0.0", "0.1", "1"]


@pytest.mark.parametrize(
    ("found", "merged"),
    [
        ([Diagnosis()], Diagnosis()),
        ([Diagnosis("", "", ["a"]), Diagnosis("x", "backward"), Diagnosis("y", "forward", ["c", "d"])], ("x", "acd")),
        ([Diagnosis("y", "backward", ["a", "b", "c"]), Diagnosis("x", "backward", ["d"])], ("y", "adbc")),
    ],
)
def test_workers_take_turns_in_naming_their_samples(found, merged):
    if isinstance(merged, tuple):
        merged = Diagnosis(merged[0], "backward", list(merged[1]))
    assert Diagnosis.merge(found) == merged
