"""The release's parameter table (paper scale, counted on the meta device), and what each stage trains."""

from __future__ import annotations

import re

import pytest

from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.layouts import plain_key, release_key
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.meta import build_on_meta
from tinygptv.training.optim import parameter_groups
from tinygptv.training.stages import RECIPES, get_stage, set_trainable

PARAMETERS = {
    "vision_encoder.vit": {224: 985_894_528, 448: 986_975_872},
    "vision_encoder.vit.blocks.0": 25_248_768,
    "vision_encoder.vit.patch_embed": 829_312,
    "vision_encoder.vit.cls_token": 1_408,
    "vision_encoder.vit.pos_embed": {224: 361_856, 448: 1_443_200},
    "vision_encoder.ln_vision": 2_816,
    "qformer.encoder": 105_137_664,
    "qformer.encoder.encoder.layer.0.attention": 2_363_904,
    "qformer.encoder.encoder.layer.0.crossattention": 3_346_944,
    "qformer.encoder.layernorm": 1_536,
    "qformer.query_tokens": 24_576,
    "projector.linear_1": 3_149_824,
    "projector.linear_2": 10_488_320,
    "projector": 13_638_144,
    "language_model.embed_tokens": 131_072_000,
    "lm_head": 131_123_200,
    "language_model.final_layernorm": 5_120,
}
"""Our name of a part -> the release's count, per image side where that matters."""

ADDED_NORMS = re.compile(r"(q_layernorm|k_layernorm|attention_rmsnorm)\.")
TOTALS = {(224, 0): 3_884_473_728, (448, 0): 3_885_555_072, (224, 64): 3_915_931_008, (448, 64): 3_917_012_352}
"""(image side, LoRA rank) -> parameters of the whole model."""

PROJECTOR, NORMS, LORA = 13_638_144, 171_520, 31_457_280
TRAINED = {
    "paper": {1: PROJECTOR + NORMS, 2: 45_266_944, 3: 45_266_944, 4: 45_266_944},
    "released": dict.fromkeys((1, 2, 3, 4), 45_266_944),
}


@pytest.fixture(scope="module")
def models():
    return {(side, rank): build_on_meta(TinyGPTVConfig.phi2(image_size=side, lora_rank=rank)) for side, rank in TOTALS}


def sizes(model):
    return {plain_key(name): p.numel() for name, p in model.named_parameters()}


def test_every_line_of_the_parameter_table(models):
    for (side, rank), model in models.items():
        counts = sizes(model)
        assert sum(counts.values()) == TOTALS[side, rank]
        for part, count in PARAMETERS.items():
            wanted = count[side] if isinstance(count, dict) else count
            found = sum(n for name, n in counts.items() if name == part or name.startswith(f"{part}."))
            assert found == wanted, part
        phi = {n: c for n, c in counts.items() if n.startswith(("language_model.", "lm_head.")) and ".lora_" not in n}
        added = {name: count for name, count in phi.items() if ADDED_NORMS.search(name)}
        assert sum(added.values()) == 92_160 and sum(phi.values()) - 92_160 == 2_779_683_840
        assert sum(count for name, count in added.items() if name.endswith("weight")) == 87_040
        layer = sum(c for n, c in phi.items() if n.startswith("language_model.layers.7.") and n not in added)
        assert layer == 78_671_360
        crossing = {n.split(".")[4] for n in counts if "crossattention" in n}
        assert crossing == {"0", "2", "4", "6", "8", "10"}
        lora = {name: count for name, count in counts.items() if ".lora_" in name}
        assert sum(lora.values()) == (LORA if rank else 0)
        of_layer = {n: c for n, c in lora.items() if ".layers.0." in n}
        assert sum(c for n, c in of_layer.items() if "qkv_proj" in n) == (655_360 if rank else 0)
        assert sum(c for n, c in of_layer.items() if ".dense." in n) == (327_680 if rank else 0)


def expected_names(lora):
    """Names of the release's trained tensors, written out."""
    prefix = "llama_model.base_model.model.model" if lora else "llama_model.model"
    names = {f"{p}.{leaf}" for p in ("llama_proj", "llama_proj2") for leaf in ("weight", "bias")}
    names.add(f"{prefix}.final_layernorm.weight")
    for i in range(32):
        layer = f"{prefix}.layers.{i}"
        names |= {f"{layer}.input_layernorm.weight", f"{layer}.post_layernorm.weight"}
        names |= {f"{layer}.self_attn.{n}_layernorm.weight" for n in "qk"}
        if lora:
            names |= {f"{layer}.self_attn.{m}.lora_{x}.weight" for m in ("query_key_value", "dense") for x in "AB"}
    return names


@pytest.mark.parametrize("recipe", sorted(TRAINED))
def test_each_stage_trains_what_the_release_trains(models, recipe):
    for number, count in TRAINED[recipe].items():
        stage = get_stage(recipe, number)
        model = models[stage.image_size, stage.lora_rank]
        counts = set_trainable(model, stage.trainable)
        assert sum(counts.values()) == count, number
        assert counts["projector"] == PROJECTOR and counts["language_norms"] == NORMS
        trained = {plain_key(name) for name, p in model.named_parameters() if p.requires_grad}
        lora = bool(stage.lora_rank)
        assert {release_key(name, lora)[0] for name in trained} == expected_names(lora), number


def test_optimizer_groups_of_the_release(models):
    model = models[448, 64]
    set_trainable(model, get_stage("released", 4).trainable)
    decayed, undecayed = parameter_groups(model.named_parameters(), 0.05)
    assert sum(p.numel() for p in decayed["params"]) == 45_088_768 and decayed["weight_decay"] == 0.05
    assert sum(p.numel() for p in undecayed["params"]) == 178_176 and undecayed["weight_decay"] == 0.0


def test_a_stage_that_trains_what_is_not_there_says_so():
    model = build_on_meta(tiny_config(lora_rank=0))
    with pytest.raises(ValueError, match=r"\['lora'\] have no parameters"):
        set_trainable(model, ("projector", "lora"))


def test_a_rate_that_rises_at_the_end_is_kept_and_told():
    schedule = get_stage("paper", 4).schedule
    assert schedule.learning_rate(schedule.num_steps - 1) > 7 * schedule.peak
    with pytest.warns(UserWarning, match="rises instead of decaying"):
        schedule.warn_if_rising()


def test_recipes_have_four_stages():
    for recipe, stages in RECIPES.items():
        assert [stage.number for stage in stages] == [1, 2, 3, 4], recipe
    with pytest.raises(ValueError, match="recipe is 'none'"):
        get_stage("none", 1)


MIX = {
    "multitask_conversation": (50, 1), "llava_conversation": (30, 1), "unnatural_instruction": (10, 1),
    "refvg": (40, 3), "llava_detail": (20, 2), "llava_reason": (80, 2), "flickr_grounded_caption": (80, 1),
    "flickr_CaptionToPhrase": (80, 1), "flickr_ObjectToPhrase": (80, 1), "refcoco": (25, 3), "refcocop": (25, 3),
    "refcocog": (25, 3), "invrefcoco": (10, 3), "invrefcocop": (10, 3), "invrefcocog": (10, 3),
    "textcaps_caption": (30, 3), "coco_vqa": (15, 3), "ok_vqa": (8, 3), "aok_vqa": (12, 3), "gqa": (50, 3),
}  # fmt: skip
"""Stage 4 of the release: source -> sample ratio and batch size."""


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_the_mix_of_stage_4_is_the_releases(recipe):
    stage = get_stage(recipe, 4)
    assert {source.name: (source.weight, source.batch_size) for source in stage.sources} == MIX
    assert stage.draws_per_step == 1 and stage.max_step_samples == 3


SCHEDULES = {
    1: ("warmup_cosine", 1e-4, 8e-5, 1e-6, 1000, 5000, 1), 2: ("warmup_cosine", 1e-4, 8e-5, 1e-6, 5000, 5000, 4),
    3: ("warmup_cosine", 3e-5, 1e-5, 1e-6, 200, 200, 5), 4: ("warmup_cosine", 1e-5, 8e-5, 1e-6, 1000, 1000, 50),
}  # fmt: skip
OTHERS = {
    1: {"laion": (115, 64), "cc_sbu": (14, 64)}, 2: {"laion": (115, 64), "cc_sbu": (14, 64)},
    3: {"cc_sbu_align": (1, 6)}, 4: MIX,
}  # fmt: skip


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_numbers_of_the_release(number):
    stage = get_stage("released", number)
    s = stage.schedule
    found = (s.kind, s.peak, s.minimum, s.warmup_start, s.warmup_steps, s.steps_per_epoch, s.epochs)
    assert found == SCHEDULES[number]
    assert {source.name: (source.weight, source.batch_size) for source in stage.sources} == OTHERS[number]
    assert (stage.image_size, stage.template) == (
        (448, "inst") if number == 4 else (224, "human" if number == 3 else "caption")
    )
    assert stage.limits.max_text_tokens == {1: 32, 2: 32, 3: 160, 4: 1024}[number] and stage.limits.mask_inner_bos
    assert (stage.lora_rank, stage.lora_alpha, stage.lora_dropout) == (64, 16, 0.05)
    assert (stage.weight_decay, stage.beta2, stage.max_grad_norm) == (0.05, 0.999, None)


def test_the_papers_first_stage_is_a_saw_tooth_without_adapters():
    stage = get_stage("paper", 1)
    assert stage.trainable == ("projector", "language_norms") and stage.lora_rank == 0
    s = stage.schedule
    assert (s.kind, s.peak, s.warmup_start, s.steps_per_epoch, s.epochs) == ("sawtooth", 1e-4, 1e-5, 1000, 17)
    assert get_stage("paper", 4).template == "human"


WEB, ALIGNED = {"laion": (115, 32), "cc_sbu": (14, 32)}, {"cc_sbu_align": (1, 32), "llava_detail": (1, 32)}
MINI_MIX = {
    "coco_vqa": 30, "gqa": 20, "refcoco": 22, "invrefcoco": 8, "flickr_grounded_caption": 8, "flickr_ObjectToPhrase": 4,
    "coco_caption": 6, "llava_conversation": 8, "llava_detail": 2, "unnatural_instruction": 2,
}  # fmt: skip
MINI = {
    1: (WEB, 64, "caption", 48, ("sawtooth", 3e-3, 3e-3, 3e-4, 0, 50, 3), 1, 0),
    2: (WEB, 64, "caption", 48, ("warmup_decay", 2e-3, 1e-3, 1e-4, 20, 50, 3), 1, 16),
    3: (ALIGNED, 64, "human", 96, ("warmup_decay", 3e-4, 1e-5, 3e-5, 10, 20, 3), 1, 16),
    4: (
        {name: (weight, 1) for name, weight in MINI_MIX.items()},
        *(128, "human", 128, ("warmup_decay", 2e-3, 1e-4, 1e-4, 30, 100, 8), 32, 16),
    ),
}
"""Stage -> sources, image side, template, text tokens, schedule, draws of a step, LoRA rank: the shipped weights."""


@pytest.mark.parametrize("number", MINI)
def test_numbers_of_the_miniature(number):
    stage = get_stage("mini", number)
    s = stage.schedule
    schedule = (s.kind, s.peak, s.minimum, s.warmup_start, s.warmup_steps, s.steps_per_epoch, s.epochs)
    sources = {source.name: (source.weight, source.batch_size) for source in stage.sources}
    assert MINI[number] == (
        sources, stage.image_size, stage.template, stage.limits.max_text_tokens, schedule, stage.draws_per_step,
        stage.lora_rank,
    )  # fmt: skip
    assert stage.trainable == (
        ("projector", "language_norms") if number == 1 else ("projector", "language_norms", "lora")
    )
    assert (stage.lora_alpha, stage.lora_dropout) == (16, 0.05 if number == 1 else 0.0)
    assert (stage.weight_decay, stage.beta2, stage.max_grad_norm) == (0.05, 0.999, 1.0)
    assert not stage.limits.mask_inner_bos


def test_the_papers_third_stage_learns_from_two_sets_and_its_texts_are_not_masked():
    assert {source.name: (source.weight, source.batch_size) for source in get_stage("paper", 3).sources} == {
        "cc_sbu_align": (1, 6), "llava_detail": (1, 6)
    }  # fmt: skip
    limits = [stage.limits for stage in RECIPES["paper"]]
    assert [(limit.max_text_tokens, limit.mask_inner_bos) for limit in limits] == [
        (32, False), (32, False), (160, False), (1024, False)
    ]  # fmt: skip
