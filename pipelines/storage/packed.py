"""Compressed files, recognised by their first bytes: names are often wrong
(a gzip file named .tar, a plain one named .gz)."""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from pipelines.storage.files import COPY_BYTES, disk_full_as_error
from pipelines.storage.location import Location
from pipelines.storage.reading import ReadOnlyStream, open_file

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xfd7zXZ\x00", "xz"),
)
_UNPACK_BYTES = 4 << 10
_FED_BYTES = 256
"""Compressed bytes that a decompressor gets at a time where damage is near: what it made of these may be lost."""


class DamagedFileError(OSError):
    """The compressed data of a file is damaged or cut off. It has no errno, as errors of pyarrow's decompressors."""


def compression_of(location: str | Location) -> str:
    """Name of a file's compression, from its first bytes; empty where it has none that is known here."""
    with open_file(location) as stream:
        head = stream.read(8)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


@contextmanager
def open_unpacked(location: str | Location) -> Iterator[BinaryIO]:
    """The content of a file from its start, unpacked where it is compressed.

    Where the compressed data is damaged, all that comes before is read first; then reading raises
    ``DamagedFileError``, as does the reading of everything at once.
    """
    compression = compression_of(location)
    if compression:
        with _UpToDamage(location, compression) as content:
            yield cast(BinaryIO, content)
        return
    with open_file(location) as stream:
        yield stream


class _UpToDamage(ReadOnlyStream):
    """A compressed file's content. Decompressors keep nothing of the read in which they find damage; this does."""

    def __init__(self, location: str | Location, compression: str) -> None:
        self._location, self._compression = location, compression
        self._opened = ExitStack()
        self._stream = self._open()
        self._position = 0
        self._damage: DamagedFileError | None = None

    def _open(self, fed_bytes: int = COPY_BYTES) -> BinaryIO:
        packed = self._opened.enter_context(open_file(self._location))
        if isinstance(packed, io.RawIOBase):  # remote: a request for each of a decompressor's small reads
            packed = self._opened.enter_context(io.BufferedReader(packed, COPY_BYTES))
        self._packed = _Packed(packed, fed_bytes)
        if self._compression == "xz":
            return cast(BinaryIO, self._opened.enter_context(lzma.open(cast(BinaryIO, self._packed))))
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(self._packed, mode="r"), self._compression))

    def read(self, size: int = -1) -> bytes:
        parts, left = [], size
        while left and self._damage is None:
            try:
                part = self._stream.read(_UNPACK_BYTES if left < 0 else min(left, _UNPACK_BYTES))
            except (OSError, lzma.LZMAError, EOFError) as error:
                if self._packed.fault is not None:
                    raise self._packed.fault from None
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk or the network
                self._damage = DamagedFileError(str(error))
                part = self._before_damage()
            if not part:
                break
            parts.append(part)
            self._position += len(part)
            left -= len(part) if left > 0 else 0
        if self._damage is not None and (size < 0 or (size and not parts)):
            raise self._damage
        return b"".join(parts)

    def _before_damage(self) -> bytes:
        """What the failed read would have given: the file is read again from its start, then byte by byte."""
        stream, found = self._open(_FED_BYTES), bytearray()
        with suppress(OSError, lzma.LZMAError, EOFError):
            left = self._position
            while left and (skipped := stream.read(min(left, _UNPACK_BYTES))):
                left -= len(skipped)
            while byte := stream.read(1):
                found += byte
        if self._packed.fault is not None:  # what comes before the damage is not known
            raise self._packed.fault
        return bytes(found)

    def close(self) -> None:
        """Close the file."""
        self._opened.close()
        super().close()


class _Packed(ReadOnlyStream):
    """The compressed bytes of a file, so many at a time.

    It notes that reading itself failed: decompressors raise the same for that as for damage, and errors of storages
    have no errno either.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.fault: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._stream.read(self._size if size < 0 else min(size, self._size)))
        except OSError as error:
            self.fault = error
            raise


def unpack(location: str | Location, target: Path) -> str:
    """Copy a file to a local path, unpacked where it is compressed.

    Returns:
        What is wrong with the compressed data: ``target`` then holds what comes before. Empty where nothing is.

    Raises:
        OSError: the disk failed.
        StorageError: the storage refuses, or fails at every try.
        DiskFullError: there is no room.
    """
    with disk_full_as_error(target), open_unpacked(location) as source, target.open("wb") as sink:
        while True:
            try:
                chunk = source.read(COPY_BYTES)
            except DamagedFileError as error:
                return f"the compressed data is damaged or cut off: {error}"
            if not chunk:
                return ""
            sink.write(chunk)
