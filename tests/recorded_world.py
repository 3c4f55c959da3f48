"""Writes ``tests/data/miniature.json`` and ``miniature.png``: what a seed of the miniature draws and says.

    python -m tests.recorded_world

Shipped weights, recorded scores and recipes belong to one world: a change of what a seed gives is a change of the data.
Write the file again only where that is meant, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tinygptv.miniature.documents import KINDS, make_document
from tinygptv.miniature.draw import render
from tinygptv.miniature.entries import DESCRIBE
from tinygptv.miniature.instructions import text_instruction
from tinygptv.miniature.question_files import BENCHMARKS, benchmarks_of
from tinygptv.miniature.scenes import SPLITS, Scene, generator, make_scene
from tinygptv.miniature.words import list_scene

FILE = Path(__file__).parent / "data" / "miniature.json"
IMAGES = FILE.with_suffix(".png")
SEED = 1
NUM_SCENES = 16


def _scene(scene: Scene) -> dict[str, Any]:
    fields = asdict(scene)
    fields["objects"] = [item.to_dict() | {"rgb": item.rgb, "angle": round(item.angle, 6)} for item in scene.objects]
    return fields | {"listing": list_scene(scene)}


def _parts(index: int) -> Iterator[tuple[str, Any]]:
    """What is made of the scenes of one index, by name."""
    for split in SPLITS:
        scene = make_scene(SEED, split, index)
        yield f"scene/{split}", _scene(scene)
        for name in benchmarks_of(split):
            yield f"benchmark/{name}/{split}", BENCHMARKS[name](scene, generator(scene.key, name))
    scene = make_scene(SEED, "train", index)
    for name, describe in DESCRIBE.items():
        yield f"source/{name}", describe(scene, generator(scene.key, f"{name}:{SEED}"))
    rng = generator(scene.key, "instructions")
    yield "instructions", [asdict(text_instruction(rng)) for _ in range(12)]
    for kind in KINDS:
        yield f"document/{kind}", make_document(scene, generator(scene.key, kind), kind).text("<bos>")


def recorded_world() -> dict[str, dict[str, Any]]:
    """By name: the hash over ``NUM_SCENES`` scenes, and what the first one gives."""
    made: dict[str, list[Any]] = {}
    for index in range(NUM_SCENES):
        for name, part in _parts(index):
            made.setdefault(name, []).append(json.loads(json.dumps(part)))
    return {
        name: {"sha256": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16], "first": parts[0]}
        for name, parts in made.items()
    }


def recorded_images() -> Image.Image:
    """Drawn scenes side by side, one of each split, at a quarter of their size: a pixel is the mean of 16."""
    scenes = [make_scene(SEED, split, index) for index, split in enumerate(SPLITS)]
    drawn = [render(scene).reduce(4) for scene in scenes]
    sheet = Image.new("RGB", (sum(image.width for image in drawn), max(image.height for image in drawn)))
    left = 0
    for image in drawn:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


if __name__ == "__main__":
    recorded_images().save(IMAGES)
    lines = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in recorded_world().items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(FILE)
