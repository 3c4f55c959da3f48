"""The matrix without training: what all variants share, what is compared, what is written and sent when."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.ablation import run as matrix
from pipelines.ablation.run import _fingerprint, _rows, ablate
from pipelines.ablation.variant_run import SharedInputs, StageStatus, VariantOutcome
from pipelines.ablation.variants import find_variant, with_precision
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import AblateSettings, SettingsError
from pipelines.units import UnitsLostError
from tests.ablation_stand_ins import Recording, write_record

# ---------------------------------------------------------------------- the matrix


def test_what_all_variants_share_is_their_identity():
    base = AblateSettings(recipe="mini")
    shared = {
        "seed": 1,
        "max_steps": 7,
        "benchmark": "",
        "score_limit": 3,
        "stage": {"lora_rank": 2},
        "train": {"packing": True},
        "world_scenes": 9,
        "data": "/data",
    }
    marks = [_fingerprint(base.model_copy(update={key: value})) for key, value in shared.items()]
    assert all(mark != _fingerprint(base) for mark in marks)
    own = {"variants": ["full"], "stages": [1], "precisions": ["bf16"], "num_workers": 0, "features": "inline"}
    assert _fingerprint(base.model_copy(update=own)) == _fingerprint(base)
    given = base.model_copy(update={"data": "/data"})
    assert _fingerprint(given) == _fingerprint(given.model_copy(update={"world_scenes": 9}))


def test_gradients_are_compared_with_the_full_model_at_the_same_precision(tmp_path):
    settings = AblateSettings(recipe="mini", stages=[2, 3])
    shared = SharedInputs("", "", "", str(tmp_path), "")
    for name, norm in (("full", 1.0), ("full-bf16", 1e-9), ("no_lora", 1e-9), ("no_lora-bf16", 1e-9)):
        write_record(tmp_path / name / "stage2", [2.0] * 20, norm)
    variants = [with_precision(find_variant("no_lora"), precision) for precision in ("fp32", "bf16")]
    trained = VariantOutcome({2: StageStatus("trained", "a note")}, {"vqa": {"value": 1.0}})
    outcomes = {variant.name: trained for variant in variants}
    first, second = _rows(settings, variants, shared, outcomes)
    assert [outcome.cell for outcome in first.outcomes] == ["gradient vanishing at step 0 (projector)", "not run"]
    assert [outcome.cell for outcome in second.outcomes] == ["2.000", "not run"]
    assert (second.variant, second.precision) == (variants[1], "bf16")
    assert [outcome.note for outcome in first.outcomes] == [
        "a note",
        "the stage before failed, or ended without a finite loss",
    ]
    assert (first.precision, first.scores, len(first.records[2]), first.records[3]) == (
        "fp32",
        {"vqa": {"value": 1.0}},
        20,
        [],
    )


def test_where_full_was_not_run_a_variant_is_its_own_measure(tmp_path):
    settings = AblateSettings(recipe="mini", stages=[4])
    shared = SharedInputs("", "", "", str(tmp_path), "")
    variant = with_precision(find_variant("no_qk_norm"), "bf16")
    write_record(tmp_path / "no_qk_norm-bf16/stage4", [3.0] * 30, norms=[0.5] * 12 + [1e-4] * 18)
    write_record(tmp_path / "full/stage4", [3.0] * 30, norms=[1e-2] * 30)  # at another precision
    write_record(tmp_path / "full-bf16/stage3", [3.0] * 30, norms=[1e-2] * 30)  # in another stage
    (row,) = _rows(settings, [variant], shared, {variant.name: VariantOutcome({4: StageStatus("trained")})})
    assert [outcome.cell for outcome in row.outcomes] == ["gradient vanishing at step 12 (projector)"]
    assert row.outcomes[0].stage == 4 and [entry["step"] for entry in row.records[4]] == list(range(30))


class Passes(list):
    """Number of stages of each pass of features, ``made`` with what; ``reported`` is what the report was made of."""

    def __init__(self):
        super().__init__()
        self.made = []


@pytest.fixture
def stubbed(monkeypatch):
    """``ablate`` whose variants are not run, but answer at once."""
    tracker, features = Recording(), Passes()

    def finish(setup, variants, workers, settings, name):
        assert tracker.told["cluster"] == "up", "variants are tasks of the cluster"
        output = settings_seen[0].output
        for variant in variants[:-1]:
            for number in settings.stages:
                write_record(Path(output, variant.name, f"stage{number}"), [2.0] * 12)
            yield variant, VariantOutcome({number: StageStatus("trained") for number in settings.stages})
        raise UnitsLostError([variants[-1]])

    settings_seen = []

    def shared(settings, work, parent_run_id):
        settings_seen.append(SharedInputs("/data", "/start", "", work.uri(), parent_run_id))
        return settings_seen[0]

    def report(output, rows, settings, seconds):
        features.reported = ([row.variant.name for row in rows], settings, seconds)
        for name in ("report.md", "report.html", "losses.png"):
            (output / name).write_text(name)
        return {
            "report": str(output / "report.md"),
            "page": str(output / "report.html"),
            "plots": [str(output / "losses.png")],
        }

    monkeypatch.setattr(matrix, "map_units", finish)
    monkeypatch.setattr(matrix, "start_ray", tracker.cluster)
    monkeypatch.setattr(matrix, "_shared_inputs", shared)
    monkeypatch.setattr(matrix, "write_report", report)
    monkeypatch.setattr(matrix, "continue_tracker", tracker.begin)
    monkeypatch.setattr(
        matrix, "cache_stage_features", lambda stages, make: features.append(len(stages)) or features.made.append(make)
    )
    return tracker, features


def test_a_result_is_written_before_it_is_sent_and_a_lost_variant_is_a_failed_one(stubbed, tmp_path, monkeypatch):
    tracker, features = stubbed
    parents, checked, claimed, claim = [], [], [], matrix.claim
    monkeypatch.setattr(matrix.storage, "check_access", lambda place, *, writes: checked.append((place.uri, writes)))
    fetched, published, publish = [], [], matrix.storage.WorkFolder.publish
    monkeypatch.setattr(matrix.storage.WorkFolder, "fetch", lambda work, *names: fetched.append(names))
    monkeypatch.setattr(
        matrix.storage.WorkFolder,
        "publish",
        lambda work, *names: published.append((*names, dict(tracker.told), tracker.files[:])) or publish(work, *names),
    )
    monkeypatch.setattr(matrix, "time", SimpleNamespace(perf_counter=iter((10.0, 70.0, 85.26, 90.0)).__next__))
    monkeypatch.setattr(matrix, "claim", lambda *given, **more: claimed.append((given, more)) or claim(*given, **more))
    shared = matrix._shared_inputs
    monkeypatch.setattr(matrix, "_shared_inputs", lambda *given: parents.append(given[2]) or shared(*given))
    settings = AblateSettings(
        recipe="mini",
        variants=["full", "no_lora"],
        precisions=["fp32"],
        stages=[2, 3],
        output=str(tmp_path / "out"),
        quiet=True,
    )
    result = ablate(settings)
    assert [(row["variant"], [s["cell"] for s in row["stages"].values()]) for row in result["rows"]] == [
        ("full", ["2.000", "2.000"]),
        ("no_lora", ["failed", "not run"]),
    ]
    assert "its process died" in result["rows"][1]["stages"]["2"]["note"]
    assert json.loads((tmp_path / "out/result.json").read_text()) == json.loads(json.dumps(result))
    assert result["plots"] == [f"{tmp_path}/out/losses.png"] and result["result"] == f"{tmp_path}/out/result.json"
    assert tracker.files == ["report.md", "report.html", "losses.png", "result.json"] and tracker.status == "FINISHED"
    assert tracker.told["ablation"] == result["table"] and features == [2]
    assert [(row["precision"], row["stage 2"]) for row in result["table"]] == [("fp32", "2.000"), ("fp32", "failed")]
    assert parents == ["parent"], "the variants' runs lie below the ablation's"
    assert checked == [(f"{tmp_path}/out", True)]
    first, last = published
    assert first == ("run.json", {}, []), "before anything is told"
    assert len(last) == 2 and last[1][-1] == "result.json", "all of the folder, when all is told"
    names, used, seconds = features.reported
    assert (names, seconds, result["seconds"]) == (["full", "no_lora"], 60.0, 75.3)
    assert used == settings.model_copy(update={"tracking_uri": used.tracking_uri}) and "://" in used.tracking_uri
    begun, title, folder = tracker.begun
    assert begun == used and title.startswith("mini ablation, ") and folder == tmp_path / "out"
    assert tracker.told.items() >= {**used.model_dump(), "cluster": "down"}.items(), "settings are the run's parameters"
    (make,) = features.made
    assert make.args == (used, SharedInputs("/data", "/start", "", f"{tmp_path}/out", "parent"))
    assert fetched[0] == ("run.json", "unsent.jsonl"), "an earlier run of the tracker is continued"
    (((place, mark, files), more),) = claimed
    assert (place, mark, files) == (f"{tmp_path}/out", _fingerprint(settings), ["full", "no_lora", *matrix._RESULTS])
    assert more == {"overwrite": False, "inputs": ["", "", ""]}
    with pytest.raises(OtherInputsError, match="seed was 0, is now 1"):
        ablate(settings.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(("how", "data", "passes"), [("cached", "", 1), ("cached", "given", 1), ("inline", "", 0)])
def test_features_are_cached_before_the_variants_run_unless_they_are_inline(stubbed, tmp_path, how, data, passes):
    _, features = stubbed
    if data:
        (tmp_path / data).mkdir()
    settings = AblateSettings(
        recipe="mini", variants=["full"], precisions=["fp32"], stages=[2], features=how, benchmark="", quiet=True,
        data=data and str(tmp_path / data), output=str(tmp_path / "out"),
    )  # fmt: skip
    ablate(settings)
    assert features == [1] * passes


def test_a_variant_that_was_killed_in_the_middle_of_a_line_is_in_the_report(stubbed, tmp_path):
    write_record(tmp_path / "out/full/stage2", [2.0] * 3)
    with (tmp_path / "out/full/stage2/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    settings = AblateSettings(
        recipe="mini", variants=["full"], precisions=["fp32"], stages=[2], features="inline", quiet=True,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    rows = _rows(
        settings, [with_precision(find_variant("full"), "fp32")], SharedInputs("", "", "", str(tmp_path / "out"), ""),
        {"full": VariantOutcome({2: StageStatus("failed", "its process died")})},
    )  # fmt: skip
    assert rows[0].outcomes[0].cell == "failed" and [each["step"] for each in rows[0].records[2]] == [0, 1, 2]


def test_an_empty_matrix_is_refused():
    for changes in ({"variants": []}, {"precisions": []}, {"stages": []}):
        with pytest.raises(SettingsError, match="an ablation needs at least one of variants=, precisions= and stages="):
            ablate(AblateSettings(recipe="mini", **changes))
