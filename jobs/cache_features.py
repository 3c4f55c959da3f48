#!/usr/bin/env python3
r"""Compute the frozen vision encoder's and Q-Former's outputs once, and keep them beside the shards.

    python jobs/cache_features.py --config configs/mini.yaml data=data/miniature/shards \
        checkpoint=outputs/miniature/backbones image_size=64
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import CacheFeaturesSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the features of every shard set; the path of result.json is printed last."""
    settings = CacheFeaturesSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.data.features import cache_features

        print(cache_features(settings)["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
