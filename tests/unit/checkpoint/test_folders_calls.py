"""Checkpoint folders: what is on the disk before what, and every refusal word for word."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from tinygptv.checkpoint import folders
from tinygptv.checkpoint.folders import (
    MANIFEST,
    CheckpointError,
    check_inputs,
    check_output,
    read_manifest,
    verify_folder,
    write_folder,
)


def fill(folder):
    (folder / "b.bin").write_bytes(b"bb")
    (folder / "sub").mkdir()
    (folder / "sub/a.bin").write_bytes(b"a")


def refused(act, *arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        act(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def calls(monkeypatch):
    """What is synced, renamed and removed, in order: ``.tmp`` is the staging folder, ``.old`` the earlier one."""
    done = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def short(path):
        name = Path(path).name
        return name[name.rindex(".") :] if name.startswith(".") else name

    def log(kind, act, *paths):
        done.append((kind, *map(short, paths)))
        return act()

    monkeypatch.setattr(
        folders.os, "fsync", lambda fd: log("sync", lambda: fsync(fd), Path(f"/proc/self/fd/{fd}").readlink())
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: log("rename", lambda: rename(self, to), self, to))
    monkeypatch.setattr(
        folders.shutil, "rmtree", lambda path, **options: log("remove", lambda: rmtree(path, **options), path)
    )
    return done


def test_everything_is_on_the_disk_before_the_old_folder_goes(tmp_path, calls):
    parent = tmp_path / "parent"
    new = [
        ("sync", "b.bin"),
        ("sync", "a.bin"),
        ("sync", "manifest.json.tmp"),
        ("rename", "manifest.json.tmp", "manifest.json"),
        ("sync", ".tmp"),
    ]
    write_folder(parent / "ours", fill)
    assert calls == [*new, ("rename", ".tmp", "ours"), ("sync", "parent")]
    calls.clear()
    write_folder(str(parent / "ours"), fill)
    assert calls == [
        *new,
        ("rename", "ours", ".old"),
        ("rename", ".tmp", "ours"),
        ("sync", "parent"),
        ("remove", ".old"),
    ]
    assert list((parent / "ours").iterdir()) and [path.name for path in parent.iterdir()] == ["ours"]


def test_the_staging_folder_lies_beside_and_is_anothers_each_time(tmp_path):
    seen = []
    for _ in range(2):
        write_folder(tmp_path / "ours", lambda staging: (seen.append(staging), fill(staging)))
    assert seen[0] != seen[1] and {path.parent for path in seen} == {tmp_path}
    assert all(path.name.startswith(".ours.") and path.name.endswith(".tmp") for path in seen)
    assert not any(path.exists() for path in seen)

    def kill(staging):
        seen.append(staging)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "other", kill)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"] and not seen[-1].exists()


def test_refusals_of_an_output_word_for_word(tmp_path):
    ours = write_folder(tmp_path / "ours", fill)
    file, mine = tmp_path / "file", tmp_path / "mine"
    file.touch()
    mine.mkdir()
    (mine / "notes").touch()
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a file that would be deleted" in refused(check_output, tmp_path / "pipe")
    below = file / "deep/er"
    assert refused(check_output, below) == f"output {below} cannot be made: {file} is a file. Give another folder."
    assert refused(check_output, str(file)) == (
        f"output {file} is a file that would be deleted: give a new or empty folder."
    )
    assert refused(check_output, mine) == (
        f"output {mine} is not empty and was not written by this project (it has no manifest.json): give a new or "
        "empty folder."
    )
    for name in ("z", "sub/mine", "sub/link"):
        (ours / name).symlink_to(tmp_path / "nowhere")
    (ours / "empty").mkdir()
    assert refused(check_output, ours, also_ours=["sub/link"]) == (
        f"output {ours} holds sub/mine, which this project did not write and which would be deleted: move it, or give "
        "a new folder."
    )
    check_output(ours, also_ours=["sub/link", "sub/mine", "z"])
    assert refused(check_inputs, ours, [mine, file, ours / "b.bin"]) == (
        f"output {ours} would change the input {ours / 'b.bin'}: give another folder."
    )
    check_inputs(file / "x", [file])  # a file has nothing below it: refused for itself, not as an input
    check_inputs(tmp_path / "new", [mine, file, ours])


def test_refusals_of_a_folder_word_for_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(read_manifest, "no") == "checkpoint no does not exist.", "as it was given"
    ours = write_folder(tmp_path / "ours", fill)
    manifest = ours / MANIFEST
    assert refused(read_manifest, tmp_path / "no") == f"checkpoint {tmp_path / 'no'} does not exist."
    assert refused(read_manifest, str(manifest)) == f"checkpoint {manifest} is a file, not a folder."
    assert refused(read_manifest, tmp_path) == (
        f"{tmp_path} has no manifest.json: it was never finished, or is no checkpoint of this project."
    )
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    assert refused(read_manifest, tmp_path / "link").startswith(f"{tmp_path}/link has no"), "as it was given"
    text = manifest.read_text()
    for content, reason in (
        ("[1]", f"{manifest} holds a list where an object {{...}} is expected."),
        ('{"files": {}}', "it lists no files."),
        (
            '{"files": {"a/../../b": {"bytes": 0, "sha256": ""}}}',
            "it names 'a/../../b', which is outside of its folder.",
        ),
        ('{"files": {"a": {"bytes": -1, "sha256": ""}}}', "its entry of a has no size and SHA-256."),
    ):
        manifest.write_text(content)
        assert refused(verify_folder, ours) == f"{manifest} is damaged: {reason}"
    manifest.write_text('{"files": {"sub/a.bin": {"bytes": 0, "sha256": "x"}}}')
    assert read_manifest(ours).files["sub/a.bin"] == folders.FileEntry(0, "x"), "an empty file has a size"
    (ours / "sub/a.bin").write_bytes(b"")
    assert refused(verify_folder, ours).endswith(
        "a.bin does not match the hash in its manifest: damaged or written over."
    )
    (ours / "sub/a.bin").write_bytes(b"a")
    manifest.write_text(text)
    assert list(verify_folder(ours).files) == ["b.bin", "sub/a.bin"]
    (ours / "sub/a.bin").write_bytes(b"x")
    assert refused(verify_folder, ours) == (
        f"{ours / 'sub/a.bin'} does not match the hash in its manifest: damaged or written over."
    )
    (ours / "sub/a.bin").write_bytes(b"long")
    assert refused(verify_folder, ours) == f"{ours / 'sub/a.bin'} is another file (4 bytes; its manifest says 1)."
    (ours / "b.bin").write_bytes(b"b")
    assert refused(verify_folder, ours) == f"{ours / 'b.bin'} is cut off (1 bytes; its manifest says 2)."
    (ours / "b.bin").unlink()
    (ours / "b.bin").mkdir()
    assert refused(verify_folder, ours) == f"{ours} lacks b.bin, which its manifest lists."


def test_a_weight_file_that_is_none_is_one_sentence(tmp_path):
    pointer = tmp_path / "a.bin"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert refused(folders.check_weight_file, pointer) == (
        f"{pointer} is a Git LFS pointer, not the file itself: run git lfs pull in its repository, or download the "
        "file."
    )
    cut = tmp_path / "a.safetensors"
    cut.write_bytes((20).to_bytes(8, "little") + b"{")
    assert refused(folders.check_weight_file, cut) == (
        f"{cut} is cut off (its header should have 20 bytes): download or copy it again."
    )


def test_a_hash_is_of_the_whole_file_and_its_folder_is_closed(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert folders.hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = len(list(Path("/proc/self/fd").iterdir()))
    folders._sync(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_write_out_a_folder_is_no_fault(tmp_path, monkeypatch, number, passes):
    fsync = os.fsync

    def of_files(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(folders.os, "fsync", of_files)
    (tmp_path / "a").write_bytes(b"abc")
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match="Input/output"):
        folders.write_manifest(tmp_path)
    folders.verify_folder(tmp_path)
