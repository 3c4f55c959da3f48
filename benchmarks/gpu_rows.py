"""What the GPU benchmarks share: rows with a floor beside what was measured, a clock, a hard memory cap.

Each row is printed as a line of JSON as soon as it is known, so that what was measured is not lost where a run is cut.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch

from tinygptv.training.memory_plan import CUDA_CONTEXT_BYTES

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        section: ``train``, ``memory``, ...
        what: what was measured.
        value: the number; None where it could not be measured.
        unit: its unit.
        floor: least value wanted; None for a number without one.
        note: how it was measured, or why not.
        ceiling: greatest value wanted.
    """

    section: str
    what: str
    value: float | None
    unit: str
    floor: float | None = None
    note: str = ""
    ceiling: float | None = None

    @property
    def wanted(self) -> str:
        """What is wanted: ``4``, or ``0 to 10``."""
        if self.floor is None:
            return "" if self.ceiling is None else f"at most {self.ceiling:g}"
        return f"{self.floor:g}" if self.ceiling is None else f"{self.floor:g} to {self.ceiling:g}"

    @property
    def verdict(self) -> str:
        """``yes`` or ``NO`` where something is wanted; what could not be measured was not reached."""
        if not self.wanted:
            return ""
        low = -math.inf if self.floor is None else self.floor
        high = math.inf if self.ceiling is None else self.ceiling
        return "yes" if self.value is not None and low <= self.value <= high else "NO"


class Rows(list[Row]):
    """Rows of one section, printed as they come."""

    def __init__(self, section: str) -> None:
        super().__init__()
        self.section = section

    def put(
        self,
        what: str,
        value: float | None,
        unit: str,
        *,
        floor: float | None = None,
        ceiling: float | None = None,
        note: str = "",
    ) -> None:
        """Add a row and print it."""
        rounded = None if value is None else float(f"{value:.4g}")
        row = Row(self.section, what, rounded, unit, floor, note, ceiling)
        self.append(row)
        print(json.dumps({**asdict(row), "reached": row.verdict}), flush=True)

    def value(self, what: str) -> float | None:
        """The number of a row; None where it was not measured."""
        return next((row.value for row in self if row.what == what), None)


class Clock:
    """Time limit of a section: asks before each case whether there is time for it."""

    def __init__(self, rows: Rows, limit_s: float) -> None:
        self.rows, self.ends = rows, time.perf_counter() + limit_s

    def allows(self, what: str, needs_s: float) -> bool:
        """Whether so many seconds are left; where not, a row says what was left out."""
        left = self.ends - time.perf_counter()
        if left >= needs_s:
            return True
        self.rows.put(what, None, "", note=f"left out: {left:.0f} s left, about {needs_s:.0f} s needed")
        return False


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| section | what | measured | wanted | reached | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:,.4g} {row.unit}"
        lines.append(f"| {row.section} | {row.what} | {value} | {row.wanted} | {row.verdict} | {row.note} |")
    return "\n".join(lines)


def sentence(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:160]}"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Peak:
    """Most bytes of torch's allocator inside a ``memory_cap``, in use and taken from the device."""

    allocated: int = 0
    reserved: int = 0


@contextmanager
def memory_cap(device: torch.device, cap_bytes: int) -> Iterator[Peak]:
    """A card of so many bytes: the rest of the device's memory is occupied while the block runs.

    ``torch.cuda.set_per_process_memory_fraction`` would not do, as it does not count what expandable segments map.
    What CUDA takes beside torch is assumed (``memory_plan.CUDA_CONTEXT_BYTES``), as in the memory plan, and the card
    says that it has so many bytes. On a CPU nothing is capped and the peak stays 0.
    """
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.synchronize()
    gc.collect()  # what an earlier case left behind would count as free memory that cannot be taken
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream that there was, of 32 MiB on an H100
    torch.cuda.empty_cache()
    ask = torch.cuda.mem_get_info
    free = ask()[0]
    left = cap_bytes - CUDA_CONTEXT_BYTES - torch.cuda.memory_reserved()
    occupied = max(0, free - left)
    ballast = torch.empty(occupied, dtype=torch.uint8, device=device)
    torch.cuda.reset_peak_memory_stats()
    try:
        with mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (ask(device)[0], cap_bytes)):
            yield peak
    finally:
        torch.cuda.synchronize()
        peak.allocated = torch.cuda.max_memory_allocated() - ballast.nbytes
        peak.reserved = torch.cuda.max_memory_reserved() - ballast.nbytes
        del ballast
        torch.cuda.empty_cache()
