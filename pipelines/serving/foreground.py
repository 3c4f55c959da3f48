"""Serve until a signal comes, as the entry scripts do."""

from __future__ import annotations

import signal
import threading

from pipelines.settings import ServeSettings


def serve_until_stopped(settings: ServeSettings) -> None:
    """Start, print the address, wait for Ctrl-C or SIGTERM, finish the answers in flight, stop what was started."""
    replicas = "1 replica" if settings.num_replicas == 1 else f"{settings.num_replicas} replicas"
    print(f"Starting Ray and {replicas} of the model (about 20 s) ...", flush=True)
    from pipelines.serving.run import finish_answers, serving  # Ray takes seconds to import

    stop = threading.Event()
    with serving(settings) as address:
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets handlers of its own when it starts
            signal.signal(number, lambda *_: stop.set())
        print(f"TinyGPT-V is ready: {address} (web page), {address}/v1 (API). Ctrl-C stops it.", flush=True)
        stop.wait()
        print("Stopping when the answers in flight are finished; Ctrl-C again stops at once ...", flush=True)
        stop.clear()
        finish_answers(settings.request_timeout_s, stop)
