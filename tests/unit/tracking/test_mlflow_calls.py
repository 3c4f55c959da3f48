"""What the tracker asks of MLflow, call by call, and what it does with each kind of error."""

from __future__ import annotations

import os
import zlib
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.utils import validation as limits

from pipelines.settings import Settings
from pipelines.tracking import mlflow as module
from pipelines.tracking.base import continue_tracker, open_tracker
from pipelines.tracking.described import DataInput
from pipelines.tracking.identity import RunIdentity
from pipelines.tracking.mlflow import MLflowTracker
from pipelines.tracking.names import NameTable
from pipelines.tracking.outbox import MAX_BATCH_VALUES
from tests.mlflow_store import FakeStore

REFUSED = MlflowException("wrong " + "x" * 400, INVALID_PARAMETER_VALUE)
AWAY = MlflowException("later", TEMPORARILY_UNAVAILABLE)


def raising(error):
    def call(*given, **more):
        raise error

    return call


@pytest.fixture
def store(monkeypatch):
    found = FakeStore()
    monkeypatch.setattr(module, "open_client", lambda uri: found)
    return found


@pytest.fixture
def tracker(store):
    """A tracker whose entries are sent by hand."""
    made = object.__new__(MLflowTracker)
    made.run_id, made._client, made._is_new = "run0", store, True
    made._names, made._last_step, made._uri, made._experiment = NameTable(), {}, "one", "mine"
    return made


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (REFUSED, "MLflow refused 'tags': wrong xxx"),
        (FileNotFoundError("gone"), "'tags' cannot be sent to MLflow: gone"),
        (ValueError("odd"), "'tags' cannot be sent to MLflow: odd"),
        (TypeError("odd"), "'tags' cannot be sent to MLflow: odd"),
        (AWAY, None),
        (ConnectionError("no answer"), None),
    ],
)
def test_what_would_fail_again_is_named_and_dropped(tracker, monkeypatch, caplog, error, told):
    monkeypatch.setattr(tracker, "_deliver", raising(error))
    if told is None:
        with pytest.raises(type(error)):
            tracker._send([{"kind": "tags"}])
        assert caplog.text == ""
    else:
        tracker._send([{"kind": "tags"}])
        (message,) = caplog.messages
        assert message.startswith(told) and len(message) < 250


def test_a_tracker_without_a_connection_connects_before_it_sends(tracker, monkeypatch):
    client, tracker._client, delivered = tracker._client, None, []
    monkeypatch.setattr(tracker, "_connect", lambda: client)
    monkeypatch.setattr(tracker, "_deliver", lambda *given: delivered.append(given))
    tracker._send([{"kind": "end"}])
    assert delivered == [(client, [{"kind": "end"}])]


def test_a_run_that_is_refused_or_deleted_is_none_of_this_store():
    run = SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))
    client = SimpleNamespace(get_run=lambda run_id: run)
    assert module._get_run(client, "r") is run
    run.info.lifecycle_stage = "deleted"
    assert module._get_run(client, "r") is None
    assert module._get_run(SimpleNamespace(get_run=raising(REFUSED)), "r") is None
    with pytest.raises(MlflowException):
        module._get_run(SimpleNamespace(get_run=raising(AWAY)), "r")


def test_one_odd_item_does_not_take_the_others(tracker, caplog):
    sent = []

    def log(items):
        sent.append([item.key for item in items])
        if any(item.key == "odd" for item in items):
            raise REFUSED

    tracker._log_each(log, [SimpleNamespace(key=key) for key in ("a", "odd", "b")])
    assert sent == [["a", "odd", "b"], ["a"], ["odd"], ["b"]]
    assert [message[:22] for message in caplog.messages] == ["MLflow refused odd: wr"]
    with pytest.raises(MlflowException):
        tracker._log_each(raising(AWAY), [SimpleNamespace(key="a")])


def test_values_go_in_calls_of_so_many_and_only_new_steps(tracker, store, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "MAX_BATCH_VALUES", 2)
    monkeypatch.setattr(store, "log_batch", lambda run_id, metrics: calls.append([(m.key, m.step) for m in metrics]))
    tracker._last_step = {"a": 4}
    entries = [{"kind": "metrics", "values": {"a": "1.5", "b": 2}, "step": step, "at": 1} for step in (4, 5, 5, 0)]
    tracker._deliver_metrics(store, entries)
    assert calls == [[("b", 4), ("a", 5)], [("b", 5)]] and tracker._last_step == {"a": 5, "b": 5}


@pytest.mark.parametrize("arrived", [0, 1, 2], ids="{} calls arrived".format)
def test_values_that_did_not_arrive_are_sent_again_and_those_that_did_are_not(tracker, store, monkeypatch, arrived):
    """A call may also time out after the server has taken it."""
    monkeypatch.setattr(module, "MAX_BATCH_VALUES", 2)
    store.create_experiment("mine", None, {})
    run = store.create_run("0", 0, {}, "x")
    take, calls = store.log_batch, []

    def log(run_id, metrics):
        calls.append(len(metrics))
        if len(calls) <= arrived or len(calls) > 2:
            take(run_id, metrics)
        if len(calls) == 2:
            raise ConnectionError("no answer")

    monkeypatch.setattr(store, "log_batch", log)
    entries = [{"kind": "metrics", "values": {"a": 1.0, "b": 2.0}, "step": step, "at": 1} for step in (3, 4)]
    with pytest.raises(ConnectionError):
        tracker._send(entries)
    tracker._send(entries)
    for name in "ab":
        assert [metric.step for metric in run.data.metrics[name]] == [3, 4]


def test_a_history_that_cannot_be_read_costs_no_value(tracker, store, monkeypatch):
    tracker._is_new = False
    store.create_experiment("mine", None, {})
    run = store.create_run("0", 0, {}, "x")
    history, asked = store.get_metric_history, []

    def read(run_id, name):
        asked.append(name)
        if asked == ["a", "b"]:
            raise AWAY
        return history(run_id, name)

    monkeypatch.setattr(store, "get_metric_history", read)
    entries = [{"kind": "metrics", "values": {"a": 1.0, "b": 2.0}, "step": 5, "at": 1}]
    with pytest.raises(MlflowException):
        tracker._send(entries)
    tracker._send(entries)
    assert {name: [each.step for each in found] for name, found in run.data.metrics.items()} == {"a": [5], "b": [5]}


def test_a_resumed_run_begins_behind_its_history(tracker, store, monkeypatch):
    tracker._is_new = False
    history = {"a": [3, 7, 5], "b": []}
    monkeypatch.setattr(
        store, "get_metric_history", lambda run_id, name: [SimpleNamespace(step=s) for s in history[name]]
    )
    found = [tracker._new_values(store, {"values": {"a": 1.0, "b": 1.0}, "step": step}) for step in (0, 7, 8)]
    assert found == [{"b": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}]


def test_experiments_that_were_deleted_are_passed_over_until_there_are_too_many(tracker, store, caplog, monkeypatch):
    assert tracker._find_experiment(store) == "0" and not caplog.text
    assert tracker._find_experiment(store) == "0", "it is there"
    monkeypatch.setattr(module, "_MAX_EXPERIMENT_NAMES", 3)
    for name in ("mine", "mine-2"):
        store.experiments[name] = SimpleNamespace(experiment_id=name, lifecycle_stage="deleted")
    with pytest.raises(RuntimeError, match="3 experiments named 'mine' were deleted"):
        tracker._find_experiment(store)


@pytest.mark.parametrize(("given", "used"), [(None, "false"), ("true", "true")])
def test_mlflow_draws_no_bars_unless_the_environment_says_otherwise(store, monkeypatch, given, used):
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", given)
    open_tracker(Settings(tracking_uri="one"), "x").close()
    assert os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] == used


def test_a_server_that_does_not_answer_is_told_without_its_password(monkeypatch, caplog):
    monkeypatch.setattr(module, "open_client", raising(ConnectionError("no\n answer")))
    open_tracker(Settings(tracking_uri="http://me:secret@host"), "x").close()
    assert caplog.messages == ["entries for MLflow at http://***@host wait: no answer"], "told once"


def test_nothing_is_larger_than_mlflow_takes(tracker, store):
    assert MAX_BATCH_VALUES <= limits.MAX_METRICS_PER_BATCH
    assert module._BATCH_PARAMS == limits.MAX_PARAMS_TAGS_PER_BATCH
    assert (module._PARAM_LIMIT, module._TAG_LIMIT) == (limits.MAX_PARAM_VAL_LENGTH, limits.MAX_TAG_VAL_LENGTH)
    put = []
    tracker._outbox = SimpleNamespace(put=lambda kind, **data: put.append((kind, data)))
    tracker.params({"text": "x" * 9000, "a": {"b": "http://me:secret@host"}})
    tracker.describe("y" * 9000)
    assert put == [
        ("params", {"values": {"text": "x" * 6000, "a.b": "http://***@host"}}),
        ("tags", {"values": {"mlflow.note.content": "y" * 8000}}),
    ]


def test_errors_are_one_line_of_bounded_length_without_passwords():
    error = ValueError("a\n b http://me:secret@host " + "x" * 300)
    assert module.one_line(error).startswith("a b http://***@host xxx") and len(module.one_line(error)) <= 200
    cut = module.one_line(ValueError("x" * 180 + " http://me:secret@host"))
    assert "secret" not in cut and len(cut) <= 200


def test_a_table_is_emptied_only_where_it_is_there(store, monkeypatch):
    store.create_experiment("mine", None, {})
    store.create_run("0", 0, {}, "x")
    emptied = []
    write = store.log_text
    monkeypatch.setattr(store, "log_text", lambda *given: emptied.append(given[2]) or write(*given))
    for name in ("a.json", "deep/a.json", "a.json"):
        module._log_table(store, "run0", {"x": [1]}, name)
    assert emptied == ["a.json"]


def test_a_model_and_data_sets_are_of_their_kind(store):
    made = []
    store.search_logged_models = lambda experiments, query: []
    store.create_logged_model = lambda *given, **more: made.append((given, more)) or SimpleNamespace(model_id="m")
    store.create_experiment("mine", None, {})
    run = store.create_run("0", 0, {}, "x")
    module._log_model(store, run.info.run_id, "stage 1", "/out")
    more = {"source_run_id": "run0", "tags": {"location": "/out"}, "model_type": "checkpoint"}
    assert made == [(("0", "stage 1"), more)]
    found = module._as_input(DataInput("gqa", "9f", "s3://b/gqa", 12, "training"))
    assert (found.tags[0].key, found.tags[0].value) == ("mlflow.data.context", "training")
    assert (found.dataset.source, found.dataset.profile) == ('{"uri": "s3://b/gqa"}', '{"num_rows": 12}')


def test_a_model_that_was_made_and_not_finished_is_finished(tracker, store, monkeypatch):
    store.create_experiment("mine", None, {})
    store.create_run("0", 0, {}, "x")
    finish = store.finalize_logged_model
    monkeypatch.setattr(store, "finalize_logged_model", raising(ConnectionError("no answer")))
    entries = [{"kind": "model", "name": "stage 1", "location": "/out"}]
    with pytest.raises(ConnectionError):
        tracker._send(entries)
    monkeypatch.setattr(store, "finalize_logged_model", finish)
    for _ in range(2):
        tracker._send(entries)
    assert store.sent == [("model", "stage 1", "run0", "0", "/out"), ("m1", "READY")]


def test_odd_values_of_lists_are_text():
    assert module.flatten({"a": (1, {"b": PurePosixPath("/x")})}) == {"a": '[1, {"b": "/x"}]'}


def test_a_relative_database_has_its_artifacts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert module._artifact_location("sqlite:///x.db", "mine") == f"{tmp_path}/mlartifacts/mine"


def test_a_folder_for_the_identity_is_made(store, tmp_path):
    tracker = continue_tracker(Settings(tracking_uri="one"), "x", tmp_path / "a/b")
    tracker.close()
    assert (tmp_path / "a/b/run.json").is_file()


def test_two_keys_of_one_name_are_told_apart_and_told(caplog):
    caplog.set_level("INFO")
    table, mark = NameTable(), f"-{zlib.crc32(b'a?b'):08x}"
    assert [table.valid(key) for key in ("a+b", "a?b", "a+b", "plain")] == ["a_b", f"a_b{mark}", "a_b", "plain"]
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "'a+b' is logged as 'a_b'",
        f"'a?b' is logged as 'a_b{mark}'",
    ]
    long = [table.valid("x" * 249 + end) for end in "+?"]
    assert long[0] == "x" * 249 + "_" and long[1].startswith("x" * 241 + "-") and len(long[1]) == 250


def test_a_run_that_begins_now_has_its_name_and_the_time_of_now(store, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 12.5)
    MLflowTracker("one", "mine", "x", RunIdentity()).close()
    assert (store.runs["run0"].info.start_time, store.runs["run0"].info.run_name) == (12_500, "x")
    assert store.experiments["mine"].location is None, "the server decides"
    MLflowTracker("one", "other", "x", RunIdentity(), started=0.0).close()
    assert store.runs["run1"].info.start_time == 0


def test_artifacts_lie_in_a_folder_of_the_experiment_that_records_them(store, tmp_path):
    database = f"sqlite:///{tmp_path}/mlflow.db"
    MLflowTracker(database, "mine", "x", RunIdentity()).close()
    store.experiments["mine"].lifecycle_stage = "deleted"
    MLflowTracker(database, "mine", "x", RunIdentity()).close()
    locations = {name: experiment.location for name, experiment in store.experiments.items()}
    assert locations == {name: f"{tmp_path}/mlartifacts/{name}" for name in ("mine", "mine-2")}
