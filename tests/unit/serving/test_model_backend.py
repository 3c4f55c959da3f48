"""One replica: what settings load, what a job asks of the assistant, what its deltas and errors become."""

from __future__ import annotations

import asyncio
import os
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.serving import artifact as artifacts
from pipelines.serving import model_backend
from pipelines.serving.backend import ChatJob, Failure, ModelInfo, Piece, PromptRead, ReplicaStats, TokenProbability
from pipelines.serving.metrics import ENGINE_COUNTERS, ENGINE_GAUGES
from pipelines.serving.model_backend import ModelBackend
from pipelines.settings import ServeSettings
from tinygptv.data.conversation import ChatImage, ChatMessage
from tinygptv.inference import assistant as assistants
from tinygptv.inference import loading
from tinygptv.inference.request import Delta, EngineStats, PromptTooLong
from tinygptv.inference.sampling import SamplingParams, TokenLogprobs
from tinygptv.inference.watch import ThreadFailure

SAMPLING = {"max_tokens": 7, "temperature": 0.5}


class Assistant:
    """Says the deltas that it is given, or fails; notes what it is asked."""

    def __init__(self, *deltas, error=None):
        self.deltas, self.error, self.asked, self.closed = deltas, error, [], False
        self.images = SimpleNamespace(image_size=4, num_encoded=11, num_reused=12)
        self.token_bytes = {1: b"a", 2: b"\xc3", 3: b"\xc3\xbc"}
        self.stats, self.max_batch_size, self.context_length = EngineStats(steps=3, waiting=2), 5, 99
        self.model = SimpleNamespace(config=SimpleNamespace(scope="photographs"))

    async def prepare(self, messages, params, salt):
        self.asked.append((messages, params, salt))
        if self.error:
            raise self.error
        return SimpleNamespace(ids=[5, 6, 7])

    async def stream(self, request, interval_s):
        self.asked.append((len(request.ids), interval_s))
        try:
            for delta in self.deltas:
                if isinstance(delta, Exception):
                    raise delta
                yield delta
        finally:
            self.closed = True

    def check_health(self, stuck_after_s):
        self.asked.append(stuck_after_s)


def replica(*deltas, error=None):
    backend = ModelBackend.__new__(ModelBackend)
    backend.assistant, backend.stuck_after_s, backend.created = Assistant(*deltas, error=error), 30, 1234
    return backend


def image(side):
    return ChatImage(1, np.zeros((3, side, side), np.uint8), 9, 9)


def job(*sides, **fields):
    messages = [ChatMessage("user", f"m{side}", (image(side),)) for side in sides] or [ChatMessage("user", "hi", ())]
    return ChatJob(tuple(messages), SAMPLING, **fields)


def stream(backend, given):
    async def collect():
        return [item async for item in backend.stream(given)]

    return asyncio.run(collect())


DELTAS = (
    Delta("a", [1, 2], num_reused=4, logprobs=[TokenLogprobs(1, -0.5, [(2, -0.7), (3, -0.9)])]),
    Delta("b", [3], logprobs=[TokenLogprobs(3, -0.1, [])]),
    Delta("", [], finish_reason="length"),
)
PIECES = [
    Piece(
        "a", 2, 4, (TokenProbability("a", -0.5, b"a", (
            TokenProbability("\ufffd", -0.7, b"\xc3"), TokenProbability("ü", -0.9, b"\xc3\xbc"))),),
    ),
    Piece("b", 1, 0, (TokenProbability("ü", -0.1, b"\xc3\xbc", ()),)),
    Piece("", 0, 0, (), "length"),
]  # fmt: skip


def test_a_stream_is_the_prompt_and_then_a_piece_for_each_delta():
    backend = replica(*DELTAS)
    given = job(4, 4, interval_s=0.25, salt=77)
    assert stream(backend, given) == [PromptRead(3), *PIECES]
    (messages, params, salt), (length, interval_s) = backend.assistant.asked
    assert messages == given.messages and salt == 77 and params == SamplingParams(max_tokens=7, temperature=0.5)
    assert (length, interval_s) == (3, 0.25) and backend.assistant.closed


def test_a_whole_answer_waits_for_its_end():
    backend = replica(*DELTAS)
    assert asyncio.run(backend.complete(job())) == [PromptRead(3), *PIECES]
    assert backend.assistant.asked[1] == (3, float("inf")) and backend.assistant.closed


@pytest.mark.parametrize(
    ("reason", "error", "item"),
    [
        (None, "", Piece("x", 1)),
        ("stop", "", Piece("x", 1, finish_reason="stop")),
        ("length", "", Piece("x", 1, finish_reason="length")),
        ("error", "out of memory.", Failure("out of memory.", "model")),
        ("cancelled", "", Failure("the answer was cancelled.", "model")),
    ],
)
def test_why_an_answer_ends(reason, error, item):
    assert replica()._item(Delta("x", [1], finish_reason=reason, error=error)) == item


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PromptTooLong("too long."), "too_long"),
        (ValueError("no such token."), "request"),
        (ThreadFailure("the images thread has ended."), "unavailable"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_only_item(error, kind):
    for items in (stream(replica(error=error), job()), asyncio.run(replica(error=error).complete(job()))):
        assert items == [Failure(str(error), kind)]


def test_an_engine_that_dies_ends_the_answer_and_other_errors_are_bugs():
    died = ThreadFailure("the engine thread has ended.")
    assert stream(replica(DELTAS[1], died), job())[2:] == [Failure(str(died), "unavailable")]
    assert asyncio.run(replica(died).complete(job()))[1:] == [Failure(str(died), "unavailable")]
    for call in (lambda: stream(replica(KeyError("bug")), job()), lambda: stream(replica(error=KeyError("x")), job())):
        with pytest.raises(KeyError):
            call()


@pytest.mark.parametrize("sides", [(5,), (4, 5), (5, 4)])
def test_images_of_another_size_are_sent_back(sides):
    backend = replica(*DELTAS)
    message = "the model now takes images of 4 pixels; try again."
    assert stream(backend, job(*sides)) == [Failure(message, "stale_image")] and not backend.assistant.asked


def test_a_caller_that_leaves_closes_the_answer():
    backend = replica(*DELTAS)

    async def leave():
        items = backend.stream(job())
        assert [await anext(items), await anext(items)] == [PromptRead(3), PIECES[0]]
        await items.aclose()

    asyncio.run(leave())
    assert backend.assistant.closed


def test_metadata_counters_and_health_are_those_of_the_assistant():
    backend = replica()
    assert asyncio.run(backend.describe()) == ModelInfo(4, 99, 1234, "photographs")
    (stats,) = asyncio.run(backend.stats())
    wanted = {"steps": 3, "waiting": 2, "running": 0, "images_encoded": 11, "images_reused": 12, "slots": 5}
    assert stats == ReplicaStats(str(os.getpid()), platform.node(), stats.values)
    assert wanted.items() <= stats.values.items() and set(stats.values) == {*ENGINE_COUNTERS, *ENGINE_GAUGES}
    asyncio.run(backend.check_health())
    assert backend.assistant.asked == [30]


# ----------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def loaded(monkeypatch):
    """What a replica loads and sets; the model has as many parameters as ``size``."""
    seen = SimpleNamespace(size=1)

    def load(folder, device):
        seen.loaded = folder, device
        parameters = [SimpleNamespace(numel=lambda: seen.size - 1), SimpleNamespace(numel=lambda: 1)]
        seen.model = SimpleNamespace(parameters=lambda: parameters)
        return seen.model, "processor"

    def assistant(model, processor, **options):
        seen.options = options
        return (model, processor)

    monkeypatch.setattr(artifacts, "resolve_artifact", lambda settings: f"/folder/{settings.artifact}")
    monkeypatch.setattr(loading, "load_for_inference", load)
    monkeypatch.setattr(assistants, "Assistant", assistant)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(seen, "threads", count))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    return seen


@pytest.mark.parametrize(
    ("size", "threads", "wanted"),
    [(99_999_999, 0, 1), (100_000_000, 0, 6), (99_999_999, 3, 3), (100_000_000, 2, 2)],
)
def test_threads_are_those_of_the_settings_or_of_the_models_size(loaded, size, threads, wanted):
    loaded.size = size
    ModelBackend(ServeSettings(artifact="x", threads=threads))
    assert loaded.threads == wanted and loaded.loaded == ("/folder/x", "cpu")


@pytest.mark.parametrize(
    ("num_gpus", "there", "device"), [(0, True, "cpu"), (1, True, "cuda"), (0.5, True, "cuda"), (1, False, "cpu")]
)
def test_the_device_is_a_gpu_where_one_is_given_and_there(loaded, monkeypatch, num_gpus, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    ModelBackend(ServeSettings(artifact="x", num_gpus=num_gpus))
    assert loaded.loaded[1] == device


def test_the_bounds_of_the_settings_reach_the_assistant(loaded, monkeypatch):
    monkeypatch.setattr(model_backend.time, "time", lambda: 1234.9)
    bounds = {"max_batch_size": 3, "context_length": 77, "prefill_tokens": 5, "kept_images": 9}
    backend = ModelBackend(ServeSettings(artifact="x", **bounds, kv_cache_dtype="bfloat16", stuck_after_s=44))
    assert loaded.options == {**bounds, "kv_cache_dtype": "bfloat16"}
    assert (backend.stuck_after_s, backend.created) == (44, 1234)
    assert backend.assistant == (loaded.model, "processor")
