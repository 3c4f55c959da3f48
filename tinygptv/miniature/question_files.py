"""The miniature's own benchmarks: what is asked about held-out scenes, and the facts that answers are checked with.

Every record names its image and split, and holds the scene's objects where an answer has to be checked by meaning
(``meaning.find``, ``meaning.check_caption``). Referring expressions are in the list form of the RefCOCO evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from tinygptv.miniature import captions
from tinygptv.miniature.conversations import KINDS as CONVERSATION_KINDS
from tinygptv.miniature.conversations import two_turns
from tinygptv.miniature.entries import bbox_xywh, coco_name
from tinygptv.miniature.questions import questions
from tinygptv.miniature.referring import expressions
from tinygptv.miniature.scenes import HELD_OUT, ObjectRecord, Scene
from tinygptv.miniature.words import DIRECTIONS, Style, box_text, full_name, holds

BENCHMARK_SPLITS = ("test", "combination", "crowded", "wording", "large")
"""Splits in the benchmark files; all but ``test`` with a quarter of the scenes."""


class CommonFields(TypedDict):
    """Fields of every record.

    Attributes:
        image: file name in the folder ``images``.
        split: one of ``BENCHMARK_SPLITS``.
        width: of the image, in pixels.
        height: the same for the height.
    """

    image: str
    split: str
    width: int
    height: int


class VqaRecord(CommonFields):
    """A line of ``vqa.json``."""

    question: str
    answer: str
    kind: str


class ReferRecord(CommonFields):
    """A line of ``refer.json``; ``bbox`` is x, y, width, height in pixels."""

    img_id: str
    sents: str
    bbox: list[float]
    kind: str


class IdentifyRecord(CommonFields):
    """A line of ``identify.json``: ``box`` is the released text form, ``index`` the object's number in ``objects``."""

    bbox: list[float]
    box: str
    phrases: list[str]
    index: int
    objects: list[ObjectRecord]


class SceneFact(TypedDict):
    """A relation between two objects, or a lone object, whose relation is None."""

    shape: str
    colour: str
    relation: str | None
    other_shape: NotRequired[str]
    other_colour: NotRequired[str]


class CaptionRecord(CommonFields):
    """A line of ``caption.json``."""

    captions: list[str]
    facts: list[SceneFact]
    objects: list[ObjectRecord]


class GroundedPhrase(TypedDict):
    """An object by name, with its box in pixels and in the released text form."""

    phrase: str
    bbox: list[float]
    box: str


class GroundingRecord(CommonFields):
    """A line of ``grounding.json``."""

    caption: str
    grounded: list[GroundedPhrase]
    objects: list[ObjectRecord]


class TurnRecord(TypedDict):
    """A question with its answer."""

    question: str
    answer: str


class ConversationRecord(CommonFields):
    """A line of ``conversation.json``."""

    turns: list[TurnRecord]
    kind: str


def _common(scene: Scene) -> CommonFields:
    return {"image": coco_name(scene), "split": scene.split, "width": scene.width, "height": scene.height}


def _objects(scene: Scene) -> list[ObjectRecord]:
    return [item.to_dict() for item in scene.objects]


def _style(scene: Scene) -> Style:
    return "unseen" if scene.split == "wording" else "usual"


def _meant(scene: Scene, rng: np.random.Generator) -> int:
    """The object to refer to; in ``combination`` one of the held-out ones."""
    held_out = [i for i, item in enumerate(scene.objects) if (item.colour, item.shape) in HELD_OUT]
    among = held_out or list(range(len(scene.objects)))
    return among[int(rng.integers(len(among)))]


def _vqa(scene: Scene, rng: np.random.Generator) -> list[VqaRecord]:
    return [
        {**_common(scene), "question": found.question, "answer": found.answer, "kind": found.kind}
        for found in questions(scene, rng, 1, style=_style(scene))
    ]


def _refer(scene: Scene, rng: np.random.Generator) -> list[ReferRecord]:
    index = _meant(scene, rng)
    found = next(expressions(scene.objects, index, rng, style=_style(scene)))
    img_id = f"{coco_name(scene).removesuffix('.jpg')}_{scene.number * 10 + index}"
    return [
        {**_common(scene), "img_id": img_id, "sents": found.text, "bbox": bbox_xywh(scene, index), "kind": found.kind}
    ]


def _identify(scene: Scene, rng: np.random.Generator) -> list[IdentifyRecord]:
    index = _meant(scene, rng)
    phrases = [found.text for found, _ in zip(expressions(scene.objects, index, rng), range(5), strict=False)]
    return [
        {
            **_common(scene),
            "bbox": bbox_xywh(scene, index),
            "box": box_text(scene, scene.objects[index]),
            "phrases": phrases,
            "index": index,
            "objects": _objects(scene),
        }
    ]


def _caption(scene: Scene, rng: np.random.Generator) -> list[CaptionRecord]:
    """``facts``: every clear relation of every ordered pair; a lone object has its shape and colour only."""
    facts: list[SceneFact] = [
        {"shape": a.shape, "colour": a.colour, "relation": d, "other_shape": b.shape, "other_colour": b.colour}
        for a in scene.objects
        for b in scene.objects
        for d in DIRECTIONS
        if a is not b and holds(a, b, d)
    ]
    alone: list[SceneFact] = [{"shape": item.shape, "colour": item.colour, "relation": None} for item in scene.objects]
    references = [captions.short_caption(scene, rng) for _ in range(3)]
    return [{**_common(scene), "captions": references, "facts": facts or alone, "objects": _objects(scene)}]


def _grounding(scene: Scene, rng: np.random.Generator) -> list[GroundingRecord]:
    named: list[GroundedPhrase] = [
        {"phrase": full_name(item), "bbox": bbox_xywh(scene, index), "box": box_text(scene, item)}
        for index, item in enumerate(scene.objects)
    ]
    return [
        {
            **_common(scene),
            "caption": captions.grounded_caption(scene, rng),
            "grounded": named,
            "objects": _objects(scene),
        }
    ]


def _conversation(scene: Scene, rng: np.random.Generator) -> list[ConversationRecord]:
    for position in rng.permutation(len(CONVERSATION_KINDS)):
        found = two_turns(scene, rng, CONVERSATION_KINDS[position])
        if found:
            turns: list[TurnRecord] = [{"question": turn.question, "answer": turn.answer} for turn in found.turns]
            return [{**_common(scene), "turns": turns, "kind": found.kind}]
    return []


BENCHMARKS: dict[str, Callable[[Scene, np.random.Generator], Sequence[Mapping[str, object]]]] = {
    "vqa": _vqa,
    "refer": _refer,
    "identify": _identify,
    "caption": _caption,
    "grounding": _grounding,
    "conversation": _conversation,
}
"""File name without ``.json`` -> the records of a scene."""

_WORDED = ("vqa", "refer")
"""Benchmarks that the split ``wording`` changes."""


def benchmarks_of(split: str) -> tuple[str, ...]:
    """The benchmarks that a split takes part in."""
    return _WORDED if split == "wording" else tuple(BENCHMARKS)
