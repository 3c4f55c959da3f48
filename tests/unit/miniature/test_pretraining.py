"""The loop of the backbones' pretraining: what decays, what a step does, what a run reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tinygptv.miniature import pretraining
from tinygptv.miniature.pretraining import _optimizers, pretrain


def parameters_of(*shapes):
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes}


SHAPES = (("layers.0.w", (3, 4)), ("layers.0.b", (3,)), ("embed.w", (5, 2)), ("conv.w", (2, 2, 2, 2)))


def test_matrices_decay_and_vectors_do_not():
    found = parameters_of(*SHAPES)
    (adam,) = _optimizers(found, "", 0.1, 0.01)
    matrices, vectors = adam.param_groups
    assert [id(p) for p in matrices["params"]] == [id(found[n]) for n in ("layers.0.w", "embed.w", "conv.w")]
    assert [id(p) for p in vectors["params"]] == [id(found["layers.0.b"])]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)
    assert [(g["lr"], g["betas"]) for g in adam.param_groups] == [(0.1, (0.9, 0.98))] * 2


def test_named_matrices_are_orthogonalized_and_nothing_trains_twice():
    found = parameters_of(*SHAPES)
    adam, muon = _optimizers(found, "layers.", 0.1, 0.01)
    (group,) = muon.param_groups
    assert [id(p) for p in group["params"]] == [id(found["layers.0.w"])]
    assert (group["lr"], group["weight_decay"], group["adjust_lr_fn"]) == (0.2, 0.01, "match_rms_adamw")
    rest = [id(p) for g in adam.param_groups for p in g["params"]]
    assert sorted(rest) == sorted(id(found[n]) for n in ("layers.0.b", "embed.w", "conv.w"))


class Task:
    """Two losses of a weight each; the second one's is only used in step 0."""

    def __init__(self):
        self.module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(2, 2))})
        self.modes, self.factor = [], 1.0

    def losses(self, step):
        self.modes.append(self.module.training)
        ours = self.factor * (self.module["a"] - 1).square().sum()
        return {"a": ours, "b": self.module["b"].sum() * (step == 0)}

    def evaluate(self):
        self.modes.append((self.module.training, torch.is_inference_mode_enabled()))
        return {"score": float(self.module["a"].mean())}


def test_a_run_reports_evaluates_and_leaves_the_modules_mode(tmp_path):
    task, told = Task(), []
    options = {"cycles": (3, 4), "peak_learning_rate": 0.1, "weight_decay": 0.0, "warmup_steps": 1}
    last = pretrain(
        task, **options, state_dir=tmp_path, report=lambda *a: told.append(a), report_every=3, evaluate_every=5
    )
    assert [(step, sorted(numbers)) for step, numbers in told] == [
        (0, ["a", "b"]), (3, ["a", "b"]), (4, ["held_out/score"]), (6, ["a", "b"]), (6, ["held_out/score"]),
    ]  # fmt: skip
    assert told[0][1] == {"a": 4.0, "b": 0.0} and last == told[-1][1] and task.module.training
    assert task.modes == [True] * 5 + [(False, True)] + [True] * 2 + [(False, True)]
    before = [p.clone() for p in task.module.parameters()]
    again = Task()
    assert pretrain(again, **options, state_dir=tmp_path) == pytest.approx(last), "finished: evaluated and no more"
    assert again.modes == [(False, True)]
    assert all(torch.equal(p, q) for p, q in zip(before, again.module.parameters(), strict=True))


def test_gradients_are_clipped_and_belong_to_their_step(tmp_path, monkeypatch):
    task, norms, rates = Task(), [], []
    task.factor = 100.0
    step = torch.optim.AdamW.step

    def spy(optimizer, *a):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        norms.append((float(torch.stack([g.norm() for g in grads]).norm()), grads[1].abs().max().item()))
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *a)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    pretrain(task, cycles=(4,), peak_learning_rate=0.1, state_dir=tmp_path, warmup_steps=2)
    assert [norm for norm, _ in norms] == pytest.approx([1.0] * 4, abs=1e-4)
    assert norms[0][1] > 0 and [other for _, other in norms[1:]] == [0.0] * 3, "nothing of the step before is left"
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1 * (0.02 + 0.49)])


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Parameters, the moments of both optimizers and the step's own number come back."""
    monkeypatch.setattr(pretraining, "SAVE_EVERY_S", -1)
    options = {"cycles": (3,), "peak_learning_rate": 0.1, "warmup_steps": 1, "orthogonalized": "b"}
    whole, stopped, resumed = Task(), Task(), Task()
    pretrain(whole, **options, state_dir=tmp_path / "whole")
    losses = stopped.losses
    stopped.losses = lambda step: losses(step) if step < 1 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        pretrain(stopped, **options, state_dir=tmp_path / "state")
    pretrain(resumed, **options, state_dir=tmp_path / "state")
    assert resumed.modes == [True] * 2 + [(False, True)], "the steps 1 and 2"
    for name, parameter in whole.module.items():
        assert torch.equal(parameter, resumed.module[name])
        assert not torch.equal(parameter, stopped.module[name])


def test_the_state_is_kept_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    now, kept = itertools.count(0, 20.2), []
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(pretraining, "_save", lambda folder, step, *_: kept.append((folder, step)))
    pretrain(Task(), cycles=(4, 3), peak_learning_rate=0.1, state_dir=tmp_path)
    assert kept == [(tmp_path, step) for step in (3, 6, 7)], "after 60.6 s each time"
