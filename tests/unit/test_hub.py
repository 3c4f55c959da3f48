"""Checkpoint folders on the hub: uploaded whole, and which names are a repository."""

from __future__ import annotations

import shutil
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
    assert uploaded["repo_id"] == REPO and uploaded["commit_message"] == "Upload checkpoint"
    push_folder(folder, REPO, message="better")
    assert calls[2] == ("create", REPO, {"private": False, "exist_ok": True})
    assert calls[3][1]["commit_message"] == "better"


@pytest.fixture
def downloads(folder, monkeypatch, tmp_path):
    """Downloads that the hub is asked for; each gives a copy of the folder."""
    asked = []

    def download(repo, revision, allow_patterns, local_dir):
        asked.append((repo, revision, local_dir))
        assert "*.safetensors" in allow_patterns and not {"*.bin", "*.py", "*.pkl"} & set(allow_patterns)
        return shutil.copytree(folder, tmp_path / str(len(asked)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_the_revision_that_is_named_is_downloaded(downloads, tmp_path, capsys):
    assert local_folder("hf://org/tiny") == tmp_path / "1"
    assert local_folder("hf://org/tiny@v2", tmp_path / "out") == tmp_path / "2"
    assert main(["pull", "org/tiny@v3", "--output", "here"]) == 0 and capsys.readouterr().out == f"{tmp_path / '3'}\n"
    assert downloads == [
        ("org/tiny", None, None),
        ("org/tiny", "v2", tmp_path / "out"),
        ("org/tiny", "v3", Path("here")),
    ]


def test_what_comes_is_compared_with_its_manifest(downloads, folder, tmp_path, monkeypatch, capsys):
    card = folder / "README.md"
    text = card.read_text()
    try:
        card.write_text("X" + text[1:])  # of equal size
        local_folder("hf://org/tiny")
        assert main(["pull", "org/tiny"]) == 2 and "README.md does not match the hash" in capsys.readouterr().err
        card.write_text(text[:-1])
        with pytest.raises(CheckpointError, match=r"README\.md is cut off"):
            local_folder("hf://org/tiny")
    finally:
        card.write_text(text)


@pytest.mark.parametrize(
    ("error", "advice"), [("401 Client Error", True), ("no token", True), ("404 Client  Error", False), ("", False)]
)
def test_a_refusal_of_the_hub_is_one_sentence(monkeypatch, error, advice):
    def refuse(*arguments, **more):
        raise RuntimeError(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="hf://org/tiny cannot be downloaded: ") as caught:
        local_folder("hf://org/tiny")
    assert ("hf auth login" in str(caught.value)) == advice


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
