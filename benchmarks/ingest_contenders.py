"""The ways to turn tars of JPEGs into small JPEGs that benchmarks/ingest.py compares. Each runs in its own process.

    python benchmarks/ingest_contenders.py NAME TARS_FOLDER OUTPUT_FOLDER WORKERS

The same work for all: read every sample, decode, shrink so that the shorter side is 224, encode as JPEG, quality 90,
write images and captions. Prints one JSON line: rows of a pass, wall seconds of the best pass, CPU seconds of the
median pass, and wall seconds of a first pass that does not count: it starts workers and imports libraries.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa

SIDE, QUALITY = 224, 90
PASSES = 3
SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("caption", pa.string())])


# ---------------------------------------------------------------- decoders


def shrink_pil(data: bytes) -> bytes:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def shrink_fast(data: bytes) -> bytes:
    """The decoder, filter and encoder that ingest uses, without its checks."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=size[0], min_height=size[1])
    return simplejpeg.encode_jpeg(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), QUALITY, "RGB", "420")


def shrink_img2dataset() -> Callable[[bytes], bytes]:
    from img2dataset.resizer import Resizer

    resizer = Resizer(SIDE, "keep_ratio", True, encode_quality=QUALITY)
    return lambda data: resizer(io.BytesIO(data))[0]


# ---------------------------------------------------------------- plain loops and pools


def tar_samples(path: Path) -> Iterator[tuple[str, bytes, str]]:
    parts: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            parts[extension] = tar.extractfile(member).read()
            if len(parts) == 3:
                yield key, parts["jpg"], json.loads(parts["json"])["caption"]
                parts = {}


def write_shard(rows: Iterator[tuple[str, bytes, str]], path: Path) -> int:
    count = 0
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        waiting: list[tuple[str, bytes, str]] = []
        for row in rows:
            waiting.append(row)
            count += 1
            if len(waiting) == 64:
                writer.write_batch(pa.record_batch(list(zip(*waiting, strict=True)), schema=SCHEMA))
                waiting = []
        if waiting:
            writer.write_batch(pa.record_batch(list(zip(*waiting, strict=True)), schema=SCHEMA))
    return count


def one_tar(job: tuple[Path, Path, str]) -> int:
    tar, output, decoder = job
    shrink = {"pil": lambda: shrink_pil, "fast": lambda: shrink_fast, "img2dataset": shrink_img2dataset}[decoder]()
    rows = ((key, shrink(image), caption) for key, image, caption in tar_samples(tar))
    return write_shard(rows, output / f"{tar.stem}.arrow")


class Pool:
    """One task per tar; ``workers`` 0 is a loop in this process."""

    def __init__(self, decoder: str, workers: int) -> None:
        self.decoder = decoder
        self.pool = ProcessPoolExecutor(workers) if workers else None

    def __call__(self, tars: list[Path], output: Path) -> int:
        output.mkdir(parents=True)
        jobs = [(tar, output, self.decoder) for tar in tars]
        return sum(self.pool.map(one_tar, jobs) if self.pool else map(one_tar, jobs))


# ---------------------------------------------------------------- libraries


class WebDataset:
    """webdataset in a DataLoader of ``workers`` processes; the main process writes."""

    def __init__(self, shrink: Callable[[bytes], bytes], workers: int) -> None:
        self.shrink, self.workers = shrink, workers

    def __call__(self, tars: list[Path], output: Path) -> int:
        import webdataset as wds

        output.mkdir(parents=True)
        shrink = self.shrink

        def work(sample: dict) -> tuple[str, bytes, str]:
            return sample["__key__"], shrink(sample["jpg"]), json.loads(sample["json"])["caption"]

        dataset = wds.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False).map(work)
        loader = wds.WebLoader(dataset.batched(64, collation_fn=list), batch_size=None, num_workers=self.workers)
        return write_shard((row for batch in loader for row in batch), output / "all.arrow")


class HuggingFace:
    """datasets: the webdataset builder, then ``map`` in ``workers`` processes, then Parquet."""

    def __init__(self, shrink: Callable[[bytes], bytes], workers: int) -> None:
        self.shrink, self.workers = shrink, workers

    def __call__(self, tars: list[Path], output: Path) -> int:
        import datasets

        datasets.disable_progress_bars()
        shrink = self.shrink
        rows = datasets.load_dataset(
            "webdataset", data_files=[str(tar) for tar in tars], split="train", cache_dir=str(output / "cache")
        ).cast_column("jpg", datasets.Image(decode=False))

        def work(row: dict) -> dict:
            return {"key": row["__key__"], "image": shrink(row["jpg"]["bytes"]), "caption": row["json"]["caption"]}

        done = rows.map(work, remove_columns=rows.column_names, num_proc=self.workers)
        done.to_parquet(str(output / "all.parquet"))
        return len(done)


class Ours:
    """pipelines.data.ingest.job on a local Ray cluster of ``workers`` CPUs, with all of its checks."""

    def __init__(self, workers: int) -> None:
        from pipelines.cluster import start_ray
        from pipelines.settings import PrepareDataSettings

        self.settings = PrepareDataSettings(
            source="laion", image_size=SIDE, jpeg_quality=QUALITY, num_cpus=workers, object_store_mb=100,
            duplicates="keep", quiet=True, tracking_uri="none",
        )  # fmt: skip
        self.session = start_ray(self.settings)
        self.session.__enter__()

    def __call__(self, tars: list[Path], output: Path) -> int:
        from pipelines.data.ingest.job import ingest

        update = {"input": str(tars[0].parent / "*.tar"), "output": str(output)}
        return ingest(self.settings.model_copy(update=update))["rows_out"]


CONTENDERS: dict[str, Callable[[int], Callable[[list[Path], Path], int]]] = {
    "loop, PIL": lambda workers: Pool("pil", 0),
    "pool, PIL": lambda workers: Pool("pil", workers),
    "pool, the same decoder": lambda workers: Pool("fast", workers),
    "pool, img2dataset's Resizer": lambda workers: Pool("img2dataset", workers),
    "webdataset, PIL": lambda workers: WebDataset(shrink_pil, workers),
    "webdataset, the same decoder": lambda workers: WebDataset(shrink_fast, workers),
    "datasets map, PIL": lambda workers: HuggingFace(shrink_pil, workers),
    "datasets map, the same decoder": lambda workers: HuggingFace(shrink_fast, workers),
    "ours": Ours,
}


NEEDS = {
    "pool, img2dataset's Resizer": "img2dataset",
    "webdataset, PIL": "webdataset",
    "webdataset, the same decoder": "webdataset",
    "datasets map, PIL": "datasets",
    "datasets map, the same decoder": "datasets",
}
"""Package that a contender needs besides this project's own."""


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    """CPU time of this process, its living descendants, and those that have ended and were waited for."""
    total = 0.0
    for process in family():
        try:
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    name, folder, output, workers = sys.argv[1:]
    tars = sorted(Path(folder).glob("*.tar"))
    contender = CONTENDERS[name](int(workers))
    walls, cpus = [], []
    for turn in range(1 + PASSES):
        target = Path(output, f"{turn}")
        cpu, began = cpu_seconds(), time.perf_counter()
        rows = contender(tars, target)
        walls.append(time.perf_counter() - began)
        cpus.append(cpu_seconds() - cpu)
        shutil.rmtree(target)
    result = {"rows": rows, "wall": min(walls[1:]), "cpu": statistics.median(cpus[1:]), "first_wall": walls[0]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
