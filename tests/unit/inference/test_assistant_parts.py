"""What an assistant hands to its engine and encoder, and at which bounds it refuses; nothing is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinygptv.data.conversation import ChatMessage
from tinygptv.inference import assistant as module
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.request import Delta, PromptTooLong
from tinygptv.inference.sampling import SamplingParams
from tinygptv.inference.watch import ThreadFailure, WatchedThread

IMAGE = 99

TURN = [ChatMessage("user", "hi")]


class Parts:
    """Engine, images and loop of an assistant in one; notes what they are asked."""

    def __init__(self):
        self.notes, self.context_length, self.device = [], 10, torch.device("cpu")
        self.refused = False

    def check_length(self, length):
        self.notes.append(("length", length))
        if self.refused:
            raise PromptTooLong("too long")

    def check(self, request):
        self.notes.append(("check", request.salt))

    def encode(self, image, salt):
        self.notes.append(("encode", image.number, salt))
        future = Future()
        future.set_result(torch.full((2, 3), float(image.number)))
        return future

    def iterate(self, request):
        self.notes.append(("iterate", request.params))
        yield from self.deltas


@pytest.fixture
def made(monkeypatch):
    found = object.__new__(Assistant)
    parts = Parts()
    found.engine = found.images = found.loop = parts
    found.processor = SimpleNamespace(image_token_id=IMAGE, num_query_tokens=2)
    found.model = SimpleNamespace(
        embed=lambda ids, image_embeds: parts.notes.append(("embed", ids, image_embeds)) or ids[..., None]
    )
    found._layout = "layout"
    found._tokenizing = ThreadPoolExecutor(1)
    images = [SimpleNamespace(number=-5), SimpleNamespace(number=-8)]
    ids = np.array([1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3])
    monkeypatch.setattr(
        module, "encode_conversation", lambda messages, layout: parts.notes.append(layout) or (ids, images)
    )
    yield found, parts
    found._tokenizing.shutdown()


def test_the_positions_of_an_image_name_it_and_each_image_has_its_own(made):
    assistant, parts = made
    ids, images, pending = assistant._encode([ChatMessage("user", "hi")], 7)
    assert parts.notes == ["layout", ("length", 7), ("encode", -5, 7), ("encode", -8, 7)], "checked, then encoded"
    request = assistant._build(
        TURN, ids, images, [future.result() for future in pending], SamplingParams(max_tokens=3), 7
    )
    assert request.ids.tolist() == [1, -5, -5, 2, -8, -8, 3] and ids.tolist()[1] == IMAGE
    assert (request.params.max_tokens, request.salt, request.inputs_embeds.shape) == (3, 7, (7, 1))
    (_, given, embeds), checked = parts.notes[-2:]
    assert given.tolist() == [[1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]] and embeds[:, 0, 0].tolist() == [-5.0, -8.0]
    assert checked == ("check", 7)


def test_text_alone_has_no_embeddings_of_images(made):
    assistant, parts = made
    request = assistant._build(TURN, np.array([1, 2]), [], [], SamplingParams())
    assert parts.notes[0][2] is None and request.ids.tolist() == [1, 2] and request.salt == 0


def test_no_image_is_encoded_for_a_prompt_that_is_too_long(made):
    assistant, parts = made
    parts.refused = True
    with pytest.raises(PromptTooLong, match="too long"):
        assistant._encode([ChatMessage("user", "hi")])
    assert parts.notes == ["layout", ("length", 7)]


def test_bounds_are_those_of_the_context(made):
    """As many messages as tokens, and as many characters as the longest tokens may have, are not refused unread."""
    assistant, _ = made
    most = 128 * 10  # the longest token of Phi-2 has 128 characters
    assistant._check_bounds([ChatMessage("user", "")] * 10)
    assistant._check_bounds([ChatMessage("user", "x" * (most - 1)), ChatMessage("assistant", "x")])
    with pytest.raises(PromptTooLong, match=r"^the conversation has 11 messages: the context is 10 tokens"):
        assistant._check_bounds([ChatMessage("user", "")] * 11)
    with pytest.raises(PromptTooLong, match=f"has {most + 1} characters: far more than the context of 10 tokens"):
        assistant._check_bounds([ChatMessage("user", "x" * most), ChatMessage("assistant", "x")])


def test_a_whole_answer_is_the_sum_of_its_pieces_or_its_error(made):
    assistant, parts = made
    parts.deltas = [Delta("a"), Delta("b"), Delta("c", finish_reason="stop")]
    params = SamplingParams(max_tokens=5)
    assert assistant.answer([ChatMessage("user", "hi")], params) == "abc"
    assert parts.notes[-1] == ("iterate", params)
    assistant.answer([ChatMessage("user", "hi")])
    assert parts.notes[-1] == ("iterate", SamplingParams()), "as by default"
    parts.deltas = [Delta("a"), Delta(finish_reason="error", error="why")]
    with pytest.raises(RuntimeError, match=r"^why$"):
        assistant.answer([ChatMessage("user", "hi")])


@pytest.mark.parametrize(
    ("asked", "has_card", "device"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_a_card_is_taken_where_there_is_one(monkeypatch, asked, has_card, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr(module, "load_for_inference", lambda *given: given)
    monkeypatch.setattr(
        Assistant, "__init__", lambda self, *given, **options: vars(self).update(given=given, options=options)
    )
    found = Assistant.load("/folder", asked, max_batch_size=3)
    assert (found.given, found.options) == (("/folder", device), {"max_batch_size": 3})


def test_what_is_given_reaches_engine_and_encoder(monkeypatch):
    made = {}
    monkeypatch.setattr(module, "ImageEncoder", lambda *given: made.update(images=given) or "images")
    monkeypatch.setattr(
        module, "Engine", lambda *given, **options: made.update(engine=given, options=options) or "engine"
    )
    monkeypatch.setattr(module, "EngineLoop", lambda engine: f"loop of {engine}")
    processor = SimpleNamespace(tokenizer="tokenizer", end_symbol="###", layout=lambda: "layout")
    options = {"max_batch_size": 3, "context_length": 77, "prefill_tokens": 5, "kv_cache_dtype": "bfloat16"}
    found = Assistant("model", processor, **options, kept_images=9)
    assert (found.images, found.engine, found.loop, found.max_batch_size) == ("images", "engine", "loop of engine", 3)
    assert made["images"] == ("model", 9) and made["engine"] == ("model", "tokenizer")
    assert made["options"] == {**options, "stop": ("###",)} and found._layout == "layout"
    found.engine = SimpleNamespace(context_length=77, stats="counters")
    assert (found.context_length, found.stats) == (77, "counters")


@pytest.mark.parametrize("stuck", ["engine", "image-encoder"])
def test_health_is_that_of_both_threads(stuck):
    assistant = object.__new__(Assistant)
    threads = {name: WatchedThread(lambda: None, name) for name in ("engine", "image-encoder")}
    assistant.loop, assistant.images = (SimpleNamespace(thread=thread) for thread in threads.values())
    for thread in threads.values():
        thread.is_alive = lambda: True
    assistant.check_health(5.0)
    threads[stuck]._working_since = -1e6
    with pytest.raises(ThreadFailure, match=f"the {stuck} thread has been on one step for"):
        assistant.check_health(5.0)
    threads[stuck].is_alive = lambda: False
    with pytest.raises(ThreadFailure, match=f"the {stuck} thread has ended"):
        assistant.check_health(1e9)


def test_work_is_timed_from_its_begin_to_its_end(monkeypatch):
    from tinygptv.inference import watch

    clock = iter([10.0, 13.5])
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    thread = WatchedThread(lambda: None, "x")
    assert thread.daemon and thread.name == "x" and thread.busy_s == 0.0
    with suppress(KeyError), thread.working():
        assert thread.busy_s == 3.5
        raise KeyError
    assert thread.busy_s == 0.0


def test_closing_ends_the_engine_the_encoder_and_the_tokenizing():
    ended = []
    assistant = object.__new__(Assistant)
    assistant.loop = SimpleNamespace(close=lambda: ended.append("loop"))
    assistant.images = SimpleNamespace(close=lambda: ended.append("images"))
    assistant._tokenizing = SimpleNamespace(shutdown=lambda *, wait: ended.append(wait))
    assistant.close()
    assert ended == ["loop", "images", False]
