"""Tars for benchmarks: 40 images of 500 x 375 pixels with small changes, their JPEGs as large as photographs' are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)


def make_pictures(count: int) -> list[np.ndarray]:
    """Textures with as many details as photographs: about 90 kB at quality 92."""
    pictures = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        layers = []
        for height, width in ((4, 5), (24, 32), (94, 125)):
            coarse = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            layers.append(np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=float))
        grain = rng.normal(0, 9, (SIZE[1], SIZE[0], 1))
        pictures.append(np.clip(0.55 * layers[0] + 0.3 * layers[1] + 0.15 * layers[2] + grain, 0, 255).astype(np.uint8))
    return pictures


def make_tars(folder: Path, num_tars: int, rows_per_tar: int) -> Path:
    """Tars as img2dataset writes them."""
    folder.mkdir(parents=True)
    pictures = make_pictures(40)
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(rows_per_tar):
                _add_sample(tar, number * rows_per_tar + row, pictures)
    return folder


def _add_sample(tar: tarfile.TarFile, index: int, pictures: list[np.ndarray]) -> None:
    picture = pictures[index % len(pictures)].copy()
    picture[:8, :8] = index % 251
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92)
    caption = f"picture number {index}"
    fields = json.dumps({"caption": caption, "key": f"{index:09d}"}).encode()
    for extension, data in (("jpg", buffer.getvalue()), ("json", fields), ("txt", caption.encode())):
        info = tarfile.TarInfo(f"{index:09d}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def megabytes(folder: Path) -> float:
    """Size of the tars of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.tar")) / 1e6
