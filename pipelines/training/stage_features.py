"""Cached query features for several stages: one pass of the frozen encoder per image size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from pipelines.data.features import cache_features
from pipelines.settings import CacheFeaturesSettings
from tinygptv.training.stages import Stage


def cache_stage_features(stages: Sequence[Stage], make_settings: Callable[..., CacheFeaturesSettings]) -> None:
    """Compute the features that stages read, for each image size once; finished parts are kept.

    Args:
        stages: what will be trained.
        make_settings: settings of one pass from ``image_size`` and ``sources``.
    """
    by_size = sorted(stages, key=lambda stage: stage.image_size)
    for image_size, alike in groupby(by_size, key=lambda stage: stage.image_size):
        sources = sorted({source.name for stage in alike for source in stage.sources})
        cache_features(make_settings(image_size=image_size, sources=sources))
