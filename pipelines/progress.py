"""Progress that people can read: a live line in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StepProgress:
    """One line: step, loss, learning rate, samples per second, share of time waited for data, time left."""

    def __init__(self, title: str, start: int, stop: int, *, quiet: bool = False, log_every_s: float = 10.0) -> None:
        """Begin.

        Args:
            title: what runs.
            start: first step.
            stop: one past the last step.
            quiet: print nothing.
            log_every_s: seconds between lines where the output is no terminal.
        """
        self.title, self.start, self.stop, self.quiet = title, start, stop, quiet
        self.live = sys.stderr.isatty()
        self.log_every_s = log_every_s
        self.began = time.perf_counter()
        self.printed = 0.0

    def update(self, done: int, loss: float, learning_rate: float, samples_per_second: float, wait_share: float) -> None:
        """Show where the stage stands.

        Args:
            done: steps done.
            loss: of the last step.
            learning_rate: of the last step.
            samples_per_second: over the last few steps.
            wait_share: 0..1, time spent waiting for data.
        """
        now = time.perf_counter()
        due = self.live or now - self.printed >= self.log_every_s or done == self.stop
        if self.quiet or not due:
            return
        self.printed = now
        left = (now - self.began) / max(done - self.start, 1) * (self.stop - done)
        line = (
            f"{self.title}: step {done}/{self.stop}  loss {loss:.3f}  lr {learning_rate:.2e}  "
            f"{samples_per_second:.1f} samples/s  data wait {wait_share:.0%}  left {format_seconds(left)}"
        )
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self.live and not self.quiet:
            print(file=sys.stderr)


class Bar:
    """Counts towards a total: a live bar in a terminal, a line now and then in a log file."""

    def __init__(self, title: str, *, quiet: bool = False, log_every_s: float = 10.0) -> None:
        self.title, self.quiet, self.log_every_s = title, quiet, log_every_s
        self.live = sys.stderr.isatty()
        self.began = time.perf_counter()
        self.printed = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live and not self.quiet and self.printed:
            print(file=sys.stderr)

    def update(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        now = time.perf_counter()
        if self.quiet or not (self.live or now - self.printed >= self.log_every_s or done >= total):
            return
        self.printed = now
        share = done / total if total else 1.0
        filled = "#" * round(30 * share)
        left = (now - self.began) / max(done, 1) * (total - done)
        line = f"{self.title} [{filled:.<30}] {done}/{total}  left {format_seconds(left)}"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)
