"""LoRA adapters: what they compute, what they leave as it was, and which parameters train."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.lora import AdaptedLinear, add_lora, freeze_below_adapters, merge_lora, reset_lora
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import RECIPES, set_trainable

IDS = torch.arange(1, 13).reshape(2, 6)


def make_model(rank=0, seed=0):
    torch.manual_seed(seed)
    return TinyGPTVForConditionalGeneration(tiny_config(lora_rank=rank)).eval()


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("trained", [(), ("layers.0.mlp.fc1.weight", "layers.1.self_attn.dense.weight")])
def test_adding_adapters_leaves_what_trains_as_it_was(trained):
    language = make_model().language_model
    for name, parameter in language.named_parameters():
        parameter.requires_grad_(name in trained)
    add_lora(language, 2, 16, 0.0)
    training = {name for name, p in language.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert training == {name.replace("dense.weight", "dense.base_layer.weight") for name in trained}
    adapters = [p for name, p in language.named_parameters() if ".lora_" in name]
    assert len(adapters) == 2 * 2 * 2 and all(p.requires_grad for p in adapters)


def test_fresh_adapters_change_nothing_and_trained_ones_add_their_scaled_product():
    model = make_model()
    before = logits_of(model)
    model.add_lora(4, 16, 0.0)
    assert torch.equal(logits_of(model), before)
    dense = model.language_model.layers[0].self_attn.dense
    with torch.no_grad():
        dense.lora_B["default"].weight.normal_()
    x = torch.randn(3, 32)
    product = x @ dense.lora_A["default"].weight.T @ dense.lora_B["default"].weight.T
    torch.testing.assert_close(dense(x) - dense.base_layer(x), 16 / 4 * product)
    assert not torch.allclose(logits_of(model), before)


def adapted(rank=4, width=16):
    """An adapted layer whose adapter does something."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"qkv_proj": nn.Linear(width, width)})
    add_lora(model, rank, 16, 0.0)
    with torch.no_grad():
        model["qkv_proj"].lora_B["default"].weight.normal_()
    return model["qkv_proj"].eval()


@torch.no_grad()
def test_an_adapter_in_float32_adds_to_a_matrix_in_16_bits():
    layer = adapted()
    layer.base_layer.bfloat16()
    x = torch.randn(3, 16)
    base = layer.base_layer(x.bfloat16())
    update = 4 * x.bfloat16().float() @ layer.adapter[0].weight.T @ layer.adapter[1].weight.T
    found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16 and all(part.weight.dtype == torch.float32 for part in layer.adapter)
    torch.testing.assert_close(found, (base + update).bfloat16())


@torch.no_grad()
def test_an_adapter_that_is_switched_off_or_merged_is_not_added_again():
    off, merged, x = adapted(), adapted(), torch.randn(3, 16)
    with_it, without = off(x), off.base_layer(x)
    assert off.is_adapted and not torch.allclose(with_it, without, atol=0.1)
    off.enable_adapters(False)
    assert torch.equal(off(x), without) and not off.is_adapted
    merged.merge()
    assert not merged.is_adapted
    torch.testing.assert_close(merged(x), with_it)


def test_merged_adapters_answer_alike_and_are_gone():
    model = make_model(rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    before = logits_of(model)
    assert model.merge_lora() == 4, "two adapters in each of two layers"
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    assert not any(".lora_" in name or "base_layer" in name for name, _ in model.named_parameters())
    assert (model.config.lora_rank, model.config.lora_merged) == (0, True)
    assert merge_lora(model.language_model) == 0 and model.merge_lora() == 0 and model.config.lora_merged


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_that_peft_merged_adapters_into_are_known_as_such(rank):
    """A stage file of the release could not hold them: it has adapters beside Phi-2's own matrices."""
    model = get_peft_model(make_model(rank=rank), LoraConfig(target_modules=["dense"])).merge_and_unload()
    assert (model.config.lora_rank, model.config.lora_merged) == (0, True)


def test_reset_adapters_change_nothing():
    model = make_model(rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.fill_(1.0)
    reset_lora(model.language_model)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            assert not parameter.any(), name
        elif ".lora_A" in name:
            assert parameter.std() > 0, name


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="lora_rank is 0"):
        add_lora(make_model().language_model, 0, 16, 0.0)
    with pytest.raises(ValueError, match="already has LoRA adapters of rank 4"):
        make_model(rank=4).add_lora(2, 16, 0.0)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_adapters_train_where_the_stage_says_so_and_are_frozen_elsewhere(recipe):
    model = make_model(rank=4)
    for stage in RECIPES[recipe]:
        set_trainable(model, stage.trainable)
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert adapters <= training if "lora" in stage.trainable else not adapters & training, stage.number
        assert not any(name.startswith(("vision_encoder.", "qformer.", "lm_head.")) for name in training)


def test_a_language_model_that_trains_takes_no_adapters_along():
    model = make_model(rank=4)
    counts = set_trainable(model, ("language_model",))
    assert all(not p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    assert counts["language_model"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    both = set_trainable(model, ("language_model", "lora"))
    assert both["lora"] == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert both["language_model"] == counts["language_model"]


def test_the_caller_may_drop_from_the_adapters_input():
    layer = make_adapted()
    x, dropped = torch.randn(3, 6), torch.randn(3, 6)
    down, up = layer.adapter
    expected = layer.base_layer(x) + up(down(dropped) * 2.0)
    torch.testing.assert_close(layer.forward_dropped(x, dropped), expected)
    assert layer.eval().input_dropout == 0.0 and layer.train().input_dropout == 0.25


def test_adapters_of_a_user_are_chosen_as_peft_says_after_the_models_own_are_weights(monkeypatch):
    asked, layer = [], make_adapted().eval()
    monkeypatch.setattr(BaseTunerLayer, "set_adapter", lambda self, *given: asked.append((self.is_own, *given)))
    before = layer(torch.ones(1, 6))
    layer.set_adapter("theirs", True)
    assert asked[-1] == (False, "theirs", True) and not layer.lora_A and not layer.merged
    torch.testing.assert_close(layer(torch.ones(1, 6)), before)
    layer.set_adapter(["more"])
    assert asked[-1] == (False, ["more"], False)


@torch.no_grad()
def test_adapters_that_no_checkpoint_holds_start_without_effect():
    model = make_model(rank=2)
    for layer in (module for module in model.modules() if isinstance(module, AdaptedLinear)):
        down, up = layer.adapter
        down.weight.zero_(), up.weight.fill_(1.0)
        model._init_weights(layer)
        assert down.weight.std() > 0 and not up.weight.any()


def test_a_users_adapters_take_the_models_own_as_weights():
    model = make_model(rank=2)
    model.requires_grad_(True)
    assert not hasattr(model, "peft_config")
    configs = {"default": object()}
    model.peft_config = configs
    assert model.peft_config is configs and model.config.lora_rank == 0 and model.config.lora_alpha
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    del model.peft_config
    assert not hasattr(model, "peft_config")


def make_adapted():
    """A linear layer of 6 to 4 with an adapter of rank 2, scaled by 2."""
    model = nn.Sequential(OrderedDict(qkv_proj=nn.Linear(6, 4)))
    add_lora(model, 2, 4, 0.25)
    with torch.no_grad():
        model.qkv_proj.adapter[1].weight.normal_()
    return model.qkv_proj


def test_all_but_adapters_is_frozen_and_what_peft_keeps_of_a_saved_module_too():
    saved = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    model = nn.Sequential(OrderedDict(adapted=make_adapted(), saved=saved, other=nn.Linear(2, 2)))
    model.requires_grad_(True)
    model.adapted.lora_A.requires_grad_(False)  # what its owner froze stays frozen
    freeze_below_adapters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "adapted.lora_B.default.weight",
        "saved.modules_to_save.default.weight",
        "saved.modules_to_save.default.bias",
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_dropout_of_adapters_can_be_changed(dropout):
    model = make_model(rank=2)
    model.set_lora_dropout(0.5)
    model.set_lora_dropout(dropout)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len(layers) == 4
    assert {layer.train().input_dropout for layer in layers} == {dropout}
    assert {layer.eval().input_dropout for layer in layers} == {0.0}
    assert {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers} == {dropout}
