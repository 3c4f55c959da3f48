"""Pretraining of the miniature's encoder: labels of cells and patches, losses, its module beside the model's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tinygptv.data.images import normalise_pixels, resize_pixels
from tinygptv.miniature import pretrain_vision
from tinygptv.miniature.draw import render
from tinygptv.miniature.pretrain_vision import (
    NUM_BINS,
    VALUES,
    ScenePool,
    VisionModule,
    VisionTask,
    _waves,
    cell_index,
)
from tinygptv.miniature.scenes import make_scene
from tinygptv.miniature.tiny import tiny_config

SIDES = (28, 56)


@pytest.fixture(scope="module")
def pool():
    return ScenePool.draw(3, "crowded", 2, SIDES)


def test_a_pool_says_what_is_in_each_cell(pool):
    assert len(pool) == 2 and sorted(pool.pixels) == list(SIDES)
    for index in range(2):
        scene = make_scene(3, "crowded", index)
        for side in SIDES:
            assert np.array_equal(pool.pixels[side][index], resize_pixels(render(scene), side))
        cells = {cell_index(scene, item): item for item in scene.objects}
        for cell in range(16):
            item = cells.get(cell)
            box = [int(100 * side) for side in item.box] if item else [-100] * 4
            assert pool.boxes[index, cell].tolist() == box
            for name, options in VALUES.items():
                assert pool.values[name][index, cell] == (options.index(getattr(item, name)) if item else -100)


def test_the_number_of_a_cell_counts_rows_first():
    scene = SimpleNamespace(cell_of=lambda item: item)
    assert [cell_index(scene, cell) for cell in ((0, 0), (0, 3), (1, 0), (3, 2))] == [0, 3, 4, 14]


def task_of(pool, **fields):
    task = object.__new__(VisionTask)
    for name, value in ({"train": pool, "held_out": pool, "sides": sorted(pool.pixels)} | fields).items():
        setattr(task, name, value)
    return task


def test_a_mirrored_image_has_mirrored_cells_and_boxes(pool):
    pixels, values, boxes = task_of(pool)._batch(pool, np.array([1, 0, 1]), 28, flip=np.array([False, True, True]))
    for row, scene, flipped in ((0, 1, False), (1, 0, True), (2, 1, True)):
        plain = normalise_pixels(pool.pixels[28][scene])
        assert np.allclose(pixels[row].numpy(), plain[..., ::-1] if flipped else plain)
        for cell in range(16):
            source = cell // 4 * 4 + 3 - cell % 4 if flipped else cell
            assert all(values[name][row, cell] == pool.values[name][scene, source] for name in VALUES)
            x1, y1, x2, y2 = pool.boxes[scene, source]
            empty = x1 == -100
            assert boxes[row, cell].tolist() == (
                [99 - x2, y1, 99 - x1, y2] if flipped and not empty else [x1, y1, x2, y2]
            )
    assert np.array_equal(pool.boxes, ScenePool.draw(3, "crowded", 2, SIDES).boxes), "the pool stays as it is"


def test_a_patch_belongs_to_the_object_whose_box_holds_its_centre(pool):
    """Centres are at 12.5, 37.5, ..; a box of the numbers 12 to 12 reaches from 12 to 13."""
    values = {name: torch.tensor([[2, 0, -100, 1, 1, 1]]) for name in VALUES}
    boxes = torch.tensor(
        [[[0, 0, 49, 24], [60, 60, 99, 99], [-100] * 4, [62, 12, 62, 12], [63, 30, 86, 45], [80, 13, 99, 36]]]
    )
    labels = task_of(pool)._patch_labels(values, boxes, 16)
    assert sorted(labels) == ["colour", "shape", "texture"]
    assert labels["shape"].view(4, 4).tolist() == [[3, 3, 2, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_loss_of_a_box_is_least_at_its_numbers_and_little_beside_them(pool):
    boxes = torch.full((1, 3, 4), -100)
    boxes[0, 1] = torch.tensor([10, 20, 30, 100])

    def loss(shift):
        logits = torch.full((4, NUM_BINS), -20.0)
        for row, number in enumerate((10, 20, 30, 100)):
            logits[row, max(0, number - shift)] = 0.0
        box = lambda features: logits.flatten().expand(len(features), -1)  # noqa: E731
        return float(task_of(pool, module=SimpleNamespace(box=box))._box_loss(torch.zeros(1, 3, 1), boxes))

    losses = [loss(shift) for shift in (0, 1, 2, 50)]
    assert losses == sorted(losses) and losses[0] < 9 < losses[1] < losses[2] < losses[3] <= 20.1
    bell = torch.softmax(-0.5 * ((torch.arange(NUM_BINS) - 10) / 0.7).square(), 0)
    assert losses[0] == pytest.approx(
        20 * (3 * (1 - float(bell[10])) + 1 - float(bell[10] / bell[:11].sum())) / 4, abs=0.1
    )


def test_losses_and_scores_are_those_of_cells_and_patches(pool):
    task = task_of(pool, batch_size=2, seed=0)
    boxes, values = torch.from_numpy(pool.boxes), {name: torch.from_numpy(v) for name, v in pool.values.items()}
    full = boxes[..., 0] != -100

    class Module:
        """Heads that know the answers; features are the numbers of the cells."""

        heads = {}

        def features(self, pixel_values):
            return torch.zeros(2, 5, 1), torch.arange(32.0).view(2, 16, 1)

        def present(self, features):
            return full.flatten()[features.long()].float() * 20 - 10

        def box(self, features):
            known = boxes.view(32, 4)[features.flatten().long()].clamp(min=0)
            known = (known + torch.tensor([0, -1, 1, 0])).clamp(0, 100)
            return nn.functional.one_hot(known, NUM_BINS).float().flatten(1) * 50

    def head(name):
        def logits(features):
            shape = features.shape[:-1]
            labels = values[name].flatten()[features.flatten().long()].clamp(min=0)
            return (nn.functional.one_hot(labels, len(VALUES[name])).float() * 50).view(*shape, -1)

        return logits

    task.module = Module()
    task.module.heads = {name: head(name) for name in VALUES}
    task.module.patch_heads = {n: lambda f, n=n: torch.zeros(2, 4, len(VALUES[n]) + 1) for n in VALUES if n != "size"}
    losses = task._losses(None, values, boxes)
    assert list(losses) == ["present", *VALUES, "box", "patch_shape", "patch_colour", "patch_texture"]
    assert all(losses[name] < 1e-3 for name in ("present", *VALUES))
    assert float(losses["patch_colour"]) == pytest.approx(0.5 * np.log(len(VALUES["colour"]) + 1))
    hits = task._hits(None, values, boxes)
    assert hits == {"present": 1.0, **dict.fromkeys(VALUES, 1.0), "box_error": 0.5}
    assert task.evaluate() == {f"{name}/{side}px": value for side in SIDES for name, value in hits.items()}
    wrong = {name: (labels + 1) % 3 for name, labels in values.items()}
    assert all(value < 0.7 for name, value in task._hits(None, wrong, boxes).items() if name in VALUES)


def test_the_larger_side_takes_half_the_batch_and_a_step_is_always_the_same(pool):
    asked = []
    task = task_of(pool, batch_size=6, seed=1)
    task._batch = lambda *a, flip: asked.append((a[2], a[1].tolist(), flip.tolist())) or ()
    task._losses = lambda: None
    for step in [*range(30), 0]:
        task.losses(step)
    assert {(side, len(chosen), len(flip)) for side, chosen, flip in asked} == {(28, 6, 6), (56, 3, 3)}
    assert asked[0] == asked[-1] != asked[1]
    assert 8 <= sum(side == 56 for side, _, _ in asked[:30]) <= 16, "four of ten"
    flips = [flip for _, _, many in asked for flip in many]
    assert 0.4 < np.mean(flips) < 0.6
    task.sides = [28]
    asked.clear(), task.losses(0)
    assert asked[0][0] == 28


def test_waves_tell_rows_and_columns():
    found = _waves(4, 8)
    assert found.shape == (16, 8)
    x, y = (torch.arange(16) % 4 + 0.5) / 4, (torch.arange(16) // 4 + 0.5) / 4
    rates = torch.pi * torch.tensor([1.0, 8.0])
    expected = [wave(axis[:, None] * rates) for axis in (x, y) for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(found, torch.cat(expected, 1))


def vision_module(**changes):
    torch.manual_seed(0)
    return VisionModule(tiny_config(num_query_tokens=16, lora_rank=0, **changes)).eval()


def test_features_are_those_of_the_models_encoder_at_any_side():
    module = vision_module()
    pixels = {side: torch.randn(2, 3, side, side) for side in SIDES}
    with torch.no_grad():
        found = {side: module.features(given) for side, given in pixels.items()}
        for side, (patches, queries) in found.items():
            module.vision_encoder.set_image_size(side)
            expected = module.vision_encoder(pixels[side])
            torch.testing.assert_close(patches, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(queries, module.qformer(expected), atol=1e-4, rtol=1e-4)
    assert {side: tuple(patches.shape) for side, (patches, _) in found.items()} == {28: (2, 5, 32), 56: (2, 17, 32)}


def test_patches_and_queries_start_with_the_waves_of_where_they_are():
    module = vision_module()
    table = module.vision_encoder.vit.pos_embed.detach()[0]
    torch.testing.assert_close(table[1:], 0.5 * _waves(2, 32))
    torch.testing.assert_close(module.qformer.query_tokens.detach()[0], _waves(4, 24))
    compared = 0
    for layer in module.qformer.encoder.encoder.layer:
        for linear in (layer.attention.attention.query, *cross_attention(layer)):
            diagonal = float(linear.weight.detach().diagonal().mean())
            is_cross = linear in cross_attention(layer)
            assert diagonal == pytest.approx(1.2 if is_cross else 0.0, abs=0.05)
            assert float(linear.weight.detach().fill_diagonal_(0).std()) < (0.015 if is_cross else 0.03)
            compared += is_cross
    assert compared == 2, "the query and the key of the one layer that looks at patches"


def cross_attention(layer):
    return (
        (layer.crossattention.attention.query, layer.crossattention.attention.key) if layer.has_cross_attention else ()
    )


def test_heads_have_a_class_for_each_value_and_patches_one_for_the_ground():
    module = vision_module()
    sizes = {name: head.out_features for name, head in module.heads.items()}
    assert sizes == {name: len(options) for name, options in VALUES.items()}
    patches = {name: head.out_features for name, head in module.patch_heads.items()}
    assert patches == {name: len(VALUES[name]) + 1 for name in ("shape", "colour", "texture")}
    assert {head.in_features for head in module.heads.values()} == {24}
    assert {head.in_features for head in module.patch_heads.values()} == {32}
    assert (module.present.out_features, module.box.out_features) == (1, 4 * NUM_BINS) == (1, 404)


def test_a_task_is_made_of_its_module_two_pools_and_how_it_draws(pool, monkeypatch):
    monkeypatch.setattr(pretrain_vision, "VisionModule", lambda config: ("module", config))
    held_out = ScenePool.draw(4, "validation", 1, (28,))
    task = VisionTask("config", pool, held_out, batch_size=5, seed=7)
    assert (task.module, task.batch_size, task.seed, task.sides) == (("module", "config"), 5, 7, [28, 56])
    assert task.train is pool and task.held_out is held_out
    plain = VisionTask("config", held_out, pool)
    assert (plain.batch_size, plain.seed, plain.sides) == (64, 0, [28])


def test_scores_are_of_all_held_out_scenes_at_every_side(pool):
    asked = []
    task = task_of(pool, sides=[28, 56])
    task.held_out = type("Pool", (), {"__len__": lambda self: 300})()
    task._batch = lambda pool, chosen, side, flip: asked.append((side, chosen.tolist(), flip.any())) or (len(chosen),)
    task._hits = lambda size: {"shape": float(size)}
    assert task.evaluate() == {"shape/28px": 100.0, "shape/56px": 100.0}
    rows = [list(range(0, 128)), list(range(128, 256)), list(range(256, 300))]
    assert asked == [(side, chosen, False) for side in (28, 56) for chosen in rows], "none is mirrored"
