"""Training states: which are kept, what they hold, and what a resumed run gets back."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from pipelines.training.states import StateStore, collect_state, restore_state
from tests.training_batches import mixed_samples, tiny_model
from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.data.collate import collate
from tinygptv.training.train_step import TrainStep


def store_in(location, keep=2, **options):
    return StateStore(str(location), keep, **options)


def save(store, steps, losses=None):
    for step in steps:
        store.save(step, {"parameter/x": torch.full((3,), float(step))}, {"mean_loss": (losses or {}).get(step)})
    store.wait()


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_states_are_kept(tmp_path):
    save(store_in(tmp_path, keep=2), [3, 6, 9, 12])
    assert names(tmp_path) == ["step-00000009", "step-00000012"]
    save(store_in(tmp_path, keep=1), [15])
    assert names(tmp_path) == ["step-00000015"]


def test_the_best_state_is_the_one_of_least_mean_loss(tmp_path):
    losses = {3: 2.5, 6: 0.5, 9: 1.5, 12: 0.7, 15: 0.9}
    save(store_in(tmp_path, keep=2, keep_best=True), losses, losses)
    assert names(tmp_path) == ["step-00000006", "step-00000012", "step-00000015"]
    save(store_in(tmp_path, keep=2, keep_best=True), [18], {18: 0.1})
    assert names(tmp_path) == ["step-00000015", "step-00000018"], "the new best one is among the newest"


def test_a_held_out_loss_decides_where_there_is_one(tmp_path):
    losses = {3: (0.1, None), 6: (0.9, 0.5), 9: (0.2, 0.7), 12: (0.3, 0.6)}  # of training, of held-out rows
    store = store_in(tmp_path, keep=1, keep_best=True)
    for step, (mean, held_out) in losses.items():
        store.save(step, {"parameter/x": torch.zeros(1)}, {"mean_loss": mean, "held_out_loss": held_out})
    store.wait()
    assert names(tmp_path) == ["step-00000006", "step-00000012"]


def test_a_state_without_a_loss_is_never_the_best(tmp_path):
    losses = {3: 9.0, 6: None, 9: None}
    save(store_in(tmp_path, keep=1, keep_best=True), losses, losses)
    assert names(tmp_path) == ["step-00000003", "step-00000009"]


def test_half_a_state_is_never_the_best(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    losses = {3: 0.5, 6: 1.0}
    save(store_in(tmp_path, keep=1, keep_best=True), losses, losses)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / ".step-00000003.tmp").mkdir()
    save(store_in(tmp_path), [6])
    assert names(tmp_path) == ["step-00000006"]


def test_the_newest_complete_state_is_read(tmp_path, caplog):
    store = store_in(tmp_path, keep=9)
    assert store.newest() is None and store.newest_step() == 0
    save(store, [3, 6])
    (tmp_path / "step-00000009").mkdir()
    assert store.newest_step() == 6
    step, tensors, extra = store.newest()
    assert step == extra["next_step"] == 6 and tensors["parameter/x"].tolist() == [6.0] * 3
    weights = tmp_path / "step-00000006/state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    caplog.clear()
    assert store.newest()[0] == 3
    skipped = [record.getMessage() for record in caplog.records]
    assert ["step-00000009" in skipped[0], "step-00000006" in skipped[1]] == [True, True] and len(skipped) == 2


def test_tensors_are_copied_when_a_state_is_taken(tmp_path, monkeypatch):
    """The next step changes the weights while the state is being written."""
    store, weight, changed = store_in(tmp_path), torch.zeros(1000), threading.Event()
    write = store._write_state

    def late(*arguments):
        assert changed.wait(30)
        return write(*arguments)

    monkeypatch.setattr(store, "_write_state", late)
    store.save(3, {"parameter/x": weight}, {})
    weight += 1
    changed.set()
    store.wait()
    assert not store.newest()[1]["parameter/x"].any()


def test_a_write_that_fails_is_told_once_by_the_next_call(tmp_path, monkeypatch):
    store = store_in(tmp_path)

    def broken(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "_write_state", broken)
    store.save(3, {}, {})
    with pytest.raises(OSError, match="the disk is gone"):
        store.wait()
    store.wait()


def test_object_storage_keeps_the_same(tmp_path):
    location = "memory://bucket/states"
    losses = {3: 0.5, 6: 2.0, 9: 1.5}
    store = store_in(location, keep=1, keep_best=True)
    save(store, losses, losses)
    assert [step for step, _ in store._folders()] == [3, 9]
    step, tensors, extra = store.newest()
    assert (step, tensors["parameter/x"].tolist(), extra["mean_loss"]) == (9, [9.0] * 3, 1.5)


# ---------------------------------------------------------------------- what a state holds


def make_step(precision="fp32", seed=0):
    torch.manual_seed(seed)
    model = tiny_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainStep(model, torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95)), num_sources=1, precision=precision)


def run(step, count):
    batch = collate(mixed_samples(), 0)
    return [float(step.run([batch], 1e-3).loss) for _ in range(count)]


@pytest.mark.parametrize("precision", ["fp32", "fp16_range"])
def test_a_restored_step_goes_on_bit_for_bit(tmp_path, precision):
    step = make_step(precision)
    run(step, 3)
    save_store = store_in(tmp_path)
    tensors, extra = collect_state(step)
    save_store.save(3, tensors, json.loads(json.dumps(extra)))
    save_store.wait()
    expected = run(step, 3)
    other = make_step(precision)
    run(other, 1)  # whatever it did before is forgotten
    _, tensors, extra = save_store.newest()
    restore_state(other, tensors, extra)
    assert run(other, 3) == expected


def test_moments_and_scaler_come_back(tmp_path):
    step = make_step("fp16_range")
    run(step, 2)
    step.scaler.update(1234.0)
    tensors, extra = collect_state(step)
    other = make_step("fp16_range")
    restore_state(other, {name: tensor.clone() for name, tensor in tensors.items()}, extra)
    assert other.scaler.get_scale() == 1234.0
    for (name, ours), (_, theirs) in zip(other.named, step.named, strict=True):
        mine, expected = other.optimizer.state[ours], step.optimizer.state[theirs]
        assert set(mine) == set(expected) == {"step", "exp_avg", "exp_avg_sq"}, name
        assert all(torch.equal(mine[key], expected[key]) for key in mine), name


def test_a_state_of_another_stage_is_refused(tmp_path):
    step = make_step()
    tensors, extra = collect_state(step)
    gone = next(name for name in tensors if name.startswith("parameter/projector"))
    del tensors[gone]
    with pytest.raises(CheckpointError, match=gone.removeprefix("parameter/")):
        restore_state(make_step(), tensors, extra)
