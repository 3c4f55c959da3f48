"""The per-step record of a training: ``metrics.jsonl``, one JSON object per optimizer step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from pipelines import storage
from pipelines.json_files import to_json
from pipelines.tracking.outbox import JOURNAL_FILE

RECORD_FILE = "metrics.jsonl"
GUARD_FILE = "guard.jsonl"
"""Faults that the guard found: one line each."""

HELD_OUT_FILE = "held_out.jsonl"
"""Losses of held-out rows: one line per evaluation (``held_out_record``)."""

PREDICTIONS_FOLDER = "predictions"
WORKER_FILES = (RECORD_FILE, GUARD_FILE, HELD_OUT_FILE, PREDICTIONS_FOLDER, JOURNAL_FILE)
"""Files that rank 0 writes while it trains, beside states and checkpoint; published with every training state."""


class StepEntry(TypedDict):
    """One line. Numbers that are not finite are ``null`` in the file and NaN here.

    Attributes:
        step: 0-based optimizer step.
        loss: mean token loss of the step over all workers, in nats.
        loss_hex: the same to the last bit (``float.hex``).
        lr: learning rate.
        grad_norm: norm of the whole gradient before clipping.
        skipped: the update was left out.
        part_norms: gradient norm of each trainable part, at the steps where they are read.
        sample_ids: ``source/id`` of every sample of the step.
    """

    step: int
    loss: float
    loss_hex: str
    lr: float
    grad_norm: float
    skipped: bool
    part_norms: NotRequired[dict[str, float]]
    sample_ids: list[str]


def read_record(location: str | Path) -> list[StepEntry]:
    """The steps of a ``metrics.jsonl``, local or remote, in order, up to half a line from a kill; empty where there is
    none."""
    try:
        text = storage.read_bytes(str(location)).decode(errors="replace")
    except FileNotFoundError:
        return []
    return [entry for _, entry in _whole_lines(text)]


def _whole_lines(text: str) -> Iterator[tuple[str, StepEntry]]:
    for line in text.splitlines():
        try:
            yield line, parse_entry(line)
        except ValueError:
            return  # half a line from a kill


def parse_entry(line: str) -> StepEntry:
    """One line of the record.

    Raises:
        ValueError: it is no whole JSON object, e.g. half a line from a kill.
    """
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError(f"{line[:40]!r} is no JSON object.")
    for name in ("loss", "grad_norm"):
        entry[name] = number(entry.get(name))
    if "part_norms" in entry:
        entry["part_norms"] = {part: number(norm) for part, norm in entry["part_norms"].items()}
    return entry  # type: ignore[return-value]  # a file's content


def number(value: float | str | None) -> float:
    """A number of the file; earlier versions wrote infinite gradient norms as text."""
    return math.nan if value is None else float(value)


class StepRecord:
    """Writes ``metrics.jsonl``; flushed with every training state."""

    def __init__(self, path: Path, next_step: int) -> None:
        """Open the record; lines of steps that will be done again are dropped.

        Args:
            path: the file.
            next_step: first step that will be written.
        """
        self.path = path
        kept = list(self._kept_lines(next_step))
        storage.make_folder(str(path.parent))
        storage.write_atomically(str(path), "".join(f"{line}\n" for line in kept).encode())
        self.first_loss = parse_entry(kept[0])["loss"] if kept else math.nan
        self.last_loss = parse_entry(kept[-1])["loss"] if kept else math.nan
        self._is_empty = not kept
        self._stream = path.open("a")

    def _kept_lines(self, next_step: int) -> Iterator[str]:
        if not self.path.exists():
            return
        for line, entry in _whole_lines(self.path.read_text(errors="replace")):
            if entry["step"] < next_step:
                yield line

    def write(self, entry: StepEntry) -> None:
        """Append a step."""
        if self._is_empty:
            self.first_loss, self._is_empty = entry["loss"], False
        self.last_loss = entry["loss"]
        with storage.disk_full_as_error(str(self.path)):
            self._stream.write(to_json(entry) + "\n")

    def flush(self) -> None:
        """Hand lines to the operating system."""
        with storage.disk_full_as_error(str(self.path)):
            self._stream.flush()

    def close(self) -> None:
        """Flush and close."""
        with storage.disk_full_as_error(str(self.path)):
            self._stream.close()
