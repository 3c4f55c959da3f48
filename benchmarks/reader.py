"""Reading prepared data: random rows and batches, next to Hugging Face datasets and webdataset on the same images.
Writes benchmarks/results/reader.md.

    python benchmarks/reader.py                  # about half a minute on a quiet core

webdataset is not among this project's requirements; without it its line is left out:

    pip install --target extra --no-deps webdataset braceexpand && PYTHONPATH=extra python benchmarks/reader.py
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from note import LoadWatch, versions, write_note
from photo_tars import SIZE, make_pictures
from PIL import Image

from pipelines.data.shards import ShardSet
from pipelines.miniature.tiny_training import write_shard_set
from tinygptv.data.images import open_image, resize_pixels
from tinygptv.data.sample import SampleRow, Turn

SIDE, BATCH = 224, 64
Images = Callable[[int], Iterator[bytes]]
"""Gives so many encoded images, one after the other."""


def make_rows(count: int) -> Iterator[SampleRow]:
    """Photograph-like images as ingest stores them, each a little different."""
    pictures = [Image.fromarray(pixels).resize((299, SIDE)) for pixels in make_pictures(40)]
    for number in range(count):
        buffer = BytesIO()
        picture = pictures[number % len(pictures)].copy()
        picture.paste((number % 251, 0, 0), (0, 0, 8, 8))
        picture.save(buffer, "JPEG", quality=90)
        turn = Turn("", (f"picture number {number}",))
        yield SampleRow(f"set/{number:06d}", "set", "pair", (turn,), buffer.getvalue(), *SIZE)


def write_tar(rows: Iterable[SampleRow], path: Path) -> Path:
    """The same images and words as one tar."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            for extension, data in (("jpg", row.image or b""), ("txt", row.turns[0].answers[0].encode())):
                info = tarfile.TarInfo(f"{row.id.replace('/', '-')}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return path


def readers(shards: ShardSet, scratch: Path) -> dict[str, Images]:
    order = np.random.default_rng(0).integers(0, len(shards), 100_000).tolist()

    def ours(count: int) -> Iterator[bytes]:
        return (shards.row(k).image for k in order[:count])

    ways: dict[str, Images] = {"ours, random rows": ours}
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()
        files = [f"{shards.uri}/{info.file}" for info in shards.manifest.shards]
        rows = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=f"{scratch}/cache")
        ways["datasets, random rows"] = lambda count: (rows[k]["image"] for k in order[:count])
    if importlib.util.find_spec("webdataset"):
        import webdataset as wds

        tar = write_tar(shards, scratch / "set.tar")

        def stream(count: int) -> Iterator[bytes]:
            dataset = wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).shuffle(1000).repeat()
            return (sample["jpg"] for sample, _ in zip(dataset, range(count), strict=False))

        ways["webdataset, in order through a shuffle buffer of 1,000"] = stream
    return ways


def measure(read: Images, count: int, use: Callable[[bytes], object]) -> float:
    """CPU seconds of one pass per image."""
    began = time.process_time()
    for image in read(count):
        use(image)
    return (time.process_time() - began) / count


def compare(ways: dict[str, Images], rounds: int, count: int) -> list[str]:
    """Rates in rows per second of one core's time, ratios within a round."""
    uses = {"raw": (lambda image: None, count), "decoded": (decode, max(BATCH, count // 10))}
    costs = {(name, use): [] for name in ways for use in uses}
    for _ in range(1 + rounds):  # the first one warms caches
        for name, read in ways.items():
            for use, (work, number) in uses.items():
                costs[name, use].append(measure(read, number, work))
    lines = [
        "| reader, one process | rows/s | ours is faster by | decoded rows/s | batches of 64 /s | ours is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for name in ways:
        cells = [name]
        for use in uses:
            mine, own = costs[name, use][1:], costs["ours, random rows", use][1:]
            rate, ratio = 1 / min(mine), statistics.median(a / b for a, b in zip(mine, own, strict=True))
            cells += [f"{rate:.0f}", *([f"{rate / BATCH:.1f}"] if use == "decoded" else []), f"{ratio:.2f} x"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decode(image: bytes) -> np.ndarray:
    return resize_pixels(open_image(image), SIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="rows of a pass; a tenth of them where they are decoded")
    arguments = parser.parse_args()
    load = LoadWatch()
    with tempfile.TemporaryDirectory(prefix="reader-") as folder:
        shards = ShardSet.open(str(write_shard_set(Path(folder, "set"), list(make_rows(2000)), 500)))
        ways = readers(shards, Path(folder))
        lines = compare(ways, arguments.rounds, arguments.rows)
        header = [
            versions(["pyarrow", "datasets", "webdataset", "pillow"]),
            str(load),
            f"Input: {len(shards)} JPEGs, shorter side {SIDE} pixels, in memory.",
            f"Rates are per second of CPU time, the best of {arguments.rounds} rounds; ratios: their median.",
        ]
    write_note("reader", header, {"Rows and batches": lines})


if __name__ == "__main__":
    main()
