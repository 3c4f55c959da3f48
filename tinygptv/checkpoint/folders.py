"""Folders that are written whole or not at all, replace only what this project wrote, and are verified when read.

``manifest.json`` lists name, size and SHA-256 of every other file. It is written last: a folder without it, or whose
files do not match it, is not complete. Imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tinygptv.checkpoint.file_kinds import FileKindError, missing_bytes, read_json_object, wrong_kind
from tinygptv.folder_fault import folder_fault
from tinygptv.json_object import JsonObject

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
QUANTIZATION_FILE = "quantization.json"
"""Marks a folder of low-bit weights, a quantized artifact."""


class CheckpointError(ValueError):
    """A folder cannot be read as a checkpoint, or must not be written to; the message names the file and the reason."""


@dataclass(frozen=True)
class FileEntry:
    """Entry of a file in the manifest: its size and its SHA-256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a folder, by path relative to it."""

    files: dict[str, FileEntry]


# ---------------------------------------------------------------------- writing


def write_folder(folder: str | Path, fill: Callable[[Path], None], *, also_ours: Collection[str] = ()) -> Path:
    """Write a folder so that it is either complete or absent.

    Args:
        folder: final path; a folder of this project there is replaced once the new one is complete.
        fill: writes the files into the folder it is given.
        also_ours: see ``check_output``.

    Returns:
        The final path.

    Raises:
        CheckpointError: the path holds something that this project did not write, its folder cannot be made, or the
            complete folder cannot be renamed to it.
    """
    given = Path(folder)
    check_output(given, also_ours=also_ours)
    folder = Path(os.path.realpath(given))  # a link stays a link
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"output {given} cannot be made: {folder_fault(staging, error)}. Give another folder."
        ) from error
    try:
        fill(staging)
        write_manifest(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _move_into_place(staging, folder)
    return given


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers of a folder left beside it; only where no other process can be writing it."""
    folder = Path(os.path.realpath(folder))
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _move_into_place(new: Path, folder: Path) -> None:
    """Rename a complete folder to its final path; the one there is removed afterwards, or restored where that fails."""
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written ({error.strerror or error}): the new folder is complete and stays at {new}"
            f"{_restore(old, folder)}. Rename it to {folder} when the cause is gone."
        ) from error
    except BaseException:
        _restore(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def _restore(old: Path | None, folder: Path) -> str:
    """Give a folder its name back; says where it is."""
    if old is None:
        return ""
    try:
        old.rename(folder)
    except OSError:
        return f", the one before it at {old}"
    return f", the one before it is again at {folder}"


def check_output(output: str | Path, inputs: Collection[str | Path] = (), *, also_ours: Collection[str] = ()) -> None:
    """Refuse an output folder before any work, unless it is new, empty, or holds only what this project wrote.

    Args:
        output: the folder to write.
        inputs: files and folders that are read; the output must not be one of them, lie in one, or hold one.
        also_ours: names beside the manifest's that are this project's, for example ``result.json``.

    Raises:
        CheckpointError: the output would delete or change something else.
    """
    output = Path(output)
    check_inputs(output, inputs)
    if not output.exists():
        blocking = next((p for p in output.absolute().parents if p.exists() and not p.is_dir()), None)
        if blocking is not None:
            raise CheckpointError(f"output {output} cannot be made: {blocking} is a file. Give another folder.")
        return
    if not output.is_dir():
        raise CheckpointError(f"output {output} is a file that would be deleted: give a new or empty folder.")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise CheckpointError(
            f"output {output} is not empty and was not written by this project (it has no {MANIFEST}): give a new or "
            "empty folder."
        )
    known = {MANIFEST, *read_manifest(output).files, *also_ours}
    foreign = sorted({p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()} - known)
    if foreign:
        raise CheckpointError(
            f"output {output} holds {foreign[0]}, which this project did not write and which would be deleted: move "
            "it, or give a new folder."
        )


def check_inputs(output: Path, inputs: Collection[str | Path]) -> None:
    """Refuse an output that is an input, lies in one, or holds one.

    Raises:
        CheckpointError: naming the input.
    """
    written = Path(os.path.realpath(output))
    for given in inputs:
        path = Path(os.path.realpath(given))
        if written == path or written in path.parents or (path.is_dir() and path in written.parents):
            raise CheckpointError(f"output {output} would change the input {given}: give another folder.")


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder into ``manifest.json``, itself written atomically."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = asdict(FileEntry(path.stat().st_size, hash_file(path)))
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as stream:
        json.dump({"format_version": FORMAT_VERSION, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(folder / MANIFEST)
    _share(folder, files)
    _sync(folder)


def _share(folder: Path, names: Collection[str]) -> None:
    """Who may read the manifest may read its files: safetensors since 0.8 writes them for the owner alone."""
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for name in names:
        with contextlib.suppress(OSError):  # file systems without modes
            (folder / name).chmod((folder / name).stat().st_mode & 0o777 | mode)


# ---------------------------------------------------------------------- reading


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        CheckpointError: there is no folder or manifest, or the manifest is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {folder} {what}.")
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never finished, or is no checkpoint of this project."
        )
    try:
        files = read_json_object(path).get("files")
    except FileKindError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} is damaged: it lists no files.")
    return Manifest({name: _read_entry(path, name, entry) for name, entry in files.items()})


def read_object(path: Path) -> JsonObject:
    """The JSON object in a file of a checkpoint or artifact.

    Raises:
        CheckpointError: it is missing, damaged, or no object.
    """
    try:
        return read_json_object(path)
    except FileKindError as error:
        raise CheckpointError(str(error)) from error


def _read_entry(path: Path, name: str, entry: Any) -> FileEntry:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not name:
        raise CheckpointError(f"{path} is damaged: it names {name!r}, which is outside of its folder.")
    size = entry.get("bytes") if isinstance(entry, dict) else None
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(sha256, str):
        raise CheckpointError(f"{path} is damaged: its entry of {name} has no size and SHA-256.")
    return FileEntry(size, sha256)


def verify_folder(folder: str | Path, *, hashes: bool = True) -> Manifest:
    """Check a folder against its manifest.

    Args:
        folder: the folder.
        hashes: also compare SHA-256, not only presence and size.

    Returns:
        The manifest.

    Raises:
        CheckpointError: there is no folder or manifest, or a file is missing, short, long or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists.")
        size = path.stat().st_size
        if size != entry.bytes:
            kind = wrong_kind(path) or ("cut off" if size < entry.bytes else "another file")
            raise CheckpointError(f"{path} is {kind} ({size} bytes; its manifest says {entry.bytes}).")
        if hashes and hash_file(path) != entry.sha256:
            raise CheckpointError(f"{path} does not match the hash in its manifest: damaged or written over.")
    return manifest


def is_whole(folder: str | Path) -> bool:
    """Whether a folder has a manifest, and every file that it names in its size; hashes are not compared."""
    try:
        verify_folder(folder, hashes=False)
    except CheckpointError:
        return False
    return True


def check_weight_file(path: Path) -> None:
    """Refuse a weight file that is none.

    Raises:
        CheckpointError: naming what it is instead, or how it is cut off.
    """
    if kind := wrong_kind(path):
        raise CheckpointError(f"{path} is {kind}.")
    if path.suffix == ".safetensors" and (missing := missing_bytes(path)):
        raise CheckpointError(f"{path} is cut off ({missing}): download or copy it again.")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)
"""Answers of file systems (some of FUSE, SMB) that cannot write out a folder; its files are written out as ever."""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
