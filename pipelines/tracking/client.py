"""Clients of MLflow's servers and databases; an SQLite database is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage.files import draft_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


def open_client(uri: str) -> MlflowClient:
    """A client of a tracking server or database; a file of SQLite is made where it is missing.

    MLflow would ask a database that it cannot open nine times more, which takes 100 s: the outbox does that, meanwhile.
    """
    from mlflow import MlflowClient
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 1
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists() and not path.startswith(":memory:") and "?" not in path:
        _make_database(Path(path))
    return MlflowClient(tracking_uri=uri)


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
