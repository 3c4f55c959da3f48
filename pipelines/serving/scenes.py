"""Drawn scenes with a question and its true answer, for the web page of a model that knows drawn scenes."""

from __future__ import annotations

import base64
import random

from pydantic import BaseModel, Field

from pipelines.serving.protocol import Coordinates
from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.questions import questions
from tinygptv.miniature.referring import expressions
from tinygptv.miniature.scenes import generator, make_scene, pick

SEED, SPLIT = 20240104, "test"
"""Of the scenes' world; no model trains on this split."""

NUM_SCENES = 10_000_000


class DrawnScene(BaseModel):
    """Response of ``GET /ui/scene``."""

    image: str = Field(description="data URL")
    task: str = Field(description="vqa or refer")
    question: str
    answer: str = Field(description="the true answer; empty where it is a box")
    box: Coordinates | None = Field(description="the true box x1, y1, x2, y2 in pixels, for task refer")


def draw_scene(number: int | None = None) -> DrawnScene:
    """Draw a scene, and ask about it.

    Args:
        number: of the scene; None draws a random one.

    Returns:
        Two of three ask a question with a short answer, the others ask where an object is.
    """
    scene = make_scene(SEED, SPLIT, random.randrange(NUM_SCENES) if number is None else number)
    rng = generator(scene.key, "web page")
    image = "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(scene)).decode()
    asked = questions(scene, rng, 1)
    if asked and scene.key.index % 3:
        return DrawnScene(image=image, task="vqa", question=asked[0].question, answer=asked[0].answer, box=None)
    index = pick(rng, range(len(scene.objects)))
    phrase = next(expressions(scene.objects, index, rng)).text
    box = scene.pixel_box(scene.objects[index])
    return DrawnScene(image=image, task="refer", question=phrase, answer="", box=box)
