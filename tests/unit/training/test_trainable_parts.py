"""Each part of a model by the names of its parameters: what trains, and that nothing else does."""

from __future__ import annotations

import pytest
import torch

from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.meta import build_on_meta
from tinygptv.training.optim import build_optimizer
from tinygptv.training.schedule import Schedule
from tinygptv.training.stages import TRAINABLE_PARTS, Stage, StageSource, get_stage, set_trainable

EXPECTED = {
    "projector": lambda name: name.startswith("projector."),
    "lora": lambda name: ".lora_" in name,
    "qk_norms": lambda name: name.endswith((".q_layernorm.weight", ".k_layernorm.weight")),
    "input_norms": lambda name: name.endswith(".input_layernorm.weight"),
    "attention_norms": lambda name: name.endswith(".attention_rmsnorm.weight"),
    "final_norm": lambda name: name.endswith(".final_layernorm.weight"),
    "language_norms": lambda name: name.endswith("norm.weight") and name.startswith("language_model."),
    "qformer": lambda name: name.startswith("qformer."),
    "vision_encoder": lambda name: name.startswith("vision_encoder."),
    "language_model": lambda name: name.startswith(("language_model.", "lm_head.")) and ".lora_" not in name,
}


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    config.lora_rank = 2
    return build_on_meta(config)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("part", sorted(TRAINABLE_PARTS))
def test_a_part_trains_alone(model, part):
    counts = set_trainable(model, (part,))
    named = dict(model.named_parameters())
    expected = {name for name in named if EXPECTED[part](name)}
    assert trained(model) == expected and expected
    assert counts == {part: sum(named[name].numel() for name in expected)}


def test_adapters_train_beside_the_language_model_only_where_they_are_named(model):
    both = set_trainable(model, ("language_model", "lora"))
    assert any(".lora_" in name for name in trained(model)) and both["lora"] > 0
    alone = set_trainable(model, ("language_model",))
    assert not any(".lora_" in name for name in trained(model))
    assert alone["language_model"] == both["language_model"]


def test_a_parameter_counts_for_the_first_part_that_claims_it(model):
    counts = set_trainable(model, ("qk_norms", "language_norms"))
    assert (
        counts["qk_norms"] > 0 and sum(counts.values()) == set_trainable(model, ("language_norms",))["language_norms"]
    )


@pytest.mark.parametrize(("sizes", "draws", "most"), [((3, 8, 2), 4, 32), ((1,), 1, 1)])
def test_a_step_is_as_large_as_its_largest_source_each_time(sizes, draws, most):
    fields = vars(get_stage("mini", 4)) | {
        "sources": tuple(StageSource(f"s{number}", 1, size) for number, size in enumerate(sizes)),
        "draws_per_step": draws,
    }
    assert Stage(**fields).max_step_samples == most


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    schedule = Schedule("warmup_decay", 4e-3, 1e-3, 1e-3, 10, steps_per_epoch=20, epochs=2)
    found = build_optimizer(model, schedule, 0.3, 0.75)
    groups = [(group["names"], group["weight_decay"], group["lr"], group["betas"]) for group in found.param_groups]
    assert groups == [
        (["0.weight"], 0.3, 1e-3, (0.9, 0.75)),
        (["0.bias", "1.weight", "1.bias"], 0.0, 1e-3, (0.9, 0.75)),
    ]
    assert build_optimizer(model, schedule, 0.3, 0).param_groups[0]["betas"] == (0.9, 0.0), "as 0 is read from YAML"
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(model, schedule, 0.3, 0.75)
