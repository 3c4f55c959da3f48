#!/usr/bin/env python3
"""Serve a checkpoint or artifact over HTTP until Ctrl-C, in OpenAI's shape, with a web page.

python jobs/serve_http.py artifact=outputs/stage4/checkpoint host=127.0.0.1 port=8000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.serving.foreground import serve_until_stopped
from pipelines.settings import ServeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Start, print the address, wait."""
    settings = ServeSettings.from_command_line(argv, __doc__)
    return run_main(lambda: serve_until_stopped(settings))


if __name__ == "__main__":
    sys.exit(main())
