"""What computing features asks for, writes and refuses, without a model; test_features.py has one."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import storage
from pipelines.data import features as module
from pipelines.data.feature_set import FeatureError, FeaturePart, FeatureSet
from pipelines.data.features import FeatureUnit, FeatureWriter, cache_features
from pipelines.data.shard_cache import ShardCache
from pipelines.data.shards import ShardSet
from pipelines.settings import CacheFeaturesSettings, SettingsError
from pipelines.units import Workers
from tinygptv.lru import LRU


def image(number):
    return f"image {number}".encode()


class Encoder(FeatureWriter):
    """Encodes an image by its number; notes the batches."""

    def __init__(self, batch_size, capacity=1 << 20):
        config = SimpleNamespace(num_query_tokens=1, qformer_config=SimpleNamespace(hidden_size=2))
        self.model = SimpleNamespace(config=config)
        self.batch_size, self.batches = batch_size, []
        self.known = LRU(capacity, lambda features: features.nbytes)

    def _pixels(self, data):
        return np.array([int(data.split()[1])])

    def _encode(self, pixels):
        self.batches.append(pixels.ravel().tolist())
        return np.stack([[[number, -number]] for number in pixels.ravel()]).astype(np.float32)


@pytest.fixture
def shards(monkeypatch):
    """Two shards of a set: rows by the number of their image, None for none."""
    numbers = [9, 9, 9, 1, None, 2, 1, 3, 3, 2, 4, None]
    rows = [SimpleNamespace(image=None if number is None else image(number)) for number in numbers]
    opened = SimpleNamespace(shard_rows=(3, 9), row=lambda index: rows[index])
    monkeypatch.setattr(ShardSet, "open", lambda uri: opened if uri == "set" else None)
    return numbers


def unit(folder="f", dtype="float32", rows=9):
    return FeatureUnit("set", 1, str(folder), FeaturePart("part-00001.npy", rows, "sha", dtype))


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [(1, [[1], [2], [3], [4]]), (2, [[1, 2], [3, 4]]), (3, [[1, 2, 3], [4]]), (9, [[1, 2, 3, 4]])],
)
def test_each_image_of_a_shard_is_encoded_once_into_all_its_rows(shards, batch_size, batches):
    writer = Encoder(batch_size)
    found = writer._features(unit())
    assert writer.batches == batches
    assert found.dtype == np.float32 and found.shape == (9, 1, 2)
    assert found[:, 0, 0].tolist() == [number or 0 for number in shards[3:]]
    assert found[:, 0, 1].tolist() == [-(number or 0) for number in shards[3:]]


def test_images_of_earlier_shards_are_remembered_up_to_a_bound(shards):
    writer = Encoder(2)
    writer._features(unit())
    again = writer._features(unit(dtype="float16"))
    assert len(writer.batches) == 2 and again.dtype == np.float16 and again[7, 0, 0] == 4
    small = Encoder(9, capacity=8)
    small._features(unit())
    small._features(unit())
    assert small.batches == [[1, 2, 3, 4], [1, 2, 3]], "the last one alone was kept"
    assert module._KNOWN_BYTES == 256 * 2**20


def test_a_part_is_written_before_its_record(shards, tmp_path, monkeypatch):
    written, write = [], storage.write_atomically

    def noting(location, data):
        written.append(str(location))
        write(location, data)

    monkeypatch.setattr(storage, "write_atomically", noting)
    Encoder(9)(unit(tmp_path / "deep/er"))
    part = tmp_path / "deep/er/part-00001.npy"
    assert written == [str(part), f"{part}.json"], "a record means that the part is there"
    data = part.read_bytes()
    assert json.loads((tmp_path / "deep/er/part-00001.npy.json").read_text()) == {
        "name": "part-00001.npy",
        "rows": 9,
        "shard_sha256": "sha",
        "dtype": "float32",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    assert np.load(part)[7].tolist() == [[4, -4]]


@pytest.mark.parametrize(("num_workers", "cpus", "threads"), [(0, 8, 0), (1, 8, 8), (3, 8, 2), (9, 8, 1), (1, None, 1)])
def test_workers_share_the_machines_cores(monkeypatch, num_workers, cpus, threads):
    asked = []

    def map_units(setup, units, workers, settings, *, name):
        asked.append((setup.func, setup.args, units, workers, settings, name))
        yield from ((each, None) for each in units)

    shown = []
    monkeypatch.setattr(module, "map_units", map_units)
    monkeypatch.setattr(module.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(module.Bar, "update", lambda bar, *now: shown.append((bar.title, *now)))
    settings = CacheFeaturesSettings(num_workers=num_workers, gpus_per_worker=0.5, batch_size=7, quiet=True)
    module._compute(settings, "checkpoint", 28, ["a", "b"])
    workers = Workers(num_workers, num_cpus=0.5, num_gpus=0.5, reuse_setup=True)
    assert asked == [(FeatureWriter, ("checkpoint", 28, 7, threads), ["a", "b"], workers, settings, "cache_features")]
    assert shown == [("computing features", 1, 2), ("computing features", 2, 2)]


@pytest.mark.parametrize(("fits", "batch"), [(0, 4), (16, 8), (17, 8), (64, 32), (10**9, 1024)])
def test_the_largest_batch_is_half_of_what_fits(monkeypatch, fits, batch):
    emptied = []

    def encode(pixels):
        assert pixels.shape[1:] == (3, 28, 28)
        if len(pixels) > fits:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    model = SimpleNamespace(encode_query_features=encode, device="cpu")
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: np.broadcast_to(np.float32(0), shape))
    assert module._largest_batch(model, 28) == batch
    assert len(emptied) == (batch < 1024)


@pytest.mark.parametrize(("cuda", "batch_size", "threads"), [(True, 0, 2), (False, 0, 0), (True, 5, 0), (False, 5, 3)])
def test_a_writer_has_the_model_where_it_is_fastest(monkeypatch, cuda, batch_size, threads):
    from tinygptv.checkpoint import checkpoint

    done = []
    model = SimpleNamespace(
        set_image_size=lambda size: done.append(("size", size)), eval=lambda: done.append("eval") or model
    )
    model.to = lambda device: done.append(device) or model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    monkeypatch.setattr(module, "local_checkpoint", lambda uri: f"local {uri}")
    monkeypatch.setattr(module, "_largest_batch", lambda of, size: done.append((of is model, size)) or 512)
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path, dtype: done.append((path, dtype)) or (model, 0, 0))
    writer = FeatureWriter("c", 28, batch_size, threads)
    dtype, device = (torch.float16, "cuda") if cuda else (torch.float32, "cpu")
    searched = [(True, 28)] if cuda and not batch_size else []
    assert done == [*([threads] if threads else []), ("local c", dtype), ("size", 28), "eval", device, *searched]
    assert writer.batch_size == (batch_size or (512 if cuda else 32))
    assert (writer.image_size, writer.known.capacity) == (28, module._KNOWN_BYTES)


# ---------------------------------------------------------------- the job


def test_units_are_the_shards_of_the_sets_in_order(monkeypatch):
    def shard(number, rows):
        return SimpleNamespace(file=f"part-{number:05d}.arrow", rows=rows, sha256=f"s{number}")

    opened = {"/d/a": [shard(0, 5), shard(1, 2)], "/d/b": [shard(0, 7)]}
    monkeypatch.setattr(ShardSet, "open", lambda uri: SimpleNamespace(manifest=SimpleNamespace(shards=opened[uri])))
    monkeypatch.setattr(module, "find_shard_sets", lambda data: sorted(opened))
    units = list(module._find_units(CacheFeaturesSettings(data="/d", dtype="float16"), "key"))
    assert units == [
        FeatureUnit(
            f"/d/{name}", number, f"/d/{name}/features/key", FeaturePart(f"part-{number:05d}.npy", r, s, "float16")
        )
        for name, number, r, s in (("a", 0, 5, "s0"), ("a", 1, 2, "s1"), ("b", 0, 7, "s0"))
    ]
    assert units[0].record == "/d/a/features/key/part-00000.npy.json"
    chosen = list(module._find_units(CacheFeaturesSettings(data="/d", sources=["b"]), "key"))
    assert [each.shards for each in chosen] == ["/d/b"]
    monkeypatch.setattr(module, "find_shard_sets", lambda data: [])
    with pytest.raises(SettingsError, match=r"^data=/d holds no shard sets: run jobs/prepare_data\.py first\."):
        next(module._find_units(CacheFeaturesSettings(data="/d"), "key"))


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A job whose units are known; notes what is asked."""
    done = {"access": []}
    units = [
        FeatureUnit("set", n, str(tmp_path / f"f{n // 2}"), FeaturePart(f"{n}.npy", 10 + n, "s", "float32"))
        for n in range(4)
    ]
    monkeypatch.setattr(module.storage, "check_access", lambda at, writes: done["access"].append((str(at), writes)))
    monkeypatch.setattr(module, "checked_checkpoint", lambda location: done.setdefault("start", location))
    monkeypatch.setattr(module, "feature_key", lambda start, size: f"{size}-key")
    monkeypatch.setattr(module, "_image_size", lambda start: 448)
    monkeypatch.setattr(module, "_find_units", lambda settings, key: iter(units))
    monkeypatch.setattr(module, "_is_done", lambda each: each.number == 1)
    monkeypatch.setattr(module, "_compute", lambda settings, *given: done.update(computed=given))
    monkeypatch.setattr(module, "_write_manifest", lambda *given: done.setdefault("manifests", []).append(given))
    (tmp_path / "data").mkdir()
    return done, units, {"data": str(tmp_path / "data"), "checkpoint": "c", "output": str(tmp_path / "out")}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_done_is_left_and_every_folder_gets_its_manifest(job, tmp_path, monkeypatch, overwrite):
    done, units, given = job
    monkeypatch.chdir(tmp_path)
    result = cache_features(CacheFeaturesSettings(**given, overwrite=overwrite, dtype="float16"))
    waiting = units if overwrite else [units[0], *units[2:]]
    assert done["access"] == [(str(tmp_path / "out"), True), (given["data"], True)]
    assert done["start"] == f"{tmp_path}/c" and done["computed"] == (f"{tmp_path}/c", 448, waiting)
    assert done["manifests"] == [
        (str(tmp_path / "f0"), units[:2], "448-key", 448, "float16"),
        (str(tmp_path / "f1"), units[2:], "448-key", 448, "float16"),
    ]
    assert 0 <= result.pop("seconds") < 60 and result == {
        "key": "448-key",
        "parts": len(waiting),
        "reused": 4 - len(waiting),
        "rows": 10 + 11 + 12 + 13,
        "result": f"{tmp_path}/out/result.json",
    }


def test_the_settings_size_wins_over_the_checkpoints(job):
    done, _, given = job
    assert cache_features(CacheFeaturesSettings(**given, image_size=28))["key"] == "28-key"
    assert done["computed"][1] == 28


def test_what_is_missing_is_told_before_anything_is_asked(job):
    done, _, given = job
    for lacks in ("data", "checkpoint"):
        with pytest.raises(SettingsError, match=r"^give data=DIR \(prepared shard sets\) and checkpoint=DIR"):
            cache_features(CacheFeaturesSettings(**{**given, lacks: ""}))
    assert done == {"access": []}
    with pytest.raises(SettingsError, match=r"data=/nowhere does not exist: give the folder of prepared shard sets"):
        cache_features(CacheFeaturesSettings(**{**given, "data": "/nowhere"}))


# ---------------------------------------------------------------- reading


def test_rows_are_those_of_their_part_and_few_parts_stay_open(monkeypatch):
    loaded = []
    parts = [FeaturePart(f"{n}.npy", rows, "s", "float32") for n, rows in enumerate((2, 0, 3))]
    monkeypatch.setattr(
        FeatureSet, "_load", lambda self, part: loaded.append(part.name) or np.arange(part.rows) + 10 * len(part.name)
    )
    found = FeatureSet("uri", "key", parts)
    assert found._open.capacity == 64
    assert [int(found.row(index)) for index in range(5)] == [50, 51, 50, 51, 52]
    assert loaded == ["0.npy", "2.npy"] and found.starts.tolist() == [0, 2, 2, 5]
    row = found.row(0)
    row += 1
    assert int(found.row(0)) == 50, "a copy"


def test_parts_of_a_bucket_are_kept_on_the_disk_where_their_hash_is_known(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    data = (tmp_path / "a.npy").read_bytes()
    place, fetched = f"memory://features/{tmp_path.name}", []
    storage.write_atomically(f"{place}/a.npy", data)
    fetch = ShardCache.fetch
    monkeypatch.setenv("TINYGPTV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        ShardCache, "fetch", lambda cache, at, sha: fetched.append((at.uri, sha)) or fetch(cache, at, sha)
    )
    sha = hashlib.sha256(data).hexdigest()
    for known, asked in (("", []), (sha, [(f"{place}/a.npy", sha)])):
        part = FeaturePart("a.npy", 2, "s", "int64", sha256=known)
        assert FeatureSet(place, "key", [part]).row(1).tolist() == [3, 4, 5] and fetched == asked
    local = FeatureSet(str(tmp_path), "key", [FeaturePart("a.npy", 2, "s", "int64", sha256=sha)])
    assert local.row(0).tolist() == [0, 1, 2] and len(fetched) == 1
    (tmp_path / "a.npy").write_bytes(b"no numbers")
    with pytest.raises(
        FeatureError,
        match=rf"^{tmp_path}/a\.npy cannot be read \(.*\): run jobs/cache_features\.py with overwrite=true",
    ):
        FeatureSet(str(tmp_path), "key", [FeaturePart("a.npy", 1, "s", "int64")]).row(0)


def test_parts_of_earlier_versions_are_read_and_compared_without_their_hash():
    known = {"name": "a", "rows": 1, "shard_sha256": "s", "dtype": "float32"}
    assert FeaturePart.from_json({**known, "image_size": 28}) == FeaturePart("a", 1, "s", "float32")
    with pytest.raises(TypeError):
        FeaturePart.from_json({"name": "a"})
    one = FeaturePart("a", 1, "s", "float32", "x", 5)
    assert one.is_like(FeaturePart("a", 1, "s", "float32", "y", 6))
    assert not any(one.is_like(FeaturePart(*other)) for other in (("b", 1, "s", "float32"), ("a", 2, "s", "float32")))


def test_a_cache_that_was_never_computed_says_how(tmp_path):
    told = (
        rf"^{tmp_path} has no cached features of this encoder and image size \(key: hash of the weights, pixels\); run "
    )
    with pytest.raises(FeatureError, match=told):
        FeatureSet.open(str(tmp_path), "key")
    for name in ("a-28", "b-28", "unfinished"):
        (tmp_path / "features" / name).mkdir(parents=True)
    for name in ("a-28", "b-28"):
        (tmp_path / "features" / name / "manifest.json").touch()
    with pytest.raises(FeatureError, match=r"there are others, of other weights or sizes: a-28, b-28; run "):
        FeatureSet.open(str(tmp_path), "key")


def test_features_are_opened_in_the_order_of_the_data_and_each_must_be_whole(tmp_path, monkeypatch):
    files = [SimpleNamespace(file=f"part-{name}.arrow", sha256=name) for name in ("b", "a")]
    monkeypatch.setattr(
        ShardSet, "open", lambda uri: SimpleNamespace(manifest=SimpleNamespace(shards=files[:]), uri=uri)
    )
    folder = tmp_path / "features/key"
    folder.mkdir(parents=True)
    known = {
        name: {"name": f"{name}.npy", "rows": rows, "shard_sha256": name, "dtype": "float32"}
        for name, rows in (("a", 3), ("b", 4), ("of earlier data", 9))
    }

    def write(**changes):
        (folder / "manifest.json").write_text(json.dumps({"parts": [{**known[k], **changes} for k in known]}))

    def refused():
        with pytest.raises(FeatureError) as caught:
            FeatureSet.open(str(tmp_path), "key")
        return str(caught.value)

    again = "run jobs/cache_features.py again."
    write()
    (folder / "b.npy").write_bytes(b"12345")
    assert refused() == f"{folder}/a.npy is missing or cut off: {again}"
    (folder / "a.npy").touch()
    found = FeatureSet.open(str(tmp_path), "key")  # of an earlier version, which stated no sizes
    assert (found.uri, found.key, found.starts.tolist()) == (str(folder), "key", [0, 4, 7])
    assert [part.name for part in found.parts] == ["b.npy", "a.npy"]
    write(bytes=5)
    assert refused() == f"{folder}/a.npy is missing or cut off: {again}"
    (folder / "a.npy").write_bytes(b"54321")
    FeatureSet.open(str(tmp_path), "key")
    files.append(SimpleNamespace(file="part-c.arrow", sha256="c"))
    assert refused() == f"the features in {folder} lack part-c.arrow: the data changed; {again}"
    for damage in ("{", "{}", "[]", '{"parts": [{}]}', '{"parts": [{"shard_sha256": "a"}]}'):
        (folder / "manifest.json").write_text(damage)
        text = refused()
        assert text.startswith(f"{folder}/manifest.json is damaged (") and text.endswith(again)
