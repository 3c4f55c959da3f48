"""A stage trained in this process: the record, exact resumption, and two ways to one answer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from pipelines.data.feature_set import FeatureError, feature_key
from pipelines.data.features import cache_features
from pipelines.miniature.tiny_training import train_settings
from pipelines.settings import CacheFeaturesSettings, SettingsError, TrainSettings
from pipelines.training.job import apply_stage_settings, resolve_job
from pipelines.training.record import read_record
from pipelines.training.run import dry_run, run_stage
from pipelines.training.run_reports import NoReports
from pipelines.training.states import StateStore
from pipelines.training.worker import TrainWorker, _dropout_seed
from tests.training_runs import losses, record, run_until
from tinygptv.checkpoint.checkpoint import load_checkpoint
from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.training.stages import get_stage


def weights(output):
    return load_checkpoint(output / "checkpoint")[0].state_dict()


def assert_same_weights(one, two):
    for (name, a), b in zip(weights(one).items(), weights(two).values(), strict=True):
        assert torch.equal(a, b), name


def test_result_and_record(straight):
    result, output = straight
    entries = record(output)
    assert result["steps"] == len(entries) == 12
    assert [entry["step"] for entry in entries] == list(range(12))
    assert result["first_loss"] == entries[0]["loss"] and result["last_loss"] == entries[-1]["loss"]
    assert float.fromhex(entries[0]["loss_hex"]) == entries[0]["loss"]
    assert result["last_loss"] < result["first_loss"]
    assert all(sample.split("/")[0] in ("pairs", "questions") for e in entries for sample in e["sample_ids"])
    assert entries[0]["lr"] == pytest.approx(1e-3)
    model, processor, stage = load_checkpoint(result["checkpoint"])
    assert stage["stage"] == 4 and model.config.lora_rank == 2 and processor.template == "human"


def test_only_the_stages_parts_change(straight, world):
    before, after = load_checkpoint(world["init_from"])[0].state_dict(), weights(straight[1])
    for name, tensor in after.items():
        if ".lora_" in name:
            continue
        old = before[name.replace(".base_layer.", ".")]
        trained = name.startswith("projector.") or (name.endswith("norm.weight") and name.startswith("language_model"))
        assert torch.equal(old, tensor) != trained, name


def test_frozen_matrices_in_4_bits_are_handed_on_as_they_were(straight, world, tmp_path, monkeypatch):
    """Interrupted and resumed: the matrices are packed again, to the same bits."""
    settings = train_settings(world, tmp_path / "a", frozen_weights="nf4", max_steps=6)
    result = run_stage(settings, 4)
    assert result["last_loss"] < result["first_loss"] and losses(tmp_path / "a") != losses(straight[1])[:6]
    test_only_the_stages_parts_change((result, tmp_path / "a"), world)
    again = settings.model_copy(update={"output": str(tmp_path / "b")})
    run_until(monkeypatch, 4, again)
    run_stage(again, 4)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert_same_weights(tmp_path / "b", tmp_path / "a")


def test_a_finished_stage_is_not_trained_again(straight, world):
    result, output = straight
    before = (output / "checkpoint/model.safetensors").stat().st_mtime_ns
    assert run_stage(train_settings(world, output), 4)["last_loss"] == result["last_loss"]
    assert (output / "checkpoint/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("at", [1, 4, 8])
def test_interrupted_runs_go_on_bit_for_bit(straight, world, tmp_path, monkeypatch, at):
    """Stopped in the middle of a step, then run again by the same command."""
    run_until(monkeypatch, at, train_settings(world, tmp_path))
    run_stage(train_settings(world, tmp_path), 4)
    assert losses(tmp_path) == losses(straight[1])
    assert_same_weights(tmp_path, straight[1])


def test_damaged_states_are_passed_over(straight, world, tmp_path, caplog):
    shutil.copytree(straight[1], tmp_path, dirs_exist_ok=True)
    newest = sorted((tmp_path / "states").glob("step-*"))[-1]
    damaged = newest / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7] + b"garbage")
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "states/step-99999999").mkdir()  # half-written: no manifest
    store = StateStore(str(tmp_path / "states"), 9)
    next_step, _, _ = store.newest()
    assert next_step == int(sorted((tmp_path / "states").glob("step-0*"))[-2].name.removeprefix("step-"))
    assert "does not match the hash" in caplog.text and "never finished" in caplog.text
    run_stage(train_settings(world, tmp_path, keep_checkpoints=9), 4)
    assert losses(tmp_path) == losses(straight[1])


@pytest.mark.parametrize(
    ("every", "keep", "last", "steps"), [(2, 9, 6, [2, 4]), (2, 9, 5, [2, 4]), (1, 2, 5, [3, 4]), (100, 2, 2, [])]
)
def test_states_are_saved_at_their_steps_and_the_newest_are_kept(world, tmp_path, every, keep, last, steps):
    """Every so many steps; at the end of the stage the whole checkpoint takes their place."""
    settings = train_settings(world, tmp_path, checkpoint_every=every, keep_checkpoints=keep, max_steps=last)
    run_stage(settings, 4)
    assert sorted(path.name for path in (tmp_path / "states").glob("*")) == [f"step-{step:08d}" for step in steps]
    if not steps:
        return
    newest = json.loads((tmp_path / f"states/step-{steps[-1]:08d}/state.json").read_text())
    losses_since = [entry["loss"] for entry in record(tmp_path)[steps[-2] : steps[-1]]]
    assert newest["next_step"] == steps[-1] and newest["mean_loss"] == pytest.approx(
        sum(losses_since) / len(losses_since)
    )


def test_seeds_of_dropout_differ_between_runs_steps_and_workers():
    seeds = {_dropout_seed(seed, step, rank) for seed in range(3) for step in range(2000) for rank in range(8)}
    assert len(seeds) == 3 * 2000 * 8


def test_the_record_in_object_storage_is_never_behind_a_state(world, tmp_path, monkeypatch):
    """A kill right after a state must not cost lines of the steps before it."""
    location, published, save = f"memory://bucket/{tmp_path.name}", {}, StateStore.save

    def saving(self, next_step, *arguments):
        published[next_step] = len(read_record(f"{location}/metrics.jsonl"))
        return save(self, next_step, *arguments)

    monkeypatch.setattr(StateStore, "save", saving)
    run_stage(train_settings(world, tmp_path, storage_path=location, checkpoint_every=4, max_steps=9), 4)
    assert published == {4: 4, 8: 8}


def test_fresh_adapters_follow_from_the_seed_alone(world, tmp_path):
    """Every worker draws the same ones, whatever its process drew before."""

    def adapters(seed, drawn_before):
        job, *_ = resolve_job(train_settings(world, tmp_path / str(seed), seed=seed), 4)
        torch.rand(drawn_before)
        model = TrainWorker(job, NoReports()).model
        return torch.cat([p.detach().ravel() for name, p in model.named_parameters() if ".lora_A." in name])

    first = adapters(1, drawn_before=5)
    assert first.std() > 0 and torch.equal(adapters(1, drawn_before=7), first)
    assert not torch.equal(adapters(2, drawn_before=7), first)


def test_dropout_draws_alike_after_an_interruption(straight, world, tmp_path, monkeypatch):

    def settings(name):
        return train_settings(world, tmp_path / name, stage={"lora_dropout": 0.5}, max_steps=6)

    run_stage(settings("straight"), 4)
    assert losses(tmp_path / "straight") != losses(straight[1])[:6], "dropout does something"
    run_until(monkeypatch, 4, settings("broken"))
    run_stage(settings("broken"), 4)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert_same_weights(tmp_path / "broken", tmp_path / "straight")


def test_micro_batches_change_rounding_only(straight, world, tmp_path):
    run_stage(train_settings(world, tmp_path, micro_batch_size=1, max_steps=4), 4)
    for a, b in zip(record(tmp_path), record(straight[1])[:4], strict=True):
        assert a["sample_ids"] == b["sample_ids"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)


def test_packing_gives_the_padded_losses(straight, world, tmp_path):
    run_stage(train_settings(world, tmp_path, packing=True, max_steps=4), 4)
    for a, b in zip(record(tmp_path), record(straight[1])[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)


def test_gradient_checkpointing_changes_nothing(straight, world, tmp_path):
    run_stage(train_settings(world, tmp_path, gradient_checkpointing=True, max_steps=4), 4)
    assert losses(tmp_path) == losses(straight[1])[:4]


def test_an_encoder_in_half_precision_rounds_features_and_no_weight(straight, world, tmp_path):
    run_stage(train_settings(world, tmp_path, encoder_precision="bf16", max_steps=2), 4)
    assert losses(tmp_path) != losses(straight[1])[:2]
    assert record(tmp_path)[0]["loss"] == pytest.approx(record(straight[1])[0]["loss"], rel=5e-3)
    ours, theirs = weights(tmp_path), weights(straight[1])
    frozen = [name for name in theirs if name.startswith(("vision_encoder.", "qformer."))]
    assert frozen
    assert all(torch.equal(ours[name], theirs[name]) for name in frozen)


def test_cached_features_train_to_the_same_losses(straight, world, tmp_path):
    with pytest.raises(FeatureError, match=r"run `python jobs/cache_features\.py data=.* image_size=28 "):
        run_stage(train_settings(world, tmp_path / "a", features="cached"), 4)
    cache = CacheFeaturesSettings(
        data=world["data"], checkpoint=world["init_from"], num_workers=0, quiet=True, output=str(tmp_path / "cache")
    )
    assert cache_features(cache)["rows"] == 52
    again = cache_features(cache)
    assert again["parts"] == 0 and again["reused"] == 7
    run_stage(train_settings(world, tmp_path / "b", features="cached", max_steps=4), 4)
    for a, b in zip(record(tmp_path / "b"), record(straight[1])[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.parametrize("size", [28, 56])
def test_the_next_stage_finds_the_features_of_the_start(world, tmp_path, size):
    """Training rounds the encoder to bfloat16; its checkpoint holds it as the start does."""
    result = run_stage(
        train_settings(world, tmp_path, precision="bf16", max_steps=1, stage={"image_size": size}, packing=False), 4
    )
    assert feature_key(result["checkpoint"], size) == feature_key(world["init_from"], size)
    model, _, _ = load_checkpoint(result["checkpoint"])
    assert model.config.vision_config.image_size == size
    assert model.qformer.query_tokens.dtype == model.dtype == torch.bfloat16


def test_features_of_other_weights_are_refused(world, tmp_path, straight):
    """A checkpoint with another encoder finds no features under its own key."""
    model, processor, _ = load_checkpoint(world["init_from"])
    model.qformer.query_tokens.data.add_(1e-3)
    from tinygptv.checkpoint.checkpoint import save_checkpoint

    other = save_checkpoint(tmp_path / "other", model, processor, {})
    with pytest.raises(FeatureError, match="no cached features"):
        run_stage(train_settings({**world, "init_from": str(other)}, tmp_path / "run", features="cached"), 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init_from": ""}, SettingsError, "needs a start: give init_from"),
        ({"init_from": "/nowhere"}, CheckpointError, "/nowhere does not exist"),
        ({"data": "/nowhere"}, SettingsError, "data=/nowhere does not exist: give the folder of prepared shard sets"),
        ({"stage": {"nonsense": 1}}, SettingsError, r"stage\.nonsense is no field"),
        (
            {"stage": {"lora_rnak": 1}},
            SettingsError,
            r"stage\.lora_rnak is no field of a stage; did you mean 'lora_rank'",
        ),
        ({"stage": {"schedule": {"pek": 1}}}, SettingsError, "'pek' is unknown; did you mean 'peak'"),
        ({"stage": {"limits": 3}}, SettingsError, "stage.limits=3 .* a mapping of max_text_tokens"),
        ({"stage": {"template": "x"}}, SettingsError, "template 'x'"),
        ({"precision": "fp8"}, ValueError, "'fp32', 'bf16', 'fp16'"),
        ({"features": "magic"}, ValueError, "'inline' or 'cached'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(world, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run_stage(train_settings(world, tmp_path, **changes), 4)


def test_fields_of_a_stage_are_changed_as_people_write_them():
    stage = get_stage("mini", 4)
    changes = {"schedule": {"peak": 5e-4, "epochs": 2}, "sources": {"gqa": {"weight": 7}}, "lora_rank": 4}
    changed = apply_stage_settings(stage, changes)
    assert (changed.schedule.peak, changed.schedule.epochs, changed.lora_rank) == (5e-4, 2, 4)
    assert len(changed.sources) == len(stage.sources)
    assert {source.name: source.weight for source in changed.sources}["gqa"] == 7
    own = {"name": "own", "weight": 1, "batch_size": 2}
    assert [source.name for source in apply_stage_settings(stage, {"sources": [own]}).sources] == ["own"]
    with pytest.raises(SettingsError, match="a new one needs weight and batch_size"):
        apply_stage_settings(stage, {"sources": {"own": {"weight": 1}}})


def test_adapters_of_the_start_are_the_ones_that_train_and_are_shown(straight, tmp_path, world, caplog):
    told = {"lora_rank": 4, "lora_alpha": 64, "lora_dropout": 0.5}
    start = str(straight[1] / "checkpoint")
    settings = train_settings({**world, "init_from": start}, tmp_path, stage=told, max_steps=1)
    shown = dry_run(settings, 4)
    assert "rank 2, alpha 16, dropout 0.5" in shown
    assert "stage.lora_rank=4 is ignored" in caplog.text and "adapters of alpha 16" in caplog.text
    run_stage(settings, 4)
    stage = yaml.safe_load((tmp_path / "config.yaml").read_text())["stage"]
    assert (stage["lora_rank"], stage["lora_alpha"], stage["lora_dropout"]) == (2, 16, 0.5)
    model = load_checkpoint(tmp_path / "checkpoint")[0]
    assert (model.config.lora_alpha, model.config.lora_dropout) == (16, 0.5)
    assert sum(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in model.modules()) > 0


@pytest.mark.parametrize("recipe", ["paper", "mini"])
def test_a_dry_run_tells_everything_and_needs_nothing(recipe):
    text = dry_run(TrainSettings(recipe=recipe, dry_run=True), 1)
    for words in ("warm-up", "laion", "projector", "trainable", "optimizer", "peak", "sawtooth", "data is not given"):
        assert words in text, words
    if recipe == "paper":
        assert "13,809,664" in text, "what stage 1 of the paper trains"
    unusable = TrainSettings(recipe=recipe, features="cached", stage={"trainable": ["projector", "qformer"]})
    with pytest.raises(SettingsError, match=r"^features=cached: stage\.trainable names qformer"):
        dry_run(unusable, 1)
