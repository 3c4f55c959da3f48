"""JSON files: valid for every parser, whole or absent, damaged ones are told and count as missing."""

from __future__ import annotations

import json
import math
from types import MappingProxyType

import pytest

from pipelines import storage
from pipelines.json_files import read_json_object, to_json, write_json


def test_numbers_that_are_not_finite_become_null_at_any_depth(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": 0, "d": "NaN", "e": True, "f": None}
    plain = {"a": [1.5, None, [None, {"b": None}]], "c": 0, "d": "NaN", "e": True, "f": None}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == plain
    write_json(tmp_path / "x.json", value)
    assert read_json_object(tmp_path / "x.json") == plain
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff"])
def test_a_damaged_file_counts_as_missing_and_is_named(tmp_path, caplog, content):
    assert read_json_object(tmp_path / "x.json") is None and not caplog.text
    (tmp_path / "x.json").write_bytes(content)
    assert read_json_object(tmp_path / "x.json") is None
    assert f"{tmp_path}/x.json is empty or damaged" in caplog.text


def test_a_storage_that_fails_is_no_missing_file(monkeypatch):
    def refused(location):
        raise storage.StorageError(f"{location} refuses access")

    monkeypatch.setattr(storage, "read_bytes", refused)
    with pytest.raises(storage.StorageError, match=r"^s3://b/x\.json refuses access$"):
        read_json_object("s3://b/x.json")


def test_mappings_of_any_kind_are_objects():
    assert to_json(MappingProxyType({"a": MappingProxyType({"b": math.nan})})) == '{"a": {"b": null}}'


def test_a_key_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="Out of range float values"):
        to_json({math.nan: 1})


def test_an_object_without_members_is_one(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    assert read_json_object(str(tmp_path / "x.json")) == {}


def test_files_are_for_people_and_texts_are_short(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert to_json({"a": [1]}) == '{"a": [1]}' and to_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'
