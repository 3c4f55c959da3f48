"""Ingest, side by side with what one would pick instead. Writes benchmarks/results/ingest.md.

    python benchmarks/ingest.py                                   # about five minutes on two quiet cores
    python benchmarks/ingest.py --img2dataset-python PYTHON       # also img2dataset, from an environment of its own

webdataset is not among this project's requirements; a contender that is not installed is left out of the table:

    pip install --target extra --no-deps webdataset braceexpand && PYTHONPATH=extra python benchmarks/ingest.py
    python -m venv other && other/bin/pip install img2dataset psutil      # wants old versions of libraries used here
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
from ingest_contenders import CONTENDERS, NEEDS, QUALITY, SIDE, one_tar, shrink_fast
from note import LoadWatch, versions, write_note
from photo_tars import SIZE, make_tars, megabytes

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")])),
    "PYTHONWARNINGS": "ignore",
}
ALONE = "ours, 1 CPU"


# ---------------------------------------------------------------- rates


def run_contender(name: str, tars: Path, output: Path, workers: int, python: str) -> dict:
    command = [python, str(HERE / "ingest_contenders.py"), name, str(tars), str(output), str(workers)]
    environment = ENVIRONMENT if python == sys.executable else {**ENVIRONMENT, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def choose_contenders(img2dataset_python: str) -> tuple[list[str], list[str]]:
    """Contenders that can run here, and those that cannot."""
    names, missing = [], []
    for name in CONTENDERS:
        package = NEEDS.get(name)
        here = package is None or importlib.util.find_spec(package) or (package == "img2dataset" and img2dataset_python)
        (names if here else missing).append(name)
    return names, missing


def compare(tars: Path, scratch: Path, rounds: int, img2dataset_python: str) -> list[str]:
    """All contenders in turn, several times; a ratio is taken within a round, so that other work on the machine counts
    for both sides."""
    names, missing = choose_contenders(img2dataset_python)
    runs: dict[str, list[dict]] = {name: [] for name in [*names, ALONE]}
    for _ in range(rounds):
        for name, done in runs.items():
            python = img2dataset_python if NEEDS.get(name) == "img2dataset" and img2dataset_python else sys.executable
            key, workers = ("ours", 1) if name == ALONE else (name, 2)
            done.append(run_contender(key, tars, scratch / "out", workers, python))
            print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
    size = megabytes(tars)
    lines = [
        "| way | rows/s | MB/s per core | ours is faster by | rows per CPU second | first pass, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, done in runs.items():
        best = min(done, key=lambda run: run["wall"])
        cores = 1 if "loop" in name or name == ALONE else 2
        ratios = [run["wall"] / ours["wall"] for run, ours in zip(done, runs["ours"], strict=True)]
        cpu = statistics.median(run["rows"] / run["cpu"] for run in done)
        lines.append(
            f"| {name} | {best['rows'] / best['wall']:.0f} | {size / best['wall'] / cores:.1f} | "
            f"{statistics.median(ratios):.2f} x | {cpu:.0f} | {best['first_wall']:.1f} |"
        )
    lines += ["", f"Rates are of the best pass, ratios the median over {rounds} round(s). MB are those of the input."]
    return lines + ([f"Not installed, hence not measured: {', '.join(missing)}."] if missing else [])


# ---------------------------------------------------------------- the floor


def measure_floor(tars: Path) -> list[str]:
    """Decode, shrink and encode in one thread: what no arrangement of processes can beat."""
    import cv2
    import simplejpeg

    from pipelines.data.ingest.check_images import check_image
    from pipelines.data.ingest.staging import stage_unit
    from pipelines.data.sources import locate
    from pipelines.settings import PrepareDataSettings

    cv2.setNumThreads(1)
    first = min(tars.glob("*.tar"))
    with tarfile.open(first) as tar:
        data = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    settings = PrepareDataSettings(source="laion", input=str(first), image_size=SIDE, jpeg_quality=QUALITY)
    source, location = locate(settings)
    unit = next(source.reader.plan(location))
    size = (round(SIZE[0] * SIDE / SIZE[1]), SIDE)
    pixels = [cv2.resize(simplejpeg.decode_jpeg(d, "RGB"), size, interpolation=cv2.INTER_AREA) for d in data]

    def whole_unit(folder: str) -> None:
        stage_unit(unit, 0, settings, folder)
        shutil.rmtree(folder)
        Path(folder).mkdir()

    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "decode at the smallest sufficient scale": lambda: [
                simplejpeg.decode_jpeg(d, "RGB", min_width=size[0], min_height=size[1]) for d in data
            ],
            f"encode, quality {QUALITY}": lambda: [
                simplejpeg.encode_jpeg(p, QUALITY, "RGB", "420") for p in pixels
            ],
            "decode, shrink, encode: the floor": lambda: [shrink_fast(d) for d in data],
            "our check_image: the same with all checks and the perceptual hash": lambda: [
                check_image(d, settings) for d in data
            ],
            "a plain loop over the tar, the same decoder, no checks": lambda: one_tar((first, Path(folder), "fast")),
            "a plain loop over the tar, PIL": lambda: one_tar((first, Path(folder), "pil")),
            "our whole unit: tar, text, all checks, hashes, Arrow file": lambda: whole_unit(folder),
        }  # fmt: skip
        costs: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(7):
            for name, step in steps.items():
                began = time.process_time()
                step()
                costs[name].append((time.process_time() - began) / len(data) * 1000)
    lines = ["| step, one thread | CPU ms per image |", "|---|---|"]
    lines += [f"| {name} | {min(times):.2f} |" for name, times in costs.items()]
    ours, same, pil = (costs[name] for name in (list(steps)[-1], list(steps)[-3], list(steps)[-2]))
    against = [statistics.median(a / b for a, b in zip(other, ours, strict=True)) for other in (same, pil)]
    return [
        *lines,
        "",
        f"Our whole unit against the plain loops, medians of the rounds' ratios: {against[0]:.2f} x the speed of "
        f"the same decoder without checks, {against[1]:.2f} x that of PIL.",
    ]


# ---------------------------------------------------------------- memory


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Most MB of the driver, and of one worker, while a command runs."""
    driver = worker = 0.0
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
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
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return driver, worker


def compare_memory(scratch: Path) -> list[str]:
    base = make_tars(scratch / "small", 2, 150)
    lines = ["| input | tars | rows | driver, MB | largest worker, MB |", "|---|---|---|---|---|"]
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
        lines.append(f"| {factor} x | {factor * 2} | {factor * 300} | {driver:.0f} | {worker:.0f} |")
    return [*lines, "", "Memory of its own (USS), shared libraries not counted."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that every contender is started")
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100, help="rows of a tar")
    parser.add_argument("--img2dataset-python", default="", help="Python of an environment with img2dataset")
    parser.add_argument("--only", default="floor,rates,memory")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    load = LoadWatch()
    parts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        scratch = Path(folder)
        tars = make_tars(scratch / "tars", arguments.tars, arguments.rows)
        size = megabytes(tars)
        if "floor" in wanted:
            parts["The floor"] = measure_floor(tars)
        if "rates" in wanted:
            parts["Rates"] = compare(tars, scratch, arguments.rounds, arguments.img2dataset_python)
        if "memory" in wanted:
            parts["Memory"] = compare_memory(scratch)
    rows = arguments.tars * arguments.rows
    header = [
        versions(["ray", "pyarrow", "simplejpeg", "opencv-python-headless", "pillow", "webdataset", "datasets"]),
        str(load),
        f"Input: {arguments.tars} tars of {arguments.rows} JPEGs, {SIZE[0]} x {SIZE[1]} pixels, "
        f"{size / rows * 1000:.0f} kB each.",
    ]
    write_note("ingest", header, parts)


if __name__ == "__main__":
    main()
