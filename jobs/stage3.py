#!/usr/bin/env python3
"""Stage 3: human-like learning on detailed descriptions.

    python jobs/stage3.py --config configs/mini.yaml data=data/miniature/shards init_from=outputs/mini/stage2/checkpoint
    ray job submit --working-dir . -- python jobs/stage3.py --config configs/mini.yaml data=... init_from=... output=...

Interrupted, the same command resumes from the last training state. The last line printed is the path of result.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_stage_main


def main(argv: Sequence[str] | None = None) -> int:
    """Train the stage that the settings describe."""
    return run_stage_main(3, argv, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
