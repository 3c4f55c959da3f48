"""The identity of a result: which inputs and settings it was made from.

Every job that can resume or be run twice keeps ``fingerprint.json`` in its output folder. The same inputs continue or
return what is there; other inputs are refused with the difference named; ``overwrite=true`` begins again. Paths are no
part of it: moved data and checkpoints with the same content are the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipelines import storage
from pipelines.json_files import read_json_object, to_json, write_json
from pipelines.redact import redact
from pipelines.settings import SettingsError

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "fingerprint.json"

_NAMED_DIFFERENCES = 5
_DIGEST_LENGTH = 12
_CHECKPOINT_NOTES = ("README.md", "stage.json")
"""Files of a checkpoint that say how it was made, not what it computes."""


class OtherInputsError(SettingsError):
    """The output folder holds results of other inputs; the text names the differences."""


@dataclass(frozen=True)
class Fingerprint:
    """Inputs of a result by dotted name; values are what JSON can hold.

    Attributes:
        inputs: for example ``{"job": "train", "seed": 0, "data.laion": "9f31c2...", "stage.lora_rank": 64}``.
    """

    inputs: Mapping[str, Any]

    @classmethod
    def of(cls, job: str, **inputs: Any) -> Self:
        """The inputs of one kind of job, as nested mappings and plain values; passwords of URIs are left out."""
        return cls({"job": job, **dict(sorted(_flatten(json.loads(to_json(redact(inputs))))))})

    def differences(self, earlier: Fingerprint) -> list[str]:
        """Differences from an earlier fingerprint, a short text each: ``seed was 0, is now 7``."""
        texts = []
        for name in dict.fromkeys([*self.inputs, *earlier.inputs]):
            before, now = (_text(each.inputs, name) for each in (earlier, self))
            if before != now:
                texts.append(f"{name} was {before}, is now {now}")
        return texts


def claim(
    output: str | Path,
    fingerprint: Fingerprint,
    results: Iterable[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[str] = (),
) -> bool:
    """Reserve an output folder for results of these inputs.

    Args:
        output: folder or URI; made where it is missing.
        fingerprint: of the results that the job is about to write or continue.
        results: files and folders that the job writes there.
        overwrite: remove the results that an earlier run of the same job left there.
        inputs: paths and URIs that the job reads, which it must not write to.

    Returns:
        Whether the folder held results of the same inputs already.

    Raises:
        OtherInputsError: it holds results of other inputs; or files of these names whose inputs are not recorded, which
            ``overwrite`` does not remove either.
        SettingsError: an input lies in what the job writes.
    """
    output, results = str(output), list(results)
    refuse_inputs([storage.join(output, name) for name in results], inputs)
    location = storage.join(output, FINGERPRINT_FILE)
    known = read_json_object(location)
    if known is not None and known.get("job") != fingerprint.inputs["job"]:
        raise OtherInputsError(f"{output} holds results of another job ({known.get('job')}): give another output=.")
    if known is None:
        _refuse_unknown_results(output, results)
    elif overwrite:
        for name in (*results, FINGERPRINT_FILE):  # last: without it the others could not be removed again
            storage.remove_folder(storage.join(output, name))
            storage.remove_file(storage.join(output, name))
    else:
        refuse_others(output, fingerprint, known)
        return True
    storage.make_folder(output)
    write_json(location, dict(fingerprint.inputs))
    return False


def refuse_others(output: str | Path, fingerprint: Fingerprint, known: Mapping[str, Any]) -> None:
    """Raise where results were made from other inputs.

    Args:
        output: their folder, for the message.
        fingerprint: of what is asked for.
        known: content of the folder's ``fingerprint.json``.

    Raises:
        OtherInputsError: they differ; the text names the differences.
    """
    found = fingerprint.differences(Fingerprint(known))
    if found:
        raise OtherInputsError(
            f"{output} holds results of other inputs: {_sentence(found)}. Give another output=, or overwrite=true to "
            "replace them."
        )


def _refuse_unknown_results(output: str, results: Iterable[str]) -> None:
    """Raise where something stands in the way that this job did not write, or does not know as its own."""
    present = [name for name in results if _holds_something(storage.join(output, name))]
    if present:
        raise OtherInputsError(
            f"{output} holds {present[0]}, but no {FINGERPRINT_FILE} that says what it was made from: give another "
            f"output=, or remove {present[0]}."
        )


def _holds_something(location: str) -> bool:
    """Whether there is a folder, or a file that is not empty."""
    if storage.is_folder(location):
        return True
    return storage.exists(location) and bool(storage.read_bytes(location))


def refuse_inputs(written: Iterable[str], inputs: Iterable[str]) -> None:
    """Raise where a job would write over what it reads.

    Args:
        written: files and folders that it writes.
        inputs: paths and URIs that it reads; empty ones are left out.

    Raises:
        SettingsError: an input is one of the former, or lies in it.
    """
    written = list(written)
    for path in filter(None, inputs):
        for location in written:
            if _is_within(path, location):
                raise SettingsError(f"{path} is an input, and {location} is written by this job: give another output=.")


def _is_within(path: str, folder: str) -> bool:
    """Whether a path or URI is a folder, or lies in it."""
    if storage.is_local(path) != storage.is_local(folder):
        return False
    if storage.is_local(path):
        return Path(storage.absolute(path)).resolve().is_relative_to(Path(storage.absolute(folder)).resolve())
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def checkpoint_digest(folder: str | Path) -> str:
    """Content of a checkpoint or artifact (``manifest_digest``).

    A folder without a manifest is known by the names, sizes and times of its files, which are this machine's.
    """
    if by_manifest := manifest_digest(folder):
        return by_manifest
    stats = [(p.name, p.stat()) for p in sorted(Path(folder).iterdir()) if p.is_file()]
    return digest_of([(name, f"{stat.st_size} {stat.st_mtime_ns}") for name, stat in stats])


def manifest_digest(folder: str | Path) -> str:
    """Content by the hashes in the manifest, notes left out: alike on all machines; empty without a manifest."""
    manifest = read_json_object(Path(folder) / "manifest.json") or {}
    if "files" not in manifest:
        return ""
    return digest_of([(n, f["sha256"]) for n, f in sorted(manifest["files"].items()) if n not in _CHECKPOINT_NOTES])


def digest_of(value: Any) -> str:
    """Short hash of a JSON-able value."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:_DIGEST_LENGTH]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(inputs: Mapping[str, Any], name: str) -> str:
    return json.dumps(inputs[name]) if name in inputs else "absent"


def _sentence(differences: list[str]) -> str:
    left = len(differences) - _NAMED_DIFFERENCES
    return "; ".join(differences[:_NAMED_DIFFERENCES]) + (f"; and {left} more" if left > 0 else "")
