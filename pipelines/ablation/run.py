"""The ablation matrix: variants x precisions, each trained through the stages as one Ray task, and one report.

    <output>/<variant>[-<precision>]/stage<n>/    an ordinary training stage, with its metrics.jsonl
    <output>/<variant>[-<precision>]/score/       an ordinary score run of its last checkpoint
    <output>/report.md, report.html, *.png, result.json

The same command with the same output resumes from the last finished stage of each variant.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.ablation.findings import StageOutcome, outcome_of, typical_norms
from pipelines.ablation.report import DEFINITIONS, AblationRow, ReportFiles, RowRecord, text_table, write_report
from pipelines.ablation.variant_run import SharedInputs, StageStatus, VariantOutcome, run_variant
from pipelines.ablation.variants import Variant, find_variant, refuse_unusable, with_precision
from pipelines.cluster import start_ray
from pipelines.evaluation.benchmarks import find_benchmarks
from pipelines.fingerprint import Fingerprint, claim
from pipelines.json_files import write_json
from pipelines.node_cache import checked_checkpoint
from pipelines.progress import Bar, poll
from pipelines.settings import (
    AblateSettings,
    CacheFeaturesSettings,
    MiniatureSettings,
    PrepareDataSettings,
    SettingsError,
    TrainSettings,
)
from pipelines.settings.folders import refuse_no_folder
from pipelines.tracking.base import Tracker, continue_tracker, reachable_uri
from pipelines.tracking.described import markdown_table, run_title
from pipelines.tracking.identity import RUN_FILE
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training.job import resolve_stage
from pipelines.training.record import RECORD_FILE, StepEntry, read_record
from pipelines.training.result import RESULT_FILE
from pipelines.training.stage_features import cache_stage_features
from pipelines.units import UnitsLostError, Workers, map_units
from tinygptv.training.stages import Stage

logger = logging.getLogger(__name__)

_RESULTS = ("world", "backbones", "features", "report.md", "report.html", "result.json", "run.json", "unsent.jsonl")

_NOT_RUN = StageStatus("not run", "the stage before failed, or ended without a finite loss")


class AblationResult(ReportFiles):
    """``result.json`` of an ablation.

    Attributes:
        rows: outcome of every stage and scores, per variant and precision.
        table: the same as short texts.
        text: the table for a terminal.
        seconds: of the run.
        result: location of the file.
    """

    rows: list[RowRecord]
    table: list[dict[str, str]]
    text: str
    seconds: float
    result: str


def ablate(settings: AblateSettings) -> AblationResult:
    """Run the matrix and write its report.

    Returns:
        What stands in ``result.json``.

    Raises:
        OtherInputsError: the output holds an ablation, or a stage or score of it, of other inputs.
        SettingsError: a variant, stage or setting cannot be used, or another run is writing there.
    """
    started = time.perf_counter()
    variants = [
        with_precision(find_variant(name), precision) for precision in settings.precisions for name in settings.variants
    ]
    stages = [resolve_stage(settings, number) for number in settings.stages]
    if not variants or not stages:
        raise SettingsError("an ablation needs at least one of variants=, precisions= and stages=.")
    _refuse_unusable_inputs(settings, variants, stages)
    work = storage.WorkFolder(settings.output_location("outputs/ablation"))
    storage.check_access(work.location, writes=True)
    with storage.alone(work.uri()):
        return _run_matrix(settings, variants, stages, work, started)


def _run_matrix(
    settings: AblateSettings,
    variants: Sequence[Variant],
    stages: Sequence[Stage],
    work: storage.WorkFolder,
    started: float,
) -> AblationResult:
    output = work.path
    claim(
        work.uri(),
        _fingerprint(settings),
        [*(variant.name for variant in variants), *_RESULTS],
        overwrite=settings.overwrite,
        inputs=[settings.data, settings.init_from, settings.benchmark_data],
    )
    # The variants' tasks have other working directories.
    settings = settings.model_copy(update={"tracking_uri": reachable_uri(settings.tracking_uri, work.uri())})
    work.fetch(RUN_FILE, JOURNAL_FILE)
    parent = continue_tracker(settings, run_title(settings.recipe, "ablation"), output)
    work.publish(RUN_FILE)
    parent.params(settings.model_dump())
    with start_ray(settings):
        shared = _shared_inputs(settings, work, parent.run_id)
        if settings.features == "cached":
            cache_stage_features(stages, partial(_feature_settings, settings, shared))
        outcomes = dict(_run_all(settings, variants, shared))
    rows = _rows(settings, variants, shared, outcomes)
    files = write_report(output, rows, settings, time.perf_counter() - started)
    result: AblationResult = {
        "rows": [row.to_dict() for row in rows],
        "table": [row.cells() for row in rows],
        "text": text_table(rows),
        "report": work.uri(Path(files["report"]).name),
        "page": work.uri(Path(files["page"]).name),
        "plots": [work.uri(Path(plot).name) for plot in files["plots"]],
        "seconds": round(time.perf_counter() - started, 1),
        "result": work.uri("result.json"),
    }
    write_json(output / "result.json", result)
    _track_report(parent, result, [files["report"], files["page"], *files["plots"], str(output / "result.json")])
    work.publish()
    return result


def _refuse_unusable_inputs(settings: AblateSettings, variants: Sequence[Variant], stages: Sequence[Stage]) -> None:
    """Raise before anything is drawn or trained where a variant would fail later.

    Raises:
        SettingsError: data is no folder, a benchmark is unknown or has no data, training cannot use its settings or
            those of a variant, or two rows would share a folder.
        CheckpointError: the start is no checkpoint.
    """
    if twice := [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]:
        raise SettingsError(f"variants= and precisions= give {twice[0]} twice; its folder holds one.")
    if settings.data:
        refuse_no_folder("data", settings.data, "prepared shard sets (jobs/prepare_data.py)")
    if settings.benchmark_data:
        refuse_no_folder("benchmark_data", settings.benchmark_data, "the benchmark's files")
    if settings.init_from and storage.is_local(settings.init_from):
        checked_checkpoint(settings.init_from)
    if settings.benchmark:
        find_benchmarks(settings.benchmark)
        if settings.data and not settings.benchmark_data:
            raise SettingsError("give benchmark_data=DIR, the folder of the benchmark's files, or an empty benchmark=.")
    if "precision" in settings.train:
        raise SettingsError("train= sets a precision: give it in precisions=[..], which makes a table of each.")
    for precision in settings.precisions:
        TrainSettings.parse({**settings.train, "precision": precision}, "train= and precisions= of the ablation")
    for variant in variants:
        refuse_unusable(variant, stages, {"features": settings.features, **settings.train})


def _fingerprint(settings: AblateSettings) -> Fingerprint:
    """Settings that all variants share.

    Variants, stages and precisions may be added: each has an identity of its own, in which data and start are named.
    """
    shared = ("recipe", "seed", "max_steps", "benchmark", "score_limit", "stage", "train")
    fields = {name: getattr(settings, name) for name in shared}
    return Fingerprint.of("ablate", **fields, world_scenes=0 if settings.data else settings.world_scenes)


def _rows(
    settings: AblateSettings,
    variants: Sequence[Variant],
    shared: SharedInputs,
    outcomes: dict[str, VariantOutcome],
) -> list[AblationRow]:
    """Judge every stage of every variant; gradients are compared with the full model at the same precision."""
    record_of = cache(partial(_record, shared))  # a file may be in a bucket
    rows = []
    for variant in variants:
        full = with_precision(find_variant("full"), variant.train["precision"])
        stages = []
        for number in settings.stages:
            stage = outcomes[variant.name].stages.get(number, _NOT_RUN)
            if stage.status != "trained":
                stages.append(StageOutcome(number, stage.status, note=stage.note))
                continue
            record = record_of(variant.name, number)
            reference = typical_norms(record_of(full.name, number)) or typical_norms(record)
            stages.append(outcome_of(number, record, reference, stage.note))
        rows.append(
            AblationRow(
                variant=variant,
                precision=variant.train["precision"],
                outcomes=stages,
                records={number: record_of(variant.name, number) for number in settings.stages},
                scores=outcomes[variant.name].scores,
            )
        )
    return rows


def _record(shared: SharedInputs, variant: str, number: int) -> list[StepEntry]:
    return read_record(storage.join(shared.stage_folder(variant, number), RECORD_FILE))


# ---------------------------------------------------------------------- what all variants share


def _shared_inputs(settings: AblateSettings, work: storage.WorkFolder, parent_run_id: str) -> SharedInputs:
    """Data and backbones; the miniature's own where none are given."""
    from tinygptv.miniature.backbones import write_checkpoint

    data, benchmark_data, init_from = settings.data, settings.benchmark_data, settings.init_from
    if not init_from:
        if settings.recipe != "mini":
            raise SettingsError("give init_from=DIR, the backbones that every variant starts from.")
        write_checkpoint(work.path / "backbones")
        work.publish("backbones")
        init_from = work.uri("backbones")
    if not data:
        if settings.recipe != "mini":
            raise SettingsError("give data=DIR, the folder with one prepared shard set per source.")
        _prepare_world(settings, work.path / "world")
        work.publish("world")
        data, benchmark_data = work.uri("world/shards"), benchmark_data or work.uri("world")
    return SharedInputs(
        data=storage.absolute(data),
        init_from=storage.absolute(init_from),
        benchmark_data=storage.absolute(benchmark_data) if benchmark_data else "",
        output=work.uri(),
        parent_run_id=parent_run_id,
    )


def _prepare_world(settings: AblateSettings, world: Path) -> None:
    """Draw a miniature world and prepare what the stages read, as shard sets."""
    from pipelines.miniature.world import draw_world, prepare_world

    common = {key: getattr(settings, key) for key in ("recipe", "seed", "quiet")} | {"tracking_uri": "none"}
    scenes = settings.world_scenes
    draw_world(MiniatureSettings(output=str(world), train_scenes=scenes, test_scenes=max(1, scenes // 4), **common))
    sources = {source.name for number in settings.stages for source in resolve_stage(settings, number).sources}
    prepare_world(world, world / "shards", partial(PrepareDataSettings, **common), sources)


def _feature_settings(settings: AblateSettings, shared: SharedInputs, **fields: Any) -> CacheFeaturesSettings:
    common = {
        "data": shared.data,
        "checkpoint": shared.init_from,
        "num_workers": 1 if settings.num_workers else 0,
        "gpus_per_worker": 1 if settings.use_gpu else 0,
        "output": storage.join(shared.output, "features"),
        "tracking_uri": "none",
        "quiet": settings.quiet,
    }
    return CacheFeaturesSettings.parse({**common, **fields}, "the ablation")


# ---------------------------------------------------------------------- one variant after another, or side by side


def _run_all(
    settings: AblateSettings, variants: Sequence[Variant], shared: SharedInputs
) -> Iterator[tuple[str, VariantOutcome]]:
    folders = [shared.stage_folder(variant.name, n) for variant in variants for n in settings.stages]

    def num_done() -> int:
        return sum(storage.exists(storage.join(folder, RESULT_FILE)) for folder in folders)

    setup = partial(_variant_runner, settings, shared)
    workers = Workers(settings.num_workers, settings.cpus_per_worker, num_gpus=1 if settings.use_gpu else 0)
    with (
        Bar("ablation", quiet=settings.quiet) as bar,
        poll(lambda: bar.update(num_done(), len(folders)), every_s=2.0 if storage.is_local(shared.output) else 30.0),
    ):
        try:
            for variant, outcome in map_units(setup, variants, workers, settings, name="ablation"):
                yield variant.name, outcome
        except UnitsLostError as error:
            for variant in error.units:
                failed = StageStatus("failed", "its process died, for example for lack of memory")
                yield variant.name, VariantOutcome({settings.stages[0]: failed})


def _variant_runner(settings: AblateSettings, shared: SharedInputs) -> Callable[[Variant], VariantOutcome]:
    return partial(run_variant, settings, shared=shared)


# ---------------------------------------------------------------------- tracking


def _track_report(tracker: Tracker, result: AblationResult, files: Sequence[str]) -> None:
    """Log the table, which the run's page begins with, and the files on this machine's disk."""
    tracker.describe(f"{markdown_table(result['table'])}\n\n{DEFINITIONS}\n\nPlots: `report.html` in Artifacts.")
    tracker.table(result["table"], "ablation")
    for path in files:
        tracker.artifact(Path(path))
    tracker.close()
