"""The backbones' pretraining runs, resumes to the same numbers, and what it makes becomes package data."""

from __future__ import annotations

import pytest
import torch

from pipelines.miniature import jobs
from pipelines.settings import MiniatureSettings, SettingsError
from tinygptv.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.miniature import backbones, pretrain_language
from tinygptv.miniature.documents import LANGUAGE_MIX, LOOKUP_MIX, make_document
from tinygptv.miniature.pretrain_vision import ScenePool, VisionTask
from tinygptv.miniature.pretraining import _share_of_peak, pretrain
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import RECIPES


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain_language.train_tokenizer(seed=0, vocab_size=600, num_documents=400)


@pytest.fixture(scope="module")
def pool() -> ScenePool:
    return ScenePool.draw(0, "train", 8, (64, 128))


def _vision_task(pool: ScenePool) -> VisionTask:
    torch.manual_seed(0)
    return VisionTask(TinyGPTVConfig.mini(lora_rank=0), pool, pool, batch_size=2)


def test_interrupted_pretraining_goes_on_to_the_same_weights(pool, tmp_path):
    straight, halves = _vision_task(pool), _vision_task(pool)
    pretrain(straight, cycles=(4,), peak_learning_rate=1e-3, state_dir=tmp_path / "a")

    class Killed(Exception):
        pass

    def kill(step: int, numbers: dict[str, float]) -> None:
        if step == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinygptv.miniature.pretraining.SAVE_EVERY_S", 0.0)
        arguments = {"cycles": (4,), "peak_learning_rate": 1e-3, "state_dir": tmp_path / "b"}
        with pytest.raises(Killed):
            pretrain(halves, **arguments, report=kill, report_every=1)
        scores = pretrain(_vision_task(pool), **arguments)
    resumed = _vision_task(pool)
    pretrain(resumed, **arguments)  # finished: only loads
    for ours, theirs in zip(straight.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert {"held_out/shape/64px", "held_out/box_error/128px"} <= set(scores)


def test_every_loss_reaches_the_encoder(pool):
    task = _vision_task(pool)
    losses = task.losses(0)
    for name, loss in losses.items():
        task.module.zero_grad()
        loss.backward(retain_graph=True)
        assert task.module.vision_encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0, name


def test_language_task_learns_to_repeat_a_batch(tokenizer):
    torch.manual_seed(0)
    task = pretrain_language.LanguageTask(
        TinyGPTVConfig.mini(lora_rank=0), tokenizer, world_seed=0, batch_size=4, held_out=4
    )
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = task.losses(0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_look_ups_are_practised_from_their_step_on(tokenizer, monkeypatch):
    drawn = []

    def spy(scene, rng, kind=None, *, weights, **options):
        drawn.append(weights)
        return make_document(scene, rng, kind, weights=weights, **options)

    monkeypatch.setattr(pretrain_language, "make_document", spy)
    task = pretrain_language.LanguageTask(
        TinyGPTVConfig.mini(lora_rank=0), tokenizer, world_seed=0, batch_size=8, lookups_from=pretrain_language.BUCKETS
    )
    task.losses(pretrain_language.BUCKETS - 1)
    assert all(weights is LANGUAGE_MIX for weights in drawn)
    drawn.clear()
    with torch.no_grad():
        weighted = task.losses(pretrain_language.BUCKETS)["loss"]
        monkeypatch.setattr(pretrain_language, "LOOKUP_WEIGHT", 1.0)
        plain = task.losses(pretrain_language.BUCKETS)["loss"]
    assert all(weights is LOOKUP_MIX for weights in drawn)
    assert weighted != plain


def test_every_cycle_of_the_schedule_starts_and_ends_alike():
    shares = [_share_of_peak(step, (6, 9), warmup_steps=2) for step in range(15)]
    assert shares[:2] == shares[6:8] == [0.5, 1.0]
    assert max(shares) == shares[1] == shares[2]
    assert shares[5] > shares[14] > 0.02
    assert shares[:6] == [_share_of_peak(step, (6,), warmup_steps=2) for step in range(6)]


def test_a_shipped_stage_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "DATA", tmp_path / "data")
    monkeypatch.setattr(backbones, "BACKBONES", tmp_path / "data/backbones")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=0)).half()
    start = save_checkpoint(
        tmp_path / "start", model, TinyGPTVProcessor.from_config(model.config, tiny_tokenizer()), {}
    )
    backbones.ship_backbones(start)
    with pytest.raises(ValueError, match=r"the shipped weights .* are missing .* check \.rayignore"):
        backbones.shipped_model()

    stage = RECIPES["mini"][3]
    trained, processor, _ = load_checkpoint(backbones.write_checkpoint(tmp_path / "stage0"), dtype=torch.float32)
    trained.set_image_size(stage.image_size - stage.image_size % 14)
    trained.add_lora(stage.lora_rank, stage.lora_alpha, stage.lora_dropout)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name or "projector" in name:
                parameter.normal_(0, 0.02)
    monkeypatch.setattr(
        "tinygptv.miniature.backbones.RECIPES", {"mini": (*RECIPES["mini"][:3], _with_size(stage, trained))}
    )
    checkpoint = save_checkpoint(
        tmp_path / "stage4", trained, processor, {"title": "multi-task", "init_from": "secret"}
    )
    place = backbones.ship_stage(checkpoint, 4)
    assert "secret" not in (place / "stage.json").read_text()
    served = load_checkpoint(backbones.shipped_model())[0]
    for (name, ours), theirs in zip(trained.named_parameters(), served.parameters(), strict=True):
        assert torch.equal(ours.half(), theirs.half()), name


def _with_size(stage, model):
    from dataclasses import replace

    return replace(stage, image_size=model.config.vision_config.image_size)


def test_unknown_task_is_refused():
    with pytest.raises(SettingsError, match="choose one of"):
        jobs.run_miniature(MiniatureSettings(task="paint", tracking_uri="none"))
    with pytest.raises(SettingsError, match="backbones=DIR"):
        jobs.run_miniature(MiniatureSettings(task="ship", tracking_uri="none"))


@pytest.mark.skipif(not backbones.shipped_stages(), reason="the miniature's stages are not shipped")
def test_the_shipped_model_becomes_a_checkpoint_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = backbones.shipped_model()
    assert folder.parent == tmp_path / "tinygptv" and (folder / "manifest.json").is_file()
    model, _, metadata = load_checkpoint(folder, dtype=torch.float32)
    assert model.config.lora_rank and metadata["stage"] == backbones.shipped_stages()[-1]
    assert backbones.shipped_model() == folder
