"""The update of a step: clipping, norms per part, steps that are left out."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training_batches import make_sample, mixed_samples, tiny_model
from tinygptv.data.collate import collate
from tinygptv.training.train_step import TrainStep


def make_step(model=None, **options):
    model = model or tiny_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainStep(model, torch.optim.SGD(trained, lr=0.0), num_sources=2, **options)


def run(step):
    return step.run([collate(mixed_samples(), 0)], 0.0)


@pytest.fixture(scope="module")
def unclipped():
    step = make_step()
    result = run(step)
    return float(result.grad_norm), step.gradient.clone()


def test_a_norm_above_the_bound_is_brought_down_to_it(unclipped):
    norm, gradient = unclipped
    step = make_step(max_grad_norm=norm / 4)
    result = run(step)
    assert float(result.grad_norm) == pytest.approx(norm), "the norm that is told is the one before clipping"
    assert float(step.gradient.norm()) == pytest.approx(norm / 4, rel=1e-4)
    torch.testing.assert_close(step.gradient, gradient / 4, rtol=1e-4, atol=1e-7)


def test_a_norm_below_the_bound_stays(unclipped):
    norm, gradient = unclipped
    step = make_step(max_grad_norm=norm * 4)
    run(step)
    assert torch.equal(step.gradient, gradient)


@pytest.mark.parametrize("share", [None, 4, 0.25])
def test_norms_of_the_parts_make_up_the_norm_of_the_gradient_before_clipping(unclipped, share):
    norm, _ = unclipped
    step = make_step(max_grad_norm=None if share is None else norm * share)
    run(step)
    norms = step.part_norms()
    parts = [value for name, value in norms.items() if "/" not in name]
    assert {name for name in norms if "/" not in name} == {"projector", "language_norms", "lora"}
    assert math.hypot(*parts) == pytest.approx(norm, rel=1e-4)
    layers = [value for name, value in norms.items() if name.startswith("lora/layer_")]
    assert len(layers) == 2 and math.hypot(*layers) == pytest.approx(norms["lora"], rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = tiny_model()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    step = TrainStep(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), num_sources=1)
    handle = model.projector.linear_1.weight.register_hook(lambda gradient: gradient * math.inf)
    result = step.run([collate(mixed_samples(), 0)], 1.0)
    handle.remove()
    assert float(result.skipped) == 1.0 and not math.isfinite(float(result.grad_norm))
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert float(step.run([collate(mixed_samples(), 0)], 1.0).skipped) == 0.0
    assert not all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["fp32", "fp16_range"])
def test_a_rejected_loss_leaves_its_step_out(precision):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seen = []

    def reject(loss):
        seen.append(float(loss))
        return torch.tensor(True)

    parameters = [p for p in model.parameters() if p.requires_grad]
    step = TrainStep(model, torch.optim.SGD(parameters, lr=1.0), num_sources=1, reject=reject, precision=precision)
    result = step.run([collate(mixed_samples(), 0)], 1.0)
    assert seen == [float(result.loss)] and bool(result.rejected) and float(result.skipped) == 1.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_losses_are_summed_per_source():
    step = make_step()
    first, second = make_sample(5), make_sample(9)
    second.source = 1
    alone = [step.run([collate([make_sample(5)], 0)], 0.0), step.run([collate([make_sample(9)], 0)], 0.0)]
    both = step.run([collate([first], 0), collate([second], 0)], 0.0)
    assert both.source_tokens.tolist() == [5.0, 9.0]
    expected = [float(result.source_loss_sums[0]) for result in alone]
    assert both.source_loss_sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(both.loss) == pytest.approx(sum(expected) / 14, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16_range"])
def test_a_worker_without_samples_takes_part(precision):
    """In its first step, too: a step of one sample leaves all workers but one without any."""
    result = make_step(precision=precision).run([], 0.0)
    assert float(result.loss) == 0.0 and float(result.grad_norm) == 0.0 and result.source_tokens.tolist() == [0.0, 0.0]


def test_the_rate_reaches_every_group():
    step = make_step()
    step.run([collate([make_sample(5)], 0)], 0.125)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.125]


@pytest.mark.parametrize("option", ["precision", "encoder_precision"])
def test_an_unknown_precision_is_refused(option):
    with pytest.raises(ValueError, match="precision is 'fp8'; choose one of"):
        make_step(**{option: "fp8"})
