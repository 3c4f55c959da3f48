"""Questions with short answers: VQAv2, OK-VQA, A-OKVQA, VizWiz, GQA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluation.benchmarks.base import Benchmark, Question, Truth, each
from pipelines.evaluation.benchmarks.files import (
    COCO_FOLDERS,
    BenchmarkFiles,
    DataFolder,
    answers_of,
    label_of,
    read_json,
    text_of,
    texts_of,
)
from pipelines.settings import SettingsError
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS
from tinygptv.metrics.metrics import direct_answer_accuracy, exact_match, vizwiz_accuracy, vqa_accuracy
from tinygptv.metrics.released import contains_answer, released_okvqa, released_vizwiz


def ask(task: str, text: str = "") -> str:
    """The instruction of a benchmark for a task."""
    return EVALUATION_INSTRUCTIONS[task].replace("{}", text, 1)


@dataclass(frozen=True)
class CocoVQA:
    """A data set in the VQA format: a question file and an annotation file, or LAVIS's one list of both.

    Attributes:
        data_set: key of ``files.OWN_FOLDERS``.
        questions: names of the question file.
        annotations: names of the annotation file.
        lists: names of the list.
    """

    data_set: str
    questions: tuple[str, ...]
    annotations: tuple[str, ...]
    lists: tuple[str, ...] = ()

    def __call__(self, data: DataFolder) -> Iterator[Question]:
        """Read the questions."""
        files = data.of(self.data_set)
        listed = None
        if files.try_find(*self.annotations, fields=("annotations", "question_id", "answers")) is None:
            listed = files.try_find(*self.lists, fields=("question_id", "question", "image", "answer"))
        yield from self._read_pair(files) if listed is None else self._read_list(files, listed)

    def _read_pair(self, files: BenchmarkFiles) -> Iterator[Question]:
        annotation_path = files.find(*self.annotations, fields=("annotations", "question_id", "answers"))
        truths = {entry["question_id"]: entry for entry in read_json(annotation_path)["annotations"]}
        questions = read_json(files.find(*self.questions, fields=("questions", "question_id", "question")))
        images = files.images(*COCO_FOLDERS)
        for entry in questions["questions"]:
            truth = truths.get(entry["question_id"])
            if truth is None:
                raise SettingsError(f"{annotation_path} has no answers to question {entry['question_id']}.")
            yield Question(
                id=str(entry["question_id"]),
                instruction=ask("vqa", entry["question"]),
                image=images.coco(entry["image_id"]),
                truth={"answers": answers_of(truth["answers"])},
                kind=truth.get("answer_type", ""),
            )

    def _read_list(self, files: BenchmarkFiles, path: Path) -> Iterator[Question]:
        images = files.images(*COCO_FOLDERS)
        for entry in read_json(path):
            truth: Truth = {"answers": answers_of(entry["answer"])}
            image = images.coco(entry["image"])
            yield Question(str(entry["question_id"]), ask("vqa", entry["question"]), image, truth)


def _read_vizwiz(data: DataFolder) -> Iterator[Question]:
    files = data.of("vizwiz")
    path = files.find("Annotations/val.json", "val.json", fields=("image", "question", "answers"))
    images = files.images("val", "vizwiz_images", "images")
    for number, entry in enumerate(read_json(path)):
        yield Question(
            id=f"{number}-{entry['image']}",
            instruction=ask("vizwiz", entry["question"]),
            image=images.find(entry["image"]),
            truth={"answers": answers_of(entry["answers"])},
            kind=entry.get("answer_type", ""),
        )


def _read_gqa(data: DataFolder) -> Iterator[Question]:
    """The official object of questions by id, or LAVIS's list of ``{image, question, answer}``."""
    files = data.of("gqa")
    found = read_json(files.find("testdev_balanced_questions.json", fields=("question", "answer")))
    images = files.images("gqa/images", "gqa_images", "images", "allImages/images")
    if isinstance(found, list):
        found = {str(number): {**entry, "imageId": Path(entry["image"]).stem} for number, entry in enumerate(found)}
    for key, entry in found.items():
        yield Question(
            id=key,
            instruction=ask("vqa", entry["question"]),
            image=images.find(f"{entry['imageId']}.jpg"),
            truth={"answer": text_of(entry["answer"])},
            kind=entry.get("types", {}).get("structural", ""),
        )


@dataclass(frozen=True)
class AOKVQAEntry:
    """One question of A-OKVQA.

    Attributes:
        id: of the question.
        question: its text.
        image: path of its image.
        choices: four answers.
        correct: index of the right one.
        direct_answers: ten free answers.
        is_hard: too hard without the choices.
    """

    id: str
    question: str
    image: Path
    choices: tuple[str, ...]
    correct: int
    direct_answers: tuple[str, ...]
    is_hard: bool


def read_aokvqa(data: DataFolder) -> Iterator[AOKVQAEntry]:
    """Entries of ``aokvqa_v1p0_val.json``, as its publishers (``image_id``) or LAVIS (``image``) have them."""
    files = data.of("aokvqa")
    fields = ("question_id", "question", "choices", "correct_choice_idx", "direct_answers")
    path = files.find("aokvqa_v1p0_val.json", fields=fields)
    images = files.images("val2017", *COCO_FOLDERS)
    for entry in read_json(path):
        yield AOKVQAEntry(
            id=entry["question_id"],
            question=entry["question"],
            image=images.coco(entry["image_id"] if "image_id" in entry else entry["image"], "2017"),
            choices=texts_of(entry["choices"]),
            correct=entry["correct_choice_idx"],
            direct_answers=texts_of(entry["direct_answers"]),
            is_hard=label_of(entry.get("difficult_direct_answer", False)) == 1,
        )


def _read_aokvqa_direct(data: DataFolder) -> Iterator[Question]:
    """Questions that are too hard without choices are left out, as in the official evaluation."""
    for entry in read_aokvqa(data):
        if not entry.is_hard:
            truth: Truth = {"answers": answers_of(list(entry.direct_answers))}
            yield Question(entry.id, ask("vqa", entry.question), entry.image, truth)


def _score_vqa(answer: str, truth: Truth) -> float:
    return vqa_accuracy(answer, truth["answers"])


def score_exact(answer: str, truth: Truth) -> float:
    """1 where the answer is the true one, but for case and surrounding space."""
    return exact_match(answer, truth["answer"])


SHORT_ANSWERS = (
    Benchmark(
        "vqav2",
        "VQA accuracy",
        CocoVQA(
            "vqav2",
            ("v2_OpenEnded_mscoco_val2014_questions.json",),
            ("v2_mscoco_val2014_annotations.json",),
            ("vqa_val.json", "vqa_val_eval.json"),
        ),
        _score_vqa,
    ),
    Benchmark(
        "okvqa",
        "VQA accuracy",
        CocoVQA(
            "okvqa",
            ("OpenEnded_mscoco_val2014_questions.json", "OpenEnded_mscoco_val2014_questions_clean.json"),
            ("mscoco_val2014_annotations.json", "mscoco_val2014_annotations_clean.json"),
        ),
        _score_vqa,
        released=each(lambda answer, truth: released_okvqa(answer, truth["answers"])),
    ),
    Benchmark(
        "aokvqa_direct",
        "direct answer accuracy",
        _read_aokvqa_direct,
        lambda answer, truth: direct_answer_accuracy(answer, truth["answers"]),
    ),
    Benchmark(
        "vizwiz",
        "VizWiz accuracy",
        _read_vizwiz,
        lambda answer, truth: vizwiz_accuracy(answer, truth["answers"]),
        released=each(lambda answer, truth: released_vizwiz(answer, truth["answers"])),
    ),
    Benchmark(
        "gqa",
        "exact match",
        _read_gqa,
        score_exact,
        released=each(lambda answer, truth: contains_answer(answer, truth["answer"])),
    ),
)
