"""Clients of MLflow's servers and databases; an SQLite database is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.files import draft_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


_SLOW_S, _PAUSE_S = 5.0, 60.0
"""An error that took longer is one of a server that hangs, which is left alone for so long."""

_hung: dict[str, tuple[float, str]] = {}
"""Servers that hung, by URI: until when each is left alone, and what its error was."""


def open_client(uri: str) -> MlflowClient:
    """A client of a tracking server or database; a file of SQLite is made where it is missing.

    Each call is one quick try: MLflow itself would ask a server that is away for minutes, and a database that it cannot
    open nine times more, which takes 100 s. The outbox does that, meanwhile.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 1
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists() and not path.startswith(":memory:") and "?" not in path:
        _make_database(Path(path))
    return MlflowClient(tracking_uri=uri)


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Ask a server in this block, unless it let this process wait in vain less than a minute ago.

    A run opens and closes several trackers, of which each would wait as long again.

    Raises:
        ConnectionError: it is left alone, for the reason given.
        PermissionError: it refuses the credentials; with the fix.
    """
    from mlflow.exceptions import MlflowException  # takes seconds, which are not the server's

    until, reason = _hung.get(uri, (0.0, ""))
    began = time.monotonic()
    if began < until:
        raise ConnectionError(reason)
    try:
        yield
    except Exception as error:
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
        if status in (401, 403):
            raise PermissionError(
                f"it refuses this user or password ({status}): MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or MLFLOW_TRACKING_TOKEN, in the environment name one that may write."
            ) from error
        if time.monotonic() - began > _SLOW_S:
            _hung[uri] = (time.monotonic() + _PAUSE_S, str(error))
        raise


def _make_database(path: Path) -> None:
    """Make a database elsewhere, and give it its name when it is whole.

    MLflow makes one in seconds, by many statements. A process that is stopped among them would leave a database that no
    MLflow opens again, and in which no later run is recorded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "mlflow.db")
        _build(f"sqlite:///{made}")
        try:
            shutil.copyfile(made, draft)
            _name(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def _build(uri: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri)  # opens its store at once


def _name(draft: Path, path: Path) -> None:
    """Give a draft its name, unless another process was quicker: its database may hold runs already."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        draft.replace(path)
