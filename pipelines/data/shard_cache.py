"""Shards of remote sets on the local disk: each downloaded once, the least recently used ones removed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import storage


def _default_folder() -> Path:
    return Path(os.environ.get("TINYGPTV_CACHE") or Path(tempfile.gettempdir(), f"tinygptv-shards-{os.getuid()}"))


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded shards. Several processes may share it.

    Attributes:
        folder: where they lie; by default ``$TINYGPTV_CACHE``, or a folder among the machine's temporary files.
        max_bytes: most bytes kept, not counting the file that is being fetched.
    """

    folder: Path = field(default_factory=_default_folder)
    max_bytes: int = 20 << 30

    def fetch(self, place: str, sha256: str) -> Path:
        """The local copy of a shard.

        A file in use may be removed by another process: on a POSIX system whoever has it mapped keeps it.

        Args:
            place: URI of the shard.
            sha256: of its content; names the copy, so that a shard that was made anew is fetched anew.

        Raises:
            OSError: it cannot be downloaded.
        """
        target = self.folder / f"{sha256}.arrow"
        if target.is_file():
            os.utime(target)
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        os.close(handle)
        try:
            storage.download(place, Path(draft))
            if storage.sha256(draft) != sha256:
                raise OSError(f"what was downloaded from {place} does not match the manifest")
            self._make_room(Path(draft).stat().st_size)
            Path(draft).replace(target)
        finally:
            Path(draft).unlink(missing_ok=True)
        return target

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
