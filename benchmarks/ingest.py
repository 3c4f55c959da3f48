"""Ingest and reading, side by side with what one would pick instead. Writes benchmarks/results/ingest.md.

    python benchmarks/ingest.py                                   # everything, about six minutes on two quiet cores
    python benchmarks/ingest.py --img2dataset-python PYTHON       # also img2dataset, from an environment of its own

Needs webdataset and datasets. img2dataset asks for old versions of libraries used here, hence the other environment.
The tars are made here: JPEGs of 500 x 375 pixels, 40 pictures with small changes, as large as photographs of that size.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from ingest_contenders import CONTENDERS, QUALITY, SIDE, shrink_fast
from PIL import Image

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "ingest.md"


# ---------------------------------------------------------------- input


def make_pictures(count: int) -> list[np.ndarray]:
    """Textures with as many details as photographs: about 90 kB at quality 92."""
    pictures = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        layers = []
        for height, width in ((4, 5), (24, 32), (94, 125)):
            coarse = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            layers.append(np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=float))
        grain = rng.normal(0, 9, (375, 500, 1))
        pictures.append(np.clip(0.55 * layers[0] + 0.3 * layers[1] + 0.15 * layers[2] + grain, 0, 255).astype(np.uint8))
    return pictures


def make_tars(folder: Path, num_tars: int, rows_per_tar: int) -> Path:
    folder.mkdir(parents=True)
    pictures = make_pictures(40)
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(rows_per_tar):
                index = number * rows_per_tar + row
                picture = pictures[index % len(pictures)].copy()
                picture[:8, :8] = index % 251
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "JPEG", quality=92)
                fields = {"caption": f"picture number {index}", "key": f"{index:09d}"}
                members = (
                    ("jpg", buffer.getvalue()),
                    ("json", json.dumps(fields).encode()),
                    ("txt", fields["caption"].encode()),
                )
                for extension, data in members:
                    info = tarfile.TarInfo(f"{index:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


# ---------------------------------------------------------------- ingest


def run_contender(name: str, tars: Path, output: Path, workers: int, python: str) -> dict:
    command = [python, str(HERE / "ingest_contenders.py"), name, str(tars), str(output), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_ingest(tars: Path, scratch: Path, rounds: int, img2dataset: str) -> list[str]:
    megabytes = sum(path.stat().st_size for path in tars.glob("*.tar")) / 1e6
    names = [name for name in CONTENDERS if "img2dataset" not in name or img2dataset]
    runs: dict[str, list[dict]] = {name: [] for name in [*names, "ours, 1 CPU"]}
    for _ in range(rounds):
        for name, done in runs.items():
            python = img2dataset if "img2dataset" in name else sys.executable
            key, workers = ("ours", 1) if name == "ours, 1 CPU" else (name, 2)
            done.append(run_contender(key, tars, scratch / "out", workers, python))
            print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
    best = {name: min(done, key=lambda run: run["wall"]) for name, done in runs.items()}
    ours = best["ours"]
    lines = [
        "| way | rows/s | MB/s | MB/s per core | ours is faster by | rows per CPU second | first pass, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in best.items():
        rate = run["rows"] / run["wall"]
        cores = 1 if "loop" in name or "1 CPU" in name else 2
        cpu = statistics.median(r["rows"] / r["cpu"] for r in runs[name])
        lines.append(
            f"| {name} | {rate:.0f} | {megabytes / run['wall']:.1f} | {megabytes / run['wall'] / cores:.1f} | "
            f"{run['wall'] / ours['wall']:.2f} x | {cpu:.0f} | {run['first_wall']:.1f} |"
        )
    return lines


def measure_floor(tars: Path) -> list[str]:
    """Decode, shrink and encode in one thread: what no arrangement of processes can beat."""
    import cv2
    import simplejpeg

    from pipelines.checks import check_image
    from pipelines.settings import PrepareDataSettings

    cv2.setNumThreads(1)
    with tarfile.open(next(tars.glob("*.tar"))) as tar:
        data = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:200]
    settings = PrepareDataSettings(image_size=SIDE, jpeg_quality=QUALITY)
    size = (299, 224)
    pixels = [cv2.resize(simplejpeg.decode_jpeg(d, "RGB"), size, interpolation=cv2.INTER_AREA) for d in data]
    steps = {
        "decode to the smallest sufficient scale": lambda i: simplejpeg.decode_jpeg(
            data[i], "RGB", min_width=size[0], min_height=size[1]
        ),
        "encode, quality 90": lambda i: simplejpeg.encode_jpeg(pixels[i], QUALITY, "RGB", "420"),
        "decode, shrink, encode (the floor)": lambda i: shrink_fast(data[i]),
        "our check_image: the same with all checks and the perceptual hash": lambda i: check_image(data[i], settings),
    }  # fmt: skip
    lines = ["| step, one thread | CPU ms per image |", "|---|---|"]
    for name, step in steps.items():
        times = []
        for _ in range(5):
            began = time.process_time()
            for i in range(len(data)):
                step(i)
            times.append((time.process_time() - began) / len(data) * 1000)
        lines.append(f"| {name} | {min(times):.2f} |")
    return lines


# ---------------------------------------------------------------- memory


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Most MB of the driver, and of one worker, while a command runs."""
    driver = worker = 0.0
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            driver = max(driver, root.memory_full_info().uss / 1e6)
            for child in root.children(recursive=True):
                if "ray::" in " ".join(child.cmdline()):
                    worker = max(worker, child.memory_full_info().uss / 1e6)
        except psutil.Error:
            pass
        time.sleep(0.1)
    return driver, worker


def compare_memory(scratch: Path) -> list[str]:
    base = make_tars(scratch / "small", 2, 150)
    lines = ["| input | rows | driver, MB | largest worker, MB |", "|---|---|---|---|"]
    for factor in (1, 4, 16):
        folder = scratch / f"times{factor}"
        folder.mkdir()
        for copy in range(factor):
            for tar in base.glob("*.tar"):
                (folder / f"{copy}-{tar.name}").hardlink_to(tar)
        settings = [f"input={folder}/*.tar", f"output={scratch}/out{factor}", f"image_size={SIDE}", "duplicates=keep"]
        cluster = ["num_cpus=2", "object_store_mb=100", "tracking_uri=none", "quiet=true"]
        job = HERE.parent / "jobs/prepare_data.py"
        driver, worker = peak_memory([sys.executable, str(job), "source=laion", *settings, *cluster])
        lines.append(f"| {factor} x | {factor * 300} | {driver:.0f} | {worker:.0f} |")
    return lines


# ---------------------------------------------------------------- readers


def rate(read, count: int, rounds: int = 3) -> float:
    """Rows per second, best of a few rounds."""
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        read(count)
        best = max(best, count / (time.perf_counter() - began))
    return best


def compare_readers(tars: Path, scratch: Path) -> list[str]:
    import datasets
    import webdataset as wds

    from pipelines.shards import ShardSet
    from tinygptv.images import open_image, resize_pixels

    datasets.disable_progress_bars()
    run_ours = [f"input={tars}/*.tar", f"output={scratch}/set", f"image_size={SIDE}", "duplicates=keep", "quiet=true"]
    job = [sys.executable, str(HERE.parent / "jobs/prepare_data.py"), "source=laion", *run_ours, "tracking_uri=none"]
    subprocess.run(job, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, check=True, stdout=subprocess.DEVNULL)
    shards = ShardSet.open(f"{scratch}/set")
    tar = scratch / "set.tar"
    with wds.TarWriter(str(tar)) as writer:
        for row in shards:
            writer.write({"__key__": row.id.replace("/", "-"), "jpg": row.image, "txt": row.turns[0].answers[0]})
    files = [f"{scratch}/set/{info.file}" for info in shards.manifest.shards]
    hugging = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(scratch / "hf"))
    order = np.random.default_rng(0).integers(0, len(shards), 20_000).tolist()

    def ours(count, use=lambda image: None):
        for k in order[:count]:
            use(shards.row(k).image)

    def theirs(count, use=lambda image: None):
        for k in order[:count]:
            use(hugging[k]["image"])

    def stream(count, use=lambda image: None):
        dataset = wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).shuffle(1000).repeat()
        for done, sample in enumerate(dataset):
            if done == count:
                return
            use(sample["jpg"])

    def pixels(image):
        resize_pixels(open_image(image), SIDE)

    lines = [
        "| reader, one process | raw rows/s | rows/s decoded to 224 x 224 | batches of 64 per second |",
        "|---|---|---|---|",
    ]
    ways = {
        "ours, random rows": ours,
        "datasets, random rows": theirs,
        "webdataset, in order through a shuffle buffer of 1,000": stream,
    }
    for name, read in ways.items():
        raw, decoded = rate(read, 2000), rate(lambda n, read=read: read(n, pixels), 300)
        lines.append(f"| {name} | {raw:.0f} | {decoded:.0f} | {decoded / 64:.1f} |")
    return lines


# ---------------------------------------------------------------- report


class LoadWatch(threading.Thread):
    """CPU use of processes that are not ours, so that a noisy run can be told from a quiet one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []

    def run(self) -> None:
        while True:
            self.samples.append(os.getloadavg()[0])
            time.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="times that every contender is started; the best counts")
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100, help="rows of a tar")
    parser.add_argument("--img2dataset-python", default="", help="Python of an environment with img2dataset")
    parser.add_argument("--only", default="ingest,floor,memory,readers")
    arguments = parser.parse_args()
    watch = LoadWatch()
    watch.start()
    parts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        scratch = Path(folder)
        tars = make_tars(scratch / "tars", arguments.tars, arguments.rows)
        wanted = arguments.only.split(",")
        if "floor" in wanted:
            parts["The floor"] = measure_floor(tars)
        if "ingest" in wanted:
            parts["Ingest"] = compare_ingest(tars, scratch, arguments.rounds, arguments.img2dataset_python)
        if "memory" in wanted:
            parts["Memory"] = compare_memory(scratch)
        if "readers" in wanted:
            parts["Readers"] = compare_readers(tars, scratch)
        size = sum(path.stat().st_size for path in tars.glob("*.tar"))
    rows = arguments.tars * arguments.rows
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("ray", "pyarrow", "simplejpeg", "pillow", "webdataset", "datasets")
    )
    head = [
        f"Command: `python benchmarks/ingest.py {' '.join(sys.argv[1:])}`".rstrip(),
        f"Machine: {psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB; {versions}.",
        f"Load average while it ran: median {statistics.median(watch.samples):.1f}, most {max(watch.samples):.1f}.",
        f"Input: {rows} JPEGs of 500 x 375 pixels, {size / rows / 1000:.0f} kB each, in {arguments.tars} tars.",
    ]
    text = "\n".join(
        [*(f"- {line}" for line in head), *(f"\n## {name}\n\n" + "\n".join(body) for name, body in parts.items())]
    )
    print(text)
    RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
