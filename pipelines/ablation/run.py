"""The ablation matrix: variants x precisions, each trained through the stages as one Ray task, into one report.

    <output>/<variant>[-<precision>]/stage<n>/    an ordinary training stage, with its metrics.jsonl
    <output>/<variant>[-<precision>]/score/       an ordinary score run of its last checkpoint
    <output>/report.md, report.html, *.png, result.json

Run again with the same output, it goes on from the last finished stage of each variant.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.ablation.findings import StageOutcome, outcome_of, typical_norms
from pipelines.ablation.report import AblationRow, text_table, write_report
from pipelines.ablation.variant_run import Places, continue_tracker, find_stage, run_variant
from pipelines.ablation.variants import Variant, find_variant, with_precision
from pipelines.cluster import start_ray
from pipelines.data.features import cache_features
from pipelines.progress import Bar
from pipelines.settings import (
    AblateSettings,
    CacheFeaturesSettings,
    MiniatureSettings,
    PrepareDataSettings,
    SettingsError,
)
from pipelines.tracking.base import Tracker, default_uri
from pipelines.training.record import Record, read_record

logger = logging.getLogger(__name__)


def ablate(settings: AblateSettings) -> dict[str, Any]:
    """Run the matrix and write its report.

    Returns:
        ``rows`` (per variant and precision: the outcome of every stage, scores), ``table`` (the same as short texts),
        ``text`` (for a terminal), ``report``, ``page``, ``plots``, ``seconds``, ``result``.

    Raises:
        SettingsError: a variant, stage or setting cannot be used.
    """
    started = time.perf_counter()
    variants = [
        with_precision(find_variant(name), precision) for precision in settings.precisions for name in settings.variants
    ]
    stages = [find_stage(settings, number) for number in settings.stages]
    if not variants or not stages:
        raise SettingsError("an ablation needs at least one of variants=, precisions= and stages=.")
    output = settings.output_dir("outputs/ablation")
    # The variants' tasks run elsewhere: what is relative to this folder must not be to theirs.
    settings = settings.model_copy(update={"tracking_uri": settings.tracking_uri or default_uri(Path.cwd())})
    parent = continue_tracker(settings, "ablation", output)
    parent.params(settings.model_dump())
    with start_ray(settings):
        places = _find_places(settings, output, parent.run_id)
        if settings.features == "cached":
            _cache_features(settings, places)
        chains = dict(_run_all(settings, variants, places))
    rows = _rows(settings, variants, output, chains)
    result: dict[str, Any] = {
        "rows": [row.to_dict() for row in rows],
        "table": [row.cells() for row in rows],
        "text": text_table(rows),
        **write_report(output, rows, settings, time.perf_counter() - started),
        "seconds": round(time.perf_counter() - started, 1),
        "result": str(output / "result.json"),
    }
    (output / "result.json").write_text(json.dumps(result, indent=1))
    _track_report(parent, result)
    return result


NOT_RUN = {"status": "not run", "note": "the stage before failed, or ended without a finite loss"}


def _rows(
    settings: AblateSettings, variants: Sequence[Variant], output: Path, chains: dict[str, dict[str, Any]]
) -> list[AblationRow]:
    """Judge every stage of every variant; the full model at the same precision is the measure for gradients."""
    rows = []
    for variant in variants:
        full = with_precision(find_variant("full"), variant.train["precision"])
        outcomes = []
        for number in settings.stages:
            facts = chains[variant.name]["stages"].get(str(number), NOT_RUN)
            if facts["status"] != "trained":
                outcomes.append(StageOutcome(number, facts["status"], note=facts["note"]))
                continue
            records = _records(output, variant.name, number)
            reference = typical_norms(_records(output, full.name, number)) or typical_norms(records)
            outcomes.append(outcome_of(number, records, reference, facts["note"]))
        rows.append(
            AblationRow(
                variant=variant,
                precision=variant.train["precision"],
                outcomes=outcomes,
                records={number: _records(output, variant.name, number) for number in settings.stages},
                scores=chains[variant.name].get("scores", {}),
            )
        )
    return rows


def _records(output: Path, name: str, number: int) -> list[Record]:
    return read_record(output / name / f"stage{number}" / "metrics.jsonl")


# ---------------------------------------------------------------------- what all variants share


def _find_places(settings: AblateSettings, output: Path, parent_run_id: str) -> Places:
    """Data and backbones; the miniature's own where none are given."""
    from tinygptv.miniature.backbones import write_checkpoint

    data, benchmark_data, init_from = settings.data, settings.benchmark_data, settings.init_from
    if not init_from:
        if settings.recipe != "mini":
            raise SettingsError("give init_from=DIR, the backbones that every variant starts from.")
        init_from = str(write_checkpoint(output / "backbones"))
    if not data:
        if settings.recipe != "mini":
            raise SettingsError("give data=DIR, the folder with one prepared shard set per source.")
        world = output / "world"
        data, benchmark_data = str(_prepare_world(settings, world)), benchmark_data or str(world)
    if settings.benchmark and not benchmark_data:
        raise SettingsError("give benchmark_data=DIR, the folder of the benchmark's files, or an empty benchmark=.")
    return Places(
        data=str(Path(data).expanduser().absolute()),
        init_from=str(Path(init_from).expanduser().absolute()),
        benchmark_data=str(Path(benchmark_data).expanduser().absolute()) if benchmark_data else "",
        output=str(output),
        parent_run_id=parent_run_id,
    )


def _prepare_world(settings: AblateSettings, world: Path) -> Path:
    """Draw a miniature world and prepare it, once."""
    from pipelines.data.ingest.job import ingest
    from pipelines.miniature.jobs import draw_world

    common = {key: getattr(settings, key) for key in ("recipe", "seed", "quiet")} | {"tracking_uri": "none"}
    scenes, mark = settings.world_scenes, world / "drawn.json"
    identity = json.dumps([settings.seed, scenes])
    if not mark.is_file() or mark.read_text() != identity:
        draw_world(MiniatureSettings(output=str(world), train_scenes=scenes, test_scenes=max(1, scenes // 4), **common))
        mark.write_text(identity)
    needed = {source.name for number in settings.stages for source in find_stage(settings, number).sources}
    for name, files in json.loads((world / "sources.json").read_text()).items():
        if name in needed:
            images = str(world / files["images"]) if files["images"] else ""
            place = str(world / "shards" / name)
            ingest(
                PrepareDataSettings(
                    source=name, input=str(world / files["input"]), images=images, output=place, **common
                )
            )
    return world / "shards"


def _cache_features(settings: AblateSettings, places: Places) -> None:
    """Query features of the frozen encoder: no variant changes it, so they are computed once."""
    stages = [find_stage(settings, number) for number in settings.stages]
    for side in sorted({stage.image_size for stage in stages}):
        names = {source.name for stage in stages if stage.image_size == side for source in stage.sources}
        fields = {
            "data": places.data,
            "checkpoint": places.init_from,
            "image_size": side,
            "sources": sorted(names),
            "num_workers": 1 if settings.num_workers else 0,
            "gpus_per_worker": 1 if settings.use_gpu else 0,
            "output": str(Path(places.output) / "features"),
            "tracking_uri": "none",
            "quiet": settings.quiet,
        }
        cache_features(CacheFeaturesSettings.parse(fields, "the ablation"))


# ---------------------------------------------------------------------- one variant after another, or side by side


def _run_all(
    settings: AblateSettings, variants: Sequence[Variant], places: Places
) -> Iterator[tuple[str, dict[str, Any]]]:
    folders = [Path(places.output) / variant.name / f"stage{n}" for variant in variants for n in settings.stages]

    def num_done() -> int:
        return sum((folder / "result.json").is_file() for folder in folders)

    with Bar("ablation", quiet=settings.quiet) as bar:
        run = _run_inline if settings.num_workers == 0 else _run_on_ray
        yield from run(settings, variants, places, lambda: bar.update(num_done(), len(folders)))


def _run_inline(
    settings: AblateSettings, variants: Sequence[Variant], places: Places, show: Callable[[], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for variant in variants:
        yield variant.name, run_variant(settings, variant, places)
        show()


def _run_on_ray(
    settings: AblateSettings, variants: Sequence[Variant], places: Places, show: Callable[[], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    import ray

    task = ray.remote(run_variant).options(
        num_cpus=settings.cpus_per_worker, num_gpus=1 if settings.use_gpu else 0, max_retries=1
    )
    waiting = list(variants)
    running: dict[Any, str] = {}
    while waiting or running:
        while waiting and len(running) < settings.num_workers:
            variant = waiting.pop(0)
            running[task.remote(settings, variant, places)] = variant.name
        done, _ = ray.wait(list(running), timeout=2)
        for reference in done:
            name = running.pop(reference)
            try:
                yield name, ray.get(reference)
            except ray.exceptions.RayError as error:  # its process died, e.g. of memory
                failed = {"status": "failed", "note": f"{type(error).__name__}: {error}"}
                yield name, {"stages": {str(settings.stages[0]): failed}}
        show()


# ---------------------------------------------------------------------- tracking


def _track_report(tracker: Tracker, result: dict[str, Any]) -> None:
    tracker.table(result["table"], "ablation")
    for path in (result["report"], result["page"], *result["plots"], result["result"]):
        tracker.artifact(Path(path))
    tracker.close()
