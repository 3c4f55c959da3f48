"""What an ingest asks for, in which order, and what it returns, without reading a sample."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines import storage
from pipelines.data.ingest import job
from pipelines.data.ingest.inputs import INPUTS, STAGING, SetInputs
from pipelines.data.ingest.publish import NothingKeptError
from pipelines.data.sources.base import Source, SourceInput, SourceUnit
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.storage import Location

SOURCE = SourceInput("laion", "/in", "", "mine", "pair")
UNITS = [SourceUnit(SOURCE, Location("", f"/in/{n}.tar"), f"{n}.tar") for n in range(3)]
COUNTS = {"rows_in": 9, "rows_out": 5, "filters": {"min_side": 4}, "units": 3, "reused_units": 2}


def settings(**changes):
    return PrepareDataSettings(source="laion", **{"num_workers": 0, **changes})


def test_what_is_tracked_of_an_ingest(tmp_path, monkeypatch):
    told = []

    class Tracker:
        def params(self, values):
            told.append(("params", values["source"], values["input"], values["min_words"]))

        def metrics(self, values, step):
            told.append(("metrics", values, step))

        def artifact(self, path, folder):
            told.append(("artifact", path.name, path.read_text(), folder))

        def close(self):
            told.append("closed")

    def open_tracker(settings, name, parent_run_id):
        told.append((settings.source, name, parent_run_id))
        return Tracker()

    monkeypatch.setattr(job, "open_tracker", open_tracker)
    for name in ("report.html", "report.json", "quarantine.jsonl"):
        (tmp_path / name).write_text(f"text of {name}")
    settings = PrepareDataSettings(source="laion", input="s3://me:secret@bucket/in", min_words=3)
    job._track(settings, "mine", {"rows_in": 3, "filters": {"a": 1}, "units": 2}, str(tmp_path), "parent")
    assert told[0] == ("laion", "prepare mine", "parent") and told[-1] == "closed"
    assert told[1][:2] == ("params", "laion") and "secret" not in told[1][2] and told[1][3] == 3
    assert told[2] == ("metrics", {"rows_in": 3, "units": 2}, 0)
    assert told[3:-1] == [
        ("artifact", name, f"text of {name}", "prepare_data")
        for name in ("report.html", "report.json", "quarantine.jsonl")
    ]


@pytest.mark.parametrize(
    ("finished", "overwrite", "replaces", "may_replace", "prepares"),
    [
        (False, False, False, False, True),
        (False, False, True, True, True),
        (True, False, True, True, False),
        (True, False, False, False, False),
        (True, True, False, True, True),
    ],
)
def test_a_finished_set_is_returned_and_every_other_is_prepared(
    tmp_path, monkeypatch, finished, overwrite, replaces, may_replace, prepares
):
    done, output = [], str(tmp_path / "out")
    reader = SimpleNamespace(plan=lambda source: iter(UNITS if source is SOURCE else []))
    known = {**COUNTS, "reused_units": 3}
    given = settings(overwrite=overwrite)
    inputs = SetInputs.of(SOURCE, UNITS, given)

    @contextmanager
    def alone(at):
        done.append(("alone", at))
        yield
        done.append("free")

    def note(name, result=None):
        monkeypatch.setattr(job, name, lambda *asked, **more: done.append((name, *asked, *more.values())) or result)

    monkeypatch.setattr(job, "locate", lambda asked: (Source("pair", reader), SOURCE))
    monkeypatch.setattr(job, "_output_folder", lambda asked, name: output if (asked, name) == (given, "mine") else "")
    monkeypatch.setattr(storage, "alone", alone)
    monkeypatch.setattr(storage, "remove_folder", lambda at: done.append(("remove", at)))
    monkeypatch.setattr(storage, "remove_drafts", lambda at: done.append(("drafts", at)))
    note("check_output")
    note("_finished_before", known if finished else None)
    note("_prepare", COUNTS)
    note("_track")
    result = job.ingest(given, parent_run_id="parent", replaces_other=replaces)
    assert done == [
        ("alone", output),
        ("check_output", output, inputs, may_replace),
        ("drafts", output),
        *([] if overwrite else [("_finished_before", output, inputs)]),
        *([("_prepare", given, "mine", UNITS, output, inputs)] if prepares else []),
        *([("_track", given, "mine", COUNTS, output, "parent")] if prepares else []),
        ("remove", f"{output}/_staging"),
        "free",
    ]
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    seconds = result.pop("seconds")
    assert 0 <= seconds < 60 and seconds == round(seconds, 2)
    assert result == {**(COUNTS if prepares else known), **job._locations(output)}


def test_an_input_without_entries_writes_nothing(tmp_path, monkeypatch):
    reader = SimpleNamespace(plan=lambda source: iter([]))
    monkeypatch.setattr(job, "locate", lambda given: (Source("pair", reader), SOURCE))
    with pytest.raises(SettingsError, match=r"^input='/in/x' holds no entries: is it the right file\?$"):
        job.ingest(settings(input="/in/x", output=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_units_outcome_is_that_of_its_record(monkeypatch):
    given, asked = settings(), []
    record = SimpleNamespace(rows_in=7, rows=5)
    monkeypatch.setattr(job, "stage_unit", lambda *words: asked.append(words) or (record, True))
    assert job._unit_reader(given, "/staging")((2, UNITS[2])) == job.UnitOutcome(7, 5, True)
    assert asked == [(UNITS[2], 2, given, "/staging")]


@pytest.fixture
def preparing(tmp_path, monkeypatch):
    """Notes what ``_prepare`` does, and which files are there when the units are read; ``kept`` is what comes out."""
    done = {"kept": {"rows_in": 9, "rows_out": 5, "filters": {"min_side": 2}}}

    def run_units(given, units, staging):
        there = {name for name in (INPUTS, "manifest.json") if (tmp_path / name).exists()}
        done.update(units=units, there=there, staged={path.name for path in (tmp_path / STAGING).iterdir()})
        assert staging == f"{tmp_path}/_staging"
        return 2

    def publish(given, name, output, staged, write):
        done.update(published=(name, output, staged.folder, staged.num_units), write=(write.func, write.args))
        if done["kept"] is None:
            raise NothingKeptError("none")
        return done["kept"]

    @contextmanager
    def start_ray(given):
        done["ray"] = given
        yield

    monkeypatch.setattr(job, "_run_units", run_units)
    monkeypatch.setattr(job, "publish", publish)
    monkeypatch.setattr(job, "start_ray", start_ray)
    monkeypatch.setattr(job.Staging, "missing", lambda staged: [("", "/a.jpg")])
    return done


def prepare(tmp_path, **changes):
    given = settings(**changes)
    inputs = SetInputs.of(SOURCE, UNITS, given)
    return job._prepare(given, "mine", UNITS, str(tmp_path), inputs), inputs


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("replaces", [False, True])
def test_what_an_interrupted_run_staged_is_kept_and_a_finished_set_is_not_reused(
    tmp_path, preparing, num_workers, replaces
):
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "unit-000000.json").touch()
    (tmp_path / "manifest.json").touch()
    if replaces:
        (tmp_path / INPUTS).touch()
    counts, inputs = prepare(tmp_path, num_workers=num_workers)
    assert counts == {**preparing["kept"], "units": 3, "reused_units": 2}
    assert preparing["units"] == UNITS and preparing["there"] == set()
    assert preparing["staged"] == (set() if replaces else {"unit-000000.json"})
    assert preparing["published"] == ("mine", str(tmp_path), f"{tmp_path}/_staging", 3)
    assert preparing["write"] == (job._write_shards, (settings(num_workers=num_workers),))
    assert ("ray" in preparing) is bool(num_workers), "without workers there is no cluster"
    known = SetInputs.read(str(tmp_path))
    assert known.missing == (("", "/a.jpg"),) and known.difference(inputs) == ""


def test_where_nothing_was_kept_no_work_and_no_inputs_are_left(tmp_path, preparing):
    preparing["kept"] = None
    with pytest.raises(NothingKeptError):
        prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_set_is_the_same_input_sound_and_without_new_images(tmp_path, monkeypatch, caplog):
    out = str(tmp_path)
    inputs = job.SetInputs("mark", 7, {"input": "a"}, (("a.tar", 1, 2),), {"min_words": 1})
    state = {"damage": None}

    class Set:
        manifest = type("Manifest", (), {"counts": {"rows_in": 3, "rows_out": 2}})

        def verify(self):
            if state["damage"]:
                raise state["damage"]

    monkeypatch.setattr(job.ShardSet, "open", lambda output: Set())
    assert job._finished_before(out, inputs) is None, "nothing there"
    inputs.write(out, [])
    assert job._finished_before(out, inputs) == {"rows_in": 3, "rows_out": 2, "units": 7, "reused_units": 7}
    assert job._finished_before(out, replace(inputs, fingerprint="other")) is None
    for damage, told in ((job.ShardError("part-0 is damaged"), "part-0 is damaged"), (FileNotFoundError("x"), "")):
        state["damage"] = damage
        caplog.clear()
        assert job._finished_before(out, inputs) is None and told in caplog.text and bool(told) == bool(caplog.text)
    state["damage"] = None
    caplog.clear()
    (tmp_path / "new.jpg").touch()
    inputs.write(out, [("", str(tmp_path / "new.jpg"))])
    assert job._finished_before(out, inputs) is None
    assert f"{out}: images that were missing are there now; the data is prepared again." in caplog.text
    assert json.loads((tmp_path / "inputs.json").read_text())["units"] == 7
