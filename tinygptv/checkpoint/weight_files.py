"""Reads foreign weight files lazily: .pth, .bin, .safetensors, sharded folders. Independent of the model.

At most one tensor is held at a time: each read maps the file again, so that the pages of earlier reads are given back.
Pickles are checked opcode by opcode and read with ``weights_only``: a file can neither run code nor use up memory.
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinygptv.checkpoint.file_kinds import missing_bytes, wrong_kind
from tinygptv.checkpoint.pickle_check import PickleError, check_pickle

_WRAPPERS = ("model", "state_dict", "module")
_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.bin")
_FORBIDDEN = ("builtins.bytearray", "__builtin__.bytearray")
"""The one thing beside tensors that torch would make of any size that a pickle names."""
_MAPPED_BYTES = 2**26
"""So many bytes of a mapped file are read before it is mapped again: what was read leaves the memory of the process."""
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk.

    Attributes:
        file: where it comes from.
        key: its name there.
        shape: its dimensions.
        load: reads it.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def open_weights(path: str | Path) -> dict[str, LazyTensor]:
    """List the tensors of a file or folder without reading them.

    Args:
        path: a weight file, or a folder that holds one (or a sharded set with its index).

    Returns:
        Key -> lazy tensor; wrapper dictionaries (``model``, ``state_dict``) are opened, ``module.`` prefixes kept.

    Raises:
        WeightFileError: missing, empty, truncated, or not a file of tensors.
    """
    path = Path(path)
    tensors: dict[str, LazyTensor] = {}
    for file in _files(path):
        if kind := wrong_kind(file):
            raise WeightFileError(f"{file} is {kind}.")
        opener = _open_safetensors if file.suffix == ".safetensors" else _open_torch
        for tensor in opener(file):
            if tensor.key in tensors:
                raise WeightFileError(
                    f"{tensor.key} is in both {tensors[tensor.key].file} and {file}: keep one of them."
                )
            tensors[tensor.key] = tensor
    if not tensors:
        raise WeightFileError(f"{path} holds no tensors.")
    return tensors


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise WeightFileError(f"{path} does not exist.")
    if path.is_file() and path.name.endswith(".index.json"):
        return _indexed_files(path)
    if path.is_file():
        return [path]
    for index in sorted(path.glob("*.index.json")):
        return _indexed_files(index)
    for pattern in _PATTERNS:
        found = [f for f in sorted(path.glob(pattern)) if not f.name.startswith(_NOT_WEIGHTS)]
        if found:
            return found
    raise WeightFileError(f"{path} holds no weight file; looked for {', '.join(_PATTERNS)} and an index.json.")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WeightFileError(f"{index} is no index of weight shards: {error}.") from error
    files = [index.parent / Path(name).name for name in names]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise WeightFileError(f"{index} names shards that are missing: {', '.join(missing)}.")
    return files


def _open_safetensors(file: Path) -> Iterator[LazyTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        missing = missing_bytes(file)
        reason = f"it is cut off ({missing}): download it again" if missing else str(error)
        raise WeightFileError(f"{file} is no complete safetensors file: {reason}.") from error

    def load(key: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)

    for key, shape in shapes.items():
        yield LazyTensor(file, key, shape, partial(load, key))


def _open_torch(file: Path) -> Iterator[LazyTensor]:
    mapped = zipfile.is_zipfile(file)  # the format before torch 1.6 is no zip file, and cannot be mapped
    try:
        _check_zip(file) if mapped else _check_old_format(file)
    except (ValueError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:  # all of zipfile's
        raise WeightFileError(
            f"{file} is damaged or no file of tensors, and was not opened further: {error}"
        ) from error
    content = _unwrap(_load_torch(file, mapped), file)
    load = _MappedFile(file, content).tensor if mapped else content.__getitem__
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield LazyTensor(file, str(key), tuple(value.shape), partial(load, key))


class _MappedFile:
    """A torch file whose tensors are read from a mapping."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file = file
        self._content: Mapping[str, Any] | None = content
        self._bytes_read = 0

    def tensor(self, key: str) -> Tensor:
        """Copy one tensor out of the mapping."""
        if self._content is None:
            self._content = _unwrap(_load_torch(self._file, mapped=True), self._file)
        tensor: Tensor = self._content[key].clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            self._content, self._bytes_read = None, 0
        return tensor


def _check_zip(file: Path) -> None:
    """Check the pickle inside a torch file, that no entry unpacks to more than the file holds, and all entries' bytes.

    torch itself compares no checksums when it reads. (One pass over a file: 0.6 s per GB, measured.)
    """
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise PickleError("its entries unpack to more than the file.")
        if not any(entry.CRC for entry in archive.infolist()):
            for entry in archive.infolist():
                del entry.CRC  # zipfile then compares none; torch can be told to write none
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        if not pickles:
            raise PickleError("it is a zip archive without data.pkl.")
        for entry in pickles:
            check_pickle(archive.read(entry), forbidden=_FORBIDDEN)
        if changed := archive.testzip():
            raise PickleError(f"the bytes of {changed} are not the ones that were written (CRC-32): copy it again.")


def _check_old_format(file: Path) -> None:
    """Check the pickles at the start of a file of torch before 1.6: magic number, protocol, system, content, keys."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not data[:2] == b"\x80\x02":
            raise PickleError("it begins like no torch file.")
        position = 0
        for _ in range(5):
            position = check_pickle(data, position, forbidden=_FORBIDDEN)


def _load_torch(file: Path, mapped: bool) -> Any:
    size = file.stat().st_size
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightFileError(
            f"{file} is no file of tensors alone, or is damaged; it was not opened further, because a pickle can run "
            f"code ({_reason(error)})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise WeightFileError(f"{file} ({size} bytes) is truncated or no torch file: {_first_line(error)}") from error


def _reason(error: Exception) -> str:
    """Names that a refused pickle asked for, without torch's advice to read it unsafely."""
    found = re.search(r"(?:global|class|function)\S* (?:GLOBAL )?([\w.]+)", str(error))
    return f"it refers to {found[1]}" if found else "it holds more than tensors"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unwrap(content: Any, file: Path) -> Mapping[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightFileError(f"{file} holds a {type(content).__name__}; expected a dictionary of tensors.")
    return content
