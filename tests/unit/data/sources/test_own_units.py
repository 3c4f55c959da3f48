"""Tables and files of one's own rows, unit by unit."""

from __future__ import annotations

import errno
import io
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data.sources import SOURCES, own, table_files
from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.settings import SettingsError
from pipelines.storage import Location
from tests.source_files import own_unit, refused
from tinygptv.data.sample import Turn


def test_damage_costs_rows_and_a_storage_that_fails_ends_the_unit(tmp_path, monkeypatch):
    """Arrow says both as an error without a number; a file in a bucket may be damaged, too."""
    table, sink = pa.table({"question": [f"q{n}" for n in range(3000)], "answer": ["a"] * 3000}), io.BytesIO()
    pq.write_table(table, sink, row_group_size=1000, use_dictionary=False)
    content = bytearray(sink.getvalue())
    content[100:900] = b"\xff" * 800
    place = f"memory://tables/{tmp_path.name}.parquet"
    storage.write_atomically(place, content)
    reader, source = own.TableReader(), SourceInput("parquet", place, "", "own", "")
    units = list(reader.plan(source))
    found = [each for unit in units for each in reader.read(unit)]
    assert isinstance(found[0], Rejected) and "cannot be read after row 0" in found[0].reason
    assert own._damage(pa.ArrowInvalid("bad page")) == own._damage(OSError("bad page")) == "bad page"
    for error in (OSError(errno.EIO, "disk"), FileNotFoundError("disk"), storage.StorageError("disk")):
        with pytest.raises(OSError, match="disk"):
            own._damage(error)
    monkeypatch.setattr(storage.retry.time, "sleep", lambda seconds: None)

    def read_at(self, size):
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(storage.reading._RemoteFile, "_read_at_position", read_at)
    with pytest.raises(storage.StorageError, match="failed 6 times"):
        list(reader.read(units[-1]))
    with pytest.raises(storage.StorageError, match="failed 6 times"):
        list(reader.plan(source))


def test_a_table_that_cannot_be_read_to_its_end_says_after_which_row(tmp_path, monkeypatch):
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"question": ["q"] * 5, "answer": ["a"] * 5}), path)
    sizes = []

    def batches(unit):
        for batch in pq.ParquetFile(path).iter_batches(3):
            sizes.append(batch.num_rows)
            yield batch
        raise pa.ArrowInvalid("bad page")

    monkeypatch.setattr(own, "_batches", batches)
    *rows, last = SOURCES["parquet"].reader.read(own_unit(path, first=10, details=own.TableDetails(True)))
    assert [row.id for row in rows] == [f"0/row {number}" for number in range(10, 15)]
    assert last == Rejected("", "0.parquet", "the table cannot be read after row 15: bad page")


def test_tables_are_read_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_BATCH_ROWS", 2)
    table = pa.table({"question": [f"q{n}" for n in range(5)], "answer": ["a"] * 5})
    pq.write_table(table, tmp_path / "p")
    with pa.ipc.new_file(str(tmp_path / "f"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "s"), table.schema) as writer:
        writer.write_table(table)
    for name in "pfs":
        (unit,) = own._plan_table(own_unit(tmp_path / name))
        assert unit.details == own.TableDetails(is_parquet=name == "p")
        batches = list(own._batches(unit))
        assert [batch.num_rows for batch in batches] == [2, 2, 1], name
        assert [cell for batch in batches for cell in batch["question"].to_pylist()] == [f"q{n}" for n in range(5)]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("us"), pa.timestamp("us", "Nowhere/City"), pa.date64(), pa.time64("us"), pa.duration("us")]
)
def test_times_that_python_does_not_know_cost_nothing(tmp_path, monkeypatch, kind):
    times = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer((2**62).to_bytes(8, "little"))])
    batch = pa.record_batch([times, pa.array(["q"]), pa.array(["a"])], names=["made", "question", "answer"])
    monkeypatch.setattr(own, "_batches", lambda unit: iter([batch]))
    (row,) = SOURCES["parquet"].reader.read(own_unit(tmp_path / "a.parquet", details=own.TableDetails(True)))
    assert row.turns == (Turn("q", ("a",)),)


def test_a_large_group_of_rows_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_READ_AT_ONCE", 4 << 20)
    monkeypatch.setattr(storage, "COPY_BYTES", 1 << 16)
    images = [number.to_bytes(2, "big") * 5000 for number in range(800)]
    table = pa.table({"image": images, "caption": ["x"] * len(images)})
    pq.write_table(table, tmp_path / "a", compression="none", use_dictionary=False, write_batch_size=16)
    (unit,) = own._plan_table(own_unit(tmp_path / "a"))
    before, found = pa.total_allocated_bytes(), []
    for batch in own._batches(unit):
        found += batch["image"].to_pylist()
        assert pa.total_allocated_bytes() - before < 4 << 20, "of 8 MB"
    assert found == images


def test_offsets_that_point_out_of_a_table_are_damage(tmp_path, monkeypatch):
    offsets = pa.py_buffer(b"\0\0\0\0\xff\xff\0\0\3\0\0\0")
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc")])
    broken = pa.record_batch([text], names=["caption"])
    monkeypatch.setattr(own, "_batches", lambda unit: iter([broken]))
    (found,) = SOURCES["parquet"].reader.read(own_unit(tmp_path / "a.parquet", details=own.TableDetails(True)))
    assert found.reason.startswith("the table cannot be read after row 0: ")


def test_what_a_folder_lacks_is_told(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "0.parquet")

    def plan(given, **more):
        return list(SOURCES["hf"].reader.plan(SourceInput("hf", str(given), more.get("images", ""), "own", "")))

    assert (
        refused(SettingsError, plan, tmp_path) == f"input={str(tmp_path)!r} holds no entries: its tables have no rows."
    )
    assert "is no folder" in refused(SettingsError, plan, tmp_path, images=str(tmp_path / "none"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset_dict.json").write_text("{}")
    assert refused(SettingsError, plan, tmp_path / "set") == (
        f"input={str(tmp_path / 'set')!r} has several splits and none is named train: name one, as input=.../SPLIT."
    )
    for text in ("[]", "{", '{"_data_files": 3}', '{"_data_files": [{}]}'):
        (tmp_path / "state.json").write_text(text)
        message = refused(SettingsError, plan, tmp_path)
        assert message.startswith(f"{tmp_path}/state.json is not as `save_to_disk` writes it: ")


def test_one_split_alone_and_unnamed_tables_beside_others(tmp_path, caplog):
    def names(*files):
        found = [SimpleNamespace(location=Location("", f"/d/{name}"), name=name) for name in files]
        source = SourceInput("hf", "/d", "", "own", "")
        return [file.name for file in table_files._training_split(source, found)]

    assert names("a.parquet", "b.parquet") == ["a.parquet", "b.parquet"]
    assert names("test-0.parquet", "test-1.parquet") == ["test-0.parquet", "test-1.parquet"] and not caplog.text
    assert names("a.parquet", "Test-0.parquet") == ["a.parquet"]
    assert caplog.messages == ["/d: the training split alone is read; left out: Test-0.parquet"]
    assert names("dev.parquet", "train-0.parquet", "x.parquet", "train.parquet") == ["train-0.parquet", "train.parquet"]
    assert caplog.messages[1] == "/d: the training split alone is read; left out: dev.parquet, x.parquet"
    splits = [
        table_files._split_of(name) for name in ("my_valid.arrow", "TRAIN2.arrow", "retrain.arrow", "pretest", "dev")
    ]
    assert splits == ["valid", "train", "", "", "dev"]


def test_rows_as_json_are_found_in_a_folder(tmp_path):
    reader, given = SOURCES["jsonl"].reader, SourceInput("jsonl", str(tmp_path), "", "own", "")
    (tmp_path / "b.json").write_text('[{"caption": "x"}]')
    assert [unit.shard for unit in reader.plan(given)] == ["b.json"]
    for name in ("a.ndjson", "c.jsonl"):
        (tmp_path / name).write_text('{"caption": "x"}\n')
    assert [unit.shard for unit in reader.plan(given)] == ["a.ndjson", "c.jsonl"], "lists only where there are no lines"
