"""Runs in MLflow. Nothing outside this folder imports MLflow.

Tracking never stops training: entries wait in an outbox, which sends them in order, and keeps and tries again what
cannot be sent. With a journal folder, what waits while MLflow is away is also kept on disk, and sent by whoever opens
the same run next. A number that a run has already for a step is not sent again, so a resumed training
leaves neither gaps nor doubles.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tracking.outbox import MOST_NUMBERS, Entry, Outbox

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_KEY_TAG = "tinygptv.run"
_PARAM_LIMIT = 6000


class MLflowTracker:
    """Sends a run to MLflow from a background thread."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        run_id: str = "",
        key: str = "",
        parent_run_id: str = "",
        journal: Path | None = None,
    ) -> None:
        """Start or continue a run; where MLflow does not answer, later.

        Args:
            uri: tracking URI.
            experiment: experiment name; made where it is missing.
            run_name: name that people see.
            run_id: continue this run; empty looks for ``key``.
            key: continue the run that was begun under this key, or begin one; empty begins one.
            parent_run_id: nest under this run.
            journal: folder that keeps what could not be sent.
        """
        # One quick try per call: waiting and trying again is the sender's work.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.run_id = run_id
        self._place = (uri, experiment, run_name, key, parent_run_id)
        self._client: Any = None
        self._known = bool(run_id)
        self._last_step: dict[str, int] = {}
        try:
            self._connect()
        except Exception as error:  # tracking never stops the job
            logger.warning("MLflow at %s does not answer, what it should know waits: %s", uri, str(error)[:200])
        self._outbox = Outbox(self._send, journal)

    # ------------------------------------------------------------------ what callers say

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings once; a resumed run keeps those it has."""
        flat = {key[:250]: str(value)[:_PARAM_LIMIT] for key, value in flatten(values).items()}
        self._outbox.put("params", values=flat)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers; not-a-number values are sent too, they are news."""
        self._outbox.put(
            "metrics", values={k: float(v) for k, v in values.items()}, step=step, at=int(time.time() * 1000)
        )

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._outbox.put("tags", values=dict(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or a folder."""
        self._outbox.put("artifact", path=str(path), folder=folder)

    def image(self, image: Image, key: str, step: int) -> None:
        """Log a picture."""
        self._outbox.put("image", image=image, key=key, step=step)

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Log a table; images become MLflow images."""
        self._outbox.put("table", rows=rows, name=name)

    def model(self, name: str, place: str) -> None:
        """Log a checkpoint as a model of this run; MLflow keeps its place, not its files."""
        self._outbox.put("model", name=name, place=place)

    def close(self, status: str = "FINISHED") -> None:
        """Send what waits (for up to a minute) and end the run; the rest stays in the journal."""
        self._outbox.put("end", status=status)
        self._outbox.close()

    # ------------------------------------------------------------------ what the outbox calls

    def _connect(self) -> None:
        """Find the run, or begin it."""
        from mlflow import MlflowClient

        uri, experiment, run_name, key, parent_run_id = self._place
        client = MlflowClient(tracking_uri=uri)
        if not self.run_id:
            found = client.get_experiment_by_name(experiment)
            experiment_id = (
                found.experiment_id if found else client.create_experiment(experiment, _artifact_place(uri, experiment))
            )
            runs = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'") if key else []
            self._known = bool(runs)
            tags = {_KEY_TAG: key} if key else {}
            if parent_run_id:
                tags["mlflow.parentRunId"] = parent_run_id
            run = runs[0] if runs else client.create_run(experiment_id, run_name=run_name, tags=tags)
            self.run_id = run.info.run_id
        if self._known:
            client.update_run(self.run_id, status="RUNNING")
        self._client = client

    def _send(self, entries: list[Entry]) -> None:
        """Deliver entries; what MLflow refuses for good, such as a parameter with another value, is let go."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            self._connect()
        try:
            self._deliver(entries)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            logger.debug("MLflow refused an entry: %s", error)
        except (ValueError, TypeError, FileNotFoundError) as error:  # would fail for ever, and hold up all others
            logger.warning("a %s entry cannot be sent to MLflow: %s", entries[0]["kind"], error)

    def _deliver(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric, Param

        client, run_id, entry = self._client, self.run_id, entries[0]
        match entry["kind"]:
            case "metrics":
                news = [Metric(k, v, e["at"], e["step"]) for e in entries for k, v in self._news(e).items()]
                for start in range(0, len(news), MOST_NUMBERS):
                    client.log_batch(run_id, metrics=news[start : start + MOST_NUMBERS])
            case "params":
                flat = [Param(key, value) for key, value in entry["values"].items()]
                for start in range(0, len(flat), 100):
                    client.log_batch(run_id, params=flat[start : start + 100])
            case "tags":
                for key, value in entry["values"].items():
                    client.set_tag(run_id, key, value)
            case "artifact":
                path = Path(entry["path"])
                send: Callable[..., Any] = client.log_artifacts if path.is_dir() else client.log_artifact
                send(run_id, str(path), entry["folder"] or None)
            case "image":
                client.log_image(run_id, _as_image(entry["image"]), key=entry["key"], step=entry["step"])
            case "table":
                client.log_table(run_id, _columns(entry["rows"]), f"{entry['name']}.json")
            case "model":
                self._log_model(entry["name"], entry["place"])
            case "end":
                client.set_terminated(run_id, entry["status"])

    def _news(self, entry: Entry) -> dict[str, float]:
        """The numbers of a step that the run has not got yet."""
        news = {}
        for key, value in entry["values"].items():
            if key not in self._last_step:
                history = self._client.get_metric_history(self.run_id, key) if self._known else []
                self._last_step[key] = max((metric.step for metric in history), default=-1)
            if entry["step"] > self._last_step[key]:
                news[key] = value
                self._last_step[key] = entry["step"]
        return news

    def _log_model(self, name: str, place: str) -> None:
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        found = self._client.search_logged_models(
            [experiment_id], f"name = '{name}' AND source_run_id = '{self.run_id}'"
        )
        if not found:
            model = self._client.create_logged_model(
                experiment_id, name, source_run_id=self.run_id, tags={"place": place}, model_type="checkpoint"
            )
            self._client.finalize_logged_model(model.model_id, "READY")


def _as_image(value: Any) -> Any:
    from PIL import Image

    return Image.open(value["png"]) if isinstance(value, dict) and "png" in value else value


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as MLflow's table wants them: a column of pictures has one in every row."""
    import mlflow
    from PIL import Image

    columns: dict[str, list[Any]] = {}
    for key in rows[0] if rows else ():
        cells = [_as_image(row.get(key)) for row in rows]
        if any(hasattr(cell, "resize") for cell in cells):
            cells = [mlflow.Image(Image.new("RGB", (1, 1)) if cell is None else cell) for cell in cells]
        columns[key] = cells
    return columns


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and other values become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str) if isinstance(value, list | tuple) else value
    return flat


def _artifact_place(uri: str, experiment: str) -> str | None:
    """Artifacts lie beside an SQLite file; a server decides for itself."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else str(Path(path).absolute().with_name("mlartifacts") / experiment)
