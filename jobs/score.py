#!/usr/bin/env python3
r"""Score a checkpoint or artifact on benchmarks.

    python jobs/score.py --config configs/mini.yaml checkpoint=outputs/mini/stage4/checkpoint \
        benchmark=miniature data=data/miniature output=outputs/mini/score
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import ScoreSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print the table, and the path of result.json last."""
    settings = ScoreSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.evaluation.compare import comparison_table
        from pipelines.evaluation.run import evaluate
        from pipelines.evaluation.scoring import score_table

        result = evaluate(settings)
        print(score_table(result["benchmarks"]))
        if "comparison" in result:
            print(f"\ncompared with {settings.compare_with}:\n{comparison_table(result['comparison'])}")
            print(f"before and after: {result['comparison_page']}")
        print(f"page: {result['page']}\n{result['result']}")

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
