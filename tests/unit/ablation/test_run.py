"""The matrix without training: what each variant and stage is given, what follows a failure, what is compared."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.ablation import run as matrix
from pipelines.ablation import variant_run
from pipelines.ablation.run import _fingerprint, _rows, ablate
from pipelines.ablation.variant_run import SharedInputs, StageStatus, VariantOutcome, run_variant
from pipelines.ablation.variants import find_variant, with_precision
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import AblateSettings, SettingsError
from pipelines.tracking.base import NullTracker
from pipelines.units import UnitsLostError

NORMS = {"projector": 1.0, "lora/layer_00": 0.3}


def write_record(folder, losses, norm=1.0):
    """Steps of a stage, numbered from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": n, "loss": loss, "grad_norm": 2.0, "lr": 0.1, "part_norms": {"projector": norm}}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Recording(NullTracker):
    """Notes what it is told."""

    run_id: str = "parent"
    told: dict = field(default_factory=dict)
    points: list = field(default_factory=list)
    files: list = field(default_factory=list)
    status: str = ""

    def params(self, values):
        self.told |= values

    def metrics(self, values, step):
        self.points.append((step, values))

    def artifact(self, path, folder=""):
        assert path.is_file(), f"{path} is sent before it is written"
        self.files.append(path.name)

    def table(self, rows, name):
        self.told[name] = rows

    def close(self, status="FINISHED"):
        self.status = status


# ---------------------------------------------------------------------- one variant


class Stages:
    """Stands for the training job: notes its settings, answers as told."""

    def __init__(self, monkeypatch, folder):
        self.asked, self.scored, self.answers, self.tracker = [], [], {}, Recording()
        monkeypatch.setattr(variant_run, "run_stage", self.train)
        monkeypatch.setattr(variant_run, "evaluate", self.score)
        monkeypatch.setattr(variant_run, "continue_tracker", self.track)
        monkeypatch.setattr(variant_run, "write_start", lambda variant, start, to: Path(start))
        self.shared = SharedInputs("/data", "/start", "/bench", str(folder), "parent run")

    def train(self, settings, number):
        self.asked.append((number, settings))
        answer = self.answers.get(number, 1.5)
        if isinstance(answer, Exception):
            raise answer
        write_record(Path(settings.output), [3.0] * 11 + [answer if math.isfinite(answer) else 0.0])
        return {"last_loss": answer, "checkpoint": f"{settings.output}/checkpoint"}

    def score(self, settings):
        self.scored.append(settings)
        return {"benchmarks": {"miniature_vqa": {"value": 51.0, "blind": None, "shuffled": None}}}

    def track(self, settings, name, folder, parent_run_id):
        self.name, self.parent = name, parent_run_id
        return self.tracker

    def run(self, variant="full", precision="fp32", **settings):
        chosen = {"stages": [2, 3], "recipe": "mini", "tracking_uri": "none", **settings}
        return run_variant(AblateSettings(**chosen), with_precision(find_variant(variant), precision), self.shared)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    return Stages(monkeypatch, tmp_path)


def test_each_stage_starts_from_the_one_before_with_the_ablations_settings(stages, tmp_path):
    outcome = stages.run(
        "stage.lora_rank=4,train.attention=eager",
        "bf16",
        recipe="paper",
        seed=7,
        max_steps=12,
        features="inline",
        threads_per_worker=2,
        use_gpu=True,
        train={"attention": "sdpa", "packing": True},
        stage={"draws_per_step": 1},
    )
    (first, one), (second, other) = stages.asked
    folder = f"{tmp_path}/stage.lora_rank_4_train.attention_eager-bf16"
    assert (first, second) == (2, 3) and outcome.stages == {2: StageStatus("trained"), 3: StageStatus("trained")}
    assert (one.init_from, other.init_from) == ("/start", f"{folder}/stage2/checkpoint")
    assert (one.output, other.output) == (f"{folder}/stage2", f"{folder}/stage3")
    assert (one.data, one.seed, one.max_steps, one.features, one.threads_per_worker) == ("/data", 7, 12, "inline", 2)
    assert (one.guard, one.log_every, one.num_workers, one.tracking_uri) == ("off", 1, 0, "none")
    assert one.use_gpu is True and (one.recipe, one.quiet, one.loader_workers) == ("paper", True, 0)
    assert (one.precision, one.packing, one.attention) == ("bf16", True, "eager"), "the variant's own key wins"
    assert one.stage == {"draws_per_step": 1, "lora_rank": 4}
    (score,) = stages.scored
    assert (score.checkpoint, score.data, score.limit) == (f"{folder}/stage3/checkpoint", "/bench", 200)
    assert (score.gpus_per_worker, score.num_workers, score.threads_per_worker) == (1, 0, 2)
    assert (score.recipe, score.benchmark, score.page_cases) == ("paper", "miniature_vqa", 0)
    assert (score.quiet, score.tracking_uri) == (True, "none")
    assert score.output == f"{folder}/score" and outcome.scores["miniature_vqa"]["value"] == 51.0
    assert stages.parent == "parent run" and stages.tracker.status == "FINISHED"
    assert stages.tracker.told["precision"] == "bf16" and stages.tracker.told["seed"] == 7


def test_curves_are_sent_under_common_names_with_norms_at_every_fifth_step(stages):
    stages.run(stages=[2])
    assert (stages.asked[0][1].use_gpu, stages.scored[0].gpus_per_worker) == (False, 0)
    points = stages.tracker.points
    assert [step for step, _ in points] == [*range(12), 0]
    assert points[1][1] == {"loss/stage2": 3.0, "norms/stage2": 2.0, "lr/stage2": 0.1}
    with_norms = [step for step, values in points if "norms/stage2/projector" in values]
    assert with_norms == [0, 5, 10] and points[11][1]["loss/stage2"] == 1.5
    assert points[-1] == (0, {"score/miniature_vqa": 51.0})


def test_nothing_follows_a_stage_that_ends_without_a_finite_loss(stages):
    stages.answers[2] = math.nan
    outcome = stages.run()
    assert outcome.stages == {2: StageStatus("trained", "its last loss is not finite")}
    assert [number for number, _ in stages.asked] == [2] and stages.scored == [] and outcome.scores == {}
    assert stages.tracker.status == "FINISHED"


def test_a_failure_ends_the_variant_and_names_its_stage(stages):
    stages.answers[3] = RuntimeError("no memory")
    outcome = stages.run(stages=[2, 3, 4])
    assert outcome.stages == {2: StageStatus("trained"), 3: StageStatus("failed", "RuntimeError: no memory")}
    assert stages.tracker.status == "FAILED" and stages.scored == []


def test_a_failing_score_is_noted_at_the_last_stage_and_no_score_is_asked_for_where_none_is_named(stages, monkeypatch):
    def failing(settings):
        raise RuntimeError("no questions")

    monkeypatch.setattr(variant_run, "evaluate", failing)
    outcome = stages.run()
    assert outcome.stages[3] == StageStatus("trained", "RuntimeError: no questions")
    assert stages.run(benchmark="").stages[3] == StageStatus("trained")


def test_a_mistake_in_the_command_is_raised(stages):
    stages.answers[2] = OtherInputsError("other inputs")
    with pytest.raises(OtherInputsError):
        stages.run()
    assert stages.tracker.status == "FAILED"


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


class Passes(list):
    """Number of stages of each pass of features; ``reported`` is what the report was made of."""


@pytest.fixture
def stubbed(monkeypatch):
    """``ablate`` whose variants are not run, but answer at once."""
    tracker, features = Recording(), Passes()

    def finish(setup, variants, workers, settings, name):
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
    monkeypatch.setattr(matrix, "start_ray", lambda settings: nullcontext())
    monkeypatch.setattr(matrix, "_shared_inputs", shared)
    monkeypatch.setattr(matrix, "write_report", report)
    monkeypatch.setattr(matrix, "continue_tracker", lambda *arguments, **more: tracker)
    monkeypatch.setattr(matrix, "cache_stage_features", lambda stages, make: features.append(len(stages)))
    return tracker, features


def test_a_result_is_written_before_it_is_sent_and_a_lost_variant_is_a_failed_one(stubbed, tmp_path, monkeypatch):
    tracker, features = stubbed
    parents, checked, claimed, claim = [], [], [], matrix.claim
    monkeypatch.setattr(matrix.storage, "check_access", lambda place, *, writes: checked.append((place.uri, writes)))
    published, publish = [], matrix.storage.WorkFolder.publish
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
