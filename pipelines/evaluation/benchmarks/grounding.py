"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg, each with the splits that it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.sources.referring import corners, load_plain_pickle
from pipelines.evaluation.benchmarks.base import Benchmark, Outcome, Question, Statistics
from pipelines.evaluation.benchmarks.files import Images, coco_names, find_file, read_json, try_file
from pipelines.evaluation.benchmarks.vqa import ask
from tinygptv.metrics.metrics import grounding_overlap, rec_hit
from tinygptv.metrics.released import released_rec

DATA_SETS = {
    "refcoco": ("refcoco", "unc", ("val", "testA", "testB")),
    "refcocop": ("refcoco+", "unc", ("val", "testA", "testB")),
    "refcocog": ("refcocog", "umd", ("val", "test")),
}
"""Our name -> official folder, partition, splits."""


def _reader(name: str, split: str) -> Any:
    folder, partition, _ = DATA_SETS[name]

    def read(data: Path) -> Iterator[Question]:
        listed = try_file(data, name, f"{folder}_{split}.json")
        if listed is not None:
            yield from _read_list(listed)
            return
        # RefCOCO and RefCOCO+ have a refs(unc).p each: the folder tells whose it is.
        root = data.parent if data.name == folder else data
        path = find_file(root, name, f"{folder}/refs({partition}).p", f"{folder}_{split}.json")
        yield from _read_refs(path, split)

    return read


def _question(key: str, sentence: str, image: Path, truth: dict[str, Any]) -> Question:
    return Question(key, ask("refer", sentence), image, truth)


def _read_list(path: Path) -> Iterator[Question]:
    """``[{img_id, sents, bbox, width, height}]``, the form of the MiniGPT-v2 evaluation; one entry per sentence."""
    images = Images(path, "train2014")
    for number, entry in enumerate(read_json(path)):
        truth = {
            "img_id": entry["img_id"],
            "box": corners(*entry["bbox"]),
            "width": entry["width"],
            "height": entry["height"],
        }
        coco_id = entry["img_id"].split("_")[2]
        image = images.find(*coco_names(coco_id, "train2014"))
        yield _question(f"{number}-{entry['img_id']}", entry["sents"], image, truth)


def _read_refs(path: Path, split: str) -> Iterator[Question]:
    """``refs(<partition>).p`` and ``instances.json``, as published; one question per sentence."""
    instances = read_json(find_file(path.parent, path.parent.name, "instances.json"))
    boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in instances["images"]}
    images = Images(path, "train2014")
    for ref in load_plain_pickle(path.read_bytes()):
        if ref["split"] != split:
            continue
        width, height = sizes[ref["image_id"]]
        image = images.find(*coco_names(ref["image_id"], "train2014"))
        truth = {
            "img_id": f"COCO_train2014_{ref['image_id']:012d}_{ref['ref_id']}",
            "box": corners(*boxes[ref["ann_id"]]),
            "width": width,
            "height": height,
        }
        for sentence in ref["sentences"]:
            yield _question(str(sentence["sent_id"]), sentence["sent"], image, truth)


def score_refer(answer: str, truth: dict[str, Any]) -> float:
    """1 where the answered box overlaps the true one by more than half."""
    return rec_hit(answer, truth["box"], truth["width"], truth["height"])


def _overlap(outcome: Outcome) -> tuple[float]:
    truth = outcome.question.truth
    if outcome.problem:
        return (0.0,)
    return (grounding_overlap(outcome.answer, truth["box"], truth["width"], truth["height"]),)


OVERLAPS = Statistics(
    _overlap,
    {
        "IoU > 0.5": lambda rows: float((rows > 0.5).mean()),
        "IoU > 0.3": lambda rows: float((rows > 0.3).mean()),
        "mean IoU": lambda rows: float(rows.mean()),
    },
)


def _released(outcomes: Sequence[Outcome]) -> list[float]:
    return released_rec([o.answer for o in outcomes], [o.question.truth for o in outcomes])


REFERRING = tuple(
    Benchmark(
        f"{name}_{split}", "IoU > 0.5", _reader(name, split), score_refer, statistics=OVERLAPS, released=_released
    )
    for name, (_, _, splits) in DATA_SETS.items()
    for split in splits
)
