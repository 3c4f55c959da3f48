"""One variant without training: what each stage and the score are given, what follows a failure, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.ablation import variant_run
from pipelines.ablation.variant_run import SharedInputs, StageStatus, VariantOutcome, run_variant
from pipelines.ablation.variants import find_variant, with_precision
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import AblateSettings
from tests.ablation_stand_ins import Recording, write_record


class Stages:
    """Stands for the training job: notes its settings, answers as told."""

    def __init__(self, monkeypatch, folder):
        self.asked, self.scored, self.answers, self.tracker = [], [], {}, Recording()
        self.fault = None
        monkeypatch.setattr(variant_run, "run_stage", self.train)
        monkeypatch.setattr(variant_run, "evaluate", self.score)
        monkeypatch.setattr(variant_run, "continue_tracker", self.track)
        monkeypatch.setattr(variant_run, "write_start", self.start)
        self.shared = SharedInputs("/data", "/start", "/bench", str(folder), "parent run")

    def start(self, variant, start, folder):
        self.started = (variant.title, folder)
        if self.fault:
            raise self.fault
        return Path(start)

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
        self.name, self.parent, self.recipe = name, parent_run_id, settings.recipe
        self.before = {path.name: path.read_text() for path in folder.glob("*") if path.is_file()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text("the run")
        (folder / "unsent.jsonl").write_text("not yet sent")
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
        benchmark=["miniature_refer"],
        score_limit=7,
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
    assert (score.checkpoint, score.data, score.limit) == (f"{folder}/stage3/checkpoint", "/bench", 7)
    assert (score.gpus_per_worker, score.num_workers, score.threads_per_worker) == (1, 0, 2)
    assert (score.recipe, score.benchmark, score.page_cases) == ("paper", ["miniature_refer"], 0)
    assert (score.quiet, score.tracking_uri) == (True, "none")
    assert score.output == f"{folder}/score" and outcome.scores["miniature_vqa"]["value"] == 51.0
    assert (stages.parent, stages.recipe) == ("parent run", "paper") and stages.tracker.status == "FINISHED"
    title, name = "stage.lora_rank=4,train.attention=eager", "stage.lora_rank_4_train.attention_eager-bf16"
    assert stages.name == name and stages.started == (title, tmp_path / name / "start")
    assert stages.tracker.told == {
        "variant": title, "recipe": "paper", "seed": 7, "attention": "eager", "precision": "bf16",
        "tags": {"variant": title, "precision": "bf16"},
    }  # fmt: skip


def test_a_variant_changes_a_part_of_what_all_variants_share(stages):
    stages.run("stage.schedule.peak=1e-4", stage={"schedule": {"epochs": 2, "peak": 1.0}, "draws_per_step": 1})
    assert stages.asked[0][1].stage == {"schedule": {"epochs": 2, "peak": 1e-4}, "draws_per_step": 1}


def test_curves_are_sent_under_common_names_with_norms_at_every_fifth_step(stages):
    stages.run(stages=[2])
    assert (stages.asked[0][1].use_gpu, stages.scored[0].gpus_per_worker) == (False, 0)
    points = stages.tracker.points
    assert [step for step, _ in points] == [*range(12), 0]
    assert points[10][1] == {"loss/stage2": 3.0, "norms/stage2": 2.0, "lr/stage2": 0.1, "norms/stage2/projector": 1.0}
    assert points[1][1] == {"loss/stage2": 3.0, "norms/stage2": 2.0, "lr/stage2": 0.1}
    with_norms = [step for step, values in points if "norms/stage2/projector" in values]
    assert with_norms == [0, 5, 10] and points[11][1]["loss/stage2"] == 1.5
    assert points[-1] == (0, {"score/miniature_vqa": 51.0})


def test_a_step_without_norms_of_its_parts_is_sent_too(monkeypatch):
    entries = [{"step": 10, "loss": 1.5, "grad_norm": 2.5, "lr": 0.1}]
    monkeypatch.setattr(
        variant_run, "read_record", lambda location: entries if location == "/stage/metrics.jsonl" else []
    )
    tracker = Recording()
    variant_run._track_stage(tracker, 4, "/stage")
    assert tracker.points == [(10, {"loss/stage4": 1.5, "norms/stage4": 2.5, "lr/stage4": 0.1})]


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
    outcome = stages.run(stages=[2, 3, 4])
    good = StageStatus("trained")
    assert outcome.stages == {2: good, 3: good, 4: StageStatus("trained", "RuntimeError: no questions")}
    assert stages.run(benchmark="").stages[3] == StageStatus("trained")


def test_a_start_that_cannot_be_made_is_a_failure_of_the_first_stage(stages):
    stages.fault = ValueError("no such norm")
    outcome = stages.run(stages=[3, 4])
    assert outcome == VariantOutcome({3: StageStatus("failed", "ValueError: no such norm")})
    assert (stages.asked, stages.tracker.status) == ([], "FAILED")


@pytest.mark.parametrize("fault", [None, RuntimeError("no memory")])
def test_a_variants_run_is_continued_from_the_bucket_and_kept_there(stages, tmp_path, monkeypatch, fault):
    place = f"memory://variant/{tmp_path.name}"
    stages.shared = replace(stages.shared, output=place)
    storage.write_atomically(f"{place}/no_lora-bf16/run.json", b"the earlier run")
    storage.write_atomically(f"{place}/no_lora-bf16/unsent.jsonl", b"of the earlier run")
    storage.write_atomically(f"{place}/no_lora-bf16/other", b"not for the tracker")
    stages.fault = fault
    monkeypatch.setattr(variant_run, "run_stage", lambda settings, number: {"last_loss": 1.0, "checkpoint": "c"})
    stages.run("no_lora", "bf16")
    assert stages.before == {"run.json": "the earlier run", "unsent.jsonl": "of the earlier run"}
    kept = {name: storage.read_bytes(f"{place}/no_lora-bf16/{name}") for name in ("run.json", "unsent.jsonl")}
    assert kept == {"run.json": b"the run", "unsent.jsonl": b"not yet sent"}


def test_a_mistake_in_the_command_is_raised(stages):
    stages.answers[2] = OtherInputsError("other inputs")
    with pytest.raises(OtherInputsError):
        stages.run()
    assert stages.tracker.status == "FAILED"
