"""Cached features or images encoded in each step: which costs less, for each stage of a recipe.

Caching encodes every row of a stage's data once and keeps ``queries x width`` numbers of each on the disk. Encoding
inline encodes every sample that is drawn. Stages that read the same data at the same size share a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from tinygptv.training.stages import Stage

QUERY_NUMBERS = 32 * 768
"""Of one image: query tokens x width of the Q-Former."""
BYTES_PER_NUMBER = {"float16": 2, "float32": 4}
ENCODER_FLOP = {224: 0.52e12, 448: 2.3e12}
"""Of one image: EVA ViT-g and the Q-Former, two operations per multiplication; counted from the sizes."""
FREE_SHARE = 0.9
"""Part of the free disk that a cache may take."""

Choice = Literal["cached", "inline"]


@dataclass(frozen=True)
class FeaturePlan:
    """What one group of stages does, and what both ways cost.

    Attributes:
        stages: their numbers.
        image_size: side in pixels.
        sources: the data sets that they draw from.
        choice: cached or inline.
        rows: images that a cache holds.
        draws: images that are encoded inline.
        bytes: of the cache.
        hours_cached: to fill the cache.
        hours_inline: to encode while training.
        reason: why, for people.
    """

    stages: tuple[int, ...]
    image_size: int
    sources: tuple[str, ...]
    choice: Choice
    rows: int
    draws: int
    bytes: int
    hours_cached: float
    hours_inline: float
    reason: str

    def __str__(self) -> str:
        numbers = " and ".join(str(number) for number in self.stages)
        return (
            f"Stage {numbers} ({self.image_size} px): {self.choice}, because {self.reason}. Cached: {self.rows:,} "
            f"images, {self.hours_cached:.1f} h, {self.bytes / 1e9:.0f} GB; inline: {self.draws:,} images, "
            f"{self.hours_inline:.1f} h."
        )


def plan_features(
    stages: Sequence[Stage],
    rows: Mapping[str, int],
    free_bytes: int,
    *,
    max_steps: int = 0,
    dtype: str = "float16",
    tflops: float = 40.0,
    wanted: str = "auto",
) -> list[FeaturePlan]:
    """Choose for each group of stages with the same data and size.

    Args:
        stages: of a recipe, in order.
        rows: source -> rows of its data.
        free_bytes: of the disk that a cache would be on; what is chosen is taken off for the groups after it.
        max_steps: most steps of a stage; 0 is the stage's own number.
        dtype: of stored features.
        tflops: what the encoder reaches on this machine, in 10^12 operations per second.
        wanted: ``cached`` or ``inline`` for all; ``auto`` compares.
    """
    plans = []
    for (size, sources), alike in groupby(stages, key=lambda stage: (stage.image_size, source_names(stage))):
        group = list(alike)
        images = sum(rows[source] for source in sources)
        draws = round(sum(expected_draws(stage, max_steps) for stage in group))
        num_bytes = images * QUERY_NUMBERS * BYTES_PER_NUMBER[dtype]
        hours = ENCODER_FLOP.get(size, ENCODER_FLOP[448] * (size / 448) ** 2) / (tflops * 1e12) / 3600
        choice, reason = _choose(images, draws, num_bytes, free_bytes, wanted)
        free_bytes -= num_bytes if choice == "cached" else 0
        numbers = tuple(stage.number for stage in group)
        plans.append(
            FeaturePlan(numbers, size, sources, choice, images, draws, num_bytes, images * hours, draws * hours, reason)
        )
    return plans


def source_names(stage: Stage) -> tuple[str, ...]:
    """The data sets of a stage, sorted."""
    return tuple(sorted(source.name for source in stage.sources))


def expected_draws(stage: Stage, max_steps: int = 0) -> float:
    """Samples that a stage is expected to draw."""
    steps = min(stage.schedule.num_steps, max_steps or stage.schedule.num_steps)
    weights = sum(source.weight for source in stage.sources)
    per_draw = sum(source.weight * source.batch_size for source in stage.sources) / weights
    return steps * stage.draws_per_step * per_draw


def _choose(images: int, draws: int, num_bytes: int, free_bytes: int, wanted: str) -> tuple[Choice, str]:
    if wanted != "auto":
        return ("cached" if wanted == "cached" else "inline"), "the settings say so"
    if images >= draws:
        return "inline", "it draws fewer images than there are"
    if num_bytes > FREE_SHARE * free_bytes:
        return "inline", f"the disk has {free_bytes / 1e9:.0f} GB free"
    return "cached", "it draws images several times"
