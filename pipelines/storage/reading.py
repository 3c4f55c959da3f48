"""Files of any storage, read piece by piece: a read of a remote file that fails is tried again, from where it began."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipelines.storage.location import Location, resolve
from pipelines.storage.retry import with_retries


@contextmanager
def open_file(location: str | Location) -> Iterator[BinaryIO]:
    """A file as it is, at its start; it can be read from any place.

    Raises:
        FileNotFoundError: it is missing.
        StorageError: the storage refuses, or fails at every try; reading may raise that, too.
    """
    location = Location.parse(location)
    if location.is_local:
        filesystem, path = resolve(location)
        with filesystem.open_input_file(path) as file:
            yield cast(BinaryIO, file)
        return
    with _RemoteFile(location) as remote:
        yield cast(BinaryIO, remote)


class ReadOnlyStream(io.RawIOBase):
    """A stream of bytes; a subclass says what ``read`` gives."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; returns how many bytes."""
        data = self.read(len(buffer)) or b""
        buffer[: len(data)] = data
        return len(data)


class _RemoteFile(ReadOnlyStream):
    """A file of another storage. It is opened again where reading fails."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._opened: pa.NativeFile | None = None
        self._position = 0
        self._num_bytes: int = with_retries(location, lambda: self._file().size())

    def _file(self) -> pa.NativeFile:
        if self._opened is None:
            filesystem, path = resolve(self._location)
            self._opened = filesystem.open_input_file(path)
        return self._opened

    def _read_at_position(self, size: int) -> bytes:
        try:
            data = bytes(self._file().read_at(size, self._position))
        except Exception:  # of the storage's client
            self._opened = None
            raise
        if len(data) < min(size, self._num_bytes - self._position):
            self._opened = None
            raise OSError(f"{len(data)} bytes came of {size} at {self._position}")
        return data

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = with_retries(self._location, lambda: self._read_at_position(wanted)) if wanted else b""
        self._position += len(data)
        return data

    def close(self) -> None:
        self._opened = None
        super().close()
