#!/usr/bin/env python3
"""Answer a file of requests without a server; the same command continues after an interruption.

python jobs/batch.py artifact=outputs/demo/artifact input=requests.jsonl output=outputs/batch

A line is a request of OpenAI's batch API for /v1/chat/completions or /v1/responses, or the body of a chat request
alone; images may be paths, relative to the file:

{"custom_id": "1", "body": {"task": "refer", "messages": [{"role": "user", "content": [
    {"type": "text", "text": "the red star"}, {"type": "image_url", "image_url": "photo.jpg"}]}]}}
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import run_main
from pipelines.settings import BatchSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``answers.jsonl``; the path of result.json is printed last."""
    settings = BatchSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.serving.batch import run_batch

        result = run_batch(settings)
        print(f"{result.answered} of {result.requests} requests answered, {result.failed} failed: {result.answers}")
        print(result.result)

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
