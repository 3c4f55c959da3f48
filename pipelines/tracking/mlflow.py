"""Runs in MLflow. Nothing outside this folder imports MLflow.

Tracking never stops a job: entries wait in an outbox, which sends them in order, and keeps and retries what cannot be
sent. With a journal folder, what waits while MLflow is away is also kept on disk, and sent by whoever opens the same
run next. A value that a run has already for a step is not sent again, so a resumed training leaves neither gaps nor
doubles.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.redact import one_line, redact
from pipelines.tracking.client import asking, open_client
from pipelines.tracking.described import DataInput, source_tags
from pipelines.tracking.identity import RunIdentity
from pipelines.tracking.names import NameTable, valid_name
from pipelines.tracking.outbox import MAX_BATCH_VALUES, Entry, Outbox, as_image

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run
    from mlflow.exceptions import MlflowException
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_KEY_TAG = "tinygptv.run"
_PARENT_TAG = "mlflow.parentRunId"
_DESCRIPTION_TAG = "mlflow.note.content"
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else its pages open for agents, with runs as "evaluations"
    _DESCRIPTION_TAG: "TinyGPT-V: trainings with their stages as nested runs, scores, ablations, artifacts.",
}
_PARAM_LIMIT = 6000
_TAG_LIMIT = 8000
_BATCH_PARAMS = 100
_MAX_EXPERIMENT_NAMES = 100
_FOREIGN = (
    "run %s of the start, the parent or an earlier try is in another MLflow store; this run is recorded on its own."
)

T = TypeVar("T")


class MLflowTracker:
    """Sends a run to MLflow from a background thread."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        identity: RunIdentity,
        *,
        journal: Path | None = None,
        started: float | None = None,
    ) -> None:
        """Start or continue a run; where MLflow does not answer, later.

        Args:
            uri: tracking URI.
            experiment: experiment name; made where it is missing.
            run_name: name that people see.
            identity: the run to continue or begin.
            journal: folder that keeps what could not be sent.
            started: when the work of a new run began, in seconds since the epoch; None is now.
        """
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if redact(uri) != uri:  # MLflow would print the URI with each run that ends
            os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.run_id = identity.run_id
        self._uri, self._experiment, self._run_name, self._identity = uri, experiment, run_name, identity
        self._started_ms = int((time.time() if started is None else started) * 1000)
        self._client: MlflowClient | None = None
        self._is_new = False
        self._last_step: dict[str, int] = {}
        self._names = NameTable()
        told = ""
        try:
            with asking(uri):
                self._connect()
        except Exception as error:  # tracking never stops the job
            told = one_line(error)
            logger.warning("entries for MLflow at %s wait: %s", redact(uri), told)
        self._outbox = Outbox(self._send, journal, told)

    # ------------------------------------------------------------------ what callers say

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings once, without the passwords of URIs; a resumed run keeps those it has."""
        flat = {key: redact(str(value))[:_PARAM_LIMIT] for key, value in flatten(values).items()}
        self._outbox.put("params", values=flat)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step; NaN and infinite values too."""
        self._outbox.put(
            "metrics", values={k: float(v) for k, v in values.items()}, step=step, at=int(time.time() * 1000)
        )

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._outbox.put("tags", values={key: redact(value) for key, value in values.items()})

    def describe(self, text: str) -> None:
        """Set the description (Markdown), which stands at the top of the run's page."""
        self.tags({_DESCRIPTION_TAG: text[:_TAG_LIMIT]})

    def inputs(self, data: Sequence[DataInput]) -> None:
        """Log data sets with source, digest and number of rows; logged again, they are not doubled."""
        self._outbox.put("inputs", data=[{**asdict(each), "source": redact(each.source)} for each in data])

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or a folder."""
        self._outbox.put("artifact", path=str(path), folder=folder)

    def image(self, image: Image, key: str, step: int) -> None:
        """Log an image."""
        self._outbox.put("image", image=image, key=key, step=step)

    def table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Log a table; images become MLflow images."""
        self._outbox.put("table", rows=rows, name=name)

    def model(self, name: str, location: str) -> None:
        """Log a checkpoint as a model of this run; MLflow keeps its location, not its files."""
        self._outbox.put("model", name=name, location=location)

    def keep(self) -> None:
        """Have in the journal what waits to be sent, so that a kill loses nothing of before."""
        self._outbox.keep()

    def close(self, status: str = "FINISHED") -> None:
        """Send what waits (for up to a minute) and end the run; the rest stays in the journal."""
        self._outbox.put("end", status=status)
        self._outbox.close()

    # ------------------------------------------------------------------ finding the run

    def _connect(self) -> MlflowClient:
        """Find the run, or begin it."""
        client = open_client(self._uri)
        run = self._find_run(client)
        self._is_new = run is None
        if run is None:
            run = self._begin_run(client)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self._client = client
        return client

    def _find_run(self, client: MlflowClient) -> Run | None:
        if self.run_id:
            run = _get_run(client, self.run_id)
            if run is not None:
                return run
            logger.info(_FOREIGN, self.run_id)
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{_KEY_TAG}` = '{self._identity.key}'")
        return runs[0] if runs else None

    def _begin_run(self, client: MlflowClient) -> Run:
        tags = {_KEY_TAG: self._identity.key, **source_tags()}
        parent = self._identity.parent
        if parent and _get_run(client, parent) is not None:
            tags[_PARENT_TAG] = parent
        elif parent:
            logger.info(_FOREIGN, parent)
        experiment = self._find_experiment(client)
        return client.create_run(experiment, self._started_ms, tags, self._run_name)

    def _find_experiment(self, client: MlflowClient) -> str:
        """Id of the experiment; where one of its name was deleted, of a new one with a number behind the name."""
        for number in range(1, _MAX_EXPERIMENT_NAMES):
            name = self._experiment if number == 1 else f"{self._experiment}-{number}"
            found = client.get_experiment_by_name(name)
            if found is None:
                if number > 1:
                    logger.warning(
                        "MLflow experiment %r was deleted: this run is recorded in %r. `mlflow experiments restore` "
                        "brings the deleted one back.",
                        self._experiment,
                        name,
                    )
                return client.create_experiment(name, _artifact_location(self._uri, name), _EXPERIMENT_TAGS)
            if found.lifecycle_stage == "active":
                return found.experiment_id
        raise RuntimeError(f"{_MAX_EXPERIMENT_NAMES} experiments named {self._experiment!r} were deleted.")

    # ------------------------------------------------------------------ what the outbox calls

    def _send(self, entries: list[Entry]) -> None:
        """Deliver entries; what MLflow refuses for good is named in the log and dropped.

        Raises:
            Exception: MLflow does not answer; the outbox retries.
        """
        from mlflow.exceptions import MlflowException

        with asking(self._uri):
            client = self._client or self._connect()
            try:
                self._deliver(client, entries)
            except MlflowException as error:
                if not _is_refusal(error):
                    raise
                logger.warning("MLflow refused %r: %s", entries[0]["kind"], one_line(error))
            except (ValueError, TypeError, FileNotFoundError) as error:  # would fail again, and hold up all others
                logger.warning("%r cannot be sent to MLflow: %s", entries[0]["kind"], one_line(error))

    def _deliver(self, client: MlflowClient, entries: list[Entry]) -> None:
        entry, run_id = entries[0], self.run_id
        match entry["kind"]:
            case "metrics":
                self._deliver_metrics(client, entries)
            case "params":
                self._deliver_params(client, dict(entry["values"]))
            case "tags":
                for key, value in entry["values"].items():
                    client.set_tag(run_id, self._names.valid(key), value)
            case "inputs":
                client.log_inputs(run_id, datasets=[_as_input(DataInput(**fields)) for fields in entry["data"]])
            case "artifact":
                path = Path(entry["path"])
                send: Callable[..., Any] = client.log_artifacts if path.is_dir() else client.log_artifact
                send(run_id, str(path), entry["folder"] or None)
            case "image":
                client.log_image(run_id, as_image(entry["image"]), key=entry["key"], step=entry["step"])
            case "table":
                _log_table(client, run_id, _columns(entry["rows"]), f"{entry['name']}.json")
            case "model":
                _log_model(client, run_id, entry["name"], entry["location"])
            case "end":
                client.set_terminated(run_id, entry["status"])

    def _deliver_metrics(self, client: MlflowClient, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        try:
            new = [
                Metric(name, value, entry["at"], entry["step"])
                for entry in entries
                for name, value in self._new_values(client, entry).items()
            ]
            for part in _parts(new, MAX_BATCH_VALUES):
                self._log_each(lambda values: client.log_batch(self.run_id, metrics=values), part)
        except Exception:  # the entries come again: which of their values arrived, the run's history says
            self._last_step.clear()
            self._is_new = False
            raise

    def _deliver_params(self, client: MlflowClient, values: dict[str, str]) -> None:
        """A resumed run may be given another value for a parameter, which MLflow refuses: the first one stays."""
        from mlflow.entities import Param

        flat = [Param(self._names.valid(key), value) for key, value in values.items()]
        known = {} if self._is_new else client.get_run(self.run_id).data.params
        for part in _parts([param for param in flat if param.key not in known], _BATCH_PARAMS):
            self._log_each(lambda values: client.log_batch(self.run_id, params=values), part)

    def _log_each(self, log: Callable[[list[T]], object], items: list[T]) -> None:
        """Log items in one call; where MLflow refuses it, one by one, so that one odd item does not take the others."""
        from mlflow.exceptions import MlflowException

        try:
            log(items)
        except MlflowException as error:
            if not _is_refusal(error):
                raise
            if len(items) == 1:
                logger.warning("MLflow refused %s: %s", getattr(items[0], "key", "an entry"), one_line(error))
                return
            for item in items:
                self._log_each(log, [item])

    def _new_values(self, client: MlflowClient, entry: Entry) -> dict[str, float]:
        """The values of a step that the run does not have yet, by valid name."""
        new = {}
        for key, value in entry["values"].items():
            name = self._names.valid(key)
            if name not in self._last_step:
                history = [] if self._is_new else client.get_metric_history(self.run_id, name)
                self._last_step[name] = max((metric.step for metric in history), default=-1)
            if entry["step"] > self._last_step[name]:
                new[name] = float(value)
                self._last_step[name] = entry["step"]
        return new


def _get_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run of this store; None where it has none of this id, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not _is_refusal(error):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _is_refusal(error: MlflowException) -> bool:
    """Whether MLflow answered that the request is wrong: sending it again would end alike."""
    status: int = error.get_http_status_code()
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def _log_model(client: MlflowClient, run_id: str, name: str, location: str) -> None:
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], f"name = '{name}' AND source_run_id = '{run_id}'")
    if found and found[0].status == "READY":
        return
    model = (
        found[0]
        if found
        else client.create_logged_model(
            experiment_id, name, source_run_id=run_id, tags={"location": location}, model_type="checkpoint"
        )
    )
    client.finalize_logged_model(model.model_id, "READY")


def _log_table(client: MlflowClient, run_id: str, columns: dict[str, list[Any]], name: str) -> None:
    """Log a table in place of one that is there; MLflow itself would append to it."""
    folder, _, _ = name.rpartition("/")
    if name in {file.path for file in client.list_artifacts(run_id, folder or None)}:
        client.log_text(run_id, '{"columns": [], "data": []}', name)
    client.log_table(run_id, columns, name)


def _as_input(data: DataInput) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="uri" if "://" in data.source else "local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps({"num_rows": data.rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


def _columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list[Any]]:
    """Rows as columns, one for every key, as MLflow's tables want them; a column of images has one in every row."""
    import mlflow
    from PIL import Image

    columns: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = [as_image(row.get(key)) for row in rows]
        if any(hasattr(cell, "resize") for cell in cells):
            cells = [mlflow.Image(Image.new("RGB", (1, 1)) if cell is None else cell) for cell in cells]
        columns[key] = cells
    return columns


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested mappings to dotted keys; lists and other values become text."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str) if isinstance(value, list | tuple) else value
    return flat


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Artifacts lie beside an SQLite file, also of a name like ``/Users/me/x``; a server decides for itself."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else str(Path(path).absolute().with_name("mlartifacts") / valid_name(experiment))


def _parts(items: Sequence[T], size: int) -> Iterable[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
