"""The node's cache of what lies in buckets: a private folder on this machine's disk, and locks between processes."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.settings import SettingsError
from pipelines.settings.folders import make_local_folder
from pipelines.storage.location import Location

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TINYGPTV_CACHE"

LOCK = ".lock"
"""File of an output folder that a run holds while it writes there."""


def default_cache() -> Path:
    """``$TINYGPTV_CACHE``, or a folder of this user among the machine's temporary files."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(tempfile.gettempdir(), f"tinygptv-cache-{os.getuid()}")


def secure_folder(folder: Path) -> Path:
    """Make a cache folder, and refuse one into which another user could put files.

    Raises:
        SettingsError: it is a link, belongs to another user, or others can write to it; or it cannot be made.
    """
    make_local_folder(folder, "the cache", f"Set {CACHE_VARIABLE} to a folder of your own.", mode=0o700)
    found = folder.lstat()
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or others_write:
        raise SettingsError(
            f"the cache {folder} is a link, belongs to another user, or can be written by others: set "
            f"{CACHE_VARIABLE} to a folder of your own, or run `chmod 700 {folder}` if it is yours."
        )
    return folder


@contextmanager
def locked(path: Path, busy: str = "", mode: int = 0o600, *, wait: bool = False) -> Iterator[None]:
    """Have a lock file for this process alone while the block runs. A dead process holds none.

    Args:
        path: of the lock file; made where it is missing.
        busy: sentence of the error where another process has it; empty waits for it.
        mode: rights of a new file.
        wait: log ``busy`` and wait instead.

    Raises:
        SettingsError: another process has it.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, mode), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            if not wait:
                raise SettingsError(busy) from error
            logger.warning("%s", busy)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network and FUSE file systems have no locks
            if not busy:
                raise
            logger.warning("%s cannot be locked (%s): see to it that no other process writes there.", path, error)
        yield


@contextmanager
def alone(output: str, *, wait: bool = False, is_replaced: bool = False) -> Iterator[None]:
    """Keep other runs from writing into an output folder while the block runs; buckets have no locks.

    Args:
        output: folder, made where it is missing; or a URI.
        wait: wait for another run to end.
        is_replaced: the run puts a new folder in its place: the lock is a file beside it, and it is not made.

    Raises:
        SettingsError: another run has it, or it cannot be made.
    """
    location = Location.parse(output)
    if not location.is_local:
        yield
        return
    folder = Path(location.path)
    lock = folder / LOCK
    if is_replaced:
        folder = folder.resolve()  # a link stays a link
        lock = folder.with_name(f".{folder.name}{LOCK}")
    make_local_folder(lock.parent, "output", "Give another output=.")
    busy = f"another run is writing into output={location.path!r}: wait for it, or choose another."
    if wait:
        busy = f"another run is writing into {folder}: waiting for it."
    # Mode less the umask: those who share the folder share the lock.
    with locked(lock, busy, mode=0o666, wait=wait):
        yield
