"""Progress that people can read: a live line in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipelines import storage

_POLL_S = 0.5
_POLL_REMOTE_S = 5.0


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


PROGRESS_FILE = "progress.txt"
"""Where a training worker writes its newest line, in the output folder."""


class StepProgress:
    """One line: step, loss, learning rate, samples per second, share of time spent waiting for data, time left."""

    def __init__(self, title: str, start: int, stop: int) -> None:
        """Begin.

        Args:
            title: what runs.
            start: first step.
            stop: one past the last step.
        """
        self.title, self.start, self.stop = title, start, stop
        self.began = time.perf_counter()

    def line(self, done: int, loss: float, learning_rate: float, samples_per_second: float, wait_share: float) -> str:
        """The progress line.

        Args:
            done: steps done.
            loss: of the last step.
            learning_rate: of the last step.
            samples_per_second: over the last few steps.
            wait_share: 0..1, time spent waiting for data.
        """
        left = (time.perf_counter() - self.began) / max(done - self.start, 1) * (self.stop - done)
        return (
            f"{self.title}: step {done}/{self.stop}  loss {loss:.3f}  lr {learning_rate:.2e}  "
            f"{samples_per_second:.1f} samples/s  data wait {wait_share:.0%}  left {format_seconds(left)}"
        )


class Line:
    """Shows a changing line: in place in a terminal, now and then in a log file."""

    def __init__(self, *, quiet: bool = False, log_every_s: float = 10.0) -> None:
        self.quiet, self.log_every_s = quiet, log_every_s
        self.live = sys.stderr.isatty()
        self._printed_at = 0.0
        self._shown = ""

    def show(self, line: str, *, last: bool = False) -> None:
        """Print the line where it is new and due; ``last`` ends it."""
        now = time.perf_counter()
        due = self.live or last or now - self._printed_at >= self.log_every_s
        if self.quiet or not line or not due:
            return
        if line != self._shown:
            text = f"\r\x1b[K{line}" if self.live else f"{line}\n"
            print(text, end="", file=sys.stderr, flush=True)
            self._shown, self._printed_at = line, now
        if last and self.live:
            print(file=sys.stderr)


class Bar:
    """Counts towards a total: a live bar in a terminal, a line now and then in a log file."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title = title
        self._line = Line(quiet=quiet)
        self._text = ""
        self._began = time.perf_counter()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.show(self._text, last=True)

    @property
    def seconds(self) -> float:
        """Since the start; never 0, to divide by."""
        return max(time.perf_counter() - self._began, 1e-6)

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total``, a note, and the time left at the speed so far."""
        share = done / total if total else 1.0
        left = self.seconds / max(done, 1) * (total - done)
        parts = (f"[{'#' * round(30 * share):.<30}] {done}/{total}", note, f"left {format_seconds(left)}")
        self._text = f"{self.title} {'  '.join(filter(None, parts))}"
        self._line.show(self._text)


@contextmanager
def poll(action: Callable[[], None], every_s: float = _POLL_S) -> Iterator[None]:
    """Call ``action`` again and again in a thread while the block runs, and once at its end.

    A storage that fails on the way is asked again at the next call; retries tell of it.
    """
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(every_s):
            with suppress(OSError):
                action()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        action()


@contextmanager
def follow(location: str, *, quiet: bool = False) -> Iterator[None]:
    """Show the line that another process keeps writing to a file, while the block runs.

    Args:
        location: of the file, local or remote; an earlier one is removed.
        quiet: show nothing.
    """
    line = Line(quiet=quiet)
    is_local = storage.is_local(location)
    if is_local or storage.exists(location):
        storage.remove_file(location)

    def read() -> str:
        try:
            return storage.read_bytes(location).decode(errors="replace")
        except OSError:
            return ""

    with poll(lambda: line.show(read()), _POLL_S if is_local else _POLL_REMOTE_S):
        yield
    line.show(read(), last=True)
