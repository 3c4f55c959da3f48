"""Which folder an artifact's name means, and that a wrong one is told before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.serving import artifact as artifacts
from pipelines.serving.artifact import check_artifact, resolve_artifact
from pipelines.settings import ServeSettings
from pipelines.tracking import registry
from tinygptv.checkpoint.folders import CheckpointError, write_manifest
from tinygptv.miniature import backbones


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the registry, the shipped model and other storages."""
    found = []
    monkeypatch.setattr(
        registry, "download_registered_model", lambda name, uri: found.append((name, uri)) or "/registered"
    )
    monkeypatch.setattr(backbones, "shipped_model", lambda: Path("/shipped"))
    monkeypatch.setattr(artifacts, "local_checkpoint", lambda *name, **how: found.append((*name, how)) or Path("/copy"))
    return found


def both(**settings):
    """The folder of a replica, and the name that replicas are given."""
    return resolve_artifact(ServeSettings(**settings)), check_artifact(ServeSettings(**settings))


def test_a_registered_model_is_downloaded_from_its_registry(asked):
    assert both(artifact="models:/m@best", tracking_uri="http://t") == (Path("/registered"), "/registered")
    assert asked == [("models:/m@best", "http://t")] * 2


def test_without_a_name_the_shipped_model_is_served(asked):
    assert both() == (Path("/shipped"), "/shipped") and asked == []


@pytest.mark.parametrize("name", ["hf://org/name", "s3://bucket/artifact"])
def test_what_lies_elsewhere_is_copied_by_each_node_and_looked_for_before(asked, name):
    assert both(artifact=name) == (Path("/copy"), name)
    assert asked == [(name, {}), (name, {"weights": False})]


def test_a_folder_is_served_where_it_is_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"artifact 'model' is no checkpoint folder \(config.json is missing\): give"):
        both(artifact="model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for name in ("model", "model/", f"file://{tmp_path}/model", f"{tmp_path}/model"):
        assert both(artifact=name) == (tmp_path / "model", f"{tmp_path}/model")
    write_manifest(tmp_path / "model")
    assert both(artifact="model")[0] == tmp_path / "model"
    checked = []
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.serving.artifact.verify_folder", lambda folder, **how: checked.append(how))
        both(artifact="model")
    assert checked == [{"hashes": False}] * 2, "gigabytes are not read twice"
    (tmp_path / "model/config.json").write_text("{ }")
    for call in (resolve_artifact, check_artifact):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            call(ServeSettings(artifact="model"))
