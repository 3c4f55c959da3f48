"""Images, prompts and answers together, and the encoder that computes each image once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import threading
import time

import numpy as np
import pytest
import torch

from tests.serving_model import IMAGE_SIZE, make_image, make_model, make_processor, save_checkpoint
from tinygptv.data.conversation import ChatImage, ChatMessage
from tinygptv.data.images import normalise_pixels
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.image_encoder import ImageEncoder
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.request import PromptTooLong
from tinygptv.inference.sampling import SamplingParams
from tinygptv.inference.watch import ThreadFailure


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


@pytest.mark.parametrize("said", ["yes, a", None])
def test_space_before_the_rest_of_an_answer_is_kept(assistant, monkeypatch, said):
    messages = [ChatMessage("user", "what is it?"), *([ChatMessage("assistant", said)] if said else [])]
    monkeypatch.setattr(assistant.loop, "iterate", lambda request: request)
    requests = [assistant.iterate(messages), asyncio.run(assistant.prepare(messages, SamplingParams()))]
    assert [request.continues for request in requests] == [said is not None] * 2


def test_turns_reuse_image_and_history(assistant):
    image = assistant.open(make_image(5))
    before = dataclasses.replace(assistant.stats), assistant.images.num_encoded
    messages = [ChatMessage("user", "[vqa] what is it?", (image,))]
    answer = assistant.answer(messages, SamplingParams(max_tokens=8))
    messages += [ChatMessage("assistant", answer), ChatMessage("user", "sure?")]
    assistant.answer(messages, SamplingParams(max_tokens=8))
    assert assistant.images.num_encoded - before[1] == 1
    assert assistant.stats.reused_tokens - before[0].reused_tokens >= 10


def test_async_front_gives_the_same(assistant):
    messages = [ChatMessage("user", "hello", (assistant.open(make_image(7)),))]

    async def ask():
        request = await assistant.prepare(messages, SamplingParams(max_tokens=12))
        return "".join([delta.text async for delta in assistant.stream(request)])

    assert asyncio.run(ask()) == assistant.answer(messages, SamplingParams(max_tokens=12))


@pytest.mark.security
def test_too_much_text_is_refused_before_any_work(assistant, monkeypatch):
    encoded = assistant.images.num_encoded
    image = assistant.open(make_image(99))
    with pytest.raises(PromptTooLong):
        assistant.answer([ChatMessage("user", "word " * 300, (image,))])
    with pytest.raises(PromptTooLong, match="characters"):
        assistant.answer([ChatMessage("user", "x" * 1_000_000, (image,))])
    tokenized = []
    monkeypatch.setattr("tinygptv.inference.assistant.encode_conversation", lambda *_: tokenized.append(1))
    empty = [ChatMessage("user", ""), ChatMessage("assistant", "")]
    with pytest.raises(PromptTooLong, match="200001 messages"):
        assistant.answer([*empty * 100_000, ChatMessage("user", "hi", (image,))])
    assert not tokenized
    assert assistant.images.num_encoded == encoded


def test_embeddings_are_those_of_the_model_and_made_once():
    encoder = ImageEncoder(make_model(), capacity=3)
    images = [ChatImage.from_bytes(make_image(seed), IMAGE_SIZE) for seed in range(4)]
    futures = [encoder.encode(image) for image in [*images, images[3]]]
    for image, future in zip(images, futures, strict=False):
        pixel_values = torch.from_numpy(normalise_pixels(image.pixels[None]))
        torch.testing.assert_close(future.result(60), make_model().encode_images(pixel_values)[0])
    assert (encoder.num_encoded, encoder.num_reused) == (4, 1)
    encoder.encode(images[0]).result(60)  # the oldest had to leave
    assert encoder.num_encoded == 5 and encoder.thread.daemon, "it does not keep a process that ends"
    assert not any(entry.waiters for entry in encoder._entries._entries.values()), "nobody waits, nothing is held"
    encoder.close()
    assert not encoder.thread.is_alive()


def test_a_failing_image_is_reported_and_tried_again(monkeypatch):
    encoder = ImageEncoder(make_model())
    image = ChatImage.from_bytes(make_image(), IMAGE_SIZE)
    forward = encoder._forward

    def broken(images):
        monkeypatch.setattr(encoder, "_forward", forward)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="memory"):
        encoder.encode(image).result(60)
    assert encoder.encode(image).result(60).shape == (4, 64)
    encoder.close()


class SlowEncoder(ImageEncoder):
    """Encodes when it is told to."""

    def __init__(self, **options):
        self.may_encode, self.batches = threading.Semaphore(0), []
        super().__init__(make_model(), **options)

    def _forward(self, images):
        assert self.may_encode.acquire(timeout=60)
        self.batches.append([image.number for image in images])
        return super()._forward(images)


@pytest.fixture
def slow_encoder():
    encoder = SlowEncoder()
    yield encoder
    encoder.may_encode.release(100)
    encoder.close()


def chat_image(seed):
    return ChatImage.from_bytes(make_image(seed), IMAGE_SIZE)


@pytest.mark.security
def test_a_caller_that_leaves_hurts_neither_the_thread_nor_others(slow_encoder):
    leaving, staying = slow_encoder.encode(chat_image(1)), slow_encoder.encode(chat_image(1))
    while not slow_encoder.thread.busy_s:
        time.sleep(0.001)
    assert leaving.cancel()
    slow_encoder.may_encode.release(10)
    assert staying.result(60).shape == (4, 64)
    assert slow_encoder.encode(chat_image(2)).result(60).shape == (4, 64)
    slow_encoder.thread.check(stuck_after_s=60)


def test_a_caller_that_leaves_a_failing_image_does_not_end_the_thread(slow_encoder, monkeypatch):
    leaving = slow_encoder.encode(chat_image(1))
    while not slow_encoder.thread.busy_s:
        time.sleep(0.001)
    leaving.cancel()
    monkeypatch.setattr(slow_encoder.model, "encode_images", lambda *_: 1 / 0)
    slow_encoder.may_encode.release()
    while slow_encoder.thread.busy_s:
        time.sleep(0.001)
    monkeypatch.undo()
    slow_encoder.may_encode.release(10)
    assert slow_encoder.encode(chat_image(1)).result(60).shape == (4, 64)


def test_images_that_nobody_waits_for_are_not_encoded(slow_encoder):
    blocking = slow_encoder.encode(chat_image(0))
    while not slow_encoder.thread.busy_s:
        time.sleep(0.001)
    for future in [slow_encoder.encode(chat_image(seed)) for seed in range(1, 9)]:
        future.cancel()
    wanted = slow_encoder.encode(chat_image(9))
    again = slow_encoder.encode(chat_image(3))  # its first caller left, the second one stays
    slow_encoder.may_encode.release(10)
    for future in (blocking, wanted, again):
        future.result(60)
    assert slow_encoder.num_encoded == 3


@pytest.mark.security
def test_callers_with_different_salts_share_nothing():
    encoder = ImageEncoder(make_model())
    results = [encoder.encode(chat_image(1), salt).result(60) for salt in (0, 0, 5)]
    assert (encoder.num_encoded, encoder.num_reused) == (2, 1)
    torch.testing.assert_close(results[0], results[2])
    encoder.close()


def test_a_dead_encoder_is_noticed_and_refuses(assistant, monkeypatch):
    monkeypatch.setattr(assistant.images.thread, "is_alive", lambda: False)
    with pytest.raises(ThreadFailure, match="image-encoder thread has ended"):
        assistant.check_health(stuck_after_s=60)
    with pytest.raises(ThreadFailure):
        assistant.answer([ChatMessage("user", "hi", (assistant.open(make_image(77)),))])


def test_clients_that_leave_while_their_images_are_encoded(assistant):
    """The way of a request over HTTP: a task that is cancelled while it waits for its image."""
    message = [ChatMessage("user", "hi", (assistant.open(make_image(55)),))]

    async def leave_and_ask():
        for _ in range(20):
            task = asyncio.create_task(assistant.prepare(message, SamplingParams(max_tokens=2)))
            await asyncio.sleep(random.uniform(0, 0.01))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return await asyncio.wait_for(assistant.prepare(message, SamplingParams(max_tokens=2)), 60)

    assert len(asyncio.run(leave_and_ask()).ids) > 4
    assistant.check_health(stuck_after_s=60)


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
    with pytest.raises(ValueError, match="no weights"):
        load_for_inference(tmp_path)
