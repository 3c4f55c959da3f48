"""One answer among several: A-OKVQA's choices, IconQA, VSR, POPE, Hateful Memes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.evaluation.benchmarks.base import Benchmark, Outcome, Question, Read, Statistics, Truth, each
from pipelines.evaluation.benchmarks.files import (
    COCO_FOLDERS,
    DataFolder,
    choice_of,
    label_of,
    read_json,
    read_lines,
    text_of,
    texts_of,
)
from pipelines.evaluation.benchmarks.vqa import ask, read_aokvqa, score_exact
from tinygptv.metrics.metrics import auroc, f1, pope_answer, precision, recall, yes_no
from tinygptv.metrics.released import contains_answer, released_hateful


def _read_aokvqa_choice(data: DataFolder) -> Iterator[Question]:
    for entry in read_aokvqa(data):
        truth: Truth = {"answer": choice_of(entry.choices, entry.correct)}
        yield Question(entry.id, ask("vqa", entry.question), entry.image, truth, choices=entry.choices)


def _read_iconqa(data: DataFolder) -> Iterator[Question]:
    """``problems.json`` with ``pid_splits.json`` of the official archive, or the release's ``choose_text_val.json``."""
    files = data.of("iconqa")
    listed = files.try_find("choose_text_val.json", fields=("image_id", "question", "choices", "answer"))
    if listed is not None:
        entries = {str(entry["image_id"]): entry for entry in read_json(listed)}
    else:
        problems = read_json(files.find("problems.json", fields=("question", "choices", "answer")))
        splits = read_json(files.find("pid_splits.json"))
        entries = {pid: problems[pid] for pid in splits["choose_txt_val"]}
    images = files.images("iconqa/val/choose_txt", "val/choose_txt", "choose_txt", "iconvqa_images", "iconqa_images")
    for pid, entry in entries.items():
        choices = texts_of(entry["choices"])
        truth: Truth = {"answer": choice_of(choices, entry["answer"])}
        yield Question(pid, ask("vqa", entry["question"]), images.find(f"{pid}/image.png"), truth, choices=choices)


def _read_vsr(data: DataFolder) -> Iterator[Question]:
    files = data.of("vsr")
    names = ("zeroshot/test.jsonl", "vsr_zeroshot/test.jsonl", "test.jsonl")
    path = files.find(*names, fields=("image", "caption", "label"), not_in=("random", "vsr_random"))
    images = files.images("train2017", "val2017", "trainval2017", "vsr_images", "images", *COCO_FOLDERS)
    for number, entry in enumerate(read_lines(path)):
        truth: Truth = {"answer": "true" if label_of(entry["label"]) else "false"}
        image = images.coco(entry["image"], "2017")
        yield Question(str(number), ask("true_false", entry["caption"]), image, truth, kind=entry.get("relation", ""))


def _read_pope(kind: str) -> Read:
    def read(data: DataFolder) -> Iterator[Question]:
        files = data.of("pope")
        path = files.find(f"coco_pope_{kind}.json", fields=("question_id", "image", "text", "label"))
        images = files.images(*COCO_FOLDERS)
        for entry in read_lines(path):
            image = images.coco(entry["image"])
            truth: Truth = {"answer": _yes_or_no(entry["label"])}
            yield Question(str(entry["question_id"]), ask("vqa", entry["text"]), image, truth)

    return read


def _yes_or_no(label: object) -> str:
    answer = text_of(label).strip().lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"{answer[:80]!r} is neither yes nor no")
    return answer


def score_pope(answer: str, truth: Truth) -> float:
    """1 where the answer, read as POPE reads it, is the true one."""
    return float(pope_answer(answer) == truth["answer"])


def _pope_columns(outcome: Outcome) -> tuple[float, float]:
    """Predicted yes, true yes; a question without an answer counts as answered wrongly."""
    truth = outcome.question.truth["answer"] == "yes"
    predicted = (not truth) if outcome.problem else pope_answer(outcome.answer) == "yes"
    return float(predicted), float(truth)


POPE_STATISTICS = Statistics(
    _pope_columns,
    {
        "F1": lambda rows: f1(rows[:, 0], rows[:, 1]),
        "accuracy": lambda rows: float((rows[:, 0] == rows[:, 1]).mean()),
        "precision": lambda rows: precision(rows[:, 0], rows[:, 1]),
        "recall": lambda rows: recall(rows[:, 0], rows[:, 1]),
        "yes ratio": lambda rows: float(rows[:, 0].mean()),
    },
)
"""F1 with yes as the positive class, and POPE's other numbers."""


def _read_hateful(data: DataFolder) -> Iterator[Question]:
    files = data.of("hateful_memes")
    path = files.find("dev.jsonl", "dev_seen.jsonl", fields=("id", "img", "label", "text"))
    images = files.images("hm_images", "img", "images")
    for entry in read_lines(path):
        yield Question(
            str(entry["id"]),
            ask("hateful", entry["text"]),
            images.find(entry["img"], Path(entry["img"]).name),
            {"label": label_of(entry["label"])},
            choices=("yes", "no"),
        )


def _score_hateful(answer: str, truth: Truth) -> float:
    return float(yes_no(answer) == ("yes" if truth["label"] else "no"))


def _hateful_columns(outcome: Outcome) -> tuple[float, float, float]:
    """loss(no) - loss(yes), the label, and whether the generated answer is right."""
    label = outcome.question.truth["label"]
    if outcome.problem:
        return (-np.inf if label else np.inf, label, 0.0)
    yes, no = outcome.losses
    return (no - yes, label, _score_hateful(outcome.answer, outcome.question.truth))


_HATEFUL_STATISTICS = Statistics(
    _hateful_columns,
    {
        "AUROC": lambda rows: auroc(rows[:, 0], rows[:, 1]),
        "accuracy": lambda rows: float(rows[:, 2].mean()),
    },
)


def score_choice(answer: str, truth: Truth) -> float:
    """1 where the right choice was taken."""
    return float(answer == truth["answer"])


CHOICES = (
    Benchmark("aokvqa_choice", "accuracy", _read_aokvqa_choice, score_choice, generates=False),
    Benchmark("iconqa", "accuracy", _read_iconqa, score_choice, generates=False),
    Benchmark(
        "vsr",
        "exact match",
        _read_vsr,
        score_exact,
        released=each(lambda answer, truth: contains_answer(answer, truth["answer"])),
    ),
    *(
        Benchmark(f"pope_{kind}", "F1", _read_pope(kind), score_pope, statistics=POPE_STATISTICS)
        for kind in ("random", "popular", "adversarial")
    ),
    Benchmark(
        "hateful_memes",
        "AUROC",
        _read_hateful,
        _score_hateful,
        statistics=_HATEFUL_STATISTICS,
        released=each(lambda answer, truth: released_hateful(answer, truth["label"])),
    ),
)
