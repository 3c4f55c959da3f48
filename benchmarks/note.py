"""What every results file begins with: command, machine, versions, and how busy the machine was."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

RESULTS = Path(__file__).resolve().parent / "results"


class LoadWatch(threading.Thread):
    """Load average while a benchmark runs, so that a noisy run can be told from a quiet one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self.start()

    def run(self) -> None:
        while True:
            self.samples.append(os.getloadavg()[0])
            time.sleep(5)

    def __str__(self) -> str:
        return f"Load average while it ran: median {statistics.median(self.samples):.1f}, most {max(self.samples):.1f}."


def seconds_of(work: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory() -> int:
    """Most resident bytes of this process so far.

    ``resource.getrusage`` would not do: a child keeps the size that its parent had when it was started.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


def machine() -> str:
    """CPU model, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def versions(names: Sequence[str]) -> str:
    """Installed versions of packages."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def write_note(script: str, header: Sequence[str], parts: dict[str, list[str]]) -> Path:
    """Write ``results/<script>.md`` and print it.

    Args:
        script: name of the benchmark.
        header: one line each, for the head.
        parts: title -> lines of Markdown.
    """
    head = [
        f"Command: `python benchmarks/{script}.py {' '.join(sys.argv[1:])}".rstrip() + "`",
        f"Machine: {machine()}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
        *header,
    ]
    body = [f"\n## {title}\n\n" + "\n".join(lines) for title, lines in parts.items()]
    text = "\n".join([f"# {script}", "", *(f"- {line}" for line in head), *body]) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{script}.md"
    path.write_text(text)
    return path
