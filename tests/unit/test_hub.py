"""Checkpoint folders on the hub: uploaded whole, and which names are a repository."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.hub import local_folder, main, push_folder

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "checkpoint"
    return save_checkpoint(target, make_model(), make_processor(), {"stage": 4, "recipe": "test"})


def test_a_folder_goes_up_whole(folder, monkeypatch, tmp_path, capsys):
    calls = []

    class Api:
        def create_repo(self, repo, **fields):
            calls.append(("create", repo, fields))

        def upload_folder(self, **fields):
            calls.append(("upload", fields))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (folder / "notes.tmp").write_text("not of the checkpoint")
    try:
        assert main(["push", str(folder), REPO, "--private"]) == 0
    finally:
        (folder / "notes.tmp").unlink()
    assert capsys.readouterr().out == "https://hub/commit/1\n"
    (_, repo, created), (_, uploaded) = calls
    assert repo == REPO and created == {"private": True, "exist_ok": True}
    names = set(uploaded["allow_patterns"])
    assert {"README.md", "manifest.json", "config.json"} <= names and "notes.tmp" not in names
    assert "## Licences" in (folder / "README.md").read_text()


def test_damaged_folders_stay_here(folder, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        push_folder(tmp_path / "nowhere", REPO)
    assert main(["push", str(tmp_path / "nowhere"), REPO]) == 2


@pytest.mark.parametrize("name", ["hf://", "hf://name", "hf://a/b/c", "hf://a/"])
def test_names_that_are_no_repository(name):
    with pytest.raises(CheckpointError, match="names no repository: write hf://org/name"):
        local_folder(name)


def test_paths_are_left_alone():
    assert local_folder("some/folder") == Path("some/folder")
