#!/usr/bin/env python3
"""Prepare one data set for training: source files -> checked Arrow shards.

    python jobs/prepare_data.py --config configs/mini.yaml source=laion input='DIR/*.tar' output=DIR
    python jobs/prepare_data.py source=jsonl input=own.jsonl name=own output=DIR

Run the same command again to resume an interrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import PrepareDataSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shard set; the path of result.json is printed last."""
    settings = PrepareDataSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.data.ingest.job import ingest

        print(ingest(settings)["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
