"""The identity of a tracked run, kept in the output folder: the same command continues the same run."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipelines.json_files import read_json_object, write_json

RUN_FILE = "run.json"


def _new_key() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class RunIdentity:
    """Identifiers that find a run again.

    Attributes:
        run_id: of the tracking service; empty while it has not answered.
        key: tag of the run, by which it is found where the id is not known.
        parent: id of the run that it is nested under; empty for none.
    """

    run_id: str = ""
    key: str = field(default_factory=_new_key)
    parent: str = ""


def read_identity(folder: Path) -> RunIdentity | None:
    """The run that an output folder belongs to; None where it has none, or its file is damaged."""
    known = read_json_object(folder / RUN_FILE)
    if known is None:
        return None
    return RunIdentity(**{name: str(known[name]) for name in ("run_id", "key", "parent") if name in known})


def write_identity(folder: Path, identity: RunIdentity) -> None:
    """Keep the run of an output folder."""
    write_json(folder / RUN_FILE, asdict(identity))
