"""Drawn scenes of the web page: a question, its true answer, and that only models which know them offer them."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from pipelines.serving.backend import ModelInfo
from pipelines.serving.scenes import SEED, SPLIT, draw_scene
from tests.serving_api import Client, FakeBackend
from tinygptv.miniature.scenes import make_scene


def test_a_scene_is_drawn_with_a_question_and_its_answer():
    for number in range(12):
        drawn, scene = draw_scene(number), make_scene(SEED, SPLIT, number)
        image = Image.open(io.BytesIO(base64.b64decode(drawn.image.partition(",")[2])))
        assert image.size == (scene.width, scene.height) and image.format == "JPEG"
        assert drawn.question
        if drawn.task == "refer":
            assert not drawn.answer and drawn.box in [scene.pixel_box(item) for item in scene.objects]
        else:
            assert drawn.answer and drawn.box is None
    assert [draw_scene(number).task for number in range(6)] == ["refer", "vqa", "vqa"] * 2
    assert (SEED, SPLIT) == (20240104, "test"), "of no training"
    assert draw_scene(5) == draw_scene(5) and draw_scene().image != draw_scene().image


def test_the_page_gets_scenes_from_a_model_that_knows_them():
    scene = Client().request("GET", "/ui/scene").json()
    assert set(scene) == {"image", "task", "question", "answer", "box"}
    assert Client(api_keys=["key"]).request("GET", "/ui/scene").status_code == 401


@pytest.mark.parametrize("scope", ["photographs", ""])
def test_other_models_offer_none(scope):
    class Other(FakeBackend):
        async def describe(self):
            return ModelInfo(16, 100, 1, scope)

    assert Client(Other()).request("GET", "/ui/scene").status_code == 404
