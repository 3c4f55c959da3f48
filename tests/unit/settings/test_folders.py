"""Folders of the settings: what cannot be read or written is told with the key, before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pipelines.settings import ScoreSettings, SettingsError
from pipelines.settings.folders import make_local_folder, refuse_no_folder, refuse_unwritable


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("below", ["", "run", "run/1"])
def test_an_output_that_is_a_file_or_below_one(file, below):
    output = str(file / below) if below else str(file)
    message = f"output={output} cannot be a folder: {file} is a file. Give another output=."
    with pytest.raises(SettingsError, match=re.escape(message)):
        ScoreSettings(output=output).output_location("outputs")
    assert file.read_text() == "mine"


def test_an_output_that_nobody_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(SettingsError, match=re.escape(f"{tmp_path} is read-only for you. Give another output=.")):
        refuse_unwritable("output", tmp_path / "a/b")
    assert not (tmp_path / "a").exists(), "nothing is made"
    for rights in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda path, mode, rights=rights: not mode & ~rights)
        with pytest.raises(
            SettingsError, match=rf"^page={tmp_path} cannot be written: {tmp_path} is read-only for you\."
        ):
            refuse_unwritable("page", tmp_path)


def test_a_link_to_nothing_and_a_new_folder(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(SettingsError, match="is a link to nothing"):
        refuse_unwritable("output", tmp_path / "link/x")
    refuse_unwritable("output", tmp_path / "new/x")


def test_data_that_is_no_folder(file, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"data=.*notes\.txt is a file: give the folder of shards"):
        refuse_no_folder("data", str(file), "shards")
    with pytest.raises(SettingsError, match="data=/nowhere does not exist: give the folder of shards"):
        refuse_no_folder("data", "/nowhere", "shards")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for fine in (str(tmp_path), f"file://{tmp_path}", "s3://bucket/x", f"~/{tmp_path.name}"):
        refuse_no_folder("data", fine, "shards")


def test_a_folder_that_cannot_be_made_is_told_with_its_fix(file, tmp_path):
    for _ in range(2):
        make_local_folder(tmp_path / "deep/er", "the cache", "Fix it.", mode=0o700)
    assert (tmp_path / "deep/er").stat().st_mode & 0o777 == 0o700
    with pytest.raises(SettingsError) as caught:
        make_local_folder(file / "below", "the cache", "Set another one.")
    start, end = f"the cache {file}/below cannot be made: ", ". Set another one."
    assert str(caught.value).startswith(start) and str(caught.value).endswith(end)
    assert str(file) in str(caught.value).removeprefix(start) and isinstance(caught.value.__cause__, OSError)
