#!/usr/bin/env python3
"""The ablation matrix: which norm, and whether LoRA, in which stage (the shape of the paper's Table 3).

    python jobs/ablate.py --config configs/mini.yaml data=data/miniature/shards init_from=outputs/miniature/backbones \
        output=outputs/mini/ablation
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.main import run_main
from pipelines.settings import AblateSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run all variants, print the table, and the path of result.json last."""
    settings = AblateSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.ablate import ablate

        result = ablate(settings)
        print(result["table"])
        print(result["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
