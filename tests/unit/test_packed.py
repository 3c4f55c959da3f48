"""Compressed files: known by their bytes, and read up to where they are damaged."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import random
import zlib
from pathlib import Path
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
    why = {"gzip": "Truncated compressed stream", "xz": "Compressed file ended before the end-of-stream marker"}[kind]
    assert f"damaged or cut off: {why}" in storage.unpack(str(tmp_path / "file"), tmp_path / "plain")
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


def write_damaged(file: Path, packed: bytes, num_zeros: int) -> bytes:
    """Write zeros over the middle of a packed file; returns what comes before them."""
    half = len(packed) // 2
    file.write_bytes(packed[:half] + bytes(num_zeros) + packed[half + num_zeros :])
    return packed[:half]


def test_damage_inside_costs_a_few_hundred_bytes(tmp_path):
    """A decompressor that is fed 64 KiB loses what it made of all of them."""
    data = bytes(random.Random(0).choices(b"abcdefghijkl ", k=300_000))
    before = write_damaged(tmp_path / "file", gzip.compress(data), 400)
    whole = len(zlib.decompressobj(wbits=31).decompress(before))
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        kept = stream.read(1 << 20)
        with pytest.raises(storage.DamagedFileError):
            stream.read(1)
    assert kept[: whole - 2000] == data[: whole - 2000]
    assert len(data) - 1000 < len(kept) < len(data) + 1000, "it is found at the end, by the checksum"


def test_an_xz_file_is_read_to_where_it_is_damaged(tmp_path):
    data = bytes(random.Random(4).choices(b"abcdefghijkl ", k=20_000))
    before = write_damaged(tmp_path / "file", lzma.compress(data), 40)
    assert "damaged or cut off: Corrupt input data" in storage.unpack(str(tmp_path / "file"), tmp_path / "plain")
    kept = (tmp_path / "plain").read_bytes()
    whole = lzma.LZMADecompressor().decompress(before)
    assert data.startswith(kept) and len(whole) - 1000 < len(kept) <= len(whole)


def test_all_is_read_where_all_is_asked_for_and_the_file_is_closed(tmp_path):
    data = random.Random(2).randbytes(20_000)
    (tmp_path / "file").write_bytes(gzip.compress(data))
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        packed = stream._packed._stream
        assert stream.readable() and [stream.read(1) for _ in range(3)] == [b"%c" % byte for byte in data[:3]]
        assert stream.read(9_000) == data[3:9_003]
        assert stream.read(-1) == data[9_003:] and stream.read(1) == b"" and not packed.closed
    assert packed.closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_is_unpacked_onto_a_full_disk_is_told(tmp_path):
    (tmp_path / "file").write_bytes(gzip.compress(b"text"))
    (tmp_path / "plain").symlink_to("/dev/full")
    with pytest.raises(storage.DiskFullError, match=f"^no space left while writing {tmp_path}/plain: "):
        storage.unpack(str(tmp_path / "file"), tmp_path / "plain")


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(gzip.compress(b"text"))
    with storage.open_unpacked(str(tmp_path / "file")) as stream:
        monkeypatch.setattr(stream, "_stream", SimpleNamespace(read=Mock(side_effect=OSError(errno.EIO, "failed"))))
        with pytest.raises(OSError, match="failed") as caught:
            stream.read(1)
        assert caught.value.errno == errno.EIO


class Flaky:
    """A storage of one file that fails after so many bytes of each opening, as pyarrow says it: without a number."""

    def __init__(self, content, *fails_at):
        self.content, self.fails_at, self.requests = content, list(fails_at), 0

    def open_input_file(self, path):
        assert path == "x"
        left = self.fails_at.pop(0)

        def read_at(size, start):
            self.requests += 1
            if start >= left:
                raise OSError("AWS Error NETWORK_CONNECTION during GetObject")
            return self.content[start : min(start + size, left)]

        return SimpleNamespace(read_at=read_at, size=lambda: len(self.content))

    def open_file(self, location):
        """The same, as ``storage.open_file`` gives it, not tried again."""
        file, inner = self.open_input_file("x"), io.BytesIO(self.content)

        def read(size):
            return inner.read(len(file.read_at(size, inner.tell())))

        return contextlib.nullcontext(SimpleNamespace(read=read))


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind])
def test_a_network_that_fails_is_no_damage(tmp_path, monkeypatch, kind):
    """The decompressor raises the same for both: rows must not be lost because a connection was."""
    data = random.Random(1).randbytes(20_000)
    content = PACKED[kind](data)
    half, never = content[:10_000], len(content) + 1
    for packed, *fails_at in (
        (content, never, 10_000),
        (content, never, len(content) - 8),
        (half, never, never, 5_000),
    ):
        flaky = Flaky(packed, *fails_at)
        monkeypatch.setattr(storage.packed, "open_file", flaky.open_file)
        with pytest.raises(OSError, match="NETWORK_CONNECTION") as caught:
            storage.unpack("x", tmp_path / "plain")
        assert not isinstance(caught.value, storage.DamagedFileError) and not flaky.fails_at
    monkeypatch.setattr(storage.packed, "open_file", Flaky(content, never, never).open_file)
    assert storage.unpack("x", tmp_path / "plain") == "" and (tmp_path / "plain").read_bytes() == data


def test_what_is_unpacked_from_a_bucket_is_asked_for_again(tmp_path, monkeypatch):
    data = random.Random(3).randbytes(20_000)
    content = gzip.compress(data)
    never, pauses = len(content) + 1, []
    monkeypatch.setattr(storage.retry.time, "sleep", pauses.append)

    def unpack(content, *fails_at):
        flaky = Flaky(content, *fails_at)
        monkeypatch.setattr(storage.reading, "resolve", lambda location: (flaky, location.path))
        damage = storage.unpack("s3://bucket/x", tmp_path / "plain")
        assert not flaky.fails_at
        return damage

    assert unpack(content, 0, never, 10_000, never) == "" and (tmp_path / "plain").read_bytes() == data
    assert len(pauses) == 2
    assert "damaged or cut off" in unpack(content[:10_000], never, never, never) and len(pauses) == 2
    with pytest.raises(storage.StorageError, match=r"^s3://bucket/x failed 6 times, last with: AWS Error NETWORK_CONN"):
        unpack(content, *[0] * 6)


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind])
def test_a_bucket_is_asked_for_large_pieces_also_where_there_is_damage(tmp_path, monkeypatch, kind):
    """Decompressors read a few bytes at a time; each was a request."""
    data = random.Random(4).randbytes(300_000)
    content = PACKED[kind](data)
    for packed in (content, content[:200_000]):
        flaky = Flaky(packed, *[len(content) + 1] * 3)
        monkeypatch.setattr(storage.reading, "resolve", lambda location, flaky=flaky: (flaky, location.path))
        damage = storage.unpack("s3://bucket/x", tmp_path / "plain")
        assert bool(damage) == (packed is not content) and flaky.requests <= 5
    assert data.startswith((tmp_path / "plain").read_bytes())
