"""Batches of a plan: which samples a worker makes, in which order, and that images stay with their samples."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.data import loader
from pipelines.data.loader import BatchMaker, CutCount, LoadPlan, build_mixture, iterate_steps, open_shards
from pipelines.miniature.tiny_training import make_rows, make_world, train_settings
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


def test_a_batch_says_how_long_the_trainer_waited_for_it(plan, monkeypatch):
    now = itertools.count(start=10.0, step=0.25)
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(now))
    waits = [batch.wait_s for batch in iterate_steps(plan, 0, 4, loader_workers=0, prefetch_steps=1)]
    assert waits == [0.25] * 4, "from asking for it to having it"


def test_a_source_that_was_not_prepared_is_named_with_the_others(plan):
    stage = plan.stage
    with pytest.raises(FileNotFoundError, match=r"/nowhere/ lacks pairs, questions: run jobs/prepare_data\.py"):
        open_shards("/nowhere/", stage)
    assert loader.CHUNK_STEPS >= 1


# ---------------------------------------------------------------- bookkeeping, without a tokenizer


def bare_maker(plan, **fields) -> BatchMaker:
    """A maker without open shards."""
    maker = object.__new__(BatchMaker)
    maker.plan, maker.names = plan, ["pairs", "questions"]
    for name, value in fields.items():
        setattr(maker, name, value)
    return maker


def test_samples_are_named_by_the_rows_that_are_not_held_out(plan):
    held = {"pairs": np.arange(0, 30, 2), "questions": np.arange(20)}
    rows, encoder = make_rows("questions", 4)[3:], SimpleNamespace(encode=lambda rendered: "encoded")
    maker = BatchMaker(replace(plan, held_out=held))
    for step in range(3):
        expected = []
        for ref in maker.mixture.step(step):
            name = maker.names[ref.source]
            kept = np.setdiff1d(np.arange(len(maker.shards[name])), held[name])
            expected.append(f"{name}/{maker.shards[name].row_id(int(kept[ref.row]))}")
            read = []
            shards = SimpleNamespace(row=lambda index, read=read: read.append(index) or rows[0])
            loaded = bare_maker(maker.plan, shards={name: shards}, features={}, mixture=maker.mixture, encoder=encoder)
            assert loaded.load(ref).source == ref.source and read == [kept[ref.row]], "what is read is what is named"
        assert maker.sample_ids(step) == expected


def test_cut_samples_are_counted_by_source(plan):
    def sample(source, question, answer):
        return SimpleNamespace(source=source, encoded=SimpleNamespace(question_cut=question, answer_cut=answer))

    samples = [sample(0, True, False), sample(1, False, True), sample(0, True, True), sample(0, False, False)]
    assert bare_maker(plan)._count_cut(samples) == {"pairs": CutCount(3, 2, 1), "questions": CutCount(1, 0, 1)}


def test_features_are_those_of_the_row_and_rows_without_an_image_have_none(plan):
    encoder = SimpleNamespace(encode=lambda rendered: "encoded")
    maker = bare_maker(plan, encoder=encoder)
    rows = make_rows("questions", 4)
    shards = SimpleNamespace(row=lambda index: rows[index])
    features = SimpleNamespace(row=lambda index: np.full((1, 1), index))
    found = [maker.encode(shards, row, np.random.default_rng(0), 1, features) for row in range(4)]
    assert [None if each.query_features is None else int(each.query_features[0, 0]) for each in found] == [
        0,
        1,
        2,
        None,
    ]
    assert all(each.pixels is None and each.source == 1 for each in found)
    assert maker.encode(shards, 0, np.random.default_rng(0), 0).pixels.shape == (3, 28, 28)


def test_the_plans_bounds_cut_a_step_into_micro_batches(plan, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loader, "cut", lambda *given, **more: asked.append((*given, more)) or [slice(0, 3), slice(3, 4)]
    )
    monkeypatch.setattr(loader, "collate", lambda samples, pad, pack_length: (samples, pad, pack_length))
    plan = replace(plan, micro_batch_size=3, micro_batch_tokens=77, padded=False, pack_length=64)
    maker = bare_maker(plan, tokenizer=SimpleNamespace(pad_token_id=5))
    long, short, middle, same = (SimpleNamespace(encoded=SimpleNamespace(input_ids=[n] * n)) for n in (9, 2, 4, 4))
    found = maker.batch([long, middle, short, same])
    assert found == [([short, middle, same], 5, 64), ([long], 5, 64)]
    assert found[0][0][1] is middle and found[0][0][2] is same, "of one length, in the mixture's order"
    plain = bare_maker(replace(plan, pack_length=0), tokenizer=SimpleNamespace(pad_token_id=5))
    plain.batch([middle])
    bare_maker(replace(plan, padded=True), tokenizer=plain.tokenizer).batch([middle])
    assert asked[0] == ([2, 4, 4, 9], 3, 77, {"padded": False})
    assert asked[1:] == [([4], 3, 77, {"padded": False}), ([4], 3, 77, {"padded": True})]


def test_a_stages_mixture_has_its_weights_batch_sizes_and_kept_rows(plan):
    shards = {"pairs": SimpleNamespace(shard_rows=(8, 8, 8, 6)), "questions": SimpleNamespace(shard_rows=(8, 8, 6))}
    mixture = build_mixture(plan.stage, shards, 5, {"questions": np.array([0, 8, 9])})
    found = {source.name: (source.weight, source.batch_size, source.shard_rows) for source in mixture.sources}
    assert found == {"pairs": (2, 4, (8, 8, 8, 6)), "questions": (1, 3, (7, 6, 6))}
    assert (mixture.seed, mixture.draws_per_step) == (5, 2)
