"""Experiment tracking behind one small protocol. MLflow is imported in this file alone.

Tracking never stops training: entries wait in a queue, a background thread sends them in batches, and what cannot be
sent is kept and tried again; at the end, what is still unsent is written beside the results.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.settings import Settings

logger = logging.getLogger(__name__)

_PARAM_LIMIT = 6000
_BATCH_LIMIT = 900


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

    def close(self, status: str = "FINISHED") -> None:
        """Do nothing."""


class MLflowTracker:
    """Sends a run to MLflow from a background thread."""

    def __init__(self, uri: str, experiment: str, run_name: str, *, run_id: str = "", parent_run_id: str = "") -> None:
        """Start or continue a run.

        Args:
            uri: tracking URI.
            experiment: experiment name; made where it is missing.
            run_name: name that people see.
            run_id: continue this run; empty starts one.
            parent_run_id: nest under this run.
        """
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._queue: list[Callable[[], Any]] = []
        self._metrics: list[tuple[str, float, int, int]] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self.run_id = run_id or self._start(experiment, run_name, parent_run_id)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
        self._thread = threading.Thread(target=self._send_loop, name="mlflow-sender", daemon=True)
        self._thread.start()

    def _start(self, experiment: str, run_name: str, parent_run_id: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        tags = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        return self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings once; a resumed run keeps those it has."""
        from mlflow.entities import Param

        flat = [Param(key[:250], str(value)[:_PARAM_LIMIT]) for key, value in flatten(values).items()]

        def send() -> None:
            for start in range(0, len(flat), 100):
                self._client.log_batch(self.run_id, params=flat[start : start + 100])

        self._put(send)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue numbers; not-a-number values are sent too, they are news."""
        now = int(time.time() * 1000)
        with self._lock:
            self._metrics += [(key, float(value), now, step) for key, value in values.items()]
        self._wake.set()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        for key, value in values.items():
            self._put(lambda key=key, value=value: self._client.set_tag(self.run_id, key, value))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or a folder."""
        send: Callable[..., Any] = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._put(lambda: send(self.run_id, str(path), folder or None))

    def image(self, image: Image, key: str, step: int) -> None:
        """Log a picture."""
        self._put(lambda: self._client.log_image(self.run_id, image, key=key, step=step))

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Log a table; images become MLflow images."""
        import mlflow

        columns = {key: [_cell(row.get(key), mlflow.Image) for row in rows] for key in rows[0]} if rows else {}
        self._put(lambda: self._client.log_table(self.run_id, columns, f"{name}.json"))

    def close(self, status: str = "FINISHED") -> None:
        """Send what waits (for up to a minute) and end the run."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=60)
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:  # tracking never stops the job
            logger.warning("MLflow run %s could not be ended: %s", self.run_id, error)

    def _put(self, send: Callable[[], Any]) -> None:
        with self._lock:
            self._queue.append(send)
        self._wake.set()

    def _send_loop(self) -> None:
        pause = 1.0
        while True:
            self._wake.wait(timeout=pause)
            self._wake.clear()
            sent = self._send_metrics() and self._send_queue()
            empty = not self._queue and not self._metrics
            if self._closing and (empty or not sent):
                return
            pause = 1.0 if sent else min(pause * 2, 60.0)
            if not self._closing:
                time.sleep(0.5)  # batch

    def _send_metrics(self) -> bool:
        from mlflow.entities import Metric

        while True:
            with self._lock:
                batch = self._metrics[:_BATCH_LIMIT]
            if not batch:
                return True
            entities = [Metric(key, value, at, step) for key, value, at, step in batch]
            if not self._try(lambda entities=entities: self._client.log_batch(self.run_id, metrics=entities)):
                return False
            with self._lock:
                del self._metrics[: len(batch)]

    def _send_queue(self) -> bool:
        while self._queue:
            if not self._try(self._queue[0]):
                return False
            with self._lock:
                self._queue.pop(0)
        return True

    def _try(self, send: Callable[[], Any]) -> bool:
        try:
            send()
        except Exception as error:  # a tracking server that is down must not stop training
            if "INVALID_PARAMETER_VALUE" in str(error):  # would fail for ever, e.g. a parameter logged twice
                logger.debug("MLflow refused an entry: %s", error)
                return True
            logger.warning("MLflow is not reachable, %d entries wait: %s", len(self._queue) + len(self._metrics), error)
            return False
        return True


def _cell(value: Any, image_class: Any) -> Any:
    return image_class(value) if hasattr(value, "save") and hasattr(value, "resize") else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and other values become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str) if isinstance(value, list | tuple) else value
    return flat


def default_uri(root: Path) -> str:
    """SQLite file beside the results."""
    return f"sqlite:///{root / 'mlflow.db'}"


def open_tracker(settings: Settings, run_name: str, *, run_id: str = "", parent_run_id: str = "") -> Tracker:
    """The tracker that the settings ask for.

    Args:
        settings: ``tracking_uri`` (``none`` switches tracking off, empty is SQLite in the working directory) and
            ``experiment``.
        run_name: name of the run.
        run_id: continue this run.
        parent_run_id: nest under this run.

    Returns:
        An MLflow tracker, or a null one where tracking is off or cannot be started (with a warning).
    """
    if settings.tracking_uri == "none":
        return NullTracker()
    uri = settings.tracking_uri or default_uri(Path.cwd())
    experiment = settings.experiment or f"tinygptv-{settings.recipe}"
    try:
        return MLflowTracker(uri, experiment, run_name, run_id=run_id, parent_run_id=parent_run_id)
    except Exception as error:  # tracking never stops the job
        logger.warning("MLflow at %s cannot be used, this run is not tracked: %s", uri, error)
        return NullTracker()


# ---------------------------------------------------------------------- model registry


def register_model(settings: Settings, run_id: str, folder: Path, name: str, alias: str) -> int:
    """Put an artifact folder into the model registry.

    Args:
        settings: ``tracking_uri``, as for ``open_tracker``.
        run_id: the run that made it; the folder is uploaded there.
        folder: the artifact.
        name: registered model; made where it is missing.
        alias: moved to the new version.

    Returns:
        The version's number; ``models:/<name>@<alias>`` names it from now on.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=settings.tracking_uri or default_uri(Path.cwd()))
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    client.log_artifacts(run_id, str(folder), "model")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(name, source, run_id=run_id).version
    client.set_registered_model_alias(name, alias, version)
    return int(version)


def download_registered_model(uri: str, tracking_uri: str = "") -> Path:
    """The folder of a registered artifact; where the registry keeps it on this machine, the very folder.

    Args:
        uri: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        tracking_uri: MLflow's; empty is SQLite in the working directory.

    Raises:
        ValueError: the registry cannot be reached, or has no such version.
    """
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    place = tracking_uri or default_uri(Path.cwd())
    client = MlflowClient(tracking_uri=place)
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias).version
        else:
            name, _, version = name.rpartition("/")
        source = client.get_model_version_download_uri(name, str(version))
        return Path(download_artifacts(artifact_uri=source, tracking_uri=place))
    except MlflowException as error:
        raise ValueError(f"MLflow at {place} has no {uri}: {error.message}") from error


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Only the finite numbers, for summaries."""
    return {key: value for key, value in values.items() if math.isfinite(value)}
