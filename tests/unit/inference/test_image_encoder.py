"""Which images are encoded together, for whom, and what is kept; the model is a stub."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinygptv.data.conversation import ChatImage
from tinygptv.inference import image_encoder as module
from tinygptv.inference.image_encoder import ImageEncoder
from tinygptv.inference.watch import ThreadFailure


class Gate:
    """Stands for the graphed encoder: waits until it is opened, and notes what it encodes together."""

    def __init__(self, model):
        self.batches, self.opened, self.fails = [], threading.Event(), False
        self.entered = threading.Event()

    def encode(self, pixels):
        self.entered.set()
        self.opened.wait(60)
        self.batches.append([int(image[0, 0, 0]) for image in pixels])
        if self.fails:
            raise RuntimeError("why")
        return [torch.tensor([float(image[0, 0, 0])]) for image in pixels]


@pytest.fixture
def encoder(monkeypatch, request):
    monkeypatch.setattr(module, "GraphedEncoder", Gate)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=4))
    made = ImageEncoder(SimpleNamespace(config=config), capacity=getattr(request, "param", 20), batch_size=3)
    yield made
    made._encoder.opened.set()
    made.close()
    assert not made.thread.is_alive()


def image(number, side=4, channels=3):
    return ChatImage(-number, np.full((channels, side, side), number, np.uint8), side, side)


def first_taken(encoder):
    """Wait until the worker encodes the first image alone."""
    future = encoder.encode(image(1))
    assert encoder._encoder.entered.wait(60)
    return future


def test_what_waits_is_encoded_together_up_to_a_batch_in_its_order(encoder):
    futures = [first_taken(encoder), *(encoder.encode(image(number)) for number in range(2, 7))]
    encoder._encoder.opened.set()
    assert [future.result(60).tolist() for future in futures] == [[float(number)] for number in range(1, 7)]
    assert encoder._encoder.batches == [[1], [2, 3, 4], [5, 6]]
    assert (encoder.num_encoded, encoder.num_reused) == (6, 0)


def test_equal_images_share_a_result_before_and_after_it_is_there(encoder):
    first, again, other = first_taken(encoder), encoder.encode(image(1)), encoder.encode(image(1), salt=5)
    assert first is not again and encoder.num_reused == 1
    again.cancel()
    encoder._encoder.opened.set()
    assert (first.result(60).tolist(), other.result(60).tolist()) == ([1.0], [1.0])
    assert encoder.encode(image(1)).result(60) is first.result() and encoder.num_reused == 2
    assert encoder._encoder.batches == [[1], [1]] and encoder.num_encoded == 2, "another caller's is its own"


def test_an_image_that_nobody_waits_for_is_asked_again_later(encoder):
    first = first_taken(encoder)
    left = encoder.encode(image(2))
    left.cancel()
    encoder._encoder.opened.set()
    first.result(60)
    assert encoder.encode(image(3)).result(60).tolist() == [3.0] and [2] not in encoder._encoder.batches
    assert encoder.encode(image(2)).result(60).tolist() == [2.0] and encoder.num_reused == 0


def test_a_caller_that_leaves_takes_the_image_from_nobody_else(encoder):
    first = first_taken(encoder)
    left, stays, gone = encoder.encode(image(2)), encoder.encode(image(2)), encoder.encode(image(2))
    left.cancel(), gone.cancel()
    encoder._encoder.opened.set()
    assert (first.result(60).tolist(), stays.result(60).tolist()) == ([1.0], [2.0])
    assert encoder._encoder.batches == [[1], [2]] and left.cancelled() and gone.cancelled()


@pytest.mark.parametrize("encoder", [2], indirect=True)
def test_so_many_images_are_kept_and_the_one_that_was_used_least_recently_leaves(encoder):
    encoder._encoder.opened.set()
    for number in (1, 2, 1, 3, 1, 2):
        assert encoder.encode(image(number)).result(60).tolist() == [float(number)]
    assert encoder._encoder.batches == [[1], [2], [3], [2]]
    assert (encoder.num_encoded, encoder.num_reused, len(encoder._entries)) == (4, 2, 2)


@pytest.mark.parametrize("encoder", [2], indirect=True)
def test_an_image_that_was_pushed_out_while_it_waited_takes_nothing_from_its_successor(encoder):
    first_taken(encoder)
    encoder.encode(image(2)).cancel()
    encoder.encode(image(3)), encoder.encode(image(4))
    again = encoder.encode(image(2))
    assert encoder.thread.busy_s > 0, "a forward pass that hangs is seen"
    encoder._encoder.opened.set()
    assert again.result(60).tolist() == [2.0]
    assert encoder.encode(image(2)).result(60) is again.result() and encoder.num_reused == 1
    assert encoder._encoder.batches == [[1], [3, 4], [2]]


def test_all_who_wait_for_a_failing_batch_are_told_and_the_next_may_succeed(encoder, caplog):
    encoder._encoder.fails = True
    first = first_taken(encoder)
    others = [encoder.encode(image(2)), encoder.encode(image(3)), encoder.encode(image(3))]
    encoder._encoder.opened.set()
    for future in (first, *others):
        with pytest.raises(RuntimeError, match=r"^why$"):
            future.result(60)
    assert encoder.num_encoded == 0
    assert caplog.messages == [f"{count} images could not be encoded" for count in (1, 2)]
    encoder._encoder.fails = False
    assert encoder.encode(image(2)).result(60).tolist() == [2.0]


def test_closing_waits_for_what_is_queued(encoder):
    futures = [first_taken(encoder), encoder.encode(image(2))]
    encoder._queue.put(None)
    encoder._encoder.opened.set()
    encoder.thread.join(60)
    assert [future.result(0).tolist() for future in futures] == [[1.0], [2.0]] and not encoder.thread.is_alive()
    with pytest.raises(ThreadFailure, match="the image-encoder thread has ended"):
        encoder.encode(image(3))
    encoder.close()


def test_what_is_kept_is_read_and_changed_by_one_thread_at_a_time(encoder, monkeypatch):
    seen, get = [], encoder._entries.get
    monkeypatch.setattr(encoder._entries, "get", lambda key: seen.append(encoder._lock.locked()) or get(key))
    first, left = first_taken(encoder), encoder.encode(image(2))
    left.cancel()
    encoder._encoder.opened.set()
    first.result(60), encoder.encode(image(3)).result(60)
    encoder._encoder.fails = True
    with pytest.raises(RuntimeError):
        encoder.encode(image(4)).result(60)
    assert seen == [True] * 6, "four images, one that nobody waits for and one that failed"


def test_unless_told_otherwise_256_images_are_kept_and_8_encoded_together(monkeypatch):
    monkeypatch.setattr(module, "GraphedEncoder", Gate)
    made = ImageEncoder(SimpleNamespace())
    made.close()
    assert (made._entries.capacity, made.batch_size) == (256, 8)


@pytest.mark.parametrize("wrong", [image(1, side=5), image(1, channels=1)])
def test_images_for_another_model_are_refused(encoder, wrong):
    with pytest.raises(ValueError, match=r"was sent to a model of \[3, 4, 4\]"):
        encoder.encode(wrong)
    assert encoder._queue.empty() and len(encoder._entries) == 0
