"""One variant of an ablation: its stages one after the other, its score, its MLflow run. Runs in a task of its own."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ablation.variants import Variant, write_start
from pipelines.evaluation.run import evaluate
from pipelines.settings import AblateSettings, ScoreSettings, TrainSettings
from pipelines.tracking.base import Tracker, open_tracker
from pipelines.training.job import apply_stage_settings
from pipelines.training.record import read_record
from pipelines.training.run import run_stage
from tinygptv.training.stages import Stage, get_stage

logger = logging.getLogger(__name__)

_NORMS_EVERY = 5
"""Steps between the per-depth norms that are sent to the tracker; the record on disk has every step."""


@dataclass(frozen=True)
class Places:
    """What all variants share.

    Attributes:
        data: folder with one shard set per source.
        init_from: backbones.
        benchmark_data: folder of the benchmark's files.
        output: folder of the ablation.
        parent_run_id: MLflow run that the variants' runs are nested under.
    """

    data: str
    init_from: str
    benchmark_data: str
    output: str
    parent_run_id: str


def find_stage(settings: AblateSettings, number: int) -> Stage:
    """A stage of the recipe with the changes that all variants share."""
    return apply_stage_settings(get_stage(settings.recipe, number), settings.stage)


def run_variant(settings: AblateSettings, variant: Variant, places: Places) -> dict[str, Any]:
    """Train a variant through the stages and score it.

    Returns:
        ``stages``: number -> ``status`` (``trained`` or ``failed``), ``note``; stages after a failed one are left out.
        ``scores``: per benchmark, where it was scored. A failure ends the variant, not the ablation.
    """
    folder = Path(places.output) / variant.name
    tracker = continue_tracker(settings, variant.name, folder, places.parent_run_id)
    tracker.params({"variant": variant.title, "recipe": settings.recipe, "seed": settings.seed, **variant.train})
    tracker.tags({"variant": variant.title, "precision": str(variant.train["precision"])})
    found: dict[str, Any] = {"stages": {}, "scores": {}}
    try:
        checkpoint = str(write_start(variant, places.init_from, folder / "start"))
        for number in settings.stages:
            checkpoint, facts = _train_stage(settings, variant, places, number, checkpoint)
            found["stages"][str(number)] = facts
            _track_stage(tracker, number, folder / f"stage{number}")
            if facts["note"]:
                break
        else:
            found["scores"] = _score(settings, places, checkpoint, folder / "score")
            tracker.metrics({f"score/{name}": facts["value"] for name, facts in found["scores"].items()}, 0)
    except Exception as error:  # one variant must not take the others with it
        logger.exception("variant %s failed", variant.name)
        number = next((n for n in settings.stages if str(n) not in found["stages"]), settings.stages[-1])
        found["stages"].setdefault(str(number), {"status": "failed"})["note"] = f"{type(error).__name__}: {error}"
    failed = any(facts["status"] == "failed" for facts in found["stages"].values())
    tracker.close("FAILED" if failed else "FINISHED")
    return found


def _train_stage(
    settings: AblateSettings, variant: Variant, places: Places, number: int, init_from: str
) -> tuple[str, dict[str, Any]]:
    output = Path(places.output) / variant.name / f"stage{number}"
    fields: dict[str, Any] = {
        "recipe": settings.recipe,
        "seed": settings.seed,
        "output": str(output),
        "tracking_uri": "none",
        "quiet": True,
        "data": places.data,
        "init_from": init_from,
        "max_steps": settings.max_steps,
        "num_workers": 0,
        "loader_workers": 0,
        "threads_per_worker": settings.threads_per_worker,
        "use_gpu": settings.use_gpu,
        "features": settings.features,
        "log_every": 1,
        "guard": "off",  # an ablation wants to see what the guard would step over
        "stage": {**settings.stage, **variant.stage_changes(find_stage(settings, number))},
        **settings.train,
        **variant.train,
    }
    result = run_stage(TrainSettings.parse(fields, "the ablation"), number)
    if not math.isfinite(result["last_loss"]):
        return result["checkpoint"], {"status": "trained", "note": "its last loss is not finite"}
    return result["checkpoint"], {"status": "trained", "note": ""}


def _score(settings: AblateSettings, places: Places, checkpoint: str, output: Path) -> dict[str, Any]:
    if not settings.benchmark:
        return {}
    fields = {
        "recipe": settings.recipe,
        "checkpoint": checkpoint,
        "benchmark": settings.benchmark,
        "data": places.benchmark_data,
        "output": str(output),
        "limit": settings.score_limit,
        "num_workers": 0,
        "threads_per_worker": settings.threads_per_worker,
        "gpus_per_worker": 1 if settings.use_gpu else 0,
        "page_cases": 0,
        "tracking_uri": "none",
        "quiet": True,
    }
    scores = evaluate(ScoreSettings.parse(fields, "the ablation"))["benchmarks"]
    keys = ("metric", "value", "low", "high", "n", "blind", "shuffled")
    return {name: {key: facts[key] for key in keys} for name, facts in scores.items()}


def continue_tracker(settings: AblateSettings, name: str, folder: Path, parent_run_id: str = "") -> Tracker:
    """The MLflow run that this folder began, or a new one."""
    record = folder / "run.json"
    known = json.loads(record.read_text())["run_id"] if record.is_file() else ""
    tracker = open_tracker(settings, name, run_id=known, parent_run_id=parent_run_id)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"run_id": tracker.run_id}))
    return tracker


def _track_stage(tracker: Tracker, number: int, folder: Path) -> None:
    """Send the stage's curves, once, under names that all variants share, so that they lie over each other."""
    mark = folder / "tracked"
    if mark.is_file():
        return
    mark.touch()
    for record in read_record(folder / "metrics.jsonl"):
        values = {"loss": record["loss"], "grad_norm": float(record["grad_norm"]), "lr": record["lr"]}
        if record["step"] % _NORMS_EVERY == 0:
            values |= {f"grad_norm/{part}": norm for part, norm in record.get("part_norms", {}).items()}
        tracker.metrics({f"stage{number}/{name}": value for name, value in values.items()}, record["step"])
