"""The memory plan: its counts are those of the model, its activations those that autograd keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from pipelines.settings import PlanMemorySettings
from pipelines.training.memory_plan import plan_memory
from tinygptv.data.sample import TextLimits
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.memory_plan import GIB, TrainingMemory, inference_memory, layer_activation_bytes, parse_bytes
from tinygptv.training.stages import get_stage, set_trainable

TOKENS = 48


def kept_bytes(config, dtype, *, checkpointing=False):
    """Bytes of the storages that autograd keeps for one sequence, weights not counted."""
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        if not re.search(r"projector|lora_|_layernorm|rmsnorm", name):
            parameter.data = parameter.data.to(dtype)
    set_trainable(model, ("projector", "language_norms", *(("lora",) if config.lora_rank else ())))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps the address taken
        return tensor

    embeds = torch.randn(1, TOKENS, config.text_config.hidden_size, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_counted_activations_are_what_autograd_keeps(rank, dtype):
    """The difference of models of 5 and 2 layers is that of 3 layers, whatever the ends keep."""
    text = dict(tiny_config().text_config.to_dict(), hidden_size=64, intermediate_size=160, num_attention_heads=4)
    small, large = (tiny_config(text_config={**text, "num_hidden_layers": depth}, lora_rank=rank) for depth in (2, 5))
    kept = (kept_bytes(large, dtype) - kept_bytes(small, dtype)) / 3 / TOKENS
    # autocast also keeps one cast copy of each adapter matrix for the whole forward pass
    copies = 2 * rank * (64 + 192 + 64 + 64) / TOKENS if dtype == torch.bfloat16 else 0
    counted = layer_activation_bytes(large.text_config, rank, dtype == torch.bfloat16, 0.0)
    assert kept == pytest.approx(counted + copies, rel=0.03)


def test_checkpointing_keeps_the_residual_alone():
    config = tiny_config(lora_rank=0)
    small, large = (
        tiny_config(text_config={**config.text_config.to_dict(), "num_hidden_layers": depth}, lora_rank=0)
        for depth in (2, 5)
    )
    kept = kept_bytes(large, torch.float32, checkpointing=True) - kept_bytes(small, torch.float32, checkpointing=True)
    assert kept / 3 / TOKENS == pytest.approx(4 * config.text_config.hidden_size, rel=0.05)


def test_weights_gradients_and_optimizer_of_the_paper():
    """Bytes follow from the release's parameter table: 2 per frozen parameter, 4 + 4 + 8 per trained one."""
    stage = get_stage("paper", 2)
    plan = TrainingMemory(paper(stage), stage).plan(1)
    assert plan.gradients == 4 * 45_266_944 and plan.optimizer == 8 * 45_266_944
    biases = 92_160 - 87_040 + 2560 * 33  # of norms: float32, but frozen
    assert sum(plan.weights.values()) == 2 * 3_915_931_008 + 2 * (45_266_944 + biases)
    warm_up = get_stage("paper", 1)
    assert TrainingMemory(paper(warm_up), warm_up).plan(1).optimizer == 8 * 13_809_664


def paper(stage):
    from pipelines.training.memory_plan import recipe_config

    return recipe_config("paper", stage)


@pytest.fixture(scope="module")
def memory():
    stage = replace(get_stage("paper", 3), image_size=28, limits=TextLimits(160))
    return TrainingMemory(tiny_config(), stage)


def test_largest_micro_batch_is_the_last_that_fits(memory):
    for checkpointing in (False, True):
        capacity = memory.plan(7, gradient_checkpointing=checkpointing).peak
        assert memory.largest_micro_batch(capacity, gradient_checkpointing=checkpointing) == 7
        assert memory.largest_micro_batch(capacity - 1, gradient_checkpointing=checkpointing) == 6
    assert memory.largest_micro_batch(1000) == 0


def test_what_saves_memory_saves_it(memory):
    plain, checkpointed = memory.plan(64), memory.plan(64, gradient_checkpointing=True)
    assert checkpointed.activations < plain.activations and checkpointed.weights == plain.weights
    half, full = inference_memory(tiny_config(), bf16()), inference_memory(tiny_config(), dict.fromkeys(bf16(), "full"))
    assert half.peak < full.peak and half.gradients == half.optimizer == 0


def bf16():
    from pipelines.training.memory_plan import INFERENCE_FORMATS

    return INFERENCE_FORMATS["bf16"]


def test_sizes_of_cards():
    assert parse_bytes("24GB") == parse_bytes("24 GiB") == 24 * GIB
    assert parse_bytes("512MB") == 512 * 2**20
    for wrong in ("24", "GB", "-1GB", "0GB", "24TBs"):
        with pytest.raises(ValueError, match="no memory size: write it like 24GB"):
            parse_bytes(wrong)


def test_plan_of_a_recipe(tmp_path):
    plan = plan_memory(PlanMemorySettings(recipe="mini", output=str(tmp_path), gpu="1GB"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written["stages"]) == {"1", "2", "3", "4"} and set(written["inference"]) == {"bf16", "int8", "nf4"}
    for facts in written["stages"].values():
        parts = facts["plain"]
        assert parts["peak"] == sum(parts["weights"].values()) + sum(
            parts[name] for name in ("gradients", "optimizer", "activations", "workspace", "cuda_context")
        )
        assert facts["largest_micro_batch"]["checkpointing"] >= facts["largest_micro_batch"]["plain"]
    assert len(plan["table"].splitlines()) == 2 + 8 + 3 + 3
    with pytest.raises(ValueError, match="recipe is 'none'"):
        plan_memory(PlanMemorySettings(recipe="none", output=str(tmp_path)))
