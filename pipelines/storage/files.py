"""Reading and writing whole files. A file that this writes is absent or complete, also after a kill or a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.settings.folders import make_local_folder
from pipelines.storage.location import Location, resolve
from pipelines.storage.retry import with_retries

COPY_BYTES = 8 << 20
DRAFT_ENDING = ".tmp"


class DiskFullError(ValueError):
    """There is no room for the output; finished parts are kept, and the same command resumes.

    A ``ValueError`` like every mistake that the user can fix, so that entry scripts show its sentence alone.
    """


class disk_full_as_error:
    """Turn "no space left on device" into one clear sentence."""

    def __init__(self, location: object) -> None:
        self.location = location

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Raise ``DiskFullError`` instead of the system's error."""
        if error is not None and _is_disk_full(error):
            raise DiskFullError(
                f"no space left while writing {self.location}: free some, and run the same command again; "
                "what is finished is kept."
            ) from error


def _is_disk_full(error: BaseException) -> bool:
    """Whether the system had no room; some libraries say so only in the text of their own errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def exists(location: str | Location) -> bool:
    """Whether a file or folder is there."""
    return bool(_info(location).type != pafs.FileType.NotFound)


def is_folder(location: str | Location) -> bool:
    """Whether a folder is there."""
    return bool(_info(location).type == pafs.FileType.Directory)


def num_bytes(location: str | Location) -> int:
    """Size of a file; -1 where there is none."""
    info = _info(location)
    return info.size if info.type == pafs.FileType.File and info.size is not None else -1


def list_names(folder: str | Location) -> dict[str, int]:
    """Names of the files directly in a folder, with their sizes in bytes; empty where the folder is missing."""
    return {info.base_name: info.size or 0 for info in _list(folder) if info.type == pafs.FileType.File}


def list_folders(folder: str | Location) -> list[str]:
    """Names of the folders directly in a folder, sorted; empty where the folder is missing."""
    return sorted(info.base_name for info in _list(folder) if info.type == pafs.FileType.Directory)


def _list(folder: str | Location) -> list[pafs.FileInfo]:
    folder = Location.parse(folder)
    filesystem, path = resolve(folder)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return with_retries(folder, lambda: list(filesystem.get_file_info(selector)))


def _info(location: str | Location) -> pafs.FileInfo:
    location = Location.parse(location)
    filesystem, path = resolve(location)
    return with_retries(location, lambda: filesystem.get_file_info(path))


def read_bytes(location: str | Location) -> bytes:
    """A whole file, as it is.

    Raises:
        FileNotFoundError: it is missing.
        StorageError: the storage refuses, or fails at every try.
    """
    location = Location.parse(location)
    filesystem, path = resolve(location)

    def read() -> bytes:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    return with_retries(location, read)


def sha256(location: str | Location) -> str:
    """SHA-256 of a file in hexadecimal; empty where it is missing."""
    location = Location.parse(location)
    filesystem, path = resolve(location)

    def read() -> str:
        digest = hashlib.sha256()
        with filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(COPY_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    try:
        return with_retries(location, read)
    except FileNotFoundError:
        return ""


def draft_of(target: Path) -> Path:
    """A new name beside a file, to write it under before it is renamed.

    No two drafts share a name: a worker that a dead run left behind must not write into the file of its successor.
    """
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{DRAFT_ENDING}")


def remove_drafts(folder: str | Location) -> None:
    """Remove what interrupted runs left unfinished in a folder."""
    folder = Location.parse(folder)
    for name in list_names(folder):
        if name.startswith(".") and name.endswith(DRAFT_ENDING):
            remove_file(folder / name)


class AtomicFile:
    """A file to be written that appears under its name when it is complete.

    Use it as a context manager: it is committed at the end, and left without a trace where the block fails. What goes
    to another storage is written to this machine's temporary files first, so that an upload that fails is tried again.
    """

    def __init__(self, location: str | Location) -> None:
        self.location = Location.parse(location)
        self.closed = False
        with disk_full_as_error(self.location):
            if self.location.is_local:
                self._draft = draft_of(Path(self.location.path))
                self._file: IO[bytes] = self._draft.open("wb")
            else:
                handle, name = tempfile.mkstemp(prefix="upload-", suffix=DRAFT_ENDING)
                self._draft = Path(name)
                self._file = os.fdopen(handle, "wb")

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()

    def commit(self) -> None:
        """Make the file visible under its name.

        Raises:
            DiskFullError: there is no room; nothing is left.
            StorageError: the storage refuses, or fails at every try; nothing is left.
        """
        try:
            with disk_full_as_error(self.location):
                self._file.close()
                self.closed = True
                if self.location.is_local:
                    self._draft.replace(self.location.path)
                else:
                    upload(self._draft, self.location)
                    self._draft.unlink()
        except (Exception, KeyboardInterrupt):
            self.abort()
            raise

    def abort(self) -> None:
        """Leave nothing behind."""
        self.closed = True
        try:
            self._file.close()
        except OSError:
            pass  # a full disk, which was reported already
        finally:
            self._draft.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Commit, or abort where the block failed."""
        if error is None:
            self.commit()
            return
        self.abort()
        with disk_full_as_error(self.location):
            if isinstance(error, OSError):
                raise error


def write_atomically(location: str | Location, data: bytes | memoryview) -> None:
    """Write a file.

    Raises:
        DiskFullError: there is no room; an earlier file stays as it was.
        StorageError: the storage refuses, or fails at every try; likewise.
    """
    location = Location.parse(location)
    if location.is_local:
        with AtomicFile(location) as file:
            file.write(data)
        return
    _send(location, lambda stream: stream.write(data))


def upload(source: Path, location: str | Location) -> None:
    """Copy a local file to any storage; it appears there when it is complete.

    Raises:
        StorageError: the storage refuses, or fails at every try; an earlier file stays as it was.
    """

    def send(stream: pa.NativeFile) -> None:
        with source.open("rb") as file:
            shutil.copyfileobj(file, stream, COPY_BYTES)

    _send(Location.parse(location), send)


def _send(location: Location, send: Callable[[pa.NativeFile], object]) -> None:
    """Write a remote file whole. Most storages show it when its stream is closed; others get a draft first."""
    filesystem, target = resolve(location)
    draft = str(draft_of(Path(target))) if location.shows_partial_files else target

    def write() -> None:
        with filesystem.open_output_stream(draft, compression=None) as stream:  # else by the name: a.gz twice
            send(stream)
        if draft != target:
            filesystem.move(draft, target)

    try:
        with_retries(location, write)
    except BaseException:
        with suppress(OSError):  # of a storage that is gone: the first error says so
            if draft != target and filesystem.get_file_info(draft).type == pafs.FileType.File:
                filesystem.delete_file(draft)
        raise


def write_lines(location: str | Location, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines; returns how many."""
    count = 0
    with AtomicFile(location) as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007 - counted
            file.write(_json_line(line))
    return count


def _json_line(line: Mapping[str, Any]) -> bytes:
    """One line. The separators of Unicode are escaped, because some readers take them for the end of a line."""
    text = _ENCODE_LINE(line)
    if not text.isascii():
        for separator in "\u2028\u2029\x85":
            text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text.encode("utf-8", "backslashreplace") + b"\n"


_ENCODE_LINE = json.JSONEncoder(ensure_ascii=False).encode
"""``json.dumps`` makes an encoder per line where it is given an argument: half of the time."""


def make_folder(location: str | Location) -> None:
    """Make a folder and those above it. In object storages there is none to make: folders are parts of names.

    Raises:
        SettingsError: a local folder cannot be made.
        StorageError: the storage refuses, or fails at every try.
    """
    location = Location.parse(location)
    filesystem, path = resolve(location)
    if location.is_local:
        make_local_folder(Path(location.path), "folder", "Move away what is there, or give another path.")
    elif not location.is_object_store:
        with_retries(location, lambda: filesystem.create_dir(path, recursive=True))


def remove_folder(location: str | Location) -> None:
    """Remove a folder with everything in it; a missing one is fine."""
    location = Location.parse(location)
    filesystem, path = resolve(location)
    if is_folder(location):
        with_retries(location, lambda: filesystem.delete_dir(path))


def remove_file(location: str | Location) -> None:
    """Remove a file; a missing one is fine."""
    location = Location.parse(location)
    filesystem, path = resolve(location)
    if num_bytes(location) >= 0:
        with_retries(location, lambda: filesystem.delete_file(path))


def link_or_copy(source: str | Location, target: str | Location) -> None:
    """Give a file a second name; a copy where the storage has no hard links. Replaces ``target``."""
    source, target = Location.parse(source), Location.parse(target)
    filesystem, path = resolve(source)
    _, target_path = resolve(target)
    with disk_full_as_error(target):
        if not source.is_local:
            with_retries(target, lambda: filesystem.copy_file(path, target_path))
            return
        draft = draft_of(Path(target_path))
        try:
            draft.hardlink_to(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            _copy_whole(Path(path), draft)
        draft.replace(target_path)


def _copy_whole(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def download(location: str | Location, target: Path) -> None:
    """Copy a file of any storage, as it is, to a local path.

    Raises:
        DiskFullError: there is no room.
        StorageError: the storage refuses, or fails at every try.
    """
    location = Location.parse(location)
    filesystem, path = resolve(location)

    def copy() -> None:
        with filesystem.open_input_stream(path, compression=None) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, COPY_BYTES)

    with disk_full_as_error(target):
        with_retries(location, copy)
