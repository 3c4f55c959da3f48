"""Experiment tracking behind one small protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.tracking.mlflow import MLflowTracker

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a job tells the outside world about a run."""

    run_id: str

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, flattened with dots."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder."""

    def image(self, image: Image, key: str, step: int) -> None:
        """Log a picture under a key, at a step."""

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Log a table (JSON); PIL images are allowed as cells."""

    def model(self, name: str, place: str) -> None:
        """Log a checkpoint as a model that this run made; its files stay where they are."""

    def close(self, status: str = "FINISHED") -> None:
        """Send what waits and end the run."""


class NullTracker:
    """Takes everything, keeps nothing."""

    run_id = ""

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def image(self, image: Image, key: str, step: int) -> None:
        """Do nothing."""

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Do nothing."""

    def model(self, name: str, place: str) -> None:
        """Do nothing."""

    def close(self, status: str = "FINISHED") -> None:
        """Do nothing."""


def default_uri(root: Path) -> str:
    """SQLite file beside the results."""
    return f"sqlite:///{root / 'mlflow.db'}"


def absolute_uri(uri: str) -> str:
    """The same place for processes in other working directories; empty is the default, ``none`` stays."""
    if not uri:
        return default_uri(Path.cwd())
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri or path.startswith("/") else f"sqlite:///{Path.cwd() / path}"


def open_tracker(
    settings: Settings,
    run_name: str,
    *,
    run_id: str = "",
    key: str = "",
    parent_run_id: str = "",
    journal: Path | None = None,
) -> Tracker:
    """The tracker that the settings ask for.

    Args:
        settings: ``tracking_uri`` (``none`` switches tracking off, empty is SQLite in the working directory) and
            ``experiment``.
        run_name: name of the run.
        run_id: continue this run.
        key: continue the run that was begun under this key, or begin it.
        parent_run_id: nest under this run.
        journal: folder that keeps what could not be sent.

    Returns:
        An MLflow tracker, or a null one where tracking is off or MLflow is not installed (with a warning).
    """
    if settings.tracking_uri == "none":
        return NullTracker()
    uri = settings.tracking_uri or default_uri(Path.cwd())
    experiment = settings.experiment or f"tinygptv-{settings.recipe}"
    try:
        return MLflowTracker(
            uri, experiment, run_name, run_id=run_id, key=key, parent_run_id=parent_run_id, journal=journal
        )
    except ImportError as error:
        logger.warning("this run is not tracked: %s", error)
        return NullTracker()
