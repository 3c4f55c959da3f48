"""The loader's bookkeeping: which rows are read and named, what is counted, how a step is cut. No model, no cluster."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.data import loader
from pipelines.data.loader import BatchMaker, CutCount, LoadPlan, StepBatch, build_mixture, iterate_steps
from pipelines.data.shard_format import ShardError
from pipelines.miniature.tiny_training import make_rows, write_shard_set
from tinygptv.data import processing
from tinygptv.data.sample import SampleRow, Turn
from tinygptv.miniature.tiny import tiny_tokenizer
from tinygptv.training.stages import StageSource, get_stage

SOURCES = (StageSource("pairs", 2, 4), StageSource("questions", 1, 3))


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> LoadPlan:
    """Of worker 1 of 2, over 30 pairs and 22 questions."""
    folder = tmp_path_factory.mktemp("shards")
    for source, count in (("pairs", 30), ("questions", 22)):
        rows = [SampleRow(f"{source} {n}", source, "text", (Turn("q", ("a",)),)) for n in range(count)]
        write_shard_set(folder / source, rows)
    stage = replace(get_stage("mini", 1), sources=SOURCES, draws_per_step=2, image_size=28)
    return LoadPlan(str(folder), "tokenizer", stage, 3, 256, 4, micro_batch_size=8, rank=1, world_size=2)


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    """The plan's tokenizer without a folder of it."""
    monkeypatch.setattr(loader, "local_checkpoint", lambda uri, weights: uri)
    monkeypatch.setattr(processing, "load_tokenizer", lambda path: tiny_tokenizer())


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


def test_data_that_was_prepared_again_is_not_taken_for_the_trainings(plan):
    """A worker that starts again opens its shards again."""
    shards = loader.open_shards(plan.data, plan.stage)
    digests = {name: each.manifest.digest for name, each in shards.items()}
    assert BatchMaker(replace(plan, digests=digests)).sample_ids(0)
    with pytest.raises(ShardError, match="questions was prepared again while it was trained on: prepare it as it was"):
        BatchMaker(replace(plan, digests={**digests, "questions": digests["pairs"]}))


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
    assert all((each.pixels, each.source, each.encoded) == (None, 1, "encoded") for each in found)
    drawn = maker.encode(shards, 0, np.random.default_rng(0), 0)
    assert (drawn.pixels.shape, drawn.query_features) == ((3, 28, 28), None)
    assert (drawn.source, drawn.encoded) == (0, "encoded")


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
    whole = build_mixture(plan.stage, shards, 5)
    assert [source.shard_rows for source in whole.sources] == [(8, 8, 8, 6), (8, 8, 6)]


def test_a_samples_features_are_those_of_its_source_and_its_kept_row(plan):
    """Each data set has features of its own; rows that are held out do not shift them."""

    def of(name):
        return SimpleNamespace(row=lambda row: (name, row))

    names, rows = ["pairs", "questions"], make_rows("pairs", 1)
    maker = bare_maker(
        replace(plan, held_out={"questions": np.array([0, 2])}),
        shards={name: SimpleNamespace(row=lambda row: rows[0]) for name in names},
        features={name: of(name) for name in names},
        mixture=SimpleNamespace(generator=lambda ref: np.random.default_rng(ref.position)),
        encoder=SimpleNamespace(encode=lambda rendered: rendered),
    )
    refs = [SimpleNamespace(source=source, row=row, position=0) for source, row in ((0, 2), (1, 0), (1, 1), (1, 5))]
    found = [maker.load(ref).query_features for ref in refs]
    assert found == [("pairs", 2), ("questions", 1), ("questions", 3), ("questions", 7)]


def test_a_steps_batch_is_this_workers_share(plan):
    """Every second sample, beginning at the worker's own; its cut samples are those that are counted."""
    asked = []

    def load(self, ref):
        asked.append(ref)
        return f"sample {ref.row}"

    for rank in (0, 1):
        maker = BatchMaker(plan.for_worker(rank, 2))
        refs = maker.mixture.step(7)
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchMaker, "load", load)
            patch.setattr(BatchMaker, "batch", lambda self, samples: ("batches of", *samples))
            patch.setattr(BatchMaker, "_count_cut", lambda self, samples: ("cut of", *samples))
            made = maker.make(7)
        assert asked == refs[rank::2] and len(refs) == 8
        samples = [f"sample {ref.row}" for ref in refs[rank::2]]
        assert (made.step, made.micro_batches, made.cut) == (7, ("batches of", *samples), ("cut of", *samples))
        assert made.sample_ids == ([] if rank else maker.sample_ids(7)) and made.wait_s == 0.0


class Making:
    """Makes steps that are their numbers, in whichever thread; notes them."""

    threads: list[threading.Thread]
    plans: list[LoadPlan]
    last = 10**9

    def __init__(self, plan):
        self.plans.append(plan)

    def make(self, step):
        self.threads.append(threading.current_thread())
        if step > self.last:
            raise OSError(f"step {step} cannot be read")
        return StepBatch(step, [], [], {})


@pytest.fixture
def making(monkeypatch):
    monkeypatch.setattr(Making, "threads", [], raising=False)
    monkeypatch.setattr(Making, "plans", [], raising=False)
    monkeypatch.setattr(loader, "BatchMaker", Making)
    return Making


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 9), (4, 4)])
def test_a_thread_makes_the_steps_asked_for_and_no_other(plan, making, start, stop):
    made = list(iterate_steps(plan, start, stop, loader_workers=0, prefetch_steps=2))
    assert [batch.step for batch in made] == list(range(start, stop))
    assert making.plans == [plan] and len(making.threads) == stop - start
    for thread in set(making.threads):
        assert (thread.name, thread.daemon) == ("loader", True), "a process that ends does not wait for it"
        thread.join(60)
        assert not thread.is_alive()


def test_steps_before_one_that_fails_are_handed_on(plan, making, monkeypatch):
    monkeypatch.setattr(making, "last", 4)
    steps = iterate_steps(plan, 3, 9, loader_workers=0, prefetch_steps=5)
    assert [next(steps).step, next(steps).step] == [3, 4]
    with pytest.raises(OSError, match="step 5 cannot be read"):
        next(steps)
    assert len(making.threads) == 3, "nothing is made after it"


def test_a_loader_that_is_left_makes_no_more(plan, making):
    steps = iterate_steps(plan, 0, 10**9, loader_workers=0, prefetch_steps=1)
    next(steps)
    steps.close()
    making.threads[0].join(60)
    assert not making.threads[0].is_alive()


def test_a_batch_says_how_long_the_trainer_waited_for_it(plan, making, monkeypatch):
    now = itertools.count(start=10.0, step=0.25)
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(now))
    waits = [batch.wait_s for batch in iterate_steps(plan, 0, 4, loader_workers=0, prefetch_steps=1)]
    assert waits == [0.25] * 4, "from asking for it to having it"
