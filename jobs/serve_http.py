#!/usr/bin/env python3
"""Serve a checkpoint or artifact over HTTP until Ctrl-C, in OpenAI's shape, with a web page.

python jobs/serve_http.py artifact=outputs/stage4/checkpoint host=127.0.0.1 port=8000
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import ServeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Start, print the address, wait."""
    settings = ServeSettings.from_command_line(argv, "Serve a model over HTTP.")
    return run_main(lambda: serve(settings))


def serve(settings: ServeSettings) -> None:
    """Serve until a signal comes."""
    replicas = "1 replica" if settings.num_replicas == 1 else f"{settings.num_replicas} replicas"
    print(f"Starting Ray and {replicas} of the model (about 20 s) ...", flush=True)
    from pipelines.serving.run import serving  # Ray takes seconds to import

    stop = threading.Event()
    with serving(settings) as address:
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets handlers of its own when it starts
            signal.signal(number, lambda *_: stop.set())
        print(f"TinyGPT-V is ready: {address} (web page), {address}/v1 (API). Ctrl-C stops it.", flush=True)
        stop.wait()
        print("Stopping ...", flush=True)


if __name__ == "__main__":
    sys.exit(main())
