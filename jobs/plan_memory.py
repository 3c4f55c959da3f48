#!/usr/bin/env python3
"""Will it fit? Memory per stage and for inference, counted from the configuration; no GPU is touched.

python jobs/plan_memory.py --config configs/paper.yaml gpu=24GB
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import PlanMemorySettings


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the path of result.json is printed last."""
    settings = PlanMemorySettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.training.memory_plan import plan_memory

        plan = plan_memory(settings)
        print(plan["table"], plan["result"], sep="\n")

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
