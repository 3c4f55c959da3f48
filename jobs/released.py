#!/usr/bin/env python3
"""Ask the released TinyGPT-V: fetch its files, convert and quantize them for this machine, and serve them.

    python jobs/released.py device=auto
    python jobs/released.py device=cpu output=outputs/released server.port=8080
    python jobs/released.py serve=false fetch.local=[/mnt/usb] fetch.offline=true

The plan is printed before anything is downloaded (8.6 GB). Interrupted, the same command resumes; finished, it goes
straight to the server.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import ReleasedSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Do all of it; the path of result.json is printed before the server starts."""
    settings = ReleasedSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.released import run_released, serve_settings
        from pipelines.serving.foreground import serve_until_stopped

        result = run_released(settings)
        print(result["result"], flush=True)
        if settings.serve:
            serve_until_stopped(serve_settings(settings, result))

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
