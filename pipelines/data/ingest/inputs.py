"""Inputs of a shard set: written beside it, and compared before another run with the same output.

The same input and settings continue or are finished already; others are refused with the difference named, because the
set in the folder would be lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipelines import storage
from pipelines.data.ingest.staging import any_exists, content_settings, fingerprint
from pipelines.data.shard_format import FORMAT, MANIFEST
from pipelines.data.sources.base import SourceInput, SourceUnit
from pipelines.redact import redact
from pipelines.settings import PrepareDataSettings, SettingsError

INPUTS = "inputs.json"
STAGING = "_staging"
QUARANTINE = "quarantine.jsonl"

_MOST_MISSING = 1000

FileFacts = tuple[str, int, int]
"""Name, bytes and time of change of an input file."""


@dataclass(frozen=True)
class SetInputs:
    """Input and settings of a shard set.

    Attributes:
        fingerprint: hash of everything that decides what the set holds, but for the images that annotations name.
        units: units of work.
        source: of the rows, as fields of ``SourceInput``; passwords in URIs are left out.
        files: of the input.
        settings: those that decide what the set holds.
        missing: locations of images that were missing, as pairs of ``Location``'s fields; the first ones.
    """

    fingerprint: str
    units: int
    source: dict[str, str]
    files: tuple[FileFacts, ...]
    settings: dict[str, object]
    missing: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, source: SourceInput, units: Sequence[SourceUnit], settings: PrepareDataSettings) -> SetInputs:
        """The inputs of an ingest."""
        mark = hashlib.sha256("".join(fingerprint(unit, settings) for unit in units).encode()).hexdigest()
        files = dict.fromkeys((unit.shard, unit.num_bytes, unit.modified_ns) for unit in units)
        return cls(mark, len(units), redact(asdict(source)), tuple(files), content_settings(settings))

    @classmethod
    def read(cls, output: str) -> SetInputs | None:
        """The inputs of the set in a folder; None where they are not known."""
        try:
            content = json.loads(storage.read_bytes(storage.join(output, INPUTS)))
            files = tuple((str(name), int(size), int(changed)) for name, size, changed in content.pop("files"))
            missing = tuple((str(root), str(path)) for root, path in content.pop("missing"))
            return cls(files=files, missing=missing, **content)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def write(self, output: str, missing: Sequence[tuple[str, str]]) -> None:
        """Write beside the set: from then on it is known from what it was made."""
        known = replace(self, missing=tuple(missing[:_MOST_MISSING]))
        data = json.dumps(asdict(known), indent=1).encode() + b"\n"
        storage.write_atomically(storage.join(output, INPUTS), data)

    def difference(self, now: SetInputs) -> str:
        """Differences from other inputs, in words; empty where nothing does."""
        if self.fingerprint == now.fingerprint:
            return ""
        pairs: list[tuple[str, object, object]] = [
            (key, self.source.get(key), value) for key, value in now.source.items()
        ]
        pairs += [(key, self.settings.get(key), value) for key, value in now.settings.items()]
        for key, before, value in pairs:
            if before != value:
                return f"{key} was {before!r} and is {value!r}"
        names, known = {file[0] for file in now.files}, {file[0] for file in self.files}
        if added := sorted(names - known):
            return f"the input has {len(added)} more files, e.g. {added[0]}"
        if removed := sorted(known - names):
            return f"the input lacks {len(removed)} files, e.g. {removed[0]}"
        if changed := sorted(set(now.files) - set(self.files)):
            return f"the input file {changed[0][0]} was changed"
        return "the input is read in another way by this version"

    def has_new_images(self) -> bool:
        """Whether images that were missing are there now."""
        return any_exists(self.missing)


def check_output(output: str, now: SetInputs, *, replaces_other: bool) -> None:
    """Refuse an output folder that holds other things, or a set that was made from something else.

    Args:
        output: the folder.
        now: what is to be prepared.
        replaces_other: a set that was made from something else may be replaced.

    Raises:
        SettingsError: it is refused.
    """
    names = {*storage.list_names(output), *storage.list_folders(output)}
    names = {name for name in names if name != storage.LOCK and not name.endswith(storage.DRAFT_ENDING)}
    if names and not (names & {INPUTS, STAGING, QUARANTINE}) and not _is_shard_set(output):
        raise SettingsError(
            f"output={output!r} holds other files, e.g. {sorted(names)[0]!r}, and no prepared data: choose an empty or "
            "new folder."
        )
    before = SetInputs.read(output)
    difference = before.difference(now) if before else ""
    if difference and not replaces_other:
        raise SettingsError(
            f"output={output!r} holds data that was prepared from something else: {difference}. Choose another output, "
            "or set overwrite=true to replace it."
        )


def _is_shard_set(output: str) -> bool:
    try:
        content = json.loads(storage.read_bytes(storage.join(output, MANIFEST)))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
