"""Checkpoints and artifacts of a bucket on this machine's disk: fetched once per node, whole or not at all.

A checkpoint folder is known by its manifest (names, sizes and hashes of its files, written last). The cache keeps each
under the hash of that manifest, so that a folder that was written again is another entry, and two checkpoints with one
content are one. Processes of a node that need the same one wait for one download.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines import storage
from pipelines.settings import SettingsError
from tinygptv.checkpoint.folders import MANIFEST, CheckpointError, verify_folder
from tinygptv.hub import is_hub, local_folder

logger = logging.getLogger(__name__)

MAX_FOLDERS = 8
"""Copies of whole checkpoints that a node keeps; the least recently used are removed."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".npy")
_KEY_LENGTH = 32
_DRAFT, _DEAD_AFTER_S = "draft-", 6 * 3600


def local_checkpoint(location: str, *, weights: bool = True) -> Path:
    """A checkpoint or artifact folder on this machine's disk: itself where it is local, else a copy.

    Args:
        location: path or URI of the folder; ``hf://org/name[@revision]`` is a repository of the hub.
        weights: also the files of weights; without them a copy is small: configuration, tokenizer, manifest.

    Returns:
        The folder; its content must not be changed.

    Raises:
        CheckpointError: there is no finished checkpoint, or it changes while it is copied.
        StorageError: the storage refuses, or fails at every try.
        DiskFullError: there is no room.
    """
    if storage.is_local(location):
        return Path(storage.absolute(location))
    if is_hub(location):
        return local_folder(location)  # the hub's library has a cache of its own
    remote = storage.Location.parse(location)
    manifest = read_manifest(remote)
    key = hashlib.sha256(manifest).hexdigest()[:_KEY_LENGTH]
    folders = _cache_folder("checkpoints")
    whole, target = folders / key, folders / (key if weights else f"{key}-light")
    for present in (whole, target):
        if (present / MANIFEST).is_file():
            os.utime(present)
            return present
    with storage.locked(folders / f"{key}.lock"):
        if not (target / MANIFEST).is_file():  # else another process was faster
            _fetch(remote, manifest, target, weights=weights)
            _thin_out(folders, target)
    return target


def checked_checkpoint(location: str, *, weights: bool = True) -> Path:
    """As ``local_checkpoint``; a local folder is compared with its manifest, too, by the sizes of its files.

    Raises:
        CheckpointError: there is no finished checkpoint.
        StorageError: the storage refuses, or fails at every try.
    """
    folder = local_checkpoint(location, weights=weights)
    if storage.is_local(location):
        verify_folder(folder, hashes=False)
    return folder


def read_manifest(remote: storage.Location) -> bytes:
    """The manifest of a remote checkpoint.

    Raises:
        CheckpointError: there is none; the text says what is there instead.
        StorageError: the bucket does not exist, or access is refused.
    """
    try:
        return storage.read_bytes(remote / MANIFEST)
    except FileNotFoundError:
        storage.check_access(remote)
        if not (storage.list_names(remote) or storage.list_folders(remote)):
            raise CheckpointError(f"checkpoint {remote} does not exist: check the URI.") from None
        raise CheckpointError(
            f"{remote} has files but no {MANIFEST}, which is written last: another job is still writing it, or was "
            "stopped. Wait for it, or run it again."
        ) from None


def local_data(location: str) -> Path:
    """A folder (or file) of data on this machine's disk: itself where it is local, else a copy of all its files.

    A copy is known by the names, sizes and times of the files, and keeps their times.

    Raises:
        SettingsError: there is nothing.
        StorageError: the storage refuses, or fails at every try.
        DiskFullError: there is no room.
    """
    if storage.is_local(location):
        return Path(storage.absolute(location))
    remote = storage.Location.parse(location)
    files = storage.find_below(remote)
    if not files:
        storage.check_access(remote)
        raise SettingsError(f"{remote} holds no files: check the URI.")
    key = hashlib.sha256(repr(files).encode()).hexdigest()[:_KEY_LENGTH]
    folders = _cache_folder("data")
    target = folders / key
    with storage.locked(folders / f"{key}.lock"):
        if target.is_dir():
            os.utime(target)
        else:
            _fetch_data(remote, files, target)
            _thin_out(folders, target)
    return target if files[0].name else target / remote.name


def _cache_folder(kind: str) -> Path:
    return storage.secure_folder(storage.secure_folder(storage.default_cache()) / kind)


def _fetch_data(remote: storage.Location, files: Sequence[storage.FoundFile], target: Path) -> None:
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=_DRAFT))
    try:
        logger.info("fetching %d files of %s (%.1f MB)", len(files), remote, sum(f.num_bytes for f in files) / 1e6)
        base = remote if files[0].name else remote.parent
        names = {file.name or remote.name: file for file in files}
        storage.download_files(base, names, draft)
        for name, file in names.items():
            os.utime(draft / name, ns=(file.modified_ns, file.modified_ns))
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fetch(remote: storage.Location, manifest: bytes, target: Path, *, weights: bool) -> None:
    try:
        sizes = {name: int(file["bytes"]) for name, file in json.loads(manifest)["files"].items()}
        names = [name for name in sizes if weights or not name.endswith(_WEIGHTS)]
        total = sum(sizes[name] for name in names)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=_DRAFT))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{remote / MANIFEST} is damaged: {error}.") from error
    logger.info("fetching %s (%.1f MB)", remote, total / 1e6)
    try:
        try:
            storage.download_files(remote, names, draft)
        except FileNotFoundError as error:
            raise CheckpointError(f"{remote} lacks a file that its manifest lists: {error}.") from error
        try:
            (draft / MANIFEST).write_bytes(_cut_manifest(manifest, names))
            verify_folder(draft)
        except CheckpointError as error:
            reason = str(error).replace(str(draft), str(remote))
            raise CheckpointError(f"{reason} Is another job writing it? Wait for it, and try again.") from error
        (draft / MANIFEST).write_bytes(manifest)  # whole: results are known by it
        storage.remove_folder(str(target))  # a copy without a manifest
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _cut_manifest(manifest: bytes, names: list[str]) -> bytes:
    """A manifest with only some of its files."""
    content = json.loads(manifest)
    return json.dumps({**content, "files": {name: content["files"][name] for name in names}}).encode()


def _thin_out(folders: Path, newest: Path) -> None:
    """Remove the copies that were used longest ago, and what killed downloads left."""
    others = sorted((path for path in folders.iterdir() if path.is_dir() and path != newest), key=_used_at)
    copies = [path for path in others if not path.name.startswith(_DRAFT)]
    dead = [path for path in others if path.name.startswith(_DRAFT) and time.time() - _used_at(path) > _DEAD_AFTER_S]
    for path in (*dead, *copies[: max(0, len(copies) - MAX_FOLDERS + 1)]):
        shutil.rmtree(path, ignore_errors=True)


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
