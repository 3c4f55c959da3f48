"""A whole recipe: fetch, convert, prepare, features where they pay, stages 1 to 4, score, quantize, serve.

Every step is a command of this project, which can be run by hand as well: ``dry_run=true`` prints them all. A step
whose result is there, of the same command, is skipped; an interrupted one is resumed by its own job.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from pipelines.cli import run_command
from pipelines.console import jobs_folder
from pipelines.data.shards import ShardSet
from pipelines.feature_plan import FeaturePlan, plan_features, source_names
from pipelines.fetch.datasets import set_of
from pipelines.fetch.run import named_files
from pipelines.json_files import read_json_object, write_json
from pipelines.redact import redact
from pipelines.settings import CacheFeaturesSettings, RecipeSettings, SettingsError, TrainSettings
from tinygptv.convert.sources import all_parts, find_parts
from tinygptv.training.stages import RECIPES

RECORD_FILE = "recipe.json"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: of the step.
        words: after ``python``: a job of ``jobs/`` or ``-m MODULE``, and its arguments.
        result: file that is there when it is done.
    """

    title: str
    words: tuple[str, ...]
    result: Path

    @property
    def shown(self) -> str:
        """As a shell takes it, without passwords of URIs."""
        return str(redact(f"python {shlex.join(self.words)}"))


class RecipeError(ValueError):
    """A step failed; its own message stands above."""


class RecipeResult(TypedDict):
    """``result.json`` of a recipe.

    Attributes:
        features: the plan of every feature store: fields of ``FeaturePlan``.
        seconds: of each step that ran, by title.
        checkpoint: of the last stage.
        artifact: its folder.
        result: path of the file.
    """

    features: list[dict[str, object]]
    seconds: dict[str, float]
    checkpoint: str
    artifact: str
    result: str


def run_recipe(settings: RecipeSettings, config: str | None) -> RecipeResult:
    """Run what is not done yet, or print it.

    Args:
        settings: folders, and which steps.
        config: configuration file that every job reads.

    Returns:
        What stands in ``result.json``, which ``dry_run`` does not write.

    Raises:
        SettingsError: data is missing, or the recipe is unknown.
        RecipeError: a step failed.
    """
    if settings.recipe not in RECIPES:
        raise SettingsError(f"recipe is {settings.recipe!r}; known recipes: {sorted(RECIPES)}.")
    output = settings.output_dir(f"outputs/{settings.recipe}")
    recipe = _Recipe(settings, config, output)
    seconds = {}
    for step in recipe.steps():
        print(f"\n== {step.title}\n{step.shown}", flush=True)
        if not settings.dry_run:
            seconds[step.title] = recipe.run(step)
    result: RecipeResult = {
        "features": [asdict(plan) for plan in recipe.plans],
        "seconds": seconds,
        "checkpoint": str(recipe.last_checkpoint),
        "artifact": str(output / "artifact"),
        "result": str(output / "result.json"),
    }
    if not settings.dry_run:
        write_json(output / "result.json", result)
    return result


class _Recipe:
    """The steps of one recipe in one folder."""

    def __init__(self, settings: RecipeSettings, config: str | None, output: Path) -> None:
        self.settings, self.output = settings, output
        given = [f"{key}={_text(value)}" for key, value in settings.given_beside(config).items()]
        self.config = [*(["--config", config] if config else []), *given]
        self.stages = RECIPES[settings.recipe]
        self.train = TrainSettings.load(config)
        self.features = CacheFeaturesSettings.load(config)
        self.data = Path(settings.data or output / "data").expanduser()
        self.raw = Path(settings.raw).expanduser()
        self.weights = Path(settings.weights or output / "weights").expanduser()
        self.sources = sorted({name for stage in self.stages for name in source_names(stage)})
        self.plans: list[FeaturePlan] = []
        self.done: dict[str, str] = read_json_object(output / RECORD_FILE) or {}
        self._ran_any = False

    def steps(self) -> Iterator[Step]:
        """In order; features are planned once the data is prepared."""
        yield from self._start()
        yield from self._prepare()
        yield from self._train()
        yield from self._finish()

    def run(self, step: Step) -> float:
        """Run a step where it is not done; returns its seconds."""
        if not self._ran_any and self.done.get(step.title) == step.shown and step.result.exists():
            print("done already", flush=True)
            return 0.0
        self._ran_any = True  # what comes after it reads its result: its own job says whether that changed
        started = time.perf_counter()
        first = step.words[0] if step.words[0] == "-m" else str(jobs_folder() / Path(step.words[0]).name)
        if run_command([sys.executable, first, *step.words[1:]]):
            raise RecipeError(
                f"step {step.title!r} failed, as it says above: fix that, and run the same command again."
            )
        self.done[step.title] = step.shown
        write_json(self.output / RECORD_FILE, self.done)
        return round(time.perf_counter() - started, 1)

    def checkpoint(self, number: int) -> Path:
        """Of a stage; 0 is the start."""
        return self.output / f"stage{number}" / "checkpoint" if number else self.output / "start"

    @property
    def last_checkpoint(self) -> Path:
        """Of the last stage."""
        return self.checkpoint(self.stages[-1].number)

    def _job(self, title: str, name: str, result: Path, *keys: str) -> Step:
        return Step(title, (f"jobs/{name}.py", *self.config, *keys), result)

    def _start(self) -> Iterator[Step]:
        files = named_files(["start"])
        last = self.weights / files[-1].path
        more = [f"{key}={_text(value)}" for key, value in self.settings.fetch.items()]
        yield Step("fetch", ("jobs/fetch.py", "what=start", f"output={self.weights}", *more), last)
        parts = {part.role: all_parts()[part.name].path for part in find_parts("start")}
        given = [word for role, path in parts.items() for word in (f"--{role}", str(self.weights / path))]
        start = self.checkpoint(0)
        words = ("-m", "tinygptv.convert", "release", *given, "--template", "human", "--output", str(start))
        yield Step("convert", words, start / "manifest.json")

    def _prepare(self) -> Iterator[Step]:
        missing = [name for name in self.sources if not self._is_prepared(name) and not self._input(name).exists()]
        if missing and not self.settings.dry_run:
            sets = dict.fromkeys(set_of(name).name for name in missing)
            raise SettingsError(
                f"raw={self.settings.raw or '(not given)'} lacks the data of {', '.join(missing)}: run "
                f"jobs/fetch.py what=[{','.join(sets)}] output={self.raw} (docs/datasets.md)."
            )
        for name in self.sources:
            target = self.data / name
            keys = (f"source={name}", f"input={self._input(name)}", f"output={target}")
            yield self._job(f"prepare {name}", "prepare_data", target / "result.json", *keys)

    def _input(self, source: str) -> Path:
        return self.raw / set_of(source).input

    def _is_prepared(self, source: str) -> bool:
        return (self.data / source / "manifest.json").is_file()

    def _train(self) -> Iterator[Step]:
        self.plans = self._plan()
        for plan in self.plans:
            print(f"\n{plan}", flush=True)
            if plan.choice == "cached":
                yield self._cache(plan)
        choices = {number: plan.choice for plan in self.plans for number in plan.stages}
        for stage in self.stages:
            keys = (
                f"data={self.data}",
                f"init_from={self.checkpoint(stage.number - 1)}",
                f"output={self.checkpoint(stage.number).parent}",
                f"features={choices[stage.number]}",
            )
            result = self.checkpoint(stage.number).parent / "result.json"
            yield self._job(f"stage {stage.number}: {stage.title}", f"stage{stage.number}", result, *keys)

    def _cache(self, plan: FeaturePlan) -> Step:
        numbers = "".join(str(number) for number in plan.stages)
        keys = (
            f"data={self.data}",
            f"checkpoint={self.checkpoint(0)}",
            f"image_size={plan.image_size}",
            f"sources=[{','.join(plan.sources)}]",
            f"output={self.output / f'features{numbers}'}",
        )
        result = self.output / f"features{numbers}" / "result.json"
        return self._job(f"features of stages {numbers}", "cache_features", result, *keys)

    def _plan(self) -> list[FeaturePlan]:
        rows = {name: self._rows(name) for name in self.sources}
        existing = next(folder for folder in (self.data, *self.data.absolute().parents) if folder.is_dir())
        return plan_features(
            self.stages,
            rows,
            shutil.disk_usage(existing).free,
            max_steps=self.train.max_steps,
            dtype=self.features.dtype,
            tflops=self.settings.tflops,
            wanted=self.settings.features,
        )

    def _rows(self, source: str) -> int:
        """Of prepared data, or as published where it is not prepared yet."""
        return len(ShardSet.open(str(self.data / source))) if self._is_prepared(source) else set_of(source).rows

    def _finish(self) -> Iterator[Step]:
        checkpoint = self.last_checkpoint
        if self.settings.benchmarks:
            target = self.output / "score"
            named = (f"benchmark={self.settings.benchmark}", f"data={self.settings.benchmarks}")
            keys = (f"checkpoint={checkpoint}", *named, f"output={target}")
            yield self._job("score", "score", target / "result.json", *keys)
        artifact = self.output / "artifact"
        given = (f"checkpoint={checkpoint}", f"output={artifact}", f"data={self.data}")
        yield self._job("quantize", "quantize", artifact / "result.json", *given)
        if self.settings.serve:
            yield self._job("serve", "serve_http", self.output / ".never", f"artifact={artifact}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    )
