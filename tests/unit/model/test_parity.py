"""Parity in any clone: kept release files against kept numbers of a plain implementation (``tests/make_parity.py``)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.make_parity import ALPHA, FOLDER, HEADS, LARGE, NEW, TALKS
from tinygptv.convert import load_release
from tinygptv.convert.layouts import interleave_heads, plain_key, release_key
from tinygptv.data.prompt_layout import Exchange, PromptLayout
from tinygptv.data.prompts import TEMPLATES
from tinygptv.data.sample import SampleEncoder, TextLimits
from tinygptv.miniature.tiny import tiny_tokenizer
from tinygptv.training.stages import set_trainable

NUMBERS = load_file(FOLDER / "numbers.safetensors")


def load(**options):
    return load_release(
        vision=FOLDER / "eva_vit_g.pth",
        qformer=FOLDER / "blip2.pth",
        language=FOLDER / "phi-2",
        checkpoint=FOLDER / "stage.pth",
        vision_heads=HEADS,
        qformer_heads=HEADS,
        lora_alpha=ALPHA,
        **options,
    )


@pytest.fixture(scope="module")
def model():
    return load()


def error(ours, wanted):
    return float((ours.detach() - wanted).abs().max() / wanted.abs().max())


def inputs_of(model, name):
    ids = NUMBERS[f"{name}/ids"]
    has_image = bool((ids < 0).any())
    return {
        "input_ids": torch.where(ids < 0, model.config.image_token_id, ids)[None],
        "attention_mask": NUMBERS[f"{name}/mask"][None],
        "pixel_values": NUMBERS["pixels_28"][None] if has_image else None,
    }


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("side", [28, LARGE])
def test_images(side):
    """At 56 pixels the position embedding is resampled, by a kernel that the reference writes out."""
    model = load(image_size=side)
    pixels = NUMBERS[f"pixels_{side}"][None]
    assert error(model.encode_query_features(pixels)[0], NUMBERS[f"query_features_{side}"]) < 1e-5
    assert error(model.encode_images(pixels)[0], NUMBERS[f"image_embeds_{side}"]) < 1e-5
    resized = load()
    resized.set_image_size(side)
    assert error(resized.encode_images(pixels)[0], NUMBERS[f"image_embeds_{side}"]) < 1e-5


@pytest.mark.parametrize("name", TALKS)
def test_logits_and_loss(model, name):
    with torch.no_grad():
        output = model(**inputs_of(model, name), labels=NUMBERS[f"{name}/labels"][None])
    seen = NUMBERS[f"{name}/mask"].bool()
    assert error(output.logits[0][seen], NUMBERS[f"{name}/logits"][seen]) < 1e-5
    assert float(output.loss) == pytest.approx(float(NUMBERS[f"{name}/loss"]), rel=1e-5)


def test_our_layout_gives_the_same_ids(model):
    turns = {
        "caption": ("caption", [Exchange(None, "a dog on a sofa", 1)]),
        "conversation": ("inst", [Exchange("what?", "a dog", 1), Exchange("old?", "no, it is young")]),
        "text": ("inst", [Exchange("say hi", "hi")]),
    }
    for name, (template, exchanges) in turns.items():
        layout = PromptLayout(tiny_tokenizer(), TEMPLATES[template], image_token_id=-1, num_query_tokens=4)
        encoded = SampleEncoder(layout, TextLimits(1000, mask_inner_bos=True)).encode(exchanges)
        assert encoded.input_ids == NUMBERS[f"{name}/ids"].tolist(), name
        assert encoded.labels == NUMBERS[f"{name}/labels"].tolist(), name
        assert encoded.attention_mask == NUMBERS[f"{name}/mask"].tolist(), name


def test_gradients_of_all_that_a_stage_trains(model):
    set_trainable(model, ("projector", "language_norms", "lora"))
    model.zero_grad()
    total, count = 0.0, 0
    for name in TALKS:
        labels = NUMBERS[f"{name}/labels"]
        tokens = int((labels[1:] != -100).sum())
        total = total + model(**inputs_of(model, name), labels=labels[None]).loss * tokens
        count += tokens
    (total / count).backward()
    wanted = {name.removeprefix("gradient/"): g for name, g in NUMBERS.items() if name.startswith("gradient/")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key, per_head = release_key(plain_key(name), lora=True)
            gradient = interleave_heads(parameter.grad, HEADS) if per_head else parameter.grad
            assert error(gradient, wanted.pop(key)) < 1e-4, key
    assert not wanted
    model.zero_grad()


def test_greedy_answers(model):
    inputs = inputs_of(model, "question")
    length = int((NUMBERS["question/labels"] == -100).sum())
    inputs = {"input_ids": inputs["input_ids"][:, :length], "pixel_values": inputs["pixel_values"]}
    answer = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer[0, length:].tolist() == NUMBERS["greedy"].tolist()
