"""What reaches MLflow: steps and values, without gaps or doubles; odd names, foreign runs and deleted experiments."""

from __future__ import annotations

import json
import math
import os
import re
import time
from types import SimpleNamespace

import pytest
from mlflow.utils.validation import _validate_metric_name
from PIL import Image

from pipelines.redact import redact
from pipelines.settings import TrainSettings
from pipelines.tracking import mlflow as module
from pipelines.tracking.base import NullTracker, absolute_uri, continue_tracker, open_tracker, reachable_uri
from pipelines.tracking.described import DataInput, hardware_tags, markdown_table, run_title
from pipelines.tracking.identity import RUN_FILE, RunIdentity, read_identity
from pipelines.tracking.names import NameTable, valid_name
from pipelines.tracking.outbox import _image_as_text
from tests.mlflow_store import FakeStore


@pytest.fixture
def stores(monkeypatch):
    """One store per URI."""
    found = {}
    monkeypatch.setattr(module, "open_client", lambda uri: found.setdefault(uri, FakeStore()))
    return found


@pytest.fixture
def store(stores):
    return stores.setdefault("one", FakeStore())


def settings(uri="one", **changes):
    return TrainSettings(tracking_uri=uri, **changes)


def points(store, run_id, key):
    return [(metric.step, metric.value) for metric in store.runs[run_id].data.metrics.get(key, [])]


def test_steps_and_values_arrive_and_a_resumed_run_has_no_doubles(store, tmp_path):
    first = continue_tracker(settings(), "stage", tmp_path)
    for step in range(5):
        first.metrics({"loss": 5.0 - step, "lr": 0.1, "top+1": step / 8}, step)
    first.close("FAILED")
    assert store.runs[first.run_id].status == "FAILED" and store.asked == 0, "a new run has no history"
    again = continue_tracker(settings(), "stage", tmp_path)
    assert again.run_id == first.run_id == read_identity(tmp_path).run_id
    assert store.runs[first.run_id].status == "RUNNING"
    for step in range(3, 7):  # steps 3 and 4 are done again
        again.metrics({"loss": 5.0 - step, "new": math.nan, "top+1": step / 8}, step)
    again.close()
    assert points(store, first.run_id, "loss") == [(step, 5.0 - step) for step in range(7)]
    assert [step for step, _ in points(store, first.run_id, "new")] == [3, 4, 5, 6]
    assert points(store, first.run_id, "lr") == [(step, 0.1) for step in range(5)]
    assert points(store, first.run_id, "top_1") == [(step, step / 8) for step in range(7)], "by its name in MLflow"
    assert store.runs[first.run_id].status == "FINISHED" and len(store.runs) == 1


def test_a_name_that_mlflow_does_not_allow_takes_nothing_with_it(store, tmp_path, caplog):
    tracker = continue_tracker(settings(), "stage", tmp_path)
    store.refused = {"refused"}
    for _ in range(2):  # a step that is done again
        tracker.metrics({"loss": 1.0, "loss/refcoco+": 2.0, "loss/refcoco_": 3.0, "../x": 4.0, "refused": 5.0}, 0)
    tracker.params({"stage.sources": [1], "odd?key": "a"})
    tracker.tags({"odd+tag": "b"})
    tracker.close()
    run = store.runs[tracker.run_id]
    assert points(store, tracker.run_id, "loss") == [(0, 1.0)]
    assert points(store, tracker.run_id, "loss/refcoco_") == [(0, 2.0)]
    (other,) = [key for key in run.data.metrics if key.startswith("loss/refcoco_-")]
    assert points(store, tracker.run_id, other) == [(0, 3.0)], "two names never become one curve"
    assert run.data.params == {"stage.sources": "[1]", "odd_key": "a"} and run.data.tags["odd_tag"] == "b"
    assert "MLflow refused refused" in caplog.text


def test_names():
    assert [valid_name(key) for key in ("loss/a", "a+b", "/a//b/", "..", "")] == ["loss/a", "a_b", "a/b", "_", "_"]
    assert valid_name("x" * 250) == "x" * 250 != valid_name("x" * 251)
    assert len(valid_name("x" * 300)) == 250 and valid_name("x" * 300) != valid_name("x" * 301)
    for key in ("a+b", "/a//b/", "..", "", "x" * 300, "größe", "a\nb"):
        _validate_metric_name(valid_name(key))
    table = NameTable()
    assert table.valid("a+b") == "a_b" != table.valid("a?b") and table.valid("a+b") == "a_b"


def test_a_changed_parameter_keeps_its_first_value_and_new_ones_arrive(store, tmp_path, caplog):
    continue_tracker(settings(), "stage", tmp_path).close()
    for value in (1, 2):
        tracker = continue_tracker(settings(), "stage", tmp_path)
        tracker.params({"micro_batch_size": value, f"only{value}": value})
        tracker.close()
    assert store.runs[tracker.run_id].data.params == {"micro_batch_size": "1", "only1": "1", "only2": "2"}
    assert "refused" not in caplog.text, "what the run has is not sent again"


def test_a_deleted_experiment_stays_deleted_and_the_run_is_recorded(store, tmp_path, caplog):
    store.create_experiment("tinygptv-mini", None, {})
    store.experiments["tinygptv-mini"].lifecycle_stage = "deleted"
    trackers = [continue_tracker(settings(), "stage", tmp_path / name) for name in ("a", "b")]
    for tracker in trackers:
        tracker.metrics({"loss": 1.0}, 0)
        tracker.close()
        assert points(store, tracker.run_id, "loss") == [(0, 1.0)]
    assert set(store.experiments) == {"tinygptv-mini", "tinygptv-mini-2"}
    assert "'tinygptv-mini' was deleted: this run is recorded in 'tinygptv-mini-2'" in caplog.text


def test_a_run_or_parent_of_another_store_is_told_calmly(stores, tmp_path, caplog):
    caplog.set_level("INFO")
    elsewhere = continue_tracker(settings("one"), "training", tmp_path)
    moved = continue_tracker(settings("two"), "training", tmp_path)
    child = open_tracker(settings("two"), "stage", parent_run_id="no such run")
    for tracker in (elsewhere, moved, child):
        tracker.metrics({"loss": 1.0}, 0)
        tracker.close()
    assert [message.partition(" is in another MLflow store; this run")[0] for message in caplog.messages] == [
        f"run {run_id} of the start, the parent or an earlier try" for run_id in (elsewhere.run_id, "no such run")
    ]
    assert "wait" not in caplog.text
    assert points(stores["two"], moved.run_id, "loss") == points(stores["two"], child.run_id, "loss") == [(0, 1.0)]
    assert "mlflow.parentRunId" not in stores["two"].runs[child.run_id].data.tags
    nested = open_tracker(settings("two"), "stage", parent_run_id=child.run_id)
    nested.close()
    assert stores["two"].runs[nested.run_id].data.tags["mlflow.parentRunId"] == child.run_id


def test_a_run_is_nested_under_its_parent_from_the_start_and_for_good(store, tmp_path):
    parent = continue_tracker(settings(experiment="mine"), "training", tmp_path / "a")
    for given in (parent.run_id, ""):
        child = continue_tracker(settings(experiment="mine"), "stage", tmp_path / "b", parent_run_id=given)
        child.close()
    assert store.runs[child.run_id].data.tags["mlflow.parentRunId"] == parent.run_id
    assert read_identity(tmp_path / "b").parent == parent.run_id
    assert read_identity(tmp_path / "b").key == store.runs[child.run_id].data.tags["tinygptv.run"]
    parent.close()
    assert set(store.experiments) == {"mine"} and len(store.runs) == 2


def test_files_images_tables_and_models_arrive(store, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(module.time, "time", lambda: 1234.5678)
    for _ in range(2):
        tracker = continue_tracker(settings(), "stage", tmp_path / "run")
        tracker.artifact(tmp_path / "a.txt")
        tracker.artifact(tmp_path, "reports")
        tracker.image(Image.new("RGB", (3, 2)), "answer", 7)
        tracker.table([{"a": 1, "b": "x"}, {"a": 2}], "rows")
        tracker.model("stage 1", "/out/checkpoint")
        tracker.metrics({"loss": 1.0}, 3)
        tracker.close()
    once = [
        ("file", f"{tmp_path}/a.txt", None),
        ("folder", str(tmp_path), "reports"),
        ("image", (3, 2), "answer", 7),
        ("table", {"a": [1, 2], "b": ["x", None]}, "rows.json"),
    ]
    model = [("model", "stage 1", tracker.run_id, "0", "/out/checkpoint"), ("m1", "READY")]
    assert store.sent == [*once, *model, *once], "a model is not doubled"
    (metric,) = store.runs[tracker.run_id].data.metrics["loss"]
    assert metric.timestamp == 1_234_567, "milliseconds"


@pytest.mark.parametrize(
    ("status", "refused"),
    [(400, True), (404, True), (409, True), (499, True)]
    + [(status, False) for status in (200, 401, 403, 408, 429, 500, 503)],
)
def test_only_a_wrong_request_is_a_refusal(status, refused):
    assert module._is_refusal(SimpleNamespace(get_http_status_code=lambda: status)) is refused


@pytest.mark.parametrize("content", ["", "[]", '{"run_id": "r'])
def test_a_damaged_identity_begins_a_new_run(store, tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    tracker = continue_tracker(settings(), "stage", tmp_path)
    tracker.close()
    assert json.loads((tmp_path / RUN_FILE).read_text())["run_id"] == tracker.run_id in store.runs


def test_a_run_that_was_never_answered_for_is_found_by_its_key(stores, tmp_path, monkeypatch):
    def away(uri):
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_client", away)
        silent = continue_tracker(settings(), "stage", tmp_path)
        silent.metrics({"loss": 1.0}, 0)
        silent.close()
    assert read_identity(tmp_path).run_id == ""
    first = open_tracker(settings(), "stage", identity=read_identity(tmp_path))
    first.close()
    second = continue_tracker(settings(), "stage", tmp_path)
    second.close()
    assert first.run_id == second.run_id and points(stores["one"], second.run_id, "loss") == [(0, 1.0)]


def test_a_database_has_one_path_wherever_a_process_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("") == absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////data/mlflow.db", "http://mlflow:5000", "none", "databricks"):
        assert absolute_uri(uri) == uri


def test_files_of_one_machine_track_no_run_of_several(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    local = f"sqlite:///{tmp_path}/x.db"
    assert reachable_uri("sqlite:///x.db", "/data/run") == local and not caplog.text
    for uri in (
        "http://mlflow:5000",
        "https://mlflow",
        "databricks://profile",
        "postgresql+psycopg2://me@db/mlflow",
        "mysql+pymysql://me@db/mlflow",
        "mssql+pyodbc://me@db/mlflow",
    ):
        assert reachable_uri(uri, "s3://bucket/run") == uri and not caplog.text
    assert reachable_uri("none", "s3://bucket/run") == "none" and not caplog.text
    assert reachable_uri("", "s3://bucket/run") == "none"
    assert "tracking_uri='' would be files of one machine, and output=s3://bucket/run" in caplog.text
    assert reachable_uri("x://me:secret@host/y", "s3://key:secret@bucket/run") == "none"
    assert "tracking_uri=x://***@host/y would be files of one machine, and output=s3://***@bucket/run" in caplog.text


def test_without_a_uri_runs_are_in_a_file_of_the_working_directory(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_tracker(settings("", recipe="paper"), "stage").close()
    (uri,) = stores
    assert uri == f"sqlite:///{tmp_path}/mlflow.db" and set(stores[uri].experiments) == {"tinygptv-paper"}


@pytest.mark.security
def test_passwords_of_uris_are_not_logged(stores, tmp_path, monkeypatch, caplog):
    uri = "http://me:secret@mlflow:5000"
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    for printed, each in (("false", "http://mlflow:5000"), ("true", uri)):
        open_tracker(settings(each), "stage").close()
        assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == printed
    tracker = continue_tracker(settings(uri), "stage", tmp_path)
    tracker.params(
        settings(uri, storage_path="s3://key:secret@bucket/x?endpoint_override=h&secret_key=secret").model_dump()
    )
    tracker.tags({"checkpoint": "s3://key:secret@bucket/x"})
    tracker.close()
    run = stores[uri].runs[tracker.run_id]
    assert "secret" not in json.dumps([run.data.params, run.data.tags]).replace("secret_key", "")
    assert run.data.params["tracking_uri"] == "http://***@mlflow:5000"
    assert redact("http://me:p@ss@host/a?b=c@d") == "http://***@host/a?b=c@d"
    assert redact(["mail me@host", ("sqlite:///a@b.db",)]) == ["mail me@host", ("sqlite:///a@b.db",)]


def test_tracking_that_is_off_writes_nothing(tmp_path):
    for off in (continue_tracker(settings("none"), "stage", tmp_path), open_tracker(settings("none"), "stage")):
        assert isinstance(off, NullTracker) and off.run_id == ""
    assert not list(tmp_path.iterdir())


def test_no_identity_begins_a_run_of_its_own():
    assert RunIdentity().key != RunIdentity().key


def test_data_sets_and_where_the_run_is_from_are_logged(store, tmp_path):
    tracker = continue_tracker(settings(), run_title("mini", "stage 4"), tmp_path)
    found = DataInput("gqa", "9f31c2", "s3://user:secret@bucket/gqa", 120, "training")
    tracker.inputs([found, DataInput("gqa (held out)", "9f31c2", "/data/gqa", 6, "evaluation")])
    tracker.close()
    run = store.runs[tracker.run_id]
    assert re.fullmatch(r"mini stage 4, \d{4}-\d\d-\d\d \d\d:\d\d", run.info.run_name)
    assert run.data.tags["mlflow.source.name"] and run.data.tags["mlflow.source.type"] == "LOCAL"
    first, second = run.inputs
    assert (first.dataset.name, first.dataset.digest, first.dataset.profile) == ("gqa", "9f31c2", '{"num_rows": 120}')
    assert first.dataset.source_type == "uri" and "secret" not in first.dataset.source
    assert second.dataset.source_type == "local" and second.tags[0].value == "evaluation"


def test_data_sets_that_could_not_be_sent_are_sent_by_the_next_run(stores, tmp_path, monkeypatch):
    def away(uri):
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_client", away)
        silent = continue_tracker(settings(), "stage", tmp_path)
        silent.inputs([DataInput("gqa", "9f31c2", "/data/gqa", 120, "training")])
        silent.close()
    again = continue_tracker(settings(), "stage", tmp_path)
    again.close()
    assert stores["one"].runs[again.run_id].inputs[0].dataset.name == "gqa"


def test_a_run_that_is_reported_at_its_end_has_the_time_of_its_start(store, tmp_path):
    began = 1_700_000_000.25
    title = run_title("mini", "score gqa", began)
    assert title == f"mini score gqa, {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}"
    tracker = continue_tracker(settings(), title, tmp_path, started=began)
    assert store.runs[tracker.run_id].info.start_time == 1_700_000_000_250
    tracker.close()


def test_the_page_of_a_run_begins_with_its_description(store, tmp_path):
    tracker = continue_tracker(settings(), "ablation", tmp_path)
    rows = [{"variant": "full", "stage 1": "0.889"}, {"variant": "a|b", "stage 1": None, "n": 7, "share": 1 / 3}]
    table = markdown_table(rows)
    tracker.describe(table + "x" * 9000)
    tracker.close()
    text = store.runs[tracker.run_id].data.tags["mlflow.note.content"]
    assert text.startswith(table) and len(text) == 8000
    assert table.splitlines() == [
        "| variant&emsp; | stage 1&emsp; | n&emsp; | share |",
        "| --- | --- | --- | --- |",
        "| full&emsp; | 0.889&emsp; | &emsp; |  |",
        "| a\\|b&emsp; | &emsp; | 7&emsp; | 0.3333 |",
    ]


@pytest.mark.parametrize("name", ["scores", "predictions/step_000200"])
def test_a_table_that_is_reported_again_is_not_doubled(store, tmp_path, name):
    for value in (1, 2):
        tracker = continue_tracker(settings(), "score", tmp_path)
        tracker.table([{"benchmark": "gqa", "value": value}, {"benchmark": "vsr", "value": 3}], name)
        tracker.close()
    table = {"columns": ["benchmark", "value"], "data": [["gqa", 2], ["vsr", 3]]}
    assert store.tables == {f"{name}.json": table}


def test_hardware_is_named():
    tags = hardware_tags(3)
    assert tags["hardware.workers"] == "3" and int(tags["hardware.cpus"]) > 0 and tags["hardware.torch"]


def test_pages_of_a_new_experiment_are_those_of_model_training(stores):
    open_tracker(settings("one"), "stage").close()
    (experiment,) = stores["one"].experiments.values()
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "TinyGPT-V" in experiment.tags["mlflow.note.content"]


def test_nested_settings_are_dotted_and_lists_are_text():
    nested = {"a": {"b": {"c": 1}, "d": [1, (2,)]}, "e": None, "f": {}}
    assert module.flatten(nested) == {"a.b.c": 1, "a.d": "[1, [2]]", "e": None}


def test_artifacts_lie_beside_a_database_and_where_a_server_says():
    assert module._artifact_location("sqlite:////data/mlflow.db", "mine") == "/data/mlartifacts/mine"
    assert module._artifact_location("http://mlflow:5000", "mine") is None
    for name, folder in (("/Users/me@x.org/v", "Users/me_x.org/v"), ("../../up", "_"), ("a/b c", "a/b c")):
        assert module._artifact_location("sqlite:////data/mlflow.db", name) == f"/data/mlartifacts/{folder}"


def test_many_parameters_and_values_go_in_several_calls():
    assert [len(part) for part in module._parts(range(250), 100)] == [100, 100, 50]
    assert module._BATCH_PARAMS == 100 and list(module._parts([], 100)) == []


def test_a_column_of_images_has_one_in_every_row():
    image = Image.new("RGB", (3, 2))
    kept = json.loads(json.dumps(image, default=_image_as_text))
    rows = [{"q": "a", "i": image}, {"q": "b"}, {"q": "c", "i": kept}]
    columns = module._columns(rows)
    assert columns["q"] == ["a", "b", "c"] and len(columns["i"]) == 3
    uneven = module._columns([{"variant": "full"}, {"variant": "small", "score": 3}, {"score": {"gqa": 1}}])
    assert uneven == {"variant": ["full", "small", None], "score": [None, 3, {"gqa": 1}]}, "the first may have failed"
    assert [found.to_pil().size for found in columns["i"]] == [(3, 2), (1, 1), (3, 2)]
    assert module._columns([]) == {}


def test_hardware_is_that_of_a_worker_and_a_missing_mlflow_is_told(monkeypatch, caplog):
    assert hardware_tags(97)["hardware.workers"] == "97"

    def missing(*given, **more):
        raise ImportError("No module named 'mlflow'")

    monkeypatch.setattr("pipelines.tracking.base.MLflowTracker", missing)
    assert isinstance(open_tracker(settings(), "stage"), NullTracker)
    assert "this run is not tracked: No module named 'mlflow'" in caplog.text
