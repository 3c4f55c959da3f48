"""Images, prompts and answers together, and the encoder that computes each image once."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from tests.serving_model import IMAGE_SIZE, make_image, make_model, make_processor, save_checkpoint
from tinygptv.data.conversation import ChatImage, ChatMessage
from tinygptv.data.images import normalise_pixels
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.engine import PromptTooLong
from tinygptv.inference.image_encoder import ImageEncoder
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def assistant():
    assistant = Assistant(make_model(), make_processor(), max_batch_size=4)
    yield assistant
    assistant.close()


def test_answer_equals_generate(assistant):
    image = assistant.open(make_image(2))
    message = ChatMessage("user", "[vqa] what is it?", (image,))
    processor = make_processor()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": message.text}]}]
    )
    inputs = processor(images=make_image(2), text=text)
    output = make_model().generate(**inputs, max_new_tokens=40, do_sample=False)
    wanted = processor.decode_answer(output[0, inputs["input_ids"].shape[1] :])
    assert assistant.answer([message], SamplingParams(max_tokens=40)) == wanted
    assert wanted


def test_turns_reuse_image_and_history(assistant):
    image = assistant.open(make_image(5))
    before = dataclasses.replace(assistant.loop.stats), assistant.images.num_encoded
    messages = [ChatMessage("user", "[vqa] what is it?", (image,))]
    answer = assistant.answer(messages, SamplingParams(max_tokens=8))
    messages += [ChatMessage("assistant", answer), ChatMessage("user", "sure?")]
    assistant.answer(messages, SamplingParams(max_tokens=8))
    assert assistant.images.num_encoded - before[1] == 1
    assert assistant.loop.stats.reused_tokens - before[0].reused_tokens >= 10


def test_async_front_gives_the_same(assistant):
    messages = [ChatMessage("user", "hello", (assistant.open(make_image(7)),))]

    async def ask():
        request = await assistant.prepare(messages, SamplingParams(max_tokens=12))
        return "".join([delta.text async for delta in assistant.stream(request)])

    assert asyncio.run(ask()) == assistant.answer(messages, SamplingParams(max_tokens=12))


def test_too_much_text_is_refused_before_any_work(assistant):
    encoded = assistant.images.num_encoded
    image = assistant.open(make_image(99))
    with pytest.raises(PromptTooLong):
        assistant.answer([ChatMessage("user", "word " * 300, (image,))])
    with pytest.raises(PromptTooLong, match="characters"):
        assistant.answer([ChatMessage("user", "x" * 1_000_000, (image,))])
    assert assistant.images.num_encoded == encoded


def test_embeddings_are_those_of_the_model_and_made_once():
    encoder = ImageEncoder(make_model(), capacity=3)
    images = [ChatImage.from_bytes(make_image(seed), IMAGE_SIZE) for seed in range(4)]
    futures = [encoder.encode(image) for image in [*images, images[3]]]
    for image, future in zip(images, futures, strict=False):
        pixel_values = torch.from_numpy(normalise_pixels(image.pixels[None]))
        torch.testing.assert_close(future.result(10), make_model().encode_images(pixel_values)[0])
    assert futures[4] is futures[3]
    assert (encoder.num_encoded, encoder.num_reused) == (4, 1)
    encoder.encode(images[0]).result(10)  # the oldest had to leave
    assert encoder.num_encoded == 5
    encoder.close()


def test_a_failing_image_is_reported_and_tried_again(monkeypatch):
    encoder = ImageEncoder(make_model())
    image = ChatImage.from_bytes(make_image(), IMAGE_SIZE)
    forward = encoder._forward

    def broken(images):
        monkeypatch.setattr(encoder, "_forward", forward)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="memory"):
        encoder.encode(image).result(10)
    assert encoder.encode(image).result(10).shape == (4, 64)
    encoder.close()


def test_an_image_of_another_size_is_refused():
    encoder = ImageEncoder(make_model())
    with pytest.raises(ValueError, match="32, 32"):
        encoder.encode(ChatImage(-1, np.zeros((3, 16, 16), np.uint8), 16, 16))
    encoder.close()


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_checkpoint_answers_as_before(tmp_path, lora):
    model, processor = load_for_inference(save_checkpoint(tmp_path / "checkpoint", lora=lora))
    assert not model.config.lora_rank and not model.training
    again = Assistant(model, processor, max_batch_size=1)
    first = Assistant(make_model(lora=lora), make_processor(), max_batch_size=1)
    message = [ChatMessage("user", "what is it?", (again.open(make_image(3)),))]
    params = SamplingParams(max_tokens=20)
    assert again.answer(message, params) == first.answer(message, params) != ""
    again.close()
    first.close()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_for_inference(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_for_inference(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tinygptv"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_for_inference(tmp_path)
