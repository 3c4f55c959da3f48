"""Checkpoint folders: written whole or not at all, verified when read.

A checkpoint is a transformers folder (safetensors, config.json, tokenizer, processor) plus

* ``stage.json``     which recipe, stage and step made it, from what;
* ``manifest.json``  name, size and SHA-256 of every other file (``folders``).

A *training state* is the same kind of folder with only what trains: tensors, optimizer, random state, position.
See docs/checkpoint_format.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tinygptv.checkpoint.folders import read_object, verify_folder, write_folder
from tinygptv.checkpoint.stage_record import STAGE_FILE, StageRecord
from tinygptv.json_object import JsonObject

if TYPE_CHECKING:
    import torch

    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

# ---------------------------------------------------------------------- whole models


def save_checkpoint(
    folder: str | Path,
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    stage: StageRecord,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a whole model with its processor.

    Args:
        folder: final path.
        model: the model; its LoRA adapters stay adapters.
        processor: tokenizer, image processor, template.
        stage: what made it, for ``stage.json``.
        stored: name -> values that are written for the model's own (``unrounded_encoder``).
    """

    def fill(staging: Path) -> None:
        model.config.template = processor.template
        processor.set_end_symbol(model.generation_config)
        model.save_pretrained(staging, state_dict={**model.state_dict(), **stored} if stored else None)
        processor.save_pretrained(staging)
        (staging / STAGE_FILE).write_text(json.dumps(stage, indent=1))
        from tinygptv.checkpoint.model_card import model_card

        (staging / "README.md").write_text(model_card(model, stage))

    return write_folder(folder, fill)


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype | str = "auto", *, verify: bool = True, **kwargs: Any
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor, StageRecord]:
    """Read a whole model, strictly (``load_model``).

    Args:
        folder: checkpoint folder.
        dtype: dtype of the matrices; ``auto`` keeps the stored one.
        verify: compare hashes, not only sizes.
        kwargs: passed to ``from_pretrained`` (``attn_implementation``, ``device_map``, ...).

    Returns:
        Model (evaluation mode), processor, and the content of ``stage.json`` (empty where there is none).

    Raises:
        CheckpointError: the folder is no complete checkpoint, is damaged, or holds another kind of model.
    """
    from tinygptv.checkpoint.load_model import load_model

    folder = Path(folder)
    verify_folder(folder, hashes=verify)
    model, processor = load_model(folder, dtype, **kwargs)
    return model, processor, read_stage(folder)


def read_stage(folder: str | Path) -> StageRecord:
    """``stage.json`` of a checkpoint folder; empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder) / STAGE_FILE
    return cast(StageRecord, read_object(path)) if path.is_file() else {}


# ---------------------------------------------------------------------- training states


def save_training_state(folder: str | Path, tensors: dict[str, torch.Tensor], extra: Mapping[str, object]) -> Path:
    """Write what a stage resumes from.

    Args:
        folder: final path.
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


def load_training_state(folder: str | Path) -> tuple[dict[str, torch.Tensor], JsonObject]:
    """Read what ``save_training_state`` wrote, after checking its hashes.

    Raises:
        CheckpointError: the folder is incomplete or corrupted.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    verify_folder(folder)
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
