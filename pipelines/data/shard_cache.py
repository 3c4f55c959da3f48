"""Shards and cached features of remote sets on the local disk: downloaded once, the least recently used removed."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import storage

_DEAD_AFTER_S = 6 * 3600
"""Without a byte more, a download's draft is of a process that is gone."""

_verified: set[tuple[str, int, int, int, int]] = set()
"""Copies whose content this process has compared with their hash: hash, device, inode, size, time of the last change.

A file system gives the inode of a removed copy to the next file, which may have the same size.
"""


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded shards. Several processes may share it.

    Attributes:
        folder: of the copies; by default in ``$TINYGPTV_CACHE``, or in a private folder among the temporary files.
        max_bytes: most bytes kept, not counting the file that is being fetched.
    """

    folder: Path = field(default_factory=storage.default_cache)
    max_bytes: int = 20 << 30

    def fetch(self, location: storage.Location, sha256: str) -> Path:
        """The local copy of a shard. Processes that need the same one wait for one download.

        A file in use may be removed by another process: on a POSIX system whoever has it mapped keeps it.

        Args:
            location: of the shard.
            sha256: of its content; names the copy, so that a shard that was written again is fetched again.

        Raises:
            OSError: it cannot be downloaded, or what arrives has another content.
            SettingsError: the folder can be written by others.
            DiskFullError: there is no room.
        """
        storage.secure_folder(self.folder)
        target = self.folder / f"{sha256}{Path(location.name).suffix}"
        if _is_whole(target, sha256) and _note_use(target):
            return target
        with storage.locked(self.folder / f"{sha256[:2]}.lock"):
            if not _is_whole(target, sha256):  # else another process was faster
                target.unlink(missing_ok=True)
                self._download(location, sha256, target)
        return target

    def _download(self, location: storage.Location, sha256: str, target: Path) -> None:
        handle, draft = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        os.close(handle)
        try:
            storage.download(location, Path(draft))
            if storage.sha256(draft) != sha256:
                raise OSError(f"what was downloaded from {location} does not match the manifest")
            self._make_room(Path(draft).stat().st_size)
            Path(draft).replace(target)
        finally:
            Path(draft).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what killed downloads left, and the least recently used copies until ``num_bytes`` fit."""
        kept = []
        for path in [p for p in self.folder.iterdir() if p.is_file() and p.suffix != ".lock"]:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process was faster
            if path.suffix != storage.DRAFT_ENDING:
                kept.append((stat.st_atime_ns, stat.st_size, path))
            elif time.time() - stat.st_mtime > _DEAD_AFTER_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in kept) + num_bytes
        for _, size, path in sorted(kept):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _note_use(path: Path) -> bool:
    """Set the time of the last use; that of the last change tells copies apart and stays. False where it is gone."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:  # another process made room
        return False
    return True


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether a copy has the content that its name promises; read once per process."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    identity = (sha256, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if identity not in _verified:
        if storage.sha256(str(path)) != sha256:
            return False
        _verified.add(identity)
    return True
