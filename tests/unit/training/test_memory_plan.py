"""The memory plan: its counts are those of the model, its activations those that autograd keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipelines.settings import PlanMemorySettings, SettingsError
from pipelines.training.memory_plan import INFERENCE_FORMATS, plan_memory, recipe_config
from tests.saved_activations import TOKENS, adapter_copies, counted, kept_by_autograd
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.flatten import TOKENS_MULTIPLE
from tinygptv.data.sample import TextLimits
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.frozen_linear import FrozenLinear, pack_frozen
from tinygptv.training.memory_plan import GIB, LIBRARY_BYTES, TrainingMemory, inference_memory
from tinygptv.training.stages import get_stage, set_trainable
from tinygptv.training.step_memory import (
    BatchSize,
    Computation,
    attention_workspace_bytes,
    layer_activation_bytes,
    layer_workspace_bytes,
)

TEXT = TinyGPTVConfig.phi2().text_config


@pytest.mark.parametrize("rank", [0, 64])
def test_counted_activations_are_what_autograd_keeps(rank):
    """The difference of models of 3 and 1 layers is that of 2 layers, whatever the ends keep."""
    kept = (kept_by_autograd(3, rank) - kept_by_autograd(1, rank)) / 2 / TOKENS
    assert kept == pytest.approx(counted(rank, 0.0, compiled=False) + adapter_copies(rank), rel=0.005)


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (64, 0.0), (64, 0.1)])
def test_counted_activations_are_what_a_fused_layer_keeps(rank, dropout):
    kept = (kept_by_autograd(3, rank, dropout, fused=True) - kept_by_autograd(1, rank, dropout, fused=True)) / 2
    assert kept / TOKENS == pytest.approx(
        counted(rank, dropout, compiled=False, fused=True) + adapter_copies(rank), rel=0.005
    )


def test_weights_gradients_and_optimizer_of_the_paper():
    """Bytes follow from the release's parameter table: 2 per frozen parameter, 4 + 4 + 8 per trained one."""
    stage = get_stage("paper", 2)
    plan = paper(2).plan(1)
    assert plan.gradients == 4 * 45_266_944 and plan.optimizer == 8 * 45_266_944
    biases = 92_160 - 87_040 + 2560 * 33  # of norms: float32, but frozen
    assert sum(plan.weights.values()) == 2 * 3_915_931_008 + 2 * (45_266_944 + biases)
    assert paper(1).plan(1).optimizer == 8 * 13_809_664
    wide = TrainingMemory(recipe_config("paper", stage), stage).computed(precision="fp32").plan(1)
    assert sum(wide.weights.values()) == 4 * 3_915_931_008


def paper(number, **computation):
    stage = get_stage("paper", number)
    return TrainingMemory(recipe_config("paper", stage), stage, Computation(**computation))


def test_what_fits_is_below_the_capacity_and_the_next_is_not():
    memory = TrainingMemory(tiny_config(), replace(get_stage("paper", 3), image_size=28, limits=TextLimits(160)))
    for checkpointing in (False, True):
        how = memory.computed(gradient_checkpointing=checkpointing)
        capacity = how.plan(7).peak
        assert how.largest_micro_batch(capacity) == 7
        assert how.largest_micro_batch(capacity - 1) == 6
    assert memory.largest_micro_batch(1000) == memory.largest_tokens(1000) == 0


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("features", ["inline", "cached"])
def test_no_batch_of_so_many_tokens_takes_more_than_planned(number, features):
    """However the tokens are shared out over samples."""
    memory = paper(number, features=features)
    tokens = memory.largest_tokens(24 * GIB)
    assert tokens >= memory.largest_micro_batch(24 * GIB) * memory.num_tokens * 0.8
    for length in (34, 60, 200, memory.num_tokens):
        samples = tokens // length
        assert memory.plan(BatchSize(samples, samples * length, samples * (length - 33), samples)).peak <= 24 * GIB


def test_what_saves_memory_saves_it():
    plain = paper(2, compiled=False).plan(64)
    compiled, checkpointed = paper(2).plan(64), paper(2, gradient_checkpointing=True).plan(64)
    assert checkpointed.activations < compiled.activations < 0.8 * plain.activations
    assert checkpointed.weights == compiled.weights == plain.weights
    assert paper(2, on_gpu=False).plan(64).workspace > compiled.workspace + GIB / 2  # logits of all positions
    assert paper(4, features="cached").plan(3).peak <= paper(4).plan(3).peak
    bf16 = INFERENCE_FORMATS["bf16"]
    half, full = inference_memory(tiny_config(), bf16), inference_memory(tiny_config(), dict.fromkeys(bf16, "full"))
    assert half.peak < full.peak and half.gradients == half.optimizer == 0


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_frozen_matrices_in_low_bits_take_what_they_take_packed(form):
    """On a model whose rows are whole blocks of codes, as those of Phi-2 are."""
    text = {**tiny_config().text_config.to_dict(), "hidden_size": 128, "intermediate_size": 256}
    model = TinyGPTVForConditionalGeneration(tiny_config(text_config=text))
    stage = replace(get_stage("paper", 2), image_size=28)
    set_trainable(model, stage.trainable)
    memory = TrainingMemory(model.config, stage, Computation("fp32"))
    full, packed = memory.plan(1), memory.computed(frozen_weights=form).plan(1)
    assert pack_frozen(model, form, torch.device("cpu")) == 4 * text["num_hidden_layers"]
    stored = [
        *model.language_model.parameters(),
        *(b for n, b in model.language_model.named_buffers() if "rotary" not in n),
    ]
    scales = sum(m.out_features * 4 for m in model.modules() if isinstance(m, FrozenLinear))  # and a table of 64 bytes
    assert sum(t.nbytes for t in stored) == pytest.approx(packed.weights["language_model"], abs=scales + 64 * 8)
    others = full.weights.keys() - {"language_model"}
    assert all(packed.weights[name] == full.weights[name] for name in others)
    assert packed.workspace == full.workspace + 2 * 4 * 128 * 256 and packed.activations == full.activations
    assert "frozen weights " + form in str(memory.computed(frozen_weights=form).computation)


def test_eight_gib_are_enough_for_frozen_matrices_of_4_bits():
    """Of stages 1 to 3, and of stage 4 with checkpointing; with full ones, 8 GiB hold not one sample."""
    for number in (1, 2, 3, 4):
        way = {"features": "cached", "fused": True, "gradient_checkpointing": number == 4}
        assert not paper(number, **way).largest_micro_batch(8 * GIB)
        assert paper(number, **way, frozen_weights="nf4").largest_micro_batch(8 * GIB)


def test_checkpointing_keeps_a_residual_per_layer_and_holds_one_layer_for_a_moment():
    plain, checkpointed = (paper(4, features="cached", gradient_checkpointing=on) for on in (False, True))
    batch = plain.longest(2)
    tokens = -(-batch.tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    layer = tokens * layer_activation_bytes(plain.config.text_config, 64, 0.05, half=True, compiled=True)
    residual = 4 * tokens * 2560
    kept = plain.plan(batch).activations - checkpointed.plan(batch).activations
    assert kept == 32 * (layer - residual)
    workspaces = [how.plan(batch).workspace for how in (plain, checkpointed)]
    backward = tokens * layer_workspace_bytes(TEXT) + attention_workspace_bytes(TEXT, batch) + LIBRARY_BYTES
    assert workspaces[1] == backward + layer
    assert workspaces[0] >= backward


def test_plan_of_a_recipe(tmp_path):
    plan = plan_memory(PlanMemorySettings(recipe="mini", output=str(tmp_path), gpu="1GB"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written["stages"]) == {"1", "2", "3", "4"} and set(written["inference"]) == {"bf16", "int8", "nf4"}
    for entry in written["stages"].values():
        parts = entry["plain"]
        assert parts["peak"] == sum(parts["weights"].values()) + sum(
            parts[name] for name in ("gradients", "optimizer", "activations", "workspace", "margin", "cuda_context")
        )
        assert entry["largest_micro_batch"]["checkpointing"] >= entry["largest_micro_batch"]["plain"]
    assert len(plan["table"].splitlines()) == 3 + 8 + 3 + 3
    with pytest.raises(ValueError, match="recipe is 'none'"):
        plan_memory(PlanMemorySettings(recipe="none", output=str(tmp_path)))


def test_the_plan_reads_how_the_stages_will_be_trained(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("recipe: paper\ntrain:\n  precision: bf16\n  features: cached\n  micro_batch_size: 16\n")
    settings = PlanMemorySettings.load(config, [f"output={tmp_path}", "train.compile=off"])
    plan = plan_memory(settings)
    assert plan["computation"] == {
        "precision": "bf16",
        "features": "cached",
        "compiled": False,
        "gradient_checkpointing": False,
        "on_gpu": True,
        "fused": True,
        "flat": True,
        "frozen_weights": "full",
    }
    assert [entry["micro_batch_size"] for entry in plan["stages"].values()] == [16, 16, 6, 3]
    first = plan["table"].splitlines()[0]
    assert "features cached, layers not compiled" in first and "micro_batch_size=16" in first

    changed = [f"output={tmp_path}", "features=inline", "train.micro_batch_size=auto", "gpu=80GB"]
    plan = plan_memory(PlanMemorySettings.load(config, changed))
    assert plan["features"] == "inline" and plan["stages"]["2"]["micro_batch_size"] == 64
    with pytest.raises(SettingsError, match=r"unknown key 'compil'.*did you mean 'compile'"):
        PlanMemorySettings.load(config, ["train.compil=off"])
