"""Pretrains the miniature's vision encoder and Q-Former: what is where, cell by cell.

The image is a grid of 4 x 4 cells, and query token i is responsible for cell i: from its feature alone, linear heads
must read whether an object has its centre there, and its shape, colour, size, texture and box. Patches get their own
heads for shape, colour and texture. All heads are thrown away: what stays is that the facts are linearly readable.

Notation: B images, P patches, Q query tokens (= cells), F Q-Former width, V vision width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.images import normalise_pixels, resize_pixels
from tinygptv.miniature.draw import render
from tinygptv.miniature.scenes import CELLS, COLOURS, SIZES, TEXTURES, Scene, SceneObject, make_scene
from tinygptv.miniature.shapes import SHAPES
from tinygptv.model.qformer import QFormer
from tinygptv.model.vision_encoder import VisionEncoder, interpolate_position_embedding

NUM_BINS = 101
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
PATCH_VALUES = ("shape", "colour", "texture")
_IGNORE = -100


@dataclass
class ScenePool:
    """Drawn scenes, ready to be batched.

    Attributes:
        pixels: side -> uint8 [N, 3, R, R].
        values: attribute -> int64 [N, Q]; -100 in empty cells.
        boxes: int64 [N, Q, 4] on the 0..100 grid; -100 in empty cells.
    """

    pixels: dict[int, np.ndarray]
    values: dict[str, np.ndarray]
    boxes: np.ndarray

    @classmethod
    def draw(cls, seed: int, split: str, count: int, sides: tuple[int, ...]) -> ScenePool:
        """Draw the first ``count`` scenes of a split at the given sides."""
        scenes = [make_scene(seed, split, i) for i in range(count)]
        pixels = {side: np.empty((count, 3, side, side), dtype=np.uint8) for side in sides}
        for i, scene in enumerate(scenes):
            image = render(scene)
            for side in sides:
                pixels[side][i] = resize_pixels(image, side)
        values = {name: np.full((count, CELLS * CELLS), _IGNORE, dtype=np.int64) for name in VALUES}
        boxes = np.full((count, CELLS * CELLS, 4), _IGNORE, dtype=np.int64)
        for i, scene in enumerate(scenes):
            for item in scene.objects:
                cell = cell_index(scene, item)
                boxes[i, cell] = [int(side * 100) for side in item.box]
                for name, options in VALUES.items():
                    values[name][i, cell] = options.index(getattr(item, name))
        return cls(pixels, values, boxes)

    def __len__(self) -> int:
        return len(self.boxes)


def cell_index(scene: Scene, item: SceneObject) -> int:
    """Cell of an object's centre, row-major."""
    row, column = scene.cell_of(item)
    return row * CELLS + column


class VisionModule(nn.Module):
    """Vision encoder, Q-Former and the heads that are thrown away."""

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__()
        self.vision_encoder = VisionEncoder(config.vision_config)
        self.qformer = QFormer(config.qformer_config, config.num_query_tokens)
        self._start_by_position()
        width, patch_width = config.qformer_config.hidden_size, config.vision_config.hidden_size
        self.present = nn.Linear(width, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(options)) for name, options in VALUES.items()})
        self.box = nn.Linear(width, 4 * NUM_BINS)
        self.patch_heads = nn.ModuleDict({name: nn.Linear(patch_width, len(VALUES[name]) + 1) for name in PATCH_VALUES})

    @torch.no_grad()
    def _start_by_position(self) -> None:
        """Patches start with waves of their position, queries with those of their cell; cross-attention compares the
        two: each query looks at its own cell from the first step, which random starts take thousands of steps to do."""
        grid = self.vision_encoder.vit.patch_embed.grid_size[0]
        width, query_width = self.vision_encoder.config.hidden_size, self.qformer.query_tokens.shape[-1]
        cast(Tensor, self.vision_encoder.vit.pos_embed)[0, 1:] = 0.5 * _waves(grid, width)
        self.qformer.query_tokens[0] = _waves(CELLS, query_width)
        for layer in self.qformer.encoder.encoder.layer:
            if layer.has_cross_attention:
                attention = layer.crossattention.attention
                for linear in (attention.query, attention.key):
                    linear.weight.mul_(0.5).add_(1.2 * torch.eye(*linear.weight.shape))

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features [B, P + 1, V] and query features [B, Q, F] at any side that the patch size divides."""
        vit = self.vision_encoder.vit
        grid = pixel_values.shape[-1] // vit.patch_embed.patch_size[0]
        x = vit.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + interpolate_position_embedding(cast(Tensor, vit.pos_embed), grid)
        for block in vit.blocks:
            x = block(x)
        patch_features = self.vision_encoder.ln_vision(x)
        return patch_features, self.qformer(patch_features)


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of the positions of a grid x grid image: [grid * grid, width]."""
    centres = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    rates = torch.pi * torch.logspace(0, 3, width // 4, base=2)
    return torch.cat([wave(axis.reshape(-1, 1) * rates) for axis in (x, y) for wave in (torch.sin, torch.cos)], dim=1)


class VisionTask:
    """Supervision of every cell and every patch, at two image sides in turn."""

    def __init__(
        self, config: TinyGPTVConfig, train: ScenePool, held_out: ScenePool, *, batch_size: int = 64, seed: int = 0
    ) -> None:
        self.module = VisionModule(config)
        self.train, self.held_out = train, held_out
        self.batch_size, self.seed = batch_size, seed
        self.sides = sorted(train.pixels)

    def losses(self, step: int) -> dict[str, Tensor]:
        """One batch at one of the sides; the larger side takes a smaller batch."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, step))))
        side = self.sides[int(rng.random() < 0.4) if len(self.sides) > 1 else 0]
        size = self.batch_size if side == self.sides[0] else self.batch_size // 2
        chosen = rng.integers(len(self.train), size=size)
        return self._losses(*self._batch(self.train, chosen, side, flip=rng.random(size) < 0.5))

    def _batch(
        self, pool: ScenePool, chosen: np.ndarray, side: int, flip: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Pixels and targets, some mirrored: cells, boxes and pixels change sides together."""
        pixels = pool.pixels[side][chosen].copy()
        boxes = pool.boxes[chosen].copy()
        values = {name: array[chosen].copy() for name, array in pool.values.items()}
        pixels[flip] = pixels[flip][..., ::-1]
        mirrored = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)[:, ::-1].ravel()
        for array in (boxes, *values.values()):
            array[flip] = array[flip][:, mirrored]
        flipped = boxes[flip]
        full = flipped[..., :1] != _IGNORE
        boxes[flip] = np.where(
            full, np.stack([99 - flipped[..., 2], flipped[..., 1], 99 - flipped[..., 0], flipped[..., 3]], -1), _IGNORE
        )
        tensors = {name: torch.from_numpy(array) for name, array in values.items()}
        return torch.from_numpy(normalise_pixels(pixels)), tensors, torch.from_numpy(boxes.clip(min=_IGNORE))

    def _losses(self, pixel_values: Tensor, values: dict[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        patch_features, query_features = self.module.features(pixel_values)
        present = (boxes[..., 0] != _IGNORE).float()
        losses = {
            "present": nn.functional.binary_cross_entropy_with_logits(
                self.module.present(query_features)[..., 0], present
            )
        }
        for name, head in self.module.heads.items():
            losses[name] = _cross_entropy(head(query_features), values[name])
        losses["box"] = self._box_loss(query_features, boxes)
        for name, labels in self._patch_labels(values, boxes, patch_features.shape[1] - 1).items():
            losses[f"patch_{name}"] = 0.5 * _cross_entropy(self.module.patch_heads[name](patch_features[:, 1:]), labels)
        return losses

    def _box_loss(self, query_features: Tensor, boxes: Tensor) -> Tensor:
        """Cross-entropy against a narrow bell around the true bin, so that a near miss costs little."""
        full = boxes[..., 0] != _IGNORE
        logits = self.module.box(query_features[full]).unflatten(-1, (4, NUM_BINS))
        centre = boxes[full].clamp(0, NUM_BINS - 1).unsqueeze(-1)
        distance = torch.arange(NUM_BINS) - centre
        target = torch.softmax(-0.5 * (distance / 0.7).square(), dim=-1)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    def _patch_labels(self, values: dict[str, Tensor], boxes: Tensor, num_patches: int) -> dict[str, Tensor]:
        """Label of each patch: the object whose box holds its centre, 0 for background."""
        grid = round(num_patches**0.5)
        centres = (torch.arange(grid) + 0.5) * 100 / grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
        x1, y1, x2, y2 = (boxes[:, None, :, i] for i in range(4))
        inside = (x1 != _IGNORE) & (x > x1) & (x < x2 + 1) & (y > y1) & (y < y2 + 1)  # [B, P, Q]
        owner, covered = inside.float().argmax(-1), inside.any(-1)
        return {
            name: torch.where(covered, torch.gather(values[name], 1, owner) + 1, 0).clamp(min=0)
            for name in PATCH_VALUES
        }

    def evaluate(self) -> dict[str, float]:
        """Per attribute accuracy over objects, presence accuracy over cells, and mean box error in grid units."""
        scores: dict[str, float] = {}
        for side in self.sides:
            hits: dict[str, list[float]] = {}
            for start in range(0, len(self.held_out), 128):
                chosen = np.arange(start, min(start + 128, len(self.held_out)))
                batch = self._batch(self.held_out, chosen, side, flip=np.zeros(len(chosen), dtype=bool))
                for name, value in self._hits(*batch).items():
                    hits.setdefault(name, []).append(value)
            scores |= {f"{name}/{side}px": float(np.mean(values)) for name, values in hits.items()}
        return scores

    def _hits(self, pixel_values: Tensor, values: dict[str, Tensor], boxes: Tensor) -> dict[str, float]:
        _, query_features = self.module.features(pixel_values)
        full = boxes[..., 0] != _IGNORE
        found = self.module.present(query_features)[..., 0] > 0
        out = {"present": float((found == full).float().mean())}
        for name, head in self.module.heads.items():
            out[name] = float((head(query_features[full]).argmax(-1) == values[name][full]).float().mean())
        predicted = self.module.box(query_features[full]).unflatten(-1, (4, NUM_BINS)).argmax(-1)
        out["box_error"] = float((predicted - boxes[full]).abs().float().mean())
        return out


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORE)
