"""The optimizer: its numbers and its groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from tinygptv.training.optim import build_optimizer, parameter_groups
from tinygptv.training.schedule import Schedule

SCHEDULE = Schedule("warmup_decay", 1e-3, 1e-4, 1e-5, 10, 20, 3)


def test_its_numbers_are_those_of_the_stage():
    optimizer = build_optimizer(nn.Linear(3, 2), SCHEDULE, weight_decay=0.05, beta2=0.98)
    matrices, vectors = optimizer.param_groups
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.98)
    assert matrices["lr"] == vectors["lr"] == pytest.approx(1e-5)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert matrices["eps"] == 1e-8


@pytest.mark.parametrize(("devices", "fused"), [((True, True), True), ((True, False), None), ((False,), None)])
def test_its_steps_are_one_kernel_where_all_is_on_a_gpu(monkeypatch, devices, fused):
    parameters = [SimpleNamespace(requires_grad=True, ndim=n + 1, is_cuda=cuda) for n, cuda in enumerate(devices)]
    model = SimpleNamespace(named_parameters=lambda: [(str(p.ndim), p) for p in parameters])
    monkeypatch.setattr("torch.optim.AdamW", lambda groups, **options: options)
    assert build_optimizer(model, SCHEDULE, 0.1, 0.9) == {"lr": 1e-5, "betas": (0.9, 0.9), "fused": fused}


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Conv2d(1, 1, 2))
    matrices, vectors = parameter_groups(model.named_parameters(), 0.1)
    assert matrices["names"] == ["0.weight", "2.weight"]
    assert vectors["names"] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert [p.ndim for p in matrices["params"]] == [2, 4]


def test_what_is_frozen_is_in_no_group_and_an_empty_group_is_left_out():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (vectors,) = parameter_groups(model.named_parameters(), 0.1)
    assert vectors["names"] == ["bias"]
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(model, SCHEDULE, 0.1, 0.999)
