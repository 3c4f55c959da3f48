"""Experiment tracking behind one small protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines import storage
from pipelines.redact import redact
from pipelines.settings.base import is_in_job_folder
from pipelines.storage import is_local
from pipelines.tracking.described import DataInput
from pipelines.tracking.identity import RunIdentity, read_identity, write_identity
from pipelines.tracking.mlflow import MLflowTracker

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Interface through which a job reports a run."""

    run_id: str

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, flattened with dots."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def describe(self, text: str) -> None:
        """Set the description (Markdown), which stands at the top of the run's page."""

    def inputs(self, data: Sequence[DataInput]) -> None:
        """Log which data sets the run reads."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder."""

    def image(self, image: Image, key: str, step: int) -> None:
        """Log an image under a key, at a step."""

    def table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Log a table (JSON); PIL images are allowed as cells."""

    def model(self, name: str, location: str) -> None:
        """Log a checkpoint as a model that this run made; its files stay where they are."""

    def keep(self) -> None:
        """Have on disk what waits to be sent."""

    def close(self, status: str = "FINISHED") -> None:
        """Send what waits and end the run."""


class NullTracker:
    """Tracking switched off: every method does nothing."""

    run_id = ""

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def describe(self, text: str) -> None:
        """Do nothing."""

    def inputs(self, data: Sequence[DataInput]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def image(self, image: Image, key: str, step: int) -> None:
        """Do nothing."""

    def table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Do nothing."""

    def model(self, name: str, location: str) -> None:
        """Do nothing."""

    def keep(self) -> None:
        """Do nothing."""

    def close(self, status: str = "FINISHED") -> None:
        """Do nothing."""


_SERVED = ("http://", "https://", "databricks", "postgresql", "mysql", "mssql")
"""Beginnings of URIs that every machine reaches: MLflow's servers, and the databases that it stores runs in."""


def default_uri(root: Path) -> str:
    """SQLite file beside the results."""
    return f"sqlite:///{root / 'mlflow.db'}"


def absolute_uri(uri: str) -> str:
    """The URI as processes in other working directories need it; empty is the default, ``none`` stays."""
    if not uri:
        return default_uri(Path.cwd())
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path.cwd() / path}"


def reachable_uri(uri: str, output: str) -> str:
    """The tracking URI for a job that may run on several machines.

    Args:
        uri: as the settings give it.
        output: folder or URI of the results; a URI says that the machines share no disk.

    Returns:
        The absolute URI; ``none``, with a warning, where MLflow's files would lie on one machine's disk alone.
    """
    if is_local(output) or uri == "none" or uri.startswith(_SERVED):
        return absolute_uri(uri)
    logger.warning(
        "this run is not tracked: tracking_uri=%s would be files of one machine, and output=%s says that there are "
        "several; give the URI of an MLflow server, e.g. tracking_uri=http://HOST:5000.",
        redact(uri) or "''",
        redact(output),
    )
    return "none"


def open_tracker(
    settings: Settings,
    run_name: str,
    *,
    identity: RunIdentity | None = None,
    parent_run_id: str = "",
    journal: Path | None = None,
    started: float | None = None,
) -> Tracker:
    """The tracker that the settings ask for.

    Args:
        settings: ``tracking_uri`` (``none`` switches tracking off, empty is SQLite in the working directory) and
            ``experiment``.
        run_name: name of a new run.
        identity: continue this run, or begin it; None begins one.
        parent_run_id: nest a new run under this one, where ``identity`` names no parent.
        journal: folder that keeps what could not be sent.
        started: when the work of a new run began, in seconds since the epoch; None is now.

    Returns:
        An MLflow tracker, or a null one where tracking is off; with a warning where MLflow is not installed, or its
        database would go with the folder of a submitted job.
    """
    if settings.tracking_uri == "none":
        return NullTracker()
    uri = absolute_uri(settings.tracking_uri)
    if is_in_job_folder(Path(uri.removeprefix("sqlite:///"))):
        _warn_of_job_folder(uri)
        return NullTracker()
    experiment = settings.experiment or f"tinygptv-{settings.recipe}"
    try:
        known = identity or RunIdentity(parent=parent_run_id)
        return MLflowTracker(uri, experiment, run_name, known, journal=journal, started=started)
    except ImportError as error:
        logger.warning("this run is not tracked: %s", error)
        return NullTracker()


@cache  # a job opens several trackers
def _warn_of_job_folder(uri: str) -> None:
    logger.warning(
        "this run is not tracked: %s would lie in the folder of a submitted job, which Ray removes after it; give "
        "tracking_uri=http://HOST:5000, or a file that stays: tracking_uri=sqlite:////data/mlflow.db.",
        uri,
    )


def continue_tracker(
    settings: Settings, run_name: str, folder: Path, *, parent_run_id: str = "", started: float | None = None
) -> Tracker:
    """Continue the run that an output folder began, or begin it and keep its identity there.

    Args:
        settings: as for ``open_tracker``.
        run_name: name of a new run.
        folder: the output folder; made where it is missing.
        parent_run_id: nest a new run under this one.
        started: when the work of a new run began, in seconds since the epoch; None is now.

    Returns:
        A tracker that keeps in the folder what it cannot send.
    """
    if settings.tracking_uri == "none":
        return NullTracker()
    identity = read_identity(folder) or RunIdentity(parent=parent_run_id)
    tracker = open_tracker(settings, run_name, identity=identity, journal=folder, started=started)
    storage.make_folder(str(folder))
    write_identity(folder, replace(identity, run_id=tracker.run_id))
    return tracker
