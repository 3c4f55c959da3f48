"""What a run says of itself in the tracker's columns: its name, its data, where its code is from, its hardware."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from pipelines.settings import ROOT


@dataclass(frozen=True)
class DataInput:
    """A data set that a run reads.

    Attributes:
        name: of the data set.
        digest: of its content.
        source: its path or URI.
        rows: how many are read.
        context: what for.
    """

    name: str
    digest: str
    source: str
    rows: int
    context: Literal["training", "evaluation"]


def run_title(recipe: str, what: str, started: float | None = None) -> str:
    """Name of a new run: recipe, what it does, and the time of its start (seconds since the epoch; None is now)."""
    return f"{recipe} {what}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(started))}"


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; a column for every key, numbers with four digits, empty cells for None.

    MLflow's page draws cells without any space between them, so each column but the last ends with some.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    head, *body = (f"| {'&emsp; | '.join(row)} |" for row in cells)
    return "\n".join([head, f"| {' | '.join(['---'] * len(columns))} |", *body])


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def source_tags() -> dict[str, str]:
    """MLflow's own tags for the columns source, version and user."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def hardware_tags(num_workers: int) -> dict[str, str]:
    """What a training worker computes on."""
    import torch

    tags = {
        "hardware.workers": str(num_workers),
        "hardware.cpus": str(os.cpu_count()),
        "hardware.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "hardware.torch": str(torch.__version__),
    }
    if torch.cuda.is_initialized():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        tags |= {"hardware.gpu": properties.name, "hardware.gpu_memory_gb": f"{properties.total_memory / 1e9:.0f}"}
    return tags


@cache
def _git_commit() -> str:
    """Commit of the project's folder; empty where it is no clone."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
