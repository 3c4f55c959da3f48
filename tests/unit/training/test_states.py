"""Training states: which are kept, what they hold, and what a resumed run gets back."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines import storage
from pipelines.storage import DiskFullError
from pipelines.training.states import StateStore, collect_state, restore_parameters, restore_state
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EBUSY, "busy"), "an older training state cannot be removed: [Errno 16] busy"),
        (
            FileNotFoundError(errno.ENOENT, "gone"),
            "step-00000003 was removed by another process: is a second run writing",
        ),
    ],
)
def test_a_state_that_cannot_be_removed_ends_nothing_and_is_tried_again(tmp_path, monkeypatch, caplog, error, told):
    store, remove, asked = store_in(tmp_path, keep=1), storage.remove_folder, []

    def busy(folder):
        asked.append(Path(folder).name)
        if len(asked) == 1:
            raise error
        remove(folder)

    monkeypatch.setattr(storage, "remove_folder", busy)
    save(store, [3, 6])
    assert names(tmp_path) == ["step-00000003", "step-00000006"]
    assert store.whole_step == 6 == store.newest_step()
    assert told in caplog.text
    save(store, [9])
    assert names(tmp_path) == ["step-00000009"] and sorted(asked[1:]) == ["step-00000003", "step-00000006"]


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


def test_of_equal_losses_the_first_is_the_best(tmp_path):
    losses = {3: 1.0, 6: 0.5, 9: 0.5, 12: 2.0}
    save(store_in(tmp_path, keep=1, keep_best=True), losses, losses)
    assert names(tmp_path) == ["step-00000006", "step-00000012"]


def test_only_folders_of_states_are_states(tmp_path):
    for name in ("step-00000003", "step-00000003.old", "step-4", "astep-00000005", "step-000000006"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in store_in(tmp_path)._folders()] == [3]


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
        assert changed.wait(60)
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


def test_a_state_lies_below_the_location_under_its_step(tmp_path):
    assert store_in("s3://bucket/states").folder(12_345_678) == "s3://bucket/states/step-12345678"
    store = store_in(tmp_path)
    assert store.folder(7) == f"{tmp_path}/step-00000007"
    for name in ("step-7", "step-00000009.old", "old-step-00000009", "step-0000000x"):
        (tmp_path / name).mkdir()
    save(store, [12, 5])
    assert store._folders() == [(5, store.folder(5)), (12, store.folder(12))]
    assert store.newest_step() == 12


def test_the_state_of_a_step_is_read(tmp_path):
    for location in (str(tmp_path), f"file://{tmp_path}/below", "memory://bucket/steps"):
        store = store_in(location, keep=9)
        save(store, [3, 6], {3: 0.5})
        step, tensors, record = store.at(3)
        assert (step, record) == (3, {"mean_loss": 0.5, "next_step": 3})
        assert tensors["parameter/x"].tolist() == [3.0] * 3
    assert names(tmp_path / "below") == ["step-00000003", "step-00000006"]
    with pytest.raises(CheckpointError, match="step-00000004 does not exist"):
        store_in(tmp_path).at(4)


def test_states_are_written_one_after_the_other_in_a_thread(tmp_path, monkeypatch):
    store, seen = store_in(tmp_path), []
    write = store._write_state
    monkeypatch.setattr(
        store,
        "_write_state",
        lambda step, *rest: seen.append((step, threading.current_thread().name)) or write(step, *rest),
    )
    assert store.whole_step == 0
    store.save(3, {"parameter/x": torch.zeros(1)}, {})
    store.save(6, {"parameter/x": torch.zeros(1)}, {})
    assert store.whole_step >= 3, "the write before has ended"
    store.wait()
    assert store.whole_step == 6 and seen == [(3, "state-writer"), (6, "state-writer")]
    store.wait()


def test_a_state_that_was_not_written_counts_for_nothing(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    save(store, [3])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_state", full)
    store.save(6, {}, {})
    with pytest.raises(DiskFullError, match=rf"while writing the training state of step 6 in {tmp_path}: free some"):
        store.wait()
    assert store.whole_step == 3 and store.newest_step() == 3


def test_the_best_state_is_kept_only_where_that_is_asked_for(tmp_path):
    save(store_in(tmp_path, keep=1), [3, 6, 9], {3: 0.1, 6: 0.2, 9: 0.3})
    assert names(tmp_path) == ["step-00000009"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"mean_loss": 2}', (True, 2.0)),
        ('{"mean_loss": null}', (True, float("inf"))),
        ("{}", (True, float("inf"))),
        ('{"mean_loss": 1, "held_out_loss": 3}', (False, 3.0)),
        ('{"mean_loss": 1, "held_out_loss": null}', (True, 1.0)),
        ("{", (True, float("inf"))),
        (None, (True, float("inf"))),
    ],
)
def test_held_out_losses_come_before_those_of_training(tmp_path, text, key):
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    assert store_in(tmp_path)._loss(str(tmp_path)) == key


def test_only_leftovers_and_old_states_are_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for name in (".step-00000001.tmp", "mine.tmp", ".mine"):
        (tmp_path / name).mkdir()
    save(store_in(f"file://{tmp_path}", keep=1), [3, 6])
    assert names(tmp_path) == [".mine", "mine.tmp", "notes.txt", "step-00000006"]


def test_a_state_without_its_step_is_skipped_and_named(tmp_path, caplog):
    store = store_in(tmp_path, keep=9)
    save(store, [3])
    store._write_state(6, {"parameter/x": torch.zeros(1)}, {})
    store._write_state(9, {"parameter/x": torch.zeros(1)}, {"next_step": None})
    store._write_state(12, {"parameter/x": torch.zeros(1)}, {"next_step": "twelve"})
    caplog.clear()
    assert store.newest()[0] == 3
    first, *others = [record.getMessage() for record in caplog.records]
    assert first.startswith("a damaged training state is skipped: ") and "'twelve'" in first
    assert others == [
        f"a damaged training state is skipped: state.json in {store.folder(step)} has no next_step." for step in (9, 6)
    ]
    shutil.rmtree(tmp_path / "step-00000012")
    (tmp_path / "step-00000009/manifest.json").unlink()
    caplog.clear()
    store.newest()
    assert (
        caplog.records[0]
        .getMessage()
        .startswith(f"a damaged training state is skipped: {store.folder(9)} has no manifest.json")
    )


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
    more = {**collect_state(step)[0], "parameter/more": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="of another stage or model: more is in only one of them"):
        restore_state(make_step(), more, extra)


def test_moments_of_before_are_forgotten():
    fresh, used = make_step(), make_step()
    run(used, 2)
    restore_state(used, *collect_state(fresh))
    assert not used.optimizer.state


# ---------------------------------------------------------------------- the same of a step that is only parameters


def layer_step(steps=1, device="cpu"):
    """What a state is collected from: named parameters, AdamW, a scaler."""
    torch.manual_seed(steps)
    layer = torch.nn.Linear(2, 3, device=device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(steps):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**steps)
    return SimpleNamespace(named=list(layer.named_parameters()), optimizer=optimizer, scaler=scaler)


def test_a_state_has_parameters_moments_and_the_scaler_by_name():
    tensors, record = collect_state(layer_step(0))
    assert set(tensors) == {"parameter/weight", "parameter/bias"}
    step = layer_step(2)
    tensors, record = collect_state(step)
    kinds = ("parameter", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    assert set(tensors) == {f"{kind}/{name}" for kind in kinds for name in ("weight", "bias")}
    for name, parameter in step.named:
        assert tensors[f"parameter/{name}"] is parameter
        assert tensors[f"optimizer/exp_avg/{name}"] is step.optimizer.state[parameter]["exp_avg"]
    assert record == {"scaler": step.scaler.state_dict()} and record["scaler"]["scale"] == 4.0


def test_a_state_replaces_all_that_was_there():
    ours, theirs = layer_step(3), layer_step(2)
    for state in ours.optimizer.state.values():
        state["stale"] = torch.ones(1)
    tensors, record = collect_state(theirs)
    restore_state(ours, {**tensors, "other/weight": torch.ones(9)}, record)
    assert ours.scaler.get_scale() == 4.0
    for (_, mine), (_, wanted) in zip(ours.named, theirs.named, strict=True):
        assert mine is not wanted and mine.requires_grad and torch.equal(mine, wanted)
        state, expected = ours.optimizer.state[mine], theirs.optimizer.state[wanted]
        assert set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in state)


def test_the_step_count_of_adamw_stays_on_the_cpu():
    """As torch keeps it, where the parameters are elsewhere; the moments are where the parameters are."""
    tensors, record = collect_state(layer_step(1))
    step = layer_step(0, device="meta")
    restore_state(step, tensors, record)
    for _, parameter in step.named:
        devices = {key: tensor.device.type for key, tensor in step.optimizer.state[parameter].items()}
        assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_parameters_alone_leave_optimizer_and_scaler_as_they_are():
    ours, theirs = layer_step(3), layer_step(2)
    before = {key: tensor.clone() for key, tensor in collect_state(ours)[0].items()}
    places = [parameter.data_ptr() for _, parameter in ours.named]
    restore_parameters(ours, {name: tensor.double() for name, tensor in collect_state(theirs)[0].items()})
    after = collect_state(ours)[0]
    assert [parameter.data_ptr() for _, parameter in ours.named] == places, "where gradients and kernels expect them"
    assert {parameter.dtype for _, parameter in ours.named} == {torch.float32}
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("optimizer/"))
    assert all(torch.equal(mine, wanted) for (_, mine), (_, wanted) in zip(ours.named, theirs.named, strict=True))
    assert ours.scaler.get_scale() == 8.0


@pytest.mark.parametrize(("removed", "added"), [("parameter/bias", None), (None, "parameter/more")])
def test_a_state_of_other_parameters_names_one_and_changes_nothing(removed, added):
    ours = layer_step(3)
    before = {key: tensor.clone() for key, tensor in collect_state(ours)[0].items()}
    tensors, record = collect_state(layer_step(2))
    tensors = {name: tensor for name, tensor in tensors.items() if name != removed}
    if added:
        tensors[added] = torch.ones(1)
    with pytest.raises(CheckpointError) as caught:
        restore_state(ours, tensors, record)
    name = (removed or added).removeprefix("parameter/")
    assert str(caught.value) == (f"the training state is of another stage or model: {name} is in only one of them.")
    assert all(torch.equal(tensor, before[key]) for key, tensor in collect_state(ours)[0].items())
