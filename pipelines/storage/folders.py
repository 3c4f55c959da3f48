"""Whole folders between this machine's disk and a storage: copied, published as a job runs, checked for access."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pipelines.storage.files import (
    DRAFT_ENDING,
    download,
    exists,
    list_names,
    make_folder,
    remove_file,
    upload,
    write_atomically,
)
from pipelines.storage.find import find_below
from pipelines.storage.location import Location, resolve
from pipelines.storage.retry import StorageError, no_bucket, with_retries

_COPIES_AT_ONCE = 4
_SOON_S = 5.0
_PROBE = ".write-check"


def upload_folder(source: Path, target: str | Location, last: str) -> None:
    """Copy a folder to any storage.

    Args:
        source: the folder.
        target: where its files go.
        last: name of the file that makes it complete: removed first, written last.
    """
    target = Location.parse(target)
    remove_file(target / last)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    make_folder(target)
    for folder in sorted({name.rpartition("/")[0] for name in names if "/" in name}):
        make_folder(target / folder)
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        list(pool.map(lambda name: upload(source / name, target / name), [name for name in names if name != last]))
    if last in names:
        upload(source / last, target / last)


def download_files(source: str | Location, names: Iterable[str], target: Path) -> Path:
    """Copy files of a folder of any storage to a local one.

    Args:
        source: the folder.
        names: of the files, relative to it.
        target: made where it is missing.
    """
    source, names = Location.parse(source), list(names)
    for name in names:
        make_folder(str((target / name).parent))
    make_folder(str(target))
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        list(pool.map(lambda name: download(source / name, target / name), names))
    return target


def check_access(location: str | Location, *, writes: bool = False) -> None:
    """Ask a storage for a folder before work depends on it; nothing is asked of a local disk.

    Args:
        location: the folder; need not exist.
        writes: also write a small file and remove it again.

    Raises:
        StorageError: the bucket does not exist, or access is refused; with the URI and the fix.
    """
    location = Location.parse(location)
    if location.is_local:
        return
    if location.is_object_store and not exists(Location(location.root, "")):
        raise StorageError(no_bucket(location))
    list_names(location)
    if writes:
        make_folder(location)
        write_atomically(location / _PROBE, b"")
        filesystem, path = resolve(location / _PROBE)
        with_retries(location, lambda: filesystem.delete_file(path))


class WorkFolder:
    """A local folder whose files are published at a location; where the location is local, the folder itself.

    A job writes into ``path`` as on any disk, and says when files are ready to be seen (``publish``). What an earlier
    run published is fetched by name (``fetch``). Every process has a folder of its own: the location is the truth.
    """

    def __init__(self, location: str | Location) -> None:
        self.location = Location.parse(location)
        self._published: dict[str, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        self._sent_at = 0.0
        if self.location.is_local:
            self.path = Path(self.location.path)
            make_folder(self.location)
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="tinygptv-work-", ignore_cleanup_errors=True)
            self.path = Path(self._temporary.name)

    def uri(self, name: str = "") -> str:
        """Where others find a file of the folder."""
        return (self.location / name).uri if name else self.location.uri

    def fetch(self, *names: str) -> None:
        """Copy files and folders that are published to the local folder; those that are missing are left out.

        A file that was published by this folder, and that somebody removed from the location, is removed here, too.
        """
        if self.location.is_local:
            return
        for name in names:
            found = [f"{name}/{file.name}" if file.name else name for file in find_below(self.location / name)]
            download_files(self.location, found, self.path)
            for gone in self._published_below(name) - set(found):
                (self.path / gone).unlink(missing_ok=True)
                del self._published[gone]
            self._published |= {file: _state(self.path / file) for file in self._files(name)}

    def publish(self, *names: str) -> None:
        """Copy what changed to the location, in the order given; all files, by name, where none is given.

        A file that was published and is gone is removed there, too.

        Raises:
            StorageError: the storage refuses, or fails at every try.
        """
        if self.location.is_local:
            return
        known = {file.partition("/")[0] for file in self._published}
        for name in names or sorted(known | {path.name for path in self.path.iterdir()}):
            present = list(self._files(name))
            for file in present:
                state = _state(self.path / file)
                if self._published.get(file) != state:
                    upload(self.path / file, self.location / file)
                    self._published[file] = state
            for gone in self._published_below(name) - set(present):
                remove_file(self.location / gone)
                del self._published[gone]

    def publish_soon(self, name: str) -> None:
        """Publish a file in the background, at most every few seconds; for what only shows progress."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if self.location.is_local or is_busy or time.monotonic() - self._sent_at < _SOON_S:
            return
        self._sent_at = time.monotonic()
        self._thread = threading.Thread(target=self._try_to_publish, args=(name,), name="progress", daemon=True)
        self._thread.start()

    def _try_to_publish(self, name: str) -> None:
        with suppress(OSError):  # told by the retries; the next line tries again
            upload(self.path / name, self.location / name)

    def _published_below(self, name: str) -> set[str]:
        """A file of this name, or the files of a folder of this name, that were published or fetched."""
        return {file for file in self._published if file == name or file.startswith(f"{name}/")}

    def _files(self, name: str) -> Iterator[str]:
        path = self.path / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file.is_file() and not file.name.endswith(DRAFT_ENDING):
                yield file.relative_to(self.path).as_posix()


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def copy_tree(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files and folders of one local folder into another; those that are missing are left out."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            make_folder(str(target))
            shutil.copy2(source / name, target / name)
