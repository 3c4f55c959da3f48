"""Shard files: what is written is what is read, at random, by us and by plain readers; damage is noticed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data import shards as shard_sets
from pipelines.data.shard_cache import ShardCache
from pipelines.data.shard_format import BATCH_ROWS, SCHEMA, Manifest, ShardError, ShardInfo, ShardWriter, record_batch
from pipelines.data.shards import ShardSet, find_shard_sets
from tests.shard_files import make_row, write_set
from tinygptv.data.sample import SampleRow, Turn


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "set", [130, 1, 64])


def test_every_row_comes_back_at_random(uri):
    shards = ShardSet.open(uri)
    order = np.random.default_rng(0).permutation(195)
    assert [shards.row(int(k)) for k in order] == [make_row(k) for k in order]
    assert shards.rows([3, 3, 194]) == [make_row(3), make_row(3), make_row(194)]
    assert [shards.row_id(k) for k in (0, 129, 130, 131)] == ["s/0", "s/129", "s/130", "s/131"]
    assert list(shards) == [make_row(k) for k in range(195)]
    assert (len(shards), shards.shard_rows) == (195, (130, 1, 64))


def test_a_shard_may_be_empty(tmp_path):
    shards = ShardSet.open(write_set(tmp_path / "set", [0, 2, 0, 1]))
    assert [shards.row(k) for k in range(3)] == list(shards) == [make_row(k) for k in range(3)]


def test_rows_of_one_record_batch_find_it_once_and_few_batches_stay_open(uri, monkeypatch):
    monkeypatch.setattr(shard_sets, "_OPEN_BATCHES", 2)
    monkeypatch.setattr(shard_sets, "_OPEN_SHARDS", 1)
    opened, found = ShardSet.open(uri), []
    original = opened._batch
    monkeypatch.setattr(opened, "_batch", lambda *where: found.append(where) or original(*where))
    opened.rows([0, 1, 2, 0])
    assert found == [(0, 0)]
    opened.rows(range(len(opened)))
    assert (len(opened._columns), len(opened._readers)) == (2, 1)


@pytest.mark.parametrize("index", [-1, 195, 10**9])
def test_rows_that_do_not_exist(uri, index):
    with pytest.raises(IndexError, match="195 rows"):
        ShardSet.open(uri).row(index)


@pytest.mark.parametrize("pieces", [(1,), (64,), (63, 65), (200,), (7, 64, 1)])
def test_batches_have_one_size_however_rows_arrive(tmp_path, uri, pieces):
    again = write_set(tmp_path / "set", [130, 1, 64], pieces)
    reader = pa.ipc.open_file(f"{again}/part-00000.arrow")
    assert [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)] == [BATCH_ROWS, BATCH_ROWS, 2]
    assert ShardSet.open(again).table().equals(ShardSet.open(uri).table())


def test_the_same_rows_in_the_same_pieces_give_the_same_bytes(tmp_path):
    first, second = (write_set(tmp_path / name, [130, 9], (7, 64, 1)) for name in ("a", "b"))
    for name in ("part-00000.arrow", "part-00001.arrow", "manifest.json"):
        assert storage.read_bytes(f"{first}/{name}") == storage.read_bytes(f"{second}/{name}")


def test_a_row_costs_its_own_bytes_and_not_the_file(tmp_path):
    writer = ShardWriter(str(tmp_path / "part-00000.arrow"))
    for number in range(20):
        writer.write(
            record_batch(
                [SampleRow(f"{number}/{n}", "s", "pair", (Turn("", ("a",)),), b"x" * 20_000) for n in range(64)]
            )
        )
    (tmp_path / "manifest.json").write_bytes(Manifest("s", (writer.close(),)).to_json())
    before = pa.total_allocated_bytes()
    row = ShardSet.open(str(tmp_path)).row(700)
    assert row.id == "10/60"
    assert pa.total_allocated_bytes() - before < 100_000


def test_pickled_set_opens_again(uri, tmp_path):
    shards = ShardSet.open(uri, ShardCache(tmp_path, 77))
    shards.row(3)
    again = pickle.loads(pickle.dumps(shards))
    assert again.row(3) == make_row(3) and again._cache == ShardCache(tmp_path, 77)


def test_a_set_is_found_itself_or_directly_below_by_name(tmp_path):
    for name in ("b", "a", "deep/c"):
        write_set(tmp_path / name, [1])
    (tmp_path / "empty").mkdir()
    write_set(tmp_path / "a/inside", [1])
    assert find_shard_sets(str(tmp_path)) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert find_shard_sets(f"{tmp_path}/a") == [f"{tmp_path}/a"]
    assert find_shard_sets(f"{tmp_path}/empty") == find_shard_sets(f"{tmp_path}/none") == []


def test_a_listing_that_lags_behind_is_asked_about_each_file(monkeypatch):
    sizes = {"new": 7, "gone": -1, "empty": 0}
    monkeypatch.setattr(shard_sets.storage, "list_names", lambda folder: {"old": 3})
    monkeypatch.setattr(shard_sets.storage, "num_bytes", lambda location: sizes[location.name])
    names = ["old", "new", "gone", "empty"]
    assert shard_sets.sizes_of("s3://bucket/set", names) == {"old": 3, "new": 7, "empty": 0}
    assert shard_sets.sizes_of("/disk/set", ["old", "new", "gone"]) == {"old": 3}


def test_a_manifest_counts_rows_and_its_digest_is_that_of_the_content(uri):
    manifest = Manifest.read(uri)
    assert json.loads(manifest.to_json())["rows"] == 195
    assert Manifest.read(uri) == manifest and len(manifest.digest) == 12
    first, *rest = manifest.shards
    for same in (replace(manifest, source="x", counts={}, settings={}), replace(manifest, batch_rows=9)):
        assert same.digest == manifest.digest
    for other in ((replace(first, sha256="0"), *rest), (replace(first, file="x"), *rest), (*rest, first), rest):
        assert replace(manifest, shards=tuple(other)).digest != manifest.digest


MADE = Manifest(
    "mine",
    (
        ShardInfo("part-00000.arrow", 5, 70, "aa", {"words": {"least": 1, "mean": 2.5, "most": 4}}),
        ShardInfo("part-00001.arrow", 3, 60, "bb"),
    ),
    {"rows_in": 9, "rows_out": 8, "filters": {"min_side": 1}},
    {"image_size": 448, "duplicates": "keep"},
    batch_rows=7,
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    (tmp_path / "manifest.json").write_bytes(MADE.to_json())
    assert Manifest.read(str(tmp_path)) == MADE
    content = json.loads(MADE.to_json())
    assert content.pop("schema")["width"] == "int32"
    assert content == {
        "format": "tinygptv-shards",
        "version": 1,
        "source": "mine",
        "rows": 8,
        "batch_rows": 7,
        "counts": {"rows_in": 9, "rows_out": 8, "filters": {"min_side": 1}},
        "settings": {"image_size": 448, "duplicates": "keep"},
        "shards": [
            {
                "file": "part-00000.arrow",
                "rows": 5,
                "bytes": 70,
                "sha256": "aa",
                "statistics": {"words": {"least": 1, "mean": 2.5, "most": 4}},
            },
            {"file": "part-00001.arrow", "rows": 3, "bytes": 60, "sha256": "bb", "statistics": {}},
        ],
    }
    other = replace(MADE, settings=dict(reversed(MADE.settings.items())), counts=dict(reversed(MADE.counts.items())))
    assert other.to_json() == MADE.to_json() and MADE.to_json().endswith(b"}\n")
    assert MADE.digest == "0a16c634572a", "training states know their data by it"


def test_a_writer_tells_the_size_and_hash_of_its_file(tmp_path):
    writer = ShardWriter(str(tmp_path / "part-00003.arrow"))
    sizes = [writer._sink.num_bytes]
    for start, stop in ((0, 63), (63, 64), (64, 73)):
        writer.write(record_batch([make_row(n) for n in range(start, stop)]))
        sizes.append(writer._sink.num_bytes)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3], "rows are written as soon as they are a batch"
    info = writer.close()
    data = (tmp_path / "part-00003.arrow").read_bytes()
    assert info == ShardInfo("part-00003.arrow", 73, len(data), hashlib.sha256(data).hexdigest())
    assert writer._sink.num_bytes == len(data)


def test_table_is_the_canonical_schema(uri):
    table = ShardSet.open(uri).table()
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == 195
    assert ShardSet.open(uri).table(["task", "id"]).column_names == ["task", "id"]
    assert ShardSet.open(f"{uri}/").uri == uri
    assert ShardInfo.from_json({"file": "a", "rows": 0, "bytes": 0, "sha256": "x"}) == ShardInfo("a", 0, 0, "x")
    with pytest.raises(ValueError, match=r"^-1 is no number of at least 0$"):
        ShardInfo.from_json({"file": "a", "rows": -1, "bytes": 0, "sha256": "x"})
    empty = ShardSet(uri, Manifest("x", ()))
    assert (len(empty), empty.table().num_rows, list(empty)) == (0, 0, [])


def test_missing_set_is_told_from_a_broken_one(tmp_path, uri):
    with pytest.raises(FileNotFoundError, match=r"jobs/prepare_data\.py"):
        ShardSet.open(str(tmp_path / "nowhere"))
    copy = tmp_path / "set"
    shutil.copytree(uri, copy)
    (copy / "part-00001.arrow").unlink()
    with pytest.raises(ShardError, match=r"part-00001\.arrow is missing"):
        ShardSet.open(str(copy))


def test_files_that_grew_are_refused_and_all_that_changed_are_named(tmp_path, uri):
    grown, changed = tmp_path / "grown", tmp_path / "changed"
    shutil.copytree(uri, grown), shutil.copytree(uri, changed)
    with (grown / "part-00001.arrow").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ShardError, match=r"part-00001\.arrow has .* bytes instead of"):
        ShardSet.open(str(grown))
    for name in ("part-00000.arrow", "part-00002.arrow"):
        data = bytearray((changed / name).read_bytes())
        data[len(data) // 2] ^= 255
        (changed / name).write_bytes(data)
    with pytest.raises(ShardError, match=r"the content of part-00000\.arrow, part-00002\.arrow does not match"):
        ShardSet.open(str(changed)).verify()


def test_a_file_that_is_written_again_after_the_set_was_opened_is_refused(tmp_path, uri):
    shutil.copytree(uri, tmp_path / "set")
    shards = ShardSet.open(str(tmp_path / "set"))
    (tmp_path / "set" / "part-00001.arrow").rename(tmp_path / "set" / "part-00000.arrow")
    with pytest.raises(ShardError, match=r"part-00000\.arrow cannot be read \(it has \d+ bytes, not \d+: it was w"):
        shards.row(0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "footer", "zeros"])
def test_damaged_shards_are_named(tmp_path, uri, damage):
    copy = tmp_path / "set"
    shutil.copytree(uri, copy)
    path = copy / "part-00000.arrow"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-10])
        with pytest.raises(ShardError, match=r"part-00000\.arrow has .* bytes instead of"):
            ShardSet.open(str(copy))
        return
    place = len(data) // 2 if damage == "flipped" else len(data) - 20
    data[place : place + 8] = bytes(255 - byte for byte in data[place : place + 8])
    data = bytes(len(data)) if damage == "zeros" else data
    path.write_bytes(data)
    shards = ShardSet.open(str(copy))
    with pytest.raises(ShardError, match=r"part-00000\.arrow does not match the manifest|part-00000\.arrow"):
        shards.verify()
    if damage in ("footer", "zeros"):
        with pytest.raises(ShardError, match=r"part-00000\.arrow cannot be read"):
            shards.row(0)
    assert shards.row(131) == make_row(131)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is no valid JSON"),
        (b"[]", "is not of format tinygptv-shards version 1"),
        (b'{"format": "other", "version": 1}', "is not of format tinygptv-shards version 1"),
        (b'{"format": "tinygptv-shards", "version": 99}', "is not of format tinygptv-shards version 1"),
    ],
)
def test_manifest_of_another_kind(tmp_path, content, reason):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ShardError, match=rf"{reason}.* run jobs/prepare_data\.py again"):
        ShardSet.open(str(tmp_path))


def test_interrupted_writer_leaves_nothing_that_looks_finished(tmp_path):
    writer = ShardWriter(str(tmp_path / "part-00000.arrow"))
    writer.write(record_batch([make_row(n) for n in range(100)]))
    assert not (tmp_path / "part-00000.arrow").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../part-00000.arrow", "/etc/passwd", "a/b.arrow", "..", ".", "", "a\\b", "x\0y", 3, None, ["a"]]
)
def test_a_manifests_names_do_not_lead_out_of_its_folder(tmp_path, uri, name):
    shutil.copytree(uri, tmp_path / "set")
    content = json.loads((tmp_path / "set/manifest.json").read_text())
    content["shards"][0]["file"] = name
    (tmp_path / "set/manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"is damaged .*no file name"):
        ShardSet.open(str(tmp_path / "set"))


@pytest.mark.security
def test_a_name_that_looks_like_options_is_a_name(tmp_path, uri):
    import fsspec

    name = "part-00000.arrow?endpoint_override=evil:9000"
    content = json.loads(storage.read_bytes(f"{uri}/manifest.json"))
    content["shards"] = [{**content["shards"][0], "file": name}]
    memory = fsspec.filesystem("memory")
    memory.pipe("/odd-set/manifest.json", json.dumps(content).encode())
    memory.pipe(f"/odd-set/{name}", storage.read_bytes(f"{uri}/part-00000.arrow"))
    assert ShardSet.open("memory://odd-set", ShardCache(tmp_path)).row(3) == make_row(3)


@pytest.mark.security
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("shards"),
        lambda content: content.update(shards=3),
        lambda content: content.update(shards=["x"]),
        lambda content: content.update(batch_rows=0),
        lambda content: content.update(batch_rows="64"),
        lambda content: content.update(batch_rows=True),
        lambda content: content["shards"][0].update(rows=-1),
        lambda content: content["shards"][0].update(bytes=1.5),
        lambda content: content["shards"][0].pop("sha256"),
        lambda content: content.update(counts=None),
    ],
)
def test_a_malformed_manifest_is_one_sentence(tmp_path, uri, change):
    shutil.copytree(uri, tmp_path / "set")
    content = json.loads((tmp_path / "set/manifest.json").read_text())
    change(content)
    (tmp_path / "set/manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"manifest\.json is damaged .*run jobs/prepare_data\.py again"):
        ShardSet.open(str(tmp_path / "set"))


def test_a_file_of_other_columns_or_fewer_rows_is_named(tmp_path, uri):
    for number, table in enumerate([pa.table({"a": [1]}), ShardSet.open(uri).table().slice(0, 64)]):
        folder = tmp_path / str(number)
        shutil.copytree(uri, folder)
        with pa.ipc.new_file(str(folder / "part-00000.arrow"), table.schema) as writer:
            for batch in table.to_batches():
                writer.write_batch(batch)
        content = json.loads((folder / "manifest.json").read_text())
        content["shards"][0]["bytes"] = (folder / "part-00000.arrow").stat().st_size
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ShardError, match=r"part-00000\.arrow cannot be read \(it has 1 record batches, not 3"):
            ShardSet.open(str(folder)).row(0)


def test_a_file_of_as_many_batches_and_columns_of_other_types_is_named(tmp_path, uri):
    shutil.copytree(uri, tmp_path / "set")
    table = ShardSet.open(uri).table().slice(130, 1)
    table = table.set_column(4, "width", table["width"].cast(pa.int64()))
    path = tmp_path / "set/part-00001.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    content = json.loads((tmp_path / "set/manifest.json").read_text())
    content["shards"][1]["bytes"] = path.stat().st_size
    (tmp_path / "set/manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"part-00001\.arrow cannot be read \(its columns are id, .* of other types"):
        ShardSet.open(str(tmp_path / "set")).row(130)


# ---------------------------------------------------------------- plain readers


def test_hugging_face_datasets_reads_the_files(uri, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [f"{uri}/part-00000.arrow", f"{uri}/part-00001.arrow"]
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 131
    assert SampleRow.from_dict(loaded[130]) == make_row(130)


def test_polars_reads_the_files(uri):
    polars = pytest.importorskip("polars")
    counts = polars.scan_ipc(f"{uri}/part-*.arrow").group_by("task").len().collect()
    assert dict(counts.iter_rows()) == {"refer": 167, "text": 28}
    assert polars.read_ipc(f"{uri}/part-00000.arrow")["boxes"].to_list()[1] == [list(make_row(1).boxes[0])]


def test_duckdb_reads_the_files(uri):
    duckdb = pytest.importorskip("duckdb")
    import pyarrow.dataset

    shards = pyarrow.dataset.dataset([f"{uri}/part-0000{n}.arrow" for n in range(3)], format="ipc")
    query = "select task, count(*), sum(octet_length(image)) from shards group by task order by task"
    size = sum(len(make_row(n).image or b"") for n in range(195))
    assert duckdb.from_arrow(shards).query("shards", query).fetchall() == [("refer", 167, size), ("text", 28, None)]


def test_manifest_says_what_the_columns_are(uri):
    content = json.loads(storage.read_bytes(f"{uri}/manifest.json"))
    turns = "list<item: struct<question: string, answers: list<item: string>>>"
    columns = {"id": "string", "source": "string", "task": "string", "image": "large_binary", "width": "int32"}
    columns |= {"height": "int32", "turns": turns, "boxes": "list<item: list<item: double>>"}
    assert content["schema"] == columns and content["rows"] == 195
    schema = pa.ipc.open_file(f"{uri}/part-00000.arrow").schema
    assert {field.name: str(field.type) for field in schema} == columns
    assert [field.name for field in schema if field.nullable] == ["image"]
    assert schema.metadata == {b"format": b"tinygptv-shards", b"version": b"1"}


@pytest.mark.parametrize("error", [OSError("Expected 8 bytes, got 5"), pa.ArrowInvalid("no batch")])
def test_a_batch_that_cannot_be_read_names_its_shard(uri, monkeypatch, error):
    def fail(number):
        raise error

    shards = ShardSet.open(uri)
    monkeypatch.setattr(shards, "_reader", lambda shard: SimpleNamespace(get_batch=fail))
    with pytest.raises(ShardError) as caught:
        shards.row(130)
    assert str(caught.value) == (
        f"{uri}/part-00001.arrow cannot be read ({error}); run jobs/prepare_data.py again with overwrite=true."
    )


def test_hashes_are_compared_to_their_last_digit(uri, monkeypatch):
    known = {shard.file: shard.sha256 for shard in Manifest.read(uri).shards}
    monkeypatch.setattr(shard_sets.storage, "sha256", lambda location: known[location.name][:-1] + "g")
    with pytest.raises(ShardError, match=r"part-00000.*part-00001.*part-00002"):
        ShardSet.open(uri).verify()
