"""The drawn world's benchmarks: every answer is checked against the scene itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pipelines.data.sources.referring import corners
from pipelines.evaluation.benchmarks.base import Benchmark, Question, Truth
from pipelines.evaluation.benchmarks.files import DataFolder, read_json
from pipelines.evaluation.benchmarks.grounding import OVERLAPS, score_refer
from pipelines.evaluation.benchmarks.vqa import ask, score_exact
from tinygptv.data.prompt_layout import Exchange
from tinygptv.metrics.metrics import grounded_f1
from tinygptv.miniature.meaning import NotUnderstood, check_caption, find
from tinygptv.miniature.question_files import (
    CaptionRecord,
    CommonFields,
    ConversationRecord,
    GroundingRecord,
    IdentifyRecord,
    ReferRecord,
    VqaRecord,
)
from tinygptv.miniature.scenes import SceneObject

R = TypeVar("R", bound=CommonFields)


@dataclass(frozen=True)
class Asked:
    """What a record asks, what the answer is checked with, and the turns before it."""

    instruction: str
    truth: Truth
    history: tuple[Exchange, ...] = ()


def _reader(file: str, question: Callable[[R], Asked]) -> Callable[[DataFolder], Iterator[Question]]:
    def read(data: DataFolder) -> Iterator[Question]:
        root = data.folder
        folder = root / "benchmarks" if (root / "benchmarks").is_dir() else root
        path = folder / f"{file}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: draw the world with jobs/miniature.py task=draw output={root}."
            )
        for number, entry in enumerate(read_json(path)):
            asked = question(entry)
            yield Question(
                id=f"{file}-{number}",
                image=folder / "images" / entry["image"],
                instruction=asked.instruction,
                truth=asked.truth,
                kind=entry.get("kind", ""),
                split=entry["split"],
                history=asked.history,
            )

    return read


def _objects(truth: Truth) -> list[SceneObject]:
    return [SceneObject.from_dict(fields) for fields in truth["objects"]]


def _vqa(entry: VqaRecord) -> Asked:
    return Asked(ask("vqa", entry["question"]), {"answer": entry["answer"]})


def _refer(entry: ReferRecord) -> Asked:
    truth: Truth = {"box": corners(*entry["bbox"]), "width": entry["width"], "height": entry["height"]}
    return Asked(ask("refer", entry["sents"]), truth)


def _identify(entry: IdentifyRecord) -> Asked:
    truth: Truth = {"objects": entry["objects"], "index": entry["index"], "phrases": entry["phrases"]}
    return Asked(ask("identify", entry["box"]), truth)


def _caption(entry: CaptionRecord) -> Asked:
    return Asked(ask("caption"), {"objects": entry["objects"]})


def _grounding(entry: GroundingRecord) -> Asked:
    named = " ".join(f"<p>{thing['phrase']}</p> {thing['box']}" for thing in entry["grounded"])
    return Asked(ask("grounding"), {"caption": named, "width": entry["width"], "height": entry["height"]})


def _conversation(entry: ConversationRecord) -> Asked:
    *earlier, last = entry["turns"]
    history = tuple(Exchange(turn["question"], turn["answer"]) for turn in earlier)
    return Asked(last["question"], {"answer": last["answer"]}, history)


def _score_identify(answer: str, truth: Truth) -> float:
    """The phrase means exactly the object in the box."""
    try:
        return float(find(_objects(truth), answer) == [truth["index"]])
    except NotUnderstood:
        return 0.0


def _score_caption(answer: str, truth: Truth) -> float:
    """Something is said, and all of it is true: shapes, colours and relations."""
    try:
        return float(check_caption(_objects(truth), answer).all_right)
    except NotUnderstood:
        return 0.0


def _score_grounding(answer: str, truth: Truth) -> float:
    return grounded_f1(_singular(answer), truth["caption"], truth["width"], truth["height"])


def _singular(text: str) -> str:
    """Phrases compare without their article."""
    for article in ("<p>a ", "<p>an ", "<p>the "):
        text = text.replace(article, "<p>")
    return text


MINIATURE = (
    Benchmark("miniature_vqa", "exact match", _reader("vqa", _vqa), score_exact, 8),
    Benchmark("miniature_refer", "IoU > 0.5", _reader("refer", _refer), score_refer, statistics=OVERLAPS),
    Benchmark("miniature_identify", "means the object", _reader("identify", _identify), _score_identify, 24),
    Benchmark("miniature_caption", "all facts right", _reader("caption", _caption), _score_caption, 64),
    Benchmark("miniature_grounding", "F1 at IoU 0.5", _reader("grounding", _grounding), _score_grounding, 128),
    Benchmark("miniature_conversation", "exact match", _reader("conversation", _conversation), score_exact, 24),
)
