"""One variant of an ablation: its stages in order, its score, its MLflow run. Runs in a Ray task of its own."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from pipelines import storage
from pipelines.ablation.findings import Status
from pipelines.ablation.variants import Variant, with_changes, write_start
from pipelines.evaluation.run import evaluate
from pipelines.evaluation.scoring import BenchmarkScore
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import AblateSettings, ScoreSettings, TrainSettings
from pipelines.tracking.base import Tracker, continue_tracker
from pipelines.tracking.identity import RUN_FILE
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training.job import resolve_stage
from pipelines.training.record import RECORD_FILE, read_record
from pipelines.training.run import run_stage

logger = logging.getLogger(__name__)

_NORMS_EVERY = 5
"""Steps between the per-depth norms that are sent to the tracker; the record on disk has every step."""


@dataclass(frozen=True)
class SharedInputs:
    """Settings that all variants of an ablation share.

    Attributes:
        data: folder with one shard set per source.
        init_from: backbones.
        benchmark_data: folder of the benchmark's files; empty where none is scored.
        output: folder or URI of the ablation.
        parent_run_id: MLflow run that the variants' runs are nested under.
    """

    data: str
    init_from: str
    benchmark_data: str
    output: str
    parent_run_id: str

    def stage_folder(self, variant: str, number: int) -> str:
        """Output folder of one stage of a variant."""
        return storage.join(self.output, variant, f"stage{number}")


@dataclass(frozen=True)
class StageStatus:
    """Outcome of one stage of a variant; ``note`` says why it failed or what is wrong with its result."""

    status: Status
    note: str = ""


@dataclass
class VariantOutcome:
    """Results of a variant's run.

    Attributes:
        stages: by number; stages after a failed one are missing.
        scores: per benchmark; empty where it was not scored.
    """

    stages: dict[int, StageStatus] = field(default_factory=dict)
    scores: dict[str, BenchmarkScore] = field(default_factory=dict)


def run_variant(settings: AblateSettings, variant: Variant, shared: SharedInputs) -> VariantOutcome:
    """Train a variant through the stages and score it. A failure ends the variant, not the ablation.

    Raises:
        OtherInputsError: a stage or score of it was made from other inputs.
    """
    work = storage.WorkFolder(storage.join(shared.output, variant.name))
    work.fetch(RUN_FILE, JOURNAL_FILE)
    folder = work.path
    tracker = continue_tracker(settings, variant.name, folder, parent_run_id=shared.parent_run_id)
    tracker.params({"variant": variant.title, "recipe": settings.recipe, "seed": settings.seed, **variant.train})
    tracker.tags({"variant": variant.title, "precision": str(variant.train["precision"])})
    outcome = VariantOutcome()
    try:
        checkpoint = str(write_start(variant, shared.init_from, folder / "start"))
        for number in settings.stages:
            checkpoint, outcome.stages[number] = _train_stage(settings, variant, shared, number, checkpoint)
            _track_stage(tracker, number, shared.stage_folder(variant.name, number))
            if outcome.stages[number].note:
                break
        else:
            outcome.scores = _score(settings, shared, checkpoint, work.uri("score"))
            tracker.metrics({f"score/{name}": score["value"] for name, score in outcome.scores.items()}, 0)
    except OtherInputsError:  # a mistake in the command, not a fault of the variant
        tracker.close("FAILED")
        raise
    except Exception as error:  # the other variants continue
        logger.exception("variant %s failed", variant.name)
        number = next((n for n in settings.stages if n not in outcome.stages), settings.stages[-1])
        done = outcome.stages.get(number)
        outcome.stages[number] = StageStatus(done.status if done else "failed", f"{type(error).__name__}: {error}")
    failed = any(stage.status == "failed" for stage in outcome.stages.values())
    tracker.close("FAILED" if failed else "FINISHED")
    work.publish(RUN_FILE, JOURNAL_FILE)
    return outcome


def _train_stage(
    settings: AblateSettings, variant: Variant, shared: SharedInputs, number: int, init_from: str
) -> tuple[str, StageStatus]:
    """Train one stage; returns its checkpoint."""
    fields = {
        "recipe": settings.recipe,
        "seed": settings.seed,
        "output": shared.stage_folder(variant.name, number),
        "tracking_uri": "none",
        "quiet": True,
        "data": shared.data,
        "init_from": init_from,
        "max_steps": settings.max_steps,
        "num_workers": 0,
        "loader_workers": 0,
        "threads_per_worker": settings.threads_per_worker,
        "use_gpu": settings.use_gpu,
        "features": settings.features,
        "log_every": 1,
        "guard": "off",  # an ablation reports what the guard would leave out
        "stage": with_changes(settings.stage, variant.stage_changes(resolve_stage(settings, number))),
        **settings.train,
        **variant.train,
    }
    result = run_stage(TrainSettings.parse(fields, "the ablation"), number)
    note = "" if math.isfinite(result["last_loss"]) else "its last loss is not finite"
    return result["checkpoint"], StageStatus("trained", note)


def _score(settings: AblateSettings, shared: SharedInputs, checkpoint: str, output: str) -> dict[str, BenchmarkScore]:
    if not settings.benchmark:
        return {}
    fields = {
        "recipe": settings.recipe,
        "checkpoint": checkpoint,
        "benchmark": settings.benchmark,
        "data": shared.benchmark_data,
        "output": output,
        "limit": settings.score_limit,
        "num_workers": 0,
        "threads_per_worker": settings.threads_per_worker,
        "gpus_per_worker": 1 if settings.use_gpu else 0,
        "page_cases": 0,
        "tracking_uri": "none",
        "quiet": True,
    }
    return evaluate(ScoreSettings.parse(fields, "the ablation"))["benchmarks"]


def _track_stage(tracker: Tracker, number: int, folder: str) -> None:
    """Send the stage's curves, under names that all variants share, so that MLflow overlays them.

    A resumed run has them already; the tracker leaves out what a run has.
    """
    for entry in read_record(storage.join(folder, RECORD_FILE)):
        values = {"loss": entry["loss"], "norms": entry["grad_norm"], "lr": entry["lr"]}
        values = {f"{name}/stage{number}": value for name, value in values.items()}
        if entry["step"] % _NORMS_EVERY == 0:
            values |= {f"norms/stage{number}/{part}": norm for part, norm in entry.get("part_norms", {}).items()}
        tracker.metrics(values, entry["step"])
