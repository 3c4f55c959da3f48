"""Shards of remote sets on the local disk: each downloaded once, the least recently used ones removed."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import storage
from pipelines.settings import SettingsError

CACHE_VARIABLE = "TINYGPTV_CACHE"


def _default_folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(tempfile.gettempdir(), f"tinygptv-shards-{os.getuid()}")


_verified: set[tuple[int, int, int]] = set()
"""Copies whose content this process has compared with their hash: device, inode, size."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded shards. Several processes may share it.

    Attributes:
        folder: of the copies; by default ``$TINYGPTV_CACHE``, or a private folder among the machine's temporary files.
        max_bytes: most bytes kept, not counting the file that is being fetched.
    """

    folder: Path = field(default_factory=_default_folder)
    max_bytes: int = 20 << 30

    def fetch(self, location: storage.Location, sha256: str) -> Path:
        """The local copy of a shard.

        A file in use may be removed by another process: on a POSIX system whoever has it mapped keeps it.

        Args:
            location: of the shard.
            sha256: of its content; names the copy, so that a shard that was written again is fetched again.

        Raises:
            OSError: it cannot be downloaded, or what arrives has another content.
            SettingsError: the folder can be written by others.
            DiskFullError: there is no room.
        """
        self._secure_folder()
        target = self.folder / f"{sha256}.arrow"
        if target.is_file():
            if _is_whole(target, sha256):
                os.utime(target)
                return target
            target.unlink(missing_ok=True)
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
        return target

    def _secure_folder(self) -> None:
        """Make the folder, and refuse one into which another user could put files.

        Raises:
            SettingsError: it is a link, belongs to another user, or others can write to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self.folder.lstat()
        others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or others_write:
            raise SettingsError(
                f"the shard cache {self.folder} is a link, belongs to another user, or can be written by others: set "
                f"{CACHE_VARIABLE} to a folder of your own, or run `chmod 700 {self.folder}` if it is yours."
            )

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used copies until ``num_bytes`` fit."""
        kept = []
        for path in self.folder.glob("*.arrow"):
            try:
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue  # another process was faster
        total = sum(size for _, size, _ in kept) + num_bytes
        for _, size, path in sorted(kept):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether a copy has the content that its name promises; read once per process."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    identity = (found.st_dev, found.st_ino, found.st_size)  # reading a copy changes its times
    if identity not in _verified:
        if storage.sha256(str(path)) != sha256:
            return False
        _verified.add(identity)
    return True
