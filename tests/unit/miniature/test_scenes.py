"""Scenes and their images: pure functions of their key, as the splits promise, and drawn where the boxes say."""

from __future__ import annotations

import io
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from tinygptv.miniature.draw import encode_jpeg, render
from tinygptv.miniature.scenes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SPLITS,
    TEXTURES,
    Background,
    Scene,
    SceneKey,
    SceneObject,
    generator,
    make_scene,
    make_scenes,
)

ORDINARY = ("train", "validation", "test")


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: make_scenes(0, split, 100) for split in SPLITS}


def test_a_scene_is_a_function_of_its_key():
    assert make_scene(3, "test", 17) == make_scene(3, "test", 17)
    assert make_scenes(3, "test", 2, start=16)[1] == make_scene(3, "test", 17)
    assert make_scene(3, "test", 17) != make_scene(4, "test", 17)


def test_splits_share_no_scene(scenes):
    contents = Counter(scene.objects for found in scenes.values() for scene in found)
    assert max(contents.values()) == 1
    numbers = Counter(scene.number for found in scenes.values() for scene in found)
    assert max(numbers.values()) == 1


def test_generators_differ_by_purpose_and_key():
    keys = [SceneKey(0, "train", 0), SceneKey(0, "train", 1), SceneKey(0, "test", 0), SceneKey(1, "train", 0)]
    draws = {generator(key, purpose).integers(2**60) for key in keys for purpose in ("scene", "pixels")}
    assert len(draws) == 8


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev'.*known splits: train"):
        make_scene(0, "dev", 0)


def test_held_out_pairs_occur_in_their_split_alone(scenes):
    def held_out(scene: Scene) -> bool:
        return any((item.colour, item.shape) in HELD_OUT for item in scene.objects)

    assert all(held_out(scene) for scene in scenes["combination"])
    assert not any(held_out(scene) for split in SPLITS if split != "combination" for scene in scenes[split])
    seen = {(item.colour, item.shape) for scene in make_scenes(1, "train", 400) for item in scene.objects}
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT
    assert 0.1 < len(HELD_OUT) / (len(COLOURS) * len(SHAPES)) < 0.15


def test_counts_and_image_sizes(scenes):
    for split, found in scenes.items():
        counts = {len(scene.objects) for scene in found}
        assert counts == ({5, 6} if split == "crowded" else {1, 2, 3, 4})
        factor = 2 if split == "large" else 1
        assert all(96 * factor <= side <= 160 * factor for scene in found for side in (scene.width, scene.height))
        assert all(0.75 <= scene.width / scene.height <= 1.33 for scene in found)
        assert all(88 <= scene.jpeg_quality <= 95 for scene in found)


def test_boxes_lie_inside_apart_and_in_cells_of_their_own(scenes):
    for found in scenes.values():
        for scene in found:
            cells = [scene.cell_of(item) for item in scene.objects]
            assert len(set(cells)) == len(cells)
            assert all(0 <= row < 4 and 0 <= column < 4 for row, column in cells)
            assert all(0.02 < side < 0.98 for item in scene.objects for side in item.box)
            for a, b in combinations([item.box for item in scene.objects], 2):
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_small_and_large_are_clearly_apart(scenes):
    longer = {"small": [], "large": []}
    for scene in scenes["train"] + scenes["large"]:
        for item in scene.objects:
            x1, y1, x2, y2 = scene.pixel_box(item)
            longer[item.size].append(max(x2 - x1, y2 - y1) / min(scene.width, scene.height))
    assert min(longer["large"]) > 1.3 * max(longer["small"])


def test_attributes_are_evenly_spread():
    items = [item for scene in make_scenes(2, "train", 800) for item in scene.objects]
    for name, options in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("texture", TEXTURES), ("size", ("small",))):
        share = Counter(getattr(item, name) for item in items)
        expected = len(items) / (len(options) if name != "size" else 2)
        assert all(abs(share[option] / expected - 1) < 0.25 for option in options), share


def test_at_most_two_objects_look_alike():
    for scene in make_scenes(3, "crowded", 120):
        assert max(Counter(item.attributes for item in scene.objects).values()) <= 2


def test_the_same_scene_is_the_same_picture():
    scene = make_scene(0, "train", 5)
    assert encode_jpeg(scene) == encode_jpeg(make_scene(0, "train", 5))
    image = Image.open(io.BytesIO(encode_jpeg(scene)))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (scene.width, scene.height))


def _lone(shape: str, colour: str, texture: str, *, angle: float = 7.0) -> Scene:
    item = SceneObject(shape, colour, "large", texture, (0.2, 0.3, 0.6, 0.72), COLOURS[colour], angle)
    ground = Background((240, 240, 240), (240, 240, 240), 0.0, 0)
    return Scene(SceneKey(0, "train", 0), 150, 120, ground, (item,), 95)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_the_drawing_fills_its_box(shape, texture):
    pixels = np.asarray(render(_lone(shape, "blue", texture)), dtype=int)
    drawn = np.abs(pixels - 240).max(axis=2) > 25
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(edges - np.array([30, 36, 90, 86.4])).max() < 2.5


def test_light_and_dark_grounds_stay_light_and_dark_with_their_noise():
    for level in (0, 255):
        ground = Background((level,) * 3, (level,) * 3, 0.0, 9)
        item = SceneObject("circle", "red", "small", "plain", (0.4, 0.4, 0.6, 0.6), COLOURS["red"])
        pixels = np.asarray(render(Scene(SceneKey(0, "train", 0), 96, 96, ground, (item,), 95)), dtype=int)
        assert np.abs(pixels[:20] - level).max() <= 9


def test_a_ground_goes_from_one_colour_to_the_other_in_its_direction():
    item = SceneObject("circle", "red", "small", "plain", (0.4, 0.4, 0.6, 0.6), COLOURS["red"])
    for angle, first, last in ((0.0, (48, 0), (48, 95)), (np.pi / 2, (0, 48), (95, 48)), (np.pi, (48, 95), (48, 0))):
        ground = Background((200, 210, 220), (240, 250, 230), angle, 0)
        pixels = np.asarray(render(Scene(SceneKey(0, "train", 0), 96, 96, ground, (item,), 95)), dtype=int)
        assert np.abs(pixels[first] - (200, 210, 220)).max() <= 3 and np.abs(pixels[last] - (240, 250, 230)).max() <= 3


@pytest.mark.parametrize("corner", [(0.2, 0.3), (0.204, 0.306), (0.2054, 0.3072)])
def test_a_drawing_stands_where_its_box_is_to_a_fraction_of_a_pixel(corner):
    x, y = corner
    item = SceneObject("square", "blue", "large", "plain", (x, y, x + 0.4, y + 0.4), COLOURS["blue"], 0.0)
    ground = Background((240, 240, 240), (240, 240, 240), 0.0, 0)
    scene = Scene(SceneKey(0, "train", 0), 150, 120, ground, (item,), 95)
    cover = 240 - np.asarray(render(scene), dtype=float)[..., 0]
    rows, columns = np.mgrid[:120, :150] + 0.5
    centre = (cover * columns).sum() / cover.sum(), (cover * rows).sum() / cover.sum()
    assert np.abs(np.subtract(centre, (150 * (x + 0.2), 120 * (y + 0.2)))).max() < 0.3


@pytest.mark.parametrize("colour", COLOURS)
def test_the_texture_shows_at_64_pixels(colour):
    """Marks differ from the colour itself even in the smallest image that the model is given."""
    spread = {}
    for texture in TEXTURES:
        image = render(_lone("square", colour, texture, angle=0.0)).resize((64, 64), Image.Resampling.BICUBIC)
        inside = np.asarray(image, dtype=float)[24:42, 18:34]
        spread[texture] = inside.std(axis=(0, 1)).max()
    assert spread["plain"] < 5
    assert min(spread["striped"], spread["dotted"]) > 35


def test_colours_are_well_apart():
    for (_, a), (_, b) in combinations(COLOURS.items(), 2):
        assert np.abs(np.subtract(a, b)).max() > 60
