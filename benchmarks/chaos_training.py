"""Kill a training again and again; every loss and the final weights must be those of a run that nobody touched.

    python benchmarks/chaos_training.py --kills 20
    python benchmarks/chaos_training.py --kills 4 --modes "1 worker" cached

Each mode trains the same small stage twice: once in peace, once while this script sends SIGKILL at random moments to a
training worker, to the driver, or to the driver with its whole cluster. A killed driver is started again by the same
command. Afterwards the losses of every step (as hexadecimal floats) and the weights are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.cluster import ENVIRONMENT
from pipelines.data.features import cache_features
from pipelines.miniature.tiny_training import as_words, make_world, train_settings
from pipelines.settings import ROOT, CacheFeaturesSettings

MODES = {
    "1 worker": {"num_workers": 1},
    "2 workers": {"num_workers": 2},
    "cached": {"num_workers": 1, "features": "cached"},
    "packing": {"num_workers": 1, "packing": True},
}
TARGETS = ("worker", "driver", "cluster")
STEPS_PER_EPOCH = 40
EPOCHS = 3
GIVE_UP_S = 1500


@dataclass
class Tally:
    """What was done to one training."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TARGETS, 0))
    at_steps: list[int] = field(default_factory=list)
    starts: int = 0


def command(world: dict[str, str], output: Path, mode: str) -> list[str]:
    schedule = {"steps_per_epoch": STEPS_PER_EPOCH, "epochs": EPOCHS, "peak": 1e-2, "minimum": 1e-3}
    settings = train_settings(
        world,
        output,
        stage={"schedule": {**schedule, "warmup_start": 1e-3}},
        checkpoint_every=5,
        log_every=1,
        max_failures=-1,
        num_cpus=4,
        object_store_mb=150,
        **MODES[mode],
    )
    return [sys.executable, str(ROOT / "jobs/stage4.py"), *as_words(settings)]


def start(words: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True)


def steps_done(output: Path) -> int:
    """Steps that the progress line tells of; 0 before the first."""
    try:
        match = re.search(r"step (\d+)/", (output / "progress.txt").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0


def processes_of(driver: int) -> list[psutil.Process]:
    """Every process of the driver's own cluster."""
    try:
        return psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_training_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def strike(target: str, driver: subprocess.Popen, chance: random.Random) -> bool:
    """SIGKILL something; False where it is not there at this moment."""
    family = processes_of(driver.pid)
    if target == "worker":
        workers = [process for process in family if is_training_worker(process)]
        if not workers:
            return False
        chance.choice(workers).send_signal(signal.SIGKILL)
        return True
    driver.kill()
    driver.wait()
    if target == "cluster":  # else what the driver leaves behind ends by itself, while the next one starts
        for process in family:
            if process.is_running():
                process.kill()
    return True


def peace(words: list[str], output: Path) -> float:
    began = time.monotonic()
    process = start(words, output.with_suffix(".log"))
    if process.wait(GIVE_UP_S):
        raise RuntimeError(f"the undisturbed run failed: {output.with_suffix('.log').read_text()[-2000:]}")
    return time.monotonic() - began


def chaos(words: list[str], output: Path, kills: int, chance: random.Random) -> Tally:
    """Train to the end through ``kills`` kills, spread over the steps."""
    tally = Tally()
    total = STEPS_PER_EPOCH * EPOCHS
    moments = sorted(chance.randrange(2, total - 2) for _ in range(kills))
    targets = [TARGETS[i % len(TARGETS)] for i in range(kills)]
    chance.shuffle(targets)
    waiting = list(zip(moments, targets, strict=True))
    log = output.with_suffix(".log")
    process, tally.starts = start(words, log), 1
    began = time.monotonic()
    while not (output / "result.json").is_file():
        if time.monotonic() - began > GIVE_UP_S:
            raise RuntimeError(f"no end after {GIVE_UP_S} s: {log.read_text()[-2000:]}")
        if waiting and steps_done(output) >= waiting[0][0] and strike(waiting[0][1], process, chance):
            tally.at_steps.append(steps_done(output))
            tally.kills[waiting.pop(0)[1]] += 1
            if waiting:  # whatever is due by now comes after some more steps
                waiting[0] = (max(waiting[0][0], tally.at_steps[-1] + 1), waiting[0][1])
        if process.poll() is not None and not (output / "result.json").is_file():
            process = start(words, log)
            tally.starts += 1
        time.sleep(0.02)
    process.wait(120)
    return tally


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs; nothing where they are the same to the last bit."""
    found = []
    records = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (one, two)]
    for a, b in zip(*records, strict=False):
        for key in ("step", "loss_hex", "lr", "sample_ids"):
            if a[key] != b[key]:
                found.append(f"step {a['step']}: {key}")
    if len(records[0]) != len(records[1]):
        found.append(f"{len(records[0])} and {len(records[1])} steps")
    weights = [(p / "checkpoint/model.safetensors").read_bytes() for p in (one, two)]
    if weights[0] != weights[1]:
        found.append("weights")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each mode")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    world = make_world(folder / "world")
    cache = {"data": world["data"], "checkpoint": world["init_from"], "output": str(folder / "features")}
    cache_features(CacheFeaturesSettings(num_workers=0, quiet=True, **cache))
    failed = False
    print("| mode | kills (worker, driver, cluster) | at steps | starts | differences | s in peace | s in chaos |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for mode in arguments.modes:
        calm, wild = (folder / f"{mode.replace(' ', '-')}-{kind}" for kind in ("peace", "chaos"))
        seconds = peace(command(world, calm, mode), calm)
        began = time.monotonic()
        tally = chaos(command(world, wild, mode), wild, arguments.kills, chance)
        found = differences(calm, wild)
        failed |= bool(found)
        counts = ", ".join(str(tally.kills[target]) for target in TARGETS)
        print(
            f"| {mode} | {sum(tally.kills.values())} ({counts}) | {' '.join(map(str, tally.at_steps))} "
            f"| {tally.starts} | "
            f"{', '.join(found[:3]) or 'none'} | {seconds:.0f} | {time.monotonic() - began:.0f} |",
            flush=True,
        )
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
