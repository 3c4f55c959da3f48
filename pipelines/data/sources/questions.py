"""Questions whose answers are in a second file, as the publishers of VQAv2 and OK-VQA distribute them.

v2_OpenEnded_mscoco_train2014_questions.json     {"questions": [{"question_id", "image_id", "question"}]}
v2_mscoco_train2014_annotations.json             {"annotations": [{"question_id", "answers": [{"answer"}]}]}
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.data.sources.base import Malformed, SourceInput, SourceUnit
from pipelines.data.sources.json_entries import JsonForm, open_entries, plan_entries, read_beside
from pipelines.data.sources.json_items import Item, JsonDamage, iterate_items
from pipelines.data.sources.json_rows import id_of
from pipelines.settings import SettingsError

_QUESTIONS, _ANNOTATIONS = "questions", "annotations"
_ANSWER_FIELDS = ("answer", "answers", "direct_answers", "multiple_choice_answer")


@dataclass(frozen=True)
class ImagesAndAnswers:
    """Data that a worker needs beside the entries of a slice.

    Attributes:
        folder: of the images; None for text only.
        answers: question_id -> answers, for the questions of the slice; None where the entries hold their answers.
    """

    folder: storage.Location | None
    answers: Mapping[Any, tuple[str, ...]] | None = None


def has_questions_alone(file: storage.FoundFile, form: JsonForm) -> bool:
    """Whether a file holds questions without answers."""
    if form.member != _QUESTIONS:
        return False
    try:
        with open_entries(file.location) as stream:
            first = next(iterate_items(stream, form.member), None)
    except (JsonDamage, storage.DamagedFileError):
        return False
    return first is not None and isinstance(first.value, dict) and not any(f in first.value for f in _ANSWER_FIELDS)


def plan_questions(
    source: SourceInput, file: storage.FoundFile, form: JsonForm, folder: storage.Location | None
) -> Iterator[SourceUnit]:
    """Slices of a file of questions; each carries the answers of its questions, so that units need no second file.

    Raises:
        SettingsError: the file with the answers is not beside it.
    """
    answers = _read_answers(_answers_file(source, file))

    def about(items: list[Item]) -> ImagesAndAnswers:
        ids = [id_of(item.value, "question_id") for item in items]
        return ImagesAndAnswers(folder, {number: answers[number] for number in ids if number in answers})

    yield from plan_entries(source, file, form, about=about)


def with_answers(entry: Any, extra: ImagesAndAnswers) -> Any:
    """An entry with its answers, where these are in a second file.

    Raises:
        Malformed: the second file does not know the question.
    """
    if extra.answers is None:
        return entry
    answers = extra.answers.get(id_of(entry, "question_id"))
    if answers is None:
        raise Malformed(f"question {id_of(entry, 'question_id')} has no answers in the annotations file")
    return {**entry, "answers": answers}


def _answers_file(source: SourceInput, file: storage.FoundFile) -> storage.Location:
    name = file.location.name
    names = [
        name.replace("OpenEnded_", "").replace(_QUESTIONS, _ANNOTATIONS),
        name.replace(_QUESTIONS, _ANNOTATIONS),
    ]
    for candidate in names:
        location = file.location.parent / candidate
        if candidate != name and storage.exists(location):
            return location
    wanted = names[0] if names[0] != name else "its annotations (as v2_mscoco_train2014_annotations.json)"
    raise SettingsError(
        f"{file.location} holds questions without answers: put {wanted} beside it, or give source={source.source} a "
        "file that holds both."
    )


def _read_answers(location: storage.Location) -> dict[Any, tuple[str, ...]]:
    found: dict[Any, tuple[str, ...]] = {}
    for entry in read_beside(location, _ANNOTATIONS):
        answers = entry.get("answers") if isinstance(entry, dict) else None
        if isinstance(answers, list):
            texts = (answer.get("answer") if isinstance(answer, dict) else answer for answer in answers)
            interned = (sys.intern(_utf8(text)) for text in texts if isinstance(text, str))
            found[id_of(entry, "question_id")] = tuple(interned)
    if not found:
        raise SettingsError(f"{location} holds no answers in {_ANNOTATIONS!r}: is it the right file?")
    return found


def _utf8(text: str) -> str:
    """Text whose bytes were read as Latin-1."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text  # it was escaped in the file, or is no UTF-8
