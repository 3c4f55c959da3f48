"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg, each with the splits that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.sources.pickles import UnsafePickleError, load_plain_pickle
from pipelines.data.sources.referring import corners
from pipelines.evaluation.benchmarks.base import Benchmark, Outcome, Question, Statistics, Truth
from pipelines.evaluation.benchmarks.files import COCO_FOLDERS, BenchmarkFiles, DataFolder, read_json
from pipelines.evaluation.benchmarks.vqa import ask
from pipelines.settings import SettingsError
from tinygptv.data.boxes import box_fault
from tinygptv.metrics.metrics import grounding_overlap, rec_hit
from tinygptv.metrics.released import released_rec


@dataclass(frozen=True)
class ReferringData:
    """A data set of referring expressions.

    Attributes:
        data_set: its official name, key of ``files.OWN_FOLDERS``.
        references: names of its pickle of references, by the partition that is evaluated.
        splits: of the partition.
    """

    data_set: str
    references: tuple[str, ...]
    splits: tuple[str, ...]

    def reader(self, split: str) -> Callable[[DataFolder], Iterator[Question]]:
        """Reads one split: MiniGPT-v2's list, or the files as published."""

        def read(data: DataFolder) -> Iterator[Question]:
            files = data.of(self.data_set)
            listed = files.try_find(f"{self.data_set}_{split}.json", fields=("img_id", "sents", "bbox"))
            yield from _read_list(files, listed) if listed else _read_references(files, self, split)

        return read


DATA_SETS = {
    "refcoco": ReferringData("refcoco", ("refs(unc).p",), ("val", "testA", "testB")),
    "refcocop": ReferringData("refcoco+", ("refs(unc).p",), ("val", "testA", "testB")),
    # MiniGPT-v2's read-me writes the name of the pickle with a slip.
    "refcocog": ReferringData("refcocog", ("refs(umd).p", "refs(und).p"), ("val", "test")),
}
"""Name of the benchmarks -> their data set."""

_FOLDERS = ("train2014", *COCO_FOLDERS)


def _question(key: str, sentence: str, image: Path, truth: Truth) -> Question:
    return Question(key, ask("refer", sentence), image, truth)


def _truth(img_id: str, bbox: Sequence[float], width: int, height: int) -> Truth:
    """What a score needs, of a box as x, y, width, height.

    Raises:
        ValueError: the box is none of its image, as one that is given by its corners.
    """
    box = corners(*bbox)
    if fault := box_fault(box, width, height):
        raise ValueError(fault)
    return {"img_id": img_id, "box": box, "width": width, "height": height}


def _read_list(files: BenchmarkFiles, path: Path) -> Iterator[Question]:
    """``[{img_id, sents, bbox, width, height}]``, the form of the MiniGPT-v2 evaluation; one entry per sentence."""
    images = files.images(*_FOLDERS)
    for number, entry in enumerate(read_json(path)):
        truth = _truth(entry["img_id"], entry["bbox"], entry["width"], entry["height"])
        image = images.coco(entry["img_id"].split("_")[2], "train2014")
        yield _question(f"{number}-{entry['img_id']}", entry["sents"], image, truth)


def _read_references(files: BenchmarkFiles, data: ReferringData, split: str) -> Iterator[Question]:
    """``refs(<partition>).p`` and ``instances.json``, as published; one question per sentence.

    RefCOCO and RefCOCO+ have files of the same names: their folder says whose they are.
    """
    path = files.find(*data.references, own=True)
    instances = read_json(files.find("instances.json", own=True))
    boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in instances["images"]}
    images = files.images(*_FOLDERS)
    try:
        refs = load_plain_pickle(path.read_bytes())
    except (UnsafePickleError, ValueError) as error:
        raise SettingsError(f"{path} cannot be used: {error}.") from error
    for ref in refs:
        if ref["split"] != split:
            continue
        img_id = f"COCO_train2014_{ref['image_id']:012d}_{ref['ref_id']}"
        truth = _truth(img_id, boxes[ref["ann_id"]], *sizes[ref["image_id"]])
        for sentence in ref["sentences"]:
            image = images.coco(ref["image_id"], "train2014")
            yield _question(str(sentence["sent_id"]), sentence["sent"], image, truth)


def score_refer(answer: str, truth: Truth) -> float:
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
    Benchmark(f"{name}_{split}", "IoU > 0.5", data.reader(split), score_refer, statistics=OVERLAPS, released=_released)
    for name, data in DATA_SETS.items()
    for split in data.splits
)
