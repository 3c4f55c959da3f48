"""What an export is made from, measured on and recorded as; tests/unit/quantization makes real artifacts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from pipelines import export as module
from pipelines import storage
from pipelines.export import ExportError, held_out_rows
from pipelines.miniature.tiny_training import make_rows, write_shard_set
from pipelines.settings import QuantizeSettings, SettingsError
from pipelines.tracking.base import NullTracker
from pipelines.tracking.described import run_title
from tinygptv.data.prompts import INSTRUCTIONS


@pytest.fixture
def sets(tmp_path):
    for name, count in (("a", 10), ("b", 2), ("c", 10)):
        write_shard_set(tmp_path / name, make_rows("pairs", count))
    return tmp_path


def test_held_out_rows_are_drawn_from_all_sets_in_turn(sets):
    rows, where = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=8))
    assert where == str(sets) and len(rows) == 8
    again, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=8))
    other, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=8, seed=1))
    assert [row.id for row in rows] == [row.id for row in again] != [row.id for row in other]
    most, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=3))
    assert [row.id for row in most] == [row.id for row in rows[:3]], "a row of each"
    two, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=2))
    assert [row.id for row in two] == [row.id for row in rows[:2]]
    rest, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=20))
    assert len(rest) == 20, "a small set's share goes to the others"
    assert [row.id for row in rest[:6]] == [row.id for row in rows[:6]]
    everything, _ = held_out_rows(QuantizeSettings(data=str(sets), drift_samples=64))
    assert len(everything) == 22
    alone, _ = held_out_rows(QuantizeSettings(data=str(sets / "b"), drift_samples=64))
    assert sorted(row.id for row in alone) == ["p0", "p1"], "no row twice"
    with pytest.raises(SettingsError) as caught:
        held_out_rows(QuantizeSettings(data=f"{sets}/none"))
    wanted = "the folder of prepared shard sets (jobs/prepare_data.py)"
    assert str(caught.value) == f"data={sets}/none does not exist: give {wanted}."
    (sets / "bare").mkdir()
    with pytest.raises(
        FileNotFoundError, match=f"^data={sets}/bare holds no shard set: make one with jobs/prepare_data"
    ):
        held_out_rows(QuantizeSettings(data=f"{sets}/bare"))
    write_shard_set(sets / "empty", [])
    with pytest.raises(FileNotFoundError, match=f"the shard sets in data={sets}/empty have no rows: leave data empty"):
        held_out_rows(QuantizeSettings(data=str(sets / "empty")))


def test_drawn_rows_are_of_every_kind_and_of_held_out_scenes():
    rows, where = held_out_rows(QuantizeSettings(drift_samples=20))
    assert where == "drawn scenes of the miniature, split test" and len(rows) == 20
    assert [row.id for row in rows] == [f"drawn-{number}" for number in range(20)]
    assert {row.task for row in rows} == set(INSTRUCTIONS)
    (other,), _ = held_out_rows(QuantizeSettings(drift_samples=1, seed=3))
    assert other != rows[0] and [other] == module.drawn_rows(1, 3)
    assert all((row.image is None) == (row.task == "text") for row in rows)


@pytest.mark.parametrize(("loss", "passes"), [(0.5, True), (-1.0, True), (0.5001, False), (math.nan, False)])
def test_a_drift_at_the_bound_passes(loss, passes):
    drift = SimpleNamespace(loss=loss, full_loss=1.0, quantized_loss=1.0 + loss)
    if passes:
        module._accept(drift, QuantizeSettings(max_drift=0.5))
    else:
        with pytest.raises(ExportError, match=r"more than max_drift=0\.5"):
            module._accept(drift, QuantizeSettings(max_drift=0.5))


def test_what_decides_an_artifact_is_its_identity(sets, monkeypatch):
    monkeypatch.setattr(module, "checkpoint_digest", lambda folder: f"digest of {folder == sets}")
    base = QuantizeSettings()
    changes = {
        "method": "cpu4",
        "encoder": "half",
        "keep_lora": True,
        "drift_samples": 3,
        "max_drift": 1.0,
        "seed": 5,
        "data": str(sets),
    }
    marks = [module._fingerprint(base.model_copy(update={key: value}), sets) for key, value in changes.items()]
    assert all(mark != module._fingerprint(base, sets) for mark in marks)
    assert [marks[0].inputs[key] for key in ("job", "checkpoint")] == ["quantize", "digest of True"]
    same = base.model_copy(update={"register_as": "x", "alias": "y", "output": "z", "overwrite": True})
    assert module._fingerprint(same, sets) == module._fingerprint(base, sets)
    monkeypatch.setattr(module, "checkpoint_digest", lambda folder: "another")
    assert module._fingerprint(base, sets).inputs["checkpoint"] == "another"


class Recording(NullTracker):
    run_id = "run1"

    def __init__(self):
        self.told, self.status = {}, ""

    def params(self, values):
        self.told |= values

    def metrics(self, values, step):
        assert step == 0
        self.told |= values

    def tags(self, values):
        self.told["tags"] = values

    def describe(self, text):
        self.told["description"] = text

    def artifact(self, path, folder=""):
        self.told["file"] = path

    def close(self, status="FINISHED"):
        self.status = status


def test_numbers_of_the_drift_are_logged_and_registered(tmp_path, monkeypatch):
    registered = []
    tracker = Recording()
    monkeypatch.setattr(module, "NullTracker", type("Off", (), {}))
    begun = {}
    monkeypatch.setattr(module, "open_tracker", lambda *given, **how: begun.update(how, given=given) or tracker)
    monkeypatch.setattr(module, "register_model", lambda *given: registered.append(given) or 7)
    drift = {"loss": 0.01234567, "full_loss": 1.5, "quantized_loss": 1.51234, "answer_agreement": 0.75}
    drift |= {"num_answers": 4, "data": "x", "seed": 3, "max_loss": 0.5}
    metadata = {"bytes": 9, "method": "cpu4", "bits_per_weight": 4.6, "drift": drift}
    settings = QuantizeSettings(method="cpu4", register_as="tiny", alias="new")
    assert module._track(settings, "/checkpoint", tmp_path, metadata, 1e9) == 7
    shown = {"quantized/bytes": 9, "quantized/drift_loss": 0.01234567, "quantized/answer_agreement": 0.75}
    assert {key: tracker.told[key] for key in tracker.told if "/" in key} == shown
    assert (tracker.told["checkpoint"], tracker.status) == ("/checkpoint", "FINISHED")
    assert (tracker.told["alias"], tracker.told["drift_samples"]) == ("new", settings.drift_samples)
    (given, title) = begun["given"]
    assert given is settings and begun["started"] == 1e9 and title == run_title("mini", "quantize cpu4", 1e9)
    assert tracker.told["tags"] == {"checkpoint": "/checkpoint", "method": "cpu4"}
    head, _, *lines = tracker.told["description"].splitlines()
    names = ["model", "held-out loss", "MB", "bits per weight", "equal greedy answers"]
    assert [name.strip() for name in head.replace("&emsp;", "").strip("|").split("|")] == names
    assert lines == [
        "| full&emsp; | 1.5&emsp; | &emsp; | &emsp; |  |",
        "| cpu4&emsp; | 1.512&emsp; | 9e-06&emsp; | 4.6&emsp; | 75.0% of 4 |",
    ]
    (by, run_id, folder, name, alias, tags) = registered[0]
    assert by is settings
    assert (run_id, folder, name, alias, tags["drift.loss"]) == ("run1", tmp_path, "tiny", "new", "0.01235")
    assert "drift.seed" not in tags and tags["drift.num_answers"] == "4"
    assert (tags["method"], tags["bytes"]) == ("cpu4", "9")
    assert tracker.told["file"] == tmp_path / "quantization.json"
    tracker.status = ""
    assert module._track(settings.model_copy(update={"register_as": ""}), "/c", tmp_path, metadata, 1e9) is None
    assert tracker.status == "FINISHED" and len(registered) == 1


def test_an_artifact_is_registered_later_without_being_made_again(tmp_path, monkeypatch, caplog):
    finished = {"version": None, "bytes": 9, "artifact": "a"}
    metadata = {"bytes": 9, "drift": {"loss": 0.25, "answer_agreement": 0.5}}
    monkeypatch.setattr(module, "checked_checkpoint", lambda location: tmp_path)
    monkeypatch.setattr(module, "_fingerprint", lambda settings, start: None)
    again = []
    monkeypatch.setattr(module, "_finished_result", lambda *given, overwrite: again.append(overwrite) or finished)
    monkeypatch.setattr(module, "_write", lambda *given: pytest.fail("it is there"))
    monkeypatch.setattr(module, "read_metadata", lambda folder: metadata)
    monkeypatch.setattr(module, "_track", lambda *given: 3)
    (tmp_path / "out").mkdir()
    fields = {"checkpoint": str(tmp_path / "c"), "output": str(tmp_path / "out")}
    caplog.set_level("INFO")
    assert module.export(QuantizeSettings(**fields)) is finished
    assert caplog.messages == [f"the artifact is finished already: {tmp_path}/out"]
    result = module.export(QuantizeSettings(**fields, register_as="tiny"))
    assert (result["version"], result["drift"], result["answer_agreement"]) == (3, 0.25, 0.5)
    finished["version"] = 3
    assert module.export(QuantizeSettings(**fields, register_as="tiny", overwrite=True)) is finished
    assert again == [False, False, True], "as the settings say"


def test_methods_of_gpus_are_rounded_and_measured_on_one_where_it_has_room(monkeypatch):
    import torch

    parameter = SimpleNamespace(nbytes=3 << 30)
    model = SimpleNamespace(parameters=lambda: [parameter, parameter])
    for there, expected in ((True, ["cuda", "cpu"]), (False, ["cpu", "cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert [module._device(QuantizeSettings(method=method)).type for method in ("nf4", "cpu4")] == expected
    for free, kind in ((8 << 30, "cuda"), ((8 << 30) - 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert module._measuring_device(model, torch.device("cuda")).type == kind
    assert module._measuring_device(model, torch.device("cpu")).type == "cpu"


def test_what_an_output_holds_already(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "local_checkpoint", lambda uri: f"copy of {uri}")
    place = f"memory://exports/{tmp_path.name}"
    output = storage.Location.parse(place)
    assert module._earlier_artifact(storage.Location.parse(str(tmp_path))) == tmp_path
    assert module._earlier_artifact(output) is None
    storage.write_atomically(f"{place}/notes.txt", b"x")
    with pytest.raises(SettingsError, match="holds something that is no artifact"):
        module._earlier_artifact(output)
    storage.write_atomically(f"{place}/quantization.json", b"{}")
    assert module._earlier_artifact(output) is None, "one that was not finished"
    storage.write_atomically(f"{place}/manifest.json", b"{}")
    assert module._earlier_artifact(output) == f"copy of {place}"
