"""Variants by value: what each row of the table changes, what a change may say, and what is refused before training."""

from __future__ import annotations

import pytest

from pipelines.ablation import run
from pipelines.ablation.run import ablate
from pipelines.ablation.variants import VARIANTS, Variant, change_config, find_variant, refuse_unusable, with_precision
from pipelines.settings import AblateSettings, SettingsError
from tinygptv.config import TinyGPTVConfig
from tinygptv.training.stages import get_stage


def test_the_rows_of_table_3_by_what_they_change():
    """Names are folder names, titles stand in the report; a stage of the paper trains every part that is named."""
    stage = get_stage("paper", 2)
    assert stage.trainable == ("projector", "language_norms", "lora"), "the expectations below are of these"
    norms = ["qk_norms", "attention_norms", "final_norm"]
    found = {name: (v.title, v.config, v.stage_changes(stage), v.train) for name, v in VARIANTS.items()}
    assert found == {
        "full": ("full", {}, {}, {}),
        "no_lora": ("without LoRA", {}, {"lora_rank": 0, "trainable": ["projector", "language_norms"]}, {}),
        "frozen_input_norm": ("input norm kept, not trained", {}, {"trainable": ["projector", *norms, "lora"]}, {}),
        "no_input_norm": ("without input norm", {"text_config.input_layernorm": False}, {}, {}),
        "no_rms_norm": ("without RMSNorm", {"text_config.attention_rmsnorm": False}, {}, {}),
        "no_qk_norm": ("without QK norm", {"text_config.qk_layernorm": False}, {}, {}),
    }
    assert list(VARIANTS) == list(found) and all(variant.name == name for name, variant in VARIANTS.items())
    assert AblateSettings().variants == list(VARIANTS), "all of them, in the table's order"


def test_parts_are_left_out_or_taken_instead_in_their_places():
    variant = Variant("v", "V", stage={"lora_rank": 3}, without=("lora",), instead={"language_norms": ("a", "b")})
    stage = get_stage("paper", 2)
    assert variant.stage_changes(stage) == {"trainable": ["projector", "a", "b"], "lora_rank": 3}
    own = Variant("v", "V", stage={"trainable": ["projector"]}, without=("lora",))
    assert own.stage_changes(stage) == {"trainable": ["projector"]}, "what is written wins"
    assert Variant("v", "V", without=("nothing",)).stage_changes(stage) == {}


@pytest.mark.parametrize(
    ("text", "name", "changes"),
    [
        ("stage.max_grad_norm=null", "stage.max_grad_norm_null", ({}, {"max_grad_norm": None}, {})),
        ("config.text_config.hidden_act=gelu", "config.text_config.hidden_act_gelu",
         ({"text_config.hidden_act": "gelu"}, {}, {})),
        ("train.a=x=y", "train.a_x_y", ({}, {}, {"a": "x=y"})),
        ("train.a=-1, stage.b=[2]", "train.a_-1__stage.b__2_", ({}, {"b": [2]}, {"a": -1})),
        ("train.a=s3://é/x", "train.a_s3___é_x", ({}, {}, {"a": "s3://é/x"})),
        ("train.a=", "train.a_", ({}, {}, {"a": None})),
        ("train.guard=off,train.a=1e-4", "train.guard_off_train.a_1e-4", ({}, {}, {"guard": "off", "a": 1e-4})),
        ("stage.b=[x,y], train.a={c: 1, d: [2, 3]}", "stage.b__x_y___train.a__c__1__d___2__3__",
         ({}, {"b": ["x", "y"]}, {"a": {"c": 1, "d": [2, 3]}})),
        ("stage.schedule.peak=1e-4,stage.schedule.epochs=2,stage.sources.gqa.weight=3",
         "stage.schedule.peak_1e-4_stage.schedule.epochs_2_stage.sources.gqa.weight_3",
         ({}, {"schedule": {"peak": 1e-4, "epochs": 2}, "sources": {"gqa": {"weight": 3}}}, {})),
    ],
)  # fmt: skip
def test_changes_are_read_as_yaml_into_their_sections(text, name, changes):
    found = find_variant(text)
    assert (found.name, found.title, (found.config, found.stage, found.train)) == (name, text, changes)
    assert (found.without, found.instead) == ((), {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config.=1", "variant 'config.=1': 'config.' must begin with config., stage. or train."),
        ("stage=1", "variant 'stage=1': 'stage' must begin with config., stage. or train."),
        ("stage.a=1, =2", "variant 'stage.a=1, =2': '' must begin with config., stage. or train."),
        ("stage.a=1, tain.b=2", "variant 'stage.a=1, tain.b=2': 'tain.b' must begin with config., stage. or train."),
        ("ful", "variant 'ful' is unknown; did you mean 'full'? A change is written like stage.lora_rank=4."),
        (
            "other",
            f"variant 'other' is unknown; known: {', '.join(VARIANTS)}. A change is written like stage.lora_rank=4.",
        ),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(SettingsError) as caught:
        find_variant(text)
    assert str(caught.value) == said


def test_a_changed_section_is_that_of_the_given_configuration():
    config = TinyGPTVConfig()
    changed = change_config(
        config, {"text_config.qk_layernorm": False, "template": "x", "vision_config.image_size": 28}
    )
    assert changed is config and (config.template, config.vision_config.image_size) == ("x", 28)
    assert config.text_config.qk_layernorm is False and config.text_config.attention_rmsnorm is True


def test_each_precision_but_fp32_is_in_the_name_and_the_given_variant_stays():
    given = Variant("v", "V", config={"a": 1}, stage={"b": 2}, train={"packing": True}, without=("lora",))
    for precision, name in (("fp32", "v"), ("bf16", "v-bf16"), ("fp16", "v-fp16")):
        found = with_precision(given, precision)
        assert (found.name, found.title, found.train) == (name, "V", {"packing": True, "precision": precision})
        assert (found.config, found.stage, found.without) == ({"a": 1}, {"b": 2}, ("lora",))
    assert given.train == {"packing": True}


# ---------------------------------------------------------------------- refused before anything is trained


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config.text_config.qk_norm=false", r"^config\.text_config\.qk_norm is no field of the model's configuration"),
        ("stage.lora_rnk=4", r"^stage\.lora_rnk is no field of a stage; did you mean 'lora_rank'\?"),
        ("stage.schedule.paek=1e-4", r"^stage\.schedule=.* is not usable: 'paek' is unknown; did you mean 'peak'\?"),
        (
            "config.text_config.qk_layernorm=no",
            r"^config\.text_config\.qk_layernorm='no' is not .*expected bool",
        ),
        (
            "stage.lora_rank=[4",
            r"^variant 'stage\.lora_rank=\[4': 'stage\.lora_rank=\[4' is no YAML: .*expected ',' or '\]'",
        ),
        ("train.pakcing=true", r"^variant 'train\.pakcing=true' of the ablation: .*unknown key 'pakcing'"),
        ("train.log_every=x", r"^variant 'train\.log_every=x' of the ablation.*log_every"),
    ],
)
def test_a_change_that_cannot_be_made_is_told_before_anything_is_trained(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(run, "start_ray", lambda _: pytest.fail("Ray was started"))
    settings = AblateSettings(
        variants=["full", text], precisions=["bf16"], stages=[2], recipe="mini", output=str(tmp_path / "out")
    )
    with pytest.raises(SettingsError, match=said):
        ablate(settings)
    assert not (tmp_path / "out").exists()


def test_a_change_is_tried_in_every_stage_with_what_all_variants_share():
    stages = [get_stage("mini", number) for number in (1, 2)]
    variant = with_precision(find_variant("stage.lora_rank=2,config.text_config.hidden_act=gelu"), "bf16")
    refuse_unusable(variant, stages, {"packing": True})
    for shared, said in (({"pakcing": True}, "pakcing"), ({"log_every": "x"}, "log_every")):
        with pytest.raises(SettingsError, match=said):
            refuse_unusable(variant, stages, shared)
    for change in ("stage.trainable=[projector, qformer]", "config.vision_config.num_attention_heads=8"):
        refuse_unusable(find_variant(change), stages, {"features": "inline"})
        with pytest.raises(SettingsError, match="features=inline"):
            refuse_unusable(find_variant(change), stages, {"features": "cached"})
    with pytest.raises(SettingsError, match=r"stage\.sources"):
        refuse_unusable(find_variant("stage.sources={llava_detail: {weight: 2}}"), stages, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": ["full", "train.precision=bf16"]},
         r"^variant 'train\.precision=bf16': a precision has a table of its own; give it in precisions=\[\.\.\]\.$"),
        ({"train": {"precision": "bf16"}}, r"^train= sets a precision: give it in precisions=\[\.\.\]"),
        ({"variants": ["no_lora", "full", "no_lora"]}, r"^variants= and precisions= give no_lora twice"),
        ({"variants": ["full"], "precisions": ["bf16", "fp32", "bf16"]}, "give full-bf16 twice"),
        ({"variants": ["stage.lora_rank= 4", "stage.lora_rank=_4"]}, "give stage.lora_rank__4 twice"),
    ],
)  # fmt: skip
def test_rows_that_would_not_be_what_they_say_are_refused(tmp_path, changes, said):
    settings = AblateSettings(**{"precisions": ["fp32"], "recipe": "mini", "output": str(tmp_path / "out"), **changes})
    with pytest.raises(SettingsError, match=said):
        ablate(settings)
    assert not (tmp_path / "out").exists()
