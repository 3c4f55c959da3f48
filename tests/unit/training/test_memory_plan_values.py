"""The memory plan by hand: each term of a step's memory with its own numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from pipelines.settings import PlanMemorySettings, TrainSettings
from pipelines.training import memory_plan as report
from tinygptv.config import TinyGPTVConfig
from tinygptv.data.sample import TextLimits
from tinygptv.miniature.tiny import tiny_config
from tinygptv.training import memory_plan as module
from tinygptv.training import step_memory
from tinygptv.training.memory_plan import (
    CUDA_CONTEXT_BYTES,
    GIB,
    LIBRARY_BYTES,
    MemoryPlan,
    TrainingMemory,
    _largest,
    inference_memory,
)
from tinygptv.training.stages import get_stage
from tinygptv.training.step_memory import (
    BatchSize,
    Computation,
    attention_workspace_bytes,
    encoder_workspace_bytes,
    head_workspace_bytes,
    layer_activation_bytes,
    layer_workspace_bytes,
)

PHI = TinyGPTVConfig.phi2().text_config
STAGE = replace(get_stage("paper", 2), image_size=28, limits=TextLimits(30), lora_rank=4, lora_dropout=0.0)


def test_a_plan_adds_up():
    plan = MemoryPlan({"a": 1, "b": 10}, 100, 1000, 10_000, 100_000, 1_000_000)
    assert (plan.allocated, plan.peak) == (111_111, 1_111_111 + CUDA_CONTEXT_BYTES)
    assert plan.to_dict() == {
        "weights": {"a": 1, "b": 10},
        "gradients": 100,
        "optimizer": 1000,
        "activations": 10_000,
        "workspace": 100_000,
        "margin": 1_000_000,
        "cuda_context": GIB // 2,
        "peak": plan.peak,
    }
    assert MemoryPlan({}, 0, 0, 0, 0).margin == 0


def test_a_computation_is_that_of_a_gpu_where_nothing_else_is_said():
    assert Computation() == Computation("bf16", "inline", True, False, False, True)


@pytest.mark.parametrize(
    ("precision", "half"), [("fp32", False), ("fp16_range", False), ("bf16", True), ("fp16", True)]
)
def test_a_computation_in_words(precision, half):
    how = Computation(precision=precision, features="cached", compiled=half, gradient_checkpointing=half)
    assert how.half is half
    words = "layers compiled, with" if half else "layers not compiled, without"
    assert str(how) == f"{precision}, features cached, {words} gradient checkpointing"
    frozen = replace(how, frozen_weights="nf4")
    assert str(frozen) == f"{precision}, frozen weights nf4, features cached, {words} gradient checkpointing"


def test_attention_holds_128_rows_more_per_sequence_and_heads_of_whole_32s(monkeypatch):
    monkeypatch.setattr(step_memory, "SEQUENCES_MULTIPLE", 8)
    text = SimpleNamespace(hidden_size=400, num_attention_heads=10)  # heads of 40 numbers: counted as 64
    for samples, sequences in ((7, 8), (8, 16)):
        batch = BatchSize(samples, tokens=1000, positions=3, images=2)
        assert attention_workspace_bytes(text, batch) == 4 * (1000 + 128 * sequences) * 10 * 65
    exact = SimpleNamespace(hidden_size=320, num_attention_heads=10)
    assert attention_workspace_bytes(exact, BatchSize(7, 1000, 3, 2)) == 4 * (1000 + 128 * 8) * 10 * 33


@pytest.mark.parametrize(
    ("changes", "head_trains", "rows", "per_logit"),
    [
        ({"compiled": True}, False, "few", 8),
        ({"compiled": False}, False, "few", 14),
        ({"compiled": True}, True, "all", 12),
        ({"on_gpu": False}, False, "all", 12),
        ({"on_gpu": False, "precision": "fp32"}, False, "all", 8),
    ],
)
def test_logits_of_a_few_rows_are_held_on_a_gpu_with_a_frozen_head(monkeypatch, changes, head_trains, rows, per_logit):
    monkeypatch.setattr(step_memory, "CHUNK_ROWS", 100)
    text = SimpleNamespace(hidden_size=7, vocab_size=11)
    for positions in (99, 101):
        held = min(positions, 100) if rows == "few" else positions
        found = head_workspace_bytes(text, positions, Computation(**changes), head_trains=head_trains)
        assert found == positions * 7 * 6 + held * 11 * per_logit


def text_of(**changes):
    fields = {
        "hidden_size": 10,
        "num_attention_heads": 2,
        "intermediate_size": 30,
        "input_layernorm": False,
        "qk_layernorm": False,
        "attention_rmsnorm": False,
        "resid_pdrop": 0.0,
    }
    return SimpleNamespace(**{**fields, **changes})


PLAIN = 40 + 80 + 8 + 60 + 40
"""Residual, q k v and attention's output, its sums, the MLP's input, q and k after rotation: 16 bits, width 10."""


@pytest.mark.parametrize(
    ("changes", "rank", "dropout", "how", "total"),
    [
        ({}, 0, 0.0, {}, PLAIN),
        ({"input_layernorm": True}, 0, 0.0, {}, PLAIN + 8),
        ({"qk_layernorm": True}, 0, 0.0, {"compiled": True}, PLAIN + 32),
        ({"qk_layernorm": True}, 0, 0.0, {"compiled": False}, PLAIN + 32 + 80),
        ({"qk_layernorm": True}, 0, 0.0, {"compiled": False, "fused": True}, PLAIN),
        ({"attention_rmsnorm": True}, 0, 0.0, {"compiled": True}, PLAIN + 4 + 20),
        ({"attention_rmsnorm": True}, 0, 0.0, {"compiled": False}, PLAIN + 4 + 80),
        ({"attention_rmsnorm": True}, 0, 0.0, {"compiled": False, "fused": True}, PLAIN + 4 + 20),
        ({"resid_pdrop": 0.1}, 0, 0.0, {}, PLAIN + 20),
        ({"resid_pdrop": 0.1}, 0, 0.0, {"fused": True}, PLAIN),
        ({}, 3, 0.0, {}, PLAIN + 12 + 20),
        ({}, 3, 0.1, {}, PLAIN + 12 + 20 + 20 + 20),
        ({}, 3, 0.1, {"fused": True}, PLAIN + 12 + 20 + 20),
        ({}, 3, 0.0, {"half": False}, 40 + 160 + 8 + 120 + 80 + 24 + 40),
        ({"qk_layernorm": True}, 0, 0.0, {"half": False, "compiled": False}, 40 + 160 + 8 + 120 + 80 + 32),
    ],
)
def test_what_a_layer_keeps_of_a_token(changes, rank, dropout, how, total):
    options = {"half": True, "compiled": True, **how}
    assert layer_activation_bytes(text_of(**changes), rank, dropout, **options) == total


def test_a_layers_backward_pass_holds_two_gradients_of_the_residual_and_two_of_the_mlp():
    assert layer_workspace_bytes(PHI) == 2 * 4 * 2560 + 2 * 2 * 10240


def test_what_encoding_an_image_holds():
    """224 px: 257 tokens of 1408 and 6144 numbers, and the image twice in float32."""
    config = TinyGPTVConfig.phi2(image_size=224)
    assert encoder_workspace_bytes(config, 2) == 257 * (2 * (2 * 1408 + 2 * 6144) + 4 * 1408) + 2 * 4 * 3 * 224**2
    assert encoder_workspace_bytes(config, 4) == 257 * (4 * (2 * 1408 + 2 * 6144) + 4 * 1408) + 2 * 4 * 3 * 224**2
    larger = TinyGPTVConfig.phi2(image_size=448)
    assert encoder_workspace_bytes(larger, 2) == 1025 * (2 * (2 * 1408 + 2 * 6144) + 4 * 1408) + 2 * 4 * 3 * 448**2


# ---------------------------------------------------------------------- a whole step


def memory(**computation):
    return TrainingMemory(tiny_config(), STAGE, Computation(**computation))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"features": "cached"},
        {"features": "inline"},
        {"features": "cached", "precision": "fp32", "on_gpu": False, "compiled": False},
    ],
)
def test_a_step_is_the_sum_of_its_terms(monkeypatch, how, checkpointing):
    monkeypatch.setattr(module, "TOKENS_MULTIPLE", 64)
    monkeypatch.setattr(module, "images_at_a_time", lambda config: 2)
    monkeypatch.setattr(module, "encoder_workspace_bytes", lambda config, element: 10**9 * element)
    memory_ = memory(**how, gradient_checkpointing=checkpointing)
    text, batch = memory_.config.text_config, BatchSize(5, 130, 50, 3)
    half, gpu = how.get("precision") != "fp32", how.get("on_gpu", True)
    element, tokens = (2, 192) if half else (4, 130)
    weights, trained, in_matrices, _ = memory_._parameters
    residual = 4 * tokens * text.hidden_size
    layer = tokens * layer_activation_bytes(text, 4, 0.0, half=half, compiled=how.get("compiled", True))
    width = memory_.config.qformer_config.hidden_size + memory_.config.projector_hidden_size
    kept = residual + 3 * memory_.config.num_query_tokens * width * element + (2 * in_matrices if half else 0)
    kept += text.num_hidden_layers * (residual if checkpointing else layer)
    backward = tokens * layer_workspace_bytes(text) + (layer if checkpointing else 0)
    backward += attention_workspace_bytes(text, batch) if gpu else 0
    loss = residual + tokens * text.hidden_size * element
    loss += head_workspace_bytes(text, 50, memory_.computation, head_trains=False)
    moment = max(backward, loss)
    if how["features"] == "inline":
        moment = max(moment, 2 * 10**9 * element - kept)
    moment += LIBRARY_BYTES if gpu else 0
    assert memory_.plan(batch) == MemoryPlan(
        weights, 4 * trained, 8 * trained, kept, moment, int(0.03 * (kept + moment))
    )


def test_the_longest_samples_have_an_image_a_prompt_and_the_most_text():
    plain = memory()
    queries = plain.config.num_query_tokens
    assert plain.num_tokens == 1 + queries + 30, "captions alone have no prompt"
    assert plain.longest(3) == BatchSize(3, 3 * plain.num_tokens, 90, 3)
    assert plain.plan(3) == plain.plan(plain.longest(3))
    asked = replace(STAGE, template="human")
    assert TrainingMemory(tiny_config(), asked).num_tokens == 1 + queries + 64 + 30
    assert TrainingMemory(tiny_config(), asked, prompt_tokens=5).num_tokens == 1 + queries + 5 + 30


@pytest.mark.parametrize(("start", "rank"), [(0, 4), (2, 2)])
def test_sizes_are_the_starts_and_image_and_dropout_the_stages(start, rank):
    config = tiny_config()
    config.lora_rank, config.vision_config.image_size = start, 56
    found = TrainingMemory(config, replace(STAGE, lora_dropout=0.5)).config
    assert (found.lora_rank, found.lora_dropout, found.vision_config.image_size) == (rank, 0.5, 28)
    assert (config.lora_rank, config.vision_config.image_size) == (start, 56), "the given one stays as it is"


def test_another_precision_counts_its_weights_again():
    half, full = memory(), memory(precision="fp32")
    weights = half._parameters[0]
    assert half.computed(precision="fp32")._parameters == full._parameters != half._parameters
    assert half.computed(compiled=False)._parameters is half._parameters and half._parameters[0] == weights
    assert half.computed(compiled=False).computation == replace(half.computation, compiled=False)
    assert half.computation == Computation()


def test_the_largest_that_fits():
    for most in range(12):
        assert _largest(lambda size, most=most: size <= most, 1 << 20) == most
    assert _largest(lambda size: True, 16) == 15, "the bound is never reached"


def test_tokens_are_counted_as_if_every_sample_were_as_short_as_its_image(monkeypatch):
    found = memory()
    shortest, asked = found.config.num_query_tokens + 2, []

    def plan(batch):
        asked.append(batch)
        tokens = batch.tokens if isinstance(batch, BatchSize) else batch * found.num_tokens
        return SimpleNamespace(peak=tokens)

    monkeypatch.setattr(found, "plan", plan)
    assert found.largest_tokens(1000) == 1000
    assert all(each == BatchSize(-(-each.tokens // shortest), each.tokens, each.tokens, each.samples) for each in asked)
    assert (
        found.largest_tokens(found.num_tokens) == found.num_tokens and found.largest_tokens(found.num_tokens - 1) == 0
    )
    assert found.largest_micro_batch(3 * found.num_tokens) == 3
    cheap = {1: SimpleNamespace(peak=9)}
    monkeypatch.setattr(found, "plan", lambda batch: cheap[batch] if isinstance(batch, int) else plan(batch))
    assert found.largest_tokens(found.num_tokens - 1) == found.num_tokens - 1, "one whole sample fits all the same"
    assert found.largest_tokens(8) == 0


def test_answering_holds_weights_a_cache_and_the_larger_of_reading_and_encoding(monkeypatch):
    config = tiny_config()
    config.lora_rank, text = 2, config.text_config
    form = dict.fromkeys(module.PARTS, "full")
    for encoding in (1, 10**12):
        monkeypatch.setattr(module, "encoder_workspace_bytes", lambda config, element, size=encoding: size * element)
        plan = inference_memory(config, form, num_tokens=100, num_images=3)
        reading = 100 * (4 * text.intermediate_size + 20 * text.hidden_size)
        assert plan.workspace == max(reading, 3 * encoding * 2)
        assert plan.activations == 4 * text.num_hidden_layers * text.hidden_size * 100
        assert (plan.gradients, plan.optimizer, plan.margin) == (0, 0, 0)
    assert config.lora_rank == 2, "the caller's own"
    config.lora_rank = 0  # adapters are merged
    numbers = sum(p.numel() for p in module.build_on_meta(config).parameters())
    assert sum(plan.weights.values()) == 4 * numbers and set(plan.weights) == set(module.PARTS)


# ---------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("setting", "checkpointing", "size"), [("auto", False, 4), ("auto", True, 6), (3, False, 3), (99, False, 6)]
)
def test_a_stage_is_planned_for_its_micro_batch(monkeypatch, setting, checkpointing, size):
    planned, made = [], []
    ways = {"plain": 4, "checkpointing": 10}

    class Memory:
        num_tokens = 77

        def __init__(self, *arguments, way=""):
            self.way = way
            made.extend(arguments)

        def computed(self, *, gradient_checkpointing):
            return Memory(way="checkpointing" if gradient_checkpointing else "plain")

        def largest_micro_batch(self, card):
            return ways[self.way] if card == 5 else 0

        def largest_tokens(self, card):
            return 100 * ways[self.way] + card

        def plan(self, samples):
            planned.append((self.way, samples))
            return MemoryPlan({"projector": 1}, 0, 0, 0, 0)

    monkeypatch.setattr(report, "TrainingMemory", Memory)
    changed = {"stage": {"lora_rank": 5, "image_size": 56}}
    train = TrainSettings(micro_batch_size=setting, gradient_checkpointing=checkpointing, **changed)
    stage = replace(get_stage("paper", 3), draws_per_step=1)
    found = report._plan_stage(train, stage, 5)
    assert (found["micro_batch_size"], found["tokens_per_sample"]) == (size, 77)
    assert planned == [("plain", size), ("checkpointing", size)]
    config, changed, how = made
    assert (changed.lora_rank, changed.image_size) == (config.lora_rank, config.vision_config.image_size) == (5, 56)
    assert how == report.computation_of(train)
    assert found["largest_micro_batch"] == ways and found["largest_tokens"] == {"plain": 405, "checkpointing": 1005}
    assert found["plain"]["fits"] is found["checkpointing"]["fits"] is False


def test_a_recipe_has_its_own_model_at_the_stages_size_and_rank():
    stage = replace(get_stage("paper", 3), image_size=56, lora_rank=5)
    for recipe, whole in (("mini", TinyGPTVConfig.mini()), ("paper", TinyGPTVConfig.phi2())):
        found = report.recipe_config(recipe, stage)
        assert found.text_config.hidden_size == whole.text_config.hidden_size
        assert (found.vision_config.image_size, found.lora_rank) == (56, 5)


def test_each_card_is_for_its_own_part_of_the_report(tmp_path, monkeypatch):
    asked = []
    plan = MemoryPlan({"projector": GIB}, 2 * GIB, 0, 0, 0)
    monkeypatch.setattr(report, "_plan_stage", lambda train, stage, card: asked.append((stage.number, card)) or entry)
    configs = []

    def answering(config, formats, *, num_tokens):
        configs.append((config.to_dict(), formats))
        asked.append(num_tokens)
        return plan

    monkeypatch.setattr(report, "inference_memory", answering)
    record = {**plan.to_dict(), "fits": True}
    entry = {
        "micro_batch_size": 5,
        "plain": record,
        "checkpointing": {**record, "fits": False},
        "largest_micro_batch": {"plain": 6, "checkpointing": 7},
        "largest_tokens": {"plain": 1234, "checkpointing": 8},
    }
    settings = PlanMemorySettings(
        recipe="mini", output=str(tmp_path), gpu="3GB", inference_gpu="4GB", context_length=99, features="cached"
    )
    found = report.plan_memory(settings)
    assert asked == [*((number, 3 * GIB) for number in (1, 2, 3, 4)), 99, 99, 99]
    mini = report.recipe_config("mini", get_stage("mini", 4)).to_dict()
    assert configs == [(mini, formats) for formats in report.INFERENCE_FORMATS.values()]
    assert list(found["inference"]) == ["bf16", "int8", "nf4"]
    assert found["result"] == f"{tmp_path}/result.json"
    report_only = {name: value for name, value in found.items() if name not in ("table", "result")}
    assert json.loads((tmp_path / "result.json").read_text()) == report_only
    assert (found["gpu_bytes"], found["inference_gpu_bytes"], found["context_length"]) == (3 * GIB, 4 * GIB, 99)
    train = settings.train_settings()
    assert found["computation"] == asdict(report.computation_of(train)) and found["computation"]["on_gpu"]
    assert (found["precision"], found["features"]) == (train.precision, "cached")
    assert all(each["fits"] for each in found["inference"].values()), "3.5 GiB on a card of 4"
    lines = found["table"].splitlines()
    sizes = ["weights", "gradients", "optimizer", "activations", "workspace", "margin", "peak", "fits"]
    assert lines[2].split() == ["stage", "micro-batch", *sizes, "largest", "micro-batch", "tokens"]
    assert lines[13].split() == ["weights", "as", *sizes]
    assert lines[3].split() == ["1", "5", "*plain", "1.00", "2.00", *["0.00"] * 4, "3.50", "yes", "6", "1,234"]
    assert lines[4].split() == ["1", "5", "checkpointing", "1.00", "2.00", *["0.00"] * 4, "3.50", "no", "7", "8"]
    assert lines[0].startswith("training, recipe mini, on 3GB: ") and lines[12].startswith("answering, 99 tokens, one")
    assert lines[12].endswith(" on 4GB") and lines[14].split()[0] == "bf16" and lines[14].endswith("3.50   yes")


@pytest.mark.parametrize(
    ("name", "shape", "form", "size"),
    [
        ("language_model.layers.0.mlp.fc1.weight", (10, 40), "full", 4.0),
        ("language_model.layers.0.mlp.fc1.weight", (10, 40), "bf16", 2.0),
        ("language_model.layers.0.mlp.fc1.weight", (10, 40), "int8", 1.0 + 4 / 40),
        ("language_model.layers.0.mlp.fc1.weight", (10, 40), "llm_int8", 1.0 + 4 / 40),
        ("language_model.layers.0.mlp.fc1.weight", (10, 40), "int4", 0.5625),
        ("language_model.layers.0.mlp.fc1.bias", (10,), "int8", 2.0),
        ("language_model.layers.0.input_layernorm.weight", (40,), "int8", 4.0),
        ("projector.linear_1.weight", (10, 40), "nf4", 4.0),
        ("vision_encoder.vit.blocks.0.attn.proj.weight", (10, 40), "nf4", 0.5 + 1 / 64 + 4 / (64 * 256)),
        ("language_model.embed_tokens.weight", (10, 40), "int8", 2.0),
    ],
)
def test_only_linear_layers_are_stored_in_their_format(name, shape, form, size):
    assert module._stored_bytes(name, SimpleNamespace(ndim=len(shape), shape=shape), form) == size


def test_padded_batches_on_a_gpu_keep_a_mask_in_each_layer():
    """Without FlashAttention: 2 bytes for each pair of 32 positions of 3 samples, and no fused kernels."""
    batch = BatchSize(3, 96, 6, 3)
    layers = tiny_config().text_config.num_hidden_layers
    flat, padded = (memory(flat=flat).plan(batch) for flat in (True, False))
    assert padded.activations - flat.activations == layers * 3 * 32 * 32 * 2
    assert memory(fused=True, flat=False).plan(batch) == padded
    on_cpu = memory(precision="fp32", on_gpu=False)
    assert on_cpu.plan(batch) == on_cpu.computed(flat=False).plan(batch)
