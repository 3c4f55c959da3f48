"""The memory plan as a report: which stage, card and setting each number is of, and where it stands in the table."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pipelines.settings import PlanMemorySettings, TrainSettings
from pipelines.training import memory_plan as module
from pipelines.training.fit import computation_of
from tinygptv.config import TinyGPTVConfig
from tinygptv.training.memory_plan import GIB, MemoryPlan
from tinygptv.training.stages import get_stage


def entry(first, fits):
    names = ("gradients", "optimizer", "activations", "workspace", "margin", "peak")
    sizes = {name: (first + place) * GIB for place, name in enumerate(names, 1)}
    return {"weights": {"a": first * GIB // 2, "b": first * GIB // 2}, **sizes, "fits": fits}


@pytest.mark.parametrize(("checkpointing", "marks"), [(False, "* "), (True, " *")])
def test_the_table_has_each_number_below_its_name(checkpointing, marks):
    settings = PlanMemorySettings(recipe="mini", gpu="24GB", inference_gpu="8GB", context_length=900)
    train = TrainSettings(gradient_checkpointing=checkpointing, micro_batch_size=6)
    stage = {
        "micro_batch_size": 6,
        "tokens_per_sample": 160,
        "plain": entry(1, fits=False),
        "checkpointing": entry(11, fits=True),
        "largest_micro_batch": {"plain": 4, "checkpointing": 77},
        "largest_tokens": {"plain": 1234, "checkpointing": 56789},
    }
    report = {"stages": {"3": stage}, "inference": {"int8": entry(21, fits=True)}}
    first, units, head, *rows, gap, answering, formats, int8 = module._table(settings, train, report).splitlines()
    assert first == f"training, recipe mini, on 24GB: {computation_of(train)}, micro_batch_size=6"
    assert units.startswith("GiB; ") and units.endswith("; * as configured") and gap == ""
    columns = ["weights", "gradients", "optimizer", "activations", "workspace", "margin", "peak", "fits"]
    assert head.split() == ["stage", "micro-batch", *columns, "largest", "micro-batch", "tokens"]
    assert rows[0].split() == ["3", "6", *f"{marks[0]}plain".split(), *texts(1), "no", "4", "1,234"]
    assert rows[1].split() == ["3", "6", *f"{marks[1]}checkpointing".split(), *texts(11), "yes", "77", "56,789"]
    assert answering == "answering, 900 tokens, one request, on 8GB"
    assert formats.split() == ["weights", "as", *columns] and int8.split() == ["int8", *texts(21), "yes"]
    assert head.index("tokens") + len("tokens") == len(rows[0]) == len(rows[1]) and len(formats) == len(int8)


def texts(first):
    return [f"{first + place}.00" for place in range(7)]


def test_a_report_is_of_its_recipe_and_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(module, "_plan_stage", lambda *given: asked.append(given) or f"stage {given[1].number}")
    monkeypatch.setattr(module, "_plan_inference", lambda *given: asked.append(given) or "answers")
    monkeypatch.setattr(module, "_table", lambda *given: asked.append(given) or "the table")
    settings = PlanMemorySettings(recipe="paper", gpu="24GB", inference_gpu="8GB", context_length=900)
    train = settings.train_settings()
    found = module.plan_memory(settings)
    assert [given[1:] for given in asked[:4]] == [(get_stage("paper", n), 24 * GIB) for n in (1, 2, 3, 4)]
    assert all(given[0] == train for given in asked[:4])
    assert asked[4:7] == [(settings, formats, 8 * GIB) for formats in module.INFERENCE_FORMATS.values()]
    report = {
        "gpu_bytes": 24 * GIB,
        "inference_gpu_bytes": 8 * GIB,
        "computation": vars(computation_of(train)),
        "precision": train.precision,
        "features": train.features,
        "context_length": 900,
        "stages": {str(number): f"stage {number}" for number in (1, 2, 3, 4)},
        "inference": dict.fromkeys(("bf16", "int8", "nf4"), "answers"),
    }
    path = tmp_path / "outputs/paper/plan_memory/result.json"
    assert json.loads(path.read_text()) == report and asked[7] == (settings, train, report)
    assert found == {**report, "table": "the table", "result": str(path)}
    with pytest.raises(ValueError, match=r"^recipe is 'none'; known recipes: \['mini', 'paper', 'released'"):
        module.plan_memory(settings.model_copy(update={"recipe": "none"}))


def test_formats_of_answering():
    assert module.INFERENCE_FORMATS["bf16"] == {
        "vision_encoder": "bf16",
        "qformer": "bf16",
        "projector": "full",
        "language_model": "bf16",
        "lm_head": "bf16",
    }
    assert module.INFERENCE_FORMATS["int8"]["language_model"] != module.INFERENCE_FORMATS["nf4"]["language_model"]
    assert all(set(formats) == set(module.INFERENCE_FORMATS["bf16"]) for formats in module.INFERENCE_FORMATS.values())


class Memory:
    """Fits 3 samples of 160 tokens, and twice as many with checkpointing."""

    num_tokens = 160

    def __init__(self, config, stage, computation):
        self.given, self.times = (config, stage, computation), 1

    def computed(self, *, gradient_checkpointing):
        other = Memory(*self.given)
        other.times = 2 if gradient_checkpointing else 1
        return other

    def largest_micro_batch(self, card):
        return 3 * self.times if card == 99 else 0

    def largest_tokens(self, card):
        return self.largest_micro_batch(card) * 160

    def plan(self, samples):
        return MemoryPlan({"a": 0}, 0, 0, 0, 0, samples * 100 // self.times)


@pytest.mark.parametrize(
    ("changes", "card", "size"),
    [
        ({"micro_batch_size": "auto"}, 99, 3),
        ({"micro_batch_size": "auto", "gradient_checkpointing": True}, 99, 6),
        ({"micro_batch_size": 2}, 99, 2),
        ({"micro_batch_size": 500}, 99, 8),
        ({"micro_batch_size": "auto"}, 1, 1),
    ],
)
def test_a_stage_is_planned_with_the_samples_of_a_step_at_most(monkeypatch, changes, card, size):
    made = []
    monkeypatch.setattr(module, "TrainingMemory", lambda *given: made.append(Memory(*given)) or made[0])
    train = TrainSettings(recipe="mini", stage={"lora_rank": 5, "draws_per_step": 8, "sources": SOURCES}, **changes)
    found = module._plan_stage(train, get_stage("mini", 4), card)
    config, stage, computation = made[0].given
    assert (stage.lora_rank, stage.max_step_samples, computation) == (5, 8, computation_of(train))
    assert config.to_dict() == TinyGPTVConfig.mini(image_size=128, lora_rank=5).to_dict()
    assert (found["micro_batch_size"], found["tokens_per_sample"]) == (size, 160)
    largest = {"plain": 3, "checkpointing": 6} if card == 99 else {"plain": 0, "checkpointing": 0}
    assert found["largest_micro_batch"] == largest
    assert found["largest_tokens"] == {name: 160 * count for name, count in largest.items()}
    assert found["plain"] == {**Memory.plan(SimpleNamespace(times=1), size).to_dict(), "fits": False}
    assert found["checkpointing"] == {**Memory.plan(SimpleNamespace(times=2), size).to_dict(), "fits": False}


SOURCES = [{"name": "gqa", "weight": 1, "batch_size": 1}]


def test_answering_is_planned_for_the_last_stage_and_the_length_of_a_conversation(monkeypatch):
    asked = []
    plan = MemoryPlan({"a": 1}, 0, 0, 0, 0, 0)
    monkeypatch.setattr(
        module, "inference_memory", lambda config, *given, **how: asked.append((config, given, how)) or plan
    )
    settings = PlanMemorySettings(recipe="paper", context_length=900)
    found = module._plan_inference(settings, {"lm_head": "bf16"}, plan.peak)
    ((config, given, how),) = asked
    stage = get_stage("paper", 4)
    assert config.to_dict() == TinyGPTVConfig.phi2(image_size=448, lora_rank=stage.lora_rank).to_dict()
    assert (given, how) == (({"lm_head": "bf16"},), {"num_tokens": 900})
    assert found == {**plan.to_dict(), "fits": True}
