"""Small source files for tests: images, and tars made member by member; units, and what refusals say."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources.base import SourceInput, SourceUnit
from pipelines.storage import Location


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth RGB image that differs clearly from those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def jpeg(seed: int, size: tuple[int, int] = (48, 32), **options) -> bytes:
    return encode(picture(seed, size), quality=90, **options)


def sample(key: str, image: bytes, caption: str, extension: str = "jpg") -> list[tuple[str, bytes]]:
    """Members of one sample, as img2dataset writes them."""
    fields = json.dumps({"caption": caption, "key": key}).encode()
    return [(f"{key}.{extension}", image), (f"{key}.json", fields), (f"{key}.txt", caption.encode())]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_web_tar(path: Path, first: int, count: int, size: tuple[int, int] = (48, 32)) -> Path:
    """``count`` sound samples with keys and captions that name their number."""
    samples = (sample(f"{n:06d}", jpeg(n, size), f"picture number {n}") for n in range(first, first + count))
    return write_tar(path, (member for members in samples for member in members))


def own_unit(path: Path, **fields) -> SourceUnit:
    """A unit of one's own data that is a whole file."""
    source = SourceInput("parquet", str(path), fields.pop("images", ""), "own", "")
    return SourceUnit(source, Location.parse(str(path)), path.name, **fields)


def refused(kind: type[Exception], call: Callable[..., object], *arguments, **more) -> str:
    """What a call that is refused with an error says."""
    with pytest.raises(kind) as caught:
        call(*arguments, **more)
    return str(caught.value)
