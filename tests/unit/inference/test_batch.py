"""Answers of the batch path: the same as one at a time, laid out as in training, and faults are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.serving_model import make_image, make_model, make_processor
from tinygptv.data.images import normalise_pixels, open_image
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import VQA_SHORT_ANSWER
from tinygptv.data.sample import SampleEncoder, TextLimits
from tinygptv.inference import batch
from tinygptv.inference.batch import MEAN_COLOUR, Answerer, Prompt
from tinygptv.inference.request import Delta
from tinygptv.inference.sample_losses import _batches_by_length
from tinygptv.training.stages import get_stage


@pytest.fixture(scope="module")
def answerer():
    return Answerer(make_model(), make_processor(), batch_size=4)


@pytest.fixture(scope="module")
def embeds(answerer):
    return answerer.encode([open_image(make_image(seed)) for seed in range(3)])


def prompts_of(n):
    words = [
        "what?",
        "[vqa] is there a red circle here?",
        "[refer] give me the location of it",
        "and now, again, what?",
    ]
    return [Prompt(words[i % 4], image=i % 3 if i % 5 else None, max_new_tokens=5 + i % 3) for i in range(n)]


def generate_alone(prompt, image_embeds):
    """The plain way: transformers' generate, one prompt, no cache between prompts."""
    model, processor = make_model(), make_processor()
    ids = torch.from_numpy(Answerer(model, processor).prompt_ids(prompt)).unsqueeze(0)
    images = None if prompt.image is None else image_embeds[prompt.image].unsqueeze(0)
    out = model.generate(ids, image_embeds=images, max_new_tokens=prompt.max_new_tokens, do_sample=False)
    return processor.decode_answer(out[0, ids.shape[1] :])


def test_answers_equal_generate_one_at_a_time(answerer, embeds):
    prompts = prompts_of(11)
    replies = answerer.answer(prompts, embeds)
    assert [reply.text for reply in replies] == [generate_alone(prompt, embeds) for prompt in prompts]
    assert len({reply.text for reply in replies}) > 3, "answers that do not depend on the prompt test nothing"


def test_answers_do_not_depend_on_earlier_calls(embeds):
    prompts = prompts_of(9)
    once = Answerer(make_model(), make_processor(), batch_size=4)
    warm = Answerer(make_model(), make_processor(), batch_size=4)
    warm.answer([replace(prompt, image=0) for prompt in prompts], embeds[1:])  # other pictures under the same numbers
    assert warm.answer(prompts, embeds) == once.answer(prompts, embeds)


def test_positions_of_an_image_name_it(answerer, embeds):
    """Prompts with the same question and another image must not share a computed beginning."""
    prompts = [Prompt("what is it?", 0), Prompt("what is it?", 2), Prompt("what is it?", 2), Prompt("what is it?")]
    assert {(prompt.max_new_tokens, prompt.choices, prompt.history) for prompt in prompts} == {(20, (), ())}
    ids = [answerer.prompt_ids(prompt) for prompt in prompts]
    asked = [answerer._request(of, prompt, embeds).ids for of, prompt in zip(ids, prompts, strict=True)]
    shown = ids[0] == answerer.processor.image_token_id
    assert shown.any() and all((of[shown] < 0).all() for of in asked[:3]), "no number of a token"
    assert not (asked[0] == asked[1])[shown].any() and (asked[1] == asked[2]).all()
    assert (asked[0] == asked[1])[~shown].all() and (asked[3] >= 0).all()


def test_no_prompts(answerer):
    assert answerer.answer([], []) == []
    assert answerer.choice_losses([], []) == []
    assert answerer.encode([]) == []


def test_too_long_a_prompt_is_an_error_and_the_others_are_answered(answerer, embeds):
    replies = answerer.answer([Prompt("word " * 400), Prompt("what?", 0)], embeds)
    assert "context" in replies[0].error and replies[0].text == ""
    assert replies[1].error == ""


def test_weights_that_give_nan_are_an_error(embeds):
    model = make_model(seed=5)
    broken = embeds[0].clone()
    broken[0, 0] = float("nan")
    replies = Answerer(model, make_processor(), batch_size=2).answer([Prompt("a", 0), Prompt("b")], [broken])
    assert "not finite" in replies[0].error and not replies[1].error


def test_prompt_layout_is_that_of_training(answerer):
    encoder = SampleEncoder(make_processor().layout(), TextLimits(1000))
    history = (Exchange("first?", "one"),)
    ids = answerer.prompt_ids(Prompt("second?", image=0, history=history))
    trained = encoder.encode([Exchange("first?", "one", 1), Exchange("second?", "two")]).input_ids
    assert trained[: len(ids)] == ids.tolist()
    assert get_stage("paper", 4).template == make_processor().template == "human"


def test_blank_picture_is_nearly_zero_after_normalisation(answerer):
    black, blank = answerer.encode([open_image(make_image(0))])[0], answerer.blank()
    assert blank.shape == black.shape and not torch.equal(blank, black)
    pixels = normalise_pixels(np.full((1, 3, 2, 2), np.array(MEAN_COLOUR, np.uint8)[:, None, None], np.uint8))
    assert abs(np.asarray(pixels)).max() < 0.01, "each channel's own mean"


def test_choice_losses_equal_the_models_loss(answerer, embeds):
    prompts = [
        Prompt("which?", 1, choices=("red", "a much longer choice", "no")),
        Prompt("and?", choices=("yes", "no")),
        Prompt("which?", 2, choices=("red", "the longest of all the choices that there are here")),
    ]
    losses = answerer.choice_losses(prompts, embeds)
    assert [len(row) for row in losses] == [3, 2, 2], "batches are made by length, results come as they were asked"
    model, processor = make_model(), make_processor()
    for prompt, row in zip(prompts, losses, strict=True):
        for choice, loss in zip(prompt.choices, row, strict=True):
            ids = answerer.prompt_ids(prompt)
            answer = np.array(processor.tokenizer.encode(choice + "###", add_special_tokens=False))
            labels = np.concatenate([np.full(len(ids), -100), answer])
            out = model(
                input_ids=torch.tensor(np.concatenate([ids, answer])[None]),
                image_embeds=None if prompt.image is None else embeds[prompt.image].unsqueeze(0),
                labels=torch.tensor(labels[None]),
            )
            assert loss == pytest.approx(float(out.loss) * len(answer), rel=1e-4)


def test_choice_that_does_not_fit_is_never_chosen(answerer, embeds):
    losses = answerer.choice_losses([Prompt("which?", 0, choices=("word " * 300, "no"))], embeds)
    assert losses[0][0] == float("inf") and losses[0][1] < 1e4


def test_a_choice_that_just_fits_has_its_loss(answerer, embeds):
    """256 positions: prompt, choice and end symbol together may fill all of them."""
    prompt = Prompt("which?", 0)
    tokenizer = answerer.processor.tokenizer
    (word,) = tokenizer.encode(" red", add_special_tokens=False)[:1]
    end = len(tokenizer.encode("###", add_special_tokens=False))
    room = 256 - len(answerer.prompt_ids(prompt)) - end
    fits = next(
        text
        for count in range(room, 0, -1)
        if len(answerer.layout.encode_answer(text := tokenizer.decode([word] * count).strip())) == room + end
    )
    longer = fits + tokenizer.decode([word])
    assert len(answerer.layout.encode_answer(longer)) == room + end + 1
    losses = answerer.choice_losses([replace(prompt, choices=(fits, longer))], embeds)
    assert 0 < losses[0][0] < 1e4 and losses[0][1] == float("inf")


def test_samples_of_like_length_share_a_batch_of_bounded_size():
    assert _batches_by_length([2, 9, 5]) == [[1, 2, 0]]
    assert _batches_by_length([4096, 4096, 1]) == [[0, 1], [2]], "8,192 tokens fit, padding included"
    assert _batches_by_length([4097, 4096, 4095, 1]) == [[0], [1, 2], [3]]
    assert _batches_by_length([10_000, 9000, 1, 1]) == [[0], [1], [2, 3]], "a longer one is alone"
    assert _batches_by_length([]) == []


def test_released_answers_are_cut_as_the_release_cuts_them(answerer):
    released = Answerer(make_model(), make_processor(), released=True)
    assert released._clean("x [/INST] a <s>dog </s> b") == "a dog"
    assert answerer._clean(" a dog </s> ") == "a dog </s>"


def test_released_prompts_are_the_releases_own():
    released = Answerer(make_model(), make_processor(), released=True)
    layout = make_processor().layout()
    for question in ("what is it?", VQA_SHORT_ANSWER.replace("{}", "what?")):
        text = f"###Human: <Img><ImageHere></Img> {question}###Assistant: "
        assert released.prompt_ids(Prompt(question, image=0)).tolist() == layout.encode_text(text)
    second = released.prompt_ids(Prompt("what color?", 0, (Exchange("what is this?", "A dog."),)))
    text = "###Human: <Img></Img> what is this?###Assistant: A dog.###Human: what color?###Assistant: "
    assert make_processor().tokenizer.decode(second) == text
    assert (second == make_processor().image_token_id).sum() == make_processor().num_query_tokens


def test_released_answers_run_past_the_end_symbol(embeds):
    """The stop string ends ours; theirs holds it."""
    processor = make_processor()
    end = processor.tokenizer.encode("###", add_special_tokens=False)
    model = make_model(seed=7)
    prompts = [Prompt("what?", 0, max_new_tokens=6)]
    bias = model.lm_head.bias.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.bias[end[0]] += 1e4  # the model says nothing but the end symbol
        ours = Answerer(model, processor).answer(prompts, embeds)[0].text
        theirs = Answerer(model, processor, released=True).answer(prompts, embeds)[0].text
    finally:
        with torch.no_grad():
            model.lm_head.bias.copy_(bias)
    assert ours == "" and "###" in theirs


class NotedEngine:
    """Answers each request with its own words after a few steps; ``order`` notes what is asked of it."""

    def __init__(self, *given, **options):
        self.order, self.running, self.most, self.number = [(given, options)], {}, 0, 0
        self.context_length = options["context_length"]

    def forget(self):
        self.order.append("forget")

    def add(self, request):
        self.number += 1
        self.running[self.number] = request
        self.order.append((len(request.ids), request.params.max_tokens))
        self.most = max(self.most, len(self.running))
        return self.number

    @property
    def has_work(self):
        return bool(self.running)

    def step(self):
        key = max(self.running)  # the last comes first
        ids = self.running.pop(key).ids
        return [(key, Delta(f" {len(ids)}", [1])), (key, Delta(" it is ", [1, 2], finish_reason="stop"))]


def test_prompts_are_asked_from_the_shortest_on_and_each_gets_its_own_answer(embeds, monkeypatch):
    monkeypatch.setattr(batch, "Engine", NotedEngine)
    asking = Answerer(make_model(), make_processor(), batch_size=3)
    prompts = [Prompt("what is it? " * n, n % 2 or None, max_new_tokens=n) for n in (5, 1, 9, 3, 2, 8, 4, 7)]
    lengths = [len(asking.prompt_ids(prompt)) for prompt in prompts]
    replies = asking.answer(prompts, embeds)
    assert replies == [batch.Reply(f"{length} it is") for length in lengths]
    (given, options), *order = asking._engine.order
    assert order == ["forget", *sorted(zip(lengths, (5, 1, 9, 3, 2, 8, 4, 7), strict=True))]
    assert asking._engine.most == 6, "twice as many as are answered together wait in the engine"
    assert given == (asking.model, asking.processor.tokenizer)
    assert options == {"max_batch_size": 3, "context_length": 128, "prefill_tokens": 2048, "stop": ("###",)}
    engine = asking._engine
    asking.answer(prompts[:2], embeds)
    assert asking._engine is engine and engine.order[-3] == "forget", "the engine of before, which knows nothing"
    asking.answer([replace(prompts[0], max_new_tokens=128)], embeds)
    assert asking._engine is not engine and asking._engine.context_length == 256
    assert Answerer(asking.model, asking.processor).batch_size == 64


@pytest.mark.parametrize(("more", "length"), [(0, 128), (1, 256), (1000, 256)])
def test_the_cache_is_as_long_as_the_longest_prompt_and_its_answer_need(embeds, monkeypatch, more, length):
    monkeypatch.setattr(batch, "Engine", NotedEngine)
    asking = Answerer(make_model(), make_processor(), batch_size=3)
    prompts = [Prompt("what?", 1, max_new_tokens=3), Prompt("and now, again, what?", 1)]
    room = 128 - len(asking.prompt_ids(prompts[1]))
    asking.answer([prompts[0], replace(prompts[1], max_new_tokens=room + more)], embeds)
    assert asking._engine.context_length == length, "in steps of 128 positions, at most the model's 256"
    released = Answerer(make_model(), make_processor(), released=True)
    released.answer(prompts, embeds)
    assert released._engine.order[0][1]["stop"] == ()


def test_the_blank_picture_is_of_the_mean_colour_and_of_the_models_size(answerer, monkeypatch):
    seen = []
    monkeypatch.setattr(answerer, "encode", lambda images: seen.extend(images) or ["embeddings"])
    assert answerer.blank() == "embeddings"
    assert [(image.mode, image.size, image.getcolors()) for image in seen] == [
        ("RGB", (32, 32), [(32 * 32, (123, 117, 104))])
    ]


def test_images_are_encoded_so_many_at_a_time_in_their_order(answerer, monkeypatch):
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        return pixels.mean((1, 2, 3))[:, None, None]

    monkeypatch.setattr(batch, "IMAGE_BATCH", 2)
    monkeypatch.setattr(answerer.model, "encode_images", encode)
    shades = [Image.new("RGB", (8, 8), (shade, shade, shade)) for shade in (0, 40, 80, 120, 160)]
    found = [float(embeds) for embeds in answerer.encode(shades)]
    assert sizes == [2, 2, 1] and found == sorted(found) and len(set(found)) == 5
    assert answerer.encode([]) == []
