"""Evaluation: a checkpoint or artifact on benchmarks, as a Ray Data batch job with a report.

Questions go through in batches that are a pure function of the benchmark; each finished batch is a file, so that a kill
costs one batch at most. Every benchmark is also answered blind (a grey picture), so that a score shows what the picture
is worth.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.benchmarks import Benchmark, Question, find_benchmarks
from pipelines.cluster import start_ray
from pipelines.settings import ScoreSettings, SettingsError
from pipelines.tracking import open_tracker
from tinygptv.metrics import bootstrap

logger = logging.getLogger(__name__)

CHUNK = 512
"""Questions of a work unit."""


def evaluate(settings: ScoreSettings) -> dict[str, Any]:
    """Score a checkpoint.

    Returns:
        ``benchmarks``: name -> ``metric, value, low, high, n, blind`` and sub-scores; ``result``: path of result.json.

    Raises:
        SettingsError: a setting cannot be used.
    """
    if not settings.checkpoint:
        raise SettingsError("give checkpoint=DIR, the checkpoint or artifact to score.")
    started = time.perf_counter()
    output = settings.output_dir("outputs/score")
    try:
        benchmarks = find_benchmarks(settings.benchmark)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    checkpoint = str(Path(settings.checkpoint).expanduser().absolute())
    units = list(_units(benchmarks, Path(settings.data).expanduser().absolute(), settings.limit))
    answered = _answer_all(settings, checkpoint, units, output / "answers")
    scores = {b.name: _score(b, answered[b.name], settings) for b in benchmarks}
    _write_predictions(output / "predictions.jsonl", benchmarks, answered)
    result = {
        "checkpoint": checkpoint,
        "benchmarks": scores,
        "seconds": round(time.perf_counter() - started, 1),
        "result": str(output / "result.json"),
    }
    (output / "result.json").write_text(json.dumps(result, indent=1))
    _track(settings, output, scores)
    return result


Unit = tuple[str, int, list[Question]]
"""Benchmark name, number of the unit, its questions."""


def _units(benchmarks: Sequence[Benchmark], data: Path, limit: int) -> Iterator[Unit]:
    for benchmark in benchmarks:
        questions = list(benchmark.read(data))
        questions = questions[:limit] if limit else questions
        for number, start in enumerate(range(0, len(questions), CHUNK)):
            yield benchmark.name, number, questions[start : start + CHUNK]


class UnitAnswerer:
    """Answers units; one of these per Ray Data actor."""

    def __init__(self, checkpoint: str, batch_size: int, baselines: bool, answers_dir: str, threads: int = 0) -> None:
        import torch

        from tinygptv.answering import Answerer
        from tinygptv.loading import load_for_inference

        if threads:
            torch.set_num_threads(threads)
        self.answerer = Answerer(*load_for_inference(checkpoint), batch_size=batch_size)
        self.baselines = baselines
        self.answers_dir = Path(answers_dir)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form: a batch of pickled units in, their numbers out."""
        import pickle

        for payload in batch["unit"]:
            self.answer(pickle.loads(payload))
        return {"done": [len(batch["unit"])]}

    def answer(self, unit: Unit) -> None:
        """Answer a unit and write it; a unit that is written already is left alone."""
        name, number, questions = unit
        path = unit_path(self.answers_dir, name, number)
        if path.is_file():
            return
        rows = self._rows(name, questions)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(path)

    def _rows(self, name: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
        from tinygptv.answering import Prompt

        max_new_tokens = find_benchmarks(name)[0].max_new_tokens
        images, places, problems = _open_images(questions)
        embeds = list(self.answerer.encode(images)) if images else []
        asked = [i for i in range(len(questions)) if i not in problems]
        prompts = [
            Prompt(questions[i].instruction, places.get(questions[i].image), questions[i].history, max_new_tokens)
            for i in asked
        ]
        answers = dict(zip(asked, self.answerer.answer(prompts, embeds), strict=True))
        blind = {}
        if self.baselines and embeds:
            grey = [self.answerer.blank()]
            blinded = [Prompt(p.instruction, None if p.image is None else 0, p.history, max_new_tokens) for p in prompts]
            blind = dict(zip(asked, self.answerer.answer(blinded, grey), strict=True))
        return [
            {"id": q.id, "answer": answers.get(i, ""), "blind": blind.get(i), "problem": problems.get(i, "")}
            for i, q in enumerate(questions)
        ]


def _open_images(questions: Sequence[Question]) -> tuple[list[Any], dict[Path | None, int], dict[int, str]]:
    """Decoded pictures, where each path stands among them, and what is wrong with which question."""
    from tinygptv.images import open_image

    images: list[Any] = []
    places: dict[Path | None, int] = {}
    problems: dict[int, str] = {}
    for i, question in enumerate(questions):
        if question.image is None or question.image in places:
            continue
        try:
            images.append(open_image(question.image.read_bytes()))
        except (OSError, ValueError) as error:
            problems[i] = f"{question.image}: {error}"
            continue
        places[question.image] = len(images) - 1
    return images, places, problems


def unit_path(folder: Path, name: str, number: int) -> Path:
    """File of a unit's answers."""
    return folder / f"{name}-{number:05d}.jsonl"


def _answer_all(
    settings: ScoreSettings, checkpoint: str, units: Sequence[Unit], folder: Path
) -> dict[str, list[tuple[Question, dict[str, Any]]]]:
    folder.mkdir(parents=True, exist_ok=True)
    _forget_other_runs(folder, {"checkpoint": checkpoint, "baselines": settings.baselines, "data": settings.data})
    waiting = [unit for unit in units if not unit_path(folder, unit[0], unit[1]).is_file()]
    if waiting:
        run = _answer_inline if settings.num_workers == 0 else _answer_on_ray
        run(settings, checkpoint, waiting, folder)
    answered: dict[str, list[tuple[Question, dict[str, Any]]]] = defaultdict(list)
    for name, number, questions in units:
        rows = [json.loads(line) for line in unit_path(folder, name, number).read_text().splitlines()]
        answered[name] += list(zip(questions, rows, strict=True))
    return answered


def _forget_other_runs(folder: Path, identity: dict[str, Any]) -> None:
    """Answers of another checkpoint or other data in this folder are of no use here."""
    record = folder / "run.json"
    text = json.dumps(identity, sort_keys=True)
    if not record.is_file() or record.read_text() != text:
        for path in folder.glob("*.jsonl"):
            path.unlink()
        record.write_text(text)


def _answer_inline(settings: ScoreSettings, checkpoint: str, units: Sequence[Unit], folder: Path) -> None:
    answerer = UnitAnswerer(checkpoint, settings.batch_size, settings.baselines, str(folder))
    for unit in units:
        answerer.answer(unit)


def _answer_on_ray(settings: ScoreSettings, checkpoint: str, units: Sequence[Unit], folder: Path) -> None:
    import os
    import pickle

    import ray.data

    with start_ray(settings):
        ray.data.DataContext.get_current().enable_progress_bars = not settings.quiet
        rows = [{"unit": pickle.dumps(unit)} for unit in units]
        threads = max(1, (os.cpu_count() or 1) // settings.num_workers)
        ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            UnitAnswerer,
            fn_constructor_args=(checkpoint, settings.batch_size, settings.baselines, str(folder), threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
            num_cpus=1,
        ).materialize()


# ---------------------------------------------------------------------- scores


def _score(
    benchmark: Benchmark, answered: Sequence[tuple[Question, dict[str, Any]]], settings: ScoreSettings
) -> dict[str, Any]:
    score = benchmark.score
    if settings.metric == "released" and benchmark.released_score:
        score = benchmark.released_score
    groups: dict[str, list[float]] = defaultdict(list)
    blind: list[float] = []
    for question, row in answered:
        value = score(row["answer"], question.truth)
        groups[question.split].append(value)
        if question.kind:
            groups[f"{question.split}/{question.kind}"].append(value)
        if row["blind"] is not None and question.split == "test":
            blind.append(score(row["blind"], question.truth))
    main = bootstrap(groups.get("test", []))
    return {
        "metric": benchmark.metric,
        **asdict(main),
        "blind": bootstrap(blind).value if blind else None,
        "unanswerable": sum(bool(row["problem"]) for _, row in answered),
        "parts": {name: asdict(bootstrap(values)) for name, values in sorted(groups.items())},
    }


def _write_predictions(
    path: Path, benchmarks: Sequence[Benchmark], answered: dict[str, list[tuple[Question, dict[str, Any]]]]
) -> None:
    with path.open("w") as stream:
        for benchmark in benchmarks:
            for question, row in answered[benchmark.name]:
                line = {
                    "benchmark": benchmark.name,
                    **row,
                    "instruction": question.instruction,
                    "image": str(question.image) if question.image else None,
                    "truth": question.truth,
                    "score": benchmark.score(row["answer"], question.truth),
                }
                stream.write(json.dumps(line) + "\n")


def _track(settings: ScoreSettings, output: Path, scores: dict[str, dict[str, Any]]) -> None:
    tracker = open_tracker(settings, "score")
    tracker.params(settings.model_dump())
    tracker.metrics({f"score/{name}": facts["value"] for name, facts in scores.items()}, 0)
    tracker.metrics({f"blind/{name}": f["blind"] for name, f in scores.items() if f["blind"] is not None}, 0)
    tracker.artifact(output / "result.json")
    tracker.close()


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as an aligned text table."""
    lines = [f"{'benchmark':26} {'metric':18} {'score':>6}  {'95% interval':>15} {'blind':>6} {'n':>6}"]
    for name, facts in scores.items():
        blind = "" if facts["blind"] is None else f"{facts['blind']:.1f}"
        interval = f"{facts['low']:.1f} .. {facts['high']:.1f}"
        lines.append(f"{name:26} {facts['metric']:18} {facts['value']:6.1f}  {interval:>15} {blind:>6} {facts['n']:6}")
    return "\n".join(lines)


