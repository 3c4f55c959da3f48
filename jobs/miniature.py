#!/usr/bin/env python3
"""The miniature: draw its world as data sets, pretrain its backbones, or keep trained weights as package data.

    python jobs/miniature.py --config configs/mini.yaml task=draw output=data/miniature
    python jobs/miniature.py --config configs/mini.yaml task=pretrain output=outputs/miniature
    python jobs/miniature.py task=ship backbones=outputs/miniature/backbones stages=outputs/demo

Interrupted, pretraining resumes from its last training state, at most a minute back.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import MiniatureSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Do the task; the path of result.json is printed last."""
    settings = MiniatureSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.miniature.jobs import run_miniature

        print(run_miniature(settings)["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
