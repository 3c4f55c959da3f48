#!/usr/bin/env python3
r"""The ablation matrix: which norm, and whether LoRA, in which stage (the shape of the paper's Table 3).

    python jobs/ablate.py --config configs/mini.yaml output=outputs/ablation
    python jobs/ablate.py --config configs/mini.yaml variants='[full, no_qk_norm, "stage.lora_rank=4"]' \
        stages='[1, 2]' data=data/shards init_from=outputs/backbones benchmark_data=data/world output=outputs/ablation
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import AblateSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run all variants, print the table, and the path of result.json last; a variant that failed ends it with 2."""
    settings = AblateSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.ablation.run import ablate

        result = ablate(settings)
        print(result["text"])
        print(f"report: {result['report']}\npage: {result['page']}")
        print(result["result"])
        rows = result["rows"]
        failed = [row["variant"] for row in rows if any(o["status"] == "failed" for o in row["stages"].values())]
        if failed:
            names = ", ".join(failed)
            raise ValueError(
                f"{len(failed)} of {len(rows)} variants failed ({names}): the same command tries them again."
            )

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
