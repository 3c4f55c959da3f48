"""Cases that were not recorded from the original, against a second, plain implementation on the release's own files.

With and without LoRA: two image sizes, truncated answers and contexts, text alone, conversations with hidden BOS,
sequences beyond the model's positions, accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests import reference_model as reference
from tests.release_files import double, qformer_state, stage_state, vision_state, write_release
from tests.release_files import language_state as phi_state
from tinygptv.convert import load_release
from tinygptv.convert.layouts import interleave_heads, plain_key, release_key
from tinygptv.data.prompt_layout import Exchange, PromptLayout
from tinygptv.data.prompts import Template
from tinygptv.data.sample import IGNORE_INDEX, SampleEncoder, TextLimits
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import set_trainable

HEADS, RANK, ALPHA, ROTARY, PAD = 4, 4, 16, 4, 0


@dataclass(frozen=True)
class World:
    """One set of release files, and the same tensors for the plain implementation, in float64."""

    model: TinyGPTVForConditionalGeneration
    vision: dict[str, torch.Tensor]
    qformer: dict[str, torch.Tensor]
    stage: dict[str, torch.Tensor]
    language: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[0, RANK], ids=["no_lora", "lora"])
def world(request, tmp_path_factory):
    torch.manual_seed(1)
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=request.param))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    plain = {plain_key(name): tensor for name, tensor in model.state_dict().items()}
    files = write_release(tmp_path_factory.mktemp("release"), plain, HEADS)
    stage = double(stage_state(plain, heads=HEADS))
    prefix = "llama_model.base_model.model."  # stage_state writes peft's names also where nothing is adapted
    trained = {name.removeprefix(prefix): tensor for name, tensor in stage.items() if name.startswith(prefix)}
    return World(
        load_release(**files, vision_heads=HEADS, qformer_heads=HEADS, lora_alpha=ALPHA),
        double(vision_state(plain)),
        double(qformer_state(plain)),
        stage,
        double(phi_state(plain, "fused", HEADS)) | trained,
    )


IMAGE = "<Img><ImageHere></Img> "
ANSWER_ONLY = [[Exchange(None, "a dog", 1)], [Exchange(None, "two people in front of a house", 1)]]
INSTRUCTIONS = [[Exchange("[vqa] what?", "red", 1)], [Exchange("[caption] say it.", "a cat on a mat", 1)]]
TALKS = [
    [Exchange("what?", "a dog", 1), Exchange("big?", "yes"), Exchange("old?", "no, it is young")],
    [Exchange("where?", "here", 1), Exchange("why?", "because")],
]
TEXT = [[Exchange("say hi ", "hi")], [Exchange("count to three ", "one two three")]]
LONG = [[Exchange(f"{'very ' * 120}long?", "yes " * 20, 1)], [Exchange("short?", "no", 1)]]

CASES = {
    # name: (conversations, template, end symbol, longest text, longest context, with images)
    "answer_only": (ANSWER_ONLY, "{}", "\n", 32, 3800, True),
    "answer_cut": (ANSWER_ONLY, "{}", "\n", 6, 3800, True),
    "instruction": (INSTRUCTIONS, "###Human: {} ###Assistant: ", "###", 160, 3800, True),
    "instruction_cut_within_the_end_symbol": (INSTRUCTIONS, "{}", "###", 5, 3800, True),
    "context_cut": (INSTRUCTIONS, "[INST] {} [/INST]", "###", 64, 24, True),
    "conversation": (TALKS, "[INST] {} [/INST]", "###", 1024, 3800, True),
    "conversation_cut_within_a_question": (TALKS, "[INST] {} [/INST]", "###", 14, 3800, True),
    "text_alone": (TEXT, "[INST] {} [/INST]", "###", 64, 3800, False),
    "beyond_the_positions": (LONG, "{}", "###", 1024, 3800, True),
}


def plain_layout(talk, template, end, longest, longest_context, num_queries):
    """Pieces of one sequence as the release's code puts them together: (id, 'image' or None, learn, seen) each."""
    tokenizer = tiny_tokenizer()

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    context = []
    has_image = bool(talk[0].num_images)
    space = " " if has_image else ""
    first = "<ImageHere>"
    if talk[0].instruction is not None:
        first = template.replace("{}", IMAGE * has_image + talk[0].instruction + space)
    for i, segment in enumerate(first.split("<ImageHere>")):
        context += ["image"] * num_queries if i else []
        context += ids(segment)
    answers = [(token, True) for token in ids(talk[0].answer + end)]
    for turn in talk[1:]:
        answers += [
            (token, False) for token in [tokenizer.bos_token_id, *ids(template.replace("{}", turn.instruction + space))]
        ]
        answers += [(token, True) for token in ids(turn.answer + end)]
    sequence = [(tokenizer.bos_token_id, False, True)]
    sequence += [(token, False, True) for token in context[:longest_context]]
    # Padding and BOS have one id, and what has that id is not looked at after the context.
    return sequence + [(token, learn, token != PAD) for token, learn in answers[:longest]]


def reference_logits(world, sequence, pixels):
    """Logits and labels of one sequence."""
    rows = []
    if pixels is not None:
        features = reference.encode_image(world.vision, world.qformer, pixels.double(), HEADS)
        image = iter(reference.project(world.stage, features))
    for token, _, _ in sequence:
        rows.append(next(image) if token == "image" else world.language["model.embed_tokens.weight"][token])
    mask = torch.tensor([seen for _, _, seen in sequence])
    labels = torch.tensor([token if learn else -100 for token, learn, _ in sequence])
    logits = reference.language(world.language, torch.stack(rows), mask, HEADS, ROTARY, ALPHA / RANK)
    return logits, labels, mask


def our_batch(model, case):
    """Our own layout, padded at the end as a collated batch is."""
    talks, template, end, longest, longest_context, _ = case
    layout = PromptLayout(
        tiny_tokenizer(),
        Template("case", template, end),
        image_token_id=model.config.image_token_id,
        num_query_tokens=model.config.num_query_tokens,
    )
    encoder = SampleEncoder(layout, TextLimits(longest, longest_context, mask_inner_bos=True))
    encoded = [encoder.encode(talk) for talk in talks]
    width = max(len(sample.input_ids) for sample in encoded)

    def padded(name, fill):
        return torch.tensor([getattr(s, name) + [fill] * (width - len(s.input_ids)) for s in encoded])

    return {
        "input_ids": padded("input_ids", PAD),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", IGNORE_INDEX),
    }


def pixels_of(case, side=28):
    return torch.randn(len(case[0]), 3, side, side, generator=torch.Generator().manual_seed(3)) if case[5] else None


def error(ours, wanted):
    return float((ours.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_inputs_logits_and_loss(world, name):
    case, model = CASES[name], world.model
    batch, pixels = our_batch(model, case), pixels_of(case)
    with torch.no_grad():
        output = model(**batch, pixel_values=pixels)
    total, count = 0.0, 0
    for i, talk in enumerate(case[0]):
        sequence = plain_layout(talk, *case[1:5], model.config.num_query_tokens)
        logits, labels, mask = reference_logits(world, sequence, None if pixels is None else pixels[i])
        length = len(sequence)
        assert batch["labels"][i, :length].tolist() == labels.tolist()
        assert batch["attention_mask"][i, :length].tolist() == mask.int().tolist()
        assert batch["attention_mask"][i, length:].sum() == 0
        assert error(output.logits[i, :length][mask], logits[mask]) < 1e-5
        loss, tokens = reference.token_loss(logits, labels)
        total, count = total + float(loss), count + tokens
    assert abs(float(output.loss) - total / count) < 1e-5 * total / count


@pytest.mark.parametrize("name", ["instruction", "conversation"])
def test_gradients(world, name):
    """Of every trained tensor, named as the release names it."""
    case, model = CASES[name], world.model
    set_trainable(model, ("projector", "language_norms", *(("lora",) if model.config.lora_rank else ())))
    model.zero_grad()
    batch, pixels = our_batch(model, case), pixels_of(case)
    model(**batch, pixel_values=pixels).loss.backward()

    leaves = {key: tensor.clone().requires_grad_() for key, tensor in world.stage.items()}
    prefix = "llama_model.base_model.model."
    trained = {key.removeprefix(prefix): leaf for key, leaf in leaves.items() if key.startswith(prefix)}
    other = World(model, world.vision, world.qformer, leaves, world.language | trained)
    total, count = 0.0, 0
    for i, talk in enumerate(case[0]):
        sequence = plain_layout(talk, *case[1:5], model.config.num_query_tokens)
        loss, tokens = reference.token_loss(*reference_logits(other, sequence, pixels[i])[:2])
        total, count = total + loss, count + tokens
    (total / count).backward()
    compared = 0
    for our_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key, per_head = release_key(plain_key(our_name), lora=True)
            gradient = interleave_heads(parameter.grad, HEADS) if per_head else parameter.grad
            assert error(gradient, leaves[key].grad) < 1e-4, key
            compared += 1
    assert compared == len(leaves)


def test_accumulation_of_sums_is_the_whole_batch(world):
    """Samples one by one, each loss divided by the tokens of all, give the whole batch's gradient."""
    case, model = CASES["instruction"], world.model
    set_trainable(model, ("projector", "language_norms"))
    batch, pixels = our_batch(model, case), pixels_of(case)
    count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def gradients(parts):
        model.zero_grad()
        for rows in parts:
            piece = {name: tensor[rows] for name, tensor in batch.items()}
            model(**piece, pixel_values=pixels[rows], num_items_in_batch=count).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    whole, parts = gradients([slice(0, 2)]), gradients([slice(0, 1), slice(1, 2)])
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(parts, whole, strict=True))


def test_another_image_size(world, tmp_path):
    """Stage 4's side: the position embedding is resampled, the rest is the same."""
    side, case = 56, CASES["instruction"]
    from tinygptv.model.vision_encoder import interpolate_position_embedding

    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=0)).eval()
    model.load_state_dict(
        {k.replace(".base_layer.", "."): v for k, v in world.model.state_dict().items() if ".lora_" not in k}
    )
    model.set_image_size(side)
    vision = world.vision | {
        "pos_embed": interpolate_position_embedding(world.vision["pos_embed"].float(), side // 14).double()
    }
    pixels = pixels_of(case, side)
    with torch.no_grad():
        ours = model.encode_query_features(pixels)
    for i in range(2):
        assert error(ours[i], reference.encode_image(vision, world.qformer, pixels[i].double(), HEADS)) < 1e-5


def test_an_odd_share_of_rotated_numbers_is_refused():
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.4 of heads of 8 is 3 numbers, which must be even"):
        TinyGPTVForConditionalGeneration(
            tiny_config(
                text_config={
                    **tiny_config().text_config.to_dict(),
                    "partial_rotary_factor": 0.4,
                    "rope_parameters": None,
                }
            )
        )
