"""Evaluation: a checkpoint or artifact on benchmarks, as a Ray Data batch job with a report.

Questions are answered in units that depend on the benchmark and the settings alone. Each finished unit is a file, so
that a kill loses only units in work. Every benchmark is answered two more times, with a blank image and with another
question's, so that a score shows what the image contributes.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pipelines import storage
from pipelines.evaluation.answers import Answers, read_answers
from pipelines.evaluation.benchmarks import Benchmark, Question, find_benchmarks
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.benchmarks.own import METRICS, OWN, own_benchmark
from pipelines.evaluation.compare import Comparison, compare, read_predictions, refuse_other_rules
from pipelines.evaluation.compare_page import COMPARISON_PAGE, comparison_page
from pipelines.evaluation.page import score_page
from pipelines.evaluation.scoring import (
    PREDICTIONS,
    BenchmarkScore,
    Prediction,
    metric_of,
    score_benchmark,
    write_predictions,
)
from pipelines.evaluation.track import ScoreResult, track_scores
from pipelines.evaluation.worker import AnswerOptions, QuestionUnit, UnitAnswerer
from pipelines.fingerprint import Fingerprint, checkpoint_digest, claim, digest_of
from pipelines.json_files import read_json_object, write_json
from pipelines.node_cache import local_checkpoint, local_data
from pipelines.progress import Bar
from pipelines.settings import ScoreSettings, SettingsError
from pipelines.tracking.identity import RUN_FILE
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.units import Workers, map_units
from tinygptv.checkpoint.folders import hash_file

logger = logging.getLogger(__name__)

RESULTS = ("answers", PREDICTIONS, "report.html", COMPARISON_PAGE, "result.json", "run.json", "unsent.jsonl")
"""Files of a score run in its output folder."""

_IMAGES_TRIED = 50
_PATHS_NAMED = 8


def evaluate(
    settings: ScoreSettings, benchmarks: Sequence[Benchmark] | None = None, *, parent_run_id: str = ""
) -> ScoreResult:
    """Score a checkpoint.

    Args:
        settings: what, where, how.
        benchmarks: benchmarks that have no name; None looks up ``settings.benchmark``.
        parent_run_id: MLflow run to nest under.

    Returns:
        The content of ``result.json``.

    Raises:
        SettingsError: a setting cannot be used, or another run is writing there.
        FileNotFoundError: a benchmark's files are missing.
    """
    work = storage.WorkFolder(settings.output_location("outputs/score"))
    storage.check_access(work.location, writes=True)
    with storage.alone(work.uri()):
        storage.remove_drafts(str(work.path))
        return _score(settings, benchmarks, work, parent_run_id)


def _score(
    settings: ScoreSettings, benchmarks: Sequence[Benchmark] | None, work: storage.WorkFolder, parent_run_id: str
) -> ScoreResult:
    started, began, output = time.perf_counter(), time.time(), work.path
    data = _data_folder(settings)
    chosen = list(benchmarks or _find(settings, data))
    _refuse_unlike_predictions(settings, chosen, work)
    checkpoint = _find_checkpoint(settings)
    asked = {benchmark.name: _read(settings, benchmark, data) for benchmark in chosen}
    _refuse_other_file(data.root, asked)
    questions = {name: read.questions for name, read in asked.items()}
    _claim_output(settings, work, _score_fingerprint(settings, checkpoint, questions))
    options = _options(settings, checkpoint, data, work.uri("answers"))
    units = [unit for benchmark in chosen for unit in _units(options, benchmark, questions[benchmark.name])]
    answering = time.perf_counter()
    answered, num_now = _answer_all(settings, options, units)
    answering_s = time.perf_counter() - answering
    released = settings.metric == "released"
    scores = {b.name: score_benchmark(b, answered[b.name], released=released) for b in chosen}
    for name, score in scores.items():
        score["files"] = [{"path": str(path), "sha256": hash_file(path)} for path in asked[name].files]
    lines = write_predictions(output / PREDICTIONS, chosen, answered, released=released)
    page = score_page(scores, lines, options.checkpoint, settings.page_cases)
    storage.write_atomically(str(output / "report.html"), page.encode())
    result: ScoreResult = {
        "checkpoint": options.checkpoint,
        "metric": settings.metric,
        "benchmarks": scores,
        "questions_per_second": round(num_now / answering_s, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "predictions": work.uri(PREDICTIONS),
        "page": work.uri("report.html"),
        "result": work.uri("result.json"),
    }
    if settings.compare_with:
        metrics = {name: score["metric"] for name, score in scores.items()}
        result["comparison"] = _compare(settings, output, lines, metrics)
        result["comparison_page"] = work.uri(COMPARISON_PAGE)
    write_json(output / "result.json", result)
    track_scores(settings, output, result, lines, parent_run_id, began)
    pages = ["report.html", COMPARISON_PAGE] if settings.compare_with else ["report.html"]
    work.publish(PREDICTIONS, *pages, RUN_FILE, JOURNAL_FILE, "result.json")
    _tell_problems(scores)
    return result


def _claim_output(settings: ScoreSettings, work: storage.WorkFolder, fingerprint: Fingerprint) -> None:
    """Take the output folder for these inputs, and continue the tracker's run of an earlier command."""
    given = [settings.checkpoint, settings.data, settings.images]
    claim(work.uri(), fingerprint, RESULTS, overwrite=settings.overwrite, inputs=given)
    work.fetch(RUN_FILE, JOURNAL_FILE)


def _tell_problems(scores: Mapping[str, BenchmarkScore]) -> None:
    for name, score in scores.items():
        for problem in score["problems"][:3]:
            logger.warning("%s, no answer to question %s", name, problem)


def _refuse_unlike_predictions(settings: ScoreSettings, chosen: Sequence[Benchmark], work: storage.WorkFolder) -> None:
    """Raise before anything is answered where nothing can be compared; predictions at a URI are read at the end."""
    location = settings.compare_with
    if location and storage.absolute(location) == work.uri():
        raise SettingsError(f"compare_with={location} is the output of this run: give another output=.")
    if location and storage.is_local(location):
        other = Path(storage.absolute(location))
        read_predictions(other)
        released = settings.metric == "released"
        refuse_other_rules({each.name: metric_of(each, released=released) for each in chosen}, other)


def _compare(
    settings: ScoreSettings, output: Path, lines: Sequence[Prediction], metrics: Mapping[str, str]
) -> dict[str, Comparison]:
    """Compare with an earlier run, in a folder or at a URI, and write the page."""
    location = settings.compare_with
    other = Path(storage.absolute(location))
    if not storage.is_local(location):
        earlier = storage.WorkFolder(location)  # its folder goes with it
        earlier.fetch(PREDICTIONS, "result.json")
        other = earlier.path
    refuse_other_rules(metrics, other)
    compared = compare(output, other)
    titles = str(settings.checkpoint), str((read_json_object(other / "result.json") or {}).get("checkpoint", location))
    page = comparison_page(compared, lines, read_predictions(other), titles, settings.page_cases)
    storage.write_atomically(str(output / COMPARISON_PAGE), page.encode())
    return compared


def _find(settings: ScoreSettings, data: DataFolder) -> list[Benchmark]:
    if not settings.data:
        raise SettingsError("give data=DIR, the folder of the benchmark's files; with benchmark=own the file of rows.")
    if not settings.benchmark:
        raise SettingsError("give benchmark=NAME, e.g. miniature, or own for the rows of data=rows.jsonl.")
    if settings.benchmark in (OWN, [OWN]):
        return [own_benchmark(settings.metric, data)]
    if settings.metric in METRICS:
        raise SettingsError(f"metric={settings.metric} is for one's own rows: give benchmark=own data=rows.jsonl.")
    return find_benchmarks(settings.benchmark)


# ---------------------------------------------------------------------- units of work


def _find_checkpoint(settings: ScoreSettings) -> Path:
    if not settings.checkpoint:
        raise SettingsError("give checkpoint=DIR, the checkpoint or artifact to score.")
    checkpoint = local_checkpoint(settings.checkpoint, weights=False)
    if not (checkpoint / "config.json").is_file():
        raise SettingsError(f"checkpoint={settings.checkpoint} is no checkpoint or artifact: it has no config.json.")
    return checkpoint


def _score_fingerprint(
    settings: ScoreSettings, checkpoint: Path, questions: Mapping[str, Sequence[Question]]
) -> Fingerprint:
    """Inputs that decide the scores. Images are not part of it: the answers of those that changed are given again."""
    return Fingerprint.of(
        "score",
        checkpoint=checkpoint_digest(checkpoint),
        metric=settings.metric,
        baselines=settings.baselines,
        limit=settings.limit,
        questions={name: digest_of([_without_folder(q) for q in asked]) for name, asked in questions.items()},
    )


def _without_folder(question: Question) -> dict[str, object]:
    return {**asdict(question), "image": question.image.name if question.image else None}


def _options(settings: ScoreSettings, checkpoint: Path, data: DataFolder, answers: str) -> AnswerOptions:
    storage.make_folder(answers)
    given = ((settings.data, data.root), (settings.images, data.image_root))
    return AnswerOptions(
        checkpoint=storage.absolute(settings.checkpoint),
        fingerprint=checkpoint_digest(checkpoint),
        batch_size=settings.batch_size,
        baselines=settings.baselines,
        released=settings.metric == "released",
        answers_dir=answers,
        copies=tuple((uri, str(folder)) for uri, folder in given if uri and not storage.is_local(uri)),
    )


def _units(options: AnswerOptions, benchmark: Benchmark, questions: Sequence[Question]) -> Iterator[QuestionUnit]:
    """Cut a benchmark's questions into units; a unit's file is named by everything that its answers depend on."""
    decides = asdict(options) | {"answers_dir": "", "checkpoint": "", "copies": ()}
    size = 4 * options.batch_size
    for number, start in enumerate(range(0, len(questions), size)):
        part = tuple(questions[start : start + size])
        images = [_image_state(question.image) for question in part]
        inputs = ([_without_folder(q) for q in part], images, benchmark.max_new_tokens, benchmark.generates, decides)
        file = f"{benchmark.name}-{number:05d}-{digest_of(inputs)}.jsonl"
        yield QuestionUnit(benchmark.name, number, part, benchmark.max_new_tokens, benchmark.generates, file)


def _image_state(image: Path | None) -> str:
    """Changes where an image appears, disappears or is replaced."""
    try:
        stat = image.stat() if image else None
    except OSError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}" if stat else "none"


@dataclass(frozen=True)
class _Asked:
    """Questions of a benchmark, and the files that they were read from."""

    questions: list[Question]
    files: list[Path]


def _data_folder(settings: ScoreSettings) -> DataFolder:
    images = local_data(settings.images) if settings.images else None
    if images is not None and not images.is_dir():
        raise SettingsError(f"images={settings.images} is no folder: give the one that holds the benchmark's images.")
    return DataFolder(local_data(settings.data), images)


def _read(settings: ScoreSettings, benchmark: Benchmark, data: DataFolder) -> _Asked:
    """The questions of a benchmark that are asked.

    Raises:
        SettingsError: its files are not as officially distributed, or its images are missing.
        FileNotFoundError: its files are missing.
    """
    data.opened.clear()
    try:
        questions = list(benchmark.read(data))
    except SettingsError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"benchmark={benchmark.name}: an entry of {_names(_used(data)) or 'its files'} is not as officially "
            f"distributed: {type(error).__name__} {error}."
        ) from error
    questions = questions[: settings.limit] if settings.limit else questions
    _check_images(benchmark.name, questions, data)
    return _Asked(questions, _used(data))


def _refuse_other_file(root: Path, asked: Mapping[str, _Asked]) -> None:
    """Refuse a file as ``data=`` that no benchmark read: they found their own beside it."""
    used = [path for read in asked.values() for path in read.files]
    if root.is_file() and root not in used:
        raise SettingsError(
            f"data={root} is not what {', '.join(asked)} would read, which is {_names(used)}: give that, or its folder."
        )


def _used(data: DataFolder) -> list[Path]:
    return [path for files in data.opened for path in files.used]


def _check_images(name: str, questions: Sequence[Question], data: DataFolder) -> None:
    """Raise where the image folder is missing; single missing images are counted later."""
    if not questions:
        raise SettingsError(f"benchmark={name} has no questions in the given data.")
    paths = [question.image for question in questions[:_IMAGES_TRIED] if question.image]
    if paths and not any(path.is_file() for path in paths):
        folders = [folder for files in data.opened for folder in files.looked_in] or [paths[0].parent]
        raise SettingsError(
            f"benchmark={name}: none of the first {len(paths)} images exists; the first, {paths[0].name}, is not in "
            f"{_names(folders)}. Give images=DIR, the folder that holds them or has it somewhere below."
        )


def _names(paths: Sequence[Path]) -> str:
    left = len(paths) - _PATHS_NAMED
    return ", ".join(map(str, paths[:_PATHS_NAMED])) + (f" or {left} more folders" if left > 0 else "")


# ---------------------------------------------------------------------- answering


def _answer_all(
    settings: ScoreSettings, options: AnswerOptions, units: Sequence[QuestionUnit]
) -> tuple[dict[str, list[tuple[Question, Answers]]], int]:
    """Answers of all units, by benchmark, and the number of questions that were answered by this call."""
    folder = storage.Location.parse(options.answers_dir)
    wanted, present = {unit.file for unit in units}, set(storage.list_names(folder))
    for name in present - wanted:  # answers of another checkpoint or other questions, or half a file
        storage.remove_file(folder / name)
    whole = {unit.file: found for unit in units if unit.file in present and (found := _whole_answers(folder, unit))}
    waiting = [unit for unit in units if unit.file not in whole]
    if len(waiting) < len(units):
        logger.info("%d of %d units are answered already", len(units) - len(waiting), len(units))
    _answer_units(settings, options, waiting)
    answered: dict[str, list[tuple[Question, Answers]]] = defaultdict(list)
    for unit in units:
        answers = whole.get(unit.file) or read_answers((folder / unit.file).uri, unit.questions)
        answered[unit.benchmark] += list(zip(unit.questions, answers, strict=True))
    return answered, sum(len(unit.questions) for unit in waiting)


def _whole_answers(folder: storage.Location, unit: QuestionUnit) -> list[Answers]:
    """A unit's answers; none where its file is damaged, which is removed."""
    try:
        return read_answers((folder / unit.file).uri, unit.questions)
    except ValueError:
        logger.warning("%s is damaged: its questions are answered again.", folder / unit.file)
        storage.remove_file(folder / unit.file)
        return []


def _answer_units(settings: ScoreSettings, options: AnswerOptions, units: Sequence[QuestionUnit]) -> None:
    """Answer units into files, in this process or by Ray Data actors."""
    threads = settings.threads_per_worker
    if settings.num_workers and not threads:
        threads = max(1, (os.cpu_count() or 1) // settings.num_workers)
    setup = partial(UnitAnswerer, options, threads, "cuda" if settings.gpus_per_worker else "cpu")
    workers = Workers(settings.num_workers, num_gpus=settings.gpus_per_worker, reuse_setup=True)
    answered, total = 0, sum(len(unit.questions) for unit in units)
    with Bar("score", quiet=settings.quiet) as bar:
        for unit, _ in map_units(setup, units, workers, settings, name="score"):
            answered += len(unit.questions)
            bar.update(answered, total)
