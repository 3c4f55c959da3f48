"""The drawn world's benchmarks: every answer is checked against the scene itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipelines.data.sources.referring import corners
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.benchmarks.files import DataFolder, read_json
from pipelines.evaluation.benchmarks.grounding import OVERLAPS, score_refer
from pipelines.evaluation.benchmarks.vqa import ask
from tinygptv.data.prompt_layout import Exchange
from tinygptv.json_object import JsonObject
from tinygptv.metrics.metrics import exact_match, grounded_f1
from tinygptv.miniature.meaning import NotUnderstood, check_caption, find
from tinygptv.miniature.scenes import SceneObject

Entry = JsonObject


def _reader(file: str, question: Callable[[Entry], JsonObject]) -> Callable[[DataFolder], Iterator[Question]]:
    def read(data: DataFolder) -> Iterator[Question]:
        root = data.folder
        folder = root / "benchmarks" if (root / "benchmarks").is_dir() else root
        path = folder / f"{file}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: draw the world with jobs/miniature.py task=draw output={root}."
            )
        for number, entry in enumerate(read_json(path)):
            fields = {"kind": entry.get("kind", ""), "split": entry["split"], **question(entry)}
            yield Question(id=f"{file}-{number}", image=folder / "images" / entry["image"], **fields)

    return read


def _objects(truth: JsonObject) -> list[SceneObject]:
    return [SceneObject.from_dict(fields) for fields in truth["objects"]]


def _vqa(entry: Entry) -> JsonObject:
    return {"instruction": ask("vqa", entry["question"]), "truth": {"answer": entry["answer"]}}


def _refer(entry: Entry) -> JsonObject:
    truth = {"box": corners(*entry["bbox"]), "width": entry["width"], "height": entry["height"]}
    return {"instruction": ask("refer", entry["sents"]), "truth": truth}


def _identify(entry: Entry) -> JsonObject:
    truth = {"objects": entry["objects"], "index": entry["index"], "phrases": entry["phrases"]}
    return {"instruction": ask("identify", entry["box"]), "truth": truth}


def _caption(entry: Entry) -> JsonObject:
    return {"instruction": ask("caption"), "truth": {"objects": entry["objects"]}}


def _grounding(entry: Entry) -> JsonObject:
    named = " ".join(f"<p>{thing['phrase']}</p> {thing['box']}" for thing in entry["grounded"])
    truth = {"caption": named, "width": entry["width"], "height": entry["height"]}
    return {"instruction": ask("grounding"), "truth": truth}


def _conversation(entry: Entry) -> JsonObject:
    *earlier, last = entry["turns"]
    history = tuple(Exchange(turn["question"], turn["answer"]) for turn in earlier)
    return {"instruction": last["question"], "truth": {"answer": last["answer"]}, "history": history}


def _score_identify(answer: str, truth: JsonObject) -> float:
    """The phrase means exactly the object in the box."""
    try:
        return float(find(_objects(truth), answer) == [truth["index"]])
    except NotUnderstood:
        return 0.0


def _score_caption(answer: str, truth: JsonObject) -> float:
    """Something is said, and all of it is true: shapes, colours and relations."""
    try:
        return float(check_caption(_objects(truth), answer).all_right)
    except NotUnderstood:
        return 0.0


def _score_grounding(answer: str, truth: JsonObject) -> float:
    return grounded_f1(_singular(answer), truth["caption"], truth["width"], truth["height"])


def _singular(text: str) -> str:
    """Phrases compare without their article."""
    for article in ("<p>a ", "<p>an ", "<p>the "):
        text = text.replace(article, "<p>")
    return text


def _score_exact(answer: str, truth: JsonObject) -> float:
    return exact_match(answer, truth["answer"])


MINIATURE = (
    Benchmark("miniature_vqa", "exact match", _reader("vqa", _vqa), _score_exact, 8),
    Benchmark("miniature_refer", "IoU > 0.5", _reader("refer", _refer), score_refer, statistics=OVERLAPS),
    Benchmark("miniature_identify", "means the object", _reader("identify", _identify), _score_identify, 24),
    Benchmark("miniature_caption", "all facts right", _reader("caption", _caption), _score_caption, 64),
    Benchmark("miniature_grounding", "F1 at IoU 0.5", _reader("grounding", _grounding), _score_grounding, 128),
    Benchmark("miniature_conversation", "exact match", _reader("conversation", _conversation), _score_exact, 24),
)
