"""Folders are whole or absent, replace only what this project wrote, and say what is wrong with them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinygptv.checkpoint.folders import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    check_output,
    check_weight_file,
    is_whole,
    read_object,
    remove_leftovers,
    verify_folder,
    write_folder,
    write_manifest,
)


def fill(text):
    def write(folder):
        (folder / "a.bin").write_bytes(text)
        (folder / "sub").mkdir()
        (folder / "sub/b.txt").write_text("b")

    return write


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "ours", fill(b"first"))


# ------------------------------------------------------------------ what may be replaced


def test_our_own_folder_is_replaced(folder):
    write_folder(folder, fill(b"second"))
    assert (folder / "a.bin").read_bytes() == b"second"
    verify_folder(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["ours"], "nothing temporary stays"


def test_what_a_kill_left_beside_a_folder_is_in_nobodys_way(folder):
    left = folder.with_name(f".{folder.name}.old")
    left.mkdir()
    (left / "x").write_text("an earlier one")
    write_folder(folder, fill(b"new"))
    assert (folder / "a.bin").read_bytes() == b"new" and (left / "x").is_file()


def test_new_and_empty_folders_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er/new"):
        verify_folder(write_folder(tmp_path / name, fill(b"x")))


def test_who_may_read_the_folder_may_read_the_weights(tmp_path):
    weights = write_folder(
        tmp_path / "ours", lambda staging: save_file({"a": torch.ones(1)}, staging / "a.safetensors")
    )
    modes = {path.stat().st_mode & 0o777 for path in weights.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_what_others_wrote_stays(tmp_path, folder):
    notes = tmp_path / "models"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="was not written by this project"):
        write_folder(notes, fill(b"x"))
    assert [path.name for path in notes.iterdir()] == ["notes.txt"]

    file = tmp_path / "file.pth"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file that would be deleted"):
        write_folder(file, fill(b"x"))
    with pytest.raises(CheckpointError, match=r"file\.pth is a file"):
        write_folder(file / "below", fill(b"x"))
    assert file.read_text() == "mine"

    (folder / "sub/mine.txt").write_text("mine")  # one's own file in a folder of ours
    with pytest.raises(CheckpointError, match=r"holds sub/mine\.txt, which this project did not write"):
        write_folder(folder, fill(b"second"))
    assert (folder / "a.bin").read_bytes() == b"first"
    write_folder(folder, fill(b"second"), also_ours=["sub/mine.txt"])

    shards = tmp_path / "shards"  # a manifest of prepared data is not one of a checkpoint
    shards.mkdir()
    (shards / MANIFEST).write_text('{"format_version": 1, "shards": []}')
    with pytest.raises(CheckpointError, match="lists no files"):
        write_folder(shards, fill(b"x"))


def test_an_output_is_never_an_input(tmp_path, folder):
    for output, given in (
        (folder, folder),
        (folder / "below", folder),
        (folder.parent, folder),
        (folder, folder / "a.bin"),
    ):
        with pytest.raises(CheckpointError, match="would change the input"):
            check_output(output, [given])
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="would change the input"):
        check_output(tmp_path / "link", [folder])
    check_output(tmp_path / "ours2", [folder])


def test_a_link_stays_a_link(tmp_path, folder):
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert write_folder(link, fill(b"second")) == link
    assert link.is_symlink() and (folder / "a.bin").read_bytes() == b"second"


def test_a_failure_leaves_what_was_there(folder):
    def fail(staging):
        fill(b"second")(staging)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(folder, fail)
    verify_folder(folder)
    assert (folder / "a.bin").read_bytes() == b"first" and [path.name for path in folder.parent.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("failing", "told", "names"),
    [
        ({2}, "the one before it is again at {ours}. Rename", {"ours": b"first", ".tmp": b"second"}),
        ({2, 3}, "the one before it at {old}. Rename", {".old": b"first", ".tmp": b"second"}),
    ],
    ids=["restored", "not even that"],
)
def test_a_rename_that_fails_loses_neither_folder(folder, monkeypatch, failing, told, names):
    rename, calls = Path.rename, []

    def fail(path, target):
        if path.is_dir():
            calls.append(path)
            if len(calls) in failing:
                raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError) as caught:
        write_folder(folder, fill(b"second"))
    found = {path.suffix or path.name: path for path in folder.parent.iterdir()}
    assert {name: (path / "a.bin").read_bytes() for name, path in found.items()} == names
    verify_folder(found[".tmp"])
    start = f"{folder} could not be written (busy): the new folder is complete and stays at {found['.tmp']}, "
    assert str(caught.value).startswith(start + told.format(ours=folder, old=found.get(".old")))


def test_a_new_folder_that_cannot_be_renamed_is_kept_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", failing_for_folders(OSError(errno.EBUSY, "busy")))
    with pytest.raises(CheckpointError, match=r"stays at .*\.tmp\. Rename it to .*new when the cause is gone"):
        write_folder(tmp_path / "new", fill(b"x"))


def test_an_interrupt_between_the_renames_restores_the_old_folder(folder, monkeypatch):
    monkeypatch.setattr(Path, "rename", failing_for_folders(KeyboardInterrupt(), but=folder))
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, fill(b"second"))
    assert [path.name for path in folder.parent.iterdir()] == ["ours"] and (folder / "a.bin").read_bytes() == b"first"


def test_what_killed_writers_left_of_a_folder_is_removed_and_nothing_else(tmp_path):
    others = ["run[1]", ".run[1].lock", ".other.12345678.tmp", ".run1.12345678.tmp"]
    for name in (*others, ".run[1].12345678.tmp", ".run[1].87654321.tmp"):
        (tmp_path / name / "inside").mkdir(parents=True)
    remove_leftovers(tmp_path / "run[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def failing_for_folders(error, but=None, rename=Path.rename):
    def fail(path, target):
        if path.is_dir() and path != but and path.suffix == ".tmp":
            raise error
        return rename(path, target)

    return fail


# ------------------------------------------------------------------ verification


def test_a_flipped_byte_of_equal_size_is_found(folder):
    (folder / "a.bin").write_bytes(b"fjrst")
    verify_folder(folder, hashes=False)
    assert is_whole(folder)
    with pytest.raises(CheckpointError, match=r"a\.bin does not match the hash"):
        verify_folder(folder)


def test_what_a_file_is_instead_is_said(folder):
    for content, reason in (
        (b"fir", "is cut off (3 bytes; its manifest says 5)"),
        (b"", "is an empty file"),
        (b"longer than before", "is another file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"  <!DOCTYPE html><html>", "is a web page (HTML)"),
    ):
        (folder / "a.bin").write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            verify_folder(folder, hashes=False)
        assert reason in str(error.value) and not is_whole(folder)
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks a\.bin"):
        verify_folder(folder)


def test_weights_are_named_for_what_they_are_without_a_manifest(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(8)}, path)
    check_weight_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    sizes = rf"{len(whole) - 5} bytes of {len(whole)}"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is cut off \(it has {sizes}\): download"):
        check_weight_file(path)
    other = tmp_path / "model.bin"
    other.write_bytes(whole[:-5])
    check_weight_file(other)  # of another format, whatever its first bytes mean
    other.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.bin is an empty file"):
        check_weight_file(other)


def test_an_empty_file_belongs_to_a_folder_and_the_manifest_has_a_version(tmp_path):
    folder = write_folder(tmp_path / "ours", lambda staging: (staging / "empty").touch())
    assert verify_folder(folder).files["empty"].bytes == 0
    assert json.loads((folder / MANIFEST).read_text())["format_version"] == FORMAT_VERSION == 1
    assert (folder / MANIFEST).read_text().startswith('{\n "format_version"'), "for people, too"


@pytest.mark.security
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no valid JSON"),
        ("", "an empty file"),
        ("<html>", "a web page"),
        ("[1]", "holds a list"),
        ("{}", "lists no files"),
        ('{"files": {}}', "lists no files"),
        ('{"files": ["a.bin"]}', "lists no files"),
        ('{"files": {"a.bin": 5}}', r"entry of a\.bin has no size"),
        ('{"files": {"a.bin": {"bytes": "5", "sha256": "x"}}}', "has no size"),
        ('{"files": {"a.bin": {"bytes": true, "sha256": "x"}}}', "has no size"),
        ('{"files": {"a.bin": {"bytes": 5}}}', "has no size and SHA-256"),
        ('{"files": {"../secret": {"bytes": 5, "sha256": "x"}}}', "outside of its folder"),
        ('{"files": {"/etc/passwd": {"bytes": 5, "sha256": "x"}}}', "outside of its folder"),
        ('{"files": {"": {"bytes": 5, "sha256": "x"}}}', "outside of its folder"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_a_malformed_manifest_is_one_sentence(folder, text, reason):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=reason) as error:
        verify_folder(folder)
    assert "\n" not in str(error.value)


def test_a_manifest_that_is_written_again_does_not_list_itself(folder):
    before = verify_folder(folder)
    write_manifest(folder)
    assert verify_folder(folder) == before and sorted(before.files) == ["a.bin", "sub/b.txt"]


def test_a_folder_that_was_never_finished_is_named(tmp_path, folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        verify_folder(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify_folder(tmp_path / "nowhere")


def test_the_manifest_lists_size_and_hash(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files["sub/b.txt"] == {
        "bytes": 1,
        "sha256": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d",
    }


def test_what_is_damaged_is_named_with_its_path(folder):
    (folder / MANIFEST).write_text('{"files": {"a.bin": 5}}')
    with pytest.raises(CheckpointError) as caught:
        verify_folder(folder)
    assert str(caught.value) == f"{folder / MANIFEST} is damaged: its entry of a.bin has no size and SHA-256."
    config = folder / "config.json"
    config.write_text('{"a": [1]}')
    assert read_object(config) == {"a": [1]}
    config.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json.* holds a list"):
        read_object(config)
