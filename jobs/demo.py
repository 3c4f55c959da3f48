#!/usr/bin/env python3
"""The whole pipeline on the miniature: draw, prepare, train four stages, score, quantize, serve, ask.

python jobs/demo.py --config configs/mini.yaml output=outputs/demo
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import config_of, run_main
from pipelines.settings import DemoSettings


def start_line(settings: DemoSettings) -> str:
    """What is said at once, before the libraries are loaded."""
    return (
        f"The demo: ten phases, results in {settings.output or 'outputs/demo'}. It took 580 s on two x86-64 cores. "
        "Interrupted, the same command resumes. Loading the libraries ..."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole pipeline and print the summary; its last line is the path of result.json."""
    settings = DemoSettings.from_command_line(argv, __doc__)

    def work() -> None:
        print(start_line(settings), flush=True)
        from pipelines.miniature.demo import run_demo, summary

        print(summary(run_demo(settings, config_of(argv))))

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
