"""Stand-ins of an ablation's tests: the record of a stage, and a tracker that notes what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.tracking.base import NullTracker


def write_record(folder: Path, losses: Sequence[float], norm: float = 1.0, norms: Sequence[float] = ()) -> None:
    """Steps of a stage, numbered from 0; ``norms`` gives the projector's at each step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": n, "loss": loss, "grad_norm": 2.0, "lr": 0.1, "part_norms": {"projector": norms[n] if norms else norm}}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Recording(NullTracker):
    """Notes what it is told."""

    run_id: str = "parent"
    told: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    status: str = ""

    def params(self, values: dict[str, Any]) -> None:
        self.told |= values

    def tags(self, values: dict[str, str]) -> None:
        self.told["tags"] = values

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))

    def artifact(self, path: Path, folder: str = "") -> None:
        assert path.is_file(), f"{path} is sent before it is written"
        self.files.append(path.name)

    def table(self, rows: Any, name: str) -> None:
        self.told[name] = rows

    def close(self, status: str = "FINISHED") -> None:
        self.status = status

    def begin(self, settings: Any, title: str, folder: Path) -> Recording:
        """Stands for ``continue_tracker``."""
        self.begun = (settings, title, folder)
        return self

    @contextmanager
    def cluster(self, settings: Any) -> Iterator[None]:
        """Stands for ``start_ray``."""
        self.told["cluster"] = "up"
        yield
        self.told["cluster"] = "down"
