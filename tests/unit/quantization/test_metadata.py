"""``quantization.json``: what is read back, what is refused, and numbers made of it."""

from __future__ import annotations

import json

import pytest

from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.quantization.metadata import (
    FORMAT_VERSION,
    ArtifactMetadata,
    bits_per_weight,
    read_metadata,
    source_stage,
    write_metadata,
)

METADATA: ArtifactMetadata = {
    "format_version": 1,
    "method": "cpu4",
    "parts": {
        "language_model": {"format": "int4", "parameters": 300, "bytes": 170},
        "projector": {"format": "full", "parameters": 100, "bytes": 400},
    },
    "bytes": 570,
    "lora": "merged",
}


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        read_metadata(folder)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    write_metadata(tmp_path, METADATA)
    assert read_metadata(tmp_path) == read_metadata(str(tmp_path)) == METADATA and FORMAT_VERSION == 1
    assert (tmp_path / "quantization.json").read_text() == json.dumps(METADATA, indent=1), "for people too"


def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "quantization.json"
    assert refused(tmp_path) == f"{path} does not exist: export the artifact again."
    path.write_text("[1]")
    assert refused(tmp_path) == f"{path} holds a list where an object {{...}} is expected: export the artifact again."
    for version, shown in ((2, "2"), (0, "0"), ("1", "1"), (None, "None")):
        path.write_text(json.dumps({**METADATA, "format_version": version}))
        assert refused(tmp_path) == f"{path} is of version {shown}; this code reads 1: export it again."


def test_bits_are_counted_over_all_parameters():
    assert bits_per_weight(METADATA) == 8 * 570 / 400


def test_of_a_stage_its_recipe_number_and_steps_are_kept():
    record = {"title": "t", "recipe": "mini", "stage": 3, "steps": 7, "seed": 1, "init_from": "/home/me", "scores": {}}
    assert source_stage(record) == {"recipe": "mini", "stage": 3, "steps": 7}
    assert source_stage({"stage": 2, "title": "t"}) == {"stage": 2} and source_stage({}) == {}
