"""The inputs of a set, as they are kept beside it: read back, compared, and named where they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.data.ingest import inputs as module
from pipelines.data.ingest.inputs import INPUTS, SetInputs
from pipelines.data.sources.base import SourceInput, SourceUnit
from pipelines.settings import PrepareDataSettings
from pipelines.storage import Location

FILES = (("a.tar", 10, 1), ("b.tar", 20, 2))
KNOWN = SetInputs("f1", 2, {"source": "laion", "name": "laion"}, FILES, {"image_size": 448, "min_words": 1})


def test_inputs_come_back_with_the_first_missing_images(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_MISSING", 3)
    KNOWN.write(str(tmp_path), [("", f"/{n}.jpg") for n in range(5)])
    missing = (("", "/0.jpg"), ("", "/1.jpg"), ("", "/2.jpg"))
    assert SetInputs.read(str(tmp_path)) == replace(KNOWN, missing=missing)
    for content in ("", "[]", "{}", '{"files": 3, "missing": []}', '{"files": [], "missing": [], "other": 1}'):
        (tmp_path / INPUTS).write_text(content)
        assert SetInputs.read(str(tmp_path)) is None, content
    assert SetInputs.read(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fingerprint": "f1", "units": 9}, ""),
        ({"source": {**KNOWN.source, "name": "mine"}}, "name was 'laion' and is 'mine'"),
        ({"settings": {**KNOWN.settings, "min_words": 2}}, "min_words was 1 and is 2"),
        ({"files": (*FILES, ("c.tar", 1, 1), ("d.tar", 1, 1))}, "the input has 2 more files, e.g. c.tar"),
        ({"files": FILES[1:]}, "the input lacks 1 files, e.g. a.tar"),
        ({"files": (FILES[0], ("b.tar", 20, 3))}, "the input file b.tar was changed"),
        ({"files": (("a.tar", 11, 1), FILES[1])}, "the input file a.tar was changed"),
        ({}, "the input is read in another way by this version"),
    ],
)
def test_the_first_difference_is_named(changes, text):
    assert KNOWN.difference(replace(KNOWN, **{"fingerprint": "f2", **changes})) == text


def test_inputs_of_an_ingest_are_its_files_settings_and_units():
    source = SourceInput("jsonl", "s3://key:secret@bucket/a", "", "own", "")
    units = [
        SourceUnit(source, Location("", "/a"), "a.jsonl", start=start, stop=start + 5, num_bytes=9, modified_ns=7)
        for start in (0, 5)
    ]
    settings = PrepareDataSettings(min_words=3)
    found = SetInputs.of(source, units, settings)
    assert (found.units, found.files, found.settings["min_words"]) == (2, (("a.jsonl", 9, 7),), 3)
    assert found.source["input"] == "s3://***@bucket/a" and found.source["name"] == "own"
    assert found == SetInputs.of(source, units, settings)
    for other in (units[:1], units[::-1], [units[0], replace(units[1], stop=11)]):
        assert SetInputs.of(source, other, settings).fingerprint != found.fingerprint
    assert SetInputs.of(source, units, PrepareDataSettings()).fingerprint != found.fingerprint
