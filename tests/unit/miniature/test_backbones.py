"""The backbones' pretraining runs, resumes to the same numbers, and what it makes becomes package data."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.miniature import jobs
from pipelines.settings import MiniatureSettings, SettingsError
from tinygptv.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.checkpoint.weight_files import open_weights
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


def test_words_and_numbers_are_one_token_each_and_the_end_is_number_0(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.model_max_length == 512 and 256 < len(tokenizer) <= 600
    for word in [*map(str, range(101)), " red", " circle", " striped", " small", "?"]:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    text = "[vqa] what color is the star?### red###"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


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
        losses.append(loss.item())
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

    stage = RECIPES["mini"][2]
    trained, processor, _ = load_checkpoint(backbones.write_checkpoint(tmp_path / "stage0"), dtype=torch.float32)
    trained.set_image_size(stage.image_size - stage.image_size % 14)
    trained.add_lora(stage.lora_rank, stage.lora_alpha, stage.lora_dropout)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name or "projector" in name:
                parameter.normal_(0, 0.02)
    stages = (*RECIPES["mini"][:2], _with_size(stage, trained), RECIPES["mini"][3])
    monkeypatch.setattr("tinygptv.miniature.backbones.RECIPES", {"mini": stages})
    checkpoint = save_checkpoint(
        tmp_path / "stage3", trained, processor, {"title": "multi-task", "init_from": "secret"}
    )
    place = backbones.ship_stage(checkpoint, 3)
    assert "secret" not in (place / "stage.json").read_text() and backbones.shipped_stages() == [3]
    stored = load_file(place / "trained.safetensors")
    trains = [n for n, _ in trained.named_parameters() if ".lora_" in n or n.startswith("projector.") or "norm" in n]
    assert set(stored) <= set(trains) and any(".lora_A" in n for n in stored) and "projector.linear_2.bias" in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    folder = backbones.shipped_model()
    assert {tensor.load().dtype for tensor in open_weights(folder).values()} == {torch.float32}
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert backbones.write_checkpoint(folder) == folder, "whatever stage it is"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == kept
    served, served_processor, metadata = load_checkpoint(folder)
    for (name, ours), theirs in zip(trained.named_parameters(), served.parameters(), strict=True):
        assert torch.equal(ours.half(), theirs.half()), name
    size = trained.config.vision_config.image_size
    assert (served.config.vision_config.image_size, served_processor.template) == (size, stage.template)
    assert metadata["title"] == "multi-task" and "init_from" not in json.loads((place / "stage.json").read_text())
    with pytest.raises(ValueError, match=r"stage 4 of the miniature is not shipped; shipped: \[3\]"):
        backbones.write_checkpoint(tmp_path / "none", 4)
    (place / "of_another_run").touch(), (tmp_path / "data/backbones/of_another_run").touch()
    assert backbones.ship_stage(checkpoint, 3) == place and backbones.ship_backbones(start).is_dir()
    assert not [*(tmp_path / "data").rglob("of_another_run")], "what was shipped before is gone"
    assert sorted(path.name for path in place.iterdir()) == ["stage.json", "trained.safetensors"]
    save_file({**stored, "projector.linear_9.bias": torch.ones(1)}, place / "trained.safetensors")
    with pytest.raises(ValueError, match=r"stage3 does not fit the shipped backbones: projector\.linear_9\.bias\."):
        backbones.shipped_model()

    (start / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        backbones.ship_backbones(start)
    assert (tmp_path / "data/backbones/config.json").read_text() != "{}", "what is shipped stays as it was"


def test_backbones_are_pretrained_at_the_sizes_of_those_that_are_shipped():
    shipped = TinyGPTVConfig.from_pretrained(backbones.BACKBONES).to_dict()
    fresh = TinyGPTVConfig.mini(vocab_size=shipped["text_config"]["vocab_size"], lora_rank=0).to_dict()
    for name in ("vision_config", "qformer_config", "text_config"):
        assert {key: fresh[name][key] for key in fresh[name] if "dtype" not in key} == {
            key: value for key, value in shipped[name].items() if "dtype" not in key
        }
    for key in ("num_query_tokens", "projector_hidden_size", "image_token_id"):
        assert fresh[key] == shipped[key]


def test_pretrained_parts_become_a_checkpoint_in_float16(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(lora_rank=0)
    source = TinyGPTVForConditionalGeneration(config)
    vision = torch.nn.ModuleDict(
        {"vision_encoder": source.vision_encoder, "qformer": source.qformer, "heads": torch.nn.Linear(2, 2)}
    )
    language = torch.nn.ModuleDict({"language_model": source.language_model, "lm_head": source.lm_head})
    metadata = {"title": "backbones"}
    folder = backbones.assemble_backbones(tmp_path / "a", config, vision, language, tiny_tokenizer(), metadata)
    assert folder == tmp_path / "a"
    stored = {name: tensor.load() for name, tensor in open_weights(folder).items()}
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    for name, tensor in source.named_parameters():
        if not name.startswith("projector."):
            assert torch.equal(stored[name], tensor.half()), name
    assert load_checkpoint(folder)[2]["title"] == "backbones"


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
