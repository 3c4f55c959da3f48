"""A finished unit is used again only while each of its files is what it was."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data.ingest import staging
from pipelines.data.ingest.checked_rows import checked_rows
from pipelines.data.ingest.staging import UnitRecord, read_index, read_record, stage_unit
from pipelines.data.shard_format import BATCH_ROWS, ShardInfo
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import Rejected, SourceInput, SourceUnit
from pipelines.settings import PrepareDataSettings
from pipelines.storage import Location
from tests.source_files import jpeg, sample, write_tar, write_web_tar
from tinygptv.data.sample import SampleRow, Turn


@pytest.fixture
def unit_and_settings(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    (tmp_path / "staging").mkdir()
    settings = PrepareDataSettings(
        source="laion", input=str(tmp_path / "0.tar"), output=str(tmp_path / "out"), num_workers=0
    )
    (unit,) = SOURCES["laion"].reader.plan(SourceInput("laion", settings.input, "", "laion", ""))
    return unit, settings


def test_a_unit_leaves_its_rows_an_index_and_a_record(tmp_path):
    members = [*sample("a", jpeg(0), "a cat"), *sample("b", b"junk", "x"), *sample("c", jpeg(1, (60, 40)), "a big dog")]
    write_tar(tmp_path / "7.tar", members)
    settings = PrepareDataSettings(source="laion", input=str(tmp_path / "7.tar"), min_side=1)
    (unit,) = SOURCES["laion"].reader.plan(SourceInput("laion", settings.input, "", "laion", ""))
    folder = tmp_path / "staging"
    folder.mkdir()
    record, _ = stage_unit(unit, 7, settings, str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "unit-000007-000.arrow",
        "unit-000007.index.arrow",
        "unit-000007.json",
    ]
    found = list(checked_rows(unit, settings, Counter()))
    entries = [one[1] for one in found if not isinstance(one, Rejected)]
    rows, index = ((folder / f"unit-000007{name}.arrow").read_bytes() for name in ("-000", ".index"))
    assert record == UnitRecord(
        staging.fingerprint(unit, settings),
        "7.tar",
        "7/",
        rows_in=3,
        files=[ShardInfo("unit-000007-000.arrow", 2, len(rows), hashlib.sha256(rows).hexdigest())],
        index_sha256=hashlib.sha256(index).hexdigest(),
        rejected=[one for one in found if isinstance(one, Rejected)],
    )
    assert (record.rows, [one.key for one in record.rejected]) == (2, ["b"])
    assert read_record(str(folder), 7) == record and read_record(str(folder), 0) is None
    assert read_index(str(folder), 7).to_pylist() == [entry._asdict() for entry in entries]
    assert [(entry.id, entry.width, entry.words) for entry in entries] == [("7/a", 48, 2), ("7/c", 60, 3)]
    assert read_index(str(folder), 7, ["words", "id"]).to_pydict() == {"words": [2, 3], "id": ["7/a", "7/c"]}


def test_an_index_has_room_for_the_widest_image_and_for_every_hash():
    """100 megapixels may be 20 times as wide as high, hashes have 64 bits, and a file may have more than 2 GiB."""
    line = {
        "id": "7/a", "content_hash": bytes(range(16)), "image_hash": 2**64 - 1, "perceptual_hash": 2**64 - 2,
        "width": 44_721, "height": 44_721, "image_bytes": 2**31, "words": 100_000, "kept": True,
    }  # fmt: skip
    assert pa.Table.from_pylist([line], staging.INDEX_SCHEMA).to_pylist() == [line]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": [], "rejected": [], "missing": []}'])
def test_a_record_that_is_none_is_not_there(tmp_path, content):
    (tmp_path / "unit-000003.json").write_text(content)
    assert read_record(str(tmp_path), 3) is None


def test_a_finished_unit_is_not_read_again(unit_and_settings, tmp_path):
    unit, settings = unit_and_settings
    first, was_there = stage_unit(unit, 0, settings, str(tmp_path / "staging"))
    assert (first.rows, was_there) == (5, False)
    assert stage_unit(unit, 0, settings, str(tmp_path / "staging")) == (first, True)
    other = settings.model_copy(update={"jpeg_quality": 50})
    again, was_there = stage_unit(unit, 0, other, str(tmp_path / "staging"))
    assert (again.fingerprint, was_there) == (staging.fingerprint(unit, other), False), "of other settings"
    assert stage_unit(unit, 0, other, str(tmp_path / "staging")) == (again, True)
    changed = replace(unit, modified_ns=unit.modified_ns + 1)
    assert not stage_unit(changed, 0, other, str(tmp_path / "staging"))[1], "of another input"


@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        *((name, damage) for name in ("index.arrow", "rows") for damage in ("changed", "cut", "gone")),
        ("json", "cut"),
        ("json", "gone"),
    ],
)
def test_a_damaged_unit_is_read_again(unit_and_settings, tmp_path, damage, ending):
    unit, settings = unit_and_settings
    folder = tmp_path / "staging"
    first, _ = stage_unit(unit, 0, settings, str(folder))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = first.files[0].file if ending == "rows" else next(name for name in whole if name.endswith(f".{ending}"))
    data = whole[name]
    middle = len(data) // 2
    if damage == "gone":
        (folder / name).unlink()
    else:
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (folder / name).write_bytes(changed if damage == "changed" else data[:middle])
    assert stage_unit(unit, 0, settings, str(folder)) == (first, False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_unit_whose_missing_images_appeared_is_read_again(tmp_path):
    folder, images = tmp_path / "staging", tmp_path / "own"
    folder.mkdir(), images.mkdir()
    own = images / "own.jsonl"
    own.write_text("".join(json.dumps({"image": f"{n}.jpg", "caption": f"c {n}"}) + "\n" for n in range(2)))
    (images / "0.jpg").write_bytes(jpeg(0))
    settings = PrepareDataSettings(source="jsonl", input=str(own), output=str(tmp_path / "out"), num_workers=0)
    source = SOURCES["jsonl"]
    (unit,) = source.reader.plan(SourceInput("jsonl", str(own), "", "own", source.task))
    first, _ = stage_unit(unit, 0, settings, str(folder))
    assert first.rows == 1 and len(first.rejected) == 1 and first.missing
    assert stage_unit(unit, 0, settings, str(folder))[1], "still missing"
    (images / "1.jpg").write_bytes(jpeg(1))
    again, was_there = stage_unit(unit, 0, settings, str(folder))
    assert (again.rows, again.missing, was_there) == (2, [], False)


def test_missing_images_are_looked_for_in_their_own_storage(tmp_path):
    there = Location.parse(f"memory://missing/{tmp_path.name}.jpg")
    storage.write_atomically(there, b"image")
    gone = ("", str(tmp_path / "gone.jpg"))
    assert staging.any_exists([gone, (there.root, there.path)])
    assert not staging.any_exists([gone, (there.root, "gone.jpg"), ("", f"{tmp_path}/{there.path}")])
    assert not staging.any_exists([])


# ---------------------------------------------------------------- bounds, hashes, fingerprints


def text_row(number, image=None):
    return SampleRow(f"{number}", "x", "text", (Turn("q", (f"a {number}",)),), image)


@pytest.mark.parametrize(
    ("count", "num_bytes", "settings", "files"),
    [
        (150, 0, {"shard_rows": 100}, [100, 50]),
        (128, 0, {"shard_rows": 64}, [64, 64]),
        (5, 2**18, {"shard_mb": 1}, [3, 2]),  # a row takes some bytes besides its image
        (5, 2**18 - 256, {"shard_mb": 1}, [4, 1]),  # filled to the last byte
        (5, 400_000, {"shard_mb": 1}, [2, 2, 1]),
        (2, 2**21, {"shard_mb": 1}, [1, 1]),  # larger than a file alone
        (0, 0, {}, []),
    ],
)
def test_a_units_files_are_filled_up_to_their_bounds(tmp_path, count, num_bytes, settings, files):
    staged = staging._StagedFiles(str(tmp_path), "unit", PrepareDataSettings(**settings))
    for number in range(count):
        staged.add(text_row(number, bytes(num_bytes) or None), staging.IndexEntry(str(number), bytes(16)))
        assert len(staged._rows) < BATCH_ROWS, "no more than a record batch waits in memory"
    found = staged.close()
    assert [(info.file, info.rows) for info in found] == [(f"unit-{n:03d}.arrow", rows) for n, rows in enumerate(files)]
    assert [entry.id for entry in staged.index] == [str(number) for number in range(count)]


def test_a_units_files_lie_below_a_uri_with_options(monkeypatch):
    """As of a storage of one's own: ``s3://bucket/data?endpoint_override=minio:9000``."""
    places = []
    monkeypatch.setattr(staging, "ShardWriter", lambda place: places.append(place) or MagicMock(rows=0))
    staged = staging._StagedFiles("s3://bucket/set?endpoint_override=h:9000", "unit", PrepareDataSettings())
    staged.add(text_row(0), staging.IndexEntry("0", bytes(16)))
    staged.close()
    assert places == ["s3://bucket/set/unit-000.arrow?endpoint_override=h:9000"]


@pytest.mark.parametrize("count", [0, 100])
def test_an_input_that_cannot_be_read_to_its_end_leaves_no_file(unit_and_settings, tmp_path, monkeypatch, count):
    unit, settings = unit_and_settings

    def failing(*_):
        yield from ((text_row(n), staging.IndexEntry(str(n), bytes(16))) for n in range(count))
        raise OSError("gone")

    monkeypatch.setattr(staging, "checked_rows", failing)
    with pytest.raises(OSError, match="gone"):
        stage_unit(unit, 0, settings, str(tmp_path / "staging"))
    assert list((tmp_path / "staging").iterdir()) == []


def test_changes_are_in_the_order_of_their_names(unit_and_settings, tmp_path, monkeypatch):
    def changing(unit, settings, changes):
        changes.update(["b", "c", "a", "b"])
        return iter(())

    unit, settings = unit_and_settings
    monkeypatch.setattr(staging, "checked_rows", changing)
    record, _ = stage_unit(unit, 0, settings, str(tmp_path / "staging"))
    assert list(record.changes.items()) == [("a", 1), ("b", 2), ("c", 1)], "the same unit always gives the same bytes"


def test_a_record_names_so_many_missing_images_and_no_rejection_keeps_its_own(monkeypatch):
    monkeypatch.setattr(staging, "_MOST_MISSING", 3)
    record = staging.UnitRecord("f", "0.tar", "0/")
    for number in range(5):
        record.reject(Rejected(f"{number}", "0.tar", "missing", missing=(("", f"/{number}.jpg"),)))
    assert record.missing == [("", f"/{number}.jpg") for number in range(3)]
    assert [(found.key, found.missing) for found in record.rejected] == [(f"{number}", ()) for number in range(5)]
    assert staging.UnitRecord.from_json(json.loads(json.dumps(asdict(record)))) == record


def test_a_units_fingerprint_changes_with_everything_that_it_gives(unit_and_settings, monkeypatch):
    unit, settings = unit_and_settings
    fields = {"start": 1, "stop": 2, "first": 3, "num_bytes": 4, "modified_ns": 5, "shard": "x", "details": b"images"}
    others = [replace(unit, **{name: value}) for name, value in fields.items()]
    others.append(replace(unit, source=replace(unit.source, task="caption")))
    others.append(replace(unit, source=replace(unit.source, split="val")))
    marks = {staging.fingerprint(each, settings) for each in (unit, *others)}
    marks.add(staging.fingerprint(unit, settings.model_copy(update={"jpeg_quality": 1})))
    monkeypatch.setattr(staging, "STAGING_VERSION", 0)
    marks.add(staging.fingerprint(unit, settings))
    assert len(marks) == len(others) + 3


def test_work_of_an_earlier_program_of_this_version_is_found_again():
    """Where a fingerprint is to change, ``STAGING_VERSION`` is raised."""
    source = SourceInput("jsonl", "/in", "/images", "own", "caption")
    unit = SourceUnit(source, Location("", "/in/a.jsonl"), "a.jsonl", 1, 2, 3, 4, 5, ("details",))
    fields = dict(
        zip(staging.CONTENT_SETTINGS, (448, 90, 4096, 256, 16, 8.0, 50.0, 1, 0.5, 0.7, "drop", 4), strict=True)
    )
    mark = staging.fingerprint(unit, PrepareDataSettings(**fields))
    assert (staging.STAGING_VERSION, mark[:16]) == (4, "c8c4b9d57f8b9a9b")
