"""Checkpoint folders on the hub: uploaded whole, and which names are a repository."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError, write_folder
from tinygptv.hub import _reason, is_hub, local_folder, main, push_folder

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
    assert uploaded["folder_path"] == folder and set(uploaded) == {
        "repo_id", "folder_path", "allow_patterns", "commit_message",
    }  # fmt: skip
    push_folder(folder, REPO, message="better")
    assert main(["push", str(folder), REPO]) == 0
    assert [call for call in calls[2:] if call[0] == "create"] == [
        ("create", REPO, {"private": False, "exist_ok": True})
    ] * 2
    monkeypatch.chdir(folder)
    push_folder(".", REPO)
    assert [call[1]["commit_message"] for call in calls[2:] if call[0] == "upload"] == [
        "better",
        "Upload checkpoint",
        "Upload checkpoint",
    ], "a folder has a name, however it is given"


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


def test_files_of_others_are_not_replaced_by_a_download(downloads, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    local_folder("hf://org/tiny", tmp_path / "mine")
    (tmp_path / "mine/README.md").write_text("mine")
    assert main(["pull", "org/tiny", "--output", str(tmp_path / "mine")]) == 2 and len(downloads) == 1
    assert capsys.readouterr().err.startswith(f"error: --output {tmp_path}/mine holds files that a download might rep")
    (tmp_path / "mine/.cache/huggingface/download").mkdir(parents=True)  # of an earlier pull, perhaps cut off
    local_folder("hf://org/tiny", tmp_path / "mine")
    assert len(downloads) == 2


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


@pytest.mark.parametrize(
    ("output", "fix"), [(None, "Set HF_HOME to another folder."), ("out", "Give another --output.")]
)
def test_a_folder_that_cannot_be_made_is_told_with_what_to_change(monkeypatch, tmp_path, output, fix):
    def refuse(*arguments, **more):
        raise PermissionError(13, "Permission denied", str(tmp_path / "no"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=rf"downloaded: {tmp_path}/no cannot be made: .* {fix}$"):
        local_folder("hf://org/tiny", output and tmp_path / output)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pull", "--help"], ["hf://org/name or hf://org/name@revision", "folder [the hub's cache]"]),
        (["push", "--help"], ["checkpoint or artifact folder", "org/name", "a new repository is private"]),
        (["--help"], ["pull download a repository and check it", "push upload a checkpoint or artifact folder"]),
    ],
)
def test_help_of_the_command(capsys, monkeypatch, words, told):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(words)
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and out.startswith("usage: python -m tinygptv.hub") and all(t in out for t in told)


def test_libraries_tell_nobody_of_a_download_unless_the_environment_says_otherwise(monkeypatch, downloads):
    for before, after in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", before or "")
        if before is None:
            monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
        assert main(["pull", "hf://org/tiny"]) == 0 and os.environ["HF_HUB_DISABLE_TELEMETRY"] == after


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


def test_a_refusal_says_what_was_wanted_and_what_to_do(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("403 \n  Forbidden")

    advice = "403 Forbidden Log in with `hf auth login`, or set HF_TOKEN."
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert main(["pull", "org/tiny@v2"]) == 2
    assert capsys.readouterr().err == f"error: hf://org/tiny@v2 cannot be downloaded: {advice}\n"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(create_repo=refuse))
    assert main(["push", str(folder), REPO]) == 2
    assert capsys.readouterr().err == f"error: {folder} cannot be uploaded to {REPO}: {advice}\n"
    assert _reason(KeyError()) == "KeyError" and _reason(OSError("a\n b")) == "a b"
    assert _reason(OSError("bad Token")).endswith("set HF_TOKEN.") and _reason(OSError("401")).startswith("401 Log")


@pytest.mark.parametrize(("words", "name"), [(["pull", "a/b"], "local_folder"), (["push", "a", "b/c"], "push_folder")])
def test_an_error_of_the_system_is_one_sentence_and_a_bug_is_not(monkeypatch, capsys, words, name):
    error = OSError("no disk")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(f"tinygptv.hub.{name}", fails)
    assert main(words) == 2 and capsys.readouterr() == ("", "error: no disk\n")
    error = KeyError("bug")
    with pytest.raises(KeyError):
        main(words)


def test_a_folder_without_its_card_stays_here(tmp_path):
    folder = write_folder(tmp_path / "x", lambda staging: (staging / "a").write_text("a"))
    with pytest.raises(CheckpointError) as caught:
        push_folder(folder, REPO)
    assert str(caught.value) == f"{folder} has no README.md, which tells the licences: save it with save_checkpoint."


def test_a_repository_without_a_manifest_is_taken_as_it_is(monkeypatch, tmp_path):
    asked = {}

    def download(repo, **how):
        asked.update(how)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("hf://org/name@") == tmp_path and asked["revision"] is None
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "*.txt", "*.md", "*.jinja", "*.model"]
    assert is_hub("hf://a/b") and is_hub(Path("hf://a")) is False and not is_hub("a/hf://b")


def test_a_file_that_was_changed_stays_here(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    card = (copy / "README.md").read_text()
    (copy / "README.md").write_text("X" + card[1:])  # of equal size
    with pytest.raises(CheckpointError, match=r"README\.md does not match the hash"):
        push_folder(copy, REPO)
