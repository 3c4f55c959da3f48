#!/usr/bin/env python3
r"""Shrink a checkpoint to an artifact that is ready to serve.

    python jobs/quantize.py --config configs/mini.yaml checkpoint=outputs/mini/stage4/checkpoint method=cpu \
        output=outputs/mini/artifact
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import QuantizeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the artifact; the path of result.json is printed last."""
    settings = QuantizeSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.export import export

        print(export(settings)["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
