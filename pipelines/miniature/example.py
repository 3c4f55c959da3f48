"""An example of one's own data that the miniature does not know: scenes with a colour that its world lacks.

train.jsonl       questions, boxes and phrases about the images
test.jsonl        questions about other images, for ``jobs/score.py benchmark=own``
test_boxes.jsonl  phrases whose boxes are to be found there
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NotRequired, TypedDict

from pipelines.fingerprint import Fingerprint, claim
from pipelines.miniature.world import MiniatureResult
from pipelines.settings import MiniatureSettings
from tinygptv.data.sample import ArrowTurn
from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.scenes import RGB, Scene, SceneObject, make_scene

NEW_COLOUR = "aqua"
"""A word of three tokens: of one of six (turquoise), so short a training teaches the beginning alone."""

_RGB: RGB = (38, 186, 180)
_SPLIT = "validation"
"""Its scenes are in neither the training nor the test split of the world."""

_FILES = ("train.jsonl", "test.jsonl", "test_boxes.jsonl", "images", "result.json")


class Row(TypedDict):
    """A row of one's own data (docs/datasets.md): a question with its answer, or turns about a box."""

    image: str
    task: str
    question: NotRequired[str]
    answer: NotRequired[str]
    turns: NotRequired[list[ArrowTurn]]
    boxes: NotRequired[list[list[float]]]


def draw_example(settings: MiniatureSettings) -> MiniatureResult:
    """Write the example into ``settings.output``: ``example_scenes`` to learn from, and as many to score.

    Returns:
        ``folder``, and the number of ``rows`` of each file.

    Raises:
        OtherInputsError: the folder holds an example of other settings.
    """
    output = settings.output_dir("data/example")
    fingerprint = Fingerprint.of("example", seed=settings.seed, scenes=settings.example_scenes)
    claim(output, fingerprint, _FILES, overwrite=settings.overwrite)
    (output / "images").mkdir(exist_ok=True)
    files: dict[str, list[Row]] = {"train.jsonl": [], "test.jsonl": [], "test_boxes.jsonl": []}
    for number, (scene, item) in enumerate(_scenes(settings.seed, 2 * settings.example_scenes)):
        name = f"images/{number:03d}.jpg"
        (output / name).write_bytes(encode_jpeg(scene))
        questions, box, phrase = _questions(name, scene), _box(name, scene, item), _phrase(name, scene, item)
        if number < settings.example_scenes:
            files["train.jsonl"] += [*questions, box, phrase]
        else:
            files["test.jsonl"] += questions
            files["test_boxes.jsonl"].append(box)
    for file, rows in files.items():
        (output / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"folder": str(output), "rows": {file: len(rows) for file, rows in files.items()}}


def _scenes(seed: int, count: int) -> Iterator[tuple[Scene, SceneObject]]:
    """Scenes in which one object, the only one of its shape, has the new colour."""
    index = 0
    while count:
        scene, index = make_scene(seed, _SPLIT, index), index + 1
        shapes = Counter(item.shape for item in scene.objects)
        alone = [place for place, item in enumerate(scene.objects) if shapes[item.shape] == 1]
        if not alone:
            continue
        objects = list(scene.objects)
        objects[alone[0]] = replace(objects[alone[0]], colour=NEW_COLOUR, rgb=_RGB)
        yield replace(scene, objects=tuple(objects)), objects[alone[0]]
        count -= 1


def _questions(name: str, scene: Scene) -> list[Row]:
    """The colour of every object that is the only one of its shape."""
    shapes = Counter(other.shape for other in scene.objects)
    return [
        {"image": name, "question": f"what color is the {other.shape}?", "answer": other.colour, "task": "vqa"}
        for other in scene.objects
        if shapes[other.shape] == 1
    ]


def _box(name: str, scene: Scene, item: SceneObject) -> Row:
    corners = [round(corner, 1) for corner in scene.pixel_box(item)]
    turn: ArrowTurn = {"question": "", "answers": [f"{NEW_COLOUR} {item.shape}"]}
    return {"image": name, "turns": [turn], "boxes": [corners], "task": "refer"}


def _phrase(name: str, scene: Scene, item: SceneObject) -> Row:
    row = _box(name, scene, item)
    return {
        **row,
        "turns": [{"question": "", "answers": [f"{item.size} {NEW_COLOUR} {item.shape}"]}],
        "task": "identify",
    }
