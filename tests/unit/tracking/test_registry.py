"""Artifacts in MLflow's registry: a version, its alias, and the folder that a name stands for."""

from __future__ import annotations

from types import SimpleNamespace

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from pipelines.settings import QuantizeSettings
from pipelines.tracking.registry import download_registered_model, register_model


class Registry:
    """As much of MLflow's client as is asked for."""

    def __init__(self):
        self.names, self.versions, self.aliases, self.uploads, self.uris = set(), {}, {}, [], []

    def __call__(self, tracking_uri):
        self.uris.append(tracking_uri)
        return self

    def get_registered_model(self, name):
        if name not in self.names:
            raise MlflowException("none")

    def create_registered_model(self, name):
        assert name not in self.names
        self.names.add(name)

    def log_artifacts(self, run_id, folder, path):
        self.uploads.append((run_id, folder, path))

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(artifact_uri=f"store/{run_id}"))

    def create_model_version(self, name, source, run_id, tags):
        number = str(len(self.versions) + 1)
        self.versions[name, number] = (source, run_id, tags)
        return SimpleNamespace(version=number)

    def set_registered_model_alias(self, name, alias, version):
        self.aliases[name, alias] = version

    def get_model_version_by_alias(self, name, alias):
        if (name, alias) not in self.aliases:
            raise MlflowException("no such alias")
        return SimpleNamespace(version=self.aliases[name, alias])

    def get_model_version_download_uri(self, name, version):
        return self.versions[name, version][0]


@pytest.fixture
def registry(monkeypatch):
    found = Registry()
    monkeypatch.setattr(mlflow, "MlflowClient", found)
    monkeypatch.setattr(
        mlflow.artifacts, "download_artifacts", lambda artifact_uri, tracking_uri: f"/{tracking_uri}/{artifact_uri}"
    )
    return found


def test_the_alias_moves_to_the_newest_version_and_each_is_found(registry, tmp_path):
    settings = QuantizeSettings(tracking_uri="http://mlflow:5000")
    numbers = [
        register_model(settings, f"run{n}", tmp_path / "artifact", "team/tiny", "champion", {"method": "cpu"})
        for n in (1, 2)
    ]
    assert numbers == [1, 2] and registry.aliases == {("team/tiny", "champion"): "2"}
    assert registry.uploads[0] == ("run1", f"{tmp_path}/artifact", "model")
    assert registry.versions["team/tiny", "2"] == ("store/run2/model", "run2", {"method": "cpu"})
    for uri, folder in (("models:/team/tiny@champion", "run2"), ("models:/team/tiny/1", "run1")):
        assert str(download_registered_model(uri, "other")) == f"/other/store/{folder}/model"
    assert registry.uris == ["http://mlflow:5000"] * 2 + ["other"] * 2
    with pytest.raises(ValueError, match=r"MLflow at http://other has no models:/team/tiny@none: no such alias"):
        download_registered_model("models:/team/tiny@none", "http://other")


def test_the_default_registry_is_a_file_of_the_working_directory(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").touch()  # else it is made
    register_model(QuantizeSettings(), "run1", tmp_path, "tiny", "champion")
    assert registry.versions["tiny", "1"][2] == {}
    found = str(download_registered_model("models:/tiny@champion"))
    assert registry.uris == [f"sqlite:///{tmp_path}/mlflow.db"] * 2
    assert found == f"/sqlite:{tmp_path}/mlflow.db/store/run1/model"
