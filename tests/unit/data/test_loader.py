"""Batches of a plan: which samples a worker makes, in which order, and that images stay with their samples."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from pipelines.data import loader
from pipelines.data.loader import BatchMaker, LoadPlan, iterate_steps, open_shards
from pipelines.miniature.tiny_training import make_world, train_settings
from pipelines.training.job import resolve_job
from tinygptv.data.images import open_image, resize_pixels
from tinygptv.data.sample import chooser, render_sample


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plan(world, tmp_path_factory) -> LoadPlan:
    job, *_ = resolve_job(train_settings(world, tmp_path_factory.mktemp("run")), 4)
    return job.plan


def keys(batches):
    """What each sample of a worker's step says: its supervised tokens."""
    found = []
    for batch in batches:
        found += np.split(batch.supervised_ids, np.flatnonzero(np.diff(batch.supervised_positions) > 1) + 1)
    return sorted(tuple(ids.tolist()) for ids in found)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_workers_shares_are_the_step(plan, world_size):
    whole = BatchMaker(plan)
    for step in range(4):
        shares = [BatchMaker(plan.for_worker(rank, world_size)).make(step) for rank in range(world_size)]
        together = keys([batch for share in shares for batch in share.micro_batches])
        assert together == keys(whole.make(step).micro_batches)
        assert sum(b.num_samples for share in shares for b in share.micro_batches) == len(whole.sample_ids(step))


def test_wording_and_answers_are_drawn_by_the_generator_of_the_draw(plan):
    """Epochs differ in what they say of a row, and another maker says the same."""
    maker, other, said = BatchMaker(plan), BatchMaker(plan), {}
    for step in range(40):
        for ref in maker.mixture.step(step):
            row = maker.shards[maker.names[ref.source]].row(ref.row)
            rendered = render_sample(row, chooser(maker.mixture.generator(ref)))
            encoded = maker.load(ref).encoded
            assert encoded == maker.encoder.encode(rendered) == other.load(ref).encoded
            assert maker.load(ref).source == ref.source
            said.setdefault((ref.source, ref.row), set()).add(tuple(encoded.input_ids))
    assert any(len(texts) > 1 for texts in said.values())


def test_only_rank_0_names_the_samples_and_it_names_all_of_them(plan):
    ids = [BatchMaker(plan.for_worker(rank, 2)).make(3).sample_ids for rank in range(2)]
    assert ids[0] == BatchMaker(plan).sample_ids(3)
    assert ids[1] == []
    assert {name.split("/")[0] for name in ids[0]} <= {"pairs", "questions"}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_hold_so_many_samples_of_like_length(plan, size):
    batches = BatchMaker(replace(plan, micro_batch_size=size, pack_length=0)).make(1).micro_batches
    assert [batch.num_samples for batch in batches[:-1]] == [size] * (len(batches) - 1)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths)


@pytest.mark.parametrize("pack_length", [0, 64])
def test_images_stay_with_their_samples_when_these_are_reordered_and_packed(plan, pack_length):
    """The n-th run of image positions shows the n-th image of the batch."""
    plan = replace(plan, pack_length=pack_length, micro_batch_size=32)
    maker = BatchMaker(plan)
    for step in range(4):
        expected = {}
        for ref in maker.mixture.step(step):
            sample = maker.load(ref)
            row = maker.shards[maker.names[ref.source]].row(ref.row)
            if row.image is not None:
                pixels = resize_pixels(open_image(row.image), plan.stage.image_size)
                expected.setdefault(tuple(sample.encoded.input_ids), []).append(pixels.tobytes())
        (batch,) = maker.make(step).micro_batches
        ids = batch.input_ids.ravel()
        number = 0
        for start in np.flatnonzero((ids == plan.image_token_id) & (np.r_[-1, ids[:-1]] != plan.image_token_id)):
            around = [text for text in expected if _stands_at(ids, int(start), text, plan.image_token_id)]
            assert any(batch.pixels[number].tobytes() in expected[text] for text in around), step
            number += 1
        assert batch.pixels is None or number == len(batch.pixels)


def _stands_at(ids, image_start, text, image_token_id):
    begin = image_start - text.index(image_token_id)
    return begin >= 0 and tuple(ids[begin : begin + len(text)].tolist()) == text


def test_steps_do_not_depend_on_where_a_run_starts(plan):
    straight = list(iterate_steps(plan, 0, 6, loader_workers=0, prefetch_steps=2))
    later = list(iterate_steps(plan, 4, 6, loader_workers=0, prefetch_steps=1))
    assert [batch.step for batch in straight] == list(range(6))
    assert [batch.step for batch in later] == [4, 5]
    for one, other in zip(straight[4:], later, strict=True):
        assert one.sample_ids == other.sample_ids
        assert all(
            (a.input_ids == b.input_ids).all() for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
        )
    assert len({tuple(batch.sample_ids) for batch in straight}) == 6


def test_an_error_of_the_loader_reaches_the_trainer(plan, monkeypatch):
    def failing(self, step):
        raise OSError(f"step {step} cannot be read")

    monkeypatch.setattr(BatchMaker, "make", failing)
    with pytest.raises(OSError, match="step 2 cannot be read"):
        next(iterate_steps(plan, 2, 5, loader_workers=0, prefetch_steps=2))


def test_no_more_steps_are_made_ahead_than_asked_for(plan, monkeypatch):
    made = []
    original = BatchMaker.make
    monkeypatch.setattr(BatchMaker, "make", lambda self, step: (made.append(step), original(self, step))[1])
    steps = iterate_steps(plan, 0, 30, loader_workers=0, prefetch_steps=3)
    next(steps)
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(made) == 1 + 3 + 1, "the one that was taken, three that wait, one in the making"
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "loader"]
    steps.close()
    thread.join(60)
    assert not thread.is_alive(), "it does not wait for room for ever"


def test_a_source_that_was_not_prepared_is_named_with_the_others(plan):
    stage = plan.stage
    with pytest.raises(FileNotFoundError, match=r"/nowhere/ lacks pairs, questions: run jobs/prepare_data\.py"):
        open_shards("/nowhere/", stage)
    assert loader.CHUNK_STEPS >= 1
