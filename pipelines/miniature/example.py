"""An example of one's own data that the miniature does not know: scenes with a colour that its world lacks.

train.jsonl       questions, boxes and phrases about every object of the images, old and new
test.jsonl        questions about the new things of other images, for ``jobs/score.py benchmark=own``
test_known.jsonl  questions about the other things there, whose colours the miniature knows
test_boxes.jsonl  phrases of the new things, whose boxes are to be found
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import NotRequired, TypedDict

import numpy as np

from pipelines.fingerprint import Fingerprint, claim
from pipelines.miniature.world import MiniatureResult
from pipelines.settings import MiniatureSettings
from tinygptv.data.sample import ArrowTurn
from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.questions import ATTRIBUTE_WORDINGS
from tinygptv.miniature.referring import refer_to
from tinygptv.miniature.scenes import RGB, Scene, generator, jitter, make_scene, pick

NEW_COLOUR = "aqua"
"""A word of three tokens: of one of six (turquoise), so short a training teaches the beginning alone."""

_RGB: RGB = (40, 200, 245)
"""Far from all colours of the world: the frozen encoder takes a darker aqua for green, whatever is trained."""
_SPLIT = "validation"
"""Its scenes are in neither the training nor the test split of the world."""
_FIRST_SCENE = 10_000
"""Those before score the pretraining of the backbones."""

_WORDINGS = ATTRIBUTE_WORDINGS["usual"]["colour"]
_FILES = ("train.jsonl", "test.jsonl", "test_known.jsonl", "test_boxes.jsonl")
_TESTS_PER_SCENE = 2


class Row(TypedDict):
    """A row of one's own data (docs/datasets.md): a question with its answer, or turns about a box."""

    image: str
    task: str
    question: NotRequired[str]
    answer: NotRequired[str]
    turns: NotRequired[list[ArrowTurn]]
    boxes: NotRequired[list[list[float]]]


def draw_example(settings: MiniatureSettings) -> MiniatureResult:
    """Write the example into ``settings.output``: ``example_scenes`` to learn from, and twice as many to score.

    Returns:
        ``folder``, and the number of ``rows`` of each file.

    Raises:
        OtherInputsError: the folder holds an example of other settings.
    """
    output = settings.output_dir("data/example")
    fingerprint = Fingerprint.of("example", seed=settings.seed, scenes=settings.example_scenes)
    claim(output, fingerprint, (*_FILES, "images", "result.json"), overwrite=settings.overwrite)
    (output / "images").mkdir(exist_ok=True)
    rows: dict[str, list[Row]] = {file: [] for file in _FILES}
    for number in range((1 + _TESTS_PER_SCENE) * settings.example_scenes):
        scene = _scene(settings.seed, _FIRST_SCENE + number)
        name = f"images/{number:03d}.jpg"
        (output / name).write_bytes(encode_jpeg(scene))
        rng = generator(scene.key, "example")
        if number < settings.example_scenes:
            rows["train.jsonl"] += _annotations(name, scene, rng)
            continue
        colours = list(_colours(name, scene, rng, pick(rng, _WORDINGS)))
        rows["test.jsonl"] += [row for row in colours if row["answer"] == NEW_COLOUR]
        rows["test_known.jsonl"] += [row for row in colours if row["answer"] != NEW_COLOUR]
        rows["test_boxes.jsonl"] += _box(name, scene, 0, "refer", rng)
    for file, found in rows.items():
        (output / file).write_text("".join(json.dumps(row) + "\n" for row in found))
    return {"folder": str(output), "rows": {file: len(found) for file, found in rows.items()}}


def _scene(seed: int, index: int) -> Scene:
    """A scene whose first object has the new colour."""
    scene = make_scene(seed, _SPLIT, index)
    first, *others = scene.objects
    first = replace(first, colour=NEW_COLOUR, rgb=jitter(generator(scene.key, "colour"), _RGB))
    return replace(scene, objects=(first, *others))


def _annotations(name: str, scene: Scene, rng: np.random.Generator) -> Iterator[Row]:
    """What people would write about an image: as much about each of the other things as about the new one. Where all is
    about the new one, its word becomes the answer to every question about such images."""
    for wording in _WORDINGS:
        yield from _colours(name, scene, rng, wording)
    for index in range(len(scene.objects)):
        for task in ("refer", "identify") if index == 0 else (pick(rng, ("refer", "identify")),):
            yield from _box(name, scene, index, task, rng)


def _colours(name: str, scene: Scene, rng: np.random.Generator, wording: str) -> Iterator[Row]:
    """Questions for the colours of the objects that words tell apart without it."""
    for index, item in enumerate(scene.objects):
        if words := refer_to(scene.objects, index, rng, hide=("colour",)):
            yield {"image": name, "question": wording.format(x=words), "answer": item.colour, "task": "vqa"}


def _box(name: str, scene: Scene, index: int, task: str, rng: np.random.Generator) -> Iterator[Row]:
    """A phrase and its box; nothing for an object that no words tell apart."""
    item = scene.objects[index]
    if item.colour == NEW_COLOUR:
        phrase: str | None = f"{NEW_COLOUR} {item.shape}"
    else:
        phrase = refer_to(scene.objects, index, rng)
    if phrase:
        corners = [round(corner, 1) for corner in scene.pixel_box(item)]
        yield {"image": name, "turns": [{"question": "", "answers": [phrase]}], "boxes": [corners], "task": task}
