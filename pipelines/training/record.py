"""The per-step record of a training: ``metrics.jsonl``, one line per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines import storage

RECORD_FILE = "metrics.jsonl"

Record = dict[str, Any]


def read_record(path: Path) -> list[Record]:
    """The steps of a ``metrics.jsonl``, in order; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class StepRecord:
    """``metrics.jsonl``: one line per step, flushed with every training state."""

    def __init__(self, path: Path, next_step: int) -> None:
        """Open the record; lines of steps that will be done again are dropped.

        Args:
            path: the file.
            next_step: first step that will be written.
        """
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # half a line from a kill
                if entry["step"] < next_step:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(str(path), "".join(f"{line}\n" for line in kept).encode())
        self.first_loss = json.loads(kept[0])["loss"] if kept else None
        self.last_loss = json.loads(kept[-1])["loss"] if kept else None
        self._stream = path.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        """Append a step."""
        if self.first_loss is None:
            self.first_loss = entry["loss"]
        self.last_loss = entry["loss"]
        self._stream.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Hand lines to the operating system."""
        self._stream.flush()

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
