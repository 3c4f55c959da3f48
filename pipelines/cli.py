"""Shared by all entry scripts: quiet libraries, and a user's mistake as one sentence instead of a trace."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipelines.redact import redact

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors of wrong settings, missing folders and damaged files: shown as one sentence. Others show their trace."""

_USER_ERRNOS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""A disk that cannot be written, or no longer, and a name that is too long for it."""


def run_main(work: Callable[[], object]) -> int:
    """Run a job's work.

    Returns:
        The process's exit status: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM (``ray job stop``).
    """
    quiet_libraries()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except Exception as error:
        if os.environ.get("TINYGPTV_TRACE") or not _is_users(error):
            raise
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("Interrupted. Run the same command to resume.", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    return 0


def _is_users(error: Exception) -> bool:
    """Whether the user can fix it: a mistake, or a storage that refuses."""
    if isinstance(error, OSError) and not isinstance(error, USER_ERRORS):
        from pipelines.storage import StorageError

        return isinstance(error, StorageError) or error.errno in _USER_ERRNOS
    return isinstance(error, USER_ERRORS)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


def _stop(*_: object) -> None:
    raise Terminated


def run_command(words: Sequence[str]) -> int:
    """Run another command to its end, and return its exit status.

    A signal that ends this process lets that one end first: jobs close what they hold. Ctrl-C reaches both.
    """
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Terminated):
            process.terminate()
        process.wait()
        raise


def run_stage_main(number: int, argv: Sequence[str] | None, description: str) -> int:
    """Train a stage as its settings say; ``dry_run=true`` or ``--dry-run`` only prints what would be trained.

    Args:
        number: of the stage, 1 to 4.
        argv: words of the command line; None takes the process's own.
        description: what ``--help`` says.
    """
    from pipelines.settings import TrainSettings

    settings = TrainSettings.from_command_line(argv, description)

    def work() -> None:
        from pipelines.training.result import print_result
        from pipelines.training.run import dry_run, run_stage

        if settings.dry_run:
            print(dry_run(settings, number))
        else:
            print_result(run_stage(settings, number))

    return run_main(work)


def quiet_libraries() -> None:
    """Our progress lines are the ones to read: others' progress bars and chatter are switched off."""
    if not _names_the_hub(sys.argv):  # nothing else asks the hub, and libraries shall not on their own
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpx2", "alembic", "bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Each try of MLflow's, with a page of trace where a database is full or locked; its error is told once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _names_the_hub(argv: Sequence[str]) -> bool:
    """Whether a word, or the configuration file, names a repository of the hub."""
    text = ""
    with suppress(OSError):  # the job says so itself
        text = Path(config_of(argv) or os.devnull).read_text("utf-8", "replace")
    return any("hf://" in word for word in (*argv, text))


def config_of(argv: Sequence[str] | None) -> str | None:
    """The configuration file that ``--config FILE`` names, as ``Settings.from_command_line`` reads it; None for none.

    Args:
        argv: words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    config: str | None = parser.parse_known_args(argv)[0].config
    return config
