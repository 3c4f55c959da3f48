#!/usr/bin/env python3
"""Download published files by name, with their sizes and hashes checked; interrupted, the same command resumes.

    python jobs/fetch.py what=released output=weights
    python jobs/fetch.py what=start output=weights dry_run=true
    python jobs/fetch.py what=released output=weights local=/mnt/usb offline=true
    python jobs/fetch.py what=sample rows=1000 output=SAMPLE

The names are in docs/weights.md and docs/datasets.md. HF_ENDPOINT or hub= names a mirror of the hub, mirror= a base
address for the other files, HTTPS_PROXY a proxy, HF_TOKEN the token for files that need one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import FetchSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch; the path of result.json is printed last."""
    settings = FetchSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.fetch.run import fetch

        print(fetch(settings)["result"])

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
