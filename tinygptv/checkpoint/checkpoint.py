"""Checkpoint folders: written whole or not at all, verified when read.

A checkpoint is a transformers folder (safetensors, config.json, tokenizer, processor) plus

* ``stage.json``     which recipe, stage and step made it, from what;
* ``manifest.json``  name, size and SHA-256 of every other file. It is written last: a folder without it, or whose files
  do not match it, is not a checkpoint.

A *training state* is the same kind of folder with only what trains: tensors, optimizer, random state, position.
See docs/checkpoint_format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

MANIFEST = "manifest.json"
STAGE_FILE = "stage.json"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A folder is no usable checkpoint; the message says which file and why."""


def write_folder(folder: str | Path, fill: Callable[[Path], None]) -> Path:
    """Write a folder so that it is either complete or absent.

    Args:
        folder: final place; an existing one is replaced only after the new one is complete.
        fill: writes the files into the folder it is given.

    Returns:
        The final place.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir()
    try:
        fill(staging)
        write_manifest(staging)
        old = None
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
            folder.rename(old)
        staging.rename(folder)
        _sync(folder.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder into ``manifest.json``, itself written atomically."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as stream:
        json.dump({"format_version": FORMAT_VERSION, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(folder / MANIFEST)
    _sync(folder)


def verify_folder(folder: str | Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check a folder against its manifest.

    Args:
        folder: the folder.
        hashes: also compare SHA-256, not only presence and size.

    Returns:
        The manifest.

    Raises:
        CheckpointError: there is no folder or manifest, or a file is missing, short, long or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist.")
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never finished, or is no checkpoint of this project."
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        files = manifest["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{manifest_path} is damaged: {error}.") from error
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists.")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; its manifest says {facts['bytes']}.")
        if hashes and hash_file(path) != facts["sha256"]:
            raise CheckpointError(f"{path} does not match the hash in its manifest: the file is corrupted.")
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- whole models


def save_checkpoint(
    folder: str | Path,
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    stage: dict[str, Any],
) -> Path:
    """Write a whole model with its processor.

    Args:
        folder: final place.
        model: the model; its LoRA adapters stay adapters.
        processor: tokenizer, image processor, template.
        stage: what made it (recipe, stage, step, init_from, ...), for ``stage.json``.
    """

    def fill(staging: Path) -> None:
        model.config.template = processor.template
        processor.set_end_symbol(model.generation_config)
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / STAGE_FILE).write_text(json.dumps(stage, indent=1))
        from tinygptv.checkpoint.model_card import model_card

        (staging / "README.md").write_text(model_card(model, stage))

    return write_folder(folder, fill)


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype | str = "auto", *, verify: bool = True, **kwargs: Any
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor, dict[str, Any]]:
    """Read a whole model.

    Args:
        folder: checkpoint folder.
        dtype: dtype of the matrices; ``auto`` keeps the stored one.
        verify: check sizes and hashes first.
        kwargs: passed to ``from_pretrained`` (``attn_implementation``, ``device_map``, ...).

    Returns:
        Model (evaluation mode), processor, and what ``stage.json`` says (empty where there is none).

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """
    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

    folder = Path(folder)
    verify_folder(folder, hashes=verify)
    model = TinyGPTVForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs)
    processor = TinyGPTVProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor, read_stage(folder)


def read_stage(folder: str | Path) -> dict[str, Any]:
    """``stage.json`` of a checkpoint folder; empty where there is none."""
    path = Path(folder) / STAGE_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


# ---------------------------------------------------------------------- training states


def save_training_state(folder: str | Path, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> Path:
    """Write what a stage needs to go on.

    Args:
        folder: final place.
        tensors: trainable parameters and optimizer moments, by name.
        extra: JSON-able rest (step, learning-rate position, scaler, random state).
    """
    from safetensors.torch import save_file

    def fill(staging: Path) -> None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staging / "state.safetensors",
        )
        (staging / "state.json").write_text(json.dumps(extra))

    return write_folder(folder, fill)


def load_training_state(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``save_training_state`` wrote, after checking its hashes.

    Raises:
        CheckpointError: the folder is incomplete or corrupted.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    verify_folder(folder)
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
