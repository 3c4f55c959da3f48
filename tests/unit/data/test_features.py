"""The feature cache: what is computed again, what is refused, and which row gets which features."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data import features as module
from pipelines.data.feature_set import FEATURES, FeatureError, FeatureSet, encoder_hash, feature_key
from pipelines.data.features import FeatureWriter, cache_features
from pipelines.data.shards import ShardSet
from pipelines.miniature.tiny_training import make_rows, make_world, write_shard_set
from pipelines.settings import CacheFeaturesSettings, SettingsError
from tinygptv.checkpoint import stored_weights
from tinygptv.checkpoint.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    cache(world, tmp_path_factory.mktemp("out"))
    return world


def cache(world, output, **changes):
    fields = {
        "data": world["data"],
        "checkpoint": world["init_from"],
        "image_size": 28,
        "num_workers": 0,
        "quiet": True,
    }
    return cache_features(CacheFeaturesSettings(**{**fields, "output": str(output), **changes}))


@pytest.fixture
def world(made, tmp_path):
    shutil.copytree(made["data"], tmp_path / "shards")
    return {**made, "data": str(tmp_path / "shards")}


def folder(world, source="questions") -> Path:
    (found,) = Path(world["data"], source, "features").iterdir()
    return found


def test_each_row_has_the_features_of_its_own_image(made):
    key = feature_key(made["init_from"], 28)
    writer = FeatureWriter(made["init_from"], 28, batch_size=3)
    uri = f"{made['data']}/questions"
    cached, shards = FeatureSet.open(uri, key), ShardSet.open(uri)
    assert len(shards.shard_rows) == 3, "several parts"
    for index in range(len(shards)):
        image = shards.row(index).image
        if image is None:
            assert not cached.row(index).any()
        else:
            alone = writer._encode(np.stack([writer._pixels(image)]))[0]
            assert np.abs(cached.row(index) - alone).max() < 1e-4
    assert len({cached.row(index).tobytes() for index in range(len(shards))}) > 10


@pytest.mark.parametrize("batch_size", [2, 4])
def test_one_image_is_encoded_once_for_all_rows_that_show_it(made, tmp_path, monkeypatch, batch_size):
    rows = make_rows("pairs", 3)
    write_shard_set(tmp_path / "shards/twice", [*rows, *rows, *rows], rows_per_shard=4)
    encoded = []
    original = FeatureWriter._encode
    monkeypatch.setattr(FeatureWriter, "_encode", lambda self, p: (encoded.append(len(p)), original(self, p))[1])
    cache({**made, "data": str(tmp_path / "shards")}, tmp_path / "out", batch_size=batch_size)
    assert encoded == ([2, 1] if batch_size == 2 else [3])
    cached = FeatureSet.open(f"{tmp_path}/shards/twice", feature_key(made["init_from"], 28))
    features = [cached.row(index) for index in range(9)]
    assert all(first.any() for first in features[:3]) and not np.array_equal(features[0], features[1])
    assert all(np.array_equal(features[index], features[index % 3]) for index in range(9))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.with_name("part-00001.npy").unlink(),
        lambda path: path.with_name("part-00001.npy").write_bytes(b"short"),
        lambda path: path.with_name("part-00001.npy.json").unlink(),
        lambda path: path.with_name("part-00001.npy.json").write_text("{"),
        lambda path: path.with_name("part-00001.npy.json").write_text(
            path.with_name("part-00001.npy.json").read_text().replace('"shard_sha256": "', '"shard_sha256": "0')
        ),
    ],
    ids=["missing", "cut off", "no record", "damaged record", "of another shard"],
)
def test_a_part_that_is_not_whole_is_computed_again_and_no_other(world, tmp_path, damage):
    before = {path.name: path.read_bytes() for path in folder(world).glob("*.npy")}
    damage(folder(world) / "manifest.json")
    again = cache(world, tmp_path / "out")
    assert (again["parts"], again["reused"]) == (1, 6)
    assert {path.name: path.read_bytes() for path in folder(world).glob("*.npy")} == before


def test_features_of_other_data_are_not_taken_for_these(world, tmp_path):
    shutil.rmtree(Path(world["data"], "questions"))
    shutil.copytree(Path(world["data"], "pairs"), Path(world["data"], "questions"))
    key = feature_key(world["init_from"], 28)
    FeatureSet.open(f"{world['data']}/questions", key)
    kept = folder(world)
    rows = make_rows("questions", 22)
    saved = tmp_path / "saved"
    shutil.move(kept, saved)
    shutil.rmtree(Path(world["data"], "questions"))
    write_shard_set(Path(world["data"], "questions"), rows)
    shutil.copytree(saved, Path(world["data"], "questions/features", key))
    with pytest.raises(FeatureError, match=r"lack part-00000\.arrow: the data changed"):
        FeatureSet.open(f"{world['data']}/questions", key)
    assert cache(world, tmp_path / "out")["parts"] == 3


def test_another_dtype_is_refused_until_it_may_overwrite(world, tmp_path):
    with pytest.raises(SettingsError, match=r"holds these features as float32, and dtype=float16 .* overwrite=true"):
        cache(world, tmp_path / "out", dtype="float16")
    assert cache(world, tmp_path / "out", dtype="float16", overwrite=True)["parts"] == 7
    cached = FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))
    assert cached.row(0).dtype == np.float16
    assert {part.dtype for part in cached.parts} == {"float16"}


def test_features_are_computed_by_one_run_at_a_time(world, tmp_path, monkeypatch, caplog):
    """Parts of two runs, of unlike dtypes, came under one manifest."""
    shutil.rmtree(folder(world))
    done, compute = [], module._compute

    def other():
        with pytest.raises(SettingsError, match="as float32, and dtype=float16 was asked for"):
            cache(world, tmp_path / "other", dtype="float16", sources=["questions"])
        done.append("other")

    def slow(settings, checkpoint, image_size, waiting):
        if settings.dtype == "float32":
            thread.start()
            while thread.is_alive() and "waiting for it" not in caplog.text:
                thread.join(0.01)
            compute(settings, checkpoint, image_size, waiting)
            done.append("first")

    thread = threading.Thread(target=other)
    monkeypatch.setattr(module, "_compute", slow)
    cache(world, tmp_path / "out")
    thread.join()
    assert done == ["first", "other"]
    FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))


def test_features_that_are_being_replaced_do_not_pass_for_whole(world, tmp_path, monkeypatch):
    """The data was prepared again, and its features were half computed; then the first data was prepared again."""
    key = feature_key(world["init_from"], 28)
    draft = folder(world) / ".part-00000.npy.0.tmp"
    draft.write_bytes(b"of a run that was killed")

    def killed(settings, checkpoint, image_size, waiting):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_compute", killed)
        cache(world, tmp_path / "out", overwrite=True)
    with pytest.raises(FeatureError, match="has no cached features of this encoder"):
        FeatureSet.open(f"{world['data']}/questions", key)
    assert not draft.exists()
    assert cache(world, tmp_path / "out")["parts"] == 0
    FeatureSet.open(f"{world['data']}/questions", key)


def test_finished_features_are_only_read(world, tmp_path, monkeypatch):
    """Data may lie on a disk that is mounted to be read."""

    def read_only(location, data):
        assert str(location) == str(tmp_path / "out/result.json")

    monkeypatch.setattr(module.storage, "write_atomically", read_only)
    before = {path.name for path in folder(world).iterdir()}
    assert cache(world, tmp_path / "out")["parts"] == 0
    assert {path.name for path in folder(world).iterdir()} == before


def test_another_image_size_is_another_cache(world, tmp_path):
    assert feature_key(world["init_from"], 28) != feature_key(world["init_from"], 56)
    assert cache(world, tmp_path / "out", image_size=56)["reused"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stages_checkpoint_finds_what_its_start_was_cached_for(made, tmp_path, dtype):
    """A stage saves its position embedding resampled to its own image size: another tensor, but the same features."""
    model, processor, _ = load_checkpoint(made["init_from"], dtype=dtype)
    start = save_checkpoint(tmp_path / "start", model, processor, {})
    keys = {size: feature_key(start, size) for size in (28, 56)}
    assert keys[28].partition("-")[0] != keys[56].partition("-")[0]
    model.set_image_size(56)
    stage = save_checkpoint(tmp_path / "stage", model, processor, {})
    assert feature_key(stage, 56) == keys[56]
    assert feature_key(stage, 28) != keys[28], "resampled back it is another embedding"


def test_features_that_were_not_computed_are_told_with_those_that_were(world):
    key = feature_key(world["init_from"], 28)
    uri = f"{world['data']}/questions"
    Path(uri, "features/unfinished-56").mkdir()
    with pytest.raises(FeatureError) as caught:
        FeatureSet.open(uri, "0123-56")
    assert str(caught.value) == (
        f"{uri} has no cached features of this encoder and image size (0123-56: hash of the weights, pixels); there "
        f"are others, of other weights or sizes: {key}; run `python jobs/cache_features.py data={world['data']} "
        "sources=[questions] image_size=56 checkpoint=START` with the checkpoint that training starts from, or set "
        "features=inline."
    )


def test_stages_that_read_another_size_are_named(made, tmp_path, caplog):
    cache(made, tmp_path, image_size=0)
    assert "for 28 px, the checkpoint's size; recipe mini reads 64 px in stage 1, 64 px in stage 2" in caplog.text
    caplog.clear()
    cache(made, tmp_path, image_size=28)
    assert not caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"parts": [{}]}', '{"parts": [{"shard_sha256": "x"}]}'])
def test_a_damaged_manifest_is_one_sentence(world, content):
    (folder(world) / "manifest.json").write_text(content)
    with pytest.raises(FeatureError, match=r"run jobs/cache_features\.py again"):
        FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))


def test_a_part_that_was_cut_off_is_noticed_when_it_is_opened(world):
    path = folder(world) / "part-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FeatureError, match=r"part-00001\.npy is missing or cut off"):
        FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))


@pytest.mark.security
def test_names_of_parts_do_not_lead_out_of_the_cache(world):
    path = folder(world) / "manifest.json"
    content = json.loads(path.read_text())
    content["parts"][0]["name"] = "../../part-00000.arrow"
    path.write_text(json.dumps(content))
    with pytest.raises(FeatureError, match="is missing or cut off"):
        FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))


def test_mistakes_are_one_sentence(made, tmp_path):
    with pytest.raises(SettingsError, match="holds no shard sets"):
        cache({**made, "data": str(tmp_path)}, tmp_path / "out")
    with pytest.raises(SettingsError, match="give data=DIR"):
        cache({**made, "data": ""}, tmp_path / "out")
    assert FEATURES == "features"


def test_an_encoder_is_known_by_the_names_and_values_of_its_weights(monkeypatch):
    def hash_of(**weights):
        monkeypatch.setattr(
            stored_weights, "stored_encoder", lambda *given: iter(weights.items()) if given == ("x", 28) else None
        )
        return encoder_hash("x", 28)

    one = {"qformer.b": torch.tensor([3.0]), "vision_encoder.a": torch.tensor([1.0, 2.0])}
    known = hash_of(**one)
    assert known == "e2c8a77527cc4558", "cached features are found by it in every version"
    assert feature_key("x", 28) == "e2c8a77527cc4558-28"
    assert hash_of(**{name: values.bfloat16() for name, values in one.items()}) == known
    for other in (
        {"qformer.c": one["qformer.b"], "vision_encoder.a": one["vision_encoder.a"]},
        {"qformer.b": one["qformer.b"], "vision_encoder.a": torch.tensor([2.0, 1.0])},
        {"vision_encoder.a": one["vision_encoder.a"]},
    ):
        assert hash_of(**other) != known


def test_only_the_sources_that_are_named_are_done(world, tmp_path):
    result = cache(world, tmp_path / "out", sources=["pairs"])
    assert (result["parts"], result["reused"], result["rows"]) == (0, 4, 30)
    assert json.loads((tmp_path / "out/result.json").read_text()) == result


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({}, True),
        ({"bytes": 4}, False),
        ({"rows": 3}, False),
        ({"name": "b.npy"}, False),
        ({"shard_sha256": "of other data", "dtype": "float16"}, False),
        ({"dtype": "float16"}, None),
    ],
)
def test_a_finished_part_is_one_of_these_images_in_this_form_and_whole(tmp_path, changes, done):
    part = module.FeaturePart("a.npy", 2, "sha", "float32")
    unit = module.FeatureUnit("set", 0, str(tmp_path), part)
    (tmp_path / "a.npy").write_bytes(b"12345")
    record = {"name": "a.npy", "rows": 2, "shard_sha256": "sha", "dtype": "float32", "sha256": "x", "bytes": 5}
    (tmp_path / "a.npy.json").write_text(json.dumps({**record, **changes}))
    if done is None:
        with pytest.raises(SettingsError, match="holds these features as float16, and dtype=float32 was asked for"):
            module._is_done(unit)
    else:
        assert module._is_done(unit) is done


def test_a_caches_manifest_names_what_it_was_made_with_and_each_part(made):
    key = feature_key(made["init_from"], 28)
    content = json.loads((folder(made) / "manifest.json").read_text())
    assert (content["key"], content["image_size"], content["dtype"]) == (key, 28, "float32")
    shards = ShardSet.open(f"{made['data']}/questions").manifest.shards
    told = [(part["name"], part["rows"], part["shard_sha256"]) for part in content["parts"]]
    assert told == [(f"part-{n:05d}.npy", shard.rows, shard.sha256) for n, shard in enumerate(shards)]
    for part in content["parts"]:
        data = (folder(made) / part["name"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_parts_belong_to_shards_by_their_content_and_not_by_their_order(world):
    path = folder(world) / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "parts": content["parts"][::-1]}))
    found = FeatureSet.open(f"{world['data']}/questions", feature_key(world["init_from"], 28))
    assert [part.name for part in found.parts] == [f"part-{number:05d}.npy" for number in range(3)]
    assert found.starts.tolist() == [0, 8, 16, 22]
