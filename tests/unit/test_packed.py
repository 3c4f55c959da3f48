"""Compressed files: known by their bytes, and read up to where they are damaged."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import random
import zlib
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pytest

from pipelines import storage

PACKED = {
    "": lambda data: data,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", PACKED)
def test_compressed_files_are_known_by_their_bytes(tmp_path, kind):
    data = b"some words " * 5000
    (tmp_path / "file.tar").write_bytes(PACKED[kind](data))
    assert storage.compression_of(str(tmp_path / "file.tar")) == kind
    assert storage.unpack(str(tmp_path / "file.tar"), tmp_path / "plain") == ""
    assert (tmp_path / "plain").read_bytes() == data
    with storage.open_unpacked(str(tmp_path / "file.tar")) as stream:
        assert stream.read(11) == b"some words "


@pytest.mark.parametrize("kind", ["gzip", "xz"])
def test_damaged_compression_gives_what_comes_before(tmp_path, kind):
    data = os.urandom(200_000)
    packed = PACKED[kind](data)
    (tmp_path / "file").write_bytes(packed[: len(packed) // 2])
    assert "damaged or cut off" in storage.unpack(str(tmp_path / "file"), tmp_path / "plain")
    kept = (tmp_path / "plain").read_bytes()
    assert data.startswith(kept) and len(kept) > 50_000
    make = {"gzip": lambda: zlib.decompressobj(wbits=31), "xz": lzma.LZMADecompressor}[kind]
    assert kept == make().decompress(packed[: len(packed) // 2]), "to the last byte"
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        assert stream.read(8 << 20) == kept
        for size in (1, 8 << 20, -1):
            with pytest.raises(storage.DamagedFileError):
                stream.read(size)
        assert stream.read(0) == b""
    with storage.open_unpacked(str(tmp_path / "file")) as stream, pytest.raises(storage.DamagedFileError):
        stream.read()  # not a part for the whole


def test_damage_inside_costs_a_few_hundred_bytes(tmp_path):
    """A decompressor that is fed 64 KiB loses what it made of all of them."""
    data = bytes(random.Random(0).choices(b"abcdefghijkl ", k=300_000))
    packed = bytearray(gzip.compress(data))
    half = len(packed) // 2
    packed[half : half + 400] = bytes(400)
    (tmp_path / "file").write_bytes(packed)
    whole = len(zlib.decompressobj(wbits=31).decompress(packed[:half]))
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        kept = stream.read(1 << 20)
        with pytest.raises(storage.DamagedFileError):
            stream.read(1)
    assert kept[: whole - 2000] == data[: whole - 2000]


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(gzip.compress(b"text"))
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        monkeypatch.setattr(stream, "_stream", SimpleNamespace(read=Mock(side_effect=OSError(errno.EIO, "failed"))))
        with pytest.raises(OSError, match="failed") as caught:
            stream.read(1)
        assert caught.value.errno == errno.EIO
