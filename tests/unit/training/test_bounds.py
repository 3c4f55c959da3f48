"""Numbers of a stage that no training could use, told with the key and the bounds."""

from __future__ import annotations

import pytest

from pipelines.settings import SettingsError
from pipelines.training.job import apply_stage_settings
from tinygptv.bounds import check_number
from tinygptv.training.stages import RECIPES, get_stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sources": {"own": {"weight": 1, "batch_size": 0}}},
            "batch_size of source 'own' is 0; .* whole number of at",
        ),
        ({"sources": {"own": {"weight": 1, "batch_size": -1}}}, "batch_size of source 'own' is -1"),
        ({"sources": {"own": {"weight": 1, "batch_size": 2.5}}}, r"batch_size of source 'own' is 2\.5"),
        ({"sources": {"own": {"weight": 1, "batch_size": "3"}}}, "batch_size of source 'own' is '3'"),
        ({"sources": {"own": {"weight": 1, "batch_size": True}}}, "batch_size of source 'own' is True"),
        ({"sources": {"own": {"weight": -1, "batch_size": 1}}}, "weight of source 'own' is -1"),
        ({"sources": {"own": {"weight": 0, "batch_size": 1}}}, "no source with a weight above 0"),
        ({"sources": []}, "no source with a weight above 0"),
        (
            {"sources": [{"name": "own", "weight": w, "batch_size": 1} for w in (1, 2)]},
            "stage 4 has source 'own' twice: give it once, with one weight",
        ),
        ({"sources": "own"}, r"stage\.sources='own' is not usable: write \{NAME: \{weight: 1, batch_size: 1\}"),
        ({"sources": ["own"]}, r"stage\.sources=\['own'\] is not usable: write"),
        ({"sources": {"own": 3}}, r"\{'own': 3\} is not usable: write"),
        ({"sources": [{"name": "own", "weight": 1}]}, "is not usable: write"),
        ({"sources": {"coco_vqa": {"wait": 1}}}, "is not usable: write"),
        ({"trainable": "lora"}, r"stage\.trainable='lora' is not usable: a list of parts is wanted"),
        ({"trainable": []}, r"no trainable part: choose some of \['attention_norms'"),
        ({"schedule": {"peak": float("inf")}}, "schedule.peak is inf"),
        ({"draws_per_step": 0}, "draws_per_step is 0; it must be a whole number of at least 1"),
        ({"draws_per_step": 2.5}, r"draws_per_step is 2\.5"),
        ({"image_size": 0}, "image_size is 0"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; it must be a number from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta2": 1.01}, "beta2 is 1.01; it must be a number from 0 to 1"),
        ({"template": "humane"}, r"stage 4 has template 'humane'; known: \['caption'"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0, .*null clips none"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"schedule": {"epochs": 0}}, "schedule.epochs is 0"),
        ({"schedule": {"steps_per_epoch": 1.5}}, "schedule.steps_per_epoch is 1.5"),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps is -1"),
        ({"schedule": {"peak": -1}}, "schedule.peak is -1"),
        ({"schedule": {"peak": "fast"}}, "schedule.peak is 'fast'"),
        ({"limits": {"max_text_tokens": 0}}, "limits.max_text_tokens is 0"),
    ],
)
def test_numbers_of_a_stage_have_bounds(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        apply_stage_settings(get_stage("mini", 4), changes)
    assert ".." not in str(error.value)


def test_the_scale_of_adapters_need_not_be_whole():
    assert apply_stage_settings(get_stage("mini", 4), {"lora_alpha": 1.5}).lora_alpha == 1.5


@pytest.mark.parametrize("number", [0, 5])
def test_a_recipe_has_no_other_stage(number):
    with pytest.raises(ValueError, match=rf"recipe 'mini' has no stage {number}; it has \[1, 2, 3, 4\]"):
        get_stage("mini", number)


def test_every_recipe_is_within_the_bounds():
    assert all(stage.draws_per_step >= 1 for stages in RECIPES.values() for stage in stages)
    check_number("x", 0, 0)
    check_number("x", 1, 0, 1, whole=True)
