"""One's own rows as a benchmark: the files that ``prepare_data`` reads, scored instead of trained on.

    {"image": "a.jpg", "question": "what colour is the mug?", "answer": "red"}
    {"image": "a.jpg", "turns": [{"question": "", "answers": ["the mug"]}], "boxes": [[9, 20, 90, 80]], "task": "refer"}

Every question of a row is asked, each with the turns before it and their true answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines import storage
from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.data.sources.delimited import DELIMITED, read_delimited
from pipelines.data.sources.drafts import Draft, tidy_turn
from pipelines.data.sources.images import data_url_of, image_path, unicode_forms
from pipelines.data.sources.json_entries import plain_name, read_entries
from pipelines.data.sources.own import JsonRowsReader
from pipelines.data.sources.own_rows import own_draft
from pipelines.evaluation.benchmarks.base import Benchmark, Question, Truth
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.benchmarks.grounding import OVERLAPS, score_refer
from pipelines.settings import SettingsError
from tinygptv.data.boxes import box_fault, format_box
from tinygptv.data.image_orientation import read_orientation
from tinygptv.data.prompt_layout import Exchange
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS, INSTRUCTIONS
from tinygptv.metrics.metrics import exact_match, vqa_accuracy
from tinygptv.metrics.vqa_text import normalise_answer

OWN = "own"
METRICS = ("exact", "vqa", "iou")
"""``metric=`` of one's own rows."""

_ANNOTATORS = 3
_UNKNOWN = (1, 1)
_FILES = ("*.jsonl", "*.ndjson", "*.json", *(f"*{ending}" for ending in DELIMITED))


def own_benchmark(metric: str, data: DataFolder) -> Benchmark:
    """The benchmark of one's own rows.

    Args:
        metric: one of ``METRICS``; anything else takes ``iou`` where the first row asks for a box, else ``exact``.
        data: file of rows, or folder with such files.

    Raises:
        SettingsError: there are no rows, or the first cannot be used.
    """
    if metric not in METRICS:
        first = next(_read(data), None)
        metric = "iou" if first is not None and "box" in first.truth else "exact"
    return _BENCHMARKS[metric]


def _score_exact(answer: str, truth: Truth) -> float:
    return max(exact_match(answer, each) for each in truth["answers"])


def _score_vqa(answer: str, truth: Truth) -> float:
    """VQA accuracy; of fewer than three answers, any may be given."""
    if len(truth["answers"]) >= _ANNOTATORS:
        return vqa_accuracy(answer, truth["answers"])
    return float(normalise_answer(answer) in {normalise_answer(each) for each in truth["answers"]})


def _read(data: DataFolder) -> Iterator[Question]:
    files, paths = data.of(OWN), _files(data.root)
    for path in paths:
        files.used.append(path)
        folder = data.image_root or path.parent
        prefix = f"{path.name}, " if len(paths) > 1 else ""  # a line's number is unique within its file
        for key, fields in _rows(path):
            for question in _questions(path, key, fields, folder):
                yield replace(question, id=prefix + question.id)


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = [path for pattern in _FILES for path in sorted(root.glob(pattern)) if not path.name.startswith(".")]
    if not found:
        raise SettingsError(f"data={root} is no file of rows and no folder of them: give data=rows.jsonl.")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and fields of every row."""
    location = storage.Location.parse(str(path))
    if plain_name(path.name).endswith(DELIMITED):
        yield from read_delimited(location)
        return
    source = SourceInput("jsonl", str(path), str(path.parent), OWN, "")
    for unit in JsonRowsReader().plan(source):
        yield from read_entries(unit)


def _questions(path: Path, key: str, fields: Any, folder: Path) -> Iterator[Question]:
    where = f"{path.name}, {key if key.startswith('line') else f'row {key}'}"
    if isinstance(fields, Rejected):
        raise SettingsError(f"{where}: {fields.reason}.")
    try:
        draft = own_draft(fields, "")
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{where}: {error}.") from error
    if isinstance(draft.image, bytes) or data_url_of(draft.image or ""):
        raise SettingsError(f"{where}: the image is in the row; name a file.")
    image = _find(folder, image_path(draft.image)) if draft.image else None
    turns = tuple(tidy_turn(turn) for turn in draft.turns)
    if not all(turn.answers for turn in turns):
        raise SettingsError(f"{where}: a question has no answer.")
    draft = replace(draft, turns=turns)
    history: list[Exchange] = []
    for number, turn in enumerate(draft.turns):
        instruction, truth = _ask(where, draft, number, image)
        name = f"{key}/{number}" if number else key
        yield Question(name, instruction, image, truth, kind=draft.task, history=tuple(history))
        history.append(Exchange(instruction, turn.answers[0]))


def _find(folder: Path, name: str) -> Path:
    paths = [folder / form for form in unicode_forms(name)]
    return next((path for path in paths[1:] if path.is_file()), paths[0])


def _ask(where: str, draft: Draft, number: int, image: Path | None) -> tuple[str, Truth]:
    """Instruction and truth of a turn."""
    turn, task = draft.turns[number], draft.task
    if task not in INSTRUCTIONS:
        raise SettingsError(f"{where}: task {task!r} is unknown; known: {', '.join(INSTRUCTIONS)}.")
    wording = EVALUATION_INSTRUCTIONS.get(task) or (INSTRUCTIONS[task] or ("{}",))[0]
    if task not in ("refer", "identify"):
        return wording.replace("{}", turn.question, 1), {"answers": list(turn.answers)}
    if not draft.boxes or image is None:
        raise SettingsError(f"{where}: task {task!r} needs an image and boxes, as [[x1, y1, x2, y2]] in pixels.")
    width, height = _size(image)
    if (width, height) != _UNKNOWN and (fault := box_fault(draft.boxes[0], width, height)):
        raise SettingsError(f"{where}: {fault}.")
    if task == "refer":
        truth: Truth = {"box": list(draft.boxes[0]), "width": width, "height": height, "answers": list(turn.answers)}
        return wording.replace("{}", turn.answers[0], 1), truth
    return wording.replace("{}", format_box(draft.boxes[0], width, height), 1), {"answers": list(turn.answers)}


def _size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is looked at; unknown where it cannot be opened, which is counted later."""
    try:
        with Image.open(path) as image:
            return image.size if read_orientation(image) < 5 else (image.height, image.width)
    except (OSError, ValueError):
        return _UNKNOWN


def _boxes_only(data: DataFolder) -> Iterator[Question]:
    """Rows that ask for boxes.

    Raises:
        SettingsError: a row does not.
    """
    for question in _read(data):
        if "box" not in question.truth:
            raise SettingsError(
                f"metric=iou: row {question.id} asks for no box (task refer with boxes); score it by metric=exact."
            )
        yield question


def _texts_only(data: DataFolder) -> Iterator[Question]:
    """Rows that ask for texts.

    Raises:
        SettingsError: a row asks for a box.
    """
    for question in _read(data):
        if "box" in question.truth:
            raise SettingsError(
                f"row {question.id} asks for a box: score such rows by metric=iou, in a file of theirs."
            )
        yield question


_LONGEST_ANSWER = 64

_BENCHMARKS = {
    "exact": Benchmark(OWN, "exact match", _texts_only, _score_exact, _LONGEST_ANSWER),
    "vqa": Benchmark(OWN, "VQA accuracy", _texts_only, _score_vqa, _LONGEST_ANSWER),
    "iou": Benchmark(OWN, "IoU > 0.5", _boxes_only, score_refer, statistics=OVERLAPS),
}
