"""What the update of a step asks of its workers, its optimizer and the device, beside a model that only records."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.recording_model import batch_of, recording_step
from tinygptv.training import train_step

CUDA = torch.device("cuda")


def test_a_step_divides_once_by_the_tokens_of_all_batches():
    step = recording_step()
    batches = [batch_of(3, 8), batch_of(5)]
    ids = np.concatenate([batch.supervised_ids for batch in batches])
    for _ in range(2):  # the second starts from nothing
        result = step.run(batches, 0.0)
        assert float(result.loss) == pytest.approx(2 * ids.mean())
        assert step.model.projector.weight.grad.tolist() == pytest.approx(np.full((2, 1), ids.mean()))
        assert float(result.grad_norm) == pytest.approx(2**0.5 * ids.mean())
        assert result.source_tokens.tolist() == [16, 0]
        assert result.source_loss_sums.tolist() == pytest.approx([2 * ids.sum(), 0])
        assert (float(result.skipped), bool(result.rejected)) == (0.0, False)
    step.run([], 0.0)
    assert result.source_tokens.tolist() == [16, 0], "a result stays as it was"


def test_a_rate_is_that_of_all_groups_and_moves_the_weights_by_the_gradient():
    step, batch = recording_step(), batch_of(4)
    step.run([batch], 0.25)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.25, 0.25]
    moved = 1 - 0.25 * batch.supervised_ids.mean()
    assert step.model.projector.weight.tolist() == pytest.approx(np.full((2, 1), moved))


@pytest.mark.parametrize(("local", "counted"), [(0, 1), (1, 1), (2, 2), (2**24 + 1, 2**24 + 1)])
def test_tokens_are_counted_exactly_and_are_one_at_least(local, counted):
    step = recording_step()
    assert step._global_count(local).item() == counted
    step.device = torch.device("meta")
    assert step._global_count(local).device.type == "meta"


class Workers:
    """torch.distributed of so many workers that all do the same."""

    def __init__(self, size, initialized=True):
        self.size, self.initialized, self.reduced = size, initialized, []

    def is_initialized(self):
        return self.initialized

    def get_world_size(self):
        return self.size

    def all_reduce(self, tensor):
        self.reduced.append(tensor)
        tensor.mul_(self.size)


def test_workers_add_up_tokens_gradients_and_sums(monkeypatch):
    times = iter((10.0, 12.5, 20.0, 20.25))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: next(times))
    batch = batch_of(3, 8)
    alone = recording_step().run([batch], 0.0)
    assert alone.reduce_s == 2.5
    workers = Workers(2)
    monkeypatch.setattr(train_step, "dist", workers)
    step = recording_step()
    both = step.run([batch], 0.0)
    assert len(workers.reduced) == 3 and workers.reduced[0].tolist() == 22.0
    assert workers.reduced[1] is step.gradient and workers.reduced[2] is step._sums
    assert float(both.loss) == pytest.approx(float(alone.loss))
    assert float(both.grad_norm) == pytest.approx(float(alone.grad_norm))
    assert both.source_tokens.tolist() == [22, 0] and both.reduce_s == 0.25


@pytest.mark.parametrize("workers", [Workers(1), Workers(2, initialized=False)])
def test_one_worker_reduces_nothing(monkeypatch, workers):
    monkeypatch.setattr(train_step, "dist", workers)
    assert float(recording_step().run([batch_of(3)], 0.0).source_tokens.sum()) == 3 and not workers.reduced


@pytest.mark.parametrize(("bound", "factor"), [(None, 1.0), (20.0, 1.0), (5.0, 0.5), (10.0, 1.0)])
def test_a_gradient_is_clipped_to_its_bound(bound, factor):
    step = recording_step(max_grad_norm=bound)
    step.gradient.copy_(torch.tensor([6.0, 8.0, 0.0, 0.0]))
    result = step._update(torch.tensor(1.0), 0.5)
    assert float(result.grad_norm) == 10.0 and result.reduce_s == 0.5
    torch.testing.assert_close(step.gradient, factor * torch.tensor([6.0, 8.0, 0.0, 0.0]))
    assert step.part_norms() == pytest.approx({"projector": 10.0}), "of the gradient before clipping"


def test_a_zero_gradient_is_not_divided_by():
    step = recording_step(max_grad_norm=1.0)
    assert float(step._update(torch.tensor(1.0), 0.0).grad_norm) == 0.0
    assert step.gradient.tolist() == [0.0] * 4 and float(step._clipped_by) == 1.0


def test_a_loss_is_judged_and_one_that_passes_adds_nothing_to_the_gradient(monkeypatch):
    monkeypatch.setattr(train_step, "emulate_half_range", lambda model: None)
    seen = []
    for precision in ("fp32", "fp16_range"):
        step = recording_step(precision=precision, reject=lambda loss: seen.append(float(loss)) or torch.tensor(False))
        step.scaler.scale(torch.ones(()))
        step._sums[0, 1] = 6.0
        result = step._update(torch.tensor(4.0), 0.0)
        assert float(result.grad_norm) == 0.0 and float(result.skipped) == 0.0
    assert seen == [1.5, 1.5]


@pytest.mark.parametrize("precision", ["fp32", "fp16_range"])
@pytest.mark.parametrize(("gradient", "verdict"), [(1.0, True), (float("inf"), False), (float("nan"), False)])
def test_a_step_that_is_left_out_changes_no_weight(monkeypatch, precision, gradient, verdict):
    monkeypatch.setattr(train_step, "emulate_half_range", lambda model: None)
    step = recording_step(precision=precision, reject=lambda loss: torch.tensor(verdict))
    scale = step.scaler.get_scale()
    step.scaler.scale(torch.ones(()))
    before = [parameter.clone() for _, parameter in step.named]
    step.gradient.fill_(gradient)
    result = step._update(torch.tensor(1.0), 0.0)
    assert (float(result.skipped), bool(result.rejected)) == (1.0, verdict)
    assert all(torch.equal(parameter, old) for (_, parameter), old in zip(step.named, before, strict=True))
    assert step.scaler.get_scale() == (scale if precision == "fp32" else scale / 2)


def test_a_scaled_gradient_is_brought_back_before_it_is_measured(monkeypatch):
    monkeypatch.setattr(train_step, "emulate_half_range", lambda model: None)
    batch = batch_of(3)
    plain, scaled = recording_step(), recording_step(precision="fp16_range")
    wanted = float(plain.run([batch], 0.125).grad_norm)
    assert float(scaled.run([batch], 0.125).grad_norm) == pytest.approx(wanted)
    for (_, one), (_, other) in zip(scaled.named, plain.named, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("verdict", [False, True])
def test_on_cuda_the_optimizer_leaves_the_update_out_itself(verdict):
    """The host does not wait for the verdict."""
    step, seen = recording_step(reject=lambda loss: torch.tensor(verdict)), []
    step.device = CUDA
    step.optimizer = SimpleNamespace(
        step=lambda: seen.append((float(step.optimizer.found_inf), step.optimizer.grad_scale))
    )
    step._update(torch.tensor(1.0), 0.0)
    assert seen == [(float(verdict), None)]


def test_norms_are_told_per_part_and_per_layer():
    step = recording_step()
    names = ("projector.weight", "language_model.layers.3.x.lora_A.y", "language_model.layers.3.x.lora_B.y")
    names += ("language_model.layers.12.q_layernorm.weight", "language_model.final_layernorm.weight")
    step.named = []
    for value, name in zip((3.0, 4.0, 3.0, 2.0, 1.0), names, strict=True):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([value])
        step.named.append((name, parameter))
    step._clipped_by = torch.tensor(0.5)
    assert step.part_norms() == pytest.approx(
        {
            "projector": 6.0,
            "lora": 10.0,
            "lora/layer_03": 10.0,
            "language_norms": 2 * 5**0.5,
            "language_norms/layer_12": 4.0,
        }
    )


# ---------------------------------------------------------------------- to the device


def test_arrays_are_sent_in_one_transfer_and_parted_again(monkeypatch):
    step, sent = recording_step(), []
    original = step._to_device
    monkeypatch.setattr(step, "_to_device", lambda array: sent.append(len(array)) or original(array))
    arrays = (np.arange(3), np.arange(0), np.arange(2))
    assert [tensor.tolist() for tensor in step._send(*arrays)] == [[0, 1, 2], [], [0, 1]] and sent == [5]


@pytest.mark.parametrize("is_there", [False, True])
def test_on_cuda_host_arrays_are_pinned_and_sent_without_waiting(monkeypatch, is_there):
    step = recording_step()
    step.device = CUDA
    calls = []
    pinned = SimpleNamespace(to=lambda device, **options: calls.append(("pinned", device, options)) or "sent")
    tensor = SimpleNamespace(
        is_cuda=is_there,
        pin_memory=lambda: pinned,
        to=lambda device, **options: calls.append(("plain", device, options)) or "sent",
    )
    monkeypatch.setattr(train_step.torch, "as_tensor", lambda array: tensor if array == "array" else None)
    assert step._to_device("array") == "sent"
    assert calls == [("plain", CUDA, {}) if is_there else ("pinned", CUDA, {"non_blocking": True})]
