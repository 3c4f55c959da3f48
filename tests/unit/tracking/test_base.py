"""Which tracker the settings ask for, and what it is opened with."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from PIL import Image

from pipelines.settings import Settings
from pipelines.tracking import base as module
from pipelines.tracking.base import NullTracker, Tracker, continue_tracker, open_tracker, reachable_uri
from pipelines.tracking.identity import RunIdentity, read_identity
from pipelines.tracking.mlflow import MLflowTracker


@pytest.fixture
def opened(monkeypatch):
    """What MLflow's tracker is made with."""
    found = []

    def make(*given, **options):
        found.append((*given, options))
        return SimpleNamespace(run_id=given[3].run_id or "begun")

    monkeypatch.setattr(module, "MLflowTracker", make)
    return found


def test_a_tracker_is_opened_with_what_is_given(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identity = RunIdentity(run_id="r", parent="p")
    settings = Settings(tracking_uri="http://mlflow", experiment="mine")
    open_tracker(settings, "title", identity=identity, parent_run_id="q", journal=tmp_path, started=3.5)
    assert opened == [("http://mlflow", "mine", "title", identity, {"journal": tmp_path, "started": 3.5})]
    open_tracker(Settings(recipe="paper"), "title", parent_run_id="q")
    uri, experiment, title, new, options = opened[1]
    assert (uri, experiment, title) == (f"sqlite:///{tmp_path}/mlflow.db", "tinygptv-paper", "title")
    assert (new.run_id, new.parent, options) == ("", "q", {"journal": None, "started": None})
    open_tracker(Settings(), "title")
    assert opened[2][3].parent == ""


def test_a_folder_keeps_the_run_that_it_began(opened, tmp_path):
    folder, settings = tmp_path / "new/out", Settings(tracking_uri="http://mlflow")
    assert continue_tracker(settings, "title", folder, parent_run_id="p", started=3.5).run_id == "begun"
    kept = read_identity(folder)
    assert (kept.run_id, kept.parent) == ("begun", "p")
    continue_tracker(settings, "title", folder, parent_run_id="another")
    (_, _, title, first, options), (*_, second, later) = opened
    assert (title, first.run_id, first.parent, first.key) == ("title", "", "p", kept.key)
    assert second == kept == read_identity(folder), "what it was begun under stays"
    assert options == {"journal": folder, "started": 3.5} and later == {"journal": folder, "started": None}
    continue_tracker(settings, "title", tmp_path / "alone")
    assert read_identity(tmp_path / "alone").parent == ""


def test_tracking_that_is_off_has_every_method_and_does_nothing(tmp_path):
    """Its defaults are those of a tracker: a caller that leaves one out gets the same of both."""
    off = NullTracker()
    off.params({"a": 1}), off.metrics({"a": 1.0}, 0), off.tags({"a": "b"}), off.describe("text"), off.inputs([])
    off.artifact(tmp_path), off.image(Image.new("RGB", (1, 1)), "key", 0), off.table([], "name")
    off.model("name", "/c"), off.close()
    assert off.run_id == ""
    for name in ("params", "metrics", "tags", "describe", "inputs", "artifact", "image", "table", "model", "close"):
        signatures = {str(inspect.signature(getattr(kind, name))) for kind in (Tracker, NullTracker, MLflowTracker)}
        assert len(signatures) == 1, signatures
    assert inspect.signature(Tracker.close).parameters["status"].default == "FINISHED"
    assert inspect.signature(Tracker.artifact).parameters["folder"].default == ""


def test_a_database_that_ray_removes_after_a_job_is_not_begun(opened, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for uri in ("", "", "sqlite:///mine.db"):
        assert isinstance(open_tracker(Settings(tracking_uri=uri), "title"), NullTracker)
    assert [text.partition(":")[0] for text in caplog.messages] == ["this run is not tracked"] * 2, "once for each"
    for uri in (f"sqlite:///{tmp_path}/mlflow.db", "http://mlflow"):
        open_tracker(Settings(tracking_uri=uri), "title")
    assert [given[0] for given in opened] == [f"sqlite:///{tmp_path}/mlflow.db", "http://mlflow"]


def test_what_is_not_tracked_is_told_with_the_way_to_track_it(monkeypatch, caplog):
    assert reachable_uri("sqlite:////data/m.db", "s3://bucket/run") == "none"

    def missing(*given, **options):
        raise ImportError("No module named 'mlflow'")

    monkeypatch.setattr(module, "MLflowTracker", missing)
    assert isinstance(open_tracker(Settings(), "title"), NullTracker)
    assert caplog.messages == [
        "this run is not tracked: tracking_uri=sqlite:////data/m.db would be files of one machine, and "
        "output=s3://bucket/run says that there are several; give the URI of an MLflow server, e.g. "
        "tracking_uri=http://HOST:5000.",
        "this run is not tracked: No module named 'mlflow'",
    ]
