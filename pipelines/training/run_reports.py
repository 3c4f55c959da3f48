"""What a worker tells Ray Train, and what Ray Train tells it: saved states, their metrics, nodes that will be taken.

What a run resumes from is decided by our manifests alone (``states``). Ray is told of each saved state by a small
checkpoint that names its location, so that the dashboard, callbacks and ``Result`` show the run as it is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Protocol

STATE_REFERENCE = "state_reference.json"
"""The only file of a checkpoint that Ray is told of: ``{"location": .., "next_step": ..}``."""


class RunReports(Protocol):
    """Where states are reported; all workers call it at the same steps."""

    def saved(self, metrics: dict[str, float], location: str) -> None:
        """Report a saved state.

        Args:
            metrics: numbers of the run at the state.
            location: of the state; empty on all ranks but 0.
        """

    def must_save(self) -> bool:
        """Whether a machine of this run is about to be taken, so that its state must be saved now; once per notice."""


class NoReports:
    """A run without Ray Train."""

    def saved(self, metrics: dict[str, float], location: str) -> None:
        """Do nothing."""

    def must_save(self) -> bool:
        """Never."""
        return False


class RayTrainReports:
    """Reports to the Ray Train run of this worker."""

    def __init__(self) -> None:
        self._noticed: set[str] = set()

    def saved(self, metrics: dict[str, float], location: str) -> None:
        """Report a saved state; waits for the other workers."""
        import ray.train

        if not location:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="state-reference-") as folder:
            reference = {"location": location, "next_step": int(metrics["saved_step"])}
            Path(folder, STATE_REFERENCE).write_text(json.dumps(reference))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def must_save(self) -> bool:
        """Whether the cloud has announced to take a node; waits for the other workers."""
        import ray.train

        notice = ray.train.get_preemption_info()
        taken = set(notice.preempted_node_ids) if notice else set()
        is_new = bool(taken - self._noticed)
        self._noticed |= taken
        return is_new
