"""A seed gives the scenes, images, texts, entries and records as before: shipped weights and scores belong to them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.recorded_world import FILE, IMAGES, recorded_images, recorded_world

RECORDED = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def made():
    return recorded_world()


def test_all_kinds_are_recorded(made):
    assert list(made) == list(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_seed_gives_what_it_gave_before(made, name):
    assert made[name]["first"] == RECORDED[name]["first"]
    assert made[name]["sha256"] == RECORDED[name]["sha256"], "as the first scene, but not as the others"


def test_a_seed_draws_what_it_drew_before():
    before, now = (np.asarray(image.convert("RGB"), dtype=int) for image in (Image.open(IMAGES), recorded_images()))
    assert now.shape == before.shape
    assert np.abs(now - before).max() <= 6, "a contour may be smoothed by another version of Pillow in another way"
    assert np.abs(now - before).mean() < 0.1
