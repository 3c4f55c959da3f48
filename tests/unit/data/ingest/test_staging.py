"""A finished unit is used again only while each of its files is what it was."""

from __future__ import annotations

import json

import pytest

from pipelines.data.ingest.staging import stage_unit
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import SourceInput
from pipelines.settings import PrepareDataSettings
from tests.source_files import jpeg, write_web_tar


@pytest.fixture
def unit_and_settings(tmp_path):
    write_web_tar(tmp_path / "0.tar", 0, 5)
    (tmp_path / "staging").mkdir()
    settings = PrepareDataSettings(
        source="laion", input=str(tmp_path / "0.tar"), output=str(tmp_path / "out"), num_workers=0
    )
    (unit,) = SOURCES["laion"].reader.plan(SourceInput("laion", settings.input, "", "laion", ""))
    return unit, settings


def test_a_finished_unit_is_not_read_again(unit_and_settings, tmp_path):
    unit, settings = unit_and_settings
    first, was_there = stage_unit(unit, 0, settings, str(tmp_path / "staging"))
    assert (first.rows, was_there) == (5, False)
    assert stage_unit(unit, 0, settings, str(tmp_path / "staging")) == (first, True)


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
    staging = tmp_path / "staging"
    first, _ = stage_unit(unit, 0, settings, str(staging))
    whole = {path.name: path.read_bytes() for path in staging.iterdir()}
    name = first.files[0].file if ending == "rows" else next(name for name in whole if name.endswith(f".{ending}"))
    data = whole[name]
    middle = len(data) // 2
    if damage == "gone":
        (staging / name).unlink()
    else:
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (staging / name).write_bytes(changed if damage == "changed" else data[:middle])
    assert stage_unit(unit, 0, settings, str(staging)) == (first, False)
    assert {path.name: path.read_bytes() for path in staging.iterdir()} == whole


def test_a_unit_whose_missing_images_appeared_is_read_again(tmp_path):
    staging, images = tmp_path / "staging", tmp_path / "own"
    staging.mkdir(), images.mkdir()
    own = images / "own.jsonl"
    own.write_text("".join(json.dumps({"image": f"{n}.jpg", "caption": f"c {n}"}) + "\n" for n in range(2)))
    (images / "0.jpg").write_bytes(jpeg(0))
    settings = PrepareDataSettings(source="jsonl", input=str(own), output=str(tmp_path / "out"), num_workers=0)
    source = SOURCES["jsonl"]
    (unit,) = source.reader.plan(SourceInput("jsonl", str(own), "", "own", source.task))
    first, _ = stage_unit(unit, 0, settings, str(staging))
    assert first.rows == 1 and len(first.rejected) == 1 and first.missing
    assert stage_unit(unit, 0, settings, str(staging))[1], "still missing"
    (images / "1.jpg").write_bytes(jpeg(1))
    again, was_there = stage_unit(unit, 0, settings, str(staging))
    assert (again.rows, again.missing, was_there) == (2, [], False)
