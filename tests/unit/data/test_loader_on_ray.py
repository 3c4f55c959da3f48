"""What the loader asks of Ray Data, by a stand-in for it; tests/integration trains on the real one."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest

from pipelines.data import loader
from pipelines.data.loader import LOADER_CPUS, CutCount, LoadPlan, RayMaker, StepBatch, iterate_steps, open_shards
from pipelines.data.shard_format import Manifest, ShardInfo
from pipelines.data.shards import ShardSet
from tinygptv.training.stages import get_stage

ray_data = pytest.importorskip("ray.data")
ray_datasource = pytest.importorskip("pipelines.data.ray_datasource")


class Maker:
    """Makes a step that is its number, for the plan's rank."""

    def __init__(self, plan):
        self.plan = plan

    def make(self, step):
        return StepBatch(step, [], [f"rank {self.plan.rank}"], {})


class DataSet:
    """Blocks of step numbers as Ray Data would hand them to ``RayMaker``; notes what it is asked for."""

    def __init__(self, blocks, asked):
        self.blocks, self.asked = blocks, asked

    def map_batches(self, function, *, batch_size, fn_constructor_args=None, **options):
        assert batch_size is None, "a block stays whole"
        if fn_constructor_args is not None:
            self.asked.update(options)
            function = function(*fn_constructor_args)
        return DataSet([function(block) for block in self.blocks], self.asked)

    def set_name(self, name):
        self.asked["name"] = name

    def iter_batches(self, **options):
        self.asked.update(options)
        return iter(self.blocks)


@pytest.fixture
def asked(monkeypatch):
    """What Ray Data was asked for."""
    found = {}

    def numbers(start, stop, per_block, *, num_cpus):
        source = ray_datasource._Numbers(start, stop, per_block)
        tasks = source.get_read_tasks(1)
        sizes = [(task.metadata.num_rows, task.metadata.size_bytes) for task in tasks]
        assert all(size == 8 * rows for rows, size in sizes) and sum(rows for rows, _ in sizes) == stop - start
        assert source.estimate_inmemory_data_size() == 8 * (stop - start)
        found.update(count=stop - start, blocks=len(tasks), numbers_cpus=num_cpus)
        return DataSet([{"id": table["id"].to_numpy()} for task in tasks for table in task()], found)

    context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=False))
    monkeypatch.setattr(loader, "quiet_ray_data", lambda: found.setdefault("context", context))
    monkeypatch.setattr(loader, "BatchMaker", Maker)
    monkeypatch.setattr(ray_datasource, "read_numbers", numbers)
    monkeypatch.setattr(ray_data, "ActorPoolStrategy", lambda **sizes: sizes)
    return found


def plan_of(rank=0, **fields) -> LoadPlan:
    return LoadPlan("data", "tokenizer", get_stage("mini", 1), 0, 0, 0, 1, rank=rank, **fields)


@pytest.mark.parametrize(("start", "stop", "blocks"), [(0, 4, 1), (0, 5, 2), (7, 16, 3), (3, 4, 1)])
def test_steps_come_in_order_from_their_start_in_blocks_of_four(asked, start, stop, blocks):
    made = list(iterate_steps(plan_of(2), start, stop, loader_workers=3, prefetch_steps=9))
    assert [batch.step for batch in made] == list(range(start, stop))
    assert {tuple(batch.sample_ids) for batch in made} == {("rank 2",)}
    assert (asked["count"], asked["blocks"]) == (stop - start, blocks)
    assert asked["compute"] == {"min_size": 1, "max_size": 3} and asked["num_cpus"] == 0.5
    assert asked["numbers_cpus"] + asked["num_cpus"] == LOADER_CPUS, "all that must be free for a batch"
    assert asked["context"].execution_options.preserve_order is True
    assert asked["name"] == "batches of worker 2"
    assert (asked["batch_size"], asked["prefetch_batches"]) == (None, 2)


@pytest.mark.parametrize(("start", "stop", "blocks"), [(7, 16, [4, 4, 1]), (8, 16, [4, 4]), (5, 5, [])])
def test_numbers_are_read_by_small_tasks_a_block_each(monkeypatch, start, stop, blocks):
    monkeypatch.setattr(ray_datasource.ray.data, "read_datasource", lambda source, **options: (source, options))
    source, options = ray_datasource.read_numbers(start, stop, 4, num_cpus=0.25)
    assert options == {"num_cpus": 0.25, "override_num_blocks": max(1, len(blocks))}
    tables = [table for task in source.get_read_tasks(9) for table in task()]
    assert [table.num_rows for table in tables] == blocks and len(source) == len(blocks)
    assert {str(table.schema) for table in tables} <= {"id: int64"}
    assert [number for table in tables for number in table["id"].to_pylist()] == list(range(start, stop))


def test_at_least_one_block_is_made_ahead(asked):
    list(iterate_steps(plan_of(), 0, 1, loader_workers=1, prefetch_steps=1))
    assert asked["prefetch_batches"] == 1


def test_a_set_is_read_shard_by_shard(monkeypatch, tmp_path):
    shards = tuple(ShardInfo(f"part-{n}.arrow", 1, 1, "") for n in range(3))
    monkeypatch.setattr(ray_datasource.Manifest, "read", lambda uri: Manifest("s", shards))
    monkeypatch.setattr(ray_datasource, "ArrowFileDatasource", lambda paths, filesystem: (paths, filesystem.type_name))
    monkeypatch.setattr(ray_datasource.ray.data, "read_datasource", lambda source, **options: (source, options))
    files = [f"{tmp_path}/part-{n}.arrow" for n in range(3)]
    assert ray_datasource.read_shards(str(tmp_path)) == ((files, "local"), {"override_num_blocks": 3})
    shards = ()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} has a manifest.json but no rows"):
        ray_datasource.read_shards(str(tmp_path))


def test_batches_of_a_shard_are_its_blocks(tmp_path):
    batches = [pa.record_batch({"a": [1, 2]}), pa.record_batch({"a": [3]})]
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    reader = object.__new__(ray_datasource.ArrowFileDatasource)
    with reader._open_input_source(pa.fs.LocalFileSystem(), str(tmp_path / "a.arrow")) as stream:
        blocks = list(reader._read_stream(stream, "a.arrow"))
    assert [block.to_pydict() for block in blocks] == [{"a": [1, 2]}, {"a": [3]}]


def test_an_actor_makes_each_step_of_its_block(monkeypatch):
    monkeypatch.setattr(loader, "BatchMaker", Maker)
    made = RayMaker(plan_of(1))({"id": np.array([5, 2])})
    batches = [pickle.loads(payload) for payload in made.pop("batch")]
    assert [(type(batch.step), batch.step) for batch in batches] == [(int, 5), (int, 2)] and made == {}


def test_a_workers_plan_differs_in_its_rank_alone():
    plan = plan_of(feature_key="k", held_out={"a": np.arange(2)})
    other = plan.for_worker(1, 4)
    assert (other.rank, other.world_size) == (1, 4)
    assert (plan.rank, plan.world_size, plan.padded, plan.pack_length, plan.micro_batch_tokens) == (0, 1, True, 0, 0)
    assert other.for_worker(0, 1) == plan


def test_cut_samples_add_up_by_kind():
    assert CutCount(1, 2, 3) + CutCount(10, 20, 30) == CutCount(11, 22, 33)
    assert CutCount() == CutCount(0, 0, 0)


def test_shard_sets_are_opened_below_the_data_and_only_the_missing_are_named(monkeypatch):
    def opening(uri):
        if uri.endswith("b"):
            raise FileNotFoundError(uri)
        return f"opened {uri}"

    monkeypatch.setattr(ShardSet, "open", opening)
    sources = [SimpleNamespace(name=name) for name in "abc"]
    stage = SimpleNamespace(number=3, sources=sources)
    with pytest.raises(FileNotFoundError, match=r"stage 3 needs prepared data, and /data lacks b: run"):
        open_shards("/data", stage)
    stage = SimpleNamespace(number=3, sources=sources[::2])
    assert open_shards("/data", stage) == {"a": "opened /data/a", "c": "opened /data/c"}


def test_a_maker_opens_what_its_plan_names(monkeypatch):
    """The tokenizer without its weights, the layout of the stage, and the features of the plan's key."""
    from pipelines.data import feature_set
    from tinygptv.data import processing

    stage = SimpleNamespace(
        sources=[SimpleNamespace(name=name) for name in "ab"], prompt_template="template", limits="limits"
    )
    plan = LoadPlan("data", "tok", stage, 7, 50, 32, 1, feature_key="key", held_out="held")
    shards = {name: SimpleNamespace(uri=f"data/{name}") for name in "ab"}
    monkeypatch.setattr(loader, "open_shards", lambda data, of: shards if (data, of) == ("data", stage) else None)
    monkeypatch.setattr(loader, "build_mixture", lambda *given: given)
    monkeypatch.setattr(loader, "local_checkpoint", lambda uri, weights: Path(f"/local {uri} {weights}"))
    monkeypatch.setattr(processing, "load_tokenizer", lambda path: f"tokenizer of {path!r}")
    monkeypatch.setattr(loader, "PromptLayout", lambda *given, **named: (given, named))
    monkeypatch.setattr(loader, "SampleEncoder", lambda *given: given)
    monkeypatch.setattr(feature_set.FeatureSet, "open", lambda uri, key: (uri, key))
    maker = loader.BatchMaker(plan)
    assert maker.mixture == (stage, shards, 7, "held") and maker.names == ["a", "b"]
    assert maker.tokenizer == "tokenizer of '/local tok False'"
    layout = ((maker.tokenizer, "template"), {"image_token_id": 50, "num_query_tokens": 32})
    assert maker.encoder == (layout, "limits")
    assert maker.features == {"a": ("data/a", "key"), "b": ("data/b", "key")}


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_loader_that_is_left_closes_what_makes_its_steps(monkeypatch, loader_workers):
    made, closed = [], []

    def steps(*arguments):
        try:
            yield StepBatch(0, [], [], {})
            yield StepBatch(1, [], [], {})
        finally:
            closed.append(arguments)

    def begin(*arguments):
        made.append(steps(*arguments))  # held, so that nothing else closes it
        return made[-1]

    monkeypatch.setattr(loader, "_thread_steps" if loader_workers == 0 else "_ray_steps", begin)
    plan = plan_of()
    left = iterate_steps(plan, 3, 9, loader_workers=loader_workers, prefetch_steps=5)
    next(left)
    assert not closed
    left.close()
    assert closed == [(plan, 3, 9, 5) if loader_workers == 0 else (plan, 3, 9, 2, 5)]
