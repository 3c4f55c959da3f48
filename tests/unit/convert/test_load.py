"""Models from matched files: what is handed on, what starts fresh and how, and buffers that no file holds."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from tinygptv.convert import load
from tinygptv.convert.match import LoadReport
from tinygptv.miniature.tiny import tiny_config


def test_what_is_given_reaches_the_match_and_the_report_stays_with_the_model(monkeypatch):
    asked, report = [], LoadReport()

    class Model(nn.Linear):
        load_report = None

    model = Model(1, 1).train()
    release = SimpleNamespace(config="config", report=report, tensors=lambda dtype: [("file", dtype)])
    monkeypatch.setattr(load, "match_release", lambda *given: asked.append(given) or release)
    monkeypatch.setattr(load, "build_on_meta", lambda config: {"config": model}[config])
    monkeypatch.setattr(load, "build_fresh", lambda release, dtype: [("fresh", dtype)])
    monkeypatch.setattr(load, "build_from_tensors", lambda model, tensors: asked.append(list(tensors)) or model)
    found = load.load_release("v", "q", "l", "p", "c", 448, 4, 5, 7, torch.float16)
    assert asked == [("v", "q", "l", "p", "c", 448, 4, 5, 7), [("file", torch.float16), ("fresh", torch.float16)]]
    assert found is model and found.load_report is report and not found.training
    load.load_release()
    assert asked[2:] == [(*[None] * 8, 16), [("file", torch.float32), ("fresh", torch.float32)]]


def test_what_starts_fresh_is_what_a_new_model_has(monkeypatch):
    config = tiny_config(lora_rank=0)
    config.initializer_range = 0.5
    matrix = load._fresh("projector.linear_1.weight", (200, 100), config)
    assert matrix.shape == (200, 100) and 0.45 < matrix.std() < 0.55 and abs(matrix.mean()) < 0.05
    assert load._fresh("a.bias", (3,), config).tolist() == [0, 0, 0]
    assert load._fresh("a_layernorm.weight", (3,), config).tolist() == [1, 1, 1]
    names = ["projector.linear_2.bias", "language_model.layers.0.self_attn.q_layernorm.weight", "lm_head.bias"]
    shapes = dict.fromkeys([*names, "other"], (2,))
    monkeypatch.setattr(load, "tensor_shapes", lambda config: shapes)
    release = SimpleNamespace(config=config, report=LoadReport(fresh=names))
    found = dict(load.build_fresh(release, torch.bfloat16))
    assert list(found) == names
    assert [tensor.dtype for tensor in found.values()] == [torch.float32, torch.float32, torch.bfloat16]


def test_buffers_that_no_file_holds_are_computed_again():
    text = tiny_config().text_config
    wanted = PhiRotaryEmbedding(text)
    with torch.device("meta"):
        rotary, layer = PhiRotaryEmbedding(text), nn.Linear(2, 2)
        layer.register_buffer("zeros", torch.ones(3, dtype=torch.int32), persistent=False)
    layer.register_buffer("kept", torch.ones(3), persistent=False)
    model = nn.Sequential(rotary, layer)
    tensors = {"1.weight": torch.ones(2, 2).half(), "1.bias": torch.ones(2).half()}
    assert load.build_from_tensors(model, iter(tensors.items())) is model
    assert torch.equal(rotary.inv_freq, wanted.inv_freq) and torch.equal(rotary.original_inv_freq, wanted.inv_freq)
    assert rotary.original_inv_freq is not rotary.inv_freq
    assert layer.zeros.tolist() == [0, 0, 0] and layer.zeros.dtype == torch.float16 and layer.kept.tolist() == [1, 1, 1]
    assert layer.weight is model[1].weight and layer.weight.dtype == torch.float16
    alone = nn.Module()
    alone.register_buffer("zeros", torch.ones(3, dtype=torch.int32, device="meta"))
    load.rebuild_buffers(alone)
    assert alone.zeros.tolist() == [0, 0, 0] and alone.zeros.dtype == torch.int32
