"""Compressed files, recognised by their first bytes: names are often wrong
(a gzip file named .tar, a plain one named .gz)."""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from pipelines.storage.files import COPY_BYTES, disk_full_as_error
from pipelines.storage.location import Location, resolve

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xfd7zXZ\x00", "xz"),
)
_UNPACK_BYTES = 4 << 10


def compression_of(location: str | Location) -> str:
    """Name of a file's compression, from its first bytes; empty where it has none that is known here."""
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(8)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


@contextmanager
def open_unpacked(location: str | Location) -> Iterator[BinaryIO]:
    """The content of a file from its start, unpacked where it is compressed.

    Reading raises ``OSError`` without an errno where the compressed data is damaged.
    """
    compression = compression_of(location)
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path, compression=None) as stream:
        if compression == "xz":
            with lzma.open(cast(BinaryIO, stream)) as content:
                yield cast(BinaryIO, _ErrorsAsOsError(content))
        elif compression:
            yield cast(BinaryIO, pa.CompressedInputStream(stream, compression))
        else:
            yield cast(BinaryIO, stream)


class _ErrorsAsOsError(io.RawIOBase):
    """lzma raises errors of its own kind; readers know ``OSError``."""

    def __init__(self, content: lzma.LZMAFile) -> None:
        self.content = content

    def read(self, size: int = -1) -> bytes:
        try:
            return self.content.read(size)
        except (lzma.LZMAError, EOFError) as error:
            raise OSError(str(error)) from error


def unpack(location: str | Location, target: Path) -> str:
    """Copy a file to a local path, unpacked where it is compressed.

    Returns:
        What is wrong with the compressed data: ``target`` then holds what comes before. Empty where nothing is.

    Raises:
        OSError: the disk or the network failed.
        DiskFullError: there is no room.
    """
    chunk_bytes = _UNPACK_BYTES if compression_of(location) else COPY_BYTES  # the chunk with the damage is lost
    with disk_full_as_error(target), open_unpacked(location) as source, target.open("wb") as sink:
        while True:
            try:
                chunk = source.read(chunk_bytes)
            except OSError as error:
                if error.errno is not None:
                    raise
                return f"the compressed data is damaged or cut off: {error}"
            if not chunk:
                return ""
            sink.write(chunk)
