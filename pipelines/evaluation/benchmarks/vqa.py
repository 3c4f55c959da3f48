"""Questions with short answers: VQAv2, OK-VQA, A-OKVQA, VizWiz, GQA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.evaluation.benchmarks.base import Benchmark, Question, each
from pipelines.evaluation.benchmarks.files import Images, coco_names, find_file, read_json
from tinygptv.data.prompts import EVALUATION_INSTRUCTIONS
from tinygptv.metrics.metrics import direct_answer_accuracy, exact_match, vizwiz_accuracy, vqa_accuracy
from tinygptv.metrics.released import contains_answer, released_okvqa, released_vizwiz


def ask(task: str, text: str = "") -> str:
    """The wording that benchmarks use for a task."""
    return EVALUATION_INSTRUCTIONS[task].replace("{}", text, 1)


def _coco_vqa(name: str, questions: tuple[str, ...], annotations: tuple[str, ...]) -> Any:
    """Reader of the VQA format: a question file and an annotation file."""

    def read(data: Path) -> Iterator[Question]:
        annotation_path = find_file(data, name, *annotations)
        truths = {entry["question_id"]: entry for entry in read_json(annotation_path)["annotations"]}
        question_path = find_file(data, name, *questions)
        images = Images(question_path, "val2014")
        for entry in read_json(question_path)["questions"]:
            truth = truths.get(entry["question_id"])
            if truth is None:
                raise ValueError(f"{annotation_path} has no answers to question {entry['question_id']}.")
            yield Question(
                id=str(entry["question_id"]),
                instruction=ask("vqa", entry["question"]),
                image=images.find(*coco_names(entry["image_id"], "val2014")),
                truth={"answers": [answer["answer"] for answer in truth["answers"]]},
                kind=truth.get("answer_type", ""),
            )

    return read


def _read_vizwiz(data: Path) -> Iterator[Question]:
    path = find_file(data, "vizwiz", "val.json", "Annotations/val.json")
    images = Images(path, "val")
    for number, entry in enumerate(read_json(path)):
        yield Question(
            id=f"{number}-{entry['image']}",
            instruction=ask("vizwiz", entry["question"]),
            image=images.find(entry["image"]),
            truth={"answers": [answer["answer"] for answer in entry["answers"]]},
            kind=entry.get("answer_type", ""),
        )


def _read_gqa(data: Path) -> Iterator[Question]:
    """The official object of questions by id, or the list of ``{image, question, answer}`` that the release reads."""
    path = find_file(data, "gqa", "testdev_balanced_questions.json")
    images = Images(path, "gqa/images")
    found = read_json(path)
    if isinstance(found, list):
        found = {str(number): {**entry, "imageId": Path(entry["image"]).stem} for number, entry in enumerate(found)}
    for key, entry in found.items():
        yield Question(
            id=key,
            instruction=ask("vqa", entry["question"]),
            image=images.find(f"{entry['imageId']}.jpg"),
            truth={"answer": entry["answer"]},
            kind=entry.get("types", {}).get("structural", ""),
        )


def read_aokvqa(data: Path) -> Iterator[dict[str, Any]]:
    """Entries of ``aokvqa_v1p0_val.json``, each with the path of its picture as ``path``."""
    path = find_file(data, "aokvqa", "aokvqa_v1p0_val.json")
    images = Images(path, "val2017")
    for entry in read_json(path):
        yield {**entry, "path": images.find(f"{entry['image_id']:012d}.jpg")}


def _read_aokvqa_direct(data: Path) -> Iterator[Question]:
    """Questions that are too hard without choices are left out, as in the official evaluation."""
    for entry in read_aokvqa(data):
        if not entry.get("difficult_direct_answer", False):
            instruction = ask("vqa", entry["question"])
            truth = {"answers": entry["direct_answers"]}
            yield Question(entry["question_id"], instruction, entry["path"], truth)


def _score_vqa(answer: str, truth: dict[str, Any]) -> float:
    return vqa_accuracy(answer, truth["answers"])


def _score_gqa(answer: str, truth: dict[str, Any]) -> float:
    return exact_match(answer, truth["answer"])


SHORT_ANSWERS = (
    Benchmark(
        "vqav2",
        "VQA accuracy",
        _coco_vqa(
            "vqav2",
            ("v2_OpenEnded_mscoco_val2014_questions.json",),
            ("v2_mscoco_val2014_annotations.json",),
        ),
        _score_vqa,
    ),
    Benchmark(
        "okvqa",
        "VQA accuracy",
        _coco_vqa(
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
        _score_gqa,
        released=each(lambda answer, truth: contains_answer(answer, truth["answer"])),
    ),
)
