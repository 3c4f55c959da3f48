"""The guard: each fault is planted, found, named and answered as the settings say."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.data.loader import BatchMaker
from pipelines.miniature.tiny_training import train_settings
from pipelines.training.guard import Diagnosis, Guard, TrainingStopped, diagnose
from pipelines.training.job import resolve_job
from pipelines.training.run import run_stage
from pipelines.training.run_reports import NoReports
from pipelines.training.worker import TrainWorker
from tests.training_runs import record
from tinygptv.checkpoint.checkpoint import load_checkpoint
from tinygptv.training.train_step import StepResult, TrainStep

BAD_STEP = 7


def make_guard(**changes):
    return Guard(**{"spike": 8.0, "vanishing": 1e-9, "patience": 3, "device": torch.device("cpu"), **changes})


def judge(guard, losses):
    return [bool(guard.reject(torch.tensor(loss, dtype=torch.float64))) for loss in losses]


def calm(count, mean=2.0):
    return list(mean + 0.05 * np.random.default_rng(0).standard_normal(count))


class Scaler:
    """As much of a GradScaler as the guard asks for."""

    def __init__(self, scale=None):
        self.scale = scale

    def is_enabled(self):
        return self.scale is not None

    def get_scale(self):
        return self.scale


class Step:
    def __init__(self, scale=None):
        self.scaler = Scaler(scale)


def faults_of(guard, losses, grad_norms, train_step=None, part_norms=None):
    for i, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True)):
        value = torch.tensor(loss, dtype=torch.float64)
        rejected = guard.reject(value)
        zeros = torch.zeros(1)
        guard.watch(i, StepResult(value, zeros, zeros, torch.tensor(norm), torch.zeros(()), rejected, 0.0))
    return guard.check(train_step or Step(), part_norms)


# ---------------------------------------------------------------------- verdicts


def test_spikes_and_bad_values_are_rejected_and_nothing_else():
    guard = make_guard()
    assert not any(judge(guard, calm(60)))
    assert judge(guard, [9.0, 2.1, math.nan, math.inf, 1.9]) == [True, False, True, True, False]


def test_first_losses_may_fall_as_they_like():
    assert not any(judge(make_guard(), [10 * 0.7**i for i in range(15)] + [4.0]))


def test_a_lasting_change_is_accepted_in_the_end():
    verdicts = judge(make_guard(), calm(60) + calm(60, mean=4.0))
    assert verdicts[60] and not any(verdicts[-20:])


def test_no_spike_is_looked_for_where_it_is_switched_off():
    assert not any(judge(make_guard(spike=0.0), [*calm(60), 99.0]))


def test_a_restored_guard_judges_alike():
    guard, losses = make_guard(), [*calm(60), 9.0, *calm(5), 2.4]
    judge(guard, losses[:30])
    other = make_guard()
    other.load_state({name: tensor.clone() for name, tensor in guard.state().items()})
    assert judge(other, losses[30:]) == judge(guard, losses[30:])
    assert torch.equal(other.statistics, guard.statistics)


def test_kinds():
    losses, norms = [*calm(30), 9.0, 2.0, math.nan], [1.0] * 31 + [math.inf, math.nan]
    found = [(fault.step, fault.kind) for fault in faults_of(make_guard(), losses, norms)]
    assert found == [(30, "spike"), (31, "nonfinite_gradient"), (32, "nonfinite_loss")]


def test_a_scaler_that_looks_for_its_scale_is_no_fault():
    assert not faults_of(make_guard(), [2.0], [math.inf], Step(65536.0))
    assert faults_of(make_guard(), [2.0], [math.inf], Step(0.5)), "below 1 it has found nothing"


def test_bad_steps_in_a_row_are_counted_over_readings():
    guard = make_guard()
    faults_of(guard, [math.nan, math.nan], [1.0, 1.0])
    faults_of(guard, [math.nan], [1.0])
    assert guard.faults_in_a_row == 3
    faults_of(guard, [2.0], [1.0])
    assert guard.faults_in_a_row == 0


def test_vanishing_gradients_are_told_once_by_the_layer_next_to_the_loss():
    guard = make_guard()
    norms = {"lora": 1e-12, "lora/layer_00": 0.0, "lora/layer_01": 1e-12, "lora/layer_02": 1e-3, "projector": 0.5}
    found = [faults_of(guard, [2.0], [0.5], part_norms=norms) for _ in range(5)]
    assert [[(fault.kind, fault.part) for fault in faults] for faults in found] == [
        [],
        [],
        [("vanishing_gradient", "lora/layer_01")],
        [],
        [],
    ]


def test_a_gradient_that_comes_back_has_not_vanished():
    guard = make_guard()
    norms = [1e-12, 1e-12, 0.5, 1e-12, 0.5, 1e-12, 1e-12, 1e-12]
    found = [faults_of(guard, [2.0], [0.5], part_norms={"projector": norm}) for norm in norms]
    assert [len(faults) for faults in found] == [0] * 7 + [1], "so many readings in a row"


def test_diagnoses_of_several_workers_become_one():
    merged = Diagnosis.merge([Diagnosis(), Diagnosis("layer", "forward", ["a/1"]), Diagnosis("other", "", ["b/2"])])
    assert merged == Diagnosis("layer", "forward", ["a/1", "b/2"])


def test_eight_samples_are_named(worker, monkeypatch):
    many = [Diagnosis("layer", "forward", [f"{source}/{n}" for n in range(6)]) for source in "ab"]
    assert Diagnosis.merge(many).samples == [f"{source}/{n}" for n in range(4) for source in "ab"]
    batches = [(f"{name}-{n}", batch) for n in range(3) for name, batch in samples(worker)]
    found = diagnose(worker.train_step, batches, spike=True)
    assert len(batches) > 8 and len(found.samples) == 8
    losses = [worker.train_step.forward(dict(batches)[name]).mean().item() for name in found.samples]
    assert losses == sorted(losses, reverse=True)
    assert not any(module._forward_hooks for module in worker.model.modules()), "nothing observes the next step"


def test_a_restored_guard_waits_for_no_step():
    guard = make_guard()
    zeros = torch.zeros(1)
    guard.watch(3, StepResult(torch.tensor(math.nan), zeros, zeros, zeros[0], zeros[0], torch.tensor(True), 0.0))
    guard.load_state({})
    assert guard.check(Step()) == [] and guard.statistics.tolist() == [0.0] * 3


def test_a_loss_that_is_not_finite_leaves_the_statistics_as_they_are():
    guard = make_guard()
    judge(guard, calm(30))
    before = guard.statistics.clone()
    assert judge(guard, [math.inf, -math.inf, math.nan]) == [True, True, True]
    assert torch.equal(guard.statistics, before) and before[2] == 30


def test_a_spike_enters_the_statistics_clipped_to_the_threshold():
    guard, other = make_guard(), make_guard()
    judge(guard, calm(40)), judge(other, calm(40))
    mean, variance, _ = guard.statistics.tolist()
    limit = mean + 8.0 * max(math.sqrt(variance), 0.02 * mean)
    assert judge(guard, [1e9]) == [True]
    judge(other, [limit])
    torch.testing.assert_close(guard.statistics, other.statistics)
    assert guard.statistics[0] == pytest.approx(mean + 0.05 * (limit - mean)) and guard.statistics[2] == 41


def test_statistics_are_a_mean_at_first_and_a_running_one_later():
    guard, losses = make_guard(spike=0.0), calm(20)
    judge(guard, losses)
    assert guard.statistics[0] == pytest.approx(np.mean(losses))
    assert guard.statistics[1] == pytest.approx(np.var(losses))
    for loss in calm(60, mean=3.0):
        mean = guard.statistics[0].item()
        judge(guard, [loss])
        assert guard.statistics[0] == pytest.approx(mean + max(0.05, 1 / guard.statistics[2].item()) * (loss - mean))


def test_spikes_are_looked_for_from_the_21st_loss_on():
    for count, rejected in ((19, False), (20, True)):
        guard = make_guard()
        judge(guard, calm(count))
        assert judge(guard, [9.0]) == [rejected], count


def test_a_vanishing_gradient_is_no_bad_step(worker, monkeypatch):
    """Its step is trained: nothing is rolled back, whatever ``guard`` says, and no patience is lost."""
    from pipelines.training.guard import Fault

    monkeypatch.setattr(
        worker, "job", replace(worker.job, settings=worker.job.settings.model_copy(update={"guard": "rollback"}))
    )
    monkeypatch.setattr(worker, "_roll_back", lambda steps: pytest.fail(f"rolled back for {steps}"))
    fault = Fault(3, "vanishing_gradient", 2.0, 0.5, "lora/layer_01")
    assert worker._handle([fault]) is None
    monkeypatch.setattr(worker, "_roll_back", min)
    assert worker._handle([fault, Fault(5, "spike", 9.0, 0.5)]) == 5


# ---------------------------------------------------------------------- training with planted faults


def settings(world, output, **changes):
    """Three or four samples a step, computed one by one."""
    few = {"pairs": {"weight": 2, "batch_size": 2}, "questions": {"weight": 1, "batch_size": 1}}
    stage = {"sources": few, **changes.pop("stage", {})}
    return train_settings(world, output, stage=stage, **{"micro_batch_size": 1, "guard_patience": 2, **changes})


@pytest.fixture(scope="module")
def worker(world, tmp_path_factory):
    job, _ = resolve_job(settings(world, tmp_path_factory.mktemp("worker")), 4)
    return TrainWorker(job, NoReports())


def samples(worker):
    maker = BatchMaker(worker.plan)
    batches = [maker.batch([maker.load(ref)])[0] for ref in maker.mixture.step(0)]
    return list(zip(maker.sample_ids(0), batches, strict=True))


def with_image(worker):
    return next(i for i, (_, batch) in enumerate(samples(worker)) if batch.pixels is not None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_sample_is_named(worker, value):
    batches = samples(worker)
    bad = with_image(worker)
    name, batch = batches[bad]
    batches[bad] = (name, replace(batch, pixels=None, query_features=np.full((1, 4, 24), value, np.float32)))
    found = diagnose(worker.train_step, batches, spike=False)
    assert found.samples == [name] and found.where == "forward" and found.layer.startswith("projector.")
    assert not worker.train_step.gradient.any()


def test_a_bad_weight_is_named_by_its_layer(worker):
    weight = worker.model.language_model.layers[1].mlp.fc2.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.nan
        found = diagnose(worker.train_step, samples(worker), spike=False)
        weight[0, 0] = kept
    assert found.layer == "language_model.layers.1.mlp.fc2"
    assert len(found.samples) == len(samples(worker)), "every sample meets it"


def test_a_gradient_that_breaks_on_its_way_is_named_by_its_layer(worker):
    layer = worker.model.language_model.layers[0]
    hook = layer.mlp.fc2.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.inf,))
    found = diagnose(worker.train_step, samples(worker), spike=False)
    hook.remove()
    assert found.where == "backward" and found.layer.startswith("language_model.layers.0.mlp")


def test_a_sound_step_is_found_sound(worker):
    assert diagnose(worker.train_step, samples(worker), spike=False) == Diagnosis()


def plant(monkeypatch, step, change):
    """Change the first sample with an image of one step, and of no other; returns where its id will be."""
    original, planted = BatchMaker.load, []

    def load(self, ref):
        sample = original(self, ref)
        refs = self.mixture.step(step)
        if sample.pixels is None or next(r for r in refs if self.shards[self.names[r.source]].row(r.row).image) != ref:
            return sample
        planted[:] = [self.sample_ids(step)[refs.index(ref)]]
        return change(sample)

    monkeypatch.setattr(BatchMaker, "load", load)
    return planted


def nan_features(sample):
    return replace(sample, pixels=None, query_features=np.full((4, 24), math.nan, np.float32))


def faults(output):
    return [json.loads(line) for line in (output / "guard.jsonl").read_text().splitlines()]


def test_skipping_and_rolling_back_end_alike(world, tmp_path, monkeypatch):
    planted = plant(monkeypatch, BAD_STEP, nan_features)
    weights = []
    for action in ("skip", "rollback"):
        result = run_stage(settings(world, tmp_path / action, guard=action, max_steps=BAD_STEP + 2), 4)
        (fault,) = faults(tmp_path / action)
        assert (fault["step"], fault["kind"], fault["action"]) == (BAD_STEP, "nonfinite_loss", action)
        assert fault["samples"] == planted and fault["layer"].startswith("projector.")
        assert [e["step"] for e in record(tmp_path / action) if e["skipped"]] == [BAD_STEP]
        weights.append(load_checkpoint(result["checkpoint"])[0].state_dict())
    skipped, rolled_back = ([e["loss_hex"] for e in record(tmp_path / a)] for a in ("skip", "rollback"))
    assert skipped == rolled_back and len(skipped) == BAD_STEP + 2 and skipped[BAD_STEP] == "nan"
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_steps_that_were_left_out_stay_left_out_after_another_roll_back(world, tmp_path, monkeypatch):
    plant(monkeypatch, 2, nan_features), plant(monkeypatch, 5, nan_features)
    run_stage(settings(world, tmp_path, guard="rollback", log_every=1, checkpoint_every=100, max_steps=7), 4)
    assert [fault["step"] for fault in faults(tmp_path)] == [2, 5], "each is found once"
    assert [e["step"] for e in record(tmp_path) if e["skipped"]] == [2, 5]
    assert [e["step"] for e in record(tmp_path)] == list(range(7))


def test_stopping_says_where_and_by_what(world, tmp_path, monkeypatch):
    planted = plant(monkeypatch, BAD_STEP, nan_features)
    with pytest.raises(TrainingStopped, match=rf"step {BAD_STEP}: the loss is not finite .* projector\.") as stopped:
        run_stage(settings(world, tmp_path, guard="stop"), 4)
    assert planted[0] in str(stopped.value)
    assert not (tmp_path / "result.json").exists()


def test_bad_weights_stop_training_whatever_the_action(world, tmp_path):
    model, processor, _ = load_checkpoint(world["init_from"])
    with torch.no_grad():
        model.language_model.layers[0].self_attn.dense.bias[3] = math.inf
    from tinygptv.checkpoint.checkpoint import save_checkpoint

    start = save_checkpoint(tmp_path / "start", model, processor, {})
    with pytest.raises(TrainingStopped, match=r"layers\.0\.self_attn\.dense.* 2 steps in a row"):
        run_stage(settings({**world, "init_from": str(start)}, tmp_path / "run", guard="skip"), 4)


def test_a_spike_leaves_its_step_out_and_names_the_sample(world, tmp_path, monkeypatch):
    def garbage(sample):
        """An answer of a token that no other text has; its losses are made ten times as large below."""
        encoded = deepcopy(sample.encoded)
        encoded.add([250] * 3, learn=True)
        return replace(sample, encoded=encoded)

    forward = TrainStep.forward

    def exaggerating(self, batch):
        return forward(self, batch) * (10 if (batch.supervised_ids == 250).any() else 1)

    monkeypatch.setattr(TrainStep, "forward", exaggerating)

    planted = plant(monkeypatch, 22, garbage)
    schedule = {"steps_per_epoch": 7, "epochs": 4, "peak": 3e-2, "minimum": 1e-2, "warmup_start": 1e-3}
    stage = {"schedule": schedule, "sources": {"pairs": {"weight": 1, "batch_size": 4}}}
    run_stage(settings(world, tmp_path, stage=stage, micro_batch_size=8, max_steps=24), 4)
    (fault,) = faults(tmp_path)
    assert (fault["step"], fault["kind"]) == (22, "spike") and fault["samples"][0] == planted[0]
    entries = record(tmp_path)
    assert entries[22]["loss"] > entries[21]["loss"] + 0.2 and entries[22]["skipped"]


def test_fp16_trains_with_a_scaler_and_recovers_from_overflow(world, tmp_path):
    """fp16_range emulates the precision on a CPU; the scaler starts too high and finds its scale by itself."""
    run_stage(settings(world, tmp_path, precision="fp16_range", micro_batch_size=4), 4)
    entries = record(tmp_path)
    assert not (tmp_path / "guard.jsonl").exists()
    assert entries[-1]["loss"] < entries[0]["loss"] and not entries[-1]["skipped"]
