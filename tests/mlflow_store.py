"""As much of an MLflow store as the tracker asks for, in memory; names are checked by MLflow's own rules."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.utils.validation import _validate_metric_name, _validate_param


class FakeStore:
    """An MLflow client and its store."""

    def __init__(self):
        self.experiments, self.runs, self.refused, self.asked, self.sent = {}, {}, set(), 0, []
        self.tables = {}

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, location, tags):
        assert name not in self.experiments
        found = SimpleNamespace(
            experiment_id=str(len(self.experiments)), lifecycle_stage="active", name=name, tags=tags, location=location
        )
        self.experiments[name] = found
        return found.experiment_id

    def create_run(self, experiment_id, start_time, tags, run_name):
        (experiment,) = [e for e in self.experiments.values() if e.experiment_id == experiment_id]
        assert experiment.lifecycle_stage == "active"
        run_id = f"run{len(self.runs)}"
        info = SimpleNamespace(
            run_id=run_id,
            run_name=run_name,
            experiment_id=experiment_id,
            lifecycle_stage="active",
            start_time=start_time,
        )
        data = SimpleNamespace(tags=dict(tags), params={}, metrics={})
        self.runs[run_id] = SimpleNamespace(info=info, data=data, status="RUNNING")
        return self.runs[run_id]

    def search_runs(self, experiment_ids, query):
        name, value = re.fullmatch(r"tags\.`(.+)` = '(.+)'", query).groups()
        return [r for r in self.runs.values() if r.data.tags[name] == value and r.info.experiment_id in experiment_ids]

    def get_run(self, run_id):
        if run_id not in self.runs:
            raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
        return self.runs[run_id]

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    set_terminated = update_run

    def set_tag(self, run_id, key, value):
        self.runs[run_id].data.tags[key] = value

    def log_batch(self, run_id, metrics=(), params=()):
        if {metric.key for metric in metrics} & self.refused:
            raise MlflowException("refused", INVALID_PARAMETER_VALUE)
        for metric in metrics:
            _validate_metric_name(metric.key)
        for param in params:
            _validate_param(param.key, param.value)
            if self.runs[run_id].data.params.get(param.key, param.value) != param.value:
                raise MlflowException("changed", INVALID_PARAMETER_VALUE)
        for metric in metrics:
            self.runs[run_id].data.metrics.setdefault(metric.key, []).append(metric)
        self.runs[run_id].data.params.update({param.key: param.value for param in params})

    def log_inputs(self, run_id, datasets):
        assert run_id in self.runs
        self.runs[run_id].inputs = datasets

    def log_artifact(self, run_id, path, folder):
        assert run_id in self.runs
        self.sent.append(("file", path, folder))

    def log_artifacts(self, run_id, path, folder):
        assert run_id in self.runs
        self.sent.append(("folder", path, folder))

    def log_image(self, run_id, image, key, step):
        assert run_id in self.runs
        self.sent.append(("image", image.size, key, step))

    def log_table(self, run_id, columns, name):
        assert run_id in self.runs
        self.sent.append(("table", columns, name))
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.tables[name] = {"columns": list(columns), "data": self.tables.get(name, {"data": []})["data"] + rows}

    def list_artifacts(self, run_id, folder):
        assert run_id in self.runs
        return [SimpleNamespace(path=name) for name in self.tables if name.rpartition("/")[0] == (folder or "")]

    def log_text(self, run_id, text, name):
        assert run_id in self.runs
        self.tables[name] = json.loads(text)

    def search_logged_models(self, experiment_ids, query):
        name, run_id = re.fullmatch("name = '(.+)' AND source_run_id = '(.+)'", query).groups()
        status = "READY" if ("m1", "READY") in self.sent else "PENDING"
        return [
            SimpleNamespace(model_id="m1", status=status) for entry in self.sent if entry[:3] == ("model", name, run_id)
        ]

    def create_logged_model(self, experiment_id, name, source_run_id, tags, model_type):
        self.sent.append(("model", name, source_run_id, experiment_id, tags["location"]))
        return SimpleNamespace(model_id="m1")

    def finalize_logged_model(self, model_id, status):
        self.sent.append((model_id, status))

    def get_metric_history(self, run_id, key):
        self.asked += 1
        return self.runs[run_id].data.metrics.get(key, [])
