"""The plan of a stage as text: every value stands beside its own name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines.settings import TrainSettings
from pipelines.training import describe as module
from pipelines.training.describe import _data_lines, _memory_lines, _parameter_lines, _stage_lines, model_config
from tinygptv.config import TinyGPTVConfig
from tinygptv.miniature.tiny import tiny_config
from tinygptv.training.memory_plan import GIB, MemoryPlan, TrainingMemory
from tinygptv.training.schedule import Schedule
from tinygptv.training.stages import StageSource, get_stage

SCHEDULE = Schedule("warmup_decay", 2e-3, 1e-4, 3e-4, 30, steps_per_epoch=1100, epochs=8)
STAGE = replace(
    get_stage("mini", 4),
    sources=(StageSource("a", 3, 1), StageSource("b", 1, 4)),
    draws_per_step=2,
    schedule=SCHEDULE,
    trainable=("projector", "lora"),
    lora_rank=6,
    lora_alpha=5,
    lora_dropout=0.25,
    weight_decay=0.07,
    beta2=0.97,
    max_grad_norm=0.9,
)


def rows(lines):
    return {line[:18].strip(): line[18:] for line in lines}


def test_what_a_stage_does_line_by_line():
    settings = TrainSettings(
        recipe="mini",
        seed=9,
        init_from="start",
        output="out",
        num_workers=3,
        micro_batch_size=5,
        precision="bf16",
        encoder_precision="fp32",
        attention="eager",
        features="cached",
        packing=True,
        gradient_checkpointing=True,
        compile="off",
        checkpoint_every=40,
        guard="rollback",
        storage_path="s3://bucket",
    )
    stage = replace(STAGE, sources=(*STAGE.sources, StageSource("c", 1, 2)))
    assert rows(_stage_lines(settings, stage)) == {
        "stage": f"4 ({STAGE.title}), recipe mini, seed 9",
        "trains": "projector, lora",
        "start": "start",
        "image side": "128 px",
        "template": "human, at most 128 tokens of text",
        "steps": "8,800 of 8 x 1,100",
        "samples per step": "2 to 8, over 3 worker(s) by 5",
        "learning rate": "warmup_decay: peak 0.002, minimum 0.0001, warmup_start 0.0003, warm-up 30 steps",
        "optimizer": "AdamW, weight decay 0.07, beta2 0.97, clip 0.9",
        "LoRA": "rank 6, alpha 5, dropout 0.25",
        "precision": "bf16, encoder fp32, frozen weights full, attention eager, features cached, packing True, "
        "gradient checkpointing True, compile off",
        "checkpoints": "every 40 steps in s3://bucket",
        "guard": "rollback",
    }


@pytest.mark.parametrize(("asked", "steps"), [(0, "8,800"), (7, "7"), (9000, "8,800")])
def test_what_is_not_given_is_told_so(asked, steps):
    stage = replace(STAGE, lora_rank=0, sources=STAGE.sources[1:])
    found = rows(_stage_lines(TrainSettings(max_steps=asked, num_workers=0, output="out"), stage))
    assert found["start"] == "not given (init_from=DIR)" and found["LoRA"] == "none"
    assert found["samples per step"] == "8, over 1 worker(s) by auto" and found["steps"].startswith(f"{steps} of ")
    assert found["checkpoints"].endswith(" in out") and found["precision"].startswith("fp32, encoder fp32,")


def test_parameters_are_counted_by_part_and_in_all():
    stage = replace(STAGE, trainable=("projector",))
    head, *parts, total = _parameter_lines(tiny_config(), stage)
    assert head.split() == ["part", "parameters", "trainable"]
    counts = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in parts}
    assert list(counts) == ["vision_encoder", "qformer", "projector", "language_model", "lm_head"]
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [
        int(n.replace(",", "")) for n in total.split()[1:]
    ]
    assert counts["projector"][0] == counts["projector"][1] > 0
    assert [trains for _, trains in counts.values()].count(0) == 4


@pytest.mark.parametrize(
    ("gpu", "size", "title"),
    [(False, "auto", "a CPU, 8 samples"), (True, 3, "a GPU, 3 samples"), (True, 99, "a GPU, 8")],
)
def test_memory_has_each_kind_in_its_own_line(monkeypatch, gpu, size, title):
    plan = MemoryPlan({"x": GIB, "y": GIB}, 3 * GIB, 4 * GIB, 5 * GIB, 6 * GIB, 7 * GIB)
    asked = []
    monkeypatch.setattr(TrainingMemory, "plan", lambda self, samples: asked.append(samples) or plan)
    settings = TrainSettings(use_gpu=gpu, micro_batch_size=size, precision="bf16", gradient_checkpointing=True)
    head, *lines = _memory_lines(settings, tiny_config(), STAGE)
    assert head.endswith(f": {module.computation_of(settings)}") and "bf16" in head
    assert head.startswith(f"memory of a worker on {title}") and asked == [8 if size != 3 else 3]
    assert f"of {TrainingMemory(tiny_config(), STAGE).num_tokens} tokens at a time" in head
    assert [(line.split()[0], line.split()[1]) for line in lines] == [
        ("weights", "2.00"),
        ("gradients", "3.00"),
        ("optimizer", "4.00"),
        ("activations", "5.00"),
        ("workspace", "6.00"),
        ("allocator", "7.00"),
        ("peak", "27.50"),
    ]


def test_data_has_its_share_and_its_rows(monkeypatch):
    shards = {"a": SimpleNamespace(shard_rows=(1000, 234)), "b": SimpleNamespace(shard_rows=(5,))}
    monkeypatch.setattr(module, "open_shards", lambda *given: shards if given == ("data", STAGE) else {})
    lines = [line.split() for line in _data_lines(TrainSettings(data="data"), STAGE)]
    assert lines == [
        ["source", "share", "at", "a", "time", "rows"],
        ["a", "75.0%", "1", "1,234"],
        ["b", "25.0%", "4", "5"],
    ]


@pytest.mark.parametrize(("data", "told"), [("", "data is not given (data=DIR)"), ("gone", "it is not there")])
def test_data_that_is_not_there_is_told_below_the_sources(monkeypatch, data, told):
    def missing(data, stage):
        raise FileNotFoundError("it is not there")

    monkeypatch.setattr(module, "open_shards", missing)
    _, *sources, note = _data_lines(TrainSettings(data=data), STAGE)
    assert note == told and [line.split()[-1] for line in sources] == ["?", "?"]


@pytest.mark.parametrize(("start_rank", "rank"), [(0, 6), (3, 3)])
def test_the_model_is_the_starts_at_the_stages_image_size(monkeypatch, start_rank, rank):
    start = tiny_config()
    start.lora_rank = start_rank
    monkeypatch.setattr(module, "local_checkpoint", lambda location, *, weights: (location, weights))
    monkeypatch.setattr(module, "read_config", lambda place: start if place == ("start", False) else None)
    found = model_config(TrainSettings(init_from="start"), STAGE)
    assert found is start and (found.vision_config.image_size, found.lora_rank) == (128, rank)
    for recipe, size in (("mini", TinyGPTVConfig.mini), ("paper", TinyGPTVConfig.phi2)):
        own = model_config(TrainSettings(recipe=recipe), STAGE)
        assert own.to_dict() == size(image_size=128, lora_rank=6).to_dict()


def test_blocks_are_apart(monkeypatch):
    settings = TrainSettings(seed=5)
    names = {id(settings): "settings", id(STAGE): "stage"}
    monkeypatch.setattr(module, "model_config", lambda *given: " of ".join(names[id(each)] for each in given))
    for name in ("_stage_lines", "_parameter_lines", "_memory_lines", "_data_lines"):
        monkeypatch.setattr(module, name, lambda *a, name=name: [name, *(names.get(id(each), each) for each in a)])
    assert module.describe_stage(settings, STAGE) == (
        "_stage_lines\nsettings\nstage\n\n_parameter_lines\nsettings of stage\nstage\n\n"
        "_memory_lines\nsettings\nsettings of stage\nstage\n\n_data_lines\nsettings\nstage"
    )
