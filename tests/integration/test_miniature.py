"""The miniature's backbones from nothing: a few steps of pretraining, a checkpoint, package data."""

from __future__ import annotations

import functools

import torch

from pipelines.miniature import jobs
from pipelines.settings import MiniatureSettings
from tinygptv.checkpoint.checkpoint import load_checkpoint
from tinygptv.miniature import backbones, pretrain_language


def test_job_runs_a_few_steps_and_ships_what_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "DATA", tmp_path / "data")
    monkeypatch.setattr(backbones, "BACKBONES", tmp_path / "data/backbones")
    monkeypatch.setattr(jobs, "HELD_OUT_SCENES", 8)
    monkeypatch.setattr(pretrain_language, "EVALUATED_KINDS", ())
    quick = functools.partial(pretrain_language.train_tokenizer, num_documents=400)
    monkeypatch.setattr(pretrain_language, "train_tokenizer", quick)
    common = {"tracking_uri": "none", "quiet": True, "output": str(tmp_path / "out")}
    result = jobs.run_miniature(MiniatureSettings(task="pretrain", max_steps=1, **common))
    model, processor, metadata = load_checkpoint(result["checkpoint"])
    assert model.config.lora_rank == 0
    assert metadata["seed"] == 0
    assert processor.tokenizer.bos_token_id == 0

    shipped = jobs.run_miniature(MiniatureSettings(task="ship", backbones=result["checkpoint"], **common))
    assert shipped["bytes"] < 10e6
    again = backbones.write_checkpoint(tmp_path / "again")
    for ours, theirs in zip(model.parameters(), load_checkpoint(again)[0].parameters(), strict=True):
        assert torch.equal(ours.half(), theirs.half())
